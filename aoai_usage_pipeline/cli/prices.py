"""`aoai-usage prices`: bring the price book up to a list of the Azure Retail Prices API, and look for gaps in it."""

import argparse
import dataclasses
import datetime as dt
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.cli.console import date, money, open_console, plain
from aoai_usage_pipeline.dates import days_between
from aoai_usage_pipeline.pipeline import Pipeline, Unpriced
from aoai_usage_pipeline.settings import EXAMPLE_REFERENCE_DIR, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from aoai_usage_pipeline.reference.files import Reference, Row
    from aoai_usage_pipeline.reference.proposal import Entry, Proposal

_NEW_SHOWN = 20
_CHECKED_DAYS = 35


def add_parser(commands: Any) -> None:
    prices = commands.add_parser("prices", help="import public prices into the price book, or look for gaps in it")
    verbs = prices.add_subparsers(required=True, metavar="VERB")
    load = verbs.add_parser("import", help="propose price book rows from the Azure Retail Prices API; --write writes them")
    load.add_argument("source", metavar="SOURCE", help="a .json or .json.gz file, a folder of such snapshots, or an address of the API")
    load.add_argument("--write", action="store_true", help="write the proposal to the price book")
    load.add_argument("--price-book", metavar="FILE", help="the price book (price_book.csv in AOAI_REFERENCE_DIR)")
    load.add_argument("--month", type=_month, metavar="YYYY-MM", help="the month whose bill is compared (the current one)")
    load.add_argument("--effective-from", type=date, metavar="DATE", help="first day of new prices (the one that the list names)")
    load.add_argument("--strict", action="store_true", help="exit code 1, and nothing written, when a meter is not understood")
    load.set_defaults(run=_import)
    check = verbs.add_parser("check", help="list usage without a price, periods without a price and prices that jump")
    check.add_argument("--from", dest="first", type=date, metavar="DATE", help=f"first usage date looked at ({_CHECKED_DAYS} days up to the last)")
    check.add_argument("--to", dest="last", type=date, metavar="DATE", help="last usage date, included (today)")
    check.set_defaults(run=_check)


def _month(text: str) -> dt.date:
    if not re.fullmatch(r"\d{4}-\d{2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a month such as 2026-10")
    return date(f"{text}-01")


def _import(arguments: argparse.Namespace, settings: Settings) -> int:
    from aoai_usage_pipeline.reference.proposal import Book, Proposal
    from aoai_usage_pipeline.reference.retail import snapshots

    console = open_console()
    if settings.reference_in_container and not arguments.price_book:
        raise ValueError("AOAI_REFERENCE_DIR is a container: download price_book.csv, name it with --price-book, and upload it again")
    path = Path(arguments.price_book or Path(settings.reference_dir) / "price_book.csv")
    if arguments.write and not arguments.price_book and path.parent.resolve() == EXAMPLE_REFERENCE_DIR.resolve():
        raise ValueError("AOAI_REFERENCE_DIR is the example set of the package: copy it to a folder of your own, or name a file with --price-book")
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist")
    today = dt.datetime.now(dt.UTC).date()
    book = Book(path)
    lists = snapshots(arguments.source, today)
    before = book.rows()
    proposal = Proposal(book, lists, arguments.effective_from)
    after = book.rows()
    _print_proposal(console, proposal, [one.date for one in lists])
    month = arguments.month or today.replace(day=1)
    next_month = (month + dt.timedelta(31)).replace(day=1)
    _print_impact(console, Pipeline(settings), month, next_month, before, after)
    if arguments.strict and proposal.not_understood:
        console.print("Nothing written: --strict, and there are meters that are not understood.", soft_wrap=True)
        return 1
    if not arguments.write:
        console.print(f"Nothing written: --write writes this to {plain(str(path))}", soft_wrap=True)
    elif proposal.new or proposal.changed or proposal.ended:
        book.write()
        console.print(f"Written to {plain(str(path))}", soft_wrap=True)
    else:
        console.print(f"Nothing to write: {plain(str(path))} is up to date.", soft_wrap=True)
    return 0


