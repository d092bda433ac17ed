"""Rating against an independent computation: every meter, price, contract, markup and exchange rate once more, in plain Python and `Decimal`."""

import csv
import dataclasses
import datetime as dt
import decimal
import hashlib
import hmac
import io
import itertools
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
    COST_CENTERS,
    DAY,
    DEPLOYMENTS,
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
)

LAST_DAY = DAY + dt.timedelta(2)
HASH_KEY = "a key of the tests"
PRICE_COLUMNS = PRICE_BOOK.splitlines()[0].split(",")
KEY = ("model", "model_version", "deployment_sku", "region", "service_tier", "context_band")
CONTRACT_COLUMNS = ("price_id", *KEY, "meter", "unit_price", "unit_tokens", "discount", "effective_from", "effective_to", "source")
MARKUP_COLUMNS = ("price_id", *KEY, "meter", "markup", "effective_from", "effective_to", "source")
RATE_COLUMNS = ("from_currency", "to_currency", "rate", "effective_from", "effective_to", "source")
METERS = (
    "input", "cached_input", "cache_write", "output", "audio_input", "cached_audio_input", "audio_output", "image_input", "cached_image_input",
    "image_output", "image", "image/1024x1024", "image/1024x1024/hd", "audio_seconds", "characters", "web_search_calls", "file_search_calls",
    "code_interpreter_sessions",
)  # fmt: skip
TOOLS = {"web_search_calls": "web_search_call", "file_search_calls": "file_search_call", "code_interpreter_sessions": "code_interpreter_session"}
Row = dict[str, Any]


