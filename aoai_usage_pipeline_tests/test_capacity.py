"""Capacity: what is deployed costs money whether it is used or not, every unit of it is borne by someone, and a reservation is never paid twice."""

import datetime as dt
import functools
import random
from collections import defaultdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.billing.capacity import CapacityLine, Payer, Usage, amortised, lines, total
from aoai_usage_pipeline.reference import Capacity, ReferenceDataError, Reservation, load
from aoai_usage_pipeline_tests import support

DAY = dt.date(2026, 9, 1)
MIDNIGHT = dt.datetime.combine(DAY, dt.time())
SALES, HR = Payer("apim", "sales", cost_center="CC-1100"), Payer("apim", "hr", cost_center="CC-2200")
GLOBAL, ZONE = "GlobalProvisionedManaged", "DataZoneProvisionedManaged"
UNIT = Decimal("1E-15")


def ptus(number: int = 100, **changes: object) -> Capacity:
    values = {"capacity_id": "chat-ptu", "deployment": "chat", "ptus": number, "hourly_price": Decimal(1), "currency": "USD"}
    return Capacity(**values | changes)


def reserved(number: int = 100, **changes: object) -> Reservation:
    # 720 USD in a month of 30 days: 1 USD an hour
    values = {"reservation_id": "r", "deployment_sku": GLOBAL, "ptus": number, "term_price": Decimal(720), "term": "1-month", "currency": "USD"}
    return Reservation(**values | changes)


def use(hour: int, payer: Payer, tokens: int, output: int = 0, deployment: str = "chat") -> Usage:
    return Usage(hour, deployment, payer, tokens, output)


def bill(*capacity: Capacity, usage: tuple[Usage, ...] | list[Usage] = (), reservations: tuple[Reservation, ...] = (), day: dt.date = DAY) -> dict:
    """Cost by cost centre and meter."""
    costs: dict[tuple[str | None, str], Decimal] = defaultdict(Decimal)
    for line in lines(day, capacity, reservations, usage):
        costs[line.payer.cost_center, line.meter] += line.cost
    return dict(costs)


def minutes(first: str, last: str, **changes: object) -> Capacity:
    """100 PTUs from one time of the day to another."""
    hours = [MIDNIGHT + dt.timedelta(hours=int(time[:2]), minutes=int(time[3:])) for time in (first, last)]
    return ptus(**{"effective_from": hours[0], "effective_to": hours[1]} | changes)


# --- what is deployed


def test_fifteen_minutes_of_100_ptus_are_25_ptu_hours():
    [line] = lines(DAY, [minutes("10:00", "10:15")], [], [use(10, SALES, 1)])
    assert line == CapacityLine(
        SALES,
        "chat",
        "provisioned_capacity",
        Decimal("25.000000"),
        Decimal("25.000000000000000"),
        "USD",
        "chat-ptu",
        "usage",
        "units",
        Decimal("1.000000"),
    )
    assert (line.ptu_hours.as_tuple().exponent, line.cost.as_tuple().exponent) == (-6, -15)


def test_a_change_inside_an_hour_is_prorated_by_the_minute():
    before, after = minutes("00:00", "10:20"), minutes("10:20", "24:00", capacity_id="chat-ptu-2", ptus=150, hourly_price=Decimal("0.9"))
    usage = [use(10, SALES, 300), use(10, HR, 100)]
    found = {(line.capacity_id, line.payer.cost_center): line for line in lines(DAY, [before, after], [], usage)}
    # 10:00 to 11:00 has 100 x 20 and 150 x 40 PTU-minutes, so a quarter of the hour's usage is the first row's
    assert found["chat-ptu", "CC-1100"].cost == Decimal(100) * 20 / 60 * Decimal("0.75") == 25
    assert found["chat-ptu-2", "CC-1100"].cost == Decimal("67.5")
    assert found["chat-ptu", "CC-1100"].driver_quantity == 75
    assert found["chat-ptu", "UNALLOCATED"].cost == 1000
    assert found["chat-ptu-2", "UNALLOCATED"].cost == 13 * 150 * Decimal("0.9")


def test_hosting_of_a_fine_tuned_model_is_one_unit_without_traffic():
    [line] = lines(DAY, [ptus(1, hourly_price=Decimal("1.70"), idle_to="CC-4100")], [], [])
    assert (line.payer, line.meter, line.ptu_hours, line.cost) == (Payer(cost_center="CC-4100"), "idle_capacity", 24, Decimal("40.8"))


