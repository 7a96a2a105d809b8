"""Any source with any sink: the same requests, good, malformed and poison, and the same outcomes, on real servers."""

from __future__ import annotations

import io
import os
import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition

from inferbus.worker.supervisor import COMMAND
from tests import tiny_models
from tests.servers import S3, Kafka, RabbitMQ, Sqs

pytestmark = pytest.mark.broker

PATIENCE = 60.0


class Outcome(NamedTuple):
    """What became of a request: its key, and what was predicted, or the code of its error and its body."""

    key: str | None
    y: list[float] | None = None
    code: str | None = None
    body: str | None = None


class Bus(ABC):
    """A place for requests and two for outcomes."""

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Where requests are read, as in a pipeline file."""

    @abstractmethod
    def publish(self, requests: Mapping[str, bytes]) -> None:
        """Put requests there, each under its id, with that as its key."""

    @abstractmethod
    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where predictions and error records go, as in a pipeline file."""

    @abstractmethod
    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        """All that lies there."""


def told(headers: Mapping[str, bytes | str], key: str | None, body: bytes) -> tuple[str, Outcome]:
    """A record on a bus as an outcome."""
    if "inferbus-error" in headers:
        error = orjson.loads(headers["inferbus-error"])
        return error["id"], Outcome(key, code=error["code"], body=body.decode())
    id_ = headers["inferbus-id"]
    assert headers["inferbus-status"] in (b"ok", "ok")
    return id_.decode() if isinstance(id_, bytes) else id_, Outcome(key, orjson.loads(body)["outputs"][0]["data"])


def row(fields: Mapping[str, Any]) -> tuple[str, Outcome]:
    """A row of a file as an outcome."""
    if "error" in fields:
        return fields["id"], Outcome(fields["key"], code=fields["error"]["code"], body=fields["body"])
    return fields["id"], Outcome(fields["key"], fields["y"])


class OnKafka(Bus):
    def __init__(self, kafka: Kafka) -> None:
        self._brokers = kafka.brokers
        self._topics = [kafka.topic(), kafka.topic(), kafka.topic()]

    def source(self) -> dict[str, Any]:
        return {"kafka": {"brokers": self._brokers, "topic": self._topics[0]}}

    def publish(self, requests: Mapping[str, bytes]) -> None:
        producer = Producer({"bootstrap.servers": self._brokers})
        for id_, body in requests.items():
            producer.produce(self._topics[0], body, id_, headers=[("inferbus-id", id_.encode())])
        assert producer.flush(PATIENCE) == 0

    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        places = [{"kafka": {"brokers": self._brokers, "topic": topic}} for topic in self._topics[1:]]
        return places[0], places[1]

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        reader = Consumer({"bootstrap.servers": self._brokers, "group.id": "reader"})
        try:
            places = [TopicPartition(topic, p, 0) for topic in self._topics[1:] for p in range(4)]
            left = sum(reader.get_watermark_offsets(place, PATIENCE)[1] for place in places)
            reader.assign(places)
            for _ in range(left):
                m = reader.poll(PATIENCE)
                assert m is not None
                yield told(dict(m.headers()), m.key() and m.key().decode(), m.value())
        finally:
            reader.close()


class OnRabbitMQ(Bus):
    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self._server = rabbitmq
        self._queues = [rabbitmq.queue(), rabbitmq.queue("quorum"), rabbitmq.queue()]

    def source(self) -> dict[str, Any]:
        return {"rabbitmq": {"url": self._server.url, "queue": self._queues[0]}}

    def publish(self, requests: Mapping[str, bytes]) -> None:
        import pika  # noqa: PLC0415 - beside its use

        with self._server.channel() as channel:
            for id_, body in requests.items():
                properties = pika.BasicProperties(message_id=id_, headers={"inferbus-key": id_})
                channel.basic_publish("", self._queues[0], body, properties, mandatory=True)

    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        places = [{"rabbitmq": {"url": self._server.url, "routing_key": queue}} for queue in self._queues[1:]]
        return places[0], places[1]

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        with self._server.channel() as channel:
            for queue in self._queues[1:]:
                while True:
                    method, properties, body = channel.basic_get(queue, auto_ack=True)
                    if method is None:
                        break
                    headers = properties.headers
                    yield told(headers, headers.get("inferbus-key"), body)


