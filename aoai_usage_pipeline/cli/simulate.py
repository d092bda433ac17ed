"""`aoai-usage simulate`: realistic capture files, or events in a hub, to try the pipeline with."""

import argparse
import datetime as dt
from typing import Any

from aoai_usage_pipeline.cli.console import date, open_console, progress_bar
from aoai_usage_pipeline.settings import Settings, SettingsError


def add_parser(commands: Any) -> None:
    simulate = commands.add_parser("simulate", help="write realistic capture files to AOAI_CAPTURE_URL")
    simulate.add_argument("--from", dest="first", type=date, default=dt.date(2026, 8, 16), metavar="DATE", help="first day (2026-08-16)")
    simulate.add_argument("--to", dest="last", type=date, default=dt.date(2026, 9, 30), metavar="DATE", help="last day, included (2026-09-30)")
    simulate.add_argument("--requests-per-day", type=int, default=1500, metavar="N", help="requests on a weekday (1500)")
    simulate.add_argument("--seed", type=int, default=1, metavar="N", help="another number gives other traffic (1)")
    simulate.add_argument("--to-event-hub", action="store_true", help="send the events to the hub of the AOAI_EVENT_HUB_ settings instead")
    simulate.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace, settings: Settings) -> int:
    from aoai_usage_pipeline.capture.names import NameFormat
    from aoai_usage_pipeline.capture.simulator import simulate
    from aoai_usage_pipeline.storage import open_store

    if arguments.to_event_hub:
        return _send(arguments, settings)
    console = open_console()
    store = open_store(settings.capture_url, settings.storage_connection_string, create=True)
    with progress_bar(console, "simulating") as progress:
        files, written = simulate(
            store, NameFormat(settings.capture_name_format), arguments.first, arguments.last,
            requests_per_day=arguments.requests_per_day, seed=arguments.seed, progress=progress,
        )  # fmt: skip
    console.print(f"{files} capture files in {settings.capture_url}, {written} of them written now.", soft_wrap=True)
    console.print(f"Next: aoai-usage bill --from {arguments.first} --to {arguments.last}", soft_wrap=True)
    return 0


def _send(arguments: argparse.Namespace, settings: Settings) -> int:
    """Send the traffic to the hub, each partition of the simulation to one of the hub's."""
    from aoai_usage_pipeline.capture.simulator import traffic
    from aoai_usage_pipeline.pipeline import Pipeline

    hub = Pipeline(settings).hub
    if not hub:
        raise SettingsError("--to-event-hub needs AOAI_EVENT_HUB_NAMESPACE and AOAI_EVENT_HUB_NAME")
    console = open_console()
    with progress_bar(console, "sending") as progress:
        ids = hub.partition_ids()
        events = traffic(
            arguments.first, arguments.last, requests_per_day=arguments.requests_per_day, seed=arguments.seed, progress=lambda done, total, what: None
        )
        to_send = ((ids[int(partition) % len(ids)], body) for _, partition, body in events)
        sent = hub.send(to_send, lambda sent: progress(sent, len(events), f"{sent:,} events sent"))
    console.print(f"{sent} events sent to {hub}.", soft_wrap=True)
    return 0
