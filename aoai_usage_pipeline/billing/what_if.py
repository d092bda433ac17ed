"""What the usage of the lake would cost under another arrangement, beside what it was billed: the daily tables made from a rewritten view.

Prices are looked up where they always are. What a scenario changes is the model and the deployment type that usage is priced as, and whether
capacity is paid for; every group of usage is found again by the `deployment` of its lines, which no price looks at.
"""

import dataclasses
import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import capacity, fixed_costs
from aoai_usage_pipeline.billing.daily_tables import DailyTables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.reference import Capacity, Reference, Reservation
from aoai_usage_pipeline.reference.capacity import GLOBAL, PROVISIONED_SKUS
from aoai_usage_pipeline.reference.ptu import PtuModel, ptu_models

PAYG, PTU, BATCH, MODEL = "payg", "ptu", "batch", "model"
BATCH_SKUS = {"GlobalStandard": "GlobalBatch", "DataZoneStandard": "DataZoneBatch"}
LIST_PRICE, LIST_CURRENCY = Decimal("1.00"), "USD"
"""Of a PTU-hour of a global deployment: Azure Retail Prices API, 2026-07."""

_KEY = ("usage_date", "deployment", "model", "model_version", "deployment_sku", "region", "service_tier", "context_band", "currency", "unpriced")
_UNCACHED = "CAST(coalesce(sum(coalesce(prompt_tokens, 0) - coalesce(cached_tokens, 0)), 0) AS BIGINT)"
_OUTPUT = "CAST(coalesce(sum(completion_tokens), 0) AS BIGINT)"
_TOOLS = ("web_search", "file_search", "code_interpreter")
_CAPACITY_METERS = (capacity.PROVISIONED, capacity.IDLE, capacity.UNUSED)
_MADE_UP = "what-if"


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """Another arrangement. `ptus` None: as many as the usage needs. Prices are of one PTU: an hour of it, or a month of it reserved."""

    kind: str
    deployment_sku: str = GLOBAL
    ptus: int | None = None
    model: str | None = None
    model_version: str | None = None
    hourly_price: Decimal | None = None
    monthly_price: Decimal | None = None

    @classmethod
    def of(cls, text: str) -> "Scenario":
        """The scenario that `payg[:SKU]`, `ptu[:N]`, `batch` or `model:NAME[@VERSION]` says. Raises ValueError."""
        kind, colon, value = text.partition(":")
        if kind == PAYG and bool(colon) == bool(value) and value not in PROVISIONED_SKUS:
            return cls(PAYG, value or "GlobalStandard")
        if kind == PTU and not colon:
            return cls(PTU)
        if kind == PTU and value.isascii() and value.isdigit() and 1 <= int(value) <= 9_999_999:
            return cls(PTU, ptus=int(value))
        if kind == BATCH and not colon:
            return cls(BATCH)
        name, at, version = value.partition("@")
        if kind == MODEL and name and bool(at) == bool(version):
            return cls(MODEL, model=name, model_version=version or None)
        raise ValueError(f"scenario {text!r} is not one of payg, payg:SKU (paid by the token), ptu, ptu:N, batch, model:NAME, model:NAME@VERSION")


