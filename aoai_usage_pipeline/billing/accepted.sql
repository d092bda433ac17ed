-- The canonical copy of every request, completed by its other copies: `events` (raw events of some usage dates) -> `accepted`.
-- `moved` has the requests that were also seen on other usage dates: counts_on, copies, conflict and what all copies say together.
-- Only what occurs twice is looked at closely; everything else passes through.
CREATE TABLE repeated AS
WITH suspects AS (
    SELECT usage_date, hash(request_id) AS request_hash FROM events GROUP BY ALL HAVING count(*) > 1
)
SELECT usage_date, request_id, count(*) AS copies
FROM events AS e SEMI JOIN suspects AS s ON e.usage_date = s.usage_date AND hash(e.request_id) = s.request_hash
GROUP BY ALL HAVING count(*) > 1;

CREATE TABLE canonical AS
WITH ranked AS (
    SELECT e.*, r.copies, row_number() OVER (PARTITION BY usage_date, request_id ORDER BY {canonical_order}) AS rank
    FROM events AS e JOIN repeated AS r USING (usage_date, request_id)
), together AS (
    SELECT usage_date, request_id, {completed}, {conflict} AS conflict FROM ranked GROUP BY ALL
)
SELECT r.* EXCLUDE (rank) REPLACE ({replaced}), t.attributed, t.conflict
FROM ranked AS r JOIN together AS t USING (usage_date, request_id)
WHERE rank = 1;

CREATE VIEW accepted AS
SELECT e.* REPLACE (
        coalesce(m.copies, e.copies) AS copies, coalesce(m.conflict, e.conflict) AS conflict,
        coalesce(e.attributed OR m.attributed, e.attributed) AS attributed, {replaced_by_moved}
    ),
    CASE WHEN e.prompt_tokens > {long_context_tokens} THEN 'long' ELSE 'short' END AS context_band
FROM (
    SELECT e.* REPLACE (coalesce(service_tier, 'default') AS service_tier),
        1 AS copies, part IS DISTINCT FROM 'usage' AS attributed, false AS conflict
    FROM events AS e ANTI JOIN repeated USING (usage_date, request_id)
    UNION ALL BY NAME
    SELECT * REPLACE (coalesce(service_tier, 'default') AS service_tier) FROM canonical
) AS e
LEFT JOIN moved AS m USING (usage_date, request_id)
WHERE m.counts_on IS NULL OR m.counts_on = usage_date;

-- what reference data looks at
CREATE TABLE combination AS
SELECT DISTINCT {combination} FROM accepted;
