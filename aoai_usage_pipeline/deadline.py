"""How long something may take."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def within(seconds: float, action: Callable[[], _T]) -> _T:
    """What an action gives or raises, or `TimeoutError` when that takes longer.

    SDKs and the sign-in have limits for their parts only, so the thread that does it is not waited for any longer.
    """
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
