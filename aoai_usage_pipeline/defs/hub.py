"""The Event Hub itself: `drained_events` for hubs without Capture, and the check that capture files have everything the hub holds."""

from typing import Any

import dagster as dg

from aoai_usage_pipeline.defs.capture import running
from aoai_usage_pipeline.defs.common import GROUP, ONE_RUN, OWNERS, table_of, told
from aoai_usage_pipeline.pipeline import Pipeline

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
_FIELDS = {
    "SequenceNumber": ("long", "number of the event in its partition"),
    "Offset": ("string", "position of the event in its partition"),
    "EnqueuedTimeUtc": ("string", "when the hub accepted it"),
    "SystemProperties": ("map", "the same time in milliseconds, and the partition key"),
    "Properties": ("map", "properties of the sender"),
    "Body": ("bytes", "the event as it was sent"),
}


@dg.asset(
    backfill_policy=ONE_RUN,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"eventhubs", "avro"},
    metadata={"dagster/column_schema": dg.TableSchema(columns=[dg.TableColumn(n, t, description=d) for n, (t, d) in _FIELDS.items()])},
)
def drained_events(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The hub's new events as capture files, for a hub without Capture or for bills that are minutes old. Only with `AOAI_DRAIN=on`."""
    done = pipeline.drain(told(context, pipeline))
    for one in done:
        if one.lost:
            context.log.warning("Partition %s: %s events left the hub before they were drained.", one.partition_id, one.lost)
        if one.restarted:
            context.log.warning("Partition %s: the hub was created again since the last drain; read from its first event.", one.partition_id)
    rows = [
        {
            "partition": one.partition_id,
            "events": one.events,
            "files": one.files,
            "to": _shown(one.last_sequence_number),
            "lost": one.lost,
            "restarted": str(one.restarted),
        }
        for one in done
    ]
    totals = {name: sum(getattr(one, name) for one in done) for name in ("events", "files", "lost")}
    return dg.MaterializeResult(metadata={"outcome": "drained", **totals, "partitions": table_of(rows)})


@dg.asset_check(
    asset="raw_events",
    name="capture_is_complete",
    description="Everything the Event Hub holds is in ingested capture files, up to what Capture has not written yet.",
)
def capture_is_complete(pipeline: dg.ResourceParam[Pipeline]) -> dg.AssetCheckResult:
    from aoai_usage_pipeline.storage import StorageError

    try:
        found = pipeline.completeness()
    except StorageError as error:
        return dg.AssetCheckResult(passed=False, severity=WARN, description=f"The hub could not be asked: {error}")
    if not found:
        return dg.AssetCheckResult(
            passed=True, description="No hub is configured (AOAI_EVENT_HUB_NAMESPACE, AOAI_EVENT_HUB_NAME): nothing to compare with."
        )
    rows = [
        {
            "partition": one.partition.partition_id,
            "state": one.state,
            "lag_events": one.missing,
            "lag_minutes": one.minutes,
            "lost_events": one.lost,
            "hub_from": one.partition.first,
            "hub_to": one.partition.last,
            "hub_last_enqueued_at": _shown(one.partition.last_enqueued_at),
            "captured_to": _shown(one.captured_to),
            "missing_from": _shown(one.missing_from),
            "restarted": str(one.restarted),
        }
        for one in found
    ]
    bad = [one for one in found if not one.ok]
    said = [f"partition {one.partition.partition_id} {one.state}: {one.lost or one.missing} events" for one in bad]
    said += [f"partition {one.partition.partition_id}: the hub was created again, its numbers started anew" for one in found if one.restarted]
    return dg.AssetCheckResult(
        passed=not bad,
        severity=ERROR,
        description="; ".join(said) or None,
        metadata={
            "lag_events": sum(one.missing for one in found),
            "lag_minutes": max(one.minutes for one in found),
            "lost_events": sum(one.lost for one in found),
            "partitions": table_of(rows),
        },
    )


def build_job() -> Any:
    """The job `drain`."""
    return dg.define_asset_job("drain", dg.AssetSelection.assets("drained_events"), description="Read the hub's new events into capture files.")


def build_schedule(job: Any, status: dg.DefaultScheduleStatus) -> dg.ScheduleDefinition:
    """The schedule `drain_run`: every five minutes, unless the run before is still at it."""

    @dg.schedule(
        name="drain_run",
        job=job,
        cron_schedule="*/5 * * * *",
        execution_timezone="UTC",
        default_status=status,
        description="Reads the hub's new events every five minutes; the sensor sees the files.",
    )
    def drain_run(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if running(context.instance, job.name):
            return dg.SkipReason("the drain before is still running")
        return dg.RunRequest(run_key=f"drain:{context.scheduled_execution_time.isoformat()}")

    return drain_run


def _shown(value: object) -> int | str:
    return value if isinstance(value, int) else "" if value is None else str(value)
