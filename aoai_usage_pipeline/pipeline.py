"""One installation of the pipeline: its stores, its reference data and its stages. What the Dagster shell and the command line hold.

Heavy libraries are imported where they are used, so that loading definitions stays fast.
"""

import contextlib
import dataclasses
import datetime as dt
import itertools
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.deadline import within
from aoai_usage_pipeline.settings import Settings

if TYPE_CHECKING:
    from decimal import Decimal

    from duckdb import DuckDBPyConnection

    from aoai_usage_pipeline.billing.daily_tables import DailyTables
    from aoai_usage_pipeline.billing.enrichment import Enrichment
    from aoai_usage_pipeline.billing.explain import Bills
    from aoai_usage_pipeline.billing.periods import Closing
    from aoai_usage_pipeline.billing.stage import Day
    from aoai_usage_pipeline.billing.statement import Statement
    from aoai_usage_pipeline.billing.what_if import Comparison, Only, Scenario
    from aoai_usage_pipeline.capture.names import NameFormat
    from aoai_usage_pipeline.hub.client import EventHub
    from aoai_usage_pipeline.hub.drain import Drained
    from aoai_usage_pipeline.lake.manifest import Manifests
    from aoai_usage_pipeline.notify.targets import Target
    from aoai_usage_pipeline.publish.cosmos import Cosmos, Published
    from aoai_usage_pipeline.reconcile.hub import Completeness
    from aoai_usage_pipeline.reconcile.replay import Verification
    from aoai_usage_pipeline.reconcile.usage import DayFigures
    from aoai_usage_pipeline.reference import Reference
    from aoai_usage_pipeline.reference.versions import ReferenceVersions
    from aoai_usage_pipeline.storage import ObjectStore
    from aoai_usage_pipeline.usage.raw_events import Ingest, Ingested