def table(columns: Sequence[str], lines: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# --- what is random: calls


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: how it is sent, and what of it is to be paid, by meter. Its parts are disjoint; the usage object is put together from them."""

    number: int
    at: dt.datetime
    contract: str
    caller: str
    deployment: str | None
    spilled_to: str | None
    model: str | None
    tier: str | None
    usage: dict[str, Any] | None
    image_kind: tuple[str, ...]
    pays: dict[str, Decimal]

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    def body(self) -> bytes:
        return self._v2() if self.contract == "contract_v2" else self._private()

    def _v2(self) -> bytes:
        tools = {TOOLS[meter]: int(self.pays[meter]) for meter in TOOLS if meter in self.pays}
        size, quality = [*self.image_kind, None, None][:2]
        event = {
            "schema": "aoai-usage/2", "requestId": self.request_id, "time": f"{self.at:%Y-%m-%dT%H:%M:%S}.5Z", "gateway": "apim",
            "subscriptionId": self.caller, "deployment": self.deployment, "spilloverFrom": self.deployment if self.spilled_to else None,
            "spilloverTo": self.spilled_to, "model": self.model, "serviceTier": self.tier, "status": 200, "usage": self.usage,
            "toolCalls": tools or None, "imageCount": int(self.pays["image"]) if "image" in self.pays else None, "imageSize": size,
            "imageQuality": quality, "inputCharacters": int(self.pays["characters"]) if "characters" in self.pays else None,
        }  # fmt: skip
        return json.dumps(event).encode()

    def _private(self) -> bytes:
        """The whole answer; its output has the tool calls, those of the code interpreter twice for each container, and its data the images."""
        answer: dict[str, Any] = {"id": self.request_id, "model": self.model, "service_tier": self.tier, "usage": self.usage}
        counts = {meter: int(self.pays.get(meter, 0)) for meter in TOOLS}
        answer["output"] = [{"type": "message", "id": "m"}, {"type": "function_call", "id": "f"}]
        for meter in ("web_search_calls", "file_search_calls"):
            answer["output"] += [{"type": TOOLS[meter], "id": f"{meter}{n}"} for n in range(counts[meter])]
        sessions = range(counts["code_interpreter_sessions"])
        answer["output"] += [{"type": "code_interpreter_call", "id": f"ci{n}{x}", "container_id": f"cntr_{n}"} for n in sessions for x in "ab"]
        if "image" in self.pays:
            answer["data"] = [{"url": "https://x"}] * int(self.pays["image"])
            answer |= dict(zip(("size", "quality"), self.image_kind, strict=False))
        text = json.dumps(answer)
        if self.number % 2 and "data" not in answer:
            # a stream says each item before it says all of them
            events = [{"type": "response.output_item.done", "item": item} for item in answer["output"]]
            text = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, {"type": "response.completed", "response": answer}])
        time = f"{self.at:%Y-%m-%dT%H:%M:%S}.5Z"
        return json.dumps({"eventTime": time, "apiOperation": "Chat", "appSubscriptionKey": self.caller, "response": text}).encode()


def usage_object(rng: random.Random, shape: str) -> tuple[dict[str, Any] | None, dict[str, Decimal]]:
    """A usage object of a shape, and what its disjoint parts are."""

    def some(most: int = 5_000) -> int:
        return rng.choice((0, 0, 1, rng.randint(2, most), rng.randint(2, most)))

    if shape == "none":
        return None, {}
    if shape == "duration":
        micros = rng.randint(1, 10**10)
        seconds = Decimal(micros).scaleb(-6)
        return {"type": "duration", "seconds": float(seconds)}, {"audio_seconds": seconds}
    parts = dict.fromkeys(METERS[:10], 0) | {"input": some() if rng.random() < 0.7 else rng.randint(250_000, 290_000), "output": some()}
    if shape == "embeddings":
        parts["output"] = 0
        return {"prompt_tokens": parts["input"], "total_tokens": parts["input"]}, {"input": Decimal(parts["input"])}
    allowed = {
        "chat": ("cached_input", "cache_write", "audio_input", "audio_output"),
        "responses": ("cached_input", "cache_write"),
        "transcription": ("audio_input",),
        "images": ("image_input", "image_output"),
        "realtime": ("cached_input", "audio_input", "cached_audio_input", "audio_output", "image_input", "cached_image_input"),
    }
    parts |= {meter: some() for meter in allowed[shape]}
    incoming, outgoing = [m for m in METERS[:10] if "output" not in m], [m for m in METERS[:10] if "output" in m]
    prompt, completion = sum(parts[m] for m in incoming), sum(parts[m] for m in outgoing)
    audio, image = parts["audio_input"] + parts["cached_audio_input"], parts["image_input"] + parts["cached_image_input"]
    details: dict[str, Any] = {"cached_tokens": sum(parts[m] for m in incoming if m.startswith("cached"))}
    details |= {"audio_tokens": audio, "image_tokens": image, "text_tokens": prompt - audio - image, "cache_write_tokens": parts["cache_write"]}
    answered = {"audio_tokens": parts["audio_output"], "image_tokens": parts["image_output"], "reasoning_tokens": rng.randint(0, parts["output"])}
    details = {name: count or rng.choice((0, None)) for name, count in details.items()}
    answered = {name: count or rng.choice((0, None)) for name, count in answered.items()}
    if shape == "realtime":
        details["cached_tokens_details"] = {
            "text_tokens": parts["cached_input"], "audio_tokens": parts["cached_audio_input"], "image_tokens": parts["cached_image_input"]
        }  # fmt: skip
    names = {
        "chat": ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details"),
        "realtime": ("input_tokens", "output_tokens", "input_token_details", "output_token_details"),
        "transcription": ("input_tokens", "output_tokens", "input_token_details", "output_token_details"),
    }.get(shape, ("input_tokens", "output_tokens", "input_tokens_details", "output_tokens_details"))
    usage = dict(zip(names, (prompt, completion, details, answered), strict=True))
    if rng.random() < 0.8:
        usage["total_tokens"] = prompt + completion
    return usage, {meter: Decimal(count) for meter, count in parts.items()}


SHAPES = ("chat", "chat", "responses", "realtime", "transcription", "duration", "images", "embeddings", "none")
REPORTED = ("gpt-4o-2024-11-20", "gpt-4o", "gpt-image-1", "whisper-2024-01-01", "mystery-1", None)
TIERS = (None, "", "default", "standard", "Standard", "priority", "flex")


def call(rng: random.Random, number: int) -> Call:
    contract = rng.choice(("contract_v2", "contract_v2", "contract_v2", "private_openai"))
    usage, pays = usage_object(rng, rng.choice(SHAPES))
    images: tuple[str, ...] = ()
    if usage is None:
        if rng.random() < 0.6:
            pays["image"] = Decimal(rng.randint(1, 9))
            images = rng.choice(((), ("1024x1024",), ("1024x1024", "hd"), ("1024x1024", "standard"), ("256x256",), ("256x256", "hd")))
        elif contract == "contract_v2" and rng.random() < 0.8:
            pays["characters"] = Decimal(rng.randint(1, 4096))
    for meter in TOOLS if usage and "audio_seconds" not in pays else ():
        if rng.random() < 0.25:
            pays[meter] = Decimal(rng.randint(1, 7))
    at = DAY + dt.timedelta(seconds=rng.choice((0, 86_399, 86_400, 172_799, rng.randrange(3 * 86_400))))
    v2 = contract == "contract_v2"
    deployment = rng.choice(("chat", "batch", "zone", "unlisted", None)) if v2 else None
    spilled = rng.choice((None, None, None, "zone", "chat")) if deployment else None
    model, tier = rng.choice(REPORTED[: None if v2 else -1]), rng.choice(TIERS)
    return Call(number, at, contract, rng.choice(("sales", "hr")), deployment, spilled, model, tier, usage, images, pays)


DEPLOYMENT_ROWS = f"""{DEPLOYMENTS.splitlines()[0]}
,,,,batch,,,,GlobalBatch,,,
,,,,zone,,,,DataZoneStandard,eu,,
apim,,,,chat,,,,GlobalStandard,eastus,,2026-10-06
apim,,,,chat,,,,GlobalStandard,swedencentral,2026-10-06,
apim,hr,,,chat,,gpt-4o,2024-11-20,,,,2026-10-07
"""


# --- what is random: prices


def dated(rng: random.Random) -> list[Row]:
    """Periods that follow each other at midnights, some with a day missing between them."""
    midnights = rng.choice(([], [], ["2026-10-06"], ["2026-10-06", "2026-10-07"]))
    bounds = ["", *midnights, ""]
    periods = [{"effective_from": a, "effective_to": b} for a, b in itertools.pairwise(bounds)]
    return [period for period in periods if len(periods) == 1 or rng.random() < 0.85]


PATHS = [
    {"model": "gpt-4o", "model_version": "2024-11-20"},
    {"model": "gpt-image-1", "model_version": "1"},
    {"model": "whisper", "model_version": "2024-01-01"},
    {},
]
VALUES = {
    "deployment_sku": ("GlobalStandard", "GlobalBatch", "DataZoneStandard"),
    "region": ("eastus", "swedencentral", "eu"),
    "service_tier": ("default", "standard", "priority", "flex"),
    "context_band": ("short", "long"),
}


def patterns(rng: random.Random, more: Sequence[str] = ()) -> Iterator[Row]:
    """Patterns from general to exact for each model: each has more exact columns than the last or other values in them, so none tie."""
    for path in PATHS:
        pattern: Row = {"model": path["model"]} if path else {}
        yield pattern
        if not path:
            continue
        columns = rng.sample(["model_version", *VALUES, *more], rng.randint(1, 5))
        for column in columns:
            values = (path[column],) if column == "model_version" else METERS if column == "meter" else VALUES[column]
            chosen = rng.sample(values, rng.randint(1, min(4, len(values))))
            if {"default", "standard"} <= set(chosen):
                chosen.remove("standard")  # they are one tier
            for value in chosen:
                yield pattern | {column: value}
            pattern = pattern | {column: chosen[0]}


def price_book(rng: random.Random, currencies: Sequence[str]) -> list[Row]:
    lines: list[Row] = []
    for pattern in patterns(rng):
        for meter in rng.sample(METERS, rng.randint(2, 9)):
            for period in dated(rng):
                unit = 1 if meter == "audio_seconds" else 10 ** rng.randint(0, 6)
                price = Decimal(rng.randrange(10 ** rng.randint(1, 10))).scaleb(-9)
                line = {"price_id": f"p{len(lines)}", "meter": meter, "unit_price": f"{price:f}", "unit_tokens": unit}
                lines.append(dict.fromkeys(KEY, rng.choice("* ")) | pattern | line | {"currency": rng.choice(currencies)} | period)
    return lines


def overlay(rng: random.Random, book: Sequence[Row], give: Any) -> list[Row]:
    """Rows for patterns, or for single prices and all others."""
    if rng.random() < 0.3:
        chosen: list[Row] = [{}, *({"price_id": line["price_id"]} for line in book)]
    else:
        chosen = list(patterns(rng, ["meter"]))
    return [pattern | give() | period for pattern in chosen if rng.random() < 0.5 for period in dated(rng)]


def contract_row(rng: random.Random) -> Row:
    if rng.random() < 0.5:
        return {"discount": f"{Decimal(rng.randint(1, 10**8)).scaleb(-6):f}"}
    return {"unit_price": f"{Decimal(rng.randrange(10**10)).scaleb(-9):f}", "unit_tokens": 10 ** rng.randint(0, 6)}


@dataclasses.dataclass(frozen=True)
class Prices:
    """All that decides what a line costs."""

    billing_currency: str | None
    book: list[Row]
    contract: list[Row]
    markups: list[Row]
    rates: list[Row]

    def write(self, folder: Path) -> Path:
        reference(folder, table(PRICE_COLUMNS, self.book), DEPLOYMENT_ROWS, COST_CENTERS)
        for name, columns, lines in (
            ("contract_prices", CONTRACT_COLUMNS, self.contract),
            ("markups", MARKUP_COLUMNS, self.markups),
            ("exchange_rates", RATE_COLUMNS, self.rates),
        ):
            (folder / f"{name}.csv").write_text(table(columns, lines))
        return folder


def prices(rng: random.Random) -> Prices:
    billing_currency = rng.choice((None, None, "EUR", "USD"))
    book = price_book(rng, ("USD",) if billing_currency is None else ("USD", "EUR", "GBP"))
    contract = overlay(rng, book, lambda: contract_row(rng)) if rng.random() < 0.7 else []
    markups = overlay(rng, book, lambda: {"markup": f"{Decimal(rng.randint(-10 * 10**6, 50 * 10**6)).scaleb(-6):f}"}) if rng.random() < 0.7 else []
    rates = [
        {"from_currency": a, "to_currency": b, "rate": f"{Decimal(rng.randint(1, 3 * 10**9)).scaleb(-9):f}"} | period
        for a in ("USD", "EUR", "GBP")
        for b in ("USD", "EUR")
        if a != b and rng.random() < 0.8
        for period in dated(rng)
    ]
    return Prices(billing_currency, book, contract, markups, rates)


# --- the independent computation


PAYER = ("gateway", "subscription_id", "team", "cost_center", "department")
DEPLOYMENT = ("deployment", "model", "model_version", "deployment_sku", "region", "service_tier")
LINE = ("meter", "price_id", "unit_price", "unit_tokens", "currency", "pricing_status", "list_unit_price", "contracted_unit_price", "pricing_currency",
        "exchange_rate", "usage_source")  # fmt: skip
SUMS = ("quantity", "cost", "list_cost", "contracted_cost")
REQUEST = ("request_id", "usage_date", *PAYER, *DEPLOYMENT, "context_band", "usage_source", "cost", "currency", "pricing_status")


def best(table_: Sequence[Row], columns: Sequence[str], event: Row, day: dt.date) -> Row | None:
    """The row in force for the price itself, else the one with the most exact matches, of images the one that says most of them."""
    found: dict[tuple[bool, int, int], Row] = {}
    for row in table_:
        exact = [column for column in columns if row.get(column, "").strip() not in ("", "*")]
        in_force = row.get("effective_from", "") <= str(day) and (not row.get("effective_to") or str(day) < row["effective_to"])
        if in_force and all(matches(column, row[column], event.get(column)) for column in exact):
            rank = "price_id" in exact, len(exact), len(row["meter"]) if "meter" in exact else 0
            assert rank not in found, "the random reference data has a tie"
            found[rank] = row
    return found[max(found)] if found else None


def matches(column: str, wanted: str, value: str | None) -> bool:
    if column == "service_tier":
        return (wanted if wanted != "standard" else "default") == value
    if column == "meter" and value and wanted.startswith("image"):
        return value == wanted or value.startswith(f"{wanted}/")
    return wanted == value


class Expected:
    """What must be published for these calls at these prices."""

    def __init__(self, calls: Sequence[Call], given_: Prices) -> None:
        self._prices = given_
        self._deployments, self._owners = (list(csv.DictReader(io.StringIO(text))) for text in (DEPLOYMENT_ROWS, COST_CENTERS))
        self.lines: list[Row] = []
        self.requests = [self._request(sent) for sent in calls]

    def _request(self, sent: Call) -> Row:
        day, v2 = sent.at.date(), sent.contract == "contract_v2"
        caller = sent.caller if v2 else hmac.new(HASH_KEY.encode(), sent.caller.encode(), hashlib.sha256).hexdigest()[:32]
        event: Row = {
            "usage_date": day, "request_id": sent.request_id, "gateway": "apim" if v2 else None, "subscription_id": caller,
            "deployment": sent.spilled_to or sent.deployment, "reported_model": sent.model, "operation": None if v2 else "Chat",
        }  # fmt: skip
        tier = (sent.tier or "default").lower()
        event["service_tier"] = "default" if tier == "standard" else tier
        name, version = sent.model, None
        if name and name[-10:-6].isdigit():
            name, version = name[:-11], name[-10:]
        deployed = best(self._deployments, DEPLOYMENTS.split(",")[:6], event, day) or {}
        event |= {"model": deployed.get("model") or name, "model_version": deployed.get("model_version") or version}
        event |= {column: deployed.get(column) or None for column in ("deployment_sku", "region")}
        owner = best(self._owners, ("subscription_id",), event, day)
        event |= {column: owner[column] if owner else "UNALLOCATED" for column in ("team", "cost_center", "department")}
        prompt = sum(sent.pays.get(meter, 0) for meter in METERS[:10] if "output" not in meter)
        event["context_band"] = "long" if prompt > 272_000 else "short"
        event["usage_source"] = "reported" if sent.pays else None
        if not sent.pays:
            return event | {"cost": None, "currency": None, "pricing_status": "no_usage"}
        lines = [self._line(event, meter, quantity, sent.image_kind, day) for meter, quantity in sent.pays.items() if quantity]
        self.lines += [event | line for line in lines]
        # a request of no tokens has no line; its input price says whether it is priced
        judged = lines or [self._line(event, "input", Decimal(0), (), day)]
        costs = [line["cost"] for line in judged if line["cost"] is not None]
        status = next(s for s in ("unpriced", "fallback", "priced") if any(line["pricing_status"] == s for line in judged))
        currency = next((line["currency"] for line in judged if line["cost"] is not None), None)
        return event | {"cost": sum(costs) if costs else None, "currency": currency, "pricing_status": status}

    def _line(self, event: Row, meter: str, quantity: Decimal, image_kind: Sequence[str], day: dt.date) -> Row:
        kinds = ["/".join(("image", *image_kind[:n])) for n in (2, 1, 0)] if meter == "image" else [meter]
        line: Row = dict.fromkeys((*LINE, *SUMS)) | {
            "meter": kinds[0],
            "quantity": quantity,
            "usage_source": "reported",
            "pricing_status": "unpriced",
        }
        tried = [*kinds, "input"] if meter == "cached_input" else kinds
        found = [(kind, row) for kind in tried if (row := best([r for r in self._prices.book if r["meter"] == kind], KEY, event, day))]
        if not found:
            return line
        kind, row = found[0]
        bill = self._prices.billing_currency or row["currency"]
        rate = None
        if bill != row["currency"]:
            pair = {"from_currency": row["currency"], "to_currency": bill}
            rated = best(self._prices.rates, RATE_COLUMNS[:2], pair, day)
            if rated is None:
                # no price, but it is said of which price the rate is missing
                return line | {"price_id": row["price_id"], "pricing_currency": row["currency"]}
            rate = Decimal(rated["rate"])
        of_line = event | {"meter": kinds[0], "price_id": row["price_id"]}
        contract = best(self._prices.contract, CONTRACT_COLUMNS[:8], of_line, day)
        markup = best(self._prices.markups, MARKUP_COLUMNS[:8], of_line, day)
        each = per_million(row)
        contracted = each
        if contract and contract.get("discount"):
            contracted = each * (100 - Decimal(contract["discount"])) / 100
        elif contract and each:
            contracted = per_million(contract)
        billed = contracted * (100 + Decimal(markup["markup"])) / 100 if markup else contracted
        unit = int(row["unit_tokens"])
        if contract or markup or rate is not None:
            unit = 1 if meter == "audio_seconds" else 1_000_000
        amounts = [amount * unit / 1_000_000 * (rate or 1) for amount in (each, contracted, billed)]
        if contract or markup or rate is not None:
            with decimal.localcontext(traps=[]):
                amounts = [amount.quantize(Decimal("1e-9"), decimal.ROUND_HALF_EVEN) for amount in amounts]
        costs = [quantity * amount / unit for amount in amounts]
        line |= dict(zip(("list_unit_price", "contracted_unit_price", "unit_price"), amounts, strict=True))
        line |= dict(zip(("list_cost", "contracted_cost", "cost"), costs, strict=True))
        status = "fallback" if meter == "cached_input" and kind == "input" else "priced"
        return line | {
            "unit_tokens": unit, "price_id": row["price_id"], "currency": bill, "pricing_status": status, "pricing_currency": row["currency"],
            "exchange_rate": rate,
        }  # fmt: skip

    def enriched_usage(self) -> Counter[tuple[Any, ...]]:
        return Counter(tuple(request[column] for column in REQUEST) for request in self.requests)

    def daily_billing(self) -> Counter[tuple[Any, ...]]:
        key = ("usage_date", *PAYER, *DEPLOYMENT, *LINE)
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for line in self.lines:
            groups[tuple(line[column] for column in key)].append(line)
        sums = (tuple(None if group[0][c] is None else sum(line[c] for line in group) for c in SUMS) for group in groups.values())
        return Counter(key_ + sums_ for key_, sums_ in zip(groups, sums, strict=True))


def per_million(row: Row) -> Decimal:
    return Decimal(row["unit_price"]) * 1_000_000 / int(row["unit_tokens"])


# --- running it


# an example takes a second, so shrinking one that fails would take minutes; the differing rows tell enough
some = settings(max_examples=4, deadline=None, phases=(Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck))
many = settings(some, max_examples=60)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Python's 28 digits would round what 38 hold."""
    with decimal.localcontext(prec=80, traps=[decimal.Inexact]):
        yield


def send(pipeline: Pipeline, bodies: Sequence[bytes], at: dt.datetime = DAY + dt.timedelta(hours=2), partition_id: str = "0") -> None:
    put(pipeline.settings.capture_url, blob_name(at, partition_id), capture_file(Captured(body, at, n) for n, body in enumerate(bodies)))


def published(pipeline: Pipeline, table_: str, columns: Sequence[str]) -> Counter[tuple[Any, ...]]:
    return Counter(rows(pipeline, f"SELECT {', '.join(columns)} FROM {table_}"))


def compare(rng: random.Random) -> None:
    calls = [call(rng, number) for number in range(120)]
    chosen = prices(rng)
    expected = Expected(calls, chosen)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chosen.write(root / "reference")
        pipeline = installation(root, billing_currency=chosen.billing_currency, hash_key=HASH_KEY)
        send(pipeline, [sent.body() for sent in calls], LAST_DAY + dt.timedelta(hours=23))
        # some are sent again: they count once, with everything there is to pay
        send(pipeline, [sent.body() for sent in rng.sample(calls, 20)], LAST_DAY + dt.timedelta(hours=23), "1")
        run_all(pipeline, DAY.date(), LAST_DAY.date())
        assert pipeline.held() == {}
        assert rows(pipeline, "SELECT reason FROM quarantine") == []
        assert published(pipeline, "enriched_usage", REQUEST) == expected.enriched_usage()
        assert published(pipeline, "daily_billing", ("usage_date", *PAYER, *DEPLOYMENT, *LINE, *SUMS)) == expected.daily_billing()
        totals = [rows(pipeline, f"SELECT currency, sum(cost) FROM {name} WHERE cost IS NOT NULL GROUP BY 1 ORDER BY 1")
                  for name in ("enriched_usage", "daily_usage", "daily_billing")]  # fmt: skip
        assert totals[0] == totals[1] == totals[2]


@some
@given(st.randoms(use_true_random=True))
def test_every_line_equals_an_independent_computation(rng: random.Random) -> None:
    compare(rng)


@pytest.mark.slow
@many
@given(st.randoms(use_true_random=True))
def test_every_line_of_many_price_books_equals_an_independent_computation(rng: random.Random) -> None:
    compare(rng)


# --- single rules, computed by hand


HEADER = ",".join(PRICE_COLUMNS)
NOON = DAY + dt.timedelta(hours=12)


def v2(request_id: str, usage: dict[str, Any] | None = None, at: dt.datetime = NOON, **changes: Any) -> bytes:
    event = {"schema": "aoai-usage/2", "requestId": request_id, "time": f"{at:%Y-%m-%dT%H:%M:%S}Z", "gateway": "apim", "subscriptionId": "sales"}
    return json.dumps(event | {"deployment": "chat", "model": "gpt-4o-2024-11-20", "status": 200, "usage": usage} | changes).encode()


def book(*lines: str) -> str:
    """A price book of lines `id meter price unit [column=value …]`."""
    found: list[Row] = []
    for line in lines:
        price_id, meter, price, unit, *rest = line.split()
        values = {"price_id": price_id, "meter": meter, "unit_price": price, "unit_tokens": unit, "model": "gpt-4o", "currency": "USD"}
        found.append(values | dict(pair.split("=") for pair in rest))
    return table(PRICE_COLUMNS, found)


def at_prices(
    root: Path, price_book: str, deployments: str = DEPLOYMENTS.splitlines()[0], files: dict[str, str] | None = None, **given_: Any
) -> Pipeline:
    folder = reference(root / "reference", price_book, deployments)
    for name, text in (files or {}).items():
        (folder / f"{name}.csv").write_text(text)
    return installation(root, **given_)


def bill(pipeline: Pipeline, *bodies: bytes, days: int = 1) -> None:
    send(pipeline, bodies, DAY + dt.timedelta(days - 1, hours=20))
    run_all(pipeline, DAY.date(), (DAY + dt.timedelta(days)).date())


def costs(pipeline: Pipeline) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(rest) for name, *rest in rows(pipeline, "SELECT request_id, cost, pricing_status FROM enriched_usage")}


