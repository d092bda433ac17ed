"""The image and Dagster's instance in Azure: what the Dockerfile says holds, and the containers' very commands run against a real PostgreSQL."""

import contextlib
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.support import DAY, Captured, blob_name, capture_file, chat, put, reference, seed_event

BICEP = (ROOT / "infra/modules/container-apps.bicep").read_text()
SCRIPTS = Path(sys.executable).parent


def instructions() -> list[list[tuple[str, str]]]:
    """The Dockerfile's instructions, stage by stage."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    stages: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, arguments))
    return stages


def pins(lock: str) -> dict[str, str]:
    lines = (line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def containers() -> dict[str, list[str]]:
    """The command and arguments of each container of the Bicep module, its variables put in."""
    variables = dict(re.findall(r"(?m)^var (\w+) = (\d+)$", BICEP))
    found = {}
    for name, lists in re.findall(r"name: '([\w-]+)'\n +image: image\n((?: +(?:command|args): \[.*\]\n)+)", BICEP):
        words = re.findall(r"'([^']*)'|string\((\w+)\)", lists)
        found[name] = [text or variables[variable] for text, variable in words]
    return found


def test_the_dockerfile_copies_what_is_there_and_what_dockerignore_lets_through():
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "**"))]
    assert ignored == "*"
    copied = [source for stage in instructions() for name, text in stage if name == "COPY" and "--from" not in text for source in text.split()[:-1]]
    assert {"requirements.lock", "requirements-image.lock", "aoai_usage_pipeline"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, f"{one.removeprefix('!')}*") for one in allowed), f"{source} is ignored"


def test_the_image_is_installed_from_the_locks_and_runs_without_root_or_installer():
    build, final = instructions()
    installs = [text for name, text in build if name == "RUN" and text.startswith("pip ")]
    assert "--no-deps --only-binary :all: --requirement requirements.lock --requirement requirements-image.lock" in installs[0]
    assert "--no-deps ." in installs[1] and installs[1].endswith("check")
    assert any(name == "RUN" and text.startswith("pip uninstall") and text.endswith("setuptools wheel pip") for name, text in final)
    [user] = [text for name, text in final if name == "USER"]
    assert user == "1000:1000"
    after = [name for name, _ in final[final.index(("USER", user)) :]]
    assert "RUN" not in after and "COPY" not in after


def test_the_locks_pin_everything_that_the_image_needs():
    """Walks the requirements of what is installed here, which are those of the same versions."""
    locked = pins("requirements.lock") | pins("requirements-image.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["deploy"])]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            assert name in locked, f"{name} is in no lock"
            assert requirement.specifier.contains(locked[name], prereleases=True), requirement
            further = map(Requirement, importlib.metadata.requires(name) or [])
            wanted += [one for one in further if not one.marker or one.marker.evaluate({"extra": extra})]
    for name, version in pins("requirements-image.lock").items():
        # a fresh environment of Python 3.11 has a setuptools of its own
        if name != "setuptools":
            assert pins("requirements-test.lock").get(name) == version, f"{name} differs from requirements-test.lock"


def test_every_command_of_the_containers_is_in_the_image():
    commands = [*containers().values(), *(json.loads(text) for stage in instructions() for name, text in stage if name == "CMD")]
    assert len(commands) == 4
    for command in commands:
        assert (SCRIPTS / command[0]).exists(), command
    assert containers()["code-location"] == commands[-1], "the image's own command is the code location's"


def test_probes_are_within_what_container_apps_allow():
    probes = re.findall(r"\{ type: '(Startup|Readiness|Liveness)', (.+) \}\n", BICEP)
    assert len(probes) == 6
    for _, text in probes:
        limits = {"periodSeconds": 240, "timeoutSeconds": 240, "failureThreshold": 10, "initialDelaySeconds": 60}
        for name, value in re.findall(r"(\w+): (\d+)", text):
            assert 1 <= int(value) <= limits[name], f"{name}: {value}"
        assert "port: webserverPort, path: '/server_info'" in text or "port: codeLocationPort" in text


def test_what_the_instance_reads_from_the_environment_is_set_in_every_container():
    read: set[str] = set()
    for file in (ROOT / "infra/dagster").iterdir():
        read |= set(re.findall(r"env: (\w+)", file.read_text()))
    block = BICEP[BICEP.index("var dagsterEnvironment") : BICEP.index("var pipelineEnvironment")]
    assert read == set(re.findall(r"name: '(DAGSTER_\w+)'", block))
    environments = re.findall(r"(?m)^ +env: (.+)$", BICEP)
    assert sorted(environments) == ["concat(dagsterEnvironment, pipelineEnvironment)", "dagsterEnvironment", "dagsterEnvironment"]


# ---- for real ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: Callable[[], Any], process: subprocess.Popen, log: Path, seconds: float = 240) -> Any:
    """What `what` returns once it is true; fails with the end of the log when the process ends or time is up."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError):
            if found := what():
                return found
        time.sleep(0.3)
    pytest.fail(f"{log.name}: {log.read_text()[-3000:]}")


