"""Bodies that hold several records: Azure Monitor's `{"records": […]}` envelope, and plain arrays of records.

Each record becomes a body of its own. A diagnostics record is flattened on the way: names in lower case, `properties` (an object, or the
JSON text of one) merged in, prompts and answers left behind. Names it has and nobody knows stay without their values, to be reported as new.
Everything else keeps its text.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from aoai_usage_pipeline.usage import answers
from aoai_usage_pipeline.usage.contract import Contract, contracts
from aoai_usage_pipeline.usage.estimate import estimate

_ARRAY = re.compile(r'\s*(?:\[|\{\s*"records"\s*:\s*\[)', re.IGNORECASE)
_SINGLE = re.compile(rb'"category(?:_s)?"\s*:\s*"(?:GatewayLlmLogs|GatewayLogs|RequestResponse)"', re.IGNORECASE)
_HEAD_BYTES = 4096
_CATEGORIES = {"gatewayllmlogs": "llm_log", "gatewaylogs": "gateway_log", "requestresponse": "request_response"}
_LLM_PATH = re.compile(r"/(?:openai|deployments|completions|responses|embeddings|images|audio|realtime)(?:/|$)", re.IGNORECASE)
_DEPLOYMENT = re.compile(r"/deployments/([^/?]+)", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"([0-9]{1,18})(?:\.0*)?")
_FLAT_BEGINNINGS = (b'{"Su', b'{"id', b'{"sc', b'{"ev')
_TYPE_SUFFIXES = ("_s", "_d", "_b", "_g", "_t")
_COMMON = frozenset(
    (
        "time", "timegenerated", "category", "type", "properties", "resourceid", "_resourceid", "resource", "resourcegroup", "resourceprovider",
        "resourcetype", "subscriptionid", "_subscriptionid", "tenantid", "tenant", "location", "region", "servicename", "sku", "deploymentversion",
        "operationname", "operationversion", "correlationid", "resulttype", "resultsignature", "resultdescription", "durationms", "isrequestsuccess",
        "calleripaddress", "identity", "level", "event", "truncated", "sourcesystem", "_billedsize", "_isbillable",
    )
)  # fmt: skip
"""What diagnostics of any category may have, in Azure Monitor's common schema, in a Log Analytics table or beside the properties."""
_CONTENT = ("requestmessages", "responsemessages", "requestbody", "responsebody", "backendrequestbody", "backendresponsebody")

Names = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Envelopes:
    """Opens bodies. With `estimated`, the usage of calls that report none is made of their messages; with `kept`, prompts and answers stay."""

    estimated: bool
    kept: bool

    def opens(self, beginning: bytes) -> bool:
        """Whether a body that begins with these four bytes may hold several records; saves looking at the others."""
        return beginning not in _FLAT_BEGINNINGS

    def open_body(self, body: bytes) -> list[bytes] | None:
        """The records of an envelope as bodies of their own, never none; None for any other body.

        What follows a record that cannot be read is one more body, so that it is quarantined and not lost.
        """
        try:
            text = body.decode()
        except UnicodeDecodeError:
            return None
        start = _ARRAY.match(text)
        if not start and not _SINGLE.search(body[:_HEAD_BYTES]):
            return None
        opened: list[Names | str] = []
        calls: dict[str, list[tuple[Names, Names]]] = {}
        for record, part in _records(text, start.end()) if start else _single(text):
            kind, names, news = _named(record)
            if not kind:
                opened.append(part)
                continue
            flat = self._flat(kind, names) | news
            if self.estimated and kind == "llm_log":
                # a record without an id is a call of its own
                calls.setdefault(str(names.get("correlationid") or f"#{len(opened)}"), []).append((names, flat))
            opened.append(flat)
        for call in calls.values():
            call[0][1]["estimate"] = _estimate([names for names, _ in call])
        bodies = [part.encode() if isinstance(part, str) else json.dumps(part).encode() for part in opened]
        return bodies or ([body] if start else None)

    def _flat(self, kind: str, names: Names) -> Names:
        """A diagnostics record as a flat body."""
        declared = _declared(kind)
        flat = {name: value for name, value in names.items() if name in declared and not isinstance(value, dict | list)}
        if kind == "gateway_log":
            path = str(names.get("backendurl") or names.get("url") or "").partition("?")[0]
            flat["llm"] = bool(_LLM_PATH.search(path))
            if deployment := _DEPLOYMENT.search(path):
                flat["deploymentname"] = deployment.group(1)
            response = names.get("backendresponsebody") or names.get("responsebody")
            flat["answer"] = json.loads(answers.read(response)) if isinstance(response, str) else None
        if self.kept:
            flat |= {name: names[name] for name in _CONTENT if name in names}
        flat["azure_monitor"] = kind
        return flat


