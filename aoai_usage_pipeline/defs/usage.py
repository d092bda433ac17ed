"""`enriched_usage`: who used which model at which price, one row per request, and its checks."""

from collections.abc import Iterator

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.defs.common import (
    GROUP,
    ONE_RUN,
    OWNERS,
    check_result,
    checked_days,
    day_metadata,
    days_of,
    report,
    schema_metadata,
    span,
    told,
)
from aoai_usage_pipeline.pipeline import Pipeline

_REQUESTS, _TOKENS = "accepted_plus_duplicates_is_parsed", "tokens_enriched_equal_raw"
_IDENTITIES = {
    _REQUESTS: "Every raw event of the day is an accepted request or a duplicate of one. A day that fails is held.",
    _TOKENS: "The tokens of the day's requests are exactly the tokens of its raw events without duplicates. A day that fails is held.",
}
_COVERAGE = {"token_coverage": "Enough of the successful calls reported their usage (AOAI_MIN_COVERAGE)."}
_WARNINGS = {
    "no_conflicting_duplicates": ("Copies of a request agree on its usage.", "conflict", ("prompt_tokens", "completion_tokens", "copies")),
    "totals_add_up": (
        "Prompt and completion tokens add up to the reported total.",
        "prompt_tokens + completion_tokens <> total_tokens",
        ("prompt_tokens", "completion_tokens", "total_tokens"),
    ),
    "no_unpriced_usage": (
        "Every meter with usage has a price.",
        "pricing_status = 'unpriced'",
        ("model", "model_version", "deployment_sku", "region", "service_tier"),
    ),
    "no_unattributed_usage": (
        "Every request with usage has a record that says who called.",
        "NOT attributed",
        ("deployment", "prompt_tokens", "completion_tokens"),
    ),
    "no_unallocated_usage": ("Every request has an owner.", "cost_center = 'UNALLOCATED'", ("subscription_id", "product", "application")),
}


def build(partitions: dg.PartitionsDefinition) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `enriched_usage` and its checks."""

    @dg.asset(
        partitions_def=partitions,
        backfill_policy=ONE_RUN,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"duckdb", "parquet"},
        metadata=schema_metadata("enriched_usage", tables.ENRICHED_USAGE),
        deps=[dg.AssetDep("raw_events", partition_mapping=dg.TimeWindowPartitionMapping(-1, 1, allow_nonexistent_upstream_partitions=True))],
    )
    def enriched_usage(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
        """One row per request, by the UTC day of the request: deduplicated, with model, owner and exact cost. A day that does not add up is held."""
        days = pipeline.enrich(days_of(context), told(context, pipeline))
        table = pipeline.enrichment().days
        for day in days:
            context.add_asset_metadata(day_metadata(table, day), partition_key=str(day.usage_date))
        held = [day for day in days if day.outcome == "held"]
        return dg.MaterializeResult(metadata={"held": span([day.usage_date for day in held]) or "none", "days": len(days)})

    @dg.multi_asset_check(
        specs=[
            dg.AssetCheckSpec(name, asset="enriched_usage", description=text)
            for name, text in (_IDENTITIES | _COVERAGE | {name: text for name, (text, *_) in _WARNINGS.items()}).items()
        ],
        name="enriched_usage_checks",
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> Iterator[dg.AssetCheckResult]:
        from aoai_usage_pipeline.reconcile import usage

        enrichment, lake = pipeline.enrichment(), pipeline.lake
        days = checked_days(context, enrichment.days.existing)
        error, warn = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
        results = [
            check_result("enriched_usage", _REQUESTS, error, usage.unbalanced_requests(enrichment, days), "usage_date"),
            check_result("enriched_usage", _TOKENS, error, usage.unbalanced_tokens(lake, enrichment, days), "usage_date"),
        ]
        for name, (_, condition, columns) in _WARNINGS.items():
            count, rows = usage.requests_where(lake, enrichment, days, condition, columns)
            results.append(check_result("enriched_usage", name, warn, rows, "usage_date", count))
        low = usage.low_coverage(enrichment, lake, days, pipeline.settings.min_coverage)
        results.append(check_result("enriched_usage", "token_coverage", warn, low, "usage_date"))
        yield from report(context, results, list(_IDENTITIES))

    return enriched_usage, checks
