"""What the commands share: the console, progress, and how dates, money and text are read and shown."""

import argparse
import contextlib
import datetime as dt
import warnings
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def date(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-10-01") from None


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
