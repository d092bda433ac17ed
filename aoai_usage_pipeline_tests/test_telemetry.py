"""What is sent to Application Insights, what never is, and that without the connection string there is nothing of it."""

import collections
import contextlib
import datetime as dt
import importlib.metadata
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs import telemetry
from aoai_usage_pipeline.defs.telemetry import METRICS, sender
from aoai_usage_pipeline.hub.client import Partition
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reconcile.hub import Completeness
from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline.storage import StorageError
from aoai_usage_pipeline_tests.application_insights_server import ApplicationInsights, serving
from aoai_usage_pipeline_tests.conftest import _ACCOUNT, _KEY, ROOT
from aoai_usage_pipeline_tests.support import DAY, PRICE_BOOK, Captured, blob_name, capture_file, chat, installation, put, reference, seed_event

STRING = "InstrumentationKey=11111111-2222-3333-4444-555555555555;IngestionEndpoint=http://127.0.0.1:9/"
NAME = "APPLICATIONINSIGHTS_CONNECTION_STRING"
HOUR = dt.timedelta(hours=1)


# --- the setting ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "11111111-2222-3333-4444-555555555555",
        "InstrumentationKey=11111111-2222-3333-4444-555555555555",
        "IngestionEndpoint=https://westeurope-5.in.applicationinsights.azure.com/",
        "InstrumentationKey=s3cret;IngestionEndpoint=https://westeurope-5.in.applicationinsights.azure.com/",
        "InstrumentationKey=11111111-2222-3333-4444-555555555555;IngestionEndpoint=http://example.com/",
    ],
)
def test_what_is_no_connection_string_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(SettingsError, match=NAME) as error:
        Settings.from_env({NAME: text})
    assert text not in str(error.value)


def test_the_connection_string_is_not_in_the_representation_of_the_settings() -> None:
    settings = Settings.from_env({NAME: STRING})
    assert settings.applicationinsights_connection_string == STRING
    assert "1111" not in repr(settings)


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SettingsError, match=re.escape("pip install 'aoai-usage-pipeline[monitor]'")):
        Settings.from_env({NAME: STRING})
    assert Settings.from_env({}).applicationinsights_connection_string is None


def test_the_sensor_that_measures_is_there_only_with_the_setting() -> None:
    assert "pipeline_health" not in {sensor.name for sensor in build_defs().sensors or []}
    assert "pipeline_health" in {sensor.name for sensor in build_defs(applicationinsights_connection_string=STRING).sensors or []}


@pytest.mark.parametrize(
    ("endpoint", "azure"),
    [
        ("https://westeurope-5.in.applicationinsights.azure.com/", True),
        ("https://usgovvirginia-1.in.applicationinsights.azure.us/", True),
        ("https://dc.services.visualstudio.com", True),
        ("https://applicationinsights.azure.com.example.org/", False),
        ("http://127.0.0.1:9/", False),
    ],
)
def test_azure_is_signed_in_to_and_nobody_else(endpoint: str, azure: bool) -> None:
    assert sender.is_azure(endpoint) is azure


