"""Making days of `enriched_usage` and of the daily tables, each day from what its digest says, held when its ledger does not balance."""

import concurrent.futures
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest, fixed_costs
from aoai_usage_pipeline.billing.periods import Periods, correct
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days, footer_metadata
from aoai_usage_pipeline.lake.held import Held
from aoai_usage_pipeline.lake.manifest import Manifests, Segment, events_by_usage_date
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.rating.overlay import PriceOverflow
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore
from aoai_usage_pipeline.usage.identity import CANONICAL_ORDER, COMPLETED, CONFLICT, RequestDates, completed

Progress = Callable[[int, int, str], None]

_CHUNK_EVENTS = 600_000
_ATTEMPTS = 5
_WRITES = 3
_COMBINATION = (
    "usage_date", "gateway", "subscription_id", "product", "application", "operation", "deployment", "reported_model", "reported_region",
    "service_tier", "context_band", "contract", "time_source", "service", "usage_source", "image_kind",
)  # fmt: skip
_SUCCESSFUL = "(service = 'openai' AND (status_code IS NULL OR status_code BETWEEN 200 AND 299))"

BILLED_TOKENS = f"CASE WHEN meter IN ({', '.join(map(engine.literal, match.TOKEN_METERS))}) THEN quantity ELSE 0 END"
USAGE_COST = f"CASE WHEN meter NOT IN ({', '.join(map(engine.literal, fixed_costs.METERS))}) THEN cost END"
"""SQL over `daily_billing`: the tokens of a line, and the cost that comes from usage and not from fixed costs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Day:
    """What became of one usage date: made, unchanged, or held with the reason."""

    usage_date: dt.date
    outcome: str
    reason: str | None = None


class Unbalanced(Exception):
    """A day's requests, tokens or cost do not add up; the message has both figures."""


class _Stage:
    """What both stages share: find the days whose input changed, make them in chunks, hold the ones that fail, write the others."""

    table: str

    def __init__(self, lake: ObjectStore) -> None:
        self._lake = lake
        self.held = Held(lake, self.table)

    def plan(self, days: Sequence[dt.date]) -> dict[dt.date, str]:
        """The input digest of each day that differs from what its objects were made from."""
        raise NotImplementedError

    @property
    def objects(self) -> tuple[Days, Days]:
        """The tables whose days the stage makes, in the order in which it replaces them."""
        raise NotImplementedError

    def size(self, day: dt.date) -> int:
        """Roughly how many events the day has, for the size of chunks."""
        raise NotImplementedError

    def make(self, db: duckdb.DuckDBPyConnection, days: dict[dt.date, str]) -> dict[dt.date, str]:
        """Compute the days inside the connection; returns the reasons of those that must be held."""
        raise NotImplementedError

    def write(self, db: duckdb.DuckDBPyConnection, day: dt.date, input_digest: str, etags: list[str | None]) -> None:
        """Replace the day's objects. Raises `Changed`."""
        raise NotImplementedError

    def run(self, days: Sequence[dt.date], progress: Progress) -> Iterator[Day]:
        """Bring the days up to date and say what became of each; one that fails keeps its previous version and stops no other."""
        wanted = sorted(set(days))
        held_before = set(self.held.reasons())
        for _ in range(_ATTEMPTS):
            footers = [table.footers() for table in self.objects]
            versions = {day: [found[day][1] if day in found else None for found in footers] for day in wanted}
            stale = self.plan(wanted)
            for day in wanted:
                if day not in stale:
                    if day in held_before:
                        self.held.release(day)
                    yield Day(day, "unchanged")
            wanted, done = [], len(days) - len(stale)
            for chunk in self._chunks(stale):
                for day, reason in self._make(chunk, versions):
                    if reason is None:
                        if day in held_before:
                            self.held.release(day)
                        yield Day(day, "made")
                    elif reason == _OVERTAKEN:
                        wanted.append(day)
                    else:
                        self.held.hold(day, reason, chunk[day])
                        yield Day(day, "held", reason=reason)
                done += len(chunk)
                progress(done, len(days), f"{self.table} up to {max(chunk)}")
            if not wanted:
                return
        for day in wanted:
            self.held.hold(day, "other runs kept replacing the day while it was made", "")
            yield Day(day, "held", reason="other runs kept replacing the day while it was made")

    def _chunks(self, stale: dict[dt.date, str]) -> Iterator[dict[dt.date, str]]:
        chunk: dict[dt.date, str] = {}
        size = 0
        for day, input_digest in stale.items():
            if chunk and size + self.size(day) > _CHUNK_EVENTS:
                yield chunk
                chunk, size = {}, 0
            chunk[day] = input_digest
            size += self.size(day)
        if chunk:
            yield chunk

    def _make(self, chunk: dict[dt.date, str], versions: dict[dt.date, list[str | None]]) -> Iterator[tuple[dt.date, str | None]]:
        try:
            with engine.connect(self._lake.staging()) as db:
                reasons = self.make(db, chunk)
                with concurrent.futures.ThreadPoolExecutor(_WRITES) as pool:
                    writes = {
                        day: pool.submit(self.write, db.cursor(), day, input_digest, versions[day])
                        for day, input_digest in chunk.items()
                        if day not in reasons
                    }
                    yield from reasons.items()
                    for day, write in writes.items():
                        try:
                            write.result()
                            yield day, None
                        except Changed:
                            yield day, _OVERTAKEN
                        except Unbalanced as error:
                            yield day, str(error)
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException):
            raise  # a fault of ours, not of the day's data
        except (duckdb.Error, NotFound, PriceOverflow) as error:
            if len(chunk) > 1:
                # find the day that fails, so that the others are made
                for day, input_digest in chunk.items():
                    yield from self._make({day: input_digest}, versions)
            else:
                yield next(iter(chunk)), _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, PriceOverflow):
        return str(error)
    if isinstance(error, (duckdb.OutOfRangeException, duckdb.ConversionException)):
        return f"a quantity, price or cost of the day is too large for its column: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {error}"


