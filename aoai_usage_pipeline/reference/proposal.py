"""What a price list changes in a price book: new rows, and rows that end because their price changed. History is never rewritten.

A row that is in force keeps its text; only its end may be set. Rows that the list does not know are kept.
"""

import csv
import dataclasses
import datetime as dt
import io
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from aoai_usage_pipeline.reference.files import PRICE_BOOK, ReferenceDataError, Row, parse_price_book
from aoai_usage_pipeline.reference.retail import Item, Snapshot
from aoai_usage_pipeline.reference.retail_meters import Key, NotUnderstood, Price, keys_of, kind_of, price_of


@dataclasses.dataclass(eq=False)
class Entry:
    """One row of a price book: its text by column, and what it means. An empty `region` matches any."""

    values: dict[str, str]
    key: Key
    region: str
    price: Price
    currency: str
    start: dt.date | None
    end: dt.date | None

    @property
    def price_id(self) -> str:
        return self.values["price_id"]

    @property
    def meter_id(self) -> str:
        return self.values.get("meter_id", "").lower()


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A row whose price changed: the row that ends and the one that follows."""

    old: Entry
    new: Entry

    @property
    def percent(self) -> Decimal | None:
        """How much dearer the new price is, in percent to one place; None where the two cannot be compared."""
        if not self.old.price.amount or self.old.currency != self.new.currency:
            return None
        return round((self.new.price.each / self.old.price.each - 1) * 100, 1)


class Book:
    """The price book in a file, as it is and as it would be. An absent file is an empty book."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = path.read_bytes() if path.is_file() else b""
        try:
            text = self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ReferenceDataError(f"{path}: not UTF-8 text (byte {error.start})") from None
        rows = {row.line: row for row in parse_price_book(text, path)}
        reader = csv.reader(io.StringIO(text, newline=""))
        self.columns = [name.strip() for name in next(reader, PRICE_BOOK.columns)]
        self.entries = [
            _entry(rows[reader.line_num], dict(zip(self.columns, (field.strip() for field in fields), strict=True)))
            for fields in reader
            if reader.line_num in rows
        ]
        self.columns += [name for name in PRICE_BOOK.columns if name not in self.columns]

    def text(self) -> str:
        """The book as CSV, in its own columns and line ends."""
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self.columns, restval="", lineterminator="\r\n" if b"\r\n" in self.content else "\n")
        writer.writeheader()
        writer.writerows(entry.values for entry in self.entries)
        return out.getvalue()

    def rows(self) -> tuple[Row, ...]:
        """The book as reference data. Raises `ReferenceDataError` where it could not be loaded."""
        return parse_price_book(self.text(), self.path)

    def write(self) -> None:
        """Replace the file, whole or not at all. Raises `ReferenceDataError` when it could not be loaded or was changed meanwhile."""
        self.rows()
        content = self.text().encode("utf-8-sig" if self.content.startswith(b"\xef\xbb\xbf") else "utf-8")
        target = self.path.resolve()
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            beside = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            beside.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
            if (target.read_bytes() if target.is_file() else b"") != self.content:
                raise ReferenceDataError(f"{self.path} was changed meanwhile: import again")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        self.content = content


def _entry(row: Row, values: dict[str, str]) -> Entry:
    given = row.values
    key = Key(*(given[name] or "" for name in ("model", "model_version", "deployment_sku", "service_tier", "context_band", "meter")))
    price = Price(Decimal(given["unit_price"] or 0), int(given["unit_tokens"] or 1))
    return Entry(values, key, given["region"] or "", price, given["currency"] or "", row.effective_from, row.effective_to)


