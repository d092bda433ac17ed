"""`aoai-usage`: what Dagster has no verb for. It materializes the same assets with the same checks on the same Dagster instance.

Each command is a module with `add_parser(commands)`; what they share is in `console.py`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from aoai_usage_pipeline.cli import bill, close, explain, prices, simulate, statement, verify, what_if
from aoai_usage_pipeline.settings import Settings, SettingsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 unless a day was held, a run failed or the input cannot be used."""
    import dagster as dg
    import duckdb

    from aoai_usage_pipeline.reference import ReferenceDataError
    from aoai_usage_pipeline.storage import StorageError

    arguments = _parser().parse_args(argv)
    logging.getLogger("azure").addHandler(logging.NullHandler())  # what it warns of on the way is in the error at the end
    unusable = (SettingsError, ReferenceDataError, StorageError, ValueError, OSError, dg.DagsterInvariantViolationError)
    try:
        return arguments.run(arguments, Settings.from_env())
    except (*unusable, duckdb.IOException, duckdb.InvalidInputException) as error:
        print(f"aoai-usage: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aoai-usage", description="Exact bills for Azure OpenAI from Event Hubs Capture files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (bill, simulate, prices, explain, what_if, verify, close, statement):
        command.add_parser(commands)
    return parser
