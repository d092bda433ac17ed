"""API Management's `GatewayLogs` from Azure Monitor: who called what, with which outcome.

The identity half of a call whose counts are in `GatewayLlmLogs`; where the diagnostic setting logs answers, it has the usage itself. The
deployment comes from the URL of the backend.
"""

from aoai_usage_pipeline.usage.contract import TOOL_COLUMNS, Contract

_ERROR = ("elapsed", "message", "reason", "scope", "section", "source")

CONTRACT = Contract(
    name="apim_gateway_log",
    markers=('"gateway_log"',),
    shape=dict.fromkeys(
        (
            "azure_monitor", "time", "timegenerated", "correlationid", "servicename", "resourceid", "deploymentname", "apimsubscriptionid",
            "productid", "operationid", "responsecode", "llm",
        ),
        "VARCHAR",
    ) | {"answer": dict.fromkeys(("model", "service_tier", "usage", "images", "image_kind", *TOOL_COLUMNS), "VARCHAR")},
    matches="e.azure_monitor = 'gateway_log'",
    fields={
        "request_id": "e.correlationid",
        "event_time": "coalesce(e.time, e.timegenerated)",
        "gateway": "lower(coalesce(nullif(e.servicename, ''), regexp_extract(e.resourceid, '[^/]+$')))",
        "subscription_id": "nullif(e.apimsubscriptionid, '')",
        "product": "nullif(e.productid, '')",
        "operation": "nullif(e.operationid, '')",
        "deployment": "e.deploymentname",
        "reported_model": "e.answer.model",
        "service_tier": "e.answer.service_tier",
        "status_code": "e.responsecode",
        "service": "CASE WHEN e.llm = 'true' THEN 'openai' ELSE 'other' END",
        "image_kind": "e.answer.image_kind",
        "part": "CASE WHEN coalesce(e.answer.usage, e.answer.images) IS NULL THEN 'identity' END",
    },
    usage="e.answer.usage",
    counts={name: f"e.answer.{name}" for name in ("images", *TOOL_COLUMNS)},
    ignores=(
        "method", "url", "apiid", "apirevision", "userid", "workspaceid", "cache", "cachetime", "totaltime", "clienttime", "clientprotocol",
        "clienttlsversion", "requestsize", "requestheaders", "requestbody", "responsesize", "responseheaders", "responsebody", "backendid",
        "backendmethod", "backendprotocol", "backendresponsecode", "backendtime", "backendurl", "backendrequestheaders", "backendrequestbody",
        "backendresponseheaders", "backendresponsebody", "errors", "tracerecords", "ismastertrace", "istraceallowed", "istraceexpired",
        "istracerequested", "httpstatuscodecategory", "lasterror", *(f"lasterror{joint}{name}" for joint in ("", "_") for name in _ERROR),
    ),
)  # fmt: skip
