"""Usage that nobody reported, estimated from the text when asked to, and marked as an estimate."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from aoai_usage_pipeline.settings import Settings, SettingsError
from aoai_usage_pipeline.usage.estimate import estimate
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import Captured, chat, rows, seed_event
from aoai_usage_pipeline_tests.test_answers import private_event, stream
from aoai_usage_pipeline_tests.test_diagnostics import NOON, envelope, gateway_log, llm_log
from aoai_usage_pipeline_tests.test_events import v2_event

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


# --- contract v2's content


CHAT_ANSWER = {"id": "1", "model": "gpt-4o", "choices": [{"message": {"role": "assistant", "content": "I am fine."}}]}


def test_the_content_of_a_v2_event_is_counted_where_its_usage_is_missing(tmp_path):
    forms = list(itertools.product([json.loads(REQUEST), REQUEST], [CHAT_ANSWER, json.dumps(CHAT_ANSWER), SAID]))
    content = [{"request": request, "response": response} for request, response in forms]
    bodies = [v2_event(f"r{n}", None, content=value) for n, value in enumerate(content)] + [v2_event("b", chat(9, 9), content=content[0])]
    assert {row[:3] for row in bill(tmp_path / "off", *bodies)} == {(None, None, None), ("reported", 9, 9)}
    found = bill(tmp_path / "on", *bodies, estimate_usage="on")
    assert [row[:3] for row in found] == [*[("estimated", PROMPT, 4)] * len(forms), ("reported", 9, 9)]


def test_a_v2_event_without_a_whole_answer_stays_without_usage(tmp_path):
    answers = [{}, {"response": None}, {"response": ""}, {"response": {"error": {"code": "429"}}}]
    contents = [None, {}, *({"request": REQUEST} | answer for answer in answers)]
    long = {"request": json.loads(REQUEST), "response": CHAT_ANSWER | {"more": "x" * 250_000}}
    cut = v2_event("cut", None, content=long)[:204_800]
    assert b"I am fine." in cut
    bodies = [*(v2_event(f"r{n}", None, content=content) for n, content in enumerate(contents)), cut]
    assert bill(tmp_path, *bodies, estimate_usage="on") == [(None, None, None, "no_usage")] * len(bodies)


def test_where_images_were_reported_no_tokens_are_estimated(tmp_path):
    content = {"request": {"prompt": "a cat"}, "response": {"data": [{"url": "https://x"}]}}
    bodies = [v2_event("a", None, imageCount=1, content=content), private_event(json.dumps(content["response"]), request='{"prompt": "a cat"}')]
    assert bill(tmp_path, *bodies, estimate_usage="on") == [("reported", None, None, "unpriced")] * 2


# --- messages in API Management's diagnostics


SPOKEN = {"requestMessages": json.dumps(MESSAGES), "responseMessages": json.dumps([{"role": "assistant", "content": "I am fine."}])}
ESTIMATE, NOTHING = [("estimated", PROMPT, 4, "priced")], [(None, None, None, "no_usage")]


def said(call: str = "c1", prompt: int | None = None, completion: int | None = None, **changes: Any) -> dict[str, Any]:
    return llm_log(call, prompt=prompt, completion=completion, **SPOKEN | changes)


def pieces(text: str, count: int) -> list[str]:
    size = -(-len(text) // count)
    return [text[at : at + size] for at in range(0, len(text), size)]


def split(call: str, requests: int, responses: int, **changes: Any) -> list[dict[str, Any]]:
    """A call whose request and answer are so long that each is split over records."""
    parts = [("requestMessages", part) for part in pieces(SPOKEN["requestMessages"], requests)]
    parts += [("responseMessages", part) for part in pieces(SPOKEN["responseMessages"], responses)]
    empty = {"requestMessages": "", "responseMessages": ""}
    return [said(call, **empty | {name: part, "sequenceNumber": n} | changes) for n, (name, part) in enumerate(parts)]


def test_a_record_whose_messages_are_whole_is_counted_where_it_reports_nothing(tmp_path):
    records = [
        said("no counts"),
        said("zero", prompt=0, completion=0),
        said("zero as double and text", promptTokens=0.0, completionTokens="0", totalTokens=None),
        said("messages as JSON", requestMessages=MESSAGES, responseMessages={"role": "assistant", "content": "I am fine."}),
        said("properties as text") | {"properties": json.dumps(said()["properties"])},
    ]
    bodies = [*map(envelope, records), json.dumps(said("alone")).encode(), json.dumps([said("in an array")]).encode()]
    assert bill(tmp_path / "on", *bodies, estimate_usage="on") == ESTIMATE * len(bodies)
    assert bill(tmp_path / "off", *bodies) == NOTHING * len(bodies)


def test_messages_that_are_not_whole_are_not_counted(tmp_path):
    broken = [None, "[]", "null", 5, "[" * 100_000]
    changes = [{name: value} for name, whole in SPOKEN.items() for value in (*broken, whole[:-3])]
    bodies = [envelope(said(f"c{n}", **change)) for n, change in enumerate(changes)]
    assert bill(tmp_path, *bodies, estimate_usage="on") == NOTHING * len(bodies)


def test_messages_split_over_records_of_an_envelope_are_joined_and_counted_once(tmp_path):
    orders = list(itertools.permutations(range(4)))
    calls = [split(f"c{n}", 2, 2) for n in range(len(orders))]
    first, second = ([calls[c][order[place]] for c, order in enumerate(orders) for place in places] for places in ((0, 1), (2, 3)))
    # the records of the calls are mixed, and one was delivered twice
    found = bill(tmp_path, envelope(*first, gateway_log("c1"), *second, first[0]), estimate_usage="on")
    assert found == ESTIMATE * len(orders)
    pipeline = support.installation(tmp_path)
    records = 4 * len(orders) + 2
    assert rows(pipeline, "SELECT parsed, accepted, duplicates, estimated FROM daily_quality") == [
        (records, len(orders), records - len(orders), len(orders))
    ]
    assert rows(pipeline, "SELECT sum(quantity) FROM daily_billing") == [(len(orders) * (PROMPT + 4),)]


def test_messages_with_a_piece_missing_or_elsewhere_are_not_counted(tmp_path):
    # without its middle the text still is JSON
    long = json.dumps([{"role": "user", "content": "x" * 90}])
    gap = [said("c1", requestMessages=part, sequenceNumber=n, responseMessages=SPOKEN["responseMessages"]) for n, part in enumerate(pieces(long, 3))]
    two = split("c2", 2, 1)
    assert bill(tmp_path, envelope(gap[0], gap[2]), envelope(*two[:2]), envelope(two[2]), estimate_usage="on") == NOTHING * 2


def test_records_without_an_id_are_not_joined(tmp_path):
    records = [record | {"correlationId": None} for record in split("", 1, 1)]
    assert bill(tmp_path, envelope(*records), estimate_usage="on") == NOTHING * 2


def test_a_count_from_any_other_copy_wins_over_the_messages(tmp_path):
    reported = llm_log("c1", prompt=30, completion=5)
    bodies = [
        *(envelope(said("c1")), envelope(reported)),
        envelope(said("c2"), reported | {"correlationId": "c2"}),
        *(envelope(said("c3")), v2_event("c3", chat(30, 5))),
    ]
    assert bill(tmp_path, *bodies, estimate_usage="on") == [("reported", 30, 5, "priced")] * 3


def test_the_switch_is_on_or_off():
    assert Settings.from_env({"AOAI_ESTIMATE_USAGE": "on"}).estimate_usage == "on"
    with pytest.raises(SettingsError, match="AOAI_ESTIMATE_USAGE is 'maybe'"):
        Settings.from_env({"AOAI_ESTIMATE_USAGE": "maybe"})
