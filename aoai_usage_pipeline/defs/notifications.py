"""The sensor `notifications`: what Dagster, the lake and the Event Hub say is wrong, told to the targets of the settings."""

import datetime as dt
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import dagster as dg

from aoai_usage_pipeline.deadline import within
from aoai_usage_pipeline.defs import telemetry
from aoai_usage_pipeline.defs.common import days_of_run
from aoai_usage_pipeline.notify.book import Book, Busy, Checked, Ended
from aoai_usage_pipeline.notify.deliver import Delivered, deliver
from aoai_usage_pipeline.notify.notification import Links
from aoai_usage_pipeline.pipeline import Pipeline

MAX_RUNS_PER_TICK = 200
RUNS_SECONDS, ASK_SECONDS, SEND_SECONDS = 10.0, 10.0, 20.0
"""A tick must end within the minute that Dagster gives it."""

_KEY = "aoai_usage_pipeline/notifications"
_HUB_CHECK = "raw_events/capture_is_complete"
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_MAX_CHECKS = 500


def build_sensor(status: dg.DefaultSensorStatus) -> dg.SensorDefinition:
    """The sensor `notifications`."""

    @dg.sensor(
        minimum_interval_seconds=30,
        default_status=status,
        description="Tells the webhook and the Event Hub of the settings about failed runs, failed checks, held days and capture lag, each "
        "occurrence once. What was told is kept in Dagster's own database, not in the cursor: resetting the cursor repeats nothing.",
    )
    @telemetry.tick
    def notifications(context: dg.SensorEvaluationContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.SkipReason:
        targets, settings = pipeline.notification_targets, pipeline.settings
        links = Links(settings.ui_url and settings.ui_url.rstrip("/"), settings.runbook_url)
        try:
            book = Book(_Document(context.instance), uuid.uuid4().hex, time.time(), [target.name for target in targets], links)
        except Busy:
            return dg.SkipReason("another tick is still at it, or was killed less than two minutes ago")
        notes = _look(context, pipeline, book)
        book.save()
        results = deliver(book, targets, SEND_SECONDS, time.time)
        for name, result in results.items():
            notes.append(_said(name, result, book.waiting_for(name)))
            if result.given_up:
                context.log.error("%s refused notifications for good: %s", name, ", ".join(result.given_up))
        book.close()
        said = "; ".join(note for note in notes if note) or "nothing to tell"
        if any(result.problem for result in results.values()):
            raise NotDelivered(said)
        return dg.SkipReason(said)

    return notifications


class NotDelivered(Exception):
    """A target did not take what it was sent; it waits in the book. The tick fails for people to see it."""


class _Document:
    """The book in Dagster's own database, beside the runs it tells of: both are there, or neither."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._storage = instance.daemon_cursor_storage

    def load(self) -> str | None:
        return self._storage.get_cursor_values({_KEY}).get(_KEY)

    def save(self, text: str) -> None:
        self._storage.set_cursor_values({_KEY: text})


def _look(context: dg.SensorEvaluationContext, pipeline: Pipeline, book: Book) -> list[str]:
    """Enter into the book what is wrong now. What cannot be asked is left as it was, and named."""
    notes = [_runs(context, book)]

    def ask(what: str, call: Callable[[], Any], enter: Callable[[Any, float], None]) -> None:
        try:
            enter(within(ASK_SECONDS, call), time.time())
        except Exception as error:
            context.log.warning("%s could not be asked for: %s", what, error)
            notes.append(f"{what} could not be asked for ({type(error).__name__})")

    ask("held days", pipeline.held, book.held)
    if book.lag_due(time.time()):
        ask("capture lag", lambda: _lag(pipeline), book.lag)
    if given_up := book.settle(time.time()):
        context.log.error("%s notifications are given up: a target did not take them for a week", given_up)
    return notes


def _runs(context: dg.SensorEvaluationContext, book: Book) -> str:
    """Enter the runs that have ended since the last tick."""
    until = time.monotonic() + RUNS_SECONDS
    after = dg.RunsFilter(statuses=_ENDED, updated_after=dt.datetime.fromtimestamp(book.runs_since(), dt.UTC))
    limit = MAX_RUNS_PER_TICK + len(book.state.handled) + 1
    entered = 0
    for record in context.instance.get_run_records(after, limit=limit, order_by="update_timestamp", ascending=True):
        changed_at = record.update_timestamp.timestamp()
        ended_at = record.end_time or changed_at
        if record.dagster_run.run_id in book.state.handled:
            continue
        if entered == MAX_RUNS_PER_TICK or time.monotonic() > until:
            return "more runs to look at"
        entered += 1
        if book.is_new(record.dagster_run.run_id, ended_at, changed_at) and not _is_elsewhere(record.dagster_run, context):
            book.run_ended(_ended(context.instance, record.dagster_run, ended_at))
    return ""


def _is_elsewhere(run: dg.DagsterRun, context: dg.SensorEvaluationContext) -> bool:
    """Whether the run is another code location's. Runs of the command line have no location and are ours."""
    here, there = context.code_location_origin, run.remote_job_origin
    return bool(here and there and there.repository_origin.code_location_origin.location_name != here.location_name)


def _ended(instance: dg.DagsterInstance, run: dg.DagsterRun, ended_at: float) -> Ended:
    days = tuple(map(str, days_of_run(run)))
    failed = run.status == dg.DagsterRunStatus.FAILURE and run.tags.get("dagster/will_retry") != "true"
    events = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION, limit=_MAX_CHECKS).records
    evaluations = [event.event_log_entry.asset_check_evaluation for event in events]
    checks = tuple(_checked(evaluation, days or None) for evaluation in evaluations if evaluation)
    return Ended(run.run_id, _job(run), ended_at, days, _failure(instance, run) if failed else None, checks)


