"""Prices of one key through time: periods without a price, and prices that jump."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

from aoai_usage_pipeline.reference.files import PRICE_BOOK, Row

JUMP = 3
"""A price that is more than so many times, or less than one so many times, the price before is suspicious."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two rows of the same key, one after the other."""

    earlier: Row
    later: Row


def pairs(rows: Iterable[Row]) -> list[Pair]:
    """Consecutive rows of each key (the matching columns and the meter), in the order of the file."""
    series: dict[tuple[str | None, ...], list[Row]] = defaultdict(list)
    for row in rows:
        series[(*(row.values[name] for name in PRICE_BOOK.matches), row.values["meter"])].append(row)
    ordered = (sorted(rows, key=lambda row: str(row.effective_from or "")) for rows in series.values())
    return [Pair(*pair) for rows in ordered for pair in itertools.pairwise(rows)]


def missing_periods(rows: Iterable[Row]) -> list[Pair]:
    """Where a row ends and the next one of its key starts later."""
    return [p for p in pairs(rows) if p.earlier.effective_to and p.later.effective_from and p.earlier.effective_to < p.later.effective_from]


def jumps(rows: Iterable[Row]) -> list[Pair]:
    """Where the price of one unit goes up or down more than `JUMP` times within one currency."""
    return [p for p in pairs(rows) if p.earlier.values["currency"] == p.later.values["currency"] and _jumps(_each(p.earlier), _each(p.later))]


def _jumps(one: Decimal, other: Decimal) -> bool:
    return max(one, other) > JUMP * min(one, other)


def _each(row: Row) -> Decimal:
    return Decimal(row.values["unit_price"] or 0) / int(row.values["unit_tokens"] or 1)
