"""The records of many capture files as one stream of Arrow batches, in the order of the files, that copies no text."""

import codecs
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import CaptureFile
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore

TRUNCATED_BYTES = 190_000
"""API Management cuts an event at 200 KB; a body that is not JSON and at least this long was cut."""

MAX_BODY_BYTES = 4 * 2**20
"""A larger body is not looked into: a gateway sends 200 KB at the most, and Event Hubs takes 1 MB on every tier but dedicated clusters."""

_FETCHES = 4
_FETCH_FILES, _FETCH_BYTES, _AHEAD_BYTES = 32, 4 * 2**20, 64 * 2**20
_FILES_TOLD, _SECONDS_TOLD = 1000, 30
_GAPS_TOLD = 20
_HEAD_BYTES = 400
_SAMPLED_FIRST, _SAMPLED_EVERY = 10, 100
_BATCH_ROWS = 5_000
_BATCH_BYTES = 8 * 2**20
SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "partition": pa.dictionary(pa.int32(), pa.string()),
        "window_start": pa.timestamp("us"),
        "sequence_number": pa.int64(),
        "offset": pa.string_view(),
        "enqueued_text": pa.string_view(),
        "body": pa.string_view(),
        "head": pa.string_view(),
        "valid": pa.bool_(),
        "bytes": pa.int64(),
        "record_index": pa.int32(),
        "body_hash": pa.string(),
        "sampled": pa.bool_(),
    }
)
"""The stream's columns; `file` is the place of the record's file in the list of files, `head` the body's first bytes. `record_index` is the
place of a body that was one of several in its record, `body_hash` the SHA-256 of a body that is not text or too large, and
`sampled` marks the first bodies of a file and some of the others."""


class Opener(Protocol):
    """Finds the several bodies that one record may hold."""

    def opens(self, beginning: bytes) -> bool:
        """Whether a body that begins with these four bytes is worth looking at."""
        ...

    def open_body(self, body: bytes) -> list[bytes] | None:
        """The bodies inside a body, at least one; None when it is a body itself."""
        ...


@dataclasses.dataclass
class FileRead:
    """One capture file and what reading it gave; `number` is its place in the list of files.

    `events` counts the bodies in its records. `gaps` are the first runs of sequence numbers that are missing inside the file, both ends
    included. `reason` says why it is unreadable.
    """

    file: CaptureFile
    number: int
    etag: str = ""
    size: int = 0
    content: str = ""
    records: int = 0
    events: int = 0
    first: int | None = None
    last: int | None = None
    reason: str | None = None
    gaps: tuple[tuple[int, int], ...] = ()


def batches(store: ObjectStore, reads: list[FileRead], opener: Opener, progress: Callable[[int, int, str], None]) -> Iterator[pa.RecordBatch]:
    """The bodies of the records of all files, which fills in `reads`; small files share a batch, and a large one is cut into several."""
    group: list[tuple[FileRead, avro.Records]] = []
    rows, told = 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_FETCHES) as pool:
        for fetched in _fetch_ahead(pool, store, reads):
            number, read = fetched[0][0].number, fetched[0][0]
            if number // _FILES_TOLD != (number - len(fetched)) // _FILES_TOLD or time.monotonic() - told > _SECONDS_TOLD:
                progress(number, len(reads), f"read {read.file.object.name}")
                told = time.monotonic()
            there = [(read, content) for read, content in fetched if content is not None]
            for (read, _), records in zip(there, avro.read_many([content for _, content in there]), strict=True):
                if isinstance(records, avro.Unreadable):
                    read.reason = str(records)
                elif len(records):
                    group.append((read, records))
                    rows += len(records)
            if rows >= _BATCH_ROWS or sum(map(len, _contents(group))) >= _BATCH_BYTES:
                yield from _batch(group, opener)
                group, rows = [], 0
    if group:
        yield from _batch(group, opener)
    progress(len(reads), len(reads), "read every capture file")


def _fetch(store: ObjectStore, read: FileRead) -> bytes | None:
    try:
        content, read.etag = store.read(read.file.object.name)
    except (NotFound, Changed) as error:
        read.reason, read.etag = f"gone or being written while it was read: {error}", read.file.object.etag
        return None
    read.size, read.content = len(content), hashlib.sha256(content).hexdigest()
    return content


def _contents(group: list[tuple[FileRead, avro.Records]]) -> list[bytes]:
    """The contents that the records of a group are slices of, each once and in order."""
    return list({id(records.content): records.content for _, records in group}.values())


