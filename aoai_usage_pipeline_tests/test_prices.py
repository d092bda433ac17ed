"""The price list of Azure in the price book: read whole or not at all, understood or named, and never at the cost of history."""

import contextlib
import datetime as dt
import gzip
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoai_usage_pipeline import cli
from aoai_usage_pipeline.reference import ReferenceDataError, load
from aoai_usage_pipeline.reference.proposal import Book, Proposal
from aoai_usage_pipeline.reference.retail import Item, RetailError, Snapshot, snapshots
from aoai_usage_pipeline.reference.retail_meters import KINDS, Key, NotUnderstood, keys_of, kind_of, price_of, read_name
from aoai_usage_pipeline.settings import EXAMPLE_REFERENCE_DIR
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import DAY, PRICE_BOOK, Captured, hub_event

FIXTURE = Path(__file__).parent / "data" / "retail_prices_2025-08-25.json"
HEADER = PRICE_BOOK.splitlines()[0]
TODAY = dt.date(2026, 11, 24)
Run = Callable[..., tuple[int, str, str]]


def item(name: str = "gpt 4o 1120 Inp glbl Tokens", price: str = "0.0025", **changes: Any) -> Item:
    values: dict[str, Any] = {
        "meter_id": f"id of {name}", "meter_name": name, "region": "eastus", "price": Decimal(price), "unit": "1M" if "1M" in name else "1K",
        "currency": "USD", "start": dt.date(2025, 1, 1), "end": None, "type": "Consumption", "minimum_units": Decimal(0),
    }  # fmt: skip
    return Item(**values | changes)


def api_item(name: str = "gpt 4o 1120 Inp glbl Tokens", price: float = 0.0025, **changes: Any) -> dict[str, Any]:
    return {
        "currencyCode": "USD", "tierMinimumUnits": 0.0, "retailPrice": price, "armRegionName": "eastus", "effectiveStartDate": "2025-01-01T00:00:00Z",
        "meterId": f"id of {name}", "meterName": name, "productName": "Azure OpenAI", "unitOfMeasure": "1K", "type": "Consumption",
    } | changes  # fmt: skip


def listed(*items: Item, date: dt.date = dt.date(2025, 6, 1)) -> Snapshot:
    return Snapshot(date, items)


def book(path: Path, *lines: str) -> Book:
    file = path / "price_book.csv"
    file.write_text("\n".join([HEADER, *lines]) + "\n")
    return Book(file)


def line(price_id: str = "in", **changes: str) -> str:
    values = {
        "price_id": price_id, "model": "gpt-4o", "model_version": "2024-11-20", "deployment_sku": "GlobalStandard", "region": "*", "service_tier": "default",
        "meter": "input", "unit_price": "0.0025", "unit_tokens": "1000", "currency": "USD", "effective_from": "2024-12-01",
    } | changes  # fmt: skip
    return ",".join(values.get(name, "") for name in HEADER.split(","))


def priced(proposal: Proposal) -> list[tuple[str, str, str, str, str]]:
    names = ("region", "unit_price", "unit_tokens", "effective_from", "effective_to")
    return [tuple(entry.values.get(name, "") for name in names) for entry in proposal.book.entries]  # type: ignore[misc]


# --- names


