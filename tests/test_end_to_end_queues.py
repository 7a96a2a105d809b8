"""Whole workers on real RabbitMQ and SQS: what is promised holds while all around does its worst."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pika
import pytest
import yaml
from botocore.exceptions import BotoCoreError, ClientError
from pika.exceptions import AMQPError

from inferbus.connectors.sqs_mapping import decoded, encoded
from tests.end_to_end import (
    CHANCE,
    ERROR_KEYS,
    PATIENCE,
    SIZES,
    Headers,
    Outcome,
    Request,
    Worker,
    asking,
    await_,
    body_of,
    check_prediction,
    good_ones,
    model_that,
    refused,
    repeated_later,
    shuffled,
    value,
)
from tests.malformed import malformed
from tests.servers import RabbitMQ, RabbitMQServer, Sqs, SqsServer, Toxiproxy

pytestmark = pytest.mark.broker

POISON = 666.0

# It would tell at length of each try to reach a server that we have killed.
logging.getLogger("pika").setLevel(logging.CRITICAL)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "inferbus")


# The queues


class Queues(ABC):
    """Queues of requests, predictions and error records on one server.

    Attributes:
        part: Of the requests of a scenario, one in so many is enough here: the server is that much slower.
        away: What a call raises while the server is away.
    """

    part = 1
    away: tuple[type[Exception], ...]

    @abstractmethod
    def places(self) -> dict[str, Any]:
        """`source`, `sink` and `errors` of a pipeline file."""

    @abstractmethod
    def publish(self, requests: Sequence[Request]) -> None:
        """Return when the server keeps them all."""

    @abstractmethod
    def ready(self) -> int:
        """Requests that anyone may receive now."""

    @abstractmethod
    def take(self) -> list[Outcome]:
        """Outcomes that have come; they are taken away."""


def outcome(queue: str, key: bytes | None, body: bytes, headers: Headers) -> Outcome:
    """With the header that makes it an error record, if it has it, at the end: on SQS headers have no order."""
    ordered = sorted(headers, key=lambda header: header[0] == "inferbus-error")
    return Outcome(queue, -1, 0, key, body, tuple(ordered))


class OnRabbitMQ(Queues):
    """Requests on a queue of this kind.

    Args:
        server: Where.
        kind: `classic` or `quorum`.
        url: By which workers reach the server, if not directly.
        arguments: More of the requests' queue.
    """

    away = (AMQPError, OSError)

    def __init__(
        self,
        server: RabbitMQ,
        kind: str = "classic",
        *,
        url: str | None = None,
        arguments: Mapping[str, str | int] | None = None,
    ) -> None:
        self._server = server
        self._url = url or server.url
        self._requests = server.queue(kind, arguments)
        self._outcomes = [server.queue(), server.queue()]

    def places(self) -> dict[str, Any]:
        sink, errors = ({"rabbitmq": {"routing_key": queue}} for queue in self._outcomes)
        return {"source": {"rabbitmq": {"url": self._url, "queue": self._requests}}, "sink": sink, "errors": errors}

    def publish(self, requests: Sequence[Request]) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self._server.url))
        channel = connection.channel()
        channel.tx_select()  # one answer for all of them
        for request in requests:
            table: dict[str, Any] = {}
            for name, content in (("inferbus-key", request.key), *request.headers):
                table.setdefault(name, []).append(content)
            # A header that is there twice is a list.
            table = {name: several[0] if len(several) == 1 else several for name, several in table.items()}
            properties = pika.BasicProperties(headers=table, delivery_mode=2)
            channel.basic_publish("", self._requests, request.body, properties)
        channel.tx_commit()
        connection.close()

    def ready(self) -> int:
        with self._server.channel() as channel:
            return int(channel.queue_declare(self._requests, passive=True).method.message_count)

    def take(self) -> list[Outcome]:
        found = []
        with self._server.channel() as channel:
            for queue in self._outcomes:
                while (came := channel.basic_get(queue, auto_ack=True))[0]:
                    found.append(self._outcome(queue, came[1].headers, came[2]))
        return found

    def _outcome(self, queue: str, table: Mapping[str, Any], body: bytes) -> Outcome:
        headers = [
            (name, item if isinstance(item, bytes) else item.encode())
            for name, content in table.items()
            for item in (content if isinstance(content, list) else [content])
        ]
        key = dict(headers).get("inferbus-key")
        return outcome(queue, key, body, tuple(header for header in headers if header[0] != "inferbus-key"))


class OnSqs(Queues):
    """Standard queues, whose messages come again 10 s after a crash."""

    part = 4
    away = (BotoCoreError, ClientError)

    def __init__(self, server: Sqs) -> None:
        self._server = server
        self._requests, *self._outcomes = (server.queue() for _ in range(3))

    def places(self) -> dict[str, Any]:
        at = {"region": self._server.region, "endpoint_url": self._server.url}
        sink, errors = ({"sqs": {"queue": queue}} for queue in self._outcomes)
        source = {"sqs": {"queue": self._requests, "visibility_timeout": "10s", **at}}
        return {"source": source, "sink": sink, "errors": errors}

    def publish(self, requests: Sequence[Request]) -> None:
        url = self._server.address(self._requests)
        for i in range(0, len(requests), 10):
            entries = []
            for number, request in enumerate(requests[i : i + 10]):
                text, attributes, _ = encoded(request.key, request.body, request.headers)
                entries.append({"Id": str(number), "MessageBody": text, "MessageAttributes": attributes})
            assert not self._server.client.send_message_batch(QueueUrl=url, Entries=entries).get("Failed")

    def ready(self) -> int:
        wanted = "ApproximateNumberOfMessages"
        url = self._server.address(self._requests)
        found = self._server.client.get_queue_attributes(QueueUrl=url, AttributeNames=[wanted])
        return int(found["Attributes"][wanted])

    def take(self) -> list[Outcome]:
        found = []
        for queue in self._outcomes:
            ask = {"QueueUrl": self._server.address(queue), "MaxNumberOfMessages": 10, "MessageAttributeNames": ["All"]}
            while came := self._server.client.receive_message(**ask).get("Messages"):
                entries = [{"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(came)]
                self._server.client.delete_message_batch(QueueUrl=ask["QueueUrl"], Entries=entries)
                found += [outcome(queue, *decoded(message)) for message in came]
        return found


Place = Callable[..., Queues]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """Makes queues: `classic` or `quorum` ones of RabbitMQ, or SQS's."""

    def make(kind: str, **settings: Any) -> Queues:
        if kind == "sqs":
            return OnSqs(request.getfixturevalue("sqs"))
        return OnRabbitMQ(request.getfixturevalue("rabbitmq"), kind, **settings)

    return make


