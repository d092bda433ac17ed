"""Events of every contract, whatever state they arrive in: contract v2, privacy, schema drift, coverage, and no record ever lost."""

import datetime as dt
import importlib.resources
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import jsonschema
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.lake import engine
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reconcile import capture, usage
from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import chat, hub_event, rows, seed_event
from aoai_usage_pipeline_tests.test_answers import private_event
from aoai_usage_pipeline_tests.test_diagnostics import NOON, bill, envelope, gateway_log, llm_log

SCHEMA = json.loads(importlib.resources.files("aoai_usage_pipeline.usage.contracts").joinpath("contract_v2.schema.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA)
DAY = dt.timedelta(1)


def v2_event(request_id: str = "r", tokens: dict[str, Any] | None = None, **changes: Any) -> bytes:
    example = SCHEMA["examples"][0]
    event = example | {"requestId": request_id, "time": f"{NOON:%Y-%m-%dT%H:%M:%S}.1234567Z", "usage": tokens} | changes
    VALID.validate(event)
    return json.dumps(event).encode()


def ledger(pipeline: Pipeline) -> tuple[int, int]:
    """Events captured, and events that are accepted, duplicates or quarantined."""
    [(captured, parsed, quarantined)] = rows(pipeline, "SELECT sum(events), sum(parsed), sum(quarantined) FROM capture_files")
    [(counted,)] = rows(pipeline, "SELECT coalesce(sum(accepted + duplicates), 0) FROM daily_quality")
    [(shown,)] = rows(pipeline, "SELECT count(*) FROM quarantine")
    assert (parsed, quarantined) == (counted, shown)
    return captured, counted + shown


# --- contract v2


def test_the_schema_has_examples_that_are_valid_and_in_order():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for example in SCHEMA["examples"]:
        VALID.validate(example)
        assert list(example) == [name for name in SCHEMA["properties"] if name in example]
    assert list(SCHEMA["properties"])[-1] == "content"


@pytest.mark.parametrize("content", [{"request": [], "response": None}, {"request": {}, "response": 5}, "text"])
def test_the_schema_says_what_content_is(content):
    assert not VALID.is_valid(SCHEMA["examples"][0] | {"content": content})


def test_a_v2_event_says_everything_a_price_needs(tmp_path):
    pipeline = bill(tmp_path, [v2_event(tokens=chat(150, 50, 128), stream=True, toolCalls={"web_search_call": 2}, serviceTier="priority")])
    select = """SELECT contract, gateway, subscription_id, product, application, operation, deployment, reported_model, model, model_version, region,
        service_tier, status_code, prompt_tokens, cached_tokens, completion_tokens, time_source, length(end_user) FROM enriched_usage"""
    assert rows(pipeline, select) == [
        (
            "contract_v2", "apim-contoso-weu", "sales-team-sub", "openai-standard", "11115293-844b-456f-8dbc-0c2d78e3e307", "ChatCompletions_Create", "chat",
            "gpt-4o-2024-11-20", "gpt-4o", "2024-11-20", "swedencentral", "priority", 200, 150, 128, 50, "event", 32,
        )
    ]  # fmt: skip
    [(details,)] = rows(pipeline, "SELECT details FROM enriched_usage")
    found = json.loads(details)
    assert (found["stream"], json.loads(found["toolCalls"]), found["backend"]) == ("true", {"web_search_call": 2}, "openai-backend-0")


def test_tool_calls_that_are_no_object_are_no_count(tmp_path):
    event = v2_event(tokens=chat(150, 50), toolCalls={"web_search_call": 2}).replace(b'{"web_search_call": 2}', b'"two"')
    pipeline = bill(tmp_path, [event])
    assert rows(pipeline, "SELECT reason FROM quarantine") == [("invalid_count: web_search_calls is not a count",)]


def test_a_v2_event_that_was_cut_off_still_bills(tmp_path):
    body = v2_event("cut", chat(150, 50), content={"request": {"messages": [{"content": "CANARY é" * 40_000}]}, "response": None})
    pipeline = bill(tmp_path, [body[:204_800], v2_event("whole", chat(1, 1))])
    assert rows(pipeline, "SELECT request_id, prompt_tokens, completion_tokens FROM enriched_usage ORDER BY 1") == [("cut", 150, 50), ("whole", 1, 1)]


def test_a_request_that_spilled_over_is_billed_where_it_was_served(tmp_path):
    pipeline = bill(tmp_path, [v2_event(tokens=chat(1, 1), spilloverFrom="chat-ptu", spilloverTo="chat-standard", deployment="chat-ptu")])
    assert rows(pipeline, "SELECT deployment FROM daily_usage") == [("chat-standard",)]


@pytest.mark.parametrize("apart", [0, 1], ids=["one day", "two days"])
def test_an_answer_knows_more_than_the_diagnostics_of_its_call(tmp_path, apart):
    usage = chat(150, 50, 128) | {"completion_tokens_details": {"reasoning_tokens": 20, "audio_tokens": 0}}
    log, call = llm_log("c1", NOON + apart * DAY), gateway_log("c1")
    pipeline = bill(tmp_path, [envelope(log, call), v2_event("c1", usage, gateway="apim", serviceTier=None)], at=NOON)
    select = "SELECT contract, prompt_tokens, cached_tokens, reasoning_tokens, copies, conflict, cost FROM enriched_usage"
    # 22 uncached and 128 cached input tokens, 50 output tokens
    assert rows(pipeline, select) == [("contract_v2", 150, 128, 20, 3, False, Decimal("0.000715"))]


def test_an_answer_that_disagrees_with_the_diagnostics_is_a_conflict(tmp_path):
    pipeline = bill(tmp_path, [envelope(llm_log("c1"), gateway_log("c1")), v2_event("c1", chat(150, 51))])
    assert rows(pipeline, "SELECT completion_tokens, copies, conflict FROM enriched_usage") == [(51, 3, True)]


@pytest.mark.parametrize("apart", [0, 1], ids=["one day", "two days"])
def test_a_streamed_request_that_spilled_over_is_billed_where_it_was_served(tmp_path, apart):
    log = llm_log("c1", NOON + apart * DAY, deploymentName="chat-ptu")
    event = v2_event("c1", spilloverFrom="chat-ptu", spilloverTo="chat-standard", deployment="chat-ptu", stream=True)
    pipeline = bill(tmp_path, [envelope(log, gateway_log("c1", path="openai/deployments/chat-ptu/chat/completions")), event])
    assert rows(pipeline, "SELECT deployment, prompt_tokens, copies FROM enriched_usage") == [("chat-standard", 150, 3)]


def test_images_are_counted_where_the_usage_has_no_tokens(tmp_path):
    pipeline = bill(tmp_path, [v2_event(imageCount=2, imageSize="1024x1024", imageQuality="hd")])
    assert rows(pipeline, "SELECT images, usage_source, pricing_status, cost FROM enriched_usage") == [(2, "reported", "unpriced", None)]


def test_no_images_and_no_usage_is_no_usage(tmp_path):
    pipeline = bill(tmp_path, [v2_event(imageCount=0)])
    assert rows(pipeline, "SELECT images, usage_source, pricing_status FROM enriched_usage") == [(None, None, "no_usage")]


# --- ai-hub-gateway's other records


def test_calls_of_other_services_are_requests_without_tokens(tmp_path):
    search = hub_event("search-1", NOON, 1, 0, 1, targetService="AI-Search", model="ai-search")
    pipeline = bill(tmp_path, [search, hub_event("chat-1", NOON, 3, 4, 7)])
    select = "SELECT request_id, service, prompt_tokens, pricing_status FROM enriched_usage ORDER BY 1"
    assert rows(pipeline, select) == [("chat-1", "openai", 3, "priced"), ("search-1", "ai-search", None, "no_usage")]
    assert rows(pipeline, "SELECT accepted, coverage FROM daily_quality") == [(2, 1)]


def test_a_citadel_record_without_a_subscription_is_recognised(tmp_path):
    record = {
        "id": "llm-7c", "timestamp": support.culture(NOON), "appId": "hr-prod", "productName": "AI-HR", "deploymentName": "gpt-4o", "backendId": "pool",
        "customDimension1": "", "gatewayName": "hub", "promptTokens": "1500", "responseTokens": "320", "totalTokens": "1820", "targetService": "NA", "model": "gpt-4o",
    }  # fmt: skip
    pipeline = bill(tmp_path, [json.dumps(record).encode()])
    assert rows(pipeline, "SELECT contract, application, product, prompt_tokens FROM enriched_usage") == [
        ("ai_hub_gateway", "hr-prod", "AI-HR", 1500)
    ]


# --- coverage and drift


def test_coverage_counts_successful_calls_only_and_is_checked(tmp_path):
    events = [
        v2_event("a", chat(1, 1)),
        v2_event("b", None),
        v2_event("c", None, status=429),
        v2_event("d", None, status=400),
        seed_event("e", NOON, chat(1, 1)),
    ]
    pipeline = bill(tmp_path, events)
    assert rows(pipeline, "SELECT round(coverage, 6) FROM daily_quality") == [(Decimal("0.666667"),)]
    low = usage.low_coverage(pipeline.enrichment(), pipeline.lake, [NOON.date()], Decimal("0.95"))
    assert low == [{"usage_date": "2026-10-05", "coverage": "0.666667", "minimum": "0.95"}]
    assert usage.low_coverage(pipeline.enrichment(), pipeline.lake, [NOON.date()], Decimal("0.5")) == []


@pytest.mark.parametrize("share", ["nan", "much", "1.5", "-1"])
def test_a_coverage_that_is_no_share_is_named(share):
    with pytest.raises(SettingsError, match=f"AOAI_MIN_COVERAGE is '{share}'"):
        Settings.from_env({"AOAI_MIN_COVERAGE": share})


def test_a_field_never_seen_before_is_reported_once_and_breaks_nothing(tmp_path):
    pipeline = support.installation(tmp_path)
    days = [NOON + n * dt.timedelta(days=1) for n in range(3)]
    for n, day in enumerate(days):
        new = {} if n == 0 else {"Tenant": "x", "ada@example.com": 1}
        body = seed_event(f"r{n}", day, chat(1, 1), **new)
        support.put(tmp_path / "capture", support.blob_name(day), support.capture_file([support.Captured(body, day, n)]))
    support.run_all(pipeline, days[0].date(), days[-1].date())
    assert rows(pipeline, "SELECT count(*) FROM enriched_usage") == [(3,)]
    news = capture.new_fields(pipeline.manifests.all(), [day.date() for day in days])
    assert news == [{"capture_date": str(days[1].date()), "contract": "seed_policy", "field": field} for field in ("<redacted>", "Tenant")]


def test_the_quarantine_is_counted_by_reason_with_an_example_of_each(tmp_path):
    pipeline = bill(tmp_path, [b"{", b'{"ada@example.com": 1, "10.1.2.3": 2}', b"{", seed_event("r", NOON, chat(1, 1, 9))])
    reasons = usage.quarantine_reasons(pipeline.lake, pipeline.manifests.all(), [NOON.date()])
    assert [(row["reason"], row["contract"], row["count"], row["sequence_number"]) for row in reasons] == [
        ("invalid_json", "unknown", 2, 0),
        ("conflict", "seed_policy", 1, 3),
        ("unknown_contract", "unknown", 1, 1),
    ]
    [(reason,)] = rows(pipeline, "SELECT reason FROM quarantine WHERE reason LIKE 'unknown%'")
    assert reason == "unknown_contract: top-level fields <redacted>, <redacted>"


# --- privacy


CANARIES = ["CANARY-PROMPT", "CANARY-ANSWER", "CANARY-KEY", "ada@canary.example", "203.0.113.77", "CANARY-USER"]


def private_bodies() -> list[bytes]:
    """An event of every contract with something in it that must not be kept, and the same events damaged."""
    said = "CANARY-PROMPT ada@canary.example"
    messages = [{"role": "user", "content": said}]
    answer = [{"message": {"content": "CANARY-ANSWER"}}]
    whole = {"id": "chatcmpl-1", "choices": answer, "usage": chat(1, 1)}
    log = llm_log("c1", requestMessages=json.dumps(messages), responseMessages="CANARY-ANSWER")
    call = gateway_log(
        "c1", backendRequestBody=said, backendResponseBody=json.dumps(whole), userId="CANARY-USER", requestHeaders={"api-key": "CANARY-KEY"}
    )
    bodies = [
        seed_event("s1", NOON, chat(1, 1), RequestIp="203.0.113.77", Prompt=messages, Response=answer),
        seed_event("s2", NOON, chat(1, 1), Prompt=[{"content": said * 9_000}])[:200_000],
        hub_event("h1", NOON, 1, 1, 2, RequestIp="203.0.113.77", endUserId="CANARY-USER", sessionId="CANARY-USER"),
        v2_event(
            "v1",
            chat(1, 1),
            endUser="CANARY-USER",
            clientTag="ada@canary.example 203.0.113.77",
            content={"request": {"messages": messages}, "response": {"choices": answer}},
        ),
        private_event(json.dumps(whole), "CANARY-KEY", request=json.dumps({"messages": messages})),
        json.dumps(
            {"timestamp": support.culture(NOON), "appId": "app", "appSubscriptionKey": "CANARY-KEY", "promptTokens": "1", "responseTokens": "1"}
        ).encode(),
        envelope(log | {"callerIpAddress": "203.0.113.77"}, call | {"callerIpAddress": "203.0.113.77"}),
        envelope(llm_log("c2", prompt=None, requestMessages=json.dumps(messages), responseMessages=json.dumps([answer[0]["message"]]))),
        json.dumps({"said": said, "ada@canary.example": "CANARY-KEY"}).encode(),
    ]
    return bodies + [body[:-3] for body in bodies]


def canaries(root: Path, pipeline: Pipeline) -> dict[str, set[str]]:
    """The canaries in each written file and in each published table."""
    texts = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and root / "capture" not in path.parents}
    assert any(path.suffix == ".duckdb" for path in texts)
    for path in texts:
        if path.suffix == ".parquet":
            texts[path] += repr(rows(pipeline, f"SELECT * FROM read_parquet('{path}')")).encode()
    found = {str(path.relative_to(root)): {canary for canary in CANARIES if canary.encode() in text} for path, text in texts.items()}
    for table in ("enriched_usage", "quarantine", "daily_usage", "daily_billing", "capture_files"):
        shown = repr(rows(pipeline, f"SELECT * FROM {table}"))
        found[table] = {canary for canary in CANARIES if canary in shown}
    return {where: seen for where, seen in found.items() if seen}


def raw_events(pipeline: Pipeline, columns: str) -> list[tuple[Any, ...]]:
    """Columns of the raw events that the manifests name now."""
    names = [segment.name for manifest in pipeline.manifests.all() for segment in manifest.segments]
    source = engine.read_parquet(pipeline.lake.local_paths(names), tables.empty_select(tables.RAW_EVENTS))
    with duckdb.connect() as db:
        return db.execute(f"SELECT {columns} FROM {source} ORDER BY sequence_number, record_index").fetchall()


def kept_bodies(pipeline: Pipeline) -> list[bytes]:
    return [body.encode() for (body,) in raw_events(pipeline, "body") if body]


@pytest.mark.parametrize("estimate_usage", ["off", "on"])
def test_nothing_private_passes_the_reader(tmp_path, estimate_usage):
    pipeline = bill(tmp_path, private_bodies(), estimate_usage=estimate_usage)
    assert rows(pipeline, "SELECT count(DISTINCT contract) FROM enriched_usage") == [(7,)]
    assert rows(pipeline, "SELECT sum(estimated) FROM daily_quality") == [(estimate_usage == "on",)]
    assert canaries(tmp_path, pipeline) == {}
    assert not [path for path in (tmp_path / "lake/raw_events").rglob("*.parquet") if "body" in pq.read_schema(path).names]


def test_the_switch_keeps_bodies_in_raw_events_and_no_key_anywhere(tmp_path):
    bodies = private_bodies()
    pipeline = bill(tmp_path, bodies, keep_content="on")
    where = canaries(tmp_path, pipeline)
    assert [name.rpartition("-")[0] for name in where] == [f"lake/raw_events/capture_date={NOON.date()}/hour={NOON.hour}"]
    assert next(iter(where.values())) == set(CANARIES) - {"CANARY-KEY"}
    kept = raw_events(pipeline, "contract, sequence_number, reason, body")
    for contract, number, reason, body in kept:
        if reason or contract in ("private_openai", "enterprise_azureai_event"):
            assert body is None
        elif contract.startswith("apim"):
            assert "203.0.113.77" not in body
            assert json.loads(body).get("requestmessages", json.loads(body).get("backendrequestbody")).count("CANARY-PROMPT") == 1
        else:
            assert body == bodies[number].decode()
    assert {contract for contract, _, _, body in kept if body} == {
        "seed_policy", "ai_hub_gateway", "contract_v2", "apim_llm_log", "apim_gateway_log"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["appSubscriptionKey", "APPSUBSCRIPTIONKEY"])
def test_a_body_with_a_key_where_nobody_expects_it_is_not_kept(tmp_path, name):
    bodies = [
        seed_event("a", NOON, chat(1, 1), **{name: "CANARY-KEY"}),
        v2_event("b", chat(1, 1), content={"request": json.dumps({name: "CANARY-KEY"})}),
    ]
    pipeline = bill(tmp_path, [*bodies, seed_event("c", NOON, chat(1, 1))], keep_content="on")
    assert canaries(tmp_path, pipeline) == {}
    assert raw_events(pipeline, "request_id, body IS NULL") == [("a", True), ("b", True), ("c", False)]


def test_turning_the_switch_reads_the_days_again_and_takes_bodies_away_again(tmp_path):
    bodies = [seed_event("a", NOON, chat(1, 1)), seed_event("b", NOON, chat(1, 1))]
    bill(tmp_path, *([body] for body in bodies))
    bills = []
    for choice in ("on", "off", "on"):
        pipeline = support.installation(tmp_path, keep_content=choice)
        assert list(pipeline.changed_capture_dates(NOON.date(), NOON.date())) == [NOON.date()]
        support.run_all(pipeline, NOON.date(), NOON.date())
        assert pipeline.changed_capture_dates(NOON.date(), NOON.date()) == {}
        assert kept_bodies(pipeline) == (bodies if choice == "on" else [])
        bills.append(rows(pipeline, "SELECT * FROM daily_billing ORDER BY ALL"))
    assert bills[0] == bills[1] == bills[2]
    # of a capture file that is gone the events stay, but not their text
    (tmp_path / "capture" / support.blob_name(NOON)).unlink()
    pipeline = support.installation(tmp_path)
    support.run_all(pipeline, NOON.date(), NOON.date())
    assert raw_events(pipeline, "request_id") == [("a",), ("b",)]
    assert kept_bodies(pipeline) == []
    assert rows(pipeline, "SELECT * FROM daily_billing ORDER BY ALL") == bills[0]


def test_the_switch_that_keeps_content_is_on_or_off():
    assert Settings.from_env({}).keep_content == "off"
    assert Settings.from_env({"AOAI_KEEP_CONTENT": "on"}).keep_content == "on"
    with pytest.raises(SettingsError, match="AOAI_KEEP_CONTENT is 'yes'"):
        Settings.from_env({"AOAI_KEEP_CONTENT": "yes"})


# --- fuzzing


SAMPLES = [
    seed_event("s1", NOON, chat(10, 5, 3)),
    hub_event("h1", NOON, 3, 4, 7),
    v2_event("v1", chat(10, 5)),
    private_event(json.dumps({"id": "p1", "usage": chat(1, 2)})),
    json.dumps([{"TimeGenerated": "2026-10-05T12:00:00Z", "Consumer": "HR", "Model": "gpt-4o", "InputTokens": 1, "OutputTokens": 2}]).encode(),
    envelope(llm_log("c1"), gateway_log("c1")),
    v2_event("v2", content={"request": {"messages": [{"content": "hello"}]}, "response": {"choices": [{"message": {"content": "hi"}}]}}),
    envelope(*(llm_log("c2", prompt=None, responseMessages='[{"content": "hi"}]', sequenceNumber=n) for n in (0, 1))),
]
VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "x", "null", [], {}, [[]], {"a": {"b": [1]}}, "\ud800", "\x00", "é" * 99, "9" * 400]


