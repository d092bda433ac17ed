"""Every version of the reference data that was ever used to bill, kept in the lake, and which one was in use when.

`reference_versions/<version>.json` has the text of every file and the billing currency; `reference_versions.json` says from when on each
version was in use.
"""

import contextlib
import dataclasses
import datetime as dt
import json
import tempfile
from pathlib import Path

from aoai_usage_pipeline.reference.files import SPECS, Reference, ReferenceDataError, load
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore

_LOG = "reference_versions.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """A version, and since when it was in use (UTC, without a zone)."""

    version: str
    recorded_at: dt.datetime


class ReferenceVersions:
    """The versions of a lake."""

    def __init__(self, lake: ObjectStore) -> None:
        self._lake = lake

    def record(self, reference: Reference, folder: Path) -> None:
        """Note that `reference`, which was loaded from `folder`, is in use from now on; nothing happens when it is already.

        The text is written before the log names it, so a run that is killed in between changes nothing.
        Raises `ReferenceDataError` when the files were changed since they were loaded.
        """
        while True:
            log, etag = self._read()
            if log and log[-1].version == reference.version:
                return
            if self._lake.etag(_name(reference.version)) is None:
                self._keep(reference, folder)
            # the clock of another machine may be ahead of ours, but the log is in order
            now = max([dt.datetime.now(dt.UTC).replace(tzinfo=None), *(entry.recorded_at for entry in log[-1:])])
            content = json.dumps([dataclasses.asdict(entry) for entry in (*log, Recorded(reference.version, now))], default=str)
            with contextlib.suppress(Changed):
                self._lake.write(_LOG, content.encode(), replacing=etag)
                return

    def log(self) -> list[Recorded]:
        """Each time another version came into use, oldest first."""
        return self._read()[0]

    def at(self, moment: dt.datetime) -> Recorded | None:
        """The version that was in use at a moment (UTC), None when none was recorded yet."""
        return next((entry for entry in reversed(self.log()) if entry.recorded_at <= moment), None)

    def load(self, version: str) -> Reference | None:
        """The reference data of a version, validated like the files, None when it was never recorded. Raises `ReferenceDataError`."""
        try:
            content, _ = self._lake.read(_name(version))
        except NotFound:
            return None
        stored = json.loads(content)
        return _load(version, stored["files"], stored["billing_currency"])

    def _read(self) -> tuple[list[Recorded], str | None]:
        try:
            content, etag = self._lake.read(_LOG)
        except NotFound:
            return [], None
        return [Recorded(entry["version"], dt.datetime.fromisoformat(entry["recorded_at"])) for entry in json.loads(content)], etag

    def _keep(self, reference: Reference, folder: Path) -> None:
        texts = {spec.name: (folder / spec.name).read_bytes().decode("utf-8-sig") for spec in SPECS if (folder / spec.name).exists()}
        if _load(reference.version, texts, reference.billing_currency).version != reference.version:
            raise ReferenceDataError(f"folder {folder} was changed while it was read: run again")
        with contextlib.suppress(Changed):
            self._lake.write(
                _name(reference.version), json.dumps({"files": texts, "billing_currency": reference.billing_currency}).encode(), replacing=None
            )


def _name(version: str) -> str:
    return f"reference_versions/{version}.json"


def _load(version: str, texts: dict[str, str], billing_currency: str | None) -> Reference:
    with tempfile.TemporaryDirectory() as place:
        # faults name the folder, so it has the name of the version
        folder = Path(place) / version
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        return load(folder, billing_currency)
