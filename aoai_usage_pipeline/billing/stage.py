"""What both stages share: find the days whose input changed, make them in chunks, hold the ones that fail, write the others."""

import abc
import concurrent.futures
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence

import duckdb

from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.lake.held import Held
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.rating.overlay import PriceOverflow
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore

Progress = Callable[[int, int, str], None]

OVERTAKEN = "overtaken"
"""The reason that is none: another run replaced what the day is made from, or the day itself, and it is made again."""

_CHUNK_EVENTS = 600_000
_ATTEMPTS = 5
_WRITES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Day:
    """What became of one usage date: made, unchanged, or held with the reason."""

    usage_date: dt.date
    outcome: str
    reason: str | None = None


class Unbalanced(Exception):
    """A day's requests, tokens or cost do not add up; the message has both figures."""


class Stage(abc.ABC):
    """One stage over days: what it makes, and how the days become up to date."""

    table: str

    def __init__(self, lake: ObjectStore) -> None:
        self._lake = lake
        self.held = Held(lake, self.table)

    @abc.abstractmethod
    def plan(self, days: Sequence[dt.date]) -> dict[dt.date, str]:
        """The input digest of each day that differs from what its objects were made from."""

    @property
    @abc.abstractmethod
    def objects(self) -> tuple[Days, Days]:
        """The tables whose days the stage makes, in the order in which it replaces them."""

    @abc.abstractmethod
    def size(self, day: dt.date) -> int:
        """Roughly how many events the day has, for the size of chunks."""

    @abc.abstractmethod
    def make(self, db: duckdb.DuckDBPyConnection, days: dict[dt.date, str]) -> dict[dt.date, str]:
        """Compute the days inside the connection; returns the reasons of those that must be held."""

    @abc.abstractmethod
    def write(self, db: duckdb.DuckDBPyConnection, day: dt.date, input_digest: str, etags: list[str | None]) -> None:
        """Replace the day's objects. Raises `Changed`."""

    def run(self, days: Sequence[dt.date], progress: Progress) -> Iterator[Day]:
        """Bring the days up to date and say what became of each; one that fails keeps its previous version and stops no other."""
        wanted = sorted(set(days))
        held_before = set(self.held.reasons())
        for _ in range(_ATTEMPTS):
            footers = [table.footers() for table in self.objects]
            versions = {day: [found[day][1] if day in found else None for found in footers] for day in wanted}
            stale = self.plan(wanted)
            for day in wanted:
                if day not in stale:
                    if day in held_before:
                        self.held.release(day)
                    yield Day(day, "unchanged")
            wanted, done = [], len(days) - len(stale)
            for chunk in self._chunks(stale):
                for day, reason in self._make(chunk, versions):
                    if reason is None:
                        if day in held_before:
                            self.held.release(day)
                        yield Day(day, "made")
                    elif reason == OVERTAKEN:
                        wanted.append(day)
                    else:
                        self.held.hold(day, reason, chunk[day])
                        yield Day(day, "held", reason=reason)
                done += len(chunk)
                progress(done, len(days), f"{self.table} up to {max(chunk)}")
            if not wanted:
                return
        for day in wanted:
            self.held.hold(day, "other runs kept replacing the day while it was made", "")
            yield Day(day, "held", reason="other runs kept replacing the day while it was made")

    def _chunks(self, stale: dict[dt.date, str]) -> Iterator[dict[dt.date, str]]:
        chunk: dict[dt.date, str] = {}
        size = 0
        for day, input_digest in stale.items():
            if chunk and size + self.size(day) > _CHUNK_EVENTS:
                yield chunk
                chunk, size = {}, 0
            chunk[day] = input_digest
            size += self.size(day)
        if chunk:
            yield chunk

    def _make(self, chunk: dict[dt.date, str], versions: dict[dt.date, list[str | None]]) -> Iterator[tuple[dt.date, str | None]]:
        try:
            with engine.connect(self._lake.staging()) as db:
                reasons = self.make(db, chunk)
                with concurrent.futures.ThreadPoolExecutor(_WRITES) as pool:
                    writes = {
                        day: pool.submit(self.write, db.cursor(), day, input_digest, versions[day])
                        for day, input_digest in chunk.items()
                        if day not in reasons
                    }
                    yield from reasons.items()
                    for day, write in writes.items():
                        try:
                            write.result()
                            yield day, None
                        except Changed:
                            yield day, OVERTAKEN
                        except Unbalanced as error:
                            yield day, str(error)
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException):
            raise  # a fault of ours, not of the day's data
        except (duckdb.Error, NotFound, PriceOverflow) as error:
            if len(chunk) > 1:
                # find the day that fails, so that the others are made
                for day, input_digest in chunk.items():
                    yield from self._make({day: input_digest}, versions)
            else:
                yield next(iter(chunk)), _reason(error)


def made_from(tables_of_day: Iterable[Days]) -> dict[dt.date, set[object]]:
    """The input digests that the tables' objects of each day name, None for a missing object: exactly one when all are up to date."""
    footers = [table.footers() for table in tables_of_day]
    return {day: {found[day][0].get("input") if day in found else None for found in footers} for found in footers for day in found}


def by_day(db: duckdb.DuckDBPyConnection, select: str) -> dict[dt.date, tuple[int, ...]]:
    return {day: tuple(rest) for day, *rest in db.execute(select).fetchall()}


def meters_in_use(db: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """The meters that any row of the table may use: most gateways see neither audio nor images, and every meter costs time for every request."""
    details = match.METER_DETAILS
    seen = ", ".join(f"coalesce(bool_or({column} > 0), false)" for column in details.values())
    [flags] = db.execute(f"SELECT {seen} FROM {table}").fetchall()
    unused = {meter for meter, used in zip(details, flags, strict=True) if not used}
    return [meter for meter in match.METER_QUANTITIES if meter not in unused]


def _reason(error: Exception) -> str:
    if isinstance(error, PriceOverflow):
        return str(error)
    if isinstance(error, (duckdb.OutOfRangeException, duckdb.ConversionException)):
        return f"a quantity, price or cost of the day is too large for its column: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {error}"
