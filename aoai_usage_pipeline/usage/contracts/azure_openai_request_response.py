"""Azure OpenAI's own `RequestResponse` diagnostics: no token counts and no caller, so evidence and never a request of its own.

Kept for the number of calls that Azure OpenAI itself saw and for the model versions behind its deployments.
"""

from aoai_usage_pipeline.usage.contract import Contract

CONTRACT = Contract(
    name="azure_openai_request_response",
    markers=('"request_response"',),
    shape=dict.fromkeys(
        ("azure_monitor", "time", "timegenerated", "correlationid", "resourceid", "modeldeploymentname", "modelname", "modelversion"), "VARCHAR"
    ),
    matches="e.azure_monitor = 'request_response'",
    fields={
        "request_id": "e.correlationid",
        "event_time": "coalesce(e.time, e.timegenerated)",
        "gateway": "lower(regexp_extract(e.resourceid, '[^/]+$'))",
        "deployment": "nullif(e.modeldeploymentname, '')",
        "reported_model": "nullif(concat_ws('-', nullif(e.modelname, ''), nullif(e.modelversion, '')), '')",
    },
    ignores=("apiname", "requesttime", "requestlength", "responsetime", "responselength", "objectid", "streamtype"),
    billable=False,
)
