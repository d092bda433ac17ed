"""What if: the same usage under another arrangement, priced by the same rules, to the last digit, with nothing left out and nothing written."""

import dataclasses
import datetime as dt
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoai_usage_pipeline import cli
from aoai_usage_pipeline.billing.what_if import Comparison, Line, Only, Scenario
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reference.ptu import ptu_models
from aoai_usage_pipeline_tests.support import (
    DAY,
    Captured,
    blob_name,
    capture_file,
    chat,
    hub_event,
    installation,
    put,
    reference,
    seed_event,
)

DATE, NEXT = DAY.date(), DAY.date() + dt.timedelta(days=1)
MILLION = 1_000_000
ALL = Only()
GLOBAL, REGIONAL = "GlobalProvisionedManaged", "ProvisionedManaged"
HEADER = "price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency\n"


def prices(*rows: str) -> str:
    """A price book of `model,version,sku,currency,input,cached_input,output`; a blank price: no row."""
    book = HEADER
    for number, row in enumerate(rows):
        model, version, sku, currency, *amounts = row.split(",")
        for meter, price in zip(("input", "cached_input", "output"), amounts, strict=True):
            if price:
                book += f"{number}-{meter},{model},{version},{sku},,,,{meter},{price},1000000,{currency}\n"
    return book


PRICES = prices(
    "gpt-4o,2024-11-20,GlobalStandard,USD,2.50,1.25,10",
    "gpt-4o,2024-11-20,GlobalBatch,USD,1.25,,5",
    "gpt-4o,2024-11-20,Standard,USD,2.75,1.375,11",
    f"*,*,{GLOBAL},USD,0,0,0",
    "gpt-4o-mini,2023-01-01,GlobalStandard,USD,9,9,9",
    "gpt-4o-mini,2024-07-18,GlobalStandard,USD,0.15,0.075,0.60",
    "o1,*,GlobalStandard,USD,15,7.5,60",
    "eu-model,*,GlobalStandard,EUR,1,1,1",
)
DEPLOYMENTS = f"""gateway,deployment,model,model_version,deployment_sku,region
hub,chat,gpt-4o,2024-11-20,GlobalStandard,eastus
hub,regional,gpt-4o,2024-11-20,Standard,eastus
hub,think,o1,2024-12-17,GlobalStandard,eastus
hub,ptu,gpt-4o,2024-11-20,{GLOBAL},eastus
hub,ptu-o3,o3,2025-04-16,{GLOBAL},eastus
hub,mystery,mystery,1,GlobalStandard,eastus
apim,,gpt-4o,2024-11-20,GlobalStandard,eastus
"""
CAPACITY = f"""gateway,deployment,ptus,hourly_price,currency,deployment_sku
hub,ptu,100,1.00,USD,{GLOBAL}
"""
RESERVATION = f"""reservation_id,deployment_sku,ptus,term_price,term,currency
pool,{GLOBAL},120,7440,1-month,USD
"""


def call(deployment: str, prompt: int, completion: int = 0, at: dt.datetime = DAY, subscription: str = "hr") -> tuple[dt.datetime, bytes]:
    call.number = getattr(call, "number", 0) + 1
    usage = (prompt, completion, prompt + completion)
    return at, hub_event(f"r{call.number}", at, *usage, deploymentName=deployment, subscriptionId=subscription, model=None)


def cached(prompt: int, completion: int, of_these: int) -> tuple[dt.datetime, bytes]:
    return DAY, seed_event(f"cached {prompt}", DAY, chat(prompt, completion, of_these))


def lake(root: Path, *calls: tuple[dt.datetime, bytes], **files: str) -> Pipeline:
    """An installation in which these calls are billed."""
    given = {"price_book": PRICES, "deployments": DEPLOYMENTS} | files
    reference(root / "reference", **{name: given[name] for name in ("price_book", "deployments")})
    for name in given.keys() - {"price_book", "deployments"}:
        (root / "reference" / f"{name}.csv").write_text(given[name])
    pipeline = installation(root)
    for day in sorted({at.date() for at, _ in calls}):
        start = dt.datetime.combine(day, dt.time(23))
        events = [Captured(body, start, number) for number, (at, body) in enumerate(calls) if at.date() == day]
        put(root / "capture", blob_name(start), capture_file(events))
    days = [DATE, NEXT]
    pipeline.ingest(days)
    pipeline.enrich(days)
    pipeline.bill(days)
    assert pipeline.held() == {}
    return pipeline