def test_each_documented_trap_by_hand(tmp_path: Path) -> None:
    deployments = (
        f"{DEPLOYMENTS.splitlines()[0]}\n,,,,ptu,,,,GlobalProvisionedManaged,,,\n,,,,chat,,,,GlobalStandard,,,\n,,,,batch,,,,GlobalBatch,,,\n"
    )
    global_, batch, ptu = "deployment_sku=GlobalStandard", "deployment_sku=GlobalBatch", "deployment_sku=GlobalProvisionedManaged"
    pipeline = at_prices(
        tmp_path,
        book(
            f"in input 2.50 1000000 {global_}", f"cached cached_input 1.25 1000000 {global_}", f"write cache_write 3.125 1000000 {global_}",
            f"out output 0.01 1000 {global_}", f"in-pp input 4.25 1000000 {global_} service_tier=priority",
            f"in-b input 1.25 1000000 {batch}", f"out-b output 5 1000000 {batch}", f"in-p input 0 1000000 {ptu}", f"out-p output 0 1000000 {ptu}",
            f"image image 0.04 1 {global_}", f"image-hd image/1024x1024/hd 0.08 1 {global_}", f"web web_search_calls 14 1000 {global_}",
            f"code code_interpreter_sessions 0.03 1 {global_}", f"tts characters 15 1000000 {global_}", f"asr audio_seconds 0.0001 1 {global_}",
        ),
        deployments,
    )  # fmt: skip
    details = {"cached_tokens": 600, "cache_write_tokens": 400}
    usage = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
    bill(
        pipeline,
        v2("plain", chat(1000, 100)),
        v2("cached and written", usage | {"input_tokens_details": details}),
        v2("more than there is", usage | {"input_tokens_details": details | {"cache_write_tokens": 401}}),
        v2("reasoning", chat(1000, 100) | {"completion_tokens_details": {"reasoning_tokens": 90, "rejected_prediction_tokens": 10}}),
        v2("priority", chat(1000, 0), serviceTier="priority"),
        v2("downgraded", chat(1000, 0), serviceTier="default", content={"request": {"service_tier": "priority"}}),
        v2("standard", chat(1000, 0), serviceTier="standard"),
        v2("batch", chat(1000, 100), deployment="batch"),
        v2("provisioned", chat(1000, 100), deployment="ptu"),
        v2("spilled over", chat(1000, 100), deployment="ptu", spilloverFrom="ptu", spilloverTo="chat"),
        v2("images", imageCount=3, imageSize="512x512"),
        v2("hd images", imageCount=3, imageSize="1024x1024", imageQuality="hd"),
        v2("images in tokens", {"input_tokens": 10, "output_tokens": 1000, "total_tokens": 1010}, imageCount=3, imageSize="1024x1024"),
        v2("tools", chat(0, 0), toolCalls={"web_search_call": 2, "code_interpreter_session": 1, "function_call": 9}),
        v2("speech", inputCharacters=1000),
        v2("speech in tokens", {"input_tokens": 10, "output_tokens": 1000, "total_tokens": 1010}, inputCharacters=1000),
        v2("whisper", {"type": "duration", "seconds": 12.345678}),
        v2("whisper backwards", {"type": "duration", "seconds": -1}),
        v2("nothing", chat(0, 0)),
        v2("nobody knows", None),
    )
    one_million = Decimal(1_000_000)
    assert costs(pipeline) == {
        "plain": (Decimal("0.0035"), "priced"),
        "cached and written": ((600 * Decimal("1.25") + 400 * Decimal("3.125")) / one_million + Decimal("0.001"), "priced"),
        "reasoning": (Decimal("0.0035"), "priced"),
        "priority": (Decimal("0.00425"), "priced"),
        "downgraded": (Decimal("0.0025"), "priced"),
        "standard": (Decimal("0.0025"), "priced"),
        "batch": (Decimal("0.00175"), "priced"),
        "provisioned": (Decimal(0), "priced"),
        "spilled over": (Decimal("0.0035"), "priced"),
        "images": (Decimal("0.12"), "priced"),
        "hd images": (Decimal("0.24"), "priced"),
        "images in tokens": (Decimal("0.010025"), "priced"),
        "tools": (Decimal("0.058"), "priced"),
        "speech": (Decimal("0.015"), "priced"),
        "speech in tokens": (Decimal("0.010025"), "priced"),
        "whisper": (Decimal("0.0012345678"), "priced"),
        "nothing": (Decimal(0), "priced"),
        "nobody knows": (None, "no_usage"),
    }
    assert rows(pipeline, "SELECT split_part(reason, ':', 1) FROM quarantine ORDER BY 1") == [("conflict",), ("invalid_count",)]
    assert rows(pipeline, "SELECT deployment, quantity FROM daily_billing WHERE price_id = 'in-p'") == [("ptu", 1000)]


