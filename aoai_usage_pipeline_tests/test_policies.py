"""The API Management policies, run: every kind of call through inbound, backend, outbound and on-error, from the gateway to the bill."""

import datetime as dt
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline_tests import apim, support
from aoai_usage_pipeline_tests.apim import Gateway, Served
from aoai_usage_pipeline_tests.support import chat, rows
from aoai_usage_pipeline_tests.test_answers import DATA, lines
from aoai_usage_pipeline_tests.test_diagnostics import NOON, bill, envelope, gateway_log, llm_log
from aoai_usage_pipeline_tests.test_events import SCHEMA, VALID

pytestmark = pytest.mark.slow
CHAT = "/openai/deployments/chat/chat/completions?api-version=2024-10-21"
V1 = "/openai/v1/chat/completions"
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
HELLO = {"messages": [{"role": "user", "content": "CANARY-PROMPT é"}]}
STREAMED = HELLO | {"stream": True}
INCLUDED = b'{"stream_options":{"include_usage":true},'
ANSWER = {"id": "chatcmpl-1", "model": "gpt-4o-2024-11-20", "object": "chat.completion", "usage": chat(150, 50, 128), "service_tier": "default"}
# what cannot get into an event unless the switch for content is on
CANARIES = ("CANARY-KEY", "CANARY-PROMPT", "CANARY-ANSWER", "Bearer", "203.0.113.24")


def compiled(folder: Path, **more: str) -> Path:
    if not (shutil.which("mcs") and shutil.which("mono") and apim.NEWTONSOFT.exists()):
        why = "mono is not installed: apt-get install --no-install-recommends mono-mcs mono-runtime libnewtonsoft-json-cil-dev"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    apim.compile_policies(folder, apim.project_policies() | more)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's policies, compiled, and one whose outbound section fails behind the event."""
    fault = '<set-header name="x"><value>@((string)context.Variables["absent"])</value></set-header>'
    late = apim.project_policies()["azure-openai-api"].replace("</outbound>", f"{fault}</outbound>")
    return compiled(tmp_path_factory.mktemp("policies"), fails_late=late)


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    running = Gateway(folder)
    yield running
    running.close()


def numbered(n: int) -> str:
    return f"6f0c2f3e-6d0b-4d53-8a0f-{n:012x}"


def served(gateway: Gateway, path: str = CHAT, body: Any = HELLO, kept: bool = False, **changes: Any) -> Served:
    """A call that the policies neither broke nor changed; its message, if any, is valid, small and without secrets."""
    call = gateway.call(path, body, **{"at": NOON, "answer": ANSWER} | changes)
    if not changes.get("fails"):
        assert call.said["failures"] == ([f"{changes['error']} in backend: no answer"] if changes.get("error") else [])
        assert call.said["sent"]["buffered"] is False
        assert "api-key" not in call.said["sent"]["headers"]
        assert call.said["sent"]["headers"]["Authorization"].startswith("Bearer managed-identity")
        assert (call.sent or b"").replace(INCLUDED, b"{") == (call.asked or b"")
        if not changes.get("error"):
            assert call.returned == call.answered
            assert call.said["response"]["status"] == changes.get("status", 200)
    for message in call.bodies:
        assert len(message) < 200_000
        assert message.startswith(b'{"schema":"aoai-usage/2","requestId":"')
        event = json.loads(message, parse_constant=pytest.fail)
        VALID.validate(event)
        assert list(event) == [name for name in SCHEMA["properties"] if name in event]
        assert event["time"].endswith("Z")
        assert not [canary for canary in CANARIES if canary in message.decode() and not (kept and canary in ("CANARY-PROMPT", "CANARY-ANSWER"))]
    return call


def event(gateway: Gateway, *arguments: Any, **changes: Any) -> dict[str, Any]:
    """The one event of a call."""
    return served(gateway, *arguments, **changes).event


