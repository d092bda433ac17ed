"""Documents per second of the Cosmos DB publisher against the bare SDK: the same documents, batches and local server, in one run.

With `--million` instead: a month of a million lines is published, then published again, which must write nothing.
"""

import argparse
import datetime as dt
import itertools
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from azure.cosmos import CosmosClient, PartitionKey

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.publish.cosmos import Cosmos
from aoai_usage_pipeline.publish.documents import DAILY_BILLING, lines
from aoai_usage_pipeline.storage import ObjectStore, open_store
from aoai_usage_pipeline_tests.cosmos_server import KEY, CosmosServer

FIRST, COST_CENTERS, SIZE = dt.date(2026, 10, 1), 20, 100
MONTH, MILLION = 31, 1_000_000


def fill(lake: ObjectStore, numbers: list[int]) -> None:
    """Days of `daily_billing` with these numbers of lines."""
    made = {
        "billing_period": "'2026-10'", "subscription_id": "'team-' || n % 200", "team": f"'Team ' || n % {COST_CENTERS}",
        "cost_center": f"'CC-' || n % {COST_CENTERS}", "department": "'Research'", "deployment": "'chat-' || n % 30", "model": "'gpt-4o'",
        "model_version": "'2024-11-20'", "deployment_sku": "'GlobalStandard'", "region": "'eastus'", "service_tier": "'default'", "meter": "'input'",
        "quantity": "1000 + n", "unit_price": "2.5", "unit_tokens": "1000000", "price_id": "'gpt-4o-input'", "cost": "n * 0.0000025::DECIMAL(38,15)",
        "list_cost": "n * 0.0000025::DECIMAL(38,15)", "contracted_cost": "n * 0.0000025::DECIMAL(38,15)", "currency": "'USD'",
        "pricing_status": "'priced'", "usage_source": "'reported'",
    }  # fmt: skip
    for n, number in enumerate(numbers):
        day = FIRST + dt.timedelta(n)
        values = made | {"usage_date": f"'{day}'", "line_id": f"left(sha256('{day}' || n), 24)"}
        select = ", ".join(f'CAST({values.get(c.name, "NULL")} AS {c.type}) AS "{c.name}"' for c in tables.DAILY_BILLING)
        with engine.connect(lake.staging()) as db:
            db.execute("SET enable_progress_bar = false")
            staged = engine.stage(db, lake.staging(), f"SELECT {select} FROM range({number}) AS r(n)")
        Days(lake, "daily_billing").replace(day, staged, replacing=None)


def publisher(endpoint: str, database: str, lake: ObjectStore, days: list[dt.date]) -> tuple[int, float, float]:
    """Documents written, seconds and CPU seconds of this process."""
    cosmos = Cosmos(endpoint, database, KEY)
    start, cpu = time.perf_counter(), time.process_time()
    written = sum(published.written for _, published in cosmos.publish(DAILY_BILLING, lake, days))
    return written, time.perf_counter() - start, time.process_time() - cpu


def batches(lake: ObjectStore, days: list[dt.date]) -> Iterator[tuple[Any, list[Any]]]:
    with engine.connect(lake.staging()) as db:
        for day in days:
            for key, documents in lines(DAILY_BILLING, lake, day, db):
                operations = (("create", (document,)) for document in documents)
                while batch := list(itertools.islice(operations, SIZE)):
                    yield list(key), batch


def bare(endpoint: str, database: str, lake: ObjectStore, days: list[dt.date], *, ready: bool = False) -> tuple[int, float, float]:
    """A loop over `execute_item_batch` that sends the documents as they are made from the lake; or, with `ready`, made before."""
    made: Iterable[tuple[Any, list[Any]]] = list(batches(lake, days)) if ready else batches(lake, days)
    client = CosmosClient(endpoint, KEY)
    container = client.create_database_if_not_exists(database).create_container_if_not_exists(
        "daily-billing", PartitionKey(["/costCenter", "/billingPeriod"])
    )
    written, start, cpu = 0, time.perf_counter(), time.process_time()
    for key, batch in made:
        container.execute_item_batch(batch, key)
        written += len(batch)
    return written, time.perf_counter() - start, time.process_time() - cpu


def bare_ready(endpoint: str, database: str, lake: ObjectStore, days: list[dt.date]) -> tuple[int, float, float]:
    return bare(endpoint, database, lake, days, ready=True)


