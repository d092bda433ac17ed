"""The event of microsoft/private-openai-with-apim-for-chargeback: request and answer as text, the answer JSON or a whole stream.

The event carries the caller's subscription key; only a keyed hash of it is kept, as the subscription id. It has no request id: the hash of
answer id and key, or else the record's coordinates, stand in.
"""

from aoai_usage_pipeline.usage.contract import TOOL_COLUMNS, Contract

CONTRACT = Contract(
    name="private_openai",
    markers=('"appSubscriptionKey"',),
    shape={"eventTime": "VARCHAR", "apiOperation": "VARCHAR", "appSubscriptionKey": "VARCHAR", "response": "VARCHAR"},
    matches="e.eventTime IS NOT NULL AND e.appSubscriptionKey IS NOT NULL",
    fields={
        "request_id": "a.id",
        "event_time": "e.eventTime",
        "subscription_id": "keyed_hash(nullif(e.appSubscriptionKey, ''))",
        "operation": "nullif(e.apiOperation, '')",
        "reported_model": "a.model",
        "service_tier": "a.service_tier",
        "status_code": "'200'",
        "image_kind": "a.image_kind",
    },
    response="e.response",
    usage="a.usage",
    counts={"images": "a.images"} | {name: f"a.{name}" for name in TOOL_COLUMNS},
    texts={"request": "VARCHAR"},
    estimate="estimate(e.request, e.response, a.model)",
    secrets=("appSubscriptionKey",),
)
