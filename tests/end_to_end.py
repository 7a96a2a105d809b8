"""What the end-to-end scenarios share: workers as real processes, requests that know their answer, and the count.

A scenario publishes requests, does harm, and in the end holds every outcome on the topics against every delivery:
none may be missing, none may be a stranger, and each must carry its own key, id, headers and values.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
import yaml
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from onnx import helper
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import Kafka
from tests.tiny_models import floats, python_model, save

COMMAND = (sys.executable, "-m", "inferbus.worker.cli", "run")
PATIENCE = 120.0  # seconds any one thing may take before the scenario is called hung
CHANCE = random.Random(3)  # noqa: S311 - no secret hangs on it
Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Sizes:
    """How large the scenarios are: whole in a soak (INFERBUS_SOAK=1), about a tenth otherwise."""

    kills: int = 50
    requests_under_kills: int = 20_000
    malformed: int = 5_000
    broker_restarts: int = 10
    rounds_of_workers: int = 10  # of joining, and leaving or being killed
    requests: int = 20_000  # of every other scenario that needs many


SIZES = Sizes()
if os.environ.get("INFERBUS_SOAK") != "1":
    SIZES = Sizes(**{name: max(1, size // 10) for name, size in vars(SIZES).items()})


# The model: `x` FP32 [-1, 3], or wider where the rest counts nothing, -> `y` FP32 [-1, 2]. All weights and inputs are
# whole numbers, so every answer is exact.

WEIGHTS = np.array([[1, -1], [2, 3], [4, 5]], np.float32)

_PYTHON = """
import time
import numpy as np
from inferbus.models import Model

class Affine(Model):
    calls = 0

    def predict(self, inputs):
        self.calls += 1
        x = inputs["x"]
        y = x @ np.array({weights}, np.float32)
{harm}
        return {{"y": y}}
