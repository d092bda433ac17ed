"""Azure Monitor's diagnostics: envelopes opened, the two halves of a call put together, each call counted once."""

import datetime as dt
import itertools
import json
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.reconcile import capture
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import Captured, chat, rows, seed_event

NOON = support.DAY + dt.timedelta(hours=12)
RESOURCE = "/SUBSCRIPTIONS/1/RESOURCEGROUPS/RG/PROVIDERS/MICROSOFT.APIMANAGEMENT/SERVICE/APIM"
CALL = "SELECT request_id, subscription_id, product, deployment, model, prompt_tokens, completion_tokens, attributed, copies, conflict FROM enriched_usage"
WHOLE = ("c1", "sales", "hr", "chat", "gpt-4o", 150, 50, True, 2, False)


def iso(at: dt.datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%S}.1234567Z"


def llm_log(call: str, at: dt.datetime = NOON, prompt: int | None = 150, completion: int | None = 50, **changes: Any) -> dict[str, Any]:
    counts = {"promptTokens": prompt, "completionTokens": completion, "totalTokens": (prompt or 0) + (completion or 0)}
    properties = {
        "deploymentName": "chat", "modelName": "gpt-4o-2024-11-20", "sequenceNumber": 0, "isStreamCompletion": True,
        "requestMessages": '[{"role": "user", "content": "CANARY-PROMPT"}]',
    }  # fmt: skip
    return {
        "category": "GatewayLlmLogs", "operationName": "Microsoft.ApiManagement/GatewayLlmLogs", "correlationId": call, "resourceId": RESOURCE,
        "time": iso(at), "serviceName": "apim", "properties": properties | (counts if prompt is not None else {}) | changes,
    }  # fmt: skip


def gateway_log(
    call: str, at: dt.datetime = NOON, status: int = 200, path: str = "openai/deployments/chat/chat/completions", **changes: Any
) -> dict[str, Any]:
    properties = {
        "method": "POST", "url": f"https://apim.azure-api.net/{path}?api-version=2024-10-21", "backendUrl": f"https://aoai.openai.azure.com/{path}",
        "responseCode": status, "apiId": "azure-openai", "operationId": "ChatCompletions_Create", "productId": "hr", "apimSubscriptionId": "sales",
    }  # fmt: skip
    return {
        "category": "GatewayLogs", "correlationId": call, "resourceId": RESOURCE, "time": iso(at), "isRequestSuccess": status < 400,
        "callerIpAddress": "203.0.113.24", "properties": properties | changes,
    }  # fmt: skip


def envelope(*records: Any) -> bytes:
    return json.dumps({"records": records}).encode()


def bill(root: Path, *files: list[bytes | None], at: dt.datetime = NOON, **changes: Any) -> Pipeline:
    """One capture file for each list of bodies, ten minutes apart, all the way to the published file."""
    pipeline = support.installation(root, **changes)
    numbers = itertools.count()
    for n, bodies in enumerate(files):
        window = at + n * dt.timedelta(minutes=10)
        events = [Captured(body, window + dt.timedelta(minutes=1), next(numbers)) for body in bodies]
        support.put(root / "capture", support.blob_name(window), support.capture_file(events))
    support.run_all(pipeline, at.date() - dt.timedelta(1), at.date() + dt.timedelta(2))
    return pipeline


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=["usage first", "identity first"])
@pytest.mark.parametrize("together", ["one message", "two messages", "two files"])
def test_the_halves_of_a_call_become_one_request(tmp_path, order, together):
    halves = [[llm_log("c1"), gateway_log("c1")][n] for n in order]
    bodies = [envelope(*halves)] if together == "one message" else [envelope(half) for half in halves]
    pipeline = bill(tmp_path, *([body] for body in bodies)) if together == "two files" else bill(tmp_path, bodies)
    assert rows(pipeline, CALL) == [WHOLE]
    assert rows(pipeline, "SELECT parsed, accepted, duplicates, unattributed, coverage FROM daily_quality") == [(2, 1, 1, 0, 1)]
    assert rows(pipeline, "SELECT sum(quantity) FROM daily_billing") == [(200,)]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"properties": json.dumps(record["properties"])},
        lambda record: {name.upper(): value for name, value in record.items()},
        lambda record: (
            {name[0].upper() + name[1:]: value for name, value in record.items()}
            | {"properties": {name[0].upper() + name[1:]: value for name, value in record["properties"].items()}}
        ),
        lambda record: record | {"category": record["category"].upper()},
        lambda record: record | {"somethingNew": {"deep": [1]}},
    ],
    ids=["properties as text", "upper case", "Pascal case", "category in upper case", "an extra field"],
)
def test_spelling_and_form_do_not_matter(tmp_path, change):
    pipeline = bill(tmp_path, [envelope(change(llm_log("c1")), change(gateway_log("c1")))])
    assert rows(pipeline, CALL) == [WHOLE]


