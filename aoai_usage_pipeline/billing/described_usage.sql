-- Who used which model: `combination` -> `described`.
-- Everything that reference data decides is decided once per distinct combination of an event's attributes.
{match_deployments};
{match_owners};

CREATE TABLE described AS
SELECT c.*,
    coalesce(o.best.team, 'UNALLOCATED') AS team,
    coalesce(o.best.cost_center, 'UNALLOCATED') AS cost_center,
    coalesce(o.best.department, 'UNALLOCATED') AS department,
    nullif(regexp_extract(c.reported_model, '^(.+?)(-(\d{{4}}-\d{{2}}-\d{{2}}|\d{{4}}))?$', 1), '') AS reported_name,
    nullif(regexp_extract(c.reported_model, '^(.+?)(-(\d{{4}}-\d{{2}}-\d{{2}}|\d{{4}}))?$', 3), '') AS reported_version,
    coalesce(d.best.model, reported_name) AS model,
    coalesce(d.best.model_version, CASE WHEN d.best.model IS NULL OR d.best.model = reported_name THEN reported_version END) AS model_version,
    d.best.deployment_sku AS deployment_sku,
    coalesce(d.best.region, c.reported_region) AS region
FROM combination AS c
LEFT JOIN deployment_of AS d ON c.usage_date = d.usage_date AND c.gateway IS NOT DISTINCT FROM d.gateway
    AND c.subscription_id IS NOT DISTINCT FROM d.subscription_id AND c.product IS NOT DISTINCT FROM d.product
    AND c.operation IS NOT DISTINCT FROM d.operation AND c.deployment IS NOT DISTINCT FROM d.deployment
    AND c.reported_model IS NOT DISTINCT FROM d.reported_model
LEFT JOIN owner_of AS o ON c.usage_date = o.usage_date AND c.subscription_id IS NOT DISTINCT FROM o.subscription_id
    AND c.product IS NOT DISTINCT FROM o.product AND c.application IS NOT DISTINCT FROM o.application;
