"""Rows of `capacity.csv` and `reservations.csv`: what is deployed or reserved at a fixed price, who owns what of it nobody uses, and their faults."""

import dataclasses
import datetime as dt
import re
from collections.abc import Mapping
from decimal import Decimal

from aoai_usage_pipeline.reference.checks import Fault, Values, check_currency

UNALLOCATED = "UNALLOCATED"
METHODS = ("usage", "shares", "peak", "two_part")
TERMS = {"1-month": 1, "1-year": 12}
GLOBAL = "GlobalProvisionedManaged"
PROVISIONED_SKUS = (GLOBAL, "DataZoneProvisionedManaged", "ProvisionedManaged")
_NUMBERS = {"hourly_price": (0, None), "output_ratio": (0, None), "fixed_part": (0, 100), "units_per_ptu_minute": (1, None)}


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """So many PTUs of a deployment at an hourly price, in force to the minute (UTC; None: open). `gateway` None: of any gateway."""

    capacity_id: str
    deployment: str
    ptus: int
    hourly_price: Decimal
    currency: str
    gateway: str | None = None
    idle_to: str = UNALLOCATED
    method: str = "usage"
    shares: tuple[tuple[str, Decimal], ...] = ()
    fixed_part: Decimal = Decimal(0)
    output_ratio: Decimal = Decimal(4)
    units_per_ptu_minute: Decimal | None = None
    deployment_sku: str | None = None
    region: str | None = None
    effective_from: dt.datetime | None = None
    effective_to: dt.datetime | None = None

    @classmethod
    def of(cls, values: Mapping[str, str | None], start: dt.date | None, end: dt.date | None) -> "Capacity":
        """The row that a valid line says."""
        given: dict[str, object] = {name: values[name] for name in _fields(cls) if values[name] is not None}
        given |= {name: Decimal(values[name] or 0) for name in _NUMBERS if name in given}
        given |= {"ptus": int(values["ptus"] or 0), "shares": _shares(values["shares"])}
        return cls(**given, effective_from=start, effective_to=end)  # type: ignore[arg-type]

    def on(self, day: dt.date) -> "Capacity | None":
        """The part of the row that lies in a UTC day, None when there is none."""
        first = dt.datetime.combine(day, dt.time())
        last = first + dt.timedelta(days=1)
        start, end = max(self.effective_from or first, first), min(self.effective_to or last, last)
        return dataclasses.replace(self, effective_from=start, effective_to=end) if start < end else None


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """So many PTUs of one type, in one region unless the type is global, for whole UTC days; `term_price` is for all of them and one whole term."""

    reservation_id: str
    deployment_sku: str
    ptus: int
    term_price: Decimal
    term: str
    currency: str
    region: str | None = None
    idle_to: str = UNALLOCATED
    effective_from: dt.date | None = None
    effective_to: dt.date | None = None

    @classmethod
    def of(cls, values: Mapping[str, str | None], start: dt.date | None, end: dt.date | None) -> "Reservation":
        """The row that a valid line says."""
        given: dict[str, object] = {name: values[name] for name in _fields(cls) if values[name] is not None}
        given |= {"ptus": int(values["ptus"] or 0), "term_price": Decimal(values["term_price"] or 0)}
        return cls(**given, effective_from=start, effective_to=end)  # type: ignore[arg-type]

    def on(self, day: dt.date) -> "Reservation | None":
        """The row without its end, which changes no day before it, or None when it is not in force on the day."""
        started = self.effective_from is None or self.effective_from <= day
        return dataclasses.replace(self, effective_to=None) if started and (self.effective_to is None or day < self.effective_to) else None


def check_capacity(values: Values, start: dt.date | None, fault: Fault) -> None:
    """Tell every fault of a line of `capacity.csv`, and give it the id and the method that it leaves blank."""
    if values["capacity_id"] is None:
        name = "/".join(part for part in (values["gateway"], values["deployment"]) if part)
        values["capacity_id"] = f"{name}@{start.isoformat()[:16]}" if start else name
    _check_ptus(values, fault)
    check_currency("currency", values, fault)
    _check_scope(values, fault)
    for name, (least, most) in _NUMBERS.items():
        _check_number(name, values, fault, least, most)
    method = values["method"] = values["method"] or METHODS[0]
    if method not in METHODS:
        fault("method", f"{method!r} is not one of {', '.join(METHODS)}")
        return
    for name, methods in (("shares", ("shares", "two_part")), ("fixed_part", ("two_part",))):
        if method in methods and values[name] is None:
            fault(name, f"must not be blank with method {method}")
        elif method not in methods and values[name] is not None:
            fault(name, f"has no meaning with method {method}")
    if values["shares"]:
        _check_shares(values["shares"], fault)


def check_reservation(values: Values, fault: Fault) -> None:
    """Tell every fault of a line of `reservations.csv`."""
    _check_ptus(values, fault)
    check_currency("currency", values, fault)
    _check_scope(values, fault)
    _check_number("term_price", values, fault)
    if values["term"] and values["term"] not in TERMS:
        fault("term", f"{values['term']!r} is neither {' nor '.join(TERMS)}")


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if not field.name.startswith("effective_")]


def _shares(text: str | None) -> tuple[tuple[str, Decimal], ...]:
    parts = [part.partition("=") for part in text.split(";")] if text else []
    return tuple((name.strip(), Decimal(percent.strip())) for name, _, percent in parts)


def _check_shares(text: str, fault: Fault) -> None:
    wrong = [part.strip() for part in text.split(";") if not re.fullmatch(r"[^=]*[^=\s][^=]*=\s*[0-9]{1,3}(\.[0-9]{1,9})?\s*", part, re.ASCII)]
    for part in wrong:
        fault("shares", f"{part!r} is not a cost centre with its percentage, such as CC-1100=60")
    if wrong:
        return
    names = [name for name, _ in _shares(text)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        fault("shares", f"{name!r} is named more than once")
    if (total := sum(percent for _, percent in _shares(text))) > 100:
        fault("shares", f"add up to {total} percent")


def _check_ptus(values: Values, fault: Fault) -> None:
    if values["ptus"] and not re.fullmatch(r"0*[1-9][0-9]{0,6}", values["ptus"], re.ASCII):
        fault("ptus", f"{values['ptus']!r} is not a whole number from 1 to 9999999")


def _check_scope(values: Values, fault: Fault) -> None:
    sku, region = values["deployment_sku"], values["region"]
    if sku and sku not in PROVISIONED_SKUS:
        fault("deployment_sku", f"{sku!r} is not one of {', '.join(PROVISIONED_SKUS)}")
    elif sku == GLOBAL and region:
        fault("region", f"must be blank for {GLOBAL}, whose reservations cover every region")
    elif sku and sku != GLOBAL and not region:
        fault("region", f"must not be blank for {sku}, whose reservations cover one region")


def _check_number(name: str, values: Values, fault: Fault, least: int = 0, most: int | None = None) -> None:
    text = values[name]
    if text and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text, re.ASCII):
        fault(name, f"{text!r} is not a decimal number such as 1.25, with at most 9 digits before and after the point")
    elif text and (Decimal(text) < least or (most is not None and Decimal(text) > most)):
        fault(name, f"{text!r} is not {f'from {least} to {most}' if most else f'at least {least}'}")
