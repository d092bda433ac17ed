"""Realistic capture files without a hub: a small company's traffic, with the faults real traffic has. The same arguments give the same bytes."""

import datetime as dt
import itertools
import json
import random
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import NameFormat
from aoai_usage_pipeline.capture.times import culture
from aoai_usage_pipeline.storage import Changed, ObjectStore

NAMESPACE, HUB, PARTITIONS = "contoso-ehns", "aoai-usage", ("0", "1", "2", "3")
_WINDOW = dt.timedelta(minutes=15)
_CHAT, _EMBEDDINGS = "Creates a completion for the chat message", "Get a vector representation of a given input"
_SEED_CALLERS = (
    ("sales-assistant", 22), ("hr-copilot", 8), ("support-chat", 30), ("legal-research", 10), ("intern-hackathon", 2),
)  # fmt: skip
_HUB_CALLERS = (("data-science", 14), ("dev-portal", 14))
_HUB_DEPLOYMENTS = (
    ("chat", "gpt-4o-2024-11-20", 30), ("mini", "gpt-5-mini-2025-08-07", 30), ("embed", "text-embedding-3-small", 15),
    ("reasoning", "o3-mini-2025-01-31", 10), ("frontier", "gpt-5.6-sol-2026-07-09", 14), ("preview", "o1-preview-2024-09-12", 1),
)  # fmt: skip
_EMBEDDERS = {"sales-assistant", "support-chat", "legal-research"}


def traffic(
    first: dt.date, last: dt.date, *, requests_per_day: int, seed: int, progress: Callable[[int, int, str], None]
) -> list[tuple[dt.datetime, str, bytes]]:
    """The events of requests of the days `first` to `last` as (enqueued at, partition, body), in the order in which they are enqueued."""
    days = (last - first).days + 1
    events: list[tuple[dt.datetime, str, bytes]] = []
    for number in range(days):
        day = first + dt.timedelta(number)
        events += _day(day, requests_per_day, random.Random(f"{seed} {day}"))  # noqa: S311 - not for secrets
        if day.day % 10 == 1:
            progress(number + 1, days * 2, f"simulated {day}")
    return sorted(events, key=lambda event: event[:2])