def test_a_price_that_does_not_divide_is_rounded_half_even_once_an_hour():
    [line] = lines(DAY, [minutes("10:00", "10:07", ptus=1, hourly_price=Decimal("0.000000001"))], [], [])
    assert line.cost == Decimal("0.000000000116667")
    [line] = lines(DAY, [minutes("10:50", "11:10", ptus=1, hourly_price=Decimal("0.1"))], [], [])
    assert line.cost == 2 * Decimal("0.016666666666667")


def test_a_day_before_or_after_has_no_lines():
    row = minutes("00:00", "24:00")
    assert len(lines(DAY, [row], [], [])) == 1
    for day in (DAY - dt.timedelta(days=1), DAY + dt.timedelta(days=1)):
        assert (lines(day, [row], [], [use(1, SALES, 1)]), total(day, [row], [])) == ([], {})


# --- who bears it


def test_usage_is_weighted_by_the_output_ratio_and_cached_tokens_weigh_nothing():
    row = minutes("10:00", "11:00", output_ratio=Decimal(8))
    usage = [use(10, SALES, 200, 100), use(10, HR, 1000), Usage(10, "chat", Payer(cost_center="cached only"), 0, 0)]
    assert bill(row, usage=usage) == {("CC-1100", "provisioned_capacity"): 50, ("CC-2200", "provisioned_capacity"): 50}


def test_each_hour_is_shared_by_those_who_used_it_and_an_hour_without_usage_is_idle():
    usage = [use(8, SALES, 10), use(9, SALES, 10), use(9, HR, 30)]
    assert bill(ptus(), usage=usage) == {
        ("CC-1100", "provisioned_capacity"): 125,
        ("CC-2200", "provisioned_capacity"): 75,
        ("UNALLOCATED", "idle_capacity"): 2200,
    }


def test_with_a_known_throughput_what_was_not_drawn_is_idle():
    row = minutes("10:00", "11:00", units_per_ptu_minute=Decimal(2500), idle_to="CC-4000")
    # 100 PTUs x 60 minutes x 2,500 = 15 million units
    usage = [use(10, SALES, 3_000_000), use(10, HR, 1_000_000, 500_000)]
    assert bill(row, usage=usage) == {
        ("CC-1100", "provisioned_capacity"): 20,
        ("CC-2200", "provisioned_capacity"): 20,
        ("CC-4000", "idle_capacity"): 60,
    }
    more = [use(10, SALES, 30_000_000), use(10, HR, 10_000_000)]
    assert bill(row, usage=more) == {("CC-1100", "provisioned_capacity"): 75, ("CC-2200", "provisioned_capacity"): 25}


def test_agreed_shares_are_borne_whatever_was_used_and_the_rest_is_idle():
    row = ptus(method="shares", shares=(("CC-1100", Decimal(60)), ("CC-3300", Decimal("25.5"))), idle_to="CC-4000")
    for usage in ([], [use(8, HR, 10)]):
        found = lines(DAY, [row], [], usage)
        assert [(line.payer.cost_center, line.cost, line.driver, line.driver_quantity) for line in found] == [
            ("CC-4000", 348, "ptu_hours", 348),
            ("CC-1100", 1440, "percent", 60),
            ("CC-3300", 612, "percent", Decimal("25.5")),
        ]


def test_the_peak_sizes_the_shares_of_the_whole_day():
    row = ptus(method="peak")
    usage = [use(3, SALES, 1_000), use(9, SALES, 600), use(9, HR, 1_800), use(20, SALES, 2_000)]
    assert bill(row, usage=usage) == {("CC-1100", "provisioned_capacity"): 600, ("CC-2200", "provisioned_capacity"): 1800}
    tied = [use(3, SALES, 10), use(9, HR, 10)]
    assert bill(row, usage=tied) == {("CC-1100", "provisioned_capacity"): 2400}
    half = ptus(method="peak", units_per_ptu_minute=Decimal(1))
    assert bill(half, usage=[use(9, SALES, 3_000)]) == {("CC-1100", "provisioned_capacity"): 1200, ("UNALLOCATED", "idle_capacity"): 1200}


