"""DuckDB as the engine over the lake's files: one private in-memory connection per piece of work."""

import datetime as dt
import hashlib
import json
import uuid
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import duckdb

MEMORY_LIMIT = "500MB"
_DICTIONARY_VALUES = 1000
"""A column with more values is written without a dictionary: looking for repeated ids and times among thousands costs more than it saves."""

GRACE = dt.timedelta(days=1)
"""How long an object that nothing refers to any more is kept for readers of the previous state."""


def connect(spill: Path) -> duckdb.DuckDBPyConnection:
    """A connection with a bounded memory that spills to the folder `spill`; UTC, and no extension is ever loaded from a network."""
    config = {
        "memory_limit": MEMORY_LIMIT,
        "temp_directory": str(spill / f"spill-{uuid.uuid4().hex}"),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def read_parquet(paths: Sequence[str], empty: str = "", *, filename: bool = False) -> str:
    """A FROM item over Parquet files; columns of the SELECT `empty`, which gives no rows, are there even if no file has them.

    With `filename` each row says which of the paths it is from, and nothing is taken from the folders' names.
    """
    options = "union_by_name = true" + (", filename = true, hive_partitioning = false" if filename else "")
    files = f"read_parquet([{', '.join(literal(path) for path in paths)}], {options})"
    return f"(SELECT * FROM {files} UNION ALL BY NAME {empty})" if empty else files


def literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def stage(db: duckdb.DuckDBPyConnection, folder: Path, select: str, metadata: dict[str, str] | None = None) -> Path:
    """Write a SELECT's rows as one new Parquet file in `folder`, with `metadata` in its footer."""
    target = folder / f"{uuid.uuid4().hex}.parquet"
    footer = ", ".join(f"{key}: {literal(value)}" for key, value in (metadata or {}).items())
    options = f", KV_METADATA {{{footer}}}" if footer else ""
    db.execute(f"COPY ({select}) TO {literal(str(target))} (FORMAT parquet, DICTIONARY_SIZE_LIMIT {_DICTIONARY_VALUES}{options})")
    return target


def sql_file(room: str, name: str) -> str:
    """The text of a `.sql` file that lies in a room of this package."""
    return resources.files("aoai_usage_pipeline").joinpath(room, name).read_text("utf-8")


def digest(*parts: object) -> str:
    """A short stable hash of JSON-able values: 24 hexadecimal digits of SHA-256."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def code_digest(*rooms: str) -> str:
    """A hash of the source of whole rooms, so that a change of the code is noticed without anyone counting versions."""
    files = sorted(path for room in rooms for path in (Path(__file__).parent.parent / room).rglob("*") if path.suffix in (".py", ".sql"))
    return digest([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
