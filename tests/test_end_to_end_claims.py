"""Whole workers whose requests and predictions lie in S3 while Kafka, RabbitMQ or SQS carry where."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from inferbus.connectors.base import Headers, Message
from inferbus.worker import access
from inferbus.worker.cli import main
from inferbus.worker.pipeline_file import load
from tests.end_to_end import Worker, await_, body_of, model_that, value
from tests.servers import S3, Kafka, Proxy, Sqs, Toxiproxy

pytestmark = pytest.mark.broker

BUSES = ["kafka", "rabbitmq", "sqs"]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3.credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3.credentials[1])


def places(kind: str, server: Any, partitions: int = 1) -> dict[str, Any]:
    """`source`, `sink` and `errors` of a pipeline file, made for it."""
    if kind == "kafka":
        at = {"brokers": server.brokers, "config": {"session.timeout.ms": 6000}}
        named = [{"topic": server.topic(partitions), **at}, {"topic": server.topic(1)}, {"topic": server.topic(1)}]
    elif kind == "rabbitmq":
        named = [{"url": server.url, "queue": server.queue()}]
        named += [{"routing_key": server.queue()} for _ in range(2)]
    else:
        at = {"region": server.region, "endpoint_url": server.url, "visibility_timeout": "10s"}
        named = [{"queue": server.queue(), **at}, {"queue": server.queue()}, {"queue": server.queue()}]
    return {use: {kind: place} for use, place in zip(("source", "sink", "errors"), named, strict=True)}


class Scene:
    """A pipeline file, a bucket, and what goes in and out."""

    def __init__(self, s3: S3, folder: Path, named: dict[str, Any], harm: str = "pass", **claim_check: Any) -> None:
        self.s3, self.folder, self.bucket = s3, folder, s3.bucket()
        at = {"region": s3.region, "endpoint_url": s3.url}
        ours = {"allow": [f"s3://{self.bucket}/in"], "to": f"s3://{self.bucket}/out", "over": 250}
        pipeline = {
            "name": "affine", "model": str(model_that(harm, folder / "model")), "http": {"port": 0},
            "batch": {"max_rows": 8}, "claim_check": {**ours, **at, **claim_check}, **named,
        }  # fmt: skip
        self.file = folder / "p.yaml"
        self.file.write_text(yaml.safe_dump(pipeline))
        self.settings = load(self.file, environ=dict(os.environ))
        self.workers: list[Worker] = []

    def put(self, name: str, body: bytes) -> Headers:
        """Store an object; answers the header that claims it."""
        self.s3.client.put_object(Bucket=self.bucket, Key=f"in/{name}", Body=body)
        return self.claim(name)

    def claim(self, name: str) -> Headers:
        return (("inferbus-claim", orjson.dumps({"url": f"s3://{self.bucket}/in/{name}"})),)

    def publish(self, *requests: tuple[bytes, Headers], key: bytes = b"k") -> None:
        with access.publisher(self.settings.source.place) as publisher:
            for body, headers in requests:
                publisher.publish(body, key, headers)
            publisher.finish()

    def ask(self, *serials: int) -> None:
        """Publish requests that lie in S3, of eight keys."""
        for key in {serial % 8 for serial in serials}:
            asked = [serial for serial in serials if serial % 8 == key]
            requests = [(b"", (*named(f"{i}"), *self.put(f"{i}", body_of([[i, 0.0, 0.0]])))) for i in asked]
            self.publish(*requests, key=b"k%d" % key)

    def await_answers(self, count: int) -> None:
        """Wait for the answers to requests 0 to `count`, whose objects are deleted then; there must be one to each."""
        await_(lambda: not self.unanswered(), f"{count} answers", *self.workers)
        found = self.predictions()
        assert sorted(int(id_) for id_, _, _ in found) == list(range(count))
        assert all(y == [float(id_), -float(id_)] for id_, y, _ in found)
        assert self.read("errors") == []

    def worker(self, *arguments: str) -> Worker:
        self.workers.append(Worker([str(self.file), *arguments], self.folder / f"{len(self.workers)}.log"))
        return self.workers[-1]

    def serve(self) -> None:
        worker = self.worker("--until-idle", "0.5")
        assert worker.ended() == 0, worker.log()

    def predictions(self) -> list[tuple[str, list[float], Message]]:
        """Id, `y` and record of each, with the body from where it lies."""
        found = []
        for m in self.read("sink"):
            body, headers = m.body, dict(m.headers)
            if "inferbus-claim" in headers:
                url = orjson.loads(headers["inferbus-claim"])["url"]
                body = self.stored()[url.removeprefix(f"s3://{self.bucket}/")]
            found.append((m.id, orjson.loads(body)["outputs"][0]["data"], m))
        return found

    def read(self, use: str) -> list[Message]:
        place = self.settings.sink[0].place if use == "sink" else self.settings.errors[0].place
        with access.reader(self.settings, place) as reader:
            return list(reader.to_end())

    def stored(self) -> dict[str, bytes]:
        return self.s3.objects(self.bucket)

    def unanswered(self) -> int:
        """Objects of requests that are there still."""
        listed = self.s3.client.list_objects_v2(Bucket=self.bucket, Prefix="in/")
        return len(listed.get("Contents", []))


def named(id_: str) -> Headers:
    return (("inferbus-id", id_.encode()),)


Stage = Callable[..., Scene]


@pytest.fixture
def stage(s3: S3, tmp_path: Path) -> Iterator[Stage]:
    """Makes the scene; a worker that still runs at the end is killed."""
    scenes: list[Scene] = []

    def make(*given: Any, **settings: Any) -> Scene:
        scenes.append(Scene(s3, tmp_path, *given, **settings))
        return scenes[-1]

    yield make
    for worker in (worker for scene in scenes for worker in scene.workers if worker.running()):
        worker.kill()


@pytest.fixture(params=BUSES)
def buses(request: pytest.FixtureRequest) -> dict[str, Any]:
    return places(request.param, request.getfixturevalue(request.param))


def test_bodies_go_by_s3_both_ways_and_errors_come_back_as_they_were_sent(
    buses: dict[str, Any], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = stage(buses, delete=True)
    assert main(["check", str(scene.file), "--connect"]) == 0
    assert f"claim_check: s3://{scene.bucket}/in s3://{scene.bucket}/out: reached" in capsys.readouterr().err
    rows = [[float(i), 1.0, 0.0] for i in range(40)]
    scene.publish(
        (b"", (*named("claimed"), *scene.put("large", body_of(rows)))),
        (body_of(rows[:1]), named("plain")),
        (b"", (*named("dataref"), ("ce_dataref", f"s3://{scene.bucket}/in/event".encode()))),
        (b"", (*named("missing"), *scene.claim("missing"))),
        (b"", (*named("elsewhere"), ("inferbus-claim", b'{"url": "s3://elsewhere/in/x"}'))),
        (b"", (*named("malformed"), *scene.put("malformed", b"{"))),
    )
    scene.put("event", body_of(rows[:2]))
    scene.serve()

    answers = {id_: (y, m) for id_, y, m in scene.predictions()}
    assert answers.keys() == {"claimed", "plain", "dataref"}
    assert answers["claimed"][0] == [y for a, b, _ in rows for y in (a + 2 * b, -a + 3 * b)]
    claims = {id_ for id_, (_, m) in answers.items() if "inferbus-claim" in dict(m.headers)}
    assert "claimed" in claims
    assert "plain" not in claims
    assert {key for key in scene.stored() if key.startswith("in/")} == {"in/malformed"}  # the others are answered

    records = {m.id: m for m in scene.read("errors")}
    errors = {id_: orjson.loads(dict(m.headers)["inferbus-error"]) for id_, m in records.items()}
    assert {(id_, error["code"], error["stage"]) for id_, error in errors.items()} == {
        ("missing", "invalid_request", "receive"),
        ("elsewhere", "invalid_request", "receive"),
        ("malformed", "invalid_request", "decode"),
    }
    assert all("body" not in error for error in errors.values())
    for id_, m in records.items():
        assert (m.key, m.body) == (b"k", b"")
        sent = [header for header in m.headers if header[0] in ("inferbus-id", "inferbus-claim")]
        assert sorted(sent)[1] == named(id_)[0]
        assert len(sent) == 2

    scene.put("missing", body_of(rows[:3]))
    assert main(["errors", "replay", str(scene.file), "--id", "missing"]) == 0
    scene.serve()
    assert {id_: y for id_, y, _ in scene.predictions()}["missing"] == [2.0, 3.0, 3.0, 2.0, 4.0, 1.0]


def test_a_worker_killed_among_claims_loses_nothing(buses: dict[str, Any], stage: Stage) -> None:
    scene = stage(buses, harm="time.sleep(0.02)", delete=True)
    count = 300
    scene.publish(*((b"", (*named(f"{i}"), *scene.put(f"{i}", body_of([[i, 0.0, 0.0]])))) for i in range(count)))
    worker = scene.worker()
    await_(lambda: scene.unanswered() < count - 20, "some answers", worker)
    worker.kill()
    scene.serve()

    found = scene.predictions()
    given = Counter(id_ for id_, _, _ in found)
    assert given.keys() == {str(i) for i in range(count)}
    assert all(y == [float(id_), -float(id_)] for id_, y, _ in found)
    assert scene.read("errors") == []


def test_the_sqs_extended_client_is_understood_and_answered(sqs: Sqs, stage: Stage) -> None:
    scene = stage(places("sqs", sqs))
    scene.put("0c2d", body_of([[float(i), 0.0, 0.0] for i in range(30)]))
    name = "software.amazon.payloadoffloading.PayloadS3Pointer"
    pointer = [name, {"s3BucketName": scene.bucket, "s3Key": "in/0c2d"}]
    size = {"DataType": "Number", "StringValue": "300000"}
    sqs.client.send_message(
        QueueUrl=sqs.address(str(scene.settings.source.place.label()).removeprefix("queue ")),
        MessageBody=orjson.dumps(pointer).decode(),
        MessageAttributes={"ExtendedPayloadSize": size},
    )
    scene.serve()

    queue = str(scene.settings.sink[0].place.label()).removeprefix("queue ")
    asked = {"QueueUrl": sqs.address(queue), "MessageAttributeNames": ["All"], "WaitTimeSeconds": 5}
    (answer,) = sqs.client.receive_message(**asked)["Messages"]
    kind, place = orjson.loads(answer["Body"])
    body = scene.stored()[place["s3Key"]]
    assert (kind, place["s3BucketName"]) == (name, scene.bucket)
    assert orjson.loads(body)["outputs"][0]["data"][-2:] == [29.0, -29.0]
    attributes = answer["MessageAttributes"]
    assert attributes["ExtendedPayloadSize"] == {"DataType": "Number", "StringValue": str(len(body))}
    assert "inferbus-claim" in attributes


# S3 is away


@pytest.fixture
def proxy(s3: S3, toxiproxy: Toxiproxy) -> Proxy:
    return toxiproxy.before(s3.url.rpartition("/")[2])


def test_claims_that_wait_while_partitions_change_hands_are_served_by_their_new_owner(
    kafka: Kafka, proxy: Proxy, stage: Stage
) -> None:
    scene = stage(places("kafka", kafka, partitions=4), endpoint_url=f"http://{proxy.address}", delete=True)
    one = scene.worker().is_ready()
    with proxy.cut():
        scene.ask(*range(200))
        await_(lambda: value(one, "inferbus_inflight_messages") == 200, "all to wait", one)
        two = scene.worker("--set", f"claim_check.endpoint_url={scene.s3.url}").is_ready()
        await_(lambda: value(one, "inferbus_inflight_messages") < 200, "partitions to change hands", one, two)
        assert one.running()
    scene.await_answers(200)
    for worker in (one, two):
        worker.stop()


def test_a_worker_waits_for_s3_at_start_and_gives_up_in_the_end(
    buses: dict[str, Any], proxy: Proxy, stage: Stage
) -> None:
    scene = stage(buses, endpoint_url=f"http://{proxy.address}", delete=True)
    scene.ask(*range(10))
    with proxy.cut():
        worker = scene.worker("--set", "retry.start=60s")
        worker.has_said("waiting")
        assert scene.worker("--set", "retry.start=1s").ended() == 3
    scene.await_answers(10)
    worker.stop()


def test_an_s3_that_goes_away_and_comes_back_costs_nothing_but_time(
    buses: dict[str, Any], proxy: Proxy, stage: Stage
) -> None:
    scene = stage(buses, endpoint_url=f"http://{proxy.address}", delete=True, over=1)
    worker = scene.worker().is_ready()
    scene.ask(*range(50))
    await_(lambda: not scene.unanswered(), "the first answers", worker)  # what cannot be deleted later stays
    with proxy.cut():
        scene.ask(*range(50, 100))
        worker.answers("/readyz", 503)
        why = f'bucket "{scene.bucket}": no answer from {proxy.address}'
        await_(lambda: why in worker.get("/readyz")[1].replace("\\", ""), "the page to say why", worker)
    worker.answers("/readyz", 200)
    scene.await_answers(100)
    worker.stop()
