"""The CSV files of finance: every fault named at once, the most exact row of the day wins, and nothing is written with a bad file."""

import datetime as dt
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoai_usage_pipeline.reference import Reference, ReferenceDataError, load
from aoai_usage_pipeline.reference.files import Row
from aoai_usage_pipeline.settings import EXAMPLE_REFERENCE_DIR
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import COST_CENTERS, DEPLOYMENTS, PRICE_BOOK, Captured, chat, hub_event, rows, seed_event

NOON = support.DAY + dt.timedelta(hours=12)
PRICE_HEADER, DEPLOYMENT_HEADER, OWNER_HEADER = (text.splitlines()[0] for text in (PRICE_BOOK, DEPLOYMENTS, COST_CENTERS))
FILES = ("price_book.csv", "deployments.csv", "cost_centers.csv")


def price(**changes: str) -> str:
    """A line of the price book."""
    values = {"price_id": "p", "model": "gpt-4o", "meter": "output", "unit_price": "10.00", "unit_tokens": "1000000", "currency": "USD"}
    values |= {"effective_from": "2024-01-01", "source": "test"} | changes
    return ",".join(values.get(column, "") for column in PRICE_HEADER.split(","))


def prices(*lines: str) -> str:
    return "\n".join([PRICE_HEADER, *lines]) + "\n"


def faults(folder: Path, **files: str) -> list[str]:
    """The faults of a reference folder, one a line, without its path."""
    with pytest.raises(ReferenceDataError) as error:
        load(support.reference(folder, **files))
    return str(error.value).replace(f"{folder}/", "").splitlines()


FAULTS = {
    "a price without an id": ({"price_id": ""}, "price_id"),
    "a price without a meter": ({"meter": ""}, "meter"),
    "an unknown meter": ({"meter": "inputs"}, "meter"),
    "no price": ({"unit_price": ""}, "unit_price"),
    "a price that is no number": ({"unit_price": "ten"}, "unit_price"),
    "a price with a currency sign": ({"unit_price": "$10"}, "unit_price"),
    "a negative price": ({"unit_price": "-0.01"}, "unit_price"),
    "NaN as a price": ({"unit_price": "NaN"}, "unit_price"),
    "an endless price": ({"unit_price": "Infinity"}, "unit_price"),
    "a price with 10 places": ({"unit_price": "0.0000000001"}, "unit_price"),
    "a price too large": ({"unit_price": "1000000000"}, "unit_price"),
    "a price far too large": ({"unit_price": "1e30"}, "unit_price"),
    "no unit": ({"unit_tokens": ""}, "unit_tokens"),
    "a unit that is no number": ({"unit_tokens": "1M"}, "unit_tokens"),
    "a unit that is no power of ten": ({"unit_tokens": "2000"}, "unit_tokens"),
    "a unit of zero": ({"unit_tokens": "0"}, "unit_tokens"),
    "a unit above a million": ({"unit_tokens": "10000000"}, "unit_tokens"),
    "no currency": ({"currency": ""}, "currency"),
    "a currency in lower case": ({"currency": "usd"}, "currency"),
    "a currency sign": ({"currency": "$"}, "currency"),
    "an unknown context band": ({"context_band": "medium"}, "context_band"),
    "a date that does not exist": ({"effective_from": "2026-02-30"}, "effective_from"),
    "a date in another order": ({"effective_to": "31/12/2026"}, "effective_to"),
    "an end before its start": ({"effective_from": "2026-02-01", "effective_to": "2026-01-01"}, "effective_to"),
    "an end at its start": ({"effective_from": "2026-02-01", "effective_to": "2026-02-01"}, "effective_to"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_price_has_file_line_and_column(tmp_path, name):
    changes, column = FAULTS[name]
    [fault] = faults(tmp_path, price_book=prices(price(price_id="good", meter="input"), price(**changes)))
    assert fault.startswith(f"price_book.csv: line 3, column {column}: ")


@pytest.mark.parametrize(
    ("file", "text"),
    [("deployments", f"{DEPLOYMENT_HEADER}\napim,,,,,,m,,,,01.01.2026,\n"), ("cost_centers", f"{OWNER_HEADER}\nsales,,,T,CC,D,soon,\n")],
)
def test_a_fault_of_the_other_files_has_file_line_and_column(tmp_path, file, text):
    [fault] = faults(tmp_path, **{file: text})
    assert fault.startswith(f"{file}.csv: line 2, column effective_from: ")


def test_all_faults_of_all_files_are_told_at_once(tmp_path):
    assert [fault.partition(": '")[0] for fault in sorted(
        faults(
            tmp_path,
            price_book=prices(price(unit_price="x", currency="$"), price(price_id="q", meter="m"), price(price_id="r", meter="input")),
            deployments=f"{DEPLOYMENT_HEADER}\n,,,,,,a,,,,x,y\n",
            cost_centers=f"{OWNER_HEADER}\nsales,,,T,CC,D,,\nhr,,,T,CC,D,,x\n",
        )
    )] == [
        "cost_centers.csv: line 3, column effective_to",
        "deployments.csv: line 2, column effective_from",
        "deployments.csv: line 2, column effective_to",
        "price_book.csv: line 2, column currency",
        "price_book.csv: line 2, column unit_price",
        "price_book.csv: line 3, column meter",
    ]  # fmt: skip


def test_ties_and_repeated_ids_are_told_beside_other_faults_of_the_file(tmp_path):
    found = faults(tmp_path, price_book=prices(price(), price(unit_price="11"), price(price_id="q", currency="usd", meter="input")))
    assert [fault.partition(":")[2][:7] for fault in sorted(found)] == [" line 3", " line 3", " line 4"]


def test_a_repeated_price_id_is_a_fault_even_in_another_period(tmp_path):
    [fault] = faults(tmp_path, price_book=prices(price(effective_to="2025-01-01"), price(effective_from="2025-01-01")))
    assert fault == "price_book.csv: line 3, column price_id: 'p' is also in line 2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PRICE_HEADER.replace("meter_id", "metre_id"), ["line 1: unknown column 'metre_id'"]),
        (PRICE_HEADER.replace("meter_id", "meter"), ["line 1: repeated column 'meter'"]),
        (PRICE_HEADER.replace("unit_price,unit_tokens,", ""), ["line 1: column 'unit_price' is missing", "line 1: column 'unit_tokens' is missing"]),
        (PRICE_HEADER.replace(",", ";"), ["line 1: unknown column"]),
    ],
)
def test_a_bad_header_is_a_fault_of_line_1_that_names_the_column(tmp_path, text, expected):
    found = faults(tmp_path, price_book=f"{text}\n")
    for start in expected:
        assert any(fault.startswith(f"price_book.csv: {start}") for fault in found)


