-- One line per payer, deployment, meter and price: `daily_groups` and `rate_of` -> the rows of `daily_billing`.
WITH metered AS (
    SELECT {dimensions}, context_band, usage_source, m.meter AS meter, sum(m.quantity) AS quantity
    FROM (SELECT *, unnest([{meters}]) AS m FROM daily_groups WHERE usage_source IS NOT NULL)
    WHERE m.quantity > 0
    GROUP BY ALL
)
SELECT {dimensions_of_m}, strftime(m.usage_date, '%Y-%m') AS billing_period, m.meter, sum(m.quantity) AS quantity, r.unit_price, r.unit_tokens,
    r.price_id, CAST(sum(m.quantity) AS DECIMAL(18,0)) * r.token_price AS cost, r.currency, r.pricing_status, m.usage_source,
    CAST(NULL AS VARCHAR) AS charge_class, CAST(NULL AS VARCHAR) AS correction_of
FROM metered AS m LEFT JOIN rate_of AS r ON m.usage_date = r.usage_date AND m.meter = r.meter AND m.model IS NOT DISTINCT FROM r.model
    AND m.model_version IS NOT DISTINCT FROM r.model_version AND m.deployment_sku IS NOT DISTINCT FROM r.deployment_sku
    AND m.region IS NOT DISTINCT FROM r.region AND m.service_tier IS NOT DISTINCT FROM r.service_tier
    AND m.context_band IS NOT DISTINCT FROM r.context_band
GROUP BY {dimensions_of_m}, m.meter, m.usage_source, r.unit_price, r.unit_tokens, r.price_id, r.token_price, r.currency, r.pricing_status
