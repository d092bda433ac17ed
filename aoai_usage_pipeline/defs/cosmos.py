"""`cosmos_daily_billing`, `cosmos_usage` and `cosmos_statements`: days and closed months in Cosmos DB, and the check that reads them back."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.defs.common import GROUP, ONE_RUN, OWNERS, check_result, checked_days, days_of, days_of_run, report, told
from aoai_usage_pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from aoai_usage_pipeline.publish.cosmos import Published

_EQUAL = "documents_equal_ledger"
_ASSETS = {
    "cosmos_daily_billing": ("daily_billing", "daily-billing", tables.DAILY_BILLING, "The lines of `daily_billing` as documents in Cosmos DB."),
    "cosmos_usage": (
        "enriched_usage",
        "usage",
        tables.ENRICHED_USAGE,
        "The latest requests of `enriched_usage` as documents in Cosmos DB, when AOAI_COSMOS_USAGE is on.",
    ),
}


def build(partitions: dg.PartitionsDefinition) -> tuple[list[dg.AssetsDefinition], dg.AssetChecksDefinition]:
    """The assets, which make their containers equal to the lake, and the checks that they are."""

    @dg.multi_asset_check(
        specs=[
            dg.AssetCheckSpec(
                _EQUAL, asset=name, description="Read back, the documents of the day have exactly the number, tokens and amounts of the lake."
            )
            for name in _ASSETS
        ]
        + [
            dg.AssetCheckSpec(
                _EQUAL, asset="cosmos_statements", description="Read back, the documents of closed months say exactly what their statements say."
            )
        ],
        name="cosmos_checks",
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> Iterator[dg.AssetCheckResult]:
        from aoai_usage_pipeline.lake.days import Days
        from aoai_usage_pipeline.reconcile.usage import MAX_ROWS

        results = []
        for name, (table, *_) in _ASSETS.items():
            if dg.AssetCheckKey(dg.AssetKey(name), _EQUAL) not in context.selected_asset_check_keys:
                continue
            if off := pipeline.cosmos_off(table):
                results.append(dg.AssetCheckResult(passed=True, asset_key=name, check_name=_EQUAL, description=f"not compared: {off}"))
            else:
                rows = pipeline.unequal_in_cosmos(table, checked_days(context, Days(pipeline.lake, table).existing))
                results.append(check_result(name, _EQUAL, dg.AssetCheckSeverity.ERROR, rows[:MAX_ROWS], "usage_date", len(rows)))
        if dg.AssetCheckKey(dg.AssetKey("cosmos_statements"), _EQUAL) in context.selected_asset_check_keys:
            if off := pipeline.cosmos_off("statements"):
                results.append(dg.AssetCheckResult(passed=True, asset_key="cosmos_statements", check_name=_EQUAL, description=f"not compared: {off}"))
            else:
                rows = pipeline.unequal_statements_in_cosmos(days_of_run(context.run) or None)
                results.append(check_result("cosmos_statements", _EQUAL, dg.AssetCheckSeverity.ERROR, rows[:MAX_ROWS], "billing_period", len(rows)))
        yield from report(context, results, [_EQUAL], "differs in Cosmos DB")

    return [*(_asset(name, partitions) for name in _ASSETS), cosmos_statements], checks


@dg.asset(
    deps=["daily_billing"],
    backfill_policy=ONE_RUN,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"cosmosdb"},
    metadata={
        "dagster/column_schema": dg.TableSchema(columns=[dg.TableColumn(c.name, c.type, description=c.description) for c in tables.STATEMENT_FIELDS]),
        "dagster/table_name": "statements",
    },
)
def cosmos_statements(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The statements of closed months as documents in Cosmos DB."""
    if off := pipeline.cosmos_off("statements"):
        return dg.MaterializeResult(metadata={"published": f"no: {off}"})
    published = pipeline.publish_statements(days_of_run(context.run) or None)
    return dg.MaterializeResult(metadata={"published": ", ".join(published) or "no month to publish", **_figures(*published.values())})


def _asset(name: str, partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    table, container, columns, text = _ASSETS[name]
    schema = dg.TableSchema(columns=[dg.TableColumn(c.name, c.type, description=c.description) for c in tables.document_fields(columns)])

    @dg.asset(
        name=name,
        deps=[table],
        partitions_def=partitions,
        backfill_policy=ONE_RUN,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"cosmosdb"},
        description=text,
        metadata={"dagster/column_schema": schema, "dagster/table_name": container},
    )
    def documents(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
        off = pipeline.cosmos_off(table)
        if off:
            return dg.MaterializeResult(metadata={"published": f"no: {off}"})
        published = pipeline.publish_cosmos(table, days_of(context), told(context, pipeline))
        for day, did in published.items():
            figures = {"dagster/partition_row_count": did.written + did.unchanged, **_figures(did)}
            context.add_asset_metadata(figures, partition_key=str(day))
        return dg.MaterializeResult(metadata={"published": "yes", **_figures(*published.values())})

    return documents


def _figures(*published: "Published") -> dict[str, int | float]:
    """What the UI shows of publishing days."""
    counts = {name: sum(getattr(one, name) for one in published) for name in ("written", "unchanged", "deleted", "throttled")}
    return counts | {"request_charge": float(sum(one.request_charge for one in published))}
