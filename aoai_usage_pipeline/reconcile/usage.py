"""Checks over usage dates: does every request and token that was ingested come out enriched and billed, and what is missing to price it."""

import dataclasses
import datetime as dt
from collections.abc import Sequence
from decimal import Decimal

from aoai_usage_pipeline.billing.daily_tables import BILLED_TOKENS, USAGE_COST, DailyTables
from aoai_usage_pipeline.billing.enrichment import Enrichment
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.lake.manifest import Manifest
from aoai_usage_pipeline.storage import ObjectStore

Row = dict[str, object]

MAX_ROWS = 100
"""How many offending rows are shown; the counts are always whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class DayFigures:
    """What one usage date comes to: coverage (None without successful calls), requests with usage but no price, and cost by currency."""

    usage_date: dt.date
    coverage: Decimal | None
    unpriced: int
    cost: dict[str, Decimal]


def figures(lake: ObjectStore, days: Sequence[dt.date]) -> list[DayFigures]:
    """The figures of those days that are enriched."""
    quality, billing = (Days(lake, table).paths(list(days)) for table in ("daily_quality", "daily_billing"))
    if not quality:
        return []
    with engine.connect(lake.staging()) as db:
        found = db.execute(f"SELECT usage_date, coverage, unpriced FROM {engine.read_parquet(quality)} ORDER BY 1").fetchall()
        select = "SELECT usage_date, currency, sum(cost) FROM {} WHERE cost IS NOT NULL GROUP BY ALL ORDER BY ALL"
        costs = db.execute(select.format(engine.read_parquet(billing))).fetchall() if billing else []
    return [DayFigures(*row, {currency: cost for day, currency, cost in costs if day == row[0]}) for row in found]


def unbalanced_requests(enrichment: Enrichment, days: Sequence[dt.date]) -> list[Row]:
    """Held days, and days where accepted and duplicates are not exactly the raw events."""
    rows: list[Row] = [
        {"usage_date": str(day), "parsed": None, "accepted": None, "duplicates": None, "reason": f"held: {reason}"}
        for day, reason in enrichment.held.reasons().items()
        if day in set(days)
    ]
    for day in days:
        footer, etag = enrichment.days.footer(day)
        if not etag:
            continue
        parsed, duplicates, accepted = int(str(footer["parsed"])), int(str(footer["duplicates"])), enrichment.days.rows(day)
        if parsed != accepted + duplicates:
            rows.append({"usage_date": str(day), "parsed": parsed, "accepted": accepted, "duplicates": duplicates, "reason": "does not add up"})
    return rows


def unbalanced_tokens(lake: ObjectStore, enrichment: Enrichment, days: Sequence[dt.date]) -> list[Row]:
    """Held days, and days where the enriched tokens are not exactly the raw ones without those of duplicates."""
    rows: list[Row] = [
        {"usage_date": str(day), "tokens_raw": None, "tokens_enriched": None, "reason": f"held: {reason}"}
        for day, reason in enrichment.held.reasons().items()
        if day in set(days)
    ]
    enriched = _sum_by_day(lake, enrichment.days, "coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)", days)
    for day in days:
        footer, etag = enrichment.days.footer(day)
        if etag and enriched.get(day, 0) != (raw := int(str(footer["tokens"]))):
            rows.append({"usage_date": str(day), "tokens_raw": raw, "tokens_enriched": enriched.get(day, 0), "reason": "does not add up"})
    return rows


def unbalanced_bill(lake: ObjectStore, enrichment: Enrichment, daily: DailyTables, days: Sequence[dt.date]) -> list[Row]:
    """Held days, and days whose billed tokens or cost are not exactly the enriched ones."""
    rows: list[Row] = [
        {
            "usage_date": str(day),
            "tokens_enriched": None,
            "tokens_billed": None,
            "cost_enriched": None,
            "cost_billed": None,
            "reason": f"held: {reason}",
        }
        for day, reason in daily.held.reasons().items()
        if day in set(days)
    ]
    tokens = _sum_by_day(lake, enrichment.days, "coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)", days)
    billed = _sum_by_day(lake, daily.billing, BILLED_TOKENS, days)
    cost, billed_cost = _sum_by_day(lake, enrichment.days, "cost", days), _sum_by_day(lake, daily.billing, USAGE_COST, days)
    for day in days:
        made_from = daily.billing.footer(day)[0].get("input")
        # a day that is enriched anew and not yet billed is stale, not wrong
        if made_from != enrichment.days.footer(day)[0].get("input"):
            continue
        if tokens.get(day, 0) != billed.get(day, 0) or cost.get(day, 0) != billed_cost.get(day, 0):
            rows.append(
                {
                    "usage_date": str(day),
                    "tokens_enriched": tokens.get(day),
                    "tokens_billed": billed.get(day),
                    "cost_enriched": str(cost.get(day)),
                    "cost_billed": str(billed_cost.get(day)),
                    "reason": "does not add up",
                }
            )
    return rows


def requests_where(
    lake: ObjectStore, enrichment: Enrichment, days: Sequence[dt.date], condition: str, columns: Sequence[str]
) -> tuple[int, list[Row]]:
    """How many requests of the days meet a condition over `enriched_usage`, and the first of them with their coordinates."""
    paths = enrichment.days.paths(list(days))
    if not paths:
        return 0, []
    names = ["usage_date", "request_id", *columns, "blob", "partition_id", "sequence_number", "offset"]
    with engine.connect(lake.staging()) as db:
        found = f"FROM {engine.read_parquet(paths)} WHERE {condition}"
        [(count,)] = db.execute(f"SELECT count(*) {found}").fetchall()
        shown = db.execute(
            f'SELECT {", ".join(f"""CAST("{n}" AS VARCHAR)""" for n in names)} {found} ORDER BY usage_date, blob, sequence_number LIMIT {MAX_ROWS}'
        ).fetchall()
    return count, [dict(zip(names, row, strict=True)) for row in shown]


def quarantined_records(lake: ObjectStore, manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> tuple[int, list[Row]]:
    """How many records of the capture dates are quarantined, and the first of them with their coordinates."""
    mine = [manifest for manifest in manifests if manifest.capture_date in set(dates) and manifest.quarantine]
    if not mine:
        return 0, []
    names = ["capture_date", "reason", "blob", "partition_id", "sequence_number", "offset", "bytes"]
    rows: list[Row] = []
    with engine.connect(lake.staging()) as db:
        for manifest in mine:
            if len(rows) < MAX_ROWS:
                paths = lake.local_paths([str(manifest.quarantine)])
                select = f'SELECT reason, blob, partition_id, sequence_number, "offset", bytes FROM {engine.read_parquet(paths)} LIMIT {MAX_ROWS}'
                rows += [dict(zip(names, (str(manifest.capture_date), *row), strict=True)) for row in db.execute(select).fetchall()]
    return sum(manifest.quarantined for manifest in mine), rows[:MAX_ROWS]


def quarantine_reasons(lake: ObjectStore, manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """How many bodies of the capture dates are quarantined for which kind of reason, with the coordinates of one of each."""
    names = [str(manifest.quarantine) for manifest in manifests if manifest.capture_date in set(dates) and manifest.quarantine]
    if not names:
        return []
    with engine.connect(lake.staging()) as db:
        found = db.execute(
            f"""SELECT reason_kind, contract, count(*), arg_min(e, e)
            FROM (SELECT split_part(reason, ':', 1) AS reason_kind, contract, struct_pack(blob, partition_id, sequence_number, "offset") AS e
                FROM {engine.read_parquet(lake.local_paths(names))})
            GROUP BY ALL ORDER BY count(*) DESC, reason_kind, contract LIMIT {MAX_ROWS}"""
        ).fetchall()
    return [{"reason": kind, "contract": contract or "unknown", "count": count} | example for kind, contract, count, example in found]


def low_coverage(enrichment: Enrichment, lake: ObjectStore, days: Sequence[dt.date], minimum: Decimal) -> list[Row]:
    """Days on which too few of the successful calls reported their usage."""
    paths = enrichment.quality.paths(list(days))
    if not paths:
        return []
    with engine.connect(lake.staging()) as db:
        select = f"SELECT usage_date, coverage FROM {engine.read_parquet(paths)} WHERE coverage < CAST(? AS DECIMAL(9,6)) ORDER BY 1"
        found = db.execute(select, [str(minimum)]).fetchall()
    return [{"usage_date": str(day), "coverage": str(coverage), "minimum": str(minimum)} for day, coverage in found]


def _sum_by_day(lake: ObjectStore, table: Days, expression: str, days: Sequence[dt.date]) -> dict[dt.date, object]:
    paths = table.paths(list(days))
    if not paths:
        return {}
    with engine.connect(lake.staging()) as db:
        select = f"SELECT usage_date, coalesce(sum({expression}), 0) FROM {engine.read_parquet(paths)} GROUP BY 1"
        return dict(db.execute(select).fetchall())
