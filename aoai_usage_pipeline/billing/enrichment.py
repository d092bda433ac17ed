"""The stage that makes days of `enriched_usage`: one row per request, described and priced."""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import fixed_costs
from aoai_usage_pipeline.billing.stage import Stage, Unbalanced, by_day, made_from, meters_in_use
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days, footer_metadata
from aoai_usage_pipeline.lake.manifest import Manifests, Segment, events_by_usage_date
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.storage import ObjectStore
from aoai_usage_pipeline.usage.identity import CANONICAL_ORDER, COMPLETED, CONFLICT, RequestDates, completed

_COMBINATION = (
    "usage_date", "gateway", "subscription_id", "product", "application", "operation", "deployment", "reported_model", "reported_region",
    "service_tier", "context_band", "contract", "time_source", "service", "usage_source", "image_kind",
)  # fmt: skip
_SUCCESSFUL = "(service = 'openai' AND (status_code IS NULL OR status_code BETWEEN 200 AND 299))"


class Enrichment(Stage):
    """Days of `enriched_usage`, with `daily_quality` beside them."""

    table = "enriched_usage"

    def __init__(
        self, lake: ObjectStore, manifests: Manifests, requests: RequestDates, reference: Callable[[], Reference], start_date: dt.date
    ) -> None:
        super().__init__(lake)
        self._manifests, self._requests, self._load_reference, self._start_date = manifests, requests, reference, start_date
        self._reference = Reference((), (), ())
        self._segments: dict[dt.date, list[Segment]] = {}
        self._moved: dict[dt.date, dict[str, list[object]]] = {}
        self._counts: dict[dt.date, dict[str, int]] = {}
        self.days, self.quality = Days(lake, self.table), Days(lake, "daily_quality")
        self._code = engine.code_digest("reference", "rating", "billing")

    def expected(self) -> dict[dt.date, str]:
        """The digest of what each usage date with events would be made from now, and would be made from by the next `make`."""
        self._reference, self._moved = self._load_reference(), self._requests.moved()
        # a day that lost its last event is made once more, without any, and fixed costs need no events
        used = events_by_usage_date(self._manifests.all())
        fixed = fixed_costs.days(self._reference, self._start_date, used, dt.datetime.now(dt.UTC).date())
        nothing: dict[dt.date, list[Segment]] = {day: [] for day in (*self.days.existing(), *fixed)}
        self._segments = nothing | used
        return {
            day: engine.digest(
                self._code, [segment.name for segment in segments], self._reference.on(day).content(), sorted(self._moved.get(day, {}).items())
            )
            for day, segments in self._segments.items()
        }

    def plan(self, days: Sequence[dt.date]) -> dict[dt.date, str]:
        stale = self.stale()
        return {day: stale[day] for day in days if day in stale}

    def stale(self) -> dict[dt.date, str]:
        """Every usage date whose objects differ from what they would be made from, with the digest of that."""
        made = made_from(self.objects)
        return {day: input_digest for day, input_digest in self.expected().items() if made.get(day) != {input_digest}}

    @property
    def objects(self) -> tuple[Days, Days]:
        return self.quality, self.days

    def size(self, day: dt.date) -> int:
        return sum(segment.usage_dates[str(day)][0] for segment in self._segments[day])

    def make(self, db: duckdb.DuckDBPyConnection, days: dict[dt.date, str]) -> dict[dt.date, str]:
        segments = {day: self._segments[day] for day in days}
        names = sorted({segment.name for day in days for segment in segments[day]})
        _load_events(db, self._lake.local_paths(names), days)
        columns = {"usage_date": "DATE", "request_id": "VARCHAR", "counts_on": "DATE", "copies": "BIGINT", "conflict": "BOOLEAN"}
        columns |= {c.name: c.type for name in COMPLETED for c in tables.RAW_EVENTS if c.name == name} | {"attributed": "BOOLEAN"}
        elsewhere = [(day, request_id, *rest) for day in days for request_id, rest in self._moved.get(day, {}).items()]
        rows = pa.table({name: pa.array([row[n] for row in elsewhere]) for n, name in enumerate(columns)})  # noqa: F841 - read by name below
        typed = ", ".join(f"CAST({name} AS {type_}) AS {name}" for name, type_ in columns.items())
        db.execute(f"CREATE TABLE moved AS SELECT {typed} FROM rows")
        match.load_reference(db, self._reference)
        accepted = engine.sql_file("billing", "accepted.sql")
        db.execute(
            accepted.format(
                canonical_order=CANONICAL_ORDER,
                completed=completed("rank"),
                conflict=CONFLICT,
                replaced=", ".join(f"t.{name} AS {name}" for name in COMPLETED),
                replaced_by_moved=", ".join(f"coalesce(m.{name}, e.{name}) AS {name}" for name in COMPLETED),
                long_context_tokens=match.LONG_CONTEXT_TOKENS,
                combination=", ".join(_COMBINATION),
            )
        )
        meters = meters_in_use(db, "events")
        parts = _meter_sql(meters)
        described = engine.sql_file("billing", "described_usage.sql")
        db.execute(described.format(match_deployments=match.match_deployments("combination"), match_owners=match.match_owners("combination")))
        match.match_prices(db, "described", self._reference, meters)
        db.execute(engine.sql_file("billing", "combination_rates.sql").format(same_price_key=match.same_price_key("d"), **parts))
        _name_values(db)
        enriched = engine.sql_file("billing", "enriched_usage.sql")
        db.execute(enriched.format(attributes=", ".join(_COMBINATION[1:]), same_combination=_same_combination(db), **parts))
        return self._unbalanced(db, segments, meters)

    def _unbalanced(self, db: duckdb.DuckDBPyConnection, segments: dict[dt.date, list[Segment]], meters: Sequence[str]) -> dict[dt.date, str]:
        """The days that cannot be made: the lake does not hold what was ingested, or a model is priced in several currencies."""
        raw = by_day(db, f"SELECT usage_date, count(*), {tables.TOKENS} FROM events GROUP BY 1")
        kept = by_day(db, f"SELECT usage_date, count(*), {tables.TOKENS} FROM accepted GROUP BY 1")
        for day in segments:
            (events, _), (requests, tokens) = raw.get(day, (0, 0)), kept.get(day, (0, 0))
            self._counts[day] = {"parsed": events, "duplicates": events - requests, "tokens": tokens}
        held: dict[dt.date, str] = {}
        for day, parts in segments.items():
            captured = tuple(sum(part.usage_dates[str(day)][i] for part in parts) for i in (0, 1))
            read = raw.get(day, (0, 0))
            if read != captured:
                held[day] = f"{captured[0]} raw events with {captured[1]} tokens were ingested, but {read[0]} with {read[1]} are in the lake"
        several = "SELECT usage_date FROM rate_of WHERE currency IS NOT NULL GROUP BY usage_date, model HAVING count(DISTINCT currency) > 1"
        if suspects := db.execute(f"SELECT DISTINCT CAST(usage_date AS VARCHAR) FROM ({several})").fetchall():
            mixed = f"""SELECT usage_date, model, list(DISTINCT c ORDER BY c)
                FROM (SELECT usage_date, model, unnest(used) AS c
                    FROM (SELECT usage_date, model, list_distinct([{", ".join(_used_currencies(meters).values())}]) AS used FROM enriched
                        WHERE usage_date IN ({", ".join(f"DATE '{day}'" for (day,) in suspects)}))
                    WHERE len(used) > 1)
                GROUP BY ALL"""
            for day, model, currencies in db.execute(mixed).fetchall():
                held[day] = f"requests to model {model} use meters that are priced in several currencies: {', '.join(currencies)}"
        return held

    def write(self, db: duckdb.DuckDBPyConnection, day: dt.date, input_digest: str, etags: list[str | None]) -> None:
        counts = self._counts[day]
        reference = engine.digest(self._reference.on(day).content())
        version = self._reference.version
        footer = footer_metadata({"input": input_digest, "code": self._code, "reference": reference, "reference_version": version, **counts})
        columns = tables.select_list(tables.ENRICHED_USAGE, texts=False)
        enriched = engine.stage(db, self._lake.staging(), f"SELECT {columns} FROM enriched WHERE usage_date = DATE '{day}'", footer)
        source = engine.read_parquet([str(enriched)])
        # the identities are proven on the very file that will stand in the lake
        [(requests, tokens)] = db.execute(f"SELECT count(*), {tables.TOKENS} FROM {source}").fetchall()
        if (requests + counts["duplicates"], tokens) != (counts["parsed"], counts["tokens"]):
            enriched.unlink()
            kept = counts["parsed"] - counts["duplicates"]
            raise Unbalanced(f"{kept} accepted requests with {counts['tokens']} tokens became {requests} enriched ones with {tokens}")
        select = engine.sql_file("billing", "daily_quality.sql").format(day=day, parsed=counts["parsed"], enriched=source, successful=_SUCCESSFUL)
        quality = engine.stage(db, self._lake.staging(), f"SELECT {tables.select_list(tables.DAILY_QUALITY)} FROM ({select})", footer)
        self.quality.replace(day, quality, replacing=etags[0])
        self.days.replace(day, enriched, replacing=etags[1])


