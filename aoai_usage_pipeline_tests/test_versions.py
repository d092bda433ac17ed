"""Reference data through time: every version that billed is kept, and a bill can be printed as it was known at a moment."""

import datetime as dt
import json
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reference import ReferenceDataError
from aoai_usage_pipeline.reference.files import SPECS, Spec
from aoai_usage_pipeline_tests.support import (
    COST_CENTERS,
    DAY,
    PRICE_BOOK,
    Captured,
    Run,
    blob_name,
    capture,
    capture_file,
    chat,
    installation,
    lines,
    put,
    reference,
    run_all,
    seed_event,
    versions,
)

HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
DEARER = PRICE_BOOK.replace("input,2.50", "input,3.50")
BILL = ("bill", "--from", "2026-10-05", "--to", "2026-10-06")
LOG = "reference_versions.json"


def now() -> str:
    """This very moment, as `--as-of` takes it."""
    return f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def log(root: Path) -> list[dict[str, str]]:
    return json.loads((root / "lake" / LOG).read_text())


def recorded_long_ago(root: Path) -> None:
    """Put the log back in time, to before any event was sent."""
    entries = [entry | {"recorded_at": f"2026-09-{day:02}T00:00:00"} for day, entry in enumerate(log(root), 1)]
    (root / "lake" / LOG).write_text(json.dumps(entries))


def total(out: str) -> list[str]:
    """Requests, prompt tokens, completion tokens and cost of the printed bill."""
    [cells] = lines(out, "│ Total")
    return cells[2:]


def test_after_a_price_change_the_earlier_bill_is_printed_exactly_and_nothing_is_written(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(1_000_001, 100_000, cached=7)), seed_event("b", DAY, chat(3, 5), SubscriptionId="hr"))
    _, first, _ = aoai_usage(*BILL)
    between = now()
    reference(root / "reference", DEARER, cost_centers=COST_CENTERS.replace("CC-2", "CC-9"))
    _, second, _ = aoai_usage(*BILL)
    before = versions(root)
    code, then, _ = aoai_usage(*BILL, "--as-of", between)
    assert code == 0
    assert versions(root) == before
    assert lines(then, "│ CC-") == lines(first, "│ CC-") != lines(second, "│ CC-")
    assert total(then) == total(first) != total(second)
    assert log(root)[0]["version"] in then and "Nothing was written" in then
    assert total(aoai_usage(*BILL, "--as-of", now())[1]) == total(second)


def test_a_price_that_comes_back_is_in_use_again(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(1_000_000, 0)))
    moments = []
    for price_book in (PRICE_BOOK, DEARER, PRICE_BOOK):
        reference(root / "reference", price_book)
        aoai_usage(*BILL)
        moments.append(now())
    one, other, again = (entry["version"] for entry in log(root))
    assert one == again != other
    assert {path.stem for path in (root / "lake/reference_versions").iterdir()} == {one, other}
    assert [total(aoai_usage(*BILL, "--as-of", at)[1])[-1] for at in moments] == ["2.50 USD", "3.50 USD", "2.50 USD"]


def test_a_late_event_was_unknown_before_the_hub_had_it(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 0)))
    at = DAY + 3 * ONE_DAY + HOUR * 12
    capture(root, at, seed_event("late", DAY, chat(100, 0)), first=2)
    aoai_usage(*BILL)
    recorded_long_ago(root)
    for moment, requests in (
        ("2026-10-04", "0"),
        ("2026-10-07", "1"),
        ("2026-10-08", "2"),
        ("2026-10-08T11:59:59Z", "1"),
        ("2026-10-08T14:00+02:00", "2"),
    ):
        code, out, _ = aoai_usage(*BILL, "--as-of", moment)
        assert (code, total(out)[0]) == (0, requests), moment


def test_before_the_first_version_there_is_no_bill(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 0)))
    code, out, err = aoai_usage(*BILL, "--as-of", "2026-10-05")
    assert (code, out) == (2, "") and "none was recorded" in err
    aoai_usage(*BILL)
    code, out, err = aoai_usage(*BILL, "--as-of", "2026-10-05")
    assert (code, out) == (2, "")
    assert f"the first was recorded at {log(root)[0]['recorded_at'][:19].replace('T', ' ')}" in err


@pytest.mark.parametrize("moment", ["soon", "2026-10-05T12:00", "2026-10-32", "0001-01-01T00:00+23:59"])
def test_a_moment_that_cannot_be_read_is_named(root: Path, aoai_usage: Run, moment: str) -> None:
    code, _, err = aoai_usage(*BILL, "--as-of", moment)
    assert code == 2 and repr(moment) in err and "Traceback" not in err
    assert not (root / "lake").exists()


