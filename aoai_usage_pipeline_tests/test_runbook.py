"""The runbook has a section for everything that can go red, its commands work, and restoring from capture files gives what it says."""

import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.storage import StorageError
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.support import PRICE_BOOK, capture, chat, installation, reference, rows, run_all, seed_event
from aoai_usage_pipeline_tests.test_events import v2_event

RUNBOOK = (ROOT / "docs/runbook.md").read_text()
SECTIONS = set(re.findall(r"^#+ `([\w-]+)`$", RUNBOOK, re.M))
TABLES = ("daily_usage", "daily_billing", "enriched_usage", "daily_quality", "quarantine", "capture_files")
KEPT = ("closed", "statements", "reference_versions", "reference_versions.json", "hash_key")
SEPTEMBER, OCTOBER = dt.datetime(2026, 9, 10), dt.datetime(2026, 10, 5)


def test_every_check_has_its_section_and_every_section_of_a_check_has_one() -> None:
    checks = {key.name for key in build_defs().resolve_asset_graph().asset_check_keys}
    assert checks <= SECTIONS
    assert {name for name in SECTIONS if "_" in name} == checks


def test_every_alert_and_every_notification_has_its_section() -> None:
    alerts = (ROOT / "infra/modules/alerts.bicep").read_text()
    names = set(re.findall(r"^    name: '([a-z-]+)'$", alerts, re.M))
    assert len(names) == 3 and alerts.count("#${rule.name}'") == 1
    assert SECTIONS - {name for name in SECTIONS if "_" in name} == names | {"run-failed", "held-days", "capture-lag"}


def test_the_runbook_says_what_each_dimension_of_an_alert_means() -> None:
    alerts = (ROOT / "infra/modules/alerts.bicep").read_text()
    said = re.findall(r"what = (?:strcat\()?'([^']+)'", alerts)
    assert len(said) == 8 and [what for what in said if f"*{what.rstrip()}" not in RUNBOOK] == []