def serve(pipe: Connection) -> None:
    """The server in a process of its own: says its endpoint, and whenever asked how many requests came and how many documents were changed."""
    with CosmosServer() as server:
        pipe.send(server.endpoint)
        while pipe.recv():
            pipe.send((server.requests, server.written))


def publish_month(pipe: Connection, endpoint: str, url: str) -> None:
    """Publish the month in a process of its own, so that the memory is that of publishing and nothing else."""
    days = [FIRST + dt.timedelta(n) for n in range(MONTH)]
    lake, start = open_store(url, create=False), time.perf_counter()
    done = [published for _, published in Cosmos(endpoint, "million", KEY).publish(DAILY_BILLING, lake, days)]
    counts = tuple(sum(getattr(one, name) for one in done) for name in ("written", "unchanged", "deleted"))
    pipe.send((*counts, time.perf_counter() - start, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def million() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        lake = open_store(str(Path(folder) / "lake"), create=True)
        fill(lake, [MILLION * (n + 1) // MONTH - MILLION * n // MONTH for n in range(MONTH)])
        asked, pipe = spawn.Pipe()
        server = spawn.Process(target=serve, args=(pipe,))
        server.start()
        endpoint = asked.recv()
        seen = 0, 0
        for expected in ((MILLION, 0, 0), (0, MILLION, 0)):
            result, pipe = spawn.Pipe()
            client = spawn.Process(target=publish_month, args=(pipe, endpoint, lake.url))
            client.start()
            written, unchanged, deleted, seconds, cpu, mebibytes = result.recv()
            client.join()
            asked.send(True)
            now = asked.recv()
            requests, changed = (after - before for after, before in zip(now, seen, strict=True))
            seen = now
            print(
                f"{written:,} written, {unchanged:,} unchanged, {deleted:,} deleted; the server changed {changed:,} in {requests:,} requests",
                flush=True,
            )
            print(f"    {seconds:.0f} s, {cpu:.0f} s of CPU and {mebibytes:,.0f} MiB of the client", flush=True)
            assert (written, unchanged, deleted) == expected and changed == written
        asked.send(False)
        server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--lines", type=int, default=2000, help="lines a day")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="publish a month of a million lines twice instead; takes 5 GiB for the server")
    given = parser.parse_args()
    if given.million:
        return million()
    days = [FIRST + dt.timedelta(n) for n in range(given.days)]
    command = [sys.executable, "-m", "aoai_usage_pipeline_tests.cosmos_server"]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        endpoint = server.stdout.readline().split()[0].split("=", 1)[1]
        try:
            lake = open_store(str(Path(folder) / "lake"), create=True)
            fill(lake, [given.lines] * given.days)
            ratios: dict[str, list[tuple[float, float]]] = {"bare": [], "bare_ready": []}
            for n in range(given.rounds):
                rates = {}
                for way in (publisher, bare, bare_ready)[:: -1 if n % 2 else 1]:
                    written, seconds, cpu = way(endpoint, f"bench-{uuid.uuid4().hex}", lake, days)
                    assert written == given.days * given.lines
                    rates[way.__name__] = written / seconds, written / cpu
                    print(f"{way.__name__:10}  {written:,} documents, {written / seconds:,.0f}/s, {written / cpu:,.0f} per second of CPU")
                for other, found in ratios.items():
                    found.append((rates["publisher"][0] / rates[other][0], rates["publisher"][1] / rates[other][1]))
            for other, found in ratios.items():
                by_time, by_cpu = (statistics.median(values) for values in zip(*found, strict=True))
                print(f"publisher / {other}: {by_time:.2f} by time, {by_cpu:.2f} by CPU of the client")
            database = f"bench-{uuid.uuid4().hex}"
            publisher(endpoint, database, lake, days)
            start = time.perf_counter()
            cosmos = Cosmos(endpoint, database, KEY)
            again = [published for _, published in cosmos.publish(DAILY_BILLING, lake, days)]
            seconds, unchanged = time.perf_counter() - start, sum(one.unchanged for one in again)
            assert sum(one.written + one.deleted for one in again) == 0
            print(f"unchanged  {unchanged:,} documents, {unchanged / seconds:,.0f}/s, nothing written")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
