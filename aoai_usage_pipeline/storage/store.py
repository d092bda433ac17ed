"""The interface both stores share, and the one place that chooses between them."""

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol


class StorageError(Exception):
    """The store cannot be used as configured; the message says which one and why."""


class NotFound(StorageError):
    """No object of that name."""


class Changed(StorageError):
    """A conditional write found another version than the one it was to replace."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as a listing shows it. `etag` changes whenever the content is replaced."""

    name: str
    etag: str
    size: int
    modified: dt.datetime


class ObjectStore(Protocol):
    """Named objects that are replaced as a whole. Names use `/`; a prefix is a plain string prefix ending in `/` or empty."""

    url: str

    def objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """Every object whose name starts with `prefix`, in no particular order."""

    def children(self, prefix: str = "") -> tuple[list[str], list[StoredObject]]:
        """What lies directly below `prefix`: folder prefixes (ending in `/`) and objects."""

    def read(self, name: str) -> tuple[bytes, str]:
        """Content and the ETag of exactly that content. Raises `NotFound`."""

    def tail(self, name: str, size: int) -> tuple[bytes, str]:
        """The last `size` bytes, or all there are, and the ETag. Raises `NotFound`."""

    def etag(self, name: str) -> str | None:
        """The object's current ETag, or None when there is no such object."""

    def write(self, name: str, content: bytes | Path, *, replacing: str | None) -> str:
        """Write the whole object if its ETag is still `replacing` (None: it must not exist). Returns the new ETag.

        A `Path` hands over a finished local file, which is gone afterwards. Raises `Changed`.
        """

    def delete(self, name: str) -> None:
        """Remove the object; no error when it is already gone."""

    def staging(self) -> Path:
        """A local folder for files to be handed to `write`."""

    def local_paths(self, names: Iterable[str]) -> list[str]:
        """Paths of local files with the objects' content, for engines that read files. Raises `NotFound`."""


def open_store(url: str, connection_string: str | None = None, *, create: bool) -> ObjectStore:
    """The store behind `url`: a folder, or the http(s) URL of a Blob container with an optional folder below it.

    `create` makes a missing folder or container, for what we write; otherwise its absence raises `StorageError`.
    """
    if url.startswith(("http://", "https://")):
        from aoai_usage_pipeline.storage.blob import BlobStore

        return BlobStore(url, connection_string, create=create)
    from aoai_usage_pipeline.storage.folder import FolderStore

    return FolderStore(url.removeprefix("file://"), create=create)
