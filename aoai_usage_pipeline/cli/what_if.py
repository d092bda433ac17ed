"""`aoai-usage what-if`: usage of the lake at the prices of another arrangement, beside what it was billed."""

import argparse
import dataclasses
import datetime as dt
import re
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.cli.console import date, money, open_console, plain
from aoai_usage_pipeline.dates import days_between
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reference.capacity import GLOBAL, PROVISIONED_SKUS
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from aoai_usage_pipeline.billing.what_if import Comparison, Scenario


def add_parser(commands: Any) -> None:
    what_if = commands.add_parser("what-if", help="price past usage as another arrangement: by the token, provisioned, batch, another model")
    what_if.add_argument("--from", dest="first", type=date, required=True, metavar="DATE", help="first usage date, such as 2026-10-01")
    what_if.add_argument("--to", dest="last", type=date, required=True, metavar="DATE", help="last usage date, included")
    scenarios = "payg, payg:SKU, ptu, ptu:N, batch, model:NAME or model:NAME@VERSION"
    what_if.add_argument("--as", dest="scenario", required=True, metavar="SCENARIO", help=scenarios)
    what_if.add_argument("--model", metavar="NAME", help="only usage of this model")
    what_if.add_argument("--deployment", metavar="NAME", help="only usage of this deployment")
    what_if.add_argument("--cost-center", metavar="NAME", help="only usage of this cost centre")
    what_if.add_argument("--ptu-sku", choices=PROVISIONED_SKUS, default=GLOBAL, metavar="SKU", help=f"type of the PTUs ({GLOBAL})")
    price = what_if.add_mutually_exclusive_group()
    price.add_argument("--hourly-price", type=_price, metavar="PRICE", help="price of a PTU-hour (the global list price, 1.00 USD)")
    price.add_argument("--monthly-price", type=_price, metavar="PRICE", help="price of a PTU reserved for a month")
    what_if.set_defaults(run=_what_if)


