"""What the lines of the price files may say: every check tells its faults by column, and gives a value its one spelling."""

import re
from collections.abc import Callable
from decimal import Decimal

Values = dict[str, str | None]
Fault = Callable[[str, str], None]

METERS = (
    "input",
    "cached_input",
    "cache_write",
    "output",
    "audio_input",
    "cached_audio_input",
    "audio_output",
    "image_input",
    "cached_image_input",
    "image_output",
    "image",
    "audio_seconds",
    "characters",
    "web_search_calls",
    "file_search_calls",
    "code_interpreter_sessions",
)
ONE_BY_ONE = ("audio_seconds",)
"""Meters that count parts of one, to 6 places; a price for one has 9, so cost has no more than 15."""

_IMAGE_METER = re.compile(r"image/[1-9][0-9]*x[1-9][0-9]*(/[a-z]+)?")
_MAX_UNIT_TOKENS = 1_000_000
_MAX_PRICE_PER_TOKEN = 100_000
_PLACES = 9


def check_price(values: Values, fault: Fault) -> None:
    """Tell every fault of a line of `price_book.csv`."""
    if values["meter"] in ONE_BY_ONE and values["unit_tokens"] not in (None, "1"):
        fault("unit_tokens", f"must be 1 for {values['meter']}, which is counted in parts of one")
    _check_key(values, fault)
    check_currency("currency", values, fault)
    _check_unit_price(values, fault)


def check_contract(values: Values, fault: Fault) -> None:
    """Tell every fault of a line of `contract_prices.csv`."""
    _check_key(values, fault)
    if (values["unit_price"] is None) == (values["discount"] is None):
        fault("unit_price", "needs either a unit_price with its unit_tokens, or a discount")
    if (values["unit_price"] is None) != (values["unit_tokens"] is None):
        fault("unit_tokens", "belongs to a unit_price")
    _check_unit_price(values, fault)
    _check_percent("discount", values["discount"], 0, 100, fault)


def check_markup(values: Values, fault: Fault) -> None:
    """Tell every fault of a line of `markups.csv`."""
    _check_key(values, fault)
    _check_percent("markup", values["markup"], -100, 10_000, fault)


def check_rate(values: Values, fault: Fault) -> None:
    """Tell every fault of a line of `exchange_rates.csv`."""
    for name in ("from_currency", "to_currency"):
        check_currency(name, values, fault)
    if values["from_currency"] and values["from_currency"] == values["to_currency"]:
        fault("to_currency", f"{values['to_currency']!r} is from_currency too")
    rate = values["rate"]
    if rate and (not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", rate) or not Decimal(rate)):
        fault("rate", f"{rate!r} is not a rate such as 0.923456, above 0 and with at most 9 decimal places")


def _check_key(values: Values, fault: Fault) -> None:
    meter = values["meter"]
    if meter and meter not in METERS and not _IMAGE_METER.fullmatch(meter):
        fault("meter", f"{meter!r} is not one of {', '.join(METERS)}, image/SIZE, image/SIZE/QUALITY")
    if values["context_band"] not in (None, "short", "long"):
        fault("context_band", f"{values['context_band']!r} is neither short nor long")
    if values["service_tier"]:
        tier = values["service_tier"].lower()
        values["service_tier"] = "default" if tier == "standard" else tier


def check_currency(name: str, values: Values, fault: Fault) -> None:
    """Tell that a value is no currency."""
    if (currency := values[name]) and not re.fullmatch("[A-Z]{3}", currency):
        fault(name, f"{currency!r} is not an ISO 4217 code such as USD")


def _check_percent(name: str, text: str | None, least: int, most: int, fault: Fault) -> None:
    if text and (not re.fullmatch(r"-?[0-9]{1,5}(\.[0-9]{0,6})?", text) or not least <= Decimal(text) <= most):
        fault(name, f"{text!r} is not a percentage from {least} to {most}, such as 12.5")


def _check_unit_price(values: Values, fault: Fault) -> None:
    price, unit = values["unit_price"], values["unit_tokens"]
    tokens = int(unit) if unit and unit.isascii() and unit.isdigit() and len(unit) <= 9 else 0
    if unit and (not 1 <= tokens <= _MAX_UNIT_TOKENS or str(tokens).strip("0") != "1"):
        fault("unit_tokens", f"{unit!r} is not a power of ten from 1 to {_MAX_UNIT_TOKENS}")
        return
    if price:
        if not re.fullmatch(r"-?[0-9]{1,30}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?", price):
            fault("unit_price", f"{price!r} is not a decimal number such as 2.50")
            return
        amount = Decimal(price)
        if amount < 0:
            fault("unit_price", f"{price!r} is not a price: it must not be negative")
        elif (tokens and amount / tokens >= _MAX_PRICE_PER_TOKEN) or amount >= Decimal(10) ** _PLACES:
            fault("unit_price", f"{price!r} is too large")
        elif amount != round(amount, _PLACES):
            fault("unit_price", f"{price!r} has more than {_PLACES} decimal places")
        else:
            values["unit_price"] = f"{amount:f}"