"""
_PYTHON_YAML = """
inputs: [{name: x, datatype: FP32, shape: [-1, 3]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 2]}]
"""


def onnx_model(folder: Path, width: int = 3) -> Path:
    """The model as ONNX."""
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    weights = np.vstack([WEIGHTS, np.zeros((width - 3, 2), np.float32)])
    x, y = floats("x", ["batch", width]), floats("y", ["batch", 2])
    return save(folder / "affine.onnx", [node], [x], [y], weights={"weights": weights})


def model_that(harm: str, folder: Path) -> Path:
    """The model in Python, which before it answers `y` for `x` in its `self.calls`-th call runs the lines `harm`."""
    indented = "\n".join(f"        {line}" for line in harm.splitlines())
    return python_model(folder, _PYTHON.format(weights=WEIGHTS.tolist(), harm=indented), _PYTHON_YAML)


# Requests


@dataclass(frozen=True, slots=True)
class Request:
    """What is published, and what must become of it.

    Attributes:
        expected: Rows of `y`, or the codes of which its error record must have one.
        partition: -1 lets the key decide.
        topic: Where it was published; empty before.
        offset: The same.
    """

    body: bytes
    key: bytes | None
    headers: Headers
    expected: list[list[float]] | frozenset[str]
    partition: int = -1
    topic: str = ""
    offset: int = -1

    @property
    def id(self) -> str:
        """As the contract resolves it."""
        found = dict(self.headers)
        if given := found.get("inferbus-id"):
            return given.decode()
        if "ce_id" in found and "ce_source" in found:
            return f"{found['ce_source'].decode()}/{found['ce_id'].decode()}"
        return f"{self.topic}-{self.partition}-{self.offset}"


def body_of(rows: Sequence[Sequence[float]], width: int = 3) -> bytes:
    """A V2 request for these rows of `x`, filled up with zeros."""
    flat = [value for row in rows for value in (*row, *[0.0] * (width - 3))]
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), width], "data": flat}]})


def asking(
    rows: Sequence[Sequence[float]], key: bytes | None = None, headers: Headers = (), *, width: int = 3
) -> Request:
    """A good request for these rows."""
    answer: list[list[float]] = (np.array(rows, np.float32) @ WEIGHTS).tolist()
    return Request(body_of(rows, width), key, headers, answer)


def refused(body: bytes, key: bytes | None, headers: Headers, *codes: str) -> Request:
    """A request that must end as an error with one of these codes."""
    return Request(body, key, headers, frozenset(codes))


def good(serial: int, *, keys: int = 50, width: int = 3) -> Request:
    """A good request of 1 to 3 rows; key, id, headers and values all follow from the serial number."""
    rows = [(float(serial), float(serial % 7), float(i)) for i in range(1 + serial % 3)]
    headers = (
        ("tenant", b"t%d" % (serial % 11)),
        ("inferbus-id", b"r-%d" % serial),
        ("traceparent", b"00-%032x-%016x-01" % (serial + 1, serial + 1)),
        ("tenant", bytes([serial % 256])),  # twice, and not text
    )
    return asking(rows, b"k%d" % (serial % keys), headers, width=width)


def good_ones(count: int, first: int = 0, *, keys: int = 50, width: int = 3) -> list[Request]:
    """`count` good requests from serial number `first` on."""
    return [good(serial, keys=keys, width=width) for serial in range(first, first + count)]


def shuffled(requests: Iterable[Request]) -> list[Request]:
    """The same in a random order, and in the same one each time."""
    several = list(requests)
    CHANCE.shuffle(several)
    return several


def publish(brokers: str, topic: str, requests: Iterable[Request], *, rate: float = 0.0) -> list[Request]:
    """Publish in order, at most `rate` a second; answers the same requests with the place each was given.

    Broker restarts are sat out: the client is idempotent and patient.
    """
    failures: list[KafkaError] = []
    placed: dict[int, Request] = {}

    def report(number: int, request: Request, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            failures.append(error)
        else:
            placed[number] = replace(request, topic=topic, partition=message.partition(), offset=message.offset())

    settings = {"bootstrap.servers": brokers, "enable.idempotence": True, "linger.ms": 2}
    producer = Producer({**settings, "partitioner": "murmur2_random", "error_cb": lambda _: None, "log_level": 0})
    began = time.monotonic()
    for number, request in enumerate(requests):
        while rate and time.monotonic() < began + number / rate:
            producer.poll(0.002)
        producer.produce(
            topic,
            request.body,
            request.key,
            request.partition,
            lambda error, message, n=number, r=request: report(n, r, error, message),
            headers=list(request.headers),
        )
        producer.poll(0)
    assert producer.flush(PATIENCE) == 0
    assert not failures
    return [placed[number] for number in sorted(placed)]


class Load(threading.Thread):
    """Publishes good requests, `rate` a second, while the scenario does its harm; `end` answers what was placed."""

    def __init__(self, brokers: str, topic: str, rate: float) -> None:
        super().__init__(name="load", daemon=True)
        self._place, self._rate = (brokers, topic), rate
        self._ending = threading.Event()
        self._placed: list[Request] = []
        self.start()

    def _requests(self) -> Iterator[Request]:
        return itertools.takewhile(lambda _: not self._ending.is_set(), map(good, itertools.count()))

    def run(self) -> None:
        self._placed = publish(*self._place, self._requests(), rate=self._rate)

    def end(self) -> list[Request]:
        self._ending.set()
        self.join(2 * PATIENCE)
        assert self._placed, "not everything could be published"
        return self._placed


# Outcomes


@dataclass(frozen=True, slots=True)
class Outcome:
    """A record on the sink or on the error topic."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    body: bytes
    headers: Headers

    @property
    def id(self) -> str:
        """Header `inferbus-id` of a prediction, `id` of an error record."""
        return str(self.error["id"]) if self.error else self.header("inferbus-id").decode()

    @property
    def error(self) -> dict[str, Any]:
        """The header `inferbus-error`; empty for a prediction."""
        name, value = self.headers[-1]
        found: dict[str, Any] = orjson.loads(value) if name == "inferbus-error" else {}
        return found

    @property
    def rows(self) -> list[list[float]]:
        """`y` of a prediction."""
        (output,) = orjson.loads(self.body)["outputs"]
        rows: list[list[float]] = np.array(output["data"]).reshape(output["shape"]).tolist()
        return rows

    @property
    def timing(self) -> dict[str, Any]:
        """The header `inferbus-timing` of a prediction."""
        found: dict[str, Any] = orjson.loads(self.header("inferbus-timing"))
        return found

    def header(self, name: str) -> bytes:
        """The one header of that name."""
        (value,) = [value for own, value in self.headers if own == name]
        return value


