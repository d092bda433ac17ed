"""A small Event Hubs namespace on the loopback: as much AMQP 1.0 as `azure-eventhub` speaks, without TLS, kept in memory.

It checks SAS tokens, numbers events by partition, gives them back from a position, answers for the properties of hubs and partitions, and lets
an owner level take a partition over. It was written from what the SDK sends, so it proves our code against the SDK, not against Azure: the
partition of a partition key is its own choice. By hand: `python -m aoai_usage_pipeline_tests.event_hub_server --port 5672 --partitions 4`.
"""

import argparse
import base64
import contextlib
import dataclasses
import datetime as dt
import hashlib
import hmac
import itertools
import queue
import socket
import struct
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import Any

KEY_NAME, KEY = "RootManageSharedAccessKey", "SAS_KEY_VALUE_OF_THE_TESTS"
_FRAME = 65_536
_CREDIT = 1_000
_BATCH_FORMAT = 0x80013700
_OPEN, _BEGIN, _ATTACH, _FLOW, _TRANSFER, _DISPOSITION, _DETACH, _END, _CLOSE = range(0x10, 0x19)
_FIELDS = {_OPEN: 10, _BEGIN: 8, _ATTACH: 14, _FLOW: 11, _TRANSFER: 11, _DISPOSITION: 6, _DETACH: 3, _END: 1, _CLOSE: 1}


# --- AMQP's types -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value with the AMQP type it is written as."""

    kind: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Described:
    """A value with its descriptor: a section of a message, an error, a filter."""

    code: Any
    value: Any


def symbol(text: str) -> Typed:
    return Typed("symbol", text)


_FIXED = {
    "ubyte": (0x50, ">B"),
    "ushort": (0x60, ">H"),
    "uint": (0x70, ">I"),
    "ulong": (0x80, ">Q"),
    "int": (0x71, ">i"),
    "long": (0x81, ">q"),
    "timestamp": (0x83, ">q"),
}


def encode(value: Any) -> bytes:
    """Plain ints are longs, str strings, bytes binary; everything else says what it is."""
    match value:
        case None:
            return b"\x40"
        case bool():
            return b"\x41" if value else b"\x42"
        case Typed("symbol", text):
            return b"\xb3" + struct.pack(">I", len(text.encode())) + text.encode()
        case Typed("array", items):
            inside = b"".join(struct.pack(">I", len(item.encode())) + item.encode() for item in items)
            return b"\xf0" + struct.pack(">IIB", len(inside) + 5, len(items), 0xB1) + inside
        case Typed(kind, number):
            return bytes([_FIXED[kind][0]]) + struct.pack(_FIXED[kind][1], number)
        case Described(code, inner):
            return b"\x00" + (b"\x53" + bytes([code]) if isinstance(code, int) else encode(code)) + encode(inner)
        case uuid.UUID():
            return b"\x98" + value.bytes
        case int():
            return b"\x81" + struct.pack(">q", value)
        case str():
            return b"\xb1" + struct.pack(">I", len(value.encode())) + value.encode()
        case bytes():
            return b"\xb0" + struct.pack(">I", len(value)) + value
        case list() | dict():
            items = value if isinstance(value, list) else list(itertools.chain.from_iterable(value.items()))
            inside = b"".join(map(encode, items))
            return (b"\xd0" if isinstance(value, list) else b"\xd1") + struct.pack(">II", len(inside) + 4, len(items)) + inside
    raise TypeError(type(value))


_NUMBERS = {
    0x50: ">B", 0x51: ">b", 0x52: ">B", 0x53: ">B", 0x54: ">b", 0x55: ">b", 0x60: ">H", 0x61: ">h", 0x70: ">I", 0x71: ">i",
    0x72: ">f", 0x80: ">Q", 0x81: ">q", 0x82: ">d", 0x83: ">q",
}  # fmt: skip
_CONSTANTS = {0x40: None, 0x41: True, 0x42: False, 0x43: 0, 0x44: 0, 0x45: []}


