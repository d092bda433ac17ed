"""Closing a month: its lines stand, and whatever differs from them later is a correction in the oldest open month."""

import dataclasses
import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.billing.daily_tables import DailyTables
from aoai_usage_pipeline.billing.periods import Periods
from aoai_usage_pipeline.billing.what_if import Only, Scenario
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
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
    run_all,
    seed_event,
)

AUGUST, SEPTEMBER = dt.datetime(2026, 8, 20, 12), dt.datetime(2026, 9, 10, 12)
FIRST, LAST = dt.date(2026, 8, 1), dt.date(2026, 10, 31)
LINES = "usage_date, billing_period, subscription_id, meter, quantity, cost, charge_class, correction_of"


def captured(pipeline: Pipeline, number: int, at: dt.datetime, request_id: str, prompt: int, completion: int, **changes: str) -> None:
    """One capture file with one event that was enqueued three days before the file's number in October."""
    window = dt.datetime(2026, 10, 1) + dt.timedelta(hours=number)
    event = Captured(seed_event(request_id, at, chat(prompt, completion), **changes), window, number)
    put(pipeline.settings.capture_url, blob_name(window), capture_file([event]))


def billed(pipeline: Pipeline) -> list[tuple]:
    run_all(pipeline, FIRST, LAST)
    assert pipeline.held() == {}
    return rows(pipeline, f"SELECT {LINES} FROM daily_billing ORDER BY ALL")


def per_million(tokens: int, price: str) -> Decimal:
    return tokens * Decimal(price) / 1_000_000


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    made = installation(tmp_path)
    captured(made, 0, AUGUST, "a", 1000, 100)
    captured(made, 1, SEPTEMBER, "b", 2000, 200)
    billed(made)
    return made


def test_a_late_event_of_a_closed_month_is_a_correction_in_the_open_one(pipeline):
    before = rows(pipeline, f"SELECT {LINES} FROM daily_billing WHERE billing_period = '2026-08' ORDER BY ALL")
    pipeline.close("2026-08")
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    after = billed(pipeline)
    assert [line for line in after if line[1] == "2026-08"] == before
    assert [line for line in after if line[6]] == [
        (AUGUST.date(), "2026-09", "sales", "input", 500, per_million(500, "2.5"), "Correction", "2026-08"),
    ]  # fmt: skip
    # request rows and daily usage go on as if nothing had been closed
    assert rows(pipeline, "SELECT sum(requests), sum(prompt_tokens) FROM daily_usage WHERE usage_date = '2026-08-20'") == [(2, 1500)]


def test_a_price_that_changes_afterwards_takes_back_the_old_lines_and_books_the_new_ones(pipeline):
    pipeline.close("2026-08")
    reference(Path(pipeline.settings.reference_dir), PRICE_BOOK.replace("in-1,gpt-4o,*,*,*,*,*,input,2.50", "in-2,gpt-4o,*,*,*,*,*,input,3.00"))
    lines = billed(pipeline)
    august = AUGUST.date()
    assert [line for line in lines if line[0] == august and line[3] == "input"] == [
        (august, "2026-08", "sales", "input", 1000, per_million(1000, "2.5"), None, None),
        (august, "2026-09", "sales", "input", -1000, -per_million(1000, "2.5"), "Correction", "2026-08"),
        (august, "2026-09", "sales", "input", 1000, per_million(1000, "3"), "Correction", "2026-08"),
    ]
    # the open month is simply billed at the new price
    assert (SEPTEMBER.date(), "2026-09", "sales", "input", 2000, per_million(2000, "3"), None, None) in lines
    assert pipeline.stale_usage_dates() == {}


def test_corrections_are_closed_with_their_month_and_later_ones_go_to_the_next(pipeline):
    pipeline.close("2026-08")
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    billed(pipeline)
    closing = pipeline.close("2026-09")
    assert closing.lines == 3
    captured(pipeline, 3, AUGUST, "later", 0, 7)
    lines = billed(pipeline)
    assert [line for line in lines if line[6]] == [
        (AUGUST.date(), "2026-09", "sales", "input", 500, per_million(500, "2.5"), "Correction", "2026-08"),
        (AUGUST.date(), "2026-10", "sales", "output", 7, per_million(7, "10"), "Correction", "2026-08"),
    ]


def test_nothing_new_is_no_correction(pipeline):
    before = billed(pipeline)
    pipeline.close("2026-08")
    (Path(pipeline.settings.lake_url) / "daily_billing/usage_date=2026-08-20/data.parquet").unlink()
    assert billed(pipeline) == before


