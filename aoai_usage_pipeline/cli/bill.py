"""`aoai-usage bill`: ingest, bill and publish on the Dagster instance, and print the bill."""

import argparse
import contextlib
import datetime as dt
import logging
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.cli.console import EXACT, add_range, moment, money, open_console, plain, print_stale, progress_bar, usage_dates
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(commands: Any) -> None:
    bill = commands.add_parser("bill", help="ingest new capture files, bill a range of usage dates, publish, print the bill")
    add_range(bill)
    bill.add_argument(
        "--as-of", type=moment, metavar="TIME", help="print the bill as it was known at the end of a UTC day or at a time; nothing is written"
    )
    bill.set_defaults(run=_bill)


def _bill(arguments: argparse.Namespace, settings: Settings) -> int:
    console = open_console()
    days = usage_dates(arguments, settings, console, "billing")
    first, last = days[0], days[-1]
    pipeline = Pipeline(settings)
    if arguments.as_of:
        return _bill_as_known(console, pipeline, days, arguments.as_of)
    today = dt.datetime.now(dt.UTC).date()
    pipeline.reference()

    def changed_dates() -> list[dt.date]:
        return sorted(pipeline.changed_capture_dates(max(settings.start_date, first - dt.timedelta(1)), today + dt.timedelta(1)))

    # a drain makes files, and the place for them
    changed = [] if settings.drain == "on" else changed_dates()
    failures: list[str] = []
    with progress_bar(console, "billing") as progress, _instance(console) as instance:
        pipeline.progress = progress
        if settings.drain == "on":
            failures += _run(pipeline, instance, "drain")
            changed = changed_dates()
        if changed:
            failures += _run(pipeline, instance, "ingest", changed[0], min(changed[-1], today))
        failures += _run(pipeline, instance, "bill", first, last)
    if Path(settings.warehouse_path).is_file():
        _print_bill(console, settings, first, last, published=not failures)
    held = {day: reason for reasons in pipeline.held().values() for day, reason in reasons.items() if day in set(days)}
    _print_held(console, held)
    if others := pipeline.stale_usage_dates().keys() - set(days) - held.keys():
        print_stale(console, others, "days outside of this bill")
    for failure in failures:
        console.print(f"[bold red]failed[/] {plain(failure)}", soft_wrap=True)
    return 1 if held or failures else 0


def _bill_as_known(console: "Console", pipeline: Pipeline, days: list[dt.date], moment: dt.datetime) -> int:
    """Print the bill as it was known at a moment."""
    import duckdb

    with progress_bar(console, "billing") as progress:
        pipeline.progress = progress
        with pipeline.as_known(days, moment) as known, duckdb.connect(str(known.warehouse), read_only=True) as db:
            at = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
            console.print(_bill_table(db, days[0], days[-1], f" as known at {at}"))
            _print_quality(console, db, days[0], days[-1])
            console.print(
                f"Events enqueued up to {at}; reference data version {known.reference_version}, in use since "
                f"{known.recorded_at:%Y-%m-%d %H:%M:%S} UTC. Nothing was written.",
                soft_wrap=True,
            )
            _print_held(console, known.held)
            return 1 if known.held else 0


def _print_held(console: "Console", held: dict[dt.date, str]) -> None:
    for day, reason in sorted(held.items()):
        console.print(f"[bold red]held[/] {day}: {plain(reason)}", soft_wrap=True)


