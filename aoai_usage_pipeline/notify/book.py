"""What was seen, what is open, and what each target still has to be told: one small document, saved before anything is sent.

An **occurrence** begins when something is found wrong that was not wrong before: a run failed; a check fails on a day on which it passed, or was
never evaluated; a day is held that was not; the hub's events are overdue or lost. As long as it lasts it is not told again, whatever its figures.
It ends when it has been right for an hour, and that is told once too. A failed run is an occurrence of its own and does not end; a job that fails
again and again for one reason is told at once, and then once an hour how often it failed since.
"""

import dataclasses
import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from aoai_usage_pipeline.notify.notification import Links, Notification, spans_of, without_error_text

OVERLAP = 900.0
"""Seconds that runs are looked at again after they ended: a database may show them late."""
QUIET = 3600.0
"""Seconds that something must have been right before it counts as over. What comes and goes is told once."""
GATHERED = 3600.0
"""Seconds in which further failures of a job for the same reason wait, to be told in one notification."""
LEASE = 75.0
"""Seconds after which a tick that is not heard of any more is taken for dead."""
KEPT = 7 * 86_400.0
"""Seconds that a notification waits for a target."""
LAG_EVERY = 300.0

_LISTED = 10
_LAG = {"overdue": "Capture is behind: events of the Event Hub are in no file", "lost": "Events left the Event Hub before any file had them"}


class Document(Protocol):
    """Where the book is kept between ticks and across restarts."""

    def load(self) -> str | None:
        """What was saved last, or None."""

    def save(self, text: str) -> None:
        """Replace what was saved, durably."""


class Busy(Exception):
    """Another tick has the book."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """How a check went. `days` are the days it looked at (None: all there are), `failing` those it failed on.

    A check that does not know days has none in both, and `failed` alone says it. Not `exhaustive`: it may have failed on more of `days`.
    """

    subject: str
    severity: str
    failed: bool
    days: tuple[str, ...] | None
    failing: tuple[str, ...]
    exhaustive: bool
    facts: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended, at `ended_at` (seconds since 1970). `failure` is the facts of its failure, None when it did not fail."""

    run_id: str
    job: str
    ended_at: float
    days: tuple[str, ...]
    failure: Mapping[str, str] | None
    checks: tuple[Checked, ...]


@dataclasses.dataclass
class Waiting:
    """A notification that some targets were not told yet; per target how often it was refused, and when it may be tried again."""

    payload: dict[str, Any]
    key: str
    since: float
    targets: dict[str, dict[str, float]]


@dataclasses.dataclass
class Failing:
    """A job that fails for one reason: when it was told last, and its `runs` that were not told yet, as far as a person wants to know of them."""

    job: str
    failure: dict[str, str]
    told: float | None = None
    runs: int = 0
    first: float = 0.0
    last: float = 0.0
    run_id: str = ""
    days: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _State:
    started: float
    watermark: float
    handled: dict[str, float] = dataclasses.field(default_factory=dict)
    open: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failing: dict[str, Failing] = dataclasses.field(default_factory=dict)
    waiting: list[Waiting] = dataclasses.field(default_factory=list)
    targets: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    lag_asked: float = 0.0
    owner: str = ""
    leased_until: float = 0.0


