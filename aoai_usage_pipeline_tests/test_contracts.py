"""From event bodies to raw events: what is recognised, counted, dated, quarantined, and never written."""

import datetime as dt
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import CHAT, Captured, chat, hub_event, rows, seed_event

HOUR, DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
NOON = support.DAY + 12 * HOUR
START = dt.date(2026, 1, 1)
BLOB = support.blob_name(NOON)
Event = bytes | None | tuple[bytes | None, dt.datetime]


def captured(root: Path, events: list[Event], **settings: Any) -> Pipeline:
    """An installation with one capture file of these events, each enqueued at noon unless it says when."""
    pairs = [event if isinstance(event, tuple) else (event, NOON) for event in events]
    content = support.capture_file(Captured(body, at, number) for number, (body, at) in enumerate(pairs))
    pipeline = support.installation(root, start_date=START, **settings)
    support.put(root / "capture", BLOB, content)
    return pipeline


def ingest(root: Path, *events: Event, **settings: Any) -> list[dict[str, Any]]:
    """The raw events, in the order of the events; every event gives exactly one."""
    pipeline = captured(root, list(events), **settings)
    pipeline.ingest([NOON.date()])
    paths = pipeline.lake.local_paths(segment.name for manifest in pipeline.manifests.all() for segment in manifest.segments)
    columns = tables.names(tables.RAW_EVENTS)
    quoted = ", ".join(f'"{column}"' for column in columns)
    source = engine.read_parquet(paths, tables.empty_select(tables.RAW_EVENTS))
    found = duckdb.execute(f"SELECT {quoted} FROM {source} ORDER BY sequence_number").fetchall()
    assert len(found) == len(events)
    return [dict(zip(columns, row, strict=True)) for row in found]


def bill(root: Path, *events: Event) -> Pipeline:
    """The same events, all the way to the published file."""
    pipeline = captured(root, list(events))
    support.run_all(pipeline, NOON.date() - DAY, NOON.date() + DAY)
    return pipeline


def pick(row: dict[str, Any], *columns: str) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)


def with_fields(body: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(body) | changes).encode()


def without(body: bytes, *fields: str) -> bytes:
    return json.dumps({key: value for key, value in json.loads(body).items() if key not in fields}).encode()


COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


# --- the seed policy's event


def test_a_seed_event_gives_who_when_and_how_much(tmp_path):
    usage = chat(100, 40, cached=30) | {
        "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 25, "audio_tokens": 7, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    [row] = ingest(tmp_path, seed_event("6f0c2f3e", NOON, usage))
    expected = {
        "blob": BLOB, "namespace": "ns", "event_hub": "hub", "partition_id": "0", "sequence_number": 0, "offset": "0", "enqueued_at": NOON,
        "contract": "seed_policy", "reason": None, "usage_date": NOON.date(), "event_time": NOON, "time_source": "event", "request_id": "6f0c2f3e",
        "gateway": "apim", "subscription_id": "sales", "product": None, "application": None, "operation": CHAT, "deployment": None,
        "reported_model": None, "service_tier": None, "prompt_tokens": 100, "cached_tokens": 30, "cache_write_tokens": None,
        "completion_tokens": 40, "reasoning_tokens": 25, "total_tokens": 140, "audio_prompt_tokens": 5, "audio_completion_tokens": 7,
    }  # fmt: skip
    assert {column: row[column] for column in expected} == expected
    assert row["bytes"] == len(seed_event("6f0c2f3e", NOON, usage))


def test_indented_json_as_the_gateway_writes_it_is_the_same_event(tmp_path):
    body = seed_event("r1", NOON, chat(10, 5))
    one_line, indented = ingest(tmp_path, body, json.dumps(json.loads(body), indent=2).replace("\n", "\r\n").encode())
    assert pick(indented, "request_id", *COUNTS) == pick(one_line, "request_id", *COUNTS) == ("r1", 10, 5, 15)


def test_an_event_without_an_id_is_identified_by_its_hub_coordinates(tmp_path):
    found = ingest(tmp_path, *(seed_event(missing, NOON, chat(1, 1)) for missing in (None, "", "  ")), hub_event("NA", NOON, 1, 1, 2))
    assert [row["request_id"] for row in found] == ["ns/hub/0/0", "ns/hub/0/1", "ns/hub/0/2", "ns/hub/0/3"]
    assert [row["reason"] for row in found] == [None] * 4


def test_embeddings_have_no_completion_tokens(tmp_path):
    [row] = ingest(tmp_path, seed_event("e1", NOON, {"prompt_tokens": 12, "total_tokens": 12}, Response=None))
    assert pick(row, "reason", *COUNTS) == (None, 12, 0, 12)


def test_absent_details_are_unknown_and_not_zero(tmp_path):
    details = {"prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": None}}
    found = ingest(tmp_path, seed_event("a", NOON, chat(10, 5)), seed_event("b", NOON, chat(10, 5) | details))
    assert [pick(row, "reason", "cached_tokens", "reasoning_tokens") for row in found] == [(None, None, None)] * 2