def _load_events(db: duckdb.DuckDBPyConnection, segments: Sequence[str], days: Iterable[dt.date]) -> None:
    """Make `events`: the events of the days that were parsed. Columns that no segment has, half of them for most gateways, cost nothing."""
    empty = tables.empty_select(tables.RAW_EVENTS)
    source = engine.read_parquet(segments, empty) if segments else f"({empty})"
    present = {name for name, *_ in db.execute(f"DESCRIBE SELECT * FROM {engine.read_parquet(segments)}").fetchall()} if segments else set()
    columns = {c.name: f'"{c.name}"' if c.name in present else f'CAST(NULL AS {c.type}) AS "{c.name}"' for c in tables.RAW_EVENTS if c.name != "body"}
    stored = ", ".join(sql for name, sql in columns.items() if name in present) or "usage_date"
    dates = ", ".join(f"DATE '{day}'" for day in days)
    db.execute(f"CREATE TABLE stored_events AS SELECT {stored} FROM {source} WHERE reason IS NULL AND usage_date IN ({dates})")
    db.execute(f"CREATE VIEW events AS SELECT {', '.join(columns.values())} FROM stored_events")


def _same_combination(db: duckdb.DuckDBPyConnection) -> str:
    """SQL: that a request `b` has the combination `r`. Only what differs between combinations is compared, for every request."""
    values = ", ".join(f"count(DISTINCT {column}) + CAST(count(*) > count({column}) AS BIGINT)" for column in _COMBINATION)
    [counts] = db.execute(f"SELECT {values} FROM combination").fetchall()
    differing = [column for column, count in zip(_COMBINATION, counts, strict=True) if count > 1]
    return " AND ".join(f"b.{column} IS NOT DISTINCT FROM r.{column}" for column in differing) or "true"