class Book:
    """The document, opened by one tick. Nothing is kept of it before `save`. `now` is in seconds since 1970."""

    def __init__(self, document: Document, owner: str, now: float, targets: Sequence[str], links: Links) -> None:
        """Open the book for the tick `owner`. The first one begins now: what ended before is not told. Raises `Busy`."""
        self._document, self._links, self._targets = document, links, list(targets)
        self.state = _load(document.load(), now)
        self._from = max(self.state.started, self.runs_since())
        if self.state.owner not in ("", owner) and now < self.state.leased_until:
            raise Busy
        self.state.owner, self.state.leased_until = owner, now + LEASE
        self.save()
        # two ticks that opened it in the same moment: the later one has it
        if _load(document.load(), now).owner != owner:
            raise Busy
        for one in self.state.waiting:
            one.targets = {name: tried for name, tried in one.targets.items() if name in targets}

    def save(self) -> None:
        self.state.waiting = [one for one in self.state.waiting if one.targets]
        self._document.save(json.dumps(dataclasses.asdict(self.state), separators=(",", ":")))

    def close(self) -> None:
        """Save, and let the next tick have it."""
        self.state.owner, self.state.leased_until = "", 0.0
        self.save()

    def runs_since(self) -> float:
        """Runs that were changed after this are to be looked at."""
        return self.state.watermark - OVERLAP

    def is_new(self, run_id: str, ended_at: float, changed_at: float) -> bool:
        """Remember a run that has ended, and whose record was changed last at `changed_at`.

        Returns False when it ended before there was a book, or so long ago that it was looked at: then only its record has changed.
        """
        new = run_id not in self.state.handled and ended_at >= self._from
        self.state.handled[run_id] = changed_at
        self.state.watermark = max(self.state.watermark, changed_at)
        self.state.handled = {run_id: changed for run_id, changed in self.state.handled.items() if changed >= self.runs_since()}
        return new

    def run_ended(self, run: Ended) -> None:
        """A run has ended: its failure, and what its checks found."""
        if run.failure is not None:
            reason = "|".join((run.job, *run.failure.values()))
            one = self.state.failing.setdefault(reason, Failing(run.job, dict(run.failure)))
            one.first = one.first if one.runs else run.ended_at
            one.runs, one.last, one.run_id, one.days = one.runs + 1, run.ended_at, run.run_id, sorted({*one.days, *run.days})
        for checked in run.checks:
            self._checked(run, checked)

    def held(self, held: Mapping[str, Mapping[dt.date, str]], now: float) -> None:
        """The days that are held now, by table, with their reasons."""
        tables = {*held, *(subject for kind, subject, _ in map(_split, self.state.open) if kind == "days_held")}
        for table in sorted(tables):
            reasons = {str(day): without_error_text(reason) for day, reason in held.get(table, {}).items()}
            new = self._begin("days_held", table, reasons, "error", _iso(now))
            self._right("days_held", table, [day for day in self._days("days_held", table) if day not in reasons], now)
            if new:
                facts = {"Table": table, "Days": spans_of(new), **{day: reasons[day] for day in new[:_LISTED]}}
                title = f"{table}: {_count(new)} held ({spans_of(new, 3)})"
                self._tell(Notification("days_held", "open", "error", table, _iso(now), _iso(now), title, tuple(new), facts), now)

    def lag_due(self, now: float) -> bool:
        """Whether the hub is to be asked again; if so, it counts as asked."""
        due = now >= self.state.lag_asked + LAG_EVERY
        self.state.lag_asked = now if due else self.state.lag_asked
        return due

    def lag(self, states: Mapping[str, Mapping[str, str]], now: float) -> None:
        """What the hub says now: facts by what is wrong (`overdue`, `lost`); nothing when all is well."""
        for state in _LAG:
            if state not in states:
                self._right("capture_lag", state, self._days("capture_lag", state), now)
            elif self._begin("capture_lag", state, [""], "error", _iso(now)):
                self._tell(Notification("capture_lag", "open", "error", state, _iso(now), _iso(now), _LAG[state], (), states[state]), now)

    def settle(self, now: float) -> int:
        """Tell which jobs failed, and what has been right for long enough; give up what a target did not take for too long, and return how many."""
        for reason, failing in list(self.state.failing.items()):
            if failing.told is None or now >= failing.told + GATHERED:
                if failing.runs:
                    self._failed(failing)
                    self.state.failing[reason] = Failing(failing.job, failing.failure, told=now)
                else:
                    del self.state.failing[reason]
        over: dict[tuple[str, str, str], list[str]] = {}
        for key, one in list(self.state.open.items()):
            if one["right"] and now >= one["right"] + QUIET:
                kind, subject, day = _split(key)
                over.setdefault((kind, subject, one["severity"]), []).append(day)
                del self.state.open[key]
        for (kind, subject, severity), days in sorted(over.items()):
            named = tuple(sorted(day for day in days if day))
            title = f"Resolved: {_name(kind, subject)}" + (f" on {spans_of(named, 3)}" if named else "")
            facts = {"Days": spans_of(named)} if named else {}
            self._tell(Notification(kind, "resolved", severity, subject, _iso(now), _iso(now), title, named, facts), now)
        waited = len(self.state.waiting)
        self.state.waiting = [one for one in self.state.waiting if one.since > now - KEPT]
        return waited - len(self.state.waiting)

    def due(self, target: str, now: float) -> Waiting | None:
        """The next notification that a target is to be told, the oldest first."""
        if now < self.state.targets.get(target, {}).get("not_before", 0.0):
            return None
        return next((one for one in self.state.waiting if target in one.targets and one.targets[target]["not_before"] <= now), None)

    def waiting_for(self, target: str) -> int:
        return sum(target in one.targets for one in self.state.waiting)

    def _failed(self, one: Failing) -> None:
        days = spans_of(one.days)
        times = {"Runs": f"{one.runs}, from {_iso(one.first)} to {_iso(one.last)}"} if one.runs > 1 else {}
        facts = {"Job": one.job, **({"Days": days} if days else {}), **times, **one.failure}
        title = f"{one.job} failed" + (f" {one.runs} times" if one.runs > 1 else "") + (f" for {days}" if days else "")
        self._tell(
            Notification("run_failed", "open", "error", one.job, one.run_id, _iso(one.last), title, tuple(one.days), facts, one.run_id), one.last
        )

    def _checked(self, run: Ended, checked: Checked) -> None:
        kind, subject = "check_failed", checked.subject
        failing = list(checked.failing) or ([""] if checked.failed else [])
        known = self._days(kind, subject)
        looked_at = known if checked.days is None else [day for day in known if day in ("", *checked.days)]
        if checked.exhaustive:
            self._right(kind, subject, [day for day in looked_at if day not in failing], run.ended_at)
        if new := self._begin(kind, subject, failing, checked.severity, run.run_id):
            days = tuple(day for day in new if day)
            asset, _, check = subject.rpartition("/")
            title = f"{asset}: {check} {'failed' if checked.severity == 'error' else 'warned'}" + (f" on {spans_of(days, 3)}" if days else "")
            facts = {"Asset": asset, "Check": check, **({"Days": spans_of(days)} if days else {}), **checked.facts}
            self._tell(
                Notification(kind, "open", checked.severity, subject, run.run_id, _iso(run.ended_at), title, days, facts, run.run_id), run.ended_at
            )

    def _begin(self, kind: str, subject: str, days: Iterable[str], severity: str, began: str) -> list[str]:
        """The days on which something is wrong are open; returns those that were not before."""
        new = []
        for day in sorted(days):
            found = self.state.open.get(_key(kind, subject, day))
            if found:
                found["right"] = None
            else:
                self.state.open[_key(kind, subject, day)] = {"severity": severity, "began": began, "right": None}
                new.append(day)
        return new

    def _right(self, kind: str, subject: str, days: Iterable[str], at: float) -> None:
        for day in days:
            found = self.state.open[_key(kind, subject, day)]
            found["right"] = found["right"] or at

    def _days(self, kind: str, subject: str) -> list[str]:
        return [day for k, s, day in map(_split, self.state.open) if (k, s) == (kind, subject)]

    def _tell(self, notification: Notification, since: float) -> None:
        waits = {target: {"refused": 0, "not_before": 0.0} for target in self._targets}
        self.state.waiting.append(Waiting(notification.payload(self._links), notification.subject, since, waits))


def _load(text: str | None, now: float) -> _State:
    if text is None:
        return _State(started=now, watermark=now)
    # what a later version added is left out after going back to this one
    data = {name: value for name, value in json.loads(text).items() if name in _State.__dataclass_fields__}
    failing = {reason: Failing(**one) for reason, one in data.get("failing", {}).items()}
    return _State(**data | {"failing": failing, "waiting": [Waiting(**one) for one in data["waiting"]]})


def _key(kind: str, subject: str, day: str) -> str:
    return f"{kind}|{subject}|{day}"


def _split(key: str) -> tuple[str, str, str]:
    kind, subject, day = key.split("|")
    return kind, subject, day


def _name(kind: str, subject: str) -> str:
    if kind == "capture_lag":
        return f"events of the Event Hub are {subject}"
    return f"held days of {subject}" if kind == "days_held" else subject.replace("/", ": ")


def _count(days: Sequence[str]) -> str:
    return "1 day is" if len(days) == 1 else f"{len(days)} days are"


def _iso(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
