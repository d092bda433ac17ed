"""The Dagster UI in a real browser: the graph, the checks and the automation a person would look at."""

import datetime as dt
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.support import ASSETS, DAY, Captured, blob_name, capture_file, chat, put, reference, seed_event

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a webserver over a billed day that has one unreadable file."""
    root = tmp_path_factory.mktemp("ui")
    reference(root / "reference")
    good = capture_file([Captured(seed_event("r-1", DAY, chat(1000, 100, 400)), DAY, 0)])
    put(root / "capture", blob_name(DAY), good)
    put(root / "capture", blob_name(DAY + dt.timedelta(minutes=15)), good[:-20])
    home = root / "home"
    home.mkdir()
    shutil.copy(ROOT / "dagster.yaml", home)
    env = os.environ | {
        "DAGSTER_HOME": str(home),
        "AOAI_CAPTURE_URL": str(root / "capture"),
        "AOAI_LAKE_URL": str(root / "lake"),
        "AOAI_WAREHOUSE_PATH": str(root / "usage.duckdb"),
        "AOAI_REFERENCE_DIR": str(root / "reference"),
    }
    scripts = Path(sys.executable).parent
    subprocess.run([scripts / "aoai-usage", "bill", "--from", "2026-10-05", "--to", "2026-10-05"], env=env, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [scripts / "dagster-webserver", "-w", ROOT / "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with open(root / "webserver.log", "wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/server_info", timeout=2)
                break
            except OSError:
                if time.monotonic() > give_up or server.poll() is not None:
                    pytest.fail((root / "webserver.log").read_text()[-2000:])
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


@pytest.fixture(scope="module")
def page(ui: str) -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        if os.environ.get("CI"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        tab = browser.new_page(viewport={"width": 2200, "height": 760})
        tab.set_default_timeout(60_000)
        yield tab
        browser.close()


def test_the_graph_shows_every_asset(ui, page):
    page.goto(f"{ui}/asset-groups")
    for asset in ASSETS:
        page.get_by_text(asset, exact=True).first.wait_for()
    if target := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(3000)
        page.screenshot(path=f"{target}/asset-graph.png", clip={"x": 540, "y": 110, "width": 1660, "height": 650})


def test_an_unreadable_file_is_shown_with_its_name_and_reason(ui, page):
    page.goto(f"{ui}/assets/raw_events?view=checks&checkDetail=no_unreadable_files")
    page.get_by_text("1 on 2026-10-05", exact=True).first.wait_for()
    page.get_by_text("ns/hub/0/2026/10/05/00/15/00.avro").first.wait_for()
    page.get_by_text("torn").first.wait_for()


def test_columns_and_owners_are_described(ui, page):
    page.goto(f"{ui}/assets/daily_billing")
    page.get_by_text("unit_price", exact=True).first.wait_for()
    page.get_by_text("finops-platform").first.wait_for()


def test_sensor_and_schedule_are_there(ui, page):
    page.goto(f"{ui}/automation")
    page.get_by_text("capture_files").first.wait_for()
    page.get_by_text("daily_billing_run").first.wait_for()
