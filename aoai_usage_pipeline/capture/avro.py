"""Avro object containers as Event Hubs Capture writes them, read whole or not at all, and written.

fastavro decides what a file is and reads every kind of it. The files of a hub look alike, down to the keys of each record's maps, so once
fastavro has read one, the others are read as columns: the constant bytes of the maps are searched for and everything between them is
decoded and checked as arrays, which takes a tenth of the time. Whatever does not fit exactly, fastavro reads.
"""

import dataclasses
import io
import itertools
import json
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fastavro
import numpy as np

_SCHEMA = {
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
_SCHEMA_TEXT = json.dumps(_SCHEMA, separators=(",", ":"))
_PARSED_SCHEMA = fastavro.parse_schema(_SCHEMA)
_REQUIRED = {"SequenceNumber", "Offset", "EnqueuedTimeUtc", "Body"}
_LAYOUT = ["long", "string", "string", "map", "map", ["null", "bytes"]]
_NAMES = ["SequenceNumber", "Offset", "EnqueuedTimeUtc", "SystemProperties", "Properties", "Body"]
_KINDS = {int: "long", float: "double", str: "string", bytes: "bytes", type(None): "null"}
_MAX_VARINT_BYTES = 9

FIELDS, OFFSET, ENQUEUED, BODY = 7, 1, 3, 5


class Unreadable(Exception):
    """The file cannot be read whole; the message says why, for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """A file's records as slices of `content`.

    `fields` has a row of seven numbers for each record: the sequence number, then position and size of the offset, of the enqueued time
    and of the body; a null body has size -1. All text is UTF-8, except that a body may be anything.
    """

    content: bytes
    fields: np.ndarray

    def __len__(self) -> int:
        return len(self.fields)


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """The two maps of a record as bytes: the constant ones they begin with, then values of some kind, each with the constant bytes behind it."""

    lead: bytes
    values: tuple[tuple[str, bytes], ...]


_known: dict[bytes, tuple[str, tuple[_Layout, ...]]] = {}
"""The codec and the latest layouts of the headers that fastavro has read, without the sync marker behind them."""

_MAX_KNOWN = 8


def read(content: bytes) -> Records:
    """All records of a capture file. Raises `Unreadable` when any part of it cannot be read."""
    if not content:
        raise Unreadable("zero bytes: Capture has not written it yet, or it was cut off")
    if not content.startswith(b"Obj\x01"):
        raise Unreadable("not an Avro file: it does not start with the Avro marker")
    for header, (codec, layouts) in list(_known.items()):
        if content.startswith(header) and len(content) >= len(header) + 16:
            for layout in layouts:
                records = _read_alike(content, len(header) + 16, codec, layout)
                if records is not None:
                    _remember(header, codec, layout)
                    return records
    rows: list[dict[str, Any]] = []
    file = io.BytesIO(content)
    try:
        blocks = fastavro.block_reader(file)
        header = content[: file.tell() - 16]
        schema: dict[str, Any] = blocks.writer_schema  # type: ignore[assignment]
        fields = {field["name"]: field["type"] for field in schema["fields"]}
        if missing := sorted(_REQUIRED - fields.keys()):
            raise Unreadable(f"not an Event Hubs Capture file: its schema lacks {', '.join(missing)}")
        first = next((record for block in blocks for record in block), {"SystemProperties": {}, "Properties": {}})
        if blocks.codec in ("null", "deflate") and (layout := _layout(fields, first)):
            alike = _read_alike(content, len(header) + 16, blocks.codec, layout)
            if alike is not None:
                _remember(header, blocks.codec, layout)
                return alike
        file.seek(0)
        for block in fastavro.block_reader(file):
            rows.extend(block)
            if left := len(block.bytes_.read()):
                raise Unreadable(f"damaged: a block announces {block.num_records} records and holds {left} more bytes")
        return _columns(rows)
    except Unreadable:
        raise
    # a damaged file can make the decoder fail in any way; whichever it is, the file contributes nothing
    except Exception as error:
        if isinstance(error, EOFError) or file.tell() >= len(content):
            raise Unreadable(f"torn: it ends after {len(rows)} records in the middle of a block; {len(content)} bytes") from error
        raise Unreadable(f"damaged after {len(rows)} records: {type(error).__name__}: {error}") from error


def read_many(contents: Sequence[bytes]) -> list[Records | Unreadable]:
    """What `read` gives or raises for each of the files. Small files that look alike are read at once and share one `content`."""
    together = _read_together(contents) if len(contents) > 1 else None
    return list(together) if together else [_attempt(content) for content in contents]


def _attempt(content: bytes) -> Records | Unreadable:
    try:
        return read(content)
    except Unreadable as error:
        return error


def _remember(header: bytes, codec: str, layout: _Layout) -> None:
    _, layouts = _known.pop(header, (codec, ()))
    _known[header] = codec, (layout, *(other for other in layouts if other != layout))[:_MAX_KNOWN]
    for oldest in list(_known)[:-_MAX_KNOWN]:
        _known.pop(oldest, None)


def records(content: bytes) -> list[dict[str, Any]]:
    """All records of a capture file with everything in them, as `write` takes them. Raises `Unreadable`."""
    whole = read(content)
    found = list(fastavro.reader(io.BytesIO(content)))
    if len(found) != len(whole):
        raise Unreadable(f"damaged: it has {len(whole)} records, of which {len(found)} can be read")
    return found  # type: ignore[return-value]


def write(records: Iterable[Mapping[str, Any]], *, codec: str = "null", sync_marker: bytes | None = None) -> bytes:
    """A capture file of one block, byte by byte as Capture writes it; an empty one has one block of no records."""
    sync, block, count = sync_marker or secrets.token_bytes(16), io.BytesIO(), 0
    for record in records:
        fastavro.schemaless_writer(block, _PARSED_SCHEMA, record)
        count += 1
    content = block.getvalue()
    if codec == "deflate":
        compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        content = compressor.compress(content) + compressor.flush()
    # fastavro spells the schema with spaces, Capture does not
    metadata = b"".join(_text(part) for part in ("avro.codec", codec, "avro.schema", _SCHEMA_TEXT))
    return b"Obj\x01" + _zigzag(2) + metadata + b"\0" + sync + _zigzag(count) + _zigzag(len(content)) + content + sync


def _columns(rows: list[dict[str, Any]]) -> Records:
    content = bytearray()
    fields: list[tuple[int, ...]] = []
    for row in rows:
        numbers = [row["SequenceNumber"]]
        for value in (str(row["Offset"]).encode(), row["EnqueuedTimeUtc"].encode(), row["Body"]):
            numbers += (len(content), -1 if value is None else len(value))
            content += value or b""
        fields.append(tuple(numbers))
    return Records(bytes(content), np.array(fields, np.int64).reshape(-1, FIELDS))


def _layout(types: dict[str, Any], record: dict[str, Any]) -> _Layout | None:
    """The layout of a record's maps when the schema is Capture's, else None."""
    if list(types) != _NAMES or [type_["type"] if isinstance(type_, dict) else type_ for type_ in types.values()] != _LAYOUT:
        return None
    kinds: list[str] = []
    constants = [b""]
    for name in ("SystemProperties", "Properties"):
        branches = types[name]["values"]
        constants[-1] += _zigzag(len(record[name])) if record[name] else b""
        for key, value in record[name].items():
            kind = _KINDS[type(value)]
            if not isinstance(branches, list) or kind not in branches:
                return None
            constants[-1] += _zigzag(len(key.encode())) + key.encode() + _zigzag(branches.index(kind))
            if kind != "null":
                kinds.append(kind)
                constants.append(b"")
        constants[-1] += b"\0"
    return _Layout(constants[0], tuple(zip(kinds, constants[1:], strict=True)))


def _zigzag(number: int) -> bytes:
    """A length as Avro writes it."""
    number *= 2
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _text(text: str) -> bytes:
    """A text as Avro writes it."""
    return _zigzag(len(text.encode())) + text.encode()


def _read_together(contents: Sequence[bytes]) -> list[Records] | None:
    """The records of several files that all have the header and the layout read last; None where any of them is different."""
    header, (codec, layouts) = next(reversed(_known.items()), (b"", ("", ())))
    if codec != "null" or not all(content.startswith(header) and len(content) >= len(header) + 16 for content in contents):
        return None
    joined, at = b"".join(contents), 0
    blocks: list[tuple[int, int, int]] = []
    counts: list[int] = []
    try:
        for content in contents:
            found = _blocks(content, len(header) + 16)
            blocks += [(count, at + start, at + end) for count, start, end in found]
            counts.append(sum(count for count, *_ in found))
            at += len(content)
        fields = _read_blocks(joined, blocks, layouts[0])
    except (_Unlike, IndexError, UnicodeDecodeError):
        return None
    ends = list(itertools.accumulate(counts))
    return [Records(joined, fields[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def _read_alike(content: bytes, position: int, codec: str, layout: _Layout) -> Records | None:
    """The records of a file whose maps all have the layout; None for any other file, whatever is wrong with it."""
    try:
        blocks = _blocks(content, position)
        if codec == "deflate":
            plain = [zlib.decompress(content[start:end], -zlib.MAX_WBITS) for _, start, end in blocks]
            ends = list(itertools.accumulate(len(block) for block in plain))
            blocks = [(count, end - len(block), end) for (count, *_), block, end in zip(blocks, plain, ends, strict=True)]
            content = b"".join(plain)
        return Records(content, _read_blocks(content, blocks, layout))
    except (_Unlike, IndexError, UnicodeDecodeError, zlib.error):
        return None


class _Unlike(Exception):
    """Something that is not as the layout has it."""


def _blocks(content: bytes, position: int) -> list[tuple[int, int, int]]:
    """How many records each block behind the header announces, and where it starts and ends. Raises `_Unlike`."""
    sync, blocks = content[position - 16 : position], []
    while position < len(content):
        (count, length), position = _two_longs(content, position)
        end = position + length
        if count < 0 or length < 0 or content[end : end + 16] != sync or (count == 0 and length):
            raise _Unlike
        if count:
            blocks.append((count, position, end))
        position = end + 16
    return blocks


def _read_blocks(content: bytes, blocks: Sequence[tuple[int, int, int]], layout: _Layout) -> np.ndarray:
    """The records of all blocks. Each record is found by its map, and is believed because it begins where the one before it ends."""
    if not blocks:
        return np.empty((0, FIELDS), np.int64)
    lead = re.compile(re.escape(layout.lead))
    found = [[match.start() for match in lead.finditer(content, start, end)] for _, start, end in blocks]
    counts, block_starts, block_ends = np.array(blocks, np.int64).T
    if [len(positions) for positions in found] != counts.tolist():
        raise _Unlike
    maps = np.array(list(itertools.chain.from_iterable(found)), np.int64)
    data = np.frombuffer(content, np.uint8)
    at = maps + len(layout.lead)
    for kind, constant in layout.values:
        if kind == "double":
            at = at + 8
        elif kind == "long":
            _, at = _varints(data, at)
        else:
            size, at = _lengths(data, at)
            at = at + size
        at = _skip(data, at, constant)
    branch = data[at]
    if not ((branch == 0) | (branch == 2)).all():
        raise _Unlike
    body_size, body = np.full(len(maps), -1), at + 1
    present = branch == 2
    body_size[present], body[present] = _lengths(data, body[present])
    ends = body + np.maximum(body_size, 0)
    last = np.cumsum(counts) - 1
    if (ends[last] != block_ends).any():
        raise _Unlike
    starts = np.roll(ends, 1)
    starts[last - counts + 1] = block_starts
    numbers, at = _varints(data, starts)
    offset_size, offset = _lengths(data, at)
    enqueued_size, enqueued = _lengths(data, offset + offset_size)
    if (enqueued + enqueued_size != maps).any() or (enqueued_size > 63).any():
        raise _Unlike
    # between the two texts lies one length byte below 128, so both are checked to be UTF-8 at once
    b"\0".join([content[a:z] for a, z in zip(offset.tolist(), maps.tolist(), strict=True)]).decode()
    return np.column_stack([numbers, offset, offset_size, enqueued, enqueued_size, body, body_size])


def _skip(data: np.ndarray, at: np.ndarray, constant: bytes) -> np.ndarray:
    """The positions behind the constant bytes. Raises `_Unlike` where others stand."""
    if (data[at[:, None] + np.arange(len(constant))] != np.frombuffer(constant, np.uint8)).any():
        raise _Unlike
    return at + len(constant)


def _lengths(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes, at = _varints(data, at)
    if (sizes < 0).any():
        raise _Unlike
    return sizes, at


def _varints(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Avro longs at the positions, and the positions behind them."""
    values, at, shift = data[at].astype(np.int64), at + 1, 7
    going = values > 127
    values &= 127
    while going.any():
        if shift == 7 * _MAX_VARINT_BYTES:
            raise _Unlike
        bytes_ = data[at].astype(np.int64)
        values |= np.where(going, bytes_ & 127, 0) << shift
        at += going
        going &= bytes_ > 127
        shift += 7
    return (values >> 1) ^ -(values & 1), at


def _two_longs(content: bytes, position: int) -> tuple[list[int], int]:
    values = []
    for _ in range(2):
        value = shift = 0
        while content[position] > 127:
            value |= (content[position] & 127) << shift
            position, shift = position + 1, shift + 7
        value |= content[position] << shift
        position += 1
        values.append((value >> 1) ^ -(value & 1))
    return values, position
