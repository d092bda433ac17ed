"""What a day of capacity costs and who bears it: hours of deployed PTUs, netted with reservations, split by method, conserved to the last unit.

Amounts are whole units of 10^-15 inside, so that nothing is rounded but the hour's cost, once.
"""

import calendar
import dataclasses
import datetime as dt
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from aoai_usage_pipeline.reference.capacity import TERMS, UNALLOCATED, Capacity, Reservation

PROVISIONED, IDLE, UNUSED = "provisioned_capacity", "idle_capacity", "unused_reservation"
UNITS, PERCENT, PTU_HOURS = "units", "percent", "ptu_hours"
_PLACES, _QUANTITY_PLACES = 15, 6


class Payer(NamedTuple):
    """Who pays, in the columns of the daily tables. Of an agreed share and of idle capacity only the gateway of the row and the owner are known."""

    gateway: str | None = None
    subscription_id: str | None = None
    product: str | None = None
    application: str | None = None
    team: str | None = None
    cost_center: str | None = None
    department: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a payer used of a deployment in one hour (0 to 23) of the day. Cached tokens take no capacity and are in neither count."""

    hour: int
    deployment: str | None
    payer: Payer
    uncached_input_tokens: int
    output_tokens: int

    def units(self, output_ratio: Decimal) -> Fraction:
        """The capacity it took, in uncached input tokens."""
        return self.uncached_input_tokens + Fraction(output_ratio) * self.output_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class CapacityLine:
    """One line of the day. `driver` is what its cost was split by and `driver_quantity` counts: PTU-weighted units, percent, or its own PTU-hours."""

    payer: Payer
    deployment: str | None
    meter: str
    ptu_hours: Decimal
    cost: Decimal
    currency: str
    capacity_id: str
    method: str | None
    driver: str
    driver_quantity: Decimal


@dataclasses.dataclass(frozen=True, slots=True)
class HourPart:
    """What a line has of one hour (0 to 23): `share` of the hour's cost, which makes `part` of it, the remainder of the split included.

    `cost` is that of all PTU-hours deployed, or reserved and unused, in the hour; `prepaid` is the part of it that reservations paid. With method
    `peak` the share is that of the busiest hour, `judged_by`; otherwise that is the hour itself. Of a line split by units, `units` are
    the payer's in the hour it is judged by, and `of_units` everybody's, or what the PTUs can do where that is known and more.
    """

    hour: int
    judged_by: int
    ptu_hours: Fraction
    cost: Decimal
    prepaid: Decimal
    share: Fraction
    part: Decimal
    units: Fraction | None = None
    of_units: Fraction | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Charge:
    """What an hour of deployed PTUs, or of the unused part of a reservation, costs, and the part of it that reservations paid."""

    hour: int
    of: Capacity | Reservation
    ptu_minutes: Fraction
    cost: int
    prepaid: int


_Key = tuple[str | None, ...]
_Used = Mapping[Capacity | Reservation, Mapping[int, Mapping[Payer, Fraction]]]


def lines(day: dt.date, capacity: Iterable[Capacity], reservations: Iterable[Reservation], usage: Iterable[Usage]) -> list[CapacityLine]:
    """The day's lines in a fixed order, whatever the order of what is given. Raises ValueError for negative tokens."""
    charges = _by_hour(day, capacity, reservations)
    used = _by_row(charges, usage)
    found: list[CapacityLine] = []
    for of, hours in charges.items():
        found += _allocated(of, hours, used[of]) if isinstance(of, Capacity) else _unused(of, hours)
    return sorted(found, key=lambda line: _rank((line.capacity_id, line.meter, line.driver, *line.payer)))