class Proposal:
    """What price lists change in a book. The book's entries are changed; nothing is written.

    `changed`, `new` and `ended` are the rows in question. The rest is about the last list: `unchanged` counts the rows that it confirms, `older` its
    prices from before the row that is in force, which change nothing, `kinds` the items that are no usage meters here, and `not_understood` the
    others by reason. `unlisted` are rows with a meter id in force on its day which it does not have: they are kept.
    """

    def __init__(self, book: Book, snapshots: Sequence[Snapshot], effective_from: dt.date | None = None) -> None:
        self.book = book
        self.changed: list[Change] = []
        self.new: list[Entry] = []
        self.ended: list[Entry] = []
        self.older, self.items, self.usage = 0, 0, 0
        self._confirmed: set[Entry] = set()
        self.kinds: Counter[str] = Counter()
        self.not_understood: Counter[str] = Counter()
        self._list_date = dt.date.min
        self.unlisted: list[Entry] = []
        self._effective_from = effective_from
        self._ids = {entry.price_id for entry in book.entries}
        self._by_key: dict[Key, list[Entry]] = defaultdict(list)
        for entry in book.entries:
            self._by_key[entry.key].append(entry)
        self._before: dict[str, list[Entry]] = defaultdict(list)
        for entry in book.entries:
            self._before[entry.key.meter].append(entry)
        self._follows: dict[Entry, Entry] = {}
        for snapshot in snapshots:
            self._read(snapshot)
        # a row that follows another stands after it, the others at the end
        followers: dict[Entry, list[Entry]] = defaultdict(list)
        for entry, first in self._follows.items():
            followers[first].append(entry)
        added = sorted((e for e in self.new if e not in self._follows), key=lambda e: (e.key, e.region, e.start or dt.date.min))
        book.entries = [row for entry in [*book.entries, *added] for row in (entry, *followers[entry])]

    @property
    def unchanged(self) -> int:
        return len(self._confirmed)

    def _read(self, snapshot: Snapshot) -> None:
        self.kinds, self.not_understood, self._list_date = Counter(), Counter(), snapshot.date
        self.items, self.usage, self.older, self._confirmed = len(snapshot.items), 0, 0, set()
        listed: set[Key] = set()
        for wave in _waves(snapshot.items):
            found: dict[Key, dict[str, list[tuple[Item, Price]]]] = defaultdict(lambda: defaultdict(list))
            by_meter_id: dict[str, set[Key]] = defaultdict(set)
            for entry in self._entries():
                if entry.meter_id:
                    by_meter_id[entry.meter_id].add(entry.key)
            for item in wave:
                try:
                    prices = list(_prices(item, by_meter_id))
                except NotUnderstood as reason:
                    self.not_understood[str(reason)] += 1
                    continue
                if not prices:
                    self.kinds[kind_of(item) or ""] += 1
                    continue
                self.usage += 1
                for key, price in prices:
                    found[key][item.region].append((item, price))
            listed |= found.keys()
            for key, regions in sorted(found.items()):
                self._compare(key, self._one_price_each(key, regions), snapshot)
        self.unlisted = [e for e in self._entries() if e.meter_id and _in_force(e, snapshot.date) and e.key not in listed]

    def _entries(self) -> list[Entry]:
        return [entry for entries in self._by_key.values() for entry in entries]

    def _one_price_each(self, key: Key, regions: dict[str, list[tuple[Item, Price]]]) -> dict[str, tuple[Item, Price]]:
        """The price of each region; two meters of one key with different prices are not understood."""
        one: dict[str, tuple[Item, Price]] = {}
        for region, offers in regions.items():
            offers.sort(key=lambda offer: (offer[0].meter_name, offer[0].meter_id))
            if len({price.each for _, price in offers}) == 1:
                one[region] = offers[0]
                continue
            for item, _ in offers:
                others = ", ".join(f"{price.amount} per {price.unit_tokens} ({other.meter_name!r})" for other, price in offers)
                self.not_understood[f"{item.meter_name!r}: {_described(key)} has several prices in {region}: {others}"] += 1
                self.usage -= 1
        return one

    def _compare(self, key: Key, regions: dict[str, tuple[Item, Price]], snapshot: Snapshot) -> None:
        if not regions:
            return
        if not self._by_key[key]:
            self._add_all(key, regions, everywhere=True)
            return
        followers: dict[Entry, list[str]] = defaultdict(list)
        differing: dict[Entry, list[str]] = defaultdict(list)
        unknown: list[str] = []
        for region, (item, price) in sorted(regions.items()):
            current = self._latest(key, region) or self._latest(key, "")
            if current is None:
                unknown.append(region)
                continue
            followers[current].append(region)
            day = max(snapshot.date, item.start)
            if _says(current, price, item.currency) and (current.end is None or current.end > day):
                self._confirmed.add(current)
            elif current.start and current.start >= day:
                known = [e for e in self._by_key[key] if e.region in (region, "") and _in_force(e, day) and _says(e, price, item.currency)]
                self._confirmed.update(known)
                self.older += not known
            else:
                differing[current].append(region)
        self._add_all(key, {region: regions[region] for region in unknown}, everywhere=False)
        for current, names in followers.items():
            ends = [end for region in names if (end := regions[region][0].end)]
            if current not in differing and len(ends) == len(names) and current.end is None and max(ends) > (current.start or dt.date.min):
                self._end(current, max(ends))
                self.ended.append(current)
        for current, names in differing.items():
            offers = {region: regions[region] for region in names}
            if current.region or (names == followers[current] and len({price.each for _, price in offers.values()}) == 1):
                self._follow(current, offers, snapshot)
            elif names == followers[current]:
                # one price everywhere became several
                start = min(self._start(current, [item], snapshot) for item, _ in offers.values())
                self._end(current, start)
                self.ended.append(current)
                for region, (item, price) in offers.items():
                    self._add(self._new(key, region, item, price, start, where=region))
            else:
                for region, (item, price) in offers.items():
                    self._add(self._new(key, region, item, price, self._start(current, [item], snapshot), where=region))

    def _follow(self, current: Entry, offers: dict[str, tuple[Item, Price]], snapshot: Snapshot) -> None:
        region = min(offers)
        start = self._start(current, [item for item, _ in offers.values()], snapshot)
        new = self._new(current.key, current.region, *offers[region], start, where=region)
        self._by_key[current.key].append(new)
        self._ids.add(new.price_id)
        self._follows[new] = self._follows.get(current, current)
        if current.end is None or current.end > start:
            self._end(current, start)
            self.changed.append(Change(current, new))
        else:
            self.new.append(new)

    def _start(self, current: Entry, items: list[Item], snapshot: Snapshot) -> dt.date:
        """The first day of a price that follows `current`: the day the list names, or else the day of the list."""
        if self._effective_from:
            if current.start and self._effective_from <= current.start:
                raise ValueError(
                    f"--effective-from {self._effective_from} is not after {current.start}, from which {current.price_id} is in force: "
                    "history is not rewritten"
                )
            return self._effective_from
        named = min((item.start for item in items if current.start is None or item.start > current.start), default=None)
        if current.end and current.end <= snapshot.date:
            return max(current.end, named or current.end)
        return named or snapshot.date

    def _add_all(self, key: Key, offers: dict[str, tuple[Item, Price]], *, everywhere: bool) -> None:
        """New rows: one for all regions where the price is the same in all of them, else one a region."""
        # one region of a list may be all that was asked for
        everywhere = everywhere and (len(offers) > 1 or key.deployment_sku.startswith("Global"))
        if everywhere and len({(price.each, item.end) for item, price in offers.values()}) == 1:
            first = min(offers)
            item, price = offers[first]
            self._add(self._new(key, "", item, price, self._first_day(key, "", min(item.start for item, _ in offers.values())), where=first))
            return
        for region, (item, price) in sorted(offers.items()):
            self._add(self._new(key, region, item, price, self._first_day(key, region, item.start), where=region))

    def _first_day(self, key: Key, region: str, start: dt.date) -> dt.date:
        """From when a row of a new key holds: usage that a less exact row has priced so far keeps that price up to the day of the list."""
        if self._effective_from:
            return self._effective_from
        taken_over = any(
            all(mine in ("", value) for mine, value in zip(entry.key, key, strict=True))
            and entry.region in ("", region)
            and (entry.end is None or start < entry.end)
            for entry in self._before.get(key.meter, ())
            if entry.key != key
        )
        return max(start, self._list_date) if taken_over else start

    def _add(self, entry: Entry) -> None:
        self.new.append(entry)
        self._by_key[entry.key].append(entry)
        self._ids.add(entry.price_id)

    def _end(self, entry: Entry, day: dt.date) -> None:
        entry.end = day
        entry.values["effective_to"] = str(day)

    def _latest(self, key: Key, region: str) -> Entry | None:
        return max((e for e in self._by_key[key] if e.region == region), key=lambda e: e.start or dt.date.min, default=None)

    def _new(self, key: Key, region: str, item: Item, price: Price, start: dt.date, where: str) -> Entry:
        end = item.end if item.end and item.end > start else None
        source = f"Azure Retail Prices {self._list_date}: {item.meter_name}"
        values = {
            "price_id": self._id(key, region, start),
            **{name: getattr(key, name) or "*" for name in ("model", "model_version", "deployment_sku")},
            "region": region or "*",
            "service_tier": key.service_tier,
            "context_band": key.context_band,
            "meter": key.meter,
            "unit_price": f"{price.amount:f}",
            "unit_tokens": str(price.unit_tokens),
            "currency": item.currency,
            "effective_from": str(start),
            "effective_to": str(end or ""),
            "meter_id": item.meter_id,
            "source": source + (f" ({region})" if region else "") + (f"; {price.note}" if price.note else ""),
        }
        return Entry(values, key, region, price, item.currency, start, end)

    def _id(self, key: Key, region: str, start: dt.date) -> str:
        tier = key.service_tier if key.service_tier != "default" else ""
        parts = (key.model or "any", key.model_version, key.deployment_sku.lower(), region, tier, key.context_band, key.meter.replace("/", "-"))
        base = "-".join(part for part in parts if part)
        for name in (base, f"{base}-{start}"):
            if name not in self._ids:
                return name
        return next(name for n in range(2, len(self._ids) + 3) if (name := f"{base}-{start}-{n}") not in self._ids)