def test_contract_markup_and_exchange_rate_by_hand_and_a_change_of_each_at_midnight(tmp_path: Path) -> None:
    pipeline = at_prices(
        tmp_path,
        book("in input 2.50 1000000", "out output 0.01 1000", "web web_search_calls 14 1000 currency=GBP"),
        files={
            "contract_prices": "model,meter,discount,unit_price,unit_tokens,effective_to\n*,input,12.5,,,2026-10-06\n*,output,,0.004,1000,\n",
            "markups": "price_id,markup,effective_from\nin,7,\nout,-100,2026-10-06\n",
            "exchange_rates": "from_currency,to_currency,rate,effective_from,effective_to\nUSD,EUR,0.923456789,,2026-10-06\nUSD,EUR,2,2026-10-06,\n",
        },
        billing_currency="EUR",
    )
    tools = {"toolCalls": {"web_search_call": 1}}
    bill(
        pipeline, v2("a", chat(1_000_000, 1_000_000), DAY, **tools), v2("b", chat(1_000_000, 1_000_000), DAY + dt.timedelta(1), **tools), days=2
    )  # fmt: skip
    select = """SELECT day(usage_date), meter, list_cost, contracted_cost, cost, unit_price, unit_tokens, currency, pricing_currency, exchange_rate,
        pricing_status FROM daily_billing ORDER BY 1, 2"""
    rate = Decimal("0.923456789")
    # 2.50 x 0.923456789 = 2.3086419725, and half of the last place goes to the even digit; 2.50 x 0.875 x 1.07 x 0.923456789 = 2.16146104675…
    listed, contracted, billed = Decimal("2.308641972"), Decimal("2.020061726"), Decimal("2.161466047")
    assert rows(pipeline, select) == [
        (5, "input", listed, contracted, billed, billed, 1_000_000, "EUR", "USD", rate, "priced"),
        (
            5,
            "output",
            Decimal("9.23456789"),
            Decimal("3.693827156"),
            Decimal("3.693827156"),
            Decimal("3.693827156"),
            1_000_000,
            "EUR",
            "USD",
            rate,
            "priced",
        ),
        (5, "web_search_calls", None, None, None, None, None, None, "GBP", None, "unpriced"),
        (6, "input", Decimal(5), Decimal(5), Decimal("5.35"), Decimal("5.35"), 1_000_000, "EUR", "USD", Decimal(2), "priced"),
        (6, "output", Decimal(20), Decimal(8), Decimal(0), Decimal(0), 1_000_000, "EUR", "USD", Decimal(2), "priced"),
        (6, "web_search_calls", None, None, None, None, None, None, "GBP", None, "unpriced"),
    ]
    assert rows(pipeline, "SELECT usage_date, sum(unpriced) FROM daily_quality GROUP BY 1 HAVING sum(unpriced) = 1") != []
    assert costs(pipeline)["a"] == (billed + Decimal("3.693827156"), "unpriced")


