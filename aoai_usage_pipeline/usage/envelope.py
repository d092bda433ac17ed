"""Bodies that hold several records: Azure Monitor's `{"records": […]}` envelope, and plain arrays of records.

Each record becomes a body of its own. A diagnostics record is flattened on the way: names in lower case, `properties` (an object, or the
JSON text of one) merged in, prompts and answers left behind. Everything else keeps its text.
"""

import functools
import json
import re
from typing import Any

from aoai_usage_pipeline.usage import answers
from aoai_usage_pipeline.usage.contract import contracts

_ARRAY = re.compile(r'\s*(?:\[|\{\s*"records"\s*:\s*\[)', re.IGNORECASE)
_SINGLE = re.compile(rb'"category"\s*:\s*"(?:GatewayLlmLogs|GatewayLogs|RequestResponse)"', re.IGNORECASE)
_HEAD_BYTES = 4096
_CATEGORIES = {"gatewayllmlogs": "llm_log", "gatewaylogs": "gateway_log", "requestresponse": "request_response"}
_LLM_PATH = re.compile(r"/(?:openai|deployments|completions|responses|embeddings|images|audio|realtime)(?:/|$)", re.IGNORECASE)
_DEPLOYMENT = re.compile(r"/deployments/([^/?]+)", re.IGNORECASE)
_FLAT_BEGINNINGS = (b'{"Su', b'{"id', b'{"sc', b'{"ev')


def opens(beginning: bytes) -> bool:
    """Whether a body that begins with these four bytes may hold several records; saves looking at the others."""
    return beginning not in _FLAT_BEGINNINGS


def open_body(body: bytes) -> list[bytes] | None:
    """The records of an envelope as bodies of their own, never none; None for any other body.

    What follows a record that cannot be read is one more body, so that it is quarantined and not lost.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    start = _ARRAY.match(text)
    if not start:
        if _SINGLE.search(body[:_HEAD_BYTES]):
            try:
                record = answers.DECODER.decode(text)
            except (ValueError, RecursionError):
                return None
            return [_flat(record, text)]
        return None
    found: list[bytes] = []
    at = start.end()
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            break
        try:
            record, end = answers.DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            found.append(text[at:].encode())
            break
        found.append(_flat(record, text[at:end]))
        at = end
    return found or [body]


def _flat(record: Any, text: str) -> bytes:
    """A diagnostics record as a flat body; any other record as it is."""
    if not isinstance(record, dict):
        return text.encode()
    names = _lower(record)
    kind = _CATEGORIES.get(str(names.get("category", names.get("type", ""))).lower())
    if not kind:
        return text.encode()
    properties = names.get("properties")
    if isinstance(properties, str):
        try:
            properties = answers.DECODER.decode(properties)
        except (ValueError, RecursionError):
            properties = {}
    names |= _lower(properties) if isinstance(properties, dict) else {}
    flat = {name: value for name, value in names.items() if name in _declared(kind) and not isinstance(value, dict | list)}
    if kind == "gateway_log":
        path = str(names.get("backendurl") or names.get("url") or "").partition("?")[0]
        flat["llm"] = bool(_LLM_PATH.search(path))
        if deployment := _DEPLOYMENT.search(path):
            flat["deploymentname"] = deployment.group(1)
        response = names.get("backendresponsebody") or names.get("responsebody")
        flat["answer"] = json.loads(answers.read(response)) if isinstance(response, str) else None
    return json.dumps(flat | {"azure_monitor": kind}).encode()


@functools.cache
def _declared(kind: str) -> frozenset[str]:
    """The fields that the contract of a kind of diagnostics reads."""
    return frozenset(field for contract in contracts() if f'"{kind}"' in contract.markers for field in contract.shape)


def _lower(record: dict[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in record.items()}