def test_a_month_is_closed_once_in_order_when_it_has_ended_and_is_up_to_date(pipeline, tmp_path):
    with pytest.raises(ValueError, match="2026-08 is still open"):
        pipeline.close("2026-09")
    with pytest.raises(ValueError, match="has not ended"):
        pipeline.close(f"{dt.datetime.now(dt.UTC):%Y-%m}")
    with pytest.raises(ValueError, match="it has no lines"):
        pipeline.close("2026-07")
    with pytest.raises(ValueError, match="'August' is not a billing period"):
        pipeline.close("August")
    reference(Path(pipeline.settings.reference_dir), PRICE_BOOK.replace("2.50", "2.60"))
    with pytest.raises(ValueError, match="not up to date, the first is 2026-08-20"):
        pipeline.close("2026-08")
    reference(Path(pipeline.settings.reference_dir))
    pipeline.close("2026-08")
    with pytest.raises(ValueError, match="2026-08 is closed already"):
        pipeline.close("2026-08")


def test_a_month_with_unpriced_usage_is_closed_only_when_that_is_accepted(pipeline):
    reference(Path(pipeline.settings.reference_dir), "\n".join(PRICE_BOOK.splitlines()[:3]) + "\n")
    billed(pipeline)
    with pytest.raises(ValueError, match="1 lines have no price"):
        pipeline.close("2026-08")
    pipeline.close("2026-08", accept_unpriced=True)
    reference(Path(pipeline.settings.reference_dir))
    corrections = [line for line in billed(pipeline) if line[6]]
    assert corrections == [
        (AUGUST.date(), "2026-09", "sales", "output", -100, None, "Correction", "2026-08"),
        (AUGUST.date(), "2026-09", "sales", "output", 100, per_million(100, "10"), "Correction", "2026-08"),
    ]
    assert pipeline.unpriced([AUGUST.date(), SEPTEMBER.date()], pipeline.reference()) == []


def test_a_run_that_began_before_the_month_was_closed_makes_its_day_again(pipeline, monkeypatch):
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    days = [AUGUST.date()]
    pipeline.ingest([dt.date(2026, 10, 1)])
    pipeline.enrich(days)
    write, closings = DailyTables.write, []

    def close_first(self, *arguments):
        if not closings:
            closings.append(Periods(pipeline.lake).close("2026-08", self.billing))
        write(self, *arguments)

    monkeypatch.setattr(DailyTables, "write", close_first)
    assert [day.outcome for day in pipeline.bill(days)] == ["made"]
    assert [line[4] for line in billed(pipeline) if line[6]] == [500]


def test_the_statement_adds_up_to_its_lines_and_says_what_it_rounded(pipeline):
    [sales] = pipeline.statements("2026-08")
    exact = per_million(1000, "2.5") + per_million(100, "10")
    assert (sales.cost_center, sales.currency, sales.total) == ("CC-1", "USD", exact)
    assert sum(line.cost for line in sales.lines) == sales.total
    assert (sales.amount, sales.amount - sales.rounding) == (Decimal("0.00"), exact)
    stored = Path(pipeline.settings.lake_url) / "statements/billing_period=2026-08.json"
    assert not stored.exists()
    closing = pipeline.close("2026-08")
    [kept] = json.loads(stored.read_text())
    assert (kept["total"], kept["digest"]) == ("0.0035", sales.digest == closing.digest and closing.digest)


def test_verify_agrees_after_closing_and_correcting(pipeline):
    pipeline.close("2026-08")
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    billed(pipeline)
    assert pipeline.verify([AUGUST.date(), SEPTEMBER.date()]).agrees


def test_a_closed_line_and_its_correction_are_explained_as_what_they_are(pipeline):
    pipeline.close("2026-08")
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    billed(pipeline)
    bills = pipeline.bills()
    said = {(line["meter"], line["charge_class"]): bills.explain(line).outdated for line in bills.lines([AUGUST.date()])}
    assert "the line corrects the closed month 2026-08" in said["input", "Correction"]
    assert "the month is closed and the line stands as it was" in said["input", None]
    assert said["output", None] is None


def test_usage_of_a_closed_month_is_compared_like_any_other(pipeline):
    window = dt.datetime(2026, 10, 1, 5)
    event = Captured(hub_event("named", AUGUST, 1000, 100, 1100, deploymentName="chat", gatewayName="apim"), window, 2)
    put(pipeline.settings.capture_url, blob_name(window), capture_file([event]))
    billed(pipeline)
    days = [FIRST + dt.timedelta(n) for n in range(61)]
    before = pipeline.what_if(days, Scenario.of("model:gpt-4o"), Only())
    costs = pipeline.rebill(days, pipeline.reference())
    pipeline.close("2026-08")
    assert pipeline.what_if(days, Scenario.of("model:gpt-4o"), Only()) == before
    assert pipeline.rebill(days, pipeline.reference()) == costs


