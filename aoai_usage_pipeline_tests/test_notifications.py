"""Notifications: what is told, to whom, once; with a real Dagster instance, a real webhook and the hub of the tests."""

import datetime as dt
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import jsonschema
import pytest
from dagster._core.events import EngineEventData
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._utils.error import SerializableErrorInfo

from aoai_usage_pipeline import notify
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs.notifications import NotDelivered
from aoai_usage_pipeline.lake.held import Held
from aoai_usage_pipeline.notify import book as books
from aoai_usage_pipeline.notify import deliver as delivery
from aoai_usage_pipeline.notify import targets
from aoai_usage_pipeline.notify.book import Book, Busy, Checked, Ended
from aoai_usage_pipeline.notify.deliver import deliver
from aoai_usage_pipeline.notify.notification import Links, Notification, slack_message, teams_message
from aoai_usage_pipeline.notify.targets import EventHubTarget, Refused, Unreachable, Webhook
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.event_hub_server import KEY, KEY_NAME, Hub, Server
from aoai_usage_pipeline_tests.support import DAY, Captured, blob_name, capture_file, chat, installation, put, seed_event
from aoai_usage_pipeline_tests.webhook_server import PATH, WebhookServer

SCHEMA = json.loads((Path(notify.__path__[0]) / "notification.schema.json").read_text())
HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
MINUTE = 60.0


def valid(payload: dict[str, Any]) -> dict[str, Any]:
    jsonschema.validate(payload, SCHEMA, format_checker=jsonschema.FormatChecker())
    return payload


# --- the sensor on a real instance --------------------------------------------------------------------------------------------------


class Sensor:
    """The sensor `notifications`, evaluated again and again as the daemon does; a test may move its clock."""

    def __init__(self, pipeline: Pipeline, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance, self.later = instance, 0.0
        self.start(pipeline)
        clock = time.time
        monkeypatch.setattr("aoai_usage_pipeline.defs.notifications.time.time", lambda: clock() + self.later)

    def start(self, pipeline: Pipeline) -> None:
        """As after a restart and a reset cursor."""
        self.pipeline, self.cursor, self.defs = pipeline, None, build_defs(pipeline=pipeline)

    def fail(self, job: str, why: str = "gone", **tags: str) -> str:
        """A run of the job that failed outside of its steps."""
        run = self.instance.create_run_for_job(self.defs.resolve_job_def(job), tags=tags, status=dg.DagsterRunStatus.STARTED)
        self.instance.report_run_failed(run, f"{why}: secret")
        return run.run_id

    def tick(self) -> str:
        """What the tick says, whether it is skipped or fails."""
        try:
            data = self.defs.resolve_sensor_def("notifications").evaluate_tick(
                dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources={"pipeline": self.pipeline})
            )
        except NotDelivered as error:
            return f"failed: {error}"
        assert not data.run_requests
        self.cursor = data.cursor
        return data.skip_message or ""

    def run(self, job: str, first: dt.datetime, last: dt.datetime) -> dg.ExecuteInProcessResult:
        tags = {RANGE_START: str(first)[:10], RANGE_END: str(last)[:10]}
        return self.defs.resolve_job_def(job).execute_in_process(instance=self.instance, tags=tags, raise_on_error=False, run_config=QUIET)


@pytest.fixture
def webhook() -> Iterator[WebhookServer]:
    with WebhookServer() as running:
        yield running


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "home"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home), {"telemetry": {"enabled": False}}) as local:
        yield local


