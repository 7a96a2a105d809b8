"""The three pages, and what a careless or hostile client can do to them: nothing."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from inferbus.worker.http import MAX_CONNECTIONS, Listener, PortBusy


@contextmanager
def listening(*, live: tuple[str, ...] = (), ready: tuple[str, ...] = (), patience: float = 10.0) -> Iterator[int]:
    listener = Listener(
        "127.0.0.1",
        0,
        live=lambda: list(live),
        ready=lambda: list(ready),
        render=lambda: b"inferbus_inflight_messages 3.0\n",
        logger=structlog.get_logger(),
        patience=patience,
    )
    try:
        yield listener.port
    finally:
        listener.close()


def ask(port: int, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def raw(port: int, sent: bytes) -> bytes:
    """What the server answers to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(sent)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_worker_that_is_well_says_ok(path: str) -> None:
    with listening() as port:
        answer, body = ask(port, path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"status": "ok", "reasons": []}


def test_a_worker_that_is_not_ready_says_why_and_still_lives() -> None:
    with listening(ready=("kafka: away", "model: loading")) as port:
        answer, body = ask(port, "/readyz")
        assert answer.status == 503
        assert json.loads(body) == {"status": "unavailable", "reasons": ["kafka: away", "model: loading"]}
        assert ask(port, "/livez")[0].status == 200


def test_a_hung_device_makes_livez_fail() -> None:
    with listening(live=("device: no answer for 60 s",)) as port:
        answer, body = ask(port, "/livez")
    assert (answer.status, json.loads(body)["reasons"]) == (503, ["device: no answer for 60 s"])


def test_metrics_are_prometheus_text() -> None:
    with listening() as port:
        answer, body = ask(port, "/metrics?collect=all")
    assert (answer.status, body) == (200, b"inferbus_inflight_messages 3.0\n")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_head_has_the_headers_of_get_and_no_body() -> None:
    with listening() as port:
        answer, body = ask(port, "/metrics", "HEAD")
    assert (answer.status, answer.headers["Content-Length"], body) == (200, "31", b"")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/../etc/passwd", "/livez%00", "*"])
def test_any_other_path_is_not_found(path: str) -> None:
    with listening() as port:
        answer, body = ask(port, path)
    assert (answer.status, body) == (404, b"Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X"])
def test_any_other_method_is_refused_with_what_is_allowed(method: str) -> None:
    with listening() as port:
        answer, _ = ask(port, "/metrics", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_no_answer_names_the_software() -> None:
    with listening() as port:
        for path in ("/livez", "/nothing"):
            answer, body = ask(port, path)
            assert "Server" not in answer.headers
            assert b"python" not in body.lower()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /livez HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /livez HTTP/9.9\r\n\r\n", b"505"),
        (b"\x16\x03\x01\x02\x00\n", b"400"),
    ],
    ids=["long line", "long header", "many headers", "version", "tls"],
)
def test_what_is_not_a_small_http_request_is_refused(sent: bytes, status: bytes) -> None:
    with listening() as port:
        answer = raw(port, sent)
        assert status in answer
        assert b"<html" not in answer.lower()
        assert ask(port, "/livez")[0].status == 200


def test_a_client_that_says_nothing_is_cut_off() -> None:
    with listening(patience=0.05) as port:
        assert raw(port, b"") == b""


def test_a_client_that_drips_is_cut_off_too() -> None:
    with (
        listening(patience=0.2) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        client.settimeout(0.05)
        for _ in range(100):
            try:
                client.sendall(b"a")
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("still connected after five seconds")


def test_a_flood_of_connections_is_turned_away_and_leaves_the_server_well() -> None:
    with listening(patience=0.5) as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(MAX_CONNECTIONS)]
        assert raw(port, b"") == b""  # one more is closed at once
        for client in clients:
            assert client.recv(1) == b""
            client.close()
        assert ask(port, "/livez")[0].status == 200


def test_a_bug_in_a_page_is_logged_and_the_next_request_is_served() -> None:
    def broken() -> list[str]:
        raise KeyError("lag")

    with capture_logs() as logs:
        listener = Listener(
            "127.0.0.1",
            0,
            live=list,
            ready=broken,
            render=bytes,
            logger=structlog.get_logger(),
            public=False,
        )
        try:
            assert raw(listener.port, b"GET /readyz HTTP/1.0\r\n\r\n") == b""
            assert ask(listener.port, "/livez")[0].status == 200
        finally:
            listener.close()
    assert [entry["event"] for entry in logs] == ["http_failed"]
    assert isinstance(logs[0]["exc_info"], KeyError)


def test_the_address_is_logged_unless_it_is_private() -> None:
    pages: dict[str, Any] = {"live": list, "ready": list, "render": bytes, "logger": structlog.get_logger()}
    with capture_logs() as logs:
        public = Listener("127.0.0.1", 0, **pages)
        Listener("127.0.0.1", 0, **pages, public=False).close()
        public.close()
    assert logs == [{"event": "http_listening", "log_level": "info", "host": "127.0.0.1", "port": public.port}]


def test_ipv6_works_where_the_machine_has_it() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    listener = Listener("::1", 0, live=list, ready=list, render=bytes, logger=structlog.get_logger())
    try:
        with socket.create_connection(("::1", listener.port), timeout=10) as client:
            client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert b"200 OK" in client.recv(4096)
    finally:
        listener.close()


def test_a_busy_port_names_the_cure() -> None:
    with (
        listening() as port,
        pytest.raises(PortBusy, match=f"port {port} is in use: set http.port to a free one, 0 for any, or"),
    ):
        Listener("127.0.0.1", port, live=list, ready=list, render=bytes, logger=structlog.get_logger())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_names_the_cure(host: str) -> None:
    with pytest.raises(PortBusy, match=r"set http\.host to an address of this machine"):
        Listener(host, 0, live=list, ready=list, render=bytes, logger=structlog.get_logger())


def test_a_closed_listener_frees_its_port_and_may_be_closed_again() -> None:
    pages: dict[str, Any] = {"live": list, "ready": list, "render": bytes, "logger": structlog.get_logger()}
    first = Listener("127.0.0.1", 0, **pages)
    first.close()
    first.close()
    Listener("127.0.0.1", first.port, **pages).close()
