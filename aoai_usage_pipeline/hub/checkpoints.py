"""How far a hub was drained: per partition the last event whose capture file is written, beside the capture files.

In a Blob container it is the SDK's own checkpoint store, so that other tools can read the lag from it; in a folder, files with the same names.
"""

import dataclasses
import datetime as dt
import json
from typing import Protocol

from aoai_usage_pipeline.hub.client import EventHub
from aoai_usage_pipeline.storage import ObjectStore, open_store


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last event that was drained. `saved_at` is UTC."""

    sequence_number: int
    saved_at: dt.datetime


class Checkpoints(Protocol):
    """The checkpoints of one hub and consumer group."""

    def load(self) -> dict[str, Checkpoint]:
        """Those there are, by partition."""

    def save(self, partition_id: str, sequence_number: int, offset: str) -> None:
        """Everything up to this event is in capture files."""


def open_checkpoints(hub: EventHub, capture_url: str, connection_string: str | None) -> Checkpoints:
    """The checkpoints at the root of the capture folder or container."""
    if capture_url.startswith(("http://", "https://")):
        return _BlobCheckpoints(hub, capture_url, connection_string)
    return _FolderCheckpoints(hub, open_store(capture_url, create=True))


def _prefix(hub: EventHub) -> str:
    return f"{hub.host}/{hub.name}/{hub.consumer_group}/checkpoint/".lower()


class _FolderCheckpoints:
    def __init__(self, hub: EventHub, store: ObjectStore) -> None:
        self._prefix, self._store = _prefix(hub), store

    def load(self) -> dict[str, Checkpoint]:
        found = {}
        for stored in self._store.children(self._prefix)[1]:
            number = json.loads(self._store.read(stored.name)[0])["sequencenumber"]
            found[stored.name.removeprefix(self._prefix)] = Checkpoint(number, stored.modified.replace(tzinfo=None))
        return found

    def save(self, partition_id: str, sequence_number: int, offset: str) -> None:
        name = self._prefix + partition_id
        content = json.dumps({"sequencenumber": sequence_number, "offset": offset}).encode()
        self._store.write(name, content, replacing=self._store.etag(name))


class _BlobCheckpoints:
    def __init__(self, hub: EventHub, capture_url: str, connection_string: str | None) -> None:
        from azure.eventhub.extensions.checkpointstoreblob import BlobCheckpointStore

        from aoai_usage_pipeline.storage.blob import is_azure, split

        account_url, container, _ = split(capture_url)
        self._hub, self._root = hub, open_store(f"{account_url}/{container}", connection_string, create=True)
        if is_azure(account_url):
            from azure.identity import DefaultAzureCredential

            self._store = BlobCheckpointStore(account_url, container, credential=DefaultAzureCredential())
        else:
            self._store = BlobCheckpointStore.from_connection_string(connection_string or "", container)

    def load(self) -> dict[str, Checkpoint]:
        prefix = _prefix(self._hub)
        numbers = {
            checkpoint["partition_id"]: checkpoint["sequence_number"]
            for checkpoint in self._store.list_checkpoints(self._hub.host, self._hub.name, self._hub.consumer_group)
        }
        saved = {stored.name.removeprefix(prefix): stored.modified for stored in self._root.children(prefix)[1]}
        return {
            partition_id: Checkpoint(number, saved[partition_id].astimezone(dt.UTC).replace(tzinfo=None))
            for partition_id, number in numbers.items()
            if partition_id in saved
        }

    def save(self, partition_id: str, sequence_number: int, offset: str) -> None:
        self._store.update_checkpoint(
            {
                "fully_qualified_namespace": self._hub.host, "eventhub_name": self._hub.name, "consumer_group": self._hub.consumer_group,
                "partition_id": partition_id, "sequence_number": sequence_number, "offset": offset,
            }
        )  # fmt: skip
