"""What orchestrators and Prometheus ask a worker over HTTP: `/livez`, `/readyz`, `/metrics`.

Beside the path of a message, on threads of its own: an answer never waits for the pipeline, it reads what
the pipeline has left behind. A connection carries one request, lives for a bounded time, and only so many
are open at once, so neither a slow client nor a flood of them can take threads from the worker.

Invariant: whoever can reach the port reads three pages and changes nothing.
"""

from __future__ import annotations

import errno
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from structlog.typing import FilteringBoundLogger

MAX_CONNECTIONS = 64

Reasons = Callable[[], list[str]]
"""Why something is not so, in a few words each; empty when it is."""


class PortBusy(Exception):
    """The address of the pipeline file cannot be listened on: say so and exit 1. The text names the cure."""


class Listener:
    """Serves the three pages from construction until `close`.

    Args:
        host: Address or name to listen on.
        port: 0 for any free one.
        live: Why this process should be restarted.
        ready: Why this process does not serve now.
        render: The metrics as Prometheus text.
        logger: Told the address (event `http_listening`) and of bugs in the three callables.
        public: False keeps the address out of the log: a child's listener is for its parent alone.
        patience: Seconds a connection may last.

    Attributes:
        port: The port it listens on, also when 0 (any) was asked for.

    Raises:
        PortBusy: The address is taken, not ours, or not allowed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        live: Reasons,
        ready: Reasons,
        render: Callable[[], bytes],
        logger: FilteringBoundLogger,
        public: bool = True,
        patience: float = 10.0,
    ) -> None:
        pages: dict[str, Callable[[], _Page]] = {
            "/livez": lambda: _status(live()),
            "/readyz": lambda: _status(ready()),
            "/metrics": lambda: (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", render()),
        }
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._server = _Server(family, address, pages, logger, patience)
        except OSError as error:
            raise PortBusy(_cure(host, port, error)) from error
        self.port: int = self._server.server_address[1]
        # The interval bounds how late `close` returns and how late an overdue connection is cut.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)
        self._thread.start()
        if public:
            logger.info("http_listening", host=host, port=self.port)

    def close(self) -> None:
        """Stop listening. Idempotent; answers under way are not waited for."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


_Page = tuple[HTTPStatus, str, bytes]


def _status(reasons: list[str]) -> _Page:
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    body = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
    return status, "application/json", json.dumps(body).encode() + b"\n"


def _cure(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: set http.port to a free one, 0 for any, or http: null"
    if error.errno == errno.EACCES:
        return f"port {port} is not allowed: set http.port to one above 1023, 0 for any, or http: null"
    return f"cannot listen on {host}: set http.host to an address of this machine, 127.0.0.1 or 0.0.0.0"


class _Server(ThreadingHTTPServer):
    """One thread per connection, at most `MAX_CONNECTIONS`, each at most `patience` seconds."""

    request_queue_size = MAX_CONNECTIONS
    allow_reuse_port = False  # newer Pythons turn it on, and then a busy port goes unnoticed

    def __init__(
        self,
        family: socket.AddressFamily,
        address: Any,
        pages: dict[str, Callable[[], _Page]],
        logger: FilteringBoundLogger,
        patience: float,
    ) -> None:
        self.address_family = family
        self.pages = pages
        self._logger = logger
        self._patience = patience
        self._deadlines: dict[Any, float] = {}
        super().__init__(address, _Request)

    def server_bind(self) -> None:
        # The parent class also looks its own name up in DNS, which may take seconds and serves nothing.
        socketserver.TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - not ours to choose
        if len(self._deadlines) >= MAX_CONNECTIONS:
            return False
        self._deadlines[request] = time.monotonic() + self._patience
        return True

    def service_actions(self) -> None:
        """Cut overdue connections. A socket timeout would not do: each byte that drips in starts it again."""
        now = time.monotonic()
        for request, deadline in self._deadlines.copy().items():
            if now > deadline:
                self._deadlines.pop(request, None)
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has just ended by itself

    def shutdown_request(self, request: Any) -> None:
        self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - not ours to choose
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that went away is nobody's news
            self._logger.error("http_failed", exc_info=error)


class _Request(BaseHTTPRequestHandler):
    """Answers GET and HEAD for exactly the server's pages."""

    server: _Server
    default_request_version = "HTTP/1.0"  # the parent's 0.9 would answer a broken request without a status

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._answer(*page())

    do_HEAD = do_GET  # noqa: N815 - the name the parent looks for

    def send_error(self, code: int, *_: object, **__: object) -> None:
        """Every refusal, the parent's own included, without its HTML page and its version banner."""
        # The parent says 501 to a method that has no do_ method here.
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._answer(status, "text/plain; charset=utf-8", status.phrase.encode() + b"\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response_only(status)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's signature
        """Probes come every few seconds; nobody wants a line for each."""
