"""`aoai-usage statement`: what each cost centre pays for a month."""

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import Any

from aoai_usage_pipeline.cli.console import money, open_console, plain, print_stale
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings


def add_parser(commands: Any) -> None:
    statement = commands.add_parser("statement", help="print what each cost centre pays for a month")
    statement.add_argument("period", metavar="YYYY-MM", help="the month")
    statement.add_argument("--cost-center", metavar="NAME", help="only this one, with its lines")
    statement.add_argument("--csv", type=Path, metavar="FILE", help="write the lines of the statements to a file")
    statement.set_defaults(run=_statement)


def _statement(arguments: argparse.Namespace, settings: Settings) -> int:
    from rich.table import Table

    from aoai_usage_pipeline.billing.periods import Periods

    pipeline, console = Pipeline(settings), open_console()
    found = [one for one in pipeline.statements(arguments.period) if arguments.cost_center in (None, one.cost_center)]
    if not found:
        raise ValueError(f"{arguments.period} has no lines{f' of {arguments.cost_center}' if arguments.cost_center else ''}")
    closed = arguments.period in Periods(pipeline.lake).closed()
    console.print(f"Statement {arguments.period}, {'closed' if closed else 'preliminary: the month is open'}", soft_wrap=True)
    # corrections of earlier months are in it too
    if not closed and (stale := [day for day in pipeline.stale_usage_dates() if f"{day:%Y-%m}" <= arguments.period]):
        print_stale(console, stale, f"days up to the end of {arguments.period}")
    table = Table("Cost centre", "Currency", title_justify="left")
    for name in ("Exact total", "Rounding", "Amount"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Digest of the lines")
    for one in found:
        amounts = (money(one.total), money(one.rounding), money(one.amount)) if one.currency else ("no price", "-", "-")
        table.add_row(plain(one.cost_center), one.currency or "-", *amounts, one.digest[:16])
    console.print(table)
    if arguments.cost_center:
        for one in found:
            for line in one.lines:
                what = " ".join(part for part in (line.model, line.model_version, line.deployment_sku, line.meter) if part)
                price = f" x {line.unit_price.normalize():f} / {line.unit_tokens:,}" if line.unit_price is not None else ""
                cost = f"{money(line.cost)} {one.currency}" if line.cost is not None else line.pricing_status
                correction = f" (correction of {line.correction_of})" if line.charge_class else ""
                console.print(f"  {plain(what)}: {line.quantity.normalize():,f}{price} = {cost}{correction}", soft_wrap=True)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for number, one in enumerate(found):
                rows = [{"cost_center": one.cost_center, "currency": one.currency, **dataclasses.asdict(line)} for line in one.lines]
                if number == 0:
                    writer.writerow(rows[0])
                writer.writerows(row.values() for row in rows)
    return 0
