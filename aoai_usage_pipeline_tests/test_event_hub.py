"""The Event Hub over a real socket, the SDK against the tests' own server; and the rules of draining over a hub in memory."""

import base64
import contextlib
import dataclasses
import datetime as dt
import itertools
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from azure.eventhub import EventData, EventHubProducerClient
from azure.eventhub.amqp import AmqpAnnotatedMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.times import culture
from aoai_usage_pipeline.definitions import build_defs
from aoai_usage_pipeline.hub.checkpoints import Checkpoint
from aoai_usage_pipeline.hub.client import EventHub, HubError, HubState, Partition, Record, TakenOver
from aoai_usage_pipeline.hub.drain import drain
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reconcile.hub import COMPLETE, IN_WINDOW, LOST, NOT_INGESTED, OVERDUE
from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline.storage import ObjectStore, open_store
from aoai_usage_pipeline_tests.event_hub_server import KEY, Hub, Server
from aoai_usage_pipeline_tests.support import (
    NAMES,
    Captured,
    Run,
    blob_name,
    capture_file,
    chat,
    installation,
    put,
    rows,
    run_all,
    seed_event,
    versions,
)

NOW = dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0)
MINUTE = dt.timedelta(minutes=1)


@pytest.fixture(autouse=True)
def now() -> None:
    """`NOW` is when a test begins, however long after the first one that is."""
    global NOW
    NOW = dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0)


class Clock:
    """When the hub enqueues: two hours ago, until a test sets it."""

    def __init__(self) -> None:
        self.now = NOW - 120 * MINUTE

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


def hub_settings(server: Server, **changes: Any) -> dict[str, Any]:
    hub = {"event_hub_namespace": "ns", "event_hub_name": "hub", "event_hub_connection_string": server.connection_string, "drain": "on"}
    return hub | changes


@pytest.fixture
def pipeline(tmp_path: Path, server: Server) -> Pipeline:
    return installation(tmp_path, **hub_settings(server))


def client(server: Server, **changes: Any) -> EventHub:
    return EventHub(**{"namespace": "ns", "name": "hub", "consumer_group": "$Default", "connection_string": server.connection_string} | changes)


def files(store: ObjectStore) -> dict[str, bytes]:
    return {name: store.read(name)[0] for name in sorted(stored.name for stored in store.objects()) if name.endswith(".avro")}


def numbers(store: ObjectStore, partition_id: str = "0") -> list[int]:
    """The sequence numbers in a partition's capture files, in the order of the files."""
    return [
        record["SequenceNumber"] for name, content in files(store).items() if name.split("/")[2] == partition_id for record in avro.records(content)
    ]


def event(request: str, at: dt.datetime) -> bytes:
    return seed_event(request, at, chat(100, 10))


# --- draining over a real socket --------------------------------------------------------------------------------------------------


def test_drained_events_are_capture_files(pipeline: Pipeline, hub: Hub, clock: Clock) -> None:
    clock.now = dt.datetime(2026, 10, 5, 12, 4, 59, 750_000)
    hub.put("0", b"a", b"b")
    clock.now = dt.datetime(2026, 10, 5, 12, 5)
    hub.put("0", b"c")
    done = pipeline.drain()
    assert [(one.partition_id, one.events, one.files, one.lost) for one in done] == [("0", 3, 2, 0), ("1", 0, 0, 0)]
    found = files(pipeline.capture)
    assert list(found) == ["ns/hub/0/2026/10/05/12/00/00.avro", "ns/hub/0/2026/10/05/12/05/00.avro"]
    first, second = avro.records(found["ns/hub/0/2026/10/05/12/00/00.avro"])
    assert first == {
        "SequenceNumber": 0, "Offset": "0", "EnqueuedTimeUtc": "10/5/2026 12:04:59 PM",
        "SystemProperties": {"x-opt-enqueued-time": 1791201899750}, "Properties": {}, "Body": b"a",
    }  # fmt: skip
    assert (second["SequenceNumber"], second["Body"]) == (1, b"b")


