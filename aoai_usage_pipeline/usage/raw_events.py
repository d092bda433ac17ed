"""Raw events: capture files decoded, recognised by their contract, and kept as immutable segments, one capture date at a time."""

import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import hashlib
import itertools
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import CaptureFile, NameFormat
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest, Manifests, Segment, folder
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore
from aoai_usage_pipeline.usage.normalize import MACROS, TRUNCATED_BYTES, raw_events_select

_CHUNK_BYTES = 160 * 2**20
_FETCHES = 4
_FILES_TOLD = 1000
_GAPS_TOLD = 20
_HEAD_BYTES = 400
_BATCH_ROWS = 8_192
_BATCH_BYTES = 8 * 2**20
_SCHEMA = pa.schema(
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
    }
)


class Unbalanced(Exception):
    """Records came out of the reader in another number than they went in; nothing of that date was replaced."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ingested:
    """What ingesting one capture date did."""

    manifest: Manifest
    files_read: int


@dataclasses.dataclass
class _Read:
    """One capture file on its way into a segment."""

    file: CaptureFile
    number: int
    etag: str = ""
    size: int = 0
    content: str = ""
    records: int = 0
    first: int | None = None
    last: int | None = None
    reason: str | None = None
    counts: tuple[int, int] = (0, 0)
    gaps: tuple[tuple[int, int], ...] = ()

    def entry(self) -> FileEntry:
        status = "unreadable" if self.reason else "read" if self.records else "empty"
        return FileEntry(
            self.file.object.name, self.etag, self.size, self.records, self.first, self.last, *self.counts, status, self.reason,
            self.file.window_start.hour, f"{self.file.namespace}/{self.file.event_hub}", self.file.partition_id, self.content, self.gaps,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """One capture date that needs reading: the manifest it replaces, and the hours that differ from it with their files."""

    date: dt.date
    before: Manifest
    etag: str | None
    hours: dict[int, list[CaptureFile]]


class Ingest:
    """Brings capture dates of the lake up to the capture files of a store."""

    def __init__(self, capture: ObjectStore, lake: ObjectStore, manifests: Manifests, names: NameFormat, start_date: dt.date) -> None:
        self._capture, self._lake, self._manifests, self._names, self._start_date = capture, lake, manifests, names, start_date
        self._progress: Callable[[int, int, str], None] = lambda done, total, what: None
        self.reader = engine.digest(engine.code_digest("capture", "usage"), start_date)

    def changed(self, files: Iterable[CaptureFile], manifest: Manifest) -> dict[int, list[CaptureFile]]:
        """The hours of a capture date whose set of (blob, ETag) differs from the manifest's, with the files they have now.

        A file that was removed from the store since (a lifecycle rule) is not a change: what was read from it stays.
        """
        known = {entry.blob: entry for entry in manifest.files}
        hours: dict[int, list[CaptureFile]] = {}
        for file in files:
            hours.setdefault(file.window_start.hour, []).append(file)
        return {
            hour: listed
            for hour, listed in hours.items()
            if manifest.reader != self.reader or any(f.object.name not in known or known[f.object.name].etag != f.object.etag for f in listed)
        }

    def run(self, dates: Sequence[dt.date], progress: Callable[[int, int, str], None]) -> Iterator[tuple[dt.date, Ingested | Unbalanced]]:
        """Ingest the dates, several small ones in one pass; gives each date's result as soon as it is in the lake."""
        if not dates:
            return
        self._progress = progress
        listed = self._list(dates)
        overtaken: list[dt.date] = []
        waiting: concurrent.futures.Future[list[tuple[dt.date, Ingested | Unbalanced | None]]] | None = None
        done = 0
        # while one chunk is written, the next one is decoded
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for chunk in self._chunks(dates, listed):
                unchanged = [work for work in chunk if not work.hours]
                changed = [work for work in chunk if work.hours]
                yield from ((work.date, Ingested(work.before, 0)) for work in unchanged)
                if changed:
                    decoded = self._decode(changed)
                    if waiting:
                        yield from self._split(waiting.result(), overtaken)
                    waiting = pool.submit(self._write, changed, *decoded)
                done += len(chunk)
                progress(done, len(dates), f"decoded up to {chunk[-1].date}")
            if waiting:
                yield from self._split(waiting.result(), overtaken)
        if overtaken:
            # another run replaced these manifests since we listed: look again, and read what still differs
            yield from self.run(overtaken, progress)

    def _chunks(self, dates: Sequence[dt.date], listed: dict[dt.date, list[CaptureFile]]) -> "Iterator[list[_Work]]":
        chunk: list[_Work] = []
        size = 0
        for date in sorted(dates):
            chunk.append(self._work(date, listed[date]))
            size += sum(file.object.size for files in chunk[-1].hours.values() for file in files)
            if size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    @staticmethod
    def _split(
        results: list[tuple[dt.date, Ingested | Unbalanced | None]], overtaken: list[dt.date]
    ) -> Iterator[tuple[dt.date, Ingested | Unbalanced]]:
        for date, result in results:
            if result is None:
                overtaken.append(date)
            else:
                yield date, result

    def _list(self, dates: Sequence[dt.date]) -> dict[dt.date, list[CaptureFile]]:
        listed: dict[dt.date, list[CaptureFile]] = {date: [] for date in dates}
        for file in self._names.files(self._capture, min(dates), max(dates)):
            if file.capture_date in listed:
                listed[file.capture_date].append(file)
        return listed

    def _work(self, date: dt.date, listed: list[CaptureFile]) -> "_Work":
        manifest, etag = self._manifests.get(date)
        return _Work(date, manifest, etag, self.changed(listed, manifest))

    def _decode(self, chunk: "list[_Work]") -> tuple[duckdb.DuckDBPyConnection, list[_Read]]:
        """Stream every file into the table `events`, decoding in one thread while the engine parses in the others."""
        files_of = (file for work in chunk for hour in sorted(work.hours) for file in sorted(work.hours[hour], key=lambda f: f.object.name))
        reads = [_Read(file, number) for number, file in enumerate(files_of)]
        segments = _segment_numbers(chunk)
        db = engine.open_connection(self._lake.staging())
        db.execute(MACROS)
        files = pa.table(  # noqa: F841 - read by name below
            {
                "file": pa.array([r.number for r in reads], pa.int32()),
                "blob": [r.file.object.name for r in reads],
                "namespace": [r.file.namespace for r in reads],
                "event_hub": [r.file.event_hub for r in reads],
                "partition_id": [r.file.partition_id for r in reads],
                "segment": [segments[r.file.capture_date, r.file.window_start.hour] for r in reads],
            }
        )
        db.execute("CREATE TABLE files AS SELECT * FROM files")
        db.register("records", pa.RecordBatchReader.from_batches(_SCHEMA, self._batches(reads)))
        today = dt.datetime.now(dt.UTC).date()
        db.execute(f"CREATE TABLE events AS {raw_events_select('records', start_date=self._start_date, today=today)}")
        counted = "SELECT file, count(*) FILTER (reason IS NULL), count(*) FILTER (reason IS NOT NULL) FROM events GROUP BY ALL"
        for number, parsed, quarantined in db.execute(counted).fetchall():
            reads[number].counts = (parsed, quarantined)
        return db, reads

    def _write(self, chunk: "list[_Work]", db: duckdb.DuckDBPyConnection, reads: list[_Read]) -> list[tuple[dt.date, Ingested | Unbalanced | None]]:
        """Write a decoded chunk's segments and replace the manifests; None for a date that another run was faster with."""
        results: list[tuple[dt.date, Ingested | Unbalanced | None]] = []
        with db:
            segments = self._write_segments(db, chunk, reads)
            for work in chunk:
                try:
                    results.append((work.date, self._commit(db, work, [r for r in reads if r.file.capture_date == work.date], segments)))
                except Changed:
                    results.append((work.date, None))
        return results

    def _batches(self, reads: list[_Read]) -> Iterator[pa.RecordBatch]:
        """The records of all files; small files share a batch, and a large one is cut into several."""
        group: list[tuple[_Read, avro.Records]] = []
        rows = 0
        with concurrent.futures.ThreadPoolExecutor(_FETCHES) as pool:
            for number, (read, content) in enumerate(_fetch_ahead(pool, self._fetch, reads)):
                if number % _FILES_TOLD == 0:
                    self._progress(number, len(reads), f"read {read.file.object.name}")
                if content is None:
                    continue
                try:
                    records = avro.read(content)
                except avro.Unreadable as error:
                    read.reason = str(error)
                    continue
                if not len(records):
                    continue
                group.append((read, records))
                rows += len(records)
                if rows >= _BATCH_ROWS or sum(len(r.content) for _, r in group) >= _BATCH_BYTES:
                    yield from _cut(_batch(group))
                    group, rows = [], 0
        if group:
            yield from _cut(_batch(group))

    def _fetch(self, read: _Read) -> bytes | None:
        try:
            content, read.etag = self._capture.read(read.file.object.name)
        except (NotFound, Changed) as error:
            read.reason, read.etag = f"gone or being written while it was read: {error}", read.file.object.etag
            return None
        read.size, read.content = len(content), hashlib.sha256(content).hexdigest()
        return content

    def _commit(
        self, db: duckdb.DuckDBPyConnection, work: "_Work", reads: list[_Read], written: dict[tuple[dt.date, int], Segment]
    ) -> Ingested | Unbalanced:
        """Write the date's new segments and replace its manifest; a run that is killed before leaves only unreferenced files."""
        if wrong := [read for read in reads if read.records != sum(read.counts)]:
            return Unbalanced("; ".join(f"{r.file.object.name}: {r.records} captured, {sum(r.counts)} came out" for r in wrong))
        before = work.before
        listed = {read.file.object.name for read in reads}
        vanished = [entry for entry in before.files if entry.hour in work.hours and entry.blob not in listed]
        segments = [segment for segment in before.segments if segment.hour not in work.hours]
        for hour in sorted(work.hours):
            segment = written.get((work.date, hour))
            if kept := [entry for entry in vanished if entry.hour == hour and entry.records]:
                old = [s.name for s in before.segments if s.hour == hour]
                segment = self._keep(db, f"{folder(work.date)}hour={hour:02}/", hour, segment, kept, old)
            segments += [segment] if segment else []
        files = [entry for entry in before.files if entry.hour not in work.hours] + vanished + [read.entry() for read in reads]
        manifest = Manifest(
            capture_date=work.date,
            reader=self.reader,
            files=tuple(sorted(files, key=lambda entry: (entry.hour, entry.blob))),
            segments=tuple(sorted(segments, key=lambda segment: segment.hour)),
        )
        if manifest.quarantined:
            manifest = dataclasses.replace(manifest, quarantine=self._write_quarantine(db, manifest))
        self._manifests.put(manifest, replacing=work.etag)
        self._collect(manifest, before)
        return Ingested(manifest, len(reads))

    def _write_segments(self, db: duckdb.DuckDBPyConnection, chunk: "list[_Work]", reads: list[_Read]) -> dict[tuple[dt.date, int], Segment]:
        """One segment for each hour that was read, in one pass over `events`; hours without records have none."""
        usage_dates: dict[int, dict[str | None, tuple[int, int]]] = {}
        for number, day, events, tokens in db.execute(
            f"SELECT segment, CAST(usage_date AS VARCHAR), count(*), {tables.TOKENS} FROM events JOIN files USING (file) GROUP BY 1, 2 ORDER BY ALL"
        ).fetchall():
            usage_dates.setdefault(number, {})[day] = (events, tokens)
        target = self._lake.staging() / uuid.uuid4().hex
        db.execute(
            f"""COPY (SELECT {tables.select_list(tables.RAW_EVENTS)}, segment FROM events JOIN files USING (file))
            TO {engine.literal(str(target))} (FORMAT parquet, PARTITION_BY (segment))"""
        )
        segments: dict[tuple[dt.date, int], Segment] = {}
        for (date, hour), number in _segment_numbers(chunk).items():
            if number not in usage_dates:
                continue
            mine = [r for r in reads if r.records and r.file.capture_date == date and r.file.window_start.hour == hour]
            name = f"{folder(date)}hour={hour:02}/{engine.digest(self.reader, sorted((r.file.object.name, r.content) for r in mine))}.parquet"
            parts = sorted((target / f"segment={number}").iterdir())
            if len(parts) > 1:
                parts = [engine.stage(db, target, f"SELECT * FROM {engine.read_parquet([str(part) for part in parts])}")]
            self._write_named(name, parts[0])
            segments[date, hour] = _segment(name, hour, usage_dates[number])
        shutil.rmtree(target, ignore_errors=True)
        return segments

    def _keep(self, db: duckdb.DuckDBPyConnection, prefix: str, hour: int, segment: Segment | None, kept: list[FileEntry], old: list[str]) -> Segment:
        """The segment with the rows of files that are gone from the store, out of the hour's old segments."""
        blobs = ", ".join(engine.literal(entry.blob) for entry in kept)
        rows = f"SELECT * FROM {engine.read_parquet(self._lake.local_paths(old))} WHERE blob IN ({blobs})"
        if segment:
            rows = f"SELECT * FROM {engine.read_parquet(self._lake.local_paths([segment.name]))} UNION ALL BY NAME {rows}"
        counts = db.execute(f"SELECT CAST(usage_date AS VARCHAR), count(*), {tables.TOKENS} FROM ({rows}) GROUP BY 1").fetchall()
        name = f"{prefix}{engine.digest(segment.name if segment else '', sorted((e.blob, e.content) for e in kept))}.parquet"
        self._write_named(name, engine.stage(db, self._lake.staging(), rows))
        return _segment(name, hour, {day: (events, tokens) for day, events, tokens in counts})

    def _write_quarantine(self, db: duckdb.DuckDBPyConnection, manifest: Manifest) -> str:
        segments = [segment.name for segment in manifest.segments if segment.quarantined]
        name = f"{folder(manifest.capture_date)}quarantine-{engine.digest(segments)}.parquet"
        source = engine.read_parquet(self._lake.local_paths(segments))
        select = f"SELECT {tables.select_list(tables.QUARANTINE)} FROM {source} WHERE reason IS NOT NULL"
        self._write_named(name, engine.stage(db, self._lake.staging(), select))
        return name

    def _write_named(self, name: str, staged: Path) -> None:
        """Put a staged file under a name that says its content; one that is there already may be damaged and is replaced."""
        with contextlib.suppress(Changed):
            self._lake.write(name, staged, replacing=self._lake.etag(name))

    def _collect(self, manifest: Manifest, before: Manifest) -> None:
        """Delete what no manifest names any more, after a grace period for readers of the previous manifest."""
        if not before.files:
            return
        oldest = dt.datetime.now(dt.UTC) - engine.GRACE
        for stored in self._lake.objects(folder(manifest.capture_date)):
            named = stored.name in manifest.names() or stored.name in before.names()
            if not named and stored.modified < oldest:
                self._lake.delete(stored.name)