def hours_of(
    line: CapacityLine, day: dt.date, capacity: Iterable[Capacity], reservations: Iterable[Reservation], usage: Iterable[Usage]
) -> list[HourPart]:
    """What one of the day's lines is made of, hour by hour; the parts add up to its cost."""
    charges = _by_hour(day, capacity, reservations)
    used = _by_row(charges, usage)
    key = (*line.payer, line.meter, line.driver)
    found: list[HourPart] = []
    for of, hours in charges.items():
        if isinstance(of, Reservation):
            if line.meter == UNUSED and of.reservation_id == line.capacity_id:
                found += [_hour_part(charge, hour, Fraction(1), charge.cost) for hour, charge in hours.items()]
        elif line.meter != UNUSED and of.capacity_id == line.capacity_id:
            for hour, judged, split, parts in _split_hours(of, hours, used[of]):
                if key in parts:
                    drawn, whole = None, None
                    if line.driver == UNITS:
                        drawn, whole = used[of][judged][line.payer], _whole(of, hours[judged].ptu_minutes, used[of][judged])
                    found.append(_hour_part(hours[hour], judged, split[key], parts[key], drawn, whole))
    return found


def _hour_part(charge: _Charge, judged: int, share: Fraction, part: int, units: Fraction | None = None, of_units: Fraction | None = None) -> HourPart:
    cost, prepaid, of_line = (_decimal(amount, _PLACES) for amount in (charge.cost, charge.prepaid, part))
    return HourPart(charge.hour, judged, charge.ptu_minutes / 60, cost, prepaid, share, of_line, units, of_units)


def total(day: dt.date, capacity: Iterable[Capacity], reservations: Iterable[Reservation]) -> dict[str, Decimal]:
    """What the day's lines must add up to, by currency, before anything is allocated."""
    sums: dict[str, int] = defaultdict(int)
    for charge in _charges(day, capacity, reservations):
        sums[charge.of.currency] += charge.cost
    return {currency: _decimal(amount, _PLACES) for currency, amount in sorted(sums.items())}


def amortised(reservation: Reservation, day: dt.date) -> Decimal:
    """The day's part of the term's price. The parts of a term's days add up to it exactly.

    Terms follow each other from `effective_from`, or are calendar months and years when that is blank.
    """
    return _decimal(_amortised(reservation, day), _PLACES)


def _amortised(reservation: Reservation, day: dt.date) -> int:
    anchor, months = reservation.effective_from or dt.date(1, 1, 1), TERMS[reservation.term]
    elapsed = ((day.year - anchor.year) * 12 + day.month - anchor.month) // months * months
    if _months_after(anchor, elapsed) > day:
        elapsed -= months
    first = _months_after(anchor, elapsed)
    return _equal_part(_units(reservation.term_price), (day - first).days, (_months_after(anchor, elapsed + months) - first).days)


def _months_after(start: dt.date, months: int) -> dt.date:
    """The same day some months later, or the last of that month when it has no such day."""
    year, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    return dt.date(year, month + 1, min(start.day, calendar.monthrange(year, month + 1)[1]))


def _by_hour(day: dt.date, capacity: Iterable[Capacity], reservations: Iterable[Reservation]) -> dict[Capacity | Reservation, dict[int, _Charge]]:
    charges: dict[Capacity | Reservation, dict[int, _Charge]] = defaultdict(dict)
    for charge in _charges(day, capacity, reservations):
        charges[charge.of][charge.hour] = charge
    return charges


def _charges(day: dt.date, capacity: Iterable[Capacity], reservations: Iterable[Reservation]) -> Iterator[_Charge]:
    """The cost of every hour: reservations cover what is deployed in their scope, the rest is at the hourly price, and all in a scope share both."""
    scopes: dict[_Key, tuple[list[Capacity], list[Reservation]]] = {}
    for reservation in filter(None, (row.on(day) for row in reservations)):
        scopes.setdefault((reservation.deployment_sku, reservation.region), ([], []))[1].append(reservation)
    for row in filter(None, (row.on(day) for row in capacity)):
        scope = (row.deployment_sku, row.region)
        scopes.setdefault(scope if scope in scopes else (row.capacity_id,), ([], []))[0].append(row)
    for rows, reserved in scopes.values():
        for hour in range(24):
            yield from _hour(day, hour, rows, reserved)


