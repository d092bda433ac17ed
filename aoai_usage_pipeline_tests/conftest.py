"""Fixtures: a free installation per test, and one real Azurite for all tests that need Blob storage."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoai_usage_pipeline import cli
from aoai_usage_pipeline_tests.support import Run, installation

ROOT = Path(__file__).parent.parent
_ACCOUNT = "devstoreaccount1"
# the key that every emulator has, published in Microsoft's documentation
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="session")
def azurite() -> Iterator[tuple[str, str]]:
    """(blob endpoint, connection string) of a running Azurite."""
    main = ROOT / ".azurite/node_modules/azurite/dist/src/blob/main.js"
    node = ROOT / ".venv/bin/node"
    if not main.exists():
        pytest.fail("Azurite is not installed: run `make test`, which installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    location = tempfile.mkdtemp(prefix="azurite-")
    command = [str(node) if node.exists() else "node", str(main), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", location]
    process = subprocess.Popen([*command, "--silent", "--disableTelemetry", "--skipApiVersionCheck"], start_new_session=True)
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    try:
        _wait(endpoint, process)
        yield endpoint, f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={endpoint};"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(location, ignore_errors=True)


def _wait(endpoint: str, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + 90
    while time.monotonic() < give_up and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=2)
        except urllib.error.HTTPError:
            return  # it answers, and refuses the unsigned request
        except OSError:
            time.sleep(0.2)
    pytest.fail("Azurite did not start")


@pytest.fixture(params=["folder", pytest.param("blob", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """(url, connection string) of an empty place for objects, once as a folder and once as a Blob container."""
    if request.param == "folder":
        return str(tmp_path / "store"), None
    endpoint, connection_string = request.getfixturevalue("azurite")
    return f"{endpoint}/test-{uuid.uuid4().hex}", connection_string


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose settings are in the environment, without a DAGSTER_HOME."""
    pipeline = installation(tmp_path)
    for name in ("capture_url", "lake_url", "warehouse_path", "reference_dir"):
        monkeypatch.setenv(f"AOAI_{name.upper()}", str(getattr(pipeline.settings, name)))
    monkeypatch.setenv("AOAI_START_DATE", "2026-01-01")
    for name in ("DAGSTER_HOME", "AOAI_COSMOS_ENDPOINT", "AOAI_COSMOS_KEY", "AOAI_COSMOS_USAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def aoai_usage(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: (exit code, what it printed, what it complained about)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
