"""Capture files into `raw_events`: the asset, its checks, and the sensor that watches the capture container."""

import dataclasses
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.dates import spans
from aoai_usage_pipeline.defs import telemetry
from aoai_usage_pipeline.defs.common import (
    GROUP,
    ONE_RUN,
    OWNERS,
    RANGE_END,
    RANGE_START,
    check_result,
    checked_days,
    days_of,
    days_of_run,
    report,
    schema_metadata,
    span,
    table_of,
    told,
)
from aoai_usage_pipeline.pipeline import Pipeline

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
NEWEST_DAYS = 3
MAX_ATTEMPTS = 3
MAX_RUNS_PER_TICK = 5
SWEEP_SECONDS = 8.0
SILENCE_SECONDS = 300
"""A run that works writes to its log more often than this."""
SPAN_REACH = 8
"""Days this close share a run: the unchanged days between them, weekends say, cost nothing."""
DAYS_PUBLISHED = 31
"""How many days a run that only publishes has at the most; there is one such run at a time."""

_BALANCED = "captured_is_parsed_plus_quarantined"
_CHECKS = {
    _BALANCED: "Every record of every capture file is either a raw event or quarantined. A date that fails is held.",
    "no_unreadable_files": "Every capture file can be read whole; an unreadable one contributes nothing until it is replaced.",
    "no_sequence_gaps": "The sequence numbers of each partition are complete across files: nothing the hub accepted is missing.",
    "no_overlaps": "No event was captured twice. Repeated ones are counted once all the same.",
    "no_new_fields": "Events have no fields that their contract and earlier dates did not know; the first events of each file are looked at.",
    "no_quarantined_records": "Every record could be read by an event contract.",
}


