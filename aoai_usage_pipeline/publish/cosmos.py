"""Cosmos DB for NoSQL: containers that equal the lake, one usage date or closed month after the other, by writing only what differs.

A day is read from the container first and from the lake after that, and every write is conditional on what was read. So a slow run cannot undo
what a newer one wrote: it is refused, or sees afterwards that the lake has changed, and looks again.
"""

import base64
import contextlib
import dataclasses
import datetime as dt
import itertools
import logging
import operator
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ServiceRequestError, ServiceResponseError
from azure.cosmos import ContainerProxy, CosmosClient, PartitionKey, ThroughputProperties
from azure.cosmos.exceptions import CosmosBatchOperationError, CosmosResourceExistsError, CosmosResourceNotFoundError

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.billing.periods import Periods
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.publish.documents import STATEMENTS, Container, Document, Key, Part, Period, UsageDate, number, source
from aoai_usage_pipeline.publish.marks import Marks
from aoai_usage_pipeline.storage import ObjectStore

PATIENCE = dt.timedelta(minutes=3)
"""How long one request is tried again while Cosmos DB throttles it, times out, fails over or cannot be reached."""

_BATCH = 100  # operations; Cosmos DB takes no more in a transaction
_PAGE = 1000
_REQUESTS = 8  # the SDK keeps no more than ten connections
_LOOKS = 5
_AUTOSCALE = 1000
_PASSING = {408, 410, 429, 449, 500, 502, 503, 504}
_FAILOVER = {(403, 3), (403, 1008), (404, 1002)}  # the region does not take writes, has no such account, has not caught up
_OVERTAKEN = {404, 409, 412}
_TOO_LARGE = 413

# at INFO the SDK writes every request with its headers
_QUIET = logging.getLogger(f"{__name__}.http")
_QUIET.setLevel(logging.WARNING)

_T = TypeVar("_T")
Row = dict[str, object]
Existing = dict[Key, dict[str, tuple[str, int | None]]]
"""The documents of a usage date by logical partition and id: the ETag and a hash of the content."""


class CosmosError(Exception):
    """Cosmos DB cannot be used as configured, or did not do what was asked in time; the message says which container and why."""


