"""The manifest of a capture date: which capture files were read, which segments hold their events, and of which usage dates.

`manifests/capture_date=D.json` is the only mutable object of a capture date; everything it names is immutable.
"""

import dataclasses
import datetime as dt
import json
from collections.abc import Iterable

from aoai_usage_pipeline.storage import NotFound, ObjectStore, StorageError

_PREFIX = "manifests/"


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """One capture file as it was read; the columns of the table `capture_files`, and what finding gaps and re-reading need.

    `events` counts the bodies in its records, which may hold several. `gaps` are the first runs of sequence numbers that are missing inside
    the file, both ends included.
    """

    blob: str
    etag: str
    bytes: int
    records: int
    events: int
    first_sequence_number: int | None
    last_sequence_number: int | None
    parsed: int
    quarantined: int
    status: str
    reason: str | None
    hour: int
    hub: str
    partition_id: str
    content: str
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def readable(self) -> bool:
        return self.status != "unreadable"


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One immutable Parquet file of raw events.

    `usage_dates` counts events and tokens of each usage date in it; tokens are prompt + completion. `unknown_fields` are fields of events
    that their contract does not know, by contract.
    """

    name: str
    hour: int
    rows: int
    quarantined: int
    usage_dates: dict[str, tuple[int, int]]
    unknown_fields: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What one capture date consists of. `quarantine` names the date's quarantined records."""

    capture_date: dt.date
    reader: str = ""
    files: tuple[FileEntry, ...] = ()
    segments: tuple[Segment, ...] = ()
    quarantine: str | None = None

    @property
    def parsed(self) -> int:
        return sum(file.parsed for file in self.files)

    @property
    def quarantined(self) -> int:
        return sum(file.quarantined for file in self.files)

    def names(self) -> set[str]:
        """Every object the manifest refers to."""
        return {segment.name for segment in self.segments} | ({self.quarantine} if self.quarantine else set())


def folder(capture_date: dt.date) -> str:
    """The prefix of everything of a capture date."""
    return f"raw_events/capture_date={capture_date}/"


def _name(capture_date: dt.date) -> str:
    return f"{_PREFIX}capture_date={capture_date}.json"


class Manifests:
    """The manifests of a lake, parsed once per version."""

    def __init__(self, lake: ObjectStore) -> None:
        self._lake = lake
        self._cache: dict[dt.date, tuple[str, Manifest]] = {}

    def get(self, capture_date: dt.date) -> tuple[Manifest, str | None]:
        """The manifest and its ETag; an empty one with None where nothing was ingested."""
        etag = self._lake.etag(_name(capture_date))
        return (etag and self._read(capture_date, etag)) or (Manifest(capture_date), None)

    def all(self) -> list[Manifest]:
        """Every manifest of the lake, by capture date."""
        found = []
        for stored in self._lake.objects(_PREFIX):
            try:
                date = dt.date.fromisoformat(stored.name.rpartition("=")[2].removesuffix(".json"))
            except ValueError:
                continue  # somebody else's file
            if read := self._read(date, stored.etag):
                found.append(read[0])
        return sorted(found, key=lambda manifest: manifest.capture_date)

    def _read(self, capture_date: dt.date, etag: str) -> tuple[Manifest, str] | None:
        if capture_date not in self._cache or self._cache[capture_date][0] != etag:
            try:
                content, etag = self._lake.read(_name(capture_date))
            except NotFound:
                return None
            try:
                self._cache[capture_date] = (etag, _parse(capture_date, content))
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(f"{self._lake.url}/{_name(capture_date)} is damaged, or of another version: {error}") from error
        etag, manifest = self._cache[capture_date]
        return manifest, etag

    def put(self, manifest: Manifest, *, replacing: str | None) -> None:
        """Replace the date's manifest if it is still the version `replacing`. Raises `Changed`."""
        content = json.dumps(manifest, default=_plain).encode()
        self._lake.write(_name(manifest.capture_date), content, replacing=replacing)


def events_by_usage_date(manifests: Iterable[Manifest]) -> dict[dt.date, list[Segment]]:
    """The segments that hold events of each usage date, sorted by name."""
    found: dict[dt.date, list[Segment]] = {}
    for manifest in manifests:
        for segment in manifest.segments:
            for day in segment.usage_dates:
                found.setdefault(dt.date.fromisoformat(day), []).append(segment)
    return {day: sorted(segments, key=lambda segment: segment.name) for day, segments in sorted(found.items())}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)


def _parse(capture_date: dt.date, content: bytes) -> Manifest:
    data = json.loads(content)
    return Manifest(
        capture_date=capture_date,
        reader=data["reader"],
        files=tuple(FileEntry(**{"events": file["records"]} | file) for file in data["files"]),
        segments=tuple(
            Segment(**{**segment, "usage_dates": {day: (n, tokens) for day, (n, tokens) in segment["usage_dates"].items()}})
            for segment in data["segments"]
        ),
        quarantine=data["quarantine"],
    )