@pytest.mark.parametrize("tokens", [None, {}, {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}])
def test_a_call_without_usage_is_accepted_with_unknown_tokens_and_no_cost(tmp_path, tokens):
    pipeline = bill(tmp_path, seed_event("failed", NOON, None, Tokens=tokens), seed_event("good", NOON, chat(10, 5)))
    select = "SELECT request_id, prompt_tokens, completion_tokens, total_tokens, cost, pricing_status, usage_source FROM enriched_usage ORDER BY 1"
    assert rows(pipeline, select) == [
        ("failed", None, None, None, None, "no_usage", None),
        ("good", 10, 5, 15, Decimal("0.000075"), "priced", "reported"),
    ]
    assert rows(pipeline, "SELECT requests, total_tokens, cost, pricing_status FROM daily_usage ORDER BY pricing_status") == [
        (1, 0, None, "no_usage"),
        (1, 15, Decimal("0.000075"), "priced"),
    ]
    assert rows(pipeline, "SELECT sum(quantity), count(*) FILTER (pricing_status = 'no_usage') FROM daily_billing") == [(15, 0)]
    assert rows(pipeline, "SELECT parsed, accepted, no_usage, coverage FROM daily_quality") == [(2, 2, 1, Decimal("0.5"))]


def test_text_is_kept_as_it_is(tmp_path):
    odd = 'o\'brien "é" \\ {x} %s\n日本'
    [row] = ingest(tmp_path, seed_event(odd, NOON, chat(1, 1), SubscriptionId=odd, OperationName=odd, ServiceName=odd))
    assert pick(row, "reason", "request_id", "subscription_id", "operation", "gateway") == (None, odd, odd, odd, odd)


def test_unknown_extra_fields_change_nothing(tmp_path):
    extra = {"Zebra": {"Tokens": {"prompt_tokens": 9}}, "StatusCode": 200, "EventProcessedUtcTime": "2024-05-27T14:46:04.4009773Z"}
    usage = chat(10, 5) | {"new_tokens": 3, "prompt_tokens_details": {"text_tokens": 10}}
    found = ingest(
        tmp_path,
        with_fields(seed_event("s", NOON, usage), **extra),
        with_fields(hub_event("h", NOON, 10, 5, 15), **extra, cachedTokens=4, audioTokens=0),
    )
    assert [pick(row, "reason", "contract", "request_id", *COUNTS) for row in found] == [
        (None, "seed_policy", "s", 10, 5, 15),
        (None, "ai_hub_gateway", "h", 10, 5, 15),
    ]
    assert found[1]["cached_tokens"] == 4


# --- the AI hub gateway's event