def _print_proposal(console: "Console", proposal: "Proposal", dates: list[dt.date]) -> None:
    from rich.table import Table

    from aoai_usage_pipeline.reference.retail_meters import KINDS

    if len(dates) > 1:
        console.print(f"{len(dates)} lists from {dates[0]} to {dates[-1]}; counted is the last one.", soft_wrap=True)
    unknown = sum(proposal.not_understood.values())
    console.print(
        f"Azure price list of {dates[-1]}: {proposal.items:,} prices, {proposal.usage:,} of usage, {sum(proposal.kinds.values()):,} of other kinds, "
        f"{unknown:,} not understood",
        soft_wrap=True,
    )
    for kind, count in sorted(proposal.kinds.items()):
        console.print(f"  {count:,} {KINDS[kind]}", soft_wrap=True)
    for reason, count in sorted(proposal.not_understood.items()):
        console.print(f"[yellow]not understood[/] {count:,} x {plain(reason)}", soft_wrap=True)
    if proposal.not_understood:
        console.print("  Give such a meter a row in the price book with its meter_id, and every import follows it.", soft_wrap=True)
    console.print(
        f"Price book: {len(proposal.new):,} new, {len(proposal.changed):,} changed, {len(proposal.ended):,} ended, {proposal.unchanged:,} unchanged",
        soft_wrap=True,
    )
    if proposal.older:
        console.print(f"  {proposal.older:,} prices are from before a row that the price book has: ignored", soft_wrap=True)
    if proposal.unlisted:
        console.print(f"  {len(proposal.unlisted):,} rows are not in this list: kept", soft_wrap=True)
    if proposal.changed:
        table = Table(title="Changed prices", title_justify="left")
        for name in ("Row", "From"):
            table.add_column(name, overflow="fold")
        for name in ("Old price", "New price", "Change"):
            table.add_column(name, justify="right", no_wrap=True)
        for change in proposal.changed:
            percent = "-" if change.percent is None else f"{change.percent:+}%"
            table.add_row(plain(change.new.price_id), str(change.new.start), _price(change.old), _price(change.new), percent)
        console.print(table)
    for entry in proposal.new[:_NEW_SHOWN]:
        console.print(f"[green]new[/] {plain(entry.price_id)}: {_price(entry)} from {entry.start}", soft_wrap=True)
    if len(proposal.new) > _NEW_SHOWN:
        console.print(f"[green]new[/] and {len(proposal.new) - _NEW_SHOWN:,} more", soft_wrap=True)
    for entry in proposal.ended:
        console.print(f"[yellow]ended[/] {plain(entry.price_id)}: {_price(entry)} up to {entry.end}, not included", soft_wrap=True)


def _price(entry: "Entry") -> str:
    return f"{entry.price.amount:f} {entry.currency} / {entry.price.unit_tokens:,}"


def _print_impact(
    console: "Console", pipeline: Pipeline, month: dt.date, next_month: dt.date, before: "Iterable[Row]", after: "Iterable[Row]"
) -> None:
    """The month's bill with the old and with the new price book."""
    from rich.table import Table

    days = days_between(month, next_month - dt.timedelta(1))
    reference = pipeline.reference()
    old, new = (pipeline.rebill(days, dataclasses.replace(reference, price_book=tuple(rows))) for rows in (before, after))
    if not old and not new:
        console.print(f"No priced usage in {month:%Y-%m}, so its bill does not change.", soft_wrap=True)
        return
    table = Table(title=f"Bill of {month:%Y-%m}", title_justify="left")
    table.add_column("Model")
    for name in ("Now", "With these prices", "Difference"):
        table.add_column(name, justify="right", no_wrap=True)
    nothing = Decimal(0)
    for model, currency in sorted(old.keys() | new.keys(), key=str):
        one, other = old.get((model, currency)), new.get((model, currency))
        cells = ("-" if cost is None else f"{money(cost)} {currency}" for cost in (one, other))
        table.add_row(plain(model or "(no model)"), *cells, f"{money((other or nothing) - (one or nothing))} {currency}")
    table.add_section()
    for currency in sorted({currency for _, currency in old.keys() | new.keys()}):
        one, other = (sum((cost for (_, c), cost in costs.items() if c == currency), nothing) for costs in (old, new))
        table.add_row("Total", f"{money(one)} {currency}", f"{money(other)} {currency}", f"{money(other - one)} {currency}")
    console.print(table)


