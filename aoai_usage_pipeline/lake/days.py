"""Tables kept as one Parquet object per usage date, replaced as a whole; the footer says what a day was made from."""

import datetime as dt
import io
import json
from pathlib import Path

import pyarrow.parquet

from aoai_usage_pipeline.storage import NotFound, ObjectStore

_FOOTER_KEY = "aoai_usage"
_TAIL_BYTES = 256 * 1024


class Days:
    """One table's day objects."""

    def __init__(self, lake: ObjectStore, table: str) -> None:
        self._lake, self.table = lake, table
        self._footers: dict[str, tuple[str, dict[str, object]]] = {}

    def name(self, day: dt.date) -> str:
        """The object's name in the lake."""
        return f"{self.table}/usage_date={day}/data.parquet"

    def existing(self) -> list[dt.date]:
        """The days that have an object, sorted."""
        return sorted(self.footers())

    def footers(self) -> dict[dt.date, tuple[dict[str, object], str]]:
        """`footer` of every day that has an object, for the price of one listing and the objects that changed since the last one."""
        return {day: footer for day, etag in self.etags().items() if (footer := self._read(self.name(day), etag))}

    def etags(self) -> dict[dt.date, str]:
        """The ETag of every day that has an object, for the price of one listing."""
        found = {}
        for stored in self._lake.objects(f"{self.table}/"):
            try:
                day = dt.date.fromisoformat(stored.name.split("/")[1].removeprefix("usage_date="))
            except ValueError:
                continue  # somebody else's file
            if stored.name == self.name(day):
                found[day] = stored.etag
        return found

    def footer(self, day: dt.date) -> tuple[dict[str, object], str | None]:
        """What the day's object says it was made from, and its ETag; an empty dict and None where there is no object."""
        etag = self._lake.etag(self.name(day))
        return (etag and self._read(self.name(day), etag)) or ({}, None)

    def _read(self, name: str, etag: str) -> tuple[dict[str, object], str] | None:
        if self._footers.get(name, ("", {}))[0] != etag:
            try:
                content, etag = self._lake.tail(name, _TAIL_BYTES)
            except NotFound:
                return None
            try:
                parquet = pyarrow.parquet.read_metadata(io.BytesIO(content))
                stored = json.loads((parquet.metadata or {}).get(_FOOTER_KEY.encode(), b"{}"))
                self._footers[name] = (etag, {**stored, "rows": parquet.num_rows})
            except pyarrow.ArrowInvalid:
                # a damaged object is made from nothing we know, so it is made again
                self._footers[name] = (etag, {"rows": 0})
        etag, footer = self._footers[name]
        return footer, etag

    def rows(self, day: dt.date) -> int:
        """How many rows the day's object has; 0 where there is none."""
        return int(str(self.footer(day)[0].get("rows", 0)))

    def paths(self, days: list[dt.date]) -> list[str]:
        """Local paths of the days' objects, without the days that have none."""
        existing = self.footers() if len(days) > 1 else {day: True for day in days if self._lake.etag(self.name(day))}
        return self._lake.local_paths([self.name(day) for day in days if day in existing])

    def replace(self, day: dt.date, staged: Path, *, replacing: str | None) -> None:
        """Put a finished local file in the day's place. Raises `Changed` when another run was faster."""
        self._lake.write(self.name(day), staged, replacing=replacing)

    def delete(self, day: dt.date) -> None:
        """Take the day's object away, so that the day is made again."""
        self._lake.delete(self.name(day))


def footer_metadata(footer: dict[str, object]) -> dict[str, str]:
    """The Parquet key-value metadata that `Days.footer` reads back."""
    return {_FOOTER_KEY: json.dumps(footer, sort_keys=True, default=str)}
