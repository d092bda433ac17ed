"""`aoai-usage close`: freeze a month's bill, so that what comes later are corrections."""

import argparse
from typing import Any

from aoai_usage_pipeline.cli.console import open_console
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings


def add_parser(commands: Any) -> None:
    close = commands.add_parser("close", help="close a month: its lines stand, later events and prices become corrections")
    close.add_argument("period", metavar="YYYY-MM", help="the month, which must have ended")
    close.add_argument("--accept-unpriced", action="store_true", help="close although some usage has no price; priced later, it is a correction")
    close.set_defaults(run=_close)


def _close(arguments: argparse.Namespace, settings: Settings) -> int:
    closing = Pipeline(settings).close(arguments.period, accept_unpriced=arguments.accept_unpriced)
    console = open_console()
    console.print(f"{closing.period} is closed: {closing.lines:,} lines with digest {closing.digest}", soft_wrap=True)
    console.print(f"Next: aoai-usage statement {closing.period}", soft_wrap=True)
    return 0