class _Overtaken(Exception):
    """Another run changed the day in the meantime."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What publishing one usage date took: documents written (new or replaced), unchanged and deleted, requests that were throttled, and the
    request units of all requests.
    """

    written: int = 0
    unchanged: int = 0
    deleted: int = 0
    throttled: int = 0
    request_charge: Decimal = Decimal(0)

    def __add__(self, other: "Published") -> "Published":
        return Published(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


def is_azure(endpoint: str) -> bool:
    """Whether an endpoint is Azure's own, and not an emulator's."""
    return ".documents." in (urllib.parse.urlsplit(endpoint).hostname or "")


class Cosmos:
    """A database. Azure is signed in to with `DefaultAzureCredential` and its containers must exist; an emulator takes the key, and there the
    database and the containers are created.
    """

    def __init__(self, endpoint: str, database: str, key: str | None = None, patience: dt.timedelta = PATIENCE) -> None:
        self._endpoint, self._name, self._patience = endpoint, database, patience.total_seconds()
        self._lanes = _Lanes()
        credential = _credential(endpoint, key)
        options: dict[str, Any] = {"raw_response_hook": self._lanes.saw, "logger": _QUIET, "no_response_on_write": True}
        options |= {"retry_connect": 0, "retry_read": 0}  # that is what `_patiently` is for
        self._client = self._patiently("the account", lambda: CosmosClient(endpoint, credential, **options))
        self._containers: dict[str, ContainerProxy] = {}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def publish(self, container: Container, lake: ObjectStore, days: Sequence[dt.date]) -> Iterator[tuple[dt.date, Published]]:
        """Make usage dates of the container equal to the lake, and say what each took. Raises `CosmosError`; then the next run goes on from what
        was written.
        """
        yield from zip(days, self._publish_all(container, lake, [UsageDate(container, lake, day) for day in days]), strict=True)

    def publish_statements(self, lake: ObjectStore, periods: Sequence[str]) -> Iterator[tuple[str, Published]]:
        """The same for the statements of closed months."""
        yield from zip(periods, self._publish_all(STATEMENTS, lake, [Period(lake, period) for period in periods]), strict=True)

    def unpublished(self, container: Container, lake: ObjectStore) -> dict[dt.date, str]:
        """Usage dates whose version in the lake was not published to the container, as far as the lake remembers, with a digest of that version
        and the container. Raises `CosmosError`.
        """
        found = self._unmarked(container, lake, {str(day): etag for day, etag in Days(lake, container.table).etags().items()})
        return {day: version for name, version in found.items() if container.keeps(day := dt.date.fromisoformat(name))}

    def unpublished_statements(self, lake: ObjectStore) -> dict[str, str]:
        """The same for closed months."""
        closed = Periods(lake).etags()
        return self._unmarked(STATEMENTS, lake, closed) if closed else {}

    def _unmarked(self, container: Container, lake: ObjectStore, current: dict[str, str]) -> dict[str, str]:
        marks = self._marks(container, lake)
        marked = marks.etags()
        differ = (name for name in sorted(current.keys() | marked.keys()) if current.get(name) != marked.get(name))
        return {name: engine.digest(marks.container, current.get(name)) for name in differ}

    def _marks(self, container: Container, lake: ObjectStore) -> Marks:
        proxy = self._container(container)
        found = self._patiently(container.name, proxy.read)
        code = engine.code_digest("publish", *(["billing"] if container is STATEMENTS else []))
        made = engine.digest(found["_rid"], found["_ts"], code, str(container.columns))
        return Marks(lake, f"{urllib.parse.urlsplit(self._endpoint).hostname}/{self._name}/{container.name}", made)

    def _publish_all(self, container: Container, lake: ObjectStore, parts: Sequence[Part]) -> Iterator[Published]:
        marks, done = self._marks(container, lake), dict[str, str | None]()
        try:
            # one connection for all, because making one takes longer than a small day
            with engine.connect(lake.staging()) as db:
                for part in parts:
                    published, done[part.name] = self._publish(part, db)
                    yield published
        finally:
            marks.leave(done)

    def _publish(self, part: Part, db: duckdb.DuckDBPyConnection) -> tuple[Published, str | None]:
        container, throttled, charge = part.container, self._lanes.throttled, self._lanes.charge
        total, give_up = Published(), time.monotonic() + self._patience
        for attempt in itertools.count(1):
            existing = _existing(container, self._documents(container, part.name))
            etag, tally = part.version(), _Tally()
            with contextlib.suppress(_Overtaken):
                self._send_all(container, _batches(container, part.lines(db), existing, tally), tally)
                tally.complete = part.version() == etag
            total += Published(tally.written, 0, tally.deleted)
            if tally.complete:
                return total + Published(0, tally.unchanged, 0, self._lanes.throttled - throttled, self._lanes.charge - charge), etag
            if attempt >= _LOOKS and time.monotonic() > give_up:
                break
        raise CosmosError(f"container {container.name}: other runs kept changing {part.name} while it was published")

    def unequal(self, container: Container, lake: ObjectStore, days: Sequence[dt.date]) -> list[Row]:
        """Where the documents of usage dates differ from the lake in their number, tokens, amounts or numeric twins; empty where they do not."""
        with engine.connect(lake.staging()) as db:
            return [row for day in days for row in self._unequal(container, lake, day, db)]

    def _unequal(self, container: Container, lake: ObjectStore, day: dt.date, db: duckdb.DuckDBPyConnection) -> Iterator[Row]:
        documents = _compared(container, self._documents(container, str(day)))
        columns = {c.name: c.type for c in container.columns}
        names = (*container.partition_key, "currency", *container.amounts, *container.counted)
        typed = ", ".join(f'TRY_CAST("{tables.camel(name)}" AS {columns[name]}) AS "{name}"' for name in dict.fromkeys(names))
        twins = ", ".join(f'"{tables.camel(name)}Number"' for name in container.amounts)
        db.register("documents", documents)
        found = _sums(db, container, f"(SELECT {typed}, {twins} FROM documents)")
        numbers = ", ".join(f'{number(name)} AS "{tables.camel(name)}Number"' for name in container.amounts)
        ledger = _sums(db, container, f"(SELECT *, {numbers} FROM {source(container, lake, day)})")
        keys, values = (*container.partition_key, "currency"), ("lines", "tokens", *container.amounts, "wrong_numbers")
        for key in sorted(ledger.keys() | found.keys(), key=str):
            mine, theirs = ledger.get(key, ("",) * len(values)), found.get(key, ("",) * len(values))
            if mine != theirs:
                figures = {
                    f"{name}{suffix}": digest.text(v) for suffix, of in (("", mine), ("_found", theirs)) for name, v in zip(values, of, strict=True)
                }
                yield {"usage_date": str(day), **dict(zip(keys, map(str, key), strict=True)), **figures}

    def unequal_statements(self, lake: ObjectStore, periods: Sequence[str]) -> list[Row]:
        """Where the documents of closed months say other than their statements; empty where they do not."""
        rows: list[Row] = []
        content = _content(STATEMENTS)
        with engine.connect(lake.staging()) as db:
            for period in periods:
                mine, theirs = (
                    {document["costCenter"]: document for document in documents}
                    for documents in (
                        itertools.chain.from_iterable(documents for _, documents in Period(lake, period).lines(db)),
                        self._documents(STATEMENTS, period),
                    )
                )
                for cost_center in sorted(mine.keys() | theirs.keys(), key=str):
                    one, other = mine.get(cost_center, {}), theirs.get(cost_center, {})
                    if content(one) != content(other):
                        totals = {"totals": _totals(one), "totals_found": _totals(other)}
                        rows.append({"billing_period": period, "cost_center": str(cost_center), **totals})
        return rows

    def _container(self, container: Container) -> ContainerProxy:
        if container.name not in self._containers:
            if is_azure(self._endpoint):
                proxy = self._client.get_database_client(self._name).get_container_client(container.name)
            else:
                proxy = self._patiently(container.name, lambda: self._created(container))
            self._containers[container.name] = proxy
        return self._containers[container.name]

    def _created(self, container: Container) -> ContainerProxy:
        """The container, created together with the database where they are missing."""
        try:
            return self._client.create_database_if_not_exists(self._name).create_container_if_not_exists(
                container.name,
                _partition_key(container),
                indexing_policy=container.policy,
                default_ttl=container.ttl,
                offer_throughput=ThroughputProperties(auto_scale_max_throughput=_AUTOSCALE),
            )
        except CosmosResourceExistsError:
            return self._created(container)  # another run was faster between our look and our creation

    def _documents(self, container: Container, name: str) -> Iterator[Document]:
        # across partitions, so that it finds the documents of cost centres and periods that have no lines any more
        query = self._container(container).query_items(
            f"SELECT * FROM c WHERE c.{tables.camel(container.by)} = @name",
            parameters=[{"name": "@name", "value": name}],
            enable_cross_partition_query=True,
            max_item_count=_PAGE,
        )
        pages = query.by_page()
        while (page := self._patiently(container.name, lambda: next(pages, None))) is not None:
            yield from page

    def _send_all(self, container: Container, batches: "Iterator[tuple[Key, list[_Operation]]]", tally: "_Tally") -> None:
        lock, errors = threading.Lock(), list[BaseException]()

        def work() -> None:
            while not errors:
                try:
                    with lock:
                        batch = next(batches, None)
                    if batch is None:
                        return
                    self._send(container, *batch, tally)
                except BaseException as error:
                    errors.append(error)

        with ThreadPoolExecutor(_REQUESTS) as pool:
            for _ in range(_REQUESTS):
                pool.submit(work)
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # an error that is held by a frame of its own traceback keeps the database connection alive

    def _send(self, container: Container, key: Key, operations: "list[_Operation]", tally: "_Tally") -> None:
        proxy = self._container(container)
        value: Any = list(key) if len(key) > 1 else key[0]
        try:
            # the SDK takes the options out of what it is given, so each attempt gets its own
            self._patiently(container.name, lambda: proxy.execute_item_batch([operation.as_tuple() for operation in operations], value))
        except CosmosBatchOperationError as error:
            if error.status_code in _OVERTAKEN:
                raise _Overtaken from error
            raise self._error(container.name, error) from error
        except _TooLarge as error:
            if len(operations) == 1:
                raise CosmosError(f"container {container.name}: document {operations[0].id} is larger than Cosmos DB takes") from error
            half = len(operations) // 2
            self._send(container, key, operations[:half], tally)
            self._send(container, key, operations[half:], tally)
        else:
            tally.confirm(operations)

    def _patiently(self, what: str, action: Callable[[], _T]) -> _T:
        """Do something again until it works, or until what keeps it from working is not going to pass or takes too long."""
        give_up = time.monotonic() + self._patience
        for attempt in itertools.count():
            try:
                with self._lanes.one():
                    return action()
            except (HttpResponseError, ServiceRequestError, ServiceResponseError) as error:
                status = getattr(error, "status_code", None)
                if status == _TOO_LARGE:
                    raise _TooLarge from error
                if isinstance(error, CosmosBatchOperationError):
                    if status not in _PASSING:
                        raise
                    self._lanes.saw_status(status)
                elif isinstance(error, HttpResponseError) and status not in _PASSING and (status, getattr(error, "sub_status", 0)) not in _FAILOVER:
                    raise self._error(what, error) from error
                if time.monotonic() >= give_up:
                    raise self._error(what, error, f" for {self._patience:.0f} seconds") from error
            except AzureError as error:
                raise self._error(what, error) from error
            time.sleep(min(random.uniform(0.05, 0.1) * 2**attempt, 5, max(0.0, give_up - time.monotonic())))  # noqa: S311
        raise AssertionError("the loop has no end")

    def _error(self, what: str, error: AzureError, since: str = "") -> CosmosError:
        status = getattr(error, "status_code", None)
        place = f"{self._endpoint}, database {self._name}, {what if what == 'the account' else f'container {what}'}"
        if isinstance(error, ClientAuthenticationError):
            return CosmosError(f"no sign-in for {self._endpoint}: {error.message}")
        if isinstance(error, CosmosResourceNotFoundError):
            return CosmosError(f"{place}: does not exist")
        if status in (401, 403):
            return CosmosError(f"{place}: access refused ({status}); the identity needs the role Cosmos DB Built-in Data Contributor")
        return CosmosError(f"{place}: {status or type(error).__name__}{since}")


def _credential(endpoint: str, key: str | None) -> Any:
    if is_azure(endpoint):
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()
    if not key:
        raise CosmosError(f"{endpoint} is not an Azure endpoint: set AOAI_COSMOS_KEY to the emulator's key")
    try:
        base64.b64decode(key, validate=True)
    except ValueError:
        raise CosmosError("AOAI_COSMOS_KEY is not the key of an emulator: it is not base64") from None
    return key


def _partition_key(container: Container) -> PartitionKey:
    paths = [f"/{tables.camel(name)}" for name in container.partition_key]
    return PartitionKey(paths) if len(paths) > 1 else PartitionKey(paths[0])


class _TooLarge(Exception):
    """A batch is larger than Cosmos DB takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Operation:
    """One operation of a batch: a new document has no ETag, a deletion no document."""

    id: str
    document: Document | None
    etag: str | None

    def as_tuple(self) -> Any:
        if self.etag is None:
            return "create", (self.document,)
        options = {"if_match_etag": self.etag}
        return ("delete", (self.id,), options) if self.document is None else ("replace", (self.id, self.document), options)


class _Tally:
    """What one look at a day found and did."""

    def __init__(self) -> None:
        self.written = self.unchanged = self.deleted = 0
        self.complete = False
        self._lock = threading.Lock()

    def confirm(self, operations: list[_Operation]) -> None:
        deleted = sum(operation.document is None for operation in operations)
        with self._lock:
            self.deleted += deleted
            self.written += len(operations) - deleted


class _Lanes:
    """How many requests may be under way: half as many after each 429, one more after as many successes. It counts what they cost."""

    def __init__(self) -> None:
        self.throttled, self.charge = 0, Decimal(0)
        self._free, self._busy, self._limit = threading.Condition(), 0, 4.0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._busy < int(self._limit))
            self._busy += 1
        try:
            yield
        finally:
            with self._free:
                self._busy -= 1
                self._free.notify_all()

    def saw(self, response: Any) -> None:
        """Called by the SDK with every answer, those it deals with itself included."""
        answer = response.http_response
        self.saw_status(answer.status_code, Decimal(answer.headers.get("x-ms-request-charge") or 0))

    def saw_status(self, status: int, charge: Decimal = Decimal(0)) -> None:
        with self._free:
            self.charge += charge
            if status == 429:
                self.throttled += 1
                self._limit = max(1.0, self._limit / 2)
            elif status < 400:
                self._limit = min(float(_REQUESTS), self._limit + 1 / self._limit)


def _batches(
    container: Container, lines: Iterable[tuple[Key, Iterable[Document]]], existing: Existing, tally: _Tally
) -> Iterator[tuple[Key, list[_Operation]]]:
    """What makes the existing documents equal to the lines, in batches of one logical partition each. Uses `existing` up."""
    content = _content(container)
    for key, documents in lines:
        yield from _chunked(key, _operations(documents, existing.pop(key, {}), content, tally))
    for key, vanished in existing.items():
        yield from _chunked(key, _operations((), vanished, content, tally))


def _operations(
    documents: Iterable[Document], existing: dict[str, tuple[str, int | None]], content: Callable[[Document], int | None], tally: _Tally
) -> Iterator[_Operation]:
    for document in documents:
        etag, other = existing.pop(document["id"], (None, None))
        if etag is None or other != content(document):
            yield _Operation(document["id"], document, etag)
        else:
            tally.unchanged += 1
    for name, (etag, _) in existing.items():
        yield _Operation(name, None, etag)


def _chunked(key: Key, operations: Iterable[_Operation]) -> Iterator[tuple[Key, list[_Operation]]]:
    operations = iter(operations)
    while chunk := list(itertools.islice(operations, _BATCH)):
        yield key, chunk


def _existing(container: Container, documents: Iterable[Document]) -> Existing:
    partition_key, content = [tables.camel(name) for name in container.partition_key], _content(container)
    found: Existing = {}
    for document in documents:
        key = tuple(document.get(name) for name in partition_key)
        found.setdefault(key, {})[document["id"]] = (document["_etag"], content(document))
    return found


def _content(container: Container) -> Callable[[Document], int | None]:
    """What gives a hash of what a document says, whatever the order of its fields and however Cosmos DB writes its numbers; None for one that
    has not exactly the container's fields, or other than single values in them.
    """
    fields, nested = container.fields, container is STATEMENTS
    values = operator.itemgetter(*fields)

    def content(document: Document) -> int | None:
        try:
            said = _hashable(values(document)) if nested else values(document)
            others = sum(name[0] != "_" for name in document) - len(fields) - 1
            # Python gives -1 and -2 the same hash
            return None if others else hash((said, -1 in said))
        except (KeyError, TypeError):
            return None

    return content


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _hashable(value[name])) for name in sorted(value))
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _totals(document: Document) -> str:
    try:
        return ", ".join(f"{one['total']} {one['currency']}" for one in document["statements"])
    except (KeyError, TypeError):
        return ""


def _compared(container: Container, documents: Iterable[Document]) -> pa.Table:
    """What is compared of documents, as text, and the numeric twins of the amounts."""
    names = dict.fromkeys(map(tables.camel, (*container.partition_key, "currency", *container.amounts, *container.counted)))
    twins = [f"{tables.camel(name)}Number" for name in container.amounts]
    columns: dict[str, list[Any]] = {name: [] for name in (*names, *twins)}
    for document in documents:
        for name in names:
            value = document.get(name)
            columns[name].append(None if value is None else str(value))
        for name in twins:
            value = document.get(name)
            columns[name].append(float(value) if isinstance(value, int | float) else None)
    return pa.table({name: pa.array(values, pa.float64() if name in twins else pa.string()) for name, values in columns.items()})


def _sums(db: duckdb.DuckDBPyConnection, container: Container, source: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Number, tokens, amounts, and how many amounts have another number than text, by logical partition and currency."""
    keys = ", ".join((*container.partition_key, "currency"))
    amounts = ", ".join(f"sum({name})" for name in container.amounts)
    wrong = " + ".join(f'count_if("{tables.camel(n)}Number" IS DISTINCT FROM {number(n)})' for n in container.amounts)
    select = f"SELECT {keys}, count(*), sum({container.tokens}), {amounts}, {wrong} FROM {source} GROUP BY {keys}"
    width = len(container.partition_key) + 1
    return {row[:width]: row[width:] for row in db.execute(select).fetchall()}