class OnSqs(Bus):
    def __init__(self, sqs: Sqs) -> None:
        self._server = sqs
        self._queues = [sqs.queue(), sqs.queue(), sqs.queue(fifo=True)]

    def _place(self, queue: str) -> dict[str, Any]:
        return {"sqs": {"queue": queue, "region": self._server.region, "endpoint_url": self._server.url}}

    def source(self) -> dict[str, Any]:
        return self._place(self._queues[0])

    def publish(self, requests: Mapping[str, bytes]) -> None:
        url = self._server.address(self._queues[0])
        for id_, body in requests.items():
            named = {name: {"DataType": "String", "StringValue": id_} for name in ("inferbus-id", "inferbus-key")}
            self._server.client.send_message(QueueUrl=url, MessageBody=body.decode(), MessageAttributes=named)

    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._place(self._queues[1]), self._place(self._queues[2])

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        for queue in self._queues[1:]:
            url = self._server.address(queue)
            ask = {
                "QueueUrl": url,
                "MaxNumberOfMessages": 10,
                "MessageAttributeNames": ["All"],
                "VisibilityTimeout": 60,
            }
            while messages := self._server.client.receive_message(**ask).get("Messages"):
                for message in messages:
                    self._server.client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
                    headers = {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}
                    yield told(headers, headers.get("inferbus-key"), message["Body"].encode())


class OnFiles(Bus):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def source(self) -> dict[str, Any]:
        return {"file": {"path": "in.jsonl"}}

    def publish(self, requests: Mapping[str, bytes]) -> None:
        (self._folder / "in.jsonl").write_bytes(b"".join(body + b"\n" for body in requests.values()))

    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"file": {"path": "out"}}, {"file": {"path": "errors"}}

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        for path in [*self._folder.glob("out/**/*.jsonl"), *self._folder.glob("errors/**/*.jsonl")]:
            yield from map(row, map(orjson.loads, path.read_bytes().splitlines()))
        for path in self._folder.glob("out/**/*.parquet"):
            yield from map(row, pq.read_table(path).to_pylist())


class OnS3(Bus):
    def __init__(self, s3: S3) -> None:
        self._server = s3
        self._bucket = s3.bucket()

    def source(self) -> dict[str, Any]:
        return {"s3": {**self._place(), "prefix": "in/"}}

    def _place(self) -> dict[str, Any]:
        return {"bucket": self._bucket, "region": self._server.region, "endpoint_url": self._server.url}

    def publish(self, requests: Mapping[str, bytes]) -> None:
        content = b"".join(body + b"\n" for body in requests.values())
        self._server.client.put_object(Bucket=self._bucket, Key="in/in.jsonl", Body=content)

    def put_table(self, content: bytes) -> None:
        """A table in place of lines."""
        self._server.client.put_object(Bucket=self._bucket, Key="in/in.parquet", Body=content)

    def sinks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"s3": {**self._place(), "prefix": "out/"}}, {"s3": {**self._place(), "prefix": "errors/"}}

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        for key, content in self._server.objects(self._bucket).items():
            if key.startswith("in/"):
                continue
            if key.endswith(".parquet"):
                yield from map(row, pq.read_table(io.BytesIO(content)).to_pylist())
            else:
                yield from map(row, map(orjson.loads, content.splitlines()))


def body(x: float) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [x, 0.5, 0]}]})


REQUESTS = {
    **{f"good-{i}": body(i) for i in range(60)},
    "poison": body(666),
    "a-string": body(0).replace(b"0.5", b'"0.5"'),
    "not-json": b'{"inputs": [',
    "nothing": b"{}",
}
SOURCES = ("kafka", "rabbitmq", "sqs", "file")
SINKS = (*SOURCES, "s3")
STORES = ("file", "s3")


