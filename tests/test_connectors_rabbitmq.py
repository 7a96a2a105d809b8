"""RabbitMQ on the real thing: classic and quorum queues, lost connections, refusals, and what a message looks like."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pika
import pytest

from deploy.local import servers
from inferbus.connectors.base import (
    Bell,
    Failure,
    Fatal,
    Headers,
    Message,
    Misconfigured,
    Records,
    Refused,
    Source,
    TooLarge,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.rabbitmq import RECEIPT_EPOCH, RabbitmqSink, RabbitmqSource
from inferbus.connectors.rabbitmq_client import Connection
from inferbus.connectors.settings import AmqpDeclare, AmqpTls
from tests.connector_contract import (
    PATIENCE,
    ConnectorContract,
    Place,
    Seen,
    no_drain,
    opened,
    receive,
    records,
    settle,
    write,
)
from tests.servers import RabbitMQ, RabbitMQServer, started_rabbitmq

pytestmark = pytest.mark.broker


def table(key: bytes | None, headers: Headers) -> dict[str, Any]:
    """Headers as AMQP carries them: a repeated one is a list, the key is one of them."""
    found: dict[str, Any] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value)
    whole = {name: several if len(several) > 1 else several[0] for name, several in found.items()}
    return whole if key is None else {**whole, "inferbus-key": key}


class RabbitmqPlace(Place):
    def __init__(self, bus: RabbitMQ, kind: str = "classic") -> None:
        self.bus = bus
        self.requests = bus.queue(kind)
        self.answers = bus.queue(kind)

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        self.send(body, headers=table(key, headers))

    def send(self, body: bytes, **properties: Any) -> None:
        """A request with these properties, kept by the broker when this returns."""
        with self.bus.channel() as channel:
            channel.basic_publish("", self.requests, body, pika.BasicProperties(delivery_mode=2, **properties))

    def send_many(self, bodies: Sequence[bytes]) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self.bus.url))
        channel = connection.channel()
        for body in bodies:
            channel.basic_publish("", self.requests, body)
        connection.close()

    def source(self, group: str = "", **settings: Any) -> RabbitmqSource:  # noqa: ARG002 - a queue has no groups
        return RabbitmqSource(self.bus.url, self.requests, **({"max_inflight": 100} | settings))

    def sink(self) -> RabbitmqSink:
        return RabbitmqSink(Connection(self.bus.url, AmqpTls()), "", self.answers)

    def seen(self) -> list[Seen]:
        return [seen for _, seen in self.delivered()]

    def delivered(self) -> list[tuple[Any, Seen]]:
        """Everything in the answers' queue, with its properties; it is taken away."""
        found = []
        with self.bus.channel() as channel:
            count = channel.queue_declare(self.answers, passive=True).method.message_count
            # Not by `basic_get`, for which a quorum queue adds a header, and sorts the others.
            for _ in range(count):
                _, properties, body = next(channel.consume(self.answers, auto_ack=True, inactivity_timeout=PATIENCE))
                headers = [
                    (name, item if isinstance(item, bytes) else item.encode())
                    for name, value in (properties.headers or {}).items()
                    for item in (value if isinstance(value, list) else [value])
                ]
                keys = [value for name, value in headers if name == "inferbus-key"]
                rest = [header for header in headers if header[0] != "inferbus-key"]
                found.append((properties, Seen(keys[0] if keys else None, body, rest)))
        return found

    def left(self) -> int:
        """Messages of the requests' queue that are ready for anyone."""
        with self.bus.channel() as channel:
            return int(channel.queue_declare(self.requests, passive=True).method.message_count)

    def kill(self, source: Source) -> None:
        assert isinstance(source, RabbitmqSource)
        connection = source._connection
        assert connection._thread is not None
        connection.call(connection._loop.stop)
        connection._thread.join()
        connection._drop_socket()
        connection._loop.close()


