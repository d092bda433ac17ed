"""The command line as a person uses it: what it prints, its exit codes, and what it leaves behind."""

import datetime as dt
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import dagster as dg
import pytest

from aoai_usage_pipeline.cli import console
from aoai_usage_pipeline_tests.support import (
    DAY,
    PRICE_BOOK,
    Captured,
    Run,
    blob_name,
    capture,
    capture_file,
    chat,
    hub_event,
    installation,
    lines,
    put,
    reference,
    rows,
    seed_event,
    versions,
)

HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
TODAY = dt.datetime.combine(dt.datetime.now(dt.UTC).date(), dt.time())


def small_mess(root: Path) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(1_000_000, 100_000)), hub_event("b", DAY, 10, 5, 15), b"[broken]")
    capture(root, DAY + ONE_DAY + HOUR, seed_event("c", DAY + ONE_DAY, chat(10, 5), SubscriptionId="[nobody]"), first=4)
    torn = capture(root, DAY + 2 * ONE_DAY + HOUR, seed_event("d", DAY + ONE_DAY, chat(10, 5)), first=5)
    torn.write_bytes(torn.read_bytes()[:-20])


def test_bill_prints_the_bill_the_totals_and_what_is_wrong(root: Path, aoai_usage: Run) -> None:
    small_mess(root)
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert code == 0
    assert lines(out, "CC-1") == [["CC-1", "Sales", "1", "1,000,000", "100,000", "3.50 USD"]]
    assert lines(out, "CC-2") == [["CC-2", "People", "1", "10", "5", "0.000075 USD"]]
    assert lines(out, "UNALLOCATED") == [["UNALLOCATED", "UNALLOCATED", "1", "10", "5", "0.000075 USD"]]
    assert lines(out, "Total") == [["Total", "", "3", "1,000,020", "100,010", "3.50015 USD"]]
    assert "3 events: 3 requests, 0 duplicates" in out and "1 without an owner" in out
    [[quarantined]] = lines(out, "quarantined", blob_name(DAY + HOUR))
    assert "1 x " in quarantined and "sequence number 3" in quarantined
    assert len(lines(out, "unreadable", blob_name(DAY + 2 * ONE_DAY + HOUR), "torn")) == 1
    assert str(root / "warehouse.duckdb") in out


def test_bill_takes_both_days_included_and_no_other(root: Path, aoai_usage: Run) -> None:
    for n in range(4):
        capture(root, DAY + n * ONE_DAY + HOUR, seed_event(f"r{n}", DAY + n * ONE_DAY, chat(10**n, 0)), first=n)
    code, out, _ = aoai_usage("bill", "--from", "2026-10-06", "--to", "2026-10-07")
    assert code == 0
    assert lines(out, "Total") == [["Total", "", "2", "110", "0", "0.000275 USD"]]
    assert rows(installation(root), "SELECT day(usage_date) FROM daily_usage ORDER BY 1") == [(6,), (7,)]


@pytest.mark.parametrize("late", [dt.timedelta(hours=30), dt.timedelta(days=40)])
def test_bill_reads_every_newer_file_so_late_events_are_in_it(root: Path, aoai_usage: Run, late: dt.timedelta) -> None:
    capture(root, DAY - ONE_DAY + HOUR * 23, seed_event("window of the day before", DAY, chat(1, 0)))
    capture(root, DAY + late, seed_event("late", DAY, chat(10, 0)), first=2)
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 0
    assert lines(out, "Total")[0][2:4] == ["2", "11"]


def test_bill_names_other_days_whose_late_events_it_read(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 0)), seed_event("late", DAY - 40 * ONE_DAY, chat(10, 0)))
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 0
    assert "not up to date 1 days outside of this bill: aoai-usage bill --from 2026-08-26 --to 2026-08-26" in out
    assert "not up to date" not in aoai_usage("bill", "--from", "2026-08-26", "--to", "2026-10-05")[1]


def test_bill_of_nothing_says_so(root: Path, aoai_usage: Run) -> None:
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert code == 0
    assert lines(out, "Total") == [["Total", "", "0", "0", "0", "-"]]


def test_bill_keeps_currencies_apart_and_shows_unpriced_usage_without_a_cost(root: Path, aoai_usage: Run) -> None:
    euro = "".join(f"eur-{m},gpt-4o-mini,*,*,*,*,*,{m},1.00,1000000,EUR,,,,\n" for m in ("input", "output"))
    reference(root / "reference", PRICE_BOOK + euro)
    models = ("gpt-4o", "gpt-4o-mini", "mystery")
    capture(root, DAY + HOUR, *(hub_event(model, DAY, 1_000_000, 0, 1_000_000, model=model) for model in models))
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 0
    assert lines(out, "CC-2") == [["CC-2", "People", "3", "3,000,000", "0", "1.00 EUR"]]
    assert len(lines(out, "2.50 USD")) == 2  # the cost centre's second line, and the total's
    assert "1 without a price" in out