class Identity:
    """The endpoint through which a container gets tokens of its managed identity, as App Service and Container Apps have it."""

    def __init__(self) -> None:
        self.token = "first-token"
        self.asked: list[tuple[str, str]] = []
        identity = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
                allowed = self.headers.get("X-IDENTITY-HEADER") == "header-of-the-container"
                identity.asked.append((query.get("resource", ""), query.get("client_id", "")))
                # used up soon, so that it is asked for again
                answer = {"access_token": identity.token, "expires_on": str(int(time.time()) + 60), "resource": query.get("resource")}
                body = json.dumps(answer | {"token_type": "Bearer"}).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/msi/token"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Server:
    """A PostgreSQL server on the loopback that takes nothing but TLS and the current token as password, as Azure's does."""

    def __init__(self, token: str) -> None:
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        if not binaries:
            if os.environ.get("CI"):
                pytest.fail("no PostgreSQL is installed")
            pytest.skip("no PostgreSQL is installed")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self._bin, self._data, self.port = binaries[-1], folder / "data", free_port()
        folder.chmod(0o755)
        # it refuses to run as root
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "postgres", "postgres")
        self.certificate = folder / "server.crt"
        self._run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
                  "subjectAltName=DNS:localhost", "-keyout", folder / "server.key", "-out", self.certificate)  # fmt: skip
        self._run(self._bin / "initdb", "--pgdata", self._data, "--username", "owner", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder, "fsync": "off", "ssl": "on"}
        settings |= {"ssl_cert_file": self.certificate, "ssl_key_file": folder / "server.key"}
        (self._data / "postgresql.auto.conf").write_text("".join(f"{name} = '{value}'\n" for name, value in settings.items()))
        (self._data / "pg_hba.conf").write_text("local all owner trust\nhostssl all all 127.0.0.1/32 password\n")
        self._run(self._bin / "pg_ctl", "start", "--wait", "--silent", "--pgdata", self._data, "--log", folder / "postgresql.log")
        self.query(f"CREATE ROLE \"aoai-usage-pipeline\" LOGIN SUPERUSER PASSWORD '{token}'")
        self.query("CREATE DATABASE dagster")

    def query(self, sql: str, database: str = "postgres") -> str:
        """The rows of a statement, run as the owner of the machine, columns separated by `|`."""
        options = ("--no-psqlrc", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1", "--host", self._folder, "--port", str(self.port))
        return self._run(self._bin / "psql", *options, "--username", "owner", "--dbname", database, "--command", sql).strip()

    def stop(self) -> None:
        self._run(self._bin / "pg_ctl", "stop", "--mode", "immediate", "--silent", "--pgdata", self._data)
        shutil.rmtree(self._folder)

    def _run(self, *command: object) -> str:
        # a file and not a pipe: the server that pg_ctl starts keeps what it got
        output = self._folder / "output.txt"
        with open(output, "w") as out:
            done = subprocess.run([str(word) for word in command], stdout=out, stderr=out, cwd="/", **self._user)
        assert done.returncode == 0, output.read_text()
        return output.read_text()


@pytest.mark.slow
def test_the_containers_commands_bill_a_day_with_runs_in_postgresql_and_tokens_that_change(tmp_path):
    identity, started = Identity(), []
    server = Server(identity.token)
    try:
        home = tmp_path / "opt/dagster/dagster_home"
        home.mkdir(parents=True)
        shutil.copy(ROOT / "infra/dagster/dagster.yaml", home)
        grpc, web = str(free_port()), str(free_port())
        workspace = (ROOT / "infra/dagster/workspace.yaml").read_text()
        assert "port: 4000" in workspace
        (home.parent / "workspace.yaml").write_text(workspace.replace("4000", grpc))
        put(tmp_path / "capture", blob_name(DAY), capture_file([Captured(seed_event("r-1", DAY, chat(1000, 100, 400)), DAY, 0)]))
        reference(tmp_path / "reference")
        foreign = ("AOAI_", "DAGSTER_", "AZURE_", "IDENTITY_", "PG")
        shared = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DAGSTER_HOME": str(home),
            "PGSSLMODE": "verify-full",
            "PGSSLROOTCERT": str(server.certificate),
            "AZURE_CLIENT_ID": "client-of-the-identity",
            "IDENTITY_ENDPOINT": identity.url,
            "IDENTITY_HEADER": "header-of-the-container",
            "DAGSTER_POSTGRES_HOST": "localhost",
            "DAGSTER_POSTGRES_DATABASE": "dagster",
            "DAGSTER_POSTGRES_USER": "aoai-usage-pipeline",
            "DAGSTER_CODE_LOCATION_HOST": "localhost",
        }
        pipeline = {
            "AOAI_CAPTURE_URL": str(tmp_path / "capture"),
            "AOAI_LAKE_URL": str(tmp_path / "lake"),
            "AOAI_REFERENCE_DIR": str(tmp_path / "reference"),
        }
        instance = yaml.safe_load((home / "dagster.yaml").read_text())
        instance["storage"]["postgres"]["postgres_db"]["port"] = server.port
        (home / "dagster.yaml").write_text(yaml.safe_dump(instance))

        def start(name: str, env: dict[str, str]) -> tuple[subprocess.Popen, Path]:
            command = [{"0.0.0.0": "127.0.0.1", "4000": grpc, "3000": web}.get(word, word) for word in containers()[name]]
            log = tmp_path / f"{name}.log"
            with open(log, "wb") as out:
                process = subprocess.Popen(command, cwd=home.parent, env=env, start_new_session=True, stdout=out, stderr=out)
            started.append(process)
            return process, log

        def ask(query: str, **variables: Any) -> Any:
            body = json.dumps({"query": query, "variables": variables}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{web}/graphql", body, {"Content-Type": "application/json"})
            answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
            assert "errors" not in answer, answer
            return answer["data"]

        # the webserver and the daemon may be there first, and then find the code location by themselves
        daemon, webserver = start("daemon", shared), start("webserver", shared)
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{web}/server_info", timeout=2).status == 200, *webserver)
        code = start("code-location", shared | pipeline)
        locations = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }"

        def loaded() -> bool:
            entries = ask(locations)["workspaceOrError"]["locationEntries"]
            return [entry["locationOrLoadError"]["__typename"] for entry in entries] == ["RepositoryLocation"]

        wait_for(loaded, *code)

        def bill_the_day() -> str:
            selector = {"repositoryLocationName": "aoai_usage_pipeline", "repositoryName": "__repository__", "jobName": "daily_run"}
            tags = [{"key": "dagster/partition", "value": str(DAY.date())}]
            launched = ask(
                """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
                     __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
                params={"selector": selector, "runConfigData": {}, "executionMetadata": {"tags": tags}},
            )["launchRun"]
            assert launched["__typename"] == "LaunchRunSuccess", launched
            run_id = launched["run"]["runId"]

            def status() -> str:
                found = ask("query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run_id)["runOrError"]["status"]
                return found if found in ("SUCCESS", "FAILURE", "CANCELED") else ""

            assert wait_for(status, *daemon) == "SUCCESS", code[1].read_text()[-3000:]
            return run_id

        first = bill_the_day()
        assert server.query("SELECT run_id, status FROM runs", "dagster") == f"{first}|SUCCESS"
        assert int(server.query("SELECT count(*) FROM event_logs", "dagster")) > 10
        assert list((tmp_path / "lake/daily_billing").rglob("*.parquet")) and (home.parent / "data/aoai_usage.duckdb").exists()
        assert not list(home.rglob("*.db")), "Dagster kept something in SQLite"
        assert set(identity.asked) == {("https://ossrdbms-aad.database.windows.net", "client-of-the-identity")}

        # the tokens of before no longer open anything
        identity.token = "second-token"
        server.query(f"ALTER ROLE \"aoai-usage-pipeline\" PASSWORD '{identity.token}'")
        second = bill_the_day()
        assert server.query("SELECT count(*) FROM runs WHERE status = 'SUCCESS'", "dagster") == "2" and second != first
        healthy = "{ instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } } }"
        daemons = [one for one in ask(healthy)["instance"]["daemonHealth"]["allDaemonStatuses"] if one["required"]]
        assert {"SENSOR", "SCHEDULER", "QUEUED_RUN_COORDINATOR", "MONITORING"} <= {one["daemonType"] for one in daemons}
        assert all(one["healthy"] for one in daemons), daemons
    finally:
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        server.stop()
        identity.close()
