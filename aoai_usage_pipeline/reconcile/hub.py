"""Is everything the Event Hub holds in the capture files that were ingested? The hub's own sequence numbers say."""

import concurrent.futures
import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator, Sequence

from aoai_usage_pipeline.capture.names import NameFormat
from aoai_usage_pipeline.hub.client import AT_ONCE, EventHub, HubState, Partition
from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest
from aoai_usage_pipeline.storage import ObjectStore, StoredObject

COMPLETE, IN_WINDOW, NOT_INGESTED, OVERDUE, LOST = "complete", "within the capture window", "not ingested yet", "overdue", "lost"
WRITING = dt.timedelta(minutes=2)
"""What Capture may take to write a window's file after it has ended."""

_EPOCH = dt.datetime(1970, 1, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Completeness:
    """A partition's events in the hub against those in ingested files.

    `missing` of those the hub holds are in no file, the oldest of them has the number `missing_from` and is `minutes` old;
    `lost` left the hub before any file had them. `restarted`: there are files of an earlier hub of that name. All times are UTC.
    """

    partition: Partition
    captured_to: int | None
    missing: int
    missing_from: int | None
    minutes: int
    lost: int
    restarted: bool
    state: str

    @property
    def ok(self) -> bool:
        return self.state not in (OVERDUE, LOST)


def completeness(hub: EventHub, manifests: Sequence[Manifest], names: NameFormat, capture: ObjectStore, window: dt.timedelta) -> list[Completeness]:
    """Compare each partition of the hub with the files in the manifests. `window` is the longest that Capture keeps an event. Raises `HubError`."""
    state = hub.state()
    known = {(f.blob, f.etag) for manifest in manifests for f in manifest.files}
    files = [f for manifest in manifests for f in manifest.files if _is_of(f, hub)]

    def compare(partition: Partition) -> Completeness:
        spans, restarted = _spans([f for f in files if f.partition_id == partition.partition_id], names, state, partition, window)
        captured_to = max((last for _, last in spans), default=None)
        missing = list(_missing(spans, partition))
        lost = max(0, partition.first - captured_to - 1) if captured_to is not None else 0
        minutes, verdict = 0, COMPLETE
        if missing:
            since = hub.enqueued_at(partition.partition_id, missing[0][0]) or partition.last_enqueued_at or _EPOCH
            age = dt.datetime.now(dt.UTC).replace(tzinfo=None) - since
            minutes = max(0, age // dt.timedelta(minutes=1))
            verdict = IN_WINDOW if age <= window + WRITING else OVERDUE
            if verdict == OVERDUE and _waits(capture, names, hub, partition, known, since, window):
                verdict = NOT_INGESTED
        count, missing_from = sum(last - first + 1 for first, last in missing), missing[0][0] if missing else None
        return Completeness(partition, captured_to, count, missing_from, minutes, lost, restarted, LOST if lost else verdict)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(compare, state.partitions))


def _is_of(file: FileEntry, hub: EventHub) -> bool:
    """Whether the name of the file says that it is this hub's, or does not say."""
    namespace, _, name = file.hub.partition("/")
    return namespace.lower() in ("", hub.namespace.lower()) and name.lower() in ("", hub.name.lower())


def _spans(
    files: Sequence[FileEntry], names: NameFormat, state: HubState, partition: Partition, window: dt.timedelta
) -> tuple[list[tuple[int, int]], bool]:
    """The runs of sequence numbers of this hub that the files have, and whether there are files of an earlier one.

    A file is an earlier hub's when its window ended before this hub was created, or when files behind it begin to count again.
    """
    of_files = []
    restarted = False
    for file in files:
        parsed = names.parse(StoredObject(file.blob, file.etag, file.bytes, _EPOCH))
        if file.first_sequence_number is None or file.last_sequence_number is None or not parsed:
            continue
        if parsed.window_start + window <= state.created_at:
            restarted = True
        else:
            of_files.append((parsed.window_start, file.first_sequence_number, list(_runs(file))))
    spans: list[tuple[int, int]] = []
    before = -1
    for _, first, runs in sorted(of_files):
        if first < before:
            restarted, spans = True, []
        before = first
        spans += runs
    if any(last > partition.last for _, last in spans):
        restarted, spans = True, []
    return sorted(spans), restarted


def _runs(file: FileEntry) -> Iterator[tuple[int, int]]:
    first = file.first_sequence_number or 0
    for missing_from, missing_to in file.gaps:
        yield first, missing_from - 1
        first = missing_to + 1
    yield first, file.last_sequence_number or 0


def _missing(spans: Iterable[tuple[int, int]], partition: Partition) -> Iterator[tuple[int, int]]:
    expected = partition.first
    for first, last in spans:
        if first > expected:
            yield expected, first - 1
        expected = max(expected, last + 1)
    if expected <= partition.last:
        yield expected, partition.last


def _waits(
    capture: ObjectStore,
    names: NameFormat,
    hub: EventHub,
    partition: Partition,
    known: set[tuple[str, str]],
    since: dt.datetime,
    window: dt.timedelta,
) -> bool:
    """Whether a file that can hold an event enqueued at that time is there and was not read yet."""
    return any(
        (file.object.name, file.object.etag) not in known
        and file.partition_id == partition.partition_id
        and since - window < file.window_start <= since
        and file.namespace.lower() in ("", hub.namespace.lower())
        and file.event_hub.lower() in ("", hub.name.lower())
        for file in names.files(capture, (since - window).date(), since.date())
    )
