"""The process's way to Application Insights: one gate that says what may leave, behind it the Azure Monitor exporters. Imported only when used.

Microsoft's distribution, which sets all of that up by itself, is not used: it instruments every library it knows and sends their log records and
the texts of exceptions, in which names and addresses are.
"""

import collections
import contextlib
import functools
import logging
import os
import re
import socket
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from azure.core.settings import settings as azure
from azure.identity import DefaultAzureCredential
from azure.monitor.opentelemetry.exporter import AzureMonitorMetricExporter, AzureMonitorTraceExporter
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, _Gauge
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from aoai_usage_pipeline.deadline import within
from aoai_usage_pipeline.defs.telemetry import CHECK, METRICS
from aoai_usage_pipeline.settings import ingestion_endpoint

FLUSH_SECONDS = 5.0
"""How long the end of a run waits for the last of its telemetry."""
CALLS_PER_STEP, CALLS_PER_TICK = 25, 5
"""Azure calls of one step or tick that are sent; failed ones always are. A tick may make hundreds, every minute."""

_AZURE = re.compile(r"\.applicationinsights\.azure\.(com|us|cn)$|\.services\.visualstudio\.com$")
_CALLERS = 64  # that are remembered at once
_COUNTED = {"aoai.ingest.events", "aoai.runs.failed"}
_DURATIONS = {"aoai.run.duration"}
_ATTRIBUTES = {
    "job", "run_id", "first_day", "last_day", "error", "runs_requested", "asset", "passed", "severity", "offending", "days",
    "http.request.method", "http.response.status_code", "http.request.resend_count", "server.address", "server.port", "url.full", "error.type",
    "az.client_request_id", "az.service_request_id",
}  # fmt: skip
_REQUEST, _LOG = trace.SpanKind.SERVER, logging.getLogger(__name__)
_Result = TypeVar("_Result", SpanExportResult, MetricExportResult)


@functools.cache
def sender(connection_string: str) -> "Sender":
    """The one sender of this process."""
    return Sender(connection_string)


def is_azure(endpoint: str) -> bool:
    """Whether an ingestion endpoint is Azure's own, in any cloud."""
    return bool(_AZURE.search(urllib.parse.urlsplit(endpoint).hostname or ""))


