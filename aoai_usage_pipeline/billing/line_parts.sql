-- What each request contributes to a line: `of_line`, `rate_of` and `line` -> `parts`, and `rate`, the price keys whose price is the line's.
CREATE TABLE rate AS
SELECT r.* FROM rate_of AS r SEMI JOIN line AS l ON r.meter = '{meter}' AND {same_price};

CREATE TABLE parts AS
SELECT p.request_id, p.event_time, p.quantity, {cost} AS cost, p.context_band, p.copies, p.conflict,
    p.blob, p.partition_id, p.sequence_number, p."offset", p.record_index
FROM of_line AS p JOIN rate AS r ON {same_price_key};