def test_bill_adds_fixed_costs_to_what_each_cost_centre_pays(root: Path, aoai_usage: Run) -> None:
    capacity = "deployment,ptus,hourly_price,currency,method,shares,effective_from,effective_to\n"
    shares = "ptu,10,1.25,USD,shares,CC-1=40;CC-7=50,2026-10-05,2026-10-07\nmodel,1,1.70,EUR,,,2026-10-05,2026-10-07\n"
    (root / "reference/capacity.csv").write_text(capacity + shares)
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(1_000_000, 100_000)))
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert code == 0
    assert lines(out, "CC-1") == [["CC-1", "", "0", "0", "0", "240.00 USD"], ["CC-1", "Sales", "1", "1,000,000", "100,000", "3.50 USD"]]
    assert lines(out, "CC-7") == [["CC-7", "", "0", "0", "0", "300.00 USD"]]
    # two days of a model that is hosted, and a tenth of the PTUs that nobody agreed to bear
    unallocated = out.splitlines().index(next(line for line in out.splitlines() if "UNALLOCATED" in line))
    assert [lines(line, "")[0][-1] for line in out.splitlines()[unallocated : unallocated + 2]] == ["81.60 EUR", "60.00 USD"]
    assert lines(out, "Total") == [["Total", "", "1", "1,000,000", "100,000", "81.60 EUR"]]
    assert len(lines(out, "603.50 USD")) == 1
    assert rows(installation(root), "SELECT currency, sum(cost) FROM daily_billing GROUP BY 1 ORDER BY 1") == [
        ("EUR", Decimal("81.6")), ("USD", Decimal("603.5"))
    ]  # fmt: skip


def test_money_is_printed_with_every_digit() -> None:
    largest = Decimal("99999999999999999999999.999999999999999")
    assert [console.money(cost) for cost in (largest, Decimal("0.50"), Decimal(3))] == [
        "99,999,999,999,999,999,999,999.999999999999999",
        "0.50",
        "3.00",
    ]


def test_a_held_day_is_named_with_exit_code_1_and_the_others_are_billed(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    capture(root, DAY + ONE_DAY + HOUR, seed_event("b", DAY + ONE_DAY, chat(10, 5)), first=2)
    # on the first day a request's meters are priced in two currencies, so it cannot be summed
    dollars = "out-1,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD,2024-01-01,"
    euros = "out-0,gpt-4o,*,*,*,*,*,output,10.00,1000000,EUR,2024-01-01,2026-10-06"
    reference(root / "reference", PRICE_BOOK.replace(dollars, f"{euros},,\n{dollars.replace('2024-01-01', '2026-10-06')}"))
    code, out, err = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert code == 1
    assert len(lines(out, "held", "2026-10-05", "currencies")) == 1
    assert "Traceback" not in out + err
    assert rows(installation(root), "SELECT day(usage_date) FROM daily_usage") == [(6,)]
    reference(root / "reference")
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert code == 0 and not lines(out, "held 2026")


def test_running_again_changes_nothing(root: Path, aoai_usage: Run) -> None:
    small_mess(root)
    first = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    before = versions(root)
    second = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert versions(root) == before
    assert second[0] == 0

    def bill(out: str) -> str:
        return out[out.index("Bill 2026-10-05") :]

    assert bill(second[1]) == bill(first[1])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--from", "2026-10-06", "--to", "2026-10-05"), "2026-10-06"),
        (("--from", "2026-02-30", "--to", "2026-10-05"), "2026-02-30"),
        (("--from", "yesterday", "--to", "2026-10-05"), "yesterday"),
        (("--from", "2025-12-31", "--to", "2026-10-05"), "AOAI_START_DATE"),
        (("--from", "2026-10-05"), "--to"),
    ],
)
def test_bad_dates_are_exit_code_2(root: Path, aoai_usage: Run, arguments: tuple[str, ...], complaint: str) -> None:
    code, out, err = aoai_usage("bill", *arguments)
    assert code == 2
    assert complaint in err and "Traceback" not in out + err
    assert not (root / "lake").exists()


