"""Statements: what a cost centre pays for a billing period, line by line, with the exact total, the amount in whole cents and the difference."""

import dataclasses
import json
from decimal import ROUND_HALF_EVEN, Decimal

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.lake.engine import literal

_WITHOUT_CENTS = {"BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF"}
"""Currencies without a minor unit (ISO 4217)."""

_GROUP = (
    "deployment", "model", "model_version", "deployment_sku", "region", "service_tier", "meter", "unit_price", "unit_tokens", "price_id",
    "pricing_status", "usage_source", "charge_class", "correction_of",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class StatementLine:
    """The daily lines of one deployment, meter and price together. `cost` is None where nothing has a price."""

    deployment: str | None
    model: str | None
    model_version: str | None
    deployment_sku: str | None
    region: str | None
    service_tier: str | None
    meter: str
    unit_price: Decimal | None
    unit_tokens: int | None
    price_id: str | None
    pricing_status: str
    usage_source: str | None
    charge_class: str | None
    correction_of: str | None
    quantity: Decimal
    cost: Decimal | None


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """One cost centre's period in one currency. `total` is exactly the sum of the lines, `amount` what is charged, `rounding` the difference.

    `digest` is over the sorted lines of `daily_billing` that it is made of.
    """

    cost_center: str
    currency: str | None
    lines: tuple[StatementLine, ...]
    total: Decimal
    amount: Decimal
    rounding: Decimal
    daily_lines: int
    digest: str


def statements(db: duckdb.DuckDBPyConnection, lines: str, period: str) -> list[Statement]:
    """The statements of a period out of a FROM item with lines of `daily_billing`, by cost centre and currency.

    Lines without a price have no currency: they are statements of their own, with a total of 0 and a status that says why.
    """
    of_period = f"FROM {lines} WHERE billing_period = {literal(period)}"
    db.execute(f"CREATE OR REPLACE TEMP TABLE stated AS SELECT {tables.select_list(tables.DAILY_BILLING)} {of_period}")
    found = []
    for cost_center, currency in db.execute("SELECT DISTINCT cost_center, currency FROM stated ORDER BY ALL").fetchall():
        mine = "FROM stated WHERE cost_center IS NOT DISTINCT FROM ? AND currency IS NOT DISTINCT FROM ?"
        of = [cost_center, currency]
        daily = db.execute(f"SELECT * {mine}", of).fetchall()
        columns = ", ".join(_GROUP)
        grouped = db.execute(f"SELECT {columns}, sum(quantity), sum(cost) {mine} GROUP BY {columns} ORDER BY ALL", of).fetchall()
        stated = tuple(StatementLine(*row) for row in grouped)
        [(total,)] = db.execute(f"SELECT coalesce(sum(cost), 0) {mine}", of).fetchall()
        if total != sum((line.cost for line in stated if line.cost is not None), Decimal(0)):
            raise ArithmeticError(f"the lines of {cost_center} in {period} do not add up to {total}")
        amount = total.quantize(Decimal(1) if currency in _WITHOUT_CENTS else Decimal("0.01"), ROUND_HALF_EVEN)
        found.append(Statement(cost_center, currency, stated, total, amount, amount - total, len(daily), digest.of_day(daily)))
    return found


def summary(found: list[Statement]) -> bytes:
    """What is stored of the statements of a closed period: JSON, the amounts as text."""
    return json.dumps(
        [{field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "lines"} for one in found], default=digest.text
    ).encode()