def _hour(day: dt.date, hour: int, rows: list[Capacity], reserved: list[Reservation]) -> Iterator[_Charge]:
    minutes = {(row.capacity_id,): row.ptus * _minutes(row, day, hour) for row in rows}
    deployed, bought = sum(minutes.values()), 60 * sum(reservation.ptus for reservation in reserved)
    covered, prepaid = min(deployed, bought), 0
    for reservation in reserved:
        cost = _equal_part(_amortised(reservation, day), hour, 24)
        used = round(Fraction(cost * covered, bought))
        prepaid += used
        if covered < bought:
            yield _Charge(hour, reservation, Fraction(60 * reservation.ptus * (bought - covered), bought), cost - used, cost - used)
    if not deployed:
        return
    listed = {(row.capacity_id,): minutes[row.capacity_id,] * Fraction(row.hourly_price) / 60 for row in rows}
    excess = _units(sum(listed.values()) * Fraction(deployed - covered, deployed))
    at_reserved_rate, at_hourly_price = _apportioned(prepaid, minutes), _apportioned(excess, listed)
    for row in rows:
        key = (row.capacity_id,)
        if minutes[key]:
            yield _Charge(hour, row, Fraction(minutes[key]), at_reserved_rate[key] + at_hourly_price[key], at_reserved_rate[key])