def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    from aoai_usage_pipeline.reference import ReferenceDataError
    from aoai_usage_pipeline.reference.series import JUMP, jumps, missing_periods

    console = open_console()
    pipeline = Pipeline(settings)
    last = arguments.last or dt.datetime.now(dt.UTC).date()
    first = arguments.first or last - dt.timedelta(_CHECKED_DAYS - 1)
    if first > last:
        raise ValueError(f"--from {first} --to {last}: expected days in order")
    try:
        reference = pipeline.reference()
    except ReferenceDataError as error:
        console.print("The reference data cannot be loaded, and nothing is billed, until these faults are mended:", soft_wrap=True)
        for fault in str(error).splitlines():
            console.print(f"[bold red]fault[/] {plain(fault)}", soft_wrap=True)
        return 1
    days = days_between(first, last)
    found = 0
    for use in pipeline.unpriced(days, reference):
        found += use.status == "unpriced"
        for line in _describe(use, reference):
            console.print(line, soft_wrap=True)
    for free in pipeline.unpaid(days, reference):
        found += 1
        console.print(
            f"[bold red]no capacity[/] {plain(free.deployment)} ({free.deployment_sku}, gateway {plain(free.gateway or '-')}): "
            f"used on {free.days} days from {free.first} to {free.last}, when capacity.csv does not have it: this usage costs nothing",
            soft_wrap=True,
        )
    for pair in missing_periods(reference.price_book):
        found += 1
        console.print(
            f"[bold red]missing period[/] {_row(pair.earlier)} ends on {pair.earlier.effective_to}, and {_row(pair.later)}, which follows it, "
            f"starts on {pair.later.effective_from}: the days between have no price of this kind",
            soft_wrap=True,
        )
    for pair in jumps(reference.price_book):
        found += 1
        console.print(
            f"[bold red]price jump[/] {_row(pair.later)}: from {_amount(pair.earlier)} to {_amount(pair.later)} on {pair.later.effective_from}, "
            f"more than {JUMP} times apart",
            soft_wrap=True,
        )
    kinds = "usage without a price or capacity, missing periods, overlapping rows, price jumps"
    console.print(f"{found or 'No'} findings from {first} to {last} ({kinds}).", soft_wrap=True)
    return 1 if found else 0


def _amount(row: "Row") -> str:
    return f"{row.values['unit_price']} {row.values['currency']} / {int(row.values['unit_tokens'] or 1):,}"


def _row(row: "Row") -> str:
    return f"{plain(row.values['price_id'] or '')} (line {row.line})"


def _describe(use: Unpriced, reference: "Reference") -> list[str]:
    """What has no price, and what the price book has that is near."""
    version = f" {use.model_version}" if use.model_version else ""
    where = f"{use.deployment_sku or 'unknown deployment type'}, {use.region or 'unknown region'}, tier {use.service_tier}"
    via = f", deployment {', '.join(use.deployments)}" if use.deployments else ""
    what = f"{use.model or 'unknown model'}{version} ({where}{via})"
    when = f"from {use.first} to {use.last}"
    if use.status == "fallback":
        return [f"[dim]note[/] {plain(what)}: {use.quantity:,} of {use.meter} at the input price, {when}: there is no row for {use.meter}"]
    lines = [f"[bold red]no price[/] {plain(what)}: {use.quantity:,} of {use.meter}, {when}"]
    if use.pricing_currency:
        return [*lines, f"  its price is in {use.pricing_currency}, and exchange_rates.csv has no rate to {reference.billing_currency} then"]
    near = [row.values for row in reference.price_book if row.values["model"] == use.model and row.values["meter"] == use.meter]
    if not use.model:
        lines.append("  the events name no model: add the deployment to deployments.csv")
    elif not near:
        lines.append(f"  the price book has no {plain(use.meter)} price of {plain(use.model)}: add one, or import the price list")
    else:
        kinds = sorted({" ".join(values[name] or f"any {name}" for name in ("model_version", "deployment_sku", "region")) for values in near})
        lines.append(f"  the price book has {plain(use.meter)} of {plain(use.model)} for other usage: {plain(', '.join(kinds[:5]))}")
    if use.model and not use.deployment_sku:
        lines.append("  add the deployment to deployments.csv, so that its type and region are known")
    return lines