def _windows(events: list[tuple[dt.datetime, str, bytes]], first: dt.date) -> dict[tuple[str, dt.datetime], list[dict[str, Any]]]:
    """The events numbered by their partitions, as records of the windows that Capture would write."""
    windows: dict[tuple[str, dt.datetime], list[dict[str, Any]]] = {}
    numbers = {partition: itertools.count() for partition in PARTITIONS}
    start = dt.datetime.combine(first, dt.time())
    for enqueued_at, partition, body in events:
        number = next(numbers[partition])
        # each partition has its own window phase, as in real hubs
        phase = dt.timedelta(minutes=3 * int(partition), seconds=12)
        window = start + phase + ((enqueued_at - start - phase) // _WINDOW) * _WINDOW
        windows.setdefault((partition, window), []).append(
            {
                "SequenceNumber": number,
                "Offset": str(number * 688 + 336),
                "EnqueuedTimeUtc": culture(enqueued_at),
                "SystemProperties": {"x-opt-enqueued-time": int(enqueued_at.replace(tzinfo=dt.UTC).timestamp() * 1000)},
                "Properties": {},
                "Body": body,
            }
        )
    return windows


def simulate(
    store: ObjectStore,
    names: NameFormat,
    first: dt.date,
    last: dt.date,
    *,
    requests_per_day: int,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> tuple[int, int]:
    """Write capture files for requests of the days `first` to `last`; returns (files, files written now). Files that are there already stay."""
    days = (last - first).days + 1
    windows = _windows(traffic(first, last, requests_per_day=requests_per_day, seed=seed, progress=progress), first)
    written = 0
    for number, ((partition, window), records) in enumerate(sorted(windows.items(), key=lambda item: item[0][1])):
        name = names.name(NAMESPACE, HUB, partition, window)
        content = avro.write(records, sync_marker=uuid.uuid5(uuid.NAMESPACE_URL, name).bytes)
        if number == len(windows) // 2:
            content = content[: len(content) * 2 // 3]  # one file that was torn on its way
        try:
            store.write(name, content, replacing=None)
            written += 1
        except Changed:
            pass
        if number % 1000 == 0:
            progress(days + days * number // len(windows), days * 2, f"wrote {name}")
    progress(days * 2, days * 2, "capture files written")
    return len(windows), written


def _day(day: dt.date, requests: int, rng: random.Random) -> Iterator[tuple[dt.datetime, str, bytes]]:
    """A day's events as (enqueued at, partition, body), in no order; about one in a hundred has something wrong with it."""
    quiet = 0.35 if day.weekday() >= 5 else 1.0
    for _ in range(int(requests * quiet * rng.uniform(0.9, 1.1))):
        # office hours make a hump around 13:00
        second = min(86_399, max(0, int(rng.gauss(46_800, 14_400)))) if rng.random() < 0.85 else rng.randrange(86_400)
        at = dt.datetime.combine(day, dt.time()) + dt.timedelta(seconds=second)
        partition = rng.choice(PARTITIONS)
        body = _seed_event(at, rng) if rng.random() < 0.72 else _hub_event(at, rng)
        enqueued_at = at + dt.timedelta(seconds=rng.randrange(4))
        fault = rng.random()
        if fault < 0.003:
            enqueued_at += dt.timedelta(hours=rng.choice((1, 7, 30)))
        elif fault < 0.006:
            yield enqueued_at + dt.timedelta(minutes=rng.choice((1, 45, 200))), rng.choice(PARTITIONS), body
        elif fault < 0.007:
            body = b'{"level": "info", "message": "health probe"}'
        elif fault < 0.0075:
            body = body[: len(body) // 2]
        yield enqueued_at, partition, body


def _weighted(rng: random.Random, choices: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    return rng.choices(choices, [choice[-1] for choice in choices])[0]


def _tokens(rng: random.Random) -> tuple[int, int, int]:
    """Prompt, cached and completion tokens of a chat; caching starts at 1,024 tokens in steps of 128."""
    prompt = int(rng.lognormvariate(6.6, 1.0)) + 8
    cached = (prompt // 128) * 128 if prompt >= 1024 and rng.random() < 0.4 else 0
    return prompt, cached, int(rng.lognormvariate(4.8, 0.9)) + 1


def _seed_event(at: dt.datetime, rng: random.Random) -> bytes:
    caller = _weighted(rng, _SEED_CALLERS)[0]
    embedding = caller in _EMBEDDERS and rng.random() < 0.15
    prompt, cached, completion = _tokens(rng)
    tokens: dict[str, Any] | None
    if embedding:
        tokens = {"prompt_tokens": prompt, "total_tokens": prompt}
    else:
        details = {"cached_tokens": cached, "audio_tokens": None}
        tokens = {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": prompt + completion, "prompt_tokens_details": details}
    failed = rng.random() < 0.01
    event = {
        "SubscriptionId": caller,
        "EventTime": culture(at),
        "ServiceName": "apim-contoso-weu",
        "RequestId": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "RequestIp": f"203.0.113.{rng.randrange(1, 255)}",
        "OperationName": _EMBEDDINGS if embedding else _CHAT,
        "Prompt": None if embedding else [{"role": "user", "content": "(simulated)"}],
        "Response": None
        if failed or embedding
        else [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "(simulated)"}}],
        "Tokens": None if failed else tokens,
    }
    return json.dumps(event, indent=2).encode()


def _hub_event(at: dt.datetime, rng: random.Random) -> bytes:
    deployment, model, _ = _weighted(rng, _HUB_DEPLOYMENTS)
    prompt, cached, completion = _tokens(rng)
    if deployment == "embed":
        cached = completion = 0
    as_text = rng.random() < 0.2
    counts: dict[str, Any] = {"promptTokens": prompt, "responseTokens": completion, "totalTokens": prompt + completion}
    event = {
        "id": f"chatcmpl-{rng.getrandbits(96):024x}",
        "timestamp": culture(at),
        "appId": "NA",
        "subscriptionId": _weighted(rng, _HUB_CALLERS)[0],
        "productName": "AI-Platform",
        "targetService": "list" if deployment == "embed" else "chat.completion",
        "model": model,
        "gatewayName": "apim-contoso-eus.azure-api.net",
        "gatewayRegion": "East US",
        "RequestIp": f"203.0.113.{rng.randrange(1, 255)}",
        "operationName": _EMBEDDINGS if deployment == "embed" else _CHAT,
        "backendId": "openai-backend-0",
        "routeLocation": "eastus",
        "deploymentName": deployment,
        **({key: str(value) for key, value in counts.items()} if as_text else counts),
        "cachedTokens": cached,
    }
    return json.dumps(event).encode()
