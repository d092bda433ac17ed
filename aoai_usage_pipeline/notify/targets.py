"""The two kinds of target: a webhook, and an Event Hub. What they say of an attempt never has the webhook's address in it, which is a secret."""

import contextlib
import email.utils
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from aoai_usage_pipeline.notify.notification import slack_message, teams_message
from aoai_usage_pipeline.storage import StorageError

if TYPE_CHECKING:
    from aoai_usage_pipeline.hub.client import EventHub

_TIMEOUT = 15.0
_SLACK = ("hooks.slack.com", "hooks.slack-gov.com")
_ACCEPTED_BEFORE = 409
_REFUSED = (400, 413, 415, 422)


class Refused(Exception):
    """The target does not want this very notification."""


class Unreachable(Exception):
    """The target takes nothing now. `wait` is what it asked to be left alone for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Target(Protocol):
    """Something that can be told."""

    name: str

    def open(self) -> contextlib.AbstractContextManager[Callable[[Mapping[str, Any], str], None]]:
        """For as long as the context lasts, a function that sends a payload; notifications of one key keep their order. It raises `Refused` and
        `Unreachable`.
        """


class Webhook:
    """POSTs the payload with its id as `Idempotency-Key`. Slack's host gets what Slack takes; all others the payload and a Teams message."""

    name = "webhook"

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_slack = urllib.parse.urlsplit(url).hostname in _SLACK

    @contextlib.contextmanager
    def open(self) -> Any:
        opener = urllib.request.build_opener(_NoRedirect)

        def send(payload: Mapping[str, Any], _: str) -> None:
            body = slack_message(payload) if self._is_slack else {**payload, **teams_message(payload)}
            headers = {"Content-Type": "application/json; charset=utf-8", "Idempotency-Key": payload["id"], "User-Agent": "aoai-usage-pipeline"}
            request = urllib.request.Request(self._url, json.dumps(body, ensure_ascii=False).encode(), headers, method="POST")  # noqa: S310 - see settings
            # the library's errors name the address or parts of it; only what is known to be harmless goes on
            try:
                with opener.open(request, timeout=_TIMEOUT):
                    return
            except urllib.error.HTTPError as error:
                status, wait = error.code, _retry_after(error.headers.get("Retry-After"))
                error.close()
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
                raise Unreachable(type(reason).__name__) from None
            if status in _REFUSED:
                raise Refused(f"status {status}")
            if status != _ACCEPTED_BEFORE:
                raise Unreachable(f"status {status}", wait)

        yield send


class EventHubTarget:
    """Sends the payload as one event: `message_id` is the notification's id, its subject is the partition key."""

    name = "event hub"

    def __init__(self, hub: "EventHub") -> None:
        self._hub = hub

    @contextlib.contextmanager
    def open(self) -> Any:
        with contextlib.ExitStack() as stack:
            publish: Any = None

            def send(payload: Mapping[str, Any], key: str) -> None:
                nonlocal publish
                properties = {name: payload[name] for name in ("schema", "kind", "state", "severity")}
                try:
                    publish = publish or stack.enter_context(self._hub.publishing())
                    publish(json.dumps(payload, ensure_ascii=False).encode(), key, payload["id"], properties)
                except (StorageError, OSError) as error:
                    raise Unreachable(str(error).splitlines()[0] if isinstance(error, StorageError) else type(error).__name__) from None

            yield send


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the payload to somebody nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _retry_after(text: str | None) -> float:
    if not text:
        return 0.0
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
