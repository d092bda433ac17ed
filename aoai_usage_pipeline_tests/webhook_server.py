"""A webhook on the loopback: keeps what it was sent and answers as a test tells it to."""

import http.server
import json
import socket
import threading
from typing import Any

PATH = "/workflows/hook?sig=SIGNATURE_OF_THE_TESTS"


class WebhookServer:
    """`answers` are used up one by one, `answer` after that: a status, `hang` (until the server stops), `close`, or `redirect`.

    `received` is (headers, body) of every request, whatever was answered; `told` the ids of those that were accepted.
    """

    def __init__(self) -> None:
        self.answers: list[int | str] = []
        self.answer: int | str = 202
        self.received: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.told: list[str] = []
        self.on_request = lambda: None
        self._stopped = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner._take(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{PATH}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "WebhookServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def titles(self, start: int = 0) -> list[str]:
        """The titles of the notifications that were accepted."""
        accepted = {body["id"]: body["title"] for _, body in self.received if "id" in body}
        return [accepted[one] for one in self.told[start:]]

    def _take(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.received.append((dict(request.headers), body))
        answer = self.answers.pop(0) if self.answers else self.answer
        self.on_request()
        if answer == "hang":
            self._stopped.wait(60)
        if not isinstance(answer, int) and answer != "redirect":
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        request.send_response(307 if answer == "redirect" else answer)
        if answer == "redirect":
            request.send_header("Location", self.url)
        if answer in (429, 503):
            request.send_header("Retry-After", "7")
        request.send_header("Content-Length", "0")
        request.end_headers()
        if isinstance(answer, int) and answer < 300:
            self.told.append(request.headers["Idempotency-Key"])
