"""Billing periods: months that are open, and months that were closed, whose lines stand for ever.

Closing a month copies its lines into one object that nothing replaces. From then on a day of that month keeps those lines, and whatever
differs from them, by late events or by other prices, becomes correction lines in the oldest month that is still open.
"""

import calendar
import dataclasses
import datetime as dt
import re
from collections.abc import Iterable, Sequence

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days, footer_metadata
from aoai_usage_pipeline.storage import Changed, ObjectStore

_FOLDER = "closed/"
_AMOUNTS = ("quantity", "cost", "list_cost", "contracted_cost")
_STAMPS = ("billing_period", "charge_class", "correction_of")
_TOLD = ("list_unit_price", "contracted_unit_price", "pricing_currency", "exchange_rate")
_KEY = [column for column in tables.names(tables.DAILY_BILLING) if column not in (*_AMOUNTS, *_STAMPS, *_TOLD, "line_id")]


class AlreadyClosed(ValueError):
    """The month was closed before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Closing:
    """What closing a month froze: its number of lines and the digest over them."""

    period: str
    lines: int
    digest: str


def days_of(period: str) -> tuple[dt.date, dt.date]:
    """The first and the last day of a month written YYYY-MM. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", period):
        raise ValueError(f"{period!r} is not a billing period such as 2026-09")
    year, month = map(int, period.split("-"))
    return dt.date(year, month, 1), dt.date(year, month, calendar.monthrange(year, month)[1])


class Periods:
    """The closed months of a lake."""

    def __init__(self, lake: ObjectStore) -> None:
        self._lake = lake

    def closed(self) -> list[str]:
        """The closed months, oldest first."""
        return sorted(self.etags())

    def etags(self) -> dict[str, str]:
        """The ETag of every closed month's lines."""
        found = (
            (re.fullmatch(rf"{_FOLDER}billing_period=([0-9-]+)/data\.parquet", stored.name), stored.etag) for stored in self._lake.objects(_FOLDER)
        )
        return {match[1]: etag for match, etag in found if match}

    def lines(self, periods: Sequence[str]) -> str:
        """SQL: a FROM item with the frozen lines of closed months."""
        empty = tables.empty_select(tables.DAILY_BILLING)
        return engine.read_parquet(self._lake.local_paths([_name(period) for period in periods]), empty) if periods else f"({empty})"

    def copy(self, into: ObjectStore) -> None:
        """Copy the closed months into a lake that has none."""
        for period in self.closed():
            into.write(_name(period), self._lake.read(_name(period))[0], replacing=None)

    def close(self, period: str, billing: Days) -> Closing:
        """Freeze the lines of a month as the days have them. Raises `AlreadyClosed`.

        A day that another run replaces meanwhile is deleted, so that the next run makes it again beside the frozen lines.
        """
        _, last = days_of(period)
        before = {day: etag for day, (_, etag) in billing.footers().items() if day <= last}
        with engine.connect(self._lake.staging()) as db:
            empty = tables.empty_select(tables.DAILY_BILLING)
            days = engine.read_parquet(billing.paths(sorted(before)), empty) if before else f"({empty})"
            select = f"SELECT {tables.select_list(tables.DAILY_BILLING)} FROM {days} WHERE billing_period = {engine.literal(period)} ORDER BY ALL"
            lines = db.execute(select).fetchall()
            closing = Closing(period, len(lines), digest.of_day(lines))
            footer = {"digest": closing.digest, "closed_at": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S}"}
            staged = engine.stage(db, self._lake.staging(), select, footer_metadata(footer))
        try:
            self._lake.write(_name(period), staged, replacing=None)
        except Changed:
            raise AlreadyClosed(f"{period} is closed already") from None
        for day, (_, etag) in billing.footers().items():
            if day <= last and before.get(day) != etag:
                billing.delete(day)
        return closing


def correct(db: duckdb.DuckDBPyConnection, periods: Periods, closed: Sequence[str], days: Iterable[dt.date]) -> None:
    """Make `daily_billing` of some days what closed months leave of it: their lines stay as they were frozen, and what differs from them
    follows as corrections in the oldest open month.
    """
    frozen_days = [day for day in days if f"{day:%Y-%m}" in closed]
    if not frozen_days:
        return
    columns = tables.select_list(tables.DAILY_BILLING)
    dates = ", ".join(f"DATE '{day}'" for day in frozen_days)
    db.execute("ALTER TABLE daily_billing RENAME TO computed")
    months = ", ".join(map(engine.literal, closed))
    db.execute(f"CREATE TABLE frozen AS SELECT {columns} FROM {periods.lines(closed)} WHERE usage_date IN ({dates})")
    correction = engine.sql_file("billing", "corrections.sql").format(
        key=", ".join(_KEY),
        amounts=", ".join(_AMOUNTS),
        negated=", ".join(f"-{name} AS {name}" for name in _AMOUNTS),
        sums=", ".join(f"sum({name}) AS {name}" for name in _AMOUNTS),
        told=", ".join(_TOLD),
        any_told=", ".join(f"any_value({name}) AS {name}" for name in _TOLD),
        differs=" OR ".join(f"coalesce(sum({name}), 0) <> 0" for name in _AMOUNTS),
        closed=months,
        line_id=tables.line_id(),
        open=engine.literal(_following(closed[-1])),
    )
    db.execute(f"CREATE TABLE daily_billing AS SELECT {columns} FROM ({correction}) ORDER BY ALL")


def _following(period: str) -> str:
    return f"{days_of(period)[1] + dt.timedelta(1):%Y-%m}"


def _name(period: str) -> str:
    return f"{_FOLDER}billing_period={period}/data.parquet"