def _records(text: str, at: int) -> Iterator[tuple[Any, str]]:
    """The records of an array that begins at a place, each with its text; the last one is None with the rest where that cannot be read."""
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        try:
            record, end = answers.DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield None, text[at:]
            return
        yield record, text[at:end]
        at = end


def _single(text: str) -> Iterator[tuple[Any, str]]:
    """The record that a body is, unless it cannot be read."""
    try:
        yield answers.DECODER.decode(text), text
    except (ValueError, RecursionError):
        return


def _named(record: Any) -> tuple[str | None, Names, Names]:
    """Which diagnostics a record is, everything it says by name, its properties included, and the names that nobody knows, without values;
    None for any other record.
    """
    if not isinstance(record, dict):
        return None, {}, {}
    names = {name.lower(): value for name, value in record.items()}
    kind = _CATEGORIES.get(str(names.get("category", names.get("category_s", names.get("type", "")))).lower())
    if not kind:
        return None, {}, {}
    properties = names.get("properties", names.get("properties_s"))
    if isinstance(properties, str):
        try:
            properties = answers.DECODER.decode(properties)
        except (ValueError, RecursionError):
            properties = None
    if isinstance(properties, dict):
        names |= {name.lower(): value for name, value in properties.items()}
    news = names.keys() - _known(kind)
    return kind, names, _plain(names, kind, sorted(news)) if news else {}


def _plain(names: Names, kind: str, news: list[str]) -> Names:
    """Give names as the documentation has them to what the table AzureDiagnostics renamed: it puts a column's type behind its name, and makes
    numbers doubles. Returns the names that stay unknown, without values.
    """
    unknown: Names = {}
    for name in news:
        plain, suffix = name[:-2], name[-2:]
        if suffix not in _TYPE_SUFFIXES or plain not in _known(kind):
            unknown[name] = None
            continue
        value = names[name]
        if suffix == "_d" and isinstance(value, str) and (number := _WHOLE_NUMBER.fullmatch(value)):
            value = number.group(1)
        names.setdefault(plain, value)
    return unknown


def _estimate(call: list[Names]) -> str | None:
    """The usage of a call, as JSON, from the messages in its records; None where it was reported or the messages are not whole."""
    # "0", "0.0" and nothing at all are no count
    if any(str(names.get(count) or "").strip("0. ") for names in call for count in ("prompttokens", "completiontokens")):
        return None
    prompt, answer = _messages(call, "requestmessages"), _messages(call, "responsemessages")
    if not prompt or not answer:
        return None
    model = next((str(names["modelname"]) for names in call if names.get("modelname")), None)
    return estimate(json.dumps({"messages": prompt}), json.dumps({"choices": [{"message": message} for message in answer]}), model)


def _messages(call: list[Names], name: str) -> list[Any]:
    """The messages of a call, joined in the order of their records; none where one of the records is missing."""
    parts: dict[int, Any] = {}
    for names in call:
        if names.get(name):
            number = _WHOLE_NUMBER.fullmatch(str(names.get("sequencenumber")))
            parts.setdefault(int(number.group(1)) if number else 0, names[name])
    # text with a gap in it may well be JSON
    if not parts or max(parts) - min(parts) >= len(parts):
        return []
    found = parts[min(parts)]
    if isinstance(found, str):
        try:
            found = answers.DECODER.decode("".join(parts[number] for number in sorted(parts)))
        except (TypeError, ValueError, RecursionError):
            return []
    elif len(parts) > 1:
        return []
    return found if isinstance(found, list) else [found] if isinstance(found, dict | str) else []


def _contract(kind: str) -> Contract:
    return next(contract for contract in contracts() if f'"{kind}"' in contract.markers)


@functools.cache
def _declared(kind: str) -> frozenset[str]:
    """The fields that the contract of a kind of diagnostics reads."""
    return frozenset(_contract(kind).shape)


@functools.cache
def _known(kind: str) -> frozenset[str]:
    """The names that are no news in a kind of diagnostics."""
    contract = _contract(kind)
    return _COMMON.union(contract.shape, contract.texts, contract.ignores)
