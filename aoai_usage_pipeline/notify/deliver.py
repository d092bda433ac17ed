"""Telling each target what waits for it: apart from the others, in order, a bounded number at a time, and no longer than a tick may last."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from aoai_usage_pipeline.notify.book import Book
from aoai_usage_pipeline.notify.targets import Refused, Target, Unreachable

PER_TICK = 20
"""Notifications that a target gets in one tick: one that was away for a day is not flooded."""
MAX_REFUSALS = 8
"""A notification that was refused this often, over two hours, is given up."""

_FIRST_WAIT, _LONGEST_WAIT = 60.0, 900.0
_LONGEST_ASKED = 3600.0


@dataclasses.dataclass
class Delivered:
    """What became of a target in a tick. `given_up` are ids of notifications that it refused for good."""

    told: int = 0
    problem: str | None = None
    given_up: list[str] = dataclasses.field(default_factory=list)


def deliver(book: Book, targets: Sequence[Target], seconds: float, clock: Callable[[], float]) -> dict[str, Delivered]:
    """Tell the targets what is due, for at most so many seconds.

    Each result is saved before the next notification is sent, so a tick that is killed repeats one at the most, with the same id.
    """
    lock, over = threading.Lock(), threading.Event()
    results = {target.name: Delivered() for target in targets}
    threads = [threading.Thread(target=_tell, args=(book, target, results[target.name], lock, over, clock), daemon=True) for target in targets]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    with lock:
        over.set()  # what a thread hears from now on is too late, and counts as not heard
        for target, thread in zip(targets, threads, strict=True):
            if thread.is_alive():
                _leave_alone(book, target, results[target.name], Unreachable(f"no answer within {seconds:.0f} seconds"), clock())
    return results


def _tell(book: Book, target: Target, result: Delivered, lock: threading.Lock, over: threading.Event, clock: Callable[[], float]) -> None:
    with target.open() as send:
        for _ in range(PER_TICK):
            with lock:
                waiting = None if over.is_set() else book.due(target.name, clock())
            if waiting is None:
                return
            failure: Exception | None = None
            try:
                send(waiting.payload, waiting.key)
            except (Refused, Unreachable) as error:
                failure = error
            except Exception as error:  # whatever a library raises, the others go on; its text may name the address
                failure = Unreachable(type(error).__name__)
            with lock:
                if over.is_set():
                    return
                if isinstance(failure, Unreachable):
                    _leave_alone(book, target, result, failure, clock())
                    return
                _record(book, target, result, waiting, failure, clock())


def _record(book: Book, target: Target, result: Delivered, waiting: Any, refusal: Exception | None, now: float) -> None:
    book.state.targets.pop(target.name, None)  # it answers
    tried = waiting.targets[target.name]
    if refusal is None:
        result.told += 1
        del waiting.targets[target.name]
    else:
        result.problem = str(refusal)
        tried["refused"] += 1
        tried["not_before"] = now + _FIRST_WAIT * 2 ** (tried["refused"] - 1)
        if tried["refused"] >= MAX_REFUSALS:
            result.given_up.append(waiting.payload["id"])
            del waiting.targets[target.name]
    book.save()


def _leave_alone(book: Book, target: Target, result: Delivered, failure: Unreachable, now: float) -> None:
    failures = book.state.targets.get(target.name, {}).get("failures", 0) + 1
    wait = max(min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT), min(failure.wait, _LONGEST_ASKED))
    book.state.targets[target.name] = {"failures": failures, "not_before": now + wait}
    result.problem = str(failure)
    book.save()