GLOBAL, ZONE, REGION = "GlobalStandard", "DataZoneStandard", "Standard"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt-4o-0806-Inp-glbl Tokens", ("gpt-4o", "2024-08-06", GLOBAL, "default", "", "input")),
        ("gpt 4o 0806 cached Inp glbl Tokens", ("gpt-4o", "2024-08-06", GLOBAL, "default", "", "cached_input")),
        ("gpt 4o 0806 Inp Data Zone Tokens", ("gpt-4o", "2024-08-06", ZONE, "default", "", "input")),
        ("gpt-4o-0806-Batch-Inp-glbl Tokens", ("gpt-4o", "2024-08-06", "GlobalBatch", "default", "", "input")),
        ("gpt 4o 0513 Input global Tokens", ("gpt-4o", "2024-05-13", GLOBAL, "default", "", "input")),
        ("gpt 4o 1120 Outp regnl Tokens", ("gpt-4o", "2024-11-20", REGION, "default", "", "output")),
        ("gpt 4o mini0718 BatchOutp DataZone Tokens", ("gpt-4o-mini", "2024-07-18", "DataZoneBatch", "default", "", "output")),
        ("gpt 4.1 mini cached Inp DZone Tokens", ("gpt-4.1-mini", "2025-04-14", ZONE, "default", "", "cached_input")),
        ("GPT 5 cchd Inpt DZone 1M Tokens", ("gpt-5", "2025-08-07", ZONE, "default", "", "cached_input")),
        ("GPT 5 Rsng outpt Glbl 1M Tokens", ("gpt-5", "2025-08-07", GLOBAL, "default", "", "output")),
        ("GPT 5 Mini Batch Inpt cchd Dzone 1M Tokens", ("gpt-5-mini", "2025-08-07", "DataZoneBatch", "default", "", "cached_input")),
        ("gpt-5-codex-ccchd-inp-glbl Tokens", ("gpt-5-codex", "", GLOBAL, "default", "", "cached_input")),
        ("5.4 inp Gl 1M Tokens", ("gpt-5.4", "", GLOBAL, "default", "short", "input")),
        ("5.4 cd inp Gl 1M Tokens", ("gpt-5.4", "", GLOBAL, "default", "short", "cached_input")),
        ("5.4 opt Gl 1M Tokens", ("gpt-5.4", "", GLOBAL, "default", "short", "output")),
        ("5.4 longco inp Gl 1M Tokens", ("gpt-5.4", "", GLOBAL, "default", "long", "input")),
        ("54 mini Inp Flex Gl", ("gpt-5.4-mini", "", GLOBAL, "flex", "", "input")),
        ("5.6 sol ShortCo Inp Std Gl 1M Tokens", ("gpt-5.6-sol", "", GLOBAL, "default", "short", "input")),
        ("5.6 sol ShortCo Cd Inp Std DZ 1M Tokens", ("gpt-5.6-sol", "", ZONE, "default", "short", "cached_input")),
        ("5.6 sol ShortCo Cd Wr Std Gl 1M Tokens", ("gpt-5.6-sol", "", GLOBAL, "default", "short", "cache_write")),
        ("5.6 terra ShortCo Cd Inp PP Gl", ("gpt-5.6-terra", "", GLOBAL, "priority", "short", "cached_input")),
        ("6-astra ShortCo Cd Wr Std Gl 1M Tokens", ("gpt-6-astra", "", GLOBAL, "default", "short", "cache_write")),
        ("o1 1217 cached Inp glbl Tokens", ("o1", "2024-12-17", GLOBAL, "default", "", "cached_input")),
        ("o3 mini 0131 input glbl Tokens", ("o3-mini", "2025-01-31", GLOBAL, "default", "", "input")),
        ("o4-mini 0416 cached Inp DataZone Tokens", ("o4-mini", "2025-04-16", ZONE, "default", "", "cached_input")),
        ("text-embedding-3-large-glbl Tokens", ("text-embedding-3-large", "1", GLOBAL, "default", "", "input")),
        ("text embedding 3 large DZ Tokens", ("text-embedding-3-large", "1", ZONE, "default", "", "input")),
        ("embedding-ada-regional Tokens", ("text-embedding-ada-002", "2", REGION, "default", "", "input")),
        ("gpt-image-1-inp-cached-img-glbl Tokens", ("gpt-image-1", "", GLOBAL, "default", "", "cached_image_input")),
        ("gpt-image-1-output-img-glbl Tokens", ("gpt-image-1", "", GLOBAL, "default", "", "image_output")),
        ("gpt rt aud 0828 cchd Inp glbl Tokens", ("gpt-realtime", "2025-08-28", GLOBAL, "default", "", "cached_audio_input")),
        ("gpt-4o-aud-0603 Inp glbl Tokens", ("gpt-4o-audio-preview", "2025-06-03", GLOBAL, "default", "", "audio_input")),
        ("gpt-4o-aud-0603-txt Inp glbl Tokens", ("gpt-4o-audio-preview", "2025-06-03", GLOBAL, "default", "", "input")),
        ("gpt4o realtimePrvwAudOutp DataZone Tokens", ("gpt-4o-realtime-preview", "2024-10-01", ZONE, "default", "", "audio_output")),
        ("gpt-4o-transcribe-txt-out-dz Tokens", ("gpt-4o-transcribe", "", ZONE, "default", "", "output")),
        ("Speech-to-Text-Batch-Whisper-glbl Unit", ("whisper", "", GLOBAL, "default", "", "audio_seconds")),
        ("Speech-Text to Speech HD-Regional Characters", ("tts-hd", "", REGION, "default", "", "characters")),
        ("file-search-tool-calls-glbl Calls", ("", "", GLOBAL, "", "", "file_search_calls")),
        ("Code-Interpreter-global Session", ("", "", GLOBAL, "", "", "code_interpreter_sessions")),
    ],
)  # fmt: skip
def test_a_meter_name_says_model_version_deployment_type_tier_band_and_meter(name: str, key: tuple[str, ...]) -> None:
    assert kind_of(item(name)) is None
    assert keys_of(item(name)) == (Key(*key),)


def test_one_meter_of_dall_e_prices_both_oblong_sizes() -> None:
    [standard, tall] = [[key.meter for key in keys_of(item(f"Image-Dall-E-3 HD {size}-glbl Images"))] for size in ("LowRes", "HighRes")]
    assert (standard, tall) == (["image/1024x1024/hd"], ["image/1024x1792/hd", "image/1792x1024/hd"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt-4.1-nano-dev-ft cchd inpt glbl Tokens", "fine_tuned"),
        ("gpt-4o-0806-FT-Hstng-glbl Unit", "hosting"),
        ("gpt-4o-0806-FT-Trng-glbl tkn Tokens", "training"),
        ("o3-ft mdl grdr opt Tokens", "grader"),
        ("Provisioned Managed Data Zone Unit", "provisioned"),
        ("Assistants-File Search-glbl GB", "storage"),
        ("Sora 1080p Sq 11-15s glbl Video", "video"),
    ],
)
def test_what_is_no_usage_meter_is_told_apart(name: str, kind: str) -> None:
    assert kind_of(item(name)) == kind and kind in KINDS


def test_reservations_and_dev_test_prices_are_no_usage_prices() -> None:
    assert [kind_of(item(type=kind)) for kind in ("Reservation", "DevTestConsumption")] == ["reservation", "dev_test"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("gpt 4o 1120 Inp glbl quux Tokens", "quux"),
        ("gpt 4o 0999 Inp glbl Tokens", "0999"),
        ("GPT 5 Turbo Inpt Glbl 1M Tokens", "turbo"),
        ("gpt-4-turbo128K Inp-glbl Tokens", "turbo128k"),
        ("Llama Inp glbl Tokens", "llama"),
    ],
)
def test_an_unknown_word_fails_with_the_whole_name_and_the_word(name: str, word: str) -> None:
    with pytest.raises(NotUnderstood) as error:
        read_name(name)
    assert repr(name) in str(error.value) and f"unknown word {word!r}" in str(error.value)


@given(
    st.sampled_from([i.meter_name for i in snapshots(str(FIXTURE), TODAY)[0].items]), st.integers(0, 9), st.from_regex("[a-z]{3,6}", fullmatch=True)
)
def test_no_name_with_a_foreign_word_is_ever_understood(name: str, at: int, word: str) -> None:
    words = name.split()
    words.insert(min(at, len(words)), f"zz{word}")
    with pytest.raises(NotUnderstood, match=f"zz{word}"):
        read_name(" ".join(words))