def test_bad_reference_data_is_exit_code_2_with_every_fault_and_nothing_written(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    reference(root / "reference", PRICE_BOOK.replace("2.50", "two").replace("10.00", "-1"))
    code, out, err = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 2
    for line in ("line 2", "line 4"):
        assert any("price_book.csv" in text and line in text and "unit_price" in text for text in err.splitlines())
    assert "Traceback" not in out + err
    assert not (root / "lake").exists() and not (root / "warehouse.duckdb").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AOAI_CAPTURE_URL", "no/such/folder"),
        ("AOAI_REFERENCE_DIR", "no/such/folder"),
        ("AOAI_START_DATE", "soon"),
        ("AOAI_CAPTURE_NAME_FORMAT", "{Nonsense}"),
        ("AOAI_WAREHOUSE_PATH", "file/warehouse.duckdb"),
        ("DAGSTER_HOME", "/no/such/folder"),
    ],
)
def test_settings_that_cannot_be_used_are_named_without_a_traceback(
    root: Path, aoai_usage: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    (root / "file").write_text("where a folder should be")
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    monkeypatch.setenv(name, value)
    code, out, err = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code in (1, 2)
    assert value in out + err and "Traceback" not in out + err


@pytest.mark.slow
def test_runs_are_in_the_instance_of_dagster_home(root: Path, aoai_usage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small_mess(root)
    (root / "home").mkdir()
    (root / "home/dagster.yaml").write_text("telemetry: {enabled: false}\n")
    _, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert "DAGSTER_HOME" in out
    monkeypatch.setenv("DAGSTER_HOME", str(root / "home"))
    capture(root, DAY + 2 * HOUR, seed_event("new", DAY, chat(10, 5)), first=9)
    _, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-06")
    assert "DAGSTER_HOME" not in out
    with dg.DagsterInstance.get() as instance:
        assert {run.job_name: run.status for run in instance.get_runs()} == dict.fromkeys(("ingest", "bill"), dg.DagsterRunStatus.SUCCESS)
        assert instance.get_materialized_partitions(dg.AssetKey("daily_billing")) == {"2026-10-05", "2026-10-06"}
        checks = [dg.AssetCheckKey(dg.AssetKey("raw_events"), "no_quarantined_records")]
        [record] = instance.event_log_storage.get_latest_asset_check_execution_by_key(checks).values()
        assert record.evaluation and not record.evaluation.passed


@pytest.mark.slow
def test_the_installed_command(root: Path) -> None:
    small_mess(root)
    command = [str(Path(sys.executable).parent / "aoai-usage"), "bill", "--from", "2026-10-05", "--to"]
    done = subprocess.run([*command, "2026-10-06"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "60"})
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout, "Total")[0][-1] == "3.50015 USD"  # the numbers are whole also where lines are short
    done = subprocess.run([*command, "2026-10-04"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "capture").rglob("*.avro")}


def test_simulate_gives_the_same_bytes_for_the_same_arguments(root: Path, aoai_usage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("simulate", "--from", "2026-10-05", "--to", "2026-10-06", "--requests-per-day", 40)
    code, out, _ = aoai_usage(*arguments)
    assert code == 0
    first, before = contents(root), versions(root)
    assert len(first) > 50 and f"{len(first)} of them written now" in out
    code, out, _ = aoai_usage(*arguments)
    assert code == 0 and versions(root) == before and " 0 of them written now" in out
    for folder, seed in (("again", 1), ("other", 2)):
        monkeypatch.setenv("AOAI_CAPTURE_URL", str(root / folder / "capture"))
        aoai_usage(*arguments, "--seed", seed)
    assert contents(root / "again") == first
    assert contents(root / "other") != first


@pytest.mark.slow
def test_simulated_traffic_bills_without_a_held_day_and_shows_its_faults(root: Path, aoai_usage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AOAI_REFERENCE_DIR")  # the example prices
    assert aoai_usage("simulate", "--from", "2026-08-25", "--to", "2026-09-05", "--requests-per-day", 300)[0] == 0
    code, out, err = aoai_usage("bill", "--from", "2026-08-25", "--to", "2026-09-05")
    assert code == 0, out + err
    assert not lines(out, "held 2026")
    assert lines(out, "quarantined") and len(lines(out, "unreadable", ".avro")) == 1
    [(requests, duplicates, unpriced, unallocated)] = rows(
        installation(root), "SELECT sum(accepted), sum(duplicates), sum(unpriced), sum(unallocated) FROM daily_quality"
    )
    assert requests > 2000 and duplicates and unpriced and unallocated
    # the price change inside the range is in the bill
    prices = "SELECT DISTINCT unit_price FROM daily_billing WHERE model = 'gpt-5.6-sol' AND meter = 'output' AND month(usage_date) = "
    assert rows(installation(root), prices + "8") != rows(installation(root), prices + "9")


def test_capture_files_whose_names_do_not_fit_are_an_error_and_no_empty_bill(root: Path, aoai_usage: Run) -> None:
    put(root / "capture", "2026/10/05/ns-hub-0.avro", capture_file([Captured(seed_event("a", DAY, chat(1, 1)), DAY, 0)]))
    code, out, err = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert (code, out) == (2, "")
    assert "AOAI_CAPTURE_NAME_FORMAT" in err and "2026/10/05/ns-hub-0.avro" in err


def test_names_with_brackets_are_printed_as_they_are(root: Path, aoai_usage: Run) -> None:
    reference(root / "reference", cost_centers="subscription_id,team,cost_center,department\nsales,Ops [/x] [eu],CC-[c],D\n")
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(10, 5)))
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 0
    assert "Ops [/x] [eu]" in out and "CC-[c]" in out


def test_the_current_month_can_be_named_by_its_end(root: Path, aoai_usage: Run) -> None:
    today = TODAY
    capture(root, today, seed_event("a", today, chat(10, 5)))
    code, out, _ = aoai_usage("bill", "--from", str(today.date()), "--to", str(today.date() + dt.timedelta(40)))
    assert code == 0
    assert "still to come" in out and "1 requests" in out