@pytest.mark.parametrize("form", [lambda r: json.dumps(r), lambda r: json.dumps([r]), lambda r: json.dumps({"Records": [r]}, indent=2)])
def test_a_record_may_come_alone_in_an_array_or_indented(tmp_path, form):
    pipeline = bill(tmp_path, [form(llm_log("c1")).encode(), form(gateway_log("c1")).encode()])
    assert rows(pipeline, CALL) == [WHOLE]


TYPES = {"correlationId": "_g", "isStreamCompletion": "_b", "time": "_t"}
NUMBERS = ("promptTokens", "completionTokens", "totalTokens", "promptCachedTokens", "responseCode", "sequenceNumber")


def table_row(record: dict[str, Any], whole: type) -> dict[str, Any]:
    """A record as the table AzureDiagnostics has it: flat, types behind the names, and numbers as doubles."""
    flat = {name: value for name, value in (record | record["properties"]).items() if name != "properties"}
    row = {"Category": flat.pop("category"), "Type": "AzureDiagnostics", "TimeGenerated": flat["time"], "ResourceId": flat.pop("resourceId")}
    return row | {
        name + TYPES.get(name, "_d" if name in NUMBERS else "_s"): whole(value) if name in NUMBERS else value for name, value in flat.items()
    }


def test_columns_of_the_older_table_are_read_like_plain_names(tmp_path):
    calls = [*itertools.product([float, int], [str, str.upper, str.lower]), None]
    records: list[dict[str, Any]] = []
    for n, call in enumerate(calls):
        halves = [llm_log(f"c{n}", promptCachedTokens=100), gateway_log(f"c{n}", status=429)]
        records += [{call[1](name): value for name, value in table_row(half, call[0]).items()} for half in halves] if call else halves
    assert sum("promptTokens" in record.get("properties", record) for record in records) == 1
    pipeline = bill(tmp_path, [envelope(*records)])
    columns = "request_id, subscription_id, product, deployment, model, prompt_tokens, cached_tokens, status_code, operation, gateway, event_time"
    at = NOON + dt.timedelta(microseconds=123456)
    assert rows(pipeline, f"SELECT {columns}, time_source FROM enriched_usage ORDER BY request_id") == [
        (f"c{n}", "sales", "hr", "chat", "gpt-4o", 150, 100, 429, "ChatCompletions_Create", "apim", at, "event") for n in range(len(calls))
    ]


def test_odd_rows_of_the_older_table(tmp_path):
    """No time but the table's; zero as a double; a plain name beside one with a type, which it wins over."""
    timeless = {name: value for name, value in table_row(llm_log("c1"), float).items() if name != "time_t"}
    zeros = [llm_log(f"zero {n}", promptTokens=zero, completionTokens=zero, totalTokens=zero) for n, zero in enumerate([0.0, "0.0", 0])]
    zeros.append(table_row(llm_log("zero 4", prompt=0, completion=0), float))
    pipeline = bill(tmp_path, [envelope(timeless, *zeros, llm_log("twice", promptTokens_d=7.0))])
    assert rows(pipeline, "SELECT DISTINCT time_source FROM enriched_usage") == [("event",)]
    shown = rows(pipeline, "SELECT prompt_tokens, pricing_status FROM enriched_usage ORDER BY request_id")
    assert shown == [(150, "priced"), (150, "priced"), *[(None, "no_usage")] * 4]