def test_a_hub_event_gives_who_when_what_and_how_much(tmp_path):
    [row] = ingest(tmp_path, hub_event("chatcmpl-1", NOON, 150, 50, 200, cachedTokens=128))
    expected = {
        "contract": "ai_hub_gateway", "reason": None, "request_id": "chatcmpl-1", "event_time": NOON, "time_source": "event", "gateway": "hub",
        "subscription_id": "hr", "product": "AI-HR", "application": "app-1", "operation": CHAT, "deployment": "chat",
        "reported_model": "gpt-4o-2024-11-20", "prompt_tokens": 150, "cached_tokens": 128, "completion_tokens": 50, "total_tokens": 200,
        "reasoning_tokens": None,
    }  # fmt: skip
    assert {column: row[column] for column in expected} == expected


def test_hub_counts_may_be_numbers_or_text(tmp_path):
    found = ingest(tmp_path, hub_event("a", NOON, 15000, 500, 15500), hub_event("b", NOON, "15000", "500", "15500", cachedTokens="0"))
    assert [pick(row, "reason", *COUNTS) for row in found] == [(None, 15000, 500, 15500)] * 2


def test_na_is_unknown(tmp_path):
    unknown = {"appId": "NA-HEADER", "productName": "NA", "model": "NA", "gatewayName": "NA", "operationName": "NA", "deploymentName": "NA"}
    [row] = ingest(tmp_path, hub_event("a", NOON, 5, 5, 10, subscriptionId="Portal-Admin", **unknown))
    assert pick(row, "subscription_id", "application", "product", "reported_model", "gateway", "operation", "deployment") == (
        "Portal-Admin",
        *[None] * 6,
    )


@pytest.mark.parametrize("one_zero_one", [(1, 0, 1), ("1", "0", "1")], ids=["numbers", "text"])
def test_one_zero_one_stands_for_missing_usage_except_for_embeddings(tmp_path, one_zero_one):
    services = ["chat.completion", "NA", "AI-Search", "AI-Document-Intelligence"]
    events = [hub_event(f"a {service}", NOON, *one_zero_one, targetService=service) for service in services]
    absent = without(hub_event("absent", NOON, *one_zero_one), "targetService")
    pipeline = bill(tmp_path, *events, absent, hub_event("list", NOON, *one_zero_one, targetService="list"), hub_event("real", NOON, 1, 1, 2))
    assert rows(pipeline, "SELECT request_id, prompt_tokens, completion_tokens, total_tokens, cost FROM enriched_usage ORDER BY request_id") == [
        *((name, None, None, None, None) for name in sorted([f"a {service}" for service in services] + ["absent"])),
        ("list", 1, 0, 1, Decimal("0.0000025")),
        ("real", 1, 1, 2, Decimal("0.0000125")),
    ]


# --- times


def forms(at: dt.datetime) -> dict[str, str]:
    """A time in every form a gateway may write it."""
    clock, half = f"{at.hour % 12 or 12}:{at:%M:%S}", "AM" if at.hour < 12 else "PM"
    east, west = at + 5 * HOUR + HOUR / 2, at - 5 * HOUR
    return {
        "en-US": f"{at.month}/{at.day}/{at.year} {clock} {half}",
        "en-US with a narrow space": f"{at.month}/{at.day}/{at.year} {clock}\u202f{half}",
        "invariant": f"{at:%m/%d/%Y %H:%M:%S}",
        "en-GB": f"{at:%d/%m/%Y %H:%M:%S}",
        "de-DE": f"{at:%d.%m.%Y %H:%M:%S}",
        "ISO": f"{at:%Y-%m-%dT%H:%M:%S}Z",
        "ISO without zone": f"{at:%Y-%m-%dT%H:%M:%S}",
        "ISO with 7 digits": f"{at:%Y-%m-%dT%H:%M:%S}.0000009Z",
        "ISO east": f"{east:%Y-%m-%dT%H:%M:%S}.0000000+05:30",
        "ISO west": f"{west:%Y-%m-%dT%H:%M:%S}-05:00",
    }


