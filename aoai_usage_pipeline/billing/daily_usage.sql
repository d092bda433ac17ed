-- Tokens and cost per payer and deployment: `daily_groups` -> the rows of `daily_usage`.
SELECT {dimensions},
    sum(requests) AS requests, sum(prompt_tokens) AS prompt_tokens, sum(cached_tokens) AS cached_tokens,
    sum(cache_write_tokens) AS cache_write_tokens, sum(completion_tokens) AS completion_tokens, sum(reasoning_tokens) AS reasoning_tokens,
    sum(total_tokens) AS total_tokens, sum(cost) AS cost, currency, pricing_status
FROM daily_groups
GROUP BY ALL
