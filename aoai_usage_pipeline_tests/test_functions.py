"""The Function App: its bindings as data, its functions called with the objects the host gives them, and with a real Dagster behind it."""

import concurrent.futures
import datetime as dt
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import azure.functions as func
import dagster as dg
import pytest
from azure.storage.blob import ContainerClient

from aoai_usage_pipeline.defs.capture import MAX_RUNS_PER_TICK
from aoai_usage_pipeline.notify.notification import Links, Notification, teams_message
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.support import Captured, blob_name, capture_file, chat, put, reference, seed_event
from aoai_usage_pipeline_tests.webhook_server import WebhookServer

FOLDER = ROOT / "infra/functions"
KEY = "KEY_OF_THE_TESTS"
NOTIFICATION = Notification("run_failed", "open", "error", "bill", "run-1", "2026-10-05T02:17:00.000Z", "bill failed", (), {"Job": "bill"}, "run-1")
PAYLOAD = (payload := NOTIFICATION.payload(Links())) | teams_message(payload)
EVENT = {
    "id": "14e87d03-6fbf-4bb2-9a21-92bd1281f247",
    "topic": "/subscriptions/s/resourceGroups/rg/providers/Microsoft.EventHub/namespaces/ns",
    "subject": "eventhubs/usage",
    "event_type": "Microsoft.EventHub.CaptureFileCreated",
    "event_time": dt.datetime(2026, 10, 5, 19, 12, 46),
    "data_version": "",
    "data": {
        "fileUrl": "https://account.blob.core.windows.net/capture/ns/usage/1/2026/10/05/19/11/45.avro",
        "fileType": "AzureBlockBlob",
        "partitionId": "1",
        "sizeInBytes": 249168,
        "eventCount": 1500,
        "firstSequenceNumber": 2400,
        "lastSequenceNumber": 3899,
        "firstEnqueueTime": "2026-10-05T19:12:14.674Z",
        "lastEnqueueTime": "2026-10-05T19:12:44.309Z",
    },
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The app, loaded anew, as one instance of it would be."""
    for name in ("TEAMS_WEBHOOK_URL", "MAIL_ENDPOINT", "MAIL_FROM", "MAIL_TO", "DAGSTER_URL", "DAGSTER_AUDIENCE", "DAGSTER_LOCATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RECEIVER_KEY", KEY)
    return load()


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("function_app", FOLDER / "function_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PAUSE_SECONDS = 0.0
    module.functions = {found.get_function_name(): found for found in module.app.get_functions()}
    return module


def function(module: ModuleType, name: str) -> Callable[..., Any]:
    return module.functions[name].get_user_function()


def post(module: ModuleType, body: Any = PAYLOAD, key: str = KEY, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = func.HttpRequest("POST", "/api/notifications", headers=headers or {}, params={"code": key} if key else {}, body=raw)
    answer = function(module, "notifications")(request)
    return answer.status_code, json.loads(answer.get_body())


# --- what is deployed ---------------------------------------------------------------------------------------------------------------


def test_the_bindings_are_those_that_the_deployment_names(module: ModuleType) -> None:
    found = {name: json.loads(one.get_function_json()) for name, one in module.functions.items()}
    assert set(found) == {"notifications", "capture_file_created"}
    http_trigger, _ = found["notifications"]["bindings"]
    assert {name: http_trigger[name] for name in ("type", "route", "methods", "authLevel")} == {
        "type": "httpTrigger", "route": "notifications", "methods": ["POST"], "authLevel": "ANONYMOUS",
    }  # fmt: skip
    [event_trigger] = found["capture_file_created"]["bindings"]
    assert (event_trigger["type"], event_trigger["direction"], event_trigger["name"]) == ("eventGridTrigger", "IN", "event")
    bicep = (ROOT / "infra/modules/functions.bicep").read_text()
    assert "/functions/capture_file_created'" in bicep
    assert "/api/notifications?code=" in bicep


def test_every_setting_that_is_read_is_deployed_and_in_the_example() -> None:
    read = set(re.findall(r'os\.environ(?:\.get\(|\[)"(\w+)"', (FOLDER / "function_app.py").read_text()))
    example = json.loads((FOLDER / "local.settings.example.json").read_text())["Values"]
    bicep = (ROOT / "infra/modules/functions.bicep").read_text()
    deployed = set(re.findall(r"^ {10}name: '(\w+)'\n {10}value:", bicep, re.M))
    assert read <= set(example) and read - {"DAGSTER_LOCATION"} <= deployed
    assert not any(value for name, value in example.items() if "KEY" in name or "TEAMS" in name)


def test_the_app_has_the_versions_of_the_locks_and_a_valid_host_file(module: ModuleType) -> None:
    locked = {line for lock in ROOT.glob("requirements*.lock") for line in lock.read_text().splitlines()}
    assert set((FOLDER / "requirements.txt").read_text().splitlines()) <= locked
    host = json.loads((FOLDER / "host.json").read_text())
    assert host["version"] == "2.0" and host["extensionBundle"]["version"] == "[4.0.0, 5.0.0)"
    # a function that runs longer has its process ended, with whatever else is being sent: waiting, two questions and all launches come first
    limit = dt.datetime.strptime(host["functionTimeout"], "%H:%M:%S") - dt.datetime.strptime("0", "%S")
    assert limit.total_seconds() > module.WAIT_SECONDS + (2 + MAX_RUNS_PER_TICK) * module.LOOK_SECONDS


# --- the receiver -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def teams() -> Iterator[WebhookServer]:
    with WebhookServer() as running:
        yield running


@pytest.fixture
def mail() -> Iterator[WebhookServer]:
    with WebhookServer() as running:
        yield running


@pytest.fixture
def receiver(module: ModuleType, teams: WebhookServer, mail: WebhookServer, azurite: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An instance with both channels, over a real container."""
    monkeypatch.setenv("TEAMS_WEBHOOK_URL", teams.url)
    monkeypatch.setenv("MAIL_ENDPOINT", mail.url.rsplit("/workflows")[0])
    monkeypatch.setenv("MAIL_FROM", "DoNotReply@example.com")
    monkeypatch.setenv("MAIL_TO", "finops@example.com, platform@example.com")
    container = ContainerClient.from_connection_string(azurite[1], f"seen-{uuid.uuid4().hex}")
    container.create_container()
    monkeypatch.setattr(module, "_container", lambda: container)
    monkeypatch.setattr(module, "_bearer", lambda audience: {"Authorization": f"Bearer for {audience}"})
    return module


@pytest.mark.parametrize("key", ["", "wrong", "schlüssel"])
def test_without_the_key_nothing_is_received(module: ModuleType, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert post(module, key=key)[0] == 401
    monkeypatch.setenv("RECEIVER_KEY", "")
    assert post(module, key="")[0] == 401


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b"null", {}, PAYLOAD | {"schema": "aoai-usage-notification/2"}, PAYLOAD | {"id": "../x"}, PAYLOAD | {"id": 7}, payload],
)
def test_what_is_no_notification_is_refused(module: ModuleType, body: Any) -> None:
    assert post(module, body)[0] == 400


