"""Cosmos DB: the real SDK over a real socket against `cosmos_server`, or what AOAI_TEST_COSMOS_ENDPOINT names where no fault is needed."""

import base64
import concurrent.futures
import dataclasses
import datetime as dt
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import azure.identity
import dagster as dg
import pyarrow as pa
import pyarrow.parquet
import pytest
from azure.cosmos import CosmosClient
from azure.cosmos.exceptions import CosmosBatchOperationError, CosmosHttpResponseError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline import pipeline as pipeline_module
from aoai_usage_pipeline import tables
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.defs import capture as capture_defs
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.publish import cosmos as publisher
from aoai_usage_pipeline.publish.cosmos import Cosmos, CosmosError, Published
from aoai_usage_pipeline.publish.documents import DAILY_BILLING, USAGE, USAGE_DAYS, Container, document_id
from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline.storage import ObjectStore, open_store
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.cosmos_server import KEY, CosmosServer, Fault, Request
from aoai_usage_pipeline_tests.support import DAY, Run, capture, chat, installation, run_all, seed_event
from aoai_usage_pipeline_tests.test_dagster import RANGE_END, RANGE_START, Sensor, capture_days

DATE = DAY.date()
TODAY = dt.datetime.now(dt.UTC).date()
REAL = os.environ.get("AOAI_TEST_COSMOS_ENDPOINT")
DATABASE = "aoai-usage-test" if REAL else "aoai-usage"
TYPES = {
    "VARCHAR": pa.string(), "BIGINT": pa.int64(), "INTEGER": pa.int32(), "BOOLEAN": pa.bool_(), "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us"), "DECIMAL(24,6)": pa.decimal128(24, 6), "DECIMAL(18,9)": pa.decimal128(18, 9),
    "DECIMAL(18,6)": pa.decimal128(18, 6), "DECIMAL(38,15)": pa.decimal128(38, 15),
}  # fmt: skip
WRONG_KEY = base64.b64encode(b"wrong" * 13).decode()
Line = dict[str, Any]


# --- a lake with lines, and what the documents must be ---------------------------------------------------------------------------


def line(number: int, cost: str | None = "0.001", cost_center: str = "CC-1", **changes: Any) -> Line:
    """A line of `daily_billing` of `DATE`; without a cost it has no price."""
    amount = None if cost is None else Decimal(cost)
    return {
        "usage_date": DATE, "billing_period": "2026-10", "team": "Sales", "cost_center": cost_center, "model": "gpt-4o", "meter": "input",
        "quantity": Decimal(400), "unit_price": Decimal("2.5"), "unit_tokens": 1_000_000, "cost": amount, "list_cost": amount,
        "contracted_cost": amount, "currency": None if cost is None else "USD", "pricing_status": "unpriced" if cost is None else "priced",
        "line_id": f"{number:024x}",
    } | changes  # fmt: skip


def request(name: str, **changes: Any) -> Line:
    """A row of `enriched_usage` of today."""
    return {
        "usage_date": TODAY, "request_id": name, "subscription_id": "sales", "event_time": dt.datetime.combine(TODAY, dt.time(1, 2, 3, 40)),
        "prompt_tokens": 1000, "completion_tokens": 100, "cost": Decimal("0.0035"), "currency": "USD", "attributed": True,
    } | changes  # fmt: skip


def put_day(lake: ObjectStore, container: Container, day: dt.date, lines: list[Line]) -> None:
    """Make the lines a day of the container's table in the lake."""
    columns = {c.name: pa.array([row.get(c.name) for row in lines], TYPES[c.type]) for c in container.columns}
    path = lake.staging() / f"{random.randrange(10**12)}.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    days = Days(lake, container.table)
    days.replace(day, path, replacing=days.footer(day)[1])


def expected(container: Container, rows: list[Line]) -> list[dict[str, Any]]:
    """The documents of rows, by the rules of docs/cosmos.md."""
    documents = []
    for row in rows:
        document: dict[str, Any] = {"id": document_id(row[container.id])}
        for column in container.columns:
            words = column.name.split("_")
            name, value = words[0] + "".join(word.title() for word in words[1:]), row.get(column.name)
            if isinstance(value, Decimal):
                text = f"{value:f}"
                document[name] = text.rstrip("0").rstrip(".") if "." in text else text
                document[f"{name}Number"] = float(value)
            elif isinstance(value, dt.datetime):
                document[name] = f"{value:%Y-%m-%dT%H:%M:%S.%fZ}"
            else:
                document[name] = str(value) if isinstance(value, dt.date) else value
                if column.type.startswith("DECIMAL"):
                    document[f"{name}Number"] = None
        documents.append(document)
    return sorted(documents, key=lambda document: document["id"])


class Account:
    """A database to publish to, and how to see what is in it."""

    def __init__(self, endpoint: str, key: str | None) -> None:
        self.endpoint, self.key = endpoint, key
        self.cosmos = Cosmos(endpoint, DATABASE, key)
        self._client = CosmosClient(endpoint, key or azure.identity.DefaultAzureCredential())

    def container(self, container: Container) -> Any:
        return self._client.get_database_client(DATABASE).get_container_client(container.name)

    def documents(self, container: Container, day: dt.date = DATE) -> list[dict[str, Any]]:
        """The documents of a usage date without what Cosmos DB adds."""
        query, of_day = "SELECT * FROM c WHERE c.usageDate = @d", [{"name": "@d", "value": str(day)}]
        found = self.container(container).query_items(query, parameters=of_day, enable_cross_partition_query=True)
        documents = [{name: value for name, value in document.items() if not name.startswith("_")} for document in found]
        return sorted(documents, key=lambda document: document["id"])


@pytest.fixture
def server() -> Iterator[CosmosServer]:
    with CosmosServer() as running:
        yield running


@pytest.fixture
def account(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Account]:
    """An empty database: of the local server, or a real one, whose days of these tests are emptied before and after."""
    if not REAL:
        yield Account(request.getfixturevalue("server").endpoint, KEY)
        return
    real = Account(REAL, None if publisher.is_azure(REAL) else KEY)
    empty = open_store(str(tmp_path / "empty"), create=True)

    def clean() -> None:
        for container, day in ((DAILY_BILLING, DATE), (DAILY_BILLING, DATE + dt.timedelta(1)), (USAGE, TODAY)):
            publish(real.cosmos, container, empty, day)

    clean()
    yield real
    clean()


@pytest.fixture
def lake(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "lake"), create=True)


def publish(cosmos: Cosmos, container: Container, lake: ObjectStore, day: dt.date) -> Published:
    [(_, published)] = cosmos.publish(container, lake, [day])
    return published