def test_a_row_with_too_few_or_too_many_values_is_a_fault_with_its_line(tmp_path):
    assert faults(tmp_path, cost_centers=f"{OWNER_HEADER}\nsales,,,T,CC,D,,\nhr,,,T\nit,,,T,CC,D,,,\n") == [
        "cost_centers.csv: line 3: 4 values for 8 columns",
        "cost_centers.csv: line 4: 9 values for 8 columns",
    ]


def test_a_quote_that_is_never_closed_is_a_fault_and_swallows_no_rows(tmp_path):
    [fault] = faults(tmp_path, price_book=prices(price(source='"Azure price list'), price(price_id="q", meter="input")))
    assert fault.startswith("price_book.csv: line ")


def test_a_value_too_long_for_csv_is_a_fault(tmp_path):
    [fault] = faults(tmp_path, price_book=prices(price(source="x" * 200_000)))
    assert fault.startswith("price_book.csv: line 2")


def test_text_that_is_not_utf8_is_a_fault(tmp_path):
    support.reference(tmp_path)
    (tmp_path / "cost_centers.csv").write_bytes(COST_CENTERS.encode() + "büro,,,T,CC,D,,\n".encode("latin-1"))
    with pytest.raises(ReferenceDataError, match=r"cost_centers\.csv: .*not UTF-8"):
        load(tmp_path)


def test_a_missing_folder_is_an_error_that_names_it_and_the_setting(tmp_path):
    with pytest.raises(ReferenceDataError, match=r"nowhere.*AOAI_REFERENCE_DIR"):
        load(tmp_path / "nowhere")


# --- what is valid