class TestClassicQueue(ConnectorContract):
    @pytest.fixture
    def place(self, rabbitmq: RabbitMQ) -> Place:
        return RabbitmqPlace(rabbitmq)


class TestQuorumQueue(ConnectorContract):
    @pytest.fixture
    def place(self, rabbitmq: RabbitMQ) -> Place:
        return RabbitmqPlace(rabbitmq, "quorum")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


class Proxy:
    """Stands between a client and the broker; `cut` breaks what runs through it, `shut` lets nothing new through."""

    def __init__(self, url: str) -> None:
        at = pika.URLParameters(url)
        self._target = (at.host, at.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = url.replace(f":{at.port}/", f":{self.port}/")
        self.shut = False
        self.held = False
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.shut:
                    client.close()
                    continue
                broker = socket.create_connection(self._target)
                self._sockets += [client, broker]
                for pair in ((client, broker), (broker, client)):
                    self._threads.append(threading.Thread(target=self._pump, args=pair))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while received := source.recv(65536):
                while self.held:
                    time.sleep(0.01)
                target.sendall(received)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.held = False
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


@pytest.fixture
def place(rabbitmq: RabbitMQ) -> RabbitmqPlace:
    return RabbitmqPlace(rabbitmq)


@pytest.fixture
def proxy(rabbitmq: RabbitMQ) -> Iterator[Proxy]:
    with closing(Proxy(rabbitmq.url)) as proxy:
        yield proxy


@contextmanager
def opened_sink(sink: RabbitmqSink) -> Iterator[RabbitmqSink]:
    sink.open(Bell())
    try:
        yield sink
    finally:
        sink.close(1.0)


def plain(count: int, size: int = 10, headers: Headers = ()) -> Records:
    messages = [Message(f"m{i}", None, b"", (), None, 1, None) for i in range(count)]
    return Records(messages, [None] * count, [b"x" * size] * count, [list(headers) for _ in messages])


# Lost and cancelled


def test_after_a_cut_connection_what_was_not_settled_comes_again_and_old_receipts_are_void(
    place: RabbitmqPlace, proxy: Proxy
) -> None:
    for body in (b"one", b"two", b"three"):
        place.publish(body)
    with opened(RabbitmqSource(proxy.url, place.requests)) as source:
        messages = receive(source, 3)
        source.settle(messages[:1])
        until(lambda: source.tick(time.monotonic()) and source.inflight()[0] == 2)
        assert source.exhausted()  # the answer comes after the acknowledgement
        proxy.shut = True
        proxy.cut()
        until(source.healthy)
        assert str(proxy.port) in str(source.healthy())
        assert all(map(source.void, messages))
        assert source.inflight() == (0, 0)
        source.settle(messages)
        source.release(messages)
        source.tick(time.monotonic())
        proxy.shut = False
        again = receive(source, 2)
        assert [(m.body, m.attempts) for m in again] == [(b"two", 2), (b"three", 2)]
        assert source.healthy() is None
        settle(source, again)
        assert source.exhausted()


def test_a_bell_rings_for_the_first_message_of_a_burst_and_not_before_the_source_rests(place: RabbitmqPlace) -> None:
    rung: list[float] = []

    class Counted(Bell):
        __slots__ = ()

        def ring(self) -> None:
            rung.append(time.monotonic())
            super().ring()

    source, bell = place.source(), Counted()
    source.open(bell, no_drain)
    place.send_many([b"x"] * 50)
    until(lambda: source._epoch is not None and len(source._epoch.waiting) == 50)
    assert rung == []
    source.rest()  # with something there
    assert len(rung) == 1
    settle(source, receive(source, 50))
    rung.clear()
    source.rest()
    place.publish(b"y")
    bell.wait(PATIENCE)
    bell.wait(0.1)
    assert len(rung) == 1
    source.close()


def test_a_queue_deleted_under_us_and_made_again_is_read_again(place: RabbitmqPlace) -> None:
    place.publish(b"before")
    with opened(place.source()) as source:
        before = receive(source, 1)
        with place.bus.channel() as channel:
            channel.queue_delete(place.requests)
        until(source.healthy)
        until(lambda: "does not exist" in str(source.healthy()))
        with pytest.raises(Unavailable, match="does not exist"):
            source.exhausted()
        source.settle(before)
        source.tick(time.monotonic())
        with place.bus.channel() as channel:
            channel.queue_declare(place.requests, durable=True)
        place.publish(b"after")
        assert [m.body for m in receive(source, 1)] == [b"after"]
        assert source.healthy() is None


def test_a_broker_that_restarts_is_found_again_by_source_and_sink(restartable_rabbitmq: RabbitMQServer) -> None:
    place = RabbitmqPlace(restartable_rabbitmq)
    place.publish(b"kept")
    with opened(place.source()) as source, opened_sink(place.sink()) as sink:
        (message,) = receive(source, 1)
        restartable_rabbitmq.kill()
        until(lambda: source.healthy() and sink.healthy())
        failures = write(sink, plain(2))
        assert [(i, type(error)) for i, error in failures] == [(0, Unavailable), (1, Unavailable)]
        restartable_rabbitmq.start()
        assert [m.body for m in receive(source, 1)] == [b"kept"]
        assert source.void(message)
        until(lambda: sink.healthy() is None)
        assert write(sink, plain(2)) == []


def test_a_client_that_breaks_is_fatal_to_source_and_sink_and_both_still_close(place: RabbitmqPlace) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    source, sink = place.source(), place.sink()
    with opened(source), opened_sink(sink):
        for connection in (source._connection, sink._connection):
            connection.call(broken)
        until(lambda: source._connection.broken and sink._connection.broken)
        why = r"the client broke \(ZeroDivisionError\); see the log"
        with pytest.raises(Fatal, match=why):
            sink.tick()
        with pytest.raises(Fatal, match=why):
            source.receive(1)


def test_heartbeats_go_on_while_the_pipeline_is_busy(rabbitmq: RabbitMQ) -> None:
    place = RabbitmqPlace(rabbitmq)
    place.publish(b"one")
    with opened(RabbitmqSource(f"{rabbitmq.url}?heartbeat=1", place.requests)) as source:
        (message,) = receive(source, 1)
        time.sleep(4.0)  # the broker gives up on a client after two missed heartbeats
        assert not source.void(message)
        settle(source, [message])
        assert source.inflight() == (0, 0)


# Settling


def test_behind_a_gap_messages_are_acknowledged_singly(place: RabbitmqPlace) -> None:
    place.send_many([b"%d" % i for i in range(10)])
    with opened(place.source()) as source:
        messages = receive(source, 10)
        stuck = messages[3]
        source.settle(messages[:3])
        source.settle(messages[6:])
        until(lambda: source.tick(time.monotonic()) and source.inflight()[0] == 3)
        source.settle(messages[4:6])
        until(lambda: source.tick(time.monotonic()) and source.inflight() == (1, 1))
        source.settle(messages[4:])  # twice: the broker would close the channel over it
        source.tick(time.monotonic() + 1.0)
        place.publish(b"more")
        (more,) = receive(source, 1)
        settle(source, [stuck, more])
        assert source.inflight() == (0, 0)
        assert not source.void(stuck)
        place.publish(b"and more")
        settle(source, receive(source, 1))
        assert not source.void(stuck)
    assert place.left() == 0


def test_what_was_acknowledged_behind_a_gap_does_not_come_again_after_a_crash(place: RabbitmqPlace) -> None:
    place.send_many([b"%d" % i for i in range(10)])
    source = place.source()
    source.open(Bell(), no_drain)
    messages = receive(source, 10)
    source.settle([m for m in messages if m.body != b"3"])
    until(lambda: source.tick(time.monotonic()) and source.inflight() == (1, 1))
    assert source.exhausted()  # the answer comes after the acknowledgements
    place.kill(source)
    with opened(place.source()) as second:
        assert [m.body for m in receive(second, 1)] == [b"3"]
        assert second.exhausted()


def test_what_is_released_goes_to_another_worker_and_keys_and_headers_count_as_bytes(place: RabbitmqPlace) -> None:
    place.publish(b"body", key=b"k" * 10, headers=(("h", b"v" * 100),))
    with opened(place.source()) as first:
        messages = receive(first, 1)
        assert first.inflight() == (1, 114)
        first.release(messages)
        assert first.inflight() == (0, 0)
        with opened(place.source()) as second:
            assert [m.body for m in receive(second, 1)] == [b"body"]


def test_a_body_that_is_forgotten_counts_no_more(place: RabbitmqPlace) -> None:
    place.publish(b"12345", key=b"key")
    with opened(place.source()) as source:
        messages = receive(source, 1)
        source.forget_bodies(messages)
        assert source.inflight() == (1, 3)
        assert source.stream(messages[0]) is RECEIPT_EPOCH(messages[0].receipt)  # what came on a channel goes with it
        names = {run[0] for run in (source.run(messages) for _ in range(3)) if run is not None}
        assert len(names) == 3
        assert {name.split("/")[0] for name in names} == {place.requests}
        settle(source, messages)
        assert source.inflight() == (0, 0)


def test_closing_acknowledges_what_is_settled_and_gives_back_the_rest(place: RabbitmqPlace) -> None:
    place.send_many([b"%d" % i for i in range(10)])
    source = place.source()
    source.open(Bell(), no_drain)
    source.settle(receive(source, 4))
    source.close()
    assert place.left() == 6


def test_the_prefetch_grows_with_small_messages_and_shrinks_with_large_ones(place: RabbitmqPlace) -> None:
    place.send_many([b"x" * 100] * 4500)
    with opened(place.source(max_inflight=4000, max_inflight_bytes=1_000_000)) as source:
        assert isinstance(source, RabbitmqSource)
        first = receive(source, 10)
        until(lambda: source.tick(time.monotonic() + 10.0) and waiting(source) >= 4000)  # without any acknowledgement
        messages = first + receive(source, 4000 - 10, limit=1000)
        assert len({m.receipt[1] for m in messages}) == 4000  # type: ignore[index]
        settle(source, messages)
        settle(source, receive(source, 500))
        place.send_many([b"x" * 100_000] * 300)
        for i in range(25):
            settle(source, receive(source, 10))
            source.tick(time.monotonic() + 20.0 * i)
        assert source._prefetch < 50
        assert source.healthy() is None
        settle(source, receive(source, 50))
        assert source.exhausted()


def test_large_messages_after_small_ones_fill_no_memory_before_the_prefetch_follows(place: RabbitmqPlace) -> None:
    bodies = [b"%d" % i + b"x" * 1_000_000 for i in range(60)]
    with opened(place.source(prefetch=1000, max_inflight_bytes=2_000_000)) as source:
        assert isinstance(source, RabbitmqSource)
        place.send_many(bodies)
        until(lambda: source._epoch is not None and source._epoch.full)
        assert place.left() > 20  # what is on its way still comes
        got: list[bytes] = []
        while len(got) < 60:
            messages = receive(source, 1)
            got += [m.body for m in messages]
            settle(source, messages)
        assert got == bodies


def waiting(source: RabbitmqSource) -> int:
    return 0 if source._epoch is None else len(source._epoch.waiting)


def test_a_prefetch_of_ones_own_stays_as_it_is(place: RabbitmqPlace) -> None:
    place.send_many([b"x"] * 20)
    with opened(place.source(prefetch=7)) as source:
        assert isinstance(source, RabbitmqSource)
        until(lambda: waiting(source) == 7)
        first = receive(source, 7)
        source.tick(time.monotonic() + 10.0)
        settle(source, first)
        until(lambda: waiting(source) == 7)
        settle(source, receive(source, 7))
        settle(source, receive(source, 6))


def test_the_lag_is_what_the_queue_holds_and_what_waits_here(place: RabbitmqPlace) -> None:
    place.send_many([b"x"] * 20)
    with opened(place.source(prefetch=5)) as source:
        assert source.lag() is not None
        until(lambda: source.tick(time.monotonic() + 10.0) and source.lag() == 20)


# Opening


def test_what_keeps_us_out_is_one_clear_line_without_the_password(rabbitmq: RabbitMQ) -> None:
    at = pika.URLParameters(rabbitmq.url)
    place = f"127.0.0.1:{at.port}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = silent.getsockname()[1]
    for url, words in (
        (f"amqp://guest:s3cret@{place}/", f'{place} refuses user "guest"; check user and password'),
        (f"amqp://guest:guest@{place}/nope", f'vhost "nope" does not exist at {place}'),
        (f"amqp://guest:guest@{place}/", 'queue "no-such-queue" does not exist; create it, set `declare`'),
        (f"amqp://guest:s3cret@127.0.0.1:{nobody}/", f"no broker answers at 127.0.0.1:{nobody} (Connection refused)"),
        (f"amqp://guest:s3cret@no-such-host.invalid:{nobody}/", 'host "no-such-host.invalid" is not known'),
        (f"amqps://guest:s3cret@{place}/", f"no TLS with {place}"),
    ):
        source = RabbitmqSource(url, "no-such-queue")
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                source.open(Bell(), no_drain)
            assert words in str(caught.value)
            assert "s3cret" not in str(caught.value)
        source.close()


def test_a_sink_without_its_place_says_which(rabbitmq: RabbitMQ) -> None:
    connection = Connection(rabbitmq.url, AmqpTls())
    for sink, words in (
        (RabbitmqSink(connection, "no-such-exchange", ""), 'exchange "no-such-exchange" does not exist'),
        (RabbitmqSink(connection, "", "no-such-queue"), 'queue "no-such-queue" does not exist'),
    ):
        with pytest.raises(Unavailable, match=words):
            sink.open(Bell())
        sink.close(1.0)


def test_a_url_that_cannot_work_is_refused_without_repeating_it() -> None:
    with pytest.raises(Misconfigured, match="expected amqp://user:password@host:port/vhost") as caught:
        RabbitmqSource("amqp://us3r@127.0.0.1?heartbeat=often", "q")
    assert "us3r" not in str(caught.value)
    with pytest.raises(Misconfigured, match="ca_file"):
        RabbitmqSource("amqps://127.0.0.1/", "q", tls=AmqpTls(ca_file="/no/such/file"))
    with pytest.raises(Misconfigured, match="queue: expected at most 255 bytes"):
        RabbitmqSource("amqp://127.0.0.1/", "ü" * 200)


def test_a_declared_quorum_queue_dead_letters_after_its_delivery_limit(rabbitmq: RabbitMQ) -> None:
    dead = rabbitmq.queue()
    place = RabbitmqPlace(rabbitmq)
    place.requests = f"declared-{dead}"
    declare = AmqpDeclare(delivery_limit=1, dead_letter_exchange="", dead_letter_routing_key=dead)
    with opened(place.source(declare=declare)):
        place.publish(b"poison", headers=(("inferbus-id", b"p"),))
    attempts = []
    for _ in range(2):
        source = place.source(declare=declare)
        source.open(Bell(), no_drain)
        if found := receive_some(source, 1.0):
            attempts += [m.attempts for m in found]
        place.kill(source)
    assert attempts
    with rabbitmq.channel() as channel:
        until(lambda: channel.basic_get(dead, auto_ack=True)[2] == b"poison")


def receive_some(source: Source, patience: float) -> list[Message]:
    messages: list[Message] = []
    deadline = time.monotonic() + patience
    while not messages and time.monotonic() < deadline:
        messages = source.receive(10)
        time.sleep(0.01)
    return messages


def test_a_declaration_that_contradicts_the_queue_that_is_there_says_so(rabbitmq: RabbitMQ) -> None:
    queue = rabbitmq.queue("classic")
    source = RabbitmqSource(rabbitmq.url, queue, declare=AmqpDeclare(type="quorum"))
    with pytest.raises(Misconfigured, match=r"not as `declare` says: .*x-queue-type.*'quorum'.*'classic'"):
        source.open(Bell(), no_drain)


def test_a_broker_is_reached_over_tls_once_its_authority_is_trusted(tmp_path: Path) -> None:
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(tmp_path, "req", "-x509", *new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1")
    openssl(tmp_path, "req", "-x509", *new, *signed, "-subj", "/CN=broker", "-keyout", "key", "-out", "certificate")
    (port,) = servers.free_ports(1)
    settings = {
        "listeners.ssl.1": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(tmp_path / "ca.pem"),
        "ssl_options.certfile": str(tmp_path / "certificate"),
        "ssl_options.keyfile": str(tmp_path / "key"),
    }
    with started_rabbitmq(settings) as server:
        queue, url = server.queue(), f"amqps://guest:guest@127.0.0.1:{port}/"
        trusting = AmqpTls(ca_file=str(tmp_path / "ca.pem"))
        with opened_sink(RabbitmqSink(Connection(url, trusting), "", queue)) as sink:
            assert write(sink, plain(50, size=10_000)) == []
        with opened(RabbitmqSource(url, queue, tls=trusting)) as source:
            settle(source, receive(source, 50))
            assert source.exhausted()
        with pytest.raises(Unavailable, match=r"no TLS with .*check `tls\.ca_file`"):
            RabbitmqSource(url, queue).open(Bell(), no_drain)


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607


# What a message looks like


def test_ids_keys_and_properties_come_in_as_headers(place: RabbitmqPlace) -> None:
    place.send(b"a", message_id="mine", timestamp=1_700_000_000, correlation_id="c1", content_type="application/json")
    place.send(b"b", message_id="mine", headers={"inferbus-id": "given"}, reply_to="answers", expiration="60000")
    place.send(
        b"c",
        expiration="60000",
        correlation_id="c2",
        headers={"inferbus-timeout-ms": "5", "correlation_id": "own", "inferbus-key": b"\xff"},
    )
    place.send(b"d", headers={"n": 3, "yes": True, "nested": {"a": [1, "x"]}, "none": None, "two": ["1", 2]})
    place.send(b"d")
    place.send(b"f", message_id="mine", headers={"ce_source": "/shop", "ce_id": "7"})
    with opened(place.source()) as source:
        a, b, c, d, e, f = receive(source, 6)
        settle(source, [a, b, c, d, e, f])
    assert f.id == "mine"  # before that of the event
    assert (a.id, a.created_at, a.key) == ("mine", 1_700_000_000.0, None)
    assert a.headers == (("correlation_id", b"c1"), ("content-type", b"application/json"))
    assert b.id == "given"
    assert b.headers == (
        ("inferbus-id", b"given"),
        ("inferbus-reply-to", b"answers"),
        ("inferbus-timeout-ms", b"60000"),
    )
    assert c.key == b"\xff"
    assert c.headers == (("inferbus-timeout-ms", b"5"), ("correlation_id", b"own"))
    assert d.headers == (
        ("n", b"3"),
        ("yes", b"true"),
        ("nested", b'{"a":[1,"x"]}'),
        ("none", b""),
        ("two", b"1"),
        ("two", b"2"),
    )
    assert d.id == e.id
    assert d.id.startswith("body-")
    assert len(d.id) == 5 + 32
    assert d.id != c.id


def test_a_message_whose_headers_cannot_be_read_harms_itself_alone(
    place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.publish(b"before")
    encode = pika.data.encode_value

    def out_of_range(pieces: list[bytes], value: Any) -> int:
        if value == "never":
            pieces.append(b"T" + b"\x7f" * 8)  # a time some hundred billion years from now
            return 9
        return int(encode(pieces, value))

    with monkeypatch.context() as patched:
        patched.setattr(pika.data, "encode_value", out_of_range)
        place.send(b"odd", message_id="o", headers={"when": "never"})
        place.send(b"odder", headers={"when": "never"})
    place.publish(b"after")
    with opened(place.source()) as source:
        messages = receive(source, 4)
        assert [m.body for m in messages] == [b"before", b"odd", b"odder", b"after"]
        odd = messages[1]
        assert isinstance(odd, Unreadable)
        assert odd.code == "invalid_request"
        assert "headers could not be read" in odd.reason
        settle(source, messages)
        assert source.exhausted()


def test_records_carry_their_id_key_and_properties(place: RabbitmqPlace) -> None:
    long = "i" * 300
    messages = [Message(name, None, b"", (), None, 1, None) for name in ("short", long)]
    headers = [
        [("content-type", b"application/json"), ("correlation_id", b"c" * size), ("both", b"1"), ("both", b"\xff")]
        for size in (10, 300)
    ]
    with opened_sink(place.sink()) as sink:
        assert write(sink, Records(messages, [b"key", b"\xff"], [b"1", b"2"], headers)) == []
    (first, one), (second, two) = place.delivered()
    assert (first.message_id, first.correlation_id, first.content_type) == ("short", "c" * 10, "application/json")
    assert first.delivery_mode == 2
    assert first.headers["inferbus-key"] == "key"
    assert (second.message_id, second.correlation_id) == (None, None)
    assert [one.headers, two.headers] == headers
    assert (one.key, two.key) == (b"key", b"\xff")


# What a sink refuses, and what it tries again


def test_a_record_that_no_queue_takes_is_tried_again_and_nothing_is_lost(place: RabbitmqPlace) -> None:
    exchange = f"x-{place.answers}"
    with place.bus.channel() as channel:
        channel.exchange_declare(exchange, "direct")
        with opened_sink(RabbitmqSink(Connection(place.bus.url, AmqpTls()), exchange, "there")) as sink:
            failures = write(sink, records(20))
            assert [i for i, _ in failures] == list(range(20))
            assert all(isinstance(error, Unavailable) and "no queue is bound" in str(error) for _, error in failures)
            channel.queue_bind(place.answers, exchange, "there")
            assert write(sink, records(20)) == []
        channel.exchange_delete(exchange)
    assert len(place.seen()) == 20


def test_a_queue_that_is_full_has_the_rest_tried_again(rabbitmq: RabbitMQ) -> None:
    place = RabbitmqPlace(rabbitmq)
    place.answers = rabbitmq.queue("classic", {"x-max-length": 5, "x-overflow": "reject-publish"})
    with opened_sink(place.sink()) as sink:
        failures = write(sink, plain(20))
        assert len(failures) == 15
        assert all(isinstance(error, Unavailable) for _, error in failures)
        assert len(place.seen()) == 5
        assert write(sink, plain(5)) == []


def test_writes_finish_in_order_while_several_are_under_way(place: RabbitmqPlace) -> None:
    finished: list[tuple[int, Sequence[Failure]]] = []
    with opened_sink(place.sink()) as sink:
        for i in range(20):
            sink.write(plain(100), lambda failures, i=i: finished.append((i, failures)))  # type: ignore[misc]
        until(lambda: [sink.tick()] and len(finished) == 20)  # type: ignore[func-returns-value]
    assert finished == [(i, []) for i in range(20)]
    assert len(place.seen()) == 2000


def test_records_whose_headers_no_frame_holds_are_refused_alone(place: RabbitmqPlace) -> None:
    given = plain(5)
    given.headers[1].append(("large", b"h" * 140_000))
    given.headers[3].append(("n" * 256, b"v"))
    with opened_sink(place.sink()) as sink:
        failures = dict(write(sink, given))
        assert sorted(failures) == [1, 3]
        assert isinstance(failures[1], TooLarge)
        assert isinstance(failures[3], Refused)
        assert sink.healthy() is None
    assert len(place.seen()) == 3


def test_a_cut_connection_fails_what_was_not_confirmed_and_the_next_one_takes_over(
    place: RabbitmqPlace, proxy: Proxy
) -> None:
    verdicts: list[Sequence[Failure]] = []
    with opened_sink(RabbitmqSink(Connection(proxy.url, AmqpTls()), "", place.answers)) as sink:
        assert write(sink, plain(3)) == []
        proxy.held = True
        sink.write(plain(30), verdicts.append)
        sink.write(plain(30), verdicts.append)
        until(lambda: len(sink._unconfirmed) == 60)
        proxy.cut()
        until(lambda: [sink.tick()] and len(verdicts) == 2)  # type: ignore[func-returns-value]
        assert [[i for i, _ in failures] for failures in verdicts] == [list(range(30))] * 2
        assert all(isinstance(error, Unavailable) for failures in verdicts for _, error in failures)
        until(lambda: sink.healthy() is None)
        assert write(sink, plain(3)) == []


def test_a_sink_that_is_closed_drops_what_is_not_confirmed_in_time(place: RabbitmqPlace, proxy: Proxy) -> None:
    verdicts: list[Sequence[Failure]] = []
    sink = RabbitmqSink(Connection(proxy.url, AmqpTls()), "", place.answers)
    sink.open(Bell())
    proxy.held = True
    sink.write(plain(3), verdicts.append)
    sink.close(0.1)
    assert [[i for i, _ in failures] for failures in verdicts] == [[0, 1, 2]]


def test_sinks_share_a_connection_and_the_last_one_closes_it(place: RabbitmqPlace) -> None:
    connection = Connection(place.bus.url, AmqpTls())
    one, two = (RabbitmqSink(connection, "", queue) for queue in (place.answers, place.requests))
    one.open(Bell())
    two.open(Bell())
    one.close(1.0)
    assert write(two, plain(3)) == []
    two.close(1.0)
    assert connection._thread is None
    assert place.left() == 3


@pytest.fixture(scope="module")
def narrow() -> Iterator[RabbitMQ]:
    """A broker that takes messages of at most 100,000 bytes."""
    with started_rabbitmq({"max_message_size": "100000"}) as server:
        yield server


def test_only_the_record_the_broker_finds_too_large_is_refused(narrow: RabbitMQ) -> None:
    place = RabbitmqPlace(narrow)
    bodies = [b"%d" % i for i in range(20)]
    bodies[7] = b"x" * 100_001
    given = plain(20)
    given.bodies = bodies
    left = list(range(20))
    refused: dict[int, Exception] = {}
    with opened_sink(place.sink()) as sink:
        while left:
            failures = write(sink, given.take(left))
            refused |= {left[i]: error for i, error in failures if isinstance(error, Refused)}
            left = [left[i] for i, error in failures if not isinstance(error, Refused)]
            until(lambda: sink.healthy() is None)
        assert list(refused) == [7]
        assert isinstance(refused[7], TooLarge)
        assert [i for i, _ in write(sink, given)] == [7]  # known by now: the others do not suffer
    assert {seen.body for seen in place.seen()} == {body for body in bodies if len(body) < 100_000}


def test_a_broker_short_of_memory_blocks_publishers_and_we_say_so() -> None:
    with started_rabbitmq({"vm_memory_high_watermark.absolute": "1MB"}) as server:
        connection = pika.BlockingConnection(pika.URLParameters(server.url))
        connection.channel().queue_declare("q", durable=True)
        connection.close()
        with opened_sink(RabbitmqSink(Connection(server.url, AmqpTls()), "", "q")) as sink:
            sink.write(plain(1), lambda _: None)
            until(sink.healthy)
            assert "blocks publishers" in str(sink.healthy())
            sink.close(0.1)