def _segment_numbers(chunk: list[_Work]) -> dict[tuple[dt.date, int], int]:
    """A number for each hour of a chunk."""
    return {key: number for number, key in enumerate((work.date, hour) for work in chunk for hour in work.hours)}


def _segment(name: str, hour: int, counts: dict[str | None, tuple[int, int]]) -> Segment:
    usage_dates = {day: count for day, count in sorted(counts.items(), key=str) if day}
    rows = sum(events for events, _ in counts.values())
    return Segment(name, hour, rows, rows - sum(events for events, _ in usage_dates.values()), usage_dates)


def _fetch_ahead(
    pool: concurrent.futures.Executor, fetch: Callable[[_Read], bytes | None], reads: Iterable[_Read]
) -> Iterator[tuple[_Read, bytes | None]]:
    """Each file with its content, the next few being fetched while one is decoded."""
    waiting: collections.deque[tuple[_Read, concurrent.futures.Future[bytes | None]]] = collections.deque()
    for read in reads:
        waiting.append((read, pool.submit(fetch, read)))
        if len(waiting) > _FETCHES:
            first, content = waiting.popleft()
            yield first, content.result()
    for first, content in waiting:
        yield first, content.result()


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(at, 2 * _BATCH_ROWS) for at in range(0, len(batch), 2 * _BATCH_ROWS))


