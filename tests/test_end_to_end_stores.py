"""Kafka and tables to objects: workers killed, joined and stopped, and objects in which no row is lost or doubled."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
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


# Tables in a bucket to tables in a bucket


class TablesInABucket:
    """Requests in tables under one prefix, and a job that writes what becomes of them under others."""

    def __init__(self, s3: S3, folder: Path) -> None:
        self.folder = folder
        self._s3 = s3
        self._bucket = s3.bucket()
        tiny_models.python_model(folder)
        place = {"bucket": self._bucket, "region": s3.region, "endpoint_url": s3.url, "format": "parquet"}
        pipeline = {
            "name": "job", "model": "model.py", "http": None, "flow": {"max_inflight": 2000},
            "source": {"s3": {**place, "prefix": "in/"}},
            "sink": {"s3": {**place, "prefix": "out/", "max_rows": 300}},
            "errors": {"s3": {**place, "prefix": "errors/", "max_rows": 300}},
        }  # fmt: skip
        (folder / "p.yaml").write_text(yaml.safe_dump(pipeline))
        self.progress = folder / "job.progress"

    def publish(self, count: int, files: int) -> None:
        """Rows 0..count; every hundredth has no value, every thousandth is poison."""
        for number, numbers in enumerate(np.array_split(np.arange(count), files)):
            x = [None if i % 100 == 7 else [666.0 if i % 1000 == 500 else i + 0.25, 0.0, 0.0] for i in numbers.tolist()]
            table = pa.table({"id": numbers, "x": pa.array(x, pa.list_(pa.float32()))})
            content = pa.BufferOutputStream()
            pq.write_table(table, content, row_group_size=1700)
            key = f"in/part={number:02}/rows.parquet"
            self._s3.client.put_object(Bucket=self._bucket, Key=key, Body=content.getvalue().to_pybytes())

    def start(self) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "AWS_ACCESS_KEY_ID": self._s3.credentials[0],
                   "AWS_SECRET_ACCESS_KEY": self._s3.credentials[1]}  # fmt: skip
        with (self.folder / "w.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command
                [*COMMAND, "run", "p.yaml"], cwd=self.folder, env=environ, stdout=log, stderr=log
            )

    def rows(self, prefix: str) -> Iterator[str]:
        pages = self._s3.client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        for entry in (entry for page in pages for entry in page["Contents"] if entry["Size"]):
            content = self._s3.client.get_object(Bucket=self._bucket, Key=entry["Key"])["Body"].read()
            yield from pq.read_table(io.BytesIO(content), columns=["id"])["id"].to_pylist()


def test_a_job_on_tables_that_is_killed_again_and_again_loses_and_doubles_no_row(s3: S3, tmp_path: Path) -> None:
    count, kills = (200_000, 50) if SOAK else (20_000, 5)
    job = TablesInABucket(s3, tmp_path)
    job.publish(count, files=5)
    for _ in range(kills):
        before = job.progress.read_bytes() if job.progress.exists() else b""
        worker = job.start()
        until = time.monotonic() + PATIENCE
        while (
            not job.progress.exists() or job.progress.read_bytes() == before
        ):  # a life that did nothing proves nothing
            assert worker.poll() is None, (tmp_path / "w.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))  # noqa: S311 - anywhere between upload, settling and saving
        worker.kill()
        worker.wait()
    worker = job.start()
    assert worker.wait(10 * PATIENCE) == 0, (tmp_path / "w.log").read_text()
    bad = {str(i) for i in range(count) if i % 100 == 7 or i % 1000 == 500}
    assert Counter(job.rows("out/")) == Counter(str(i) for i in range(count) if str(i) not in bad)
    assert Counter(job.rows("errors/")) == Counter(bad)
