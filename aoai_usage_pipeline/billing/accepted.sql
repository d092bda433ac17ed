-- The canonical copy of every request: `events` (raw events of some usage dates) -> `accepted`.
-- `moved` has the requests that were also seen on other usage dates: counts_on, copies, conflict.
-- Only what occurs twice is looked at closely; everything else passes through.
CREATE TABLE repeated AS
SELECT usage_date, request_id, count(*) AS copies FROM events GROUP BY ALL HAVING count(*) > 1;

CREATE TABLE canonical AS
SELECT e.*, r.copies,
    count(DISTINCT CASE WHEN prompt_tokens IS NOT NULL OR completion_tokens IS NOT NULL THEN {usage_values} END)
        OVER (PARTITION BY usage_date, request_id) > 1 AS conflict
FROM events AS e JOIN repeated AS r USING (usage_date, request_id)
QUALIFY row_number() OVER (PARTITION BY usage_date, request_id ORDER BY {canonical_order}) = 1;

CREATE VIEW accepted AS
SELECT e.* REPLACE (coalesce(m.copies, e.copies) AS copies, coalesce(m.conflict, e.conflict) AS conflict),
    CASE WHEN e.prompt_tokens > {long_context_tokens} THEN 'long' ELSE 'short' END AS context_band
FROM (
    SELECT e.*, 1 AS copies, false AS conflict FROM events AS e ANTI JOIN repeated USING (usage_date, request_id)
    UNION ALL BY NAME
    SELECT * FROM canonical
) AS e
LEFT JOIN moved AS m USING (usage_date, request_id)
WHERE m.counts_on IS NULL OR m.counts_on = usage_date;
