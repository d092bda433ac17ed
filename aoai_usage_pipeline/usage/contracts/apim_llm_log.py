"""API Management's `GatewayLlmLogs` from Azure Monitor: the token counts of a call, exact for streamed ones too.

The record knows no subscription and no product: its other half is the `GatewayLogs` record with the same correlation id. Messages above
32 KB are split over several records, of which only the first has counts; all zero means that none were reported. `estimate` is made of
the messages while the envelope is opened, where they are whole: in one record, or split over records of the same envelope.
"""

from aoai_usage_pipeline.usage.contract import Contract

_REPORTED = "coalesce(nullif(token_count(e.prompttokens), 0), nullif(token_count(e.completiontokens), 0)) IS NOT NULL"


def _count(name: str) -> str:
    return f"CASE WHEN {_REPORTED} THEN e.{name} END"


CONTRACT = Contract(
    name="apim_llm_log",
    markers=('"llm_log"',),
    shape=dict.fromkeys(
        (
            "azure_monitor", "time", "timegenerated", "correlationid", "servicename", "resourceid", "deploymentname", "modelname", "prompttokens",
            "completiontokens", "totaltokens", "promptcachedtokens", "completionreasoningtokens",
        ),
        "VARCHAR",
    ),
    matches="e.azure_monitor = 'llm_log'",
    fields={
        "request_id": "e.correlationid",
        "event_time": "coalesce(e.time, e.timegenerated)",
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
    texts={"estimate": "VARCHAR"},
    estimate="e.estimate",
    ignores=("apiversion", "isstreamcompletion", "requestid", "sequencenumber", "requestmessages", "responsemessages"),
)  # fmt: skip
