"""What the commands share: the console, progress, and how dates, money and text are read and shown."""

import argparse
import contextlib
import datetime as dt
import warnings
from collections.abc import Iterable, Iterator
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.dates import days_between
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

EXACT = Context(prec=60)
"""For sums and texts of money: Python's usual 28 digits would round what 38 hold."""


def date(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-10-01") from None


def moment(text: str) -> dt.datetime:
    """A date, which stands for its last microsecond (UTC), or a time with its zone; UTC without a zone."""
    with contextlib.suppress(ValueError):
        return dt.datetime.combine(dt.date.fromisoformat(text), dt.time.max)
    try:
        at = dt.datetime.fromisoformat(text)
        if at.tzinfo is None:
            raise ValueError
        return at.astimezone(dt.UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a date such as 2026-10-05 nor a time such as 2026-10-05T12:00Z") from None


def add_range(parser: argparse.ArgumentParser) -> None:
    """The arguments `--from` and `--to`, for `usage_dates`."""
    parser.add_argument("--from", dest="first", type=date, required=True, metavar="DATE", help="first usage date, such as 2026-10-01")
    parser.add_argument("--to", dest="last", type=date, required=True, metavar="DATE", help="last usage date, included")


def usage_dates(arguments: argparse.Namespace, settings: Settings, console: "Console", doing: str) -> list[dt.date]:
    """The days from `--from` to `--to`, up to today. Raises ValueError when they are not in order or before the start date."""
    first, last = arguments.first, arguments.last
    today = dt.datetime.now(dt.UTC).date()
    if not settings.start_date <= first <= min(last, today):
        raise ValueError(f"--from {first} --to {last}: expected days in order, from AOAI_START_DATE {settings.start_date} to today {today}")
    if last > today:
        console.print(f"--to {last} is still to come: {doing} up to today, {today}.", soft_wrap=True)
    return days_between(first, min(last, today))


def open_console() -> "Console":
    from rich.console import Console

    warnings.filterwarnings("ignore", module="dagster")
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


@contextlib.contextmanager
def progress_bar(console: "Console", title: str) -> Iterator[Any]:
    """A progress bar on a terminal; a line per step of work elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        yield lambda done, total, what: console.print(f"{title}: {what} ({done}/{total})", soft_wrap=True)
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def print_stale(console: "Console", days: Iterable[dt.date], what: str) -> None:
    """Say which days have events, prices or fixed costs that their bill does not have yet."""
    days = sorted(days)
    remedy = f"aoai-usage bill --from {days[0]} --to {days[-1]}"
    console.print(f"[yellow]not up to date[/] {len(days)} {what}: {remedy}", soft_wrap=True)


def money(cost: Decimal) -> str:
    """All the digits there are: rounding is the statement's business."""
    whole, _, fraction = digits(cost).partition(".")
    return f"{whole}.{fraction.ljust(2, '0')}"


def digits(number: Decimal) -> str:
    """All the digits there are, without zeros at the end of a fraction."""
    text = f"{number:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