@pytest.mark.slow
def test_a_drain_goes_on_where_the_last_one_ended(server: Server, hub: Hub, clock: Clock, store_url: tuple[str, str | None], tmp_path: Path) -> None:
    url, connection_string = store_url
    pipeline = installation(tmp_path, **hub_settings(server, capture_url=url, storage_connection_string=connection_string))
    hub.put("0", *(b"%d" % n for n in range(8)))
    assert sum(one.events for one in pipeline.drain()) == 8
    etags = {stored.name: stored.etag for stored in pipeline.capture.objects() if stored.name.endswith(".avro")}
    assert sum(one.events for one in pipeline.drain()) == 0
    assert {stored.name: stored.etag for stored in pipeline.capture.objects() if stored.name.endswith(".avro")} == etags

    hub.put("0", *(b"%d" % n for n in range(8, 20)))
    hub.put("1", b"x")
    hub.expire("0", 8)  # what was drained may leave the hub, and stays in the file that is completed
    done = {one.partition_id: one for one in pipeline.drain()}
    assert (done["0"].events, done["0"].files, done["0"].lost, done["0"].last_sequence_number) == (12, 1, 0, 19)
    assert numbers(pipeline.capture) == list(range(20)) and numbers(pipeline.capture, "1") == [0]

    hub.put("0", *(b"%d" % n for n in range(20, 30)))
    hub.expire("0", 25)
    assert [(one.events, one.lost) for one in pipeline.drain()] == [(5, 5), (0, 0)]
    assert numbers(pipeline.capture) == [*range(20), *range(25, 30)]