def test_a_two_part_tariff_has_a_fixed_part_by_shares_and_the_rest_by_usage():
    row = minutes("10:00", "11:00", method="two_part", fixed_part=Decimal(40), shares=(("CC-1100", Decimal(50)), ("CC-2200", Decimal(50))))
    found = lines(DAY, [row], [], [use(10, SALES, 300), use(10, HR, 100)])
    assert [(line.driver, line.payer, line.cost, line.driver_quantity) for line in found] == [
        ("percent", Payer(cost_center="CC-1100"), 20, 50),
        ("percent", Payer(cost_center="CC-2200"), 20, 50),
        ("units", HR, 15, 100),
        ("units", SALES, 45, 300),
    ]
    assert bill(row) == {("CC-1100", "provisioned_capacity"): 20, ("CC-2200", "provisioned_capacity"): 20, ("UNALLOCATED", "idle_capacity"): 60}


def test_unknown_owners_of_idle_capacity_are_unallocated_in_every_owner_column():
    [idle] = lines(DAY, [ptus(gateway="apim")], [], [])
    assert idle.payer == Payer("apim", None, None, None, "UNALLOCATED", "UNALLOCATED", "UNALLOCATED")


def test_a_row_of_one_gateway_takes_that_gateways_usage_and_a_row_of_any_the_others():
    rows = [minutes("10:00", "11:00"), minutes("10:00", "11:00", gateway="apim-2", capacity_id="second")]
    other = SALES._replace(gateway="apim-2")
    found = lines(DAY, rows, [], [use(10, SALES, 1), use(10, other, 1), use(10, HR, 1, deployment="mini")])
    assert [(line.capacity_id, line.payer, line.cost) for line in found] == [("chat-ptu", SALES, 100), ("second", other, 100)]


def test_negative_tokens_are_an_error():
    with pytest.raises(ValueError, match="negative"):
        lines(DAY, [ptus()], [], [use(1, SALES, 10, -1)])


def test_ties_of_the_last_unit_go_to_the_first_payer_and_not_the_first_given():
    row = minutes("10:00", "10:01", ptus=1, hourly_price=Decimal("0.000000001"))
    payers = [Payer("apim", name, cost_center=name) for name in ("a", "b", "c")]
    [whole] = total(DAY, [row], []).values()
    assert whole == Decimal("16667E-15")
    for order in (payers, payers[::-1]):
        found = lines(DAY, [row], [], [use(10, payer, 7) for payer in order])
        assert [line.cost / UNIT for line in found] == [5556, 5556, 5555]


# --- reservations


def test_what_a_reservation_covers_is_at_its_rate_and_the_excess_at_the_hourly_price():
    rows = [ptus(60, deployment_sku=GLOBAL), ptus(90, deployment="mini", capacity_id="mini-ptu", deployment_sku=GLOBAL)]
    usage = [use(hour, SALES, 1) for hour in range(24)] + [use(hour, HR, 1, deployment="mini") for hour in range(24)]
    # an hour: 1 USD for the 100 that are reserved, 50 USD for the 50 that are not, and both share both
    assert bill(*rows, usage=usage, reservations=(reserved(),)) == {
        ("CC-1100", "provisioned_capacity"): Decimal("20.4") * 24,
        ("CC-2200", "provisioned_capacity"): Decimal("30.6") * 24,
    }


def test_rows_with_different_prices_share_a_reservation_by_their_ptus_and_pay_their_own_excess():
    rows = [
        minutes("10:00", "11:00", deployment_sku=GLOBAL),
        minutes("10:00", "11:00", capacity_id="b", deployment_sku=GLOBAL, hourly_price=Decimal(3)),
    ]
    found = {line.capacity_id: line.cost for line in lines(DAY, rows, [reserved()], []) if line.meter == "idle_capacity"}
    assert found == {"chat-ptu": Decimal("50.5"), "b": Decimal("150.5")}


def test_what_is_reserved_and_not_deployed_is_lost_each_hour_and_never_carried_over():
    rows = [minutes("00:00", "12:00", ptus=40, deployment_sku=GLOBAL), minutes("12:00", "24:00", ptus=160, deployment_sku=GLOBAL, capacity_id="more")]
    # on average 100 are deployed, but the unused 60 of the morning do not cover the 60 too many of the afternoon
    assert bill(*rows, reservations=(reserved(idle_to="CC-4000"),)) == {
        ("UNALLOCATED", "idle_capacity"): Decimal("0.4") * 12 + 61 * 12,
        ("CC-4000", "unused_reservation"): Decimal("0.6") * 12,
    }
    unused = [line for line in lines(DAY, rows, [reserved()], []) if line.meter == "unused_reservation"]
    assert [(line.ptu_hours, line.capacity_id, line.deployment, line.method) for line in unused] == [(720, "r", None, None)]