def test_without_a_channel_the_notification_is_not_taken(module: ModuleType) -> None:
    status, body = post(module, key="", headers={"x-functions-key": KEY})
    assert (status, body["error"]) == (503, "neither TEAMS_WEBHOOK_URL nor MAIL_ENDPOINT and MAIL_TO are set")


@pytest.mark.slow
def test_a_notification_is_posted_and_mailed_once(receiver: ModuleType, teams: WebhookServer, mail: WebhookServer) -> None:
    assert post(receiver) == (200, {"id": PAYLOAD["id"], "teams": "sent", "mail": "sent"})
    assert post(receiver) == (200, {"id": PAYLOAD["id"], "teams": "already", "mail": "already"})
    [(_, card)] = teams.received
    assert card == {"type": "message", "attachments": PAYLOAD["attachments"]}
    [(headers, message)] = mail.received
    assert headers["Authorization"] == "Bearer for https://communication.azure.com"
    assert message == {
        "senderAddress": "DoNotReply@example.com",
        "recipients": {"to": [{"address": "finops@example.com"}, {"address": "platform@example.com"}]},
        "content": {"subject": "[error] bill failed", "plainText": PAYLOAD["text"]},
    }


@pytest.mark.slow
def test_a_channel_that_fails_is_told_later_and_the_other_one_not_again(receiver: ModuleType, teams: WebhookServer, mail: WebhookServer) -> None:
    teams.answers = [500, "close"]
    assert post(receiver) == (503, {"id": PAYLOAD["id"], "teams": "failed", "mail": "sent"})
    teams.answers = [500]
    assert post(receiver) == (200, {"id": PAYLOAD["id"], "teams": "sent", "mail": "already"})
    assert (len(teams.received), len(mail.received)) == (4, 1)