def test_a_contract_for_images_applies_to_their_size_and_quality_and_the_one_that_says_most_wins(tmp_path: Path) -> None:
    contract = "meter,unit_price,unit_tokens\nimage,1,1\nimage/1024x1024/hd,3,1\nimage/1024x1024,2,1\n"
    pipeline = at_prices(tmp_path, book("image image 9 1"), files={"contract_prices": contract, "markups": "meter,markup\nimage/512x512,50\n"})
    kinds = [(None, None), ("512x512", None), ("1024x1024", None), ("1024x1024", "standard"), ("1024x1024", "hd"), ("1024x10240", "hd")]
    bill(pipeline, *(v2(f"{size} {quality}", imageCount=1, imageSize=size, imageQuality=quality) for size, quality in kinds))
    assert [cost for cost, _ in (costs(pipeline)[f"{size} {quality}"] for size, quality in kinds)] == [1, Decimal("1.5"), 2, 2, 3, 1]
    assert rows(pipeline, "SELECT DISTINCT list_cost, price_id FROM daily_billing") == [(9, "image")]


MOST = 10**12


def test_a_contract_for_one_price_goes_before_any_pattern(tmp_path: Path) -> None:
    contract = "price_id,model,deployment_sku,meter,discount\nin,,,,50\n,*,GlobalStandard,input,10\n,gpt-4o,GlobalStandard,input,20\n"
    deployments = f"{DEPLOYMENTS.splitlines()[0]}\n,,,,,,gpt-4o,2024-11-20,GlobalStandard,eastus,,\n"
    pipeline = at_prices(tmp_path, book("in input 2 1000000", "out output 10 1000000"), deployments, files={"contract_prices": contract})
    bill(pipeline, v2("a", chat(1_000_000, 0)))
    assert costs(pipeline) == {"a": (Decimal(1), "priced")}


