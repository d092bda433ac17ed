"""Days that are held: why a day could not be made, kept until it succeeds."""

import contextlib
import datetime as dt
import json
from pathlib import Path

from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore


class Held:
    """The held days of one table. They live in the lake, so that a later step, run or person can name them."""

    def __init__(self, lake: ObjectStore, table: str) -> None:
        self._lake, self._table = lake, table

    def hold(self, date: dt.date, reason: str, input_digest: str) -> None:
        """Remember why the day was held, and for which input."""
        content = json.dumps({"reason": reason, "input": input_digest}).encode()
        # where two runs hold the same day at once, either one's reason will do
        with contextlib.suppress(Changed):
            self._lake.write(self._name(date), content, replacing=self._lake.etag(self._name(date)))

    def release(self, date: dt.date) -> None:
        """The day was made after all."""
        self._lake.delete(self._name(date))

    def reasons(self) -> dict[dt.date, str]:
        """Every held day of the table with its reason."""
        found: dict[dt.date, str] = {}
        for stored in self._lake.objects(f"held/{self._table}/"):
            try:
                content, _ = self._lake.read(stored.name)
            except NotFound:
                continue
            try:
                reason = json.loads(content)["reason"]
            except (ValueError, KeyError, TypeError):
                reason = f"unknown: {stored.name} is damaged"
            found[dt.date.fromisoformat(Path(stored.name).stem)] = reason
        return dict(sorted(found.items()))

    def _name(self, date: dt.date) -> str:
        return f"held/{self._table}/{date}.json"