@pytest.mark.parametrize(
    "name",
    [
        "gpt 4o 1120 Inp Outp glbl Tokens",
        "gpt 4o 1120 Inp glbl DZ Tokens",
        "gpt 4o 1120 cached Outp glbl Tokens",
        "gpt 4o 1120 glbl Tokens",
        "gpt 4o 1120 Inp Tokens",
        "gpt 4o Inp glbl Tokens",
        "Inp glbl Tokens",
        "gpt 4o 1120 Batch Inp regnl Tokens",
        "gpt-image-1 img Cd Wr glbl Tokens",
    ],
)
def test_a_name_that_contradicts_itself_or_says_too_little_is_not_understood(name: str) -> None:
    with pytest.raises(NotUnderstood, match=name):
        keys_of(item(name))


# --- prices and units


@pytest.mark.parametrize(
    ("unit", "price", "meter", "amount", "unit_tokens"),
    [
        ("1K", "0.0025", "input", "0.0025", 1000),
        ("1M", "1.250", "input", "1.25", 1_000_000),
        ("1", "0.03", "code_interpreter_sessions", "0.03", 1),
        ("100", "4.0", "image/1024x1024", "4", 100),
        ("1 Hour", "0.36", "audio_seconds", "0.0001", 1),
        ("1/Hour", "0.36", "audio_seconds", "0.0001", 1),
        ("1 Second", "0.0001", "audio_seconds", "0.0001", 1),
    ],
)
def test_units_are_explicit(unit: str, price: str, meter: str, amount: str, unit_tokens: int) -> None:
    found = price_of(item(unit=unit, price=Decimal(price)), meter)
    assert (str(found.amount), found.unit_tokens, found.note) == (amount, unit_tokens, "")


def test_an_hourly_price_that_is_no_exact_price_per_second_is_rounded_half_even_and_says_so() -> None:
    found = price_of(item(unit="1 Hour", price=Decimal("0.0000162")), "audio_seconds")  # 4.5 of the last place a second
    assert (f"{found.amount:f}", found.note) == ("0.000000004", "0.0000162 per hour, rounded")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unit": "10K"}, "'10K'"),
        ({"unit": "1 Hour"}, "'1 Hour'"),
        ({"price": Decimal(0)}, "its price is 0"),
        ({"price": Decimal("0.0000000001")}, "9 decimal places"),
        ({"minimum_units": Decimal(1000)}, "from 1000 units"),
    ],
)
def test_a_price_that_does_not_fit_names_the_meter_and_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotUnderstood, match=f"gpt 4o 1120 Inp glbl Tokens.*{reason}"):
        price_of(item(**changes), "input")


def test_a_name_that_says_another_unit_than_the_item_is_not_understood() -> None:
    with pytest.raises(NotUnderstood, match="says 1M"):
        keys_of(item("GPT 5 Inpt Glbl 1M Tokens", unit="1K"))


# --- real prices


def test_real_items_are_understood_or_named(tmp_path: Path) -> None:
    proposal = Proposal(book(tmp_path), snapshots(str(FIXTURE), TODAY))
    assert proposal.items == proposal.usage + sum(proposal.kinds.values()) + sum(proposal.not_understood.values()) == 170
    assert {reason.partition(": ")[2] for reason in proposal.not_understood} == {
        "unknown word 'base'", "unknown word 'trb16k'", "unknown word 'turbo'", "unknown word 'turbo128k'", "no deployment type: regional, batch",
    }  # fmt: skip
    assert set(proposal.kinds) == {"fine_tuned", "free", "grader", "hosting", "provisioned", "storage", "training", "video"}
    proposal.book.write()
    rows = {row.values["price_id"]: row for row in load(tmp_path).price_book}
    zone = rows["gpt-4o-2024-11-20-datazonestandard-input"]
    assert (zone.values["region"], zone.values["unit_price"]) == (None, "0.00275")  # 13 regions, one price
    regional = {name: row.values["unit_price"] for name, row in rows.items() if name.startswith("gpt-4o-2024-11-20-standard-")}
    assert len(regional) == 11 and regional["gpt-4o-2024-11-20-standard-swedencentral-input"] == "0.003025"
    assert {row.effective_to for name, row in rows.items() if name.startswith("text-embedding-3-small-1-standard")} == {dt.date(2025, 9, 1)}
    again = Proposal(Book(tmp_path / "price_book.csv"), snapshots(str(FIXTURE), TODAY))
    assert (again.new, again.changed, again.ended, again.older) == ([], [], [], 0)


def test_the_shipped_price_book_says_what_the_real_items_say() -> None:
    proposal = Proposal(Book(EXAMPLE_REFERENCE_DIR / "price_book.csv"), snapshots(str(FIXTURE), TODAY))
    assert (proposal.changed, proposal.ended) == ([], [])
    assert proposal.unchanged > 60


def test_the_shipped_price_book_has_context_bands_and_provisioned_deployments(tmp_path: Path) -> None:
    support.reference(tmp_path / "reference", (EXAMPLE_REFERENCE_DIR / "price_book.csv").read_text())
    types = {"global": "GlobalStandard", "zone": "DataZoneStandard", "ptu": "GlobalProvisionedManaged", "none": ""}
    (tmp_path / "reference" / "deployments.csv").write_text(
        "\n".join([support.DEPLOYMENTS.splitlines()[0], *(f"hub,,,,{name},,,,{sku},westeurope,," for name, sku in types.items())]) + "\n"
    )
    requests = {
        "a": (272_000, "global", "gpt-5.4-2026-03-05"),
        "b": (272_001, "global", "gpt-5.4-2026-03-05"),
        "c": (272_001, "zone", "gpt-6-sol-2026-09-22"),
        "d": (272_001, "ptu", "gpt-5.4-2026-03-05"),
        "e": (272_001, "none", "gpt-5.4-2026-03-05"),
    }
    bodies = [hub_event(name, DAY, tokens, 1000, tokens + 1000, deploymentName=at, model=model) for name, (tokens, at, model) in requests.items()]
    pipeline = support.installation(tmp_path)
    support.put(tmp_path / "capture", support.blob_name(DAY), support.capture_file(Captured(body, DAY, n) for n, body in enumerate(bodies)))
    support.run_all(pipeline, DAY.date(), DAY.date())
    assert support.rows(pipeline, "SELECT request_id, cost, pricing_status FROM enriched_usage ORDER BY 1") == [
        ("a", Decimal("0.68") + Decimal("0.015"), "priced"),
        ("b", Decimal("1.360005") + Decimal("0.0225"), "priced"),
        ("c", Decimal("1.3056048") + Decimal("0.018"), "priced"),  # the EU data zone
        ("d", Decimal(0), "priced"),
        ("e", None, "unpriced"),
    ]


