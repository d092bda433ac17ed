"""What a meter of the Azure price list is: its model, deployment type, tier and our meter, read word by word from its name.

The words are in `retail_meters.csv`, which people review. A name with any word that is not there is not understood; nothing is guessed.
"""

import csv
import dataclasses
import functools
import re
from decimal import ROUND_HALF_EVEN, Decimal
from importlib import resources
from typing import NamedTuple

from aoai_usage_pipeline.reference.checks import METERS
from aoai_usage_pipeline.reference.retail import Item

_SKUS = {
    ("global", "no"): "GlobalStandard",
    ("datazone", "no"): "DataZoneStandard",
    ("regional", "no"): "Standard",
    ("global", "yes"): "GlobalBatch",
    ("datazone", "yes"): "DataZoneBatch",
}
_UNITS = {"1": 1, "100": 100, "1K": 1000, "1M": 1_000_000}
_SECONDS = {"1 Second": 1, "1/Second": 1, "1 Hour": 3600, "1/Hour": 3600}
_PLACES = Decimal("0.000000001")
_ATTRIBUTES = ("model", "version", "modality", "direction", "cache", "place", "batch", "tier", "band", "meter", "unit", "kind")
KINDS = {
    "fine_tuned": "use of a fine-tuned model",
    "training": "training",
    "hosting": "hosting of a fine-tuned model",
    "grader": "graders of fine-tuning",
    "provisioned": "provisioned throughput (capacity.csv)",
    "storage": "storage",
    "video": "video",
    "reservation": "reservations",
    "dev_test": "Dev/Test prices",
    "free": "free",
}
"""What is on the price list and no usage meter here: `kind` in words."""


class NotUnderstood(ValueError):
    """The message says which word or fact of the item is not understood."""


class Key(NamedTuple):
    """What selects a price beside the region. An empty text matches anything."""

    model: str
    model_version: str
    deployment_sku: str
    service_tier: str
    context_band: str
    meter: str


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """An amount per `unit_tokens` units of a meter; `note` says so where it had to be rounded."""

    amount: Decimal
    unit_tokens: int
    note: str = ""

    @property
    def each(self) -> Decimal:
        """The price of one unit, exactly."""
        return self.amount.scaleb(1 - len(str(self.unit_tokens)))


