"""Lists of the Azure Retail Prices API: read from a file, from a folder of snapshots, or from the API with all its pages.

A list is complete or an error: a page that cannot be read never shortens it.
"""

import dataclasses
import datetime as dt
import email.utils
import gzip
import http.client
import itertools
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

API = "https://prices.azure.com/api/retail/prices"
_ATTEMPTS = 6
_LONGEST_WAIT = 120.0
_TIMEOUT = 60.0
_MAX_PAGES = 10_000
_FAULTS_SHOWN = 20


class RetailError(ValueError):
    """A price list cannot be read or is not complete; the message names the file or page and what is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One price of one meter in one region, as the API lists it: `price` per `unit` (such as `1K`), from day `start` to before day `end`."""

    meter_id: str
    meter_name: str
    region: str
    price: Decimal
    unit: str
    currency: str
    start: dt.date
    end: dt.date | None
    type: str
    minimum_units: Decimal


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What was listed on one day."""

    date: dt.date
    items: tuple[Item, ...]


def snapshots(source: str, today: dt.date, wait: Callable[[float], None] = time.sleep) -> list[Snapshot]:
    """The lists of `source`, oldest first: a file (.json, .json.gz), a folder of such files, or an http(s) address of the API. Raises `RetailError`.

    A file's date is the one in its name, else the newest start date in it; the API's is `today`.
    """
    if re.match("https?://", source):
        return [Snapshot(today, _items(_pages(source, wait), source))]
    path = Path(source)
    if not path.is_dir():
        return [_file(path)]
    files = sorted(found for found in path.iterdir() if found.name.endswith((".json", ".json.gz")))
    if not files:
        raise RetailError(f"folder {path} has no .json or .json.gz files")
    found = [_file(file) for file in files]
    found.sort(key=lambda snapshot: snapshot.date)
    for one, other in itertools.pairwise(found):
        if one.date == other.date:
            raise RetailError(f"folder {path} has two lists of {one.date}: put the date into the names, such as {other.date}.json")
    _one_currency([item for snapshot in found for item in snapshot.items], str(path))
    return found


def _file(path: Path) -> Snapshot:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.name.endswith(".gz") else content).decode("utf-8-sig")
    except FileNotFoundError:
        raise RetailError(f"{path} does not exist; expected a file, a folder or an address such as {API}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RetailError(f"{path}: {error}") from error
    page = _json(text, str(path))
    if isinstance(page, dict) and page.get("NextPageLink"):
        raise RetailError(f"{path} is one page of several (its NextPageLink is set): import from the API, or save the items of all pages as one list")
    items = _items(_listed(page, str(path)), str(path))
    named = re.search(r"\d{4}-\d{2}-\d{2}", path.name)
    try:
        date = dt.date.fromisoformat(named.group()) if named else max(item.start for item in items)
    except ValueError:
        raise RetailError(f"{path}: no date: neither in its name nor in an item") from None
    return Snapshot(date, items)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal, parse_int=Decimal)
    except ValueError as error:
        raise RetailError(f"{where}: not JSON: {error}") from None


def _listed(page: Any, where: str) -> list[Any]:
    items = page.get("Items") if isinstance(page, dict) else page
    if not isinstance(items, list):
        raise RetailError(f"{where}: expected a list of items, or a page with Items")
    return items


def _pages(address: str, wait: Callable[[float], None]) -> list[Any]:
    """The items of every page."""
    items: list[Any] = []
    seen: set[str] = set()
    link: str | None = address
    while link:
        if link in seen or len(seen) >= _MAX_PAGES:
            raise RetailError(f"{link}: the pages do not end")
        if _origin(link) != _origin(address):
            raise RetailError(f"{address}: the next page is elsewhere, at {link}")
        seen.add(link)
        page = _json(_get(link, wait), link)
        if not isinstance(page, dict) or "NextPageLink" not in page:
            raise RetailError(f"{link}: not a page of the Retail Prices API: NextPageLink is missing, so nothing says whether the list is complete")
        items += _listed(page, link)
        link = page["NextPageLink"]
    return items


def _origin(link: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(link)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _get(link: str, wait: Callable[[float], None]) -> str:
    """The text at `link`; a busy service is asked again after the time it names."""
    address = urllib.parse.quote(link, safe=":/?&=%$'(),@+;~#[]!*")
    for attempt in range(_ATTEMPTS):
        pause = min(2.0**attempt, _LONGEST_WAIT)
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT) as response:  # noqa: S310 - http and https only, see _origin
                return response.read().decode("utf-8-sig")
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code not in (429, 500, 502, 503, 504):
                raise RetailError(f"{link}: {problem}") from None
            pause = _retry_after(error.headers.get("Retry-After")) or pause
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke off in the middle of a page
            problem = str(error)
        except UnicodeDecodeError as error:
            raise RetailError(f"{link}: {error}") from None
        if pause > _LONGEST_WAIT:
            raise RetailError(f"{link}: {problem}, and it asks to come back in {pause:.0f} seconds")
        if attempt + 1 < _ATTEMPTS:
            wait(pause)
    raise RetailError(f"{link}: {problem}, {_ATTEMPTS} times")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - dt.datetime.now(dt.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _items(listed: list[Any], where: str) -> tuple[Item, ...]:
    faults: list[str] = []
    items: list[Item] = []
    for number, given in enumerate(listed, 1):
        try:
            items.append(_item(given))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            faults.append(f"{where}: item {number}: {reason}")
    if faults:
        more = [f"... and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
        raise RetailError("\n".join(faults[:_FAULTS_SHOWN] + more))
    _one_currency(items, where)
    return tuple(items)


def _one_currency(items: list[Item], where: str) -> None:
    currencies = sorted({item.currency for item in items})
    if len(currencies) > 1:
        raise RetailError(f"{where}: prices in several currencies ({', '.join(currencies)}): import one currency at a time")


def _item(given: Any) -> Item:
    if not isinstance(given, dict):
        raise ValueError("expected an object")
    text = {name: given[name] for name in ("meterId", "meterName", "armRegionName", "unitOfMeasure", "currencyCode", "type", "effectiveStartDate")}
    for name, value in text.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}: expected text")
    price, minimum = given["retailPrice"], given.get("tierMinimumUnits", Decimal(0))
    if not isinstance(price, Decimal) or not price.is_finite() or price < 0:
        raise ValueError(f"retailPrice is {price!r}: expected a price")
    if not isinstance(minimum, Decimal):
        raise ValueError(f"tierMinimumUnits is {minimum!r}: expected a number")
    start, end = _time("effectiveStartDate", text["effectiveStartDate"]), given.get("effectiveEndDate")
    region = text["armRegionName"].strip().lower()
    return Item(
        text["meterId"], text["meterName"].strip(), "" if region == "global" else region, price, text["unitOfMeasure"].strip(),
        text["currencyCode"], start.date(), _end(end) if end else None, text["type"], minimum,
    )  # fmt: skip


def _time(name: str, text: object) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(str(text))
    except ValueError:
        raise ValueError(f"{name} is {text!r}: expected a time such as 2025-08-31T23:59:00Z") from None


def _end(text: object) -> dt.date:
    """The first day on which a price does not hold: the API names the last minute, such as 2025-08-31T23:59:00Z."""
    end = _time("effectiveEndDate", text)
    return end.date() if end.time() == dt.time() else end.date() + dt.timedelta(1)
