"""`aoai-usage verify`: make the bill again from the capture files and compare the two, line by line."""

import argparse
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.cli.console import add_range, open_console, plain, progress_bar, usage_dates
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from aoai_usage_pipeline.reconcile.replay import Difference, Verdict

_LINES_SHOWN = 20


def add_parser(commands: Any) -> None:
    verify = commands.add_parser("verify", help="replay the capture files and prove that they give the bill that is stored")
    add_range(verify)
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace, settings: Settings) -> int:
    from aoai_usage_pipeline.billing import digest

    console = open_console()
    days = usage_dates(arguments, settings, console, "verifying")
    pipeline = Pipeline(settings)
    with progress_bar(console, "verifying") as progress:
        pipeline.progress = progress
        found = pipeline.verify(days)
    for verdict in found.verdicts:
        _print_verdict(console, verdict)
    for date in found.changed:
        why = "are new, were replaced, or were read by another version of this program: `aoai-usage bill` reads them"
        console.print(f"[yellow]changed[/] capture files of {date} {why}", soft_wrap=True)
    for blob in found.removed:
        console.print(f"[yellow]gone[/] {plain(blob)}: its events cannot be replayed", soft_wrap=True)
    counts = [sum(verdict.outcome == outcome for verdict in found.verdicts) for outcome in ("agrees", "differs", "cannot be verified")]
    stored = digest.of_days({verdict.usage_date: verdict.stored or "" for verdict in found.verdicts})
    replayed = digest.of_days({verdict.usage_date: verdict.replayed for verdict in found.verdicts})
    console.print(f"{days[0]} to {days[-1]}: stored {stored}, replayed {replayed}", soft_wrap=True)
    console.print("{} days agree, {} differ, {} cannot be verified".format(*counts), soft_wrap=True)
    return 0 if found.agrees else 1


def _print_verdict(console: "Console", verdict: "Verdict") -> None:
    style = "green" if verdict.outcome == "agrees" else "bold red"
    digests = f"stored {verdict.stored or 'without a digest'}, replayed {verdict.replayed}"
    console.print(f"[{style}]{verdict.outcome}[/] {verdict.usage_date}: {digests}", soft_wrap=True)
    for said in (*verdict.reasons, *verdict.notes):
        console.print(f"  {plain(said)}", soft_wrap=True)
    for difference in verdict.differences[:_LINES_SHOWN]:
        console.print(f"  {plain(_difference(difference))}", soft_wrap=True)
    if len(verdict.differences) > _LINES_SHOWN:
        console.print(f"  and {len(verdict.differences) - _LINES_SHOWN:,} more lines", soft_wrap=True)


def _difference(difference: "Difference") -> str:
    """The line, and the figures of both bills that are not the same."""
    one, other = difference.stored, difference.replayed
    same = {name for name in one or () if one and other and one.get(name) == other.get(name)}
    figures = (
        "no such line" if side is None else ", ".join(f"{name} {value}" for name, value in side.items() if name not in same) or "-"
        for side in (one, other)
    )
    return "{}: stored {}; replayed {}".format(difference.line, *figures)