class Outcomes:
    """Reads topics of outcomes, further to their end each time it is asked."""

    def __init__(self, brokers: str, topics: Sequence[str]) -> None:
        settings = {"bootstrap.servers": brokers, "group.id": "reader", "enable.auto.commit": False}
        self._consumer = Consumer({**settings, "error_cb": lambda _: None, "log_level": 0, "fetch.wait.max.ms": 20})
        self._ends: dict[tuple[str, int], int] = {}
        for topic in topics:
            partitions = self._consumer.list_topics(topic, timeout=30.0).topics[topic].partitions
            self._ends |= {(topic, partition): 0 for partition in partitions}
        self._at = dict.fromkeys(self._ends, 0)
        self._consumer.assign([TopicPartition(*place, 0) for place in self._ends])
        self._read: list[Outcome] = []

    def count(self) -> int:
        """How many there are, without reading them."""
        self._ends = {place: self._end(TopicPartition(*place)) for place in self._ends}
        return sum(self._ends.values())

    def _end(self, place: TopicPartition) -> int:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                _, end = self._consumer.get_watermark_offsets(place, timeout=30.0)
            except KafkaException:  # a broker that has just come up may not know the partition yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return int(end)

    def read(self) -> list[Outcome]:
        """All of them up to now, in the order of each partition."""
        self.count()
        until = time.monotonic() + PATIENCE
        while any(self._at[place] < end for place, end in self._ends.items()):
            assert time.monotonic() < until, "the topics of outcomes could not be read to their end"
            for m in self._consumer.consume(1000, 0.05):
                if m.error() is None:
                    headers = tuple(m.headers() or ())
                    place = m.topic(), m.partition()
                    self._read.append(Outcome(*place, m.offset(), m.key(), m.value() or b"", headers))
                    self._at[place] = m.offset() + 1
        return self._read

    def close(self) -> None:
        self._consumer.close()


ERROR_KEYS = {"id", "code", "message", "stage", "source", "attempts", "model", "time"}


