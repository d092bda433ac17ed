"""The ledger against an independent computation: the design's rules once more, in plain Python and `Decimal`, over random traffic and price books."""

import csv
import dataclasses
import datetime as dt
import decimal
import io
import os
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
    CHAT,
    COST_CENTERS,
    DAY,
    DEPLOYMENTS,
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

FIRST, LAST = (DAY - dt.timedelta(1)).date(), (DAY + dt.timedelta(5)).date()
HOUR = dt.timedelta(hours=1)
EMBED = "Get a vector representation of a given input"

# --- what is random -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int | None
    cached: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls, in the words of one of the two event contracts."""

    contract: str
    subscription_id: str
    operation: str = CHAT
    deployment: str | None = None
    reported_model: str | None = None


@dataclasses.dataclass(frozen=True)
class Sent:
    """One event as a gateway sent it. An event time of None is one that nobody can read."""

    request_id: str | None
    caller: Caller
    event_time: dt.datetime | None
    enqueued_at: dt.datetime
    usage: Usage | None
    partition_id: str

    def body(self) -> bytes:
        at, usage, caller = self.event_time, self.usage, self.caller
        if caller.contract == "seed_policy":
            tokens: dict[str, Any] | None = None
            if usage:
                details = {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write}
                tokens = {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": usage.total}
                tokens |= {"prompt_tokens_details": details, "completion_tokens_details": {"reasoning_tokens": usage.reasoning}}
                tokens = {name: value for name, value in tokens.items() if value is not None}
            who = {"SubscriptionId": caller.subscription_id, "OperationName": caller.operation}
            return seed_event(self.request_id, "never" if at is None else at, tokens, **who)
        counts = (usage.prompt, str(usage.completion), usage.total) if usage else (1, 0, 1)
        changes = {"subscriptionId": caller.subscription_id, "model": caller.reported_model, "deploymentName": caller.deployment}
        changes |= {"cachedTokens": usage.cached if usage else None, "id": self.request_id or "NA"}
        return hub_event("", at or DAY, *counts, **changes | ({} if at else {"timestamp": "never"}))


CALLERS = [
    Caller("seed_policy", "sales"),
    Caller("seed_policy", "sales", EMBED),
    Caller("seed_policy", "hr"),
    Caller("seed_policy", "nobody"),
    Caller("ai_hub_gateway", "hr", deployment="chat", reported_model="gpt-4o-2024-11-20"),
    Caller("ai_hub_gateway", "hr", deployment="chat", reported_model="gpt-4o-mini"),
    Caller("ai_hub_gateway", "sales", deployment="other", reported_model="gpt-4o-mini-2024-07-18"),
    Caller("ai_hub_gateway", "nobody", deployment="chat", reported_model="mystery"),
]
DEPLOYMENT_ROWS = f"""{DEPLOYMENTS.splitlines()[0]}
apim,sales,,,,,gpt-4o,2024-11-20,GlobalStandard,eastus,2024-01-01,2026-10-06
apim,sales,*,,,,gpt-4o-mini,2024-07-18,Standard,westeurope,2026-10-06,
apim,sales,,Get a vector representation of a given input,,,text-embedding-3-small,1,GlobalStandard,eastus,,
apim,nobody,,,,,gpt-4o,2024-11-20,Standard,eastus,,2026-10-07
hub,,,,chat,,,,GlobalStandard,eastus,,
"""
OWNER_ROWS = f"""{COST_CENTERS.splitlines()[0]}
sales,,,Sales,CC-1,Commerce,,2026-10-06
sales,,,Growth,CC-9,Commerce,2026-10-06,
hr,,,People,CC-2,Staff,,
hr,AI-HR,,People AI,CC-3,Staff,2026-10-06,2026-10-07
"""
MODELS = [("gpt-4o", "2024-11-20"), ("gpt-4o-mini", "2024-07-18"), ("text-embedding-3-small", "1"), ("*", "*")]
METERS = ("input", "cached_input", "cache_write", "output")
PRICE_COLUMNS = PRICE_BOOK.splitlines()[0].split(",")
_IN_FORCE = [[("", "")], [("2024-01-01", "2026-10-06"), ("2026-10-06", "")], [("2026-10-06", "")], [("", "2026-10-05"), ("2026-10-07", "")]]


@st.composite
def price_books(draw: st.DrawFn) -> str:
    """Rows from general to exact for each model, so that no two tie, each with prices that begin, change and end at midnights."""
    lines: list[dict[str, Any]] = []
    for model, version in MODELS:
        levels = [{"model": model}]
        if model != "*":
            levels += [{"model_version": version}, {"deployment_sku": "GlobalStandard"}, {"region": "eastus", "context_band": "short"}]
        matching = dict.fromkeys(PRICE_COLUMNS, "*")
        for exact in levels:
            matching |= exact
            for meter in draw(st.lists(st.sampled_from(METERS), unique=True, max_size=3)):
                for start, end in draw(st.sampled_from(_IN_FORCE)):
                    price = Decimal(draw(st.integers(0, 10**12 - 1))).scaleb(-9)
                    lines.append(
                        matching
                        | {"price_id": f"p{len(lines)}", "meter": meter, "unit_price": f"{price:f}", "unit_tokens": 10 ** draw(st.integers(0, 6))}
                        | {"currency": "USD", "effective_from": start, "effective_to": end, "meter_id": "", "source": "random"}
                    )
    text = io.StringIO()
    writer = csv.DictWriter(text, PRICE_COLUMNS)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


@st.composite
def usages(draw: st.DrawFn) -> Usage | None:
    kind = draw(st.sampled_from(["chat", "chat", "chat", "embedding", "zero", "none"]))
    if kind == "none":
        return None
    if kind == "zero":
        return Usage(0, 0)
    prompt, completion = draw(st.integers(2, 300_000)), draw(st.integers(0, 5_000))
    if kind == "embedding":
        return Usage(prompt, None, total=prompt)
    cached = draw(st.none() | st.integers(0, prompt))
    cache_write = draw(st.none() | st.integers(0, prompt - (cached or 0)))
    reasoning = draw(st.none() | st.integers(0, completion))
    return Usage(prompt, completion, cached, cache_write, reasoning, draw(st.sampled_from([None, prompt + completion, prompt + completion + 3])))


@st.composite
def traffic(draw: st.DrawFn) -> list[Sent]:
    """Requests of three days, some sent several times: later, elsewhere, with other or no usage, stamped anew or unreadably."""
    sent: list[Sent] = []
    for number in range(draw(st.integers(1, 9))):
        caller, usage = draw(st.sampled_from(CALLERS)), draw(usages())
        at = DAY + dt.timedelta(seconds=draw(st.sampled_from([0, 86_399, 86_400, 100_000, 172_799]) | st.integers(0, 3 * 86_400 - 1)))
        request_id = draw(st.sampled_from([f"r{number}"] * 4 + [None]))
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            enqueued_at = at + draw(st.sampled_from([dt.timedelta(0), dt.timedelta(seconds=3), 0.75 * HOUR, 7 * HOUR, 30 * HOUR]))
            event_time = draw(st.sampled_from([at] * 5 + [enqueued_at, None]))
            copy_usage = draw(st.sampled_from([usage] * 4 + [None, Usage(11, 7, total=18)]))
            if caller.contract == "ai_hub_gateway" and copy_usage:
                # this contract has no field for these
                copy_usage = dataclasses.replace(copy_usage, completion=copy_usage.completion or 0, cache_write=None, reasoning=None)
            sent.append(Sent(request_id, caller, event_time, enqueued_at, copy_usage, draw(st.sampled_from("01"))))
    return sent


# --- the independent computation ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """An event with the coordinates that the hub gave it."""

    sent: Sent
    sequence_number: int

    @property
    def identity(self) -> str:
        return self.sent.request_id or f"ns/hub/{self.sent.partition_id}/{self.sequence_number}"

    @property
    def time(self) -> dt.datetime:
        return self.sent.event_time or self.sent.enqueued_at

    @property
    def rank(self) -> tuple[Any, ...]:
        return self.sent.usage is None, self.sent.enqueued_at, int(self.sent.partition_id), self.sequence_number

    @property
    def tokens(self) -> dict[str, int | None] | None:
        usage = self.sent.usage
        if usage is None:
            return None
        completion = usage.completion if usage.completion is not None else usage.total - usage.prompt
        return {
            "prompt_tokens": usage.prompt, "cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write, "completion_tokens": completion,
            "reasoning_tokens": usage.reasoning, "total_tokens": usage.prompt + completion if usage.total is None else usage.total,
        }  # fmt: skip

    def captured(self) -> Captured:
        return Captured(self.sent.body(), self.sent.enqueued_at, self.sequence_number, self.sent.partition_id)


def accept(sent: Iterable[Sent]) -> list[Record]:
    """The hub numbers events per partition in the order it accepts them."""
    counts: Counter[str] = Counter()
    records = []
    for event in sorted(sent, key=lambda e: e.enqueued_at):
        counts[event.partition_id] += 1
        records.append(Record(event, counts[event.partition_id]))
    return records


PAYER = ("gateway", "subscription_id", "product", "application")
OWNER = ("team", "cost_center", "department")
DEPLOYMENT = ("deployment", "model", "model_version", "deployment_sku", "region", "service_tier")
TOKENS = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens", "reasoning_tokens", "total_tokens")
DAILY_USAGE = ("usage_date", *PAYER, *OWNER, *DEPLOYMENT, "requests", *TOKENS, "cost", "currency", "pricing_status")
DAILY_BILLING = (
    "usage_date", "billing_period", *PAYER, *OWNER, *DEPLOYMENT, "meter", "quantity", "unit_price", "unit_tokens", "price_id", "cost", "currency",
    "pricing_status", "usage_source", "charge_class", "correction_of",
)  # fmt: skip
ENRICHED = (
    "usage_date", "request_id", "event_time", "time_source", "contract", *PAYER, *OWNER, "operation", "reported_model", *DEPLOYMENT, "context_band",
    *TOKENS, "usage_source", "cost", "currency", "pricing_status", "conflict", "partition_id", "sequence_number", "enqueued_at",
)  # fmt: skip
QUALITY = ("usage_date", "parsed", "accepted", "duplicates", "conflicts", "no_usage", "unpriced", "unallocated", "estimated")


def best(table: Sequence[dict[str, str]], columns: Iterable[str], event: dict[str, Any], day: dt.date) -> dict[str, str] | None:
    """The row in force with the most exact matches."""
    found: dict[int, dict[str, str]] = {}
    for row in table:
        exact = [column for column in columns if row[column] not in ("", "*")]
        in_force = row["effective_from"] <= str(day) and (not row["effective_to"] or str(day) < row["effective_to"])
        if in_force and all(row[column] == event[column] for column in exact):
            assert len(exact) not in found, "the random reference data has a tie"
            found[len(exact)] = row
    return found[max(found)] if found else None


class Expected:
    """What must be published for these records."""

    def __init__(self, records: Sequence[Record], price_book: str) -> None:
        self._prices, self._deployments, self._owners = (list(csv.DictReader(io.StringIO(t))) for t in (price_book, DEPLOYMENT_ROWS, OWNER_ROWS))
        copies: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            copies[record.identity].append(record)
        self.requests = [self._request(sorted(group, key=lambda r: r.rank)) for group in copies.values()]
        self.quality = {day: self._quality(day, records) for day in {record.time.date() for record in records}}

    def _request(self, copies: list[Record]) -> dict[str, Any]:
        record = copies[0]
        sent, day = record.sent, record.time.date()
        hub = sent.caller.contract == "ai_hub_gateway"
        event: dict[str, Any] = {
            "usage_date": day, "request_id": record.identity, "event_time": record.time, "time_source": "event" if sent.event_time else "enqueued",
            "contract": sent.caller.contract, "gateway": "hub" if hub else "apim", "subscription_id": sent.caller.subscription_id,
            "product": "AI-HR" if hub else None, "application": "app-1" if hub else None, "operation": sent.caller.operation,
            "reported_model": sent.caller.reported_model, "deployment": sent.caller.deployment, "service_tier": "default",
            "usage_source": "reported" if record.tokens else None, "partition_id": sent.partition_id, "sequence_number": record.sequence_number,
            "enqueued_at": sent.enqueued_at, **(record.tokens or dict.fromkeys(TOKENS)),
            "conflict": len({tuple(copy.tokens.values()) for copy in copies if copy.tokens}) > 1,
        }  # fmt: skip
        name, version = sent.caller.reported_model, None
        if name and name[-10:].count("-") == 2 and name[-10:].replace("-", "").isdigit():
            name, version = name[:-11], name[-10:]
        reported = {"model": name, "model_version": version}
        deployed = best(self._deployments, (*PAYER[:3], "operation", "deployment", "reported_model"), event, day) or {}
        event |= {c: deployed.get(c) or reported.get(c) for c in ("model", "model_version", "deployment_sku", "region")}
        owner = best(self._owners, PAYER[1:], event, day)
        event |= {column: owner[column] if owner else "UNALLOCATED" for column in OWNER}
        event["context_band"] = "long" if (event["prompt_tokens"] or 0) > 272_000 else "short"
        return event | self._charge(event, day)

    def _charge(self, event: dict[str, Any], day: dt.date) -> dict[str, Any]:
        if event["usage_source"] is None:
            return {"lines": [], "cost": None, "currency": None, "pricing_status": "no_usage"}
        cached, written = event["cached_tokens"] or 0, event["cache_write_tokens"] or 0
        quantities = {"input": event["prompt_tokens"] - cached - written, "cached_input": cached, "cache_write": written}
        quantities["output"] = event["completion_tokens"]
        lines = [self._line(event, meter, quantity, day) for meter, quantity in quantities.items() if quantity]
        # a request of no tokens has no line; its input price says whether it is priced
        judged = lines or [self._line(event, "input", 0, day)]
        costs = [line["cost"] for line in judged if line["cost"] is not None]
        status = next(s for s in ("unpriced", "fallback", "priced") if any(line["pricing_status"] == s for line in judged))
        return {"lines": lines, "cost": sum(costs) if costs else None, "currency": "USD" if costs else None, "pricing_status": status}

    def _line(self, event: dict[str, Any], meter: str, quantity: int, day: dt.date) -> dict[str, Any]:
        matching = ("model", "model_version", "deployment_sku", "region", "service_tier", "context_band", "meter")
        row, status = best(self._prices, matching, event | {"meter": meter}, day), "priced"
        if row is None and meter == "cached_input":
            row, status = best(self._prices, matching, event | {"meter": "input"}, day), "fallback"
        if row is None:
            return {"meter": meter, "quantity": quantity, "pricing_status": "unpriced"} | dict.fromkeys(
                ("unit_price", "unit_tokens", "price_id", "cost", "currency")
            )
        price, unit = Decimal(row["unit_price"]), int(row["unit_tokens"])
        cost = (quantity * price).scaleb(1 - len(str(unit)))
        priced = {"unit_price": price, "unit_tokens": unit, "price_id": row["price_id"], "cost": cost, "currency": row["currency"]}
        return {"meter": meter, "quantity": quantity, "pricing_status": status} | priced

    def _quality(self, day: dt.date, records: Sequence[Record]) -> tuple[Any, ...]:
        mine = [request for request in self.requests if request["usage_date"] == day]
        parsed = sum(record.time.date() == day for record in records)
        statuses = Counter(request["pricing_status"] for request in mine)
        conflicts, ownerless = sum(r["conflict"] for r in mine), sum(r["team"] == "UNALLOCATED" for r in mine)
        return (day, parsed, len(mine), parsed - len(mine), conflicts, statuses["no_usage"], statuses["unpriced"], ownerless, 0)

    def enriched_usage(self) -> Counter[tuple[Any, ...]]:
        return Counter(tuple(request[column] for column in ENRICHED) for request in self.requests)

    def daily_usage(self) -> Counter[tuple[Any, ...]]:
        key = ("usage_date", *PAYER, *OWNER, *DEPLOYMENT, "currency", "pricing_status")
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for request in self.requests:
            groups[tuple(request[column] for column in key)].append(request)
        lines = []
        for group in groups.values():
            costs = [request["cost"] for request in group if request["cost"] is not None]
            sums = {column: sum(request[column] or 0 for request in group) for column in TOKENS}
            sums |= {"requests": len(group), "cost": sum(costs) if costs else None}
            lines.append(tuple((group[0] | sums)[column] for column in DAILY_USAGE))
        return Counter(lines)

    def daily_billing(self) -> Counter[tuple[Any, ...]]:
        key = ("usage_date", *PAYER, *OWNER, *DEPLOYMENT, "meter", "price_id", "pricing_status")
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for request in self.requests:
            for line in request["lines"]:
                groups[tuple((request | line)[column] for column in key)].append(request | line)
        lines = []
        for group in groups.values():
            line = group[0] | {"charge_class": None, "correction_of": None, "billing_period": f"{group[0]['usage_date']:%Y-%m}"}
            line["quantity"] = sum(part["quantity"] for part in group)
            line["cost"] = None if line["price_id"] is None else sum(part["cost"] for part in group)
            lines.append(tuple(line[column] for column in DAILY_BILLING))
        return Counter(lines)


# --- running it -----------------------------------------------------------------------------------------------------------------

Layout = dict[tuple[dt.datetime, str], list[Record]]


def hourly(records: Iterable[Record]) -> Layout:
    """Capture as it is: each partition's events in a file per hour in which the hub accepted them."""
    files: Layout = defaultdict(list)
    for record in records:
        files[record.sent.enqueued_at.replace(minute=0, second=0), record.sent.partition_id].append(record)
    return files