def test_netting_is_by_the_hour_in_ptu_minutes():
    row = minutes("10:00", "10:30", ptus=200, deployment_sku=GLOBAL)
    assert bill(row, reservations=(reserved(),)) == {("UNALLOCATED", "idle_capacity"): 1, ("UNALLOCATED", "unused_reservation"): 23}


@pytest.mark.parametrize(
    "other",
    [{"deployment_sku": ZONE, "region": "EU"}, {"effective_from": DAY + dt.timedelta(days=1)}, {"effective_to": DAY}],
    ids=["type", "before", "after"],
)
def test_a_reservation_of_another_type_or_time_covers_nothing(other):
    assert bill(ptus(deployment_sku=GLOBAL), reservations=(reserved(**other),))["UNALLOCATED", "idle_capacity"] == 2400


def test_a_reservation_covers_its_region_only():
    rows = [ptus(50, deployment_sku=ZONE, region="EU"), ptus(50, deployment_sku=ZONE, region="US", capacity_id="us", deployment="us")]
    found = {line.capacity_id: line.cost for line in lines(DAY, rows, [reserved(deployment_sku=ZONE, region="EU")], [])}
    assert found == {"chat-ptu": 12, "r": 12, "us": 1200}


def test_two_reservations_of_a_scope_are_used_alike():
    both = (reserved(60, idle_to="CC-1"), reserved(140, reservation_id="s", term_price=Decimal(1440), idle_to="CC-2"))
    assert bill(ptus(deployment_sku=GLOBAL), reservations=both) == {
        ("UNALLOCATED", "idle_capacity"): 36,
        ("CC-1", "unused_reservation"): 12,
        ("CC-2", "unused_reservation"): 24,
    }


@pytest.mark.parametrize(("month", "days"), [(1, 31), (2, 28), (4, 30), (12, 31)])
def test_a_months_price_is_spread_over_its_days_to_the_last_unit(month, days):
    reservation = reserved(term_price=Decimal(200))
    parts = [amortised(reservation, dt.date(2026, month, day + 1)) for day in range(days)]
    assert sum(parts) == 200
    assert all(abs(part - Decimal(200) / days) < UNIT for part in parts)
    assert parts == sorted(parts, reverse=True)


def test_a_term_begins_on_its_own_day_and_ends_where_the_next_begins():
    reservation = reserved(effective_from=dt.date(2026, 1, 31), term_price=Decimal(280))
    assert [amortised(reservation, dt.date(2026, *day)) for day in ((2, 1), (2, 28), (3, 30))] == [
        10,
        Decimal(280) / 31 // UNIT * UNIT + UNIT,
        Decimal(280) / 31 // UNIT * UNIT,
    ]
    year = reserved(term="1-year", term_price=Decimal(3660), effective_from=dt.date(2027, 3, 1))
    assert {amortised(year, dt.date(2027, 3, 1)), amortised(year, dt.date(2028, 2, 29))} == {10}
    assert amortised(year, dt.date(2028, 3, 1)) == Decimal("10.027397260273973")


