"""The `log-to-eventhub` policy of ashwanibalwani/AOAIMonitoring: one event per chat call, with the response's usage as its last key.

The event names no model and no deployment; `deployments.csv` gives them by gateway, subscription and operation. API Management cuts
an event at 200 KB, which loses `Tokens`: who called and when is then salvaged and the counts stay unknown.
"""

from aoai_usage_pipeline.usage.contract import Contract

CONTRACT = Contract(
    name="seed_policy",
    markers=('"SubscriptionId"',),
    shape={
        "SubscriptionId": "VARCHAR",
        "EventTime": "VARCHAR",
        "ServiceName": "VARCHAR",
        "RequestId": "VARCHAR",
        "OperationName": "VARCHAR",
        "Tokens": "VARCHAR",
    },
    matches="e.RequestId IS NOT NULL OR (e.SubscriptionId IS NOT NULL AND coalesce(e.EventTime, e.ServiceName) IS NOT NULL)",
    fields={
        "request_id": "e.RequestId",
        "event_time": "e.EventTime",
        "gateway": "e.ServiceName",
        "subscription_id": "e.SubscriptionId",
        "operation": "e.OperationName",
    },
    usage="e.Tokens",
    texts={"Prompt": "VARCHAR", "Response": "VARCHAR"},
    estimate="estimate(e.Prompt, e.Response, NULL)",
    ignores=("RequestIp",),
    truncated_at="Prompt",
)