UNAMBIGUOUS = dt.datetime(2026, 9, 23, 17, 4, 9)
AMBIGUOUS = dt.datetime(2026, 10, 5, 0, 4, 9)


@pytest.mark.parametrize("at", [UNAMBIGUOUS, AMBIGUOUS, dt.datetime(2026, 10, 5, 12, 0, 0), dt.datetime(2026, 10, 10, 23, 59, 58)], ids=str)
def test_every_form_of_a_time_is_read_when_the_event_is_on_time(tmp_path, at):
    check_forms(tmp_path, at, 2 * dt.timedelta(seconds=1), set(forms(at)))


@pytest.mark.parametrize("late", [30 * HOUR, 40 * DAY], ids=str)
def test_every_form_of_a_time_is_read_however_late_the_event_is(tmp_path, late):
    check_forms(tmp_path / "a", UNAMBIGUOUS, late, set(forms(UNAMBIGUOUS)))
    check_forms(tmp_path / "b", AMBIGUOUS, late, set(forms(AMBIGUOUS)) - {"en-GB"})


def test_a_24_hour_time_that_would_be_months_late_month_first_is_read_day_first(tmp_path):
    at = dt.datetime(2026, 10, 5, 5, 4, 9)
    [row] = ingest(tmp_path, (seed_event("r", f"{at:%d/%m/%Y %H:%M:%S}", chat(1, 1)), at + 40 * DAY))
    assert pick(row, "event_time", "time_source") == (at, "event")


def test_a_day_first_time_whose_day_could_be_a_month_is_read_when_the_event_is_30_hours_late(tmp_path):
    check_forms(tmp_path, AMBIGUOUS, 30 * HOUR, {"en-GB"})


def check_forms(tmp_path: Path, at: dt.datetime, late: dt.timedelta, names: set[str]) -> None:
    written = {name: text for name, text in forms(at).items() if name in names}
    found = ingest(tmp_path, *((seed_event(name, text, chat(1, 1)), at + late) for name, text in written.items()))
    resolved = {row["request_id"]: pick(row, "reason", "event_time", "usage_date", "time_source", "enqueued_at") for row in found}
    assert resolved == dict.fromkeys(written, (None, at, at.date(), "event", at + late))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "10/5/2026",
        "13/13/2026 10:00:00",
        "10/5/2026 25:00:00",
        "1759665600",
        "1/1/0001 12:00:00 AM",
        "12/31/2025 11:59:59 PM",
        "2025-12-31T23:59:59Z",
        "2026-10-06T12:00:01Z",
        "10/20/2026 1:00:00 PM",
        "9999-12-31T23:59:59Z",
    ],
)
def test_an_impossible_event_time_gives_way_to_the_enqueued_time(tmp_path, text):
    [seed, hub] = ingest(tmp_path, seed_event("s", text, chat(1, 1)), hub_event("h", NOON, 1, 1, 2, timestamp=text))
    assert pick(seed, "reason", "event_time", "usage_date", "time_source") == (None, NOON, NOON.date(), "enqueued")
    assert pick(hub, "reason", "event_time", "usage_date", "time_source") == (None, NOON, NOON.date(), "enqueued")


@pytest.mark.parametrize(("event", "field"), [(seed_event, "EventTime"), (hub_event, "timestamp")], ids=["seed", "hub"])
def test_a_missing_event_time_gives_way_to_the_enqueued_time(tmp_path, event, field):
    body = seed_event("r", NOON, chat(1, 1)) if event is seed_event else hub_event("r", NOON, 1, 1, 2)
    found = ingest(tmp_path, without(body, field), with_fields(body, **{field: None}))
    assert [pick(row, "reason", "event_time", "time_source") for row in found] == [(None, NOON, "enqueued")] * 2