@given(
    st.dates(dt.date(2020, 1, 1), dt.date(2030, 12, 31)), st.sampled_from(["1-month", "1-year"]), st.decimals("0.000000001", "999999999", places=9)
)
@settings(max_examples=60, deadline=None)
def test_the_days_of_any_term_add_up_to_its_price(start, term, price):
    reservation = reserved(term=term, term_price=price, effective_from=start)
    months = 1 if term == "1-month" else 12
    year, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    following = dt.date(year + month // 11, (month + 1) % 12 + 1, 1) - dt.timedelta(days=1)
    end = following.replace(day=min(start.day, following.day))
    parts = [amortised(reservation, start + dt.timedelta(days=n)) for n in range((end - start).days)]
    assert sum(parts) == price
    assert max(parts) - min(parts) <= UNIT


# --- nothing is lost


MINUTES = st.integers(-1440, 2 * 1440).map(lambda n: MIDNIGHT + dt.timedelta(minutes=n))
PERCENT = st.decimals(0, 33, places=2)
SCOPES = [(None, None), (GLOBAL, None), (ZONE, "EU"), (ZONE, "US")]


@st.composite
def capacities(draw: st.DrawFn) -> list[Capacity]:
    rows = []
    for number in range(draw(st.integers(1, 4))):
        start, end = sorted([draw(MINUTES), draw(MINUTES)])
        sku, region = draw(st.sampled_from(SCOPES))
        row = ptus(
            draw(st.integers(1, 1000)),
            capacity_id=f"row-{number}",
            deployment=draw(st.sampled_from(["chat", "mini"])),
            gateway=draw(st.sampled_from([None, "apim", "apim-2"])),
            hourly_price=draw(st.decimals(0, 100, places=9)),
            idle_to=draw(st.sampled_from(["UNALLOCATED", "CC-1100", "CC-4000"])),
            method=draw(st.sampled_from(["usage", "shares", "peak", "two_part"])),
            output_ratio=draw(st.sampled_from([Decimal(4), Decimal(8), Decimal("2.5")])),
            units_per_ptu_minute=draw(st.sampled_from([None, Decimal(1), Decimal(2500)])),
            deployment_sku=sku,
            region=region,
            effective_from=draw(st.sampled_from([start, None])),
            effective_to=draw(st.sampled_from([end + dt.timedelta(minutes=1), None])),
        )
        if row.method in ("shares", "two_part"):
            owners = draw(st.lists(st.sampled_from(["CC-1100", "CC-2200", "CC-4000"]), unique=True, min_size=1))
            shares = tuple((owner, draw(PERCENT)) for owner in owners)
            fixed_part = draw(st.decimals(0, 100, places=1)) if row.method == "two_part" else Decimal(0)
            row = ptus(
                **{name: getattr(row, name) for name in Capacity.__dataclass_fields__ if name != "ptus"}
                | {"number": row.ptus, "shares": shares, "fixed_part": fixed_part}
            )
        rows.append(row)
    return rows


@st.composite
def reservations_(draw: st.DrawFn) -> list[Reservation]:
    found = []
    for number in range(draw(st.integers(0, 3))):
        sku, region = draw(st.sampled_from(SCOPES[1:]))
        changes = {"reservation_id": f"r-{number}", "deployment_sku": sku, "region": region, "term": draw(st.sampled_from(["1-month", "1-year"]))}
        changes |= {"term_price": draw(st.decimals(0, 1_000_000, places=9)), "idle_to": draw(st.sampled_from(["UNALLOCATED", "CC-4000"]))}
        found.append(reserved(draw(st.integers(1, 2000)), **changes))
    return found


TOKENS = st.integers(0, 10**9)
PAYERS = st.builds(
    Payer, st.sampled_from([None, "apim", "apim-2"]), st.sampled_from([None, "sales", "hr"]), cost_center=st.sampled_from(["CC-1100", "CC-2200"])
)
USAGES = st.lists(st.builds(Usage, st.integers(0, 23), st.sampled_from([None, "chat", "mini", "other"]), PAYERS, TOKENS, TOKENS), max_size=40)


@functools.lru_cache(1000)
def deployed(row: Capacity, hour: int) -> int:
    """PTU-minutes of an hour, minute by minute."""
    start = MIDNIGHT + dt.timedelta(hours=hour)
    times = [start + dt.timedelta(minutes=n) for n in range(60)]
    return row.ptus * sum((row.effective_from or time) <= time < (row.effective_to or dt.datetime(9999, 1, 1)) for time in times)


def expected_total(capacity: list[Capacity], reservations: list[Reservation]) -> Decimal:
    """Every reservation in full, and what is deployed beyond them at its hourly price."""
    units = sum(int(amortised(reservation, DAY) / UNIT) for reservation in reservations)
    for hour in range(24):
        for scope in SCOPES:
            rows = [row for row in capacity if (row.deployment_sku, row.region) == scope]
            covering = 60 * sum(r.ptus for r in reservations if (r.deployment_sku, r.region) == scope)
            whole = sum(deployed(row, hour) for row in rows)
            listed = [deployed(row, hour) * Fraction(row.hourly_price) / 60 * 10**15 for row in rows]
            if covering:
                units += round(sum(listed) * Fraction(max(0, whole - covering), whole)) if whole else 0
            else:
                units += sum(round(price) for price in listed)
    return units * UNIT


@given(capacities(), reservations_(), USAGES)
@settings(max_examples=150, deadline=None)
def test_allocated_idle_and_unused_add_up_to_the_cost_for_every_method(capacity, reservations, usage):
    found = lines(DAY, capacity, reservations, usage)
    assert sum(line.cost for line in found) == total(DAY, capacity, reservations).get("USD", 0) == expected_total(capacity, reservations)
    assert all(line.cost >= 0 and line.ptu_hours >= 0 for line in found)
    for row in capacity:
        hours = sum(line.ptu_hours for line in found if line.capacity_id == row.capacity_id)
        assert hours == Decimal(round(Fraction(sum(deployed(row, hour) for hour in range(24)), 60) * 10**6)).scaleb(-6)
    keys = [(line.capacity_id, line.payer, line.meter, line.driver) for line in found]
    assert len(set(keys)) == len(keys)


@given(capacities(), reservations_(), USAGES, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_what_is_given_changes_nothing(capacity, reservations, usage, order: random.Random):
    found = lines(DAY, capacity, reservations, usage)
    for given_ in (capacity, reservations, usage):
        order.shuffle(given_)
    assert lines(DAY, capacity, reservations, usage) == found
    halves = [
        part
        for u in usage
        for part in (Usage(u.hour, u.deployment, u.payer, u.uncached_input_tokens, 0), Usage(u.hour, u.deployment, u.payer, 0, u.output_tokens))
    ]
    assert lines(DAY, capacity, reservations, halves) == found


@given(capacities(), reservations_())
@settings(max_examples=50, deadline=None)
def test_without_usage_only_agreed_shares_are_allocated(capacity, reservations):
    for line in lines(DAY, capacity, reservations, []):
        assert line.meter != "provisioned_capacity" or (line.method in ("shares", "two_part") and line.driver == "percent")


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=9), st.decimals("0.01", 10, places=9))
@settings(max_examples=50, deadline=None)
def test_a_payers_part_is_its_exact_share_to_within_a_unit(tokens, price):
    row = minutes("10:00", "11:00", hourly_price=price)
    payers = [Payer("apim", str(number), cost_center="CC-1100") for number in range(len(tokens))]
    found = {line.payer: line.cost for line in lines(DAY, [row], [], [use(10, payer, n) for payer, n in zip(payers, tokens, strict=True)])}
    for payer, n in zip(payers, tokens, strict=True):
        assert abs(Fraction(found[payer]) - Fraction(price) * 100 * n / sum(tokens)) < Fraction(UNIT)