def store(pipeline: Pipeline, layout: Layout) -> None:
    for (window_start, partition_id), records in layout.items():
        put(pipeline.settings.capture_url, blob_name(window_start, partition_id), capture_file(record.captured() for record in records))


def published(pipeline: Pipeline, table: str, columns: Iterable[str] = ("*",)) -> Counter[tuple[Any, ...]]:
    return Counter(rows(pipeline, f"SELECT {', '.join(columns)} FROM {table}"))


def billed(root: Path, layout: Layout, price_book: str) -> Pipeline:
    pipeline = installation(root, reference_dir=str(reference(root / "reference", price_book, DEPLOYMENT_ROWS, OWNER_ROWS)))
    store(pipeline, layout)
    run_all(pipeline, FIRST, LAST)
    assert pipeline.held() == {}
    return pipeline


def conserved(pipeline: Pipeline) -> bool:
    """Rule 1, from the published tables alone."""
    tokens = "CAST(sum(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)) AS BIGINT)"
    enriched = rows(pipeline, f"SELECT usage_date, {tokens}, coalesce(sum(cost), 0) FROM enriched_usage GROUP BY 1 ORDER BY 1")
    daily = rows(pipeline, f"SELECT usage_date, {tokens}, coalesce(sum(cost), 0) FROM daily_usage GROUP BY 1 ORDER BY 1")
    lines = rows(pipeline, "SELECT usage_date, CAST(sum(quantity) AS BIGINT), coalesce(sum(cost), 0) FROM daily_billing GROUP BY 1 ORDER BY 1")
    [(wrong,)] = rows(pipeline, "SELECT count(*) FROM daily_quality WHERE parsed <> accepted + duplicates")
    return daily == enriched and lines == [row for row in enriched if row[1]] and wrong == 0


