"""Fixed costs in the daily bill: which days have any, and the day's capacity lines as rows of `daily_billing`."""

import dataclasses
import datetime as dt
from collections.abc import Collection, Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import TypeVar

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing.capacity import IDLE, PROVISIONED, UNUSED, CapacityLine, Payer, Usage, lines, total
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.reference.capacity import Capacity, Reservation

Row = TypeVar("Row", Capacity, Reservation)


class NoRate(ValueError):
    """A fixed cost is in a currency that cannot be billed."""


class Unconserved(Exception):
    """Capacity lines do not add up to what the capacity costs; the message has both figures."""


@dataclasses.dataclass(frozen=True, slots=True)
class FixedCost:
    """One capacity line in the billed currency, with the currency its price is in and the rate between them; None where they are the same."""

    line: CapacityLine
    pricing_currency: str
    exchange_rate: Decimal | None


METERS = (PROVISIONED, IDLE, UNUSED)
_EXACT = Context(prec=80)

_USAGE = """
SELECT usage_date, hour(event_time), deployment, gateway, subscription_id, product, application, team, cost_center, department,
    CAST(sum(greatest(coalesce(prompt_tokens, 0) - coalesce(cached_tokens, 0), 0)) AS BIGINT), CAST(sum(coalesce(completion_tokens, 0)) AS BIGINT)
FROM {source} WHERE usage_source IS NOT NULL AND deployment IS NOT NULL GROUP BY ALL
"""


def days(reference: Reference, start_date: dt.date, used: Collection[dt.date], today: dt.date) -> set[dt.date]:
    """The days up to today on which capacity or a reservation costs something, whether anything was used or not.

    A row without a first day counts from the first of the days `used`: nothing is known before it.
    """
    found: set[dt.date] = set()
    for row in (*reference.capacity, *reference.reservations):
        if begins := row.effective_from or min(used, default=None):
            first = max(start_date, begins.date() if isinstance(begins, dt.datetime) else begins)
            found |= {day for n in range((today - first).days + 1) if row.on(day := first + dt.timedelta(n))}
    return found


def hourly_usage(db: duckdb.DuckDBPyConnection, source: str) -> dict[dt.date, list[Usage]]:
    """What each payer used of each deployment in every hour, by usage date, out of rows of `enriched_usage`."""
    found: dict[dt.date, list[Usage]] = {}
    for day, hour, deployment, *payer, uncached, output in db.execute(_USAGE.format(source=source)).fetchall():
        found.setdefault(day, []).append(Usage(hour, deployment, Payer(*payer), uncached, output))
    return found


def of_day(day: dt.date, reference: Reference, usage: Iterable[Usage]) -> list[FixedCost]:
    """The day's fixed costs in the billed currency. Raises `NoRate`, and `Unconserved` when they do not add up to what the capacity costs."""
    in_force = reference.on(day)
    capacity, reservations = converted_on(reference, day)
    found = lines(day, capacity, reservations, usage)
    costs: dict[str, Decimal] = {}
    for line in found:
        costs[line.currency] = _EXACT.add(costs.get(line.currency, Decimal(0)), line.cost)
    if costs != (expected := total(day, capacity, reservations)):
        raise Unconserved(f"the capacity of the day costs {expected}, but its lines have {costs}")
    priced_in = {(False, row.capacity_id): row.currency for row in in_force.capacity}
    priced_in |= {(True, row.reservation_id): row.currency for row in in_force.reservations}
    currencies = [priced_in[line.meter == UNUSED, line.capacity_id] for line in found]
    return [FixedCost(line, currency, _rate(currency, in_force)) for line, currency in zip(found, currencies, strict=True)]


def converted_on(reference: Reference, day: dt.date) -> tuple[list[Capacity], list[Reservation]]:
    """The capacity and the reservations in force on a day, priced in the billed currency. Raises `NoRate`."""
    in_force, to = reference.on(day), reference.billing_currency
    capacity = [_converted(row, _rate(row.currency, in_force), to) for row in in_force.capacity]
    return capacity, [_converted(row, _rate(row.currency, in_force), to) for row in in_force.reservations]


def load_lines(db: duckdb.DuckDBPyConnection, reference: Reference, days: Iterable[dt.date]) -> dict[dt.date, str]:
    """Make the table `capacity_lines` out of the view `enriched`; returns the reasons of days that must be held."""
    held: dict[dt.date, str] = {}
    found: list[tuple[dt.date, FixedCost]] = []
    usage = hourly_usage(db, "enriched") if reference.capacity else {}
    for day in days if reference.capacity or reference.reservations else ():
        try:
            found += [(day, cost) for cost in of_day(day, reference, usage.get(day, []))]
        except (NoRate, Unconserved) as error:
            held[day] = str(error)
    departments = departments_of(reference)
    rows = [row_of(day, cost, departments) for day, cost in found]
    names = tables.names(tables.DAILY_BILLING)
    texts = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})  # noqa: F841 - read by name below
    db.execute(f"CREATE TABLE capacity_lines AS SELECT {tables.select_list(tables.DAILY_BILLING)} FROM texts")
    return held


def departments_of(reference: Reference) -> dict[str | None, str | None]:
    """The department of every cost centre that has only one."""
    departments: dict[str | None, set[str | None]] = {}
    for owner in reference.cost_centers:
        departments.setdefault(owner.values["cost_center"], set()).add(owner.values["department"])
    return {cost_center: next(iter(of)) for cost_center, of in departments.items() if len(of) == 1}


def row_of(day: dt.date, fixed: FixedCost, departments: Mapping[str | None, str | None]) -> dict[str, str | None]:
    """A line as texts by column of `daily_billing`. The department of an owner that only its cost centre names is from `departments_of`."""
    line, rate = fixed.line, fixed.exchange_rate
    department = line.payer.department or departments.get(line.payer.cost_center)
    cost = str(line.cost)
    return line.payer._asdict() | {
        "department": department,
        "usage_date": str(day),
        "billing_period": f"{day:%Y-%m}",
        "deployment": line.deployment,
        "meter": line.meter,
        "quantity": str(line.ptu_hours),
        "price_id": line.capacity_id,
        "cost": cost,
        "list_cost": cost,
        "contracted_cost": cost,
        "currency": line.currency,
        "pricing_currency": fixed.pricing_currency,
        "exchange_rate": None if rate is None else str(rate),
        "pricing_status": "priced",
    }


def _rate(currency: str, in_force: Reference) -> Decimal | None:
    """The exchange rate of a currency to the billed one, None where it is billed as it is. Raises `NoRate`."""
    to = in_force.billing_currency
    if to is None or currency == to:
        return None
    for rate in in_force.exchange_rates:
        if (rate.values["from_currency"], rate.values["to_currency"]) == (currency, to):
            return Decimal(str(rate.values["rate"]))
    raise NoRate(f"fixed costs are in {currency}, and exchange_rates.csv has no rate to {to} on the day")


def _converted(row: Row, rate: Decimal | None, to: str | None) -> Row:
    """The row with its price in the billed currency, rounded half-even to 9 places."""
    if rate is None:
        return row
    price = "hourly_price" if isinstance(row, Capacity) else "term_price"
    converted = _EXACT.multiply(getattr(row, price), rate).quantize(Decimal("1E-9"), ROUND_HALF_EVEN, _EXACT)
    return dataclasses.replace(row, **{price: converted}, currency=to)