class Sender:
    """Spans and metrics to one Application Insights component. Signs in to Azure's endpoints with `DefaultAzureCredential`."""

    def __init__(self, connection_string: str) -> None:
        # the exporter reports on itself to Microsoft and asks for remote configuration unless told otherwise
        for name in ("STATSBEAT_DISABLED_ALL", "SDKSTATS_DISABLED", "CONTROLPLANE_DISABLED", "OPENTELEMETRY_RESOURCE_METRIC_DISABLED"):
            os.environ.setdefault(f"APPLICATIONINSIGHTS_{name}", "true")
        endpoint = ingestion_endpoint(connection_string)
        options: dict[str, Any] = {"connection_string": connection_string, "disable_offline_storage": True}
        options |= {"timeout": FLUSH_SECONDS, "read_timeout": FLUSH_SECONDS, "retry_total": 1}
        if is_azure(endpoint):
            options["credential"] = DefaultAzureCredential()
        _quiet("azure.monitor.opentelemetry", "opentelemetry")
        resource = Resource({"service.name": "aoai-usage-pipeline", "service.instance.id": socket.gethostname()})
        # no hooks at exit: a run flushes when it ends, and what cannot be sent by then does not hold up the process
        self._tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._gate = _Gate(AzureMonitorTraceExporter(**options, tracer_provider=self._tracers))
        self._tracers.add_span_processor(BatchSpanProcessor(self._gate))
        reader = PeriodicExportingMetricReader(_Changes(AzureMonitorMetricExporter(**options)), export_interval_millis=60_000)
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._tracer, meter = self._tracers.get_tracer("aoai_usage_pipeline"), self._meters.get_meter("aoai_usage_pipeline")
        self._instruments: dict[str, Any] = {}
        for name, (unit, text) in METRICS.items():
            make = meter.create_counter if name in _COUNTED else meter.create_histogram if name in _DURATIONS else meter.create_gauge
            self._instruments[name] = make(name, unit, text)
        self.open: dict[object, otel.Context] = {}
        trace.set_tracer_provider(_AzureTracers(self._tracers, self.open))
        azure.tracing_enabled = True

    def record(self, name: str, value: float, **attributes: str) -> None:
        """One measurement of a metric."""
        instrument = self._instruments[name]
        record = instrument.add if name in _COUNTED else instrument.record if name in _DURATIONS else instrument.set
        record(value, attributes)

    @contextlib.contextmanager
    def tick(self, name: str) -> Iterator[trace.Span]:
        """A span around one evaluation of a sensor; Azure calls in it are its children."""
        with self._tracer.start_as_current_span(
            name, context=otel.Context(), kind=_REQUEST, record_exception=False, set_status_on_exception=False
        ) as span:
            self._gate.allow(span.get_span_context().span_id, CALLS_PER_TICK)
            self.open[span] = otel.get_current()
            try:
                yield span
            except BaseException as error:
                _failed(span, type(error).__name__)
                raise
            finally:
                del self.open[span]

    def open_run(self, name: str, attributes: Mapping[str, str]) -> "RunTrace":
        """The trace of a run that begins now."""
        return RunTrace(self._tracer, self.open, name, attributes)

    def flush(self) -> None:
        """Send what there is; gives up waiting after `FLUSH_SECONDS`."""

        def send() -> None:
            # the alerts live on metrics: they go first
            self._meters.force_flush()
            self._tracers.force_flush()

        with contextlib.suppress(TimeoutError):
            within(FLUSH_SECONDS, send)


class RunTrace:
    """A run's span, the span of the step it is at, and that step's events."""

    def __init__(self, tracer: trace.Tracer, contexts: dict[object, otel.Context], name: str, attributes: Mapping[str, str]) -> None:
        self._tracer, self._contexts = tracer, contexts
        self._run = tracer.start_span(name, context=otel.Context(), kind=_REQUEST, attributes=attributes)
        self._context = contexts[self] = trace.set_span_in_context(self._run, otel.Context())
        self.step: trace.Span | None = None

    def open_step(self, name: str) -> None:
        self.step = self._tracer.start_span(name, context=self._context)
        self._contexts[self] = trace.set_span_in_context(self.step, self._context)

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        (self.step or self._run).add_event(name, attributes)

    def close_step(self, error: str | None) -> None:
        if self.step:
            _end(self.step, error)
            self._contexts[self], self.step = self._context, None

    def close(self, error: str | None) -> None:
        self.close_step(error)
        del self._contexts[self]
        _end(self._run, error)


class _AzureTracers(trace.TracerProvider):
    """What the Azure SDK gets as OpenTelemetry's tracer provider."""

    def __init__(self, provider: TracerProvider, contexts: Mapping[object, otel.Context]) -> None:
        self._provider, self._contexts = provider, contexts

    def get_tracer(self, *arguments: Any, **options: Any) -> trace.Tracer:
        return _AzureTracer(self._provider.get_tracer(*arguments, **options), self._contexts)


