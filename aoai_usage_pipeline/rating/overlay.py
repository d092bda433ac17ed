"""From a list price to what is billed: the contract's price or discount, the internal markup and the exchange rate, rounded once."""

import dataclasses
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact

PLACES = 9
"""Decimal places of a price."""

OVERLAID_UNIT = 1_000_000
"""The unit of a price that an overlay changed: 9 places of a price per million are 15 places of a price for one."""

_LIMITS = {1: Decimal(10) ** 5, OVERLAID_UNIT: Decimal(10) ** 9}
_EXACT = Context(prec=120, traps=[Inexact])
_ROUNDED = Context(prec=120, rounding=ROUND_HALF_EVEN)


class PriceOverflow(ValueError):
    """A price is too large for its columns: DECIMAL(18,9) per unit and DECIMAL(20,15) for one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Overlay:
    """What changes a list price. `unit_price` is the contract's own price per `unit_tokens`; `discount` and `markup` are percentages."""

    unit_price: Decimal | None = None
    unit_tokens: int | None = None
    discount: Decimal | None = None
    markup: Decimal | None = None
    exchange_rate: Decimal | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """One price at its three levels, all per `unit_tokens` and in the billed currency."""

    list_unit_price: Decimal
    contracted_unit_price: Decimal
    unit_price: Decimal
    unit_tokens: int


def overlaid(unit_price: Decimal, unit_tokens: int, overlay: Overlay, *, fractional: bool) -> Prices:
    """The prices that follow from a list price. Each is computed exactly and rounded half-even to 9 places once. Raises `PriceOverflow`."""
    exact = unrounded(unit_price, unit_tokens, overlay, fractional=fractional)
    prices, unit = (exact.list_unit_price, exact.contracted_unit_price, exact.unit_price), exact.unit_tokens
    rounded = [price.quantize(Decimal(1).scaleb(-PLACES), context=_ROUNDED) for price in prices]
    if max(rounded) >= _LIMITS[unit]:
        raise PriceOverflow(f"{max(rounded)} per {unit:,} is too large: a price must be below {_LIMITS[unit]:,f}")
    return Prices(*rounded, unit)


def unrounded(unit_price: Decimal, unit_tokens: int, overlay: Overlay, *, fractional: bool) -> Prices:
    """The prices that follow from a list price, with all their digits.

    A `fractional` meter counts parts of one, so its price stays a price for one.
    """
    unit = 1 if fractional else OVERLAID_UNIT
    listed = _per(unit_price, unit_tokens, unit)
    contracted = listed
    # what is free at list stays free: tokens of provisioned deployments, whose capacity is paid
    if listed and overlay.unit_price is not None and overlay.unit_tokens is not None:
        contracted = _per(overlay.unit_price, overlay.unit_tokens, unit)
    elif overlay.discount is not None:
        contracted = _percent(listed, 100 - overlay.discount)
    billed = contracted if overlay.markup is None else _percent(contracted, 100 + overlay.markup)
    rate = Decimal(1) if overlay.exchange_rate is None else overlay.exchange_rate
    return Prices(*(_EXACT.multiply(price, rate) for price in (listed, contracted, billed)), unit)


def _percent(price: Decimal, percent: Decimal) -> Decimal:
    return _EXACT.multiply(price, percent).scaleb(-2, _EXACT)


def _per(price: Decimal, of: int, unit: int) -> Decimal:
    # both units are powers of ten, so this is exact
    return price.scaleb(len(str(unit)) - len(str(of)), _EXACT)