def pick(found: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(found[name] for name in names)


# --- what a call says


def test_a_chat_completion_says_everything_a_bill_needs(gateway):
    found = event(gateway, headers={"x-usage-tag": "nightly"}, service="APIM-Contoso.azure-api.net", at=NOON + dt.timedelta(microseconds=123456))
    assert found == {
        "schema": "aoai-usage/2", "requestId": "6f0c2f3e-6d0b-4d53-8a0f-0c9d3e2b7a11", "time": "2026-10-05T12:00:00.1234560Z", "gateway": "apim-contoso",
        "subscriptionId": "sales", "product": "hr", "api": "azure-openai", "operation": "op", "application": None, "endUser": None,
        "backend": "aoai-swc.openai.azure.com", "region": "swedencentral", "deployment": "chat", "requestedModel": None, "model": "gpt-4o-2024-11-20",
        "apiVersion": "2024-10-21", "status": 200, "stream": False, "serviceTier": "default", "spilloverFrom": None, "spilloverTo": None,
        "usage": ANSWER["usage"], "toolCalls": None, "imageCount": None, "imageSize": None, "imageQuality": None, "inputCharacters": None,
        "requestBytes": len(json.dumps(HELLO)), "clientTag": "nightly",
    }  # fmt: skip


def form(*parts: tuple[str, str], boundary: str = "x") -> bytes:
    """A body of multipart/form-data: what the Content-Disposition says besides form-data, and the value."""
    fields = "".join(f"--{boundary}\r\nContent-Disposition: form-data; {said}\r\n\r\n{value}\r\n" for said, value in parts)
    return f"{fields}--{boundary}--\r\n".encode()


SPEECH = "/openai/deployments/tts/audio/speech?api-version=2024-10-21"
IMAGES = "/openai/deployments/dalle/images/generations?api-version=2024-10-21"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\x00\xff\xfe\r\n--x--\r\n'
TOKENS = {
    "type": "tokens",
    "input_tokens": 14,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
    "output_tokens": 45,
    "total_tokens": 59,
}
SECONDS = {"type": "duration", "seconds": 3.5}
OUTPUT = [
    {"type": "web_search_call", "id": "ws_1"}, {"type": "web_search_call", "id": "ws_2"}, {"type": "file_search_call", "id": "fs_1"},
    {"type": "code_interpreter_call", "id": "ci_1", "container_id": "c1"}, {"type": "code_interpreter_call", "id": "ci_2", "container_id": "c1"},
    {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "CANARY-ANSWER"}]},
]  # fmt: skip
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "model": "gpt-4o-2024-08-06",
    "usage": {"input_tokens": 20, "output_tokens": 11, "total_tokens": 31},
}
KINDS = {
    "completions": ("/openai/deployments/text/completions?api-version=2024-10-21", {"prompt": "CANARY-PROMPT"}, {},
        {"model": "gpt-35-turbo-instruct", "usage": chat(5, 6)}, {}, {"deployment": "text", "usage": chat(5, 6)}),
    "v1 names the deployment in the body": (V1, HELLO | {"model": "chat-eu"}, {}, ANSWER, {},
        {"deployment": "chat-eu", "requestedModel": "chat-eu", "model": "gpt-4o-2024-11-20", "apiVersion": None}),
    "responses": ("/openai/v1/responses", {"model": "chat", "input": "CANARY-PROMPT"}, {}, RESPONSE | {"output": OUTPUT, "service_tier": "priority"}, {},
        {"usage": RESPONSE["usage"], "serviceTier": "priority",
         "toolCalls": {"web_search_call": 2, "file_search_call": 1, "code_interpreter_session": 1}}),
    "compaction": ("/openai/v1/responses/compact", {"model": "chat", "input": "CANARY-PROMPT"}, {},
        {"id": "resp_2", "object": "response.compaction", "output": [{"type": "compaction", "encrypted_content": "CANARY-ANSWER"}], "usage": RESPONSE["usage"]}, {},
        {"deployment": "chat", "requestedModel": "chat", "model": None, "usage": RESPONSE["usage"], "toolCalls": None}),
    "embeddings": ("/openai/deployments/embed/embeddings?api-version=2024-10-21", {"input": ["CANARY-PROMPT"]}, {},
        {"object": "list", "data": [{"embedding": [0.1]}], "model": "text-embedding-3-small", "usage": {"prompt_tokens": 8, "total_tokens": 8}}, {},
        {"model": "text-embedding-3-small", "usage": {"prompt_tokens": 8, "total_tokens": 8}, "imageCount": None}),
    "transcription": ("/openai/deployments/transcribe/audio/transcriptions?api-version=2025-03-01-preview", FORM, MULTIPART,
        {"text": "CANARY-ANSWER", "usage": TOKENS}, {}, {"usage": TOKENS, "requestBytes": len(FORM), "requestedModel": None}),
    "translation": ("/openai/deployments/whisper/audio/translations?api-version=2024-10-21", FORM, MULTIPART,
        {"text": "CANARY-ANSWER", "usage": SECONDS}, {}, {"usage": SECONDS}),
    "transcription as text": ("/openai/deployments/whisper/audio/transcriptions?api-version=2024-10-21", FORM, MULTIPART,
        b"CANARY-ANSWER", {"Content-Type": "text/plain"}, {"usage": None, "status": 200}),
    "speech": (SPEECH, {"model": "tts-1", "input": "Hi \N{GRINNING FACE} you", "voice": "alloy"}, {}, b"ID3\x00\xff", {"Content-Type": "audio/mpeg"},
        {"inputCharacters": 8, "usage": None, "deployment": "tts", "requestedModel": "tts-1"}),
    "dall-e": (IMAGES, {"prompt": "CANARY-PROMPT", "n": 2, "size": "1024x1024", "quality": "hd"}, {}, {"created": 1, "data": [{"url": "x"}, {"url": "y"}]}, {},
        {"imageCount": 2, "imageSize": "1024x1024", "imageQuality": "hd"}),
    "gpt-image edits": ("/openai/v1/images/edits", form(('name="image"; filename="a.png"', "PNG"), ('name="model"', "image")), MULTIPART,
        {"created": 1, "size": "1536x1024", "quality": "high", "data": [{"b64_json": "CANARY-ANSWER"}], "usage": {"input_tokens": 9, "output_tokens": 8}}, {},
        {"deployment": "image", "imageCount": 1, "imageSize": "1536x1024", "imageQuality": "high", "usage": {"input_tokens": 9, "output_tokens": 8}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_is_sent(gateway, kind):
    path, body, headers, answer, answer_headers, expected = KINDS[kind]
    call = served(gateway, path, body, headers=headers, answer=answer, answer_headers=answer_headers)
    assert {name: call.event[name] for name in expected} == expected
    assert call.said["requestReads"] == (0 if headers and "/deployments/" in path else 1)
    assert call.said["responseReads"] == (0 if answer_headers else 1)


FILE = ('name="file"; filename="a.wav"', "RIFF\0CANARY-PROMPT")
MODEL = ('name="model"', "whisper")


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (form(MODEL, FILE), {}, "whisper"),
        (form(FILE, MODEL), {}, "whisper"),
        (form(FILE, ("name=model", "whisper")), {}, "whisper"),
        (form(MODEL, FILE, boundary="a-b"), {"Content-Type": 'Multipart/Form-Data; charset=utf-8; boundary="a-b"'}, "whisper"),
        (form(MODEL, FILE).replace(b"--x\r", b"--x\r\nContent-Type: text/plain\r"), {}, "whisper"),
        # what is inside a file is no field, and of two fields nobody knows which counts
        (form(('name="file"; filename="a.wav"', '\r\nContent-Disposition: form-data; name="model"\r\n\r\ncheap\r\n'), MODEL), {}, "whisper"),
        (form(MODEL, ('name="model"', "cheap")), {}, None),
        (form(MODEL, ('name="file"; filename="; name=model"', "cheap")), {}, None),
        (form(FILE), {}, None),
        (b"", {}, None),
        (form(MODEL), {"Content-Type": "multipart/form-data"}, None),
        (form(MODEL, ("name=file", "x" * 5_000_000)), {}, None),
        (form(MODEL, ("name=file", "x" * 5_000_000)), {"Content-Length": ""}, None),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_a_form_names_its_deployment_where_the_address_does_not(gateway, body, headers, expected):
    call = served(gateway, "/openai/v1/audio/transcriptions", body, headers=MULTIPART | headers, answer={"text": "CANARY-ANSWER", "usage": SECONDS})
    assert pick(call.event, "deployment", "requestedModel", "requestBytes", "usage") == (expected, expected, len(body), SECONDS)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/openai/v1/chat/completions"),
        ("GET", "/openai/v1/responses/resp_1"),
        ("POST", "/openai/v1/responses/resp_1/cancel"),
        ("GET", "/openai/v1/models"),
        ("POST", "/openai/v1/files"),
    ],
)
def test_calls_that_cost_nothing_send_nothing(gateway, method, path):
    call = served(gateway, path, HELLO, method=method, answer=RESPONSE)
    assert (call.bodies, call.said["requestReads"], call.said["responseReads"]) == ([], 0, 0)


@pytest.mark.parametrize(
    "path",
    [CHAT.replace("?", "//?"), CHAT.replace("?", "%2F?"), CHAT.replace("/completions", "%2Fcompletions"), CHAT.replace("/chat/", "//ch%61t//")],
)
def test_another_spelling_of_an_address_hides_no_call(gateway, path):
    assert pick(event(gateway, path), "deployment", "usage") == ("chat", ANSWER["usage"])


@pytest.mark.parametrize("segment", ["%2Fdeployments/chat/", "/deployments%2Fchat/", "/Deployments/chat/"])
def test_another_spelling_of_an_address_charges_no_other_deployment(gateway, segment):
    assert event(gateway, CHAT.replace("/deployments/chat/", segment), HELLO | {"model": "cheap"})["deployment"] == "chat"


def test_another_spelling_of_an_address_hides_no_characters(gateway):
    path, body, headers, answer, answer_headers, expected = KINDS["speech"]
    found = event(gateway, path.replace("/speech", "%2Fspeech%2F"), body, headers=headers, answer=answer, answer_headers=answer_headers)
    assert found["inputCharacters"] == expected["inputCharacters"]


def test_all_recorded_answers_go_through_and_are_billed(gateway, tmp_path):
    messages, tokens, streams = [], [], 0
    for number, recorded in enumerate(lines("azure_answers.jsonl.gz")):
        streamed = recorded["text"].startswith("data:")
        call = served(
            gateway, V1, HELLO | {"model": "chat"}, request_id=numbered(number), status=recorded["status"], answer=recorded["text"].encode(),
            answer_headers=SSE if streamed else None,
        )  # fmt: skip
        assert call.said["responseReads"] == (not streamed and recorded["status"] == 200)
        assert pick(call.event, "status", "stream") == (recorded["status"], streamed)
        messages += call.bodies
        streams += streamed
        tokens.append((None, None) if streamed or recorded["tokens"][0] is None else (recorded["tokens"][0], recorded["tokens"][1] or 0))
    pipeline = bill(tmp_path, messages)
    assert rows(pipeline, "SELECT prompt_tokens, completion_tokens FROM enriched_usage ORDER BY sequence_number") == tokens
    assert rows(pipeline, "SELECT count(*) FROM quarantine") == [(0,)]
    assert (len(messages), streams) == (69, 23)


# --- who calls

PERSON = {"oid": "8a1f", "azp": "11115293-844b", "scp": "user_impersonation", "name": "Ada", "upn": "ada@example.com"}
HASH = hashlib.sha256(b"8a1f").hexdigest()
TOKEN = "Bearer e30.e30.CANARY-KEY"


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        (PERSON, ("11115293-844b", HASH)),
        ({"appid": "app-1", "sub": "8a1f", "scp": "x"}, ("app-1", HASH)),
        ({"appid": "app-1", "oid": "8a1f", "roles": "Usage.Call"}, ("app-1", None)),
        ({"scp": "x"}, (None, None)),
        ({}, (None, None)),
    ],
    ids=["person", "older token without oid", "application", "neither", "no claims"],
)
def test_callers_are_known_by_the_claims_of_a_validated_token(gateway, claims, expected):
    call = served(gateway, headers={"Authorization": TOKEN}, claims=claims)
    assert pick(call.event, "application", "endUser") == expected
    assert b"ada" not in call.bodies[0].lower()


