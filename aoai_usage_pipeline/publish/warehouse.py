"""The published DuckDB file: built beside the old one from the lake, then swapped in one step, so that its readers are never disturbed."""

import datetime as dt
import fcntl
import os
from pathlib import Path

import duckdb
import pyarrow as pa

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.lake.manifest import Manifests
from aoai_usage_pipeline.storage import ObjectStore

ENRICHED_DAYS = 35
"""How many days of request rows the file carries; all of them are in the lake."""

_STORAGE_VERSION = "v1.0.0"


def publish(lake: ObjectStore, manifests: Manifests, path: Path) -> dict[str, int]:
    """Make the file equal to the lake; returns rows by table. A file that is equal already is left alone, byte for byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made_from = _input(lake)
        if rows := _current(path, made_from):
            return rows
        beside = path.with_name(f".{path.name}.new")
        beside.unlink(missing_ok=True)
        with engine.connect(lake.staging()) as db:
            db.execute(f"ATTACH {engine.literal(str(beside))} AS w (STORAGE_VERSION '{_STORAGE_VERSION}')")
            _build(db, lake, manifests)
            db.execute("CREATE TABLE w.publication AS SELECT ? AS made_from", [made_from])
            rows = _rows(db, "w.")
            db.execute("DETACH w")
        os.replace(beside, path)
        return rows


def _input(lake: ObjectStore) -> str:
    """A digest of every object the file is made from."""
    versions = [(o.name, o.etag) for table in tables.PUBLISHED for o in lake.objects(f"{table}/")]
    versions += [(o.name, o.etag) for o in lake.objects("manifests/")]
    return engine.digest(sorted(versions), engine.code_digest("publish"), [str(columns) for columns in tables.PUBLISHED.values()])


def _current(path: Path, made_from: str) -> dict[str, int]:
    if not path.exists():
        return {}
    try:
        with duckdb.connect(str(path), read_only=True) as db:
            if db.execute("SELECT made_from FROM publication").fetchall() == [(made_from,)]:
                return _rows(db, "")
    except duckdb.Error:
        pass  # whatever it is, it is not what we would publish
    return {}


def _rows(db: duckdb.DuckDBPyConnection, prefix: str) -> dict[str, int]:
    return {table: db.execute(f"SELECT count(*) FROM {prefix}{table}").fetchall()[0][0] for table in tables.PUBLISHED}


def _build(db: duckdb.DuckDBPyConnection, lake: ObjectStore, manifests: Manifests) -> None:
    for table, columns in tables.PUBLISHED.items():
        empty = tables.empty_select(columns)
        if table == "capture_files":
            db.register("rows_of_files", _capture_files(manifests))
            source = "rows_of_files"
        elif table == "quarantine":
            dates = {manifest.quarantine: manifest.capture_date for manifest in manifests.all() if manifest.quarantine}
            paths = lake.local_paths(dates)
            db.register("dates_of_files", pa.table({"filename": pa.array(paths, pa.string()), "capture_date": pa.array(dates.values(), pa.date32())}))
            rows = engine.read_parquet(paths, tables.empty_select(tables.QUARANTINE), filename=True) if paths else ""
            source = f"{rows} JOIN dates_of_files USING (filename)" if rows else ""
        else:
            days = Days(lake, table)
            existing = days.existing()
            if table == "enriched_usage" and existing:
                existing = [day for day in existing if day > existing[-1] - dt.timedelta(ENRICHED_DAYS)]
            source = engine.read_parquet(days.paths(existing), empty) if existing else ""
        order = "" if table == "enriched_usage" else " ORDER BY ALL"
        select = f"SELECT {tables.select_list(columns)} FROM {source}{order}" if source else empty
        db.execute(f"CREATE TABLE w.{table} AS {select}")
        for column in columns:
            db.execute(f'COMMENT ON COLUMN w.{table}."{column.name}" IS {engine.literal(column.description)}')


def _capture_files(manifests: Manifests) -> pa.Table:
    files = [(manifest.capture_date, file) for manifest in manifests.all() for file in manifest.files]
    types = {"VARCHAR": pa.string(), "BIGINT": pa.int64()}
    columns = {c.name: pa.array([getattr(file, c.name) for _, file in files], types[c.type]) for c in tables.CAPTURE_FILES}
    return pa.table({"capture_date": pa.array([date for date, _ in files], pa.date32())} | columns)
