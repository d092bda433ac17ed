"""Reading a hub's new events into capture files, as Capture would write them.

An event's file follows from the event alone: its partition and the five minutes it was enqueued in. A file that is there already is completed,
never replaced by less, and its bytes follow from its events. So whatever was drained before and is drained again, because the drain was killed
between a file and its checkpoint, or because two drains ran at once, ends up in the same file with the same bytes: nothing is lost, nothing is
there twice, and a file that lacks nothing is not touched.
"""

import concurrent.futures
import dataclasses
import datetime as dt
import uuid
from collections.abc import Callable

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import NameFormat
from aoai_usage_pipeline.hub.checkpoints import Checkpoints
from aoai_usage_pipeline.hub.client import AT_ONCE, EventHub, HubError, HubState, Partition, Record
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore

WINDOW = dt.timedelta(minutes=5)
_EPOCH = dt.datetime(1970, 1, 1)
_FLUSH_BYTES = 32 * 2**20
_FLUSH_EVENTS = 50_000


@dataclasses.dataclass(slots=True)
class Drained:
    """What draining one partition did. `lost` events left the hub before they were drained. `restarted`: the checkpoint was another hub's."""

    partition_id: str
    events: int = 0
    files: int = 0
    last_sequence_number: int | None = None
    lost: int = 0
    restarted: bool = False


def drain(hub: EventHub, store: ObjectStore, names: NameFormat, checkpoints: Checkpoints, progress: Callable[[int, int, str], None]) -> list[Drained]:
    """Write what each partition holds now and was not drained yet. Raises `HubError`, `TakenOver`; what was written until then stays."""
    state, known = hub.state(), checkpoints.load()

    def run(partition: Partition) -> Drained:
        at, restarted = None, False
        if checkpoint := known.get(partition.partition_id):
            restarted = _is_of_another_hub(checkpoint.sequence_number, checkpoint.saved_at, state, partition)
            at = None if restarted else checkpoint.sequence_number
        return _Draining(hub, store, names, checkpoints, partition, at, restarted).run()

    done = []
    # when one partition fails, the others are drained all the same
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for one in pool.map(run, state.partitions):
            done.append(one)
            progress(len(done), len(state.partitions), f"drained partition {one.partition_id}: {one.events} events")
    return done


def _is_of_another_hub(number: int, saved_at: dt.datetime, state: HubState, partition: Partition) -> bool:
    """A hub that was deleted and created again begins to count again."""
    return number > partition.last or saved_at < state.created_at


class _Draining:
    """One partition being drained from behind a sequence number; None is from the first event."""

    def __init__(
        self,
        hub: EventHub,
        store: ObjectStore,
        names: NameFormat,
        checkpoints: Checkpoints,
        partition: Partition,
        after: int | None,
        restarted: bool,
    ) -> None:
        self._hub, self._store, self._names, self._checkpoints, self._partition, self._after = hub, store, names, checkpoints, partition, after
        lost = 0 if after is None else max(0, partition.first - after - 1)
        self._done = Drained(partition.partition_id, last_sequence_number=after, lost=lost, restarted=restarted)
        self._waiting: list[Record] = []
        self._bytes = 0

    def run(self) -> Drained:
        first = self._partition.first if self._after is None else max(self._partition.first, self._after + 1)
        if first <= self._partition.last:
            self._hub.receive(self._partition.partition_id, self._after, self._partition.last, self._take)
            self._flush()
        return self._done

    def _take(self, records: list[Record]) -> None:
        self._waiting += records
        self._bytes += sum(len(record["Body"] or b"") for record in records)
        if self._bytes > _FLUSH_BYTES or len(self._waiting) > _FLUSH_EVENTS:
            self._flush()

    def _flush(self) -> None:
        """Write what is waiting, and only then say that it is written."""
        windows: dict[dt.datetime, list[Record]] = {}
        for record in self._waiting:
            enqueued_at = _EPOCH + dt.timedelta(milliseconds=record["SystemProperties"]["x-opt-enqueued-time"])
            windows.setdefault(enqueued_at - (enqueued_at - _EPOCH) % WINDOW, []).append(record)
        for window_start, records in sorted(windows.items()):
            name = self._names.name(self._hub.namespace, self._hub.name, self._partition.partition_id, window_start)
            self._done.files += complete(self._store, name, records)
        if self._waiting:
            last = self._waiting[-1]
            self._checkpoints.save(self._partition.partition_id, last["SequenceNumber"], last["Offset"])
            self._done.events += len(self._waiting)
            self._done.last_sequence_number = last["SequenceNumber"]
        self._waiting, self._bytes = [], 0


def complete(store: ObjectStore, name: str, records: list[Record]) -> bool:
    """Add to a capture file what it lacks of the records; whether it lacked any. Raises `HubError` when the file that is there cannot be read."""
    while True:
        before: list[Record] = []
        etag = None
        try:
            content, etag = store.read(name)
            before = avro.records(content)
        except NotFound:
            pass
        except Changed:
            continue
        except avro.Unreadable as error:
            raise HubError(f"{store.url}/{name} is in the way of the same events drained again: {error}") from error
        found = {_identity(record): record for record in [*records, *before]}
        if len(found) == len(before):
            return False
        together = sorted(found.values(), key=lambda record: record["SequenceNumber"])
        try:
            store.write(name, avro.write(together, sync_marker=uuid.uuid5(uuid.NAMESPACE_URL, name).bytes), replacing=etag)
            return True
        except Changed:
            continue


def _identity(record: Record) -> tuple[int, str, str]:
    # a hub that was created again gives the same numbers, but not at the same time
    return record["SequenceNumber"], record["Offset"], record["EnqueuedTimeUtc"]
