-- How complete a day is: `enriched` (the rows of its `enriched_usage`) and the number of its raw events -> its row of `daily_quality`.
SELECT DATE '{day}' AS usage_date, {parsed} AS parsed, count(*) AS accepted, {parsed} - count(*) AS duplicates,
    count(*) FILTER (conflict) AS conflicts,
    count(*) FILTER (pricing_status = 'no_usage') AS no_usage,
    count(*) FILTER (pricing_status = 'unpriced') AS unpriced,
    count(*) FILTER (cost_center = 'UNALLOCATED') AS unallocated,
    count(*) FILTER (usage_source = 'estimated') AS estimated,
    count(*) FILTER (NOT attributed) AS unattributed,
    CASE WHEN count(*) FILTER ({successful}) > 0
        THEN CAST(round(count(*) FILTER ({successful} AND usage_source = 'reported') / count(*) FILTER ({successful}), 6) AS DECIMAL(9,6)) END AS coverage
FROM {enriched}