def test_links_into_the_docs_lead_somewhere() -> None:
    def anchors(page: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for name in ("runbook.md", "monitoring.md"):
        text = (ROOT / "docs" / name).read_text()
        for file, anchor in re.findall(r"\]\(([\w/.-]*)#?([\w-]*)\)", text):
            page = ROOT / "docs" / (file or name)
            assert page.exists(), file
            assert not anchor or anchor in anchors(page.read_text()), f"{file}#{anchor}"


def usage(root: Path) -> Pipeline:
    """A month with a request of a known person, one in the next, and a record that nothing reads."""
    for n, at in enumerate((SEPTEMBER, OCTOBER)):
        hour = at + dt.timedelta(hours=1)
        event = v2_event(requestId=f"r{n}", eventTime=f"{hour:%Y-%m-%dT%H:%M:%SZ}", tokens=chat(1000, 500))
        capture(root, hour, seed_event(f"s{n}", hour, chat(10, 5)), event, b"broken", first=1 + 3 * n)
    return billed(root)


def billed(root: Path, **settings: Any) -> Pipeline:
    pipeline = installation(root, **settings)
    run_all(pipeline, SEPTEMBER.date(), OCTOBER.date())
    return pipeline


def published(pipeline: Pipeline, leave_out: str = "") -> dict[str, list[tuple[Any, ...]]]:
    return {t: rows(pipeline, f"SELECT * {leave_out if t == 'enriched_usage' else ''} FROM {t} ORDER BY ALL") for t in TABLES}


def lose(root: Path, keep: tuple[str, ...]) -> None:
    """Delete the lake and the published file; of the lake only these parts come back, from a backup."""
    backup = root / "backup"
    shutil.rmtree(backup, ignore_errors=True)
    shutil.move(root / "lake", backup)
    (root / "warehouse.duckdb").unlink()
    for name in keep:
        (root / "lake").mkdir(exist_ok=True)
        (shutil.copytree if (backup / name).is_dir() else shutil.copy)(backup / name, root / "lake" / name)


def test_everything_is_restored_from_capture_files_and_what_is_backed_up(tmp_path: Path) -> None:
    pipeline = usage(tmp_path)
    assert pipeline.close("2026-09").lines > 0
    reference(tmp_path / "reference", PRICE_BOOK.replace("input,2.50", "input,3.50"))
    pipeline = billed(tmp_path)
    before, known = published(pipeline), pipeline.reference_versions.log()
    total = "SELECT sum(cost) FROM daily_billing"
    cost, corrected = rows(pipeline, total), "SELECT count(*) FROM daily_billing WHERE charge_class = 'Correction'"
    assert rows(pipeline, corrected) != [(0,)] and len(known) == 2 and rows(pipeline, "SELECT count(end_user) FROM enriched_usage") == [(2,)]

    lose(tmp_path, KEPT)
    pipeline = billed(tmp_path)
    assert published(pipeline) == before and pipeline.reference_versions.log() == known

    # without a backup: the closed month, the versions and the hashes are lost, and nothing else
    before = published(pipeline, "EXCLUDE (end_user)")
    hashes = rows(pipeline, "SELECT end_user FROM enriched_usage ORDER BY ALL")
    lose(tmp_path, ())
    pipeline = billed(tmp_path)
    after = published(pipeline, "EXCLUDE (end_user)")
    assert {table for table in TABLES if after[table] != before[table]} == {"daily_billing"}
    assert rows(pipeline, total) == cost and rows(pipeline, corrected) == [(0,)]
    assert rows(pipeline, "SELECT end_user FROM enriched_usage ORDER BY ALL") != hashes
    assert len(pipeline.reference_versions.log()) == 1

    # the closed month is found again after all
    shutil.copytree(tmp_path / "backup/closed", tmp_path / "lake/closed")
    (tmp_path / "lake/daily_billing/usage_date=2026-09-10/data.parquet").unlink()
    assert published(billed(tmp_path), "EXCLUDE (end_user)") == before


def test_a_manifest_that_cannot_be_read_is_named_and_its_date_is_mended(tmp_path: Path) -> None:
    pipeline = usage(tmp_path)
    before = published(pipeline)
    path = tmp_path / "lake/manifests/capture_date=2026-09-10.json"
    newer = json.loads(path.read_text())
    newer["files"][0]["shards"] = 2
    for content, why in ((path.read_text()[:300], "line 1 column "), (json.dumps(newer), "unexpected keyword argument 'shards'")):
        path.write_text(content)
        with pytest.raises(StorageError, match=f"manifests/capture_date=2026-09-10.json is damaged, or of another version: .*{why}"):
            installation(tmp_path).stale_usage_dates()
        path.unlink()
        assert published(billed(tmp_path)) == before


def test_what_a_restore_needs_is_what_the_runbook_says() -> None:
    section = RUNBOOK.partition("### Restore from")[2].partition("\n### ")[0]
    copied = {name for line in re.findall(r"for part in ([\w. ]+);", section) for name in line.split()}
    assert copied == set(KEPT)


@pytest.mark.slow
def test_the_runbooks_commands_work(tmp_path: Path) -> None:
    pipeline = usage(tmp_path)
    for name, age in (("left-over", 2 * 86400), ("about-to-be-named", 0)):
        path = tmp_path / f"lake/raw_events/{name}.parquet"
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    settings = pipeline.settings
    env = os.environ | {
        f"AOAI_{name.upper()}": str(getattr(settings, name)) for name in ("capture_url", "lake_url", "warehouse_path", "reference_dir")
    }
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "AOAI_START_DATE": "2026-01-01"}
    env.pop("DAGSTER_HOME", None)  # the one of `make test` may not be there

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    shell = [line[4:] for line in RUNBOOK.splitlines() if line.startswith("    ")]
    queries = [line for line in shell if line.startswith("sql ")]
    definitions = [line for line in shell if line.startswith(("sql()", "export AOAI_WAREHOUSE_PATH"))]
    assert len(definitions) == 2 and len(queries) > 8
    done = run("bash", "-euc", "\n".join([*definitions, *queries]))
    assert done.returncode == 0, done.stderr
    [garbage] = re.findall(r"```python\n(.*?)```", RUNBOOK, re.S)
    done = run("python", "-c", garbage)
    assert done.returncode == 0 and [line.split()[-1] for line in done.stdout.splitlines()] == ["raw_events/left-over.parquet"], done.stderr
    (tmp_path / "lake/held/daily_billing").mkdir(parents=True)
    (tmp_path / "lake/held/daily_billing/2026-09-10.json").write_text('{"reason": "two currencies", "input": ""}')
    held, completeness = (run("bash", "-c", line) for line in shell if line.startswith("python -c"))
    assert completeness.returncode == 0 and held.stdout == "daily_billing 2026-09-10 two currencies\n", held.stderr
    for command in [line for line in shell if line.startswith(("aoai-usage prices", "dagster asset"))]:
        done = run("bash", "-c", command)
        assert done.returncode == 0, done.stderr
