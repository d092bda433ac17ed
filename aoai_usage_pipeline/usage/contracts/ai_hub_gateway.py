"""The `ai-usage` event of Azure-Samples/ai-hub-gateway-solution-accelerator, counts as numbers or strings.

The policy writes `NA` for what it does not know and 1/0/1 for usage it does not find. Only an embedding (`list`) can really have one
prompt token and no answer, so everywhere else that pattern is a placeholder and the counts are unknown.
"""

from aoai_usage_pipeline.usage.contract import Contract


def _known(field: str) -> str:
    return f"CASE WHEN e.{field} NOT IN ('NA', 'NA-HEADER') THEN e.{field} END"


CONTRACT = Contract(
    name="ai_hub_gateway",
    markers=('"subscriptionId"', '"appId"'),
    shape={
        "id": "VARCHAR",
        "timestamp": "VARCHAR",
        "appId": "VARCHAR",
        "subscriptionId": "VARCHAR",
        "productName": "VARCHAR",
        "targetService": "VARCHAR",
        "model": "VARCHAR",
        "gatewayName": "VARCHAR",
        "operationName": "VARCHAR",
        "deploymentName": "VARCHAR",
        "promptTokens": "VARCHAR",
        "responseTokens": "VARCHAR",
        "totalTokens": "VARCHAR",
        "cachedTokens": "VARCHAR",
        "audioTokens": "VARCHAR",
        "appSubscriptionKey": "VARCHAR",
    },
    matches="(e.timestamp IS NOT NULL OR e.promptTokens IS NOT NULL) AND (e.subscriptionId IS NOT NULL OR e.appId IS NOT NULL) "
    "AND e.appSubscriptionKey IS NULL",
    fields={
        "request_id": _known("id"),
        "event_time": "e.timestamp",
        "gateway": _known("gatewayName"),
        "subscription_id": _known("subscriptionId"),
        "product": _known("productName"),
        "application": _known("appId"),
        "operation": _known("operationName"),
        "deployment": _known("deploymentName"),
        "reported_model": _known("model"),
        "service": "CASE WHEN e.targetService LIKE 'AI-%' THEN lower(e.targetService) END",
    },
    counts={
        "prompt_tokens": "e.promptTokens",
        "completion_tokens": "e.responseTokens",
        "total_tokens": "e.totalTokens",
        "cached_tokens": "e.cachedTokens",
        "audio_prompt_tokens": "e.audioTokens",
    },
    placeholder="coalesce(e.targetService, 'NA') <> 'list' AND e.promptTokens = '1' AND e.responseTokens = '0' AND e.totalTokens = '1'",
    ignores=(
        "gatewayRegion", "aiGatewayId", "RequestIp", "sessionId", "endUserId", "backendId", "routeLocation", "routeName",
        "EventProcessedUtcTime", "PartitionId", "EventEnqueuedUtcTime", "customDimension1", "customDimension2",
    ),
)  # fmt: skip
