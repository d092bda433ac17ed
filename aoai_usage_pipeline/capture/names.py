"""Blob names of capture files: the hub's `archiveNameFormat`, read backwards, and how to list a range of days by it."""

import dataclasses
import datetime as dt
import functools
import re
from collections.abc import Iterator

from aoai_usage_pipeline.dates import days_between
from aoai_usage_pipeline.storage import ObjectStore, StoredObject

_TOKENS = {
    "Namespace": r"[A-Za-z0-9-]+",
    "EventHub": r"[^/]+",
    "PartitionId": r"[^/]+?",
    "Year": r"\d{4}",
    "Month": r"\d{2}",
    "Day": r"\d{2}",
    "Hour": r"\d{2}",
    "Minute": r"\d{2}",
    "Second": r"\d{2}",
}
_DATE_TOKENS = {"Year": "%Y", "Month": "%m", "Day": "%d"}
_MAX_PREFIXES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class CaptureFile:
    """One capture file as its name tells it. `window_start` is when Capture opened the window, UTC."""

    object: StoredObject
    namespace: str
    event_hub: str
    partition_id: str
    window_start: dt.datetime

    @property
    def capture_date(self) -> dt.date:
        return self.window_start.date()


class NameFormat:
    """An `archiveNameFormat`; raises ValueError for one that does not name every minute of every partition."""

    def __init__(self, text: str) -> None:
        self.text = text.strip("/").removesuffix(".avro")
        used = set(re.findall(r"\{(\w+)\}", self.text))
        unknown, missing = used - set(_TOKENS), {"PartitionId", "Year", "Month", "Day", "Hour", "Minute"} - used
        if unknown or missing:
            faults = [f"unknown {{{t}}}" for t in sorted(unknown)] + [f"missing {{{t}}}" for t in sorted(missing)]
            raise ValueError(f"AOAI_CAPTURE_NAME_FORMAT is {text!r}: {', '.join(faults)}")
        self._levels = (self.text + ".avro").split("/")
        self._pattern = re.compile(_regex(self.text + ".avro"))

    def parse(self, stored: StoredObject) -> CaptureFile | None:
        """What the name says, or None for a blob that is not one of this hub's capture files."""
        match = self._pattern.fullmatch(stored.name)
        if not match:
            return None
        found = match.groupdict()
        try:
            numbers = (int(found.get(t) or 0) for t in ("Year", "Month", "Day", "Hour", "Minute", "Second"))
            start = dt.datetime(*numbers)  # type: ignore[arg-type,misc]
        except ValueError:
            return None
        return CaptureFile(stored, found.get("Namespace") or "", found.get("EventHub") or "", found["PartitionId"], start)

    def name(self, namespace: str, event_hub: str, partition_id: str, window_start: dt.datetime) -> str:
        """The blob name Capture would give to a window's file."""
        values = {"Namespace": namespace, "EventHub": event_hub, "PartitionId": partition_id}
        values |= {t: window_start.strftime(f) for t, f in (_DATE_TOKENS | {"Hour": "%H", "Minute": "%M", "Second": "%S"}).items()}
        return re.sub(r"\{(\w+)\}", lambda m: values[m.group(1)], self.text) + ".avro"

    def files(self, store: ObjectStore, first: dt.date, last: dt.date) -> Iterator[CaptureFile]:
        """Every capture file whose window starts on a day from `first` to `last`, both included.

        Lists no more of the container than the format forces it to: below a literal date it looks only there.
        """
        for stored in self._below(store, "", 0, first, last):
            file = self.parse(stored)
            if file and first <= file.capture_date <= last:
                yield file

    def _below(self, store: ObjectStore, prefix: str, level: int, first: dt.date, last: dt.date) -> Iterator[StoredObject]:
        template = self._levels[level]
        done = "/".join(self._levels[:level])
        if all(f"{{{token}}}" in done for token in _DATE_TOKENS):
            yield from store.objects(prefix)
            return
        if level == len(self._levels) - 1:
            yield from store.children(prefix)[1]
            return
        if set(re.findall(r"\{(\w+)\}", template)) <= set(_DATE_TOKENS):
            found = re.compile(_regex(done + "/" if done else "")).fullmatch(prefix)
            fixed = tuple((token, value) for token, value in found.groupdict().items() if token in _DATE_TOKENS) if found else ()
            names = _date_names(template, fixed, first, last)
            if len(names) > _MAX_PREFIXES and "{Day}" in template:
                yield from store.objects(prefix)
                return
            for name in names:
                yield from self._below(store, f"{prefix}{name}/", level + 1, first, last)
            return
        pattern = re.compile(_regex(done + "/" + template if done else template) + "/")
        for folder in store.children(prefix)[0]:
            if pattern.fullmatch(folder):
                yield from self._below(store, folder, level + 1, first, last)


@functools.lru_cache(maxsize=4096)
def _date_names(template: str, fixed: tuple[tuple[str, str], ...], first: dt.date, last: dt.date) -> list[str]:
    """What a part of the name that holds only date tokens can be on the days from `first` to `last` that agree with the `fixed` tokens."""
    days = (day for day in days_between(first, last) if all(day.strftime(_DATE_TOKENS[token]) == value for token, value in fixed))
    return sorted({re.sub(r"\{(\w+)\}", lambda m, day=day: day.strftime(_DATE_TOKENS[m.group(1)]), template) for day in days})


@functools.lru_cache(maxsize=256)
def _regex(template: str) -> str:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        token = match.group(1)
        if token in seen:
            return f"(?P={token})"
        seen.add(token)
        return f"(?P<{token}>{_TOKENS[token]})"

    return re.sub(r"\\\{(\w+)\\\}", group, re.escape(template))
