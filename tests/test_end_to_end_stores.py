"""Kafka to objects: workers killed, joined and stopped, and objects in which no row is lost or doubled."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import yaml
from confluent_kafka import Producer

from inferbus.worker.supervisor import COMMAND
from tests import tiny_models
from tests.servers import S3, Kafka

pytestmark = pytest.mark.broker

SOAK = os.environ.get("INFERBUS_SOAK") == "1"
PATIENCE = 60.0


class Stored:
    """Requests in a topic of four partitions, and a pipeline that writes what becomes of them to files."""

    def __init__(self, kafka: Kafka, folder: Path) -> None:
        self.folder = folder
        self._kafka = kafka
        self._topic = kafka.topic()
        tiny_models.python_model(folder)
        source = {"brokers": kafka.brokers, "topic": self._topic, "config": {"session.timeout.ms": 6000}}
        self.pipeline = {
            "name": f"s-{uuid.uuid4().hex[:8]}", "model": "model.py", "http": None,
            "source": {"kafka": source}, "flow": {"max_inflight": 2000},
            "sink": {"file": {"path": "out", "max_rows": 300, "max_age": "1s"}},
            "errors": {"file": {"path": "errors", "max_age": "1s"}},
        }  # fmt: skip

    def publish(self, count: int) -> None:
        """Requests 0..count; every hundredth is malformed, every thousandth poison."""
        producer = Producer({"bootstrap.servers": self._kafka.brokers, "queue.buffering.max.messages": 1_000_000})
        for i in range(count):
            x = 666 if i % 1000 == 500 else i + 0.25
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [x, 0, 0]}
            body = b"oops" if i % 100 == 7 else orjson.dumps({"inputs": [tensor]})
            producer.produce(self._topic, body, b"%d" % i, headers=[("inferbus-id", b"%d" % i)])
        assert producer.flush(PATIENCE) == 0

    def start(self, *flags: str, name: str = "w") -> subprocess.Popen[bytes]:
        (self.folder / "p.yaml").write_text(yaml.safe_dump(self.pipeline))
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            return subprocess.Popen(  # noqa: S603 - our own command
                [*COMMAND, "run", "p.yaml", *flags], cwd=self.folder, stdout=log, stderr=log
            )

    def finish(self, *flags: str) -> None:
        worker = self.start("--until-idle", "1", *flags)
        assert worker.wait(10 * PATIENCE) == 0, (self.folder / "w.log").read_text()

    def objects(self) -> int:
        return sum(path.is_file() for path in self.folder.glob("out/**/*.jsonl"))

    def rows(self, kind: str) -> Iterator[str]:
        for path in self.folder.glob(f"{kind}/**/*.jsonl"):
            yield from (orjson.loads(line)["id"] for line in path.read_bytes().splitlines())

    def check(self, count: int) -> None:
        """Each request has one row, among predictions or among errors."""
        bad = {str(i) for i in range(count) if i % 100 == 7 or i % 1000 == 500}
        assert Counter(self.rows("out")) == Counter(str(i) for i in range(count) if str(i) not in bad)
        assert Counter(self.rows("errors")) == Counter(bad)


@pytest.fixture
def stored(kafka: Kafka, tmp_path: Path) -> Stored:
    return Stored(kafka, tmp_path)


def test_workers_killed_again_and_again_lose_and_double_no_row(stored: Stored) -> None:
    count, kills = (200_000, 50) if SOAK else (20_000, 5)
    stored.publish(count)
    member = "--set=source.kafka.config.group.instance.id=one"  # else a restart waits for the session of the dead
    for _ in range(kills):
        before = stored.objects()
        worker = stored.start(member)
        until = time.monotonic() + PATIENCE
        while stored.objects() == before:  # a life that stored nothing proves nothing
            assert worker.poll() is None, (stored.folder / "w.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))  # noqa: S311 - anywhere between upload, settling and commit
        worker.kill()
        worker.wait()
    stored.finish(member)
    stored.check(count)


def test_workers_that_join_and_leave_lose_and_double_no_row(stored: Stored) -> None:
    count = 60_000 if SOAK else 20_000
    stored.publish(count)
    first = stored.start(name="first")
    until = time.monotonic() + PATIENCE
    while stored.objects() < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    second = stored.start(name="second")
    while stored.objects() < 20:
        assert time.monotonic() < until
        time.sleep(0.01)
    first.terminate()
    assert first.wait(PATIENCE) == 0
    second.terminate()
    assert second.wait(PATIENCE) == 0
    stored.finish()
    stored.check(count)


def test_a_bucket_gets_the_same_objects(stored: Stored, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.credentials[1])
    bucket = s3.bucket()
    place = {"bucket": bucket, "region": s3.region, "endpoint_url": s3.url, "max_rows": 500, "compression": "gzip"}
    stored.pipeline["sink"] = {"s3": {**place, "prefix": "out/"}}
    stored.publish(5000)
    stored.finish()
    objects = s3.objects(bucket)
    assert len(objects) >= 8  # four partitions, some 1,240 predictions each
    assert all(key.startswith("out/") and key.endswith(".jsonl.gz") for key in objects)
    for key, content in objects.items():
        path = stored.folder / key.removesuffix(".gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(content))
    stored.check(5000)