def _fetch_ahead(pool: concurrent.futures.Executor, store: ObjectStore, reads: Iterable[FileRead]) -> Iterator[list[tuple[FileRead, bytes | None]]]:
    """The files in small groups, each with its content, the next few groups being fetched while one is decoded."""

    def fetch_all(group: list[FileRead]) -> list[tuple[FileRead, bytes | None]]:
        return [(read, _fetch(store, read)) for read in group]

    waiting: collections.deque[tuple[int, concurrent.futures.Future[list[tuple[FileRead, bytes | None]]]]] = collections.deque()
    for group in _groups(reads):
        size = sum(read.file.object.size for read in group)
        while waiting and (len(waiting) > _FETCHES or size + sum(ahead for ahead, _ in waiting) > _AHEAD_BYTES):
            yield waiting.popleft()[1].result()
        waiting.append((size, pool.submit(fetch_all, group)))
    while waiting:
        yield waiting.popleft()[1].result()


def _groups(reads: Iterable[FileRead]) -> Iterator[list[FileRead]]:
    group: list[FileRead] = []
    for read in reads:
        group.append(read)
        if len(group) == _FETCH_FILES or sum(r.file.object.size for r in group) >= _FETCH_BYTES:
            yield group
            group = []
    if group:
        yield group


def _batch(group: list[tuple[FileRead, avro.Records]], opener: Opener) -> Iterator[pa.RecordBatch]:
    counts = [len(records) for _, records in group]
    fields = np.concatenate([records.fields for _, records in group])
    at = 0
    for (read, _), count in zip(group, counts, strict=True):
        numbers = fields[at : at + count, 0]
        read.records, read.first, read.last = count, int(numbers.min()), int(numbers.max())
        if (np.diff(numbers) != 1).any():
            ordered = np.unique(numbers)
            breaks = np.flatnonzero(np.diff(ordered) > 1)[:_GAPS_TOLD]
            read.gaps = tuple((int(ordered[i]) + 1, int(ordered[i + 1]) - 1) for i in breaks)
        at += count
    contents = _contents(group)
    content = contents[0]
    if len(contents) > 1:
        content = b"".join(contents)
        starts = dict(zip(map(id, contents), itertools.accumulate(map(len, contents[:-1]), initial=0), strict=True))
        moved = np.array([starts[id(records.content)] for _, records in group], np.int64)
        fields[:, [avro.OFFSET, avro.ENQUEUED, avro.BODY]] += np.repeat(moved, counts)[:, None]
    which = np.repeat(np.arange(len(group), dtype=np.int32), counts)
    content, fields, which, index = _open(content, fields, which, opener)
    for (read, _), events in zip(group, np.bincount(which, minlength=len(group)).tolist(), strict=True):
        read.events = events
    partitions = [f"{read.file.namespace}/{read.file.event_hub}/{read.file.partition_id}" for read, _ in group]
    numbers = np.array([read.number for read, _ in group], np.int32)
    windows = np.array([read.file.window_start for read, _ in group], "datetime64[us]")
    sampled = _sampled(which)
    for rows in _slices(fields[:, avro.BODY + 1]):
        part = fields[rows]
        text, valid, hashes = _bodies(content, part)
        columns = [
            pa.array(numbers[which[rows]]),
            pa.DictionaryArray.from_arrays(pa.array(which[rows]), pa.array(partitions)),
            pa.array(windows[which[rows]]),
            pa.array(part[:, 0].copy()),
            _views(content, part, avro.OFFSET),
            _views(content, part, avro.ENQUEUED),
            text,
            _heads(text),
            valid,
            pa.array(np.maximum(part[:, avro.BODY + 1], 0)),
            index[rows.start : rows.stop],
            hashes,
            sampled[rows.start : rows.stop],
        ]
        yield pa.record_batch(columns, schema=SCHEMA)


def _slices(sizes: np.ndarray) -> Iterator[slice]:
    """The rows cut into pieces of some thousand rows and some megabytes at the most: the engine copies what it works on more than once."""
    ends = np.cumsum(np.maximum(sizes, 0))
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        end = min(start + 3 * _BATCH_ROWS, max(start + 1, int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))))
        yield slice(start, end)
        start = end


