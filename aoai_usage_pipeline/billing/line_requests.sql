-- The requests of one line of the bill: `enriched` (the day's requests) and `line` (the line, one row of `daily_billing`) -> `of_line`,
-- every request of the line's payer and deployment with what it counts on the line's meter.
CREATE TABLE of_line AS
SELECT * FROM (
    SELECT e.*, CAST({quantity} AS DECIMAL(24,6)) AS quantity
    FROM enriched AS e SEMI JOIN line AS l ON {same_dimensions} AND e.usage_source = l.usage_source
    WHERE {of_image}
)
WHERE quantity <> 0;