def test_a_contract_price_leaves_provisioned_tokens_free(tmp_path: Path) -> None:
    deployments = f"{DEPLOYMENTS.splitlines()[0]}\n,,,,ptu,,,,GlobalProvisionedManaged,,,\n,,,,chat,,,,GlobalStandard,,,\n"
    prices_ = book("in input 2 1000000", "ptu input 0 1000000 deployment_sku=GlobalProvisionedManaged")
    pipeline = at_prices(tmp_path, prices_, deployments, files={"contract_prices": "meter,unit_price,unit_tokens\ninput,1,1000000\n"})
    bill(pipeline, v2("paid", chat(1_000_000, 0), deployment="chat"), v2("provisioned", chat(1_000_000, 0), deployment="ptu"))
    assert costs(pipeline) == {"paid": (Decimal(1), "priced"), "provisioned": (Decimal(0), "priced")}


def test_the_most_tokens_at_the_highest_prices_are_exact(tmp_path: Path) -> None:
    highest, most = Decimal("99999.999999999"), {"prompt_tokens": MOST, "completion_tokens": MOST}
    pipeline = at_prices(tmp_path, book(f"in input {highest} 1", f"out output {highest} 1", f"asr audio_seconds {highest} 1"))
    bill(pipeline, v2("tokens", most), v2("again", most), v2("seconds", {"type": "duration", "seconds": MOST - 1}))
    assert pipeline.held() == {}
    assert costs(pipeline) == {
        "tokens": (2 * MOST * highest, "priced"), "again": (2 * MOST * highest, "priced"), "seconds": ((MOST - 1) * highest, "priced")
    }  # fmt: skip
    assert rows(pipeline, "SELECT sum(cost) FROM daily_billing") == [(4 * MOST * highest + (MOST - 1) * highest,)]


