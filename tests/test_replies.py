"""Requesters that gave an address are answered there as well, on every bus, where the pipeline file allows it."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pika
import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from structlog.testing import capture_logs

from inferbus.connectors.base import Message, Records
from inferbus.worker import outcomes as wire
from inferbus.worker.delivery import Outcomes
from inferbus.worker.metrics import Metrics
from inferbus.worker.replies import Answering
from inferbus.worker.supervisor import COMMAND
from tests import tiny_models
from tests.servers import Kafka, RabbitMQ, Sqs

PATIENCE = 60.0


class Reply(NamedTuple):
    """What a requester gets."""

    id: str
    status: str
    correlation: str | None
    body: dict[str, Any]


class Asking(ABC):
    """A bus with a place for requests and one for replies, and what there is to a reply."""

    @abstractmethod
    def pipeline(self) -> dict[str, Any]:
        """Source, sink and errors."""

    @abstractmethod
    def ask(self, id_: str, body: bytes, reply_to: str) -> None:
        """One request, correlation id `c-<id>`."""

    @abstractmethod
    def replies(self) -> Iterator[Reply]:
        """All that have come to `address` so far, and are taken away."""

    address: str


class OnKafka(Asking):
    def __init__(self, kafka: Kafka) -> None:
        self._brokers = kafka.brokers
        self._topics = [kafka.topic() for _ in range(3)]
        self.address = kafka.topic(1)
        self._producer = Producer({"bootstrap.servers": kafka.brokers})
        self._at = 0

    def pipeline(self) -> dict[str, Any]:
        source, sink, errors = self._topics
        return {"source": {"kafka": {"brokers": self._brokers, "topic": source}},
                "sink": {"kafka": {"topic": sink}}, "errors": {"kafka": {"topic": errors}}}  # fmt: skip

    def ask(self, id_: str, body: bytes, reply_to: str) -> None:
        headers = {"inferbus-id": id_, "inferbus-reply-to": reply_to, "correlation_id": f"c-{id_}"}
        self._producer.produce(self._topics[0], body, headers=headers)
        assert self._producer.flush(PATIENCE) == 0

    def replies(self) -> Iterator[Reply]:
        reader = Consumer({"bootstrap.servers": self._brokers, "group.id": "reader"})
        try:
            place = TopicPartition(self.address, 0, self._at)
            end = reader.get_watermark_offsets(place, PATIENCE)[1]
            reader.assign([place])
            while self._at < end:
                m = reader.poll(PATIENCE)
                self._at = m.offset() + 1
                told = {name: value.decode() for name, value in m.headers()}
                yield Reply(
                    told["inferbus-id"], told["inferbus-status"], told.get("correlation_id"), orjson.loads(m.value())
                )
        finally:
            reader.close()


class OnRabbitMQ(Asking):
    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self._server = rabbitmq
        self._queues = [rabbitmq.queue() for _ in range(3)]
        self.address = rabbitmq.queue()

    def pipeline(self) -> dict[str, Any]:
        source, sink, errors = self._queues
        return {
            "source": {"rabbitmq": {"url": self._server.url, "queue": source}},
            "sink": {"rabbitmq": {"routing_key": sink}},
            "errors": {"rabbitmq": {"routing_key": errors}},
        }

    def ask(self, id_: str, body: bytes, reply_to: str) -> None:
        with self._server.channel() as channel:
            properties = pika.BasicProperties(message_id=id_, reply_to=reply_to, correlation_id=f"c-{id_}")
            channel.basic_publish("", self._queues[0], body, properties)

    def replies(self) -> Iterator[Reply]:
        with self._server.channel() as channel:
            while True:
                method, properties, body = channel.basic_get(self.address, auto_ack=True)
                if method is None:
                    return
                status = properties.headers["inferbus-status"]
                yield Reply(properties.message_id, status, properties.correlation_id, orjson.loads(body))


class OnSqs(Asking):
    def __init__(self, sqs: Sqs) -> None:
        self._server = sqs
        self._queues = [sqs.queue() for _ in range(3)]
        self.address = sqs.queue()

    def pipeline(self) -> dict[str, Any]:
        source, sink, errors = self._queues
        place = {"queue": source, "region": self._server.region, "endpoint_url": self._server.url}
        return {"source": {"sqs": place}, "sink": {"sqs": {"queue": sink}}, "errors": {"sqs": {"queue": errors}}}

    def ask(self, id_: str, body: bytes, reply_to: str) -> None:
        told = {"inferbus-id": id_, "inferbus-reply-to": reply_to, "correlation_id": f"c-{id_}"}
        attributes = {name: {"DataType": "String", "StringValue": value} for name, value in told.items()}
        url = self._server.address(self._queues[0])
        self._server.client.send_message(QueueUrl=url, MessageBody=body.decode(), MessageAttributes=attributes)

    def replies(self) -> Iterator[Reply]:
        url = self._server.address(self.address)
        ask = {"QueueUrl": url, "MaxNumberOfMessages": 10, "MessageAttributeNames": ["All"]}
        while messages := self._server.client.receive_message(**ask).get("Messages"):
            for message in messages:
                self._server.client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
                told = {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}
                body = orjson.loads(message["Body"])
                yield Reply(told["inferbus-id"], told["inferbus-status"], told.get("correlation_id"), body)


def body(x: float) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [x, 0.5, 0]}]})


def came(bus: Asking, count: int) -> dict[str, Reply]:
    found: dict[str, Reply] = {}
    until = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        found.update({reply.id: reply for reply in bus.replies()})
        time.sleep(0.05)
    return found


@pytest.mark.broker
@pytest.mark.parametrize("name", ["kafka", "rabbitmq", "sqs"])
def test_outcomes_go_to_whoever_asked_and_may_and_nothing_waits_for_replies_that_fail(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    kinds: dict[str, Callable[[Any], Asking]] = {"kafka": OnKafka, "rabbitmq": OnRabbitMQ, "sqs": OnSqs}
    bus = kinds[name](request.getfixturevalue(name))
    gone = f"gone-{uuid.uuid4().hex[:8]}"
    tiny_models.python_model(tmp_path)
    pipeline = {"name": f"r-{uuid.uuid4().hex[:8]}", "model": "model.py", "http": None,
                "replies": {"allow": [bus.address, "gone-*"]}, **bus.pipeline()}  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
    for i in range(20):
        bus.ask(f"good-{i}", body(i), bus.address)
    bus.ask("bad", b"oops", bus.address)
    bus.ask("gone", body(1), gone)
    bus.ask("elsewhere", body(1), "not-allowed")
    environ = {**os.environ, "AWS_ACCESS_KEY_ID": "inferbus", "AWS_SECRET_ACCESS_KEY": "inferbus"}
    worker = subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, "run", "p.yaml", "--until-idle", "0.5"],
        cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE, check=False,
    )  # fmt: skip
    said = worker.stdout.decode()
    assert worker.returncode == 0, said
    assert '"ok": 22, "errors": 1' in said
    assert "reply_refused" in said
    replies = came(bus, 21)
    assert sorted(replies) == sorted(["bad", *(f"good-{i}" for i in range(20))])
    for i in range(20):
        good = replies[f"good-{i}"]
        assert (good.status, good.correlation) == ("ok", f"c-good-{i}")
        assert good.body["outputs"][0]["data"] == [2.0 * i, 1.0, 0.0]
    bad = replies["bad"]
    assert (bad.status, bad.correlation) == ("error", "c-bad")
    assert bad.body["id"] == "bad"
    assert bad.body["error"].startswith("invalid_request: body is not JSON")


class Told:
    """Keeps what it is to send."""

    name = "told"
    sent = failed = 0

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}

    def open(self, bell: object) -> None:
        """Nothing to reach."""

    def send(self, address: str, records: Records) -> None:
        self.records.setdefault(address, []).extend(m.id for m in records.messages)

    def tick(self) -> None:
        """Nothing to do."""

    def close(self, timeout: float) -> None:
        """Nothing to close."""


def wanted(id_: str, *addresses: bytes) -> Message:
    headers = tuple(("inferbus-reply-to", address) for address in addresses)
    return Message(id_, None, b"", headers, None, 1, None)


def test_only_addresses_that_match_a_pattern_whole_are_answered() -> None:
    told = Told()
    answering = Answering(told, ["replies.*", "me"], metrics := Metrics())
    messages = [wanted("a", b"replies.1"), wanted("b", b"me"), wanted("c", b"meow"), wanted("d", b"x/replies.1"),
                wanted("e"), wanted("f", b""), wanted("g", b"\xff\xfe"), wanted("h", b"other", b"me")]  # fmt: skip
    records = wire.predictions(messages, [b"{}"] * 8, [[]] * 8, [])
    with capture_logs() as logs:
        answering.answer(Outcomes("prediction", records, []))
        answering.tick()
    assert told.records == {"replies.1": ["a"], "me": ["b", "h"]}
    assert [entry["event"] for entry in logs] == ["reply_refused"]  # kept few
    assert b'inferbus_replies_total{result="refused"} 3.0' in metrics.render()