def test_absent_empty_and_header_only_files_are_valid_and_empty(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    headers = support.reference(tmp_path / "headers", PRICE_HEADER, DEPLOYMENT_HEADER + "\n", f"\ufeff{OWNER_HEADER}\r\n")
    blank = support.reference(tmp_path / "blank", "", "", "")
    for folder in (empty, headers, blank):
        reference = load(folder)
        assert (reference.price_book, reference.deployments, reference.cost_centers) == ((), (), ())


def test_a_bom_windows_lines_blank_lines_and_spaces_change_nothing(tmp_path):
    plain = load(support.reference(tmp_path / "plain"))
    folder = support.reference(tmp_path / "excel")
    for name in FILES:
        text = (folder / name).read_text().replace(",", " , ").replace("\n", "\n\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(folder).content() == plain.content()


def test_columns_may_stand_in_any_order_and_optional_ones_be_absent(tmp_path):
    text = "currency,unit_tokens,unit_price,meter,price_id,model\nUSD,1000,0.0025,input,p,gpt-4o\n"
    [row] = load(support.reference(tmp_path, price_book=text)).price_book
    assert (row.values["model"], row.values["region"], row.effective_from, row.effective_to) == ("gpt-4o", None, None, None)


def test_the_example_set_of_the_package_is_valid():
    assert len(load(EXAMPLE_REFERENCE_DIR).price_book) > 0


# --- ties


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"region": "*"}, {"model_version": ""}),
        ({"region": "eastus"}, {"deployment_sku": "GlobalStandard"}),
        ({"service_tier": "default"}, {"service_tier": "Standard"}),
        ({"effective_to": "2026-02-02"}, {"effective_from": "2026-02-01"}),
        ({"effective_from": ""}, {"effective_from": "2026-02-01"}),
    ],
    ids=["equal", "wildcard and blank", "different columns", "two names of a tier", "overlapping by a day", "open start"],
)
def test_rows_that_match_the_same_event_equally_well_are_a_fault(tmp_path, first, second):
    [fault] = faults(tmp_path, price_book=prices(price(**first), price(price_id="other", meter="input"), price(price_id="q", **second)))
    assert fault.startswith("price_book.csv: line 4 ties with line 2")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"meter": "input"}, {}),
        ({"region": "eastus"}, {"region": "westus"}),
        ({"region": "eastus"}, {}),
        ({"region": "eastus"}, {"region": "eastus", "deployment_sku": "Standard"}),
        ({"context_band": "short"}, {"context_band": "long"}),
        ({"effective_to": "2026-02-01"}, {"effective_from": "2026-02-01"}),
        ({"region": "eastus", "model": "gpt-4o"}, {"region": "*", "model": "o3", "deployment_sku": "Standard"}),
    ],
    ids=["meters", "values", "more exact", "more exact still", "bands", "one after the other", "never both"],
)
def test_rows_that_cannot_match_the_same_event_equally_well_are_valid(tmp_path, first, second):
    assert len(load(support.reference(tmp_path, price_book=prices(price(**first), price(price_id="q", **second)))).price_book) == 2


def test_ties_are_faults_of_the_other_files_too(tmp_path):
    assert faults(
        tmp_path,
        deployments=f"{DEPLOYMENT_HEADER}\napim,,,,,,a,,,,,\n*,sales,,,,,b,,,,,\n",
        cost_centers=f"{OWNER_HEADER}\nsales,,,T,CC,D,,\n,,app,T,CC,D,,\n",
    ) == [
        "deployments.csv: line 3 ties with line 2: both can match the same event in the same period equally well; "
        "make one of them more exact, or end its period",
        "cost_centers.csv: line 3 ties with line 2: both can match the same event in the same period equally well; "
        "make one of them more exact, or end its period",
    ]


# --- which row applies


def billed(root: Path, *events: tuple[bytes, dt.datetime], **files: str) -> list[tuple]:
    """The events' request id, model, version, region, cost centre, cost and status, by request id."""
    support.reference(root / "reference", **files)
    pipeline = support.installation(root)
    content = support.capture_file(Captured(body, at, number) for number, (body, at) in enumerate(events))
    support.put(root / "capture", support.blob_name(NOON), content)
    support.run_all(pipeline, NOON.date() - dt.timedelta(2), NOON.date() + dt.timedelta(2))
    return rows(pipeline, "SELECT request_id, model, model_version, region, cost_center, cost, pricing_status FROM enriched_usage ORDER BY 1")