def counts(published: Published) -> tuple[int, int, int]:
    return published.written, published.unchanged, published.deleted


# --- equal to the lake -------------------------------------------------------------------------------------------------------------


def test_documents_are_the_lines_with_exact_amounts(account: Account, lake: ObjectStore) -> None:
    lines = [
        line(1, "0.000000000000001", unit_price=Decimal("0.000075")),
        line(2, "12345678901234567890123.000000000000001", quantity=Decimal("123456789012345678.5")),
        line(3, None, cost_center="UNALLOCATED", team="UNALLOCATED", unit_price=None),
        line(4, "-0.07", cost_center="Räume & Ideen/42", charge_class="Correction", correction_of="2026-08", billing_period="2026-09"),
        line(5, "0", product="Größe 'XL' \"quoted\" \\ 日本"),
    ]
    put_day(lake, DAILY_BILLING, DATE, lines)
    published = publish(account.cosmos, DAILY_BILLING, lake, DATE)
    assert counts(published) == (5, 0, 0) and published.request_charge > 0 and (REAL or published.throttled == 0)
    assert account.documents(DAILY_BILLING) == expected(DAILY_BILLING, lines)
    assert account.cosmos.unequal(DAILY_BILLING, lake, [DATE]) == []


def test_a_second_publish_of_unchanged_lines_writes_nothing(account: Account, lake: ObjectStore, request: pytest.FixtureRequest) -> None:
    lines = [line(n, f"{n}.0000001", cost_center=f"CC-{n % 7}") for n in range(1, 1500)]
    put_day(lake, DAILY_BILLING, DATE, lines)
    assert counts(publish(account.cosmos, DAILY_BILLING, lake, DATE)) == (1499, 0, 0)
    put_day(lake, DAILY_BILLING, DATE, lines[::-1])
    before = {d["id"]: d["_etag"] for d in account.container(DAILY_BILLING).query_items(
        "SELECT * FROM c WHERE c.usageDate = @d", parameters=[{"name": "@d", "value": str(DATE)}], enable_cross_partition_query=True)}  # fmt: skip
    again = publish(Cosmos(account.endpoint, DATABASE, account.key), DAILY_BILLING, lake, DATE)
    assert counts(again) == (0, 1499, 0)
    after = {d["id"]: d["_etag"] for d in account.container(DAILY_BILLING).query_items(
        "SELECT * FROM c WHERE c.usageDate = @d", parameters=[{"name": "@d", "value": str(DATE)}], enable_cross_partition_query=True)}  # fmt: skip
    assert len(before) == 1499 and after == before
    if not REAL:
        assert request.getfixturevalue("server").written == 1499


def test_new_changed_and_vanished_lines_and_no_other_day(account: Account, lake: ObjectStore) -> None:
    tomorrow = DATE + dt.timedelta(1)
    others = [line(n, usage_date=tomorrow) for n in range(100, 103)]
    put_day(lake, DAILY_BILLING, tomorrow, others)
    publish(account.cosmos, DAILY_BILLING, lake, tomorrow)
    put_day(lake, DAILY_BILLING, DATE, [line(n) for n in range(1, 6)] + [line(6, cost_center="CC-2"), line(7, billing_period="2026-09")])
    assert counts(publish(account.cosmos, DAILY_BILLING, lake, DATE)) == (7, 0, 0)
    # 3 has another cost, 4 moves to another cost centre, 5 is gone, and so are the only lines of CC-2 and of 2026-09
    lines = [line(1), line(2), line(3, "0.002"), line(4, cost_center="CC-3"), line(8)]
    put_day(lake, DAILY_BILLING, DATE, lines)
    assert counts(publish(account.cosmos, DAILY_BILLING, lake, DATE)) == (3, 2, 4)
    assert account.documents(DAILY_BILLING) == expected(DAILY_BILLING, lines)
    assert account.documents(DAILY_BILLING, tomorrow) == expected(DAILY_BILLING, others)
    put_day(lake, DAILY_BILLING, DATE, [])
    assert counts(publish(account.cosmos, DAILY_BILLING, lake, DATE)) == (0, 0, 5)
    assert account.documents(DAILY_BILLING) == []