EVENTS = st.lists(
    st.tuples(st.sampled_from([AUGUST, SEPTEMBER]), st.integers(1, 900), st.integers(0, 90), st.sampled_from(["sales", "hr"])), max_size=4
)
STEPS = st.lists(st.one_of(EVENTS, st.sampled_from(["2.50", "3.00", "0.000000001"]), st.just("close")), min_size=2, max_size=6)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_closed_lines_and_corrections_are_always_what_is_billed_without_closing(tmp_path_factory, steps):
    """Whatever happens in whatever order, frozen lines never change, and all lines add up to the bill of a lake that closes nothing."""
    root = tmp_path_factory.mktemp("periods")
    closing, open_ = installation(root / "one"), installation(root / "two")
    for made in (closing, open_):
        captured(made, 0, AUGUST, "a", 1000, 100)
    frozen: dict[str, list[tuple]] = {}
    number = 1
    for step in steps:
        for made in (closing, open_):
            if isinstance(step, list):
                for n, (at, prompt, completion, who) in enumerate(step):
                    captured(made, number + n, at, f"r{number + n}", prompt, completion, SubscriptionId=who)
            elif step != "close":
                reference(Path(made.settings.reference_dir), PRICE_BOOK.replace("2.50", step))
            billed(made)
        number += len(step) if isinstance(step, list) else 0
        if step == "close" and len(frozen) < 2:
            period = ("2026-08", "2026-09")[len(frozen)]
            if not closing.statements(period):
                continue
            closing.close(period)
            frozen[period] = rows(closing, f"SELECT {LINES} FROM daily_billing WHERE billing_period = '{period}' ORDER BY ALL")
        for period, lines in frozen.items():
            assert rows(closing, f"SELECT {LINES} FROM daily_billing WHERE billing_period = '{period}' ORDER BY ALL") == lines
        total = (
            "SELECT usage_date, cost_center, meter, sum(quantity), sum(cost) FROM daily_billing GROUP BY ALL HAVING sum(quantity) <> 0 ORDER BY ALL"
        )
        assert rows(closing, total) == rows(open_, total)


@pytest.fixture
def command(pipeline, aoai_usage, monkeypatch):
    """Run the command line on the pipeline's lake."""
    for name, value in dataclasses.asdict(pipeline.settings).items():
        if name in ("capture_url", "lake_url", "warehouse_path", "reference_dir"):
            monkeypatch.setenv(f"AOAI_{name.upper()}", str(value))
    monkeypatch.setenv("AOAI_START_DATE", str(pipeline.settings.start_date))
    return aoai_usage


def test_what_billing_again_does_not_change_is_not_advised_to_be_billed(pipeline, command):
    pipeline.close("2026-08")
    captured(pipeline, 2, AUGUST, "late", 500, 0)
    billed(pipeline)
    [[correction]] = rows(pipeline, "SELECT line_id FROM daily_billing WHERE charge_class IS NOT NULL")
    target = Path(pipeline.settings.lake_url).parent / "requests.csv"
    code, out, _ = command("explain", correction, "--csv", str(target))
    assert code == 1
    assert "not explained the line corrects the closed month 2026-08" in out and "aoai-usage bill" not in out
    assert f"Nothing was written to {target}" in out and not target.exists()


def test_a_preliminary_statement_says_which_days_it_does_not_have_yet(pipeline, command):
    assert "not up to date" not in command("statement", "2026-09")[1]
    captured(pipeline, 2, SEPTEMBER, "late", 500, 0)
    pipeline.ingest([dt.date(2026, 10, 1)])
    assert "not up to date 1 days up to the end of 2026-09: aoai-usage bill --from 2026-09-10 --to 2026-09-10" in command("statement", "2026-09")[1]
    assert "not up to date" not in command("statement", "2026-08")[1]


def test_the_command_line_closes_and_states(pipeline, command):
    code, _, err = command("close", "2026-09")
    assert code == 2
    assert "2026-08 is still open: close it first" in err
    code, out, _ = command("close", "2026-08")
    assert code == 0
    assert "2026-08 is closed: 2 lines" in out
    target = Path(pipeline.settings.lake_url).parent / "lines.csv"
    code, out, _ = command("statement", "2026-08", "--cost-center", "CC-1", "--csv", str(target))
    assert code == 0
    assert "Statement 2026-08, closed" in out
    assert "gpt-4o 2024-11-20 GlobalStandard input: 1,000 x 2.5 / 1,000,000 = 0.0025 USD" in out
    assert target.read_text().splitlines()[0].startswith("cost_center,currency,deployment")
    assert command("statement", "2026-07")[0] == 2
