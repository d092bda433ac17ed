"""The chargeback record of Azure/enterprise-azureai, sent as an array of records.

It names a consumer and a model but no request: each record is a request of its own, told apart by its coordinates.
"""

from aoai_usage_pipeline.usage.contract import Contract

CONTRACT = Contract(
    name="enterprise_azureai",
    markers=('"InputTokens"',),
    shape=dict.fromkeys(("TimeGenerated", "Consumer", "Model", "ObjectType", "InputTokens", "OutputTokens", "TotalTokens"), "VARCHAR"),
    matches="e.TimeGenerated IS NOT NULL AND e.Consumer IS NOT NULL",
    fields={
        "event_time": "e.TimeGenerated",
        "subscription_id": "nullif(e.Consumer, '')",
        "operation": "nullif(e.ObjectType, '')",
        "reported_model": "nullif(e.Model, '')",
    },
    counts={"prompt_tokens": "e.InputTokens", "completion_tokens": "e.OutputTokens", "total_tokens": "e.TotalTokens"},
)