STATES = st.lists(
    st.dictionaries(
        st.integers(1, 6),
        st.tuples(
            st.sampled_from(["CC-1", "CC-2", "UNALLOCATED", "Ünits/#?\\"]),
            st.sampled_from(["2026-10", "2026-11"]),
            st.none() | st.decimals(Decimal(-(10**9)), Decimal(10**22), places=15, allow_nan=False),
        ),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.skipif(bool(REAL), reason="too many requests for a real account")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(states=STATES)
def test_any_sequence_of_bills_ends_equal_to_the_last(account: Account, tmp_path: Path, states: list[dict[int, Any]]) -> None:
    lake = open_store(str(tmp_path / f"lake-{random.randrange(10**12)}"), create=True)
    for state in states:
        lines = [line(n, cost and f"{cost:f}", cost_center=of, billing_period=period) for n, (of, period, cost) in state.items()]
        put_day(lake, DAILY_BILLING, DATE, lines)
        publish(account.cosmos, DAILY_BILLING, lake, DATE)
        assert account.documents(DAILY_BILLING) == expected(DAILY_BILLING, lines)
        assert account.cosmos.unequal(DAILY_BILLING, lake, [DATE]) == []


def test_requests_have_their_ids_whatever_characters_they_have(account: Account, lake: ObjectStore) -> None:
    names = ["a", "a/b", "a\\b", "a?b", "a#b", "a b", " a", "a ", "%2F", "~2f", "日本", "é", '"', "'", "x" * 5000, "x" * 4999 + "y", "a\nb", "\x7f"]
    rows = [request(name, subscription_id=["sales", None, "", "é/1"][n % 4]) for n, name in enumerate(names)]
    put_day(lake, USAGE, TODAY, rows)
    assert counts(publish(account.cosmos, USAGE, lake, TODAY)) == (len(names), 0, 0)
    assert account.documents(USAGE, TODAY) == expected(USAGE, rows)
    assert counts(publish(account.cosmos, USAGE, lake, TODAY)) == (0, len(names), 0)
    assert account.cosmos.unequal(USAGE, lake, [TODAY]) == []
    for row in rows:
        partition_key: Any = [row["subscription_id"], str(TODAY)]
        assert account.container(USAGE).read_item(document_id(row["request_id"]), partition_key)["requestId"] == row["request_id"]
    put_day(lake, USAGE, TODAY, [])
    assert counts(publish(account.cosmos, USAGE, lake, TODAY)) == (0, 0, len(names))


@settings(max_examples=50)
@given(st.text(min_size=1), st.text(min_size=1))
@example("~2f", "/")
@example("a" * 255, "a" * 256)
def test_document_ids_are_valid_and_different(one: str, other: str) -> None:
    for text in (one, other):
        made = document_id(text)
        assert 1 <= len(made.encode()) <= 255 and made.isascii() and made.isprintable() and not set(made) & set("/\\?#%") and made[-1] != " "
    assert (document_id(one) == document_id(other)) == (one == other)


def test_a_batch_that_is_too_large_is_sent_in_parts(account: Account, lake: ObjectStore) -> None:
    rows = [request(f"r{n}", details=json.dumps({"text": "x" * 60_000})) for n in range(90)]
    put_day(lake, USAGE, TODAY, rows)
    assert counts(publish(account.cosmos, USAGE, lake, TODAY)) == (90, 0, 0)
    put_day(lake, USAGE, TODAY, [request("large", details="x" * 2_200_000)])
    with pytest.raises(CosmosError, match="document large is larger than Cosmos DB takes"):
        publish(account.cosmos, USAGE, lake, TODAY)


def test_usage_has_the_last_days_only(server: CosmosServer, lake: ObjectStore) -> None:
    cosmos, old, kept = Cosmos(server.endpoint, DATABASE, KEY), TODAY - dt.timedelta(USAGE_DAYS), TODAY - dt.timedelta(USAGE_DAYS - 1)
    for day in (old, kept):
        put_day(lake, USAGE, day, [request("r", usage_date=day)])
    assert counts(publish(cosmos, USAGE, lake, old)) == (0, 0, 0)
    assert counts(publish(cosmos, USAGE, lake, kept)) == (1, 0, 0)
    assert cosmos.unequal(USAGE, lake, [old]) == cosmos.unequal(USAGE, lake, [kept]) == []
    server.clock = lambda: time.time() + (USAGE_DAYS + 3) * 86_400
    assert Account(server.endpoint, KEY).documents(USAGE, kept) == []
    put_day(lake, DAILY_BILLING, DATE, [line(1)])
    publish(cosmos, DAILY_BILLING, lake, DATE)
    server.clock = lambda: time.time() + 10_000 * 86_400
    assert len(Account(server.endpoint, KEY).documents(DAILY_BILLING)) == 1


def test_an_emulator_gets_containers_with_their_keys_ttl_index_and_autoscale(server: CosmosServer, lake: ObjectStore) -> None:
    cosmos = Cosmos(server.endpoint, DATABASE, KEY)
    for container in (DAILY_BILLING, USAGE):
        publish(cosmos, container, lake, DATE)
    made = {name: container.properties for name, container in server.databases[DATABASE].items()}
    assert made["daily-billing"]["partitionKey"]["paths"] == ["/costCenter", "/billingPeriod"]
    assert made["usage"]["partitionKey"]["paths"] == ["/subscriptionId", "/usageDate"]
    assert "defaultTtl" not in made["daily-billing"] and made["usage"]["defaultTtl"] == 92 * 86_400
    for properties in made.values():
        assert properties["partitionKey"]["kind"] == "MultiHash" and json.loads(properties["offer"]) == {"maxThroughput": 1000}
        assert properties["indexingPolicy"]["excludedPaths"] == [{"path": "/*"}]
        indexed = {path["path"] for path in properties["indexingPolicy"]["includedPaths"]}
        assert {f"{path}/?" for path in properties["partitionKey"]["paths"]} | {"/usageDate/?", "/model/?"} <= indexed
        assert "/cost/?" not in indexed


# --- the check -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"cost": "0.001000000000001", "costNumber": 0.001000000000001}, "cost"),
        ({"costNumber": 0.002}, "wrong_numbers"),
        ({"quantity": "401", "quantityNumber": 401}, "tokens"),
        ({"listCost": "1"}, "list_cost"),
        ({"cost": "free"}, "cost"),
    ],
)
def test_a_document_that_was_tampered_with_fails_the_check_and_is_mended(
    server: CosmosServer, lake: ObjectStore, changes: dict[str, Any], column: str
) -> None:
    cosmos, lines = Cosmos(server.endpoint, DATABASE, KEY), [line(1), line(2, cost_center="CC-2"), line(3)]
    put_day(lake, DAILY_BILLING, DATE, lines)
    publish(cosmos, DAILY_BILLING, lake, DATE)
    assert cosmos.unequal(DAILY_BILLING, lake, [DATE]) == []
    server.tamper("daily-billing", lines[1]["line_id"], **changes)
    [row] = cosmos.unequal(DAILY_BILLING, lake, [DATE])
    assert row["usage_date"] == str(DATE) and row["cost_center"] == "CC-2" and row[column] != row[f"{column}_found"]
    assert counts(publish(cosmos, DAILY_BILLING, lake, DATE)) == (1, 2, 0)
    assert cosmos.unequal(DAILY_BILLING, lake, [DATE]) == []


def test_a_document_too_many_or_too_few_fails_the_check(server: CosmosServer, lake: ObjectStore) -> None:
    account = Account(server.endpoint, KEY)
    put_day(lake, DAILY_BILLING, DATE, [line(1), line(2)])
    publish(account.cosmos, DAILY_BILLING, lake, DATE)
    stray = expected(DAILY_BILLING, [line(9, None, cost_center="CC-9")])[0]
    account.container(DAILY_BILLING).upsert_item(stray)
    [row] = account.cosmos.unequal(DAILY_BILLING, lake, [DATE])
    assert (row["cost_center"], row["lines"], row["lines_found"]) == ("CC-9", "", "1")
    account.container(DAILY_BILLING).delete_item(stray["id"], ["CC-9", "2026-10"])  # type: ignore[arg-type]
    account.container(DAILY_BILLING).delete_item(line(1)["line_id"], ["CC-1", "2026-10"])  # type: ignore[arg-type]
    [row] = account.cosmos.unequal(DAILY_BILLING, lake, [DATE])
    assert (row["cost_center"], row["lines"], row["lines_found"]) == ("CC-1", "2", "1")


# --- faults --------------------------------------------------------------------------------------------------------------------------

BEFORE = [line(n, cost_center=f"CC-{n % 3}") for n in range(600)]
AFTER = [line(n, "0.003" if n % 2 else "0.001", cost_center=f"CC-{n % 3}") for n in range(100, 700)]