_OVERTAKEN = "overtaken"


class Enrichment(_Stage):
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
        made = _made_from(self.objects)
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
                replaced_by_moved=", ".join(f"coalesce(e.{name}, m.{name}) AS {name}" for name in COMPLETED),
                long_context_tokens=match.LONG_CONTEXT_TOKENS,
                combination=", ".join(_COMBINATION),
            )
        )
        meters = _meters_in_use(db, "events")
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
        raw = _by_day(db, f"SELECT usage_date, count(*), {tables.TOKENS} FROM events GROUP BY 1")
        kept = _by_day(db, f"SELECT usage_date, count(*), {tables.TOKENS} FROM accepted GROUP BY 1")
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


class DailyTables(_Stage):
    """Days of `daily_usage` and `daily_billing`, made from the days of `enriched_usage`."""

    table = "daily_billing"

    def __init__(self, lake: ObjectStore, enrichment: Enrichment, reference: Callable[[], Reference]) -> None:
        super().__init__(lake)
        self._enrichment, self._load_reference = enrichment, reference
        self._sources: dict[dt.date, tuple[dict[str, object], str]] = {}
        self.usage, self.billing = Days(lake, "daily_usage"), Days(lake, "daily_billing")
        self._periods = Periods(lake)
        self._closed: list[str] = []

    def plan(self, days: Sequence[dt.date]) -> dict[dt.date, str]:
        made, sources = _made_from(self.objects), self._enrichment.days.footers()
        self._sources = sources
        inputs = {day: str(sources[day][0].get("input")) for day in days if day in sources}
        return {day: made_from for day, made_from in inputs.items() if made.get(day) != {made_from}}

    def stale(self) -> dict[dt.date, str]:
        """Every usage date whose daily tables differ from the enriched usage they would be made from."""
        return self.plan(self._enrichment.days.existing())

    @property
    def objects(self) -> tuple[Days, Days]:
        return self.usage, self.billing

    def size(self, day: dt.date) -> int:
        return self._enrichment.days.rows(day)

    def source(self, days: Iterable[dt.date]) -> str:
        """SQL: the FROM item of the days' enriched usage, which must exist."""
        return engine.read_parquet(self._enrichment.days.paths(list(days)))

    def make(self, db: duckdb.DuckDBPyConnection, days: dict[dt.date, str]) -> dict[dt.date, str]:
        self._closed = self._periods.closed()
        reference = self._load_reference()
        unbalanced = self.rate(db, days, reference)
        correct(db, self._periods, self._closed, days)
        return self._unbalanced(db, days) | unbalanced | self._overtaken(days, reference)

    def rate(self, db: duckdb.DuckDBPyConnection, days: Iterable[dt.date], reference: Reference, source: str | None = None) -> dict[dt.date, str]:
        """Compute the days as if no month was closed, from another FROM item with the columns of `enriched_usage` where one is given.

        Returns the days whose fixed costs cannot be computed, with the reason.
        """
        db.execute(f"CREATE VIEW enriched AS SELECT * FROM {source or self.source(days)}")
        match.load_reference(db, reference)
        own = ", ".join(tables.DIMENSIONS)
        no_tokens = "coalesce(prompt_tokens, completion_tokens) IS NULL"
        instead = ", ".join(f"coalesce(sum({count}) FILTER ({no_tokens}), 0) AS {count}" for count in match.INSTEAD_OF_TOKENS.values())
        db.execute(engine.sql_file("billing", "daily_groups.sql").format(dimensions=own, instead_of_tokens=instead))
        used = _meters_in_use(db, "daily_groups")
        match.match_prices(db, "daily_groups", reference, used)
        quantities = {meter: sql for meter, sql in (match.METER_QUANTITIES | match.INSTEAD_OF_TOKENS).items() if meter in used}
        meters = ", ".join(f"{{'meter': '{meter}', 'quantity': CAST({quantity} AS DECIMAL(24,6))}}" for meter, quantity in quantities.items())
        usage = engine.sql_file("billing", "daily_usage.sql").format(dimensions=own)
        costs = {f"{level}cost": match.cost_by_meter("m.meter", "sum(m.quantity)", f"r.{level}token_price") for level in ("", "list_", "contracted_")}
        billing = engine.sql_file("billing", "daily_billing.sql").format(
            dimensions=own,
            dimensions_of_m=", ".join(f"m.{d}" for d in tables.DIMENSIONS),
            meters=meters,
            same_price_key=match.same_price_key("m"),
            line_id=tables.line_id(),
            **costs,
        )
        unbalanced = fixed_costs.load_lines(db, reference, days)
        for table, columns, select in (("daily_usage", tables.DAILY_USAGE, usage), ("daily_billing", tables.DAILY_BILLING, billing)):
            db.execute(f"CREATE TABLE {table} AS SELECT {tables.select_list(columns)} FROM ({select}) ORDER BY ALL")
        return unbalanced

    def _overtaken(self, days: Iterable[dt.date], reference: Reference) -> dict[dt.date, str]:
        """The days whose enriched usage was replaced meanwhile, or was made with other reference data."""
        held: dict[dt.date, str] = {}
        for day in days:
            footer, etag = self._enrichment.days.footer(day)
            if etag != self._sources[day][1]:
                held[day] = _OVERTAKEN
            elif footer.get("reference") != engine.digest(reference.on(day).content()):
                held[day] = "the reference data changed after the day was enriched: run the day again"
        return held

    def _unbalanced(self, db: duckdb.DuckDBPyConnection, days: Iterable[dt.date]) -> dict[dt.date, str]:
        """The days whose lines do not add up to the enriched usage, in tokens or in cost."""
        nothing = (0, None)
        enriched = _by_day(db, f"SELECT usage_date, {tables.TOKENS}, sum(cost) FROM enriched GROUP BY 1")
        usage = _by_day(db, f"SELECT usage_date, {tables.TOKENS}, sum(cost) FROM daily_usage GROUP BY 1")
        billed = _by_day(db, f"SELECT usage_date, CAST(sum({BILLED_TOKENS}) AS BIGINT), sum({USAGE_COST}) FROM daily_billing GROUP BY 1")
        held: dict[dt.date, str] = {}
        for day in days:
            source = enriched.get(day, nothing)
            for name, (tokens, cost) in (("daily_usage", usage.get(day, nothing)), ("daily_billing", billed.get(day, nothing))):
                if (tokens or 0, cost or 0) != (source[0], source[1] or 0):
                    held[day] = f"enriched usage has {source[0]} tokens at {source[1]}, but {name} has {tokens} at {cost}"
        return held

    def write(self, db: duckdb.DuckDBPyConnection, day: dt.date, input_digest: str, etags: list[str | None]) -> None:
        if self._periods.closed() != self._closed:
            raise Changed(f"a month was closed while {day} was made")
        made_from, _ = self._sources[day]
        footer = {"input": input_digest, "code": made_from.get("code"), "reference_version": made_from.get("reference_version")}
        for table, etag in zip(self.objects, etags, strict=True):
            select = f"SELECT * FROM {table.table} WHERE usage_date = DATE '{day}'"
            if table is self.billing:
                footer["digest"] = digest.of_day(db.execute(select).fetchall())
            table.replace(day, engine.stage(db, self._lake.staging(), select, footer_metadata(footer)), replacing=etag)
        if self._periods.closed() != self._closed:
            # closing looks for replaced days too, so that one of the two sees the other
            self.billing.delete(day)


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


def _made_from(tables_of_day: Iterable[Days]) -> dict[dt.date, set[object]]:
    """The input digests that the tables' objects of each day name, None for a missing object: exactly one when all are up to date."""
    footers = [table.footers() for table in tables_of_day]
    return {day: {found[day][0].get("input") if day in found else None for found in footers} for found in footers for day in found}


def _by_day(db: duckdb.DuckDBPyConnection, select: str) -> dict[dt.date, tuple[int, ...]]:
    return {day: tuple(rest) for day, *rest in db.execute(select).fetchall()}


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


def _meters_in_use(db: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """The meters that any row of the table may use: most gateways see neither audio nor images, and every meter costs time for every request."""
    details = match.METER_DETAILS
    seen = ", ".join(f"coalesce(bool_or({column} > 0), false)" for column in details.values())
    [flags] = db.execute(f"SELECT {seen} FROM {table}").fetchall()
    unused = {meter for meter, used in zip(details, flags, strict=True) if not used}
    return [meter for meter in match.METER_QUANTITIES if meter not in unused]


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
