"""The CSV files: their columns, how each value is read, and every fault of a file with its line and column."""

import bisect
import csv
import dataclasses
import datetime as dt
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from aoai_usage_pipeline.reference.capacity import Capacity, Reservation, check_capacity, check_reservation
from aoai_usage_pipeline.reference.checks import Fault, check_contract, check_markup, check_price, check_rate


class ReferenceDataError(ValueError):
    """One or more files cannot be used. The message has a line per fault: file, line, column, what is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One file: the columns that match an event, the columns it gives, and which of those must not be blank."""

    name: str
    matches: tuple[str, ...]
    gives: tuple[str, ...]
    required: tuple[str, ...] = ()
    unique: str | None = None
    to_the_minute: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.matches, *self.gives, "effective_from", "effective_to")


PRICE_BOOK = Spec(
    "price_book.csv",
    ("model", "model_version", "deployment_sku", "region", "service_tier", "context_band"),
    ("price_id", "meter", "unit_price", "unit_tokens", "currency", "meter_id", "source"),
    ("price_id", "meter", "unit_price", "unit_tokens", "currency"),
    "price_id",
)
DEPLOYMENTS = Spec(
    "deployments.csv",
    ("gateway", "subscription_id", "product", "operation", "deployment", "reported_model"),
    ("model", "model_version", "deployment_sku", "region"),
)
COST_CENTERS = Spec("cost_centers.csv", ("subscription_id", "product", "application"), ("team", "cost_center", "department"))
_OVERLAID = ("price_id", *PRICE_BOOK.matches, "meter")
CONTRACT_PRICES = Spec("contract_prices.csv", _OVERLAID, ("unit_price", "unit_tokens", "discount", "source"))
MARKUPS = Spec("markups.csv", _OVERLAID, ("markup", "source"), ("markup",))
EXCHANGE_RATES = Spec("exchange_rates.csv", ("from_currency", "to_currency"), ("rate", "source"), ("from_currency", "to_currency", "rate"))
CAPACITY = Spec(
    "capacity.csv",
    ("gateway", "deployment"),
    (
        "capacity_id", "ptus", "hourly_price", "currency", "idle_to", "method", "shares", "fixed_part", "output_ratio", "units_per_ptu_minute",
        "deployment_sku", "region", "source",
    ),
    ("deployment", "ptus", "hourly_price", "currency"),
    "capacity_id",
    to_the_minute=True,
)  # fmt: skip
RESERVATIONS = Spec(
    "reservations.csv",
    (),
    ("reservation_id", "deployment_sku", "region", "ptus", "term_price", "term", "currency", "idle_to", "source"),
    ("reservation_id", "deployment_sku", "ptus", "term_price", "term", "currency"),
    "reservation_id",
)
SPECS = (PRICE_BOOK, DEPLOYMENTS, COST_CENTERS, CONTRACT_PRICES, MARKUPS, EXCHANGE_RATES, CAPACITY, RESERVATIONS)
"""Every file there is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row: text by column, None where unset or (in a matching column) anything matches. `line` is its line in the file."""

    line: int
    values: dict[str, str | None]
    effective_from: dt.date | None
    effective_to: dt.date | None

    def effective_on(self, day: dt.date) -> bool:
        return (self.effective_from is None or self.effective_from <= day) and (self.effective_to is None or day < self.effective_to)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The rows of all files, valid as a whole."""

    price_book: tuple[Row, ...]
    deployments: tuple[Row, ...]
    cost_centers: tuple[Row, ...]
    contract_prices: tuple[Row, ...] = ()
    markups: tuple[Row, ...] = ()
    exchange_rates: tuple[Row, ...] = ()
    capacity: tuple[Capacity, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    billing_currency: str | None = None

    @property
    def _files(self) -> tuple[tuple[Row, ...], ...]:
        return self.price_book, self.deployments, self.cost_centers, self.contract_prices, self.markups, self.exchange_rates

    @functools.cached_property
    def _changes(self) -> list[dt.date]:
        """The days on which a row begins or ends. Between two of them every day has the same rows, which are put together once."""
        return sorted({day for rows in self._files for row in rows for day in (row.effective_from, row.effective_to) if day})

    @functools.cached_property
    def _periods(self) -> dict[int, "Reference"]:
        return {}

    def on(self, day: dt.date) -> "Reference":
        """The rows that are in force on a day."""
        period = bisect.bisect_right(self._changes, day)
        if period not in self._periods:
            in_force = (tuple(row for row in rows if row.effective_on(day)) for rows in self._files)
            self._periods[period] = Reference(*in_force, billing_currency=self.billing_currency)
        found = self._periods[period]
        capacity = tuple(part for row in self.capacity if (part := row.on(day)))
        reservations = tuple(part for row in self.reservations if (part := row.on(day)))
        return dataclasses.replace(found, capacity=capacity, reservations=reservations) if capacity or reservations else found

    def content(self) -> str:
        """A hash of what the rows say, without where they stand in the file."""
        return self._content

    @functools.cached_property
    def version(self) -> str:
        """A hash of what all rows say and when they are in force: the same for files that say the same in another order or layout."""
        said: dict[str, object] = {"billing_currency": self.billing_currency} if self.billing_currency else {}
        for field in dataclasses.fields(self):
            if field.name == "billing_currency":
                continue
            rows = sorted(json.dumps(_said(row), sort_keys=True, default=str) for row in getattr(self, field.name))
            # a file that is empty, absent or not known yet makes no difference
            said |= {field.name: rows} if rows else {}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]

    @functools.cached_property
    def _content(self) -> str:
        said = [sorted(json.dumps(row.values, sort_keys=True) for row in rows) for rows in self._files]
        fixed = (*self.capacity, *self.reservations)
        said.append(sorted(json.dumps(dataclasses.asdict(row), sort_keys=True, default=str) for row in fixed))
        return hashlib.sha256(json.dumps([said, self.billing_currency]).encode()).hexdigest()


def load(folder: Path, billing_currency: str | None = None) -> Reference:
    """Read and validate every file in `folder`; an absent file is empty. Raises `ReferenceDataError` with all faults of all files."""
    if not folder.is_dir():
        raise ReferenceDataError(f"folder {folder} does not exist (AOAI_REFERENCE_DIR)")
    faults: list[str] = []
    read = {spec: _read(folder / spec.name, spec, faults) for spec in SPECS}
    rows = [read[spec] for spec in (PRICE_BOOK, DEPLOYMENTS, COST_CENTERS, CONTRACT_PRICES, MARKUPS, EXCHANGE_RATES)]
    capacity, reservations = read[CAPACITY], read[RESERVATIONS]
    faults.extend(f"{folder / CAPACITY.name}: {fault}" for fault in _mixed_currencies(capacity, reservations))
    if faults:
        raise ReferenceDataError("\n".join(faults))
    return Reference(
        *rows,
        capacity=tuple(Capacity.of(row.values, row.effective_from, row.effective_to) for row in capacity),
        reservations=tuple(Reservation.of(row.values, row.effective_from, row.effective_to) for row in reservations),
        billing_currency=billing_currency,
    )


def _said(row: object) -> dict[str, object]:
    """What a row says: what it leaves out says nothing, and neither does its place in the file."""
    said = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "line"}  # type: ignore[arg-type]
    said |= said.pop("values", {})
    return {name: value for name, value in said.items() if value is not None}


def parse_price_book(text: str, path: Path) -> tuple[Row, ...]:
    """The rows of a price book's text; `path` is where faults are said to be. Raises `ReferenceDataError` with all faults."""
    faults: list[str] = []
    rows = _parse(text, path, PRICE_BOOK, faults)
    if faults:
        raise ReferenceDataError("\n".join(faults))
    return rows


