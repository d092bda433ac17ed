"""The Function App beside the pipeline: it receives notifications for Teams and e-mail, and tells Dagster about new capture files.

Its settings are in `infra/modules/functions.bicep`, what it promises in `docs/notifications.md`.
"""

import datetime as dt
import functools
import hmac
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import azure.functions as func
from azure.core import MatchConditions
from azure.core.exceptions import ResourceExistsError, ResourceModifiedError, ResourceNotFoundError
from azure.identity import DefaultAzureCredential
from azure.storage.blob import ContainerClient

SCHEMA = "aoai-usage-notification/1"
CLAIMED_SECONDS = 60.0
"""A delivery that was begun this long ago and not finished is taken for dead."""
ATTEMPTS, PAUSE_SECONDS, TIMEOUT_SECONDS = 2, 1.0, 3.0
LOOK_SECONDS, WAIT_SECONDS = 20.0, 25.0
"""Event Grid waits 30 seconds for an answer. A look that takes longer goes on; `functionTimeout` in host.json is beyond all of it."""

app = func.FunctionApp()
logging.getLogger("azure").setLevel(logging.WARNING)


class Refused(Exception):
    """The channel does not want this message."""


class Failed(Exception):
    """The channel did not take the message now. Names no address: those of webhooks are secrets."""


# --- notifications -------------------------------------------------------------------------------------------------------------------