@pytest.mark.parametrize("sent", ["Bearer CANARY-KEY", "Bearer ", "Basic YTpi", "CANARY-KEY", "Bearer a.b", ""])
def test_what_is_no_token_is_not_validated_and_nobody(gateway, sent):
    call = served(gateway, headers={"Authorization": sent}, claims=None)
    assert pick(call.event, "application", "endUser", "status") == (None, None, 200)


@pytest.mark.parametrize("token", ["text", 5, True])
def test_a_variable_that_is_no_token_is_nobody(gateway, token):
    assert pick(event(gateway, variables={"usage-token": token}), "application", "endUser", "status") == (None, None, 200)


def test_a_call_without_subscription_product_and_operation(gateway):
    found = event(gateway, subscription=None, product=None, operation=None, api=None)
    assert pick(found, "subscriptionId", "product", "operation", "api", "usage") == (None, None, None, None, ANSWER["usage"])


def test_a_key_in_the_address_goes_nowhere(gateway):
    call = served(gateway, CHAT + "&api-key=CANARY-KEY")
    assert call.said["sent"]["url"] == f"https://aoai-swc.openai.azure.com{CHAT}"


def test_a_request_that_spilled_over_names_both_deployments(gateway):
    headers = {"x-ms-spillover-from-deployment": "chat-ptu", "x-ms-deployment-name": "chat-standard"}
    assert pick(event(gateway, answer_headers=headers), "spilloverFrom", "spilloverTo") == ("chat-ptu", "chat-standard")
    del headers["x-ms-spillover-from-deployment"]
    assert pick(event(gateway, answer_headers=headers), "spilloverFrom", "spilloverTo") == (None, None)