def test_the_most_exact_row_wins_and_star_and_blank_match_anything(tmp_path):
    lines = [
        price(price_id="any", model="*", unit_price="1"),
        price(price_id="model", model="gpt-4o", unit_price="2"),
        price(price_id="version", model="gpt-4o", model_version="2024-11-20", unit_price="3"),
        price(price_id="version and region", model="gpt-4o", model_version="2024-11-20", region="eastus", unit_price="4"),
        price(
            price_id="two wildcards", model="gpt-4o", model_version="*", region="westus", deployment_sku="", service_tier="default", unit_price="5"
        ),
        price(price_id="input", model="*", meter="input", unit_price="0"),
    ]
    places = {"east": "eastus", "west": "westus", "north": "northeurope"}
    deployments = [f"hub,,,,{name},,,,GlobalStandard,{region},," for name, region in places.items()]
    events = {
        "a": {"model": "o9-2026-01-01", "deploymentName": "north"},
        "b": {"model": "gpt-4o-2024-05-13", "deploymentName": "north"},
        "c": {"model": "gpt-4o-2024-11-20", "deploymentName": "north"},
        "d": {"model": "gpt-4o-2024-11-20", "deploymentName": "east"},
        "e": {"model": "gpt-4o-2024-05-13", "deploymentName": "west"},
        "f": {"model": "gpt-4o", "deploymentName": "east"},
    }
    found = billed(
        tmp_path,
        *((hub_event(name, NOON, 0, 1_000_000, 1_000_000, **changes), NOON) for name, changes in events.items()),
        price_book=prices(*lines),
        deployments="\n".join([DEPLOYMENT_HEADER, *deployments]),
    )
    assert {name: cost for name, *_, cost, _ in found} == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 2}


def test_the_most_exact_deployment_and_owner_win(tmp_path):
    deployments = [
        "*,,,,,,by-anything,,,,,",
        "apim,,,,,,by-gateway,1,Standard,eastus,,",
        "apim,sales,,,,,by-subscription,2,,,,",
        "hub,,*,,chat,,,,,westus,,",
    ]
    owners = ["*,*,*,T,CC-any,D,,", "sales,,,T,CC-sales,D,,", "hr,,,T,CC-hr,D,,", "hr,,app-1,T,CC-app,D,,"]
    found = billed(
        tmp_path,
        (seed_event("a", NOON, chat(1, 1)), NOON),
        (seed_event("b", NOON, chat(1, 1), SubscriptionId="other"), NOON),
        (seed_event("c", NOON, chat(1, 1), ServiceName="elsewhere"), NOON),
        (hub_event("d", NOON, 1, 1, 2), NOON),
        (hub_event("e", NOON, 1, 1, 2, appId="app-2"), NOON),
        deployments="\n".join([DEPLOYMENT_HEADER, *deployments]),
        cost_centers="\n".join([OWNER_HEADER, *owners]),
    )
    assert [row[:5] for row in found] == [
        ("a", "by-subscription", "2", None, "CC-sales"),
        ("b", "by-gateway", "1", "eastus", "CC-any"),
        ("c", "by-anything", None, None, "CC-sales"),
        ("d", "gpt-4o", "2024-11-20", "westus", "CC-app"),
        ("e", "gpt-4o", "2024-11-20", "westus", "CC-hr"),
    ]


_DAYS = st.dates(dt.date(2026, 1, 1), dt.date(2026, 1, 9))


@given(st.lists(st.tuples(st.none() | _DAYS, st.none() | _DAYS), max_size=4), st.lists(_DAYS, min_size=1))
def test_the_rows_of_a_day_are_those_in_force_on_it_in_whatever_order_days_are_asked_for(periods, days):
    made = tuple(Row(n, {"price_id": str(n)}, start, end) for n, (start, end) in enumerate(periods))
    whole = Reference(made, (), ())
    for day in days:
        expected = Reference(tuple(row for row in made if row.effective_on(day)), (), ())
        assert whole.on(day) == expected and whole.on(day).content() == expected.content()


