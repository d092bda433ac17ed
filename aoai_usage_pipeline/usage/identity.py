"""Requests seen on more than one usage date: on which of them each one counts.

Copies of a request carry the same event time and meet on one usage date, so almost always there is nothing to do. Where they do not
meet (a copy whose time was unreadable, a producer that stamped it anew), the request counts on its canonical copy's date only. Which
requests those are is found from an index of hashed ids per capture date and kept in one object of the lake; all of it can be rebuilt at
any time from the segments.
"""

import contextlib
import datetime as dt
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.manifest import Manifest, Manifests, events_by_usage_date
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore
from aoai_usage_pipeline.usage.contract import COUNT_COLUMNS, TOOL_COLUMNS

_NAME = "request_dates.json"
_INDEX = "request_index/"

CANONICAL_ORDER = """CASE usage_source WHEN 'reported' THEN 0 WHEN 'estimated' THEN 1 ELSE 2 END,
    CASE part WHEN 'usage' THEN 1 WHEN 'identity' THEN 2 ELSE 0 END, CASE WHEN part = 'usage' THEN -total_tokens END, enqueued_at, namespace,
    event_hub, TRY_CAST(partition_id AS BIGINT), partition_id, sequence_number, record_index, blob"""
"""How copies of a request are ranked, best first: with usage, then earliest accepted by the hub, then by coordinates.

A gateway's own event has all that an answer reports and comes before the records that diagnostics split the call into; of these, the one with
all its tokens comes first and the one that only says who called last.
"""

COMPLETED = (
    "gateway",
    "subscription_id",
    "product",
    "application",
    "operation",
    "deployment",
    "reported_model",
    "reported_region",
    "service_tier",
    "status_code",
    "end_user",
    "details",
    "image_kind",
    *TOOL_COLUMNS,
)
"""What the canonical copy of a request takes from its other copies where it does not say it itself."""

_COUNTS = f"struct_pack({', '.join(COUNT_COLUMNS)}, audio_seconds)"
CONFLICT = f"""(count(DISTINCT {_COUNTS}) FILTER (usage_source = 'reported' AND part IS DISTINCT FROM 'usage') > 1
    OR count(DISTINCT {_COUNTS}) FILTER (usage_source = 'reported' AND part = 'usage') > 1
    OR count(DISTINCT struct_pack(prompt_tokens, completion_tokens)) FILTER (usage_source = 'reported') > 1)"""
"""Whether copies of a request disagree on what they report; diagnostics do not know the details that an answer has."""

_SPILLED = "json_extract_string(details, '$.spilloverTo') <> ''"


def completed(rank: str) -> str:
    """SQL: what the copies of a group say together, in the order of `rank`, and whether any of them says who called."""
    columns = {column: f"arg_min({column}, {rank})" for column in COMPLETED}
    # only a gateway's own event knows that a deployment passed the request on, and to which
    columns["deployment"] = f"coalesce(arg_min(deployment, {rank}) FILTER ({_SPILLED}), {columns['deployment']})"
    return f"{', '.join(f'{sql} AS {column}' for column, sql in columns.items())}, bool_or(part IS DISTINCT FROM 'usage') AS attributed"