def _name_values(db: duckdb.DuckDBPyConnection) -> None:
    """Make enumerations of the texts of `rates`, which few values repeat for every request: they are a third of the work of writing them."""
    columns = db.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = 'rates' AND data_type = 'VARCHAR'").fetchall()
    for (column,) in columns:
        if db.execute(f"SELECT count({column}) FROM rates").fetchall() != [(0,)]:
            db.execute(f"CREATE TYPE {column}_values AS ENUM (SELECT DISTINCT {column} FROM rates WHERE {column} IS NOT NULL)")
            db.execute(f"ALTER TABLE rates ALTER {column} TYPE {column}_values")


def _used_meters(meters: Sequence[str]) -> dict[str, str]:
    """SQL: whether a request uses each meter."""
    used = {m: f"(q_{m} > 0)" for m in meters}
    # a request that counts nothing at all is judged by its input price
    used["input"] = f"(q_input > 0 OR (usage_source IS NOT NULL AND {' AND '.join(f'coalesce(q_{m}, 0) = 0' for m in meters)}))"
    return used


def _used_currencies(meters: Sequence[str]) -> dict[str, str]:
    """SQL: the currency of each meter that a request uses, otherwise NULL."""
    return {m: f"CASE WHEN {used} THEN m_{m}.currency END" for m, used in _used_meters(meters).items()}


def _meter_sql(meters: Sequence[str]) -> dict[str, object]:
    """The parts of `enriched_usage.sql` that are repeated for each meter."""
    used, currency = _used_meters(meters), _used_currencies(meters)
    charge = {m: f"CASE WHEN {used[m]} THEN {match.cost(m, f'q_{m}', f'm_{m}.token_price')} END" for m in meters}
    zero = "CAST(0 AS DECIMAL(38,15))"
    return {
        "rate_columns": ", ".join(
            f"any_value(struct_pack(token_price := r.token_price, currency := r.currency, status := r.pricing_status)) "
            f"FILTER (r.meter = '{m}') AS m_{m}"
            for m in meters
        ),
        "quantity_columns": ", ".join(f"{sql} AS q_{m}" for m, sql in match.METER_QUANTITIES.items() if m in used),
        "any_priced": " OR ".join(f"({used[m]} AND m_{m}.token_price IS NOT NULL)" for m in meters),
        "total_cost": " + ".join(f"coalesce({charge[m]}, {zero})" for m in meters),
        "currency": f"coalesce({', '.join(currency.values())})",
        "any_unpriced": " OR ".join(f"({used[m]} AND m_{m}.status = 'unpriced')" for m in meters),
        "any_fallback": " OR ".join(f"({used[m]} AND m_{m}.status = 'fallback')" for m in meters),
    }
