"""Avro object containers as Event Hubs Capture writes them, read whole or not at all, and written.

fastavro decides what a file is and reads every kind of it. The kind that Capture writes (this schema, codec null or deflate) is walked
here as columns, which takes a quarter of the time because no dict is made per record; whatever the walk does not expect, fastavro reads.
Unlike fastavro, the walk notices a block that holds more than the records it announces.
"""

import array
import contextlib
import dataclasses
import io
import itertools
import zlib
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


FIELDS, OFFSET, ENQUEUED, BODY = 7, 1, 3, 5


_known_headers: dict[bytes, tuple[str, tuple[list[str], list[str]]]] = {}
"""Headers that fastavro has read, without the sync marker behind them: the files of a hub all have the same."""

_MAX_KNOWN_HEADERS = 8


class Unreadable(Exception):
    """The file cannot be read whole; the message says why, for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """A file's records as slices of `content`.

    `fields` has seven numbers a record: the sequence number, then position and size of the offset, of the enqueued time and of the body; a
    null body has size -1. All text is UTF-8, except that a body may be anything.
    """

    content: bytes
    fields: "array.array[int]"

    def __len__(self) -> int:
        return len(self.fields) // FIELDS

    def texts(self, field: int) -> list[bytes | None]:
        """One field of all records as bytes objects: `OFFSET`, `ENQUEUED` or `BODY`."""
        starts, sizes = self.fields[field::FIELDS], self.fields[field + 1 :: FIELDS]
        return [None if size < 0 else self.content[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def read(content: bytes) -> Records:
    """All records of a capture file. Raises `Unreadable` when any part of it cannot be read."""
    if not content:
        raise Unreadable("zero bytes: Capture has not written it yet, or it was cut off")
    if not content.startswith(b"Obj\x01"):
        raise Unreadable("not an Avro file: it does not start with the Avro marker")
    rows: list[dict[str, Any]] = []
    try:
        for header, (codec, maps) in _known_headers.items():
            if content.startswith(header) and len(content) >= len(header) + 16:
                with contextlib.suppress(_Unusual, IndexError, UnicodeDecodeError, OverflowError, zlib.error):
                    return _walk(content, len(header) + 16, maps, deflated=codec == "deflate")
        file = io.BytesIO(content)
        reader = fastavro.reader(file)
        fields: list[dict[str, Any]] = reader.writer_schema["fields"]  # type: ignore[index,call-overload,assignment]
        if missing := sorted(_REQUIRED - {field["name"] for field in fields}):
            raise Unreadable(f"not an Event Hubs Capture file: its schema lacks {', '.join(missing)}")
        if reader.codec in ("null", "deflate") and (maps := _map_types(fields)):
            try:
                records = _walk(content, file.tell(), maps, deflated=reader.codec == "deflate")
                if len(_known_headers) < _MAX_KNOWN_HEADERS:
                    _known_headers[content[: file.tell() - 16]] = (reader.codec, maps)
                return records
            except (_Unusual, IndexError, UnicodeDecodeError, OverflowError, zlib.error):
                pass  # fastavro reads it, or says what is wrong with it
        rows.extend(reader)  # type: ignore[arg-type]
        return _columns(rows)
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


def _columns(rows: list[dict[str, Any]]) -> Records:
    content = bytearray()
    fields = array.array("q")
    for row in rows:
        fields.append(row["SequenceNumber"])
        for value in (str(row["Offset"]).encode(), row["EnqueuedTimeUtc"].encode(), row["Body"]):
            fields.extend((len(content), -1 if value is None else len(value)))
            content += value or b""
    return Records(bytes(content), fields)


def _walk(content: bytes, position: int, maps: tuple[list[str], list[str]], *, deflated: bool) -> Records:
    sync, blocks = content[position - 16 : position], []
    while position < len(content):
        count, position = _long(content, position)
        length, position = _long(content, position)
        end = position + length
        if count < 0 or length < 0 or content[end : end + 16] != sync:
            raise _Unusual
        blocks.append((count, position, end))
        position = end + 16
    if deflated:
        plain = [zlib.decompress(content[start:end], -zlib.MAX_WBITS) for _, start, end in blocks]
        ends = list(itertools.accumulate(len(block) for block in plain))
        blocks = [(count, end - len(block), end) for (count, *_), block, end in zip(blocks, plain, ends, strict=True)]
        content = b"".join(plain)
    records = Records(content, array.array("q"))
    for count, start, end in blocks:
        if _walk_block(content, start, count, maps, records) != end:
            raise Unreadable(f"damaged: a block announces {count} records in {end - start} bytes, which is not what it holds")
    # the enqueued time follows the offset, with one length byte below 128 between them, so both are checked to be UTF-8 at once
    starts, ends, sizes = records.fields[OFFSET::FIELDS], records.fields[ENQUEUED::FIELDS], records.fields[ENQUEUED + 1 :: FIELDS]
    b"\0".join([content[start : end + size] for start, end, size in zip(starts, ends, sizes, strict=True)]).decode()
    return records


def _walk_block(content: bytes, position: int, count: int, maps: tuple[list[str], list[str]], records: Records) -> int:
    """Add a block's records and return the position behind it. Everything is read in line: calls would double the time.

    A varint's sign bit must be 0 wherever a length or a branch is expected, so an odd first byte is left to fastavro.
    """
    extend = records.fields.extend
    system_types, types_of_properties = maps
    for _ in range(count):
        byte = content[position]
        position += 1
        value, shift = byte & 127, 7
        while byte > 127:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
        sequence_number = (value >> 1) ^ -(value & 1)
        size = content[position]
        if size & 129:
            raise _Unusual
        offset_size = size >> 1
        offset = position + 1
        position = offset + offset_size
        size = content[position]
        if size & 129:
            raise _Unusual
        enqueued_size = size >> 1
        enqueued = position + 1
        position = enqueued + enqueued_size
        for types in (system_types, types_of_properties):
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
                    elif kind == "long":
                        while content[position] > 127:
                            position += 1
                        position += 1
                    elif kind != "null":
                        value, position = _long(content, position)
                        if value < 0:
                            raise _Unusual
                        position += value
                entries = content[position]
                position += 1
        branch = content[position]
        position += 1
        if branch == 0:
            extend((sequence_number, offset, offset_size, enqueued, enqueued_size, 0, -1))
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
        size = value >> 1
        extend((sequence_number, offset, offset_size, enqueued, enqueued_size, position, size))
        position += size
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
