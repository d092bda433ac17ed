-- The price of every request: `accepted` joined to its combination in `rates` -> `enriched`, one row per request.
CREATE VIEW enriched AS
WITH metered AS (
    SELECT b.* EXCLUDE ({attributes}), r.* EXCLUDE (usage_date), {quantity_columns}
    FROM accepted AS b JOIN rates AS r ON {same_combination}
)
SELECT *,
    CASE WHEN {any_priced} THEN {total_cost} END AS cost,
    CASE WHEN {any_priced} THEN {currency} END AS currency,
    CASE WHEN usage_source IS NULL THEN 'no_usage' WHEN {any_unpriced} THEN 'unpriced' WHEN {any_fallback} THEN 'fallback' ELSE 'priced' END
        AS pricing_status
FROM metered;