def test_the_bounds_of_a_possible_event_time_belong_to_it(tmp_path):
    first = dt.datetime.combine(START, dt.time())
    found = ingest(tmp_path, seed_event("first", first, chat(1, 1)), seed_event("day after", "2026-10-06T12:00:00Z", chat(1, 1)))
    assert [pick(row, "time_source", "event_time") for row in found] == [("event", first), ("event", NOON + DAY)]


def test_an_event_time_inside_counts_although_the_hub_took_the_event_before_the_start(tmp_path):
    [row] = ingest(tmp_path, (seed_event("new year", "2026-01-01T00:00:05Z", chat(1, 1)), dt.datetime(2025, 12, 31, 23, 59, 59)))
    assert pick(row, "reason", "usage_date", "time_source") == (None, START, "event")


def test_an_event_whose_times_are_all_outside_is_quarantined(tmp_path):
    before, after = dt.datetime(2025, 12, 31, 23, 59, 59), dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0) + 3 * DAY
    events = [(seed_event(f"{text} {at:%Y}", text, chat(1, 1)), at) for at in (before, after) for text in ("garbage", "2025-06-01T00:00:00Z")]
    found = ingest(tmp_path, *events, (seed_event("future", f"{after:%Y-%m-%dT%H:%M:%S}Z", chat(1, 1)), after))
    assert [row["reason"].partition(":")[0] for row in found] == ["out_of_range"] * 5
    assert [row["usage_date"] for row in found] == [None] * 5


def test_tomorrow_is_not_out_of_range(tmp_path):
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0)
    [row] = ingest(tmp_path, (seed_event("fast clock", f"{now + 20 * HOUR:%Y-%m-%dT%H:%M:%S}Z", chat(1, 1)), now))
    assert pick(row, "reason", "event_time") == (None, now + 20 * HOUR)


# --- events that the gateway cut off


def long_event(request_id: str, filling: str, **changes: Any) -> bytes:
    """A seed event of far more than 200 KB, written as the gateway does, without escapes."""
    event = json.loads(seed_event(request_id, NOON - HOUR, chat(10, 5)))
    return json.dumps(event | {"Prompt": [{"role": "user", "content": filling * 260_000}]} | changes, ensure_ascii=False).encode()


@pytest.mark.parametrize("size", [200_000, 200 * 1024])
@pytest.mark.parametrize("filling", ["x", "é", "€", "😀"])
def test_a_cut_event_is_accepted_with_unknown_tokens_wherever_the_cut_is(tmp_path, size, filling):
    found = ingest(tmp_path, *(long_event(f"r{n}", filling)[: size + n] for n in range(4)))
    columns = ("reason", "contract", "subscription_id", "gateway", "operation", "event_time", *COUNTS)
    assert [pick(row, *columns) for row in found] == [(None, "seed_policy", "sales", "apim", CHAT, NOON - HOUR, None, None, None)] * 4
    assert [row["request_id"] for row in found] == ["r0", "r1", "r2", "r3"]


def test_a_cut_event_is_a_request_without_usage_on_the_bill(tmp_path):
    pipeline = bill(tmp_path, long_event("cut", "x")[:200_000], seed_event("good", NOON, chat(10, 5)))
    assert rows(pipeline, "SELECT request_id, pricing_status, cost, cost_center FROM enriched_usage ORDER BY 1") == [
        ("cut", "no_usage", None, "CC-1"),
        ("good", "priced", Decimal("0.000075"), "CC-1"),
    ]


def test_a_cut_event_keeps_a_time_with_a_narrow_space(tmp_path):
    [row] = ingest(tmp_path, long_event("r", "x", EventTime="10/5/2026 11:00:00\u202fAM")[:200_000])
    assert pick(row, "event_time", "time_source") == (NOON - HOUR, "event")


def test_a_large_whole_event_is_read_in_full(tmp_path):
    [row] = ingest(tmp_path, long_event("whole", "é"))
    assert pick(row, "reason", "request_id", *COUNTS) == (None, "whole", 10, 5, 15)