Event = tuple[str, dt.datetime, dt.datetime, int]


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    """Requests by id, event time, enqueued time and tokens; copies come hours and days later, some stamped with another day."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        at = DAY + dt.timedelta(minutes=draw(st.integers(0, 3 * 1440 - 1)))
        for _ in range(draw(st.integers(1, 3))):
            event_time = at + draw(st.sampled_from([0, 0, 1, 2])) * ONE_DAY
            enqueued_at = event_time + draw(st.sampled_from([0, 1, 30, 100])) * HOUR
            found.append((f"r{number}", event_time, enqueued_at, draw(st.sampled_from([10, 10, 20]))))
    return found


def put_events(root: Path, sent: list[Event], until: dt.datetime) -> None:
    """Capture files with the events that were enqueued up to a moment, one an hour."""
    hours: dict[dt.datetime, list[Captured]] = {}
    for number, (name, at, enqueued_at, prompt) in enumerate(sorted(sent, key=lambda event: event[2]), 1):
        hour = hours.setdefault(enqueued_at.replace(minute=0), [])
        if enqueued_at <= until:
            hour.append(Captured(seed_event(name, at, chat(prompt, 5)), enqueued_at, number))
    for hour, captured in hours.items():
        put(root / "capture", blob_name(hour), capture_file(captured))


# a copy that is stamped with the next day is the first at the hub, so the request counts there and not on the day that is asked for
ELSEWHERE = [("r0", DAY, DAY + 30 * HOUR, 10), ("r0", DAY + ONE_DAY, DAY + ONE_DAY, 10)]


@pytest.mark.slow
@given(events(), st.integers(0, 7 * 24), st.integers(0, 2), st.booleans())
@example(ELSEWHERE, 48, 0, True)
@example(ELSEWHERE, 48, 0, False)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
def test_a_bill_as_known_is_the_one_that_the_events_until_then_give(sent: list[Event], hours: int, day: int, enriched: bool) -> None:
    moment, asked = DAY + hours * HOUR, [(DAY + day * ONE_DAY).date()]
    span = (DAY.date(), (DAY + 12 * ONE_DAY).date())
    with tempfile.TemporaryDirectory() as place:
        later, then = installation(Path(place) / "later"), installation(Path(place) / "then")
        put_events(Path(place) / "later", sent, DAY + 99 * ONE_DAY)
        put_events(Path(place) / "then", sent, moment)
        run_all(then, *span)
        if enriched:
            run_all(later, *span)
        else:
            # the index of requests has not been made yet for all that was ingested
            later.ingest([span[0] + n * ONE_DAY for n in range(12)])
            later.enrich([])
            for index in Path(later.settings.lake_url, "request_index").glob("*/*.parquet"):
                index.unlink()
        recorded_long_ago(Path(place) / "later")
        before = versions(Path(place) / "later")
        with later.as_known(asked, moment) as known:
            assert not known.held
            for table in ("daily_billing", "daily_usage", "daily_quality", "enriched_usage"):
                where = f"FROM {table} WHERE usage_date = DATE '{asked[0]}' ORDER BY ALL"
                assert query(known.warehouse, f"SELECT * {where}") == query(Path(then.settings.warehouse_path), f"SELECT * {where}"), table
        assert versions(Path(place) / "later") == before


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as db:
        return db.execute(sql).fetchall()


def bill_a_day(root: Path) -> Pipeline:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    pipeline = installation(root)
    run_all(pipeline, DAY.date(), DAY.date())
    return pipeline


def test_a_recorded_version_is_loaded_again_as_it_was(tmp_path: Path) -> None:
    folder = reference(tmp_path / "reference")
    price_book = (folder / "price_book.csv").read_text()
    (folder / "price_book.csv").write_bytes(b"\xef\xbb\xbf" + price_book.replace("\n", "\r\n").replace("test", '"tést, ""1"""').encode())
    (folder / "capacity.csv").write_text("deployment,ptus,hourly_price,currency,effective_from\nchat,15,1.00,USD,2026-10-05T10:30Z\n")
    (folder / "notes.txt").write_text("not reference data")
    pipeline = bill_a_day(tmp_path)
    as_it_was = pipeline.reference()
    reference(folder, DEARER)
    (folder / "capacity.csv").unlink()
    [entry] = pipeline.reference_versions.log()
    assert pipeline.reference_versions.load(entry.version) == as_it_was
    assert as_it_was.capacity and as_it_was != pipeline.reference()
    assert pipeline.reference_versions.load("another") is None


def test_every_file_belongs_to_a_version() -> None:
    from aoai_usage_pipeline.reference import files

    assert {value for value in vars(files).values() if isinstance(value, Spec)} == set(SPECS)