def decode(data: bytes, at: int = 0, code: int | None = None) -> tuple[Any, int]:
    """The value at a position, and the position behind it. Symbols are str, binary is bytes."""
    if code is None:
        code, at = data[at], at + 1
    if code == 0:
        descriptor, at = decode(data, at)
        inner, at = decode(data, at)
        return Described(descriptor, inner), at
    if code in _CONSTANTS:
        return _CONSTANTS[code], at
    if code in _NUMBERS:
        size = struct.calcsize(_NUMBERS[code])
        return struct.unpack_from(_NUMBERS[code], data, at)[0], at + size
    if code == 0x56:
        return data[at] == 1, at + 1
    if code == 0x98:
        return uuid.UUID(bytes=data[at : at + 16]), at + 16
    long = code & 0xF0 in (0xB0, 0xD0, 0xF0)
    size, at = (struct.unpack_from(">I", data, at)[0], at + 4) if long else (data[at], at + 1)
    end = at + size
    if code & 0xF0 in (0xA0, 0xB0):
        return (data[at:end] if code & 0xF == 0 else data[at:end].decode()), end
    count, at = (struct.unpack_from(">I", data, at)[0], at + 4) if long else (data[at], at + 1)
    each = None
    if code in (0xE0, 0xF0) and count:
        each, at = data[at], at + 1
    items = []
    for _ in range(count):
        item, at = decode(data, at, each)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if code in (0xC1, 0xD1) else items), end