def _prices(item: Item, by_meter_id: dict[str, set[Key]]) -> Iterator[tuple[Key, Price]]:
    """What an item prices, nothing for what is no usage meter here: the keys of the book's rows with its meter id, else what its name says."""
    known = by_meter_id.get(item.meter_id.lower()) if item.type == "Consumption" else None
    if known is None and kind_of(item):
        return
    for key in sorted(known) if known else keys_of(item):
        yield key, price_of(item, key.meter)


def _waves(items: Iterable[Item]) -> list[list[Item]]:
    """Items in turns, so that a meter with several prices in time has one a turn, in order."""
    waves: list[list[Item]] = []
    turn: Counter[tuple[str, str, str]] = Counter()
    for item in sorted(items, key=lambda item: item.start):
        name = (item.meter_id, item.region, item.type)
        if turn[name] == len(waves):
            waves.append([])
        waves[turn[name]].append(item)
        turn[name] += 1
    return waves


def _says(entry: Entry, price: Price, currency: str) -> bool:
    return entry.price.each == price.each and entry.currency == currency


def _in_force(entry: Entry, day: dt.date) -> bool:
    return (entry.start is None or entry.start <= day) and (entry.end is None or day < entry.end)


def _described(key: Key) -> str:
    return " ".join(part for part in key if part)