def exporting_to(exporter: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str = "http://127.0.0.1:9/") -> tuple[sender.Sender, list[dict[str, Any]]]:
    """A sender whose two exporters are made by `exporter`, which gets the name of the class, and the options they are made with."""
    made: list[dict[str, Any]] = []
    for name in ("STATSBEAT_DISABLED_ALL", "SDKSTATS_DISABLED", "CONTROLPLANE_DISABLED", "OPENTELEMETRY_RESOURCE_METRIC_DISABLED"):
        monkeypatch.setenv(f"APPLICATIONINSIGHTS_{name}", "true")
    for name in ("AzureMonitorTraceExporter", "AzureMonitorMetricExporter"):
        monkeypatch.setattr(sender, name, lambda name=name, **options: made.append(options) or exporter(name))
    for name in ("azure", "_quiet"):
        monkeypatch.setattr(sender, name, mock.MagicMock())
    monkeypatch.setattr(sender.trace, "set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(sender, "DefaultAzureCredential", lambda: "the identity")
    return sender.Sender(STRING.replace("http://127.0.0.1:9/", endpoint)), made


@pytest.mark.parametrize("endpoint", ["https://westeurope-5.in.applicationinsights.azure.com/", "http://127.0.0.1:9/"])
def test_the_exporters_sign_in_try_little_and_keep_nothing_on_disk(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = exporting_to(lambda name: mock.MagicMock(), monkeypatch, endpoint)
    assert [options.get("credential") for options in made] == ["the identity" if "azure.com" in endpoint else None] * 2
    assert all(options["disable_offline_storage"] and options["retry_total"] == 1 and options["read_timeout"] <= 5 for options in made)


def test_at_the_end_metrics_go_first_and_what_is_refused_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    exported: list[str] = []

    def exporter(name: str) -> Any:
        refused = SpanExportResult.FAILURE if "Trace" in name else MetricExportResult.FAILURE
        return mock.MagicMock(export=lambda *arguments, **options: exported.append(name) or refused)

    sending, _ = exporting_to(exporter, monkeypatch)
    with sending.tick("tick capture_files"):
        sending.record("aoai.runs.failed", 0)
    sending.flush()
    assert exported == ["AzureMonitorMetricExporter", "AzureMonitorTraceExporter"]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("opentelemetry", "the endpoint did not take it")] * 2


def test_exporters_that_block_hold_up_neither_a_tick_nor_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "FLUSH_SECONDS", 0.2)
    released = threading.Event()
    sending, _ = exporting_to(lambda name: mock.MagicMock(export=lambda *arguments, **options: released.wait(60)), monkeypatch)
    started = time.monotonic()
    with sending.tick("tick capture_files"):
        sending.record("aoai.runs.failed", 0)
    sending.flush()
    released.set()
    assert time.monotonic() - started < 10


# --- names ----------------------------------------------------------------------------------------------------------------------


WORKBOOK = [item for item in json.loads((ROOT / "infra/workbook.json").read_text())["items"] if item["type"] == 3]
ALERTS = (ROOT / "infra/modules/alerts.bicep").read_text()
KUSTO = ROOT / ".kusto/node_modules/@kusto/language-service-next"
TABLES = {
    "customMetrics": "(timestamp: datetime, name: string, valueCount: int, valueSum: real, valueMin: real, valueMax: real, customDimensions: dynamic)",
    "requests": "(timestamp: datetime, id: string, name: string, success: string, resultCode: string, duration: real, operation_Id: string,"
    " operation_ParentId: string, customDimensions: dynamic)",
    "dependencies": "(timestamp: datetime, id: string, name: string, type: string, target: string, data: string, success: string, resultCode: string,"
    " duration: real, operation_Id: string, operation_ParentId: string, customDimensions: dynamic)",
    "traces": "(timestamp: datetime, message: string, operation_Id: string, operation_ParentId: string, customDimensions: dynamic)",
}
"""Of Microsoft's mapping of Application Insights' names to a workspace's, the columns that both have. `customMetrics.value` is in no workspace."""


def test_workbook_and_alerts_ask_for_what_is_sent() -> None:
    queries = [item["content"]["query"] for item in WORKBOOK]
    asked = set(re.findall(r"'(aoai\.[a-z.]+)'", " ".join([*queries, ALERTS])))
    assert asked == set(METRICS)
    names = {found for query in queries for found in re.findall(r"(?:name|message) startswith '(\w+) '", query)}
    assert names == {"run", "tick", "step", "check"}
    dimensions = {found for query in [*queries, ALERTS] for found in re.findall(r"customDimensions\.(\w+)", query)}
    measured = {"usage_date", "currency", "table", "job"}  # the attributes of metrics; the test of a real run sees them
    assert dimensions <= sender._ATTRIBUTES | measured
    jobs = {job for query in re.findall(r"job\) in \((.*?)\)", ALERTS) for job in re.findall(r"\w+", query)}
    assert jobs and jobs <= {job.name for job in build_defs().jobs or []}


