"""Why a line of the bill is what it is: its price row, contract, markup and exchange rate, or its capacity, and the requests it came from.

Nothing is priced here: the line's own price key goes through the same matching and the same arithmetic as the bill, and what comes out
must be what the line says.
"""

import contextlib
import csv
import dataclasses
import datetime as dt
import difflib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import capacity, fixed_costs
from aoai_usage_pipeline.billing.periods import Periods
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.rating.overlay import Overlay, Prices, unrounded
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.reference.capacity import Capacity, Reservation
from aoai_usage_pipeline.reference.checks import ONE_BY_ONE
from aoai_usage_pipeline.reference.files import CONTRACT_PRICES, EXCHANGE_RATES, MARKUPS, PRICE_BOOK, Row, Spec
from aoai_usage_pipeline.storage import ObjectStore

PER_PAGE = 20

_ONE_RATE = "(SELECT * FROM rate ORDER BY ALL LIMIT 1)"
_NEAREST = 5
_SIMILAR = 0.6
_PRICE = (
    "price_id", "pricing_status", "unit_price", "unit_tokens", "currency", "list_unit_price", "contracted_unit_price", "pricing_currency",
    "exchange_rate",
)  # fmt: skip

Line = dict[str, Any]
"""A row of `daily_billing` by column."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What one request contributes to a line, and where its canonical copy was captured. `cost` is None where the line is unpriced."""

    request_id: str
    event_time: dt.datetime
    quantity: Decimal
    cost: Decimal | None
    context_band: str
    copies: int
    conflict: bool
    blob: str
    partition_id: str
    sequence_number: int
    offset: str
    record_index: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """One page of a line's requests in the order of their time, and the total of all of them."""

    count: int
    quantity: Decimal
    cost: Decimal | None
    page: int
    pages: int
    rows: tuple[Request, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """Where a price comes from: the row that applied before its less exact `rivals`, and what changed it.

    `key` is what the row was found by; `bands` are the context bands of the line's requests. `before_exchange` are the list, contracted
    and billed prices in the currency of the row and `exact` those in the billed currency, both with all their digits; the line has
    `exact` rounded to 9 places. `exact` is None when there is no exchange rate to `billed_in`, and then the line is unpriced.
    """

    key: Mapping[str, str | None]
    bands: tuple[str, ...]
    row: Row
    rivals: tuple[Row, ...]
    contract: Row | None
    markup: Row | None
    exchange: Row | None
    before_exchange: Prices
    exact: Prices | None
    billed_in: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """A price row that does not apply: the matching columns in which it differs from the key, and whether it was in force on the day."""

    row: Row
    differs: tuple[str, ...]
    in_force: bool


@dataclasses.dataclass(frozen=True, slots=True)
class NoPrice:
    """Why there is no price: no row for `key`; the nearest ones, best first. Without a model there is nothing to look for."""

    key: Mapping[str, str | None]
    bands: tuple[str, ...]
    nearest: tuple[Near, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """Where a fixed cost comes from: its row as the file has it, and in the billed currency; `exchange` is the rate between them.

    `line` is the allocation with its driver, `hours` its parts. `day_ptu_hours` and `day_cost` are what all lines of the row have on the
    day; `amortised` is the day's part of a reservation's term.
    """

    row: Capacity | Reservation
    converted: Capacity | Reservation
    exchange: Row | None
    line: capacity.CapacityLine
    hours: tuple[capacity.HourPart, ...]
    day_ptu_hours: Decimal
    day_cost: Decimal
    amortised: Decimal | None

    @property
    def cost(self) -> Decimal:
        return sum((hour.part for hour in self.hours), Decimal(0))


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """A line with exactly one of: why it cannot be explained (`outdated`), its price, why it has none, or its fixed cost.

    `settled` says of the first that it is so for good: billing the day again does not change it.
    """

    line: Line
    outdated: str | None = None
    settled: bool = False
    price: Price | None = None
    no_price: NoPrice | None = None
    fixed: Fixed | None = None
    requests: Requests | None = None

    @property
    def adds_up(self) -> bool:
        """Whether the line is its parts, and its quantity times its price. Of a fixed cost, the parts are the hours."""
        line, parts = self.line, self.requests
        if self.fixed:
            return (self.fixed.cost, self.fixed.line.ptu_hours) == (line["cost"], line["quantity"])
        if line["unit_price"] is not None:
            quantity, price, cost = (Fraction(line[name]) for name in ("quantity", "unit_price", "cost"))
            if quantity * price != cost * line["unit_tokens"]:
                return False
        return parts is not None and (parts.quantity, parts.cost) == (line["quantity"], line["cost"])


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A day's cost by currency, how many lines have none, and its dearest lines."""

    cost: Mapping[str, Decimal]
    without_cost: int
    lines: tuple[Line, ...]


class Bills:
    """The billed days of a lake, to be explained with the reference data of now."""

    def __init__(self, lake: ObjectStore, reference: Reference) -> None:
        self._lake, self._reference = lake, reference
        self._billing, self._enriched = Days(lake, "daily_billing"), Days(lake, "enriched_usage")

    def lines(self, days: Sequence[dt.date], filters: Mapping[str, str] | None = None) -> list[Line]:
        """The lines of days in which columns have these texts, the dearest ones first, those without a cost last."""
        wanted = filters or {}
        paths = self._billing.paths(list(days))
        if not paths:
            return []
        conditions = " AND ".join(f"{name} = ?" for name in wanted) or "true"
        with engine.connect(self._lake.staging()) as db:
            source = engine.read_parquet(paths, tables.empty_select(tables.DAILY_BILLING))
            select = f"SELECT {tables.select_list(tables.DAILY_BILLING)} FROM {source} WHERE {conditions} ORDER BY cost DESC NULLS LAST, line_id"
            found = db.execute(select, list(wanted.values())).fetchall()
        return [dict(zip(tables.names(tables.DAILY_BILLING), row, strict=True)) for row in found]

    def summaries(self, days: Sequence[dt.date], count: int) -> dict[dt.date, Summary]:
        """What the billed ones of some days cost, each with up to `count` lines."""
        paths = self._billing.paths(list(days))
        if not paths:
            return {}
        with engine.connect(self._lake.staging()) as db:
            source = engine.read_parquet(paths, tables.empty_select(tables.DAILY_BILLING))
            totals = db.execute(f"SELECT usage_date, currency, sum(cost), count(*) - count(cost) FROM {source} GROUP BY ALL ORDER BY ALL").fetchall()
            rank = "row_number() OVER (PARTITION BY usage_date ORDER BY cost DESC NULLS LAST, line_id)"
            select = f"SELECT {tables.select_list(tables.DAILY_BILLING)} FROM {source} QUALIFY {rank} <= {count} ORDER BY usage_date, {rank}"
            dearest = db.execute(select).fetchall()
        lines = [dict(zip(tables.names(tables.DAILY_BILLING), row, strict=True)) for row in dearest]
        return {
            day: Summary(
                {currency: cost for on, currency, cost, _ in totals if on == day and cost is not None},
                sum(without for on, _, _, without in totals if on == day),
                tuple(line for line in lines if line["usage_date"] == day),
            )
            for day in {on for on, *_ in totals}
        }

    def find(self, line_id: str, day: dt.date | None, published: Path) -> Line:
        """The line with this id. Its day, when it is not given, is what the published file says, else every day is read. Raises ValueError."""
        day = day or _published_day(line_id, published)
        found = self.lines(self._billing.existing() if day is None else [day], {"line_id": line_id})
        if not found:
            when = f" on {day}" if day else ""
            raise ValueError(f"no line of the bill{when} has the id {line_id}; aoai-usage explain --date DATE lists the lines of a day")
        return found[0]

    def explain(self, line: Line, page: int = 1) -> Explanation:
        """Everything that made the line, and one page of its requests. Raises ValueError when there is no such page."""
        if line["charge_class"]:
            month = f"the closed month {line['correction_of']}"
            what = f"the line corrects {month}: it is what the usage costs today, less what {month} and earlier corrections have"
            return Explanation(line, what, settled=True)
        if outdated := self._outdated(line["usage_date"]):
            return Explanation(line, outdated)
        found = self._explained(line, page)
        if not found.adds_up and line["billing_period"] in Periods(self._lake).closed():
            what = "the month is closed and the line stands as it was; what is known today differs and is in correction lines"
            return Explanation(line, what, settled=True)
        return found

    def _explained(self, line: Line, page: int) -> Explanation:
        with self._opened(line) as db:
            if line["meter"] in fixed_costs.METERS:
                return self._fixed(db, line)
            if not db.execute("SELECT count(*) FROM rate").fetchall()[0][0]:
                return Explanation(
                    line, "the program and the reference data of now do not give the line's price: the day was billed by another version"
                )
            requests = _requests(db, page)
            key, bands = _key(db)
            if line["price_id"] is None:
                return Explanation(line, no_price=NoPrice(key, bands, self._nearest(line["usage_date"], key)), requests=requests)
            return Explanation(line, price=self._price(db, line, key, bands), requests=requests)

    def write_parts(self, explanation: Explanation, path: Path) -> int:
        """Write what the line is made of, all its requests or hours, as CSV; returns how many there are."""
        if explanation.fixed:
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["hour", "judged_by_hour", "ptu_hours", "hour_cost", "hour_cost_prepaid", "share", "cost"])
                for part in explanation.fixed.hours:
                    writer.writerow([part.hour, part.judged_by, part.ptu_hours, part.cost, part.prepaid, part.share, f"{part.part:f}"])
            return len(explanation.fixed.hours)
        with self._opened(explanation.line) as db:
            order = "ORDER BY event_time, request_id"
            [(count,)] = db.execute(f"COPY (SELECT * FROM parts {order}) TO {engine.literal(str(path))} (FORMAT csv, HEADER)").fetchall()
        return count

    def _outdated(self, day: dt.date) -> str | None:
        """Why the day's lines cannot be explained with what there is now."""
        enriched, billed = self._enriched.footer(day)[0], self._billing.footer(day)[0]
        if not enriched or billed.get("input") != enriched.get("input"):
            return "the requests of the day were enriched again after it was billed"
        if enriched.get("reference") != engine.digest(self._reference.on(day).content()):
            return "the day was made with other reference data than that of now"
        return None

    @contextlib.contextmanager
    def _opened(self, line: Line) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with the reference data, the day's `enriched` requests, the `line`, and its `rate` and `parts` when it is of usage."""
        with engine.connect(self._lake.staging()) as db:
            source = engine.read_parquet(self._enriched.paths([line["usage_date"]]), tables.empty_select(tables.ENRICHED_USAGE))
            db.execute(f"CREATE VIEW enriched AS SELECT * FROM {source}")
            match.load_reference(db, self._reference)
            if line["meter"] not in fixed_costs.METERS:
                texts = {name: [None if value is None else str(value)] for name, value in line.items()}
                given = pa.table({name: pa.array(text, pa.string()) for name, text in texts.items()})  # noqa: F841 - read by name below
                db.execute(f"CREATE TABLE line AS SELECT {tables.select_list(tables.DAILY_BILLING)} FROM given")
                meter, kind = _meter(line)
                # cached input may be rated as input
                self._load_parts(db, meter, kind, [meter] if meter != "cached_input" else [meter, "input"])
            yield db

    def _load_parts(self, db: duckdb.DuckDBPyConnection, meter: str, kind: str | None, meters: list[str]) -> None:
        db.execute(
            engine.sql_file("billing", "line_requests.sql").format(
                quantity=match.METER_QUANTITIES[meter],
                same_dimensions=" AND ".join(f"e.{name} IS NOT DISTINCT FROM l.{name}" for name in tables.DIMENSIONS),
                of_image=("true" if meter != "image" else f"e.image_kind = {engine.literal(kind)}" if kind else "e.image_kind IS NULL"),
            )
        )
        match.match_prices(db, "of_line", self._reference, meters)
        db.execute(
            engine.sql_file("billing", "line_parts.sql").format(
                meter=meter,
                same_price=" AND ".join(f"r.{name} IS NOT DISTINCT FROM l.{name}" for name in _PRICE),
                cost=match.cost(meter, "p.quantity", "r.token_price"),
                same_price_key=match.same_price_key("p"),
            )
        )

    def _price(self, db: duckdb.DuckDBPyConnection, line: Line, key: Mapping[str, str | None], bands: tuple[str, ...]) -> Price:
        meter = "'input'" if line["pricing_status"] == "fallback" else "meter"
        # requests of several context bands may share a price row, but not the rows that it won over
        of_bands = (f"(SELECT * REPLACE ({meter} AS meter) FROM rate WHERE context_band = '{band}' ORDER BY ALL LIMIT 1)" for band in bands)
        found = {row.line: row for of_band in of_bands for row in self._fitting(db, PRICE_BOOK, of_band)}
        row, *rivals = found.values()
        contract, markup = (next(iter(self._fitting(db, spec, _ONE_RATE)), None) for spec in (CONTRACT_PRICES, MARKUPS))
        currencies = f"(SELECT usage_date, pricing_currency AS from_currency, currency AS to_currency FROM {_ONE_RATE})"
        exchange = next(iter(self._fitting(db, EXCHANGE_RATES, currencies)), None)
        unit_tokens = _decimal(contract, "unit_tokens")
        overlay = Overlay(
            unit_price=_decimal(contract, "unit_price"),
            unit_tokens=None if unit_tokens is None else int(unit_tokens),
            discount=_decimal(contract, "discount"),
            markup=_decimal(markup, "markup"),
        )
        exchanged = dataclasses.replace(overlay, exchange_rate=_decimal(exchange, "rate"))
        price, unit, fractional = Decimal(row.values["unit_price"] or 0), int(row.values["unit_tokens"] or 1), key["meter"] in ONE_BY_ONE
        # a price that nothing changes stands as it is in its row
        before = Prices(price, price, price, unit) if exchanged == Overlay() else unrounded(price, unit, overlay, fractional=fractional)
        exact = before if exchanged == Overlay() else unrounded(price, unit, exchanged, fractional=fractional)
        billed_in = self._reference.billing_currency or row.values["currency"]
        return Price(key, bands, row, tuple(rivals), contract, markup, exchange, before, None if line["unit_price"] is None else exact, billed_in)

    def _fitting(self, db: duckdb.DuckDBPyConnection, spec: Spec, source: str) -> list[Row]:
        by_line = {row.line: row for row in getattr(self._reference, spec.name.removesuffix(".csv"))}
        return [by_line[line] for line in match.fitting(db, spec, source)]

    def _nearest(self, day: dt.date, key: Mapping[str, str | None]) -> tuple[Near, ...]:
        """Rows of the same meter for this model, or one of a similar name, those that differ least first."""
        model, meter = key["model"], key["meter"] or ""
        ranked: list[tuple[tuple[int, int, float, int], Near]] = []
        for row in self._reference.price_book if model else ():
            if (row.values["meter"] or "").partition("/")[0] != meter:
                continue
            differs = tuple(name for name in PRICE_BOOK.matches if row.values[name] not in (None, key[name]))
            likeness = difflib.SequenceMatcher(None, model, row.values["model"] or model).ratio()
            if likeness >= _SIMILAR:
                near = Near(row, differs, row.effective_on(day))
                strangeness = 2 if "model" in differs else int(row.values["model"] is None)
                ranked.append(((strangeness, len(differs) + (not near.in_force), -likeness, row.line), near))
        return tuple(near for _, near in sorted(ranked, key=lambda pair: pair[0])[:_NEAREST])

    def _fixed(self, db: duckdb.DuckDBPyConnection, line: Line) -> Explanation:
        day, in_force = line["usage_date"], self._reference.on(line["usage_date"])
        rows, reservations = fixed_costs.converted_on(self._reference, day)
        usage = fixed_costs.hourly_usage(db, "enriched").get(day, [])
        all_costs = fixed_costs.of_day(day, self._reference, usage)
        all_lines = [fixed.line for fixed in all_costs]
        departments = fixed_costs.departments_of(self._reference)
        compared = (*tables.LINE_KEY, "quantity", "cost")
        wanted = {name: None if line[name] is None else str(line[name]) for name in compared}
        rows_of_all = [fixed_costs.row_of(day, cost, departments) for cost in all_costs]
        alike = [number for number, row in enumerate(rows_of_all) if {name: row.get(name) for name in compared} == wanted]
        if not alike:
            return Explanation(line, "the program of now does not make this line: the day was billed by another version")
        found = all_lines[alike[0]]
        reserved = found.meter == capacity.UNUSED
        of_row = [other for other in all_lines if other.capacity_id == found.capacity_id and (other.meter == capacity.UNUSED) == reserved]
        original, converted = (
            _with_id(found.capacity_id, where[reserved]) for where in ((in_force.capacity, in_force.reservations), (rows, reservations))
        )
        pair = (original.currency, converted.currency)
        rate = next((r for r in in_force.exchange_rates if (r.values["from_currency"], r.values["to_currency"]) == pair), None)
        fixed = Fixed(
            original,
            converted,
            rate,
            found,
            tuple(capacity.hours_of(found, day, rows, reservations, usage)),
            sum((other.ptu_hours for other in of_row), Decimal(0)),
            sum((other.cost for other in of_row), Decimal(0)),
            capacity.amortised(converted, day) if isinstance(converted, Reservation) else None,
        )
        return Explanation(line, fixed=fixed)


def _published_day(line_id: str, published: Path) -> dt.date | None:
    """The day of the line in the published file, None when that is not there or does not have it."""
    if not published.is_file():
        return None
    with contextlib.suppress(duckdb.Error), duckdb.connect(str(published), read_only=True) as db:
        for (day,) in db.execute("SELECT usage_date FROM daily_billing WHERE line_id = ?", [line_id]).fetchall():
            return day
    return None


def _meter(line: Line) -> tuple[str, str | None]:
    """The meter that a request counts on, and for images their size and quality."""
    meter, _, kind = line["meter"].partition("/")
    return meter, kind or None


def _requests(db: duckdb.DuckDBPyConnection, page: int) -> Requests:
    [(count, quantity, cost)] = db.execute("SELECT count(*), sum(quantity), sum(cost) FROM parts").fetchall()
    pages = -(-count // PER_PAGE)
    if not 1 <= page <= pages:
        raise ValueError(f"--page {page}: the line has {count} requests on {pages} pages")
    select = f"SELECT * FROM parts ORDER BY event_time, request_id LIMIT {PER_PAGE} OFFSET {(page - 1) * PER_PAGE}"
    return Requests(count, quantity, cost, page, pages, tuple(Request(*row) for row in db.execute(select).fetchall()))


def _key(db: duckdb.DuckDBPyConnection) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """What the line's price is looked up by, and the context bands of its requests."""
    names = (*PRICE_BOOK.matches, "meter")
    [row] = db.execute(f"SELECT {', '.join(names)} FROM {_ONE_RATE}").fetchall()
    bands = db.execute("SELECT DISTINCT context_band FROM parts ORDER BY 1").fetchall()
    return dict(zip(names, row, strict=True)), tuple(band for (band,) in bands)


def _decimal(row: Row | None, name: str) -> Decimal | None:
    text = row.values[name] if row else None
    return None if text is None else Decimal(text)


def _with_id(row_id: str, rows: Sequence[Capacity | Reservation]) -> Capacity | Reservation:
    return next(row for row in rows if row_id == (row.capacity_id if isinstance(row, Capacity) else row.reservation_id))
