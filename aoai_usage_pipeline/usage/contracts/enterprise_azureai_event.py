"""The event of the older policy of Azure/enterprise-azureai: counts as text, nearly always `null`, and the caller's subscription key.

Only a keyed hash of the key is kept, as the subscription id. The event has no request id: its coordinates stand in.
"""

from aoai_usage_pipeline.usage.contract import Contract

CONTRACT = Contract(
    name="enterprise_azureai_event",
    markers=('"appSubscriptionKey"',),
    shape=dict.fromkeys(("timestamp", "appId", "appSubscriptionKey", "promptTokens", "responseTokens", "totalTokens"), "VARCHAR"),
    matches="e.timestamp IS NOT NULL AND e.appSubscriptionKey IS NOT NULL",
    fields={
        "event_time": "e.timestamp",
        "subscription_id": "keyed_hash(nullif(e.appSubscriptionKey, ''))",
        "application": "nullif(e.appId, '')",
    },
    counts={"prompt_tokens": "e.promptTokens", "completion_tokens": "e.responseTokens", "total_tokens": "e.totalTokens"},
    secrets=("appSubscriptionKey",),
)