def test_fields_that_diagnostics_never_had_are_reported(tmp_path):
    usage = llm_log("c1", audioTokens=5, SomethingNew_s="CANARY-PROMPT") | {"cloud": {"name": "x"}}
    identity = gateway_log("c1") | {"properties": json.dumps(gateway_log("c1")["properties"] | {"ada@example.com": 1})}
    pipeline = bill(tmp_path, [envelope(usage, identity)])
    assert rows(pipeline, CALL) == [WHOLE]
    assert [(row["contract"], row["field"]) for row in capture.new_fields(pipeline.manifests.all(), [NOON.date()])] == [
        ("apim_gateway_log", "<redacted>"),
        ("apim_llm_log", "audiotokens"),
        ("apim_llm_log", "cloud"),
        ("apim_llm_log", "somethingnew_s"),
    ]


def test_nothing_that_is_documented_is_reported_as_new(tmp_path):
    usage = llm_log("c1", apiVersion="2024-10-21", requestId="chatcmpl-1", promptCachedTokens=0, completionReasoningTokens=0, responseMessages="[]")
    common = {"DeploymentVersion": "0.49.0.0", "Level": 4, "Sku": "StandardV2", "Region": "East US", "location": "East US", "resultType": "Succeeded"}
    common |= {"durationMs": 912, "truncated": 0, "tenantId": "t", "identity": {}, "operationVersion": "1", "resultSignature": "200"}
    identity = gateway_log(
        "c1", backendMethod="POST", backendResponseCode=200, backendProtocol="HTTP/1.1", backendTime=880, backendId="b", responseSize=1432, requestSize=980,
        cache="none", apiRevision="1", userId="1", clientProtocol="HTTP/1.1", clientTlsVersion="1.2", lastError={"elapsed": 0}, requestHeaders={},
        backendRequestBody="", responseBody="", clientTime=1, cacheTime=0, errors=[], traceRecords=[],
    )  # fmt: skip
    identity["properties"]["lastError_reason_s"] = "x"
    published = json.loads((Path(__file__).parent / "data/azure_diagnostics.json").read_text())
    records = [usage | common, identity | common, table_row(llm_log("c2"), float), published["GatewayLogs"], *published["RequestResponse"]]
    pipeline = support.installation(tmp_path, start_date=dt.date(2024, 1, 1))
    support.put(tmp_path / "capture", support.blob_name(NOON), support.capture_file([Captured(envelope(*records), NOON, 1)]))
    support.run_all(pipeline, NOON.date(), NOON.date())
    assert rows(pipeline, "SELECT parsed, quarantined FROM capture_files") == [(7, 0)]
    assert capture.new_fields(pipeline.manifests.all(), [NOON.date()]) == []


def test_a_call_around_midnight_counts_on_the_day_of_its_usage(tmp_path):
    midnight = support.DAY + dt.timedelta(days=1)
    before, after = midnight - dt.timedelta(seconds=1), midnight + dt.timedelta(seconds=1)
    pipeline = bill(tmp_path, [envelope(gateway_log("c1", before)), envelope(llm_log("c1", after))], at=before)
    assert rows(pipeline, CALL) == [WHOLE]
    assert rows(pipeline, "SELECT usage_date, requests, total_tokens FROM daily_usage") == [(midnight.date(), 1, 200)]
    assert rows(pipeline, "SELECT parsed, accepted, duplicates FROM daily_quality ORDER BY usage_date") == [(1, 0, 1), (1, 1, 0)]


def test_half_a_call_waits_and_is_completed_when_the_other_half_comes(tmp_path):
    pipeline = bill(tmp_path, [envelope(llm_log("c1"))])
    assert rows(pipeline, CALL) == [("c1", None, None, "chat", "gpt-4o", 150, 50, False, 1, False)]
    assert rows(pipeline, "SELECT unattributed, unallocated FROM daily_quality") == [(1, 1)]
    late = Captured(envelope(gateway_log("c1")), NOON + dt.timedelta(hours=30), 9)
    support.put(tmp_path / "capture", support.blob_name(late.enqueued_at), support.capture_file([late]))
    support.run_all(pipeline, NOON.date(), NOON.date() + dt.timedelta(2))
    assert rows(pipeline, CALL) == [WHOLE]
    assert rows(pipeline, "SELECT unattributed FROM daily_quality WHERE accepted > 0") == [(0,)]


