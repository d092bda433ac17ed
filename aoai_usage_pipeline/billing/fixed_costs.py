"""Fixed costs in the daily bill: which days have any, and the day's capacity lines as rows of `daily_billing`."""

import dataclasses
import datetime as dt
from collections.abc import Collection, Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TypeVar

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing.capacity import IDLE, PROVISIONED, UNUSED, CapacityLine, Payer, Usage, lines, total
from aoai_usage_pipeline.reference import Reference
from aoai_usage_pipeline.reference.capacity import Capacity, Reservation

Row = TypeVar("Row", Capacity, Reservation)

METERS = (PROVISIONED, IDLE, UNUSED)

_USAGE = """
SELECT usage_date, hour(event_time), deployment, gateway, subscription_id, product, application, team, cost_center, department,
    CAST(sum(greatest(coalesce(prompt_tokens, 0) - coalesce(cached_tokens, 0), 0)) AS BIGINT), CAST(sum(coalesce(completion_tokens, 0)) AS BIGINT)
FROM enriched WHERE deployment IN (SELECT unnest(?)) GROUP BY ALL
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


def load_lines(db: duckdb.DuckDBPyConnection, reference: Reference, of_days: Iterable[dt.date]) -> dict[dt.date, str]:
    """Make the table `capacity_lines` out of the view `enriched`; returns the reasons of days that must be held."""
    held: dict[dt.date, str] = {}
    found: list[tuple[dt.date, CapacityLine]] = []
    usage = usage_of(db, reference)
    for day in of_days if reference.capacity or reference.reservations else ():
        try:
            capacity, reservations = converted_on(reference, day)
        except NoRate as error:
            held[day] = str(error)
            continue
        of_day = lines(day, capacity, reservations, usage.get(day, []))
        costs: dict[str, Decimal] = {}
        for line in of_day:
            costs[line.currency] = costs.get(line.currency, Decimal(0)) + line.cost
        if costs != (expected := total(day, capacity, reservations)):
            held[day] = f"the capacity of the day costs {expected}, but its lines have {costs}"
        found += [(day, line) for line in of_day]
    departments = departments_of(reference)
    rows = [row_of(day, line, departments) for day, line in found]
    names = tables.names(tables.DAILY_BILLING)
    texts = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})  # noqa: F841 - read by name below
    db.execute(f"CREATE TABLE capacity_lines AS SELECT {tables.select_list(tables.DAILY_BILLING)} FROM texts")
    return held


def usage_of(db: duckdb.DuckDBPyConnection, reference: Reference) -> dict[dt.date, list[Usage]]:
    """What the requests of the view `enriched` used of the deployments with capacity, by day."""
    usage: dict[dt.date, list[Usage]] = {}
    if reference.capacity:
        for day, hour, deployment, *payer, uncached, output in db.execute(_USAGE, [[row.deployment for row in reference.capacity]]).fetchall():
            usage.setdefault(day, []).append(Usage(hour, deployment, Payer(*payer), uncached, output))
    return usage


def converted_on(reference: Reference, day: dt.date) -> tuple[list[Capacity], list[Reservation]]:
    """The capacity and the reservations in force on a day, priced in the billed currency. Raises `NoRate`."""
    in_force = reference.on(day)
    return [_converted(row, in_force) for row in in_force.capacity], [_converted(row, in_force) for row in in_force.reservations]


def departments_of(reference: Reference) -> dict[str | None, str | None]:
    """The department of every cost centre that has only one."""
    departments: dict[str | None, set[str | None]] = {}
    for owner in reference.cost_centers:
        departments.setdefault(owner.values["cost_center"], set()).add(owner.values["department"])
    return {cost_center: next(iter(of)) for cost_center, of in departments.items() if len(of) == 1}


def row_of(day: dt.date, line: CapacityLine, departments: Mapping[str | None, str | None]) -> dict[str, str | None]:
    """A line as texts by column of `daily_billing`. The department of an owner that only its cost centre names is from `departments_of`."""
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
        "pricing_currency": line.currency,
        "pricing_status": "priced",
    }


class NoRate(Exception):
    """A fixed cost is in a currency that cannot be billed."""


def _converted(row: Row, in_force: Reference) -> Row:
    """The row with its price in the billed currency, rounded half-even to 9 places."""
    to = in_force.billing_currency
    if to is None or row.currency == to:
        return row
    for rate in in_force.exchange_rates:
        if (rate.values["from_currency"], rate.values["to_currency"]) == (row.currency, to):
            price = "hourly_price" if isinstance(row, Capacity) else "term_price"
            converted = (getattr(row, price) * Decimal(str(rate.values["rate"]))).quantize(Decimal("1E-9"), ROUND_HALF_EVEN)
            return dataclasses.replace(row, **{price: converted}, currency=to)
    raise NoRate(f"fixed costs are in {row.currency}, and exchange_rates.csv has no rate to {to} on the day")