@pytest.mark.slow
def test_queries_of_workbook_and_alerts_are_valid_and_have_the_columns_that_are_shown() -> None:
    if not KUSTO.exists():
        pytest.fail("Kusto's language service is not installed: run `make test`, which installs it")
    alerts = [
        query.replace("MAX_LAG_MINUTES", "60").replace("MIN_COVERAGE_PERCENT", "95").replace("MAX_UNPRICED_REQUESTS", "0")
        for query in re.findall(r"'\'\'\n(.*?)'\'\'", ALERTS, re.S)
    ]
    assert len(alerts) == 3
    charts = [item["content"] for item in WORKBOOK]
    asked = json.dumps({"tables": TABLES, "queries": [*alerts, *(chart["query"].replace("{TimeRange:grain}", "1h") for chart in charts)]})
    node = Path(sys.executable).with_name("node")
    done = subprocess.run([node, ROOT / "aoai_usage_pipeline_tests/kusto.js", KUSTO], input=asked, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    assert [answer["faults"] for answer in answers] == [[]] * len(answers)
    assert [answer["columns"] for answer in answers[:3]] == [{"what": "string", "amount": "real"}] * 3
    assert ALERTS.count("name: 'what'") == 1
    for chart, answer in zip(charts, answers[3:], strict=True):
        settings = chart.get("chartSettings", {})
        tiles = [part["columnMatch"] for part in chart.get("tileSettings", {}).values() if isinstance(part, dict)]
        shown = {*(settings[name] for name in ("xAxis", "group") if name in settings), *settings.get("yAxis", []), *tiles}
        assert shown <= set(answer["columns"]), chart["title"]


def test_the_page_names_everything_that_is_sent() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    for name, (unit, text) in METRICS.items():
        assert f"| `{name}` | {unit} | {text}" in page


# --- the gate -------------------------------------------------------------------------------------------------------------------


def through_the_gate(*spans: Any) -> list[Any]:
    exported = InMemorySpanExporter()
    sender._Gate(exported).export(spans)
    return list(exported.get_finished_spans())


def ended(name: str, kind: trace.SpanKind, attributes: dict[str, Any], error: Exception | None = None) -> Any:
    provider, made = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(made))
    span = provider.get_tracer("azure").start_span(name, kind=kind, attributes=attributes)
    if error:
        span.record_exception(error)
        span.set_status(trace.StatusCode.ERROR, str(error))
    span.add_event("check no_overlaps", {"passed": "False", "rows": "s3cret"})
    span.end()
    return made.get_finished_spans()[0]


def test_only_known_attributes_leave_and_addresses_lose_what_signs_them() -> None:
    url = "https://user:s3cret@a.blob.core.windows.net/lake/x.json?sv=2022&sig=s3cret#s3cret"
    planted = {"url.full": url, "http.request.method": "GET", "Authorization": "Bearer s3cret", "http.url": url, "db.statement": "s3cret"}
    [span] = through_the_gate(ended("GET", trace.SpanKind.CLIENT, planted, ValueError("the body was s3cret")))
    assert span.attributes == {"url.full": "https://a.blob.core.windows.net/lake/x.json", "http.request.method": "GET"}
    assert [(event.name, dict(event.attributes)) for event in span.events] == [("check no_overlaps", {"passed": "False"})]
    assert "s3cret" not in span.to_json()
    assert not span.status.is_ok


@pytest.mark.parametrize(("answer", "ok"), [("404", True), ("412", True), ("403", False), ("azure.core.exceptions.ServiceRequestError", False)])
def test_a_refused_call_has_failed_and_a_missing_object_has_not(answer: str, ok: bool) -> None:
    [span] = through_the_gate(ended("GET", trace.SpanKind.CLIENT, {"error.type": answer}))
    assert span.status.is_ok is ok


@pytest.mark.parametrize("limit", [sender.CALLS_PER_STEP, sender.CALLS_PER_TICK])
def test_of_many_calls_the_first_of_each_step_and_the_failed_ones_are_sent(limit: int) -> None:
    provider, made = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(made))
    tracer = provider.get_tracer("azure")
    exported = InMemorySpanExporter()
    gate = sender._Gate(exported)
    with tracer.start_as_current_span("run bill"):
        for _ in range(2):
            with tracer.start_as_current_span("step") as step:
                if limit != sender.CALLS_PER_STEP:
                    gate.allow(step.get_span_context().span_id, limit)
                for n in range(limit + 50):
                    refused = {"error.type": "503"} if n in (limit + 10, limit + 20) else {}
                    tracer.start_span("GET", kind=trace.SpanKind.CLIENT, attributes=refused).end()
    gate.export(made.get_finished_spans())
    kept = exported.get_finished_spans()
    calls = collections.Counter(span.parent.span_id for span in kept if span.kind == trace.SpanKind.CLIENT and span.parent)
    assert list(calls.values()) == [limit + 2] * 2
    assert len([span for span in kept if span.kind == trace.SpanKind.INTERNAL]) == 3


