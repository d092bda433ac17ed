"""Days and ranges of days, which every room speaks of."""

import datetime as dt
from collections.abc import Iterable, Iterator


def days_between(first: dt.date, last: dt.date) -> list[dt.date]:
    """The days from `first` to `last`, both included; none when they are not in order."""
    return [first + dt.timedelta(n) for n in range((last - first).days + 1)]


def spans(days: Iterable[dt.date], reach: int = 1) -> Iterator[tuple[dt.date, dt.date]]:
    """The ranges of days in which each day is at most `reach` days after the one before."""
    ordered = sorted(set(days))
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] - ordered[i - 1] > dt.timedelta(days=reach):
            yield ordered[start], ordered[i - 1]
            start = i
