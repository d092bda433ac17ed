"""One Event Hub, as this package uses it, over the SDK. Nothing else imports `azure.eventhub`, but for the checkpoints.

The SDK is used without its load balancing: one partition at a time is received, from a sequence number up to one that is known to be there.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import functools
import ipaddress
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from azure.core.exceptions import ClientAuthenticationError
from azure.eventhub import EventData, EventHubConsumerClient, EventHubProducerClient, parse_connection_string
from azure.eventhub.amqp import AmqpMessageBodyType
from azure.eventhub.exceptions import EventHubError

from aoai_usage_pipeline.capture.times import culture
from aoai_usage_pipeline.storage import StorageError

Record = dict[str, Any]
"""One event as a record of a capture file."""

AT_ONCE = 8
"""Partitions that are asked or read at the same time: nearly all of it is waiting."""

_OWNER_LEVEL = 0
_BATCH_EVENTS = 1_000
_WAIT_SECONDS = 0.5
_SILENCE_SECONDS = 60.0
_LONG = 2**63


class HubError(StorageError):
    """The hub cannot be used as configured, or gave no answer; the message says which one and why."""


class TakenOver(HubError):
    """Another consumer of the same consumer group took the partition over."""


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """What the hub says about a partition. It holds the events from `first` to `last`, both included, and none when `first` is behind `last`.

    `last_enqueued_at` is UTC, and None when nothing was ever enqueued.
    """

    partition_id: str
    first: int
    last: int
    last_enqueued_at: dt.datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class HubState:
    """When the hub was created (UTC), and its partitions."""

    created_at: dt.datetime
    partitions: tuple[Partition, ...]


class EventHub:
    """A hub in a namespace, and the consumer group it is read with. Signs in with `DefaultAzureCredential`; a connection string is taken only
    for an emulator: its endpoint is loopback, or it says `UseDevelopmentEmulator=true`.
    """

    def __init__(
        self, namespace: str, name: str, consumer_group: str, connection_string: str | None = None, silence_seconds: float = _SILENCE_SECONDS
    ) -> None:
        self.namespace, self.name, self.consumer_group = namespace.split(".")[0], name, consumer_group
        self.host = namespace if "." in namespace else f"{namespace}.servicebus.windows.net"
        self._connection_string, self._silence_seconds = connection_string, silence_seconds
        if connection_string:
            self.host = _emulator(connection_string)

    def state(self) -> HubState:
        """What the hub says about itself now. Raises `HubError`."""
        with self._errors(), self._consumer() as client:
            properties = client.get_eventhub_properties()
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                partitions = [_partition(found) for found in pool.map(client.get_partition_properties, properties["partition_ids"])]
            return HubState(_utc(properties["created_at"]), tuple(partitions))

    def enqueued_at(self, partition_id: str, number: int) -> dt.datetime | None:
        """When the first event from a sequence number on was enqueued (UTC).

        None when it is gone, or when it cannot be seen because somebody reads the partition exclusively.
        """
        found: list[Record] = []
        try:
            self._receive(partition_id, number - 1, number, found.extend, exclusive=False)
        except HubError:
            return None
        at = found[0]["SystemProperties"]["x-opt-enqueued-time"]
        return dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=at)

    def receive(self, partition_id: str, after: int | None, until: int, take: Callable[[list[Record]], None]) -> None:
        """Give the events of a partition in their order, in batches: those behind the sequence number `after` (None: from the first), until
        `until` was given. Whoever else reads the partition with this consumer group is disconnected. Raises `HubError`, `TakenOver`.
        """
        self._receive(partition_id, after, until, take, exclusive=True)

    def send(self, events: Iterable[tuple[str, bytes]], progress: Callable[[int], None] = lambda sent: None) -> int:
        """Send bodies to partitions, in order, in batches as big as they may be; returns how many. A body too big for a batch raises `HubError`."""
        with self._errors(), self._producer() as client:
            batches, sent = {}, 0
            for partition_id, body in events:
                event = EventData(body)
                batch = batches.get(partition_id)
                try:
                    if batch is None:
                        raise ValueError
                    batch.add(event)
                except ValueError:
                    if batch is not None:
                        client.send_batch(batch)
                        sent += len(batch)
                        progress(sent)
                    batches[partition_id] = batch = client.create_batch(partition_id=partition_id)
                    try:
                        batch.add(event)
                    except ValueError:
                        raise HubError(f"{self}: a body of {len(body)} bytes is bigger than the hub takes") from None
            for batch in batches.values():
                client.send_batch(batch)
                sent += len(batch)
            return sent

    @contextlib.contextmanager
    def publishing(self) -> Iterator[Callable[[bytes, str, str, Mapping[str, str]], None]]:
        """A function that sends one JSON body with its partition key, message id and properties, over one connection. Raises `HubError`."""
        with self._errors():
            # whoever publishes tries again by itself, and must not find the SDK still at it
            client = self._producer(retry_total=0)

        def publish(body: bytes, key: str, message_id: str, properties: Mapping[str, str]) -> None:
            event = EventData(body)
            event.message_id, event.content_type, event.properties = message_id, "application/json", dict(properties)
            with self._errors():
                client.send_event(event, partition_key=key)

        with client:
            yield publish

    def partition_ids(self) -> list[str]:
        """The ids of the hub's partitions. Raises `HubError`."""
        with self._errors(), self._producer() as client:
            return client.get_partition_ids()

    def __str__(self) -> str:
        return f"event hub {self.name} in {self.host}"

    def _receive(self, partition_id: str, after: int | None, until: int, take: Callable[[list[Record]], None], *, exclusive: bool) -> None:
        failures: list[Exception] = []
        # the SDK gives a batch that is not full only after the wait
        heard, batch = time.monotonic(), min(_BATCH_EVENTS, until + 1 if after is None else until - after)
        client = self._consumer()

        def on_batch(_: Any, events: list[EventData]) -> None:
            nonlocal heard
            if events:
                heard = time.monotonic()
                take([_record(event) for event in events])
                if (events[-1].sequence_number or 0) >= until:
                    client.close()
            elif time.monotonic() - heard > self._silence_seconds:
                raise HubError(
                    f"{self}: partition {partition_id} gave nothing for {self._silence_seconds:.0f} seconds, though it has events up to {until}"
                )

        def on_error(_: Any, error: Exception) -> None:
            # the SDK would go on by itself, and take the partition back from whoever took it over
            failures.append(error)
            client.close()

        with self._errors(), client:
            client.receive_batch(
                on_batch,
                on_error=on_error,
                partition_id=partition_id,
                starting_position="-1" if after is None else after,
                owner_level=_OWNER_LEVEL if exclusive else None,
                max_batch_size=batch,
                prefetch=batch,
                max_wait_time=_WAIT_SECONDS,
            )
            if failures:
                raise failures[0]

    def _consumer(self) -> EventHubConsumerClient:
        if self._connection_string:
            return EventHubConsumerClient.from_connection_string(self._connection_string, self.consumer_group, eventhub_name=self.name)
        return EventHubConsumerClient(self.host, self.name, self.consumer_group, self._credential)

    def _producer(self, **options: Any) -> EventHubProducerClient:
        if self._connection_string:
            return EventHubProducerClient.from_connection_string(self._connection_string, eventhub_name=self.name, **options)
        return EventHubProducerClient(self.host, self.name, self._credential, **options)

    @functools.cached_property
    def _credential(self) -> Any:
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Says what the SDK raised in the words of this module."""
        try:
            yield
        except ClientAuthenticationError as error:
            raise HubError(f"no sign-in for {self}: {error.message}") from error
        except EventHubError as error:
            if "link:stolen" in str(error):
                raise TakenOver(f"{self}: another consumer of {self.consumer_group} took the partition over") from error
            raise HubError(f"{self}: {str(error).splitlines()[0]}") from error


def _emulator(connection_string: str) -> str:
    """The host of an emulator's connection string. Raises `HubError` for any other, without saying what is in it."""
    try:
        host = parse_connection_string(connection_string).fully_qualified_namespace
    except ValueError as error:
        raise HubError(f"AOAI_EVENT_HUB_CONNECTION_STRING is not a connection string: {error}") from None
    says_so = any(part.strip().lower() == "usedevelopmentemulator=true" for part in connection_string.split(";"))
    if not says_so and not _is_loopback(host.rsplit(":", 1)[0].strip("[]")):
        raise HubError(f"AOAI_EVENT_HUB_CONNECTION_STRING is for {host}, which is no emulator: Azure is reached with DefaultAzureCredential")
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _partition(properties: dict[str, Any]) -> Partition:
    last = properties["last_enqueued_sequence_number"]
    first = last + 1 if properties["is_empty"] else properties["beginning_sequence_number"]
    return Partition(properties["id"], first, last, None if last < 0 else _utc(properties["last_enqueued_time_utc"]))


