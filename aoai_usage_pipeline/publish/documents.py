"""The documents of Cosmos DB: which containers there are, and the rows of the lake as documents.

A document has the columns of its table in camelCase. A decimal is an exact string, with a number beside it for programs that need one.
"""

import dataclasses
import datetime as dt
import itertools
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, Protocol

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.billing.daily_tables import BILLED_TOKENS
from aoai_usage_pipeline.billing.periods import Periods
from aoai_usage_pipeline.billing.statement import Statement, StatementLine, statements
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.storage import ObjectStore

USAGE_DAYS = 90
"""How many usage dates up to today the container `usage` has; older ones are deleted when they are published, or by its TTL."""

_FETCHED = 1000
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:@=+ -]*[A-Za-z0-9._:@=+-]")
_LONGEST_ID = 255

Document = dict[str, Any]
Key = tuple[str | None, ...]
"""The partition key of a logical partition."""


@dataclasses.dataclass(frozen=True)
class Container:
    """What a container holds: a table of the lake, the columns of its hierarchical partition key, the column that is the id, what is indexed
    beside the partition key, SQL for the tokens of a row and the amounts, whose sums are compared with the ledger's, for how many days
    documents are kept, and the column that says what is published at a time.
    """

    name: str
    table: str
    columns: tuple[tables.Column, ...]
    partition_key: tuple[str, ...]
    id: str
    indexed: tuple[str, ...]
    tokens: str
    counted: tuple[str, ...]
    amounts: tuple[str, ...]
    days: int | None = None
    by: str = "usage_date"

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a document, without its id, and SQL for the value of each."""
        values = itertools.chain.from_iterable(map(_values, self.columns))
        return {field.name: sql for field, sql in zip(tables.document_fields(self.columns), values, strict=True)}

    @property
    def policy(self) -> dict[str, Any]:
        """The indexing policy: what people filter by, and nothing else."""
        paths = [{"path": f"/{tables.camel(name)}/?"} for name in dict.fromkeys((self.by, *self.partition_key, *self.indexed))]
        return {"indexingMode": "consistent", "automatic": True, "includedPaths": paths, "excludedPaths": [{"path": "/*"}]}

    @property
    def ttl(self) -> int | None:
        """Seconds after which Cosmos DB deletes a document: two days later than the pipeline would."""
        return self.days and (self.days + 2) * 86_400

    def keeps(self, day: dt.date) -> bool:
        """Whether the container has the documents of a usage date."""
        return self.days is None or day > dt.datetime.now(dt.UTC).date() - dt.timedelta(self.days)


DAILY_BILLING = Container(
    "daily-billing",
    "daily_billing",
    tables.DAILY_BILLING,
    partition_key=("cost_center", "billing_period"),
    id="line_id",
    indexed=("subscription_id", "product", "application", "team", "department", "deployment", "model", "meter", "charge_class"),
    tokens=BILLED_TOKENS,
    counted=("meter", "quantity"),
    amounts=("cost", "list_cost", "contracted_cost"),
)
USAGE = Container(
    "usage",
    "enriched_usage",
    tables.ENRICHED_USAGE,
    partition_key=("subscription_id", "usage_date"),
    id="request_id",
    indexed=("event_time", "product", "application", "team", "cost_center", "deployment", "model", "end_user", "pricing_status"),
    tokens="coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)",
    counted=("prompt_tokens", "completion_tokens"),
    amounts=("cost",),
    days=USAGE_DAYS,
)
CONTAINERS = {container.table: container for container in (DAILY_BILLING, USAGE)}
"""The containers by the table of the lake they equal."""


class _Statements(Container):
    """What a cost centre pays for a closed month is one document, with a list of its statements, one for each currency."""

    @property
    def fields(self) -> dict[str, str]:
        return dict.fromkeys(("billingPeriod", "costCenter", "statements"), "")


STATEMENTS = _Statements("statements", "closed", (), ("billing_period",), "cost_center", ("cost_center",), "", (), (), by="billing_period")
_STATED = tuple(field.name for field in dataclasses.fields(Statement) if field.name not in ("cost_center", "lines"))
_LINE = tuple(field.name for field in dataclasses.fields(StatementLine))
_DECIMALS = {"unit_price", "quantity", "cost", "total", "amount", "rounding"}


def document_id(text: str) -> str:
    """A text as an id that Cosmos DB takes: what an id or a URL cannot have is written `~` and hexadecimal, and long ids end in a hash."""
    if _PLAIN_ID.fullmatch(text) and len(text) <= _LONGEST_ID:
        return text
    safe = "".join(c if _PLAIN_ID.fullmatch(c) else "".join(f"~{byte:02x}" for byte in c.encode("utf-8", "surrogatepass")) for c in text)
    return safe if len(safe) <= _LONGEST_ID else f"{safe[:200]}~{engine.digest(text)}"


class Part(Protocol):
    """What is published at a time: a usage date of a table, or a closed month."""

    @property
    def container(self) -> Container: ...

    @property
    def name(self) -> str:
        """What its documents have in the field of the container's column `by`."""

    def version(self) -> str | None:
        """The ETag in the lake of what it is made from; None where there is nothing."""

    def lines(self, db: duckdb.DuckDBPyConnection) -> Iterator[tuple[Key, Iterator[Document]]]:
        """Its documents, by logical partition."""


