"""A small Cosmos DB for NoSQL for tests and local work: the protocol that azure-cosmos speaks over HTTP, everything in memory.

It has databases, containers with hierarchical partition keys over several physical partitions, point operations, transactional batches, ETags,
TTL, signatures of the account key, and the queries `SELECT * | VALUE COUNT(1) | c.a, c.b FROM c [WHERE c.a = @b AND …]`. What Cosmos DB refuses
it refuses too; what it does not know it refuses as well. It was written from what the SDK sends, so it proves our code against the SDK only.

    python -m aoai_usage_pipeline_tests.cosmos_server --port 8081 [-- command with AOAI_COSMOS_ENDPOINT and AOAI_COSMOS_KEY set]
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any

from azure.cosmos.partition_key import PartitionKey

# the key that every emulator has, published in Microsoft's documentation
KEY = "C2y6yDjf5/R+ob0N8A7Cgv30VRDJIWEHLM+4QDU5DE2nQ9nDuVTqobD4b8mGGyPMbIZnqyMsEcaGQy67XIw/Jw=="
MAX_OPERATIONS, MAX_BYTES, MAX_PAGE_BYTES, MAX_CURSORS = 100, 2 * 1024 * 1024, 4 * 1024 * 1024, 100
BOUNDARIES = ["", "0AAAAAAA", "15555555", "20000000", "2AAAAAAA", "35555555", "FF"]
_CONDITION = re.compile(r"c\.(\w+)\s*(=|<=|>=|<|>)\s*(@\w+)")
_QUERY = re.compile(r"SELECT\s+(\*|VALUE\s+COUNT\(1\)|c\.\w+(?:\s*,\s*c\.\w+)*)\s+FROM\s+c(?:\s+WHERE\s+(.+))?", re.I | re.S)
_NEEDS_PLAN = re.compile(r"\b(GROUP\s+BY|ORDER\s+BY|DISTINCT|TOP|OFFSET|SUM|COUNT|AVG|MIN|MAX)\b", re.I)
_COMPARE = {
    "=": lambda a, b: a == b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, substatus: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.substatus = status, message, substatus


@dataclasses.dataclass(frozen=True)
class Request:
    """What a fault is decided by: the number of the request since the start, and its kind: account, database, container, pkranges, query,
    batch or document."""

    number: int
    kind: str
    operations: int


Fault = int | tuple[int, int] | str | None
"""Instead of an answer: a status, or status and substatus; `cut`, the connection ends before anything is done; `lose`, after it was done. None: no fault."""


class Container:
    """Documents by logical partition and id: what they say, and the same as JSON."""

    def __init__(self, properties: dict[str, Any], ranges: int) -> None:
        self.properties = properties
        self.paths = [path.strip("/") for path in properties["partitionKey"]["paths"]]
        self.documents: dict[tuple[Any, ...], dict[str, tuple[dict[str, Any], str]]] = {}
        bounds = [*BOUNDARIES[:ranges], "FF"]
        self.ranges = [{"id": str(n), "minInclusive": low, "maxExclusive": high} for n, (low, high) in enumerate(itertools.pairwise(bounds))]

    def range_of(self, key: tuple[Any, ...]) -> str:
        """The physical partition of a logical one."""
        hashed = _hashed(key, self.properties["partitionKey"]["kind"])
        return next(r["id"] for r in self.ranges if r["minInclusive"] <= hashed < r["maxExclusive"])


@functools.lru_cache(100_000)
def _hashed(key: tuple[Any, ...], kind: str) -> str:
    return str(PartitionKey._get_hashed_partition_key_string(list(key), kind))


class CosmosServer:
    """The server on a port of 127.0.0.1. `fault` is asked before each request; `requests` and `written` count what came and what was changed."""

    def __init__(self, port: int = 0, key: str = KEY, ranges: int = 3) -> None:
        self._key, self._ranges = base64.b64decode(key), ranges
        self.fault: Callable[[Request], Fault] = lambda request: None
        self.clock: Callable[[], float] = time.time
        self.requests, self.written = 0, 0
        self.databases: dict[str, dict[str, Container]] = {}
        self._cursors: collections.OrderedDict[str, tuple[list[Any], int]] = collections.OrderedDict()
        self._lock, self._etags = threading.RLock(), itertools.count(1)
        handler = type("Handler", (_Handler,), {"server_": self})
        self._http = _HTTPServer(("127.0.0.1", port), handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "CosmosServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def documents(self, container: str, database: str = "aoai-usage") -> list[dict[str, Any]]:
        """What a container holds, for tests to look at and to tamper with."""
        with self._lock:
            return [document for of in self.databases[database][container].documents.values() for document, _ in of.values()]

    def tamper(self, container: str, document_id: str, database: str = "aoai-usage", **changes: Any) -> None:
        """Change a document behind everybody's back, ETag included."""
        with self._lock:
            for of in self.databases[database][container].documents.values():
                if document_id in of:
                    self._store(of, of[document_id][0] | changes)

    # --- what the handler calls ---

    def authorize(self, verb: str, path: str, headers: Any) -> None:
        segments = [urllib.parse.unquote(segment) for segment in path.strip("/").split("/") if segment]
        whole = len(segments) % 2 == 0
        kind, link = (segments[-2] if whole else segments[-1]) if segments else "", "/".join(segments if whole else segments[:-1])
        text = f"{verb.lower()}\n{kind}\n{link}\n{headers.get('x-ms-date', '').lower()}\n\n"
        expected = base64.b64encode(hmac.new(self._key, text.encode(), hashlib.sha256).digest()).decode()
        given = urllib.parse.unquote(headers.get("Authorization", ""))
        if not hmac.compare_digest(given.encode(), f"type=master&ver=1.0&sig={expected}".encode()):
            raise Refused(401, "The input authorization token can't serve the request.")

    def handle(self, verb: str, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to an authorized request."""
        segments = [urllib.parse.unquote(segment) for segment in path.strip("/").split("/") if segment]
        data = json.loads(body) if body else None
        with self._lock:
            match verb, segments:
                case "GET", []:
                    return 200, {}, _json(self._account())
                case "POST", ["dbs"]:
                    if data["id"] in self.databases:
                        raise Refused(409, "Resource with specified id already exists.")
                    self.databases[data["id"]] = {}
                    return 201, {}, _json(_resource(data))
                case "GET", ["dbs", database]:
                    self._database(database)
                    return 200, {}, _json(_resource({"id": database}))
                case "POST", ["dbs", database, "colls"]:
                    return self._create_container(self._database(database), data, headers)
                case "GET", ["dbs", database, "colls", name]:
                    return 200, {}, _json(self._container(database, name).properties)
                case "DELETE", ["dbs", database, "colls", name]:
                    self._container(database, name)
                    del self.databases[database][name]
                    return 204, {}, b""
                case "GET", ["dbs", database, "colls", name, "pkranges"]:
                    container = self._container(database, name)
                    if headers.get("If-None-Match"):
                        return 304, {"etag": '"1"'}, b""
                    return 200, {"etag": '"1"'}, _json({"_rid": container.properties["_rid"], "PartitionKeyRanges": container.ranges})
                case "POST", ["dbs", database, "colls", name, "docs"]:
                    container = self._container(database, name)
                    if headers.get("x-ms-cosmos-is-batch-request"):
                        return self._batch(container, headers, data, len(body))
                    if headers.get("x-ms-documentdb-isquery") or headers.get("x-ms-cosmos-is-query-plan-request"):
                        return self._query(container, headers, data)
                    verb = "Upsert" if headers.get("x-ms-documentdb-is-upsert", "").lower() == "true" else "Create"
                    return self._single(container, headers, {"operationType": verb, "resourceBody": data}, len(body))
                case "GET" | "PUT" | "DELETE", ["dbs", database, "colls", name, "docs", document_id]:
                    operation = {"operationType": {"GET": "Read", "PUT": "Replace", "DELETE": "Delete"}[verb], "id": document_id}
                    operation |= {"resourceBody": data, "ifMatch": headers.get("If-Match")}
                    return self._single(self._container(database, name), headers, operation, len(body))
        raise Refused(405, f"{verb} {path} is not known to this server")

    def _account(self) -> dict[str, Any]:
        location = [{"name": "local", "databaseAccountEndpoint": self.endpoint}]
        return {
            "id": "local", "_rid": "local", "writableLocations": location, "readableLocations": location,
            "userConsistencyPolicy": {"defaultConsistencyLevel": "Session"}, "enableMultipleWriteLocations": False,
        }  # fmt: skip

    def _database(self, database: str) -> dict[str, Container]:
        if database not in self.databases:
            raise Refused(404, "Owner resource does not exist")
        return self.databases[database]

    def _container(self, database: str, name: str) -> Container:
        if name not in self._database(database):
            raise Refused(404, "Owner resource does not exist", 1003)
        return self.databases[database][name]

    def _create_container(self, database: dict[str, Container], data: dict[str, Any], headers: Any) -> tuple[int, dict[str, str], bytes]:
        if data["id"] in database:
            raise Refused(409, "Resource with specified id already exists.")
        paths = data["partitionKey"]["paths"]
        if not 1 <= len(paths) <= 3 or (len(paths) > 1) != (data["partitionKey"].get("kind") == "MultiHash"):
            raise Refused(400, "The partition key definition is not valid.")
        properties = _resource(data) | {"offer": headers.get("x-ms-cosmos-offer-autopilot-settings")}
        database[data["id"]] = Container(properties, self._ranges)
        return 201, {}, _json(properties)

    # --- documents ---

    def _partition(self, container: Container, headers: Any) -> tuple[Any, ...]:
        key = tuple(json.loads(headers.get("x-ms-documentdb-partitionkey") or "[]"))
        if len(key) != len(container.paths):
            raise Refused(400, "PartitionKey extracted from document doesn't match the one specified in the header", 1001)
        return key

    def _single(self, container: Container, headers: Any, operation: dict[str, Any], size: int) -> tuple[int, dict[str, str], bytes]:
        key = self._partition(container, headers)
        if size > MAX_BYTES:
            raise Refused(413, "Request size is too large")
        of = self._alive(container, key)
        status, document = self._apply(container, of, key, operation)
        container.documents[key] = of
        self.written += operation["operationType"] != "Read"
        etag = {"etag": document["_etag"]} if document else {}
        return status, {"x-ms-request-charge": "1" if operation["operationType"] == "Read" else "6.5", **etag}, _json(document) if document else b""

    def _batch(self, container: Container, headers: Any, operations: list[dict[str, Any]], size: int) -> tuple[int, dict[str, str], bytes]:
        key = self._partition(container, headers)
        if len(operations) > MAX_OPERATIONS:
            raise Refused(400, "Batch request has more operations than what is supported.")
        if size > MAX_BYTES:
            raise Refused(413, "Request size is too large")
        of, results = self._alive(container, key), []
        for n, operation in enumerate(operations):
            try:
                status, document = self._apply(container, of, key, operation)
            except Refused as refused:
                failed = [{"statusCode": refused.status if i == n else 424, "requestCharge": 0} for i in range(len(operations))]
                return 207, {"x-ms-request-charge": "1"}, _json(failed)
            results.append({"statusCode": status, "requestCharge": 6.5, "eTag": document and document["_etag"]})
        container.documents[key] = of
        self.written += len(operations)
        return 200, {"x-ms-request-charge": str(6.5 * len(operations))}, _json(results)

    def _apply(self, container: Container, of: dict[str, Any], key: tuple[Any, ...], operation: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        verb, body = operation["operationType"], operation.get("resourceBody")
        name = operation.get("id") or body["id"]
        if body is not None:
            if not isinstance(body.get("id"), str) or not 1 <= len(body["id"].encode()) <= 1023 or re.search(r"[/\\?#]", body["id"]):
                raise Refused(400, "The input content is invalid because the id is not valid.")
            if body["id"] != name:
                raise Refused(400, "The id of a document cannot be replaced.")
            if tuple(body.get(path) for path in container.paths) != key:
                raise Refused(400, "PartitionKey extracted from document doesn't match the one specified in the header", 1001)
        existing = of.get(name)
        if verb in ("Read", "Replace", "Delete") and not existing:
            raise Refused(404, "Entity with the specified id does not exist in the system.")
        if verb == "Create" and existing:
            raise Refused(409, "Entity with the specified id already exists in the system.")
        if existing and operation.get("ifMatch") not in (None, existing[0]["_etag"]):
            raise Refused(412, "One of the specified pre-condition is not met.")
        if verb == "Read":
            return 200, existing[0]
        if verb == "Delete":
            del of[name]
            return 204, None
        return 200 if existing else 201, self._store(of, body)

    def _store(self, of: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        etag = f'"{next(self._etags):08x}-0000"'
        document = body | {"_rid": "r", "_self": "s", "_etag": etag, "_attachments": "attachments/", "_ts": int(self.clock())}
        of[body["id"]] = (document, json.dumps(document))
        return document

    def _alive(self, container: Container, key: tuple[Any, ...]) -> dict[str, tuple[dict[str, Any], str]]:
        """A copy of a logical partition without what its TTL has ended."""
        ttl, now = container.properties.get("defaultTtl"), self.clock()
        return {name: d for name, d in container.documents.get(key, {}).items() if ttl in (None, -1) or d[0]["_ts"] + ttl > now}

    # --- queries ---

    def _query(self, container: Container, headers: Any, data: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        text = data["query"].strip()
        whole = headers.get("x-ms-documentdb-partitionkey") is not None
        if not whole:
            if headers.get("x-ms-documentdb-query-enablecrosspartition", "").lower() != "true":
                raise Refused(400, "Cross partition query is required but disabled.")
            if found := _NEEDS_PLAN.search(text):
                raise Refused(400, f"Query contained {found[0]}, which the calling client does not support across partitions.")
        token = headers.get("x-ms-continuation")
        if token:
            if token not in self._cursors:
                raise Refused(400, "The continuation token is not valid.")
            rows, at = self._cursors[token]
        else:
            at = 0
            rows = self._rows(container, text, data.get("parameters", []), self._partition(container, headers) if whole else None)
        limit = int(headers.get("x-ms-max-item-count") or 100)
        page, size = [], 0
        while at < len(rows) and len(page) < (limit if limit > 0 else 1000) and size < MAX_PAGE_BYTES:
            row = rows[at]
            at += 1
            if row is None:  # a page never reaches into the next physical partition
                break
            page.append(row)
            size += len(row)
        answer = {"x-ms-request-charge": f"{2.8 + 0.05 * len(page):.2f}", "x-ms-item-count": str(len(page))}
        if at < len(rows):
            token = base64.b64encode(uuid.uuid4().bytes).decode()
            self._cursors[token] = rows, at
            if len(self._cursors) > MAX_CURSORS:
                self._cursors.popitem(last=False)
            answer["x-ms-continuation"] = token
        return 200, answer, f'{{"_rid":"r","Documents":[{",".join(page)}],"_count":{len(page)}}}'.encode()

    def _rows(self, container: Container, text: str, parameters: list[dict[str, Any]], key: tuple[Any, ...] | None) -> list[Any]:
        """The rows, with None between the physical partitions."""
        query = _QUERY.fullmatch(text)
        conditions = [_CONDITION.fullmatch(part.strip()) for part in re.split(r"\s+AND\s+", query[2], flags=re.I)] if query and query[2] else []
        if not query or None in conditions:
            raise Refused(400, f"Syntax error, or a query that this server does not know: {text}")
        given = {parameter["name"]: parameter["value"] for parameter in parameters}
        try:
            tests = [(match[1], _COMPARE[match[2]], given[match[3]]) for match in conditions if match]
        except KeyError as missing:
            raise Refused(400, f"{missing} is not among the parameters") from None

        def holds(document: dict[str, Any]) -> bool:
            return all(name in document and type(document[name]) is type(value) and test(document[name], value) for name, test, value in tests)

        by_range: dict[str, list[Any]] = {r["id"]: [] for r in container.ranges}
        for of in [key] if key else list(container.documents):
            found = (d for d in self._alive(container, of).values() if holds(d[0]))
            if query[1] == "*":
                by_range[container.range_of(of)] += [encoded for _, encoded in found]
            elif query[1].upper().startswith("VALUE"):
                by_range[container.range_of(of)].append(str(sum(1 for _ in found)))
            else:
                names = re.findall(r"c\.(\w+)", query[1])
                by_range[container.range_of(of)] += [json.dumps({name: d[name] for name in names if name in d}) for d, _ in found]
        rows: list[Any] = []
        for of_range in by_range.values():
            rows += [*of_range, None]
        return rows[:-1] if key is None else [row for row in rows if row is not None]


class _HTTPServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is nothing to tell."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server_: CosmosServer

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        server, path = self.server_, urllib.parse.urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests += 1
        fault = server.fault(Request(server.requests, _kind(path, self.headers), body.count(b'"operationType"')))
        if fault == "cut":
            return self._cut()
        try:
            server.authorize(self.command, path, self.headers)
            if isinstance(fault, int | tuple):
                status, substatus = fault if isinstance(fault, tuple) else (fault, 0)
                raise Refused(status, "told to fail", substatus)
            status, headers, content = server.handle(self.command, path, self.headers, body)
        except Refused as refused:
            status, content = refused.status, _json({"code": str(refused.status), "message": refused.message})
            headers = {"x-ms-substatus": str(refused.substatus)} | ({"x-ms-retry-after-ms": "5"} if status in (429, 449) else {})
        if fault == "lose":
            return self._cut()
        self.send_response(status)
        stamps = {"x-ms-activity-id": str(uuid.uuid4()), "x-ms-session-token": f"0:-1#{server.written}", "Content-Type": "application/json"}
        for name, value in (stamps | {"x-ms-request-charge": "0"} | headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        return None

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815


def _kind(path: str, headers: Any) -> str:
    if headers.get("x-ms-cosmos-is-batch-request"):
        return "batch"
    if headers.get("x-ms-documentdb-isquery"):
        return "query"
    kinds = {0: "account", 1: "database", 2: "database", 3: "container", 4: "container", 5: "pkranges" if path.endswith("pkranges") else "document"}
    return kinds.get(len(path.strip("/").split("/")) if path.strip("/") else 0, "document")


def _resource(data: dict[str, Any]) -> dict[str, Any]:
    rid = base64.b64encode(uuid.uuid4().bytes[:8]).decode()
    return data | {"_rid": rid, "_self": f"{rid}/", "_etag": '"1"', "_ts": int(time.time())}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def main(arguments: list[str] | None = None) -> int:
    """Serve until the command after `--` ends, or until interrupted without one."""
    parser = argparse.ArgumentParser(description="A small Cosmos DB for NoSQL, in memory.")
    parser.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 takes a free one")
    parser.add_argument("command", nargs="*", help="a command to run with AOAI_COSMOS_ENDPOINT and AOAI_COSMOS_KEY set")
    given = parser.parse_args(arguments)
    with CosmosServer(given.port) as server:
        if given.command:
            command = subprocess.Popen(given.command, env=os.environ | {"AOAI_COSMOS_ENDPOINT": server.endpoint, "AOAI_COSMOS_KEY": KEY})
            # Ctrl-C reaches the command too, and ends us with it
            signal.signal(signal.SIGINT, lambda *_: None)
            signal.signal(signal.SIGTERM, lambda *_: command.terminate())
            return command.wait()
        print(f"AOAI_COSMOS_ENDPOINT={server.endpoint} AOAI_COSMOS_KEY={KEY}", flush=True)  # noqa: T201
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