def _price(text: str) -> Decimal:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII) or not Decimal(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a price such as 1.00, with at most 9 decimal places")
    return Decimal(text)


def _what_if(arguments: argparse.Namespace, settings: Settings) -> int:
    from aoai_usage_pipeline.billing.what_if import PTU, Only, Scenario

    first, last = arguments.first, arguments.last
    if first > last:
        raise ValueError(f"--from {first} --to {last}: expected days in order")
    scenario = Scenario.of(arguments.scenario)
    prices = {"deployment_sku": arguments.ptu_sku, "hourly_price": arguments.hourly_price, "monthly_price": arguments.monthly_price}
    if scenario.kind == PTU:
        scenario = dataclasses.replace(scenario, **prices)
    elif arguments.hourly_price or arguments.monthly_price or arguments.ptu_sku != GLOBAL:
        raise ValueError(f"--ptu-sku, --hourly-price and --monthly-price have no meaning with --as {arguments.scenario}")
    days = days_between(first, last)
    pipeline = Pipeline(settings)
    found = pipeline.what_if(days, scenario, Only(arguments.model, arguments.deployment, arguments.cost_center))
    console = open_console()
    console.print(_table(found, first, last))
    if stale := sorted(set(days) & set(pipeline.stale_usage_dates())):
        console.print(f"[yellow]not up to date[/] {len(stale)} days, the first {stale[0]}: bill them for today's prices", soft_wrap=True)
    for sentence in (*found.assumptions, *_throughput(found)):
        console.print(f"- {plain(sentence)}", soft_wrap=True)
    console.print(plain(_conclusion(found)), soft_wrap=True)
    return 0


def _name(scenario: "Scenario") -> str:
    """What the scenario is, in a few words."""
    named = {
        "payg": f"paid by the token ({scenario.deployment_sku})",
        "ptu": f"{scenario.ptus} PTUs",
        "batch": "batch",
        "model": " ".join(filter(None, (scenario.model, scenario.model_version))),
    }
    return named[scenario.kind]


def _table(found: "Comparison", first: dt.date, last: dt.date) -> Any:
    from rich.table import Table

    table = Table(title=plain(f"Usage {first} to {last} as {_name(found.scenario)}"), title_justify="left")
    table.add_column("Usage", overflow="fold")
    for name in ("Requests", "Tokens", "Cost today", "Cost in scenario", "Difference"):
        table.add_column(name, justify="right", overflow="fold")
    for line in found.lines:
        usage = [line.model, " ".join(filter(None, (line.deployment, f"({line.deployment_sku})" if line.deployment_sku else None))), line.note or ""]
        table.add_row(
            plain("\n".join(filter(None, usage))), f"{line.requests:,}", f"{line.tokens:,}", *_costs(line.today, line.scenario, line.currency),
            style="dim" if line.note else None,
        )  # fmt: skip
    table.add_section()
    for n, (currency, (today, scenario)) in enumerate(found.totals.items()):
        counts = [f"{sum(line.requests for line in found.lines):,}", f"{sum(line.tokens for line in found.lines):,}"] if n == 0 else ["", ""]
        table.add_row("Total", *counts, *_costs(today, scenario, currency))
    return table


def _costs(today: Decimal | None, scenario: Decimal | None, currency: str | None) -> list[str]:
    shown = ["-" if cost is None else f"{money(cost)} {currency}" for cost in (today, scenario)]
    if today is None and scenario is None:
        return [*shown, "-"]
    difference = (scenario or Decimal(0)) - (today or Decimal(0))
    return [*shown, f"{money(difference)} {currency}" + (f"\n{difference / today * 100:+,.1f} %" if today else "")]


def _percent(part: Fraction) -> str:
    return f"{Decimal(round(part * 10_000)).scaleb(-2).normalize():,f} %"


def _throughput(found: "Comparison") -> list[str]:
    used = found.throughput
    if not used:
        return []
    sentences = [
        f"{used.ptus} PTUs are used {_percent(used.mean)} in the mean, {_percent(used.peak_hour)} in the busiest hour and "
        f"{_percent(used.peak_minute)} in the busiest minute."
    ]
    if used.minutes_over:
        sentences.append(
            f"In {used.minutes_over:,} minutes that is more than they can do: {_percent(used.part_over)} of the usage would be refused, "
            "or spill over to a deployment that is paid by the token, at a cost that is not counted here."
        )
    return sentences


def _conclusion(found: "Comparison") -> str:
    """The break-even in words."""
    kind, even = found.scenario.kind, found.break_even
    if kind == "batch":
        return "Break-even: none. Both are paid by the token, so the difference is in proportion at any volume."
    if even is None or len(found.replaced) != 1:
        return "Break-even: none, as nothing was priced anew, it costs nothing by the token, or there are several currencies."
    [(currency, (today, scenario))] = found.replaced.items()
    costs = f"{money(today)} {currency} today, {money(scenario)} {currency} in the scenario"
    if kind == "model":
        return f"Break-even ({costs}): both cost the same if the other model takes {_percent(even.share)} of today's tokens for the same work."
    volume = f"{_percent(even.share)} of this usage ({round(even.tokens_per_day):,} tokens a day)"
    if kind == "payg":
        return f"Break-even ({costs}): both cost the same at {volume}; below it paying by the token is cheaper, above it the capacity."
    sentence = f"Break-even ({costs}): both cost the same at {volume}"
    cheaper = "above it the PTUs are cheaper, below it paying by the token"
    if used := found.throughput:
        mean, minute = _percent(used.mean * even.share), _percent(used.peak_minute * even.share)
        sentence += f", where the PTUs are used {mean} in the mean and {minute} in the busiest minute"
        if used.peak_minute * even.share > 1:
            cheaper = "that is more than they can do, and at any volume that they carry paying by the token is cheaper"
    return f"{sentence}; {cheaper}."