def _batch(group: list[tuple[_Read, avro.Records]]) -> pa.RecordBatch:
    counts = [len(records) for _, records in group]
    fields = np.concatenate([np.frombuffer(records.fields, np.int64) for _, records in group]).reshape(-1, avro.FIELDS)
    at = 0
    for (read, _), count in zip(group, counts, strict=True):
        numbers = fields[at : at + count, 0]
        read.records, read.first, read.last = count, int(numbers.min()), int(numbers.max())
        if (np.diff(numbers) != 1).any():
            ordered = np.unique(numbers)
            breaks = np.flatnonzero(np.diff(ordered) > 1)[:_GAPS_TOLD]
            read.gaps = tuple((int(ordered[i]) + 1, int(ordered[i + 1]) - 1) for i in breaks)
        at += count
    content = group[0][1].content
    if len(group) > 1:
        content = b"".join(records.content for _, records in group)
        starts = list(itertools.accumulate((len(records.content) for _, records in group[:-1]), initial=0))
        fields[:, [avro.OFFSET, avro.ENQUEUED, avro.BODY]] += np.repeat(np.array(starts, np.int64), counts)[:, None]
    which = np.repeat(np.arange(len(group), dtype=np.int32), counts)
    partitions = [f"{read.file.namespace}/{read.file.event_hub}/{read.file.partition_id}" for read, _ in group]
    text, valid = _bodies(content, fields)
    return pa.record_batch(
        [
            pa.array(np.array([read.number for read, _ in group], np.int32)[which]),
            pa.DictionaryArray.from_arrays(pa.array(which), pa.array(partitions)),
            pa.array(np.array([read.file.window_start for read, _ in group], "datetime64[us]")[which]),
            pa.array(fields[:, 0].copy()),
            _views(content, fields, avro.OFFSET),
            _views(content, fields, avro.ENQUEUED),
            text,
            _heads(text),
            valid,
            pa.array(np.maximum(fields[:, avro.BODY + 1], 0)),
        ],
        schema=_SCHEMA,
    )


def _bodies(content: bytes, fields: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """The bodies as text, and whether each one is UTF-8."""
    start, size = fields[:, avro.BODY], fields[:, avro.BODY + 1]
    if size.max() < TRUNCATED_BYTES:
        text = _views(content, fields, avro.BODY)
        try:
            text.validate(full=True)
            return text, pa.repeat(pa.scalar(True), len(fields))
        except pa.ArrowInvalid:
            pass
    decoded = [_text(content[at : at + n]) if n >= 0 else None for at, n in zip(start.tolist(), size.tolist(), strict=True)]
    valid = pa.array([text is not None or n < 0 for text, n in zip(decoded, size, strict=True)])
    return pa.array(decoded, pa.string_view()), valid


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