# --- lists


def saved(path: Path, content: object) -> str:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["2025-06-01.json", "prices_2025-06-01.json.gz"])
@pytest.mark.parametrize("page", [False, True])
def test_a_file_is_a_list_or_a_whole_page_and_prices_are_exact(tmp_path: Path, name: str, page: bool) -> None:
    items = [api_item(price=0.1), api_item(price=5.5e-05)]
    [snapshot] = snapshots(saved(tmp_path / name, {"Items": items, "NextPageLink": None} if page else items), TODAY)
    assert snapshot.date == dt.date(2025, 6, 1)
    assert [i.price for i in snapshot.items] == [Decimal("0.1"), Decimal("0.000055")]


def test_a_file_without_a_date_is_of_its_newest_start(tmp_path: Path) -> None:
    [snapshot] = snapshots(saved(tmp_path / "prices.json", [api_item(), api_item(effectiveStartDate="2025-05-01T00:00:00Z")]), TODAY)
    assert snapshot.date == dt.date(2025, 5, 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"Items": [], "NextPageLink": "https://x"}, "one page of several"),
        ({"items": []}, "expected a list"),
        ([], "no date"),
        ([api_item(), api_item(currencyCode="EUR")], "EUR, USD"),
        ([api_item(retailPrice="1.0")], "item 1: retailPrice"),
        ([api_item(effectiveStartDate="soon")], "item 1: effectiveStartDate is 'soon'"),
        ([api_item(effectiveEndDate=7)], "item 1: effectiveEndDate"),
        ([api_item(), {"meterName": "x"}, api_item(meterId=None), api_item(retailPrice=-1)], "item 2: meterId is missing\n.*item 3: meterId.*\n.*item 4: retailPrice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_list_is_an_error_with_all_faults(tmp_path: Path, content: object, complaint: str) -> None:
    with pytest.raises(RetailError, match=complaint):
        snapshots(saved(tmp_path / "prices.json", content), TODAY)


def test_a_torn_file_a_missing_one_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('[{"meterId":')
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(b"[]" * 999)[:-9])
    (tmp_path / "empty").mkdir()
    for name in ("torn.json", "torn.json.gz", "nowhere.json", "empty"):
        with pytest.raises(RetailError, match=name):
            snapshots(str(tmp_path / name), TODAY)


# --- the API


Answer = tuple[int, dict[str, str], bytes]


