"""Raw events: capture files decoded, recognised by their contract, and kept as immutable segments, one capture date at a time."""

import codecs
import collections
import concurrent.futures
import dataclasses
import datetime as dt
import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

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
_WRITES = 2
_BATCH_ROWS = 16_384
_SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "partition": pa.dictionary(pa.int32(), pa.string()),
        "window_start": pa.timestamp("us"),
        "sequence_number": pa.int64(),
        "offset": pa.string_view(),
        "enqueued_text": pa.string_view(),
        "body": pa.string_view(),
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

    def entry(self) -> FileEntry:
        status = "unreadable" if self.reason else "read" if self.records else "empty"
        return FileEntry(
            self.file.object.name, self.etag, self.size, self.records, self.first, self.last, *self.counts, status, self.reason,
            self.file.window_start.hour, f"{self.file.namespace}/{self.file.event_hub}", self.file.partition_id, self.content,
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
        listed = self._list(dates)
        chunk: list[_Work] = []
        size = done = 0
        for date in sorted(dates):
            work = self._work(date, listed[date])
            if work.hours:
                chunk.append(work)
                size += sum(file.object.size for files in work.hours.values() for file in files)
            else:
                done += 1
                yield date, Ingested(work.before, 0)
            if size >= _CHUNK_BYTES:
                yield from self._ingest(chunk)
                done += len(chunk)
                chunk, size = [], 0
                progress(done, len(dates), f"ingested up to {date}")
        yield from self._ingest(chunk)
        progress(len(dates), len(dates), "ingested")

    def _list(self, dates: Sequence[dt.date]) -> dict[dt.date, list[CaptureFile]]:
        listed: dict[dt.date, list[CaptureFile]] = {date: [] for date in dates}
        for file in self._names.files(self._capture, min(dates), max(dates)):
            if file.capture_date in listed:
                listed[file.capture_date].append(file)
        return listed

    def _work(self, date: dt.date, listed: list[CaptureFile]) -> "_Work":
        manifest, etag = self._manifests.get(date)
        return _Work(date, manifest, etag, self.changed(listed, manifest))

    def _ingest(self, chunk: "list[_Work]") -> Iterator[tuple[dt.date, Ingested | Unbalanced]]:
        if not chunk:
            return
        files = (file for work in chunk for hour in sorted(work.hours) for file in sorted(work.hours[hour], key=lambda f: f.object.name))
        reads = [_Read(file, number) for number, file in enumerate(files)]
        overtaken: list[dt.date] = []
        with engine.connect(self._lake.staging()) as db:
            db.execute(MACROS)
            self._decode(db, reads)
            with concurrent.futures.ThreadPoolExecutor(_WRITES) as pool:
                by_date = {work.date: [read for read in reads if read.file.capture_date == work.date] for work in chunk}
                commits = {work.date: pool.submit(self._commit, db.cursor(), work, by_date[work.date]) for work in chunk}
                for date, commit in commits.items():
                    try:
                        yield date, commit.result()
                    except Changed:
                        overtaken.append(date)
        if overtaken:
            # another run replaced these manifests since we listed: look again, and read what still differs
            listed = self._list(overtaken)
            again = [self._work(date, listed[date]) for date in overtaken]
            yield from ((work.date, Ingested(work.before, 0)) for work in again if not work.hours)
            yield from self._ingest([work for work in again if work.hours])

    def _decode(self, db: duckdb.DuckDBPyConnection, reads: list[_Read]) -> None:
        """Stream every file into the table `events`, decoding in one thread while the engine parses in the others."""
        files = pa.table(  # noqa: F841 - read by name below
            {
                "file": pa.array([r.number for r in reads], pa.int32()),
                "blob": [r.file.object.name for r in reads],
                "namespace": [r.file.namespace for r in reads],
                "event_hub": [r.file.event_hub for r in reads],
                "partition_id": [r.file.partition_id for r in reads],
            }
        )
        db.execute("CREATE TABLE files AS SELECT * FROM files")
        db.register("records", pa.RecordBatchReader.from_batches(_SCHEMA, self._batches(reads)))
        today = dt.datetime.now(dt.UTC).date()
        db.execute(f"CREATE TABLE events AS {raw_events_select('records', start_date=self._start_date, today=today)}")
        counted = "SELECT file, count(*) FILTER (reason IS NULL), count(*) FILTER (reason IS NOT NULL) FROM events GROUP BY ALL"
        for number, parsed, quarantined in db.execute(counted).fetchall():
            reads[number].counts = (parsed, quarantined)

    def _batches(self, reads: list[_Read]) -> Iterator[pa.RecordBatch]:
        with concurrent.futures.ThreadPoolExecutor(_FETCHES) as pool:
            for read, content in _fetch_ahead(pool, self._fetch, reads):
                if content is None:
                    continue
                try:
                    records = avro.read(content)
                except avro.Unreadable as error:
                    read.reason = str(error)
                    continue
                if len(records):
                    batch = _batch(read, records)
                    yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, len(batch), _BATCH_ROWS))

    def _fetch(self, read: _Read) -> bytes | None:
        try:
            content, read.etag = self._capture.read(read.file.object.name)
        except (NotFound, Changed) as error:
            read.reason, read.etag = f"gone or being written while it was read: {error}", read.file.object.etag
            return None
        read.size, read.content = len(content), hashlib.sha256(content).hexdigest()
        return content

    def _commit(self, db: duckdb.DuckDBPyConnection, work: "_Work", reads: list[_Read]) -> Ingested | Unbalanced:
        """Write the date's new segments and replace its manifest; a run that is killed before leaves only unreferenced files."""
        if wrong := [read for read in reads if read.records != sum(read.counts)]:
            return Unbalanced("; ".join(f"{r.file.object.name}: {r.records} captured, {sum(r.counts)} came out" for r in wrong))
        before = work.before
        listed = {read.file.object.name for read in reads}
        vanished = [entry for entry in before.files if entry.hour in work.hours and entry.blob not in listed]
        segments = [segment for segment in before.segments if segment.hour not in work.hours]
        for hour in sorted(work.hours):
            segment = self._write_segment(
                db,
                f"{folder(work.date)}hour={hour:02}/",
                [read for read in reads if read.file.window_start.hour == hour],
                [entry for entry in vanished if entry.hour == hour and entry.records],
                [s.name for s in before.segments if s.hour == hour],
            )
            segments += [dataclasses.replace(segment, hour=hour)] if segment else []
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

    def _write_segment(self, db: duckdb.DuckDBPyConnection, prefix: str, reads: list[_Read], kept: list[FileEntry], old: list[str]) -> Segment | None:
        """The segment of one hour: what was just read, and the rows of `kept` files out of the `old` segments."""
        contents = sorted([(r.file.object.name, r.content) for r in reads if r.records] + [(e.blob, e.content) for e in kept])
        if not contents:
            return None
        numbers = ", ".join(str(r.number) for r in reads)
        rows = f"SELECT {tables.select_list(tables.RAW_EVENTS)} FROM events JOIN files USING (file) WHERE file IN ({numbers})"
        if kept:
            blobs = ", ".join(engine.literal(entry.blob) for entry in kept)
            rows += f" UNION ALL BY NAME SELECT * FROM {engine.read_parquet(self._lake.local_paths(old))} WHERE blob IN ({blobs})"
        counts = db.execute(
            f"""SELECT CAST(usage_date AS VARCHAR), count(*), CAST(sum(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)) AS BIGINT)
            FROM ({rows}) GROUP BY 1"""
        ).fetchall()
        name = f"{prefix}{engine.digest(self.reader, contents)}.parquet"
        self._write_once(db, name, rows)
        usage_dates = {day: (events, tokens) for day, events, tokens in sorted(count for count in counts if count[0])}
        parsed = sum(events for events, _ in usage_dates.values())
        rows_ = sum(events for _, events, _ in counts)
        return Segment(name, hour=0, rows=rows_, quarantined=rows_ - parsed, usage_dates=usage_dates)

    def _write_quarantine(self, db: duckdb.DuckDBPyConnection, manifest: Manifest) -> str:
        segments = [segment.name for segment in manifest.segments if segment.quarantined]
        name = f"{folder(manifest.capture_date)}quarantine-{engine.digest(segments)}.parquet"
        source = engine.read_parquet(self._lake.local_paths(segments))
        self._write_once(db, name, f"SELECT {tables.select_list(tables.QUARANTINE)} FROM {source} WHERE reason IS NOT NULL")
        return name

    def _write_once(self, db: duckdb.DuckDBPyConnection, name: str, select: str) -> None:
        """Write an object whose name says its content, unless it is there already."""
        if self._lake.etag(name) is not None:
            return
        staged = self._lake.staging() / f"{uuid.uuid4().hex}.parquet"
        engine.copy(db, select, staged)
        try:
            self._lake.write(name, staged, replacing=None)
        except Changed:
            return

    def _collect(self, manifest: Manifest, before: Manifest) -> None:
        """Delete what no manifest names any more, after a grace period for readers of the previous manifest."""
        if not before.files:
            return
        oldest = dt.datetime.now(dt.UTC) - engine.GRACE
        for stored in self._lake.objects(folder(manifest.capture_date)):
            named = stored.name in manifest.names() or stored.name in before.names() or stored.name.endswith("manifest.json")
            if not named and stored.modified < oldest:
                self._lake.delete(stored.name)


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