@pytest.mark.parametrize(("month", "days"), [(1, 31), (2, 28)])
def test_a_month_without_usage_costs_its_reservation_and_the_excess_and_all_of_it_is_idle(month, days):
    row, reservation = ptus(120, deployment_sku=GLOBAL, idle_to="CC-4000"), reserved(term_price=Decimal(26_000))
    found = [line for day in range(days) for line in lines(dt.date(2026, month, day + 1), [row], [reservation], [])]
    assert {(line.payer.cost_center, line.meter) for line in found} == {("CC-4000", "idle_capacity")}
    assert sum(line.cost for line in found) == 26_000 + 20 * 24 * days
    nothing = [line for day in range(days) for line in lines(dt.date(2026, month, day + 1), [], [reservation], [])]
    assert sum(line.cost for line in nothing) == 26_000


# --- the files


CAPACITY_HEADER = "deployment,ptus,hourly_price,currency,idle_to,method,effective_from,effective_to"
ALL = "capacity_id,gateway,deployment,ptus,hourly_price,currency,idle_to,method,shares,fixed_part,output_ratio,units_per_ptu_minute,deployment_sku,region,source,effective_from,effective_to"
RESERVED = "reservation_id,deployment_sku,region,ptus,term_price,term,currency,idle_to,effective_from,effective_to,source"


def row_of(header: str, **changes: str) -> str:
    values = {"deployment": "chat", "ptus": "100", "hourly_price": "1.00", "currency": "USD"}
    if header is RESERVED:
        values = {"reservation_id": "r", "deployment_sku": GLOBAL, "ptus": "100", "term_price": "26000", "term": "1-month", "currency": "USD"}
    return ",".join((values | changes).get(column, "") for column in header.split(","))


def folder(root: Path, capacity: list[str] | None = None, reservations: list[str] | None = None) -> Path:
    support.reference(root)
    for name, header, rows in (("capacity", ALL, capacity), ("reservations", RESERVED, reservations)):
        if rows is not None:
            (root / f"{name}.csv").write_text("\n".join([header, *rows, ""]))
    return root


def faults(root: Path, capacity: list[str] | None = None, reservations: list[str] | None = None) -> list[str]:
    with pytest.raises(ReferenceDataError) as error:
        load(folder(root, capacity, reservations))
    return str(error.value).replace(f"{root}/", "").splitlines()


def test_the_columns_that_a_deployment_needs_are_enough(tmp_path):
    support.reference(tmp_path)
    (tmp_path / "capacity.csv").write_text(f"{CAPACITY_HEADER}\nchat,100,1.00,USD,,,,\nmini,50,0.9,EUR,CC-4000,usage,2026-09-01,2026-09-01T10:15Z\n")
    assert load(tmp_path).capacity == (
        Capacity("chat", "chat", 100, Decimal("1.00"), "USD"),
        Capacity(
            "mini@2026-09-01T00:00", "mini", 50, Decimal("0.9"), "EUR", idle_to="CC-4000",
            effective_from=dt.datetime(2026, 9, 1), effective_to=dt.datetime(2026, 9, 1, 10, 15),
        ),
    )  # fmt: skip


