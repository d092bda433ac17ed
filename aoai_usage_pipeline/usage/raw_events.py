"""Raw events: capture files decoded, recognised by their contract, and kept as immutable segments, one capture date at a time."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.capture import records
from aoai_usage_pipeline.capture.names import CaptureFile, NameFormat
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest, Manifests, Segment, folder
from aoai_usage_pipeline.storage import Changed, ObjectStore
from aoai_usage_pipeline.usage.envelope import Envelopes
from aoai_usage_pipeline.usage.identity import write_index
from aoai_usage_pipeline.usage.normalize import keyed_hash, prepare, raw_events_select

_STREAM_ROWS = 20_000
_WRITES, _WRITES_AHEAD = 2, 4
_FIELDS_TOLD = 50
_EMPTY = tables.empty_select(tables.RAW_EVENTS)
_DICTIONARY_COLUMNS = [c.name for c in tables.RAW_EVENTS if c.type == "VARCHAR" and c.name not in ("request_id", "offset", "body")]


class Unbalanced(Exception):
    """Records came out of the reader in another number than they went in; nothing of that date was replaced."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ingested:
    """What ingesting one capture date did: the files it read, and how many events were in them."""

    manifest: Manifest
    files_read: int
    events_read: int


@dataclasses.dataclass
class _Read(records.FileRead):
    """One capture file on its way into a segment."""

    counts: tuple[int, int] = (0, 0)

    def entry(self) -> FileEntry:
        status = "unreadable" if self.reason else "read" if self.records else "empty"
        return FileEntry(
            self.file.object.name, self.etag, self.size, self.records, self.events, self.first, self.last, *self.counts, status, self.reason,
            self.file.window_start.hour, f"{self.file.namespace}/{self.file.event_hub}", self.file.partition_id, self.content, self.gaps,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """One capture date that needs reading: the manifest it replaces, and the hours that differ from it with their files."""

    date: dt.date
    before: Manifest
    etag: str | None
    hours: dict[int, list[CaptureFile]]


@dataclasses.dataclass
class _Written:
    """What of a capture date was written in this run: its segments, and the requests in them."""

    writes: "dict[int, concurrent.futures.Future[Segment]]" = dataclasses.field(default_factory=dict)
    requests: list[pa.Table] = dataclasses.field(default_factory=list)

    @property
    def segments(self) -> dict[int, Segment]:
        """The segment of each hour, once it is in the lake."""
        return {hour: write.result() for hour, write in self.writes.items()}


class Ingest:
    """Brings capture dates of the lake up to the capture files of a store."""

    def __init__(
        self,
        capture: ObjectStore,
        lake: ObjectStore,
        manifests: Manifests,
        names: NameFormat,
        start_date: dt.date,
        hash_key: bytes,
        estimated: bool,
        kept: bool,
    ) -> None:
        self._capture, self._lake, self._manifests, self._names, self._start_date = capture, lake, manifests, names, start_date
        self._hash_key, self._estimated, self._kept = hash_key, estimated, kept
        self.reader = engine.digest(engine.code_digest("capture", "usage"), start_date, keyed_hash(hash_key, "reader"), estimated, kept)

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
        """Ingest the dates in one stream over their files; gives each date's result as soon as it is in the lake."""
        if not dates:
            return
        listed = self.listed(min(dates), max(dates))
        works = [self._work(date, listed.get(date, [])) for date in sorted(dates)]
        yield from ((work.date, Ingested(work.before, 0, 0)) for work in works if not work.hours)
        changed = [work for work in works if work.hours]
        if not changed:
            return
        overtaken: list[dt.date] = []
        with engine.connect(self._lake.staging()) as db:
            for work, reads, written in self._written(db, changed, progress):
                try:
                    yield work.date, self._commit(db.cursor(), work, reads, written)
                except Changed:
                    overtaken.append(work.date)
        if overtaken:
            # another run replaced these manifests since we listed: look again, and read what still differs
            yield from self.run(overtaken, progress)

    def listed(self, first: dt.date, last: dt.date) -> dict[dt.date, list[CaptureFile]]:
        """The capture files that are in the store now, by capture date."""
        found: dict[dt.date, list[CaptureFile]] = {}
        for file in self._names.files(self._capture, first, last):
            found.setdefault(file.capture_date, []).append(file)
        return found

    def _work(self, date: dt.date, listed: list[CaptureFile]) -> "_Work":
        manifest, etag = self._manifests.get(date)
        return _Work(date, manifest, etag, self.changed(listed, manifest))

    def _written(
        self, db: duckdb.DuckDBPyConnection, works: "list[_Work]", progress: Callable[[int, int, str], None]
    ) -> "Iterator[tuple[_Work, list[_Read], _Written]]":
        """Read the changed hours of the dates, oldest first, and write their segments; gives each date when all of it is written."""
        numbers = itertools.count()
        hours = [
            (work.date, hour, [_Read(file, next(numbers)) for file in sorted(work.hours[hour], key=lambda f: f.object.name)])
            for work in works
            for hour in sorted(work.hours)
        ]
        reads = {date: [read for *_, part in group for read in part] for date, group in itertools.groupby(hours, key=lambda hour: hour[0])}
        events = self._events(db, [read for part in reads.values() for read in part], progress)
        written = {work.date: _Written() for work in works}
        waiting = collections.deque(works)
        ahead: collections.deque[concurrent.futures.Future[Segment]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(_WRITES) as pool:
            for number, rows in _by_hour(events, np.cumsum([len(part) for *_, part in hours])):
                date, hour, part = hours[number]
                while waiting[0].date < date:
                    work = waiting.popleft()
                    yield work, reads[work.date], written[work.date]
                if len(ahead) == _WRITES_AHEAD:
                    ahead.popleft().result()
                written[date].writes[hour] = pool.submit(self._write_segment, date, hour, rows, part)
                ahead.append(written[date].writes[hour])
                written[date].requests.append(rows.select(["request_hash", "usage_date"]).filter(pc.is_valid(rows["usage_date"])))
            yield from ((work, reads[work.date], written[work.date]) for work in waiting)

    def _events(self, db: duckdb.DuckDBPyConnection, reads: list[_Read], progress: Callable[[int, int, str], None]) -> pa.RecordBatchReader:
        """The raw events of the files in their order; the engine works ahead of whoever takes them."""
        prepare(db, self._hash_key)
        db.execute("SET preserve_insertion_order = true")
        batches = records.batches(self._capture, reads, Envelopes(self._estimated, self._kept), progress)
        db.register("records", pa.RecordBatchReader.from_batches(records.SCHEMA, batches))
        today = dt.datetime.now(dt.UTC).date()
        select = raw_events_select("records", start_date=self._start_date, today=today, estimated=self._estimated, kept=self._kept)
        return db.sql(select).to_arrow_reader(_STREAM_ROWS)

    def _write_segment(self, date: dt.date, hour: int, events: pa.Table, reads: list[_Read]) -> Segment:
        """Write an hour's events, count them per file, and per usage date with their tokens."""
        number = events["file"].to_numpy() - reads[0].number
        parsed = pc.is_null(events["reason"]).to_numpy()
        counts = (np.bincount(number[which], minlength=len(reads)).tolist() for which in (parsed, ~parsed))
        for read, parsed_of_file, quarantined_of_file in zip(reads, *counts, strict=True):
            read.counts = parsed_of_file, quarantined_of_file
        tokens = sum(pc.fill_null(events[column], 0).to_numpy() for column in ("prompt_tokens", "completion_tokens"))
        days = events["usage_date"].to_numpy()
        usage_dates = {str(day): (int((days == day).sum()), int(tokens[days == day].sum())) for day in np.unique(days[~np.isnat(days)])}
        origin = {
            "blob": [read.file.object.name for read in reads],
            "namespace": [read.file.namespace for read in reads],
            "event_hub": [read.file.event_hub for read in reads],
            "partition_id": [read.file.partition_id for read in reads],
        }
        for column, values in origin.items():
            events = events.append_column(column, pa.DictionaryArray.from_arrays(pa.array(number, pa.int32()), pa.array(values)))
        staged = self._lake.staging() / f"{uuid.uuid4().hex}.parquet"
        # a column that is NULL throughout is left out: half of them are, in the events of most gateways
        names = [name for name in tables.names(tables.RAW_EVENTS) if events[name].null_count < len(events)]
        dictionaries = [name for name in names if name in _DICTIONARY_COLUMNS]
        with pa.OSFile(str(staged), "wb") as file:
            pq.write_table(events.select(names), file, use_dictionary=dictionaries, write_statistics=["usage_date"], store_schema=False)
        content = sorted((read.file.object.name, read.content) for read in reads if read.records)
        name = f"{folder(date)}hour={hour:02}-{engine.digest(self.reader, content)}.parquet"
        self._write_named(name, staged)
        return Segment(name, hour, len(events), int((~parsed).sum()), usage_dates, _unknown_fields(events))

    def _commit(self, db: duckdb.DuckDBPyConnection, work: "_Work", reads: list[_Read], written: _Written) -> Ingested | Unbalanced:
        """Replace the date's manifest by one that names the new segments; a run that is killed before leaves only unreferenced files."""
        new = written.segments
        if wrong := [read for read in reads if read.events != sum(read.counts) or read.events < read.records]:
            return Unbalanced("; ".join(f"{r.file.object.name}: {r.events} captured, {sum(r.counts)} came out" for r in wrong))
        before = work.before
        listed = {read.file.object.name for read in reads}
        vanished = [entry for entry in before.files if entry.hour in work.hours and entry.blob not in listed]
        segments = [segment for segment in before.segments if segment.hour not in work.hours]
        for hour in sorted(work.hours):
            segment = new.get(hour)
            if kept := [entry for entry in vanished if entry.hour == hour and entry.records]:
                old = [s.name for s in before.segments if s.hour == hour]
                segment = self._keep(db, f"{folder(work.date)}hour={hour:02}-", hour, segment, kept, old)
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
        if manifest.segments and {s.name for s in manifest.segments} == {s.name for s in new.values()}:
            write_index(self._lake, manifest, pa.concat_tables(written.requests))
        self._collect(manifest, before)
        return Ingested(manifest, len(reads), sum(read.events for read in reads))

    def _keep(self, db: duckdb.DuckDBPyConnection, prefix: str, hour: int, segment: Segment | None, kept: list[FileEntry], old: list[str]) -> Segment:
        """The segment with the rows of files that are gone from the store, out of the hour's old segments."""
        blobs = ", ".join(engine.literal(entry.blob) for entry in kept)
        body = "body" if self._kept else "NULL"
        old_rows = engine.read_parquet(self._lake.local_paths(old), _EMPTY)
        rows = f"SELECT * REPLACE (CAST({body} AS VARCHAR) AS body) FROM {old_rows} WHERE blob IN ({blobs})"
        if segment:
            rows = f"SELECT * FROM {engine.read_parquet(self._lake.local_paths([segment.name]), _EMPTY)} UNION ALL BY NAME {rows}"
        by_date = f"SELECT CAST(usage_date AS VARCHAR), count(*), {tables.TOKENS} FROM ({rows}) WHERE usage_date IS NOT NULL GROUP BY 1 ORDER BY 1"
        usage_dates = {day: (events, tokens) for day, events, tokens in db.execute(by_date).fetchall()}
        [(events, quarantined)] = db.execute(f"SELECT count(*), count(reason) FROM ({rows})").fetchall()
        name = f"{prefix}{engine.digest(segment.name if segment else '', sorted((e.blob, e.content) for e in kept))}.parquet"
        self._write_named(name, engine.stage(db, self._lake.staging(), rows))
        return Segment(name, hour, events, quarantined, usage_dates, segment.unknown_fields if segment else {})

    def _write_quarantine(self, db: duckdb.DuckDBPyConnection, manifest: Manifest) -> str:
        segments = [segment.name for segment in manifest.segments if segment.quarantined]
        name = f"{folder(manifest.capture_date)}quarantine-{engine.digest(segments)}.parquet"
        source = engine.read_parquet(self._lake.local_paths(segments), _EMPTY)
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


def _unknown_fields(events: pa.Table) -> dict[str, list[str]]:
    """The fields that contracts did not know, by contract."""
    found: dict[str, set[str]] = {}
    if events["unknown_fields"].null_count == len(events):
        return {}
    news = events.filter(pc.is_valid(events["unknown_fields"]))
    for contract, fields in zip(news["contract"].to_pylist(), news["unknown_fields"].to_pylist(), strict=True):
        found.setdefault(contract, set()).update(fields)
    return {contract: sorted(fields)[:_FIELDS_TOLD] for contract, fields in sorted(found.items())}


def _by_hour(events: Iterable[pa.RecordBatch], ends: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    """The events of each hour that has any, with the hour's place in `ends`; an hour's file numbers lie below its end."""
    current, parts = -1, []
    for batch in events:
        hours = np.searchsorted(ends, batch["file"].to_numpy(), side="right")
        cuts = [0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(batch)]
        for start, end in itertools.pairwise(cuts):
            if hours[start] != current:
                if parts:
                    yield current, pa.Table.from_batches(parts)
                if hours[start] < current:
                    raise RuntimeError("the engine gave events out of the order of their files")
                current, parts = int(hours[start]), []
            parts.append(batch.slice(start, end - start))
    if parts:
        yield current, pa.Table.from_batches(parts)