def test_complaints_of_the_libraries_are_told_once_and_without_what_they_show(caplog: pytest.LogCaptureFixture) -> None:
    handler = sender._Once()
    for n in range(3):
        handler.handle(logging.LogRecord("azure", logging.ERROR, "", 0, "Data drop %s: %s", (n, "s3cret"), None))
    assert [record.getMessage() for record in caplog.records] == ["telemetry is not sent: Data drop %s: %s"]


# --- the sensor that measures ---------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for the sender: what was recorded, by name."""

    def __init__(self) -> None:
        self.recorded: dict[str, list[float]] = {}

    def record(self, name: str, value: float, **attributes: str) -> None:
        self.recorded.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def tick(self, name: str) -> Iterator[trace.Span]:
        yield trace.INVALID_SPAN


def measure(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> dict[str, list[float]]:
    recorder = Recorder()
    monkeypatch.setattr(telemetry, "_sender", lambda pipeline: recorder)
    sensor = telemetry.build_sensor(dg.DefaultSensorStatus.STOPPED)
    with dg.DagsterInstance.ephemeral() as instance, contextlib.suppress(StorageError):
        sensor.evaluate_tick(dg.build_sensor_context(instance=instance, resources={"pipeline": pipeline}))
    return recorder.recorded


def test_capture_lag_is_that_of_all_partitions_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = installation(tmp_path)
    partitions = [Completeness(Partition(str(n), 0, 99, None), 50, 30 + n, 51, 7 + n, n, False, "overdue") for n in range(2)]
    monkeypatch.setattr(pipeline, "completeness", lambda: partitions)
    assert measure(monkeypatch, pipeline) == {
        "aoai.capture.lag.events": [61], "aoai.capture.lag.minutes": [8], "aoai.capture.lost.events": [1],
        "aoai.held.days": [0, 0, 0], "aoai.runs.failed": [0],
    }  # fmt: skip


def test_a_hub_that_cannot_be_asked_gives_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise StorageError("no network")

    pipeline = installation(tmp_path)
    monkeypatch.setattr(pipeline, "completeness", refuse)
    assert measure(monkeypatch, pipeline) == {}


# --- a real run -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def insights() -> Iterator[ApplicationInsights]:
    with serving() as server:
        yield server


def environment(root: Path, capture_url: str, lake_url: str, **others: str) -> dict[str, str]:
    """A process's environment: an installation below `root`, and nothing of this process's settings."""
    (root / "home").mkdir(exist_ok=True)
    (root / "home/dagster.yaml").write_text("telemetry: {enabled: false}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AOAI_", "AZURE_", "APPLICATIONINSIGHTS_", "OTEL_"))}
    settings = {"CAPTURE_URL": capture_url, "LAKE_URL": lake_url, "WAREHOUSE_PATH": str(root / "warehouse.duckdb")}
    settings |= {"REFERENCE_DIR": str(root / "reference"), "START_DATE": "2026-10-01"}
    paths = {"DAGSTER_HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}
    return clean | {f"AOAI_{name}": value for name, value in settings.items()} | paths | others


def run(root: Path, env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=env, cwd=root, capture_output=True, text=True, timeout=240)


def bill(root: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(root, env, "-m", "aoai_usage_pipeline.cli", "bill", "--from", "2026-10-05", "--to", "2026-10-06")


def one_event(capture_url: str, connection_string: str | None = None, prompt: str = "hello") -> None:
    at = DAY + HOUR
    event = seed_event("r1", at, chat(10, 5), Prompt=[{"role": "user", "content": prompt}])
    put(capture_url, blob_name(at), capture_file([Captured(event, at, 1)]), connection_string)


def spans_by_id(insights: ApplicationInsights) -> dict[str, dict[str, Any]]:
    return {span["id"]: span for kind in ("RequestData", "RemoteDependencyData") for span in insights.data(kind)}


@pytest.mark.slow
def test_a_run_is_one_trace_with_its_steps_checks_and_azure_calls_and_nothing_secret(
    tmp_path: Path, azurite: tuple[str, str], insights: ApplicationInsights
) -> None:
    endpoint, connection_string = azurite
    one_event(f"{endpoint}/telemetry-capture", connection_string, prompt="pr0mpt-s3cret")
    reference(tmp_path / "reference")
    signature = generate_account_sas(
        _ACCOUNT, _KEY, ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, add=True, create=True), dt.datetime.now(dt.UTC) + HOUR,
    )  # fmt: skip
    env = environment(
        tmp_path, f"{endpoint}/telemetry-capture", f"{endpoint}/telemetry-lake", AOAI_HASH_KEY="h4sh-s3cret",
        AZURE_STORAGE_CONNECTION_STRING=f"BlobEndpoint={endpoint};SharedAccessSignature={signature}",
        **{NAME: insights.connection_string},
    )  # fmt: skip
    done = bill(tmp_path, env)
    assert done.returncode == 0, done.stdout + done.stderr

    spans = spans_by_id(insights)
    assert [span["name"] for span in insights.data("RequestData")] == ["run ingest", "run bill"]
    assert all(span["success"] for span in insights.data("RequestData"))
    steps = [span for span in spans.values() if span["name"].startswith("step ")]
    assert {"step raw_events", "step raw_events_checks", "step enriched_usage", "step daily_tables", "step usage_warehouse"} <= {
        s["name"] for s in steps
    }
    calls = [span for span in spans.values() if span.get("type") == "HTTP"]
    assert len(calls) > 20 and len(spans) == len(steps) + len(calls) + 2
    for span in steps:
        assert spans[span["tags"]["ai.operation.parentId"]]["name"] in ("run ingest", "run bill")
    for span in calls:
        parent = spans[span["tags"]["ai.operation.parentId"]]
        assert parent["name"].startswith(("step ", "run ")) and parent["tags"]["ai.operation.id"] == span["tags"]["ai.operation.id"]
    # worker threads: the capture file is read by the engine's, the daily tables are loaded by a pool
    assert any(
        "/telemetry-capture/ns/hub/" in span["data"] and spans[span["tags"]["ai.operation.parentId"]]["name"] == "step raw_events" for span in calls
    )
    checks = {event["message"]: event for event in insights.data("MessageData")}
    assert checks["check no_unreadable_files"]["properties"]["passed"] == "True"
    assert spans[checks["check token_coverage"]["tags"]["ai.operation.parentId"]]["name"] == "step enriched_usage_checks"

    assert insights.metrics("aoai.ingest.events") == [(1, {})]
    [(rate, _)], [took] = insights.metrics("aoai.ingest.rate"), [span["duration"] for span in steps if span["name"] == "step raw_events"]
    assert rate == pytest.approx(1 / float(took.rpartition(":")[2]), rel=0.1)
    assert insights.metrics("aoai.coverage") == [(1.0, {"usage_date": "2026-10-05"})]
    assert insights.metrics("aoai.unpriced.requests") == [(0, {"usage_date": "2026-10-05"})]
    assert insights.metrics("aoai.cost") == [(0.000075, {"usage_date": "2026-10-05", "currency": "USD"})]
    assert [where for _, where in insights.metrics("aoai.run.duration")] == [{"job": job, "outcome": "success"} for job in ("ingest", "bill")]
    assert {(value, where["table"]) for value, where in insights.metrics("aoai.held.days")} == {
        (0, "raw_events"), (0, "enriched_usage"), (0, "daily_billing"),
    }  # fmt: skip

    sent = "\n".join(insights.raw) + done.stdout + done.stderr
    for secret in ("s3cret", "sig=", signature, _KEY, "hello", "Authorization: Bearer", "203.0.113.24"):
        assert secret not in sent, secret
    assert insights.instrumentation_key not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_held_day_is_a_failed_run_with_its_step(tmp_path: Path, insights: ApplicationInsights) -> None:
    one_event(str(tmp_path / "capture"))
    book = PRICE_BOOK.replace("out-1,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD", "out-1,gpt-4o,*,*,*,*,*,output,10.00,1000000,EUR")
    assert book != PRICE_BOOK
    reference(tmp_path / "reference", book)
    done = bill(tmp_path, environment(tmp_path, str(tmp_path / "capture"), str(tmp_path / "lake"), **{NAME: insights.connection_string}))
    assert done.returncode == 1
    runs = {span["name"]: span for span in insights.data("RequestData")}
    assert runs["run ingest"]["success"] and not runs["run bill"]["success"]
    assert runs["run bill"]["properties"]["error"] == "Failure"
    failed = [span["name"] for span in insights.data("RemoteDependencyData") if not span["success"]]
    assert failed == ["step enriched_usage_checks"]
    [check] = [event for event in insights.data("MessageData") if event["message"] == "check tokens_enriched_equal_raw"]
    assert check["properties"]["passed"] == "False" and check["properties"]["days"] == "2026-10-05"
    assert (1, {"table": "enriched_usage"}) in insights.metrics("aoai.held.days")
    assert (insights.metrics("aoai.run.duration")[-1][1]) == {"job": "bill", "outcome": "failure"}


@pytest.mark.slow
def test_an_endpoint_that_never_answers_neither_fails_nor_holds_up_a_run(tmp_path: Path, insights: ApplicationInsights) -> None:
    one_event(str(tmp_path / "capture"))
    reference(tmp_path / "reference")
    insights.silent.set()
    started = time.monotonic()
    done = bill(tmp_path, environment(tmp_path, str(tmp_path / "capture"), str(tmp_path / "lake"), **{NAME: insights.connection_string}))
    assert done.returncode == 0, done.stderr
    # two runs, each of which waits for its flush once; the rest is imports, work and a slow machine. The exporter alone would try for minutes
    assert time.monotonic() - started < 2 * sender.FLUSH_SECONDS + 30
    assert insights.envelopes == []


TICKS = """
import contextlib, sys
import dagster as dg
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs.telemetry import sender
from aoai_usage_pipeline.settings import Settings
defs = build_defs()
with dg.DagsterInstance.get() as instance:
    for name, cursor in (("capture_files", None), ("pipeline_health", "1")):
        with dg.build_sensor_context(instance=instance, cursor=cursor, resources=defs.resources) as context:
            with contextlib.suppress(Exception):
                defs.resolve_sensor_def(name).evaluate_tick(context)
sender.sender(Settings.from_env().applicationinsights_connection_string).flush()
"""


@pytest.mark.slow
def test_ticks_are_traces_and_the_health_sensor_counts_failed_runs_and_held_days(tmp_path: Path, insights: ApplicationInsights) -> None:
    one_event(str(tmp_path / "capture"))
    reference(tmp_path / "reference", PRICE_BOOK.replace("output,10.00,1000000,USD", "output,10.00,1000000,EUR"))
    env = environment(tmp_path, str(tmp_path / "capture"), str(tmp_path / "lake"))
    assert bill(tmp_path, env).returncode == 1 and insights.raw == []
    done = run(tmp_path, env | {NAME: insights.connection_string}, "-c", TICKS)
    assert done.returncode == 0, done.stderr
    ticks = {span["name"]: span for span in insights.data("RequestData")}
    assert set(ticks) == {"tick capture_files", "tick pipeline_health"} and all(tick["success"] for tick in ticks.values())
    assert ticks["tick capture_files"]["properties"]["runs_requested"] == "1"
    assert sorted(insights.metrics("aoai.runs.failed"), key=str) == [(0, {}), (1, {"job": "bill"})]
    assert insights.metrics("aoai.held.days") == [(0, {"table": "raw_events"}), (1, {"table": "enriched_usage"}), (0, {"table": "daily_billing"})]

    shutil.rmtree(tmp_path / "capture")
    insights.envelopes.clear()
    assert run(tmp_path, env | {NAME: insights.connection_string}, "-c", TICKS).returncode == 0
    outcomes = {span["name"]: (span["success"], span["properties"].get("error")) for span in insights.data("RequestData")}
    assert outcomes == {"tick capture_files": (False, "StorageError"), "tick pipeline_health": (True, None)}


@pytest.mark.slow
def test_without_the_setting_nothing_of_opentelemetry_is_imported(tmp_path: Path) -> None:
    one_event(str(tmp_path / "capture"))
    reference(tmp_path / "reference")
    program = """
import sys
from aoai_usage_pipeline.cli import main
code = main(["bill", "--from", "2026-10-05", "--to", "2026-10-05"])
print([name for name in sys.modules if name.startswith(("opentelemetry", "azure.monitor", "psutil")) or name.endswith("telemetry.sender")], code)
"""
    done = run(tmp_path, environment(tmp_path, str(tmp_path / "capture"), str(tmp_path / "lake")), "-c", program)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr
