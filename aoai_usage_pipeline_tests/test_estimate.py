"""Usage that nobody reported, estimated from the text when asked to, and marked as an estimate."""

import json
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline.usage.estimate import estimate
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import Captured, chat, rows, seed_event
from aoai_usage_pipeline_tests.test_answers import private_event, stream
from aoai_usage_pipeline_tests.test_diagnostics import NOON

MESSAGES = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": [{"type": "text", "text": "Hello world, how are you?"}]}]
REQUEST = json.dumps({"messages": MESSAGES, "stream": True})
# "You are terse." has 4 tokens and "Hello world, how are you?" 7, in both encodings; 4 frame each message and 3 the answer
PROMPT = 4 + 7 + 2 * 4 + 3
SAID = stream(*({"model": "gpt-4o", "choices": [{"delta": {"content": word}}]} for word in ("I", " am", " fine", ".")))


def counts(request: str, response: str, model: str = "gpt-4o") -> tuple[int, int] | None:
    found = estimate(request, response, model)
    return found and (json.loads(found)["prompt_tokens"], json.loads(found)["completion_tokens"])


@pytest.mark.parametrize("model", ["gpt-4o-2024-11-20", "gpt-4.1", "gpt-5-mini", "o3", "gpt-4-0613", "gpt-35-turbo", "", "unheard-of"])
def test_a_stream_without_usage_is_counted(model):
    assert counts(REQUEST, SAID, model) == (PROMPT, 4)


def test_half_an_emoji_is_counted_as_something():
    assert counts(REQUEST, stream({"choices": [{"delta": {"content": "fine \ud83d"}}]})) is not None


def test_an_aborted_stream_is_counted_as_far_as_it_went():
    assert counts(REQUEST, SAID[: SAID.index(" fine")]) == (PROMPT, 2)


def test_a_request_that_a_content_filter_refused_costs_its_prompt():
    assert counts(REQUEST, json.dumps({"error": {"code": "content_filter", "status": 400}})) == (PROMPT, 0)


@pytest.mark.parametrize("response", ["", "null", "[]", json.dumps({"error": {"code": "429"}}), "no JSON", "[" * 100_000])
def test_without_an_answer_nothing_is_guessed(response):
    assert counts(REQUEST, response) is None


@pytest.mark.parametrize("request_", ["", "null", "no JSON", "[" * 100_000, '{"messages": 5}', '{"input": "Hello world, how are you?"}'])
def test_whatever_the_request_is_the_answer_is_counted(request_):
    found = counts(request_, SAID)
    assert found and found[1] == 4


def bill(root: Path, *bodies: bytes, **settings: Any) -> list[tuple[Any, ...]]:
    pipeline = support.installation(root, **settings)
    events = [Captured(body, NOON, number) for number, body in enumerate(bodies)]
    support.put(root / "capture", support.blob_name(NOON), support.capture_file(events))
    support.run_all(pipeline, NOON.date(), NOON.date())
    assert rows(pipeline, "SELECT reason FROM quarantine") == []
    assert b"terse" not in b"".join(path.read_bytes() for path in (root / "lake").rglob("*") if path.is_file())
    return rows(pipeline, "SELECT usage_source, prompt_tokens, completion_tokens, pricing_status FROM enriched_usage ORDER BY sequence_number")


def test_estimates_are_made_only_when_asked_for_and_only_where_nothing_was_reported(tmp_path):
    answer = [{"index": 0, "message": {"role": "assistant", "content": "I am fine."}}]
    bodies = [
        private_event(SAID, request=REQUEST),
        private_event(stream({"model": "gpt-4o", "choices": [], "usage": chat(9, 9)}), request=REQUEST),
        seed_event("a", NOON, None, Prompt=MESSAGES, Response=answer),
        seed_event("b", NOON, None, Prompt=MESSAGES, Response=None),
        seed_event("c", NOON, chat(1, 1), Prompt=MESSAGES, Response=answer),
    ]
    off = bill(tmp_path / "off", *bodies)
    assert [row[:3] for row in off] == [(None, None, None), ("reported", 9, 9), (None, None, None), (None, None, None), ("reported", 1, 1)]
    on = bill(tmp_path / "on", *bodies, estimate_usage="on")
    assert [row[:3] for row in on] == [
        ("estimated", PROMPT, 4),
        ("reported", 9, 9),
        ("estimated", PROMPT, 4),
        (None, None, None),
        ("reported", 1, 1),
    ]


def test_a_reported_copy_wins_over_an_estimate_and_is_no_conflict(tmp_path):
    answer = [{"message": {"content": "I am fine."}}]
    bodies = [seed_event("a", NOON, None, Prompt=MESSAGES, Response=answer), seed_event("a", NOON, chat(30, 5))]
    assert bill(tmp_path, *bodies, estimate_usage="on") == [("reported", 30, 5, "priced")]


def test_the_daily_tables_say_what_is_estimated(tmp_path):
    bill(tmp_path, seed_event("a", NOON, None, Prompt=MESSAGES, Response=[{"message": {"content": "I am fine."}}]), estimate_usage="on")
    pipeline = support.installation(tmp_path)
    assert rows(pipeline, "SELECT estimated, coverage FROM daily_quality") == [(1, 0)]
    assert rows(pipeline, "SELECT DISTINCT usage_source FROM daily_billing") == [("estimated",)]


def test_the_switch_is_on_or_off():
    assert Settings.from_env({"AOAI_ESTIMATE_USAGE": "on"}).estimate_usage == "on"
    with pytest.raises(SettingsError, match="AOAI_ESTIMATE_USAGE is 'maybe'"):
        Settings.from_env({"AOAI_ESTIMATE_USAGE": "maybe"})
