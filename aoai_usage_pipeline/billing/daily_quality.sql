-- How complete each day is: `events`, `accepted` and `enriched` -> the rows of `daily_quality`.
SELECT usage_date, p.parsed, coalesce(e.accepted, 0) AS accepted, p.parsed - coalesce(e.accepted, 0) AS duplicates,
    coalesce(e.conflicts, 0) AS conflicts, coalesce(e.no_usage, 0) AS no_usage, coalesce(e.unpriced, 0) AS unpriced,
    coalesce(e.unallocated, 0) AS unallocated, 0 AS estimated,
    CASE WHEN e.accepted > 0 THEN CAST(round((e.accepted - e.no_usage) / e.accepted, 6) AS DECIMAL(9,6)) END AS coverage
FROM (SELECT usage_date, count(*) AS parsed FROM events GROUP BY ALL) AS p
LEFT JOIN (
    SELECT usage_date, count(*) AS accepted, count(*) FILTER (conflict) AS conflicts,
        count(*) FILTER (pricing_status = 'no_usage') AS no_usage, count(*) FILTER (pricing_status = 'unpriced') AS unpriced,
        count(*) FILTER (unallocated) AS unallocated
    FROM enriched GROUP BY ALL
) AS e USING (usage_date)
