"""The stage that makes days of `daily_usage` and `daily_billing`: the lines of the bill."""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest, fixed_costs
from aoai_usage_pipeline.billing.enrichment import Enrichment
from aoai_usage_pipeline.billing.periods import Periods, correct
from aoai_usage_pipeline.billing.stage import OVERTAKEN, Stage, by_day, made_from, meters_in_use
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days, footer_metadata
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.storage import Changed, ObjectStore

BILLED_TOKENS = f"CASE WHEN meter IN ({', '.join(map(engine.literal, match.TOKEN_METERS))}) THEN quantity ELSE 0 END"
USAGE_COST = f"CASE WHEN meter NOT IN ({', '.join(map(engine.literal, fixed_costs.METERS))}) THEN cost END"
"""SQL over `daily_billing`: the tokens of a line, and the cost that comes from usage and not from fixed costs."""


class DailyTables(Stage):
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
        made, sources = made_from(self.objects), self._enrichment.days.footers()
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
        instead = ", ".join(f"coalesce(sum({count}) FILTER ({match.NO_TOKENS}), 0) AS {count}" for count in match.INSTEAD_OF_TOKENS.values())
        db.execute(engine.sql_file("billing", "daily_groups.sql").format(dimensions=own, instead_of_tokens=instead))
        used = meters_in_use(db, "daily_groups")
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
                held[day] = OVERTAKEN
            elif footer.get("reference") != engine.digest(reference.on(day).content()):
                held[day] = "the reference data changed after the day was enriched: run the day again"
        return held

    def _unbalanced(self, db: duckdb.DuckDBPyConnection, days: Iterable[dt.date]) -> dict[dt.date, str]:
        """The days whose lines do not add up to the enriched usage, in tokens or in cost."""
        nothing = (0, None)
        enriched = by_day(db, f"SELECT usage_date, {tables.TOKENS}, sum(cost) FROM enriched GROUP BY 1")
        usage = by_day(db, f"SELECT usage_date, {tables.TOKENS}, sum(cost) FROM daily_usage GROUP BY 1")
        billed = by_day(db, f"SELECT usage_date, CAST(sum({BILLED_TOKENS}) AS BIGINT), sum({USAGE_COST}) FROM daily_billing GROUP BY 1")
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