class RequestDates:
    """The requests of a lake that were seen on several usage dates."""

    def __init__(self, lake: ObjectStore, manifests: Manifests) -> None:
        self._lake, self._manifests = lake, manifests

    def moved(self) -> dict[dt.date, dict[str, list[object]]]:
        """By usage date, each request with copies there and elsewhere: [the date it counts on, copies in all, whether they conflict, what
        they say together].
        """
        mended = False
        while True:
            stored, etag = {"covers": None, "requests": {}, "indexes": []}, None
            with contextlib.suppress(NotFound, json.JSONDecodeError):
                content, etag = self._lake.read(_NAME)
                stored = json.loads(content)
            manifests = {_index_name(manifest): manifest for manifest in self._manifests.all() if manifest.segments}
            if stored["covers"] != engine.digest(list(manifests)):
                with engine.connect(self._lake.staging()) as db:
                    manifests = self._write_indexes(db, manifests)
                    indexes = list(manifests)
                    known = stored["requests"]
                    try:
                        requests = self._find(db, list(manifests.values()), indexes, set(indexes) - set(stored["indexes"]), known)
                    except (duckdb.InvalidInputException, duckdb.IOException):
                        if mended:
                            raise
                        # an index is damaged: make all of them again
                        for name in indexes:
                            self._lake.delete(name)
                        mended = True
                        continue
                stored = {"covers": engine.digest(indexes), "indexes": indexes, "requests": requests}
                try:
                    self._lake.write(_NAME, json.dumps(stored).encode(), replacing=etag)
                except Changed:
                    continue
            found: dict[dt.date, dict[str, list[object]]] = {}
            for request_id, (dates, *rest) in stored["requests"].items():
                for date in dates:
                    found.setdefault(dt.date.fromisoformat(date), {})[request_id] = rest
            return found

    def _write_indexes(self, db: duckdb.DuckDBPyConnection, manifests: dict[str, Manifest]) -> dict[str, Manifest]:
        """Write the missing index of each capture date.

        Returns the manifests that have one: a capture date with a damaged segment has none until that is mended, and its days are held.
        """
        existing = {stored.name for stored in self._lake.objects(_INDEX)}
        indexed = dict(manifests)
        for name, manifest in manifests.items():
            if name in existing:
                continue
            try:
                paths = self._lake.local_paths([segment.name for segment in manifest.segments])
                events = engine.read_parquet(paths, tables.empty_select(tables.RAW_EVENTS))
                select = f"SELECT hash(request_id) AS request_hash, usage_date FROM {events} WHERE reason IS NULL AND usage_date IS NOT NULL"
                staged = engine.stage(db, self._lake.staging(), select)
            except (duckdb.Error, NotFound):
                del indexed[name]
                continue
            _put_index(self._lake, manifest, staged)
        return indexed

    def _find(
        self, db: duckdb.DuckDBPyConnection, manifests: list[Manifest], indexes: list[str], new: set[str], known: dict[str, object]
    ) -> dict[str, list[object]]:
        """Requests with several usage dates: only ids in new indexes, or known already, can be."""
        if not new and not known:
            return {}
        paths = dict(zip(indexes, self._lake.local_paths(indexes), strict=True))
        suspects = ""
        if len(new) < len(indexes):
            recent = f"SELECT request_hash FROM {engine.read_parquet([paths[name] for name in sorted(new)])}" if new else "SELECT NULL WHERE false"
            ids = ", ".join(engine.literal(request_id) for request_id in known)
            suspects = f"WHERE request_hash IN ({recent} UNION ALL SELECT hash(unnest([{ids}]::VARCHAR[])))"
        index = engine.read_parquet(list(paths.values()))
        db.execute(
            f"""CREATE TABLE several AS SELECT request_hash FROM {index} {suspects}
            GROUP BY request_hash HAVING min(usage_date) <> max(usage_date)"""
        )
        dates = f"SELECT DISTINCT usage_date FROM {index} WHERE request_hash IN (SELECT request_hash FROM several)"
        days = {day for (day,) in db.execute(dates).fetchall()}
        if not days:
            return {}
        by_day = events_by_usage_date(manifests)
        names = sorted({segment.name for day in days for segment in by_day.get(day, [])})
        source = engine.read_parquet(self._lake.local_paths(names), tables.empty_select(tables.RAW_EVENTS))
        rows = db.execute(
            f"""WITH ranked AS (
                SELECT *, row_number() OVER (PARTITION BY request_id ORDER BY {CANONICAL_ORDER}) AS rank FROM {source}
                WHERE reason IS NULL AND usage_date IS NOT NULL AND hash(request_id) IN (SELECT request_hash FROM several)
            ), together AS (
                SELECT request_id, list_sort(list(DISTINCT CAST(usage_date AS VARCHAR))) AS dates,
                CAST(arg_min(usage_date, rank) AS VARCHAR) AS counts_on, count(*) AS copies, {CONFLICT} AS conflict, {completed("rank")}
                FROM ranked GROUP BY request_id HAVING min(usage_date) <> max(usage_date)
            )
            SELECT request_id, dates, counts_on, copies, conflict, {", ".join(COMPLETED)}, attributed FROM together ORDER BY request_id"""
        ).fetchall()
        return {request_id: list(rest) for request_id, *rest in rows}


def shared_dates(lake: ObjectStore, manifests: Manifests, days: Sequence[dt.date]) -> set[dt.date]:
    """The usage dates of all copies of the requests that have one on these days, the days themselves among them. Writes nothing."""
    with_events = [manifest for manifest in manifests.all() if manifest.segments]
    existing = {stored.name for stored in lake.objects(_INDEX)}
    indexes = [name for manifest in with_events if (name := _index_name(manifest)) in existing]
    others = [segment.name for manifest in with_events if _index_name(manifest) not in existing for segment in manifest.segments]
    sources = [f"SELECT request_hash, usage_date FROM {engine.read_parquet(lake.local_paths(indexes))}"] if indexes else []
    if others:
        events = engine.read_parquet(lake.local_paths(others), tables.empty_select(tables.RAW_EVENTS))
        sources.append(f"SELECT hash(request_id) AS request_hash, usage_date FROM {events} WHERE reason IS NULL AND usage_date IS NOT NULL")
    if not sources or not days:
        return set(days)
    with engine.connect(lake.staging()) as db:
        db.execute(f"CREATE VIEW requests AS {' UNION ALL '.join(sources)}")
        wanted = ", ".join(f"DATE '{day}'" for day in days)
        mine = f"SELECT request_hash FROM requests WHERE usage_date IN ({wanted})"
        found = db.execute(f"SELECT DISTINCT usage_date FROM requests WHERE request_hash IN ({mine})").fetchall()
    return set(days) | {day for (day,) in found}


def write_index(lake: ObjectStore, manifest: Manifest, requests: pa.Table) -> None:
    """Keep the index of a capture date whose `request_hash` and `usage_date` are at hand, so that nobody reads its segments for it."""
    staged = lake.staging() / f"{uuid.uuid4().hex}.parquet"
    # hashes neither repeat nor compress
    pq.write_table(requests, staged, use_dictionary=["usage_date"], compression="none", write_statistics=False)
    _put_index(lake, manifest, staged)


def _put_index(lake: ObjectStore, manifest: Manifest, staged: Path) -> None:
    """Put a staged index in its place, and delete the capture date's earlier ones after a grace period."""
    with contextlib.suppress(Changed):
        lake.write(_index_name(manifest), staged, replacing=None)
    oldest = dt.datetime.now(dt.UTC) - engine.GRACE
    for stored in lake.objects(_index_folder(manifest)):
        if stored.name != _index_name(manifest) and stored.modified < oldest:
            lake.delete(stored.name)


def _index_folder(manifest: Manifest) -> str:
    return f"{_INDEX}capture_date={manifest.capture_date}/"


def _index_name(manifest: Manifest) -> str:
    # the engine's hash function may change with its version
    return f"{_index_folder(manifest)}{engine.digest([s.name for s in manifest.segments], duckdb.__version__)}.parquet"
