"""What an answer of Azure OpenAI says about usage: one JSON object, a whole stream of server-sent events, or a line of a batch's output.

Only finds the usage object and what names it; what the object's counts mean is decided where all usage objects are read.
"""

import json
from collections.abc import Iterator
from typing import Any

TOOLS = {"web_search_call": "web_search_calls", "file_search_call": "file_search_calls", "code_interpreter_call": "code_interpreter_sessions"}
"""The items of an answer's output that are calls of tools billed by use, and the columns that count them."""

SHAPE = json.dumps(
    dict.fromkeys(("id", "model", "object", "service_tier", "usage", "images", "image_kind", "status_code", *TOOLS.values()), "VARCHAR")
)
"""The JSON object that `read` gives; every part may be absent."""

DECODER = json.JSONDecoder(parse_float=str, parse_constant=str)
"""Reads JSON without making a float of anything."""

_WRAPPED = {"response.done", "response.completed", "response.incomplete", "response.failed"}


def read(text: str) -> str:
    """The parts of an answer that `SHAPE` names, as JSON; an empty object when the text is not an answer."""
    try:
        return json.dumps(_read(text))
    except RecursionError:
        return "{}"


def _read(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    usages: dict[str, Any] = {}
    for part in parts(text):
        kind = part.get("type")
        if isinstance(part.get("response"), dict) and (kind in _WRAPPED or "custom_id" in part):
            part = part["response"]
        if isinstance(part.get("body"), dict):
            part = {"status_code": part.get("status_code")} | part["body"]
        for name in ("id", "model", "object", "service_tier", "status_code"):
            # the first chunk of a stream may have blanks, and the last word on the service tier is the billed one
            if part.get(name) not in (None, "") and (name not in found or name == "service_tier"):
                found[name] = part[name]
        if part.get("usage") is not None:
            # a stream's usage is its last one; a realtime session reports each of its responses
            usages[str(part.get("id")) if kind == "response.done" else ""] = part["usage"]
        if isinstance(part.get("data"), list) and any(isinstance(item, dict) and item.keys() & {"b64_json", "url"} for item in part["data"]):
            found["images"] = len(part["data"])
            if isinstance(part.get("size"), str):
                found["image_kind"] = "/".join(str(part[name]) for name in ("size", "quality") if part.get(name))
        if isinstance(part.get("output"), list):
            found |= _tool_calls(part["output"])
    if usages:
        found["usage"] = _sum(list(usages.values())) if len(usages) > 1 else next(iter(usages.values()))
    return found


def _tool_calls(output: list[Any]) -> dict[str, int]:
    """How often the built-in tools that are billed by use were called; the code interpreter's calls in one container are one session."""
    calls: dict[str, set[str]] = {}
    for place, item in enumerate(output):
        if isinstance(item, dict) and item.get("type") in TOOLS:
            once = item.get("container_id") if item["type"] == "code_interpreter_call" else None
            calls.setdefault(TOOLS[item["type"]], set()).add(str(once or item.get("id") or place))
    return {name: len(ids) for name, ids in calls.items()}


def parts(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of an answer: itself, the items of an array, the data of a stream's events or the lines of a file."""
    try:
        whole = DECODER.decode(text)
    except (ValueError, RecursionError):
        for line in text.splitlines():
            data = line.strip().removeprefix("data:").strip()
            if data.startswith("{"):
                try:
                    part = DECODER.decode(data)
                except (ValueError, RecursionError):
                    continue  # a stream that was cut off ends inside an event
                yield part
        return
    yield from (part for part in (whole if isinstance(whole, list) else [whole]) if isinstance(part, dict))


def _sum(usages: list[Any]) -> Any:
    """Usage objects added up, count by count. Anything that cannot be added is kept, so that reading the counts fails on it."""
    if all(isinstance(usage, dict) for usage in usages):
        names = dict.fromkeys(name for usage in usages for name in usage)
        return {name: _sum([usage[name] for usage in usages if usage.get(name) is not None]) for name in names}
    if all(isinstance(usage, int) and not isinstance(usage, bool) for usage in usages):
        return sum(usages) if usages else None
    return usages[0] if all(usage == usages[0] for usage in usages) else json.dumps(usages)