@pytest.mark.parametrize(
    ("meter", "price", "limit"), [("input", "999 1", "1,000,000,000"), ("audio_seconds", "99999 1", "100,000")]
)  # fmt: skip
def test_a_price_that_a_markup_makes_too_large_holds_its_days_with_a_reason_and_no_others(tmp_path: Path, meter: str, price: str, limit: str) -> None:
    markups = "markup,effective_from\n5,2026-10-06\n"
    pipeline = at_prices(tmp_path, book(f"high {meter} {price}"), files={"markups": markups})
    usage = chat(10, 0) if meter == "input" else {"type": "duration", "seconds": 10}
    bill(pipeline, v2("before", usage), v2("after", usage, NOON + dt.timedelta(1)), days=2)
    assert list(costs(pipeline)) == ["before"]
    [(day, reason)] = pipeline.held()["enriched_usage"].items()
    assert day == dt.date(2026, 10, 6)
    assert reason.startswith("price high with its contract, markup and exchange rate: ") and reason.endswith(f"must be below {limit}")
    # what a person does about it is enough
    (tmp_path / "reference/markups.csv").write_text("markup,effective_from\n0,2026-10-06\n")
    run_all(pipeline, DAY.date(), (DAY + dt.timedelta(1)).date())
    assert pipeline.held() == {}
    assert sorted(costs(pipeline)) == ["after", "before"]


def test_a_price_too_large_for_a_meter_that_nobody_uses_holds_nothing(tmp_path: Path) -> None:
    pipeline = at_prices(tmp_path, book("in input 1 1", "code code_interpreter_sessions 9999 1"), files={"markups": "markup\n5\n"})
    bill(pipeline, v2("r", chat(10, 0)))
    assert pipeline.held() == {}
    assert costs(pipeline) == {"r": (Decimal("10.5"), "priced")}


@pytest.mark.slow
@pytest.mark.parametrize("files", [100, 25])
def test_sums_that_do_not_fit_hold_the_day_with_a_reason(tmp_path: Path, files: int) -> None:
    """A million times 10^12 tokens do not fit DECIMAL(18,0); 250,050 requests on five meters at 99,999 each do, but their cost not DECIMAL(38,15)."""
    meters = ("input", "output", "characters", *TOOLS)
    pipeline = at_prices(tmp_path, book(*(f"{meter} {meter} 99999.999999999 1" for meter in meters), "asr audio_seconds 99999 1"))
    bill(pipeline, v2("next day", chat(10, 0), DAY + dt.timedelta(1, hours=1)), days=2)
    before = rows(pipeline, "SELECT * FROM daily_billing")
    tools = dict.fromkeys(TOOLS.values(), MOST)
    usage = {"prompt_tokens": MOST, "completion_tokens": MOST, "seconds": MOST - 1}
    huge = v2("", usage, toolCalls=tools, inputCharacters=MOST) if files == 25 else v2("", chat(MOST, 0))
    send(pipeline, [huge] * 10_002, NOON)
    for partition in range(1, files):
        target = Path(pipeline.settings.capture_url, blob_name(NOON, str(partition)))
        target.parent.mkdir(parents=True)
        target.hardlink_to(Path(pipeline.settings.capture_url, blob_name(NOON)))
    run_all(pipeline, DAY.date(), (DAY + dt.timedelta(1)).date())
    [(day, reason)] = [held for reasons in pipeline.held().values() for held in reasons.items()]
    assert day == DAY.date() and reason.startswith("a quantity, price or cost of the day is too large for its column: ")
    assert rows(pipeline, "SELECT * FROM daily_billing") == before


# --- fixed costs beside usage


CAPACITY = "deployment,ptus,hourly_price,currency,idle_to,method,shares,effective_from,effective_to,deployment_sku,capacity_id\n"
PTU = "GlobalProvisionedManaged"
TWO_DAYS = "2026-10-05,2026-10-07"
FIXED = """SELECT day(usage_date), meter, cost_center, subscription_id, deployment, quantity, cost, currency, pricing_currency, exchange_rate
    FROM daily_billing WHERE meter IN ('provisioned_capacity', 'idle_capacity', 'unused_reservation') ORDER BY ALL"""


def shared(root: Path, files: dict[str, str], **given_: Any) -> Pipeline:
    """Two cost centres on one provisioned deployment from 10 to 11, and one of them on a standard one; the day after nobody calls."""
    deployments = f"{DEPLOYMENTS.splitlines()[0]}\n,,,,ptu,,,,{PTU},,,\n,,,,chat,,,,GlobalStandard,,,\n"
    zero = [f"{meter}-p {meter} 0 1000000 deployment_sku={PTU}" for meter in ("input", "cached_input", "output")]
    pipeline = at_prices(root, book("in input 2.50 1000000", "out output 10 1000000", *zero), deployments, files, **given_)
    ten = DAY + dt.timedelta(hours=10)
    bill(
        pipeline,
        v2("sales", chat(200, 25), ten, deployment="ptu"),
        v2("hr", chat(1100, 0, cached=1000), ten, deployment="ptu", subscriptionId="hr"),
        v2("spilled over", chat(1_000_000, 0), ten, deployment="ptu", spilloverFrom="ptu", spilloverTo="chat", subscriptionId="hr"),
        days=3,
    )
    assert pipeline.held() == {}
    return pipeline