def test_a_call_that_only_says_who_called_is_a_request_without_usage(tmp_path):
    pipeline = bill(tmp_path, [envelope(gateway_log("c1"), gateway_log("c2", status=429), gateway_log("c3", path="search/indexes/x/docs"))])
    shown = rows(pipeline, "SELECT request_id, status_code, service, usage_source, pricing_status, cost FROM enriched_usage ORDER BY 1")
    assert shown == [
        ("c1", 200, "openai", None, "no_usage", None),
        ("c2", 429, "openai", None, "no_usage", None),
        ("c3", 200, "other", None, "no_usage", None),
    ]
    # only c1 is a successful call of Azure OpenAI, and it reported nothing
    assert rows(pipeline, "SELECT accepted, no_usage, coverage FROM daily_quality") == [(3, 3, 0)]


@pytest.mark.parametrize("blank", [None, 0], ids=["absent", "zero"])
def test_a_message_split_over_several_records_counts_once(tmp_path, blank):
    parts = [llm_log("c1"), *(llm_log("c1", prompt=blank, completion=blank, sequenceNumber=n) for n in (1, 2))]
    pipeline = bill(tmp_path, [envelope(parts[2], parts[1])], [envelope(gateway_log("c1"), parts[0])])
    assert rows(pipeline, CALL) == [(*WHOLE[:8], 4, False)]
    assert rows(pipeline, "SELECT sum(quantity) FROM daily_billing") == [(200,)]


def test_counts_of_a_split_message_are_the_largest_and_not_the_sum(tmp_path):
    pipeline = bill(tmp_path, [envelope(llm_log("c1", prompt=100, completion=1), llm_log("c1"), gateway_log("c1"))])
    assert rows(pipeline, "SELECT prompt_tokens, completion_tokens FROM enriched_usage") == [(150, 50)]


def test_a_count_that_is_none_is_quarantined_beside_a_record_without_properties(tmp_path):
    counted = llm_log("c1")
    counted["properties"]["promptTokens"] = "x"
    body = json.dumps({"records": [counted, gateway_log("c1") | {"properties": ""}]}).encode()
    pipeline = bill(tmp_path, [body, seed_event("good", NOON, chat(1, 1))])
    assert rows(pipeline, "SELECT reason FROM quarantine") == [("invalid_count: prompt_tokens is not a count",)]
    assert rows(pipeline, "SELECT sum(total_tokens) FROM daily_usage") == [(2,)]


def test_a_probe_without_model_and_tokens_is_not_usage(tmp_path):
    pipeline = bill(tmp_path, [envelope(llm_log("c1", prompt=0, completion=0, modelName=""))])
    assert rows(pipeline, "SELECT prompt_tokens, usage_source, pricing_status FROM enriched_usage") == [(None, None, "no_usage")]


def test_a_policy_event_of_a_streamed_call_gets_its_counts_from_the_diagnostics(tmp_path):
    pipeline = bill(tmp_path, [seed_event("c1", NOON, None)], [envelope(llm_log("c1"))])
    assert rows(pipeline, "SELECT contract, subscription_id, prompt_tokens, cost_center, attributed FROM enriched_usage") == [
        ("apim_llm_log", "sales", 150, "CC-1", True)
    ]


def test_an_answer_in_the_gateway_log_is_usage(tmp_path):
    answer = {"id": "chatcmpl-1", "model": "gpt-4o-2024-11-20", "usage": chat(14, 8)}
    pipeline = bill(tmp_path, [envelope(gateway_log("c1", backendResponseBody=json.dumps(answer) + "\n"))])
    assert rows(pipeline, "SELECT prompt_tokens, completion_tokens, reported_model, usage_source FROM enriched_usage") == [
        (14, 8, "gpt-4o-2024-11-20", "reported")
    ]


def test_request_response_diagnostics_are_evidence_and_no_requests(tmp_path):
    properties = {
        "requestTime": 638995527610000000,
        "modelDeploymentName": "chat",
        "modelName": "gpt-4o",
        "modelVersion": "2024-11-20",
        "objectId": "",
    }
    record = {
        "Tenant": "eastus", "callerIpAddress": "203.0.113.***", "category": "RequestResponse", "correlationId": "a1", "time": iso(NOON),
        "resourceId": "/SUBSCRIPTIONS/1/PROVIDERS/MICROSOFT.COGNITIVESERVICES/ACCOUNTS/AOAI", "properties": json.dumps(properties),
    }  # fmt: skip
    pipeline = bill(tmp_path, [envelope(record, llm_log("c1"), gateway_log("c1"))])
    assert rows(pipeline, CALL) == [WHOLE]
    assert rows(pipeline, "SELECT records, events, parsed, quarantined FROM capture_files") == [(1, 3, 3, 0)]
    assert capture.new_fields(pipeline.manifests.all(), [NOON.date()]) == []


