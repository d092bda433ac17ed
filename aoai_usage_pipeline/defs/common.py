"""What every stage's definitions share: partitions, column schemas, how a check shows offending rows."""

import datetime as dt
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.dates import days_between, spans
from aoai_usage_pipeline.pipeline import Pipeline, Progress

if TYPE_CHECKING:
    from aoai_usage_pipeline.billing.stage import Day
    from aoai_usage_pipeline.lake.days import Days

# both parameters are what Dagster's own guides use; pinned to <1.14, a change of theirs cannot come unnoticed
for _parameter in ("backfill_policy", "allow_nonexistent_upstream_partitions"):
    warnings.filterwarnings("ignore", message=f".*`{_parameter}`", category=dg.BetaWarning)

# the nightly run makes every asset anew: one night without it is a warning, two are a failure
NIGHTLY = dg.FreshnessPolicy.time_window(warn_window=dt.timedelta(hours=26), fail_window=dt.timedelta(hours=50))
DRAINED = dg.FreshnessPolicy.time_window(warn_window=dt.timedelta(minutes=15), fail_window=dt.timedelta(minutes=60))
GROUP = "aoai_usage"
OWNERS = ["team:finops-platform"]
ONE_RUN = dg.BackfillPolicy.single_run()
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
_TYPES = {"BIGINT": "int", "BOOLEAN": "bool"}


def daily(start_date: dt.date) -> dg.DailyPartitionsDefinition:
    """Daily UTC partitions from the start date to today, today included."""
    return dg.DailyPartitionsDefinition(start_date=start_date.isoformat(), timezone="UTC", end_offset=1)


def with_freshness(assets: Iterable[dg.AssetsDefinition], *, drained: bool) -> Sequence[dg.AssetsDefinition]:
    """The assets with the policy that says in the UI when somebody should look; `drained_events` has one only where the hub is drained."""

    def policy(spec: dg.AssetSpec) -> dg.AssetSpec:
        if spec.key == dg.AssetKey("drained_events"):
            return spec.replace_attributes(freshness_policy=DRAINED if drained else None)
        return spec.replace_attributes(freshness_policy=NIGHTLY)

    return dg.map_asset_specs(policy, assets)


def days_of(context: dg.AssetExecutionContext) -> list[dt.date]:
    """The days of a run: one, or a range."""
    return [dt.date.fromisoformat(key) for key in context.partition_keys]


def days_of_run(run: dg.DagsterRun) -> list[dt.date]:
    """The days that a run was asked for: one, a range, or none."""
    first, last = (run.tags.get(tag) or run.tags.get("dagster/partition") for tag in (RANGE_START, RANGE_END))
    return days_between(dt.date.fromisoformat(first), dt.date.fromisoformat(last)) if first and last else []


def checked_days(context: dg.AssetCheckExecutionContext, everything: Callable[[], list[dt.date]]) -> list[dt.date]:
    """The days of the run that a check belongs to; everything there is when the check is executed on its own."""
    if context.run.tags.keys() & {RANGE_START, "dagster/partition"}:
        return [dt.date.fromisoformat(key) for key in context.partition_keys]
    return everything()


def schema_metadata(table: str, columns: tuple[tables.Column, ...]) -> dict[str, object]:
    """What the UI shows of a table: its name and its columns."""
    schema = dg.TableSchema(columns=[dg.TableColumn(c.name, c.type, description=c.description) for c in columns])
    return {"dagster/column_schema": schema, "dagster/table_name": table}


def day_metadata(table: "Days", day: "Day") -> dict[str, object]:
    """What the UI shows of a day's object: its rows, what became of it, the reference data it was made with and the digest of its lines."""
    footer, _ = table.footer(day.usage_date)
    stamps = {name: footer[name] for name in ("reference_version", "digest") if footer.get(name)}
    return {"dagster/partition_row_count": table.rows(day.usage_date), "outcome": day.outcome, **stamps}


def told(context: dg.AssetExecutionContext, pipeline: Pipeline) -> Progress:
    """Progress that shows in the run's log, and to whoever else follows the pipeline."""

    def progress(done: int, total: int, what: str) -> None:
        context.log.info("%s of %s: %s", done, total, what)
        pipeline.progress(done, total, what)

    return progress


def span(days: Sequence[dt.date]) -> str:
    """A list of days for a person, ranges abbreviated."""
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in spans(days))


def table_of(rows: Sequence[Mapping[str, object]]) -> dg.TableMetadataValue:
    """Rows of the same columns as a table in the UI."""
    return dg.MetadataValue.table(
        [dg.TableRecord({key: value if isinstance(value, int | str) else str(value) for key, value in row.items()}) for row in rows],
        schema=dg.TableSchema(columns=[dg.TableColumn(key) for key in rows[0]]),
    )


def check_result(
    asset: str, name: str, severity: dg.AssetCheckSeverity, rows: Sequence[Mapping[str, object]], day_column: str, count: int | None = None
) -> dg.AssetCheckResult:
    """Passed without offending rows; otherwise failed with a table of them, and the days they are of."""
    days = sorted({str(row[day_column]) for row in rows})
    metadata: dict[str, dg.MetadataValue] = {"offending": dg.MetadataValue.int(len(rows) if count is None else count)}
    if rows:
        metadata["days"] = dg.MetadataValue.text(", ".join(days))
        metadata["rows"] = table_of(rows)
    return dg.AssetCheckResult(
        passed=not rows,
        asset_key=asset,
        check_name=name,
        severity=severity,
        description=f"{metadata['offending'].value} on {', '.join(days)}" if rows else None,
        metadata=metadata,
    )


def report(
    context: dg.AssetCheckExecutionContext, results: Sequence[dg.AssetCheckResult], identities: Sequence[str], outcome: str = "held"
) -> Iterator[dg.AssetCheckResult]:
    """Give the results that were asked for, then end the run failed when a ledger identity does not hold, naming what became of which days.

    Dagster's own `blocking` would keep every day of a range from being billed. The stage holds the bad days itself and goes on with the
    others, so the checks only have to fail the run, after everything else was done.
    """
    wanted = {key.name for key in context.selected_asset_check_keys}
    results = [result for result in results if result.check_name in wanted]
    yield from results
    failed = [result for result in results if not result.passed and result.check_name in identities]
    if failed:
        days = sorted({day for result in failed for day in str(result.metadata["days"].value).split(", ")})
        raise dg.Failure(f"{outcome}: {', '.join(days)} ({', '.join(str(result.check_name) for result in failed)})", allow_retries=False)
