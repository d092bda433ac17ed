"""Which version of each day a container of Cosmos DB was made equal to, remembered in the lake.

A mark is left after its day was published, so it never claims too much: a run that dies in between costs reading the day once more.
"""

import datetime as dt
import json
from collections.abc import Mapping

from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore


class Marks:
    """The marks of one container. They count for `container` only, which says which one it is: those of a container that was created again, or
    that other code made the documents of, are void.
    """

    def __init__(self, lake: ObjectStore, name: str, container: str) -> None:
        self._lake, self._name, self.container = lake, f"published/{name}.json", container

    def days(self) -> dict[dt.date, str]:
        """The ETag that each day had in the lake when it was published last."""
        return self._read()[0]

    def leave(self, etags: Mapping[dt.date, str | None]) -> None:
        """Remember what was published; None is a day that the lake has not."""
        while etags:
            days, replacing = self._read()
            merged = {day: etag for day, etag in {**days, **etags}.items() if etag}
            content = json.dumps({"container": self.container, "days": {str(day): etag for day, etag in sorted(merged.items())}})
            try:
                self._lake.write(self._name, content.encode(), replacing=replacing)
                return
            except Changed:
                continue  # another run left its marks

    def _read(self) -> tuple[dict[dt.date, str], str | None]:
        while True:
            try:
                content, etag = self._lake.read(self._name)
                break
            except NotFound:
                return {}, None
            except Changed:
                continue
        try:
            stored = json.loads(content)
            days = {dt.date.fromisoformat(day): str(found) for day, found in stored["days"].items()}
            return days if stored["container"] == self.container else {}, etag
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}, etag  # damaged marks claim nothing