# --- streams


@pytest.mark.parametrize(
    ("path", "body", "changes"),
    [
        (CHAT, STREAMED, {}),
        (CHAT.replace("2024-10-21", "2024-09-01-preview"), STREAMED, {}),
        (V1, STREAMED, {}),
        (V1 + "?api-version=preview", STREAMED, {}),
        (CHAT, STREAMED, {"headers": {"Content-Type": "application/json; charset=UTF-8"}}),
        (CHAT, STREAMED, {"headers": {"Content-Length": "", "Transfer-Encoding": "chunked"}}),
        (CHAT, STREAMED, {"variables": {"usage-include": "true"}}),
    ],
)
def test_a_streamed_chat_is_asked_for_its_usage_and_not_read(gateway, path, body, changes):
    call = served(gateway, path, body, answer=b"data: [DONE]\n\n", answer_headers=SSE, **changes)
    assert call.sent.startswith(INCLUDED)
    assert json.loads(call.sent) == body | {"stream_options": {"include_usage": True}}
    assert call.said["sent"]["headers"]["Content-Length"] == str(len(call.sent))
    assert (call.said["responseReads"], call.event["stream"], call.event["usage"]) == (0, True, None)


@pytest.mark.parametrize(
    ("path", "body", "changes"),
    [
        (CHAT, HELLO, {}),
        (CHAT, HELLO | {"stream": False}, {}),
        (CHAT, HELLO | {"stream": "true"}, {}),
        (CHAT, STREAMED | {"stream_options": {"include_usage": False}}, {}),
        (CHAT, STREAMED | {"stream_options": None}, {}),
        (CHAT, STREAMED | {"data_sources": [{"type": "azure_search"}]}, {}),
        (CHAT.replace("2024-10-21", "2024-06-01"), STREAMED, {}),
        (CHAT.partition("?")[0], STREAMED, {}),
        ("/openai/v1/responses", STREAMED, {}),
        ("/openai/deployments/chat/completions?api-version=2024-10-21", STREAMED, {}),
        (CHAT, STREAMED, {"headers": {"x-usage-include": "False"}}),
        (CHAT, STREAMED, {"variables": {"usage-include": "false"}}),
        (CHAT, STREAMED, {"variables": {"usage-include": False}}),
        (CHAT, STREAMED, {"variables": {"usage-body-limit": "20"}}),
        (CHAT, json.dumps(STREAMED).encode("utf-16"), {"headers": {"Content-Type": "application/json; charset=utf-16"}}),
    ],
)
def test_a_client_that_does_not_allow_it_is_left_alone(gateway, path, body, changes):
    call = served(gateway, path, body, answer=b"data: [DONE]\n\n", answer_headers=SSE, **changes)
    assert call.sent == call.asked