def published_before(server: CosmosServer, lake: ObjectStore) -> None:
    """The container has BEFORE, the lake AFTER."""
    put_day(lake, DAILY_BILLING, DATE, BEFORE)
    publish(Cosmos(server.endpoint, DATABASE, KEY), DAILY_BILLING, lake, DATE)
    put_day(lake, DAILY_BILLING, DATE, AFTER)


def test_throttling_is_waited_out_and_counted(server: CosmosServer, lake: ObjectStore) -> None:
    published_before(server, lake)
    throttled: Counter[str] = Counter()

    def fault(request: Request) -> Fault:
        throttled[request.kind] += 1
        # the SDK tries a request ten times, so this goes past it
        return 429 if request.kind in ("query", "batch") and throttled[request.kind] <= 25 else None

    server.fault = fault
    published = publish(Cosmos(server.endpoint, DATABASE, KEY), DAILY_BILLING, lake, DATE)
    assert (published.deleted, published.throttled) == (100, 50) and published.written + published.unchanged == 600
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, AFTER)


@pytest.mark.parametrize("capacity", [2, 100])
def test_requests_under_way_are_bounded_and_fewer_when_throttled(server: CosmosServer, lake: ObjectStore, capacity: int) -> None:
    put_day(lake, DAILY_BILLING, DATE, [line(n, cost_center=f"CC-{n % 150}") for n in range(300)])
    lock, seen, refused = threading.Lock(), [], 0
    under_way = 0

    def fault(request: Request) -> Fault:
        nonlocal under_way, refused
        if request.kind != "batch":
            return None
        with lock:
            under_way += 1
            too_many = under_way > capacity
            seen.append(under_way)
            refused += too_many
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return 429 if too_many else None

    server.fault = fault
    published = publish(Cosmos(server.endpoint, DATABASE, KEY), DAILY_BILLING, lake, DATE)
    assert published.written == 300 and published.throttled == refused and max(seen) <= 8
    usual = sum(seen) / len(seen)
    assert usual < 4 if capacity == 2 else usual > 4, (usual, refused, len(seen))


@pytest.mark.parametrize("fault", [408, 449, 503, (403, 3), "cut", "lose"])
def test_what_passes_is_tried_again(server: CosmosServer, lake: ObjectStore, fault: Fault) -> None:
    published_before(server, lake)
    start = server.requests
    server.fault = lambda request: fault if (request.number - start) % 3 == 1 else None
    publish(Cosmos(server.endpoint, DATABASE, KEY), DAILY_BILLING, lake, DATE)
    server.fault = lambda request: None
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, AFTER)


@pytest.mark.parametrize("fault", [429, 503, "cut"])
def test_what_does_not_pass_ends_in_time_and_the_next_run_mends_it(server: CosmosServer, lake: ObjectStore, fault: Fault) -> None:
    published_before(server, lake)
    cosmos, batches = Cosmos(server.endpoint, DATABASE, KEY, patience=dt.timedelta(seconds=1)), Counter()  # type: ignore[var-annotated]

    def from_the_fourth_batch_on(request: Request) -> Fault:
        batches[request.kind] += 1
        return fault if request.kind == "batch" and batches["batch"] > 3 else None

    server.fault = from_the_fourth_batch_on
    start = time.monotonic()
    with pytest.raises(CosmosError, match=r"127\.0\.0\.1:\d+, database aoai-usage, container daily-billing: .* for 1 seconds"):
        publish(cosmos, DAILY_BILLING, lake, DATE)
    assert time.monotonic() - start < 60
    assert cosmos.unequal(DAILY_BILLING, lake, [DATE])
    server.fault = lambda request: None
    publish(cosmos, DAILY_BILLING, lake, DATE)
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, AFTER)


def test_a_server_that_is_not_there(lake: ObjectStore) -> None:
    with CosmosServer() as server:
        endpoint = server.endpoint
    start = time.monotonic()
    with pytest.raises(CosmosError, match=r"the account: .* for 0 seconds"):
        Cosmos(endpoint, DATABASE, KEY, patience=dt.timedelta())
    assert time.monotonic() - start < 60


def publish_in_child(endpoint: str, lake_url: str) -> None:
    publish(Cosmos(endpoint, DATABASE, KEY), DAILY_BILLING, open_store(lake_url, create=False), DATE)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 4 else []) for n in range(50)])
def test_a_publisher_that_is_killed_leaves_what_the_next_one_mends(server: CosmosServer, lake: ObjectStore, tmp_path: Path, seed: int) -> None:
    """Killed at a random request, before or after the server did it."""
    published_before(server, lake)
    rng = random.Random(seed)
    at, outcome, killed = server.requests + rng.randrange(2, 21), rng.choice(["cut", None]), threading.Event()
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload([__name__])
    child = children.Process(target=publish_in_child, args=(server.endpoint, str(tmp_path / "lake")))
    child.start()

    def fault(request: Request) -> Fault:
        if request.number >= at and not killed.is_set():
            os.kill(child.pid, signal.SIGKILL)
            killed.set()
            return outcome
        return None

    server.fault = fault
    child.join(60)
    assert child.exitcode in (-signal.SIGKILL, 0)
    server.fault = lambda request: None
    mended = Cosmos(server.endpoint, DATABASE, KEY)
    # what is not known to be there is published again, and only what is there is known
    assert (list(mended.unpublished(DAILY_BILLING, lake)) == [DATE]) == (child.exitcode != 0)
    publish(mended, DAILY_BILLING, lake, DATE)
    assert mended.unpublished(DAILY_BILLING, lake) == {}
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, AFTER)
    assert mended.unequal(DAILY_BILLING, lake, [DATE]) == []
    assert counts(publish(mended, DAILY_BILLING, lake, DATE)) == (0, 600, 0)


@pytest.mark.parametrize("lines", [AFTER, AFTER[:50], []])
@pytest.mark.parametrize("kind", ["query", "batch"])
def test_a_slow_run_does_not_undo_what_a_newer_one_wrote(server: CosmosServer, lake: ObjectStore, kind: str, lines: list[Line]) -> None:
    put_day(lake, DAILY_BILLING, DATE, BEFORE)
    slow, newer = (Cosmos(server.endpoint, DATABASE, KEY) for _ in range(2))
    publish(newer, DAILY_BILLING, lake, DATE + dt.timedelta(1))
    done = threading.Lock()

    def overtake(request: Request) -> Fault:
        if request.kind == kind and done.acquire(blocking=False):
            put_day(lake, DAILY_BILLING, DATE, lines)
            # not in the server's thread, which outlives the test: DuckDB complains at the end about connections that were made in such
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(publish, newer, DAILY_BILLING, lake, DATE).result()
        return None

    server.fault = overtake
    publish(slow, DAILY_BILLING, lake, DATE)
    assert done.locked()
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, lines)