def test_a_bad_record_does_not_take_its_neighbours_along(tmp_path):
    message = json.dumps({"records": [llm_log("c1"), 5, {"category": "AuditEvent", "x": 1}, gateway_log("c1")]})
    pipeline = bill(tmp_path, [message.encode(), message[:-600].encode(), b'{"records": []}', b'{"records": "none"}', b"[]"])
    assert rows(pipeline, "SELECT prompt_tokens, subscription_id FROM enriched_usage") == [(150, "sales")]
    reasons = rows(pipeline, "SELECT sequence_number, record_index, split_part(reason, ':', 1), body_sha256 IS NOT NULL FROM quarantine ORDER BY ALL")
    assert reasons == [
        (0, 1, "unknown_contract", True),
        (0, 2, "unknown_contract", True),
        (1, 1, "unknown_contract", True),
        (1, 2, "unknown_contract", True),
        (1, 3, "invalid_json", True),
        (2, 0, "unknown_contract", True),
        (3, None, "unknown_contract", True),
        (4, None, "unknown_contract", True),
    ]
    assert rows(pipeline, "SELECT records, events, parsed + quarantined FROM capture_files") == [(5, 11, 11)]


HALVES = st.lists(st.tuples(st.sampled_from(["usage", "identity"]), st.integers(0, 3)), min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(HALVES, st.randoms(use_true_random=False))
def test_halves_in_any_order_over_any_files_and_days_give_the_same_bill(tmp_path_factory, halves, random):
    """Each call's halves have fixed contents; how often, when and where they arrive does not change what is billed."""
    records = [
        llm_log(f"c{call}", NOON + call * dt.timedelta(hours=11), 100 + call, 10)
        if half == "usage"
        else gateway_log(f"c{call}", NOON + call * dt.timedelta(hours=13))
        for half, call in halves
    ]
    bills = []
    for shuffled in (records, random.sample(records, len(records))):
        cut = random.randrange(len(shuffled) + 1)
        pipeline = bill(tmp_path_factory.mktemp("bill"), *([envelope(*part)] for part in (shuffled[:cut], shuffled[cut:]) if part))
        select = "SELECT usage_date, request_id, subscription_id, prompt_tokens, copies, conflict, attributed, cost FROM enriched_usage ORDER BY ALL"
        bills.append(rows(pipeline, select))
    assert bills[0] == bills[1]
    assert {row[1] for row in bills[0]} == {f"c{call}" for _, call in halves}
    assert len(bills[0]) == len({call for _, call in halves})


def test_published_records_are_read(tmp_path):
    published = json.loads((Path(__file__).parent / "data/azure_diagnostics.json").read_text())
    at = dt.datetime(2024, 7, 2, 6, 31, 31)
    pipeline = support.installation(tmp_path, start_date=dt.date(2024, 1, 1))
    bodies = [envelope(published["GatewayLogs"]), envelope(*published["RequestResponse"]), json.dumps(published["ai_hub_gateway"]).encode()]
    events = [Captured(body, at, number) for number, body in enumerate(bodies)]
    support.put(tmp_path / "capture", support.blob_name(at), support.capture_file(events))
    support.run_all(pipeline, dt.date(2024, 4, 1), at.date())
    select = """SELECT contract, reported_model, deployment, prompt_tokens, completion_tokens, CAST(event_time AS VARCHAR)
        FROM read_parquet(?) ORDER BY contract"""
    with duckdb.connect() as db:
        found = db.execute(
            select, [pipeline.lake.local_paths(f"enriched_usage/usage_date={day}/data.parquet" for day in ("2024-05-24", "2024-07-02"))]
        )
        assert found.fetchall() == [
            ("ai_hub_gateway", "gpt-35-turbo", "chat", 15000, 5000, "2024-05-24 14:45:56"),
            ("apim_gateway_log", "gpt-35-turbo", "gpt-chat-pilot", 14, 8, "2024-07-02 06:31:31.44659"),
        ]
    assert rows(pipeline, "SELECT records, events, parsed, quarantined FROM capture_files") == [(3, 5, 5, 0)]