def accounted(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> int:
    """Hold every outcome against its request, all of them; answers how many are repeats.

    Requests that share an id must be alike, for then nobody can tell which one an outcome answers.
    """
    asked = defaultdict(list)
    for request in requests:
        asked[request.id].append(request)
    given = Counter(outcome.id for outcome in outcomes)
    lost = [id_ for id_, several in asked.items() if given[id_] < len(several)]
    assert not lost, f"{len(lost)} of {len(asked)} ids have too few outcomes, such as {lost[:5]}"
    strangers = [id_ for id_ in given if id_ not in asked]
    assert not strangers, f"outcomes of what was never asked: {strangers[:5]}"
    for outcome in outcomes:
        check(outcome, asked[outcome.id])
    return len(outcomes) - len(requests)


def check(outcome: Outcome, candidates: Sequence[Request]) -> None:
    """It carries what its request carried, and the answer to it."""
    request = candidates[0]
    assert outcome.key == request.key, outcome.id
    assert outcome.partition in {candidate.partition for candidate in candidates}, outcome.id
    if not outcome.error:
        assert isinstance(request.expected, list), f"{outcome.id} got a prediction, not {request.expected}"
        check_prediction(outcome, request)
        return
    assert not isinstance(request.expected, list), f"{outcome.id} got {outcome.error}"
    assert outcome.error["code"] in request.expected, f"{outcome.id} got {outcome.error}"
    check_error(outcome, request)


def check_prediction(outcome: Outcome, request: Request) -> None:
    """Values, id and headers of a prediction."""
    assert outcome.rows == request.expected, outcome.id
    answer = orjson.loads(outcome.body)
    assert answer["id"] == outcome.id
    assert outcome.header("inferbus-status") == b"ok"
    assert outcome.header("content-type") == b"application/json"
    assert outcome.header("inferbus-model") == f"{answer['model_name']}@{answer['model_version']}".encode()
    assert outcome.timing.keys() == {"batch", "rows", "predict_ms", "worker"}
    for name in ("traceparent", "correlation_id"):
        assert [h for h in outcome.headers if h[0] == name] == [h for h in request.headers if h[0] == name]


def check_error(outcome: Outcome, request: Request) -> None:
    """The request byte for byte, and one header more."""
    error = outcome.error
    assert outcome.headers[:-1] == request.headers, outcome.id
    assert error.keys() - {"body"} == ERROR_KEYS, error
    assert outcome.body == (b"" if "body" in error else request.body), outcome.id
    assert error["source"] == f"kafka:{request.topic}/{request.partition}/{request.offset}"
    assert error["message"]
    assert error["attempts"] == 1
    assert abs(error["time"] - time.time()) < 3600


# Workers


class Worker:
    """One `inferbus run`, until it has ended or is killed."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            environ = {**os.environ, "INFERBUS_LOG": "json"}
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=environ
            )

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        assert self.process.poll() is None, f"ended before it was killed\n{self.log()}"
        self.process.kill()
        self.process.wait(10.0)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM; it must drain and exit 0."""
        self.terminate()
        assert self.ended() == 0, self.log()

    def ended(self, timeout: float = PATIENCE) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:.0f} s\n{self.log()}") from None

    def log(self) -> str:
        """What it said last, for people."""
        return self._log.read_text(errors="replace")[-6000:]

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log events of that name."""
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry)
        return found

    def running(self) -> bool:
        return self.process.poll() is None

    def has_said(self, event: str) -> dict[str, Any]:
        """Wait for an event."""
        await_(lambda: self.said(event) or not self.running(), f"event {event}", self)
        found = self.said(event)
        assert found, f"ended with {self.process.returncode} before it said {event}\n{self.log()}"
        return found[0]

    def is_ready(self) -> Self:
        """Wait until it serves."""
        self.has_said("ready")
        return self

    def get(self, page: str) -> tuple[int, str]:
        """Status and body of a page of its listener."""
        connection = http.client.HTTPConnection("127.0.0.1", self.has_said("http_listening")["port"], timeout=10.0)
        with contextlib.closing(connection):
            connection.request("GET", page)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def answers(self, page: str, status: int) -> None:
        """Wait until a page of its listener has this status."""
        await_(lambda: self.get(page)[0] == status, f"{page} to answer {status}", self)


def await_(condition: Callable[[], object], what: str, *workers: Worker, timeout: float = PATIENCE) -> None:
    """Wait until the condition holds; when it does not in time, fail with the workers' last words."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            logs = "\n".join(worker.log() for worker in workers)
            raise AssertionError(f"waited {timeout:.0f} s for {what}\n{logs}")
        time.sleep(0.02)