def test_a_cut_event_that_lost_its_identity_is_quarantined(tmp_path):
    event = json.loads(seed_event("r", NOON, chat(1, 1)))
    prompt_first = {"SubscriptionId": event.pop("SubscriptionId"), "Prompt": "x" * 260_000} | {k: v for k, v in event.items() if k != "Prompt"}
    [row] = ingest(tmp_path, json.dumps(prompt_first).encode()[:200_000])
    assert row["reason"].startswith("truncated")


# --- what cannot be billed


QUARANTINED = {
    "small broken JSON": (seed_event("r", NOON, chat(1, 1))[:-20], "invalid_json"),
    "another encoding": ('{"SubscriptionId": "é"}'.encode("latin-1"), "not_utf8"),
    "long and not UTF-8 in the middle": (long_event("r", "x")[:100_000] + b"\xff" + long_event("r", "x")[100_000:], "not_utf8"),
    "null body": (None, "null_body"),
    "empty body": (b"", "empty_body"),
    "a number": (b"5", "unknown_contract"),
    "an unknown contract": (b'{"message": "probe", "level": "info"}', "unknown_contract: top-level fields level, message"),
    "an unknown contract of 12 bytes": (b'{"a":"bcde"}', "unknown_contract: top-level fields a"),
    "a negative count": (seed_event("r", NOON, {"prompt_tokens": -5, "completion_tokens": 1, "total_tokens": -4}), "invalid_count: prompt_tokens"),
    "a fraction": (seed_event("r", NOON, {"prompt_tokens": 5, "completion_tokens": 1.5, "total_tokens": 6}), "invalid_count: completion_tokens"),
    "a huge count": (seed_event("r", NOON, {"prompt_tokens": 10**13, "completion_tokens": 1}), "invalid_count: prompt_tokens"),
    "a count beyond 64 bits": (hub_event("r", NOON, 10**30, 1, 10**30), "invalid_count: prompt_tokens"),
    "text for a count": (hub_event("r", NOON, "many", 1, 2), "invalid_count: prompt_tokens"),
    "a negative count as text": (hub_event("r", NOON, "3", "-1", "2"), "invalid_count: completion_tokens"),
    "a thousands separator": (hub_event("r", NOON, "1,500", "1", "1501"), "invalid_count: prompt_tokens"),
    "true for a count": (hub_event("r", NOON, True, 0, 1), "invalid_count: prompt_tokens"),
    "an object for a count": (hub_event("r", NOON, {"value": 3}, 0, 3), "invalid_count: prompt_tokens"),
    "details of cached tokens that are no object": (
        seed_event("r", NOON, chat(10, 1) | {"prompt_tokens_details": {"cached_tokens": 3, "cached_tokens_details": "some"}}),
        "invalid_count: cached_audio_tokens",
    ),
    "a bad detail": (seed_event("r", NOON, chat(10, 1) | {"prompt_tokens_details": {"cached_tokens": "some"}}), "invalid_count: cached_tokens"),
    "usage as text": (seed_event("r", NOON, None, Tokens="21"), "invalid_usage"),
    "usage as a number": (seed_event("r", NOON, None, Tokens=21), "invalid_usage"),
    "usage as an array": (seed_event("r", NOON, None, Tokens=[chat(1, 1)]), "invalid_usage"),
    "details as an array": (seed_event("r", NOON, chat(10, 1) | {"prompt_tokens_details": [1]}), "invalid_usage"),
    "a total alone": (seed_event("r", NOON, {"total_tokens": 10}), "invalid_usage"),
    "more cached than prompt tokens": (seed_event("r", NOON, chat(10, 1, cached=11)), "conflict"),
    "more cached than prompt tokens at the hub": (hub_event("r", NOON, 10, 1, 11, cachedTokens=11), "conflict"),
    "more reasoning than completion tokens": (
        seed_event("r", NOON, chat(10, 1) | {"completion_tokens_details": {"reasoning_tokens": 2}}),
        "conflict",
    ),
    "a total less than the prompt": (seed_event("r", NOON, {"prompt_tokens": 12, "total_tokens": 10}), "conflict"),
}


