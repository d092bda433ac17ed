"""OpenTelemetry to Application Insights when APPLICATIONINSIGHTS_CONNECTION_STRING is set: runs, sensor ticks, checks, Azure calls, and metrics.

A run is followed through the events that Dagster writes about it, so no asset knows of this. Without the setting nothing of OpenTelemetry is
imported. Nothing here ever fails or holds up what it reports: sending happens in the background, and errors are warnings.
"""

import contextlib
import datetime as dt
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import dagster as dg

from aoai_usage_pipeline.defs.common import days_of_run
from aoai_usage_pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from aoai_usage_pipeline.defs.telemetry.sender import Sender

METRICS = {
    "aoai.capture.lag.events": ("{event}", "events the hub holds that no ingested capture file has"),
    "aoai.capture.lag.minutes": ("min", "age of the oldest of them"),
    "aoai.capture.lost.events": ("{event}", "events that left the hub before any capture file had them"),
    "aoai.ingest.events": ("{event}", "events read from capture files by the run"),
    "aoai.ingest.rate": ("{event}/s", "the same by the seconds the step took"),
    "aoai.coverage": ("1", "share of successful calls with reported usage"),
    "aoai.unpriced.requests": ("{request}", "requests with usage that has no price"),
    "aoai.cost": ("{currency}", "sum of the lines of the bill, as a floating-point number"),
    "aoai.held.days": ("d", "days that are held"),
    "aoai.runs.failed": ("{run}", "runs that failed, those killed with their machine included"),
    "aoai.run.duration": ("s", "from the first step to the last"),
}
"""Every metric by name: its unit (UCUM) and meaning."""

RUN, TICK, STEP, CHECK = "run", "tick", "step", "check"
"""What the names of spans begin with: `run bill`, `tick capture_files`, `step raw_events`; checks are events of a step's span."""

HEALTH_SECONDS = 300
MAX_RUNS = 1000
MAX_DAYS = 62
"""Of a run over more days, the figures of the newest are sent."""

_LOG = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def of_runs(pipeline: Pipeline) -> object:
    """The resource `pipeline`; with the setting, one that follows each run that uses it."""
    if not pipeline.settings.applicationinsights_connection_string:
        return pipeline

    @dg.resource(description="The pipeline; its runs are sent to Application Insights.")
    def followed(context: dg.InitResourceContext) -> Iterator[Pipeline]:
        follower = _follow(pipeline, context)
        try:
            yield pipeline
        finally:
            if follower:
                follower.end()

    return followed


def tick(function: _Function) -> _Function:
    """A sensor's function, which takes the resource `pipeline`: with the setting each evaluation is a span."""

    @functools.wraps(function)
    def traced(*arguments: Any, **resources: Any) -> Any:
        sender = _sender(resources["pipeline"])
        if not sender:
            return function(*arguments, **resources)
        with sender.tick(f"{TICK} {function.__name__}") as span:
            result = function(*arguments, **resources)
            span.set_attribute("runs_requested", len(getattr(result, "run_requests", None) or []))
            return result

    return traced  # type: ignore[return-value]


def build_sensor(status: dg.DefaultSensorStatus) -> dg.SensorDefinition:
    """The sensor `pipeline_health`: measures what changes without a run. That it counts failed runs, even none, is the sign of life."""

    @dg.sensor(
        name="pipeline_health",
        minimum_interval_seconds=HEALTH_SECONDS,
        default_status=status,
        description="Sends capture lag, held days and failed runs to Application Insights.",
    )
    @tick
    def pipeline_health(context: dg.SensorEvaluationContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.SensorResult:
        now = time.time()
        if sender := _sender(pipeline):
            # what may fail comes first: a tick that cannot measure sends no sign of life, and the next one counts the same runs
            if found := pipeline.completeness():
                _record_lag(sender, sum(p.missing for p in found), max(p.minutes for p in found), sum(p.lost for p in found))
            _record_held(sender, pipeline)
            since, until = (dt.datetime.fromtimestamp(at, dt.UTC) for at in (float(context.cursor or now), now))
            failed = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since, updated_before=until)
            records = context.instance.get_run_records(failed, limit=MAX_RUNS)
            sender.record("aoai.runs.failed", 0)
            for record in records:
                sender.record("aoai.runs.failed", 1, job=record.dagster_run.job_name)
        return dg.SensorResult(cursor=str(now), skip_reason="measured")

    return pipeline_health


def _sender(pipeline: Pipeline) -> "Sender | None":
    """The process's sender; None without the setting."""
    connection_string = pipeline.settings.applicationinsights_connection_string
    if not connection_string:
        return None
    from aoai_usage_pipeline.defs.telemetry.sender import sender

    with _harmless():
        return sender(connection_string)
    return None