def test_several_publishers_at_once_converge(server: CosmosServer, lake: ObjectStore) -> None:
    published_before(server, lake)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(publish, Cosmos(server.endpoint, DATABASE, KEY), DAILY_BILLING, lake, DATE) for _ in range(3)]
    assert all(run.exception() is None for run in runs)
    assert Cosmos(server.endpoint, DATABASE, KEY).unpublished(DAILY_BILLING, lake) == {}
    assert Account(server.endpoint, KEY).documents(DAILY_BILLING) == expected(DAILY_BILLING, AFTER)


# --- what the lake remembers of it ----------------------------------------------------------------------------------------------------


def test_days_that_are_not_in_the_container_are_known_without_reading_them(account: Account, lake: ObjectStore) -> None:
    tomorrow, cosmos = DATE + dt.timedelta(1), account.cosmos

    def unpublished() -> set[dt.date]:
        return set(cosmos.unpublished(DAILY_BILLING, lake))

    assert unpublished() == set()
    for number, day in enumerate((DATE, tomorrow)):
        put_day(lake, DAILY_BILLING, day, [line(number, usage_date=day)])
    assert unpublished() == {DATE, tomorrow}
    publish(cosmos, DAILY_BILLING, lake, DATE)
    assert unpublished() == {tomorrow}
    publish(cosmos, DAILY_BILLING, lake, tomorrow)
    assert unpublished() == set() == set(Cosmos(account.endpoint, DATABASE, account.key).unpublished(DAILY_BILLING, lake))
    put_day(lake, DAILY_BILLING, DATE, [line(2)])
    Days(lake, "daily_billing").delete(tomorrow)
    assert unpublished() == {DATE, tomorrow}
    for day in (DATE, tomorrow):
        publish(cosmos, DAILY_BILLING, lake, day)
    assert unpublished() == set()
    # without its memory, or with a damaged one, the lake asks for everything again, which costs reading
    [remembered] = lake.objects("published/")
    for lost in (lambda: lake.delete(remembered.name), lambda: lake.write(remembered.name, b"{", replacing=lake.etag(remembered.name))):
        lost()
        assert unpublished() == {DATE}
        assert counts(publish(cosmos, DAILY_BILLING, lake, DATE)) == (0, 1, 0)
        assert unpublished() == set()


def test_another_account_and_a_container_that_was_created_again_have_nothing(server: CosmosServer, lake: ObjectStore) -> None:
    put_day(lake, DAILY_BILLING, DATE, [line(1)])
    account = Account(server.endpoint, KEY)
    publish(account.cosmos, DAILY_BILLING, lake, DATE)
    with CosmosServer() as other:
        elsewhere = Cosmos(other.endpoint, DATABASE, KEY)
        assert list(elsewhere.unpublished(DAILY_BILLING, lake)) == [DATE]
    assert list(Cosmos(server.endpoint, "another", KEY).unpublished(DAILY_BILLING, lake)) == [DATE]
    publish(Cosmos(server.endpoint, "another", KEY), DAILY_BILLING, lake, DATE)
    assert account.cosmos.unpublished(DAILY_BILLING, lake) == {}
    account._client.get_database_client(DATABASE).delete_container("daily-billing")
    again = Cosmos(server.endpoint, DATABASE, KEY)
    assert list(again.unpublished(DAILY_BILLING, lake)) == [DATE]
    assert counts(publish(again, DAILY_BILLING, lake, DATE)) == (1, 0, 0)


def test_days_that_the_container_does_not_keep_are_not_missing(server: CosmosServer, lake: ObjectStore) -> None:
    for age in (USAGE_DAYS, USAGE_DAYS - 1):
        day = TODAY - dt.timedelta(age)
        put_day(lake, USAGE, day, [request("r", usage_date=day)])
    assert list(Cosmos(server.endpoint, DATABASE, KEY).unpublished(USAGE, lake)) == [TODAY - dt.timedelta(USAGE_DAYS - 1)]


# --- the sensor ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sensor(tmp_path: Path, server: CosmosServer) -> Iterator[Sensor]:
    start = TODAY - dt.timedelta(60)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Sensor(installation(tmp_path, start_date=start, cosmos_endpoint=server.endpoint, cosmos_key=KEY), instance)


def days_ago(number: int) -> str:
    return str(TODAY - dt.timedelta(number))


def billed_days(sensor: Sensor, first: int, last: int) -> None:
    """A request on each day from some days ago to some days ago, billed without Cosmos DB."""
    days = [TODAY - dt.timedelta(n) for n in range(first, last - 1, -1)]
    capture_days(sensor.pipeline, dt.datetime.combine(days[0], dt.time()), len(days))
    run_all(installation(Path(sensor.pipeline.settings.lake_url).parent, start_date=sensor.pipeline.settings.start_date), days[0], days[-1])


def published_days(server: CosmosServer) -> set[str]:
    return {document["usageDate"] for document in server.documents("daily-billing")}