def test_bad_events_are_quarantined_with_reason_and_coordinates_and_their_neighbours_are_billed(tmp_path):
    bad = {2 * number + 1: case for number, case in enumerate(QUARANTINED.items())}
    good = {number: seed_event(f"good-{number}", NOON, chat(10, 5)) for number in range(0, 2 * len(QUARANTINED) + 1, 2)}
    bodies = good | {number: body for number, (_, (body, _)) in bad.items()}
    pipeline = support.installation(tmp_path)
    blob = support.blob_name(NOON, "7")
    support.put(tmp_path / "capture", blob, support.capture_file(Captured(bodies[n], NOON, n, "7") for n in sorted(bodies)))
    support.run_all(pipeline, NOON.date(), NOON.date())

    select = 'SELECT sequence_number, reason, blob, partition_id, "offset", enqueued_at, bytes FROM quarantine ORDER BY sequence_number'
    quarantined = {number: rest for number, *rest in rows(pipeline, select)}
    assert sorted(quarantined) == sorted(bad)
    for number, (name, (body, reason)) in bad.items():
        found, *coordinates = quarantined[number]
        assert found.startswith(reason), name
        assert coordinates == [blob, "7", str(number * 688), NOON, len(body or b"")], name
    assert rows(pipeline, "SELECT count(*), sum(total_tokens), sum(cost) FROM enriched_usage") == [
        (len(good), 15 * len(good), Decimal("0.000075") * len(good))
    ]
    assert rows(pipeline, "SELECT records, parsed, quarantined, status FROM capture_files") == [(len(bodies), len(good), len(bad), "read")]
    assert rows(pipeline, "SELECT sum(quantity) FROM daily_billing") == [(15 * len(good),)]


@pytest.mark.parametrize("name", ["a negative count", "text for a count", "more cached than prompt tokens"])
def test_the_quarantine_says_which_contract_was_recognised(tmp_path, name):
    [row] = ingest(tmp_path, QUARANTINED[name][0])
    assert row["contract"] == ("ai_hub_gateway" if b"promptTokens" in QUARANTINED[name][0] else "seed_policy")


def test_a_sum_that_differs_from_the_total_is_not_quarantined(tmp_path):
    [row] = ingest(tmp_path, seed_event("r", NOON, {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 99}))
    assert pick(row, "reason", *COUNTS) == (None, 10, 5, 99)


# --- text of the caller is not taken for the gateway's


def test_text_of_a_prompt_that_looks_like_another_contract_is_only_text(tmp_path):
    looks = '"promptTokens": 1, "timestamp": "1", "subscriptionId": "evil", "SubscriptionId": "evil", "RequestId": "evil", "Tokens": {}'
    nested = {"promptTokens": 1, "timestamp": "x", "subscriptionId": "evil", "appId": "evil", "Tokens": {"prompt_tokens": 9}, "RequestId": "evil"}
    found = ingest(
        tmp_path,
        seed_event("text", NOON, chat(10, 5), Prompt=looks),
        seed_event("nested", NOON, chat(10, 5), Prompt=[{"role": "tool", "content": [nested]}], Response=[nested]),
        with_fields(hub_event("hub", NOON, 10, 5, 15), note=looks, more={"SubscriptionId": "evil", "RequestId": "evil", "Tokens": {}}),
    )
    assert [pick(row, "contract", "reason", "request_id", "subscription_id", *COUNTS) for row in found] == [
        ("seed_policy", None, "text", "sales", 10, 5, 15),
        ("seed_policy", None, "nested", "sales", 10, 5, 15),
        ("ai_hub_gateway", None, "hub", "hr", 10, 5, 15),
    ]