@contextlib.contextmanager
def api(answers: Callable[[str], list[Answer]]) -> Iterator[tuple[str, list[str]]]:
    """A Retail Prices API: `answers(address)` are its answers in turn (the last one repeated); gives its address and the requests it saw."""
    seen: list[str] = []
    left: list[Answer] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}/api/retail/prices"
    left += answers(address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, seen
    finally:
        server.shutdown()
        server.server_close()


def page(link: str | None, *items: dict[str, Any]) -> Answer:
    return 200, {}, json.dumps({"Items": items, "NextPageLink": link, "Count": len(items)}).encode()


def busy(status: int, **headers: str) -> Answer:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, b"busy"


def test_all_pages_of_the_api_are_read_and_a_busy_service_is_asked_again_when_it_says() -> None:
    waits: list[float] = []
    with api(
        lambda at: [
            page(f"{at}?$skip=1000", api_item("a")),
            busy(429, Retry_After="7"),
            busy(503),
            page(f"{at}?$skip=2000", api_item("b")),
            page(None, api_item("c")),
        ]
    ) as (address, seen):
        [snapshot] = snapshots(f"{address}?$filter=serviceName eq 'Foundry Models'", TODAY, waits.append)
    assert snapshot.date == TODAY
    assert [i.meter_name for i in snapshot.items] == ["a", "b", "c"]
    assert waits == [7.0, 2.0]
    assert seen[0] == "/api/retail/prices?$filter=serviceName%20eq%20'Foundry%20Models'"
    assert [path.partition("skip=")[2] for path in seen[1:]] == ["1000", "1000", "1000", "2000"]


def test_a_date_in_retry_after_is_honoured() -> None:
    waits: list[float] = []
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    with api(lambda at: [busy(503, Retry_After=soon), page(None)]) as (address, _):
        snapshots(address, TODAY, waits.append)
    assert len(waits) == 1 and 20 < waits[0] <= 30


@pytest.mark.parametrize(
    ("answers", "complaint", "requests"),
    [
        (lambda at: [page(f"{at}?p=2", api_item()), busy(429)], "HTTP 429.*6 times", 7),
        (lambda at: [page(f"{at}?p=2", api_item()), busy(429, Retry_After="86400")], "86400 seconds", 2),
        (lambda at: [page(f"{at}?p=2", api_item()), busy(400)], "HTTP 400", 2),
        (lambda at: [page(f"{at}?p=2", api_item()), (200, {}, b'{"Items": [')], "not JSON", 2),
        (lambda at: [page(f"{at}?p=2", api_item()), (200, {"Content-Length": "999"}, b'{"Items": [')], "6 times", 7),
        (lambda at: [page(f"{at}?p=2", api_item()), (200, {}, b'{"Items": []}')], "NextPageLink is missing", 2),
        (lambda at: [page(f"{at}?p=2", api_item()), page(f"{at}?p=2", api_item())], "do not end", 2),
        (lambda at: [page("http://elsewhere.example/x", api_item())], "elsewhere", 1),
    ],
    ids=["always busy", "busy for a day", "refused", "no JSON", "broken off", "no next link", "a circle", "another host"],
)
def test_a_list_that_cannot_be_read_to_its_end_is_an_error(answers: Any, complaint: str, requests: int) -> None:
    with api(answers) as (address, seen), pytest.raises(RetailError, match=complaint):
        snapshots(address, TODAY, lambda _: None)
    assert len(seen) == requests


def test_no_connection_is_an_error() -> None:
    with api(lambda at: [page(None)]) as (address, _):
        pass
    with pytest.raises(RetailError, match="6 times"):
        snapshots(address, TODAY, lambda _: None)


# --- proposals


def test_the_same_price_in_another_unit_is_unchanged(tmp_path: Path) -> None:
    proposal = Proposal(book(tmp_path, line(unit_price="2.50", unit_tokens="1000000")), [listed(item())])
    assert (proposal.unchanged, proposal.new, proposal.changed, proposal.ended) == (1, [], [], [])


def test_a_changed_price_ends_the_row_and_adds_one_after_it(tmp_path: Path) -> None:
    old = book(tmp_path, line(), line("other", model="o9", unit_price="1"))
    proposal = Proposal(old, [listed(item(price="0.002", meter_id="new id"))])
    [change] = proposal.changed
    assert (change.old.price_id, change.percent) == ("in", Decimal("-20.0"))
    assert priced(proposal) == [
        ("*", "0.0025", "1000", "2024-12-01", "2025-01-01"),
        ("*", "0.002", "1000", "2025-01-01", ""),
        ("*", "1", "1000", "2024-12-01", ""),
    ]
    old.write()
    assert [row.values["price_id"] for row in load(tmp_path).price_book] == ["in", "gpt-4o-2024-11-20-globalstandard-input", "other"]
    assert old.entries[1].values["source"] == "Azure Retail Prices 2025-06-01: gpt 4o 1120 Inp glbl Tokens"


def test_a_price_that_changed_without_a_new_start_changes_on_the_day_of_the_list(tmp_path: Path) -> None:
    proposal = Proposal(book(tmp_path, line(effective_from="2025-01-01")), [listed(item(price="0.002"))])
    assert priced(proposal)[1] == ("*", "0.002", "1000", "2025-06-01", "")


def test_effective_from_can_be_given_but_not_rewrite_history(tmp_path: Path) -> None:
    proposal = Proposal(book(tmp_path, line()), [listed(item(price="0.002"))], dt.date(2026, 1, 1))
    assert [row[3:] for row in priced(proposal)] == [("2024-12-01", "2026-01-01"), ("2026-01-01", "")]
    with pytest.raises(ValueError, match="2024-12-01, from which in is in force"):
        Proposal(book(tmp_path, line()), [listed(item(price="0.002"))], dt.date(2024, 12, 1))


def test_an_older_list_changes_nothing(tmp_path: Path) -> None:
    lines = line(effective_to="2025-07-01", unit_price="0.003"), line("now", effective_from="2025-07-01")
    known = Proposal(book(tmp_path, *lines), [listed(item(price="0.003"))])
    unknown = Proposal(book(tmp_path, *lines), [listed(item(price="0.004"))])
    assert (known.unchanged, known.older, known.new, known.changed) == (1, 0, [], [])
    assert (unknown.unchanged, unknown.older, unknown.new, unknown.changed) == (0, 1, [], [])


def test_the_meter_id_says_the_key_before_the_name_does(tmp_path: Path) -> None:
    mine = book(tmp_path, line(model="house-model", model_version="", meter_id="ID OF gpt 4o 1120 Inp glbl Tokens"))
    proposal = Proposal(mine, [listed(item(price="0.002"))])
    assert [change.new.values["model"] for change in proposal.changed] == ["house-model"] and proposal.new == []
    strange = Proposal(book(tmp_path, line(model="house-model", meter_id="strange")), [listed(item("What Is This?", "0.003", meter_id="strange"))])
    assert not strange.not_understood and len(strange.changed) == 1


def test_one_price_everywhere_is_one_row_and_several_are_a_row_a_region(tmp_path: Path) -> None:
    name = "gpt 4o 1120 Inp Data Zone Tokens"
    regions = {"eastus": "0.825", "westeurope": "0.825", "japaneast": "0.9"}
    one = Proposal(book(tmp_path), [listed(*(item(name, "0.825", region=region) for region in regions))])
    assert [row[:2] for row in priced(one)] == [("*", "0.825")]
    several = Proposal(book(tmp_path), [listed(*(item(name, price, region=region) for region, price in regions.items()))])
    assert sorted(row[:2] for row in priced(several)) == sorted(regions.items())


def test_a_list_of_one_region_says_nothing_about_others(tmp_path: Path) -> None:
    proposal = Proposal(book(tmp_path), [listed(item("gpt 4o 1120 Inp regnl Tokens"), item("gpt 4o 1120 Inp glbl Tokens"))])
    assert sorted(row[0] for row in priced(proposal)) == ["*", "eastus"]


def test_a_region_that_leaves_the_common_price_gets_its_own_row(tmp_path: Path) -> None:
    name = "gpt 4o 1120 Inp Data Zone Tokens"
    first = [item(name, "0.825", region=region) for region in ("eastus", "japaneast")]
    second = [first[0], item(name, "0.9", region="japaneast", start=dt.date(2025, 7, 1))]
    third = [item(name, price, region=region, start=dt.date(2025, 8, 1)) for region, price in (("eastus", "1"), ("japaneast", "0.9"))]
    split = Proposal(book(tmp_path), [listed(*first), listed(*second, date=dt.date(2025, 7, 2)), listed(*third, date=dt.date(2025, 8, 2))])
    assert [row[:2] + row[3:] for row in sorted(priced(split))] == [
        ("*", "0.825", "2025-01-01", "2025-08-01"),
        ("*", "1", "2025-08-01", ""),
        ("japaneast", "0.9", "2025-07-01", ""),
    ]
    split.book.rows()


def test_a_region_that_leaves_the_common_price_without_a_new_start_leaves_on_the_day_of_the_list(tmp_path: Path) -> None:
    name = "gpt 4o 1120 Inp Data Zone Tokens"
    first = [item(name, "0.825", region=region) for region in ("eastus", "japaneast")]
    second = [first[0], item(name, "0.9", region="japaneast")]
    proposal = Proposal(book(tmp_path), [listed(*first), listed(*second, date=dt.date(2025, 7, 2))])
    assert sorted(row[:2] + row[3:] for row in priced(proposal)) == [("*", "0.825", "2025-01-01", ""), ("japaneast", "0.9", "2025-07-02", "")]


def test_a_row_that_takes_over_from_a_less_exact_one_does_so_on_the_day_of_the_list(tmp_path: Path) -> None:
    negotiated = line("negotiated", model_version="", deployment_sku="", unit_price="0.002")
    proposal = Proposal(book(tmp_path, negotiated, line("other", model="o9")), [listed(item(), item("gpt 4o 1120 Outp glbl Tokens"))])
    assert [(entry.key.meter, entry.values["effective_from"]) for entry in proposal.new] == [("input", "2025-06-01"), ("output", "2025-01-01")]
    assert proposal.book.entries[0].end is None


def test_a_common_price_that_becomes_several_ends(tmp_path: Path) -> None:
    name = "gpt 4o 1120 Inp Data Zone Tokens"
    second = [item(name, price, region=region, start=dt.date(2025, 7, 1)) for region, price in (("eastus", "1"), ("japaneast", "2"))]
    first = [item(name, "0.825", region=region) for region in ("eastus", "japaneast")]
    proposal = Proposal(book(tmp_path), [listed(*first), listed(*second, date=dt.date(2025, 7, 2))])
    assert [row[:2] + row[3:] for row in sorted(priced(proposal))] == [
        ("*", "0.825", "2025-01-01", "2025-07-01"),
        ("eastus", "1", "2025-07-01", ""),
        ("japaneast", "2", "2025-07-01", ""),
    ]


def test_an_end_that_the_list_names_ends_the_row_and_the_price_after_it_follows(tmp_path: Path) -> None:
    ending = item(end=dt.date(2025, 9, 1))
    proposal = Proposal(book(tmp_path, line()), [listed(ending)])
    assert [entry.price_id for entry in proposal.ended] == ["in"] and priced(proposal)[0][4] == "2025-09-01"
    both = [ending, item(price="0.003", start=dt.date(2025, 9, 1))]
    for lists in ([listed(*both)], [listed(ending), listed(both[1], date=dt.date(2025, 9, 20))]):
        assert [row[1:] for row in priced(Proposal(book(tmp_path, line()), lists))] == [
            ("0.0025", "1000", "2024-12-01", "2025-09-01"),
            ("0.003", "1000", "2025-09-01", ""),
        ]


def test_two_meters_of_one_key_with_different_prices_are_not_understood(tmp_path: Path) -> None:
    same = [item("o1 Batch Inp glbl Tokens", "0.0075"), item("o1 1217 Batch Inp glbl Tokens", "0.0075")]
    assert len(Proposal(book(tmp_path), [listed(*same)]).new) == 1
    proposal = Proposal(book(tmp_path), [listed(same[0], item("o1 1217 Batch Inp glbl Tokens", "0.008"))])
    assert proposal.new == [] and proposal.usage == 0
    assert all("several prices in eastus" in reason for reason in proposal.not_understood) and len(proposal.not_understood) == 2


def test_rows_that_the_list_does_not_know_are_kept(tmp_path: Path) -> None:
    mine = book(tmp_path, line("mine", model="gpt-house"), line("gone", model="o9", meter_id="gone id"))
    proposal = Proposal(mine, [listed(item())])
    assert [entry.price_id for entry in proposal.book.entries[:2]] == ["mine", "gone"]
    assert [entry.price_id for entry in proposal.unlisted] == ["gone"] and all(entry.end is None for entry in proposal.book.entries)


def test_the_file_keeps_its_columns_its_line_ends_and_the_text_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "price_book.csv"
    head = "currency,unit_tokens,unit_price,meter,price_id,model,model_version,deployment_sku,service_tier\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + f'{head}USD,1000,2.50e-3,input,"in, old",gpt-4o,2024-11-20,GlobalStandard,Standard\r\n'.encode())
    mine = Book(path)
    assert Proposal(mine, [listed(item())]).unchanged == 1
    Proposal(mine, [listed(item(price="0.002"))])
    mine.write()
    lines = path.read_bytes().decode("utf-8-sig").split("\r\n")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert lines[0].startswith(head.strip()) and lines[0].endswith(",effective_to")
    assert lines[1].startswith('USD,1000,2.50e-3,input,"in, old",gpt-4o,2024-11-20,GlobalStandard,Standard') and "2025-01-01" in lines[1]
    assert len(load(tmp_path).price_book) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["price_book.csv"]


def test_a_proposal_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    tie = book(tmp_path, line(deployment_sku="", region="eastus"))
    before = tie.path.read_bytes()
    Proposal(tie, [listed(item())])
    with pytest.raises(ReferenceDataError, match="ties with line 2"):
        tie.write()
    assert tie.path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["price_book.csv"]


def test_a_file_that_somebody_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    mine = book(tmp_path, line())
    Proposal(mine, [listed(item(price="0.002"))])
    mine.path.write_text(mine.path.read_text() + line("new", model="o9") + "\n")
    with pytest.raises(ReferenceDataError, match="changed meanwhile"):
        mine.write()
    assert len(load(tmp_path).price_book) == 2


REGIONS = ("eastus", "japaneast", "westeurope")


@given(st.lists(st.dictionaries(st.sampled_from(REGIONS), st.integers(1, 3), min_size=1), min_size=1, max_size=4))
def test_whatever_changes_every_region_has_the_listed_price_from_the_day_of_the_list(tmp_path_factory: Any, prices: list[dict[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("book")
    lists = []
    for month, by_region in enumerate(prices, 1):
        start = dt.date(2025, month, 1)
        offers = (item("gpt 4o 1120 Inp regnl Tokens", str(price), region=region, start=start) for region, price in by_region.items())
        lists.append(listed(*offers, date=start))
    mine = book(folder)
    first = Proposal(mine, lists)
    mine.write()
    rows = load(folder).price_book
    for snapshot in lists:
        for offer in snapshot.items:
            found = [row for row in rows if row.values["region"] in (offer.region, None) and row.effective_on(snapshot.date)]
            best = max(found, key=lambda row: row.values["region"] is not None)
            assert Decimal(best.values["unit_price"] or 0) == offer.price
    before = mine.path.read_bytes()
    again = Proposal(Book(mine.path), lists)
    assert again.new == again.changed == again.ended == [] and again.book.text().encode() == before
    assert first.not_understood.total() == 0


# --- the command


@pytest.fixture(scope="module")
def billed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation with a day of usage: 1,000,000 tokens in and 100,000 out of gpt-4o, Global Standard."""
    tmp_path = tmp_path_factory.mktemp("billed")
    support.reference(tmp_path / "reference", price_book="\n".join([HEADER, line(), line("out", meter="output", unit_price="0.01")]) + "\n")
    (tmp_path / "reference" / "deployments.csv").write_text(
        f"{support.DEPLOYMENTS.splitlines()[0]}\nhub,,,,chat,,,,GlobalStandard,eastus,,\nhub,,,,tier,,,,GlobalStandard,eastus,,\n"
    )
    pipeline = support.installation(tmp_path)
    events = [hub_event("a", DAY, 1_000_000, 100_000, 1_100_000)]
    support.put(tmp_path / "capture", support.blob_name(DAY), support.capture_file(Captured(body, DAY, n) for n, body in enumerate(events)))
    support.run_all(pipeline, DAY.date(), DAY.date())
    return tmp_path


@pytest.fixture
def root(billed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that installation, whose settings are in the environment."""
    shutil.copytree(billed, tmp_path, dirs_exist_ok=True)
    pipeline = support.installation(tmp_path)
    for name in ("capture_url", "lake_url", "warehouse_path", "reference_dir"):
        monkeypatch.setenv(f"AOAI_{name.upper()}", str(getattr(pipeline.settings, name)))
    return tmp_path


@pytest.fixture
def prices(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `aoai-usage prices` in this process: (exit code, what it printed, what it complained about)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["prices", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def files(root: Path, *folders: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in (root / folder).rglob("*") if path.is_file()}


CHANGED = api_item(price=0.002, effectiveStartDate="2026-10-01T00:00:00Z"), api_item("gpt 4o 1120 Outp glbl Tokens", 0.01), api_item("Foo Inp Tokens")


def test_import_prints_the_difference_and_the_effect_on_the_bill_and_writes_nothing(root: Path, prices: Run) -> None:
    before = files(root, "reference", "lake")
    code, out, _ = prices("import", saved(root / "2026-11-01.json", CHANGED), "--month", "2026-10")
    assert code == 0
    assert "3 prices, 2 of usage, 0 of other kinds, 1 not understood" in out
    assert "not understood 1 x 'Foo Inp Tokens': unknown word 'foo'" in out
    assert "0 new, 1 changed, 0 ended, 1 unchanged" in out
    [change] = [text for text in out.splitlines() if "-20.0%" in text]
    assert "0.0025 USD / 1,000" in change and "0.002 USD / 1,000" in change and "2026-10-01" in change
    [model] = [text for text in out.splitlines() if "│ gpt-4o " in text]
    assert all(amount in model for amount in ("3.50 USD", "3.00 USD", "-0.50 USD"))
    assert "Nothing written: --write" in out
    assert files(root, "reference", "lake") == before


def test_import_writes_when_told_to_and_the_bill_is_what_was_promised(root: Path, prices: Run) -> None:
    source = saved(root / "2026-11-01.json", CHANGED)
    code, out, _ = prices("import", source, "--month", "2026-10", "--write")
    assert code == 0 and f"Written to {root / 'reference' / 'price_book.csv'}" in out
    support.run_all(support.installation(root), DAY.date(), DAY.date())
    assert support.rows(support.installation(root), "SELECT sum(cost) FROM daily_billing") == [(Decimal(3),)]
    code, out, _ = prices("import", source, "--write")
    assert code == 0 and "Nothing to write" in out and "0 new, 0 changed" in out


def test_import_strictly_writes_nothing_when_a_meter_is_not_understood(root: Path, prices: Run) -> None:
    before = files(root, "reference")
    code, out, _ = prices("import", saved(root / "2026-11-01.json", CHANGED), "--write", "--strict")
    assert code == 1 and "--strict" in out
    assert files(root, "reference") == before
    assert prices("import", saved(root / "2026-11-01.json", CHANGED[:2]), "--write", "--strict")[0] == 0


def test_import_of_a_folder_of_snapshots_gives_dated_rows_in_another_price_book(root: Path, prices: Run) -> None:
    (root / "snapshots").mkdir()
    for date, price in (("2026-01-15", 0.003), ("2026-02-15", 0.003), ("2026-03-15", 0.002)):
        saved(root / "snapshots" / f"prices-{date}.json", [api_item(price=price, effectiveStartDate=f"{date[:7]}-01T00:00:00Z")])
    code, out, _ = prices("import", root / "snapshots", "--write", "--price-book", root / "new.csv")
    assert code == 0 and "3 lists from 2026-01-15 to 2026-03-15" in out
    assert [(e.values["unit_price"], e.values["effective_from"], e.values["effective_to"]) for e in Book(root / "new.csv").entries] == [
        ("0.003", "2026-01-01", "2026-03-01"),
        ("0.002", "2026-03-01", ""),
    ]


def test_import_from_the_api_through_the_command(root: Path, prices: Run) -> None:
    with api(lambda at: [page(f"{at}?$skip=1", CHANGED[0]), page(None, CHANGED[1])]) as (address, _):
        code, out, _ = prices("import", address)
    assert code == 0 and "2 prices, 2 of usage" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere.json",), "nowhere.json does not exist"),
        ((str(FIXTURE), "--price-book", "no/such/folder/prices.csv"), "no/such/folder"),
        ((str(FIXTURE), "--effective-from", "2024-01-01"), "history is not rewritten"),
    ],
)
def test_an_import_that_cannot_be_done_is_exit_code_2(root: Path, prices: Run, arguments: tuple[str, ...], complaint: str) -> None:
    (root / "reference" / "price_book.csv").write_text("\n".join([HEADER, line(unit_price="9")]) + "\n")
    code, out, err = prices("import", *arguments)
    assert code == 2 and complaint in err and "Traceback" not in out + err


def test_the_example_set_of_the_package_is_never_written(root: Path, prices: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AOAI_REFERENCE_DIR")
    code, _, err = prices("import", FIXTURE, "--write")
    assert code == 2 and "--price-book" in err


# --- what the bill would be


def test_rebilling_with_the_same_reference_data_is_the_bill_and_with_others_another(root: Path) -> None:
    pipeline = support.installation(root)
    before = files(root, "lake")
    days = [DAY.date() + dt.timedelta(n) for n in range(-3, 4)]
    assert pipeline.rebill(days, pipeline.reference()) == {("gpt-4o", "USD"): Decimal("3.5")}
    euro = load(support.reference(root / "euro", PRICE_BOOK.replace("USD", "EUR").replace("10.00", "20.00")))
    assert pipeline.rebill(days, euro) == {("gpt-4o", "EUR"): Decimal("4.5")}
    assert pipeline.rebill(days[:2], euro) == {}
    assert files(root, "lake") == before


# --- check


def test_check_finds_nothing_in_a_good_price_book(root: Path, prices: Run) -> None:
    code, out, _ = prices("check", "--from", "2026-10-01", "--to", "2026-10-31")
    assert code == 0 and "No findings" in out


def test_check_names_usage_without_a_price_and_what_is_near(root: Path, prices: Run) -> None:
    book(root / "reference", line(), line("out", meter="output", deployment_sku="Standard"))
    code, out, _ = prices("check", "--to", "2026-11-01")
    assert code == 1
    assert (
        "no price gpt-4o 2024-11-20 (GlobalStandard, eastus, tier default, deployment chat): 100,000 of output, from 2026-10-05 to 2026-10-05" in out
    )
    assert "the price book has output of gpt-4o for other usage: 2024-11-20 Standard any region" in out
    assert "1 findings" in out and " of input" not in out
    assert prices("check", "--from", "2026-10-06", "--to", "2026-10-31")[0] == 0


def test_check_names_a_missing_exchange_rate_and_no_missing_price(root: Path, prices: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOAI_BILLING_CURRENCY", "EUR")
    code, out, _ = prices("check", "--to", "2026-11-01")
    assert code == 1
    assert "100,000 of output, from 2026-10-05 to 2026-10-05" in out and "2 findings" in out
    assert out.count("its price is in USD, and exchange_rates.csv has no rate to EUR then") == 2 and "other usage" not in out


def test_check_names_provisioned_deployments_that_nothing_pays_for(root: Path, prices: Run) -> None:
    sku = "GlobalProvisionedManaged"
    folder = root / "reference"
    (folder / "deployments.csv").write_text((folder / "deployments.csv").read_text().replace("GlobalStandard", sku))
    free = {"deployment_sku": sku, "unit_price": "0"}
    book(folder, line(**free), line("out", meter="output", **free))
    pipeline = support.installation(root)
    pipeline.enrich([DAY.date()])
    code, out, _ = prices("check", "--to", "2026-11-01")
    assert code == 1
    assert f"no capacity chat ({sku}, gateway hub): used on 1 days from 2026-10-05 to 2026-10-05" in out and "1 findings" in out
    capacity = "deployment,ptus,hourly_price,currency,effective_from\nchat,15,1.00,USD,2026-10-0{}\n"
    (folder / "capacity.csv").write_text(capacity.format(6))
    assert prices("check", "--to", "2026-11-01")[0] == 1
    (folder / "capacity.csv").write_text(capacity.format(5))
    assert prices("check", "--to", "2026-11-01")[0] == 0


def test_check_names_missing_periods_and_jumps(root: Path, prices: Run) -> None:
    good = line(effective_to="2025-01-01"), line("b", effective_from="2025-01-01", unit_price="0.0075"), line("out", meter="output")
    book(root / "reference", *good)
    assert prices("check")[0] == 0
    book(
        root / "reference", line(effective_to="2025-01-01"), line("b", effective_from="2025-02-01", unit_price="7.6", unit_tokens="1000000"), good[2]
    )
    code, out, _ = prices("check")
    assert code == 1
    assert "missing period in (line 2) ends on 2025-01-01, and b (line 3), which follows it, starts on 2025-02-01" in out
    assert "price jump b (line 3): from 0.0025 USD / 1,000 to 7.6 USD / 1,000,000 on 2025-02-01" in out
    assert "2 findings" in out


def test_check_says_that_overlapping_rows_stop_everything(root: Path, prices: Run) -> None:
    (root / "reference" / "price_book.csv").write_text("\n".join([HEADER, line(), line("b")]) + "\n")
    code, out, _ = prices("check")
    assert code == 1 and "nothing is billed, until" in out and "line 3 ties with line 2" in out
