-- One line per payer, deployment, meter and price: `daily_groups` and `rate_of` -> the rows of `daily_billing`, and `capacity_lines` beside them.
WITH metered AS (
    SELECT {dimensions}, context_band, image_kind, usage_source, m.meter AS meter, CAST(sum(m.quantity) AS DECIMAL(24,6)) AS quantity
    FROM (SELECT *, unnest([{meters}]) AS m FROM daily_groups WHERE usage_source IS NOT NULL)
    WHERE m.quantity > 0
    GROUP BY ALL
), lines AS (
SELECT {dimensions_of_m}, strftime(m.usage_date, '%Y-%m') AS billing_period,
    CASE WHEN m.meter = 'image' THEN concat_ws('/', m.meter, m.image_kind) ELSE m.meter END AS meter,
    sum(m.quantity) AS quantity, r.unit_price, r.unit_tokens, r.price_id, {cost} AS cost, r.currency, r.pricing_status, m.usage_source,
    r.list_unit_price, r.contracted_unit_price, {list_cost} AS list_cost, {contracted_cost} AS contracted_cost, r.pricing_currency, r.exchange_rate,
    CAST(NULL AS VARCHAR) AS charge_class, CAST(NULL AS VARCHAR) AS correction_of
FROM metered AS m LEFT JOIN rate_of AS r ON m.meter = r.meter AND {same_price_key}
GROUP BY {dimensions_of_m}, m.meter, m.image_kind, m.usage_source, r.unit_price, r.unit_tokens, r.price_id, r.token_price, r.list_token_price,
    r.contracted_token_price, r.currency, r.pricing_status, r.list_unit_price, r.contracted_unit_price, r.pricing_currency, r.exchange_rate
UNION ALL BY NAME
FROM capacity_lines
)
SELECT * REPLACE ({line_id} AS line_id) FROM lines