def _read(path: Path, spec: Spec, faults: list[str]) -> tuple[Row, ...]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return ()
    except UnicodeDecodeError as error:
        faults.append(f"{path}: not UTF-8 text (byte {error.start})")
        return ()
    return _parse(text, path, spec, faults)


def _parse(text: str, path: Path, spec: Spec, faults: list[str]) -> tuple[Row, ...]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        faults.append(f"{path}: line {reader.line_num}: not CSV: {error}")
        return ()
    header = [name.strip() for name in lines[0][1]] if lines else []
    before = len(faults)
    for name in header:
        if name not in spec.columns or header.count(name) > 1:
            faults.append(f"{path}: line 1: {'repeated' if name in spec.columns else 'unknown'} column {name!r}; expected {', '.join(spec.columns)}")
    for name in spec.required:
        if header and name not in header:
            faults.append(f"{path}: line 1: column {name!r} is missing")
    if len(faults) > before:
        return ()
    rows: list[Row] = []
    for line, fields in lines[1:]:
        if not any(field.strip() for field in fields):
            continue
        if len(fields) != len(header):
            faults.append(f"{path}: line {line}: {len(fields)} values for {len(header)} columns")
            continue

        def fault(column: str, message: str, line: int = line) -> None:
            faults.append(f"{path}: line {line}, column {column}: {message}")

        rows.append(_row(spec, line, dict(zip(header, (field.strip() for field in fields), strict=True)), fault))
    faults.extend(f"{path}: {fault}" for fault in _conflicts(spec, rows))
    return tuple(rows)