@app.function_name("notifications")
@app.route(route="notifications", methods=["POST"], auth_level=func.AuthLevel.ANONYMOUS)
def notifications(req: func.HttpRequest) -> func.HttpResponse:
    """Post a notification of the pipeline to Teams and send it by e-mail, each once however often it is delivered.

    200: every channel has it. 400: it is no notification, or a channel refuses it. 401: the key is wrong. 503: try again.
    """
    key = os.environ.get("RECEIVER_KEY", "")
    given = req.params.get("code") or req.headers.get("x-functions-key") or ""
    if not key or not hmac.compare_digest(given.encode(), key.encode()):
        return _answer(401, error="the key is wrong or not set")
    try:
        payload = req.get_json()
        if payload["schema"] != SCHEMA:
            return _answer(400, error=f"schema is {payload['schema']!r}: expected {SCHEMA!r}")
        identity = payload["id"]
        if not re.fullmatch("[0-9a-f]{32}", identity):
            raise ValueError
        messages = {"teams": _teams_message(payload), "mail": _mail(payload)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return _answer(400, error="not a notification")
    channels = {name: send for name, send in _channels().items() if send}
    if not channels:
        return _answer(503, error="neither TEAMS_WEBHOOK_URL nor MAIL_ENDPOINT and MAIL_TO are set")
    results = {name: _once(f"{identity}/{name}", functools.partial(send, messages[name])) for name, send in channels.items()}
    status = 400 if "refused" in results.values() else 503 if "failed" in results.values() else 200
    logging.info("notification %s (%s, %s): %s", identity, payload.get("kind"), payload.get("state"), results)
    return _answer(status, id=identity, **results)


def _answer(status: int, **body: str) -> func.HttpResponse:
    return func.HttpResponse(json.dumps(body), status_code=status, mimetype="application/json")


def _teams_message(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": payload["type"], "attachments": payload["attachments"]}


def _mail(payload: Mapping[str, Any]) -> dict[str, Any]:
    recipients = [address.strip() for address in os.environ.get("MAIL_TO", "").split(",") if address.strip()]
    return {
        "senderAddress": os.environ.get("MAIL_FROM", ""),
        "recipients": {"to": [{"address": address} for address in recipients]},
        "content": {"subject": f"[{payload['severity']}] {payload['title']}", "plainText": payload["text"]},
    }


def _channels() -> dict[str, Callable[[Mapping[str, Any]], None] | None]:
    teams, mail = os.environ.get("TEAMS_WEBHOOK_URL"), os.environ.get("MAIL_ENDPOINT")
    return {
        "teams": functools.partial(_deliver, teams, {}) if teams else None,
        "mail": (lambda message: _deliver(f"{mail}/emails:send?api-version=2023-03-31", _bearer("https://communication.azure.com"), message))
        if mail and os.environ.get("MAIL_TO")
        else None,
    }


def _deliver(url: str, headers: Mapping[str, str], message: Mapping[str, Any]) -> None:
    """POST the message, a second time if the first one fails for another reason than a rate limit. Raises `Refused` and `Failed`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _post(url, headers, message, TIMEOUT_SECONDS)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (400, 413, 415, 422):
                raise Refused(f"status {error.code}") from None
            problem = f"status {error.code}"
            if error.code == 429:
                break  # whatever is asked now counts against the limit
        except (OSError, http.client.HTTPException) as error:
            problem = type(error).__name__
        if attempt < ATTEMPTS:
            time.sleep(PAUSE_SECONDS)
    raise Failed(problem)


def _once(name: str, send: Callable[[], None]) -> str:
    """`sent`, `already`, `refused` or `failed`.

    A blob says that a delivery has begun, and then that it is done. Whoever creates it sends; the others, on whichever instance, do not.
    """
    blob = _container().get_blob_client(name)
    try:
        etag = blob.upload_blob(b"", overwrite=False, metadata={"state": "begun"})["etag"]
    except ResourceExistsError:
        try:
            found = blob.get_blob_properties()
            if found.metadata.get("state") == "done":
                return "already"
            if (dt.datetime.now(dt.UTC) - found.last_modified).total_seconds() < CLAIMED_SECONDS:
                return "failed"
            begun = blob.set_blob_metadata({"state": "begun"}, etag=found.etag, match_condition=MatchConditions.IfNotModified)
            etag = begun["etag"]
        except (ResourceModifiedError, ResourceNotFoundError):
            return "failed"  # another instance was quicker
    try:
        send()
    except Exception as error:
        said = str(error) if isinstance(error, Refused | Failed) else type(error).__name__
        logging.warning("%s: %s", name, said)
        blob.delete_blob(etag=etag, match_condition=MatchConditions.IfNotModified)
        return "refused" if isinstance(error, Refused) else "failed"
    blob.set_blob_metadata({"state": "done"})
    return "sent"


# --- capture files -------------------------------------------------------------------------------------------------------------------

_looking = threading.Lock()
_last_look = 0.0

_SENSOR = """query Sensor($sensor: SensorSelector!) {
  sensorOrError(sensorSelector: $sensor) {
    __typename
    ... on Sensor { sensorState { status typeSpecificData { ... on SensorData { lastCursor } } } }
  }
}"""
_EVALUATE = """mutation Evaluate($sensor: SensorSelector!, $cursor: String) {
  sensorDryRun(selectorData: $sensor, cursor: $cursor) {
    __typename
    ... on DryRunInstigationTick { evaluationResult { error { message } runRequests { jobName tags { key value } } } }
  }
}"""
_LAUNCH = """mutation Launch($job: JobOrPipelineSelector!, $tags: [ExecutionTag!]) {
  launchRun(executionParams: {selector: $job, runConfigData: {}, executionMetadata: {tags: $tags}}) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
  }
}"""


@app.function_name("capture_file_created")
@app.event_grid_trigger(arg_name="event")
def capture_file_created(event: func.EventGridEvent) -> None:
    """Have the sensor `capture_files` evaluated at once, and launch what it asks for.

    What is new is decided by the sensor alone: days that a run is working on are not asked for again, so the files of a burst share a run.
    Raises when Dagster gives no answer: Event Grid tries again for some minutes, and the sensor looks every minute anyway.
    """
    global _last_look
    if not os.environ.get("DAGSTER_URL"):
        logging.info("DAGSTER_URL is not set: the file waits for the sensor")
        return
    came = time.monotonic()
    if not _looking.acquire(timeout=WAIT_SECONDS):
        raise TimeoutError("another look takes too long")
    try:
        if _last_look >= came:
            logging.info("event %s: a look that began after it came has seen its file", event.id)
            return
        began = time.monotonic()
        launched = _look(event.id)
        _last_look = began
        logging.info("event %s: launched %s", event.id, launched or "nothing")
    finally:
        _looking.release()


def _look(event_id: str) -> list[str]:
    """Evaluate the sensor as it stands; returns the ids of the runs that were launched."""
    location = {"repositoryName": "__repository__", "repositoryLocationName": os.environ.get("DAGSTER_LOCATION", "aoai_usage_pipeline")}
    sensor = location | {"sensorName": "capture_files"}
    found = _ask(_SENSOR, "sensorOrError", "Sensor", sensor=sensor)["sensorState"]
    if found["status"] != "RUNNING":
        logging.info("the sensor capture_files is stopped: nothing is launched")
        return []
    cursor = (found["typeSpecificData"] or {}).get("lastCursor")
    result = _ask(_EVALUATE, "sensorDryRun", "DryRunInstigationTick", sensor=sensor, cursor=cursor)["evaluationResult"]
    if result["error"]:
        raise RuntimeError(f"the sensor failed: {result['error']['message']}")
    launched = []
    for request in result["runRequests"] or []:
        # the sensor ingests, and bills a minute later; one run does both. What else it asks for can wait for it
        if request["jobName"] == "ingest":
            tags = [*request["tags"], {"key": "capture_event", "value": event_id}]
            run = _ask(_LAUNCH, "launchRun", "LaunchRunSuccess", job=location | {"jobName": "daily_run"}, tags=tags)["run"]
            launched.append(run["runId"])
    return launched


def _ask(query: str, field: str, expected: str, **variables: Any) -> dict[str, Any]:
    """One field of the GraphQL API. Raises what the network raises, and `RuntimeError` for any other answer than the expected one."""
    audience = os.environ.get("DAGSTER_AUDIENCE")
    headers = _bearer(audience) if audience else {}
    url = f"{os.environ['DAGSTER_URL'].rstrip('/')}/graphql"
    answer = json.loads(_post(url, headers, {"query": query, "variables": variables}, LOOK_SECONDS))
    if answer.get("errors"):
        raise RuntimeError(f"Dagster answered: {answer['errors'][0]['message']}")
    value = answer["data"][field]
    if value["__typename"] != expected:
        raise RuntimeError(f"Dagster answered with {value['__typename']}")
    return value


# --- both ----------------------------------------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A sign-in page is no answer."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _post(url: str, headers: Mapping[str, str], body: Mapping[str, Any], timeout: float) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST")  # noqa: S310 - settings of the deployment
    with _opener.open(request, timeout=timeout) as response:
        return response.read()


def _bearer(audience: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {_credential().get_token(f'{audience}/.default').token}"}


@functools.cache
def _credential() -> Any:
    return DefaultAzureCredential()


@functools.cache
def _container() -> ContainerClient:
    return ContainerClient.from_container_url(os.environ["SEEN_CONTAINER_URL"], credential=_credential())
