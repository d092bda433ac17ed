"""Avro object containers as Event Hubs Capture writes them, read whole or not at all, and written.

fastavro decides what a file is and reads every kind of it. The one kind that Capture writes by default (this schema, codec null) is walked
here as columns, which takes a quarter of the time because no dict is made per record; whatever the walk does not expect, fastavro reads.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import fastavro

SCHEMA = fastavro.parse_schema(
    {
        "type": "record",
        "name": "EventData",
        "namespace": "Microsoft.ServiceBus.Messaging",
        "fields": [
            {"name": "SequenceNumber", "type": "long"},
            {"name": "Offset", "type": "string"},
            {"name": "EnqueuedTimeUtc", "type": "string"},
            {"name": "SystemProperties", "type": {"type": "map", "values": ["long", "double", "string", "bytes"]}},
            {"name": "Properties", "type": {"type": "map", "values": ["long", "double", "string", "bytes", "null"]}},
            {"name": "Body", "type": ["null", "bytes"]},
        ],
    }
)
_REQUIRED = {"SequenceNumber", "Offset", "EnqueuedTimeUtc", "Body"}
_LAYOUT = ["long", "string", "string", "map", "map", ["null", "bytes"]]
_NAMES = ["SequenceNumber", "Offset", "EnqueuedTimeUtc", "SystemProperties", "Properties", "Body"]
_MAX_VARINT_SHIFT = 63


class Unreadable(Exception):
    """The file cannot be read whole; the message says why, for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """A file's records as columns.

    Bodies are slices of `content`: record i's is `content[start[i] : start[i] + size[i]]`, and a null body has size -1.
    """

    content: bytes
    sequence_number: list[int]
    offset: list[str]
    enqueued_at: list[str]
    start: list[int]
    size: list[int]

    def __len__(self) -> int:
        return len(self.sequence_number)

    def bodies(self) -> list[bytes | None]:
        """The bodies, one bytes object each."""
        return [None if n < 0 else self.content[at : at + n] for at, n in zip(self.start, self.size, strict=True)]


def read(content: bytes) -> Records:
    """All records of a capture file. Raises `Unreadable` when any part of it cannot be read."""
    if not content:
        raise Unreadable("zero bytes: Capture has not written it yet, or it was cut off")
    if not content.startswith(b"Obj\x01"):
        raise Unreadable("not an Avro file: it does not start with the Avro marker")
    rows: list[dict[str, Any]] = []
    try:
        file = io.BytesIO(content)
        reader = fastavro.reader(file)
        fields: list[dict[str, Any]] = reader.writer_schema["fields"]  # type: ignore[index,call-overload,assignment]
        if missing := sorted(_REQUIRED - {field["name"] for field in fields}):
            raise Unreadable(f"not an Event Hubs Capture file: its schema lacks {', '.join(missing)}")
        if reader.codec == "null" and (maps := _map_types(fields)):
            try:
                return _walk(content, file.tell(), maps)
            except (_Unusual, IndexError, UnicodeDecodeError):
                pass  # fastavro reads it, or says what is wrong with it
        rows.extend(reader)  # type: ignore[arg-type]
        bodies = [row["Body"] for row in rows]
        size = [-1 if body is None else len(body) for body in bodies]
        return Records(
            b"".join(body or b"" for body in bodies),
            [row["SequenceNumber"] for row in rows],
            [str(row["Offset"]) for row in rows],
            [row["EnqueuedTimeUtc"] for row in rows],
            list(itertools.accumulate((max(n, 0) for n in size[:-1]), initial=0))[: len(size)],
            size,
        )
    except Unreadable:
        raise
    except EOFError as error:
        raise Unreadable(f"torn: it ends after {len(rows)} records in the middle of a block; {len(content)} bytes") from error
    # a damaged file can make the decoder fail in any way; whichever it is, the file contributes nothing
    except Exception as error:
        raise Unreadable(f"damaged after {len(rows)} records: {type(error).__name__}: {error}") from error