def type_changed(body: bytes, rng: random.Random) -> bytes:
    data = json.loads(body)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key, below in list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []:
            places.append((value, key))
            collect(below)

    collect(data)
    for holder, key in rng.sample(places, min(len(places), rng.randrange(1, 4))):
        holder[key] = rng.choice(VALUES)
    return json.dumps(data).encode()


def mutated(body: bytes, kind: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(body))
    match kind:
        case "cut":
            return body[:at]
        case "bytes":
            return body[:at] + rng.randbytes(rng.randrange(1, 9)) + body[at + rng.randrange(0, 9) :]
        case "types":
            return type_changed(body, rng)
        case "nested":
            return body[:at] + b"[" * 3000 + body[at:]
        case "deep":
            return body.replace(b"1", b'{"a":' * 2000 + b"1" + b"}" * 2000, 1)
        case "duplicate keys":
            return b'{"usage": 1, "Tokens": [], "promptTokens": {}, ' + body[1:]
        case "numbers":
            return body.replace(b"1", b"1" * rng.choice([19, 20, 400, 5000]), 1)
        case _:
            return body + b" " * 3


KINDS = ["cut", "bytes", "types", "nested", "deep", "duplicate keys", "numbers", "spaces"]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(range(len(SAMPLES))), st.sampled_from(KINDS), st.integers(0, 2**32)), min_size=20, max_size=60),
    st.sampled_from(["off", "on"]),
)
def test_no_mutation_crashes_the_pipeline_or_loses_a_record(tmp_path_factory, mutations, switch):
    bodies = [mutated(SAMPLES[which], kind, random.Random(seed)) for which, kind, seed in mutations]
    switches = {"estimate_usage": switch, "keep_content": switch}
    pipeline = bill(tmp_path_factory.mktemp("fuzz"), [*bodies, seed_event("good", NOON, chat(1, 1))], **switches)
    captured, counted = ledger(pipeline)
    assert captured == counted >= len(bodies) + 1
    assert rows(pipeline, "SELECT prompt_tokens FROM enriched_usage WHERE request_id = 'good'") == [(1,)]
    assert rows(pipeline, "SELECT sum(records) FROM capture_files") == [(len(bodies) + 1,)]


