"""The Dagster shell on a real instance: definitions, range runs, checks, the sensor and the schedule."""

import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet
import pytest

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs import capture as capture_defs
from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
    ASSETS,
    DAY,
    PRICE_BOOK,
    Captured,
    blob_name,
    capture_file,
    chat,
    hub_event,
    installation,
    put,
    reference,
    rows,
    seed_event,
)

HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
TODAY = dt.datetime.combine(dt.datetime.now(dt.UTC).date(), dt.time())
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
CHECKS = {
    ("raw_events", "captured_is_parsed_plus_quarantined"): ERROR,
    ("raw_events", "no_unreadable_files"): ERROR,
    ("raw_events", "no_sequence_gaps"): ERROR,
    ("raw_events", "capture_is_complete"): ERROR,
    ("raw_events", "no_overlaps"): WARN,
    ("raw_events", "no_quarantined_records"): WARN,
    ("enriched_usage", "accepted_plus_duplicates_is_parsed"): ERROR,
    ("enriched_usage", "tokens_enriched_equal_raw"): ERROR,
    ("enriched_usage", "no_conflicting_duplicates"): WARN,
    ("enriched_usage", "totals_add_up"): WARN,
    ("enriched_usage", "no_unpriced_usage"): WARN,
    ("enriched_usage", "no_unallocated_usage"): WARN,
    ("enriched_usage", "no_unattributed_usage"): WARN,
    ("enriched_usage", "token_coverage"): WARN,
    ("raw_events", "no_new_fields"): WARN,
    ("daily_billing", "tokens_billed_equal_enriched"): ERROR,
    ("cosmos_daily_billing", "documents_equal_ledger"): ERROR,
    ("cosmos_usage", "documents_equal_ledger"): ERROR,
    ("cosmos_statements", "documents_equal_ledger"): ERROR,
}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def capture(pipeline: Pipeline, window_start: dt.datetime, *bodies: bytes | None, first: int = 1, partition_id: str = "0") -> Path:
    """A capture file with these bodies, numbered from `first`; returns its path."""
    events = [Captured(body, window_start, number, partition_id) for number, body in enumerate(bodies, first)]
    put(pipeline.settings.capture_url, blob_name(window_start, partition_id), capture_file(events))
    return Path(pipeline.settings.capture_url, blob_name(window_start, partition_id))


def capture_days(pipeline: Pipeline, first: dt.datetime, days: int, number: int = 1) -> None:
    """One request at 01:00 of each day."""
    for n in range(days):
        at = first + n * ONE_DAY + HOUR
        capture(pipeline, at, seed_event(f"r{at:%Y%m%d}", at, chat(10, 5)), first=number + n)


def execute(
    pipeline: Pipeline, instance: dg.DagsterInstance, job: str, first: dt.datetime | dt.date | str, last: dt.datetime | dt.date | str
) -> dg.ExecuteInProcessResult:
    """One range run in this process, on that instance."""
    tags = {RANGE_START: str(first)[:10], RANGE_END: str(last)[:10]}
    return build_defs(pipeline=pipeline).resolve_job_def(job).execute_in_process(instance=instance, tags=tags, raise_on_error=False, run_config=QUIET)