# an example takes half a second, so shrinking one that fails would take minutes; the differing rows tell enough
some = settings(max_examples=15, deadline=None, phases=(Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Python's 28 digits would round what 38 hold."""
    with decimal.localcontext(prec=80, traps=[decimal.Inexact]):
        yield


@some
@given(traffic(), price_books())
def test_published_tables_equal_an_independent_computation(sent: list[Sent], price_book: str) -> None:
    records = accept(sent)
    expected = Expected(records, price_book)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = billed(Path(folder), hourly(records), price_book)
        assert published(pipeline, "daily_usage") == expected.daily_usage()
        assert published(pipeline, "daily_billing", DAILY_BILLING) == expected.daily_billing()
        assert published(pipeline, "enriched_usage", ENRICHED) == expected.enriched_usage()
        assert published(pipeline, "daily_quality", QUALITY) == Counter(expected.quality.values())
        copies = Counter(record.identity for record in records)
        assert dict(rows(pipeline, "SELECT request_id, copies FROM enriched_usage")) == copies
        assert conserved(pipeline)


@pytest.mark.slow
@some
@given(traffic(), price_books(), st.randoms(use_true_random=False))
def test_other_files_in_another_order_give_the_same_bill(sent: list[Sent], price_book: str, rng: random.Random) -> None:
    records = accept(sent)
    expected = Expected(records, price_book)
    # every record in one or two files of its partition, in any order, captured in any hour on any date
    layout: Layout = defaultdict(list)
    for record in rng.sample(records, len(records)):
        for _ in range(rng.choice((1, 1, 2))):
            layout[DAY + rng.choice((-20, 0, 1, 30, 31, 90)) * HOUR, record.sent.partition_id].append(record)
    # the files one after the other in any order, with a run in between or all at once
    files = rng.sample(sorted(layout.items(), key=lambda file: file[0]), len(layout))
    stop = rng.randrange(len(files))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = billed(Path(folder), dict(files[stop:]), price_book)
        if stop:
            store(pipeline, dict(files[:stop]))
            run_all(pipeline, FIRST, LAST)
        assert published(pipeline, "daily_usage") == expected.daily_usage()
        assert published(pipeline, "daily_billing", DAILY_BILLING) == expected.daily_billing()
        assert published(pipeline, "enriched_usage", ENRICHED) == expected.enriched_usage()
        assert conserved(pipeline)
        captured = Counter(record.time.date() for records in layout.values() for record in records)
        assert dict(rows(pipeline, "SELECT usage_date, parsed FROM daily_quality")) == captured


# --- single rules ---------------------------------------------------------------------------------------------------------------


def capture(pipeline: Pipeline, bodies: Iterable[bytes], at: dt.datetime = DAY + HOUR, partition_id: str = "0", first: int = 1) -> None:
    events = [Captured(body, at, number, partition_id) for number, body in enumerate(bodies, first)]
    put(pipeline.settings.capture_url, blob_name(at, partition_id), capture_file(events))


def test_price_changes_at_midnight_utc(tmp_path: Path) -> None:
    old, new = "in-1,gpt-4o,*,*,*,*,*,input,2.50,1000000,USD,2024-01-01,2026-10-06", "in-2,gpt-4o,*,*,*,*,*,input,4,1000000,USD,2026-10-06,"
    book = PRICE_BOOK.replace("in-1,gpt-4o,*,*,*,*,*,input,2.50,1000000,USD,2024-01-01,", f"{old},,\n{new}")
    pipeline = installation(tmp_path, reference_dir=str(reference(tmp_path / "reference", book)))
    midnight = DAY + dt.timedelta(1)
    capture(pipeline, [seed_event("before", midnight - dt.timedelta(seconds=1), chat(10, 0)), seed_event("after", midnight, chat(10, 0))], midnight)
    run_all(pipeline, FIRST, LAST)
    assert rows(pipeline, "SELECT usage_date, price_id, unit_price, cost FROM daily_billing ORDER BY 1") == [
        (DAY.date(), "in-1", Decimal("2.5"), Decimal("0.000025")),
        (midnight.date(), "in-2", Decimal(4), Decimal("0.00004")),
    ]


def test_the_long_context_band_begins_above_272_000_prompt_tokens_and_takes_the_whole_request(tmp_path: Path) -> None:
    header = PRICE_BOOK.splitlines()[0]
    book = "\n".join([header] + [f"{b}-{m},gpt-4o,,,,,{b},{m},{p},1,USD,,,," for b, p in (("short", 1), ("long", 2)) for m in ("input", "output")])
    pipeline = installation(tmp_path, reference_dir=str(reference(tmp_path / "reference", book)))
    capture(pipeline, [seed_event("below", DAY, chat(272_000, 1)), seed_event("above", DAY, chat(272_001, 1, cached=272_000))])
    run_all(pipeline, FIRST, LAST)
    assert rows(pipeline, "SELECT request_id, context_band, cost, pricing_status FROM enriched_usage ORDER BY prompt_tokens") == [
        ("below", "short", 272_001, "priced"),
        ("above", "long", 544_004, "fallback"),
    ]
    assert rows(pipeline, "SELECT price_id, meter, quantity FROM daily_billing ORDER BY ALL") == [
        ("long-input", "cached_input", 272_000),
        ("long-input", "input", 1),
        ("long-output", "output", 1),
        ("short-input", "input", 272_000),
        ("short-output", "output", 1),
    ]


@settings(some, max_examples=6)
@given(st.lists(st.integers(0, 10**12 - 1), min_size=7, max_size=7), st.lists(st.integers(1, 10**12), min_size=1, max_size=5))
def test_nine_decimal_prices_per_any_unit_are_exact(prices: list[int], counts: list[int]) -> None:
    price_of = {10**n: Decimal(price).scaleb(-9) for n, price in enumerate(prices)}
    cost_of = {unit: (sum(counts) * price).scaleb(1 - len(str(unit))) for unit, price in price_of.items()}
    book = "\n".join([PRICE_BOOK.splitlines()[0], *(f"p{unit},per {unit},,,,,,input,{price:f},{unit},USD,,,," for unit, price in price_of.items())])
    with tempfile.TemporaryDirectory() as folder:
        pipeline = installation(Path(folder), reference_dir=str(reference(Path(folder, "reference"), book)))
        calls = [(f"{n}-{unit}", count, unit) for unit in price_of for n, count in enumerate(counts)]
        capture(pipeline, [hub_event(name, DAY, count, 0, count, model=f"per {unit}", targetService="list") for name, count, unit in calls])
        run_all(pipeline, FIRST, LAST)
        assert pipeline.held() == {}
        lines = {unit: (price, cost) for unit, price, cost in rows(pipeline, "SELECT unit_tokens, unit_price, cost FROM daily_billing")}
        assert lines == {unit: (price, cost_of[unit]) for unit, price in price_of.items()}
        for table in ("daily_usage", "daily_billing", "enriched_usage"):
            assert rows(pipeline, f"SELECT sum(cost) FROM {table}") == [(sum(cost_of.values()),)]


@pytest.mark.parametrize(("unit", "price"), [(1, "99999.999999999"), (1_000, "99999999.999999999"), (1_000_000, "999999999.999999999")])
def test_the_highest_price_that_the_price_book_accepts_is_charged(tmp_path: Path, unit: int, price: str) -> None:
    book = "\n".join([PRICE_BOOK.splitlines()[0], f"in,gpt-4o,,,,,,input,{price},{unit},USD,,,,"])
    pipeline = installation(tmp_path, reference_dir=str(reference(tmp_path / "reference", book)))
    capture(pipeline, [seed_event("r", DAY, chat(7, 0))])
    run_all(pipeline, FIRST, LAST)
    assert pipeline.held() == {}
    for table in ("daily_usage", "daily_billing", "enriched_usage"):
        assert rows(pipeline, f"SELECT cost FROM {table}") == [(7 * Decimal(price) / unit,)]


def test_more_tokens_than_any_request_can_have_are_quarantined(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    capture(
        pipeline, [seed_event("most", DAY, chat(10**12, 0)), seed_event("too many", DAY, chat(10**12 + 1, 0)), seed_event("x", DAY, chat(2**64, 0))]
    )
    run_all(pipeline, FIRST, LAST)
    assert rows(pipeline, "SELECT prompt_tokens FROM daily_usage") == [(10**12,)]
    assert rows(pipeline, "SELECT sequence_number FROM quarantine WHERE reason LIKE 'invalid_count%' ORDER BY 1") == [(2,), (3,)]


@pytest.mark.slow
def test_a_day_too_large_for_its_types_is_held_and_never_wraps(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    capture(pipeline, [seed_event("small", DAY, chat(10, 0)), seed_event("next day", DAY + dt.timedelta(1), chat(10, 0))], DAY + dt.timedelta(1))
    run_all(pipeline, FIRST, LAST)
    before = rows(pipeline, "SELECT * FROM daily_billing ORDER BY ALL")
    assert len(before) == 2
    # more than 10^18 tokens: a million requests without ids, told apart by their partition
    huge = json_compact(seed_event(None, DAY, chat(10**12, 0)))
    capture(pipeline, [huge] * 10_001)
    first = Path(pipeline.settings.capture_url, blob_name(DAY + HOUR))
    for number in range(1, 100):
        other = Path(pipeline.settings.capture_url, blob_name(DAY + HOUR, str(number)))
        other.parent.mkdir(parents=True)
        os.link(first, other)
    run_all(pipeline, FIRST, LAST)
    [(day, reason)] = [held for reasons in pipeline.held().values() for held in reasons.items()]
    assert day == DAY.date() and "10" in reason
    assert rows(pipeline, "SELECT * FROM daily_billing ORDER BY ALL") == before


def json_compact(body: bytes) -> bytes:
    """The event without what a bill does not need."""
    return body.replace(b'"Prompt": [{"role": "user", "content": "hello"}], ', b"")


def test_copies_of_a_request_on_two_days_are_billed_on_the_best_copys_day_only(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    night = DAY + dt.timedelta(days=1, minutes=5)
    capture(pipeline, [seed_event("r", DAY, None)], DAY + HOUR)
    capture(pipeline, [seed_event("r", "never", chat(10, 0))], night, "1")
    run_all(pipeline, FIRST, LAST)
    assert rows(pipeline, "SELECT usage_date, requests, prompt_tokens FROM daily_usage") == [(night.date(), 1, 10)]
    assert rows(pipeline, "SELECT usage_date, parsed, accepted, duplicates FROM daily_quality ORDER BY 1") == [
        (DAY.date(), 1, 0, 1),
        (night.date(), 1, 1, 0),
    ]


def test_records_without_an_id_are_told_apart_by_their_coordinates(tmp_path: Path) -> None:
    pipeline = installation(tmp_path)
    body = hub_event("NA", DAY, 10, 5, 15)
    capture(pipeline, [body, body])
    capture(pipeline, [body], partition_id="1")
    capture(pipeline, [body], at=DAY + 2 * HOUR)  # sequence number 1 of partition 0 once more: captured twice
    run_all(pipeline, FIRST, LAST)
    assert rows(pipeline, "SELECT request_id, copies FROM enriched_usage ORDER BY 1") == [("ns/hub/0/1", 2), ("ns/hub/0/2", 1), ("ns/hub/1/1", 1)]


@pytest.mark.parametrize("missing", ["price_book", "deployments", "cost_centers"])
def test_usage_without_reference_data_is_counted_never_zero(tmp_path: Path, missing: str) -> None:
    files = {"price_book": PRICE_BOOK, "deployments": DEPLOYMENTS, "cost_centers": COST_CENTERS}
    files[missing] = files[missing].splitlines()[0]
    pipeline = installation(tmp_path, reference_dir=str(reference(tmp_path / "reference", **files)))
    capture(pipeline, [seed_event("r", DAY, chat(10, 5))])
    run_all(pipeline, FIRST, LAST)
    [(tokens, cost, currency, status, owner)] = rows(
        pipeline, "SELECT prompt_tokens + completion_tokens, cost, currency, pricing_status, cost_center FROM daily_usage"
    )
    assert tokens == 15
    priced = (Decimal("0.000075"), "USD", "priced")
    assert (cost, currency, status) == (priced if missing == "cost_centers" else (None, None, "unpriced"))
    assert owner == ("UNALLOCATED" if missing == "cost_centers" else "CC-1")
