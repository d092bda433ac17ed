"""What answers of Azure OpenAI say about usage: every shape of usage object, streams, and hundreds of answers recorded from live endpoints."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline.usage import answers
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import chat, rows, seed_event
from aoai_usage_pipeline_tests.test_diagnostics import NOON, bill

DATA = Path(__file__).parent / "data"
TOKENS = ("prompt_tokens", "completion_tokens")
DETAILS = ("cached_tokens", "cache_write_tokens", "reasoning_tokens", "audio_prompt_tokens", "cached_audio_tokens", "image_prompt_tokens",
           "audio_completion_tokens", "image_completion_tokens", "images", "audio_seconds")  # fmt: skip


def lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


def private_event(answer: str, key: str = "CANARY-KEY", **changes: Any) -> bytes:
    event = {"eventTime": f"{NOON:%Y-%m-%dT%H:%M:%S}.1234567Z", "apiOperation": "ChatCompletion", "appSubscriptionKey": key}
    return json.dumps(event | {"request": '{"messages": []}', "response": answer} | changes).encode()


def stream(*parts: dict[str, Any], end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + end


def usage_of(root: Path, *answers_: str) -> list[tuple[Any, ...]]:
    pipeline = bill(root, [private_event(answer) for answer in answers_])
    assert rows(pipeline, "SELECT reason FROM quarantine") == []
    return rows(pipeline, f"SELECT {', '.join(TOKENS + DETAILS)} FROM enriched_usage ORDER BY sequence_number")


SHAPES = {
    "chat": (chat(100, 40, 30) | {"completion_tokens_details": {"reasoning_tokens": 25, "audio_tokens": None}}, (100, 40), {"cached_tokens": 30, "reasoning_tokens": 25}),
    "chat without details": (chat(1, 2) | {"prompt_tokens_details": None}, (1, 2), {}),
    "responses": (
        {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}, "output_tokens": 11, "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 31},
        (20, 11),
        {"cached_tokens": 4, "cache_write_tokens": 3, "reasoning_tokens": 5},
    ),
    "embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, (8, 0), {}),
    "completions": ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, (5, 7), {}),
    "transcription in tokens": (
        {"type": "tokens", "input_tokens": 14, "input_token_details": {"audio_tokens": 10, "text_tokens": 4}, "output_tokens": 3, "total_tokens": 17},
        (14, 3),
        {"audio_prompt_tokens": 10},
    ),
    "transcription in seconds": ({"type": "duration", "seconds": 12.25}, (None, None), {"audio_seconds": 12.25}),
    "images": (
        {"input_tokens": 50, "input_tokens_details": {"image_tokens": 40, "text_tokens": 10}, "output_tokens": 1056,
         "output_tokens_details": {"image_tokens": 1056, "text_tokens": 0}, "total_tokens": 1106},
        (50, 1056),
        {"image_prompt_tokens": 40, "image_completion_tokens": 1056},
    ),
    "realtime": (
        {"total_tokens": 253, "input_tokens": 132, "output_tokens": 121,
         "input_token_details": {"text_tokens": 119, "audio_tokens": 13, "cached_tokens": 64, "cached_tokens_details": {"text_tokens": 60, "audio_tokens": 4}},
         "output_token_details": {"text_tokens": 30, "audio_tokens": 91}},
        (132, 121),
        {"cached_tokens": 64, "audio_prompt_tokens": 13, "cached_audio_tokens": 4, "audio_completion_tokens": 91},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("usage", "tokens", "details"), SHAPES.values(), ids=SHAPES)
def test_every_shape_of_usage_is_counted(tmp_path, usage, tokens, details):
    expected = (*tokens, *(details.get(name) for name in DETAILS))
    [found] = usage_of(tmp_path, json.dumps({"id": "1", "model": "m", "usage": usage}))
    assert (*found[:-1], found[-1] and float(found[-1])) == expected
    pipeline = bill(tmp_path / "seed", [seed_event("r", NOON, usage)])
    [found] = rows(pipeline, f"SELECT {', '.join(TOKENS + DETAILS)} FROM enriched_usage")
    assert (*found[:-1], found[-1] and float(found[-1])) == expected
    # every token is on exactly one meter
    billed = "SELECT sum(quantity) FROM daily_billing WHERE meter <> 'audio_seconds'"
    assert rows(pipeline, billed) == [(sum(filter(None, tokens)) or None,)]


def test_usage_that_is_not_in_tokens_is_unpriced_and_not_free(tmp_path):
    pipeline = bill(tmp_path, [seed_event("r", NOON, {"type": "duration", "seconds": 3})])
    assert rows(pipeline, "SELECT usage_source, pricing_status, cost FROM enriched_usage") == [("reported", "unpriced", None)]


@pytest.mark.parametrize(
    "usage",
    [
        chat(10, 5, 11),
        {
            "input_tokens": 10,
            "output_tokens": 1,
            "input_token_details": {"cached_tokens": 4, "audio_tokens": 9, "cached_tokens_details": {"audio_tokens": 5}},
        },
        {"input_tokens": 10, "output_tokens": 1, "input_tokens_details": {"image_tokens": 8, "audio_tokens": 3}},
        {"input_tokens": 10, "output_tokens": 1, "output_tokens_details": {"image_tokens": 2}},
    ],
    ids=["cached", "cached audio", "image and audio", "image output"],
)
def test_details_larger_than_their_parent_are_a_conflict(tmp_path, usage):
    pipeline = bill(tmp_path, [seed_event("r", NOON, usage)])
    assert [reason.partition(":")[0] for (reason,) in rows(pipeline, "SELECT reason FROM quarantine")] == ["conflict"]


@pytest.mark.parametrize("end", ["data: [DONE]\n\n", "", 'data: {"id": "1", "cho'], ids=["whole", "without its end", "cut inside an event"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_stream_reports_its_last_usage(end, newline):
    text = stream(
        {"id": "", "model": "", "choices": []},
        {"id": "1", "model": "gpt-4o", "usage": None},
        {"id": "1", "choices": [], "usage": chat(3, 4)},
        end=end,
    )
    assert json.loads(answers.read(text.replace("\n", newline))) == {"id": "1", "model": "gpt-4o", "usage": chat(3, 4)}


def test_a_stream_of_the_responses_api_reports_the_completed_response():
    response = {
        "id": "resp_1",
        "model": "gpt-4o-2024-08-06",
        "object": "response",
        "service_tier": "default",
        "usage": {"input_tokens": 5, "output_tokens": 6},
    }
    text = stream({"type": "response.created", "response": {"id": "resp_1", "usage": None}}, {"type": "response.completed", "response": response})
    assert json.loads(answers.read(text)) == response


def test_the_responses_of_a_realtime_session_are_added_up_and_repeats_are_not():
    def done(id_: str, tokens: int) -> dict[str, Any]:
        usage = {"input_tokens": tokens, "output_tokens": 1, "input_token_details": {"audio_tokens": tokens}}
        return {"type": "response.done", "response": {"id": id_, "usage": usage}}

    text = "\n".join(json.dumps(event) for event in (done("a", 3), {"type": "session.updated"}, done("b", 4), done("a", 3)))
    assert json.loads(answers.read(text))["usage"] == {"input_tokens": 7, "output_tokens": 2, "input_token_details": {"audio_tokens": 7}}


def test_a_line_of_a_batch_has_its_answer_inside():
    body = {"id": "chatcmpl-1", "model": "gpt-4o-2024-08-06", "usage": chat(3, 4)}
    line = {"id": "batch_req_1", "custom_id": "x", "response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}
    assert json.loads(answers.read(json.dumps(line))) == {"status_code": 200} | body


def test_generated_images_are_counted():
    assert json.loads(answers.read(json.dumps({"created": 1, "data": [{"url": "x"}, {"b64_json": "y"}]}))) == {"images": 2}


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "5", "no JSON", "data: ", "data: [DONE]", "{" * 5000, "[" * 200_000, '{"usage": 1e999}', '{"usage": ' + "9" * 5000 + "}"],
)
def test_what_is_no_answer_says_nothing(text):
    assert set(json.loads(answers.read(text))) <= {"usage"}


def test_recorded_answers_are_normalised(tmp_path):
    recorded = lines("azure_answers.jsonl.gz")
    found = usage_of(tmp_path, *(answer["text"] for answer in recorded))
    expected = [(prompt, 0 if prompt is not None and completion is None else completion) for prompt, completion in (a["tokens"] for a in recorded)]
    assert [row[:2] for row in found] == expected
    assert len(recorded) == 69
    assert sum(prompt is not None for prompt, _ in expected) == 41


def test_the_735_live_recordings_are_normalised(tmp_path):
    recorded = lines("azure_recordings.jsonl.gz")
    assert len(recorded) == 735

    def answer(number: int, recording: dict[str, Any]) -> str:
        whole = {"id": f"answer-{number}", "model": recording["model"], "object": "chat.completion"}
        if recording["failed"]:
            return json.dumps({"error": {"code": "BadRequest"}})
        if not recording["stream"]:
            return json.dumps(whole | {"usage": recording["usage"]})
        return stream(
            whole | {"usage": None, "choices": [{"delta": {}}]},
            *([whole | {"choices": [], "usage": recording["usage"]}] if recording["usage"] else []),
        )

    pipeline = bill(tmp_path, [private_event(answer(n, recording)) for n, recording in enumerate(recorded)])
    found = rows(
        pipeline,
        "SELECT prompt_tokens, completion_tokens, total_tokens, cached_tokens, reasoning_tokens, usage_source FROM enriched_usage ORDER BY sequence_number",
    )
    assert len(found) == 735
    for row, recording in zip(found, recorded, strict=True):
        usage = recording["usage"]
        if usage is None:
            assert row == (None,) * 6
            continue
        details, output = usage["prompt_tokens_details"] or {}, usage["completion_tokens_details"] or {}
        expected = (
            usage["prompt_tokens"],
            usage["completion_tokens"],
            usage["total_tokens"],
            details.get("cached_tokens"),
            output.get("reasoning_tokens"),
        )
        assert row == (*expected, "reported")
    assert rows(pipeline, "SELECT accepted, no_usage FROM daily_quality") == [(735, 20)]


def test_a_subscription_key_becomes_a_keyed_hash(tmp_path):
    answer = json.dumps({"usage": chat(1, 1)})
    bodies = [private_event(answer), private_event(answer), private_event(answer, "another")]
    pipelines = [bill(tmp_path / name, bodies) for name in ("a", "b")]
    ids = [rows(pipeline, "SELECT DISTINCT subscription_id, count(*) FROM enriched_usage GROUP BY 1 ORDER BY 2") for pipeline in pipelines]
    assert [[count for _, count in found] for found in ids] == [[1, 2], [1, 2]]
    assert not {name for name, _ in ids[0]} & {name for name, _ in ids[1]}, "each lake has a key of its own"
    shared = [bill_with_key(tmp_path / name, bodies, "secret") for name in ("c", "d")]
    assert shared[0] == shared[1]


def bill_with_key(root: Path, bodies: list[bytes], key: str) -> list[tuple[Any, ...]]:
    pipeline = support.installation(root, hash_key=key)
    events = [support.Captured(body, NOON, number) for number, body in enumerate(bodies)]
    support.put(root / "capture", support.blob_name(NOON), support.capture_file(events))
    support.run_all(pipeline, NOON.date(), NOON.date())
    return rows(pipeline, "SELECT DISTINCT subscription_id FROM enriched_usage ORDER BY 1")


def test_enterprise_azureai_records_and_events(tmp_path):
    record = {
        "TimeGenerated": f"{NOON:%Y-%m-%dT%H:%M:%SZ}",
        "Consumer": "HR prod",
        "Model": "gpt-4o",
        "ObjectType": "chat.completion",
        "InputTokens": 150,
        "OutputTokens": 50,
        "TotalTokens": 200,
    }
    event = {
        "timestamp": support.culture(NOON),
        "appId": "app",
        "appSubscriptionKey": "CANARY-KEY",
        "promptTokens": "null",
        "responseTokens": "null",
        "totalTokens": "null",
    }
    pipeline = bill(
        tmp_path,
        [
            json.dumps([record, record]).encode(),
            json.dumps(event).encode(),
            json.dumps(event | {"promptTokens": "3", "responseTokens": "4"}).encode(),
        ],
    )
    select = "SELECT contract, coalesce(application, subscription_id), prompt_tokens, completion_tokens FROM enriched_usage ORDER BY sequence_number, record_index"
    assert rows(pipeline, select) == [
        ("enterprise_azureai", "HR prod", 150, 50),
        ("enterprise_azureai", "HR prod", 150, 50),
        ("enterprise_azureai_event", "app", None, None),
        ("enterprise_azureai_event", "app", 3, 4),
    ]
