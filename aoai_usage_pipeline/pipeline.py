"""One installation of the pipeline: its stores, its reference data and its stages. What the Dagster shell and the command line hold.

Heavy libraries are imported where they are used, so that loading definitions stays fast.
"""

import contextlib
import dataclasses
import datetime as dt
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from decimal import Decimal

    from duckdb import DuckDBPyConnection

    from aoai_usage_pipeline.billing.days import DailyTables, Day, Enrichment
    from aoai_usage_pipeline.billing.explain import Bills
    from aoai_usage_pipeline.capture.names import NameFormat
    from aoai_usage_pipeline.lake.manifest import Manifests
    from aoai_usage_pipeline.reference import Reference
    from aoai_usage_pipeline.storage import ObjectStore
    from aoai_usage_pipeline.usage.raw_events import Ingest, Ingested

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Unpriced:
    """Usage of one meter without a price of its own: `status` is `unpriced`, or `fallback` where the input price stands in."""

    model: str | None
    model_version: str | None
    deployment_sku: str | None
    region: str | None
    service_tier: str | None
    meter: str
    status: str
    quantity: int
    first: dt.date
    last: dt.date
    deployments: tuple[str, ...]


class Pipeline:
    """The stages over one set of settings. `progress` is told (done, total, what) while long work runs."""

    def __init__(self, settings: Settings, progress: Progress = lambda done, total, what: None) -> None:
        self.settings, self.progress = settings, progress

    @cached_property
    def capture(self) -> "ObjectStore":
        return self._open("AOAI_CAPTURE_URL", self.settings.capture_url, create=False)

    @cached_property
    def lake(self) -> "ObjectStore":
        lake = self._open("AOAI_LAKE_URL", self.settings.lake_url, create=True)
        lake.collect_staging()
        return lake

    @cached_property
    def names(self) -> "NameFormat":
        from aoai_usage_pipeline.capture.names import NameFormat

        return NameFormat(self.settings.capture_name_format)

    @cached_property
    def manifests(self) -> "Manifests":
        from aoai_usage_pipeline.lake.manifest import Manifests

        return Manifests(self.lake)

    @cached_property
    def hash_key(self) -> bytes:
        """The key of the hashes that stand for secrets and people: the setting, else one made once and kept in the lake."""
        from aoai_usage_pipeline.storage import Changed, NotFound

        if self.settings.hash_key:
            return self.settings.hash_key.encode()
        while True:
            with contextlib.suppress(NotFound):
                return self.lake.read("hash_key")[0]
            with contextlib.suppress(Changed):
                self.lake.write("hash_key", secrets.token_hex(32).encode(), replacing=None)

    def reference(self) -> "Reference":
        """The reference data as the files say now. Raises `ReferenceDataError`."""
        from aoai_usage_pipeline.reference import load

        return load(Path(self.settings.reference_dir), self.settings.billing_currency)

    def enrichment(self) -> "Enrichment":
        """The stage that makes `enriched_usage`, with the reference data of now."""
        from aoai_usage_pipeline.billing.days import Enrichment
        from aoai_usage_pipeline.usage.identity import RequestDates

        return Enrichment(self.lake, self.manifests, RequestDates(self.lake, self.manifests), self.reference, self.settings.start_date)

    def daily_tables(self, enrichment: "Enrichment | None" = None) -> "DailyTables":
        """The stage that makes `daily_usage` and `daily_billing`."""
        from aoai_usage_pipeline.billing.days import DailyTables

        return DailyTables(self.lake, enrichment or self.enrichment(), self.reference)

    def bills(self) -> "Bills":
        """The billed days, to be looked at line by line and explained with the reference data of now."""
        from aoai_usage_pipeline.billing.explain import Bills

        return Bills(self.lake, self.reference())

    @cached_property
    def ingestion(self) -> "Ingest":
        """What brings capture dates of the lake up to their capture files."""
        from aoai_usage_pipeline.usage.raw_events import Ingest

        return Ingest(
            self.capture,
            self.lake,
            self.manifests,
            self.names,
            self.settings.start_date,
            self.hash_key,
            estimated=self.settings.estimate_usage == "on",
            kept=self.settings.keep_content == "on",
        )

    def ingest(self, dates: Sequence[dt.date], progress: Progress | None = None) -> "dict[dt.date, Ingested]":
        """Bring capture dates up to their capture files; a date that does not balance is held."""
        from aoai_usage_pipeline.lake.held import Held
        from aoai_usage_pipeline.usage.raw_events import Unbalanced

        self.reference()  # a bad file stops the run before anything is written
        held = Held(self.lake, "raw_events")
        before = set(held.reasons())
        done: dict[dt.date, Ingested] = {}
        for date, result in self.ingestion.run(dates, progress or self.progress):
            if isinstance(result, Unbalanced):
                held.hold(date, str(result), "")
                continue
            if date in before:
                held.release(date)
            done[date] = result
        return done

    def enrich(self, days: Sequence[dt.date], progress: Progress | None = None) -> "list[Day]":
        """Bring `enriched_usage` of usage dates up to date."""
        self.reference()  # a bad file stops the run before anything is written
        return sorted(self.enrichment().run(days, progress or self.progress), key=lambda day: day.usage_date)

    def bill(self, days: Sequence[dt.date], progress: Progress | None = None) -> "list[Day]":
        """Bring `daily_usage` and `daily_billing` of usage dates up to date."""
        return sorted(self.daily_tables().run(days, progress or self.progress), key=lambda day: day.usage_date)

    def rebill(self, days: Sequence[dt.date], reference: "Reference") -> "dict[tuple[str | None, str], Decimal]":
        """The cost by (model, currency) that the enriched usage of days would have with other reference data. Writes nothing."""
        with self._rebilled(days, reference) as db:
            select = "SELECT model, currency, sum(cost) FROM daily_billing WHERE cost IS NOT NULL GROUP BY ALL ORDER BY ALL"
            return {(model, currency): cost for model, currency, cost in db.execute(select).fetchall()}

    def unpriced(self, days: Sequence[dt.date], reference: "Reference") -> "list[Unpriced]":
        """The enriched usage of days that has no price in the reference data, or only that of another meter. Writes nothing."""
        with self._rebilled(days, reference) as db:
            select = """SELECT model, model_version, deployment_sku, region, service_tier, meter, pricing_status, CAST(sum(quantity) AS BIGINT),
                min(usage_date), max(usage_date), list(DISTINCT deployment ORDER BY deployment) FILTER (deployment IS NOT NULL)
                FROM daily_billing WHERE pricing_status IN ('unpriced', 'fallback') GROUP BY ALL ORDER BY ALL"""
            return [Unpriced(*row[:-1], tuple(row[-1] or ())) for row in db.execute(select).fetchall()]

    @contextlib.contextmanager
    def _rebilled(self, days: Sequence[dt.date], reference: "Reference") -> "Iterator[DuckDBPyConnection]":
        """A connection whose `daily_billing` has the lines of those days that have enriched usage, with this reference data."""
        from aoai_usage_pipeline.billing.days import DailyTables
        from aoai_usage_pipeline.lake import engine

        enrichment = self.enrichment()
        stage = DailyTables(self.lake, enrichment, lambda: reference)
        stage.plan(days)
        wanted = sorted(set(days) & set(enrichment.days.existing()))
        with engine.connect(self.lake.staging()) as db:
            if wanted:
                stage.make(db, dict.fromkeys(wanted, ""))
            else:
                db.execute(f"CREATE TABLE daily_billing AS {tables.empty_select(tables.DAILY_BILLING)}")
            yield db

    def publish(self) -> dict[str, int]:
        """Make the DuckDB file equal to the lake; returns rows by table."""
        import duckdb

        from aoai_usage_pipeline.publish.warehouse import publish
        from aoai_usage_pipeline.storage import StorageError

        try:
            return publish(self.lake, self.manifests, Path(self.settings.warehouse_path))
        except (OSError, duckdb.IOException) as error:
            raise StorageError(f"AOAI_WAREHOUSE_PATH {self.settings.warehouse_path}: {error}") from error

    def held(self) -> dict[str, dict[dt.date, str]]:
        """Every held day with its reason, by stage."""
        from aoai_usage_pipeline.lake.held import Held

        return {table: reasons for table in ("raw_events", "enriched_usage", "daily_billing") if (reasons := Held(self.lake, table).reasons())}

    def stale_usage_dates(self) -> dict[dt.date, str]:
        """Usage dates whose enriched usage or daily tables differ from what they would be made from, with the digest of that."""
        enrichment = self.enrichment()
        return self.daily_tables(enrichment).stale() | enrichment.stale()

    def changed_capture_dates(self, first: dt.date, last: dt.date) -> dict[dt.date, str]:
        """Capture dates from `first` to `last` with new or changed capture files, with a digest of those."""
        from aoai_usage_pipeline.lake.engine import digest
        from aoai_usage_pipeline.lake.manifest import Manifest

        listed = self.ingestion.listed(first, last)
        known = {manifest.capture_date: manifest for manifest in self.manifests.all()}
        if not listed and not known:
            self._expect_names_that_fit()
        changed = {date: self.ingestion.changed(files, known.get(date, Manifest(date))) for date, files in sorted(listed.items())}
        return {
            date: digest(sorted((f.object.name, f.object.etag) for files in hours.values() for f in files))
            for date, hours in changed.items()
            if hours
        }

    def _open(self, setting: str, url: str, *, create: bool) -> "ObjectStore":
        from aoai_usage_pipeline.storage import StorageError, open_store

        try:
            return open_store(url, self.settings.storage_connection_string, create=create)
        except (StorageError, OSError) as error:
            raise StorageError(f"{setting}: {error}") from error

    def _expect_names_that_fit(self) -> None:
        """Raises StorageError when there are capture files, as far as one look tells, but none with a name that is understood."""
        from aoai_usage_pipeline.storage import StorageError

        seen = [stored for stored in itertools.islice(self.capture.objects(), 1000) if stored.name.endswith(".avro")]
        if seen and not any(self.names.parse(stored) for stored in seen):
            raise StorageError(
                f"AOAI_CAPTURE_URL {self.capture.url} has capture files, but no name fits AOAI_CAPTURE_NAME_FORMAT "
                f"{self.settings.capture_name_format}; the first is {seen[0].name}"
            )