def test_a_day_that_could_not_be_published_is_asked_for_until_it_is(sensor: Sensor, server: CosmosServer, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_days(sensor.pipeline, dt.datetime.combine(TODAY - dt.timedelta(40), dt.time()), 1)
    day = days_ago(40)
    server.fault = lambda request: 403 if request.kind == "batch" else None
    asked = sensor.settle()
    assert asked[:2] == [("ingest", day, day), ("bill", day, day)] and set(asked[2:]) == {("publish", day, day)}
    assert 1 <= len(asked[2:]) <= 3 and "publish failed 3 times" in sensor.skipped
    # a restart and a reset cursor do not forget it, and an hour later it is tried again by itself
    sensor.pipeline = Pipeline(sensor.pipeline.settings)
    assert sensor.tick() == []

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> "Later":
            return super().now(tz) + dt.timedelta(hours=1)

    later = types.SimpleNamespace(**vars(dt) | {"datetime": Later})
    with monkeypatch.context() as patch:
        patch.setattr(capture_defs, "dt", later)
        assert [request.job_name for request in sensor.tick()] == ["publish"]
    sensor.cursor = None
    server.fault = lambda request: None
    assert sensor.settle() == [("publish", day, day)]
    assert published_days(server) == {day} and server.written == 2


def test_what_was_billed_without_cosmos_db_is_published_a_month_at_a_time_newest_first(sensor: Sensor, server: CosmosServer) -> None:
    billed_days(sensor, 45, 0)
    [request] = sensor.tick()
    first, last = days_ago(30), days_ago(0)
    assert (request.job_name, request.tags[RANGE_START], request.tags[RANGE_END]) == ("publish", first, last)
    job = build_defs(pipeline=sensor.pipeline).resolve_job_def("publish")
    run = sensor.instance.create_run_for_job(job, tags=dict(request.tags), status=dg.DagsterRunStatus.STARTED)
    assert sensor.tick() == []  # one run at a time
    sensor.instance.report_run_failed(run)
    assert sensor.settle() == [("publish", first, last), ("publish", days_ago(45), days_ago(31))]
    assert published_days(server) == {days_ago(n) for n in range(46)}
    # a server that begins empty gets everything
    with CosmosServer() as empty:
        sensor.pipeline = Pipeline(dataclasses.replace(sensor.pipeline.settings, cosmos_endpoint=empty.endpoint))
        assert len(sensor.settle()) == 2 and len(published_days(empty)) == 46


def test_days_that_a_bill_is_asked_for_are_not_asked_for_twice(sensor: Sensor, server: CosmosServer) -> None:
    billed_days(sensor, 10, 9)
    sensor.settle()
    sensor.cursor = None
    support.reference(Path(sensor.pipeline.settings.reference_dir), support.PRICE_BOOK.replace("2.50", "3.50"))
    assert sensor.settle() == [("bill", days_ago(10), days_ago(9))]
    assert published_days(server) == {days_ago(10), days_ago(9)}


@pytest.mark.parametrize("silent", [True, False])
def test_a_cosmos_db_that_cannot_be_asked_holds_up_nothing(
    sensor: Sensor, server: CosmosServer, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    billed_days(sensor, 10, 9)
    monkeypatch.setattr(pipeline_module, "_LOOK_SECONDS", 1 if silent else 30)
    silence = threading.Event()

    def fault(request: Request) -> Fault:
        return "cut" if silent and silence.wait(30) else 403

    server.fault = fault
    started = time.monotonic()
    assert sensor.tick() == []
    assert time.monotonic() - started < 10
    assert "Cosmos DB cannot be asked what it has" in sensor.skipped and ("no answer" in sensor.skipped) == silent
    capture_days(sensor.pipeline, dt.datetime.combine(TODAY, dt.time()), 1, number=100)
    assert [request.job_name for request in sensor.tick()] == ["ingest"]
    silence.set()
    server.fault = lambda request: None
    monkeypatch.undo()
    assert ("publish", days_ago(10), days_ago(9)) in sensor.settle()


# --- keys and logs -------------------------------------------------------------------------------------------------------------------


def test_azure_is_signed_in_to_with_a_token_and_an_emulator_with_the_key(monkeypatch: pytest.MonkeyPatch, server: CosmosServer) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(publisher, "CosmosClient", lambda endpoint, credential, **options: taken.append(credential))
    monkeypatch.setattr(azure.identity, "DefaultAzureCredential", lambda: "token")
    Cosmos("https://bills.documents.azure.com:443/", DATABASE, KEY)
    Cosmos(server.endpoint, DATABASE, KEY)
    assert taken == ["token", KEY]
    with pytest.raises(CosmosError, match="set AOAI_COSMOS_KEY"):
        Cosmos(server.endpoint, DATABASE)
    with pytest.raises(CosmosError, match="not base64"):
        Cosmos(server.endpoint, DATABASE, "secret!")


def test_a_wrong_key_is_refused(server: CosmosServer) -> None:
    with pytest.raises(CosmosError, match=r"access refused \(401\)"):
        Cosmos(server.endpoint, DATABASE, WRONG_KEY)


def test_settings() -> None:
    env = {"AOAI_COSMOS_ENDPOINT": "https://a.documents.azure.com:443/", "AOAI_COSMOS_KEY": KEY, "AOAI_COSMOS_USAGE": "on"}
    read = Settings.from_env(env)
    assert (read.cosmos_endpoint, read.cosmos_database, read.cosmos_usage) == (env["AOAI_COSMOS_ENDPOINT"], "aoai-usage", "on")
    assert KEY not in repr(read)
    for name, value in (("ENDPOINT", "a.documents.azure.com"), ("ENDPOINT", "AccountEndpoint=https://a;AccountKey=b"), ("USAGE", "yes")):
        with pytest.raises(SettingsError, match=f"AOAI_COSMOS_{name} is"):
            Settings.from_env({f"AOAI_COSMOS_{name}": value})


def test_logs_have_no_keys_and_no_documents_at_any_level(server: CosmosServer, lake: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    put_day(lake, DAILY_BILLING, DATE, [line(1, product="Very private product")])
    cosmos = Cosmos(server.endpoint, DATABASE, KEY, patience=dt.timedelta())
    failures = []
    for fault in (503, 403, "cut"):
        server.fault = lambda request, fault=fault: fault if request.kind == "batch" else None  # type: ignore[misc]
        with pytest.raises(CosmosError) as failed:
            publish(cosmos, DAILY_BILLING, lake, DATE)
        failures += [str(failed.value), str(failed.value.__cause__)]
    server.fault = lambda request: None
    publish(cosmos, DAILY_BILLING, lake, DATE)
    cosmos.unequal(DAILY_BILLING, lake, [DATE])
    server.tamper("daily-billing", line(1)["line_id"], cost="7")
    publish(cosmos, DAILY_BILLING, lake, DATE)
    assert server.documents("daily-billing")[0]["product"] == "Very private product"
    assert any(record.name.startswith("urllib3") and record.levelno == logging.DEBUG for record in caplog.records)
    told = "\n".join([f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records] + failures)
    for secret in (KEY, "sig=", "sig%3d", "private", line(1)["line_id"], "Sales"):
        assert secret not in told


# --- the server refuses what Cosmos DB refuses ---------------------------------------------------------------------------------------


def test_the_server_refuses_what_cosmos_db_refuses(server: CosmosServer, lake: ObjectStore) -> None:
    account = Account(server.endpoint, KEY)
    put_day(lake, DAILY_BILLING, DATE, [line(1), line(2, cost_center="CC-2")])
    publish(account.cosmos, DAILY_BILLING, lake, DATE)
    container = account.container(DAILY_BILLING)
    for query in ("SELECT c.costCenter, COUNT(1) FROM c GROUP BY c.costCenter", "SELECT * FROM c ORDER BY c.model", "SELECT c.nonsense(", "DROP c"):
        with pytest.raises(CosmosHttpResponseError) as refused:
            list(container.query_items(query, enable_cross_partition_query=True))
        assert refused.value.status_code == 400
    one = expected(DAILY_BILLING, [line(1)])[0]
    mine: Any = ["CC-1", "2026-10"]
    assert list(container.query_items("SELECT VALUE COUNT(1) FROM c", partition_key=mine)) == [1]
    assert container.read_item(one["id"], mine)["cost"] == "0.001"
    etag = container.upsert_item(one)["_etag"]
    for operations, status in (
        ([("create", (one,))], 409),
        ([("create", (one | {"id": "new"},)), ("delete", ("missing",))], 404),
        ([("replace", (one["id"], one), {"if_match_etag": '"stale"'})], 412),
        ([("create", (one | {"id": "a/b"},))], 400),
        ([("create", (one | {"id": "new", "costCenter": "CC-2"},))], 400),
    ):
        with pytest.raises(CosmosBatchOperationError) as failed:
            container.execute_item_batch(operations, mine)
        assert failed.value.status_code == status
    assert container.read_item(one["id"], mine)["_etag"] == etag and len(account.documents(DAILY_BILLING)) == 2
    for operations, partition_key, status in (
        ([("create", (one | {"id": f"n{n}"},)) for n in range(101)], mine, 400),
        ([("create", (one | {"id": "n", "product": "x" * 2_100_000},))], mine, 413),
    ):
        with pytest.raises(CosmosHttpResponseError) as too_much:
            container.execute_item_batch(operations, partition_key)
        assert too_much.value.status_code == status


def test_the_server_lives_as_long_as_a_command_and_gives_it_the_settings() -> None:
    code = "import os, urllib.error, urllib.request as u\ntry: u.urlopen(os.environ['AOAI_COSMOS_ENDPOINT'])\nexcept urllib.error.HTTPError as e: raise SystemExit(e.code - 394)"
    command = [sys.executable, "-m", "aoai_usage_pipeline_tests.cosmos_server", "--", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 7  # 401, because it is not signed


# --- the assets ----------------------------------------------------------------------------------------------------------------------


def run_bill(pipeline: Pipeline, first: dt.date = DATE, last: dt.date = DATE) -> dg.ExecuteInProcessResult:
    tags = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_defs(pipeline=pipeline).resolve_job_def("bill")
        return job.execute_in_process(instance=instance, tags=tags, raise_on_error=False, run_config=quiet)


def metadata(result: dg.ExecuteInProcessResult, asset: str, day: dt.date) -> dict[str, Any]:
    [found] = [
        event.step_materialization_data.materialization.metadata
        for event in result.all_events
        if event.is_step_materialization
        and event.asset_key == dg.AssetKey(asset)
        and event.step_materialization_data.materialization.partition == str(day)
    ]
    return {name: value.value for name, value in found.items()}


def evaluations(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    return {e.asset_key.to_user_string(): e for e in result.get_asset_check_evaluations() if e.check_name == "documents_equal_ledger"}


@pytest.fixture
def billable(tmp_path: Path) -> Path:
    at = DAY + dt.timedelta(hours=1)
    support.reference(tmp_path / "reference")
    capture(tmp_path, at, seed_event("r1", at, chat(1000, 100, 400)), seed_event("r2", at + dt.timedelta(days=1), chat(10, 5)))
    run_all(installation(tmp_path), DATE, DATE + dt.timedelta(1))
    return tmp_path


def test_the_job_publishes_each_day_and_says_what_it_took(billable: Path, server: CosmosServer) -> None:
    pipeline = installation(billable, cosmos_endpoint=server.endpoint, cosmos_key=KEY)
    result = run_bill(pipeline, DATE, DATE + dt.timedelta(1))
    assert result.success
    first = metadata(result, "cosmos_daily_billing", DATE)
    assert (first["dagster/partition_row_count"], first["written"], first["unchanged"], first["deleted"], first["throttled"]) == (3, 3, 0, 0, 0)
    assert first["request_charge"] > 0 and first["published"] == "yes"
    assert metadata(result, "cosmos_daily_billing", DATE + dt.timedelta(1))["written"] == 2
    assert metadata(result, "cosmos_usage", DATE)["published"] == "no: AOAI_COSMOS_USAGE is off"
    assert {name: e.passed for name, e in evaluations(result).items()} == {
        "cosmos_daily_billing": True, "cosmos_usage": True, "cosmos_statements": True,
    }  # fmt: skip
    assert evaluations(result)["cosmos_usage"].description == "not compared: AOAI_COSMOS_USAGE is off"
    assert sum(Decimal(d["cost"]) for d in server.documents("daily-billing")) == Decimal("0.003075")
    assert list(server.databases[DATABASE]) == ["daily-billing"]
    written = server.written
    again = run_bill(pipeline, DATE, DATE + dt.timedelta(1))
    assert again.success and server.written == written
    assert metadata(again, "cosmos_daily_billing", DATE)["unchanged"] == 3


def test_without_an_endpoint_the_assets_say_so(billable: Path) -> None:
    result = run_bill(installation(billable))
    assert result.success
    for asset in ("cosmos_daily_billing", "cosmos_usage"):
        assert metadata(result, asset, DATE)["published"] == "no: AOAI_COSMOS_ENDPOINT is not set"


def test_requests_are_published_when_switched_on(tmp_path: Path, server: CosmosServer) -> None:
    at = dt.datetime.combine(TODAY, dt.time())
    capture(tmp_path, at, seed_event("r/1", at, chat(1000, 100, 400)), seed_event("r/2", at, chat(10, 5), SubscriptionId="unknown"))
    pipeline = installation(tmp_path, cosmos_endpoint=server.endpoint, cosmos_key=KEY, cosmos_usage="on")
    pipeline.ingest([TODAY])
    result = run_bill(pipeline, TODAY, TODAY)
    assert result.success and metadata(result, "cosmos_usage", TODAY)["written"] == 2
    assert {(d["requestId"], d["costCenter"]) for d in server.documents("usage")} == {("r/1", "CC-1"), ("r/2", "UNALLOCATED")}


def test_a_document_that_differs_fails_the_run(billable: Path, server: CosmosServer) -> None:
    pipeline = installation(billable, cosmos_endpoint=server.endpoint, cosmos_key=KEY)
    assert run_bill(pipeline).success
    looks = Counter()  # type: ignore[var-annotated]

    def tamper_before_the_check(request: Request) -> Fault:
        looks[request.kind] += 1
        if request.kind == "query" and looks["query"] == len(server.databases[DATABASE]["daily-billing"].ranges) + 1:
            server.tamper("daily-billing", server.documents("daily-billing")[0]["id"], cost="1")
        return None

    server.fault = tamper_before_the_check
    result = run_bill(pipeline)
    assert not result.success
    evaluation = evaluations(result)["cosmos_daily_billing"]
    assert not evaluation.passed and evaluation.severity == dg.AssetCheckSeverity.ERROR
    [row] = evaluation.metadata["rows"].records
    assert (row.data["cost_center"], row.data["cost"]) == ("CC-1", "0.003")
    server.fault = lambda request: None
    assert run_bill(pipeline).success


# --- statements ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path, server: CosmosServer) -> Pipeline:
    """August is closed: CC-1 has priced usage, CC-2 only some without a price."""
    at = dt.datetime(2026, 8, 20, 12)
    unpriced = support.hub_event("r3", at, 10, 5, 15, model="mystery")
    capture(tmp_path, at, seed_event("r1", at, chat(1001, 100, 400)), seed_event("r2", at, chat(10, 5)), unpriced)
    run_all(installation(tmp_path), at.date(), at.date())
    pipeline = installation(tmp_path, cosmos_endpoint=server.endpoint, cosmos_key=KEY)
    pipeline.close("2026-08", accept_unpriced=True)
    return pipeline


def statements_run(pipeline: Pipeline) -> tuple[dg.ExecuteInProcessResult, dict[str, Any]]:
    """`cosmos_statements` materialized on its own, and its metadata."""
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_defs(pipeline=pipeline).get_implicit_global_asset_job_def()
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        keys = [dg.AssetKey("cosmos_statements")]
        checks = {dg.AssetCheckKey(keys[0], "documents_equal_ledger")}
        result = job.get_subset(asset_selection=set(keys), asset_check_selection=checks).execute_in_process(
            instance=instance, raise_on_error=False, run_config=quiet
        )
    [made] = result.asset_materializations_for_node("cosmos_statements")
    return result, {name: value.value for name, value in made.metadata.items()}


def test_statements_of_closed_months_are_documents(closed: Pipeline, server: CosmosServer) -> None:
    assert closed.unpublished_in_cosmos().keys() == {dt.date(2026, 8, 20), dt.date(2026, 8, 31)}
    result, made = statements_run(closed)
    assert result.success and (made["published"], made["written"]) == ("2026-08", 2)
    client = CosmosClient(server.endpoint, KEY).get_database_client(DATABASE).get_container_client("statements")
    [statement] = client.read_item("CC-1", "2026-08")["statements"]
    expected = closed.statements("2026-08")[0]
    assert (statement["currency"], statement["digest"], statement["dailyLines"]) == ("USD", expected.digest, expected.daily_lines)
    total = (601 + 10) * Decimal("2.5") / 10**6 + 400 * Decimal("1.25") / 10**6 + 105 * Decimal(10) / 10**6
    assert (statement["total"], statement["totalNumber"]) == (str(total.normalize()), float(total))
    assert (statement["amount"], Decimal(statement["rounding"])) == ("0", -total)
    assert sum(Decimal(line["cost"]) for line in statement["lines"]) == total and {"input", "output"} < {line["meter"] for line in statement["lines"]}
    [without] = client.read_item("CC-2", "2026-08")["statements"]
    assert (without["currency"], without["total"], {line["cost"] for line in without["lines"]}) == (None, "0", {None})
    assert without["lines"][0]["pricingStatus"] == "unpriced" and without["lines"][0]["unitPriceNumber"] is None
    # again: read and left alone, however Cosmos DB writes its numbers
    server.tamper("statements", "CC-1", statements=[json.loads(json.dumps(statement).replace(".0,", ","))])
    written = server.written
    result, made = statements_run(closed)
    assert result.success and (made["written"], made["unchanged"], server.written) == (0, 2, written)
    assert closed.unpublished_in_cosmos().keys() == {dt.date(2026, 8, 20)}


def test_a_statement_that_was_tampered_with_fails_the_check_and_is_mended(closed: Pipeline, server: CosmosServer) -> None:
    statements_run(closed)
    stray = server.documents("statements")[0] | {"id": "CC-9", "costCenter": "CC-9"}
    client = CosmosClient(server.endpoint, KEY).get_database_client(DATABASE).get_container_client("statements")
    client.create_item(stray)
    changed = [statement | {"total": "1"} for statement in client.read_item("CC-1", "2026-08")["statements"]]
    server.tamper("statements", "CC-1", statements=changed)
    rows = closed.unequal_statements_in_cosmos(None)
    assert [(row["cost_center"], row["totals_found"]) for row in rows] == [("CC-1", "1 USD"), ("CC-9", str(rows[1]["totals_found"]))]
    assert closed.unequal_statements_in_cosmos([DATE]) == []
    result, made = statements_run(closed)
    assert result.success and (made["written"], made["deleted"]) == (1, 1)
    assert closed.unequal_statements_in_cosmos(None) == []


def test_the_sensor_publishes_a_month_that_was_closed(closed: Pipeline, server: CosmosServer) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        sensor = Sensor(closed, instance)
        assert sensor.settle() == [("publish", "2026-08-31", "2026-08-31"), ("publish", "2026-08-20", "2026-08-20")]
        assert {document["id"] for document in server.documents("statements")} == {"CC-1", "CC-2"}
        assert sensor.settle() == []


def test_without_a_closed_month_there_is_no_container_for_statements(billable: Path, server: CosmosServer) -> None:
    pipeline = installation(billable, cosmos_endpoint=server.endpoint, cosmos_key=KEY)
    assert run_bill(pipeline).success
    assert list(server.databases[DATABASE]) == ["daily-billing"]


def test_bill_publishes_to_cosmos_db(root: Path, aoai_usage: Run, server: CosmosServer, monkeypatch: pytest.MonkeyPatch) -> None:
    at = DAY + dt.timedelta(hours=1)
    capture(root, at, seed_event("r1", at, chat(1000, 100, 400)))
    monkeypatch.setenv("AOAI_COSMOS_ENDPOINT", server.endpoint)
    monkeypatch.setenv("AOAI_COSMOS_KEY", KEY)
    code, _, err = aoai_usage("bill", "--from", DATE, "--to", DATE)
    assert code == 0, err
    assert {d["meter"]: d["quantity"] for d in server.documents("daily-billing")} == {"input": "600", "cached_input": "400", "output": "100"}
    monkeypatch.setenv("AOAI_COSMOS_KEY", WRONG_KEY)
    code, out, _ = aoai_usage("bill", "--from", DATE, "--to", DATE)
    assert code == 1 and "access refused (401)" in out


def test_tables_name_every_field_of_a_document() -> None:
    for container in (DAILY_BILLING, USAGE):
        assert set(container.fields) == {field.name for field in tables.document_fields(container.columns)}
        assert set(container.fields) | {"id"} == set(expected(container, [line(1) | request("r")])[0])
