"""API Management's `GatewayLlmLogs` from Azure Monitor: the token counts of a call, exact for streamed ones too.

The record knows no subscription and no product: its other half is the `GatewayLogs` record with the same correlation id. Messages above
32 KB are split over several records, of which only the first has counts; all zero means that none were reported.
"""

from aoai_usage_pipeline.usage.contract import Contract

_REPORTED = "coalesce(nullif(nullif(e.prompttokens, '0'), ''), nullif(nullif(e.completiontokens, '0'), '')) IS NOT NULL"


def _count(name: str) -> str:
    return f"CASE WHEN {_REPORTED} THEN e.{name} END"


CONTRACT = Contract(
    name="apim_llm_log",
    markers=('"llm_log"',),
    shape=dict.fromkeys(
        (
            "azure_monitor", "time", "correlationid", "servicename", "resourceid", "deploymentname", "modelname", "prompttokens",
            "completiontokens", "totaltokens", "promptcachedtokens", "completionreasoningtokens",
        ),
        "VARCHAR",
    ),
    matches="e.azure_monitor = 'llm_log'",
    fields={
        "request_id": "e.correlationid",
        "event_time": "e.time",
        "gateway": "lower(coalesce(nullif(e.servicename, ''), regexp_extract(e.resourceid, '[^/]+$')))",
        "deployment": "nullif(e.deploymentname, '')",
        "reported_model": "nullif(e.modelname, '')",
        "part": "'usage'",
    },
    counts={
        "prompt_tokens": _count("prompttokens"),
        "completion_tokens": _count("completiontokens"),
        "total_tokens": _count("totaltokens"),
        "cached_tokens": _count("promptcachedtokens"),
        "reasoning_tokens": _count("completionreasoningtokens"),
    },
)  # fmt: skip