def sections(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """The sections of a message as (code, value, bytes)."""
    at = 0
    while at < len(message):
        section, end = decode(message, at)
        yield section.code, section.value, message[at:end]
        at = end


# --- hubs -------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Event:
    """One event as the hub keeps it: its number, when it was enqueued, and the sections of the sender."""

    number: int
    offset: str
    enqueued_at: dt.datetime
    key: str | None
    sections: bytes

    def message(self) -> bytes:
        annotations: dict[Any, Any] = {
            symbol("x-opt-sequence-number"): self.number,
            symbol("x-opt-offset"): self.offset,
            symbol("x-opt-enqueued-time"): Typed("timestamp", _millis(self.enqueued_at)),
        }
        if self.key is not None:
            annotations[symbol("x-opt-partition-key")] = self.key
        return encode(Described(0x72, annotations)) + self.sections


@dataclasses.dataclass
class Partition:
    events: list[Event] = dataclasses.field(default_factory=list)
    next_number: int = 0
    next_offset: int = 0
    last: Event | None = None


class Hub:
    """A hub; `clock` says when an event was enqueued, naive UTC."""

    def __init__(self, partitions: int = 4, clock: Callable[[], dt.datetime] | None = None) -> None:
        self.clock = clock or (lambda: dt.datetime.now(dt.UTC).replace(tzinfo=None))
        self.created_at = self.clock()
        self.partitions = {str(n): Partition() for n in range(partitions)}
        self.round_robin = itertools.cycle(self.partitions)

    def append(self, partition_id: str, message: bytes) -> None:
        partition = self.partitions[partition_id]
        key, kept = None, b""
        for code, value, raw in sections(message):
            if code == 0x72:
                key = value.get("x-opt-partition-key")
            elif code != 0x70:
                kept += raw
        event = Event(partition.next_number, str(partition.next_offset), self.clock(), key, kept)
        partition.events.append(event)
        partition.last = event
        partition.next_number += 1
        partition.next_offset += (len(message) + 7) // 8 * 8 + 24

    def put(self, partition_id: str, *bodies: bytes) -> None:
        """Events as if a client had sent them."""
        for body in bodies:
            self.append(partition_id, encode(Described(0x75, body)))

    def expire(self, partition_id: str, before: int) -> None:
        """Retention: the events before a sequence number are gone."""
        partition = self.partitions[partition_id]
        partition.events = [event for event in partition.events if event.number >= before]


# --- the protocol -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Link:
    connection: "_Connection"
    channel: int
    handle: int
    address: str
    name: str
    gives: bool
    """Whether the server sends on it."""
    credit: int = 0
    delivered: int = 0
    received: int = 0
    level: int | None = None
    partition: tuple[str, str] | None = None
    after: Callable[[Event], bool] = lambda event: True
    next_number: int = 0
    parts: bytes = b""
    format: int = 0


class Server:
    """Hubs by name behind one port. `connection_string` is what a client needs; `hubs` may be changed while it runs."""

    def __init__(self, hubs: dict[str, Hub], port: int = 0, keys: dict[str, str] | None = None) -> None:
        self.hubs, self.keys = hubs, keys or {KEY_NAME: KEY}
        self.lock = threading.RLock()
        self.receivers: list[_Link] = []
        self.tokens: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self._open: set[_Connection] = set()
        self.port = self._listener.getsockname()[1]
        name, key = next(iter(self.keys.items()))
        self.connection_string = f"Endpoint=sb://127.0.0.1:{self.port};SharedAccessKeyName={name};SharedAccessKey={key};UseDevelopmentEmulator=true;"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in list(self._open):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(_Connection(self, accepted))

    def forget(self, connection: "_Connection") -> None:
        with self.lock:
            self._open.discard(connection)
            self.receivers = [link for link in self.receivers if link.connection is not connection]

    def pump(self, hub: str, partition_id: str | None = None) -> None:
        """Give receivers what they have credit for."""
        with self.lock:
            for link in [
                link for link in self.receivers if link.partition and link.partition[0] == hub and partition_id in (None, link.partition[1])
            ]:
                if hub not in self.hubs:
                    continue
                for event in self.hubs[hub].partitions[link.partition[1]].events:  # type: ignore[index]
                    if link.credit <= 0:
                        break
                    if event.number >= link.next_number and link.after(event):
                        link.next_number = event.number + 1
                        link.connection.transfer(link, event.message())

    def token_is_valid(self, token: str) -> bool:
        self.tokens.append(token)
        parts = dict(part.split("=", 1) for part in token.removeprefix("SharedAccessSignature ").split("&"))
        key = self.keys.get(parts.get("skn", ""))
        if not key or int(parts["se"]) < time.time():
            return False
        wanted = base64.b64encode(hmac.new(key.encode(), f"{parts['sr']}\n{parts['se']}".encode(), hashlib.sha256).digest()).decode()
        return hmac.compare_digest(urllib.parse.unquote_plus(parts["sig"]), wanted) or hmac.compare_digest(parts["sig"], wanted)


class _Connection:
    def __init__(self, server: Server, accepted: socket.socket) -> None:
        self.server, self.socket = server, accepted
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.links: dict[tuple[int, int], _Link] = {}
        self.authorised: set[str] = set()
        self.delivery = itertools.count()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        self._out.put(None)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _write(self) -> None:
        try:
            while (data := self._out.get()) is not None:
                self.socket.sendall(data)
        except OSError:
            pass

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise ConnectionError
            data += more
        return data

    def _read(self) -> None:
        try:
            self._exactly(8)
            self._out.put(b"AMQP\x03\x01\x00\x00")
            self._frame(0, _mechanisms(), sasl=True)
            self._one_frame()
            self._frame(0, encode(Described(0x44, [Typed("ubyte", 0), None])), sasl=True)
            self._exactly(8)
            self._out.put(b"AMQP\x00\x01\x00\x00")
            while True:
                channel, body = self._one_frame()
                if body:
                    performative, end = decode(body)
                    with self.server.lock:
                        self._on(channel, performative.code, performative.value, body[end:])
        except (ConnectionError, OSError):
            pass
        finally:
            self.server.forget(self)
            self.close()

    def _one_frame(self) -> tuple[int, bytes]:
        size, offset, _, channel = struct.unpack(">IBBH", self._exactly(8))
        return channel, self._exactly(size - 8)[offset * 4 - 8 :]

    def _frame(self, channel: int, body: bytes, *, sasl: bool = False) -> None:
        self._out.put(struct.pack(">IBBH", len(body) + 8, 2, int(sasl), channel) + body)

    def send(self, channel: int, code: int, payload: bytes = b"", **fields: Any) -> None:
        """A performative with every field written: the SDK counts on all of them being there."""
        values = [fields.get(f"f{n}") for n in range(_FIELDS[code])]
        self._frame(channel, encode(Described(code, values)) + payload)

    def transfer(self, link: _Link, message: bytes) -> None:
        link.credit -= 1
        link.delivered += 1
        delivery, room = next(self.delivery), _FRAME - 512
        pieces = [message[at : at + room] for at in range(0, len(message), room)]
        for number, piece in enumerate(pieces):
            self.send(
                link.channel, _TRANSFER, piece,
                f0=Typed("uint", link.handle), f1=Typed("uint", delivery), f2=struct.pack(">I", delivery), f3=Typed("uint", 0), f4=False, f5=number < len(pieces) - 1,
            )  # fmt: skip

    def detach(self, link: _Link, condition: str, description: str) -> None:
        error = Described(0x1D, [symbol(condition), description, None])
        self.send(link.channel, _DETACH, f0=Typed("uint", link.handle), f1=True, f2=error)
        self._drop(link)

    def _drop(self, link: _Link) -> None:
        self.links.pop((link.channel, link.handle), None)
        if link in self.server.receivers:
            self.server.receivers.remove(link)

    def _on(self, channel: int, code: int, fields: list[Any], payload: bytes) -> None:
        fields = fields + [None] * (14 - len(fields))
        link = self.links.get((channel, fields[0] if code in (_TRANSFER, _DETACH) else fields[4] if code == _FLOW else -1))
        if code == _OPEN:
            self.send(0, _OPEN, f0="event-hub-server", f2=Typed("uint", _FRAME), f3=Typed("ushort", 1024))
        elif code == _BEGIN:
            window = Typed("uint", 2**31 - 1)
            self.send(channel, _BEGIN, f0=Typed("ushort", channel), f1=Typed("uint", 0), f2=window, f3=window, f4=Typed("uint", 1024))
        elif code == _ATTACH:
            self._attach(channel, fields)
        elif code == _FLOW and link and link.gives:
            link.credit = (fields[5] or 0) + (fields[6] or 0) - link.delivered
            if link.partition:
                self.server.pump(*link.partition)
        elif code == _TRANSFER and link:
            self._transferred(link, fields, payload)
        elif code == _DETACH and link:
            self.send(channel, _DETACH, f0=Typed("uint", link.handle), f1=True)
            self._drop(link)
        elif code == _END:
            self.send(channel, _END)
        elif code == _CLOSE:
            self.send(0, _CLOSE)

    def _attach(self, channel: int, fields: list[Any]) -> None:
        name, handle, client_receives, source, target = fields[0], fields[1], fields[2], fields[5], fields[6]
        address = (source if client_receives else target).value[0]
        link = _Link(self, channel, handle, address, name, client_receives)
        path = urllib.parse.urlsplit(address).path.strip("/") if "://" in address else address.strip("/")
        self.links[channel, handle] = link
        self.send(
            channel, _ATTACH, f0=name, f1=Typed("uint", handle), f2=not client_receives, f3=Typed("ubyte", 2), f4=Typed("ubyte", 0),
            f5=_terminus(source), f6=_terminus(target), f9=Typed("uint", 0) if client_receives else None, f10=Typed("ulong", 2**20),
        )  # fmt: skip
        hub_name = path.split("/")[0]
        if path != "$cbs" and hub_name != "$management":
            if hub_name not in self.authorised:
                return self.detach(link, "amqp:unauthorized-access", "no token was put for this hub")
            if hub_name not in self.server.hubs:
                return self.detach(link, "amqp:not-found", f"The messaging entity '{hub_name}' could not be found.")
        if not client_receives:
            self.send(
                channel,
                _FLOW,
                f0=Typed("uint", 0),
                f1=Typed("uint", 2**31 - 1),
                f2=Typed("uint", 0),
                f3=Typed("uint", 2**31 - 1),
                f4=Typed("uint", handle),
                f5=Typed("uint", 0),
                f6=Typed("uint", _CREDIT),
            )
        elif "/ConsumerGroups/" in path:
            self._receive(link, path, fields)
        return None

    def _receive(self, link: _Link, path: str, fields: list[Any]) -> None:
        hub, _, _, _, partition_id = path.split("/")
        if partition_id not in self.server.hubs[hub].partitions:
            return self.detach(link, "amqp:not-found", f"partition {partition_id} does not exist")
        link.partition = hub, partition_id
        link.level = (fields[13] or {}).get("com.microsoft:epoch")
        group = path.lower()
        others = [other for other in self.server.receivers if other.address.lower().endswith(group)]
        highest = max((other.level for other in others if other.level is not None), default=None)
        if highest is not None and (link.level is None or link.level < highest):
            return self.detach(link, "amqp:link:stolen", f"a receiver with owner level {highest} has the partition")
        if link.level is not None:
            for other in others:
                other.connection.detach(other, "amqp:link:stolen", f"a receiver with owner level {link.level} took the partition over")
        link.after = _selector(fields[5].value[7])
        self.server.receivers.append(link)
        return None

    def _transferred(self, link: _Link, fields: list[Any], payload: bytes) -> None:
        if not link.parts:
            link.format = fields[3] or 0
        link.parts += payload
        if fields[1] is not None:
            link.received = fields[1]
        if fields[5]:
            return
        message, link.parts = link.parts, b""
        state: Any = Described(0x24, [])
        path = link.address.split("://")[-1].strip("/")
        if path.endswith("$cbs"):
            self._put_token(message)
        elif path.endswith("$management"):
            self._management(message)
        else:
            state = self._accept(link, message)
        first = Typed("uint", link.received)
        self.send(link.channel, _DISPOSITION, f0=True, f1=first, f2=first, f3=True, f4=state)
        link.delivered += 1
        window = Typed("uint", 2**31 - 1)
        self.send(
            link.channel, _FLOW, f0=Typed("uint", 0), f1=window, f2=Typed("uint", 0), f3=window,
            f4=Typed("uint", link.handle), f5=Typed("uint", link.delivered), f6=Typed("uint", _CREDIT),
        )  # fmt: skip

    def _accept(self, link: _Link, message: bytes) -> Any:
        path = urllib.parse.urlsplit(link.address).path if "://" in link.address else link.address
        hub_name, *rest = path.strip("/").split("/")
        hub = self.server.hubs[hub_name]
        found = list(sections(message))
        key = next((value.get("x-opt-partition-key") for code, value, _ in found if code == 0x72), None)
        if rest:
            partition_id = rest[1]
        elif key is not None:
            partition_id = str(hashlib.sha256(key.encode()).digest()[0] % len(hub.partitions))
        else:
            partition_id = next(hub.round_robin)
        if partition_id not in hub.partitions:
            return Described(0x25, [Described(0x1D, [symbol("amqp:not-found"), "no such partition", None])])
        messages = [value for code, value, _ in found if code == 0x75] if link.format == _BATCH_FORMAT else [message]
        for one in messages:
            hub.append(partition_id, one)
        self.server.pump(hub_name, partition_id)
        return Described(0x24, [])

    def _put_token(self, message: bytes) -> None:
        found = {code: value for code, value, _ in sections(message)}
        asked, valid = found[0x74], self.server.token_is_valid(found[0x77])
        if valid:
            self.authorised.add(urllib.parse.urlsplit(asked["name"]).path.strip("/").split("/")[0])
        answer = {"status-code": Typed("int", 202 if valid else 401), "status-description": "Accepted" if valid else "InvalidSignature"}
        self._answer("$cbs", found[0x73][0], answer, None)

    def _management(self, message: bytes) -> None:
        found = {code: value for code, value, _ in sections(message)}
        asked = found[0x74]
        hub = self.server.hubs.get(asked["name"])
        partition = hub and hub.partitions.get(asked.get("partition", ""))
        value: dict[str, Any] | None = None
        if hub and asked["type"] == "com.microsoft:eventhub":
            value = {"created_at": Typed("timestamp", _millis(hub.created_at)), "partition_ids": Typed("array", list(hub.partitions))}
        elif partition:
            last = partition.last
            value = {
                "partition": asked["partition"],
                "begin_sequence_number": partition.events[0].number if partition.events else 0 if not last else partition.next_number,
                "last_enqueued_sequence_number": last.number if last else -1,
                "last_enqueued_offset": last.offset if last else "-1",
                "last_enqueued_time_utc": Typed("timestamp", _millis(last.enqueued_at) if last else 0),
                "is_partition_empty": not partition.events,
            }
        status = {"status-code": Typed("int", 200 if value else 404), "status-description": "OK" if value else "not found"}
        self._answer("$management", found[0x73][0], status, value and {"name": asked["name"], **value})

    def _answer(self, address: str, message_id: Any, status: dict[str, Any], value: Any) -> None:
        properties = [None, None, None, None, None, message_id]
        message = encode(Described(0x73, properties)) + encode(Described(0x74, status)) + encode(Described(0x77, value))
        link = next(link for link in self.links.values() if link.gives and link.address.endswith(address))
        self.transfer(link, message)


def _mechanisms() -> bytes:
    names = b"".join(struct.pack(">I", len(name)) + name for name in (b"ANONYMOUS", b"EXTERNAL", b"MSSBCBS"))
    array = b"\xf0" + struct.pack(">IIB", len(names) + 5, 3, 0xB3) + names
    return b"\x00\x53\x40\xd0" + struct.pack(">II", len(array) + 4, 1) + array


def _terminus(terminus: Any) -> Any:
    return terminus and Described(terminus.code, [terminus.value[0]])


def _selector(filters: dict[Any, Any] | None) -> Callable[[Event], bool]:
    """What `amqp.annotation.x-opt-sequence-number > '5'` and its like let through."""
    if not filters:
        return lambda event: True
    text = str(next(iter(filters.values())).value).removeprefix("amqp.annotation.")
    field, comparison, quoted = text.split(" ", 2)
    wanted = int(quoted.strip("'"))
    value = {
        "x-opt-sequence-number": lambda event: event.number,
        "x-opt-offset": lambda event: int(event.offset),
        "x-opt-enqueued-time": lambda event: _millis(event.enqueued_at),
    }[field]
    return (lambda event: value(event) >= wanted) if comparison == ">=" else (lambda event: value(event) > wanted)


def _millis(at: dt.datetime) -> int:
    return (at.replace(tzinfo=dt.UTC) - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Event Hubs namespace for local development.")
    parser.add_argument("--port", type=int, default=5672)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--hub", default="aoai-usage")
    arguments = parser.parse_args()
    with Server({arguments.hub: Hub(arguments.partitions)}, arguments.port) as server:
        variables = {"NAMESPACE": "local", "NAME": arguments.hub, "CONNECTION_STRING": f"'{server.connection_string}'"}
        print("\n".join(f"export AOAI_EVENT_HUB_{name}={value}" for name, value in variables.items()), flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