def test_a_provisioned_deployment_is_shared_by_those_who_used_it_and_its_tokens_cost_nothing(tmp_path: Path) -> None:
    pipeline = shared(tmp_path, {"capacity": f"{CAPACITY}ptu,100,1.00,USD,,,,{TWO_DAYS},{PTU},ptu-1\n"})
    # 200 + 4 x 25 units of Sales and 100 uncached ones of HR between 10 and 11
    assert rows(pipeline, FIXED) == [
        (5, "idle_capacity", "UNALLOCATED", None, "ptu", 2300, 2300, "USD", "USD", None),
        (5, "provisioned_capacity", "CC-1", "sales", "ptu", 75, 75, "USD", "USD", None),
        (5, "provisioned_capacity", "CC-2", "hr", "ptu", 25, 25, "USD", "USD", None),
        (6, "idle_capacity", "UNALLOCATED", None, "ptu", 2400, 2400, "USD", "USD", None),
    ]
    assert costs(pipeline) == {"sales": (0, "priced"), "hr": (0, "priced"), "spilled over": (Decimal("2.5"), "priced")}
    assert rows(pipeline, "SELECT cost_center, sum(cost) FROM daily_billing GROUP BY 1 ORDER BY 1") == [
        ("CC-1", 75), ("CC-2", Decimal("27.5")), ("UNALLOCATED", 4700)
    ]  # fmt: skip
    # a day without requests is no day of usage
    assert rows(pipeline, "SELECT day(usage_date), sum(requests) FROM daily_usage GROUP BY 1") == [(5, 3)]
    assert rows(pipeline, "SELECT day(usage_date), parsed, accepted FROM daily_quality ORDER BY 1") == [(5, 3, 3), (6, 0, 0)]
    # a row that is taken back leaves nothing behind
    (tmp_path / "reference/capacity.csv").write_text(CAPACITY)
    run_all(pipeline, DAY.date(), LAST_DAY.date())
    assert rows(pipeline, FIXED) == [] and rows(pipeline, "SELECT sum(cost) FROM daily_billing") == [(Decimal("2.5"),)]


def test_fixed_costs_are_converted_and_conserved_to_the_last_place(tmp_path: Path) -> None:
    files = {
        "capacity": f"{CAPACITY}ptu,7,1.234567891,USD,CC-9,shares,CC-1=33.333;CC-2=33.333,{TWO_DAYS},,odd\n",
        "reservations": "reservation_id,deployment_sku,ptus,term_price,term,currency,effective_from,effective_to\n"
        f"r,{PTU},10,100.01,1-month,EUR,2026-10-05,2026-10-07\n",
        "exchange_rates": "from_currency,to_currency,rate\nUSD,EUR,0.923456789\n",
    }
    pipeline = shared(tmp_path, files, billing_currency="EUR")
    # 1.234567891 x 0.923456789 = 1.140070100… rounded to 9 places
    with decimal.localcontext(traps=[]):
        hourly = (Decimal("1.234567891") * Decimal("0.923456789")).quantize(Decimal("1e-9"), decimal.ROUND_HALF_EVEN)
        share = (7 * hourly * Decimal("0.33333")).quantize(Decimal("1e-15"), decimal.ROUND_HALF_EVEN)
    select = """SELECT day(usage_date), meter = 'unused_reservation', sum(cost), sum(quantity), min(currency), min(pricing_currency), min(exchange_rate)
        FROM daily_billing WHERE unit_price IS NULL AND pricing_status = 'priced' GROUP BY ALL ORDER BY ALL"""
    capacity = (7 * 24 * hourly, 7 * 24, "EUR", "USD", Decimal("0.923456789"))
    # 100.01 / 31, the first days of a term take what is left
    reserved = (Decimal("3.226129032258065"), 240, "EUR", "EUR", None)
    assert rows(pipeline, select) == [(5, False, *capacity), (5, True, *reserved), (6, False, *capacity), (6, True, *reserved)]
    assert {row[6] for row in rows(pipeline, FIXED) if row[2] in ("CC-1", "CC-2")} == {24 * share}


def test_a_fixed_cost_without_an_exchange_rate_holds_its_day(tmp_path: Path) -> None:
    files = {"capacity": f"{CAPACITY}ptu,1,1,USD,,,,2026-10-06,2026-10-07,,\n"}
    pipeline = at_prices(tmp_path, book("in input 1 1 currency=EUR", "out output 1 1 currency=EUR"), files=files, billing_currency="EUR")
    bill(pipeline, v2("r", chat(1, 1)), days=2)
    assert pipeline.held() == {
        "daily_billing": {dt.date(2026, 10, 6): "fixed costs are in USD, and exchange_rates.csv has no rate to EUR on the day"}
    }
    assert rows(pipeline, "SELECT day(usage_date), sum(cost) FROM daily_billing GROUP BY 1") == [(5, 2)]


def test_fixed_costs_too_large_for_their_column_hold_the_day_and_no_other(tmp_path: Path) -> None:
    files = {
        "capacity": f"{CAPACITY}ptu,9999999,999999999,USD,,,,2026-10-05,2026-10-06,,a\nptu,1,1,USD,,,,2026-10-06,2026-10-07,,b\n",
        "exchange_rates": "from_currency,to_currency,rate\nUSD,EUR,999999999\n",
    }
    pipeline = at_prices(tmp_path, book("in input 1 1 currency=EUR", "out output 1 1 currency=EUR"), files=files, billing_currency="EUR")
    bill(pipeline, v2("r", chat(1, 1)), days=2)
    [(day, reason)] = pipeline.held()["daily_billing"].items()
    assert day == DAY.date() and reason.startswith("a quantity, price or cost of the day is too large for its column: ")
    assert rows(pipeline, "SELECT day(usage_date), cost FROM daily_billing WHERE unit_price IS NULL") == [(6, 24 * 999999999)]


def test_fixed_costs_are_billed_up_to_today_and_not_beyond(tmp_path: Path) -> None:
    today = dt.datetime.now(dt.UTC).date()
    yesterday = today - dt.timedelta(1)
    pipeline = at_prices(tmp_path, HEADER, files={"capacity": f"{CAPACITY}ptu,1,1,USD,,,,{yesterday},,,\n"})
    run_all(pipeline, yesterday - dt.timedelta(1), today + dt.timedelta(1))
    assert rows(pipeline, "SELECT usage_date, sum(cost) FROM daily_billing GROUP BY 1 ORDER BY 1") == [(yesterday, 24), (today, 24)]