def test_a_row_applies_from_its_first_day_to_the_day_before_its_last(tmp_path):
    day = NOON.date()
    lines = [
        price(price_id="old", unit_price="1", effective_from="", effective_to=str(day)),
        price(price_id="new", unit_price="2", effective_from=str(day), effective_to=str(day + dt.timedelta(1))),
        price(price_id="input", meter="input", unit_price="0"),
    ]
    owners = [f"sales,,,T,CC-old,D,,{day}", f"sales,,,T,CC-new,D,{day},"]
    midnight = dt.datetime.combine(day, dt.time())
    second = dt.timedelta(seconds=1)
    times = {"a": midnight - second, "b": midnight, "c": midnight + dt.timedelta(1) - second, "d": midnight + dt.timedelta(1)}
    found = billed(
        tmp_path,
        *((seed_event(name, at, chat(0, 1_000_000)), at) for name, at in times.items()),
        price_book=prices(*lines),
        deployments=f"{DEPLOYMENT_HEADER}\napim,,,,,,gpt-4o,2024-11-20,,,,{day + dt.timedelta(2)}\n",
        cost_centers="\n".join([OWNER_HEADER, *owners]),
    )
    assert [(name, owner, cost, status) for name, *_, owner, cost, status in found] == [
        ("a", "CC-old", Decimal(1), "priced"),
        ("b", "CC-new", Decimal(2), "priced"),
        ("c", "CC-new", Decimal(2), "priced"),
        # input has a price, output none any more: the part without a price is not billed at zero
        ("d", "CC-new", None, "unpriced"),
    ]


def test_without_reference_data_everything_is_shown_and_nothing_priced(tmp_path):
    found = billed(
        tmp_path,
        (seed_event("a", NOON, chat(10, 5)), NOON),
        (hub_event("b", NOON, 10, 5, 15), NOON),
        price_book=PRICE_HEADER,
        deployments=DEPLOYMENT_HEADER,
        cost_centers=OWNER_HEADER,
    )
    assert found == [
        ("a", None, None, None, "UNALLOCATED", None, "unpriced"),
        ("b", "gpt-4o", "2024-11-20", None, "UNALLOCATED", None, "unpriced"),
    ]


# --- a bad file stops the run


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_stops_ingestion_before_anything_is_written(tmp_path, name):
    pipeline = support.installation(tmp_path)
    support.put(tmp_path / "capture", support.blob_name(NOON), support.capture_file([Captured(seed_event("r", NOON, chat(1, 1)), NOON, 0)]))
    path = tmp_path / "reference" / name
    good = path.read_text()
    path.write_text(good + "x\n")
    with pytest.raises(ReferenceDataError, match=f"{name}: line {good.count(chr(10)) + 1}: 1 values for"):
        pipeline.ingest([NOON.date()])
    assert [found for found in (tmp_path / "lake").rglob("*") if found.is_file()] == []
    path.write_text(good)
    pipeline.ingest([NOON.date()])
    assert any(pipeline.lake.objects("raw_events/"))


def test_each_tie_among_thousands_of_rows_is_named_once(tmp_path):
    header = "subscription_id,product,application,team,cost_center,department,effective_from,effective_to"
    rows = [f"team-{n},,,Team {n},CC-{n},D,," for n in range(30_000)] + ["team-7,,,Other,CC-0,D,,"]
    support.reference(tmp_path, cost_centers="\n".join([header, *rows, ""]))
    with pytest.raises(ReferenceDataError) as error:
        load(tmp_path)
    assert [line.partition("cost_centers.csv: ")[2][:25] for line in str(error.value).splitlines()] == ["line 30002 ties with line"]


def test_a_price_in_another_currency_for_a_meter_nobody_uses_holds_nothing(tmp_path):
    unused = price(price_id="audio", model="*", meter="audio_output", currency="EUR")
    support.reference(tmp_path / "reference", price_book=f"{PRICE_BOOK}{unused}\n")
    pipeline = support.installation(tmp_path)
    body = seed_event("r", NOON, chat(1_000_000, 0))
    support.put(tmp_path / "capture", support.blob_name(NOON), support.capture_file([Captured(body, NOON, 0)]))
    support.run_all(pipeline, NOON.date(), NOON.date())
    assert pipeline.held() == {}
    assert rows(pipeline, "SELECT cost, currency FROM daily_usage") == [(Decimal("2.5"), "USD")]