def test_every_column_is_read(tmp_path):
    capacity = row_of(
        ALL, capacity_id="c", gateway="apim", idle_to="CC-4000", method="two_part", shares="CC-1100=60 ; Café=39.5", fixed_part="40", output_ratio="8",
        units_per_ptu_minute="4750", deployment_sku=ZONE, region="EU", source="contract 7",
    )  # fmt: skip
    reservation = row_of(RESERVED, deployment_sku=ZONE, region="EU", idle_to="CC-4000", effective_from="2026-01-15", effective_to="2026-07-15")
    found = load(folder(tmp_path, [capacity], [reservation]))
    assert found.capacity == (
        Capacity(
            "c", "chat", 100, Decimal(1), "USD", "apim", "CC-4000", "two_part", (("CC-1100", Decimal(60)), ("Café", Decimal("39.5"))), Decimal(40),
            Decimal(8), Decimal(4750), ZONE, "EU",
        ),
    )  # fmt: skip
    assert found.reservations == (
        Reservation("r", ZONE, 100, Decimal(26000), "1-month", "USD", "EU", "CC-4000", dt.date(2026, 1, 15), dt.date(2026, 7, 15)),
    )


@pytest.mark.parametrize("text", [None, "", f"{CAPACITY_HEADER}\n"])
def test_absent_blank_and_header_only_files_are_valid(tmp_path, text):
    support.reference(tmp_path)
    if text is not None:
        (tmp_path / "capacity.csv").write_text(text)
    assert (load(tmp_path).capacity, load(tmp_path).reservations) == ((), ())


