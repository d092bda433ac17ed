"""From capture files to daily tables: the pipeline against a plain pandas loop and a per-event function, in one run."""

import argparse
import datetime as dt
import io
import json
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from decimal import Decimal
from pathlib import Path

FIRST, DAYS, PARTITIONS, TEAMS = dt.date(2026, 10, 1), 31, 4, 20
PRICES = {"input": Decimal("2.50"), "cached_input": Decimal("1.25"), "output": Decimal("10.00")}
PRICE_HEADER = (
    "price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency,"
    "effective_from,effective_to,meter_id,source"
)


def generate(folder: Path, events: int) -> None:
    """Capture files of one block each: four partitions, one file an hour and partition, one event in 200 sent twice."""
    import random

    from aoai_usage_pipeline.capture import avro

    rng = random.Random(1)
    per_file = max(1, events // (DAYS * 24 * PARTITIONS))
    sequence = [0] * PARTITIONS
    for hour in range(DAYS * 24):
        start = dt.datetime.combine(FIRST, dt.time()) + dt.timedelta(hours=hour)
        for partition in range(PARTITIONS):
            records = []
            for number in range(per_file):
                at = start + dt.timedelta(seconds=3599 * number / per_file)
                time_text = f"{at.month}/{at.day}/{at.year} {at.hour % 12 or 12}:{at:%M:%S} {'AM' if at.hour < 12 else 'PM'}"
                prompt, completion = rng.randrange(20, 6000), rng.randrange(1, 900)
                body = json.dumps(
                    {
                        "SubscriptionId": f"team-{rng.randrange(TEAMS)}",
                        "EventTime": time_text,
                        "ServiceName": "apim",
                        "RequestId": str(uuid.UUID(int=rng.getrandbits(128))),
                        "RequestIp": "203.0.113.24",
                        "OperationName": "Creates a completion for the chat message",
                        "Prompt": [{"role": "user", "content": "Hello " * 30}],
                        "Response": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi."}}],
                        "Tokens": {
                            "completion_tokens": completion,
                            "prompt_tokens": prompt,
                            "total_tokens": prompt + completion,
                            "prompt_tokens_details": {"cached_tokens": prompt // 3},
                        },
                    }
                ).encode()
                for _ in range(2 if rng.random() < 0.005 else 1):
                    records.append(
                        {
                            "SequenceNumber": sequence[partition],
                            "Offset": str(sequence[partition] * 688),
                            "EnqueuedTimeUtc": time_text,
                            "SystemProperties": {"x-opt-enqueued-time": int(at.timestamp() * 1000)},
                            "Properties": {},
                            "Body": body,
                        }
                    )
                    sequence[partition] += 1
            file = folder / f"capture/ns/hub/{partition}/{start:%Y/%m/%d/%H}/00/00.avro"
            file.parent.mkdir(parents=True)
            file.write_bytes(avro.write(records))
    reference = folder / "reference"
    reference.mkdir()
    rows = [f"{m},gpt-4o,*,*,*,*,*,{m},{p},1000000,USD,2024-01-01,,," for m, p in PRICES.items()]
    (reference / "price_book.csv").write_text("\n".join([PRICE_HEADER, *rows, ""]))
    (reference / "deployments.csv").write_text(
        "gateway,subscription_id,product,operation,deployment,reported_model,model,model_version,deployment_sku,region,effective_from,effective_to\n"
        "apim,,,,,,gpt-4o,2024-11-20,GlobalStandard,eastus,,\n"
    )
    owners = [f"team-{n},,,Team {n},CC-{n % 7},Dept {n % 3},," for n in range(TEAMS)]
    header = "subscription_id,product,application,team,cost_center,department,effective_from,effective_to"
    (reference / "cost_centers.csv").write_text("\n".join([header, *owners, ""]))


def pipeline(folder: Path, work: Path) -> tuple[int, int, Decimal]:
    import duckdb

    from aoai_usage_pipeline.pipeline import Pipeline

    days = [FIRST + dt.timedelta(n) for n in range(DAYS)]
    made = Pipeline(_settings(folder, work))
    made.ingest(days)
    made.enrich(days)
    made.bill(days)
    usage = str(work / "lake/daily_usage/*/data.parquet")
    return duckdb.sql(f"SELECT sum(requests)::BIGINT, sum(total_tokens)::BIGINT, sum(cost) FROM read_parquet('{usage}')").fetchall()[0]


def dagster(folder: Path, work: Path) -> tuple[int, int, Decimal]:
    last = FIRST + dt.timedelta(DAYS - 1)
    home = work / "dagster"
    home.mkdir()
    settings = _settings(folder, work)
    env = os.environ | {
        "DAGSTER_HOME": str(home), "AOAI_CAPTURE_URL": settings.capture_url, "AOAI_LAKE_URL": settings.lake_url,
        "AOAI_WAREHOUSE_PATH": settings.warehouse_path, "AOAI_REFERENCE_DIR": settings.reference_dir,
    }  # fmt: skip
    command = [
        "dagster",
        "asset",
        "materialize",
        "-m",
        "aoai_usage_pipeline.definitions",
        "--select",
        "raw_events,enriched_usage,daily_usage,daily_billing",
    ]
    command[0] = str(Path(sys.executable).with_name("dagster"))
    subprocess.run([*command, "--partition-range", f"{FIRST}...{last}"], env=env, check=True, capture_output=True)
    return pipeline(folder, work)


def naive(folder: Path, work: Path) -> tuple[int, int, Decimal]:
    import duckdb
    import fastavro
    import pandas as pd

    rows = []
    for file in sorted((folder / "capture").rglob("*.avro")):
        for record in fastavro.reader(io.BytesIO(file.read_bytes())):
            event = json.loads(record["Body"])
            tokens = event["Tokens"]
            rows.append(
                {
                    "request": event["RequestId"],
                    "subscription_id": event["SubscriptionId"],
                    "time": event["EventTime"],
                    "gateway": event["ServiceName"],
                    "operation": event["OperationName"],
                    "enqueued": record["EnqueuedTimeUtc"],
                    "sequence": record["SequenceNumber"],
                    "prompt": tokens["prompt_tokens"],
                    "completion": tokens["completion_tokens"],
                    "total": tokens["total_tokens"],
                    "cached": tokens["prompt_tokens_details"]["cached_tokens"],
                }
            )
    frame = pd.DataFrame(rows)
    for column in ("time", "enqueued"):
        frame[column] = pd.to_datetime(frame[column], format="%m/%d/%Y %I:%M:%S %p")
    frame = frame.sort_values(["enqueued", "sequence"]).drop_duplicates("request")
    frame["usage_date"] = frame["time"].dt.date
    frame = frame.merge(pd.read_csv(folder / "reference/deployments.csv")[["gateway", "model", "model_version", "region"]], on="gateway")
    frame = frame.merge(
        pd.read_csv(folder / "reference/cost_centers.csv")[["subscription_id", "team", "cost_center", "department"]], on="subscription_id"
    )
    keys = ["usage_date", "gateway", "subscription_id", "team", "cost_center", "department", "model", "model_version", "region"]
    daily = frame.groupby(keys, as_index=False).agg(
        requests=("request", "size"), prompt=("prompt", "sum"), completion=("completion", "sum"), total=("total", "sum"), cached=("cached", "sum")
    )
    daily["cost"] = [
        ((p - c) * PRICES["input"] + c * PRICES["cached_input"] + o * PRICES["output"]) / 1_000_000
        for p, c, o in zip(daily["prompt"].map(int), daily["cached"].map(int), daily["completion"].map(int), strict=True)
    ]
    with duckdb.connect(str(work / "daily.duckdb")) as db:
        db.execute("CREATE TABLE daily AS SELECT * FROM daily")
    return int(daily["requests"].sum()), int(daily["total"].sum()), sum(daily["cost"], Decimal(0))


def per_event(folder: Path, work: Path) -> tuple[int, int, Decimal]:
    import csv

    import fastavro

    with open(folder / "reference/cost_centers.csv") as file:
        owners = {row["subscription_id"]: row for row in csv.DictReader(file)}
    store = sqlite3.connect(work / "usage.sqlite", isolation_level=None)
    store.execute("PRAGMA journal_mode = WAL")
    store.execute("PRAGMA synchronous = NORMAL")
    store.execute("CREATE TABLE usage (request TEXT PRIMARY KEY, usage_date TEXT, team TEXT, cost_center TEXT, total INTEGER, cost TEXT)")
    for file in sorted((folder / "capture").rglob("*.avro")):
        for record in fastavro.reader(io.BytesIO(file.read_bytes())):
            event = json.loads(record["Body"])
            tokens, owner = event["Tokens"], owners[event["SubscriptionId"]]
            cached = tokens["prompt_tokens_details"]["cached_tokens"]
            uncached = tokens["prompt_tokens"] - cached
            cost = (uncached * PRICES["input"] + cached * PRICES["cached_input"] + tokens["completion_tokens"] * PRICES["output"]) / 1_000_000
            day = dt.datetime.strptime(event["EventTime"], "%m/%d/%Y %I:%M:%S %p").date()
            store.execute(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (request) DO UPDATE SET cost = excluded.cost",
                (event["RequestId"], day.isoformat(), owner["team"], owner["cost_center"], tokens["total_tokens"], str(cost)),
            )
    found = store.execute("SELECT count(*), sum(total) FROM usage").fetchone()
    return *found, sum((Decimal(cost) for (cost,) in store.execute("SELECT cost FROM usage")), Decimal(0))


WAYS = {"pipeline": pipeline, "naive": naive, "per_event": per_event, "dagster": dagster}


def _settings(folder: Path, work: Path):
    from aoai_usage_pipeline.settings import Settings

    return Settings(
        capture_url=str(folder / "capture"),
        lake_url=str(work / "lake"),
        warehouse_path=str(work / "usage.duckdb"),
        reference_dir=str(folder / "reference"),
    )


def run_one(way: str, folder: Path) -> None:
    """What a child process does: one way, timed from its first import, its result and peak memory as JSON."""
    work = Path(tempfile.mkdtemp(dir=folder))
    started = time.perf_counter()
    requests, tokens, cost = WAYS[way](folder, work)
    seconds = time.perf_counter() - started
    shutil.rmtree(work)
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
    print(json.dumps({"seconds": seconds, "mib": memory, "result": [requests, tokens, f"{Decimal(cost).normalize():f}"]}))


def measure(way: str, folder: Path) -> dict:
    answer = subprocess.run([sys.executable, __file__, "--way", way, "--folder", str(folder)], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def compare(events: int, ways: list[str], rounds: int) -> dict[str, dict]:
    """Each way `rounds` times in turn over the same files; the median seconds and the largest memory of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, events)
        runs: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                runs[way].append(measure(way, folder))
        results = {json.dumps(run["result"]) for found in runs.values() for run in found}
        if len(results) != 1:
            raise SystemExit(f"the ways disagree: {results}")
        return {way: {"seconds": statistics.median(r["seconds"] for r in found), "mib": max(r["mib"] for r in found)} for way, found in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--linear", action="store_true", help="1x, 2x, 4x, 8x of --events through the pipeline")
    parser.add_argument("--dagster", action="store_true", help="the pipeline called directly and through one Dagster range run")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_one(arguments.way, arguments.folder)
        return
    if arguments.linear:
        for factor in (1, 2, 4, 8):
            found = compare(arguments.events * factor, ["pipeline"], 1)["pipeline"]
            print(f"{arguments.events * factor:>10,} events: {found['seconds']:6.1f} s, {found['mib']} MiB")
        return
    ways = ["pipeline", "dagster"] if arguments.dagster else ["pipeline", "naive", "per_event"]
    found = compare(arguments.events, ways, arguments.rounds)
    for way, figures in found.items():
        ratio = figures["seconds"] / found["pipeline"]["seconds"]
        print(f"{way:>10}: {figures['seconds']:6.1f} s, {figures['mib']} MiB, {ratio:.2f} x the pipeline's time")


if __name__ == "__main__":
    main()
