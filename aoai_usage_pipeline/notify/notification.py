"""One notification: its JSON as `notification.schema.json` describes it, and what Teams and Slack make of it."""

import dataclasses
import datetime as dt
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aoai_usage_pipeline.dates import spans

SCHEMA = "aoai-usage-notification/1"
_FACT = 500
_FACTS = 20
_ANCHORS = {"run_failed": "run-failed", "days_held": "held-days", "capture_lag": "capture-lag"}
_COLOURS = {"error": "attention", "warning": "warning"}


@dataclasses.dataclass(frozen=True, slots=True)
class Links:
    """Where people find more: the base URL of the Dagster UI, and the runbook, whose sections are named by anchors."""

    ui: str | None = None
    runbook: str = "docs/runbook.md"

    def of(self, kind: str, subject: str, run_id: str | None) -> dict[str, str]:
        """The links of a notification by what they lead to: `run`, `asset`, `check`, `runbook`."""
        asset, _, check = subject.rpartition("/") if kind == "check_failed" else (subject, "", "")
        links = {}
        if self.ui and run_id:
            links["run"] = f"{self.ui}/runs/{run_id}"
        if self.ui and kind in ("check_failed", "days_held"):
            links["asset"] = f"{self.ui}/assets/{asset}"
        if self.ui and kind == "check_failed":
            links["check"] = f"{self.ui}/assets/{asset}?view=checks&checkDetail={check}"
        return links | {"runbook": f"{self.runbook}#{_ANCHORS.get(kind, check)}"}


@dataclasses.dataclass(frozen=True, slots=True)
class Notification:
    """Something that happened, or (`state` is `resolved`) that is over.

    `kind` is `run_failed`, `days_held`, `check_failed` or `capture_lag`; `subject` is what it is about: a job, a table, `asset/check`, or a state
    of the Event Hub. `began` names the occurrence: a run id, or the time it was first seen. `time` is ISO 8601 in UTC.
    """

    kind: str
    state: str
    severity: str
    subject: str
    began: str
    time: str
    title: str
    days: tuple[str, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    run_id: str | None = None

    @property
    def id(self) -> str:
        """The same for the same occurrence, whoever makes it, whenever."""
        parts = (self.kind, self.state, self.subject, self.began, *self.days)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def payload(self, links: Links) -> dict[str, Any]:
        """The JSON that goes to every target."""
        found = links.of(self.kind, self.subject, self.run_id)
        facts = [{"name": name, "value": _short(value)} for name, value in list(self.facts.items())[:_FACTS]]
        text = [self.title, *(f"{fact['name']}: {fact['value']}" for fact in facts), *(f"{name}: {link}" for name, link in found.items())]
        return {
            "schema": SCHEMA,
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "severity": self.severity,
            "time": self.time,
            "subject": self.subject,
            "title": self.title,
            "text": "\n".join(text),
            "days": list(self.days),
            "facts": facts,
            "runId": self.run_id,
            "links": found,
        }


def teams_message(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What a Teams workflow posts: a message with one Adaptive Card."""
    colour = "good" if payload["state"] == "resolved" else _COLOURS[payload["severity"]]
    facts = [{"title": _plain(fact["name"]), "value": _plain(fact["value"])} for fact in payload["facts"]]
    links = payload["links"].items()
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": [
            {"type": "TextBlock", "text": _plain(payload["title"]), "weight": "Bolder", "size": "Medium", "wrap": True, "color": colour},
            {"type": "FactSet", "facts": [*facts, *({"title": name, "value": _plain(link)} for name, link in links if not _is_address(link))]},
        ],
        "actions": [{"type": "Action.OpenUrl", "title": f"Open {name}", "url": link} for name, link in links if _is_address(link)],
    }
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None, "content": card}
    return {"type": "message", "attachments": [attachment]}


def slack_message(payload: Mapping[str, Any]) -> dict[str, str]:
    """What a Slack incoming webhook takes."""
    lines = [f"*{_escaped(payload['title'])}*", *(f"{_escaped(f['name'])}: {_escaped(f['value'])}" for f in payload["facts"])]
    links = [f"<{link}|{name}>" if _is_address(link) else _escaped(f"{name}: {link}") for name, link in payload["links"].items()]
    return {"text": "\n".join([*lines, " · ".join(links)])}


def without_error_text(reason: str) -> str:
    """The first line of a reason; of one that is an exception only its type, because its text may quote anything."""
    line = (reason.splitlines() or [""])[0]
    found = re.match(r"([A-Z]\w+): ", line)
    return found[1] if found else line


def spans_of(days: Sequence[str], shown: int = 8) -> str:
    """Days for a person: ranges abbreviated, and how many more there are after the first few."""
    ranges = list(spans(map(dt.date.fromisoformat, days)))
    said = [f"{first}" if first == last else f"{first} to {last}" for first, last in ranges[:shown]]
    more = sum((last - first).days + 1 for first, last in ranges[shown:])
    return ", ".join(said) + (f" and {more} more" if more else "")


def _short(text: str) -> str:
    return text if len(text) <= _FACT else text[: _FACT - 1] + "…"


def _is_address(link: str) -> bool:
    return link.startswith(("http://", "https://"))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    # the names of checks have underscores, which cards read as markdown
    return text.replace("_", "\\_")