FAULTS = {
    "no deployment": ({"deployment": ""}, "deployment"),
    "any deployment": ({"deployment": "*"}, "deployment"),
    "no PTUs": ({"ptus": ""}, "ptus"),
    "zero PTUs": ({"ptus": "0"}, "ptus"),
    "half a PTU": ({"ptus": "0.5"}, "ptus"),
    "no price": ({"hourly_price": ""}, "hourly_price"),
    "a negative price": ({"hourly_price": "-1"}, "hourly_price"),
    "a price with 10 places": ({"hourly_price": "0.0000000001"}, "hourly_price"),
    "NaN as a price": ({"hourly_price": "NaN"}, "hourly_price"),
    "a currency sign": ({"currency": "$"}, "currency"),
    "an unknown method": ({"method": "even"}, "method"),
    "shares without any": ({"method": "shares"}, "shares"),
    "shares nobody asked for": ({"method": "usage", "shares": "CC-1=50"}, "shares"),
    "a share without a percentage": ({"method": "shares", "shares": "CC-1=50;CC-2"}, "shares"),
    "a negative share": ({"method": "shares", "shares": "CC-1=-50"}, "shares"),
    "a share of nobody": ({"method": "shares", "shares": " =50"}, "shares"),
    "shares above 100": ({"method": "shares", "shares": "CC-1=50;CC-2=50.1"}, "shares"),
    "a cost centre twice": ({"method": "shares", "shares": "CC-1=50;CC-1=10"}, "shares"),
    "a tariff without its fixed part": ({"method": "two_part", "shares": "CC-1=50"}, "fixed_part"),
    "a fixed part above 100": ({"method": "two_part", "shares": "CC-1=50", "fixed_part": "101"}, "fixed_part"),
    "a negative ratio": ({"output_ratio": "-4"}, "output_ratio"),
    "no throughput": ({"units_per_ptu_minute": "0"}, "units_per_ptu_minute"),
    "an unknown type": ({"deployment_sku": "Provisioned"}, "deployment_sku"),
    "a regional type without a region": ({"deployment_sku": ZONE}, "region"),
    "a global type with a region": ({"deployment_sku": GLOBAL, "region": "eastus"}, "region"),
    "a time without its zone": ({"effective_from": "2026-09-01T10:15"}, "effective_from"),
    "a time that does not exist": ({"effective_from": "2026-09-01T24:00Z"}, "effective_from"),
    "seconds": ({"effective_to": "2026-09-01T10:15:30Z"}, "effective_to"),
    "an end at its start": ({"effective_from": "2026-09-01T10:15Z", "effective_to": "2026-09-01T10:15Z"}, "effective_to"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_capacity_has_file_line_and_column(tmp_path, name):
    changes, column = FAULTS[name]
    [fault] = faults(tmp_path, [row_of(ALL, deployment="good"), row_of(ALL, **changes)])
    assert fault.startswith(f"capacity.csv: line 3, column {column}: ")


RESERVATION_FAULTS = {
    "no id": ({"reservation_id": ""}, "reservation_id"),
    "no type": ({"deployment_sku": ""}, "deployment_sku"),
    "no region": ({"deployment_sku": "ProvisionedManaged"}, "region"),
    "no price": ({"term_price": ""}, "term_price"),
    "three years": ({"term": "3-year"}, "term"),
    "a time of day": ({"effective_from": "2026-09-01T10:15Z"}, "effective_from"),
    "PTUs in words": ({"ptus": "hundred"}, "ptus"),
}


@pytest.mark.parametrize("name", RESERVATION_FAULTS)
def test_a_fault_of_a_reservation_has_file_line_and_column(tmp_path, name):
    changes, column = RESERVATION_FAULTS[name]
    [fault] = faults(tmp_path, None, [row_of(RESERVED, reservation_id="good"), row_of(RESERVED, **changes)])
    assert fault.startswith(f"reservations.csv: line 3, column {column}: ")


def test_all_faults_of_both_files_are_told_at_once(tmp_path):
    found = faults(
        tmp_path, [row_of(ALL, ptus="x", currency="usd"), row_of(ALL, deployment="mini", effective_to="soon")], [row_of(RESERVED, term="x", ptus="")]
    )
    assert [fault.rpartition(": ")[0].partition(": '")[0] for fault in found] == [
        "capacity.csv: line 2, column ptus", "capacity.csv: line 2, column currency", "capacity.csv: line 3, column effective_to",
        "reservations.csv: line 2, column ptus", "reservations.csv: line 2, column term",
    ]  # fmt: skip


def test_rows_of_one_deployment_may_follow_each_other_but_not_overlap(tmp_path):
    first, second = row_of(ALL, effective_to="2026-09-01T10:15Z"), row_of(ALL, effective_from="2026-09-01T10:15Z")
    assert len(load(folder(tmp_path / "good", [first, second, row_of(ALL, gateway="apim"), row_of(ALL, deployment="mini")])).capacity) == 4
    [fault] = faults(tmp_path / "bad", [first, row_of(ALL, effective_from="2026-09-01T10:14Z")])
    assert fault.startswith("capacity.csv: line 3 ties with line 2")
    assert faults(tmp_path / "ids", [row_of(ALL, capacity_id="c"), row_of(ALL, capacity_id="c", deployment="mini")]) == [
        "capacity.csv: line 3, column capacity_id: 'c' is also in line 2"
    ]
    assert faults(tmp_path / "reservations", None, [row_of(RESERVED), row_of(RESERVED)]) == [
        "reservations.csv: line 3, column reservation_id: 'r' is also in line 2"
    ]


def test_a_reservation_in_another_currency_than_what_it_covers_is_a_fault(tmp_path):
    [fault] = faults(tmp_path, [row_of(ALL, deployment_sku=GLOBAL)], [row_of(RESERVED, currency="EUR")])
    assert fault.startswith("capacity.csv: line 2, column currency: USD, but line 2 of reservations.csv")
    later = row_of(RESERVED, currency="EUR", effective_from="2026-09-01")
    assert load(folder(tmp_path / "later", [row_of(ALL, deployment_sku=GLOBAL, effective_to="2026-09-01")], [later])).reservations
    assert load(folder(tmp_path / "other", [row_of(ALL)], [later])).reservations


def test_a_change_concerns_the_days_from_its_own_on(tmp_path):
    before = load(folder(tmp_path / "before", [row_of(ALL)], [row_of(RESERVED)]))
    resized = [row_of(ALL, effective_to="2026-09-01T10:15Z"), row_of(ALL, ptus="200", effective_from="2026-09-01T10:15Z")]
    after = load(folder(tmp_path / "after", resized, [row_of(RESERVED, effective_to="2026-09-02")]))
    same = {day: before.on(day).content() == after.on(day).content() for day in (DAY - dt.timedelta(days=1), DAY, DAY + dt.timedelta(days=1))}
    assert list(same.values()) == [True, False, False]
    assert sum(total(DAY, after.capacity, []).values()) == Decimal(100) * 615 / 60 + Decimal(200) * 825 / 60
