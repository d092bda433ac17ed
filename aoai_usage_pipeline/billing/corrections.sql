-- The lines of some days: `computed` (as they would be today) and `frozen` (as closed months have them) -> `daily_billing`.
-- What a closed month lacks or has too much is a correction in the open month, so that frozen lines and corrections are the computed ones.
WITH due AS (
    SELECT {key}, {sums}, {any_told}
    FROM (
        SELECT {key}, {amounts}, {told} FROM computed WHERE strftime(usage_date, '%Y-%m') IN ({closed})
        UNION ALL
        SELECT {key}, {negated}, {told} FROM frozen
    )
    GROUP BY {key}
    HAVING {differs}
), corrections AS (
    SELECT *, {open} AS billing_period, 'Correction' AS charge_class, strftime(usage_date, '%Y-%m') AS correction_of FROM due
)
SELECT * FROM computed WHERE strftime(usage_date, '%Y-%m') NOT IN ({closed})
UNION ALL BY NAME
SELECT * FROM frozen
UNION ALL BY NAME
SELECT *, {line_id} AS line_id FROM corrections