def _minutes(row: Capacity, day: dt.date, hour: int) -> int:
    """How many minutes of an hour of the day the row is in force."""
    start = dt.datetime.combine(day, dt.time(hour))
    end = start + dt.timedelta(hours=1)
    return max(0, (min(row.effective_to or end, end) - max(row.effective_from or start, start)) // dt.timedelta(minutes=1))


def _by_row(charges: Mapping[Capacity | Reservation, Mapping[int, _Charge]], usage: Iterable[Usage]) -> _Used:
    """The PTU-weighted units of every row, hour and payer. What an hour used of a deployment with several rows is spread over their PTU-minutes."""
    deployed: dict[tuple[int, str | None, str | None], list[tuple[Capacity, Fraction]]] = defaultdict(list)
    for of, hours in charges.items():
        if isinstance(of, Capacity):
            for hour, charge in hours.items():
                deployed[hour, of.gateway, of.deployment].append((of, charge.ptu_minutes))
    used: dict[Capacity | Reservation, dict[int, dict[Payer, Fraction]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(Fraction)))
    for use in usage:
        if use.uncached_input_tokens < 0 or use.output_tokens < 0:
            raise ValueError(f"usage of a negative number of tokens: {use}")
        rows = deployed.get((use.hour, use.payer.gateway, use.deployment)) or deployed.get((use.hour, None, use.deployment), [])
        whole = sum(minutes for _, minutes in rows)
        for row, minutes in rows:
            used[row][use.hour][use.payer] += use.units(row.output_ratio) * minutes / whole
    return used


def _split_hours(
    row: Capacity, hours: Mapping[int, _Charge], used: Mapping[int, Mapping[Payer, Fraction]]
) -> Iterator[tuple[int, int, dict[_Key, Fraction], dict[_Key, int]]]:
    """Each hour, the hour that it is judged by (itself, or with method peak the busiest one), the split of its cost, and the parts."""
    judged = {hour: hour for hour in hours}
    if row.method == "peak":
        judged = dict.fromkeys(hours, max(hours, key=lambda hour: (sum(used[hour].values()), -hour)))
    splits = {hour: _split(row, hours[hour].ptu_minutes, used[hour]) for hour in set(judged.values())}
    for hour, charge in hours.items():
        yield hour, judged[hour], splits[judged[hour]], _apportioned(charge.cost, splits[judged[hour]])


def _allocated(row: Capacity, hours: Mapping[int, _Charge], used: Mapping[int, Mapping[Payer, Fraction]]) -> Iterator[CapacityLine]:
    """The lines of one row's day: each hour's cost split by that hour, or every hour's by the busiest one."""
    cost: dict[_Key, int] = defaultdict(int)
    minutes: dict[_Key, Fraction] = defaultdict(Fraction)
    judges: set[int] = set()
    for hour, judged, split, parts in _split_hours(row, hours, used):
        judges.add(judged)
        for key, part in parts.items():
            cost[key] += part
            minutes[key] += split[key] * hours[hour].ptu_minutes
    ptu_hours = _apportioned(_units(sum(minutes.values()) / 60, _QUANTITY_PLACES), minutes)
    for key, amount in cost.items():
        *columns, meter, driver = key
        payer = Payer(*columns)
        quantity = ptu_hours[key]
        if driver == UNITS:
            quantity = _units(sum(used[hour][payer] for hour in judges), _QUANTITY_PLACES)
        elif driver == PERCENT:
            quantity = _units(dict(row.shares)[payer.cost_center], _QUANTITY_PLACES)
        yield _line(payer, row.deployment, meter, ptu_hours[key], amount, row.currency, row.capacity_id, row.method, driver, quantity)


def _split(row: Capacity, ptu_minutes: Fraction, used: Mapping[Payer, Fraction]) -> dict[_Key, Fraction]:
    """Who bears which part of an hour's cost; the parts add up to 1."""
    fixed = {"shares": Fraction(1), "two_part": Fraction(row.fixed_part) / 100}.get(row.method, Fraction(0))
    split: dict[_Key, Fraction] = {}
    for cost_center, percent in row.shares:
        split[*_owner(cost_center, row.gateway), PROVISIONED, PERCENT] = fixed * Fraction(percent) / 100
    if any(used.values()):
        whole = _whole(row, ptu_minutes, used)
        for payer, drawn in used.items():
            split[*payer, PROVISIONED, UNITS] = (1 - fixed) * drawn / whole
    split[*_owner(row.idle_to, row.gateway), IDLE, PTU_HOURS] = 1 - sum(split.values())
    return {key: part for key, part in split.items() if part}


def _whole(row: Capacity, ptu_minutes: Fraction, used: Mapping[Payer, Fraction]) -> Fraction:
    """The units that usage is a part of: all of it, or what the PTUs can do where that is known and more."""
    return max(sum(used.values(), Fraction()), ptu_minutes * Fraction(row.units_per_ptu_minute or 0))


def _unused(reservation: Reservation, hours: Mapping[int, _Charge]) -> Iterator[CapacityLine]:
    ptu_hours = _units(sum(charge.ptu_minutes for charge in hours.values()) / 60, _QUANTITY_PLACES)
    cost = sum(charge.cost for charge in hours.values())
    owner = _owner(reservation.idle_to)
    yield _line(owner, None, UNUSED, ptu_hours, cost, reservation.currency, reservation.reservation_id, None, PTU_HOURS, ptu_hours)


def _line(
    payer: Payer, deployment: str | None, meter: str, ptu_hours: int, cost: int, currency: str, capacity_id: str, method: str | None,
    driver: str, quantity: int,
) -> CapacityLine:  # fmt: skip
    hours, driven = _decimal(ptu_hours, _QUANTITY_PLACES), _decimal(quantity, _QUANTITY_PLACES)
    return CapacityLine(payer, deployment, meter, hours, _decimal(cost, _PLACES), currency, capacity_id, method, driver, driven)


def _owner(cost_center: str, gateway: str | None = None) -> Payer:
    unknown = UNALLOCATED if cost_center == UNALLOCATED else None
    return Payer(gateway, team=unknown, cost_center=cost_center, department=unknown)


def _apportioned(amount: int, weights: Mapping[_Key, Fraction | int]) -> dict[_Key, int]:
    """The amount in proportion to the weights: rounded down, and the rest one by one to the largest remainders, of equal ones to the first key."""
    if not amount:
        return dict.fromkeys(weights, 0)
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    whole = int(sum(weights.values()) * scale)
    shares = {key: divmod(amount * int(weight * scale), whole) for key, weight in weights.items()}
    parts = {key: part for key, (part, _) in shares.items()}
    for key in sorted(shares, key=lambda key: (-shares[key][1], _rank(key)))[: amount - sum(parts.values())]:
        parts[key] += 1
    return parts


def _equal_part(amount: int, index: int, parts: int) -> int:
    """One of so many equal parts of an amount; the first ones are one unit larger when it does not divide evenly."""
    return amount // parts + (index < amount % parts)


def _rank(key: _Key) -> tuple[tuple[bool, str], ...]:
    return tuple((value is not None, value or "") for value in key)


def _units(amount: Decimal | Fraction, places: int = _PLACES) -> int:
    return round(Fraction(amount) * 10**places)


def _decimal(units: int, places: int) -> Decimal:
    return Decimal(f"{units}E-{places}")