@pytest.mark.slow
def test_a_channel_that_limits_its_rate_is_not_asked_twice(receiver: ModuleType, teams: WebhookServer, mail: WebhookServer) -> None:
    mail.answers = [429]
    assert post(receiver) == (503, {"id": PAYLOAD["id"], "teams": "sent", "mail": "failed"})
    assert len(mail.received) == 1
    assert post(receiver) == (200, {"id": PAYLOAD["id"], "teams": "already", "mail": "sent"})


@pytest.mark.slow
def test_a_channel_that_refuses_is_said_to_the_sender(receiver: ModuleType, teams: WebhookServer, caplog: pytest.LogCaptureFixture) -> None:
    teams.answer = 400
    assert post(receiver)[0] == 400
    assert "SIGNATURE" not in caplog.text and KEY not in caplog.text


@pytest.mark.slow
def test_instances_that_get_it_at_once_post_it_once(receiver: ModuleType, teams: WebhookServer, mail: WebhookServer) -> None:
    teams.on_request = lambda: time.sleep(0.3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = sorted(status for status, _ in pool.map(lambda _: post(receiver), range(4)))
    assert statuses[0] == 200 and set(statuses) <= {200, 503}
    assert post(receiver)[0] == 200
    assert (len(teams.received), len(mail.received)) == (1, 1)


@pytest.mark.slow
def test_a_delivery_that_died_is_taken_over_after_a_minute(receiver: ModuleType, teams: WebhookServer, mail: WebhookServer) -> None:
    receiver._container().upload_blob(f"{PAYLOAD['id']}/teams", b"", metadata={"state": "begun"})
    assert post(receiver) == (503, {"id": PAYLOAD["id"], "teams": "failed", "mail": "sent"})
    receiver.CLAIMED_SECONDS = 0.0
    time.sleep(1.1)  # times of blobs are in seconds
    assert post(receiver) == (200, {"id": PAYLOAD["id"], "teams": "sent", "mail": "already"})
    assert len(teams.received) == 1


# --- capture files ------------------------------------------------------------------------------------------------------------------


class Graphql:
    """Dagster's GraphQL API as far as the app uses it; `asked` are the fields it was asked for, `launched` the variables of launches."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.launched: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status, self.error, self.wait = "RUNNING", None, 0.0
        self.requests: list[dict[str, Any]] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.headers.append(dict(self.headers))
                answer = json.dumps({"data": owner._answer(body["query"], body["variables"])}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        [field] = [field for field in ("sensorOrError", "sensorDryRun", "launchRun") if f"{field}(" in query]
        self.asked.append(field)
        if field == "sensorOrError":
            data = {"lastCursor": "the cursor"}
            return {field: {"__typename": "Sensor", "sensorState": {"status": self.status, "typeSpecificData": data}}}
        if field == "launchRun":
            self.launched.append(variables)
            return {field: {"__typename": "LaunchRunSuccess", "run": {"runId": f"run {len(self.launched)}"}}}
        assert variables["cursor"] == "the cursor"
        time.sleep(self.wait)
        found, self.requests = self.requests, []
        return {field: {"__typename": "DryRunInstigationTick", "evaluationResult": {"error": self.error, "runRequests": found}}}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def graphql(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Iterator[Graphql]:
    running = Graphql()
    monkeypatch.setenv("DAGSTER_URL", running.url + "/")
    yield running
    running.stop()


def request_of(job: str, day: str) -> dict[str, Any]:
    return {"jobName": job, "tags": [{"key": "dagster/asset_partition_range_start", "value": day}]}


def created(module: ModuleType) -> None:
    function(module, "capture_file_created")(func.EventGridEvent(**EVENT))


def test_a_file_has_the_sensor_evaluated_and_its_days_billed(module: ModuleType, graphql: Graphql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_AUDIENCE", "api://dagster")
    monkeypatch.setattr(module, "_bearer", lambda audience: {"Authorization": f"Bearer for {audience}"})
    graphql.requests = [request_of("ingest", "2026-10-05"), request_of("bill", "2026-10-01")]
    created(module)
    [launched] = graphql.launched
    assert launched["job"]["jobName"] == "daily_run"
    assert [(tag["key"], tag["value"]) for tag in launched["tags"]] == [
        ("dagster/asset_partition_range_start", "2026-10-05"), ("capture_event", EVENT["id"]),
    ]  # fmt: skip
    assert {headers["Authorization"] for headers in graphql.headers} == {"Bearer for api://dagster"}


def test_a_burst_of_files_is_looked_at_twice_at_the_most(module: ModuleType, graphql: Graphql) -> None:
    graphql.wait = 0.3
    graphql.requests = [request_of("ingest", "2026-10-05")]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: created(module), range(16)))
    assert graphql.asked.count("sensorDryRun") <= 2
    assert len(graphql.launched) == 1
    created(module)  # a later one is looked at again
    assert graphql.asked.count("sensorDryRun") <= 3


def test_a_stopped_sensor_stops_this_too_and_without_an_address_nothing_is_asked(
    module: ModuleType, graphql: Graphql, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphql.status = "STOPPED"
    created(module)
    assert graphql.asked == ["sensorOrError"]
    monkeypatch.setenv("DAGSTER_URL", "")
    created(module)
    assert graphql.asked == ["sensorOrError"]


def test_when_dagster_is_down_or_its_sensor_fails_the_event_is_tried_again(module: ModuleType, graphql: Graphql) -> None:
    graphql.error = {"message": "no container"}
    with pytest.raises(RuntimeError, match="no container"):
        created(module)
    graphql.stop()
    with pytest.raises(OSError):
        created(module)
    assert not module._looking.locked()


# --- with a real Dagster --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_file_is_billed_within_seconds_and_what_is_wrong_with_it_is_told(
    tmp_path: Path, module: ModuleType, teams: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(tmp_path / "reference")
    (tmp_path / "capture").mkdir()
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / "dagster.yaml", home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert instance.get_runs() == []  # two processes that find no database would both make it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "DAGSTER_HOME": str(home), "AOAI_AUTOMATION": "running", "AOAI_NOTIFY_WEBHOOK_URL": teams.url, "AOAI_START_DATE": "2026-01-01",
        "AOAI_CAPTURE_URL": str(tmp_path / "capture"), "AOAI_LAKE_URL": str(tmp_path / "lake"),
        "AOAI_WAREHOUSE_PATH": str(tmp_path / "usage.duckdb"), "AOAI_REFERENCE_DIR": str(tmp_path / "reference"),
    }  # fmt: skip
    monkeypatch.setenv("DAGSTER_URL", f"http://127.0.0.1:{port}")
    scripts = Path(sys.executable).parent
    commands = [["dagster-webserver", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)], ["dagster-daemon", "run", "-w", "workspace.yaml"]]
    log = (tmp_path / "log").open("wb")
    started = [
        subprocess.Popen([scripts / command[0], *command[1:]], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        for command in commands
    ]
    try:
        _until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=2), 120, tmp_path / "log")
        _until(lambda: _ticks(module, "capture_files") and _ticks(module, "notifications"), 120, tmp_path / "log")
        now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
        events = [Captured(seed_event("r-1", now, chat(1000, 100)), now, 0), Captured(b"not json", now, 1)]
        put(tmp_path / "capture", blob_name(now), capture_file(events))
        before = time.monotonic()
        created(module)
        created(module)  # of another partition
        billed = tmp_path / f"lake/daily_billing/usage_date={now:%Y-%m-%d}/data.parquet"
        _until(billed.exists, 90, tmp_path / "log")
        assert time.monotonic() - before < 60  # not the sensor's next minute and the one after it
        runs = module._ask("query { runsOrError { __typename ... on Runs { results { jobName tags { key value } } } } }", "runsOrError", "Runs")[
            "results"
        ]
        [run] = [run for run in runs if run["jobName"] == "daily_run"]
        assert {"key": "capture_event", "value": EVENT["id"]} in run["tags"]
        assert len(runs) == 1
        _until(lambda: teams.told, 150, tmp_path / "log")
        assert "raw_events: no_quarantined_records warned on" in " ".join(teams.titles())
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(30)
        log.close()


def _ticks(module: ModuleType, sensor: str) -> list[Any]:
    """The ticks of a sensor that have ended."""
    selector = {"repositoryName": "__repository__", "repositoryLocationName": "aoai_usage_pipeline", "sensorName": sensor}
    query = """query Ticks($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) {
        __typename ... on Sensor { sensorState { ticks(statuses: [SKIPPED]) { id } } } } }"""
    return module._ask(query, "sensorOrError", "Sensor", sensor=selector)["sensorState"]["ticks"]


def _until(condition: Callable[[], Any], seconds: float, log: Path) -> None:
    give_up = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (OSError, RuntimeError):
            pass
        if time.monotonic() > give_up:
            pytest.fail(log.read_text()[-3000:])
        time.sleep(0.5)