def ask(pipeline: Pipeline, text: str, only: Only = ALL, days: int = 1, **changes: object) -> Comparison:
    scenario = dataclasses.replace(Scenario.of(text), **changes)
    return pipeline.what_if([DATE + dt.timedelta(n) for n in range(days)], scenario, only)


def by_deployment(found: Comparison) -> dict[str | None, tuple[Decimal | None, Decimal | None, str | None]]:
    assert len({line.deployment for line in found.lines}) == len(found.lines)
    return {line.deployment: (line.today, line.scenario, line.note) for line in found.lines}


@pytest.fixture(scope="module")
def billed(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A lake with a call or two of each deployment, and one without token counts."""
    calls = [
        call("chat", 14_000_000, 100_000), call("regional", MILLION), call("think", MILLION), call("mystery", 7), call("ptu", 96 * MILLION),
        cached(MILLION, 0, 400_000), (DAY, seed_event("nothing", DAY)),
    ]  # fmt: skip
    return lake(tmp_path_factory.mktemp("billed"), *calls, capacity=CAPACITY)


# --- batch


def test_batch_halves_what_has_a_batch_price_and_leaves_the_rest_at_what_it_costs(billed):
    found = ask(billed, "batch")
    assert by_deployment(found) == {
        "chat": (36, 18, None),
        # 600,000 at 2.50 and 400,000 at 1.25 a million; as batch all of them at 1.25
        None: (2, Decimal("1.25"), None),
        "regional": (Decimal("2.75"), Decimal("2.75"), "Standard has no batch"),
        "think": (15, 15, "no price of input as o1 2024-12-17 GlobalBatch"),
        "ptu": (0, 0, f"{GLOBAL} has no batch"),
        "mystery": (None, None, "has no price today"),
    }
    assert found.totals == {"USD": (Decimal("55.75"), Decimal("37"))}
    assert found.replaced == {"USD": (38, Decimal("19.25"))}
    assert [(line.requests, line.tokens) for line in found.lines if line.deployment == "mystery"] == [(1, 7)]
    assert "400,000 cached tokens have no price of their own in the scenario: they are priced as input." in found.assumptions


def test_a_group_of_which_one_meter_has_no_price_is_kept_whole(tmp_path):
    book = PRICES.replace("1-output,gpt-4o,2024-11-20,GlobalBatch", "1-output,another,2024-11-20,GlobalBatch")
    [line] = ask(lake(tmp_path, call("chat", MILLION, 1), price_book=book), "batch").lines
    assert line.scenario == line.today == Decimal("2.50001")
    assert line.note == "no price of output as gpt-4o 2024-11-20 GlobalBatch"


# --- another model


def test_another_model_has_its_newest_version_and_the_same_tokens(billed):
    found = ask(billed, "model:gpt-4o-mini", Only(deployment="chat"))
    assert found.lines == (Line("gpt-4o 2024-11-20", "chat", "GlobalStandard", 1, 14_100_000, "USD", Decimal(36), Decimal("2.16"), None),)
    assert found.scenario.model_version == "2024-07-18"
    assert any("Version 2024-07-18" in sentence for sentence in found.assumptions)
    assert any("may need more or fewer" in sentence for sentence in found.assumptions)
    assert found.break_even.share == Fraction(3600, 216)


def test_the_break_even_of_another_model_is_how_many_tokens_it_may_take(tmp_path):
    chat_, mini = Only(deployment="chat"), "model:gpt-4o-mini@2023-01-01"
    found = ask(lake(tmp_path / "today", call("chat", 9 * MILLION)), mini, chat_)
    share = found.break_even.share
    assert share == Fraction(5, 18)
    longer = ask(lake(tmp_path / "then", call("chat", int(9 * MILLION * share))), mini, chat_)
    assert longer.totals["USD"][1] == found.totals["USD"][0] == Decimal("22.5")


def test_another_currency_is_no_comparison(billed):
    [line] = ask(billed, "model:eu-model", Only(deployment="chat")).lines
    assert (line.today, line.scenario, line.note) == (36, 36, "priced in EUR there")


def test_what_is_paid_with_its_capacity_costs_the_same_with_any_model(billed):
    assert by_deployment(ask(billed, "model:o1", Only(deployment="ptu"))) == {"ptu": (0, 0, "unchanged: paid with its capacity")}


# --- provisioned throughput


def test_ptus_cost_24_hours_a_day_and_break_even_at_ten_times_the_usage(billed, tmp_path):
    chat_ = Only(deployment="chat")
    found = ask(billed, "ptu:15", chat_)
    assert found.totals == {"USD": (36, 360)}
    assert found.break_even.share == 10 and found.break_even.tokens_per_day == 141_000_000
    ten_times = ask(lake(tmp_path, *(call("chat", 14_000_000, 100_000) for _ in range(10))), "ptu:15", chat_)
    assert ten_times.totals == {"USD": (360, 360)}
    assert ten_times.break_even.share == 1


def test_days_without_usage_cost_as_much(billed):
    found = ask(billed, "ptu:15", Only(deployment="chat"), days=3)
    assert found.totals["USD"] == (36, 3 * 360)
    assert "2 of the 3 days have no usage in the lake." in found.assumptions


def test_a_reservation_is_a_part_of_its_month(billed):
    # October has 31 days
    found = ask(billed, "ptu:15", Only(deployment="chat"), monthly_price=Decimal("260"), days=2)
    assert abs(found.totals["USD"][1] - Decimal(15 * 260 * 2) / 31) < Decimal("1E-12")
    assert ask(billed, "ptu:15", Only(deployment="chat"), hourly_price=Decimal("0.5")).totals["USD"][1] == 180


def test_used_capacity_is_borne_by_its_deployment_and_the_rest_is_idle(tmp_path):
    # 15 PTUs can do 15 x 2,500 x 60 = 2,250,000 units an hour; 450,000 + 4 x 56,250 are 30 % of one hour
    pipeline = lake(tmp_path, call("chat", 450_000, 56_250), call("ptu", 3))
    found = ask(pipeline, "ptu:15")
    assert by_deployment(found) == {
        "chat": (Decimal("1.6875"), Decimal("4.5"), None),
        "ptu": (0, 0, "unchanged: paid with its capacity"),
        None: (None, Decimal("355.5"), None),
    }
    assert found.throughput.peak_hour == Fraction(3, 10)
    assert found.throughput.mean == Fraction(3, 240)
    assert found.throughput.peak_minute == 18
    assert (found.throughput.minutes_over, found.throughput.part_over) == (1, Fraction(17, 18))


def test_cached_tokens_take_no_capacity(billed):
    # the seed policy's calls name no deployment: they are Sales'
    found = ask(billed, "ptu:15", Only(cost_center="CC-1"))
    assert found.throughput.peak_minute == Fraction(600_000, 15 * 2500)


def test_left_out_the_number_is_the_smallest_that_carries_the_busiest_minute(tmp_path):
    # 40,000 units in one minute need 16 PTUs, so 20; the next minute needs less
    calls = [call("chat", 36_000), call("chat", 0, 1_000, DAY + dt.timedelta(seconds=59)), call("chat", 39_000, 0, DAY + dt.timedelta(minutes=1))]
    pipeline = lake(tmp_path, *calls)
    found = ask(pipeline, "ptu")
    assert (found.scenario.ptus, found.throughput.peak_minute, found.throughput.minutes_over) == (20, Fraction(4, 5), 0)
    assert ask(pipeline, "ptu:15").throughput.minutes_over == 2
    regional = ask(pipeline, "ptu", deployment_sku=REGIONAL, hourly_price=Decimal(2))
    assert regional.scenario.ptus == 50 and regional.totals["USD"][1] == 2400
    assert any("may refuse" in sentence for sentence in ask(pipeline, "ptu:17").assumptions)


@given(model=st.sampled_from(sorted(ptu_models())), units=st.fractions(0, 10**9), sku=st.sampled_from([GLOBAL, REGIONAL]))
def test_the_size_carries_the_minute_and_no_smaller_one_does(model, units, sku):
    figures = ptu_models()[model]
    ptus, (least, step) = figures.needed(units, sku), figures.sizes(sku)
    assert (ptus - least) % step == 0 and ptus * figures.input_tpm_per_ptu >= units
    assert ptus == least or (ptus - step) * figures.input_tpm_per_ptu < units


@pytest.mark.parametrize(
    ("text", "only", "changes", "message"),
    [
        ("ptu:15", Only(), {}, "one model; name it with --model: gpt-4o, o1"),
        ("ptu", Only(model="eu-model"), {}, "no usage of model eu-model from 2026-10-05 to 2026-10-05 in the lake"),
        ("ptu:15", Only(model="mystery"), {}, "paid by the token and has a price"),
        ("ptu:15", Only("gpt-4o"), {"deployment_sku": REGIONAL}, "say what a PTU of ProvisionedManaged costs in USD"),
        ("payg", Only("o1"), {}, "no usage of provisioned deployments of model o1"),
        ("model:nothing", Only(), {}, "the price book has no row of model nothing"),
        ("model:gpt-4o-mini@2099", Only(), {}, "version 2099, only of 2023-01-01, 2024-07-18"),
    ],
)
def test_what_cannot_be_answered_says_why(billed, text, only, changes, message):
    with pytest.raises(ValueError, match=message):
        ask(billed, text, only, **changes)


# --- pay as you go


def test_by_the_token_instead_of_capacity_breaks_even_at_the_usage_that_costs_as_much(billed, tmp_path):
    # 100 PTUs are 2,400 USD a day; 96 million tokens at 2.50 a million are 240
    found = ask(billed, "payg")
    costs = by_deployment(found)
    assert costs["ptu"] == (2400, 240, None)
    assert costs["chat"] == (36, 36, "unchanged: paid by the token")
    assert found.replaced == {"USD": (2400, 240)}
    assert found.break_even.share == 10
    then = lake(tmp_path, *(call("ptu", 96 * MILLION) for _ in range(10)), capacity=CAPACITY)
    assert ask(then, "payg").totals == {"USD": (2400, 2400)}
    assert ask(billed, "payg:Standard", Only(deployment="ptu")).totals == {"USD": (2400, 264)}
    with pytest.raises(ValueError, match="no row of deployment type Nowhere"):
        ask(billed, "payg:Nowhere")


def test_a_price_of_tools_for_every_type_does_not_make_a_type_known(tmp_path):
    tools = PRICES + "tools,*,*,*,,,,web_search_calls,14,1000,USD\n"
    with pytest.raises(ValueError, match="no row of deployment type Nowhere"):
        ask(lake(tmp_path, call("ptu", MILLION), price_book=tools, capacity=CAPACITY), "payg:Nowhere")


def test_a_deployment_with_usage_without_a_price_keeps_its_whole_capacity(tmp_path):
    both = CAPACITY + f"hub,ptu-o3,15,1.00,USD,{GLOBAL}\n"
    found = ask(lake(tmp_path, call("ptu", MILLION), call("ptu-o3", MILLION), capacity=both), "payg")
    assert by_deployment(found) == {
        "ptu": (2400, Decimal("2.5"), None),
        "ptu-o3": (360, 360, "no price of input as o3 2025-04-16 GlobalStandard"),
    }
    assert found.totals == {"USD": (2760, Decimal("362.5"))}


def test_capacity_that_nobody_used_and_unused_reservations_are_given_back(tmp_path):
    # 7,440 USD for 120 PTUs in October are 10 USD an hour; 100 + 15 of them are deployed
    both = CAPACITY + f"hub,spare,15,1.00,USD,{GLOBAL}\n"
    found = ask(lake(tmp_path, call("ptu", MILLION), capacity=both, reservations=RESERVATION), "payg")
    costs = {(line.model, line.deployment): (round(line.today, 12), line.scenario) for line in found.lines}
    assert costs == {
        ("gpt-4o 2024-11-20", "ptu"): (200, Decimal("2.5")),
        ("capacity without usage", "spare"): (30, 0),
        ("unused reservation", "pool"): (10, 0),
    }
    assert found.totals == {"USD": (240, Decimal("2.5"))}


def test_provisioned_usage_without_a_row_of_capacity_is_not_compared(tmp_path):
    [line] = ask(lake(tmp_path, call("ptu", MILLION)), "payg").lines
    assert (line.today, line.scenario, line.note) == (None, None, "no row of capacity.csv says what it costs today")


def test_a_cost_centre_sees_its_part_of_the_capacity(tmp_path):
    # one busy hour: three quarters of 100 USD are Sales', one quarter HR's, 23 idle hours nobody's
    calls = [call("ptu", 3 * MILLION, subscription="sales"), call("ptu", MILLION)]
    pipeline = lake(tmp_path, *calls, capacity=CAPACITY)
    assert ask(pipeline, "payg", Only(cost_center="CC-1")).totals == {"USD": (75, Decimal("7.5"))}
    assert ask(pipeline, "payg", Only(cost_center="CC-2")).totals == {"USD": (25, Decimal("2.5"))}
    assert ask(pipeline, "payg").totals == {"USD": (2400, 10)}


# --- always


@pytest.mark.parametrize(("text", "only"), [("batch", ALL), ("payg", ALL), ("model:o1", ALL), ("ptu:15", Only("gpt-4o"))])
def test_no_request_and_no_token_is_left_out_and_nothing_is_written(billed, text, only):
    root = Path(billed.settings.lake_url).parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    found = ask(billed, text, only)
    tokens = 14_100_000 + MILLION + 96 * MILLION + MILLION + (0 if only.model else MILLION + 7)
    assert (sum(line.requests for line in found.lines), sum(line.tokens for line in found.lines)) == (4 if only.model else 6, tokens)
    assert "Left out are requests without token counts: 1." in found.assumptions
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "text", ["", "paygo", "payg:", f"payg:{GLOBAL}", "ptu:", "ptu:0", "ptu:1.5", "ptu:-1", "batch:x", "model", "model:", "model:a@"]
)
def test_an_unknown_scenario_is_refused(text):
    with pytest.raises(ValueError, match=r"is not one of payg, payg:SKU .*, ptu, ptu:N, batch, model:NAME"):
        Scenario.of(text)


# --- the command


@pytest.fixture
def run(billed, monkeypatch, capsys):
    """Runs `aoai-usage what-if` for the day of the lake: (exit code, output, errors)."""
    for name in ("capture_url", "lake_url", "warehouse_path", "reference_dir"):
        monkeypatch.setenv(f"AOAI_{name.upper()}", str(getattr(billed.settings, name)))
    monkeypatch.setenv("AOAI_START_DATE", "2026-01-01")

    def what_if(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["what-if", "--from", "2026-10-05", "--to", "2026-10-05", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return what_if


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            ["--as", "ptu:15", "--deployment", "chat"],
            [
                "36.00 USD",
                "360.00 USD",
                "+900.0 %",
                "global list price of 1.00 USD",
                "1,000 % of this usage",
                "at any volume that they carry paying by",
            ],
        ),
        (
            ["--as", "ptu:15", "--deployment", "chat", "--hourly-price", "0.50"],
            ["180.00 USD", "A PTU-hour costs 0.50 USD", "(70,500,000 tokens a day)"],
        ),
        (["--as", "payg"], ["2,400.00 USD", "240.00 USD", "-90.0 %", "unchanged: paid by the token", "1,000 % of this usage"]),
        (["--as", "batch", "--model", "gpt-4o"], ["18.00 USD", "-50.0 %", "has no batch", "Break-even: none"]),
        (["--as", "model:o1@1", "--deployment", "chat"], ["216.00 USD", "+500.0 %", "16.67 % of today's tokens"]),
    ],
)
def test_the_command_prints_the_comparison_and_the_break_even(run, arguments, printed):
    code, out, _ = run(*arguments)
    assert code == 0
    assert "not up to date" not in out
    for text in printed:
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "cheaper"], "scenario 'cheaper' is not one of"),
        (["--as", "model:none"], "the price book has no row of model none"),
        (["--as", "batch", "--model", "none"], "no usage of model none"),
        (["--as", "batch", "--to", "2026-10-04"], "expected days in order"),
        (["--as", "batch", "--from", "2026-10-01", "--to", "2026-10-02"], "no usage from 2026-10-01 to 2026-10-02 in the lake"),
        (["--as", "batch", "--hourly-price", "1"], "have no meaning with --as batch"),
        (["--as", "ptu:15", "--hourly-price", "free"], "is not a price such as 1.00"),
        (["--as", "ptu:15", "--hourly-price", "1", "--monthly-price", "1"], "not allowed with"),
    ],
)
def test_what_the_command_cannot_use_is_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_command_says_that_ptus_which_carry_the_break_even_are_cheaper_above_it(run):
    # 10,000 PTUs at 0.00001 USD are 2.40 USD a day, a fifteenth of 36; they carry 25 million tokens a minute
    code, out, _ = run("--as", "ptu:10000", "--deployment", "chat", "--hourly-price", "0.00001")
    assert code == 0
    assert "6.67 % of this usage" in out and "above it the PTUs are cheaper, below it paying by the token." in out
