-- Requests summed by everything a daily table keeps apart: `enriched` (rows of `enriched_usage`) -> `daily_groups`.
CREATE TABLE daily_groups AS
SELECT {dimensions}, context_band, image_kind, currency, pricing_status, usage_source,
    count(*) AS requests,
    coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
    coalesce(sum(cached_tokens), 0) AS cached_tokens,
    coalesce(sum(cache_write_tokens), 0) AS cache_write_tokens,
    coalesce(sum(completion_tokens), 0) AS completion_tokens,
    coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
    coalesce(sum(total_tokens), 0) AS total_tokens,
    coalesce(sum(audio_prompt_tokens), 0) AS audio_prompt_tokens,
    coalesce(sum(cached_audio_tokens), 0) AS cached_audio_tokens,
    coalesce(sum(image_prompt_tokens), 0) AS image_prompt_tokens,
    coalesce(sum(cached_image_tokens), 0) AS cached_image_tokens,
    coalesce(sum(audio_completion_tokens), 0) AS audio_completion_tokens,
    coalesce(sum(image_completion_tokens), 0) AS image_completion_tokens,
    {instead_of_tokens},
    coalesce(sum(web_search_calls), 0) AS web_search_calls,
    coalesce(sum(file_search_calls), 0) AS file_search_calls,
    coalesce(sum(code_interpreter_sessions), 0) AS code_interpreter_sessions,
    sum(cost) AS cost
FROM enriched
GROUP BY ALL;
