"""Whatever interrupts, repeats, races or damages a run, the tables end up as those of one clean run over the same files."""

import concurrent.futures
import datetime as dt
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
    DAY,
    PRICE_BOOK,
    Captured,
    blob_name,
    capture_file,
    chat,
    installation,
    put,
    reference,
    rows,
    run_all,
    seed_event,
)

HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
FIRST, LAST = (DAY - 41 * ONE_DAY).date(), (DAY + 5 * ONE_DAY).date()
DEARER = PRICE_BOOK.replace("in-1,gpt-4o,*,*,*,*,*,input,2.50", "in-1,gpt-4o,*,*,*,*,*,input,3.50")
TABLES = ("daily_usage", "daily_billing", "enriched_usage", "daily_quality", "quarantine", "capture_files")


def capture(root: Path, window_start: dt.datetime, *events: tuple[str, dt.datetime], first: int = 1, prompt: int = 10) -> Path:
    """A capture file of requests, given by id and event time; returns its path."""
    content = capture_file(Captured(seed_event(name, at, chat(prompt, 5)), window_start, n) for n, (name, at) in enumerate(events, first))
    put(root / "capture", blob_name(window_start), content)
    return root / "capture" / blob_name(window_start)


def run(root: Path) -> Pipeline:
    """A whole run, as a new process would do it."""
    pipeline = installation(root)
    run_all(pipeline, FIRST, LAST)
    return pipeline


