"""Contract v2: what this project's own API Management policy sends, so that pricing needs no guessing.

`contract_v2.schema.json` beside this module defines it. The small fields that a bill needs come first and `content` last, so that a
message cut off at 200 KB still bills. Prompts and answers are only sent when the policy's switch says so; estimates of unreported usage
read them, and they are not stored unless `AOAI_KEEP_CONTENT` says so. Ids are hashed by the sender; the end user's is hashed once more
with this installation's key.
"""

from aoai_usage_pipeline.usage.contract import TOOL_COLUMNS, Contract

_MODEL = "coalesce(nullif(e.model, ''), e.requestedModel)"
_DETAILS = (
    "api", "backend", "requestedModel", "apiVersion", "stream", "spilloverFrom", "spilloverTo", "toolCalls", "imageSize", "imageQuality",
    "requestBytes", "clientTag",
)  # fmt: skip

CONTRACT = Contract(
    name="contract_v2",
    markers=('"aoai-usage/2"',),
    shape=dict.fromkeys(
        (
            "schema", "requestId", "time", "gateway", "subscriptionId", "product", "operation", "application", "endUser", "region", "deployment",
            "model", "serviceTier", "status", "imageCount", "inputCharacters", "usage", *_DETAILS,
        ),
        "VARCHAR",
    ),
    matches="e.schema = 'aoai-usage/2'",
    fields={
        "request_id": "e.requestId",
        "event_time": "e.time",
        "gateway": "e.gateway",
        "subscription_id": "e.subscriptionId",
        "product": "e.product",
        "application": "e.application",
        "operation": "e.operation",
        # a request that spilled over is billed at the deployment that served it
        "deployment": "coalesce(nullif(e.spilloverTo, ''), e.deployment)",
        "reported_model": _MODEL,
        "service_tier": "e.serviceTier",
        "reported_region": "e.region",
        "status_code": "e.status",
        "end_user": "keyed_hash(nullif(e.endUser, ''))",
        "image_kind": "concat_ws('/', nullif(e.imageSize, ''), nullif(e.imageQuality, ''))",
        "details": f"to_json(struct_pack({', '.join(f'{name} := e.{name}' for name in _DETAILS)}))",
    },
    usage="e.usage",
    counts={
        "images": "nullif(e.imageCount, '0')",
        "characters": "nullif(e.inputCharacters, '0')",
        **{name: f"nullif(member(e.toolCalls, '$.{name.removesuffix('s')}'), '0')" for name in TOOL_COLUMNS},
    },
    texts={"content": {"request": "VARCHAR", "response": "VARCHAR"}},
    estimate=f"estimate(e.content.request, e.content.response, {_MODEL})",
    truncated_at="content",
)  # fmt: skip
