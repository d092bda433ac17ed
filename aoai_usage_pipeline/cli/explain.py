"""`aoai-usage explain`: where a line of the bill comes from, for whoever has to defend it."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.cli.console import date, digits, money, open_console, plain
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from aoai_usage_pipeline.billing.explain import Explanation, Fixed, Line, NoPrice, Price, Requests
    from aoai_usage_pipeline.reference.files import Row

_FILTERS = [name for name in tables.LINE_KEY if name not in ("usage_date", "charge_class", "correction_of")]


def add_parser(commands: Any) -> None:
    explain = commands.add_parser("explain", help="explain a line of the bill: its price, or its capacity, and the requests it came from")
    explain.add_argument("line_id", nargs="?", metavar="LINE_ID", help="column line_id of daily_billing")
    explain.add_argument("--date", type=date, metavar="DATE", help="usage date of the line; without LINE_ID, the day whose lines are listed")
    for name in _FILTERS:
        explain.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"only lines with this {name.replace('_', ' ')}")
    explain.add_argument("--page", type=int, default=1, metavar="N", help="page of the requests, 20 on each (1)")
    explain.add_argument("--csv", type=Path, metavar="FILE", help="write all requests of the line, or the hours of a fixed cost")
    explain.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace, settings: Settings) -> int:
    filters = {name: text for name in _FILTERS if (text := getattr(arguments, name)) is not None}
    if arguments.line_id is None and arguments.date is None:
        raise ValueError("explain needs a LINE_ID, or a --date whose lines are listed")
    console, bills = open_console(), Pipeline(settings).bills()
    if arguments.line_id is not None:
        found = [bills.find(arguments.line_id, arguments.date, Path(settings.warehouse_path))]
        found = [line for line in found if all(line[name] == text for name, text in filters.items())]
    else:
        found = bills.lines([arguments.date], filters)
    if not found:
        wanted = "".join(f", {name.replace('_', ' ')} {text}" for name, text in filters.items())
        raise ValueError(f"no line of the bill fits: {arguments.date or arguments.line_id}{wanted}")
    if len(found) > 1:
        if arguments.csv:
            raise ValueError(f"--csv writes the requests of one line, but {len(found)} lines fit")
        _print_lines(console, found)
        return 0
    explanation = bills.explain(found[0], arguments.page)
    for text in _text(explanation):
        console.print(text, soft_wrap=True)
    if explanation.outdated:
        if arguments.csv:
            console.print(f"Nothing was written to {plain(str(arguments.csv))}.", soft_wrap=True)
        return 1
    if arguments.csv:
        count = bills.write_parts(explanation, arguments.csv)
        console.print(f"{count:,} {'hours' if explanation.fixed else 'requests'} written to {plain(str(arguments.csv))}", soft_wrap=True)
    return 0 if explanation.adds_up else 1


def _print_lines(console: "Console", lines: "list[Line]") -> None:
    from rich.table import Table

    table = Table(title=f"{len(lines):,} lines of {lines[0]['usage_date']}", title_justify="left")
    for name in ("Line", "Cost centre", "Deployment", "Model", "Meter"):
        table.add_column(name, overflow="fold", no_wrap=name == "Line")
    for name in ("Quantity", "Cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        names = (plain(line[name] or "-") for name in ("line_id", "cost_center", "deployment", "model", "meter"))
        correction = f" (corrects {line['correction_of']})" if line["charge_class"] else ""
        table.add_row(*names, digits(line["quantity"]), _cost(line) + correction)
    console.print(table)
    console.print(f"Explain one: aoai-usage explain LINE --date {lines[0]['usage_date']}", soft_wrap=True)


def _text(explanation: "Explanation") -> Iterator[str]:
    line = explanation.line
    day = line["usage_date"]
    if explanation.outdated:
        remedy = "" if explanation.settled else f". Bring it up to date first: aoai-usage bill --from {day} --to {day}"
        yield f"[bold red]not explained[/] {explanation.outdated}{remedy}"
    total = f"{digits(line['quantity'])} {plain(line['meter'])}, {_cost(line)}"
    yield f"[bold]Line {line['line_id']}[/] of {day}, billed in {line['billing_period']}: {total}"
    yield f"  owner       {_named(line, ('cost_center', 'team', 'department'))}"
    yield f"  caller      {_named(line, ('gateway', 'subscription_id', 'product', 'application'))}"
    yield f"  deployment  {_named(line, ('deployment', 'model', 'model_version', 'deployment_sku', 'region', 'service_tier'))}"
    if line["unit_price"] is not None:
        price = f"{money(line['unit_price'])} {line['currency']}"
        yield f"  cost        {digits(line['quantity'])} x {price} / {line['unit_tokens']:,} = {_cost(line)}"
    if line["usage_source"]:
        yield f"  usage       {line['usage_source']}, {line['pricing_status']}"
    if explanation.outdated:
        return
    yield ""
    if explanation.price:
        yield from _price(line, explanation.price)
    if explanation.no_price:
        yield from _no_price(line, explanation.no_price)
    if explanation.fixed:
        yield from _fixed(line, explanation.fixed)
    if explanation.requests:
        yield ""
        yield from _requests(line, explanation.requests)
    yield ""
    if explanation.adds_up:
        parts = "hours are" if explanation.fixed else "requests are"
        yield f"[green]adds up[/] the {parts} the line: {total}"
    else:
        yield "[bold red]does not add up[/] the line is not the total of its parts"


def _key(key: Mapping[str, str | None], bands: tuple[str, ...]) -> str:
    said = [f"{name} {plain(value or 'unknown')}" for name, value in key.items() if name != "context_band"]
    return f"{', '.join(said)}, context_band {' and '.join(bands)}"


def _price(line: "Line", price: "Price") -> Iterator[str]:
    yield f"[bold]Price[/] of {_key(price.key, price.bands)}"
    if line["pricing_status"] == "fallback":
        yield "  fallback    the price book has no cached_input price for this, so cached input costs as much as other input: this is the input row"
    row, values = price.row, price.row.values
    where = f"{_where('price_book.csv', row)}, meter id {plain(values['meter_id'] or '-')}"
    yield f"  row         {plain(values['price_id'] or '')}: {_row_price(row)} ({where})"
    yield f"  matched     {_matched(row)}"
    for rival in price.rivals:
        yield f"  won over    {plain(rival.values['price_id'] or '')}: {_row_price(rival)} (less exact: {_matched(rival)})"
    if not price.rivals:
        yield "  won over    no other row fits"
    currency, before = line["pricing_currency"], price.before_exchange
    unit = f"{before.unit_tokens:,}"
    if price.contract:
        given = price.contract.values
        what = f"{given['discount']} % off" if given["discount"] else f"{given['unit_price']} {currency} / {int(given['unit_tokens'] or 1):,}"
        step = f"{digits(before.list_unit_price)} -> {digits(before.contracted_unit_price)} {currency} / {unit}"
        yield f"  contract    {what}: {step} ({_where('contract_prices.csv', price.contract)})"
    else:
        yield "  contract    none: the list price holds"
    if price.markup:
        step = f"{digits(before.contracted_unit_price)} -> {digits(before.unit_price)} {currency} / {unit}"
        yield f"  markup      {price.markup.values['markup']} %: {step} ({_where('markups.csv', price.markup)})"
    else:
        yield "  markup      none"
    if price.exact is None:
        yield f"  [bold red]unpriced[/]    exchange_rates.csv has no rate from {currency} to {price.billed_in} on the day, so this price is no price"
        return
    if price.exchange:
        rate = f"1 {currency} = {price.exchange.values['rate']} {line['currency']}"
        yield f"  exchange    {rate} ({_where('exchange_rates.csv', price.exchange)})"
    else:
        yield f"  exchange    none: billed in {currency}"
    for level, exact in (
        ("list", price.exact.list_unit_price),
        ("contracted", price.exact.contracted_unit_price),
        ("billed", price.exact.unit_price),
    ):
        stored = line["unit_price" if level == "billed" else f"{level}_unit_price"]
        rounded = f" rounded from {digits(exact)}, half to even at 9 places" if stored != exact else ", exact"
        cost = line["cost" if level == "billed" else f"{level}_cost"]
        yield f"  {level:<11} {money(stored)} {line['currency']} / {line['unit_tokens']:,}{rounded}; cost {money(cost)} {line['currency']}"


def _no_price(line: "Line", no_price: "NoPrice") -> Iterator[str]:
    key = no_price.key
    yield f"[bold red]unpriced[/] no row of price_book.csv fits {_key(key, no_price.bands)} on {line['usage_date']}, so there is no cost"
    if not key["model"]:
        yield "  The events name no model: add the deployment to deployments.csv."
        return
    if not key["deployment_sku"]:
        yield "  The deployment's type is unknown, so only rows with * there fit: add the deployment to deployments.csv."
    for near in no_price.nearest:
        values = near.row.values
        differences = [f"{name} {plain(values[name] or '')}, not {plain(key[name] or 'unknown')}" for name in near.differs]
        differences += [] if near.in_force else [f"in force {_period(near.row)}"]
        row = f"{plain(values['price_id'] or '')}: {_row_price(near.row)} (line {near.row.line})"
        yield f"  near        {row}: {'; '.join(differences) or values['meter']}"
    if not no_price.nearest:
        yield f"  The price book has no {plain(key['meter'] or '')} price of {plain(key['model'])} or of a model with a similar name."


def _fixed(line: "Line", fixed: "Fixed") -> Iterator[str]:
    from aoai_usage_pipeline.reference.capacity import Capacity

    row, converted, currency = fixed.row, fixed.converted, line["currency"]
    if isinstance(row, Capacity) and isinstance(converted, Capacity):
        yield f"[bold]Capacity[/] {plain(row.capacity_id)} (capacity.csv): {row.ptus:,} PTUs at {money(row.hourly_price)} {row.currency} an hour"
        yield f"  in force    {row.effective_from} to {row.effective_to} on this day"
        agreed = [f"{plain(cost_center)} {digits(percent)} %" for cost_center, percent in row.shares]
        said = [_METHODS[row.method], *([f"agreed {', '.join(agreed)}"] if agreed else [])]
        said += [f"the fixed part is {digits(row.fixed_part)} %"] if row.method == "two_part" else []
        said += [f"it can do {digits(row.units_per_ptu_minute)} units per PTU and minute"] if row.units_per_ptu_minute else []
        yield f"  method      {row.method}: {'; '.join(said)}"
        price, converted_price = row.hourly_price, converted.hourly_price
    else:
        assert not isinstance(row, Capacity) and not isinstance(converted, Capacity)
        scope = f"{row.deployment_sku}, {row.region or 'every region'}"
        yield f"[bold]Reservation[/] {plain(row.reservation_id)} (reservations.csv): {row.ptus:,} PTUs of {plain(scope)}"
        part = f"this day's part is {money(fixed.amortised or Decimal(0))} {currency}"
        yield f"  term        {row.term} at {money(row.term_price)} {row.currency}; {part}"
        price, converted_price = row.term_price, converted.term_price
    if fixed.exchange:
        exact = Context(prec=60).multiply(price, Decimal(fixed.exchange.values["rate"] or 0))
        rounded = "" if exact == converted_price else f", rounded from {digits(exact)}, half to even at 9 places"
        rate = f"1 {row.currency} = {fixed.exchange.values['rate']} {currency}"
        yield f"  exchange    {rate} ({_where('exchange_rates.csv', fixed.exchange)}): {money(converted_price)} {currency}{rounded}"
    yield f"  the day     {digits(fixed.day_ptu_hours)} PTU-hours, {money(fixed.day_cost)} {currency}, for everybody"
    yield f"  this line   {digits(line['quantity'])} PTU-hours, {_cost(line)}"
    yield f"  driver      {_driver(line, fixed)}"
    yield "  hours       each hour's cost is rounded once, to 15 places; what splitting it leaves goes to the largest remainders"
    for hour in fixed.hours:
        paid = f", {money(hour.prepaid)} of it reserved" if hour.prepaid and isinstance(row, Capacity) else ""
        share = f"{digits(round(Decimal(hour.share.numerator) / hour.share.denominator * 100, 6))} %"
        if hour.units is not None and hour.of_units is not None:
            judged = "" if hour.judged_by == hour.hour else f" at {hour.judged_by:02}:00"
            share += f" ({_fraction(hour.units)} of {_fraction(hour.of_units)} units{judged})"
        whole = f"{_fraction(hour.ptu_hours)} PTU-hours, {money(hour.cost)} {currency}{paid}"
        yield f"    {hour.hour:02}:00  {whole}  x {share} = {money(hour.part)} {currency}"


_METHODS = {
    "usage": "each hour is borne by those who used it",
    "shares": "agreed percentages, whatever was used",
    "peak": "the busiest hour's usage splits every hour of the day",
    "two_part": "a fixed part by agreed percentages, the rest by each hour's usage",
}


def _driver(line: "Line", fixed: "Fixed") -> str:
    found = fixed.line
    if line["meter"] == "idle_capacity":
        return "idle: deployed, and allocated to nobody by the method. It is borne by idle_to of the row, else UNALLOCATED"
    if line["meter"] == "unused_reservation":
        return "unused: reserved, and not deployed in these hours. It is borne by idle_to of the reservation, else UNALLOCATED"
    if found.driver == "percent":
        return f"percent: an agreed share of {digits(found.driver_quantity)} %"
    return f"units: {digits(found.driver_quantity)} of uncached input tokens + {digits(fixed.row.output_ratio)} x output tokens"  # type: ignore[union-attr]


def _requests(line: "Line", requests: "Requests") -> Iterator[str]:
    currency = line["currency"] or ""
    pages = f", page {requests.page} of {requests.pages}" if requests.pages > 1 else ""
    yield f"[bold]Requests[/] {requests.count:,}{pages}"
    for request in requests.rows:
        cost = "no cost" if request.cost is None else f"{money(request.cost)} {currency}"
        copies = f"  {request.copies} copies" if request.copies > 1 else ""
        conflict = "  [yellow]its copies disagree[/]" if request.conflict else ""
        yield f"  {request.event_time}  {plain(request.request_id)}  {digits(request.quantity)}  {cost}{copies}{conflict}"
        index = "" if request.record_index is None else f", body {request.record_index}"
        place = f"partition {request.partition_id}, sequence number {request.sequence_number}, offset {request.offset}{index}"
        yield f"    [dim]{plain(request.blob)}: {plain(place)}[/]"
    if requests.page < requests.pages:
        yield f"  more: aoai-usage explain {line['line_id']} --date {line['usage_date']} --page {requests.page + 1}"


def _named(line: "Line", names: Iterable[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {plain(line[name] or '-')}" for name in names)


def _matched(row: "Row") -> str:
    from aoai_usage_pipeline.reference.files import PRICE_BOOK

    exact = [f"{name} {plain(row.values[name] or '')}" for name in PRICE_BOOK.matches if row.values[name] is not None]
    any_ = [name for name in PRICE_BOOK.matches if row.values[name] is None]
    exact.append(f"meter {row.values['meter']}")
    return f"exactly {', '.join(exact)}; by * {', '.join(any_) or 'nothing'}"


def _where(file: str, row: "Row") -> str:
    return f"{file} line {row.line}, {_period(row)}, source {plain(row.values['source'] or '-')}"


def _period(row: "Row") -> str:
    first, end = row.effective_from, row.effective_to
    return " ".join([f"from {first}" if first else "from ever", f"until {end}" if end else "on"])


def _row_price(row: "Row") -> str:
    return f"{row.values['unit_price']} {row.values['currency']} / {int(row.values['unit_tokens'] or 1):,}"


def _cost(line: "Line") -> str:
    return "no cost" if line["cost"] is None else f"{money(line['cost'])} {line['currency']}"


def _fraction(number: Fraction) -> str:
    """A whole number or one with at most 6 places as it is, any other as a fraction."""
    if 10**6 % number.denominator == 0:
        return digits(Decimal(number.numerator) / number.denominator)
    return f"{number.numerator:,}/{number.denominator:,}"
