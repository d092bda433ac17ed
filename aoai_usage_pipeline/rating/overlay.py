"""From a list price to what is billed: the contract's price or discount, the internal markup and the exchange rate, rounded once."""

import dataclasses
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact

PLACES = 9
"""Decimal places of a price."""

OVERLAID_UNIT = 1_000_000
"""The unit of a price that an overlay changed: 9 places of a price per million are 15 places of a price for one."""

_LIMIT = Decimal(10) ** 9
_EXACT = Context(prec=120, traps=[Inexact])


class PriceOverflow(ValueError):
    """A price does not fit DECIMAL(18,9) for its unit."""


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
    rounded = [
        price.quantize(Decimal(1).scaleb(-PLACES), ROUND_HALF_EVEN, Context(prec=120))
        for price in (exact.list_unit_price, exact.contracted_unit_price, exact.unit_price)
    ]
    if max(rounded) >= _LIMIT:
        raise PriceOverflow(f"{max(rounded)} per {exact.unit_tokens} is too large")
    return Prices(*rounded, exact.unit_tokens)


def unrounded(unit_price: Decimal, unit_tokens: int, overlay: Overlay, *, fractional: bool) -> Prices:
    """The prices that follow from a list price, with all their digits.

    A `fractional` meter counts parts of one, so its price stays a price for one.
    """
    unit = 1 if fractional else OVERLAID_UNIT
    listed = _per(unit_price, unit_tokens, unit)
    contracted = listed
    if overlay.unit_price is not None and overlay.unit_tokens is not None:
        contracted = _per(overlay.unit_price, overlay.unit_tokens, unit)
    elif overlay.discount is not None:
        contracted = _EXACT.multiply(listed, 1 - overlay.discount / 100)
    billed = _EXACT.multiply(contracted, 1 + (overlay.markup or Decimal(0)) / 100)
    rate = Decimal(1) if overlay.exchange_rate is None else overlay.exchange_rate
    return Prices(*(_EXACT.multiply(price, rate) for price in (listed, contracted, billed)), unit)


def _per(price: Decimal, of: int, unit: int) -> Decimal:
    # both units are powers of ten, so this is exact
    return price.scaleb(len(str(unit)) - len(str(of)), _EXACT)