def _utc(at: dt.datetime) -> dt.datetime:
    return at.astimezone(dt.UTC).replace(tzinfo=None)


def _record(event: EventData) -> Record:
    """The event as Capture writes it."""
    system = event.system_properties
    millis = system[b"x-opt-enqueued-time"]
    kept: dict[str, Any] = {"x-opt-enqueued-time": millis}
    if (key := system.get(b"x-opt-partition-key")) is not None:
        kept = {"x-opt-partition-key": _text(key), **kept}
    return {
        "SequenceNumber": event.sequence_number,
        "Offset": event.offset,
        "EnqueuedTimeUtc": culture(dt.datetime(1970, 1, 1) + dt.timedelta(seconds=millis // 1000)),
        "SystemProperties": kept,
        "Properties": {str(_text(name)): _property(value) for name, value in (event.properties or {}).items()},
        "Body": _body(event),
    }


def _body(event: EventData) -> bytes | None:
    if event.body_type == AmqpMessageBodyType.DATA:
        return b"".join(event.body)  # type: ignore[arg-type]
    # a sender that does not send bytes; what it sent is kept as text
    body = event.body if event.body_type == AmqpMessageBodyType.VALUE else list(itertools.chain.from_iterable(event.body))  # type: ignore[arg-type]
    return body if isinstance(body, bytes) or body is None else json.dumps(_plain(body), default=str).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_text(key)): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else _text(value)


def _property(value: Any) -> Any:
    """A property as one of the types a capture file has; the others as text."""
    value = _text(value)
    if isinstance(value, bool) or (isinstance(value, int) and not -_LONG <= value < _LONG):
        return json.dumps(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    return value if isinstance(value, int | float | str | bytes | None) else json.dumps(_plain(value), default=str)


def _text(value: Any) -> Any:
    """The SDK gives text as bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