def write(records: Iterable[Mapping[str, Any]], *, codec: str = "null", sync_marker: bytes | None = None) -> bytes:
    """A capture file of one block, as Capture writes it; an empty one has one block of no records."""
    file = io.BytesIO()
    writer = fastavro.write.Writer(file, SCHEMA, codec=codec, sync_interval=2**62, sync_marker=sync_marker)
    for record in records:
        writer.write(record)
    writer.dump()
    return file.getvalue()


class _Unusual(Exception):
    """Something the walk leaves to fastavro."""


def _map_types(fields: list[dict[str, Any]]) -> tuple[list[str], list[str]] | None:
    """The value types of the two maps when the schema is Capture's, else None."""
    if [field["name"] for field in fields] != _NAMES:
        return None
    layout = [field["type"]["type"] if isinstance(field["type"], dict) else field["type"] for field in fields]
    if layout != _LAYOUT:
        return None
    values = fields[3]["type"]["values"], fields[4]["type"]["values"]
    return values if all(isinstance(v, list) and set(v) <= {"long", "double", "string", "bytes", "null"} for v in values) else None


def _walk(content: bytes, position: int, maps: tuple[list[str], list[str]]) -> Records:
    sync, size = content[position - 16 : position], len(content)
    records = Records(content, [], [], [], [], [])
    while position < size:
        count, position = _long(content, position)
        length, position = _long(content, position)
        end = position + length
        if count < 0 or length < 0 or content[end : end + 16] != sync:
            raise _Unusual
        if _walk_block(content, position, count, maps, records) != end:
            raise _Unusual
        position = end + 16
    return records


def _walk_block(content: bytes, position: int, count: int, maps: tuple[list[str], list[str]], records: Records) -> int:
    """Append a block's records and return the position behind it. Everything is read in line: calls would double the time.

    A varint's sign bit must be 0 wherever a length or a branch is expected, so an odd first byte is left to fastavro.
    """
    sequence_numbers, starts, sizes = records.sequence_number, records.start, records.size
    for _ in range(count):
        byte = content[position]
        position += 1
        value, shift = byte & 127, 7
        while byte > 127:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
        if shift > 70:
            raise _Unusual
        sequence_numbers.append((value >> 1) ^ -(value & 1))
        for texts in (records.offset, records.enqueued_at):
            byte = content[position]
            if byte & 129:
                raise _Unusual
            end = position + 1 + (byte >> 1)
            texts.append(content[position + 1 : end].decode())
            position = end
        for types in maps:
            entries = content[position]
            position += 1
            while entries:
                if entries & 129:
                    raise _Unusual
                for _ in range(entries >> 1):
                    byte = content[position]
                    position += 1 + (byte >> 1)
                    branch = content[position]
                    position += 1
                    if byte & 129 or branch & 129:
                        raise _Unusual
                    kind = types[branch >> 1]
                    if kind == "double":
                        position += 8
                    elif kind != "null":
                        byte = content[position]
                        position += 1
                        value, shift = byte & 127, 7
                        while byte > 127:
                            byte = content[position]
                            position += 1
                            value |= (byte & 127) << shift
                            shift += 7
                        if kind != "long":
                            if value & 1:
                                raise _Unusual
                            position += value >> 1
                entries = content[position]
                position += 1
        branch = content[position]
        position += 1
        if branch == 0:
            starts.append(0)
            sizes.append(-1)
            continue
        byte = content[position]
        position += 1
        value, shift = byte & 127, 7
        while byte > 127:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
        if branch != 2 or value & 1:
            raise _Unusual
        starts.append(position)
        sizes.append(value >> 1)
        position += value >> 1
    return position


def _long(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return (value >> 1) ^ -(value & 1), position
        shift += 7
        if shift > _MAX_VARINT_SHIFT:
            raise _Unusual