class Scene:
    """One pipeline on topics of its own, its workers, and what was asked of it.

    Args:
        kafka: The cluster.
        folder: Where pipeline files and logs go.
        model: The model file; by default the ONNX one.
        partitions: Of the requests; the outcomes have as many.
        limits: Settings of the sink's topic.
        requests: The topic requests are read from; by default a new one.
        config: librdkafka properties of the source and, by default, the sinks.
        settings: Anything else of the pipeline file.
    """

    def __init__(
        self,
        kafka: Kafka,
        folder: Path,
        *,
        model: Path | None = None,
        partitions: int = 4,
        limits: Mapping[str, str | int] | None = None,
        requests: str | None = None,
        config: Mapping[str, object] | None = None,
        **settings: object,
    ) -> None:
        self.brokers = kafka.brokers
        self.topic = requests or kafka.topic(partitions)
        self.sink, self.errors = kafka.topic(partitions, **dict(limits or {})), kafka.topic(partitions)
        self.group = f"group-{self.sink}"
        self.asked: list[Request] = []
        self.workers: list[Worker] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._numbers = itertools.count(1)
        source = {"brokers": kafka.brokers, "topic": self.topic, "group": self.group}
        # A killed member keeps its partitions for as long as its session lasts.
        self.file = {
            "name": "affine",
            "model": str(model or onnx_model(folder)),
            "source": {"kafka": {**source, "config": {**self._session(config or {}), **(config or {})}}},
            "sink": {"kafka": {"topic": self.sink}},
            "errors": {"kafka": {"topic": self.errors}},
            "http": {"port": 0},
            **settings,
        }
        self.outcomes = Outcomes(self.brokers, [self.sink, self.errors])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if worker.running():
                worker.kill()
            assert kind is not None or "Traceback" not in worker.log(), worker.log()
        self.outcomes.close()

    @staticmethod
    def _session(config: Mapping[str, object]) -> dict[str, object]:
        """With `group.protocol: consumer` it is the broker's to say how long that is."""
        return {} if config.get("group.protocol") == "consumer" else {"session.timeout.ms": 6000}

    def publish(self, requests: Iterable[Request]) -> list[Request]:
        """Publish, and expect the outcomes."""
        placed = publish(self.brokers, self.topic, requests)
        self.asked += placed
        return placed

    @contextlib.contextmanager
    def load(self, rate: float) -> Iterator[None]:
        """Publish in the background at `rate` a second; on exit all is published, and expected."""
        load = Load(self.brokers, self.topic, rate)
        try:
            yield
        finally:
            self.asked += load.end()

    def worker(self, *arguments: str, **config: object) -> Worker:
        """Start `inferbus run`; `config` are librdkafka properties with `_` for `.`, as `group_instance_id`."""
        number = next(self._numbers)
        path = self._folder / f"pipeline-{number}.yaml"
        path.write_text(yaml.safe_dump(self.file))
        overrides = [f"--set=source.kafka.config.{name.replace('_', '.')}={value}" for name, value in config.items()]
        worker = Worker([str(path), *overrides, *arguments], self._folder / f"worker-{number}.log")
        self.workers.append(worker)
        return worker

    def serve(self, *arguments: str) -> None:
        """Run a worker until it is idle; it must end with 0."""
        worker = self.worker("--until-idle", "0.5", *arguments)
        assert worker.ended() == 0, worker.log()

    def await_outcomes(self, count: int | None = None, timeout: float = PATIENCE) -> None:
        """Wait until there are so many outcomes; by default, until every id asked for has one."""
        if count is not None:
            await_(lambda: self.outcomes.count() >= count, f"{count} outcomes", *self.workers, timeout=timeout)
            return
        wanted = {request.id for request in self.asked}
        await_(self._none_missing(wanted), "every outcome", *self.workers, timeout=timeout)

    def _none_missing(self, wanted: set[str]) -> Callable[[], bool]:
        def look() -> bool:
            if self.outcomes.count() < len(wanted):
                return False
            wanted.difference_update(outcome.id for outcome in self.outcomes.read())
            return not wanted

        return look

    def accounted(self) -> int:
        """Every delivery has its own outcome; answers how many outcomes are repeats."""
        return accounted(self.asked, self.outcomes.read())

    def committed(self) -> dict[int, int]:
        """By partition, the offset the group has committed."""
        consumer = Consumer({"bootstrap.servers": self.brokers, "group.id": self.group})
        with contextlib.closing(consumer):
            partitions = consumer.list_topics(self.topic, timeout=30.0).topics[self.topic].partitions
            places = consumer.committed([TopicPartition(self.topic, p) for p in partitions], timeout=30.0)
            return {place.partition: place.offset for place in places}

    def served_by(self) -> Counter[str]:
        """Predictions by the id of the worker that made them."""
        return Counter(o.timing["worker"] for o in self.outcomes.read() if not o.error)


def repeated_later(outcomes: list[Outcome]) -> list[int]:
    """For each life of a worker, how many of its outcomes a later life repeats."""
    lives: dict[str, set[str]] = defaultdict(set)
    for outcome in outcomes:
        lives[outcome.timing["worker"]].add(outcome.id)
    ids = list(lives.values())
    return [len(own & set().union(*ids[life + 1 :])) for life, own in enumerate(ids)]


def value(worker: Worker, metric: str) -> float:
    """A metric, over all its labels."""
    families = text_string_to_metric_families(worker.get("/metrics")[1])
    return sum(s.value for family in families for s in family.samples if s.name == metric)