def tables(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every published table. ETags are the store's business: a copied folder has others."""
    pipeline = installation(root)
    return {t: rows(pipeline, f"SELECT * {'EXCLUDE (etag)' if t == 'capture_files' else ''} FROM {t} ORDER BY ALL") for t in TABLES}


def cost(root: Path) -> dict[dt.date, str]:
    return {day: str(cost.normalize()) for day, cost in rows(installation(root), "SELECT usage_date, sum(cost) FROM daily_usage GROUP BY 1")}


def requests(root: Path) -> dict[dt.date, int]:
    return dict(rows(installation(root), "SELECT usage_date, CAST(sum(requests) AS BIGINT) FROM daily_usage GROUP BY 1"))


def versions(root: Path, folder: str = "lake") -> dict[str, tuple[int, int, bytes]]:
    """Every visible file below a folder with what identifies its version."""
    files = (path for path in (root / folder).rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts[-3:]))
    return {str(path.relative_to(root / folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def rebuilt_days(before: dict[str, Any], after: dict[str, Any], table: str = "daily_billing") -> set[str]:
    return {name.split("/")[1].removeprefix("usage_date=") for name in after if name.startswith(table) and before.get(name) != after[name]}


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


class Hooked:
    """A store that calls back before each write."""

    def __init__(self, store: Any, before_write: Callable[[str], None]) -> None:
        self._store, self._before_write = store, before_write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, content: bytes | Path, *, replacing: str | None) -> str:
        self._before_write(name)
        return self._store.write(name, content, replacing=replacing)


def hooked(root: Path, before_write: Callable[[str], None]) -> Pipeline:
    pipeline = installation(root)
    pipeline.__dict__["lake"] = Hooked(pipeline.lake, before_write)
    return pipeline


def old_and_new(root: Path) -> None:
    """A billed installation, and then what came since: another file, a replaced one, a late duplicate, a broken record and other prices."""
    capture(root, DAY + HOUR, ("a", DAY), ("b", DAY + HOUR / 2))
    capture(root, DAY + ONE_DAY + HOUR, ("c", DAY + ONE_DAY), first=3)
    run(root)
    capture(root, DAY + ONE_DAY + HOUR, ("c", DAY + ONE_DAY), ("d", DAY + ONE_DAY), ("e", DAY), first=3, prompt=20)
    events = [Captured(b"broken", DAY, 6), Captured(seed_event("b", DAY + HOUR, chat(1, 1)), DAY + 2 * ONE_DAY, 7)]
    put(root / "capture", blob_name(DAY + 2 * ONE_DAY), capture_file(events))
    reference(root / "reference", DEARER)


@pytest.mark.slow
def test_killed_before_any_write_and_run_again_gives_the_tables_of_one_clean_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_and_new(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "clean")
    run(tmp_path / "clean")
    expected = tables(tmp_path / "clean")
    assert expected != tables(tmp_path / "start")
    replace = os.replace
    survived = False
    for deadly in range(1, 100):
        root = tmp_path / f"killed-{deadly}"
        shutil.copytree(tmp_path / "start", root)
        writes: list[str] = []

        def count(name: str, writes: list[str] = writes, deadly: int = deadly) -> None:
            writes.append(name)
            if len(writes) == deadly:
                raise Killed

        def swap(source: Any, target: Any, count: Callable[[str], None] = count) -> None:
            if str(target).endswith(".duckdb"):
                count("warehouse")
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", swap)
            try:
                run_all(hooked(root, count), FIRST, LAST)
                survived = True
            except Killed:
                pass
        if survived:
            break
        run(root)
        assert tables(root) == expected, f"killed before write {deadly} of {writes[-1]}"
        shutil.rmtree(root)
    assert survived and len(writes) > 15 and "warehouse" in writes


CHILD = """
import sys, pathlib
from aoai_usage_pipeline_tests import test_recovery
import aoai_usage_pipeline.billing.daily_tables, aoai_usage_pipeline.usage.raw_events, aoai_usage_pipeline.publish.warehouse
print("ready", flush=True)
test_recovery.run(pathlib.Path(sys.argv[1]))
"""


def child(root: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(root)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_processes_killed_at_random_moments_leave_nothing_wrong_behind(tmp_path: Path) -> None:
    old_and_new(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "killed")
    run(tmp_path / "start")
    killed = 0
    for _ in range(8):
        process = child(tmp_path / "killed")
        time.sleep(random.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    process = child(tmp_path / "killed")
    assert process.wait() == 0
    assert tables(tmp_path / "killed") == tables(tmp_path / "start")


def test_runs_at_once_in_threads_converge(tmp_path: Path) -> None:
    old_and_new(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "shared")
    run(tmp_path / "start")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(run, tmp_path / "shared") for _ in range(3)]:
            assert done.result().held() == {}
    assert tables(tmp_path / "shared") == tables(tmp_path / "start")


@pytest.mark.slow
def test_runs_at_once_in_processes_converge(tmp_path: Path) -> None:
    old_and_new(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "shared")
    run(tmp_path / "start")
    processes = [child(tmp_path / "shared") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert tables(tmp_path / "shared") == tables(tmp_path / "start")


def overtaken(root: Path, prefix: str, meanwhile: Callable[[], None]) -> None:
    """A run that stands still before its first write to `prefix` while `meanwhile` happens and another run does everything."""
    passed: list[str] = []

    def stand_still(name: str) -> None:
        if name.startswith(prefix) and not passed:
            passed.append(name)
            meanwhile()
            run(root)

    run_all(hooked(root, stand_still), FIRST, LAST)
    assert passed


@pytest.mark.parametrize("prefix", ["raw_events/", "request_dates", "daily_quality/", "enriched_usage/", "daily_usage/", "daily_billing/"])
def test_a_slow_run_cannot_overwrite_a_newer_one(tmp_path: Path, prefix: str) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    overtaken(tmp_path, prefix, lambda: capture(tmp_path, DAY + 2 * HOUR, ("b", DAY), first=2) and None)
    assert requests(tmp_path) == {DAY.date(): 2}
    assert installation(tmp_path).stale_usage_dates() == {}
    assert installation(tmp_path).held() == {}


@pytest.mark.parametrize("prefix", ["daily_quality/", "enriched_usage/", "daily_usage/", "daily_billing/"])
def test_a_slow_run_with_old_prices_cannot_overwrite_one_with_new_prices(tmp_path: Path, prefix: str) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    overtaken(tmp_path, prefix, lambda: reference(tmp_path / "reference", DEARER) and None)
    assert cost(tmp_path) == {DAY.date(): "0.000085"}
    assert installation(tmp_path).stale_usage_dates() == {}
    assert installation(tmp_path).held() == {}


def test_two_runs_can_hold_the_same_day_at_once(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    capture(tmp_path, DAY + ONE_DAY + HOUR, ("b", DAY + ONE_DAY), first=2)
    # a request with meters in two currencies cannot be summed
    reference(tmp_path / "reference", PRICE_BOOK.replace("output,10.00,1000000,USD", "output,10.00,1000000,EUR"))
    overtaken(tmp_path, "held/", lambda: None)
    assert set(installation(tmp_path).held()["enriched_usage"]) == {DAY.date(), (DAY + ONE_DAY).date()}


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    old_and_new(tmp_path)
    run(tmp_path)
    lake, capture_folder = versions(tmp_path), versions(tmp_path, "capture")
    warehouse = tmp_path / "warehouse.duckdb"
    before = warehouse.stat(), warehouse.read_bytes()
    run(tmp_path)
    assert versions(tmp_path) == lake
    assert versions(tmp_path, "capture") == capture_folder
    assert (warehouse.stat().st_ino, warehouse.stat().st_mtime_ns) == (before[0].st_ino, before[0].st_mtime_ns)
    assert warehouse.read_bytes() == before[1]


def test_the_published_file_can_be_rebuilt_from_the_lake(tmp_path: Path) -> None:
    old_and_new(tmp_path)
    run(tmp_path)
    expected = tables(tmp_path)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"not a database")):
        damage(tmp_path / "warehouse.duckdb")
        installation(tmp_path).publish()
        assert tables(tmp_path) == expected


def test_a_torn_file_contributes_nothing_until_it_is_repaired(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    path = capture(tmp_path, DAY + 2 * HOUR, ("b", DAY), ("c", DAY), first=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 30])
    run(tmp_path)
    assert requests(tmp_path) == {DAY.date(): 1}
    unreadable = "SELECT blob, records, parsed FROM capture_files WHERE status = 'unreadable' AND reason IS NOT NULL"
    assert rows(installation(tmp_path), unreadable) == [(blob_name(DAY + 2 * HOUR), 0, 0)]
    path.write_bytes(whole)
    run(tmp_path)
    assert requests(tmp_path) == {DAY.date(): 3}
    assert rows(installation(tmp_path), unreadable) == []


def test_a_capture_file_that_a_lifecycle_rule_removed_keeps_its_billing(tmp_path: Path) -> None:
    old = capture(tmp_path, DAY + HOUR, ("a", DAY), ("b", DAY + HOUR))
    run(tmp_path)
    before = tables(tmp_path)
    old.unlink()
    run(tmp_path)
    assert tables(tmp_path) == before
    # also when its hour is read again because of another file, and once more after that
    for minute, name in ((30, "c"), (45, "d")):
        capture(tmp_path, DAY + HOUR + dt.timedelta(minutes=minute), (name, DAY), first=minute)
        run(tmp_path)
    reference(tmp_path / "reference", DEARER)
    run(tmp_path)
    assert rows(installation(tmp_path), "SELECT list_sort(list(request_id)) FROM enriched_usage") == [(["a", "b", "c", "d"],)]
    assert cost(tmp_path) == {DAY.date(): "0.00034"}
    assert rows(installation(tmp_path), "SELECT blob, records FROM capture_files ORDER BY 1")[0] == (blob_name(DAY + HOUR), 2)


@pytest.mark.parametrize("late", [dt.timedelta(hours=30), dt.timedelta(days=40)])
def test_a_late_event_bills_its_own_day_again_and_no_other(tmp_path: Path, late: dt.timedelta) -> None:
    days = [DAY - 40 * ONE_DAY, DAY - 30 * HOUR, DAY]
    for number, day in enumerate(days):
        capture(tmp_path, day + HOUR, (f"r{number}", day), first=number)
    run(tmp_path)
    before = versions(tmp_path)
    capture(tmp_path, DAY + 2 * HOUR, ("late", DAY - late), first=9)
    pipeline = installation(tmp_path)
    pipeline.ingest([DAY.date()])
    old = (DAY - late).date()
    assert set(pipeline.stale_usage_dates()) == {old}
    run(tmp_path)
    for table in ("enriched_usage", "daily_usage", "daily_billing"):
        assert rebuilt_days(before, versions(tmp_path), table) == {str(old)}
    assert requests(tmp_path) == {day.date(): 1 + (day.date() == old) for day in days}


def test_a_capture_file_that_is_written_again_unchanged_changes_no_bill(tmp_path: Path) -> None:
    path = capture(tmp_path, DAY + HOUR, ("a", DAY))
    run(tmp_path)
    before, bill = versions(tmp_path), tables(tmp_path)
    os.utime(path, (time.time() + 5, time.time() + 5))
    pipeline = run(tmp_path)
    changed = {name for name, version in versions(tmp_path).items() if before.get(name) != version}
    assert {name for name in changed if not name.startswith("raw_events/")} == {f"manifests/capture_date={DAY.date()}.json"}
    assert tables(tmp_path) == bill
    assert pipeline.changed_capture_dates(FIRST, LAST) == {}


def test_a_changed_price_bills_again_the_days_on_which_it_is_in_force_and_no_other(tmp_path: Path) -> None:
    days = [DAY + n * ONE_DAY for n in range(5)]
    for number, day in enumerate(days):
        capture(tmp_path, day + HOUR, (f"r{number}", day), first=number)
    spring = "in-1,gpt-4o,*,*,*,*,*,input,2.50,1000000,USD,2024-01-01,"
    summer = "in-2,gpt-4o,*,*,*,*,*,input,4.00,1000000,USD,2026-10-06,2026-10-08"
    autumn = "in-3,gpt-4o,*,*,*,*,*,input,8.00,1000000,USD,2026-10-08,"
    book = PRICE_BOOK.replace(spring, f"{spring}2026-10-06,,\n{summer},,\n{autumn}")
    reference(tmp_path / "reference", book)
    run(tmp_path)
    before = versions(tmp_path)
    reference(tmp_path / "reference", book.replace("4.00", "5.00"))
    assert {str(day) for day in installation(tmp_path).stale_usage_dates()} == {"2026-10-06", "2026-10-07"}
    run(tmp_path)
    assert rebuilt_days(before, versions(tmp_path)) == {"2026-10-06", "2026-10-07"}
    assert list(cost(tmp_path).values()) == ["0.000075", "0.0001", "0.0001", "0.00013", "0.00013"]
    # another order of the rows is no other price
    before = versions(tmp_path)
    lines = book.replace("4.00", "5.00").splitlines()
    reference(tmp_path / "reference", "\n".join([lines[0], *reversed(lines[1:])]))
    run(tmp_path)
    assert rebuilt_days(before, versions(tmp_path)) == set()


@pytest.mark.parametrize("change", ["other day", "torn"])
def test_a_day_whose_events_are_gone_is_not_billed_any_more(tmp_path: Path, change: str) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    run(tmp_path)
    path = capture(tmp_path, DAY + HOUR, ("a", DAY + ONE_DAY))  # the file is replaced by a corrected one
    if change == "torn":
        path.write_bytes(path.read_bytes()[:-30])
    run(tmp_path)
    assert requests(tmp_path) == ({} if change == "torn" else {(DAY + ONE_DAY).date(): 1})
    assert rows(installation(tmp_path), "SELECT coalesce(sum(accepted), 0) FROM daily_quality") == [(len(requests(tmp_path)),)]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.mark.parametrize("repair", ["restored", "captured again"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_segment_holds_its_day_and_no_other(tmp_path: Path, damage: str, repair: str) -> None:
    paths = [capture(tmp_path, DAY + n * ONE_DAY + HOUR, (f"r{n}", DAY + n * ONE_DAY), first=n) for n in range(3)]
    middle = (DAY + ONE_DAY).date()
    run(tmp_path)
    [segment] = (tmp_path / "lake").glob(f"raw_events/capture_date={middle}/hour=*.parquet")
    good = segment.read_bytes()
    DAMAGES[damage](segment)
    reference(tmp_path / "reference", DEARER)
    pipeline = run(tmp_path)
    assert {day for reasons in pipeline.held().values() for day in reasons} == {middle}
    assert list(cost(tmp_path).values()) == ["0.000085", "0.000075", "0.000085"]
    if repair == "restored":
        segment.write_bytes(good)
    else:
        os.utime(paths[1], (time.time() + 5, time.time() + 5))
    pipeline = run(tmp_path)
    assert pipeline.held() == {}
    assert list(cost(tmp_path).values()) == ["0.000085"] * 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_segment_damaged_before_its_day_was_ever_billed_holds_that_day_and_no_other(tmp_path: Path, damage: str) -> None:
    days = [(DAY + n * ONE_DAY).date() for n in range(3)]
    for n in range(3):
        capture(tmp_path, DAY + n * ONE_DAY + HOUR, (f"r{n}", DAY + n * ONE_DAY), first=n)
    installation(tmp_path).ingest(days)
    [segment] = (tmp_path / "lake").glob(f"raw_events/capture_date={days[1]}/hour=*.parquet")
    DAMAGES[damage](segment)
    pipeline = run(tmp_path)
    assert {day for reasons in pipeline.held().values() for day in reasons} == {days[1]}
    assert requests(tmp_path) == {days[0]: 1, days[2]: 1}


def age(paths: Iterable[Path]) -> None:
    for path in paths:
        os.utime(path, (time.time() - 3 * 86_400,) * 2)


def test_unreferenced_segments_are_collected_after_a_grace_period(tmp_path: Path) -> None:
    def segments() -> set[Path]:
        return set((tmp_path / "lake/raw_events").rglob("*.parquet"))

    generations = []
    for prompt in (10, 11, 12):
        capture(tmp_path, DAY + HOUR, ("a", DAY), prompt=prompt)
        run(tmp_path)
        generations.append(segments())
    # young ones stay, whoever may be reading them
    assert generations[0] < generations[1] < generations[2]
    age(segments())
    capture(tmp_path, DAY + HOUR, ("a", DAY), prompt=13)
    run(tmp_path)
    assert not segments() & generations[1]
    # nothing that is still needed went with them
    reference(tmp_path / "reference", DEARER)
    assert run(tmp_path).held() == {}
    assert rows(installation(tmp_path), "SELECT prompt_tokens FROM enriched_usage") == [(13,)]


def test_earlier_indexes_of_a_capture_date_are_collected_after_a_grace_period(tmp_path: Path) -> None:
    def indexes() -> set[Path]:
        return set((tmp_path / "lake/request_index").rglob("*.parquet"))

    capture(tmp_path, DAY + HOUR, ("a", DAY), prompt=10)
    run(tmp_path)
    first = indexes()
    capture(tmp_path, DAY + HOUR, ("a", DAY), prompt=11)
    run(tmp_path)
    assert first < indexes()
    age(first)
    capture(tmp_path, DAY + HOUR, ("a", DAY), prompt=12)
    run(tmp_path)
    assert indexes() and not first & indexes()


def test_the_index_of_request_dates_can_be_rebuilt(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    capture(tmp_path, DAY + ONE_DAY + HOUR, ("a", DAY + ONE_DAY), first=2)
    run(tmp_path)
    expected = tables(tmp_path)
    (tmp_path / "lake/request_dates.json").unlink()
    reference(tmp_path / "reference", DEARER)
    run(tmp_path)
    reference(tmp_path / "reference", PRICE_BOOK)
    run(tmp_path)
    assert tables(tmp_path) == expected
    assert requests(tmp_path) == {DAY.date(): 1}


READER = """
import sys, duckdb
db = duckdb.connect(sys.argv[1], read_only=True)
for table in sys.stdin:
    print(*db.execute(f"SELECT count(*) FROM {table}").fetchone(), flush=True)
"""


@pytest.mark.slow
def test_a_reader_that_holds_the_old_file_open_is_not_disturbed(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    path = Path(run(tmp_path).settings.warehouse_path)
    reader = subprocess.Popen([sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin and reader.stdout

    def count(table: str) -> str:
        print(table, file=reader.stdin, flush=True)
        return reader.stdout.readline().strip()

    assert count("daily_usage") == "1"
    opened = path.stat().st_ino
    capture(tmp_path, DAY + 2 * HOUR, ("b", DAY), ("c", DAY + ONE_DAY), first=2)
    run(tmp_path)
    # also in what the reader had not looked at before
    assert [count(table) for table in ("enriched_usage", "capture_files", "daily_quality")] == ["1", "1", "1"]
    assert path.stat().st_ino != opened
    assert requests(tmp_path) == {DAY.date(): 2, (DAY + ONE_DAY).date(): 1}
    reader.stdin.close()
    assert reader.wait() == 0


def test_the_published_file_is_in_the_storage_version_of_duckdb_1_0(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    path = Path(run(tmp_path).settings.warehouse_path)
    header = path.read_bytes()[:20]
    assert header[8:12] == b"DUCK"
    assert int.from_bytes(header[12:20], "little") == 64  # what DuckDB 0.10 to 1.1 write and all later ones read
    path.chmod(0o400)
    with duckdb.connect(str(path), read_only=True) as db:
        assert db.execute("SELECT tags['storage_version'] FROM duckdb_databases() WHERE path IS NOT NULL").fetchall() == [("v1.0.0+",)]
        assert {name for (name,) in db.execute("SELECT table_name FROM duckdb_tables()").fetchall()} >= set(TABLES)


@pytest.mark.parametrize("damaged", ["enriched_usage/", "daily_quality/", "daily_usage/", "daily_billing/", "request_dates.json", "request_index/"])
def test_a_damaged_derived_object_is_made_again(tmp_path: Path, damaged: str) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY), ("b", DAY))
    run(tmp_path)
    bill = tables(tmp_path)
    for name in versions(tmp_path):
        if name.startswith(damaged):
            (tmp_path / "lake" / name).write_bytes(b"garbage")
    capture(tmp_path, DAY + 26 * HOUR, ("c", DAY + 25 * HOUR), first=50)
    run(tmp_path)
    after = tables(tmp_path)
    assert [row for row in after["daily_billing"] if DAY.date() in row] == bill["daily_billing"]
    assert requests(tmp_path) == {DAY.date(): 2, DAY.date() + dt.timedelta(1): 1}


def test_files_of_others_in_the_lake_are_left_alone(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    run(tmp_path)
    strange = [tmp_path / "lake" / name for name in ("manifests/notes.txt", "enriched_usage/notes.txt", "daily_billing/usage_date=x/data.parquet")]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    run(tmp_path)
    assert requests(tmp_path) == {DAY.date(): 1}
    assert all(path.read_text() == "mine" for path in strange)


def test_prices_changed_between_enriching_and_billing_hold_the_day_with_that_reason(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, ("a", DAY))
    pipeline = installation(tmp_path)
    pipeline.ingest([DAY.date()])
    pipeline.enrich([DAY.date()])
    book = tmp_path / "reference/price_book.csv"
    book.write_text(book.read_text().replace("2.50", "3.50"))
    [day] = pipeline.bill([DAY.date()])
    assert day.outcome == "held" and "reference data changed" in str(day.reason)
    run(tmp_path)
    assert pipeline.held() == {}