@functools.cache
def _phrases() -> dict[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What each phrase says: attribute and value; an attribute that ends in `?` holds unless another word says otherwise."""
    text = resources.files("aoai_usage_pipeline.reference").joinpath("retail_meters.csv").read_text("utf-8")
    found: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {}
    for row in csv.DictReader(text.splitlines()):
        phrase = tuple(_words(row["words"]))
        says = tuple((name, value) for name, _, value in (part.partition("=") for part in row["says"].split()))
        if phrase in found or any(name.rstrip("?") not in _ATTRIBUTES for name, _ in says):
            raise ValueError(f"retail_meters.csv: {row['words']!r} is repeated or says something unknown")
        found[phrase] = says
    return found


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name.lower()) if word]


@functools.lru_cache(maxsize=4096)
def read_name(meter_name: str) -> dict[str, str]:
    """The attributes that the words of a name say. Raises `NotUnderstood` with the whole name and the word."""
    phrases = _phrases()
    longest = max(map(len, phrases))
    words = _words(meter_name)
    said: dict[str, str] = {}
    otherwise: dict[str, str] = {}
    at = 0
    while at < len(words):
        length = next((n for n in range(longest, 0, -1) if tuple(words[at : at + n]) in phrases), 0)
        if not length:
            raise NotUnderstood(f"{meter_name!r}: unknown word {_unknown(words[at:])!r}")
        for name, value in phrases[tuple(words[at : at + length])]:
            target = otherwise if name.endswith("?") else said
            known = target.setdefault(name.rstrip("?"), value)
            if known != value:
                raise NotUnderstood(f"{meter_name!r}: says both {name.rstrip('?')} {known} and {value}")
        at += length
    return otherwise | said


def _unknown(words: list[str]) -> str:
    """The first of these words that continues no known phrase."""
    known = next(n for n in range(len(words), -1, -1) if any(phrase[:n] == tuple(words[:n]) for phrase in _phrases()))
    return words[min(known, len(words) - 1)]


def kind_of(item: Item) -> str | None:
    """Which of `KINDS` an item is, None for a usage meter. Raises `NotUnderstood`."""
    if item.type in ("Reservation", "DevTestConsumption"):
        return "reservation" if item.type == "Reservation" else "dev_test"
    if item.type != "Consumption":
        raise NotUnderstood(f"{item.meter_name!r}: unknown price type {item.type!r}")
    return read_name(item.meter_name).get("kind")


def keys_of(item: Item) -> tuple[Key, ...]:
    """What a usage meter's item prices: one key, or several where one meter covers several image sizes. Raises `NotUnderstood`."""
    said = read_name(item.meter_name)
    if said.get("unit", item.unit) != item.unit:
        raise NotUnderstood(f"{item.meter_name!r}: its name says {said['unit']}, its unit is {item.unit!r}")
    sku = _SKUS.get((said.get("place", ""), said.get("batch", "no")))
    if sku is None:
        raise NotUnderstood(f"{item.meter_name!r}: no deployment type: {said.get('place', 'neither global, data zone nor regional')}, batch")
    meters = said["meter"].split("|") if "meter" in said else [_token_meter(item.meter_name, said)]
    if "model" not in said:
        raise NotUnderstood(f"{item.meter_name!r}: no model")
    # tools cost the same with every model and in every tier
    model, tier = ("", "") if said["model"] == "*" else (said["model"], said.get("tier", "default"))
    return tuple(Key(model, said.get("version", ""), sku, tier, said.get("band", ""), meter) for meter in meters)


def _token_meter(name: str, said: dict[str, str]) -> str:
    direction, cache, modality = said.get("direction"), said.get("cache"), said.get("modality", "text")
    if cache == "write" and direction in (None, "input"):
        meter = "cache_write" if modality == "text" else f"{modality}_cache_write"
    elif direction == "input" or (cache == "read" and direction is None):
        meter = ("cached_" if cache == "read" else "") + ("input" if modality == "text" else f"{modality}_input")
    elif direction == "output" and cache is None:
        meter = "output" if modality == "text" else f"{modality}_output"
    else:
        raise NotUnderstood(f"{name!r}: {'cached output' if direction else 'neither input nor output'}")
    if meter not in METERS:
        raise NotUnderstood(f"{name!r}: no meter here for {meter}")
    return meter


def price_of(item: Item, meter: str) -> Price:
    """The item's price in the units of a meter of ours. Raises `NotUnderstood` for a unit, a tier or a price that does not fit."""
    if item.minimum_units:
        raise NotUnderstood(f"{item.meter_name!r}: a price from {item.minimum_units} units on, which a price book cannot say")
    if not item.price:
        raise NotUnderstood(f"{item.meter_name!r}: its price is 0")
    unit = (_SECONDS if meter == "audio_seconds" else _UNITS).get(item.unit)
    if unit is None:
        raise NotUnderstood(f"{item.meter_name!r}: unknown unit {item.unit!r} for {meter}")
    if meter == "audio_seconds":
        exact = item.price / unit
        amount = exact.quantize(_PLACES, ROUND_HALF_EVEN)
        note = "" if amount * unit == item.price else f"{item.price:f} per {item.unit.lower().replace('1', '').strip(' /')}, rounded"
        return Price(_plain(amount), 1, note)
    if item.price != round(item.price, -_PLACES.as_tuple().exponent):
        raise NotUnderstood(f"{item.meter_name!r}: {item.price} has more than 9 decimal places")
    return Price(_plain(item.price), unit)


def _plain(amount: Decimal) -> Decimal:
    """Without trailing zeros or an exponent."""
    return Decimal(f"{amount.normalize():f}")