def _follow(pipeline: Pipeline, context: dg.InitResourceContext) -> "_Run | None":
    sender = _sender(pipeline) if context.run else None
    if not sender or not context.run or not context.instance:
        return None
    with _harmless():
        run = _Run(sender, pipeline, context.run)
        context.instance.add_event_listener(context.run.run_id, run)
        return run
    return None


class _Run:
    """Turns the events of one run into spans and metrics."""

    def __init__(self, sender: "Sender", pipeline: Pipeline, run: dg.DagsterRun) -> None:
        self._sender, self._pipeline, self._job, self._started = sender, pipeline, run.job_name, time.monotonic()
        self._days = days_of_run(run)
        self._error: str | None = None
        self._step_started, self._events_read, self._billed = self._started, 0, False
        days = {"first_day": str(self._days[0]), "last_day": str(self._days[-1])} if self._days else {}
        self._trace = sender.open_run(f"{RUN} {run.job_name}", {"job": run.job_name, "run_id": run.run_id, **days})

    def __call__(self, entry: dg.EventLogEntry) -> None:
        with _harmless():
            if entry.dagster_event:
                self._saw(entry.dagster_event)

    def _saw(self, event: dg.DagsterEvent) -> None:
        if event.event_type == dg.DagsterEventType.STEP_START:
            self._step_started, self._events_read = time.monotonic(), 0
            self._trace.open_step(f"{STEP} {event.step_key}")
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            self._checked(event.asset_check_evaluation_data)
        elif event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            self._materialized(event.step_materialization_data.materialization)
        elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
            error = event.step_failure_data.error
            self._error = (error.cause or error).cls_name if error else "unknown"
            self._trace.close_step(self._error)
        elif event.event_type == dg.DagsterEventType.STEP_SUCCESS:
            if self._events_read:
                self._sender.record("aoai.ingest.events", self._events_read)
                self._sender.record("aoai.ingest.rate", self._events_read / max(time.monotonic() - self._step_started, 1e-3))
            self._trace.close_step(None)

    def _checked(self, evaluation: dg.AssetCheckEvaluation) -> None:
        said = {name: value.value for name, value in evaluation.metadata.items() if name in ("offending", "days") and value.value is not None}
        attributes = {"asset": evaluation.asset_key.to_user_string(), "passed": str(evaluation.passed), "severity": evaluation.severity.value}
        self._trace.event(f"{CHECK} {evaluation.check_name}", attributes | said)
        lag = [evaluation.metadata.get(name) for name in ("lag_events", "lag_minutes", "lost_events")]
        if all(lag):
            _record_lag(self._sender, *(int(str(value.value)) for value in lag if value))

    def _materialized(self, materialization: dg.AssetMaterialization) -> None:
        if read := materialization.metadata.get("events_read_now"):
            self._events_read += int(str(read.value))
        self._billed |= materialization.asset_key == dg.AssetKey("daily_billing")

    def end(self) -> None:
        """After the last step: the figures of the days, then everything goes out, as far as a few seconds allow."""
        with _harmless():
            if self._billed:
                self._record_days()
            _record_held(self._sender, self._pipeline)
        with _harmless():
            error = self._error or ("interrupted" if self._trace.step else None)
            outcome = "failure" if error else "success"
            self._sender.record("aoai.run.duration", time.monotonic() - self._started, job=self._job, outcome=outcome)
            self._trace.close(error)
            self._sender.flush()

    def _record_days(self) -> None:
        for day in self._pipeline.figures(self._days[-MAX_DAYS:]):
            on = str(day.usage_date)
            if day.coverage is not None:
                self._sender.record("aoai.coverage", float(day.coverage), usage_date=on)
            self._sender.record("aoai.unpriced.requests", day.unpriced, usage_date=on)
            for currency, cost in day.cost.items():
                self._sender.record("aoai.cost", float(cost), usage_date=on, currency=currency)


def _record_lag(sender: "Sender", events: int, minutes: int, lost: int) -> None:
    sender.record("aoai.capture.lag.events", events)
    sender.record("aoai.capture.lag.minutes", minutes)
    sender.record("aoai.capture.lost.events", lost)


def _record_held(sender: "Sender", pipeline: Pipeline) -> None:
    held = pipeline.held()
    for table in ("raw_events", "enriched_usage", "daily_billing"):
        sender.record("aoai.held.days", len(held.get(table, {})), table=table)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Whatever telemetry cannot do is a warning."""
    try:
        yield
    except Exception as error:
        _LOG.warning("telemetry: %s", type(error).__name__)