@dataclasses.dataclass(frozen=True)
class UsageDate:
    """A usage date of a container's table."""

    container: Container
    lake: ObjectStore
    day: dt.date

    @property
    def name(self) -> str:
        return str(self.day)

    def version(self) -> str | None:
        return self.lake.etag(Days(self.lake, self.container.table).name(self.day))

    def lines(self, db: duckdb.DuckDBPyConnection) -> Iterator[tuple[Key, Iterator[Document]]]:
        return lines(self.container, self.lake, self.day, db)


@dataclasses.dataclass(frozen=True)
class Period:
    """The statements of a closed month."""

    lake: ObjectStore
    name: str
    container: Container = STATEMENTS

    def version(self) -> str | None:
        return Periods(self.lake).etags().get(self.name)

    def lines(self, db: duckdb.DuckDBPyConnection) -> Iterator[tuple[Key, Iterator[Document]]]:
        found = statements(db, Periods(self.lake).lines([self.name]), self.name)
        of_centers = itertools.groupby(found, lambda one: one.cost_center)
        yield (self.name,), (_statement(self.name, cost_center, of) for cost_center, of in of_centers)


def _statement(period: str, cost_center: str, found: Iterable[Statement]) -> Document:
    stated = [_said(one, _STATED) | {"lines": [_said(line, _LINE) for line in one.lines]} for one in found]
    return {"id": document_id(cost_center), "billingPeriod": period, "costCenter": cost_center, "statements": stated}


def _said(of: Statement | StatementLine, names: Iterable[str]) -> Document:
    said: Document = {}
    for name in names:
        value = getattr(of, name)
        said[tables.camel(name)] = digest.text(value) if isinstance(value, Decimal) else value
        if name in _DECIMALS:
            said[f"{tables.camel(name)}Number"] = None if value is None else float(value)
    return said


def _values(column: tables.Column) -> tuple[str, ...]:
    """SQL for what a document says of a column: one value, two of a decimal."""
    name = f'"{column.name}"'
    if column.type.startswith("DECIMAL"):
        text = f"CAST({name} AS VARCHAR)"
        return f"rtrim(rtrim({text}, '0'), '.')", number(column.name)
    if column.type == "TIMESTAMP":
        return (f"strftime({name}, '%Y-%m-%dT%H:%M:%S.%fZ')",)
    return (f"CAST({name} AS VARCHAR)" if column.type == "DATE" else name,)


def number(name: str) -> str:
    """SQL: a decimal as the nearest number."""
    # by way of its text, because DuckDB's own cast is not always the nearest
    return f'CAST(CAST("{name}" AS VARCHAR) AS DOUBLE)'


def source(container: Container, lake: ObjectStore, day: dt.date) -> str:
    """SQL: a FROM item with the day's rows as the lake has them."""
    paths = Days(lake, container.table).paths([day]) if container.keeps(day) else []
    empty = tables.empty_select(container.columns)
    return engine.read_parquet(paths, empty) if paths else f"({empty})"


def lines(container: Container, lake: ObjectStore, day: dt.date, db: duckdb.DuckDBPyConnection) -> Iterator[tuple[Key, Iterator[Document]]]:
    """The day's rows as documents, by logical partition."""
    fields = container.fields
    key = ", ".join(f'CAST("{name}" AS VARCHAR)' for name in container.partition_key)
    select = ", ".join(f'{sql} AS "{name}"' for name, sql in fields.items())
    names, width = ["id", *fields], len(container.partition_key)
    found = db.execute(f'SELECT {key}, "{container.id}", {select} FROM {source(container, lake, day)} ORDER BY {key}')
    rows = itertools.chain.from_iterable(iter(lambda: found.fetchmany(_FETCHED), []))
    for of, group in itertools.groupby(rows, lambda row: row[:width]):
        yield of, (_document(names, row[width:]) for row in group)


def _document(names: list[str], values: tuple[Any, ...]) -> Document:
    document = dict(zip(names, values, strict=True))
    document["id"] = document_id(document["id"])
    return document