@pytest.mark.parametrize(
    ("old", "new", "other"),
    [
        ("2024-01-01,,,test\ncached", "2024-01-01,2026-12-01,,test\ncached", True),  # only its end
        ("2.50", "2.51", True),
        (",test\nout", ",a new list\nout", True),
        (PRICE_BOOK.splitlines()[1] + "\n", "", True),
        (PRICE_BOOK, "\n".join([PRICE_BOOK.splitlines()[0], "", *reversed(PRICE_BOOK.splitlines()[1:])]), False),
        ("gpt-4o,*,*", "gpt-4o, ,*", False),
    ],
    ids=["end", "price", "source", "row gone", "order", "blank for any"],
)
def test_another_version_is_what_says_something_else(tmp_path: Path, old: str, new: str, other: bool) -> None:
    bill_a_day(tmp_path)
    assert PRICE_BOOK.replace(old, new) != PRICE_BOOK
    reference(tmp_path / "reference", PRICE_BOOK.replace(old, new))
    run_all(installation(tmp_path), DAY.date(), DAY.date())
    assert len(log(tmp_path)) == 1 + other


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


class Hooked:
    """A store that calls back before each write."""

    def __init__(self, store: Any, before_write: Any) -> None:
        self._store, self._before_write = store, before_write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, content: bytes | Path, *, replacing: str | None) -> str:
        self._before_write(name)
        return self._store.write(name, content, replacing=replacing)


def hooked(root: Path, before_write: Any) -> Pipeline:
    pipeline = installation(root)
    pipeline.__dict__["lake"] = Hooked(pipeline.lake, before_write)
    return pipeline


@pytest.mark.parametrize("at", ["reference_versions/", LOG])
def test_a_run_killed_while_it_records_has_priced_nothing_and_changes_nothing(tmp_path: Path, at: str) -> None:
    def killed(name: str) -> None:
        if name.startswith(at):
            raise Killed

    bill_a_day(tmp_path)
    before = {name: version for name, version in versions(tmp_path / "lake").items() if "/reference_versions/" not in name}
    reference(tmp_path / "reference", DEARER)
    with pytest.raises(Killed):
        hooked(tmp_path, killed).enrich([DAY.date()])
    after = versions(tmp_path / "lake")
    assert {name: version for name, version in after.items() if "/reference_versions/" not in name} == before
    run_all(installation(tmp_path), DAY.date(), DAY.date())
    assert len(log(tmp_path)) == 2


def test_two_runs_that_record_at_once_are_both_in_the_log(tmp_path: Path) -> None:
    capture(tmp_path, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    dearer = reference(tmp_path / "dearer", DEARER)
    others: list[Pipeline] = [installation(tmp_path, reference_dir=str(dearer))]

    def overtake(name: str) -> None:
        if name == LOG and others:
            others.pop().enrich([])

    pipeline = hooked(tmp_path, overtake)
    pipeline.enrich([DAY.date()])
    loaded = [pipeline.reference_versions.load(entry["version"]) for entry in log(tmp_path)]
    assert loaded == [installation(tmp_path, reference_dir=str(dearer)).reference(), pipeline.reference()]
    times = [entry["recorded_at"] for entry in log(tmp_path)]
    assert times == sorted(times)


def test_files_that_change_while_they_are_recorded_are_an_error(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    loaded = pipeline.reference()
    reference(tmp_path / "reference", DEARER)
    with pytest.raises(ReferenceDataError, match="changed while"):
        pipeline.reference_versions.record(loaded, tmp_path / "reference")
    assert not pipeline.reference_versions.log()


def test_a_run_shows_the_version_it_was_made_with(tmp_path: Path) -> None:
    pipeline = bill_a_day(tmp_path)
    # a price that begins later makes another version, but no other day
    reference(tmp_path / "reference", PRICE_BOOK + "new,gpt-5,*,*,*,*,*,input,1.00,1000000,USD,2026-10-06,,,test\n")
    capture(tmp_path, DAY + ONE_DAY + HOUR, seed_event("b", DAY + ONE_DAY, chat(10, 5)), first=2)
    pipeline.ingest([(DAY + ONE_DAY).date()])
    tags = {"dagster/asset_partition_range_start": "2026-10-05", "dagster/asset_partition_range_end": "2026-10-06"}
    with dg.DagsterInstance.ephemeral() as instance:
        result = build_defs(pipeline=pipeline).resolve_job_def("bill").execute_in_process(instance=instance, tags=tags)
    first, second = (entry["version"] for entry in log(tmp_path))
    shown = {
        (event.asset_key.to_user_string(), event.partition): {
            name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()
        }
        for event in result.all_events
        if event.is_step_materialization and event.partition
    }
    for asset in ("enriched_usage", "daily_billing"):
        assert [shown[asset, day]["reference_version"] for day in ("2026-10-05", "2026-10-06")] == [first, second]
    footer, _ = pipeline.daily_tables().billing.footer(DAY.date())
    assert shown["daily_billing", "2026-10-05"]["digest"] == footer["digest"]