@pytest.fixture
def sensor(tmp_path: Path, instance: dg.DagsterInstance, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> Sensor:
    pipeline = installation(tmp_path, notify_webhook_url=webhook.url, ui_url="https://dagster.example/", runbook_url="https://runbook.example/r.md")
    return Sensor(pipeline, instance, monkeypatch)


def capture(pipeline: Pipeline, at: dt.datetime, *bodies: bytes, first: int = 1) -> Path:
    put(pipeline.settings.capture_url, blob_name(at), capture_file([Captured(body, at, n) for n, body in enumerate(bodies, first)]))
    return Path(pipeline.settings.capture_url, blob_name(at))


def test_what_went_wrong_is_told_once_also_after_a_restart_and_a_reset_cursor(sensor: Sensor, webhook: WebhookServer) -> None:
    torn = capture(sensor.pipeline, DAY, seed_event("a", DAY, chat(10, 5)), seed_event("b", DAY, chat(10, 5)))
    torn.write_bytes(torn.read_bytes()[:-20])
    capture(sensor.pipeline, DAY + HOUR, b"not json", first=3)
    sensor.run("ingest", DAY - ONE_DAY, DAY)
    assert sensor.tick() == "nothing to tell"
    assert webhook.received == []  # the history
    sensor.run("ingest", DAY, DAY)
    assert sensor.tick() == "webhook: told 2"
    payloads = {body["subject"]: valid(body) for _, body in webhook.received}
    assert {subject: (p["kind"], p["severity"], p["state"], p["days"]) for subject, p in payloads.items()} == {
        "raw_events/no_unreadable_files": ("check_failed", "error", "open", ["2026-10-05"]),
        "raw_events/no_quarantined_records": ("check_failed", "warning", "open", ["2026-10-05"]),
    }
    told = payloads["raw_events/no_quarantined_records"]
    assert told["title"] == "raw_events: no_quarantined_records warned on 2026-10-05"
    assert {"name": "offending", "value": "1"} in told["facts"]
    assert told["links"] == {
        "run": f"https://dagster.example/runs/{told['runId']}",
        "asset": "https://dagster.example/assets/raw_events",
        "check": "https://dagster.example/assets/raw_events?view=checks&checkDetail=no_quarantined_records",
        "runbook": "https://runbook.example/r.md#no_quarantined_records",
    }
    assert all(headers["Idempotency-Key"] == body["id"] for headers, body in webhook.received)
    sensor.start(Pipeline(sensor.pipeline.settings))
    assert sensor.tick() == "nothing to tell"
    capture(sensor.pipeline, DAY + ONE_DAY, b"not json either", first=9)
    sensor.run("ingest", DAY, DAY + ONE_DAY)
    sensor.tick()
    assert [title for title in webhook.titles(2) if "quarantined" in title] == ["raw_events: no_quarantined_records warned on 2026-10-06"]


def test_a_failed_run_is_told_without_the_text_of_its_error(sensor: Sensor, webhook: WebhookServer) -> None:
    sensor.tick()
    (Path(sensor.pipeline.settings.reference_dir) / "price_book.csv").write_text("price_id\nsk-secret-of-a-caller\n")
    result = sensor.run("daily_run", DAY, DAY + ONE_DAY)
    assert not result.success
    sensor.tick()
    sensor.tick()
    bodies = [valid(body) for _, body in webhook.received]
    assert [(body["kind"], body["runId"]) for body in bodies] == [("run_failed", result.run_id)]
    assert bodies[0]["title"] == "daily_run failed for 2026-10-05 to 2026-10-06"
    assert {fact["name"]: fact["value"] for fact in bodies[0]["facts"]} == {
        "Job": "daily_run", "Days": "2026-10-05 to 2026-10-06", "Step": "raw_events", "Error": "ReferenceDataError",
    }  # fmt: skip
    assert bodies[0]["links"]["runbook"].endswith("#run-failed")
    assert "secret" not in json.dumps(bodies)


def test_a_run_that_will_be_retried_is_not_told(sensor: Sensor, webhook: WebhookServer) -> None:
    sensor.tick()
    sensor.fail("ingest", **{"dagster/will_retry": "true"})
    failed = sensor.fail("ingest")
    sensor.tick()
    assert [body["runId"] for _, body in webhook.received] == [failed]
    assert "secret" not in json.dumps(webhook.received)


def test_a_run_that_could_not_be_started_is_told_with_the_type_of_what_kept_it(sensor: Sensor, webhook: WebhookServer) -> None:
    sensor.tick()
    run = sensor.instance.create_run_for_job(sensor.defs.resolve_job_def("ingest"), status=dg.DagsterRunStatus.STARTING)
    # as the daemon does when a code location does not load
    error = SerializableErrorInfo("secret", [], "DagsterCodeLocationLoadError")
    sensor.instance.report_engine_event("Caught an unrecoverable error", run, EngineEventData(error=error))
    sensor.instance.report_run_failed(run)
    sensor.tick()
    [(_, body)] = webhook.received
    assert {fact["name"]: fact["value"] for fact in valid(body)["facts"]} == {
        "Job": "ingest", "Cause": "DagsterCodeLocationLoadError",
        "Error": "This run has been marked as failed from outside the execution context.",
    }  # fmt: skip


def test_held_days_are_told_while_they_last(sensor: Sensor, webhook: WebhookServer) -> None:
    held = Held(sensor.pipeline.lake, "enriched_usage")
    for day, reason in ((DAY, "tokens differ: raw 15, enriched 14"), (DAY + ONE_DAY, "ConversionException: could not read 'a prompt'")):
        held.hold(day.date(), reason, "")
    sensor.tick()  # what is held now is no history
    sensor.tick()
    [(_, body)] = webhook.received
    assert valid(body)["title"] == "enriched_usage: 2 days are held (2026-10-05 to 2026-10-06)"
    facts = {fact["name"]: fact["value"] for fact in body["facts"]}
    assert facts["2026-10-05"] == "tokens differ: raw 15, enriched 14"
    assert facts["2026-10-06"] == "ConversionException"
    held.hold((DAY + 4 * ONE_DAY).date(), "tokens differ", "")
    held.release(DAY.date())
    sensor.tick()
    assert webhook.titles(1) == ["enriched_usage: 1 day is held (2026-10-09)"]
    sensor.later = books.QUIET + 1
    sensor.tick()
    sensor.tick()
    assert webhook.titles(2) == ["Resolved: held days of enriched_usage on 2026-10-05"]


def test_a_lake_that_cannot_be_reached_does_not_keep_failed_runs_from_being_told(
    sensor: Sensor, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Held(sensor.pipeline.lake, "daily_billing").hold(DAY.date(), "tokens differ", "")
    sensor.tick()

    def down(_: Pipeline) -> None:
        raise OSError("the storage account is down")

    monkeypatch.setattr(Pipeline, "held", down)
    sensor.fail("bill")
    sensor.later = 2 * books.QUIET
    assert sensor.tick() == "held days could not be asked for (OSError); webhook: told 1"
    assert [body["kind"] for _, body in webhook.received] == ["days_held", "run_failed"]


def test_many_runs_are_told_over_several_ticks(sensor: Sensor, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aoai_usage_pipeline.defs.notifications.MAX_RUNS_PER_TICK", 3)
    monkeypatch.setattr(delivery, "PER_TICK", 2)
    sensor.tick()
    runs = [sensor.fail("bill", f"reason {n}") for n in range(7)]
    said = [sensor.tick() for _ in range(5)]
    assert said[0] == "more runs to look at; webhook: told 2, 1 waiting"
    assert said[-1] == "nothing to tell"
    assert [body["runId"] for _, body in webhook.received] == runs


def test_the_address_of_the_webhook_is_never_shown(
    sensor: Sensor, webhook: WebhookServer, caplog: pytest.LogCaptureFixture, instance: dg.DagsterInstance
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = PATH.split("=")[1]
    Held(sensor.pipeline.lake, "daily_billing").hold(DAY.date(), "tokens differ", "")
    said = []
    for n, answer in enumerate((503, 404, 400, "close", "redirect", 202)):
        webhook.answer, sensor.later = answer, n * books.QUIET
        said.append(sensor.tick())
    assert said == [
        "failed: webhook: 1 waiting, status 503", "failed: webhook: 1 waiting, status 404", "failed: webhook: 1 waiting, status 400",
        "failed: webhook: 1 waiting, RemoteDisconnected", "failed: webhook: 1 waiting, status 307", "webhook: told 1",
    ]  # fmt: skip
    webhook.__exit__()
    Held(sensor.pipeline.lake, "raw_events").hold(DAY.date(), "records differ", "")
    sensor.later += books.QUIET
    said.append(sensor.tick())
    assert said[-1] == "failed: webhook: 1 waiting, ConnectionRefusedError"
    assert sensor.tick() == "webhook: 1 waiting"  # it is left alone for a minute
    kept = json.dumps(dict(instance.daemon_cursor_storage.get_cursor_values({"aoai_usage_pipeline/notifications"})))
    for text in (*said, caplog.text, kept, repr(sensor.pipeline.settings)):
        assert secret not in text
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({"AOAI_NOTIFY_WEBHOOK_URL": f"ftp://host/{secret}"})
    assert secret not in str(refused.value)


def test_without_a_target_there_is_no_sensor(tmp_path: Path) -> None:
    assert [sensor.name for sensor in build_defs(pipeline=installation(tmp_path)).sensors or []] == ["capture_files"]
    defs = build_defs(notify_webhook_url="https://hooks.slack.com/x", automation="running")
    assert defs.resolve_sensor_def("notifications").default_status == dg.DefaultSensorStatus.RUNNING
    with pytest.raises(SettingsError, match="AOAI_NOTIFY_EVENT_HUB"):
        Settings(notify_event_hub="notifications")
    with pytest.raises(SettingsError, match="the same hub"):
        Settings(notify_event_hub="usage", event_hub_namespace="ns", event_hub_name="usage")


def test_a_run_of_another_code_location_is_not_told(sensor: Sensor, webhook: WebhookServer) -> None:
    sensor.tick()
    here, there = (InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="m"), location_name=name) for name in ("here", "there"))
    runs = {}
    for origin in (here, there):
        run = sensor.instance.create_run_for_job(sensor.defs.resolve_job_def("bill"), status=dg.DagsterRunStatus.STARTED)
        sensor.instance.delete_run(run.run_id)
        runs[origin.location_name] = run._replace(remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(origin, "r"), "bill"))
        sensor.instance.add_run(runs[origin.location_name])
        sensor.instance.report_run_failed(runs[origin.location_name])
    context = dg.SensorEvaluationContext(
        instance_ref=None, last_tick_completion_time=None, last_run_key=None, cursor=None, repository_name="r", instance=sensor.instance,
        resources={"pipeline": sensor.pipeline}, code_location_origin=here,
    )  # fmt: skip
    sensor.defs.resolve_sensor_def("notifications").evaluate_tick(context)
    assert [body["runId"] for _, body in webhook.received] == [runs["here"].run_id]


@pytest.mark.slow
def test_capture_lag_is_told_to_both_targets(
    tmp_path: Path, instance: dg.DagsterInstance, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = dt.datetime.now(dt.UTC).replace(tzinfo=None) - 2 * HOUR
    hubs = {"usage": Hub(1, lambda: long_ago), "notifications": Hub(1)}
    with Server(hubs) as server:
        sensor = Sensor(
            installation(
                tmp_path, notify_webhook_url=webhook.url, notify_event_hub="notifications", event_hub_namespace="ns", event_hub_name="usage",
                event_hub_connection_string=server.connection_string,
            ), instance, monkeypatch,
        )  # fmt: skip
        hubs["usage"].put("0", *[seed_event(str(n), long_ago, chat(10, 5)) for n in range(3)])
        assert sensor.tick() == "webhook: told 1; event hub: told 1"
        assert sensor.tick() == "nothing to tell"
        [(_, body)] = webhook.received
        assert (valid(body)["kind"], body["subject"]) == ("capture_lag", "overdue")
        assert re.fullmatch("3 events, the oldest 1(19|20) minutes old", body["facts"][0]["value"])
        # the check of the next run says the same, and is not told again
        capture(sensor.pipeline, long_ago + HOUR, seed_event("x", long_ago, chat(1, 1)), first=7)
        sensor.run("ingest", long_ago, long_ago)
        sensor.tick()
        assert [b["subject"] for _, b in webhook.received if "capture" in b["subject"]] == []
        [event] = hubs["notifications"].partitions["0"].events
        assert event.key == "overdue"
        assert body["id"].encode() in event.sections and b"application/json" in event.sections
        told = json.loads(event.sections[event.sections.index(b"{") :])
        assert valid(told) == {name: value for name, value in body.items() if name not in ("type", "attachments")}


@pytest.mark.slow
def test_a_tick_that_is_killed_repeats_one_notification_with_its_id(sensor: Sensor, webhook: WebhookServer, tmp_path: Path) -> None:
    sensor.tick()
    for n in range(5):
        sensor.fail("bill", f"reason {n}")
    script = """
import sys, dagster as dg
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs.notifications import NotDelivered
defs = build_defs()
with dg.DagsterInstance.local_temp(sys.argv[1]) as instance:
    context = dg.build_sensor_context(instance=instance, resources={"pipeline": defs.resources["pipeline"]})
    print(defs.resolve_sensor_def("notifications").evaluate_tick(context).skip_message)
"""
    settings = sensor.pipeline.settings
    env = os.environ | {"AOAI_NOTIFY_WEBHOOK_URL": webhook.url, "AOAI_LAKE_URL": settings.lake_url, "AOAI_REFERENCE_DIR": settings.reference_dir}
    killed: list[int] = []

    def kill_at_the_third() -> None:
        if len(webhook.received) == 3 and not killed:
            killed.append(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait(10)

    webhook.on_request = kill_at_the_third
    command = [sys.executable, "-c", script, str(tmp_path / "home")]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len(webhook.received) == 3
    assert sensor.tick().startswith("another tick is still at it")
    sensor.later = books.LEASE + 1
    assert sensor.tick() == "webhook: told 3"
    deliveries = Counter(headers["Idempotency-Key"] for headers, _ in webhook.received)
    assert sorted(deliveries.values()) == [1, 1, 1, 1, 2]
    assert len({body["runId"] for _, body in webhook.received}) == 5


# --- what an occurrence is ------------------------------------------------------------------------------------------------------------


class Document:
    """A book in memory; `failing` makes saving fail."""

    def __init__(self) -> None:
        self.text: str | None = None

    def load(self) -> str | None:
        return self.text

    def save(self, text: str) -> None:
        self.text = text


class Desk:
    """A book that is opened, written and closed at a time of the test, with targets that only count."""

    def __init__(self, *names: str) -> None:
        self.document, self.names, self.ticks = Document(), names or ("webhook",), itertools.count()

    def at(self, now: float, *entries: Callable[[Book], object]) -> list[str]:
        """The titles that came up."""
        book = Book(self.document, f"tick {next(self.ticks)}", now, self.names, Links())
        before = len(book.state.waiting)
        for enter in entries:
            enter(book)
        book.settle(now)
        new = [one.payload["title"] for one in book.state.waiting[before:]]
        for one in book.state.waiting:
            valid(one.payload)
        book.close()
        return new


def checked(failing: str = "", days: str | None = "2026-10-05 2026-10-06", severity: str = "error", exhaustive: bool = True) -> Checked:
    return Checked(
        "raw_events/no_sequence_gaps", severity, bool(failing), tuple(days.split()) if days else None, tuple(failing.split()), exhaustive, {}
    )


def run_of(*checks: Checked, at: float = 1000.0, run_id: str = "r") -> Callable[[Book], object]:
    return lambda book: book.run_ended(Ended(run_id, "ingest", at, (), None, checks))


FAILED = "raw_events: no_sequence_gaps failed on "
RESOLVED = "Resolved: raw_events: no_sequence_gaps on "


def test_a_check_is_told_by_day_when_it_begins_to_fail_and_when_it_is_over() -> None:
    desk = Desk()
    assert desk.at(1000, run_of(checked("2026-10-05"))) == [FAILED + "2026-10-05"]
    assert desk.at(1100, run_of(checked("2026-10-05"))) == []
    assert desk.at(1200, run_of(checked("2026-10-05 2026-10-06"))) == [FAILED + "2026-10-06"]
    # a run of other days says nothing about these
    assert desk.at(1300, run_of(checked(days="2026-10-09"), at=1300)) == []
    assert desk.at(9000) == []
    assert desk.at(9100, run_of(checked("2026-10-06"), at=9100)) == []
    assert desk.at(9100 + books.QUIET) == [RESOLVED + "2026-10-05"]
    assert desk.at(20_000, run_of(checked("2026-10-05"), at=20_000, run_id="new")) == [FAILED + "2026-10-05"]
    # executed on its own, a check looks at everything
    assert desk.at(21_000, run_of(checked(days=None), at=21_000)) == []
    assert desk.at(21_000 + books.QUIET) == [RESOLVED + "2026-10-05 to 2026-10-06"]
    assert desk.at(99_000) == []


def test_what_comes_and_goes_within_an_hour_is_told_once() -> None:
    desk = Desk()
    told = []
    for n in range(24):
        told += desk.at(n * 300, run_of(checked("2026-10-05" if n % 2 == 0 else ""), at=n * 300))
    assert told == [FAILED + "2026-10-05"]


def failed(run_id: str, at: float, days: str = "", why: str = "ReferenceDataError", job: str = "ingest") -> Callable[[Book], object]:
    return lambda book: book.run_ended(Ended(run_id, job, at, tuple(days.split()), {"Step": "raw_events", "Error": why}, ()))


def test_runs_that_fail_again_and_again_for_one_reason_are_told_at_once_and_then_once_an_hour() -> None:
    desk = Desk()
    assert desk.at(1000, failed("0", 1000, "2026-10-05")) == ["ingest failed for 2026-10-05"]
    told = []
    for n in range(1, 200):
        told += desk.at(1000 + n * 60, failed(str(n), 1000 + n * 60, "2026-10-05 2026-10-06"))
        if n == 30:  # another reason and another job are told at once
            assert desk.at(2801, failed("x", 2801, why="OSError"), failed("y", 2801, job="bill")) == ["ingest failed", "bill failed"]
    told += desk.at(1000 + 4 * books.GATHERED)
    assert told == [f"ingest failed {n} times for 2026-10-05 to 2026-10-06" for n in (60, 60, 60, 19)]
    last = Book(desk.document, "", 99_000, ["webhook"], Links()).state.waiting[-1].payload
    assert (last["runId"], last["days"]) == ("199", ["2026-10-05", "2026-10-06"])
    assert {"name": "Runs", "value": "19, from 1970-01-01T03:17:40.000Z to 1970-01-01T03:35:40.000Z"} in last["facts"]
    # told anew when it failed no more for an hour
    assert desk.at(30_000) == []
    assert desk.at(30_001, failed("z", 30_001)) == ["ingest failed"]
    assert len(json.loads(desk.document.text or "")["failing"]) == 1


def test_a_burst_of_failed_runs_is_one_notification() -> None:
    assert Desk().at(1000, *[failed(str(n), 1000, f"2026-09-{n % 30 + 1:02}") for n in range(200)]) == [
        "ingest failed 200 times for 2026-09-01 to 2026-09-30"
    ]


def test_a_table_of_rows_that_was_cut_off_resolves_nothing() -> None:
    desk = Desk()
    desk.at(0, run_of(checked("2026-10-05 2026-10-06"), at=0))
    desk.at(1, run_of(checked("2026-10-05", exhaustive=False), at=1))
    assert desk.at(2 * books.QUIET) == []


def test_the_hubs_lag_is_told_when_it_begins_when_it_gets_worse_and_when_it_is_over() -> None:
    desk = Desk()
    overdue, lost = {"overdue": {"Partition 0": "3 events"}}, {"lost": {"Partition 0": "3 events lost"}}
    assert len(desk.at(0, lambda book: book.lag(overdue, 0))) == 1
    assert desk.at(1, lambda book: book.lag(overdue, 1)) == []
    assert desk.at(2, lambda book: book.lag(lost, 2)) == ["Events left the Event Hub before any file had them"]
    assert desk.at(2 + books.QUIET, lambda book: book.lag(lost, 2 + books.QUIET)) == ["Resolved: events of the Event Hub are overdue"]
    asked = [Book(desk.document, "x", now, ["webhook"], Links()).lag_due(now) for now in (0.0, books.LAG_EVERY)]
    assert asked == [False, True]


def test_a_run_whose_record_changes_later_is_not_told_again_and_a_late_record_is_told() -> None:
    document = Document()
    Book(document, "", 10_000, ["webhook"], Links()).close()
    book = Book(document, "", 20_000, ["webhook"], Links())
    assert not book.is_new("before the book", 9_000, 19_000)
    assert book.is_new("a", 19_000, 19_001)
    assert not book.is_new("a", 19_000, 19_500)
    assert book.is_new("late", 18_500, 18_600)
    book.close()
    book = Book(document, "", 90_000, ["webhook"], Links())
    assert book.is_new("b", 80_000, 80_001)
    book.close()
    book = Book(document, "", 90_001, ["webhook"], Links())
    assert "a" not in book.state.handled
    assert not book.is_new("a", 19_000, 89_000)


def test_two_ticks_never_have_the_book_at_once() -> None:
    document = Document()
    first = Book(document, "one", 0, ["webhook"], Links())
    with pytest.raises(Busy):
        Book(document, "two", books.LEASE - 1, ["webhook"], Links())
    first.close()
    Book(document, "two", 1, ["webhook"], Links())
    with pytest.raises(Busy):
        Book(document, "three", books.LEASE, ["webhook"], Links())
    assert Book(document, "three", books.LEASE + 2, ["webhook"], Links())

    class Raced(Document):
        def save(self, text: str) -> None:
            super().save(text.replace('"owner":"one"', '"owner":"two"'))

    with pytest.raises(Busy):
        Book(Raced(), "one", 0, ["webhook"], Links())


# --- delivery -------------------------------------------------------------------------------------------------------------------------


class Counting:
    """A target that does what `act` says."""

    def __init__(self, name: str = "other") -> None:
        self.name, self.told = name, []
        self.act: Callable[[dict[str, Any]], None] = lambda payload: None

    def open(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            def send(payload: dict[str, Any], key: str) -> None:
                self.act(payload)
                self.told.append(payload["subject"])

            yield send

        return opened()


class Line:
    """A book with notifications that wait for targets, delivered at times of the test."""

    def __init__(self, *targets: Any) -> None:
        self.document, self.targets, self.ticks = Document(), targets, itertools.count()

    def tick(self, now: float, *subjects: str, seconds: float = 5.0) -> dict[str, delivery.Delivered]:
        book = Book(self.document, str(next(self.ticks)), now, [target.name for target in self.targets], Links())
        for subject in subjects:
            book.run_ended(Ended(subject, subject, now, (), {"Error": "x"}, ()))
        book.settle(now)
        book.save()
        results = deliver(book, self.targets, seconds, lambda: now)
        book.close()
        return results


def refuse(_: Any) -> None:
    raise Refused("status 400")


def down(_: Any) -> None:
    raise Unreachable("status 503")


def test_a_target_that_is_away_for_a_day_loses_nothing_is_not_flooded_and_holds_nobody_up() -> None:
    away, other = Counting("away"), Counting()
    tried: list[str] = []

    def act(payload: dict[str, Any]) -> None:
        tried.append(payload["subject"])
        down(payload)

    away.act = act
    line = Line(away, other)
    subjects = [f"job {n:02}" for n in range(48)]
    for minute in range(0, 24 * 60, 3):
        line.tick(minute * MINUTE, *([subjects[minute // 30]] if minute % 30 == 0 else []))
    assert other.told == subjects and away.told == []
    assert 24 * 60 / 16 <= len(tried) < 24 * 60 / 13  # in the end every fifteen minutes
    away.act = lambda payload: None
    back = [line.tick(86_400 + minute * MINUTE)["away"].told for minute in range(20)]
    assert [told for told in back if told] == [delivery.PER_TICK, delivery.PER_TICK, 48 - 2 * delivery.PER_TICK]
    assert away.told == subjects


def test_what_a_target_refuses_is_tried_a_bounded_number_of_times_and_holds_up_nothing() -> None:
    target, tried = Counting(), []

    def act(payload: dict[str, Any]) -> None:
        if payload["subject"] == "poison":
            tried.append(payload["id"])
            refuse(payload)

    target.act = act
    line = Line(target)
    results = [line.tick(0, "poison", "good")] + [line.tick(minute * MINUTE) for minute in range(2, 24 * 60, 10)]
    assert target.told == ["good"]
    assert len(tried) == delivery.MAX_REFUSALS and len(set(tried)) == 1
    assert [result["other"].given_up for result in results if result["other"].given_up] == [tried[:1]]


def test_what_no_target_takes_for_a_week_is_given_up_and_a_target_that_is_gone_is_forgotten() -> None:
    away = Counting("away")
    away.act = down
    line = Line(away)
    line.tick(0, "old")
    line.targets = (Counting("new"),)
    line.tick(1, "newer")
    assert line.targets[0].told == ["newer"]  # it is not told what was there before it
    assert json.loads(line.document.text or "")["waiting"] == []
    line.targets = (away,)
    line.tick(100, "old")
    away.act = lambda payload: None
    line.tick(100 + books.KEPT)
    assert away.told == []


def test_a_target_that_gives_no_answer_costs_its_time_and_what_it_says_later_does_not_count(webhook: WebhookServer) -> None:
    webhook.answer = "hang"
    hanging, other = Webhook(webhook.url), Counting()
    line = Line(hanging, other)
    start = time.monotonic()
    results = line.tick(0, "a", "b", seconds=0.5)
    assert time.monotonic() - start < 5
    assert results["webhook"].problem == "no answer within 0 seconds" and other.told == ["a", "b"]
    assert line.tick(1)["webhook"] == delivery.Delivered()  # left alone for a minute
    webhook.answer = 202
    assert line.tick(61)["webhook"].told == 2
    assert [body["subject"] for _, body in webhook.received] == ["a", "a", "b"]
    assert webhook.received[0][1]["id"] == webhook.received[1][1]["id"]


def test_a_target_that_raises_something_unheard_of_is_only_unreachable() -> None:
    target = Counting()

    def act(_: Any) -> None:
        raise KeyError("https://host/secret")

    target.act = act
    assert Line(target).tick(0, "a")["other"].problem == "KeyError"


@pytest.mark.parametrize("answer", [503, 429, 500, 404, 401, 410, "close", "redirect"])
def test_the_webhook_is_tried_again(webhook: WebhookServer, answer: int | str) -> None:
    webhook.answers = [answer]
    line = Line(Webhook(webhook.url))
    assert line.tick(0, "a", "b")["webhook"].told == 0
    assert len(webhook.received) == 1
    assert line.tick(61)["webhook"].told == 2
    assert [body["subject"] for _, body in webhook.received] == ["a", "a", "b"]


def test_a_receiver_that_has_it_already_has_been_told(webhook: WebhookServer) -> None:
    webhook.answer = 409
    assert Line(Webhook(webhook.url)).tick(0, "a")["webhook"].told == 1


@pytest.mark.parametrize(("said", "wait"), [("7", 7), ("Thu, 26 Nov 2026 08:00:00 GMT", 0), ("soon", 0), (None, 0)])
def test_retry_after_is_heeded(said: str | None, wait: float) -> None:
    assert targets._retry_after(said) == wait


@pytest.mark.slow
def test_an_event_hub_that_is_gone_holds_up_nobody_and_is_told_when_it_is_back(tmp_path: Path) -> None:
    hub = Hub(4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connection_string = f"Endpoint=sb://127.0.0.1:{port};SharedAccessKeyName={KEY_NAME};SharedAccessKey={KEY};UseDevelopmentEmulator=true;"
    pipeline = installation(tmp_path, notify_event_hub="notifications", event_hub_namespace="ns", event_hub_connection_string=connection_string)
    [target] = pipeline.notification_targets
    assert isinstance(target, EventHubTarget)
    other = Counting()
    line = Line(target, other)
    result = line.tick(0, "a", "b", "a again", seconds=20)["event hub"]
    assert result.told == 0 and result.problem
    assert other.told == ["a", "b", "a again"]
    with Server({"notifications": hub}, port=port):
        assert line.tick(1000, seconds=20)["event hub"].told == 3
    events = [event for partition in hub.partitions.values() for event in partition.events]
    assert sorted(event.key for event in events) == ["a", "a again", "b"]


# --- what is written ------------------------------------------------------------------------------------------------------------------

EXAMPLE = Notification(
    "check_failed", "open", "warning", "enriched_usage/no_unpriced_usage", "run-1", "2026-10-05T02:17:00.000Z",
    "enriched_usage: no_unpriced_usage warned", ("2026-10-05",), {"Found": "1 <b> & co", "Long": "x" * 900}, "run-1",
)  # fmt: skip


def test_teams_gets_an_adaptive_card_and_slack_a_text() -> None:
    payload = valid(EXAMPLE.payload(Links("https://ui", "https://rb")))
    [attachment] = teams_message(payload)["attachments"]
    card = attachment["content"]
    assert (attachment["contentType"], card["type"], card["version"]) == ("application/vnd.microsoft.card.adaptive", "AdaptiveCard", "1.4")
    assert card["body"][0]["color"] == "warning"
    assert [action["url"] for action in card["actions"]] == list(payload["links"].values())
    lines = slack_message(payload)["text"].splitlines()
    assert lines[:2] == ["*enriched_usage: no_unpriced_usage warned*", "Found: 1 &lt;b&gt; &amp; co"]
    assert "<https://ui/runs/run-1|run>" in lines[-1]
    assert len(lines[2]) <= 510
    without = EXAMPLE.payload(Links())
    assert without["links"] == {"runbook": "docs/runbook.md#no_unpriced_usage"}
    assert teams_message(without)["attachments"][0]["content"]["actions"] == []  # a button needs an address
    many = Notification("check_failed", "open", "error", "a/b", "r", EXAMPLE.time, "t", tuple(f"2026-10-{n % 30 + 1:02}" for n in range(1000)), {})
    assert len(json.dumps({**many.payload(Links()), **teams_message(many.payload(Links()))})) < 28_000


def test_slacks_host_gets_what_slack_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Opener:
        def open(self, request: Any, timeout: float) -> Any:
            import contextlib

            sent.append((request.full_url, json.loads(request.data)))
            return contextlib.nullcontext()

    monkeypatch.setattr(targets.urllib.request, "build_opener", lambda *_: Opener())
    payload = EXAMPLE.payload(Links())
    for url in ("https://hooks.slack.com/services/T/B/x", "https://hooks.slack.com.evil.example/x"):
        with Webhook(url).open() as send:
            send(payload, "key")
    assert list(sent[0][1]) == ["text"]
    assert {"schema", "id", "type", "attachments"} <= set(sent[1][1])


def test_the_page_has_a_valid_example_of_every_kind() -> None:
    text = (ROOT / "docs/notifications.md").read_text()
    examples = [valid(json.loads(block)) for block in re.findall(r"```json\n(.*?)```", text, re.S)]
    assert {example["kind"] for example in examples} == set(SCHEMA["properties"]["kind"]["enum"])
    assert {example["state"] for example in examples} == {"open", "resolved"}
    for name in SCHEMA["properties"]:
        assert f"`{name}`" in text