def _row(spec: Spec, line: int, given: dict[str, str], fault: Fault) -> Row:
    values: dict[str, str | None] = {name: given.get(name) or None for name in spec.columns[:-2]}
    for name in spec.matches:
        if values[name] == "*":
            values[name] = None
    for name in spec.required:
        if values[name] is None:
            fault(name, "must not be blank")
    read = _minute if spec.to_the_minute else _date
    dates = {name: read(name, given.get(name, ""), fault) for name in ("effective_from", "effective_to")}
    start, end = dates["effective_from"], dates["effective_to"]
    if start and end and start >= end:
        fault("effective_to", f"{end} is not after effective_from {start}")
    if spec is PRICE_BOOK:
        check_price(values, fault)
    elif spec is CONTRACT_PRICES:
        check_contract(values, fault)
    elif spec is MARKUPS:
        check_markup(values, fault)
    elif spec is EXCHANGE_RATES:
        check_rate(values, fault)
    elif spec is CAPACITY:
        check_capacity(values, start, fault)
    elif spec is RESERVATIONS:
        check_reservation(values, fault)
    return Row(line, values, start, end)


def _date(name: str, text: str, fault: Fault) -> dt.date | None:
    if not text:
        return None
    try:
        if len(text) != len("2026-09-01"):
            raise ValueError
        return dt.date.fromisoformat(text)
    except ValueError:
        fault(name, f"{text!r} is not a date such as 2026-09-01")
        return None


def _minute(name: str, text: str, fault: Fault) -> dt.datetime | None:
    if len(text) == len("2026-09-01T10:15Z"):
        try:
            return dt.datetime.strptime(text, "%Y-%m-%dT%H:%MZ")
        except ValueError:
            fault(name, f"{text!r} is not a minute such as 2026-09-01T10:15Z")
            return None
    return _midnight(_date(name, text, fault))


def _midnight(day: dt.date | None) -> dt.datetime | None:
    return dt.datetime.combine(day, dt.time()) if day else None


def _conflicts(spec: Spec, rows: list[Row]) -> Iterator[str]:
    """Rows that could both be the best match of one event, and repeated ids."""
    if spec.unique:
        seen: dict[str | None, int] = {}
        for row in rows:
            first = seen.setdefault(row.values[spec.unique], row.line)
            if first != row.line:
                yield f"line {row.line}, column {spec.unique}: {row.values[spec.unique]!r} is also in line {first}"
    groups: dict[tuple[object, bool, int], dict[tuple[str, ...], list[Row]]] = {}
    for row in rows if spec.matches else ():
        exact = tuple(name for name in spec.matches if row.values[name] is not None)
        # a price book says which meter a row prices, other files which meters a row matches
        meter = None if "meter" in spec.matches else row.values.get("meter")
        # a row for one price is more exact than any pattern
        groups.setdefault((meter, "price_id" in exact, len(exact)), {}).setdefault(exact, []).append(row)
    ties: dict[int, int] = {}
    for patterns in groups.values():
        for first, second in itertools.combinations_with_replacement(patterns, 2):
            shared = [name for name in first if name in second]
            alike: dict[tuple[str | None, ...], list[Row]] = {}
            for row in patterns[first]:
                alike.setdefault(tuple(row.values[name] for name in shared), []).append(row)
            for row in patterns[second]:
                for other in alike.get(tuple(row.values[name] for name in shared), ()):
                    if other is not row and _overlap(other, row):
                        earlier, later = sorted((other.line, row.line))
                        ties[later] = min(earlier, ties.get(later, earlier))
                        break
    for later, earlier in sorted(ties.items()):
        yield (
            f"line {later} ties with line {earlier}: both can match the same event in the same period equally well; "
            "make one of them more exact, or end its period"
        )


def _overlap(first: Row, second: Row) -> bool:
    return (first.effective_to is None or second.effective_from is None or second.effective_from < first.effective_to) and (
        second.effective_to is None or first.effective_from is None or first.effective_from < second.effective_to
    )


def _mixed_currencies(capacity: tuple[Row, ...], reservations: tuple[Row, ...]) -> Iterator[str]:
    """Capacity that a reservation covers, but in another currency: the two cannot be netted."""
    for row, reservation in itertools.product(capacity, reservations):
        mine, other = row.values, reservation.values
        covered = mine["deployment_sku"] is not None and all(mine[name] == other[name] for name in ("deployment_sku", "region"))
        dated = dataclasses.replace(
            reservation, effective_from=_midnight(reservation.effective_from), effective_to=_midnight(reservation.effective_to)
        )
        if covered and mine["currency"] and other["currency"] and mine["currency"] != other["currency"] and _overlap(row, dated):
            yield (
                f"line {row.line}, column currency: {mine['currency']}, but line {reservation.line} of {RESERVATIONS.name}, which covers it, "
                f"is in {other['currency']}"
            )
