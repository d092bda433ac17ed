"""The digest of a bill: a hash of what its lines say, whatever their order and however they are stored.

A line's canonical text is a JSON array, without spaces, of its values in the order of the columns: NULL as null, everything else as a string. A
number has no exponent and no zeros that say nothing (`10`, `0.000075`), a date is `2026-10-05`. The digest of a day is the SHA-256 of its lines'
texts, sorted by their UTF-8 bytes, each ended by a newline; that of a range is the SHA-256 of `<date> <digest>` and a newline for each of its days.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal


def canonical(line: Sequence[object]) -> str:
    """The canonical text of a line."""
    return json.dumps([None if value is None else text(value) for value in line], ensure_ascii=False, separators=(",", ":"))


def text(value: object) -> str:
    """The canonical text of a value that is not NULL."""
    if not isinstance(value, Decimal):
        return str(value)
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def of_day(lines: Iterable[Sequence[object]]) -> str:
    """The digest of a day's lines: 64 hexadecimal digits."""
    texts = sorted(canonical(line).encode() for line in lines)
    return hashlib.sha256(b"".join(line + b"\n" for line in texts)).hexdigest()


def of_days(digests: Mapping[date, str]) -> str:
    """The digest of a range from those of its days."""
    return hashlib.sha256("".join(f"{day} {digests[day]}\n" for day in sorted(digests)).encode()).hexdigest()
