"""`daily_usage` and `daily_billing`: the day's sums and lines, their check, the jobs and the daily schedule."""

import datetime as dt
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.defs.common import (
    GROUP,
    ONE_RUN,
    OWNERS,
    RANGE_END,
    RANGE_START,
    check_result,
    checked_days,
    day_metadata,
    days_of,
    report,
    schema_metadata,
    span,
    table_of,
    told,
)
from aoai_usage_pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from aoai_usage_pipeline.billing.explain import Summary

TRAILING_DAYS = 7
_LINES_SHOWN = 20
_LINE_COLUMNS = ("cost_center", "deployment", "model", "meter", "quantity", "unit_price", "unit_tokens", "cost", "currency")
_BILLED = "tokens_billed_equal_enriched"


def build(partitions: dg.PartitionsDefinition) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The assets `daily_usage` and `daily_billing`, made together, and the check that they lose nothing."""

    @dg.multi_asset(
        specs=[
            dg.AssetSpec(
                name,
                deps=["enriched_usage"],
                group_name=GROUP,
                owners=OWNERS,
                kinds={"duckdb", "parquet"},
                description=text,
                metadata=schema_metadata(name, columns),
            )
            for name, columns, text in (
                ("daily_usage", tables.DAILY_USAGE, "Requests, tokens and cost per day, payer and deployment."),
                ("daily_billing", tables.DAILY_BILLING, "One line per day, payer, deployment and meter: quantity x unit price = cost, exactly."),
            )
        ],
        partitions_def=partitions,
        backfill_policy=ONE_RUN,
    )
    def daily_tables(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> Iterator[dg.MaterializeResult]:
        days = pipeline.bill(days_of(context), told(context, pipeline))
        made = pipeline.daily_tables()
        held = span([day.usage_date for day in days if day.outcome == "held"]) or "none"
        for table in (made.usage, made.billing):
            summaries = pipeline.bills().summaries([day.usage_date for day in days], _LINES_SHOWN) if table is made.billing else {}
            for day in days:
                metadata = day_metadata(table, day)
                if day.usage_date in summaries:
                    metadata |= _summary(day.usage_date, summaries[day.usage_date])
                context.add_asset_metadata(metadata, asset_key=table.table, partition_key=str(day.usage_date))
            yield dg.MaterializeResult(asset_key=table.table, metadata={"held": held, "days": len(days)})

    @dg.multi_asset_check(
        specs=[
            dg.AssetCheckSpec(
                _BILLED,
                asset="daily_billing",
                description="The billed tokens and cost of the day are exactly those of its enriched usage. A day that fails is held.",
            )
        ],
        name="daily_billing_checks",
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> Iterator[dg.AssetCheckResult]:
        from aoai_usage_pipeline.reconcile import usage

        enrichment = pipeline.enrichment()
        days = checked_days(context, enrichment.days.existing)
        rows = usage.unbalanced_bill(pipeline.lake, enrichment, pipeline.daily_tables(enrichment), days)
        result = check_result("daily_billing", _BILLED, dg.AssetCheckSeverity.ERROR, rows, "usage_date")
        yield from report(context, [result], [_BILLED])

    return daily_tables, checks


def _summary(day: dt.date, summary: "Summary") -> dict[str, Any]:
    """What a person wants to see of a day's bill: its cost, its biggest lines and how to have one explained."""
    without = [f"lines without a cost: {summary.without_cost:,}"] if summary.without_cost else []
    rows = [{"line_id": line["line_id"]} | {name: _shown(line[name]) for name in _LINE_COLUMNS} for line in summary.lines]
    explain = f"`aoai-usage explain <line_id> --date {day}`\n\nThe biggest line: `aoai-usage explain {rows[0]['line_id']} --date {day}`"
    return {
        "total cost": ", ".join([*(f"{_shown(cost)} {currency}" for currency, cost in summary.cost.items()), *without]),
        "biggest lines": table_of(rows),
        "explain a line": dg.MetadataValue.md(explain),
    }


def _shown(value: Any) -> str:
    text = "-" if value is None else f"{value:,f}" if isinstance(value, Decimal) else str(value)
    return text.rstrip("0").rstrip(".") if isinstance(value, Decimal) and "." in text else text


def build_jobs() -> tuple[Any, ...]:
    """`ingest` (capture dates), `bill` (usage dates), `publish` (usage dates that are billed), and `daily_run` (all, for the schedule)."""
    raw = dg.AssetSelection.assets("raw_events")
    documents = dg.AssetSelection.assets("cosmos_daily_billing", "cosmos_usage", "cosmos_statements")
    rest = dg.AssetSelection.assets("enriched_usage", "daily_usage", "daily_billing", "usage_warehouse") | documents
    return (
        dg.define_asset_job("ingest", raw, description="Read new and changed capture files of some capture dates."),
        dg.define_asset_job("bill", rest, description="Enrich, bill and publish some usage dates."),
        dg.define_asset_job("publish", documents, description="Make Cosmos DB equal to the lake for some usage dates and their closed months."),
        dg.define_asset_job("daily_run", raw | rest, description="Ingest, bill and publish a range of days."),
    )


def build_schedule(daily_run: Any, start_date: dt.date, status: dg.DefaultScheduleStatus) -> dg.ScheduleDefinition:
    """The schedule `daily_billing_run`: a trailing window of days up to today, as one run."""

    @dg.schedule(
        name="daily_billing_run",
        job=daily_run,
        cron_schedule="15 2 * * *",
        execution_timezone="UTC",
        default_status=status,
        description=f"Bills the last {TRAILING_DAYS} days again every night; days whose input did not change are left alone.",
    )
    def daily_billing_run(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        last = context.scheduled_execution_time.astimezone(dt.UTC).date()
        first = max(start_date, last - dt.timedelta(TRAILING_DAYS))
        return dg.RunRequest(run_key=f"daily:{last}", tags={RANGE_START: str(first), RANGE_END: str(last)})

    return daily_billing_run