def _run(pipeline: Pipeline, instance: Any, job: str, first: dt.date | None = None, last: dt.date | None = None) -> list[str]:
    """One Dagster run, over a range of days if one is given; returns what made it fail."""
    from aoai_usage_pipeline.definitions import build_defs
    from aoai_usage_pipeline.defs.common import RANGE_END, RANGE_START

    result = (
        build_defs(pipeline=pipeline)
        .resolve_job_def(job)
        .execute_in_process(
            instance=instance,
            raise_on_error=False,
            tags={RANGE_START: str(first), RANGE_END: str(last)} if first else {},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    )
    if result.success:
        return []
    errors = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    reasons = [f"{(error.cause or error).message}".strip().splitlines()[0] for error in errors if error]
    return [f"{job} run {result.run_id}: {reason}" for reason in reasons] or [f"{job} run {result.run_id}"]


@contextlib.contextmanager
def _instance(console: "Console") -> Iterator[Any]:
    import dagster as dg

    logging.getLogger("dagster").setLevel(logging.CRITICAL)
    if os.environ.get("DAGSTER_HOME"):
        with dg.DagsterInstance.get() as instance:
            yield instance
        return
    console.print("DAGSTER_HOME is not set, so these runs will not show in the Dagster UI.", style="dim")
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def _print_bill(console: "Console", settings: Settings, first: dt.date, last: dt.date, *, published: bool) -> None:
    import duckdb

    with duckdb.connect(settings.warehouse_path, read_only=True) as db:
        console.print(_bill_table(db, first, last))
        _print_quality(console, db, first, last)
        for reason, count, blob, number in db.execute(
            """SELECT reason, count(*), first(blob ORDER BY blob, sequence_number), first(sequence_number ORDER BY blob, sequence_number)
            FROM quarantine GROUP BY 1 ORDER BY 2 DESC, 1"""
        ).fetchall():
            console.print(f"[yellow]quarantined[/] {count:,} x {plain(reason)} (first: {plain(blob)}, sequence number {number})", soft_wrap=True)
        for blob, reason in db.execute("SELECT blob, reason FROM capture_files WHERE status = 'unreadable' ORDER BY 1").fetchall():
            console.print(f"[yellow]unreadable[/] {plain(blob)}: {plain(reason)}", soft_wrap=True)
    console.print(f"{'Published to' if published else 'As published before in'} {plain(settings.warehouse_path)}", soft_wrap=True)


def _print_quality(console: "Console", db: Any, first: dt.date, last: dt.date) -> None:
    quality = db.execute(
        """SELECT coalesce(sum(parsed), 0), coalesce(sum(accepted), 0), coalesce(sum(duplicates), 0), coalesce(sum(conflicts), 0),
        coalesce(sum(no_usage), 0), coalesce(sum(unpriced), 0), coalesce(sum(unallocated), 0)
        FROM daily_quality WHERE usage_date BETWEEN ? AND ?""",
        [first, last],
    ).fetchall()[0]
    console.print(
        "{:,} events: {:,} requests, {:,} duplicates, {:,} conflicts, {:,} without usage, {:,} without a price, {:,} without an owner".format(
            *quality
        ),
        soft_wrap=True,
    )


def _bill_table(db: Any, first: dt.date, last: dt.date, known: str = "") -> Any:
    from rich.table import Table

    table = Table(title=f"Bill {first} to {last}{known}", title_justify="left")
    table.add_column("Cost centre")
    table.add_column("Team")
    for name in ("Requests", "Prompt tokens", "Completion tokens", "Cost"):
        table.add_column(name, justify="right", no_wrap=True)
    total = ("Total", "")
    counts: dict[tuple[str, str], list[int]] = {}
    costs: dict[tuple[str, str], dict[str, Decimal]] = {}
    # fixed costs are only in daily_billing, requests only in daily_usage; an agreed share names a cost centre and no team
    for cost_center, team, currency, cost, *numbers in db.execute(
        """SELECT cost_center, coalesce(team, ''), currency, sum(cost), sum(requests), sum(prompt_tokens), sum(completion_tokens)
        FROM (SELECT usage_date, cost_center, team, currency, cost, 0 AS requests, 0 AS prompt_tokens, 0 AS completion_tokens FROM daily_billing
            UNION ALL SELECT usage_date, cost_center, team, NULL, NULL, requests, prompt_tokens, completion_tokens FROM daily_usage)
        WHERE usage_date BETWEEN ? AND ? GROUP BY ALL ORDER BY sum(cost) DESC NULLS LAST, cost_center, coalesce(team, '')""",
        [first, last],
    ).fetchall():
        for row in ((cost_center, team), total):
            counts[row] = [a + b for a, b in zip(counts.get(row, [0, 0, 0]), numbers, strict=True)]
            if cost is not None:
                costs.setdefault(row, {})[currency] = EXACT.add(costs.get(row, {}).get(currency, Decimal(0)), cost)
    for row in [*(row for row in counts if row != total), total]:
        if row == total:
            table.add_section()
        amounts = "\n".join(f"{money(cost)} {currency}" for currency, cost in sorted(costs.get(row, {}).items()))
        table.add_row(*map(plain, row), *(f"{n:,}" for n in counts.get(row, [0, 0, 0])), amounts or "-")
    return table
