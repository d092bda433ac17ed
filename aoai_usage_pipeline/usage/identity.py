"""Requests seen on more than one usage date: on which of them each one counts.

Copies of a request carry the same event time and meet on one usage date, so almost always there is nothing to do. Where they do not
meet (a copy whose time was unreadable, a producer that stamped it anew), the request counts on its canonical copy's date only. Which
requests those are is found from the request indexes of all capture dates and kept in one object of the lake, which can be rebuilt at any
time from the manifests.
"""

import datetime as dt
import json
from collections.abc import Sequence

from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.manifest import Manifest, Manifests, events_by_usage_date
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore

_NAME = "request_dates.json"

CANONICAL_ORDER = """(prompt_tokens IS NULL AND completion_tokens IS NULL), enqueued_at, namespace, event_hub,
    TRY_CAST(partition_id AS BIGINT), partition_id, sequence_number, blob"""
"""How copies of a request are ranked, best first: with usage, then earliest accepted by the hub, then by coordinates."""

USAGE_VALUES = """struct_pack(prompt_tokens, cached_tokens, cache_write_tokens, audio_prompt_tokens, completion_tokens,
    audio_completion_tokens, reasoning_tokens, total_tokens)"""
"""What copies of a request must agree on."""


class RequestDates:
    """The requests of a lake that were seen on several usage dates."""

    def __init__(self, lake: ObjectStore, manifests: Manifests) -> None:
        self._lake, self._manifests = lake, manifests

    def moved(self) -> dict[dt.date, dict[str, list[object]]]:
        """By usage date, each request with copies there and elsewhere: [the date it counts on, copies in all, whether they conflict]."""
        while True:
            try:
                content, etag = self._lake.read(_NAME)
                stored = json.loads(content)
            except NotFound:
                stored, etag = {"covers": None, "requests": {}, "indexes": []}, None
            manifests = self._manifests.all()
            indexes = sorted(manifest.requests for manifest in manifests if manifest.requests)
            if stored["covers"] != engine.digest(indexes):
                suspects = [name for name in indexes if name not in set(stored["indexes"])]
                stored = {
                    "covers": engine.digest(indexes),
                    "indexes": indexes,
                    "requests": self._find(manifests, indexes, suspects, stored["requests"]),
                }
                try:
                    self._lake.write(_NAME, json.dumps(stored).encode(), replacing=etag)
                except Changed:
                    continue
            found: dict[dt.date, dict[str, list[object]]] = {}
            for request_id, (dates, *rest) in stored["requests"].items():
                for date in dates:
                    found.setdefault(dt.date.fromisoformat(date), {})[request_id] = rest
            return found

    def _find(self, manifests: list[Manifest], indexes: Sequence[str], new: Sequence[str], known: dict[str, object]) -> dict[str, list[object]]:
        """Requests with several usage dates: only ids in new indexes, or known already, can be."""
        if not new and not known:
            return {}
        with engine.connect(self._lake.staging()) as db:
            everything = engine.read_parquet(self._lake.local_paths(indexes))
            recent = engine.read_parquet(self._lake.local_paths(new)) if new else f"(SELECT * FROM {everything} WHERE false)"
            db.execute("CREATE TABLE known (request_hash UBIGINT)")
            if known:
                ids = ", ".join(f"(md5_number_lower({engine.literal(request_id)}))" for request_id in known)
                db.execute(f"INSERT INTO known VALUES {ids}")
            db.execute(
                f"""CREATE TABLE several AS SELECT request_hash, list(DISTINCT usage_date) AS dates FROM {everything}
                WHERE request_hash IN (SELECT request_hash FROM {recent} UNION SELECT request_hash FROM known)
                GROUP BY request_hash HAVING min(usage_date) <> max(usage_date)"""
            )
            days = {day for (day,) in db.execute("SELECT DISTINCT unnest(dates) FROM several").fetchall()}
            if not days:
                return {}
            by_day = events_by_usage_date(manifests)
            names = sorted({segment.name for day in days for segment in by_day.get(day, [])})
            rows = db.execute(
                f"""SELECT request_id, list_sort(list(DISTINCT CAST(usage_date AS VARCHAR))),
                CAST(first(usage_date ORDER BY {CANONICAL_ORDER}) AS VARCHAR), count(*),
                count(DISTINCT {USAGE_VALUES}) FILTER (prompt_tokens IS NOT NULL OR completion_tokens IS NOT NULL) > 1
                FROM {engine.read_parquet(self._lake.local_paths(names))}
                WHERE reason IS NULL AND md5_number_lower(request_id) IN (SELECT request_hash FROM several)
                GROUP BY request_id HAVING min(usage_date) <> max(usage_date) ORDER BY request_id"""
            ).fetchall()
            return {request_id: list(rest) for request_id, *rest in rows}
