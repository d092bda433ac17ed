"""Whether a bill can be made again from its capture files, to the last digit."""

import dataclasses
import datetime as dt
import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.billing.again import bill
from aoai_usage_pipeline.billing.periods import Periods
from aoai_usage_pipeline.billing.stage import Progress
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.lake.manifest import Manifest, Manifests
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.reference.versions import ReferenceVersions
from aoai_usage_pipeline.storage import ObjectStore, open_store
from aoai_usage_pipeline.usage.identity import shared_dates
from aoai_usage_pipeline.usage.raw_events import Ingest, Unbalanced

AGREES, DIFFERS, UNVERIFIABLE = "agrees", "differs", "cannot be verified"

_FIGURES = [column.name for column in tables.DAILY_BILLING if column.type not in ("VARCHAR", "DATE")]

Line = dict[str, object]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """A line that is not the same in both bills: what it is for, and its figures in either bill, None where it is not in it."""

    line: str
    stored: dict[str, str] | None
    replayed: dict[str, str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the replay of one usage date says. `stored` is the digest the bill was stored with, None where there is none.

    `reasons` say why the day does not agree or cannot be verified, `notes` what else a person should know.
    """

    usage_date: dt.date
    outcome: str
    stored: str | None
    replayed: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on each day, the capture dates whose files differ from what was ingested, and the files that are gone."""

    verdicts: tuple[Verdict, ...]
    changed: tuple[dt.date, ...]
    removed: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return all(verdict.outcome == AGREES for verdict in self.verdicts)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes bills again from the capture files, in a temporary lake, and compares them with the ones in `lake`, which stays as it is.

    `ingest_into` gives what brings a lake up to the capture files. `present` is the reference data of now; a day is billed with the version that it
    was made with where that is recorded.
    """

    lake: ObjectStore
    ingest_into: Callable[[ObjectStore, Manifests], Ingest]
    present: Reference
    start_date: dt.date
    progress: Progress

    def verify(self, days: Sequence[dt.date]) -> Verification:
        """The verdict on usage dates. Raises ValueError when none of them has a bill."""
        stored = Days(self.lake, "daily_billing")
        footers = {day: footer for day, (footer, _) in stored.footers().items() if day in set(days)}
        if not footers:
            raise ValueError(f"there is no bill of {min(days)} to {max(days)} that could be verified")
        of_lake = Manifests(self.lake)
        shared = shared_dates(self.lake, of_lake, days)
        manifests = {date: of_lake.get(date)[0] for date in self._dates(of_lake.all(), days, shared)}
        ingestion = self.ingest_into(self.lake, of_lake)
        listed = ingestion.listed(min(manifests), max(manifests))
        removed = self._removed(manifests.values(), {file.object.name for files in listed.values() for file in files}, shared)
        notes: dict[dt.date, list[str]] = {day: [] for day in days}
        reasons = {day: [f"capture file {blob} is gone" for blob in removed.get(day, ())] for day in days}
        with tempfile.TemporaryDirectory(prefix="aoai-usage-") as place:
            again = open_store(place, create=True)
            Periods(self.lake).copy(again)
            for date, result in self.ingest_into(again, Manifests(again)).run(list(manifests), self.progress):
                if isinstance(result, Unbalanced):
                    for day in days:
                        reasons[day].append(f"the capture date {date} cannot be read: {result}")
            for reference, mine in self._references(days, footers, notes):
                for day, reason in bill(again, mine, reference, self.progress).items():
                    reasons[day].append(f"the day cannot be made again: {reason}")
            made_again = Days(again, "daily_billing")
            for day in days:
                code = footers.get(day, {}).get("code")
                if code != made_again.footer(day)[0].get("code", code):
                    notes[day].append("it was billed by another version of this program")
            elsewhere = bool(removed.keys() - set(days))
            verdicts = tuple(_judge(stored, made_again, day, reasons[day], notes[day], incomplete=elsewhere) for day in days)
        changed = tuple(date for date, manifest in manifests.items() if ingestion.changed(listed.get(date, []), manifest))
        return Verification(verdicts, changed, tuple(sorted({blob for blobs in removed.values() for blob in blobs})))

    def _dates(self, manifests: Iterable[Manifest], days: Sequence[dt.date], shared: Collection[dt.date]) -> list[dt.date]:
        """The capture dates to read: those around the days, and all that hold events of them or of days that have copies of their requests."""
        around = {day + dt.timedelta(n) for day in days for n in (-1, 0, 1)}
        wanted = {str(day) for day in shared}
        holding = {m.capture_date for m in manifests for segment in m.segments if wanted & segment.usage_dates.keys()}
        return sorted(date for date in around | holding if date >= self.start_date)

    def _removed(self, manifests: Iterable[Manifest], listed: Collection[str], shared: Collection[dt.date]) -> dict[dt.date, list[str]]:
        """The capture files that were read but are no longer listed, by the usage dates of their events."""
        found: dict[dt.date, list[str]] = {}
        dates = ", ".join(f"DATE '{day}'" for day in shared)
        with engine.connect(self.lake.staging()) as db:
            for manifest in manifests:
                gone = [file for file in manifest.files if file.parsed and file.blob not in listed]
                hours = {file.hour for file in gone}
                names = [segment.name for segment in manifest.segments if segment.hour in hours]
                if not names:
                    continue
                blobs = ", ".join(engine.literal(file.blob) for file in gone)
                events = engine.read_parquet(self.lake.local_paths(names), tables.empty_select(tables.RAW_EVENTS))
                select = f"SELECT DISTINCT usage_date, blob FROM {events} WHERE reason IS NULL AND usage_date IN ({dates}) AND blob IN ({blobs})"
                for day, blob in db.execute(f"{select} ORDER BY ALL").fetchall():
                    found.setdefault(day, []).append(blob)
        return found

    def _references(
        self, days: Sequence[dt.date], footers: dict[dt.date, dict[str, object]], notes: dict[dt.date, list[str]]
    ) -> Iterator[tuple[Reference, list[dt.date]]]:
        """The reference data to bill with, and the days it is for; what it is goes into the notes where it is not that of now."""
        groups: dict[str, list[dt.date]] = defaultdict(list)
        for day in days:
            groups[str(footers.get(day, {}).get("reference_version", self.present.version))].append(day)
        for version, mine in groups.items():
            recorded = ReferenceVersions(self.lake).load(version)
            for day in mine:
                if recorded is None and day in footers:
                    notes[day].append(f"the reference data it was billed with, version {version}, is not recorded: replayed with that of now")
                elif recorded is not None and recorded.on(day).content() != self.present.on(day).content():
                    notes[day].append(f"it was billed with reference data version {version}, which is not that of now: replayed with that version")
            yield recorded or self.present, mine


def _judge(stored: Days, replayed: Days, day: dt.date, reasons: Sequence[str], notes: Sequence[str], *, incomplete: bool) -> Verdict:
    """Compare a day of `daily_billing` with its replay.

    `reasons` make it one that cannot be verified. So does a difference when the replay is `incomplete`, that is without some events of other days
    that may have been copies of requests of this one.
    """
    footer, etag = stored.footer(day)
    made_again = _lines(replayed, day)
    replayed_digest = _digest(made_again)
    said = str(footer["digest"]) if "digest" in footer else None if etag else _digest([])
    try:
        lines = _lines(stored, day)
    except duckdb.Error as error:
        return Verdict(day, UNVERIFIABLE, said, replayed_digest, (*reasons, f"its lines cannot be read: {error}"), tuple(notes))
    differences = tuple(_differences(lines, made_again))
    if said is None:
        reasons = [*reasons, "it was stored without a digest: run `aoai-usage bill` again"]
    wrong = []
    if said is not None and (found := _digest(lines)) != said:
        wrong.append(f"the lines in the lake are not the ones it was stored with: their digest is {found}")
    if said is not None and replayed_digest != said:
        wrong.append("the replay gives another bill" if etag else "there is no bill of it in the lake")
        if incomplete:
            reasons = [*reasons, "capture files of other days, which may have had copies of its requests, are gone"]
    outcome = UNVERIFIABLE if reasons else DIFFERS if wrong else AGREES
    return Verdict(day, outcome, said, replayed_digest, (*reasons, *wrong), tuple(notes), differences)


def _digest(lines: Iterable[Line]) -> str:
    return digest.of_day(list(line.values()) for line in lines)


def _lines(table: Days, day: dt.date) -> list[Line]:
    """The lines of the day's object, with the columns it has."""
    paths = table.paths([day])
    if not paths:
        return []
    with duckdb.connect(":memory:") as db:
        found = db.execute(f"SELECT * FROM read_parquet({engine.literal(paths[0])}, hive_partitioning = false)")
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _differences(stored: Sequence[Line], replayed: Sequence[Line]) -> Iterable[Difference]:
    """The lines that only one of the bills has, those for the same thing side by side."""
    columns = list(dict.fromkeys(name for line in (*stored, *replayed) for name in line))
    counts = [Counter(tuple(line.get(name) for name in columns) for line in lines) for lines in (stored, replayed)]
    groups: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = defaultdict(lambda: ([], []))
    for side, only in enumerate((counts[0] - counts[1], counts[1] - counts[0])):
        for values in only.elements():
            said = {name: digest.text(value) for name, value in zip(columns, values, strict=True) if value is not None and name != "usage_date"}
            line = " / ".join(value for name, value in said.items() if name not in _FIGURES)
            groups[line][side].append({name: value for name, value in said.items() if name in _FIGURES})
    for line, sides in sorted(groups.items()):
        yield from (Difference(line, one, other) for one, other in itertools.zip_longest(*(sorted(side, key=str) for side in sides)))