def build(partitions: dg.PartitionsDefinition, *, drained: bool) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `raw_events` and its checks. `drained`: the capture files come from `drained_events`."""

    @dg.asset(
        partitions_def=partitions,
        backfill_policy=ONE_RUN,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"azureblob", "parquet"},
        deps=["drained_events"] if drained else [],
        metadata=schema_metadata("raw_events", tables.RAW_EVENTS),
    )
    def raw_events(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
        """One row per captured event, by the UTC day in the capture file's name. Reads only hours whose files changed."""
        from aoai_usage_pipeline.reconcile import usage

        done = pipeline.ingest(days_of(context), told(context, pipeline))
        for date, result in done.items():
            context.add_asset_metadata(
                {
                    "dagster/partition_row_count": result.manifest.parsed + result.manifest.quarantined,
                    "files": len(result.manifest.files),
                    "files_read_now": result.files_read,
                    "events_read_now": result.events_read,
                    "parsed": result.manifest.parsed,
                    "quarantined": result.manifest.quarantined,
                },
                partition_key=str(date),
            )
        metadata: dict[str, Any] = {"days_with_new_files": sum(result.files_read > 0 for result in done.values())}
        if reasons := usage.quarantine_reasons(pipeline.lake, [result.manifest for result in done.values()], list(done)):
            metadata["quarantined_by_reason"] = table_of(reasons)
        return dg.MaterializeResult(metadata=metadata)

    @dg.multi_asset_check(
        specs=[dg.AssetCheckSpec(name, asset="raw_events", description=text) for name, text in _CHECKS.items()],
        name="raw_events_checks",
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> Iterator[dg.AssetCheckResult]:
        from aoai_usage_pipeline.reconcile import capture, usage

        manifests = pipeline.manifests.all()
        dates = checked_days(context, lambda: [manifest.capture_date for manifest in manifests])
        held = [
            {"capture_date": str(date), "blob": None, "captured": None, "parsed": None, "quarantined": None, "reason": reason}
            for date, reason in pipeline.held().get("raw_events", {}).items()
            if date in set(dates)
        ]
        quarantined, shown = usage.quarantined_records(pipeline.lake, manifests, dates)
        results = [
            check_result("raw_events", _BALANCED, ERROR, held or capture.unbalanced_files(manifests, dates), "capture_date"),
            check_result("raw_events", "no_unreadable_files", ERROR, capture.unreadable_files(manifests, dates), "capture_date"),
            check_result("raw_events", "no_sequence_gaps", ERROR, capture.sequence_gaps(manifests, dates), "capture_date"),
            check_result("raw_events", "no_overlaps", WARN, capture.overlaps(manifests, dates), "capture_date"),
            check_result("raw_events", "no_new_fields", WARN, capture.new_fields(manifests, dates), "capture_date"),
            check_result("raw_events", "no_quarantined_records", WARN, shown, "capture_date", quarantined),
        ]
        yield from report(context, results, [_BALANCED])

    return raw_events, checks


def build_sensor(ingest: Any, bill: Any, publish: Any, daily_run: Any, start_date: dt.date, status: dg.DefaultSensorStatus) -> dg.SensorDefinition:
    """The sensor `capture_files`: ingest what is new or changed, bill again whatever became stale, publish what is not in Cosmos DB."""

    @dg.sensor(
        jobs=[ingest, bill, publish],
        minimum_interval_seconds=60,
        default_status=status,
        description="Looks for new or changed capture files and asks for runs that ingest them, then for runs that bill every usage date "
        "that became stale, however old, and for runs that publish what Cosmos DB does not have. What was ingested and published is told by the "
        "lake; the cursor only remembers how often a day was asked for.",
    )
    @telemetry.tick
    def capture_files(context: dg.SensorEvaluationContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.SensorResult:
        state = _State.load(context.cursor)
        now = dt.datetime.now(dt.UTC)
        changed = _look(pipeline, state, start_date, now.date())
        stale = pipeline.stale_usage_dates()
        unpublished, notes = _unpublished(pipeline, now)
        stale, unpublished = ({day: found[day] for day in found if start_date <= day <= now.date()} for found in (stale, unpublished))
        requests: list[dg.RunRequest] = []
        scheduled, billed = in_flight(context.instance, daily_run.name), in_flight(context.instance, bill.name)
        for job, wanted in ((ingest.name, changed), (bill.name, stale), (publish.name, unpublished)):
            mine = in_flight(context.instance, job)
            running = mine | scheduled | (billed if job == publish.name else set())
            asked = state.asked.setdefault(job, {})
            due, given_up = _due(wanted, asked, running)
            ranges = list(spans(due, SPAN_REACH))
            if job == publish.name:
                # the newest first, and the next when these are there
                ranges = [] if mine else [(max(start, end - dt.timedelta(DAYS_PUBLISHED - 1)), end) for start, end in ranges[-1:]]
            for start, end in ranges[: MAX_RUNS_PER_TICK - len(requests)]:
                requests.append(dg.RunRequest(job_name=job, tags={RANGE_START: str(start), RANGE_END: str(end)}))
                days = [day for day in due if start <= day <= end]
                asked |= {str(day): (wanted[day], asked.get(str(day), ("", 0))[1] + 1) for day in days}
                if job == bill.name:
                    billed |= set(days)  # that publishes them too
            if given_up:
                until = "in the next hour" if job == publish.name else "when its input changes or the cursor is reset"
                notes.append(f"{job} failed {MAX_ATTEMPTS} times for {span(given_up)}: asked again {until}")
            if running:
                notes.append(f"{job} is running for {span(sorted(running))}")
        notes += [] if requests else ["nothing new"]
        return dg.SensorResult(run_requests=requests, cursor=state.dump(), skip_reason=None if requests else "; ".join(notes))

    return capture_files


def _unpublished(pipeline: Pipeline, now: dt.datetime) -> tuple[dict[dt.date, str], list[str]]:
    """What Cosmos DB does not have, or why it cannot be asked.

    What keeps it from being published passes by itself, so each hour is another reason to ask.
    """
    if not pipeline.settings.cosmos_endpoint:
        return {}, []
    from aoai_usage_pipeline.publish.cosmos import CosmosError

    try:
        return {day: f"{version} {now:%Y-%m-%dT%H}" for day, version in pipeline.unpublished_in_cosmos().items()}, []
    except CosmosError as error:
        return {}, [f"Cosmos DB cannot be asked what it has: {error}"]


@dataclasses.dataclass
class _State:
    """The cursor: where the sweep goes on, and how often which day was asked for with which input."""

    sweep: str | None = None
    asked: dict[str, dict[str, tuple[str, int]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, cursor: str | None) -> "_State":
        data = json.loads(cursor or "{}")
        return cls(data.get("sweep"), {job: {day: (d, n) for day, (d, n) in days.items()} for job, days in data.get("asked", {}).items()})

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _look(pipeline: Pipeline, state: _State, start_date: dt.date, today: dt.date, clock: Callable[[], float] = time.monotonic) -> dict[dt.date, str]:
    """Capture dates with new or changed files: the newest days, those with unreadable files, and older months in turn as long as time allows."""
    until = clock() + SWEEP_SECONDS
    newest = max(start_date, today - dt.timedelta(NEWEST_DAYS - 1))
    changed = pipeline.changed_capture_dates(newest, today + dt.timedelta(1))
    unreadable = [m.capture_date for m in pipeline.manifests.all() if any(not f.readable for f in m.files) and start_date <= m.capture_date < newest]
    for first, last in spans(unreadable):
        changed |= pipeline.changed_capture_dates(first, last)
    if newest == start_date:
        return changed
    last = dt.date.fromisoformat(state.sweep) if state.sweep else newest
    seen: set[dt.date] = set()
    while clock() < until:
        # a month at a time, once around at the most
        last = last if start_date <= last < newest else newest - dt.timedelta(1)
        first = max(start_date, last.replace(day=1))
        if first in seen:
            break
        seen.add(first)
        changed |= pipeline.changed_capture_dates(first, last)
        last = first - dt.timedelta(1)
    state.sweep = str(last)
    return changed


def in_flight(instance: dg.DagsterInstance, job: str) -> set[dt.date]:
    """The days that runs of a job which have not ended are working on."""
    days: set[dt.date] = set()
    for run in running(instance, job):
        days.update(days_of_run(run))
    return days


def running(instance: dg.DagsterInstance, job: str) -> list[dg.DagsterRun]:
    """The runs of a job that have not ended.

    A run that was killed with its process says nothing any more and never ends by itself: it is reported as failed, which also frees its
    place in the queue.
    """
    statuses = [
        dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]  # fmt: skip
    runs = []
    for record in instance.get_run_records(dg.RunsFilter(job_name=job, statuses=statuses)):
        run = record.dagster_run
        said = [event.timestamp for event in instance.get_records_for_run(run.run_id, limit=1, ascending=False).records]
        heard = max([record.update_timestamp.timestamp(), *said])
        if run.status != dg.DagsterRunStatus.QUEUED and heard < time.time() - SILENCE_SECONDS:
            instance.report_run_failed(run, f"Nothing was heard of the run for {SILENCE_SECONDS // 60} minutes: its process is gone.")
        else:
            runs.append(run)
    return runs


def _due(wanted: Mapping[dt.date, str], asked: dict[str, tuple[str, int]], running: set[dt.date]) -> tuple[list[dt.date], list[dt.date]]:
    """The days to ask for now, and those that were asked for often enough. Forgets days that need nothing any more."""
    for day in list(asked):
        if wanted.get(dt.date.fromisoformat(day)) != asked[day][0]:
            del asked[day]
    given_up = [day for day in sorted(wanted) if day not in running and asked.get(str(day), ("", 0))[1] >= MAX_ATTEMPTS]
    return [day for day in sorted(wanted) if day not in running and day not in given_up], given_up
