"""The Event Hub over a real socket: the SDK against the tests' own server."""

import datetime as dt
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.hub.client import EventHub
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.event_hub_server import Hub, Server
from aoai_usage_pipeline_tests.support import chat, installation, rows, run_all, seed_event


NOW = dt.datetime.now(dt.UTC).replace(tzinfo=None)
MINUTE = dt.timedelta(minutes=1)


class Clock:
    """When the hub enqueues: an hour ago, unless a test turns it."""

    def __init__(self) -> None:
        self.now = NOW - 60 * MINUTE

    def __call__(self) -> dt.datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> Hub:
    return Hub(2, clock)


@pytest.fixture
def server(hub: Hub) -> Iterator[Server]:
    with Server({"hub": hub}) as running:
        yield running


def settings(server: Server, **changes: Any) -> dict[str, Any]:
    hub = {"event_hub_namespace": "ns", "event_hub_name": "hub", "event_hub_connection_string": server.connection_string, "drain": "on"}
    return hub | changes


@pytest.fixture
def pipeline(tmp_path: Path, server: Server) -> Pipeline:
    return installation(tmp_path, **settings(server))


def files(pipeline: Pipeline) -> dict[str, bytes]:
    root = Path(pipeline.settings.capture_url)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.avro"))}


def numbers(pipeline: Pipeline) -> dict[str, list[int]]:
    """The sequence numbers in the capture files, by partition."""
    found: dict[str, list[int]] = {}
    for name, content in files(pipeline).items():
        found.setdefault(name.split("/")[2], []).extend(record["SequenceNumber"] for record in avro.records(content))
    return found


def event(request: str, at: dt.datetime) -> bytes:
    return seed_event(request, at, chat(100, 10))


def test_drained_events_are_capture_files(pipeline: Pipeline, hub: Hub, clock: Clock) -> None:
    clock.now = dt.datetime(2026, 10, 5, 12, 4, 59, 750_000)
    hub.put("0", b"a", b"b")
    clock.now = dt.datetime(2026, 10, 5, 12, 5)
    hub.put("0", b"c")
    hub.put("1", b"d")
    done = pipeline.drain()
    assert [(d.partition_id, d.events, d.files) for d in done] == [("0", 3, 2), ("1", 1, 1)]
    found = files(pipeline)
    assert list(found) == [f"ns/hub/{name}.avro" for name in ("0/2026/10/05/12/00/00", "0/2026/10/05/12/05/00", "1/2026/10/05/12/05/00")]
    first, second = avro.records(found["ns/hub/0/2026/10/05/12/00/00.avro"])
    assert first == {
        "SequenceNumber": 0, "Offset": "0", "EnqueuedTimeUtc": "10/5/2026 12:04:59 PM",
        "SystemProperties": {"x-opt-enqueued-time": 1791201899750}, "Properties": {}, "Body": b"a",
    }  # fmt: skip
    assert second["SequenceNumber"] == 1