def test_nothing_else_of_a_request_changes(gateway):
    body = '\r\n {"stream" : true,"messages":[{"role":"user","content":"2024-01-01T00:00:00+02:00"}],"temperature":0.10,"seed":123456789012345678901,"a":1,"a":2,"é":"\\u00e9\\ud83d"}'
    call = served(gateway, body=body.encode(), answer=b"", answer_headers=SSE)
    assert call.sent.decode() == body.replace("{", INCLUDED.decode(), 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_streamed_call_and_its_diagnostics_are_one_request(gateway, tmp_path, order):
    call = served(gateway, CHAT, STREAMED, request_id=numbered(1), answer=b"data: [DONE]\n\n", answer_headers=SSE)
    assert call.event["requestId"] == numbered(1)
    copies = [call.bodies[0], envelope(llm_log(numbered(1), promptCachedTokens=128)), envelope(gateway_log(numbered(1)))]
    pipeline = bill(tmp_path, [copies[n] for n in order])
    select = "SELECT request_id, subscription_id, product, gateway, deployment, model, region, prompt_tokens, cached_tokens, completion_tokens, copies, attributed, conflict, cost FROM enriched_usage"
    # 22 uncached and 128 cached input tokens, 50 output tokens
    expected = (numbered(1), "sales", "hr", "apim", "chat", "gpt-4o", "eastus", 150, 128, 50, 3, True, False, Decimal("0.000715"))
    assert rows(pipeline, select) == [expected]


# --- failures


@pytest.mark.parametrize("name", ["aoai_error_400_content_filter.json", "aoai_error_429.json", "openllmetry_azure/test_chat_reasoning_1.json"])
def test_errors_of_azure_openai_are_events_without_usage(gateway, name):
    [recorded] = [answer for answer in lines("azure_answers.jsonl.gz") if answer["name"] == name]
    found = event(gateway, status=recorded["status"], answer=recorded["text"].encode())
    assert pick(found, "status", "usage", "model", "subscriptionId", "deployment") == (recorded["status"], None, None, "sales", "chat")


def test_failed_speech_and_images_are_not_charged(gateway):
    assert event(gateway, SPEECH, {"input": "hello"}, status=429, answer={"error": {}})["inputCharacters"] is None
    assert event(gateway, IMAGES, {"size": "1024x1024"}, status=400, answer={"data": [{"url": "x"}]})["imageCount"] is None


@pytest.mark.parametrize("reason", ["BackendConnectionFailure", "Timeout"])
@pytest.mark.parametrize("known", [True, False])
def test_a_backend_that_does_not_answer(gateway, reason, known):
    found = event(gateway, error=reason, **({} if known else {"noResponse": True}))
    assert pick(found, "status", "usage", "stream", "deployment", "subscriptionId") == (500, None, False if known else None, "chat", "sales")


def test_a_client_that_went_away(gateway):
    assert event(gateway, error="ClientConnectionFailure", noResponse=True)["status"] == 499


@pytest.mark.parametrize(
    ("where", "reason", "status"),
    [("before", "SubscriptionKeyNotFound", 401), ("inbound", "RateLimitExceeded", 429), ("inbound", "QuotaExceeded", 403)],
)
def test_calls_that_the_gateway_refuses(gateway, where, reason, status):
    subscription = None if where == "before" else "sales"
    call = served(gateway, fails={"in": where, "source": "x", "reason": reason, "status": status}, subscription=subscription)
    assert pick(call.event, "status", "usage", "subscriptionId", "deployment") == (status, None, subscription, "chat")
    assert (call.said["sent"], call.said["requestReads"]) == (None, 0)


def test_a_token_that_is_not_valid_is_refused_and_nobody(gateway):
    call = served(gateway, headers={"Authorization": TOKEN}, fails={"in": "nowhere"})
    assert pick(call.event, "status", "application") == (401, None)
    assert call.said["sent"] is None


def test_what_azure_openai_has_answered_counts_even_if_the_gateway_fails_then(gateway):
    found = event(gateway, fails={"in": "outbound", "source": "x", "reason": "ExpressionValueEvaluationFailure", "status": 500})
    assert pick(found, "status", "usage") == (200, ANSWER["usage"])


def test_a_call_that_fails_behind_its_event_sends_it_once(gateway):
    call = served(gateway, policy="fails_late", fails={"in": "nowhere"})
    assert len(call.said["failures"]) == 1
    assert [sent["in"] for sent in call.said["events"]] == ["outbound"]


@pytest.mark.parametrize(
    ("answer", "headers"),
    [
        (b"<html><body>502 Bad Gateway</body></html>", {"Content-Type": "text/html"}),
        (b"<html><body>502 Bad Gateway</body></html>", {}),
        (b"[]", {}),
        (b"5", {}),
        (b'"text"', {}),
        (b"null", {}),
        (b"", {}),
        (None, {}),
        (b'{"usage": ', {}),
        (b"\xff\xfe\x00{", {}),
        (b'{"usage": [1], "model": 5, "service_tier": {}, "data": {}, "output": 3}', {}),
        (b'{"usage": "none", "model": null, "data": [1, null], "output": [1, null, {"type": 5}, {}]}', {}),
        (b"{}", {"Content-Type": "application/json; charset=klingon"}),
        (b"{}", {"Content-Type": ""}),
        (b"\x1f\x8b\x08\x00", {"Content-Encoding": "gzip"}),
        (b"[" * 100_000, {}),
        (b'{"usage": {"a": "' + b"x" * 20_000 + b'"}}', {}),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
@pytest.mark.parametrize("status", [200, 502])
def test_answers_that_are_no_answers_survive(gateway, answer, headers, status):
    found = event(gateway, answer=answer, answer_headers=headers, status=status)
    assert pick(found, "status", "usage", "toolCalls", "imageCount", "subscriptionId") == (status, None, None, None, "sales")


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (None, {}),
        (b"", {}),
        (b"[]", {}),
        (b'{"stream": true', {}),
        (b"null", {}),
        (b'{"model": 5, "stream": 1, "input": {}}', {}),
        (b"\xff\xfe", {}),
        (b"{}", {"Content-Type": "application/json; charset=klingon"}),
        (b"{}", {"Content-Type": ""}),
        (b"{}", {"Content-Length": "many"}),
        (b"{}", {"Content-Length": "-5"}),
        (b"{}", {"Content-Length": "99999999999999999999"}),
        (b"{" * 100_000, {}),
        (b"<xml/>", {"Content-Type": "text/xml"}),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_requests_that_are_no_requests_survive(gateway, body, headers):
    found = event(gateway, V1, body, headers=headers)
    assert pick(found, "status", "usage", "requestedModel") == (200, ANSWER["usage"], None)


@pytest.mark.parametrize("length", ["-5", "many", "99999999999999999999"])
def test_a_length_that_is_none_is_not_sent(gateway, length):
    assert event(gateway, V1, b"<xml/>", headers={"Content-Type": "text/xml", "Content-Length": length})["requestBytes"] is None


@pytest.mark.parametrize("count", ["1e999", "-1e999", "NaN", "1" * 40, "0.1", "-5", "true"])
def test_strange_numbers_are_passed_on_as_json_and_billed_by_nobody(gateway, tmp_path, count):
    call = served(gateway, answer=f'{{"usage": {{"prompt_tokens": {count}, "completion_tokens": 1}}}}'.encode())
    pipeline = bill(tmp_path, call.bodies)
    assert rows(pipeline, "SELECT count(*) FROM enriched_usage WHERE cost IS NOT NULL") == [(0,)]


def test_names_that_clients_choose_are_cut(gateway):
    long = "x" * 100_000
    found = event(
        gateway, f"/openai/deployments/{'d' * 500}/chat/completions?api-version={'9' * 500}", {"model": long}, headers={"x-usage-tag": long}
    )
    assert [len(found[name]) for name in ("deployment", "requestedModel", "apiVersion", "clientTag")] == [128, 128, 32, 64]


# --- large bodies


def test_a_request_of_30_mb_is_not_read(gateway):
    body = json.dumps(HELLO | {"stream": True, "image": "x" * 30_000_000}).encode()
    call = served(gateway, CHAT, body, answer=b"", answer_headers=SSE)
    assert (call.said["requestReads"], call.event["requestBytes"]) == (0, len(body))
    assert call.sent == body


def test_a_request_of_unknown_length_is_not_parsed_when_it_is_large(gateway):
    body = json.dumps(HELLO | {"model": "chat", "stream": True, "image": "x" * 5_000_000}).encode()
    call = served(gateway, V1, body, headers={"Content-Length": ""}, answer=b"", answer_headers=SSE)
    assert pick(call.event, "requestBytes", "requestedModel") == (len(body), None)
    assert call.sent == body


def test_a_response_of_30_mb_gives_its_usage(gateway):
    vectors = ",".join(["[" + ",".join(["0.0123456789"] * 1536) + "]"] * 1500)
    usage = {"prompt_tokens": 9000, "total_tokens": 9000}
    for text in (
        f'{{"object": "list", "data": [{vectors}], "model": "text-embedding-3-small", "usage": {json.dumps(usage)}}}',
        f'{{"usage": {json.dumps(usage)}, "model": "text-embedding-3-small", "data": [{vectors}]}}',
    ):
        assert len(text) > 29_000_000
        started = time.monotonic()
        found = event(gateway, "/openai/deployments/embed/embeddings?api-version=2024-10-21", {"input": "x"}, answer=text.encode())
        assert pick(found, "usage", "model") == (usage, "text-embedding-3-small")
        assert time.monotonic() - started < 30


def test_a_large_response_is_searched_and_not_parsed(gateway):
    answer = RESPONSE | {"output": OUTPUT, "service_tier": "priority"}
    found = event(gateway, "/openai/v1/responses", {"model": "chat"}, answer=answer, variables={"usage-body-limit": 100})
    assert pick(found, "model", "usage", "serviceTier", "toolCalls") == ("gpt-4o-2024-08-06", RESPONSE["usage"], "priority", None)


def test_what_a_client_put_into_a_large_response_is_not_its_usage(gateway):
    fake = {"usage": {"input_tokens": 0, "output_tokens": 0}, "model": "gpt-4o-mini", "service_tier": "flex"}
    usage = RESPONSE["usage"] | {"input_tokens_details": {"cached_tokens": 4}}
    own = {"object": "response", "model": "gpt-4o-2024-08-06", "service_tier": "priority", "usage": usage}
    theirs = {
        "metadata": {"model": "gpt-4o-mini", "service_tier": "flex"},
        "tools": [{"parameters": {"properties": fake}}],
        "instructions": 'a "\\{[' * 100,
    }
    image = {"output": [{"type": "image_generation_call", "result": "A" * 4_300_000}]}
    for answer in (theirs | image | own, own | image | theirs):
        call = served(gateway, "/openai/v1/responses", {"model": "chat"}, answer=answer)
        assert pick(call.event, "model", "usage", "serviceTier") == ("gpt-4o-2024-08-06", usage, "priority")


def test_large_images_are_counted(gateway):
    images = [{"b64_json": "A" * 3_000_000, "revised_prompt": 'say "usage": {"input_tokens": 1} and "url": "x"'}] * 2
    usage = {"input_tokens": 9, "output_tokens": 8, "total_tokens": 17, "input_tokens_details": {"text_tokens": 9, "image_tokens": 0}}
    answer = {"created": 1, "data": images, "size": "1024x1024", "quality": "high", "usage": usage}
    found = event(gateway, "/openai/deployments/image/images/generations?api-version=2025-04-01-preview", {"prompt": "x"}, answer=answer)
    assert pick(found, "imageCount", "imageSize", "imageQuality", "usage") == (2, "1024x1024", "high", usage)


# --- prompts and answers

ON = {"usage-content": "true"}


@pytest.mark.parametrize("switch", [None, "false", "yes", "", False])
def test_content_stays_at_the_gateway_unless_the_switch_is_on(gateway, switch):
    call = served(gateway, variables={} if switch is None else {"usage-content": switch}, answer=ANSWER | {"choices": ["CANARY-ANSWER"]})
    assert "content" not in call.event


@pytest.mark.parametrize("switch", ["true", "True", True])
def test_content_is_sent_as_it_is(gateway, switch):
    answer = {"choices": [{"message": {"content": "CANARY-ANSWER 2024-01-01T00:00:00+02:00 \N{GRINNING FACE}"}}]}
    call = served(gateway, kept=True, variables={"usage-content": switch}, answer=ANSWER | answer)
    assert call.event["content"] == {"request": call.asked.decode(), "response": call.answered.decode()}
    assert list(call.event)[-1] == "content"


def test_content_of_streams_and_files_is_not_read(gateway):
    call = served(gateway, kept=True, variables=ON, body=STREAMED, answer=b"data: CANARY-ANSWER\n\n", answer_headers=SSE)
    assert (call.event["content"], call.said["responseReads"]) == ({"request": call.asked.decode()}, 0)
    path, body, headers, *_ = KINDS["translation"]
    assert (
        served(gateway, path, body, headers=headers, kept=True, variables=ON, answer=b"CANARY", answer_headers={"Content-Type": "text/plain"}).event[
            "content"
        ]
        == {}
    )


@pytest.mark.parametrize("text", ["x", '"', "é", "\N{GRINNING FACE}", "\x01"])
@pytest.mark.parametrize("size", [30_000, 90_000, 200_000])
def test_content_that_does_not_fit_is_left_out_whole(gateway, text, size):
    body = json.dumps({"messages": [{"content": text * size}]}, ensure_ascii=False).encode()
    answer = json.dumps(ANSWER | {"choices": [text * 30_000]}, ensure_ascii=False).encode()
    call = served(gateway, body=body, answer=answer, kept=True, variables=ON)
    assert call.event["usage"] == ANSWER["usage"]
    assert set(call.event["content"].values()) <= {body.decode(), answer.decode()}
    if size == 30_000 and text == "x":
        assert len(call.event["content"]) == 2


# --- times


@pytest.mark.parametrize("culture", ["de-DE", "en-US", "th-TH", "ar-SA", "fa-IR", "tr-TR"])
def test_events_are_the_same_in_every_culture(gateway, culture):
    capitals = served(gateway, CHAT.replace("deployments/chat/chat/completions", "DEPLOYMENTS/chat/CHAT/COMPLETIONS"), STREAMED, culture=culture)
    assert pick(capitals.event, "deployment", "usage") == ("chat", ANSWER["usage"])
    assert capitals.sent.startswith(INCLUDED)
    found = event(gateway, culture=culture, service="APIM-INTERNAL.azure-api.net", answer_headers={"x-ms-region": "West India"})
    assert pick(found, "time", "gateway", "region", "imageCount") == ("2026-10-05T12:00:00.0000000Z", "apim-internal", "westindia", None)


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_times_are_utc_wherever_the_gateway_is(folder, zone):
    running = Gateway(folder, zone)
    try:
        assert {event(running, kind=kind)["time"] for kind in ("Utc", "Local")} == {"2026-10-05T12:00:00.0000000Z"}
    finally:
        running.close()


# --- from the gateway to the bill

PRICES = """price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency,effective_from,effective_to,meter_id,source
in,gpt-4o,*,*,*,*,*,input,2.50,1000000,USD,2024-01-01,,,test
cached,gpt-4o,*,*,*,*,*,cached_input,1.25,1000000,USD,2024-01-01,,,test
out,gpt-4o,*,*,*,*,*,output,10.00,1000000,USD,2024-01-01,,,test
search,gpt-4o,*,*,*,*,*,web_search_calls,10.00,1000,USD,2024-01-01,,,test
embed,text-embedding-3-small,*,*,*,*,*,input,0.02,1000000,USD,2024-01-01,,,test
tts,tts,*,*,*,*,*,characters,15.00,1000000,USD,2024-01-01,,,test
whisper,whisper,*,*,*,*,*,audio_seconds,0.0001,1,USD,2024-01-01,,,test
dalle,dall-e-3,*,*,*,*,*,image/1024x1024/hd,8,100,USD,2024-01-01,,,test
image in,gpt-image-1,*,*,*,*,*,input,5,1000000,USD,2024-01-01,,,test
image out,gpt-image-1,*,*,*,*,*,output,40,1000000,USD,2024-01-01,,,test
image one,gpt-image-1,*,*,*,*,*,image/1536x1024/high,25,100,USD,2024-01-01,,,test
text in,gpt-35-turbo-instruct,*,*,*,*,*,input,1.50,1000000,USD,2024-01-01,,,test
text out,gpt-35-turbo-instruct,*,*,*,*,*,output,2.00,1000000,USD,2024-01-01,,,test
hear,gpt-4o-transcribe,*,*,*,*,*,audio_input,6.00,1000000,USD,2024-01-01,,,test
write,gpt-4o-transcribe,*,*,*,*,*,output,10.00,1000000,USD,2024-01-01,,,test
"""
DEPLOYMENTS = """gateway,subscription_id,product,operation,deployment,reported_model,model,model_version,deployment_sku,region,effective_from,effective_to
apim,,,,chat,,gpt-4o,2024-11-20,GlobalStandard,swedencentral,,
apim,,,,embed,,text-embedding-3-small,1,Standard,swedencentral,,
apim,,,,tts,,tts,1,Standard,swedencentral,,
apim,,,,whisper,,whisper,1,Standard,swedencentral,,
apim,,,,dalle,,dall-e-3,3.0,Standard,swedencentral,,
apim,,,,image,,gpt-image-1,1,GlobalStandard,swedencentral,,
apim,,,,transcribe,,gpt-4o-transcribe,1,GlobalStandard,swedencentral,,
"""


def test_from_the_gateway_to_the_bill(gateway, tmp_path):
    whole = [served(gateway, answer=ANSWER | {"usage": chat(1000, 200, 400)}, request_id=numbered(0))]
    for number, (path, body, headers, answer, answer_headers, _) in enumerate(KINDS.values(), 10):
        whole.append(served(gateway, path, body, headers=headers, answer=answer, answer_headers=answer_headers, request_id=numbered(number)))
    streamed = [
        served(gateway, CHAT, STREAMED, answer=b"data: [DONE]\n\n", answer_headers=SSE, request_id=numbered(1)),
        served(
            gateway, "/openai/v1/responses", {"model": "chat", "stream": True}, answer=b"event: x\n\n", answer_headers=SSE, request_id=numbered(2)
        ),
    ]
    throttled = served(gateway, CHAT, HELLO, status=429, answer={"error": {"code": "429"}}, request_id=numbered(3))
    lost = served(gateway, CHAT, HELLO, error="Timeout", noResponse=True, request_id=numbered(4))
    messages = [message for call in (*whole, *streamed, throttled, lost) for message in call.bodies]
    assert len(messages) == 5 + len(KINDS)
    counted = {0: (1000, 200), 1: (150, 50), 2: (150, 50)}
    logs = [
        record
        for n, (prompt, completion) in counted.items()
        for record in (llm_log(numbered(n), prompt=prompt, completion=completion), gateway_log(numbered(n)))
    ]
    support.reference(tmp_path / "reference", PRICES, DEPLOYMENTS)
    pipeline = bill(tmp_path, messages, [envelope(*logs)], messages[:2])
    found = rows(pipeline, "SELECT deployment, meter, sum(quantity), sum(cost) FROM daily_billing WHERE cost IS NOT NULL GROUP BY ALL ORDER BY ALL")
    assert found == [
        ("chat", "cached_input", 400, Decimal("0.0005")),
        ("chat", "input", 940, Decimal("0.00235")),
        ("chat", "output", 322, Decimal("0.00322")),
        ("chat", "web_search_calls", 2, Decimal("0.02")),
        ("chat-eu", "cached_input", 128, Decimal("0.00016")),
        ("chat-eu", "input", 22, Decimal("0.000055")),
        ("chat-eu", "output", 50, Decimal("0.0005")),
        ("dalle", "image/1024x1024/hd", 2, Decimal("0.16")),
        ("embed", "input", 8, Decimal("0.00000016")),
        ("image", "input", 9, Decimal("0.000045")),
        ("image", "output", 8, Decimal("0.00032")),
        ("text", "input", 5, Decimal("0.0000075")),
        ("text", "output", 6, Decimal("0.000012")),
        ("transcribe", "audio_input", 14, Decimal("0.000084")),
        ("transcribe", "output", 45, Decimal("0.00045")),
        ("tts", "characters", 8, Decimal("0.00012")),
        ("whisper", "audio_seconds", Decimal("3.5"), Decimal("0.00035")),
    ]
    # without a price here: what else the response called; without usage: what failed, and a transcription as plain text
    unpriced = rows(pipeline, "SELECT DISTINCT meter FROM daily_billing WHERE cost IS NULL ORDER BY 1")
    assert unpriced == [("code_interpreter_sessions",), ("file_search_calls",)]
    assert rows(pipeline, "SELECT accepted, duplicates, conflicts, no_usage FROM daily_quality") == [(16, 8, 0, 3)]
    assert rows(pipeline, "SELECT count(*) FROM quarantine") == [(0,)]
    assert rows(pipeline, "SELECT status_code, count(*) FROM enriched_usage GROUP BY 1 ORDER BY 1") == [(200, 14), (429, 1), (500, 1)]


# --- the policies as such

ELEMENTS = {
    "policies": (), "inbound": (), "backend": (), "outbound": (), "on-error": (), "fragment": (), "base": (), "choose": (), "otherwise": (),
    "when": ("condition",), "include-fragment": ("fragment-id",), "set-variable": ("name", "value"), "set-body": (), "value": (),
    "set-header": ("name", "exists-action"), "set-query-parameter": ("name", "exists-action"), "log-to-eventhub": ("logger-id",), "set-backend-service": ("backend-id",),
    "authentication-managed-identity": ("resource",), "forward-request": ("timeout", "buffer-response"),
    "validate-azure-ad-token": ("tenant-id", "output-token-variable-name"), "audiences": (), "audience": (),
}  # fmt: skip


def test_the_policies_are_well_formed_and_use_what_api_management_has():
    [logger] = re.findall(r"(?m)^var usageLoggerName = '(.+)'$", (apim.POLICIES.parent / "modules/api-management-api.bicep").read_text())
    fragments = {name for name in apim.project_policies() if name.startswith("aoai-")}
    for name, text in apim.project_policies().items():
        masked, expressions = apim.mask(text)
        root = ET.fromstring(masked)
        assert root.tag == ("fragment" if name in fragments else "policies")
        for element in root.iter():
            assert set(element.attrib) <= set(ELEMENTS[element.tag]), element.tag
            if element.tag == "include-fragment":
                assert element.attrib["fragment-id"] in fragments
                assert name not in fragments, "fragments cannot be nested"
            assert element.attrib.get("logger-id", logger) == logger
            assert name not in fragments or element.tag not in ("base", "inbound", "backend", "outbound", "on-error")
        assert len(text.encode()) < 256 * 1024
        for expression in expressions:
            # a line of an attribute may not stay a line
            comments = [token for token in apim.TOKEN.findall(expression.code) if token.startswith("//")]
            assert not (expression.attribute and comments), comments


def test_every_expression_uses_allowed_types_only(gateway):
    listed = dict(line.partition(": ")[::2] for line in (DATA / "apim_expression_types.txt").read_text().splitlines())
    context = {"Body", "Context", "Deployment", "Jwt", "LastError", "Lookups", "Message", "Named", "Request", "Response", "Url"}
    # what the compiler puts in for int?, foreach, using, lambdas and object
    implied = {"System.Nullable`1", "System.Collections.IEnumerator", "System.IDisposable", "System.Func`2", "System.Object", "Expressions"}
    uses = [use.split(" ", 1) for use in gateway.ask({"uses": True})["uses"]]
    assert ["System.Security.Cryptography.SHA256", "Create"] in uses
    for type_, member in uses:
        if type_ in context | implied:
            continue
        assert type_ in listed, type_
        name = re.sub("^[gs]et_", "", member)
        assert not listed[type_] or name in ("*", *listed[type_].split(", ")), f"{type_}.{member}"
    assert not [
        name
        for text in apim.project_policies().values()
        for _, found in [apim.mask(text)]
        for e in found
        for name in re.findall(r"\bFunc<|\bAction<|\bdynamic\b", e.code)
    ]


def test_errors_point_at_the_line_of_the_policy(tmp_path):
    compiled(tmp_path)
    text = (apim.POLICIES / "aoai-usage-event.xml").read_text()
    lines_ = text.splitlines()
    number = next(n for n, line in enumerate(lines_, 1) if "context.RequestId" in line)
    column = lines_[number - 1].index("RequestId.ToString") + 1
    with pytest.raises(apim.CompileError, match=rf"aoai-usage-event\.xml\({number},{column}\): error CS1061: .*RequestIdentity"):
        apim.compile_policies(tmp_path, {"aoai-usage-event": apim.substituted(text.replace("context.RequestId", "context.RequestIdentity", 1))})
    with pytest.raises(ET.ParseError):
        apim.compile_policies(tmp_path, {"x": "<fragment><choose></fragment>"})
    with pytest.raises(ValueError, match="line 2: the expression does not end"):
        apim.mask('<fragment>\n<set-variable name="a" value="@(1 + (2)" /></fragment>')
    with pytest.raises(KeyError, match="unknown"):
        apim.substituted('<log-to-eventhub logger-id="{{unknown}}" />')


@pytest.mark.parametrize("element", ["<forward-request />", "<cache-store />", '<set-variable name="a" value="@(new JObject())" />'])
def test_the_gateway_of_the_tests_refuses_what_api_management_would(tmp_path, element):
    policy = f"<policies><inbound>{element}</inbound><backend /><outbound /><on-error /></policies>"
    running = Gateway(compiled(tmp_path, other=policy))
    try:
        with pytest.raises(AssertionError, match="NotSupported"):
            running.call(at=NOON, policy="other")
    finally:
        running.close()


def test_the_documentation_names_every_switch():
    text = (apim.POLICIES.parent.parent / "docs/policies.md").read_text()
    policies = "".join(path.read_text() for path in apim.POLICIES.glob("*.xml"))
    for name in {*re.findall(r'"(usage-[\w-]+|x-usage-[\w-]+)"', policies), *apim.NAMED_VALUES, *(path.stem for path in apim.POLICIES.glob("*.xml"))}:
        assert (
            f"`{name}" in text or f"{{{{{name}}}}}" in text or name in ("usage-request-body", "usage-request-content", "usage-sent", "usage-request")
        ), name
