"""A small HTTP server that stands for Application Insights' ingestion endpoint and keeps the envelopes it gets."""

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class ApplicationInsights(http.server.ThreadingHTTPServer):
    """Takes whatever is sent; `silent` makes it accept connections and never answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.envelopes: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.silent = threading.Event()
        self.instrumentation_key = "11111111-2222-3333-4444-555555555555"

    @property
    def connection_string(self) -> str:
        return f"InstrumentationKey={self.instrumentation_key};IngestionEndpoint=http://127.0.0.1:{self.server_port}/"

    def data(self, base_type: str) -> list[dict[str, Any]]:
        """The base data of the envelopes of a type, with their tags."""
        return [e["data"]["baseData"] | {"tags": e["tags"]} for e in self.envelopes if e["data"]["baseType"] == base_type]

    def metrics(self, name: str) -> list[tuple[float, dict[str, str]]]:
        """Every measurement of a metric with its dimensions."""
        return [
            (point["value"], data.get("properties") or {}) for data in self.data("MetricData") for point in data["metrics"] if point["name"] == name
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ApplicationInsights

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.silent.is_set():
            threading.Event().wait(60)
            return
        text = (gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body).decode()
        items = json.loads(text)
        self.server.raw.append(f"{self.path}\n{self.headers}\n{text}")
        self.server.envelopes += items
        answer = json.dumps({"itemsReceived": len(items), "itemsAccepted": len(items), "errors": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[ApplicationInsights]:
    """A server on a free port of the loopback."""
    with ApplicationInsights() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
