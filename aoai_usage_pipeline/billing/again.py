"""Bills that are made again, in a lake of their own beside the one that is the record."""

import datetime as dt
from collections.abc import Sequence

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing.daily_tables import DailyTables
from aoai_usage_pipeline.billing.enrichment import Enrichment
from aoai_usage_pipeline.billing.stage import Progress
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.manifest import Manifest, Manifests, Segment, folder
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.storage import ObjectStore
from aoai_usage_pipeline.usage.identity import RequestDates, shared_dates


def bill(lake: ObjectStore, days: Sequence[dt.date], reference: Reference, progress: Progress) -> dict[dt.date, str]:
    """Enrich and bill usage dates of a lake with given reference data; returns the days that are held, with the reason."""
    manifests = Manifests(lake)
    enrichment = Enrichment(lake, manifests, RequestDates(lake, manifests), lambda: reference, min(days))
    stages = (enrichment, DailyTables(lake, enrichment, lambda: reference))
    return {day.usage_date: day.reason for stage in stages for day in stage.run(days, progress) if day.reason}


def copy_known(lake: ObjectStore, into: ObjectStore, days: Sequence[dt.date], moment: dt.datetime) -> None:
    """Copy the events of usage dates that were enqueued up to `moment` (UTC) into an empty lake, with manifests to match.

    Events of other usage dates come along where they may be copies of the same requests. Quarantined records do not. `lake` stays as it is.
    """
    manifests = Manifests(lake)
    shared = {str(day) for day in shared_dates(lake, manifests, days)}
    dates = ", ".join(f"DATE '{day}'" for day in sorted(shared))
    with engine.connect(into.staging()) as db:
        for manifest in manifests.all():
            names = [segment.name for segment in manifest.segments if shared & segment.usage_dates.keys()]
            if not names:
                continue
            events = engine.read_parquet(lake.local_paths(names), tables.empty_select(tables.RAW_EVENTS))
            known = f"reason IS NULL AND usage_date IN ({dates}) AND enqueued_at <= TIMESTAMP '{moment}'"
            db.execute(f"CREATE OR REPLACE VIEW known AS SELECT * EXCLUDE (body) FROM {events} WHERE {known}")
            by_date = db.execute(f"SELECT CAST(usage_date AS VARCHAR), count(*), {tables.TOKENS} FROM known GROUP BY 1 ORDER BY 1").fetchall()
            if not by_date:
                continue
            name = f"{folder(manifest.capture_date)}known-{engine.digest(names, moment)}.parquet"
            into.write(name, engine.stage(db, into.staging(), "SELECT * FROM known"), replacing=None)
            segment = Segment(name, 0, sum(events for _, events, _ in by_date), 0, {day: (events, tokens) for day, events, tokens in by_date})
            Manifests(into).put(Manifest(manifest.capture_date, segments=(segment,)), replacing=None)