@pytest.mark.slow
def test_a_hub_that_was_created_again_is_drained_from_its_first_event(server: Server, hub: Hub, clock: Clock, pipeline: Pipeline) -> None:
    hub.put("0", b"a", b"b", b"c")
    pipeline.drain()
    clock.now = NOW + MINUTE
    server.hubs["hub"] = again = Hub(2, clock)
    again.put("0", b"d", b"e", b"f", b"g", b"h")
    assert [(one.events, one.restarted, one.lost) for one in pipeline.drain()] == [(5, True, 0), (0, False, 0)]
    assert numbers(pipeline.capture) == [0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_second_of_two_consumers_takes_over(server: Server, hub: Hub, pipeline: Pipeline) -> None:
    hub.put("0", b"a", b"b")
    taken: list[Record] = []
    given = threading.Event()
    failures: list[Exception] = []

    def take(records: list[Record]) -> None:
        taken.extend(records)
        given.set()

    def first() -> None:
        try:
            client(server).receive("0", None, 99, take)
        except HubError as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert given.wait(20)
    assert client(server).enqueued_at("0", 0) is None  # a reader without an owner level does not get in
    assert [one.events for one in pipeline.drain()] == [2, 0]
    thread.join(20)
    assert [type(failure) for failure in failures] == [TakenOver] and "took the partition over" in str(failures[0])
    assert len(taken) == 2 and numbers(pipeline.capture) == [0, 1]


@pytest.mark.slow
def test_big_bodies_many_events_and_everything_senders_put_beside_the_body(server: Server, hub: Hub, pipeline: Pipeline) -> None:
    bodies = [b"x" * 900_000, *(b"%d" % n for n in range(2_500))]
    assert client(server).send(("1", body) for body in bodies) == 2_501
    with EventHubProducerClient.from_connection_string(server.connection_string, eventhub_name="hub") as producer:
        one = EventData("text")
        id_ = uuid.uuid4()
        one.properties = {"text": "é", "whole": 7, "real": 0.5, "bytes": b"\xff", "flag": True, "id": id_, "nothing": None}
        producer.send_event(one, partition_key="a key")
        producer.send_event(AmqpAnnotatedMessage(value_body={"a": [1, "é"]}), partition_id="0")
    pipeline.drain()
    records = [record for content in files(pipeline.capture).values() for record in avro.records(content)]
    assert {record["Body"] for record in records} == {*bodies, b"text", b'{"a": [1, "\\u00e9"]}'}
    [properties, system] = next((record["Properties"], record["SystemProperties"]) for record in records if record["Body"] == b"text")
    assert properties == {
        "text": "é", "whole": 7, "real": 0.5, "bytes": b"\xff", "flag": "true", "id": str(id_), "nothing": None,
    }  # fmt: skip
    assert system["x-opt-partition-key"] == "a key"
    assert all(len(avro.read(content)) == len(avro.records(content)) for content in files(pipeline.capture).values())


@pytest.mark.slow
def test_a_body_bigger_than_the_hub_takes_is_an_error(server: Server, hub: Hub) -> None:
    with pytest.raises(HubError, match="1100000 bytes"):
        client(server).send([("0", b"x" * 1_100_000)])


@pytest.mark.slow
def test_drain_then_bill_is_capture_then_bill(tmp_path: Path, server: Server, hub: Hub, clock: Clock) -> None:
    drained = installation(tmp_path / "drained", **hub_settings(server))
    captured = installation(tmp_path / "captured")
    start = dt.datetime(2026, 10, 5, 23, 50)
    windows: dict[tuple[str, dt.datetime], list[Captured]] = {}
    for n in range(40):
        clock.now = at = start + n * MINUTE
        partition_id, body = str(n % 2), event(f"r{n % 37}", at) if n % 9 else b"broken"
        hub.put(partition_id, body)
        window = start + (at - start) // (15 * MINUTE) * (15 * MINUTE)
        windows.setdefault((partition_id, window), []).append(Captured(body, at, n // 2, partition_id))
        if n in (11, 29):
            drained.drain()
    drained.drain()
    for (partition_id, window), records in windows.items():
        put(captured.settings.capture_url, blob_name(window, partition_id), capture_file(records))
    tables = {
        "daily_usage": "*",
        "daily_billing": "*",
        "daily_quality": "*",
        "quarantine": "reason, partition_id, sequence_number, enqueued_at",
        "enriched_usage": "request_id, usage_date, prompt_tokens, completion_tokens, cost",
    }
    for pipeline in (drained, captured):
        run_all(pipeline, start.date(), start.date() + dt.timedelta(1))
    for table, columns in tables.items():
        select = f"SELECT {columns} FROM {table} ORDER BY ALL"
        assert rows(drained, select) == rows(captured, select) != [], table
    digests = [list(pipeline.verify([start.date()]).verdicts) for pipeline in (drained, captured)]
    assert digests[0] == digests[1]


# --- the rules of draining --------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """The process is killed here."""


class Memory:
    """A hub of one partition in memory, with the interface of `EventHub`."""

    namespace, name = "ns", "hub"

    def __init__(self, events: list[Record], batch: int) -> None:
        self.events, self.batch = events, batch

    def state(self) -> HubState:
        last = self.events[-1]["SequenceNumber"] if self.events else -1
        return HubState(dt.datetime(2026, 1, 1), (Partition("0", self.events[0]["SequenceNumber"] if self.events else 0, last, None),))

    def receive(self, partition_id: str, after: int | None, until: int, take: Callable[[list[Record]], None]) -> None:
        wanted = [e for e in self.events if (-1 if after is None else after) < e["SequenceNumber"] <= until]
        for at in range(0, len(wanted), self.batch):
            take(wanted[at : at + self.batch])


class Fragile:
    """Checkpoints and a store whose operations crash when the budget is spent, before or after they are done."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.budget, self.after, self.saved = store, 10**9, False, {}

    def _spend(self) -> None:
        self.budget -= 1
        if self.budget < 0:
            raise Crash

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, content: bytes, *, replacing: str | None) -> str:
        if not self.after:
            self._spend()
        etag = self._store.write(name, content, replacing=replacing)
        if self.after:
            self._spend()
        return etag

    def load(self) -> dict[str, Checkpoint]:
        return self.saved

    def save(self, partition_id: str, sequence_number: int, offset: str) -> None:
        self._spend()
        self.saved = {partition_id: Checkpoint(sequence_number, NOW)}


def numbered(seconds: list[int]) -> list[Record]:
    """Events of a partition, each enqueued so many seconds behind the one before."""
    start = dt.datetime(2026, 10, 5, 23, 55)
    found = []
    for number, at in enumerate(itertools.accumulate(seconds)):
        enqueued_at = start + dt.timedelta(seconds=at)
        millis = (enqueued_at - dt.datetime(1970, 1, 1)) // dt.timedelta(milliseconds=1)
        system = {"x-opt-enqueued-time": millis}
        found.append({
            "SequenceNumber": number, "Offset": str(number * 100), "EnqueuedTimeUtc": culture(enqueued_at),
            "SystemProperties": system, "Properties": {}, "Body": b"%d" % number,
        })  # fmt: skip
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.booleans()), max_size=5),
    st.integers(1, 4),
)
def test_drains_killed_anywhere_and_run_again_give_the_files_of_one_drain(seconds: list[int], runs: list[tuple[int, int, bool]], batch: int) -> None:
    events = numbered(seconds)
    with tempfile.TemporaryDirectory() as place:
        clean, store = open_store(f"{place}/clean", create=True), open_store(f"{place}/store", create=True)
        drain(Memory(events, 100), clean, NAMES, Fragile(clean), lambda *_: None)  # type: ignore[arg-type]
        fragile = Fragile(store)
        for arrived, fragile.budget, fragile.after in [*runs, (len(events), 10**9, False)]:
            with contextlib.suppress(Crash):
                drain(Memory(events[:arrived], batch), fragile, NAMES, fragile, lambda *_: None)  # type: ignore[arg-type]
        assert files(store) == files(clean)
        before = versions(Path(place, "store"))
        fragile.saved = {}  # a checkpoint that was lost costs reading, nothing else
        drain(Memory(events, batch), fragile, NAMES, fragile, lambda *_: None)  # type: ignore[arg-type]
        assert versions(Path(place, "store")) == before


def test_two_drains_at_once_complete_the_same_file(tmp_path: Path) -> None:
    store, events = open_store(str(tmp_path), create=True), numbered([1] * 10)

    class Overtaken(Fragile):
        def read(self, name: str) -> tuple[bytes, str]:
            try:
                return store.read(name)
            finally:
                if self.budget:
                    self.budget = 0
                    drain(Memory(events, 100), store, NAMES, Fragile(store), lambda *_: None)  # type: ignore[arg-type]

        def _spend(self) -> None:
            pass

    drain(Memory(events[:4], 100), store, NAMES, Fragile(store), lambda *_: None)  # type: ignore[arg-type]
    overtaken = Overtaken(store)
    overtaken.saved = {"0": Checkpoint(3, NOW)}
    drain(Memory(events[:7], 100), overtaken, NAMES, overtaken, lambda *_: None)  # type: ignore[arg-type]
    assert numbers(store) == list(range(10))


def test_a_file_in_the_way_that_cannot_be_read_is_an_error_and_stays(tmp_path: Path) -> None:
    store, events = open_store(str(tmp_path), create=True), numbered([1, 1])
    name = NAMES.name("ns", "hub", "0", dt.datetime(2026, 10, 5, 23, 55))
    store.write(name, b"Obj\x01torn", replacing=None)
    fragile = Fragile(store)
    with pytest.raises(HubError, match=r"55/00\.avro is in the way"):
        drain(Memory(events, 100), store, NAMES, fragile, lambda *_: None)  # type: ignore[arg-type]
    assert store.read(name)[0] == b"Obj\x01torn" and fragile.saved == {}


# --- is everything captured? ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Situation:
    """A hub, and capture files of its events."""

    hub: Hub
    clock: Clock
    pipeline: Pipeline

    def send(self, minutes_ago: float, count: int, partition_id: str = "0") -> None:
        self.clock.now = NOW - minutes_ago * MINUTE
        self.hub.put(partition_id, *(event(f"{partition_id}{minutes_ago}{n}", self.clock.now) for n in range(count)))

    def capture(self, minutes_ago: float, first: int, last: int, partition_id: str = "0", *, ingest: bool = True) -> None:
        window = NOW - minutes_ago * MINUTE
        kept = self.hub.partitions[partition_id].events
        events = [Captured(event("x", window), e.enqueued_at, e.number, partition_id) for e in kept if first <= e.number <= last]
        put(self.pipeline.settings.capture_url, blob_name(window, partition_id), capture_file(events))
        if ingest:
            self.pipeline.ingest([window.date()])

    def states(self) -> dict[str, tuple[str, int, int]]:
        """State, missing and lost events by partition."""
        return {one.partition.partition_id: (one.state, one.missing, one.lost) for one in self.pipeline.completeness()}


@pytest.fixture
def situation(hub: Hub, clock: Clock, pipeline: Pipeline) -> Situation:
    return Situation(hub, clock, pipeline)


def test_completeness_from_complete_to_overdue(situation: Situation) -> None:
    situation.send(60, 5)
    situation.capture(65, 0, 4)
    assert situation.states() == {"0": (COMPLETE, 0, 0), "1": (COMPLETE, 0, 0)}
    situation.send(10, 3)
    [lagging, empty] = situation.pipeline.completeness()
    assert (lagging.state, lagging.missing, lagging.missing_from, lagging.captured_to, lagging.ok) == (IN_WINDOW, 3, 5, 4, True)
    assert 10 <= lagging.minutes <= 12 and (empty.partition.last, empty.captured_to) == (-1, None)
    hasty = Pipeline(dataclasses.replace(situation.pipeline.settings, capture_minutes=5))
    assert [(one.state, one.missing) for one in hasty.completeness()] == [(OVERDUE, 3), (COMPLETE, 0)]


@pytest.mark.slow
def test_a_gap_older_than_the_window_is_overdue_however_new_the_newest_event_is(situation: Situation) -> None:
    situation.send(60, 5)
    situation.capture(65, 0, 4)
    situation.send(40, 2)
    situation.send(1, 9)
    situation.send(1, 1, "1")
    [overdue, fresh] = situation.pipeline.completeness()
    assert (overdue.state, overdue.missing, overdue.missing_from, overdue.ok) == (OVERDUE, 11, 5, False) and 40 <= overdue.minutes <= 42
    assert (fresh.state, fresh.ok) == (IN_WINDOW, True)
    # a file that can hold the oldest missing event is there: the hub is right, the lake has to catch up
    situation.capture(45, 5, 6, ingest=False)
    assert situation.states()["0"] == (NOT_INGESTED, 11, 0)
    situation.pipeline.ingest([(NOW - 45 * MINUTE).date()])
    assert situation.states()["0"] == (IN_WINDOW, 9, 0)


@pytest.mark.slow
def test_holes_inside_and_between_files_are_overdue(situation: Situation) -> None:
    situation.send(60, 20)
    situation.capture(65, 0, 4)
    situation.capture(63, 8, 12)
    situation.capture(61, 13, 19)
    assert situation.states()["0"] == (OVERDUE, 3, 0)
    situation.capture(64, 5, 7)
    assert situation.states()["0"] == (COMPLETE, 0, 0)


@pytest.mark.slow
def test_events_that_left_the_hub_uncaptured_are_lost(situation: Situation) -> None:
    situation.send(100, 10)
    situation.capture(105, 0, 4)
    situation.hub.expire("0", 5)
    assert situation.states()["0"] == (OVERDUE, 5, 0)
    situation.hub.expire("0", 8)
    assert situation.states()["0"] == (LOST, 2, 3)
    situation.hub.expire("0", 10)
    assert situation.states()["0"] == (LOST, 0, 5)


@pytest.mark.slow
@pytest.mark.parametrize("events", [3, 9])
def test_a_hub_that_was_created_again_is_compared_with_its_own_files(situation: Situation, server: Server, events: int) -> None:
    situation.send(100, 6)
    situation.capture(105, 0, 5)
    situation.clock.now = NOW - 50 * MINUTE
    server.hubs["hub"] = situation.hub = Hub(2, situation.clock)
    situation.send(40, events)
    [one, _] = situation.pipeline.completeness()
    assert (one.state, one.missing, one.restarted, one.captured_to) == (OVERDUE, events, True, None)
    situation.capture(42, 0, events - 1)
    [one, other] = situation.pipeline.completeness()
    assert (one.state, one.missing, one.restarted, one.captured_to, other.restarted) == (COMPLETE, 0, True, events - 1, False)


# --- what the hub is reached with -------------------------------------------------------------------------------------------------


AZURE = "Endpoint=sb://contoso.servicebus.windows.net/;SharedAccessKeyName=k;SharedAccessKey=c2VjcmV0"


def test_a_key_is_for_emulators_only() -> None:
    with pytest.raises(HubError, match=r"contoso\.servicebus\.windows\.net, which is no emulator") as refused:
        EventHub("contoso", "hub", "$Default", AZURE)
    assert "c2VjcmV0" not in str(refused.value)
    assert EventHub("ns", "hub", "$Default", AZURE.replace("contoso.servicebus.windows.net", "127.0.0.1:5671")).host == "127.0.0.1:5671"
    assert EventHub("ns", "hub", "$Default", AZURE.replace("contoso.servicebus.windows.net", "emulator:5672") + ";UseDevelopmentEmulator=true")
    with pytest.raises(HubError, match="not a connection string"):
        EventHub("ns", "hub", "$Default", "nonsense")


@pytest.mark.parametrize(
    ("namespace", "host"),
    [("contoso", "contoso.servicebus.windows.net"), ("contoso.servicebus.chinacloudapi.cn", "contoso.servicebus.chinacloudapi.cn")],
)
def test_azure_is_reached_by_the_name_of_the_namespace(namespace: str, host: str) -> None:
    hub = EventHub(namespace, "hub", "$Default")
    assert (hub.host, hub.namespace) == (host, "contoso")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"AOAI_EVENT_HUB_NAMESPACE": "ns"}, "AOAI_EVENT_HUB_NAME"),
        ({"AOAI_EVENT_HUB_NAME": "hub"}, "AOAI_EVENT_HUB_NAMESPACE"),
        ({"AOAI_EVENT_HUB_CONNECTION_STRING": AZURE}, "AOAI_EVENT_HUB_CONNECTION_STRING is set"),
        ({"AOAI_DRAIN": "on"}, "AOAI_DRAIN"),
        ({"AOAI_CAPTURE_MINUTES": "soon"}, "AOAI_CAPTURE_MINUTES"),
    ],
)
def test_settings_that_do_not_fit_are_refused(variables: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as refused:
        Settings.from_env(variables)
    assert "c2VjcmV0" not in str(refused.value)


@pytest.mark.slow
def test_logs_carry_no_keys_no_tokens_and_no_bodies(server: Server, hub: Hub, pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client(server).send([("0", b"a body nobody may see")])
    pipeline.drain()
    pipeline.completeness()
    assert numbers(pipeline.capture) == [0] and server.tokens
    said = "\n".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records)
    assert any(record.name.startswith("azure.eventhub") for record in caplog.records)
    signatures = {token.split("sig=")[1].split("&")[0] for token in server.tokens}
    for secret in (KEY, base64.b64encode(KEY.encode()).decode(), "a body nobody may see", *signatures):
        assert secret not in said


@pytest.mark.slow
def test_a_wrong_key_an_unknown_hub_and_silence_are_errors_that_name_the_hub(server: Server) -> None:
    wrong = server.connection_string.replace(KEY, "another")
    with pytest.raises(HubError, match="event hub hub in 127") as refused:
        client(server, connection_string=wrong).state()
    assert "another" not in str(refused.value)
    with pytest.raises(HubError, match="event hub nothing in 127"):
        client(server, name="nothing").state()
    with pytest.raises(HubError, match="partition 0 gave nothing for 1 seconds, though it has events up to 7"):
        client(server, silence_seconds=1).receive("0", None, 7, lambda records: None)


# --- traffic to the hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_traffic_goes_to_the_hub_and_comes_back_as_a_bill(
    root: Path, server: Server, hub: Hub, aoai_usage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = ("--from", "2026-10-05", "--to", "2026-10-05")
    code, _, err = aoai_usage("simulate", *days, "--requests-per-day", 50, "--to-event-hub")
    assert code == 2 and "AOAI_EVENT_HUB_NAMESPACE" in err
    for name, value in {"NAMESPACE": "ns", "NAME": "hub", "CONNECTION_STRING": server.connection_string}.items():
        monkeypatch.setenv(f"AOAI_EVENT_HUB_{name}", value)
    monkeypatch.setenv("AOAI_DRAIN", "on")
    code, out, err = aoai_usage("simulate", *days, "--requests-per-day", 50, "--to-event-hub")
    sent = sum(len(partition.events) for partition in hub.partitions.values())
    assert code == 0 and sent > 40 and f"{sent} events sent to event hub hub" in out, err
    assert not list((root / "capture").rglob("*.avro"))
    code, out, err = aoai_usage("bill", *days)
    assert code == 0, out + err
    assert f"{sent} events: " in out
    assert sorted(numbers(open_store(str(root / "capture"), create=False), "1")) == list(range(len(hub.partitions["1"].events)))


# --- in Dagster -------------------------------------------------------------------------------------------------------------------


def materialize(pipeline: Pipeline, job: str, day: dt.date | None = None) -> dg.ExecuteInProcessResult:
    tags = {"dagster/partition": str(day)} if day else {}
    with dg.DagsterInstance.ephemeral() as instance:
        found = build_defs(pipeline=pipeline).resolve_job_def(job)
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        return found.execute_in_process(instance=instance, tags=tags, partition_key=str(day) if day else None, raise_on_error=False, run_config=quiet)


@pytest.mark.slow
def test_the_asset_drains_and_the_check_shows_every_partition(situation: Situation, server: Server) -> None:
    situation.send(60, 5)
    situation.send(2, 3)
    situation.send(50, 2, "1")
    drained = materialize(situation.pipeline, "drain")
    [materialization] = drained.asset_materializations_for_node("drained_events")
    assert {name: materialization.metadata[name].value for name in ("outcome", "events", "lost")} == {"outcome": "drained", "events": 10, "lost": 0}
    situation.send(0, 4)
    situation.send(30, 1, "1")
    result = materialize(situation.pipeline, "ingest", (NOW - 60 * MINUTE).date())
    if (NOW - 60 * MINUTE).date() != NOW.date():
        result = materialize(situation.pipeline, "ingest", NOW.date())
    [check] = [one for one in result.get_asset_check_evaluations() if one.check_name == "capture_is_complete"]
    assert result.success and not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    table = [dict(record.data) for record in check.metadata["partitions"].records]
    assert [(row["partition"], row["state"], row["lag_events"]) for row in table] == [("0", IN_WINDOW, 4), ("1", OVERDUE, 1)]
    assert check.metadata["lag_events"].value == 5 and 30 <= check.metadata["lag_minutes"].value <= 33
    assert check.description == "partition 1 overdue: 1 events"

    del server.hubs["hub"]
    result = materialize(situation.pipeline, "ingest", NOW.date())
    [check] = [one for one in result.get_asset_check_evaluations() if one.check_name == "capture_is_complete"]
    assert result.success and not check.passed and check.severity == dg.AssetCheckSeverity.WARN
    assert "The hub could not be asked: event hub hub in 127.0.0.1" in (check.description or "")
