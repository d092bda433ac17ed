"""Builders the tests share: events as gateways send them, capture files as Event Hubs writes them, reference data, and reading results."""

import dataclasses
import datetime as dt
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import duckdb

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import NameFormat
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import DEFAULT_NAME_FORMAT, Settings
from aoai_usage_pipeline.storage import open_store

NAMES = NameFormat(DEFAULT_NAME_FORMAT)
DAY = dt.datetime(2026, 10, 5)
Run = Callable[..., tuple[int, str, str]]
CHAT = "Creates a completion for the chat message"
ASSETS = {
    "raw_events",
    "enriched_usage",
    "daily_usage",
    "daily_billing",
    "usage_warehouse",
    "cosmos_daily_billing",
    "cosmos_usage",
    "cosmos_statements",
}
"""Every asset of an installation without a drain."""


def culture(at: dt.datetime) -> str:
    """A time as .NET writes it in en-US."""
    return f"{at.month}/{at.day}/{at.year} {at.hour % 12 or 12}:{at:%M:%S} {'AM' if at.hour < 12 else 'PM'}"


def seed_event(request_id: str | None, at: dt.datetime | str, tokens: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A seed policy event; `changes` replace or add top-level fields."""
    event = {
        "SubscriptionId": "sales",
        "EventTime": at if isinstance(at, str) else culture(at),
        "ServiceName": "apim",
        "RequestId": request_id,
        "RequestIp": "203.0.113.24",
        "OperationName": CHAT,
        "Prompt": [{"role": "user", "content": "hello"}],
        "Response": None if tokens is None else [{"index": 0, "message": {"role": "assistant", "content": "hi"}}],
        "Tokens": tokens,
    }
    return json.dumps(event | changes).encode()


def chat(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """A chat completion's usage object."""
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage if cached is None else usage | {"prompt_tokens_details": {"cached_tokens": cached}}


def hub_event(request_id: str, at: dt.datetime, prompt: Any, completion: Any, total: Any, **changes: Any) -> bytes:
    """An ai-hub-gateway event."""
    event = {
        "id": request_id, "timestamp": culture(at), "appId": "app-1", "subscriptionId": "hr", "productName": "AI-HR", "targetService": "chat.completion",
        "model": "gpt-4o-2024-11-20", "gatewayName": "hub", "operationName": CHAT, "deploymentName": "chat",
        "promptTokens": prompt, "responseTokens": completion, "totalTokens": total,
    }  # fmt: skip
    return json.dumps(event | changes).encode()


@dataclasses.dataclass(frozen=True)
class Captured:
    """One event as the hub accepted it."""

    body: bytes | None
    enqueued_at: dt.datetime
    sequence_number: int
    partition_id: str = "0"

    def record(self) -> dict[str, Any]:
        return {
            "SequenceNumber": self.sequence_number,
            "Offset": str(self.sequence_number * 688),
            "EnqueuedTimeUtc": culture(self.enqueued_at),
            "SystemProperties": {},
            "Properties": {},
            "Body": self.body,
        }


def blob_name(window_start: dt.datetime, partition_id: str = "0") -> str:
    """The default capture name of namespace `ns` and hub `hub`."""
    return NAMES.name("ns", "hub", partition_id, window_start)


def put(url: str | Path, name: str, content: bytes, connection_string: str | None = None) -> None:
    """Put a blob, replacing the one that may be there."""
    store = open_store(str(url), connection_string, create=True)
    store.write(name, content, replacing=store.etag(name))


def capture_file(events: Iterable[Captured]) -> bytes:
    """The bytes of a capture file with these events."""
    return avro.write([event.record() for event in events])


PRICE_BOOK = """price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency,effective_from,effective_to,meter_id,source
in-1,gpt-4o,*,*,*,*,*,input,2.50,1000000,USD,2024-01-01,,,test
cached-1,gpt-4o,*,*,*,*,*,cached_input,1.25,1000000,USD,2024-01-01,,,test
out-1,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD,2024-01-01,,,test
"""
DEPLOYMENTS = """gateway,subscription_id,product,operation,deployment,reported_model,model,model_version,deployment_sku,region,effective_from,effective_to
apim,,,,,,gpt-4o,2024-11-20,GlobalStandard,eastus,,
"""
COST_CENTERS = """subscription_id,product,application,team,cost_center,department,effective_from,effective_to
sales,,,Sales,CC-1,Commerce,,
hr,,,People,CC-2,Staff,,
"""


def reference(folder: Path, price_book: str = PRICE_BOOK, deployments: str = DEPLOYMENTS, cost_centers: str = COST_CENTERS) -> Path:
    """A reference folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("price_book", price_book), ("deployments", deployments), ("cost_centers", cost_centers)):
        (folder / f"{name}.csv").write_text(text)
    return folder


def installation(root: Path, **settings: Any) -> Pipeline:
    """A pipeline over folders below `root`, with the reference data above unless told otherwise."""
    defaults: dict[str, Any] = {
        "capture_url": str(root / "capture"),
        "lake_url": str(root / "lake"),
        "warehouse_path": str(root / "warehouse.duckdb"),
        "reference_dir": str(root / "reference"),
        "start_date": dt.date(2026, 1, 1),
    }
    if "reference_dir" not in settings and not (root / "reference").exists():
        reference(root / "reference")
    (root / "capture").mkdir(parents=True, exist_ok=True)
    return Pipeline(Settings(**defaults | settings))


def run_all(pipeline: Pipeline, first: dt.date, last: dt.date) -> None:
    """Ingest, enrich, bill and publish every capture and usage date from `first` to `last`."""
    days = [first + dt.timedelta(n) for n in range((last - first).days + 1)]
    pipeline.ingest(days)
    pipeline.enrich(days)
    pipeline.bill(days)
    pipeline.publish()


def rows(pipeline: Pipeline, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a query on the published file."""
    with duckdb.connect(pipeline.settings.warehouse_path, read_only=True) as db:
        return db.execute(sql).fetchall()


def capture(root: Path, window_start: dt.datetime, *bodies: bytes, first: int = 1) -> Path:
    """A capture file with these bodies, numbered from `first`; returns its path."""
    events = [Captured(body, window_start, number) for number, body in enumerate(bodies, first)]
    put(root / "capture", blob_name(window_start), capture_file(events))
    return root / "capture" / blob_name(window_start)


def lines(output: str, *words: str) -> list[list[str]]:
    """The cells of the lines that contain all these words."""
    found = (line for line in output.splitlines() if all(word in line for word in words))
    return [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in found]


def versions(root: Path) -> dict[str, tuple[int, int]]:
    """Every visible file below a folder with what identifies its version."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