@dataclasses.dataclass(frozen=True, slots=True)
class Only:
    """Which usage is looked at; None: all."""

    model: str | None = None
    deployment: str | None = None
    cost_center: str | None = None

    def __str__(self) -> str:
        given = {field.name.replace("_", " "): getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Usage of a deployment. `note` says why it costs in the scenario what it costs today, None where it was priced anew; no cost is None."""

    model: str
    deployment: str | None
    deployment_sku: str | None
    requests: int
    tokens: int
    currency: str | None
    today: Decimal | None
    scenario: Decimal | None
    note: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Throughput:
    """How full so many PTUs are: parts of what they can do, in the mean, the busiest hour and the busiest minute, and what is more than that."""

    ptus: int
    mean: Fraction
    peak_hour: Fraction
    peak_minute: Fraction
    minutes_over: int
    part_over: Fraction


@dataclasses.dataclass(frozen=True, slots=True)
class BreakEven:
    """The arrangements cost the same at `share` times the usage that was priced anew, which had `tokens_per_day`."""

    share: Fraction
    tokens_per_day: Fraction


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A scenario beside what was billed, and what was assumed, in sentences."""

    scenario: Scenario
    lines: tuple[Line, ...]
    assumptions: tuple[str, ...]
    throughput: Throughput | None = None
    break_even: BreakEven | None = None

    @property
    def totals(self) -> dict[str, tuple[Decimal, Decimal]]:
        """By currency, the cost today and in the scenario of all that has a cost."""
        return _totals(self.lines)

    @property
    def replaced(self) -> dict[str, tuple[Decimal, Decimal]]:
        """The part of the totals that was priced anew."""
        return _totals(line for line in self.lines if line.note is None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Usage that every price treats alike, with its cost by the token."""

    id: int
    usage_date: dt.date
    deployment: str | None
    model: str | None
    model_version: str | None
    deployment_sku: str | None
    region: str | None
    service_tier: str | None
    context_band: str | None
    currency: str | None
    unpriced: bool
    requests: int
    tokens: int
    cost: Decimal | None

    @property
    def provisioned(self) -> bool:
        return self.deployment_sku in PROVISIONED_SKUS

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.model or "unknown model", self.model_version)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Rated:
    """What a group costs at other prices: by currency, the meters without a price, and the tokens at the input price for want of their own."""

    costs: Mapping[str, Decimal]
    unpriced: tuple[str, ...]
    fallback: int


_As = tuple[str | None, str | None, str]
_Outcome = str | tuple[str, Decimal]
"""Why a group keeps today's cost, or its currency and cost in the scenario."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Fixed:
    """What the capacity that is looked at costs, by deployment and currency; `unused` by reservation; `covered`: the deployments with any."""

    costs: Mapping[tuple[str, str], Decimal]
    unused: Mapping[tuple[str, str], Decimal]
    covered: frozenset[str | None]


class _Lines:
    """The lines of a comparison while they are summed up."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str | None, ...], list[tuple[int, int, Decimal | None, Decimal | None]]] = defaultdict(list)
        self._models: dict[tuple[str | None, ...], set[str]] = defaultdict(set)

    def add(
        self, of: _Group | tuple[str, str | None, str | None], currency: str | None, note: str | None, today: Decimal | None,
        scenario: Decimal | None, *, together: bool = False,
    ) -> None:  # fmt: skip
        """Add a group, or a cost with its name, deployment and type; `together`: to one line of all models of the deployment and its capacity."""
        name, deployment, sku = (of.name, of.deployment, of.deployment_sku) if isinstance(of, _Group) else of
        requests, tokens = (of.requests, of.tokens) if isinstance(of, _Group) else (0, 0)
        key = (None if together else name, deployment, sku, currency, note)
        self._sums[key].append((requests, tokens, today, scenario))
        self._models[key].add(name)

    def all(self) -> tuple[Line, ...]:
        found = []
        for key, parts in self._sums.items():
            _, deployment, sku, currency, note = key
            requests, tokens, today, scenario = zip(*parts, strict=True)
            name = ", ".join(sorted(self._models[key]))
            found.append(Line(name, deployment, sku, sum(requests), sum(tokens), currency, _sum(today), _sum(scenario), note))
        return tuple(sorted(found, key=lambda line: (line.note or "", -(line.today or 0), line.model, line.deployment or "")))


def compare(
    stage: DailyTables, db: duckdb.DuckDBPyConnection, reference: Reference, days: Sequence[dt.date], scenario: Scenario, only: Only
) -> Comparison:
    """Price the enriched usage of days, as far as the lake has it, as the scenario says. `stage` has planned them; nothing is written.

    Raises ValueError when there is no such usage, or the scenario has no price rows at all.
    """
    known = [day for day in days if stage.size(day)]
    notes = [f"{len(days) - len(known)} of the {len(days)} days have no usage in the lake."] if len(known) < len(days) else []
    groups = _groups(db, stage.source(known), only, notes) if known else []
    which = f"{f' of {only}' if str(only) else ''} from {days[0]} to {days[-1]}"
    if not groups:
        raise ValueError(f"no usage{which} in the lake")
    if scenario.kind == PTU:
        return _as_ptu(db, groups, days, scenario, which, notes)
    fixed = _Fixed({}, {}, frozenset())
    if scenario.kind == PAYG:
        if not any(group.provisioned for group in groups):
            raise ValueError(f"no usage of provisioned deployments{which}")
        fixed = _fixed(db, stage, known, reference, days, groups, only)
    scenario = _priced(reference, scenario, notes)
    targets = {group.id: _target(group, scenario, fixed) for group in groups}
    rated = _rated(db, stage, known, reference, groups, {id_: to for id_, to in targets.items() if not isinstance(to, str)}, notes)
    outcomes: dict[int, _Outcome] = {id_: target for id_, target in targets.items() if isinstance(target, str)} | rated
    found = _Lines()
    if scenario.kind == PAYG:
        _keep_whole_deployments(groups, outcomes, fixed)
        _add_capacity(found, groups, outcomes, fixed)
        notes.append("Capacity that pay as you go replaces is given back for the whole range, and reservations with it.")
        if only.cost_center:
            notes.append(f"Of shared capacity the part that {only.cost_center} bears is counted: as long as it stays deployed, others would bear it.")
    paid_in = dict(fixed.costs.keys())
    for group in groups:
        outcome, together = outcomes[group.id], scenario.kind == PAYG and group.provisioned
        # what is paid by the hour costs nothing by the token
        today = group.cost or None if together else group.cost
        if isinstance(outcome, str):
            found.add(group, paid_in.get(group.deployment, group.currency) if together else group.currency, outcome, today, today, together=together)
        else:
            found.add(group, outcome[0], None, today, outcome[1], together=together)
    lines = found.all()
    break_even = None
    if scenario.kind != BATCH and len(replaced := list(_totals(line for line in lines if line.note is None).values())) == 1:
        break_even = _break_even(*replaced[0], lines, days)
    return Comparison(scenario, lines, tuple(notes), break_even=break_even)


def _groups(db: duckdb.DuckDBPyConnection, source: str, only: Only, notes: list[str]) -> list[_Group]:
    """The usage that is looked at, as the view `used` with the `id` of each row's group."""
    wanted = [(name, value) for name, value in dataclasses.asdict(only).items() if value is not None]
    where = "".join(f" AND {name} = {engine.literal(value)}" for name, value in wanted)
    [(uncounted,)] = db.execute(f"SELECT count(*) FROM {source} WHERE usage_source IS NULL{where}").fetchall()
    if uncounted:
        notes.append(f"Left out are requests without token counts: {uncounted:,}.")
    looked_at = f"(SELECT *, pricing_status = 'unpriced' AS unpriced FROM {source} WHERE usage_source IS NOT NULL{where})"
    columns = ", ".join(_KEY)
    distinct = f"SELECT DISTINCT {columns} FROM {looked_at}"
    db.execute(f"CREATE TABLE usage_group AS SELECT row_number() OVER (ORDER BY {columns}) AS id, * FROM ({distinct})")
    same = " AND ".join(f"u.{name} IS NOT DISTINCT FROM g.{name}" for name in _KEY)
    db.execute(f"CREATE VIEW used AS SELECT g.id, u.* FROM {looked_at} AS u JOIN usage_group AS g ON {same}")
    sums = f"SELECT id, count(*) AS requests, {tables.TOKENS} AS tokens, sum(cost) AS cost FROM used GROUP BY id"
    return [_Group(*row) for row in db.execute(f"SELECT * FROM usage_group JOIN ({sums}) USING (id) ORDER BY id").fetchall()]


def _target(group: _Group, scenario: Scenario, fixed: _Fixed) -> _As | str:
    """The model, version and deployment type that the group is priced as, or why it is not."""
    sku = group.deployment_sku or "unknown deployment type"
    if scenario.kind == PAYG:
        if not group.provisioned:
            return "unchanged: paid by the token"
        if group.deployment not in fixed.covered and not (group.deployment is None and fixed.covered):
            return "no row of capacity.csv says what it costs today"
        return group.model, group.model_version, scenario.deployment_sku
    if scenario.kind == MODEL and group.provisioned:
        return "unchanged: paid with its capacity"
    if scenario.kind == BATCH and sku in BATCH_SKUS.values():
        return "unchanged: batch already"
    if scenario.kind == BATCH and sku not in BATCH_SKUS:
        return f"{sku} has no batch"
    if group.unpriced:
        return "has no price today"
    return (scenario.model, scenario.model_version, sku) if scenario.kind == MODEL else (group.model, group.model_version, BATCH_SKUS[sku])


def _priced(reference: Reference, scenario: Scenario, notes: list[str]) -> Scenario:
    """The scenario with the version of its model. Raises ValueError when the price book has no row that it could use."""
    # prices of built-in tools are often for every deployment type, and price no token
    rows = (row.values for row in reference.price_book if not str(row.values["meter"]).startswith(_TOOLS))
    if scenario.kind == PAYG and not any(row["deployment_sku"] in (None, scenario.deployment_sku) for row in rows):
        raise ValueError(f"the price book has no row of deployment type {scenario.deployment_sku}")
    if scenario.kind == BATCH:
        notes.append("Batch answers from files within 24 hours: only work that can wait can move there.")
    if scenario.kind != MODEL:
        return scenario
    versions = {row.values["model_version"] for row in reference.price_book if row.values["model"] == scenario.model}
    named = sorted(version for version in versions if version)
    if not versions:
        raise ValueError(f"the price book has no row of model {scenario.model}")
    if scenario.model_version not in (None, *versions) and None not in versions:
        raise ValueError(f"the price book has no row of model {scenario.model} version {scenario.model_version}, only of {', '.join(named)}")
    notes.append("The tokens are those of today: another model may need more or fewer for the same work.")
    if scenario.model_version is None and named and None not in versions:
        notes.append(f"Version {named[-1]} of {scenario.model} is used, the newest that has a price.")
        return dataclasses.replace(scenario, model_version=named[-1])
    return scenario


def _rated(
    db: duckdb.DuckDBPyConnection,
    stage: DailyTables,
    known: Sequence[dt.date],
    reference: Reference,
    groups: Sequence[_Group],
    targets: Mapping[int, _As],
    notes: list[str],
) -> dict[int, _Outcome]:
    """The outcome of every group that has a target: its cost there, or what has no price there."""
    columns = zip(*((id_, *target) for id_, target in targets.items()), strict=True) if targets else [[], [], [], []]
    types = {"id": pa.int64(), "model": pa.string(), "model_version": pa.string(), "deployment_sku": pa.string()}
    priced_as = pa.table({name: pa.array(values, type_) for (name, type_), values in zip(types.items(), columns, strict=True)})  # noqa: F841 - read by name below
    db.execute("CREATE TABLE target AS SELECT * FROM priced_as")
    other = "t.model AS model, t.model_version AS model_version, t.deployment_sku AS deployment_sku, CAST(id AS VARCHAR) AS deployment"
    rewritten = f"(SELECT u.* EXCLUDE (id, unpriced) REPLACE ({other}) FROM used AS u JOIN target AS t USING (id))"
    stage.rate(db, known, reference, rewritten)
    meters = ", ".join(engine.literal(meter) for meter in _CAPACITY_METERS)
    select = f"""SELECT CAST(deployment AS BIGINT), meter, currency, pricing_status, CAST(sum(quantity) AS BIGINT), sum(cost) FROM daily_billing
        WHERE meter NOT IN ({meters}) GROUP BY ALL ORDER BY ALL"""
    costs: dict[int, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    without: dict[int, list[str]] = defaultdict(list)
    fallback = 0
    for id_, meter, currency, status, quantity, cost in db.execute(select).fetchall():
        if status == "unpriced":
            without[id_].append(meter)
        else:
            costs[id_][currency] += cost
            fallback += quantity if status == "fallback" else 0
    if fallback:
        notes.append(f"{fallback:,} cached tokens have no price of their own in the scenario: they are priced as input.")
    outcomes: dict[int, _Outcome] = {}
    for group in groups:
        if group.id not in targets:
            continue
        currencies = dict(costs[group.id]) or ({} if group.tokens or not group.currency else {group.currency: Decimal(0)})
        wrong = sorted({currency for currency in currencies if not group.provisioned and currency != group.currency})
        if without[group.id]:
            outcomes[group.id] = f"no price of {', '.join(without[group.id])} as {' '.join(filter(None, targets[group.id]))}"
        elif len(currencies) != 1 or wrong:
            outcomes[group.id] = f"priced in {', '.join(sorted(currencies))} there" if currencies else "no price there"
        else:
            [outcomes[group.id]] = currencies.items()
    return outcomes


def _fixed(
    db: duckdb.DuckDBPyConnection, stage: DailyTables, known: Sequence[dt.date], reference: Reference, days: Sequence[dt.date],
    groups: Iterable[_Group], only: Only,
) -> _Fixed:  # fmt: skip
    """The cost of the provisioned deployments, split among all who used them as in the bill."""
    deployments = {group.deployment for group in groups if group.provisioned and group.deployment}
    if only.model is None:
        rows = (row for row in reference.capacity if row.deployment_sku in PROVISIONED_SKUS)
        deployments |= {row.deployment for row in rows if only.deployment in (None, row.deployment)}
    usage = fixed_costs.hourly_usage(db, stage.source(known))
    costs: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    unused: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    covered = set()
    for line in (fixed.line for day in days for fixed in fixed_costs.of_day(day, reference, usage.get(day, []))):
        mine = only.cost_center in (None, line.payer.cost_center)
        if line.deployment is None and mine and only.model is None and only.deployment is None:
            unused[line.capacity_id, line.currency] += line.cost
        elif line.deployment in deployments:
            covered.add(line.deployment)
            if mine:
                costs[line.deployment, line.currency] += line.cost
    return _Fixed(costs, unused, frozenset(covered))


def _keep_whole_deployments(groups: Iterable[_Group], outcomes: dict[int, _Outcome], fixed: _Fixed) -> None:
    """Capacity cannot be given back in part: where some usage of a deployment stays, all of it does."""
    members: dict[str | None, list[_Group]] = defaultdict(list)
    for group in groups:
        if group.provisioned:
            members[group.deployment].append(group)
    for deployment, found in members.items():
        reasons = sorted({outcome for group in found if isinstance(outcome := outcomes[group.id], str)})
        currencies = {outcomes[group.id][0] for group in found} | {currency for name, currency in fixed.costs if name == deployment}
        if not reasons and len(currencies) > 1:
            reasons = [f"capacity and tokens are priced in {', '.join(sorted(currencies))}"]
        if reasons:
            outcomes.update(dict.fromkeys((group.id for group in found), "; ".join(reasons)))


def _add_capacity(found: _Lines, groups: Iterable[_Group], outcomes: Mapping[int, _Outcome], fixed: _Fixed) -> None:
    """The lines of capacity: with the usage of its deployment, or without any."""
    shown = {group.deployment: group for group in groups if group.provisioned}
    kept = {deployment: outcome for deployment, group in shown.items() if isinstance(outcome := outcomes[group.id], str)}
    for (deployment, currency), cost in fixed.costs.items():
        note, of = kept.get(deployment), ("capacity without usage", deployment, None)
        if group := shown.get(deployment):
            of = (group.name, deployment, group.deployment_sku)
        found.add(of, currency, note, cost, cost if note else Decimal(0), together=group is not None)
    for (reservation_id, currency), cost in fixed.unused.items():
        note = "kept: some capacity stays" if kept else None
        found.add(("unused reservation", reservation_id, None), currency, note, cost, cost if note else Decimal(0))


def _as_ptu(
    db: duckdb.DuckDBPyConnection, groups: Sequence[_Group], days: Sequence[dt.date], scenario: Scenario, which: str, notes: list[str]
) -> Comparison:
    """One provisioned deployment in place of what is paid by the token."""
    reasons = {group.id: _why_not_ptu(group) for group in groups}
    moved = [group for group in groups if reasons[group.id] is None]
    if not moved:
        raise ValueError(f"no usage{which} that is paid by the token and has a price")
    models = sorted({group.model or "unknown model" for group in moved})
    currencies = sorted({group.currency or "" for group in moved})
    if len(models) > 1:
        raise ValueError(f"provisioned throughput is deployed for one model; name it with --model: {', '.join(models)}")
    if len(currencies) > 1:
        raise ValueError(f"the usage{which} is priced in several currencies: {', '.join(currencies)}")
    [model], [currency], sku = models, currencies, scenario.deployment_sku
    figures = ptu_models().get(model)
    ids = f"id IN ({', '.join(str(group.id) for group in moved)})"
    ratio = figures.output_ratio if figures else 1
    select = f"SELECT {_UNCACHED}, {_OUTPUT} FROM used WHERE {ids} GROUP BY date_trunc('minute', event_time)"
    minutes = [uncached + ratio * output for uncached, output in db.execute(select).fetchall()]
    ptus = scenario.ptus
    if ptus is None:
        if not figures:
            raise ValueError(f"how much of {model} a PTU carries is not known: say how many PTUs, as ptu:N (known: {', '.join(ptu_models())})")
        ptus = figures.needed(Fraction(max(minutes)), sku)
    notes += _ptu_notes(scenario, figures, ptus, currency, len(days))
    if len(pooled := sorted({group.deployment or "unknown deployment" for group in moved})) > 1:
        notes.append(f"One provisioned deployment takes the usage of {', '.join(pooled)}.")
    select = f"SELECT usage_date, hour(event_time), id, {_UNCACHED}, {_OUTPUT} FROM used WHERE {ids} GROUP BY ALL"
    usage: dict[dt.date, list[capacity.Usage]] = defaultdict(list)
    hours: dict[tuple[dt.date, int], int] = defaultdict(int)
    for day, hour, id_, uncached, output in db.execute(select).fetchall():
        usage[day].append(capacity.Usage(hour, _MADE_UP, capacity.Payer(application=str(id_)), uncached, output))
        hours[day, hour] += uncached + ratio * output
    costs = _ptu_costs(scenario, figures, ptus, currency, usage, days)
    found = _Lines()
    for group in groups:
        note = reasons[group.id]
        found.add(group, group.currency, note, group.cost, group.cost if note else costs.pop(str(group.id), Decimal(0)))
    for idle in costs.values():
        found.add(("idle capacity", None, sku), currency, None, None, idle)
    lines = found.all()
    [(today, cost)] = _totals(line for line in lines if line.note is None).values()
    throughput = _throughput(ptus * figures.input_tpm_per_ptu, ptus, minutes, hours, len(days)) if figures else None
    break_even = _break_even(cost, today, lines, days)
    return Comparison(dataclasses.replace(scenario, ptus=ptus), lines, tuple(notes), throughput, break_even)


def _why_not_ptu(group: _Group) -> str | None:
    if group.provisioned:
        return "unchanged: paid with its capacity"
    if group.deployment_sku in BATCH_SKUS.values():
        return "unchanged: batch"
    return "has no price today" if group.unpriced else None


def _ptu_costs(
    scenario: Scenario, figures: PtuModel | None, ptus: int, currency: str, usage: Mapping[dt.date, list[capacity.Usage]], days: Iterable[dt.date]
) -> dict[str | None, Decimal]:
    """What the PTUs cost in the days, split by the hour among the groups that used them, by their id; None: idle."""
    sku, price = scenario.deployment_sku, scenario.hourly_price or LIST_PRICE
    row = Capacity(_MADE_UP, _MADE_UP, ptus, price, currency, deployment_sku=sku)
    if figures:
        row = dataclasses.replace(row, output_ratio=Decimal(figures.output_ratio), units_per_ptu_minute=Decimal(figures.input_tpm_per_ptu))
    reserved = []
    if scenario.monthly_price is not None:
        reserved = [Reservation(_MADE_UP, sku, ptus, ptus * scenario.monthly_price, "1-month", currency)]
    costs: dict[str | None, Decimal] = defaultdict(Decimal)
    for line in (line for day in days for line in capacity.lines(day, [row], reserved, usage.get(day, []))):
        costs[line.payer.application] += line.cost
    return costs


def _ptu_notes(scenario: Scenario, figures: PtuModel | None, ptus: int, currency: str, days: int) -> list[str]:
    """What the PTU scenario assumes. Raises ValueError where its price must be named."""
    sku = scenario.deployment_sku
    notes = [f"{ptus} PTUs ({sku}) are deployed 24 hours on each of the {days} days."]
    if scenario.monthly_price is not None:
        notes.append(f"They are reserved at {scenario.monthly_price:f} {currency} a PTU and calendar month, spread over its days.")
    elif scenario.hourly_price is not None:
        notes.append(f"A PTU-hour costs {scenario.hourly_price:f} {currency}, without a reservation.")
    elif (sku, currency) != (GLOBAL, LIST_CURRENCY):
        raise ValueError(f"say what a PTU of {sku} costs in {currency}, with --hourly-price or --monthly-price: the list price is of {GLOBAL} in USD")
    else:
        notes.append(f"A PTU-hour is assumed to cost the global list price of {LIST_PRICE} {LIST_CURRENCY}, without a reservation.")
    if not figures:
        return [*notes, "How much of this model a PTU carries is not known: whether these PTUs are enough was not looked at."]
    least, step = figures.sizes(sku)
    notes.append(
        f"A PTU carries {figures.input_tpm_per_ptu:,} tokens of {figures.model} a minute, an output token counts as {figures.output_ratio}, "
        f"a cached one as none ({figures.source}, {figures.as_of})."
    )
    if scenario.ptus is None:
        notes.append(f"{ptus} is the smallest size that carries the busiest minute: sizes are {least} and {step} more at a time.")
    elif ptus < least or (ptus - least) % step:
        notes.append(f"Azure may refuse this size: sizes are {least} and {step} more at a time.")
    return notes


def _throughput(offered: int, ptus: int, minutes: Sequence[int], hours: Mapping[tuple[dt.date, int], int], days: int) -> Throughput:
    """How full the PTUs are that can do `offered` units a minute."""
    over = [units - offered for units in minutes if units > offered]
    mean, hour, minute = sum(minutes), max(hours.values()), max(minutes)
    return Throughput(
        ptus,
        Fraction(mean, offered * 1440 * days),
        Fraction(hour, offered * 60),
        Fraction(minute, offered),
        len(over),
        Fraction(sum(over), mean or 1),
    )


def _break_even(fixed: Decimal, by_tokens: Decimal, lines: Iterable[Line], days: Sequence[dt.date]) -> BreakEven | None:
    """How often the usage costs by its tokens what the other arrangement costs; None when it costs nothing."""
    if not by_tokens:
        return None
    share = Fraction(fixed) / Fraction(by_tokens)
    return BreakEven(share, share * sum(line.tokens for line in lines if line.note is None) / len(days))


def _totals(lines: Iterable[Line]) -> dict[str, tuple[Decimal, Decimal]]:
    sums: dict[str, tuple[Decimal, Decimal]] = {}
    for line in lines:
        if line.currency:
            today, scenario = sums.get(line.currency, (Decimal(0), Decimal(0)))
            sums[line.currency] = (today + (line.today or 0), scenario + (line.scenario or 0))
    return dict(sorted(sums.items()))


def _sum(costs: Iterable[Decimal | None]) -> Decimal | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known, Decimal(0)) if known else None