@pytest.fixture
def on(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Makes a place on the bus of that name."""

    def make(name: str) -> Bus:
        if name == "file":
            return OnFiles(tmp_path)
        kinds: dict[str, Callable[[Any], Bus]] = {"kafka": OnKafka, "rabbitmq": OnRabbitMQ, "sqs": OnSqs, "s3": OnS3}
        return kinds[name](request.getfixturevalue(name))

    return make


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_request_from_any_source_has_its_outcome_in_any_sink(
    on: Any, tmp_path: Path, source: str, sink: str
) -> None:
    requests, outcomes = on(source), on(sink)
    requests.publish(REQUESTS)
    run(tmp_path, requests.source(), *outcomes.sinks())
    check(list(outcomes.outcomes()), by_place=source == "file")


def test_lines_of_an_object_become_rows_of_another(on: Any, tmp_path: Path) -> None:
    bucket = on("s3")
    bucket.publish(REQUESTS)
    predictions, errors = bucket.sinks()
    predictions["s3"]["format"] = "parquet"
    run(tmp_path, bucket.source(), predictions, errors)
    check(list(bucket.outcomes()), by_place=True)


def run(folder: Path, source: dict[str, Any], predictions: dict[str, Any], errors: dict[str, Any]) -> None:
    """Serve all there is."""
    tiny_models.python_model(folder)
    pipeline = {"name": f"m-{uuid.uuid4().hex[:8]}", "model": "model.py", "batch": {"max_rows": 16},
                "source": source, "sink": predictions, "errors": errors, "http": None}  # fmt: skip
    (folder / "p.yaml").write_text(yaml.safe_dump(pipeline))
    environ = {**os.environ, "AWS_ACCESS_KEY_ID": "inferbus", "AWS_SECRET_ACCESS_KEY": "inferbus"}
    worker = subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, "run", "p.yaml", "--until-idle", "0.5"],
        cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert worker.returncode == 0, worker.stdout.decode()


def check(found: list[tuple[str, Outcome]], *, by_place: bool) -> None:
    """Each of REQUESTS has its outcome, under its own id and key or under those of its line."""
    assert len(found) == len(REQUESTS)
    lines = dict(zip(REQUESTS, (f"in.jsonl-{i}" for i in range(len(REQUESTS))), strict=True))
    ids = lines if by_place else {name: name for name in REQUESTS}
    keys = {name: None if by_place else name for name in REQUESTS}
    good = {ids[f"good-{i}"]: Outcome(keys[f"good-{i}"], [2.0 * i, 1.0, 0.0]) for i in range(60)}
    codes = {
        "poison": "model_error",
        "a-string": "invalid_request",
        "not-json": "invalid_request",
        "nothing": "invalid_request",
    }
    bad = {ids[name]: Outcome(keys[name], code=code, body=REQUESTS[name].decode()) for name, code in codes.items()}
    assert dict(found) == good | bad


# Tables


def asked(folder: Path) -> Path:
    """A table of good rows, a poisonous one, and two that are no requests."""
    values: list[list[float | None] | None] = [[float(i), 0.5, 0.0] for i in range(60)]
    names = [f"good-{i}" for i in range(60)]
    values += [[666.0, 0.5, 0.0], [0.0, None, 0.0], None]
    names += ["poison", "a-hole", "nothing"]
    x = pa.array(values, pa.list_(pa.float32()))
    path = folder / "in.parquet"
    pq.write_table(pa.table({"id": names, "key": names, "x": x, "unused": range(63)}), path, row_group_size=25)
    return path


@pytest.mark.parametrize(("source", "sink"), [(source, sink) for source in STORES for sink in ("kafka", *STORES)])
def test_every_row_of_a_table_has_its_outcome(on: Any, tmp_path: Path, source: str, sink: str) -> None:
    table = asked(tmp_path)
    outcomes = on(sink)
    place: dict[str, Any] = {"file": {"path": "in.parquet"}}
    if source == "s3":
        bucket = on("s3")
        bucket.put_table(table.read_bytes())
        place = bucket.source()
    place[source] |= {"format": "parquet", "columns": ["x"]}
    predictions, errors = outcomes.sinks()
    if sink in STORES:
        predictions[sink]["format"] = "parquet"
    run(tmp_path, place, predictions, errors)
    found = list(outcomes.outcomes())
    assert len(found) == 63
    good = {f"good-{i}": Outcome(f"good-{i}", [2.0 * i, 1.0, 0.0]) for i in range(60)}
    bad = {
        "poison": Outcome("poison", code="model_error", body='{"x":[666.0,0.5,0.0]}'),
        "a-hole": Outcome("a-hole", code="invalid_request", body='{"x":[0.0,null,0.0]}'),
        "nothing": Outcome("nothing", code="invalid_request", body='{"x":null}'),
    }
    assert dict(found) == good | bad
