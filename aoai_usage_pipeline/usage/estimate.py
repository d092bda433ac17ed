"""Token counts for calls that Azure OpenAI bills but whose usage nobody reported, from their text; the text is looked at here and not kept.

Uses `bpe-openai`, which brings the ranks of OpenAI's tokenizers with it (the extra `estimate`). An estimate is only ever marked as one.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aoai_usage_pipeline.usage import answers

if TYPE_CHECKING:
    from bpe_openai import Encoding

_PER_MESSAGE, _PER_ANSWER = 4, 3
"""Tokens that frame a chat message (its role included) and the answer, as OpenAI documents them."""

_OLDER = re.compile(r"gpt-?(?:4(?![.o])|35|3\.5)|text-embedding")


def estimate(request: str | None, response: str | None, model: str | None) -> str | None:
    """A usage object as JSON for a call's request and answer (JSON text, or a stream); None where there is no answer to count.

    Without an answer nobody knows whether the call was billed at all, except when a content filter refused the request.
    """
    try:
        found = _estimate(request or "", response or "", model or "")
    except RecursionError:
        return None
    return found and json.dumps(found)


def _estimate(request: str, response: str, model: str) -> dict[str, int] | None:
    parts = list(answers.parts(response))
    filtered = any(isinstance(part.get("error"), dict) and part["error"].get("code") == "content_filter" for part in parts)
    if not filtered and not any(part.keys() & {"choices", "output", "message", "delta", "data"} for part in parts):
        return None
    encoding = _encoding("cl100k_base" if _OLDER.match(model) else "o200k_base")
    messages = _messages(request)
    prompt = sum(_PER_MESSAGE + _count(encoding, _texts(message)) for message in messages) + _PER_ANSWER
    completion = 0 if filtered else _count(encoding, "".join(_answer(part) for part in parts))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _messages(request: str) -> list[Any]:
    for part in answers.parts(request):
        for name in ("messages", "input", "prompt"):
            if part.get(name):
                return part[name] if isinstance(part[name], list) else [part[name]]
    # the seed policy sends the messages alone
    return list(answers.parts(request))


def _texts(value: Any) -> str:
    """The text of a message: its content, the texts of its parts, the arguments of its calls."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_texts, value))
    if isinstance(value, dict):
        return "".join(_texts(value.get(name)) for name in ("content", "text", "arguments", "function", "tool_calls", "name"))
    return ""


def _answer(part: dict[str, Any]) -> str:
    """The text of an answer or of a piece of a stream."""
    choices = part.get("choices") or [part]
    return "".join(_texts(choice.get(name)) for choice in _dicts(choices) for name in ("message", "delta", "text", "output"))


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    return (value for value in (values if isinstance(values, list) else []) if isinstance(value, dict))


def _count(encoding: "Encoding", text: str) -> int:
    # half a surrogate pair, which cut-off emoji leave behind, is no text
    return len(encoding.encode_ordinary(text.encode(errors="replace").decode())) if text else 0


@functools.cache
def _encoding(name: str) -> "Encoding":
    from bpe_openai import get_encoding

    return get_encoding(name)