@pytest.mark.slow
@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_a_text_of_10_mb_anywhere_is_read_or_quarantined(tmp_path, sample):
    long = "x" * 10_000_000
    extra = json.dumps({"long": long}).encode()[:-1]
    bodies = [extra + b", " + SAMPLES[sample][1:], SAMPLES[sample].replace(b'"gpt-4o', b'"' + long.encode(), 1), SAMPLES[sample] + long.encode()]
    pipeline = bill(tmp_path, [*bodies, seed_event("good", NOON, chat(1, 1))])
    captured, counted = ledger(pipeline)
    assert captured == counted >= 4
    assert rows(pipeline, "SELECT count(*) FROM quarantine WHERE reason LIKE 'too_large%' AND bytes > 10000000 AND length(body_sha256) = 64") >= [
        (1,)
    ]
    assert rows(pipeline, "SELECT prompt_tokens FROM enriched_usage WHERE request_id = 'good'") == [(1,)]


@pytest.mark.parametrize("name", ["prompt", "answer", "key", "ada@canary.example"])
def test_the_canaries_are_really_in_the_events(name: str):
    assert any(name.upper().encode() in body.upper() for body in private_bodies())


@pytest.mark.slow
def test_a_capture_file_of_hundreds_of_megabytes_is_read_like_any_other(tmp_path):
    """Most of it is prompts; the neighbours of its day are billed as well."""
    large = [seed_event(f"r{n}", NOON, chat(1, 1), Prompt="x" * 150_000) for n in range(900)]
    cut = [seed_event(f"cut{n}", NOON, chat(1, 1), Prompt="x" * 250_000)[:204_800] for n in range(300)]
    pipeline = bill(tmp_path, large + cut, [seed_event("small", NOON, chat(1, 1))])
    assert rows(pipeline, "SELECT count(*), sum(total_tokens) FROM enriched_usage") == [(1201, 2 * 901)]
