-- The prices of every combination: `described` and `rate_of` -> `rates`, with one column per meter, each a struct of its price.
CREATE TABLE rates AS
SELECT d.*, {rate_columns}
FROM described AS d LEFT JOIN rate_of AS r ON {same_price_key}
GROUP BY ALL