class _AzureTracer(trace.Tracer):
    """Traces requests, not the methods around them, and finds their parent from worker threads too: the step of the run this process is at."""

    def __init__(self, tracer: trace.Tracer, contexts: Mapping[object, otel.Context]) -> None:
        self._tracer, self._contexts = tracer, contexts

    def start_span(
        self, name: str, context: otel.Context | None = None, kind: trace.SpanKind = trace.SpanKind.INTERNAL, *args: Any, **kw: Any
    ) -> Any:
        context = otel.get_current() if context is None else context
        parent = trace.get_current_span(context).get_span_context()
        if not parent.is_valid:
            working = tuple(self._contexts.values())
            context = working[0] if len(working) == 1 else context
            parent = trace.get_current_span(context).get_span_context()
        # requests of the exporter itself, or of nothing that is traced
        if kind != trace.SpanKind.CLIENT or not parent.is_valid or otel.get_value(otel._SUPPRESS_INSTRUMENTATION_KEY):
            return trace.NonRecordingSpan(parent)
        return self._tracer.start_span(name, context, kind, *args, **kw)

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, *args: Any, end_on_exit: bool = True, **kw: Any) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(name, *args, **kw), end_on_exit=end_on_exit, record_exception=False) as span:
            yield span


class _Gate(SpanExporter):
    """Lets through known attributes only, addresses without query, user and fragment, and no text of an exception."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._left: collections.OrderedDict[int, int] = collections.OrderedDict()

    def allow(self, caller: int, calls: int) -> None:
        """How many calls may still leave whose parent is the span with the id `caller`."""
        self._left.pop(caller, None)
        self._left[caller] = calls
        if len(self._left) > _CALLERS:
            self._left.popitem(last=False)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        kept = [_clean(span) for span in spans if self._within_limit(span)]
        return _told(self._exporter.export(kept)) if kept else SpanExportResult.SUCCESS

    def _within_limit(self, span: ReadableSpan) -> bool:
        if span.kind != trace.SpanKind.CLIENT or not span.parent:
            return True
        left = self._left.get(span.parent.span_id, CALLS_PER_STEP)
        self.allow(span.parent.span_id, left - 1)
        return left > 0 or _refused(span)


class _Changes(MetricExporter):
    """Sends a measurement once. Left to itself the SDK repeats the last value of a gauge as long as the process lives."""

    def __init__(self, exporter: MetricExporter) -> None:
        super().__init__(dict.fromkeys((Counter, Histogram, _Gauge), AggregationTemporality.DELTA))
        self._exporter = exporter

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        return _told(self._exporter.export(metrics_data, timeout_millis, **kwargs))

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        self._exporter.shutdown(timeout_millis, **kwargs)


def _told(result: _Result) -> _Result:
    """The result of an export; that one was refused is said by the libraries only for some answers."""
    if result not in (SpanExportResult.SUCCESS, MetricExportResult.SUCCESS):
        logging.getLogger("opentelemetry").warning("the endpoint did not take it")
    return result


def _clean(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_allowed(span.attributes),
        events=[type(event)(event.name, _allowed(event.attributes), event.timestamp) for event in span.events if event.name.startswith(f"{CHECK} ")],
        kind=span.kind,
        status=trace.Status(trace.StatusCode.ERROR if _refused(span) else span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _refused(span: ReadableSpan) -> bool:
    """Whether a call failed. That an object does not exist, or was replaced by another run, is an answer like any other."""
    return (span.attributes or {}).get("error.type") not in (None, "404", "409", "412")


def _allowed(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = {name: value for name, value in (attributes or {}).items() if name in _ATTRIBUTES}
    if "url.full" in kept:
        parts = urllib.parse.urlsplit(str(kept["url.full"]))
        kept["url.full"] = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return kept


def _failed(span: trace.Span, error: str) -> None:
    span.set_attribute("error", error)
    span.set_status(trace.StatusCode.ERROR)


def _end(span: trace.Span, error: str | None) -> None:
    if error:
        _failed(span, error)
    span.end()


class _Once(logging.Handler):
    """Says once what the libraries complain about, without their arguments, which may hold envelopes and the instrumentation key."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg not in self._said:
            self._said.add(str(record.msg))
            _LOG.warning("telemetry is not sent: %s", record.msg)


def _quiet(*names: str) -> None:
    handler = _Once()
    for name in names:
        logger = logging.getLogger(name)
        logger.propagate, logger.handlers = False, [handler]