def test_what_is_salvaged_of_a_cut_event_is_not_taken_from_its_prompt(tmp_path):
    nested = {"SubscriptionId": "evil", "RequestId": "evil", "EventTime": "2026-01-01T00:00:00Z", "promptTokens": 1, "timestamp": "x", "appId": "x"}
    evil = ['"SubscriptionId": "evil", "Prompt": 1', nested, "x" * 260_000]
    cut = long_event("good", "", Prompt=evil)[:200_000]
    no_owner = long_event("no owner", "", SubscriptionId=None, Prompt=evil)[:200_000]
    found = ingest(tmp_path, cut, no_owner)
    assert [pick(row, "reason", "request_id", "subscription_id", "event_time") for row in found] == [
        (None, "good", "sales", NOON - HOUR),
        (None, "no owner", None, NOON - HOUR),
    ]


# --- prompts and answers stop at the door


CANARY, ADDRESS = "CANARY-7f3a9c", "198.51.100.77"


def test_prompts_answers_and_addresses_are_written_nowhere(tmp_path):
    content = [{"role": "user", "content": f"{CANARY} é"}]
    changes = {"Prompt": content, "Response": content, "RequestIp": ADDRESS}
    seed = seed_event("seed", NOON, chat(10, 5), **changes)
    hub = hub_event("hub", NOON, 10, 5, 15, RequestIp=ADDRESS, sessionId=CANARY)
    events = [
        seed,
        hub,
        seed_event("failed", NOON, None, **changes),
        long_event("cut", "", RequestIp=ADDRESS, Prompt=[CANARY, ADDRESS] * 20_000)[:200_000],
        seed[:-30],
        seed.replace("é".encode("ascii", "backslashreplace"), b"\xff"),
        json.dumps({"Message": CANARY, "Ip": ADDRESS}).encode(),
        f"{CANARY} {ADDRESS}".encode(),
        json.dumps([CANARY]).encode(),
        with_fields(seed, RequestId="bad count", Tokens={"prompt_tokens": CANARY}),
        with_fields(seed, RequestId="bad usage", Tokens=CANARY),
        with_fields(seed, RequestId="conflict", Tokens=chat(1, 1, cached=2)),
        (with_fields(seed, RequestId="bad time", EventTime=CANARY), NOON),
        (with_fields(seed, RequestId="out of range", EventTime=CANARY), dt.datetime(2025, 1, 1)),
    ]
    pipeline = captured(tmp_path, events)
    damaged = support.capture_file([Captured(seed, NOON, 0)])
    support.put(tmp_path / "capture", support.blob_name(NOON, "1"), damaged[:-40])
    support.put(tmp_path / "capture", support.blob_name(NOON, "2"), damaged.replace(b"PM\x00", b"PM\x07"))
    support.run_all(pipeline, NOON.date(), NOON.date())

    counted = Counter(status for (status,) in rows(pipeline, "SELECT status FROM capture_files"))
    assert counted == {"read": 1, "unreadable": 2}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "capture")]
    assert {f"capture_date={NOON.date()}.json", "warehouse.duckdb", "data.parquet"} <= {path.name for path in files}
    for path in files:
        for secret in (CANARY, ADDRESS):
            assert secret.encode() not in path.read_bytes(), path
    parquet = [str(path) for path in files if path.suffix == ".parquet"]
    # the subscription shows that the search finds what is there
    assert sum(rows_with(f"read_parquet('{path}')", "sales") for path in parquet) > 0
    for secret in (CANARY, ADDRESS):
        assert {path: rows_with(f"read_parquet('{path}')", secret) for path in parquet} == dict.fromkeys(parquet, 0)
        for table in tables.PUBLISHED:
            assert rows(pipeline, f"SELECT count(*) FROM {table} AS t WHERE contains(CAST(t AS VARCHAR), '{secret}')") == [(0,)], table


def rows_with(source: str, text: str) -> int:
    return duckdb.execute(f"SELECT count(*) FROM {source} AS t WHERE contains(CAST(t AS VARCHAR), ?)", [text]).fetchall()[0][0]