def evaluations(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    return {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}


def failed(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckSeverity]:
    return {name: evaluation.severity for name, evaluation in evaluations(result).items() if not evaluation.passed}


def offending(result: dg.ExecuteInProcessResult, check: str) -> list[dict[str, Any]]:
    return [dict(record.data) for record in evaluations(result)[check].metadata["rows"].records]


def partition_rows(result: dg.ExecuteInProcessResult) -> dict[str, dict[str | None, Any]]:
    found: dict[str, dict[str | None, Any]] = {}
    for event in result.all_events:
        if event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            count = materialization.metadata.get("dagster/partition_row_count")
            found.setdefault(materialization.asset_key.to_user_string(), {})[materialization.partition] = count and count.value
    return found


# --- definitions ----------------------------------------------------------------------------------------------------------------


def test_definitions_load_and_have_their_names() -> None:
    defs = build_defs(capture_url="nowhere", lake_url="/nowhere/either", reference_dir="/nor/here")
    dg.Definitions.validate_loadable(defs)
    assert {key.to_user_string() for key in defs.resolve_all_asset_keys()} == ASSETS
    assert {(k.asset_key.to_user_string(), k.name) for k in defs.resolve_asset_graph().asset_check_keys} == set(CHECKS)
    assert {job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")} == {"ingest", "bill", "publish", "daily_run"}
    assert [sensor.name for sensor in defs.sensors or []] == ["capture_files"]
    assert [schedule.name for schedule in defs.schedules or []] == ["daily_billing_run"]
    assert not Path("/nowhere").exists()


def test_every_asset_says_what_it_is_who_owns_it_and_what_its_columns_are() -> None:
    hub = {"event_hub_namespace": "ns", "event_hub_name": "hub", "drain": "on"}
    specs = {spec.key.to_user_string(): spec for spec in build_defs(**hub).resolve_all_asset_specs()}
    assert specs.keys() == ASSETS | {"drained_events"}
    for spec in specs.values():
        assert spec.description and spec.owners and spec.kinds and spec.group_name
        for column in spec.metadata["dagster/column_schema"].columns:
            assert column.type and column.description
    for name in ("daily_usage", "daily_billing", "enriched_usage"):
        columns = [column.name for column in specs[name].metadata["dagster/column_schema"].columns]
        assert columns == tables.names(tables.PUBLISHED[name])


def test_partitions_are_utc_days_from_the_start_date_to_today() -> None:
    specs = build_defs(start_date=dt.date(2026, 10, 1)).resolve_all_asset_specs()
    for partitions in (spec.partitions_def for spec in specs if spec.key.to_user_string() not in ("usage_warehouse", "cosmos_statements")):
        assert isinstance(partitions, dg.DailyPartitionsDefinition) and partitions.timezone == "UTC"
        assert partitions.get_first_partition_key() == "2026-10-01"
        assert partitions.get_last_partition_key() == f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"


def test_assets_say_when_somebody_should_look() -> None:
    nightly = dg.FreshnessPolicy.time_window(warn_window=dt.timedelta(hours=26), fail_window=dt.timedelta(hours=50))
    for settings, drained in (({}, None), ({"event_hub_namespace": "ns", "event_hub_name": "hub", "drain": "on"}, dt.timedelta(minutes=60))):
        policies = {spec.key.to_user_string(): spec.freshness_policy for spec in build_defs(**settings).resolve_all_asset_specs()}
        of_drain = policies.pop("drained_events", None)
        assert (of_drain and of_drain.fail_window.to_timedelta()) == drained
        assert set(policies) == ASSETS - {"drained_events"} and set(policies.values()) == {nightly}


@pytest.mark.parametrize(("automation", "status"), [("stopped", "STOPPED"), ("running", "RUNNING")])
def test_automation_runs_only_when_asked(automation: str, status: str) -> None:
    defs = build_defs(automation=automation)
    assert defs.resolve_sensor_def("capture_files").default_status.name == status
    assert defs.resolve_schedule_def("daily_billing_run").default_status.name == status


@pytest.mark.parametrize("automation", ["STOPPED", "RUNNING"])
def test_a_hub_is_drained_on_a_schedule_only_when_asked(automation: str) -> None:
    hub = {"event_hub_namespace": "ns", "event_hub_name": "hub", "automation": automation.lower()}
    captured, drained = build_defs(**hub), build_defs(**hub, drain="on")
    assert [schedule.name for schedule in captured.schedules or []] == ["daily_billing_run"]
    schedule = drained.resolve_schedule_def("drain_run")
    assert schedule.default_status.name == automation and schedule.job_name == "drain"
    raw, source = dg.AssetKey("raw_events"), dg.AssetKey("drained_events")
    assert source not in captured.resolve_all_asset_keys() and captured.resolve_asset_graph().get(raw).parent_keys == set()
    assert source in drained.resolve_all_asset_keys() and drained.resolve_asset_graph().get(raw).parent_keys == {source}


def test_without_a_hub_completeness_says_that_it_has_nothing_to_ask(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 1)
    check = evaluations(execute(pipeline, instance, "ingest", DAY, DAY))["capture_is_complete"]
    assert check.passed and "No hub is configured" in check.description


# --- range runs -----------------------------------------------------------------------------------------------------------------


def test_a_range_run_materializes_every_partition_with_its_row_count(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 2)
    capture(pipeline, DAY + 2 * HOUR, seed_event("more", DAY, chat(1, 1, 1)), b"broken", first=3)
    result = execute(pipeline, instance, "daily_run", DAY, DAY + 2 * ONE_DAY)
    assert result.success
    days = {f"{DAY + n * ONE_DAY:%Y-%m-%d}": n for n in range(3)}
    found = partition_rows(result)
    assert found["raw_events"] == dict(zip(days, (3, 1, 0), strict=True))
    assert found["enriched_usage"] == dict(zip(days, (2, 1, 0), strict=True))
    assert found["daily_usage"] == dict(zip(days, (1, 1, 0), strict=True))
    assert found["daily_billing"] == dict(zip(days, (3, 2, 0), strict=True))
    assert instance.get_materialized_partitions(dg.AssetKey("daily_billing")) == set(days)
    assert set(evaluations(result)) == {name for _, name in CHECKS}
    assert {e.asset_key.to_user_string() for e in result.get_asset_check_evaluations()} == {asset for asset, _ in CHECKS}
    assert rows(pipeline, "SELECT count(*) FROM daily_usage") == [(2,)]


def materialize(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`dagster asset materialize` of every asset, in a process of its own."""
    (root / "home").mkdir(exist_ok=True)
    (root / "home/dagster.yaml").write_text("telemetry: {enabled: false}\n")
    settings = {"CAPTURE_URL": "capture", "LAKE_URL": "lake", "WAREHOUSE_PATH": "warehouse.duckdb", "REFERENCE_DIR": "reference"}
    environment = {f"AOAI_{name}": str(root / path) for name, path in settings.items()}
    environment |= {"DAGSTER_HOME": str(root / "home"), "AOAI_START_DATE": "2026-01-01"}
    command = [str(Path(sys.executable).parent / "dagster"), "asset", "materialize", "--select", "*", "-m", "aoai_usage_pipeline.definitions"]
    return subprocess.run([*command, *arguments], env=os.environ | environment, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_dagster_asset_materialize(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 4)
    billed = "SELECT usage_date - DATE '2026-10-05', requests, cost > 0 FROM daily_usage ORDER BY 1"
    done = materialize(tmp_path, "--partition", f"{DAY + ONE_DAY:%Y-%m-%d}")
    assert done.returncode == 0, done.stderr
    assert rows(pipeline, billed) == [(1, 1, True)]
    two_currencies_on(pipeline, DAY + 2 * ONE_DAY)
    done = materialize(tmp_path, "--partition-range", f"{DAY:%Y-%m-%d}...{DAY + 3 * ONE_DAY:%Y-%m-%d}")
    assert done.returncode != 0
    assert f"held: {DAY + 2 * ONE_DAY:%Y-%m-%d}" in done.stderr
    assert rows(pipeline, billed) == [(n, 1, True) for n in (0, 1, 3)]


# --- checks ---------------------------------------------------------------------------------------------------------------------


def two_currencies_on(pipeline: Pipeline, day: dt.datetime) -> None:
    """Reference data with which no request of one day can be summed, so that the day must be held."""
    before = "out-1,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD,2024-01-01,"
    other = f"out-2,gpt-4o,*,*,*,*,*,output,9.00,1000000,EUR,{day:%Y-%m-%d},{day + ONE_DAY:%Y-%m-%d}"
    after = f"out-3,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD,{day + ONE_DAY:%Y-%m-%d},"
    assert before in PRICE_BOOK
    book = PRICE_BOOK.replace(before, f"{before}{day:%Y-%m-%d},,\n{other},,\n{after}")
    reference(Path(pipeline.settings.reference_dir), book)


@pytest.mark.parametrize("job", ["daily_run", "bill"])
def test_a_held_day_fails_the_run_is_named_and_keeps_no_other_from_being_billed(tmp_path: Path, instance: dg.DagsterInstance, job: str) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 5)
    bad = DAY + 2 * ONE_DAY
    two_currencies_on(pipeline, bad)
    if job == "bill":
        assert execute(pipeline, instance, "ingest", DAY, DAY + 4 * ONE_DAY).success
    result = execute(pipeline, instance, job, DAY, DAY + 4 * ONE_DAY)
    assert not result.success
    day = f"{bad:%Y-%m-%d}"
    for check in ("accepted_plus_duplicates_is_parsed", "tokens_enriched_equal_raw"):
        assert failed(result)[check] == ERROR
        assert [row["usage_date"] for row in offending(result, check)] == [day]
        assert day in (evaluations(result)[check].description or "")
    errors = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert len(errors) == 1 and day in errors[0].to_string()
    billed = [(DAY + n * ONE_DAY).date() for n in (0, 1, 3, 4)]
    assert rows(pipeline, "SELECT DISTINCT usage_date FROM daily_billing ORDER BY 1") == [(day,) for day in billed]
    # once it can be billed, it is, and nothing fails any more
    reference(Path(pipeline.settings.reference_dir))
    result = execute(pipeline, instance, job, DAY, DAY + 4 * ONE_DAY)
    assert result.success and not failed(result)
    assert rows(pipeline, "SELECT count(DISTINCT usage_date) FROM daily_billing") == [(5,)]


def test_a_held_day_keeps_its_previous_version(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 2)
    assert execute(pipeline, instance, "daily_run", DAY, DAY + ONE_DAY).success
    before = rows(pipeline, "SELECT * FROM daily_billing ORDER BY ALL")
    two_currencies_on(pipeline, DAY)
    result = execute(pipeline, instance, "daily_run", DAY, DAY + ONE_DAY)
    assert not result.success
    assert rows(pipeline, "SELECT * FROM daily_billing WHERE usage_date = DATE '2026-10-05' ORDER BY ALL") == before[: len(before) // 2]


def test_unreadable_files_and_gaps_are_errors_that_fail_no_run(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture(pipeline, DAY + HOUR, seed_event("a", DAY, chat(10, 5)), first=1)
    torn = capture(pipeline, DAY + 2 * HOUR, seed_event("b", DAY, chat(10, 5)), first=2)
    torn.write_bytes(torn.read_bytes()[:-20])
    capture(pipeline, DAY + ONE_DAY + HOUR, seed_event("c", DAY + ONE_DAY, chat(10, 5)), first=5)
    result = execute(pipeline, instance, "daily_run", DAY, DAY + 2 * ONE_DAY)
    assert result.success
    assert failed(result) == {"no_unreadable_files": ERROR, "no_sequence_gaps": ERROR}
    [unreadable] = offending(result, "no_unreadable_files")
    assert (unreadable["capture_date"], unreadable["blob"]) == (f"{DAY:%Y-%m-%d}", blob_name(DAY + 2 * HOUR))
    assert unreadable["reason"]
    [gap] = offending(result, "no_sequence_gaps")
    assert (gap["capture_date"], gap["partition_id"], gap["blob"]) == (f"{DAY + ONE_DAY:%Y-%m-%d}", "0", blob_name(DAY + ONE_DAY + HOUR))
    assert (gap["missing_from"], gap["missing_to"]) == (2, 4)
    assert rows(pipeline, "SELECT sum(requests) FROM daily_usage") == [(2,)]


def test_a_gap_inside_a_file_is_shown_where_it_is(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    events = [Captured(seed_event(f"r{n}", DAY, chat(10, 5)), DAY + HOUR, n) for n in (1, 2, 5, 6)]
    put(pipeline.settings.capture_url, blob_name(DAY + HOUR), capture_file(events))
    result = execute(pipeline, instance, "ingest", DAY, DAY)
    [gap] = offending(result, "no_sequence_gaps")
    assert (gap["missing_from"], gap["missing_to"]) == (3, 4)


def test_doubtful_usage_is_a_warning_with_its_coordinates(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    bodies = [
        seed_event("captured twice", DAY, chat(10, 5)),
        seed_event("conflict", DAY, chat(10, 5)),
        seed_event("conflict", DAY, chat(11, 5)),
        b"not json",
        hub_event("unpriced", DAY, 10, 5, 15, model="mystery"),
        seed_event("unallocated", DAY, chat(10, 5), SubscriptionId="nobody"),
        seed_event("total", DAY, chat(10, 5) | {"total_tokens": 99}),
    ]
    capture(pipeline, DAY + HOUR, *bodies)
    capture(pipeline, DAY + 2 * HOUR, bodies[0])
    result = execute(pipeline, instance, "daily_run", DAY - ONE_DAY, DAY + ONE_DAY)
    assert result.success
    number_of = {
        "no_overlaps": 1, "no_conflicting_duplicates": 2, "no_quarantined_records": 4, "no_unpriced_usage": 5, "no_unallocated_usage": 6,
        "totals_add_up": 7,
    }  # fmt: skip
    assert failed(result) == dict.fromkeys(number_of, WARN)
    for check, number in number_of.items():
        [row] = offending(result, check)
        coordinates = {column: str(value) for column, value in row.items()}
        assert coordinates.get("sequence_number", coordinates.get("repeated_from")) == str(number), check
        assert coordinates["partition_id"] == "0"
        assert coordinates["blob"] in (blob_name(DAY + HOUR), blob_name(DAY + 2 * HOUR))
        assert coordinates.get("offset", str(number * 688)) == str(number * 688)
        assert coordinates.get("usage_date", coordinates.get("capture_date")) == f"{DAY:%Y-%m-%d}"
        assert f"{DAY:%Y-%m-%d}" in (evaluations(result)[check].description or "")


@pytest.mark.parametrize(
    ("table", "checks"),
    [
        ("enriched_usage", {"accepted_plus_duplicates_is_parsed", "tokens_enriched_equal_raw", "tokens_billed_equal_enriched"}),
        ("daily_billing", {"tokens_billed_equal_enriched"}),
    ],
)
def test_a_row_that_vanished_from_the_lake_fails_the_run(tmp_path: Path, instance: dg.DagsterInstance, table: str, checks: set[str]) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 3)
    assert execute(pipeline, instance, "daily_run", DAY, DAY + 2 * ONE_DAY).success
    day = f"{DAY + ONE_DAY:%Y-%m-%d}"
    path = tmp_path / f"lake/{table}/usage_date={day}/data.parquet"
    kept = pyarrow.parquet.ParquetFile(path).read()
    pyarrow.parquet.write_table(kept.slice(1), path)
    result = execute(Pipeline(pipeline.settings), instance, "daily_run", DAY, DAY + 2 * ONE_DAY)
    assert not result.success
    assert failed(result) == dict.fromkeys(checks, ERROR)
    for check in checks:
        assert [row["usage_date"] for row in offending(result, check)] == [day]


def test_checks_pass_with_their_severity_when_all_is_well(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, DAY, 2)
    result = execute(pipeline, instance, "daily_run", DAY, DAY + ONE_DAY)
    found = {(e.asset_key.to_user_string(), e.check_name): (e.passed, e.severity) for e in result.get_asset_check_evaluations()}
    assert found == {check: (True, severity) for check, severity in CHECKS.items()}


# --- sensor ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sensor:
    """The sensor `capture_files` with an instance that remembers, as the daemon runs it."""

    pipeline: Pipeline
    instance: dg.DagsterInstance
    cursor: str | None = None
    skipped: str = ""

    def tick(self) -> list[dg.RunRequest]:
        sensor = build_defs(pipeline=self.pipeline).resolve_sensor_def("capture_files")
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources={"pipeline": self.pipeline})
        data = sensor.evaluate_tick(context)
        self.cursor, self.skipped = data.cursor, data.skip_message or ""
        assert data.run_requests or data.skip_message
        return list(data.run_requests or [])

    def settle(self, ticks: int = 20) -> list[tuple[str, str, str]]:
        """Tick and execute what is asked for, until nothing is; returns every run as (job, first day, last day)."""
        asked: list[tuple[str, str, str]] = []
        for _ in range(ticks):
            requests = self.tick()
            for request in requests:
                asked.append((request.job_name or "", request.tags[RANGE_START], request.tags[RANGE_END]))
                execute(self.pipeline, self.instance, *asked[-1])
            if not requests:
                return asked
        pytest.fail(f"the sensor never came to rest: {asked}")


@pytest.fixture
def sensor(tmp_path: Path, instance: dg.DagsterInstance) -> Sensor:
    return Sensor(installation(tmp_path, start_date=(TODAY - 60 * ONE_DAY).date()), instance)


def test_new_files_are_ingested_and_billed(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 2 * ONE_DAY, 3)
    first, last = f"{TODAY - 2 * ONE_DAY:%Y-%m-%d}", f"{TODAY:%Y-%m-%d}"
    assert sensor.settle() == [("ingest", first, last), ("bill", first, last)]
    assert rows(sensor.pipeline, "SELECT sum(requests) FROM daily_usage") == [(3,)]


@pytest.mark.slow
def test_first_contact_with_a_year_of_files_is_a_handful_of_runs(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    start = TODAY - 364 * ONE_DAY
    sensor = Sensor(installation(tmp_path, start_date=start.date()), instance)
    capture_days(sensor.pipeline, start, 365)
    assert len(sensor.settle()) <= 5
    assert rows(sensor.pipeline, "SELECT count(DISTINCT usage_date), sum(requests) FROM daily_usage") == [(365, 365)]
    assert sensor.pipeline.stale_usage_dates() == {}


def test_a_late_file_bills_again_only_the_days_that_became_stale(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 50 * ONE_DAY, 3)
    capture_days(sensor.pipeline, TODAY - 2 * ONE_DAY, 2, number=4)
    sensor.settle()
    old = TODAY - 49 * ONE_DAY
    capture(sensor.pipeline, TODAY + HOUR, seed_event("late", old, chat(10, 5)), first=6)
    today, late = f"{TODAY:%Y-%m-%d}", f"{old:%Y-%m-%d}"
    assert sensor.settle() == [("ingest", today, today), ("bill", late, late)]
    assert rows(sensor.pipeline, f"SELECT requests FROM daily_usage WHERE usage_date = DATE '{late}'") == [(2,)]


@pytest.mark.parametrize("age", [1, 45])
def test_a_changed_file_is_noticed(sensor: Sensor, age: int) -> None:
    day = TODAY - age * ONE_DAY
    capture_days(sensor.pipeline, day, 1)
    sensor.settle()
    capture(sensor.pipeline, day + HOUR, seed_event("a", day, chat(10, 5)), seed_event("b", day, chat(10, 5)))
    assert [job for job, *_ in sensor.settle()] == ["ingest", "bill"]
    assert rows(sensor.pipeline, "SELECT sum(requests) FROM daily_usage") == [(2,)]


@pytest.mark.parametrize("age", [0, 45])
def test_an_unreadable_file_is_looked_at_again_and_replayed_when_it_is_repaired(sensor: Sensor, age: int) -> None:
    day = TODAY - age * ONE_DAY
    torn = capture(sensor.pipeline, day + HOUR, seed_event("a", day, chat(10, 5)))
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-20])
    assert [job for job, *_ in sensor.settle()] == ["ingest"]
    assert sensor.settle() == []
    torn.write_bytes(whole)
    assert [job for job, *_ in sensor.settle()] == ["ingest", "bill"]
    assert rows(sensor.pipeline, "SELECT sum(requests) FROM daily_usage") == [(1,)]


def test_a_reset_cursor_and_a_restart_ask_for_nothing_that_was_ingested(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 40 * ONE_DAY, 2)
    capture_days(sensor.pipeline, TODAY - ONE_DAY, 2, number=3)
    sensor.settle()
    sensor.cursor = None
    sensor.pipeline = Pipeline(sensor.pipeline.settings)
    assert sensor.tick() == []
    with dg.DagsterInstance.ephemeral() as empty:
        assert Sensor(sensor.pipeline, empty).tick() == []


def test_changed_reference_data_bills_again_without_new_files(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 40 * ONE_DAY, 2)
    sensor.settle()
    reference(Path(sensor.pipeline.settings.reference_dir), PRICE_BOOK.replace("2.50", "3.50"))
    assert sensor.settle() == [("bill", f"{TODAY - 40 * ONE_DAY:%Y-%m-%d}", f"{TODAY - 39 * ONE_DAY:%Y-%m-%d}")]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_days_in_flight_are_not_asked_for_again(sensor: Sensor, status: dg.DagsterRunStatus) -> None:
    capture_days(sensor.pipeline, TODAY - 3 * ONE_DAY, 4)
    job = build_defs(pipeline=sensor.pipeline).resolve_job_def("ingest")
    tags = {RANGE_START: f"{TODAY - 3 * ONE_DAY:%Y-%m-%d}", RANGE_END: f"{TODAY - ONE_DAY:%Y-%m-%d}"}
    run = sensor.instance.create_run_for_job(job, tags=tags, status=status)
    assert [(r.job_name, r.tags[RANGE_START], r.tags[RANGE_END]) for r in sensor.tick()] == [("ingest", f"{TODAY:%Y-%m-%d}", f"{TODAY:%Y-%m-%d}")]
    # when that run ends and did not ingest them, they are asked for
    sensor.instance.report_run_failed(run)
    assert {request.tags[RANGE_START] for request in sensor.tick()} == {tags[RANGE_START]}


def test_a_lost_run_is_asked_for_a_bounded_number_of_times(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 40 * ONE_DAY, 1)
    asked = [len(sensor.tick()) for _ in range(10)]
    assert 2 <= sum(asked) <= 5
    assert asked[-1] == 0
    # another version of the input is another reason to ask, and so is a person who resets the cursor
    capture(sensor.pipeline, TODAY - 40 * ONE_DAY + HOUR, seed_event("a", TODAY - 40 * ONE_DAY, chat(10, 5)))
    assert len(sensor.tick()) == 1
    while sensor.tick():
        pass
    sensor.cursor = None
    assert len(sensor.tick()) == 1


def test_a_failing_day_is_asked_for_a_bounded_number_of_times_and_again_when_it_can_succeed(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 20 * ONE_DAY, 4)
    bad = TODAY - 19 * ONE_DAY
    two_currencies_on(sensor.pipeline, bad)
    asked = Counter(sensor.settle())
    assert asked.pop(("ingest", f"{TODAY - 20 * ONE_DAY:%Y-%m-%d}", f"{TODAY - 17 * ONE_DAY:%Y-%m-%d}")) == 1
    assert asked.pop(("bill", f"{TODAY - 20 * ONE_DAY:%Y-%m-%d}", f"{TODAY - 17 * ONE_DAY:%Y-%m-%d}")) == 1
    assert set(asked) == {("bill", f"{bad:%Y-%m-%d}", f"{bad:%Y-%m-%d}")}
    assert 1 <= asked.total() <= 4
    assert rows(sensor.pipeline, "SELECT count(DISTINCT usage_date) FROM daily_billing") == [(3,)]
    reference(Path(sensor.pipeline.settings.reference_dir))
    assert [job for job, *_ in sensor.settle()] == ["bill"]
    assert rows(sensor.pipeline, "SELECT count(DISTINCT usage_date) FROM daily_billing") == [(4,)]


def test_a_run_whose_process_was_killed_holds_up_nothing_for_long(sensor: Sensor, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_days(sensor.pipeline, TODAY - ONE_DAY, 2)
    job = build_defs(pipeline=sensor.pipeline).resolve_job_def("ingest")
    tags = {RANGE_START: f"{TODAY - ONE_DAY:%Y-%m-%d}", RANGE_END: f"{TODAY:%Y-%m-%d}"}
    run = sensor.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert sensor.tick() == []
    monkeypatch.setattr(capture_defs, "SILENCE_SECONDS", -1)
    assert [request.tags[RANGE_START] for request in sensor.tick()] == [tags[RANGE_START]]
    ended = sensor.instance.get_run_by_id(run.run_id)
    assert ended and ended.status == dg.DagsterRunStatus.FAILURE


def test_files_that_are_not_capture_files_are_left_alone(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY, 1)
    sensor.settle()
    put(sensor.pipeline.settings.capture_url, "README.txt", b"hello")
    put(sensor.pipeline.settings.capture_url, "ns/hub/0/2026/13/45/01/00/00.avro", b"no such day")
    assert sensor.settle() == []


@pytest.mark.slow
def test_a_tick_with_100_000_known_blobs_stays_quick(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    days = 261
    start = (TODAY - (days - 1) * ONE_DAY).date()
    pipeline = installation(tmp_path, start_date=start)
    quarters = [dt.timedelta(minutes=15 * n) for n in range(96)]
    for partition_id in "0123":
        for n in range(days):
            for quarter in quarters:
                path = Path(pipeline.settings.capture_url, blob_name(TODAY - n * ONE_DAY + quarter, partition_id))
                path.parent.mkdir(parents=True)
                path.touch()
    # what ingesting them would have written
    reader = pipeline.ingestion.reader
    entries: dict[dt.date, list[FileEntry]] = {}
    for file in pipeline.names.files(pipeline.capture, start, TODAY.date()):
        hub, hour = f"{file.namespace}/{file.event_hub}", file.window_start.hour
        entry = FileEntry(file.object.name, file.object.etag, 508, 0, 0, None, None, 0, 0, "empty", None, hour, hub, file.partition_id, "")
        entries.setdefault(file.capture_date, []).append(entry)
    assert sum(map(len, entries.values())) > 100_000
    for date, files in entries.items():
        pipeline.manifests.put(Manifest(date, reader, tuple(files)), replacing=None)
    sensor = Sensor(Pipeline(pipeline.settings), instance)
    for _ in range(2):
        started = time.monotonic()
        assert sensor.tick() == []
        assert time.monotonic() - started < 20
    # and in all that, one changed file of long ago is found
    capture(pipeline, TODAY - 200 * ONE_DAY, seed_event("a", TODAY - 200 * ONE_DAY, chat(10, 5)))
    day = f"{TODAY - 200 * ONE_DAY:%Y-%m-%d}"
    found: list[str] = []
    for _ in range(20):
        found += [request.tags[RANGE_START] for request in sensor.tick()]
        if found:
            break
    assert found == [day]


# --- schedule -------------------------------------------------------------------------------------------------------------------


def test_the_daily_schedule_asks_for_one_run_over_a_trailing_window_up_to_today(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    pipeline = installation(tmp_path)
    capture_days(pipeline, TODAY - 2 * ONE_DAY, 3)
    schedule = build_defs(pipeline=pipeline).resolve_schedule_def("daily_billing_run")
    at = dt.datetime.now(dt.UTC)
    data = schedule.evaluate_tick(dg.build_schedule_context(instance=instance, scheduled_execution_time=at))
    [request] = data.run_requests or []
    first, last = request.tags[RANGE_START], request.tags[RANGE_END]
    assert last == f"{at:%Y-%m-%d}"
    assert first <= f"{at - 2 * ONE_DAY:%Y-%m-%d}"
    assert schedule.job_name == "daily_run"
    assert execute(pipeline, instance, schedule.job_name, first, last).success
    assert rows(pipeline, "SELECT count(DISTINCT usage_date) FROM daily_billing") == [(3,)]


def test_the_schedules_window_does_not_begin_before_the_start_date(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    yesterday = (TODAY - ONE_DAY).date()
    schedule = build_defs(pipeline=installation(tmp_path, start_date=yesterday)).resolve_schedule_def("daily_billing_run")
    data = schedule.evaluate_tick(dg.build_schedule_context(instance=instance, scheduled_execution_time=dt.datetime.now(dt.UTC)))
    assert [request.tags[RANGE_START] for request in data.run_requests or []] == [str(yesterday)]


def test_the_cursor_is_small_and_survives_json(sensor: Sensor) -> None:
    capture_days(sensor.pipeline, TODAY - 50 * ONE_DAY, 10)
    sensor.settle()
    assert sensor.cursor and len(sensor.cursor) < 500
    assert json.loads(sensor.cursor)