def _checked(evaluation: dg.AssetCheckEvaluation, days: tuple[str, ...] | None) -> Checked:
    metadata = evaluation.metadata
    subject = f"{evaluation.asset_key.to_user_string()}/{evaluation.check_name}"
    severity = "error" if evaluation.severity == dg.AssetCheckSeverity.ERROR else "warning"
    # the sensor asks the hub itself, so its lag is not told twice
    failed = not evaluation.passed and not (subject == _HUB_CHECK and severity == "error")
    failing = tuple(str(metadata["days"].value).split(", ")) if failed and "days" in metadata else ()
    rows, offending = metadata.get("rows"), metadata.get("offending")
    exhaustive = not (isinstance(rows, dg.TableMetadataValue) and offending and int(str(offending.value)) > len(rows.records))
    figures = {
        name.replace("_", " "): str(value.value) for name, value in metadata.items() if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue)
    }
    found = {"Found": evaluation.description} if evaluation.description else {}
    return Checked(subject, severity, failed, days, failing, exhaustive, found | figures)


def _failure(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dict[str, str]:
    """The step that failed first and why: our own words, or the type of the error, never its text, which may quote an event.

    Of a run that failed outside of a step, Dagster's word for it, and the type of the error that it met before.
    """
    kinds = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.ENGINE_EVENT}
    facts: dict[str, str] = {}
    for record in instance.get_records_for_run(run.run_id, of_type=kinds, limit=20, ascending=False).records:
        event = record.event_log_entry.dagster_event
        if not event:
            continue
        if event.is_step_failure:
            data = event.step_failure_data
            told = data.user_failure_data.description if data.user_failure_data else None
            error = data.error.cause or data.error if data.error else None
            facts = {"Step": event.step_key or "", "Error": told or (error and error.cls_name) or "unknown"}
        elif event.is_engine_event:
            error = event.engine_event_data.error
            if error and "Step" not in facts:
                facts["Cause"] = error.cls_name or "unknown"
        elif "Step" not in facts:
            facts["Error"] = _without_quotes(event.message or "")
    return facts


def _without_quotes(message: str) -> str:
    """Dagster's own word for a run that failed outside of a step, without the error it may quote."""
    return re.split(r"[:\n]", message)[0]


def _lag(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    """What is wrong with the hub's partitions: facts by state."""
    found: dict[str, dict[str, str]] = {}
    for one in pipeline.completeness():
        if not one.ok:
            says = f"{one.lost} events lost" if one.lost else f"{one.missing} events, the oldest {one.minutes} minutes old"
            found.setdefault(one.state, {})[f"Partition {one.partition.partition_id}"] = says
    return found


def _job(run: dg.DagsterRun) -> str:
    """The job for a person: runs that were asked for by choosing assets have one without a name."""
    return "materialization" if run.job_name.startswith("__") else run.job_name


def _said(name: str, result: Delivered, waiting: int) -> str:
    told = [f"told {result.told}"] if result.told else []
    told += [f"{waiting} waiting"] if waiting else []
    told += [f"given up {len(result.given_up)}"] if result.given_up else []
    told += [result.problem] if result.problem else []
    return f"{name}: {', '.join(told)}" if told else ""