def _open(content: bytes, fields: np.ndarray, which: np.ndarray, opener: Opener) -> tuple[bytes, np.ndarray, np.ndarray, pa.Array]:
    """Put the bodies inside a body in its place. Returns content, fields, files and `record_index`."""
    start, size = fields[:, avro.BODY], fields[:, avro.BODY + 1]
    data = np.frombuffer(content, np.uint8)
    long = np.flatnonzero(size >= 4)
    beginnings, kinds = np.unique(np.ascontiguousarray(data[start[long, None] + np.arange(4)]).view(np.uint32)[:, 0], return_inverse=True)
    worth = np.array([opener.opens(beginning.tobytes()) for beginning in beginnings], bool)
    opened = {}
    for row in long[worth[kinds]].tolist() if len(long) else []:
        if bodies := opener.open_body(content[start[row] : start[row] + size[row]]):
            opened[row] = bodies
    if not opened:
        return content, fields, which, pa.nulls(len(fields), pa.int32())
    inside = [body for bodies in opened.values() for body in bodies]
    times = np.ones(len(fields), np.int64)
    times[list(opened)] = [len(bodies) for bodies in opened.values()]
    rows = np.repeat(np.arange(len(fields)), times)
    fields, new = fields[rows], np.isin(rows, list(opened))
    sizes = np.array([len(body) for body in inside], np.int64)
    fields[new, avro.BODY] = len(content) + np.cumsum(sizes) - sizes
    fields[new, avro.BODY + 1] = sizes
    index = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
    return content + b"".join(inside), fields, which[rows], pa.array(index.astype(np.int32), mask=~new)


def _sampled(which: np.ndarray) -> pa.Array:
    starts = np.concatenate([[0], np.flatnonzero(np.diff(which)) + 1])
    place = np.arange(len(which)) - np.repeat(starts, np.diff([*starts, len(which)]))
    return pa.array((place < _SAMPLED_FIRST) | (place % _SAMPLED_EVERY == 0))


def _bodies(content: bytes, fields: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The bodies as text, whether each one is UTF-8, and the hashes of those that are not."""
    start, size = fields[:, avro.BODY], fields[:, avro.BODY + 1]
    if size.max() < TRUNCATED_BYTES:
        text = _views(content, fields, avro.BODY)
        try:
            text.validate(full=True)
            return text, pa.repeat(pa.scalar(True), len(fields)), pa.nulls(len(fields), pa.string())
        except pa.ArrowInvalid:
            pass
    bodies = [content[at : at + n] if n >= 0 else None for at, n in zip(start.tolist(), size.tolist(), strict=True)]
    decoded = [None if body is None or len(body) > MAX_BODY_BYTES else _text(body) for body in bodies]
    broken = [body is not None and text is None for body, text in zip(bodies, decoded, strict=True)]
    hashes = [hashlib.sha256(body).hexdigest() if bad and body is not None else None for body, bad in zip(bodies, broken, strict=True)]
    return pa.array(decoded, pa.string_view()), pa.array([not bad for bad in broken]), pa.array(hashes, pa.string())


def _heads(text: pa.Array) -> pa.Array:
    """The first bytes of each text, as views into the same bytes."""
    present, views, *data = text.buffers()
    shorter = np.frombuffer(views, np.int32).reshape(-1, 4).copy()
    shorter[:, 0] = np.minimum(shorter[:, 0], _HEAD_BYTES)
    return pa.Array.from_buffers(pa.string_view(), len(text), [present, pa.py_buffer(shorter.tobytes()), *data])


def _views(content: bytes, fields: np.ndarray, field: int) -> pa.Array:
    """An Arrow string-view array over the file's bytes, which copies no text.

    A view is 16 bytes: the size, then the text itself if it has at most 12 bytes, else its first four bytes, buffer number and position.
    """
    data = np.frombuffer(content, np.uint8)
    start, size = fields[:, field], fields[:, field + 1]
    views = np.zeros((len(size), 16), np.uint8)
    short = size <= 12
    if short.any():
        at = np.minimum(start[short, None] + np.arange(12), len(data) - 1)
        views[short, 4:] = np.where(np.arange(12) < size[short, None], data[at], 0)
    if not short.all():
        views[~short, 4:8] = data[start[~short, None] + np.arange(4)]
    numbers = views.view(np.int32)
    numbers[:, 0] = np.maximum(size, 0)
    numbers[~short, 3] = start[~short]
    present = np.packbits(size >= 0, bitorder="little").tobytes()
    buffers = [pa.py_buffer(present), pa.py_buffer(views.tobytes()), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.string_view(), len(size), buffers)


def _text(body: bytes) -> str | None:
    # a body that the gateway cut off may end inside a character
    whole = len(body) < TRUNCATED_BYTES
    try:
        return codecs.utf_8_decode(body, "strict", whole)[0]
    except UnicodeDecodeError:
        return None