Progress = Callable[[int, int, str], None]
_LOOK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Unpriced:
    """Usage of one meter without a price of its own: `status` is `unpriced`, or `fallback` where the input price stands in.

    An unpriced one with a `pricing_currency` has a price in that currency and no exchange rate.
    """

    model: str | None
    model_version: str | None
    deployment_sku: str | None
    region: str | None
    service_tier: str | None
    meter: str
    status: str
    pricing_currency: str | None
    quantity: int
    first: dt.date
    last: dt.date
    deployments: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Unpaid:
    """Usage of a provisioned deployment that is free by the token, on days on which `capacity.csv` does not have the deployment."""

    gateway: str | None
    deployment: str
    deployment_sku: str
    days: int
    first: dt.date
    last: dt.date


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """A bill as it was known: the reference data, since when it was in use, the published file, and the days that could not be made."""

    reference_version: str
    recorded_at: dt.datetime
    warehouse: Path
    held: dict[dt.date, str]


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
    def hub(self) -> "EventHub | None":
        """The Event Hub the capture files come from; None when the settings name none. Raises `HubError`."""
        of = self.settings
        if not of.event_hub_namespace or not of.event_hub_name:
            return None
        from aoai_usage_pipeline.hub.client import EventHub

        return EventHub(of.event_hub_namespace, of.event_hub_name, of.event_hub_consumer_group, of.event_hub_connection_string)

    def drain(self, progress: Progress | None = None) -> "list[Drained]":
        """Read the hub's new events into capture files; nothing when no hub is configured. Raises `HubError`."""
        if not self.hub:
            return []
        from aoai_usage_pipeline.hub.checkpoints import open_checkpoints
        from aoai_usage_pipeline.hub.drain import drain

        store = self._open("AOAI_CAPTURE_URL", self.settings.capture_url, create=True)
        checkpoints = open_checkpoints(self.hub, self.settings.capture_url, self.settings.storage_connection_string)
        return drain(self.hub, store, self.names, checkpoints, progress or self.progress)

    def completeness(self) -> "list[Completeness]":
        """What each partition of the hub holds that no ingested capture file has; nothing when no hub is configured. Raises `HubError`."""
        if not self.hub:
            return []
        from aoai_usage_pipeline.reconcile.hub import completeness

        manifests = self.manifests.all()  # before the hub is asked, which goes on counting
        return completeness(self.hub, manifests, self.names, self.capture, dt.timedelta(minutes=self.settings.capture_minutes))

    @cached_property
    def notification_targets(self) -> "list[Target]":
        """Who is told what goes wrong; nobody unless the settings name someone. Raises `HubError`."""
        from aoai_usage_pipeline.notify.targets import EventHubTarget, Webhook

        of = self.settings
        targets: list[Target] = []
        if of.notify_webhook_url:
            targets.append(Webhook(of.notify_webhook_url))
        if of.notify_event_hub:
            from aoai_usage_pipeline.hub.client import EventHub

            namespace = of.event_hub_namespace or ""
            targets.append(EventHubTarget(EventHub(namespace, of.notify_event_hub, of.event_hub_consumer_group, of.event_hub_connection_string)))
        return targets

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
        with self._reference_folder() as folder:
            return self._load_reference(folder)

    @cached_property
    def reference_versions(self) -> "ReferenceVersions":
        """Every version of the reference data that was used to bill."""
        from aoai_usage_pipeline.reference.versions import ReferenceVersions

        return ReferenceVersions(self.lake)

    def reference_in_use(self) -> "Reference":
        """The reference data as the files say now, recorded as in use before anything is priced with it. Raises `ReferenceDataError`."""
        with self._reference_folder() as folder:
            reference = self._load_reference(folder)
            self.reference_versions.record(reference, folder)
            return reference

    @cached_property
    def _reference_store(self) -> "ObjectStore":
        return self._open("AOAI_REFERENCE_DIR", self.settings.reference_dir, create=False)

    @contextlib.contextmanager
    def _reference_folder(self) -> Iterator[Path]:
        """The folder of the CSV files. Those of a container are copied to one for the moment, each time anew: finance changes them."""
        if not self.settings.reference_in_container:
            yield Path(self.settings.reference_dir)
            return
        from aoai_usage_pipeline.reference.files import SPECS

        _, blobs = self._reference_store.children()
        present = {blob.name for blob in blobs}
        with tempfile.TemporaryDirectory(prefix="reference-") as place:
            for spec in SPECS:
                if spec.name in present:
                    (Path(place) / spec.name).write_bytes(self._reference_store.read(spec.name)[0])
            yield Path(place)

    def _load_reference(self, folder: Path) -> "Reference":
        from aoai_usage_pipeline.reference import ReferenceDataError, load

        try:
            return load(folder, self.settings.billing_currency)
        except ReferenceDataError as error:
            if not self.settings.reference_in_container:
                raise
            # faults name the file that finance knows, not the copy
            raise ReferenceDataError(str(error).replace(str(folder), self.settings.reference_dir.rstrip("/"))) from None

    def enrichment(self, reference: "Callable[[], Reference] | None" = None) -> "Enrichment":
        """The stage that makes `enriched_usage`, with the reference data that `reference` gives: unless told otherwise, that of now."""
        from aoai_usage_pipeline.billing.enrichment import Enrichment
        from aoai_usage_pipeline.usage.identity import RequestDates

        return Enrichment(self.lake, self.manifests, RequestDates(self.lake, self.manifests), reference or self.reference, self.settings.start_date)

    def daily_tables(self, enrichment: "Enrichment | None" = None) -> "DailyTables":
        """The stage that makes `daily_usage` and `daily_billing`."""
        from aoai_usage_pipeline.billing.daily_tables import DailyTables

        return DailyTables(self.lake, enrichment or self.enrichment(), self.reference)

    def bills(self) -> "Bills":
        """The billed days, to be looked at line by line and explained with the reference data of now."""
        from aoai_usage_pipeline.billing.explain import Bills

        return Bills(self.lake, self.reference())

    @cached_property
    def ingestion(self) -> "Ingest":
        """What brings capture dates of the lake up to their capture files."""
        return self._ingest(self.lake, self.manifests)

    def _ingest(self, lake: "ObjectStore", manifests: "Manifests") -> "Ingest":
        from aoai_usage_pipeline.usage.raw_events import Ingest

        return Ingest(
            self.capture,
            lake,
            manifests,
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
        return sorted(self.enrichment(self.reference_in_use).run(days, progress or self.progress), key=lambda day: day.usage_date)

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
            select = """SELECT model, model_version, deployment_sku, region, service_tier, meter, pricing_status, pricing_currency,
                CAST(sum(quantity) AS BIGINT), min(usage_date), max(usage_date),
                list(DISTINCT deployment ORDER BY deployment) FILTER (deployment IS NOT NULL)
                FROM daily_billing WHERE pricing_status IN ('unpriced', 'fallback') GROUP BY ALL ORDER BY ALL"""
            return [Unpriced(*row[:-1], tuple(row[-1] or ())) for row in db.execute(select).fetchall()]

    def unpaid(self, days: Sequence[dt.date], reference: "Reference") -> list[Unpaid]:
        """The provisioned deployments whose usage costs nothing, neither by the token nor by the hour. Writes nothing."""
        from aoai_usage_pipeline.reference.capacity import PROVISIONED_SKUS

        with self._rebilled(days, reference) as db:
            select = """SELECT DISTINCT gateway, deployment, deployment_sku, usage_date FROM daily_billing
                WHERE list_contains(?, deployment_sku) AND unit_price = 0 AND deployment IS NOT NULL ORDER BY ALL"""
            used = db.execute(select, [list(PROVISIONED_SKUS)]).fetchall()
        free: dict[tuple[str | None, str, str], list[dt.date]] = {}
        for gateway, deployment, sku, day in used:
            paid = (row for row in reference.capacity if row.deployment == deployment and row.gateway in (None, gateway))
            if not any(row.on(day) for row in paid):
                free.setdefault((gateway, deployment, sku), []).append(day)
        return [Unpaid(*key, len(found), found[0], found[-1]) for key, found in free.items()]

    def what_if(self, days: Sequence[dt.date], scenario: "Scenario", only: "Only") -> "Comparison":
        """What the enriched usage of days would cost under another arrangement, beside what it was billed. Writes nothing. Raises ValueError."""
        from aoai_usage_pipeline.billing.daily_tables import DailyTables
        from aoai_usage_pipeline.billing.what_if import compare
        from aoai_usage_pipeline.lake import engine

        reference = self.reference()
        stage = DailyTables(self.lake, self.enrichment(), lambda: reference)
        stage.plan(days)
        with engine.connect(self.lake.staging()) as db:
            return compare(stage, db, reference, days, scenario, only)

    @contextlib.contextmanager
    def _rebilled(self, days: Sequence[dt.date], reference: "Reference") -> "Iterator[DuckDBPyConnection]":
        """A connection whose `daily_billing` has the lines of those days that have enriched usage, with this reference data, closed or not."""
        from aoai_usage_pipeline.billing.daily_tables import DailyTables
        from aoai_usage_pipeline.lake import engine

        enrichment = self.enrichment()
        stage = DailyTables(self.lake, enrichment, lambda: reference)
        stage.plan(days)
        wanted = sorted(set(days) & set(enrichment.days.existing()))
        with engine.connect(self.lake.staging()) as db:
            if wanted:
                stage.rate(db, wanted, reference)
            else:
                db.execute(f"CREATE TABLE daily_billing AS {tables.empty_select(tables.DAILY_BILLING)}")
            yield db

    @contextlib.contextmanager
    def as_known(self, days: Sequence[dt.date], moment: dt.datetime) -> "Iterator[Known]":
        """The bill of usage dates as it was known at a moment (UTC): from the events enqueued until then, with the reference data in use then.

        It is made by today's code and kept in a temporary place; the lake and the warehouse stay as they are. Raises ValueError when no
        reference data was recorded yet at that moment.
        """
        from aoai_usage_pipeline.billing import again
        from aoai_usage_pipeline.lake.manifest import Manifests
        from aoai_usage_pipeline.publish.warehouse import publish
        from aoai_usage_pipeline.storage import NotFound, open_store

        recorded = self.reference_versions.at(moment)
        if not recorded:
            first = next(iter(self.reference_versions.log()), None)
            since = f"the first was recorded at {first.recorded_at:%Y-%m-%d %H:%M:%S} UTC" if first else "none was recorded in this lake so far"
            raise ValueError(f"no reference data is known to have been in use at {moment:%Y-%m-%d %H:%M:%S} UTC: {since}")
        reference = self.reference_versions.load(recorded.version)
        if not reference:
            raise NotFound(f"reference data version {recorded.version} is gone from {self.lake.url}")
        with tempfile.TemporaryDirectory(prefix="aoai-usage-") as place:
            then = open_store(f"{place}/lake", create=True)
            again.copy_known(self.lake, then, days, moment)
            held = again.bill(then, days, reference, self.progress)
            warehouse = Path(place, "bill.duckdb")
            publish(then, Manifests(then), warehouse)
            yield Known(recorded.version, recorded.recorded_at, warehouse, held)

    def verify(self, days: Sequence[dt.date]) -> "Verification":
        """Replay the capture files of usage dates into an empty lake and compare the bill with the one that is stored. Changes nothing.

        Raises ValueError when none of the days has a bill.
        """
        from aoai_usage_pipeline.reconcile.replay import Replay

        replay = Replay(self.lake, self._ingest, self.reference(), self.settings.start_date, self.progress)
        return replay.verify(days)

    def close(self, period: str, *, accept_unpriced: bool = False) -> "Closing":
        """Close a billing period: its lines are frozen, and what comes later are corrections in the open one.

        Raises ValueError with every reason why it cannot be closed.
        """
        from aoai_usage_pipeline.billing.periods import Periods, days_of

        first, last = days_of(period)
        today = dt.datetime.now(dt.UTC).date()
        if last >= today:
            raise ValueError(f"{period} has not ended: it can be closed from {last + dt.timedelta(1)} on")
        periods, billing = Periods(self.lake), self.daily_tables().billing
        closed, existing = set(periods.closed()), billing.existing()
        reasons = [f"{month} is still open: close it first" for month in sorted({f"{day:%Y-%m}" for day in existing if day < first} - closed)]
        held = {day: reason for of_stage in self.held().values() for day, reason in of_stage.items() if day <= last}
        reasons += [f"{day} is held: {reason}" for day, reason in sorted(held.items())]
        if stale := sorted(day for day in self.stale_usage_dates() if day <= last):
            reasons.append(f"{len(stale)} days up to {last} are not up to date, the first is {stale[0]}: run aoai-usage bill")
        if changed := self.changed_capture_dates(first, min(last + dt.timedelta(1), today)):
            reasons.append(f"capture files of {min(changed)} are not ingested: run aoai-usage bill")
        stated = self.statements(period)
        if not stated:
            reasons.append("it has no lines")
        unpriced = sum(line.pricing_status == "unpriced" for one in stated for line in one.lines)
        if unpriced and not accept_unpriced:
            reasons.append(f"{unpriced} lines have no price: add the prices and bill again, or close with --accept-unpriced")
        if reasons:
            raise ValueError(f"{period} cannot be closed:\n" + "\n".join(f"- {reason}" for reason in reasons))
        closing = periods.close(period, billing)
        self.statements(period)
        return closing

    def statements(self, period: str) -> "list[Statement]":
        """The statements of a billing period; those of a closed one are kept in the lake. Raises ValueError for what is no period."""
        from aoai_usage_pipeline.billing.periods import Periods, days_of
        from aoai_usage_pipeline.billing.statement import statements, summary
        from aoai_usage_pipeline.lake import engine
        from aoai_usage_pipeline.storage import Changed

        _, last = days_of(period)
        periods, billing = Periods(self.lake), self.daily_tables().billing
        closed = period in periods.closed()
        with engine.connect(self.lake.staging()) as db:
            empty = tables.empty_select(tables.DAILY_BILLING)
            paths = [] if closed else billing.paths([day for day in billing.existing() if day <= last])
            found = statements(db, periods.lines([period]) if closed else engine.read_parquet(paths, empty) if paths else f"({empty})", period)
        if closed:
            with contextlib.suppress(Changed):
                self.lake.write(f"statements/billing_period={period}.json", summary(found), replacing=None)
        return found

    def publish(self) -> dict[str, int]:
        """Make the DuckDB file equal to the lake; returns rows by table."""
        import duckdb

        from aoai_usage_pipeline.publish.warehouse import publish
        from aoai_usage_pipeline.storage import StorageError

        try:
            return publish(self.lake, self.manifests, Path(self.settings.warehouse_path))
        except (OSError, duckdb.IOException) as error:
            raise StorageError(f"AOAI_WAREHOUSE_PATH {self.settings.warehouse_path}: {error}") from error

    @cached_property
    def cosmos(self) -> "Cosmos | None":
        """The database of AOAI_COSMOS_ENDPOINT; None when it is unset. Raises `CosmosError`."""
        return self._cosmos()

    @cached_property
    def _impatient_cosmos(self) -> "Cosmos | None":
        return self._cosmos(patience=dt.timedelta())

    def _cosmos(self, **options: dt.timedelta) -> "Cosmos | None":
        from aoai_usage_pipeline.publish.cosmos import Cosmos

        settings = self.settings
        return Cosmos(settings.cosmos_endpoint, settings.cosmos_database, settings.cosmos_key, **options) if settings.cosmos_endpoint else None

    def cosmos_off(self, table: str) -> str | None:
        """Why a table is not published to Cosmos DB; None when it is."""
        if not self.settings.cosmos_endpoint:
            return "AOAI_COSMOS_ENDPOINT is not set"
        if table == "enriched_usage" and self.settings.cosmos_usage == "off":
            return "AOAI_COSMOS_USAGE is off"
        return None

    def publish_cosmos(self, table: str, days: Sequence[dt.date], progress: Progress | None = None) -> "dict[dt.date, Published]":
        """Make the container of a table equal to usage dates of the lake, and say what each took; nothing when it is off. Raises `CosmosError`."""
        from aoai_usage_pipeline.publish.documents import CONTAINERS

        done: dict[dt.date, Published] = {}
        if self.cosmos and not self.cosmos_off(table):
            for day, published in self.cosmos.publish(CONTAINERS[table], self.lake, days):
                done[day] = published
                (progress or self.progress)(len(done), len(days), f"Cosmos DB container {CONTAINERS[table].name}, {day}")
        return done

    def publish_statements(self, days: Sequence[dt.date] | None) -> "dict[str, Published]":
        """Make the statements in Cosmos DB equal to the closed months of usage dates (None: to all), and to those that are not there as far as the
        lake remembers; nothing when it is off. Raises `CosmosError`.
        """
        if not self.cosmos:
            return {}
        periods = sorted({*self._closed(days), *self.cosmos.unpublished_statements(self.lake)})
        return dict(self.cosmos.publish_statements(self.lake, periods)) if periods else {}

    def unequal_statements_in_cosmos(self, days: Sequence[dt.date] | None) -> list[dict[str, object]]:
        """Where the statements in Cosmos DB differ from those of the closed months of usage dates; nothing when it is off. Raises `CosmosError`."""
        periods = self._closed(days)
        return self.cosmos.unequal_statements(self.lake, periods) if self.cosmos and periods else []

    def _closed(self, days: Sequence[dt.date] | None) -> list[str]:
        from aoai_usage_pipeline.billing.periods import Periods

        months = None if days is None else {f"{day:%Y-%m}" for day in days}
        return [period for period in Periods(self.lake).closed() if months is None or period in months]

    def unpublished_in_cosmos(self) -> dict[dt.date, str]:
        """Usage dates whose latest tables are not in Cosmos DB, as far as the lake remembers, and the last days of closed months whose statements
        are not, with a digest of those; nothing when it is off.

        Raises `CosmosError`, after some seconds without an answer.
        """
        if not self.settings.cosmos_endpoint:
            return {}
        from aoai_usage_pipeline.billing.periods import days_of
        from aoai_usage_pipeline.lake.engine import digest
        from aoai_usage_pipeline.publish.cosmos import CosmosError
        from aoai_usage_pipeline.publish.documents import CONTAINERS

        lake = self.lake

        def look() -> dict[dt.date, str]:
            found: dict[dt.date, str] = {}
            for table, container in CONTAINERS.items():
                if not self.cosmos_off(table) and self._impatient_cosmos:
                    for day, version in self._impatient_cosmos.unpublished(container, lake).items():
                        found[day] = digest(found.get(day), version)
            if self._impatient_cosmos:
                for period, version in self._impatient_cosmos.unpublished_statements(lake).items():
                    _, last = days_of(period)
                    found[last] = digest(found.get(last), version)
            return found

        try:
            return within(_LOOK_SECONDS, look)
        except TimeoutError:
            raise CosmosError(f"{self.settings.cosmos_endpoint}: no answer for {_LOOK_SECONDS:.0f} seconds") from None

    def unequal_in_cosmos(self, table: str, days: Sequence[dt.date]) -> list[dict[str, object]]:
        """Where the documents of usage dates do not add up to the table in the lake; nothing when it is off. Raises `CosmosError`."""
        from aoai_usage_pipeline.publish.documents import CONTAINERS

        if not self.cosmos or self.cosmos_off(table):
            return []
        return self.cosmos.unequal(CONTAINERS[table], self.lake, days)

    def held(self) -> dict[str, dict[dt.date, str]]:
        """Every held day with its reason, by stage."""
        from aoai_usage_pipeline.lake.held import Held

        return {table: reasons for table in ("raw_events", "enriched_usage", "daily_billing") if (reasons := Held(self.lake, table).reasons())}

    def figures(self, days: Sequence[dt.date]) -> "list[DayFigures]":
        """Coverage, unpriced requests and cost of usage dates, as they are in the lake."""
        from aoai_usage_pipeline.reconcile.usage import figures

        return figures(self.lake, days)

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