def _batch(read: _Read, records: avro.Records) -> pa.RecordBatch:
    count = len(records)
    fields = np.frombuffer(records.fields, np.int64).reshape(count, avro.FIELDS)
    read.records, read.first, read.last = count, int(fields[:, 0].min()), int(fields[:, 0].max())
    text, valid = _bodies(records, fields)
    return pa.record_batch(
        [
            pa.repeat(pa.scalar(read.number, pa.int32()), count),
            pa.repeat(pa.scalar(f"{read.file.namespace}/{read.file.event_hub}/{read.file.partition_id}"), count).dictionary_encode(),
            pa.repeat(pa.scalar(read.file.window_start, pa.timestamp("us")), count),
            pa.array(fields[:, 0]),
            _views(records.content, fields, avro.OFFSET),
            _views(records.content, fields, avro.ENQUEUED),
            text,
            valid,
            pa.array(np.maximum(fields[:, avro.BODY + 1], 0)),
        ],
        schema=_SCHEMA,
    )


def _bodies(records: avro.Records, fields: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """The bodies as text, and whether each one is UTF-8."""
    size = fields[:, avro.BODY + 1]
    if size.max() < TRUNCATED_BYTES:
        text = _views(records.content, fields, avro.BODY)
        try:
            text.validate(full=True)
            return text, pa.repeat(pa.scalar(True), len(records))
        except pa.ArrowInvalid:
            pass
    decoded = [_text(body) for body in records.texts(avro.BODY)]
    valid = pa.array([text is not None or n < 0 for text, n in zip(decoded, size, strict=True)])
    return pa.array(decoded, pa.string_view()), valid


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


def _text(body: bytes | None) -> str | None:
    if body is None:
        return None
    # a body that the gateway cut off may end inside a character
    whole = len(body) < TRUNCATED_BYTES
    try:
        return codecs.utf_8_decode(body, "strict", whole)[0]
    except UnicodeDecodeError:
        return None