# A scene


class Load(threading.Thread):
    """Publishes good requests, `rate` a second, also past a server that is away; `end` answers which.

    What may have been published before the server went away is published again.
    """

    AT_ONCE = 10

    def __init__(self, queues: Queues, rate: float) -> None:
        super().__init__(name="load", daemon=True)
        self._queues, self._rate = queues, rate
        self._ending = threading.Event()
        self._published: list[Request] = []
        self.start()

    def run(self) -> None:
        for first in itertools.count(0, self.AT_ONCE):
            requests = good_ones(self.AT_ONCE, first)
            while not self._put(requests):
                pass
            self._published += requests
            if self._ending.wait(self.AT_ONCE / self._rate):
                return

    def _put(self, requests: list[Request]) -> bool:
        try:
            self._queues.publish(requests)
        except self._queues.away:
            time.sleep(0.1)
            return False
        return True

    def end(self) -> list[Request]:
        self._ending.set()
        self.join(PATIENCE)
        assert not self.is_alive(), "not everything could be published"
        return self._published


class Scene:
    """One pipeline on queues of its own, its workers, and what was asked of it.

    Args:
        queues: Its queues.
        folder: Where pipeline files and logs go.
        model: The model file.
        settings: Anything else of the pipeline file.
    """

    def __init__(self, queues: Queues, folder: Path, model: Path, **settings: object) -> None:
        self.queues = queues
        self.asked: list[Request] = []
        self.outcomes: list[Outcome] = []
        self.workers: list[Worker] = []
        self._folder = folder
        pipeline = {"name": "affine", "model": str(model), "http": {"port": 0}, **queues.places(), **settings}
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers:
            if worker.running():
                worker.kill()
            assert kind is not None or "Traceback" not in worker.log(), worker.log()

    def publish(self, requests: Sequence[Request]) -> None:
        """Publish, and expect the outcomes."""
        self.queues.publish(requests)
        self.asked += requests

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Publish in the background; on exit all is published, and expected."""
        load = Load(self.queues, 200 / self.queues.part)
        try:
            yield
        finally:
            self.asked += load.end()

    def worker(self, *arguments: str) -> Worker:
        """Start `inferbus run`."""
        log = self._folder / f"worker-{len(self.workers) + 1}.log"
        self.workers.append(Worker([str(self._folder / "pipeline.yaml"), *arguments], log))
        return self.workers[-1]

    def serve(self) -> None:
        """Run a worker until it is idle; it must end with 0."""
        worker = self.worker("--until-idle", "0.5")
        assert worker.ended() == 0, worker.log()

    def seen(self) -> list[Outcome]:
        """All outcomes up to now."""
        self.outcomes += self.queues.take()
        return self.outcomes

    def await_more(self, count: int) -> None:
        """Wait for so many outcomes from now on."""
        wanted = len(self.seen()) + count
        await_(lambda: len(self.seen()) >= wanted, f"{count} more outcomes", *self.workers)

    def await_all(self) -> None:
        """Wait until every request has an outcome."""
        wanted = {request.id for request in self.asked}
        await_(lambda: wanted <= {one.id for one in self.seen()}, "every outcome", *self.workers)

    def accounted(self) -> int:
        """Every request has an outcome, and each is right; answers how many are repeats."""
        asked = {request.id: request for request in self.asked}
        assert len(asked) == len(self.asked)
        given = Counter(one.id for one in self.seen())
        lost = [id_ for id_ in asked if id_ not in given]
        assert not lost, f"{len(lost)} of {len(asked)} requests have no outcome, such as {lost[:5]}"
        assert not given.keys() - asked.keys(), "outcomes of what was never asked"
        for one in self.outcomes:
            check(one, asked[one.id])
        return len(self.outcomes) - len(asked)


def check(one: Outcome, request: Request) -> None:
    """It carries what its request carried, and the answer to it."""
    assert one.key == request.key, one.id
    error = one.error
    if isinstance(request.expected, list):
        assert not error, f"{one.id} got {error}"
        check_prediction(one, request)
        return
    assert error, f"{one.id} got a prediction, not {request.expected}"
    assert error["code"] in request.expected, f"{one.id} got {error}"
    assert error.keys() == ERROR_KEYS
    assert (one.body, sorted(one.headers[:-1])) == (request.body, sorted(request.headers)), one.id
    assert error["source"].startswith(("rabbitmq:q-", "sqs:t-"))


Stage = Callable[..., Scene]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Stage]:
    """Makes the scene on these queues; what still runs at the end is killed. A batch takes 5 ms."""
    with ExitStack() as stack:

        def make(queues: Queues, harm: str = "time.sleep(0.005)", **settings: object) -> Scene:
            model = model_that(harm, tmp_path / "model")
            return stack.enter_context(Scene(queues, tmp_path, model, **{"batch": {"max_rows": 16}, **settings}))

        yield make


ON_BOTH = pytest.mark.parametrize("kind", ["classic", "sqs"], ids=["rabbitmq", "sqs"])


# Workers that die, come and go


@pytest.mark.parametrize("kind", ["classic", "quorum", "sqs"])
def test_kill_9_in_a_loop_loses_nothing_and_repeats_no_more_than_was_in_flight(
    place: Place, scene: Stage, kind: str
) -> None:
    # A quorum queue takes each crash for a failed attempt of all that was in flight.
    queues = place(kind, **({"arguments": {"x-delivery-limit": SIZES.kills}} if kind == "quorum" else {}))
    at_most = 200 // queues.part
    fragile = f"time.sleep(0.005)\nif (x[:, 2] == {POISON}).any(): raise ValueError"
    the = scene(queues, fragile, flow={"max_inflight": at_most})
    share = SIZES.requests_under_kills // SIZES.kills // queues.part
    for life in range(SIZES.kills):
        the.publish(mixed(share, life * share))
        worker = the.worker()
        the.await_more(CHANCE.randrange(1, share // 2))
        time.sleep(CHANCE.random() * 0.05)
        worker.kill()
    the.serve()

    assert the.accounted() <= at_most * SIZES.kills
    for repeated in repeated_later([one for one in the.outcomes if not one.error]):
        assert repeated <= at_most


def mixed(count: int, first: int) -> list[Request]:
    """So many requests, of which one in ten is malformed and one is poison to the model."""
    bad = itertools.cycle(body for _, body, headers in malformed() if not headers and len(body) < 10_000)
    requests = good_ones(count, first)
    for serial in range(first, first + count, 10):
        requests[serial - first] = refused(next(bad), b"k%d" % serial, bad_headers(serial), "invalid_request")
    poison = body_of([(1.0, 1.0, POISON)])
    requests[1] = refused(poison, b"poison", bad_headers(first + 1), "model_error")
    return shuffled(requests)


def bad_headers(serial: int) -> Headers:
    return (("inferbus-id", b"bad-%d" % serial), ("tenant", b"\xff"), ("tenant", b""))


@ON_BOTH
def test_two_workers_share_a_queue_and_each_request_has_exactly_one_outcome(
    place: Place, scene: Stage, kind: str
) -> None:
    the = scene(place(kind), flow={"max_inflight": 32})
    crew = [the.worker().is_ready(), the.worker().is_ready()]
    with the.load():
        the.await_more(400 // the.queues.part)
        await_(lambda: len({one.timing["worker"] for one in the.seen()}) == 2, "both to serve", *crew)
    the.await_all()
    for worker in crew:
        worker.stop()
    assert the.accounted() == 0


@ON_BOTH
def test_sigterm_under_load_leaves_nothing_held_back_from_others(place: Place, scene: Stage, kind: str) -> None:
    at_most = 64
    the = scene(place(kind), "time.sleep(0.1)", flow={"max_inflight": at_most})
    the.publish(good_ones(300))
    # Within its drain a worker finishes what it has; past it, it gives back the rest.
    for drain, repeats in (("20s", 0), ("200ms", at_most)):
        worker = the.worker("--set", f"drain={drain}")
        the.await_more(20)
        worker.stop()
        left = the.queues.ready()  # what is invisible, or not acknowledged, is not among these
        assert left > 0
        assert 0 <= left + len(the.seen()) - len(the.asked) <= repeats
    the.serve()
    assert the.accounted() <= at_most


# Long predictions


@pytest.mark.parametrize(("kind", "seconds"), [("classic", 8), ("sqs", 35)], ids=["rabbitmq", "sqs"])
def test_a_prediction_longer_than_heartbeat_and_visibility_timeout_is_delivered_once(
    rabbitmq: RabbitMQ, place: Place, scene: Stage, kind: str, seconds: int
) -> None:
    impatient = {} if kind == "sqs" else {"url": f"{rabbitmq.url}?heartbeat=2"}
    the = scene(place(kind, **impatient), f"if (x[:, 2] == {POISON}).any(): time.sleep({seconds})")
    crew = [the.worker().is_ready(), the.worker().is_ready()]  # either would get what the other lost
    the.publish([asking([(1.0, 2.0, POISON)], b"k", (("inferbus-id", b"long"),))])
    the.await_all()
    assert sum(value(worker, "inferbus_messages_received_total") for worker in crew) == 1
    for worker in crew:
        worker.stop()
    the.serve()
    assert the.accounted() == 0


# The server


def test_a_rabbitmq_restarted_under_load_costs_nothing_but_time(
    restartable_rabbitmq: RabbitMQServer, scene: Stage
) -> None:
    restarted_under_load(scene(OnRabbitMQ(restartable_rabbitmq)), restartable_rabbitmq)


def test_an_sqs_restarted_under_load_costs_nothing_but_time(restartable_sqs: SqsServer, scene: Stage) -> None:
    restarted_under_load(scene(OnSqs(restartable_sqs)), restartable_sqs)


def restarted_under_load(the: Scene, server: RabbitMQServer | SqsServer) -> None:
    worker = the.worker().is_ready()
    with the.load():
        for _ in range(SIZES.broker_restarts):
            the.await_more(1000 // the.queues.part)  # 5 s: RabbitMQ 3.10 does not write a new queue down at once
            server.kill()
            worker.answers("/readyz", 503)
            server.start()
            worker.answers("/readyz", 200)
    the.await_all()
    worker.stop()
    the.accounted()


# The connection


def test_connections_cut_or_fallen_silent_are_made_anew_and_nothing_is_lost(
    rabbitmq: RabbitMQ, toxiproxy: Toxiproxy, scene: Stage
) -> None:
    at_most = 128
    proxy = toxiproxy.before(pika_address(rabbitmq))
    through = f"amqp://guest:guest@{proxy.address}/?heartbeat=2"
    the = scene(OnRabbitMQ(rabbitmq, url=through), flow={"max_inflight": at_most})
    worker = the.worker().is_ready()
    harms = [proxy.cut, proxy.silent] * SIZES.broker_restarts
    with the.load():
        for harm in harms:
            the.await_more(100)
            with harm():
                worker.answers("/readyz", 503)
            worker.answers("/readyz", 200)
    the.await_all()
    worker.stop()
    the.serve()
    assert the.accounted() <= at_most * len(harms)


def test_a_slow_connection_costs_nothing_but_time(rabbitmq: RabbitMQ, toxiproxy: Toxiproxy, scene: Stage) -> None:
    proxy = toxiproxy.before(pika_address(rabbitmq))
    the = scene(OnRabbitMQ(rabbitmq, url=f"amqp://guest:guest@{proxy.address}/"))
    worker = the.worker().is_ready()
    count = SIZES.requests // 10
    with proxy.slow(latency=0.1, rate=64 * 1024):
        the.publish(good_ones(count))
        the.await_all()
        worker.stop()
        the.publish(good_ones(count, count))
        the.serve()
    assert the.accounted() == 0


def pika_address(rabbitmq: RabbitMQ) -> str:
    at = pika.URLParameters(rabbitmq.url)
    return f"{at.host}:{at.port}"
