"""A local folder as an object store."""

import contextlib
import datetime as dt
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from aoai_usage_pipeline.storage.store import Changed, NotFound, StorageError, StoredObject

_STALE_STAGING_SECONDS = 24 * 3600


class FolderStore:
    """Objects are files; a replacement is a rename, and conditional writes are serialised by a lock file of the folder."""

    def __init__(self, path: str, *, create: bool) -> None:
        self.root = Path(path).absolute()
        self.url = str(self.root)
        self._prefix = f"{self.root}{os.sep}"
        self._staging: Path | None = None
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        elif not self.root.is_dir():
            raise StorageError(f"folder {self.root} does not exist")

    def objects(self, prefix: str = "") -> Iterator[StoredObject]:
        folders = [prefix]
        while folders:
            below, objects = self.children(folders.pop())
            folders.extend(below)
            yield from objects

    def children(self, prefix: str = "") -> tuple[list[str], list[StoredObject]]:
        folders: list[str] = []
        objects: list[StoredObject] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(f"{prefix}{entry.name}/")
                    continue
                # a file that is renamed away while we look is simply not there any more
                with contextlib.suppress(FileNotFoundError):
                    objects.append(_describe(f"{prefix}{entry.name}", entry.stat()))
        return folders, objects

    def read(self, name: str) -> tuple[bytes, str]:
        try:
            with open(f"{self._prefix}{name}", "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                content = os.read(file.fileno(), stat.st_size + 1)
                # a read may give less than it is asked for
                while more := len(content) < stat.st_size and os.read(file.fileno(), stat.st_size):
                    content += more
                etag = _etag(stat)
                if _etag(os.fstat(file.fileno())) != etag:
                    raise Changed(f"{self.root / name} was written while it was read")
                return content, etag
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{self.root / name} does not exist") from None

    def tail(self, name: str, size: int) -> tuple[bytes, str]:
        try:
            with open(self.root / name, "rb") as file:
                stat = os.fstat(file.fileno())
                file.seek(max(0, stat.st_size - size))
                return file.read(), _etag(stat)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{self.root / name} does not exist") from None

    def etag(self, name: str) -> str | None:
        try:
            return _etag(os.stat(f"{self._prefix}{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes | Path, *, replacing: str | None) -> str:
        target = f"{self._prefix}{name}"
        staged = content if isinstance(content, Path) else self.staging() / uuid.uuid4().hex
        if isinstance(content, bytes):
            staged.write_bytes(content)
        with open(self.root / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.etag(name) != replacing:
                staged.unlink()
                raise Changed(f"{target} was replaced by another run")
            try:
                os.replace(staged, target)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(staged, target)
            return _etag(os.stat(target))

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def staging(self) -> Path:
        if self._staging is None:
            self._staging = self.root / ".staging"
            self._staging.mkdir(exist_ok=True)
        return self._staging

    def collect_staging(self) -> None:
        """Remove what killed runs left in the staging folder, once it is old enough to belong to no running one."""
        for entry in self.staging().iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > _STALE_STAGING_SECONDS:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def local_paths(self, names: Iterable[str]) -> list[str]:
        paths = [str(self.root / name) for name in names]
        for path in paths:
            if not os.path.exists(path):
                raise NotFound(f"{path} does not exist")
        return paths


def _etag(stat: os.stat_result) -> str:
    # the inode tells two replacements apart that fall into one tick of the file system's clock
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"


def _describe(name: str, stat: os.stat_result) -> StoredObject:
    return StoredObject(name, _etag(stat), stat.st_size, dt.datetime.fromtimestamp(stat.st_mtime, dt.UTC))
