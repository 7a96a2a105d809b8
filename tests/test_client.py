"""The client: what a service gets that asks a pipeline, on every bus."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import yaml

from inferbus.client import Client, Misconfigured, RequestFailed, Unavailable
from inferbus.client.client import outputs_of, request_body
from inferbus.connectors.base import Fatal
from inferbus.worker.supervisor import COMMAND
from tests import tiny_models
from tests.servers import Kafka, RabbitMQ, Sqs

PATIENCE = 60.0


class Served:
    """A pipeline file and a worker that serves it."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, bus: str) -> None:
        self.bus = bus
        self.folder = folder
        self.server: Any = request.getfixturevalue(bus)
        self.name = f"c-{uuid.uuid4().hex[:8]}"
        tiny_models.python_model(folder)
        self.file = folder / "p.yaml"
        self.reply_to: str | None = None
        self.file.write_text(yaml.safe_dump(self._pipeline()))

    def _pipeline(self) -> dict[str, Any]:
        if isinstance(self.server, Kafka):
            source, sink, errors, self.reply_to = (self.server.topic() for _ in range(4))
            places = [{"brokers": self.server.brokers, "topic": source}, {"topic": sink}, {"topic": errors}]
            allowed = self.reply_to
        elif isinstance(self.server, RabbitMQ):
            source, sink, errors = (self.server.queue() for _ in range(3))
            places = [{"url": self.server.url, "queue": source}, {"routing_key": sink}, {"routing_key": errors}]
            allowed = f"{self.name}.replies.*"
        else:
            source, sink, errors = (self.server.queue() for _ in range(3))
            where = {"region": Sqs.region, "endpoint_url": self.server.url}
            places = [{"queue": source, **where}, {"queue": sink}, {"queue": errors}]
            allowed = f"{self.name}-replies-*"
        uses = {use: {self.bus: place} for use, place in zip(("source", "sink", "errors"), places, strict=True)}
        return {"name": self.name, "model": "model.py", "http": None, "replies": {"allow": [allowed]}, **uses}

    def client(self) -> Client:
        return Client(self.file, reply_to=self.reply_to)

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "w.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command
                [*COMMAND, "run", "p.yaml"], cwd=self.folder, stdout=log, stderr=log
            )


@pytest.fixture(params=["kafka", "rabbitmq", "sqs"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "inferbus")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "inferbus")
    served = Served(request, tmp_path, request.param)
    worker = served.start()
    yield served
    worker.terminate()
    assert worker.wait(PATIENCE) == 0, (tmp_path / "w.log").read_text()


@pytest.mark.broker
def test_many_requests_in_flight_each_get_their_own_answer(served: Served) -> None:
    async def ask(client: Client, i: int) -> list[float]:
        outputs = await client.predict({"x": [[float(i), 0.5, 0.0]]}, timeout=PATIENCE)
        assert outputs["y"].dtype == np.float32
        return [float(value) for value in outputs["y"][0]]

    async def main() -> None:
        async with served.client() as client:
            answers = await asyncio.gather(*(ask(client, i) for i in range(200)))
            assert answers == [[2.0 * i, 1.0, 0.0] for i in range(200)]
            rows = await client.predict({"x": np.ones((3, 3), np.float32)}, timeout=PATIENCE)
            assert rows["y"].tolist() == [[2.0] * 3] * 3
            with pytest.raises(RequestFailed, match=r"^model_error: ") as poison:
                await client.predict({"x": [[666.0, 0, 0]]}, timeout=PATIENCE)
            assert poison.value.code == "model_error"
            with pytest.raises(RequestFailed, match=r'^invalid_request: inputs: "x" missing'):
                await client.predict({}, timeout=PATIENCE)
            assert await client.send({"x": [[1.0, 2.0, 3.0]]})

    asyncio.run(main())


@pytest.mark.broker
def test_two_clients_at_once_get_only_what_they_asked_for(served: Served) -> None:
    async def main() -> None:
        async with served.client() as one, served.client() as two:
            answers = await asyncio.gather(
                *(client.predict({"x": [[x, 0.0, 0.0]]}, timeout=PATIENCE) for x in (1.0, 2.0) for client in (one, two))
            )
            assert [answer["y"][0][0] for answer in answers] == [2.0, 2.0, 4.0, 4.0]
            assert not one._waiting
            assert not two._waiting

    asyncio.run(main())


@pytest.mark.broker
def test_what_is_sent_with_wait_is_told_its_outcome_on_every_bus(served: Served) -> None:
    (served.folder / "rows.jsonl").write_bytes(
        b"".join(b"%b\n" % request_body({"x": [[float(i), 0.0, 0.0]]}, "v2") for i in (1, 2, 666))
        + b'{"id": "wrong", "inputs": []}\n'
    )
    done = subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, "send", "p.yaml", "--file", "rows.jsonl", "--wait"],
        cwd=served.folder, capture_output=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    told = [orjson.loads(line) for line in done.stdout.splitlines()]
    found = {one["outcome"]["outputs"][0]["data"][0] for one in told if one["status"] == "ok"}
    failed = {one["error"]["code"]: one["id"] for one in told if one["status"] == "error"}
    assert found == {2.0, 4.0}
    assert failed.keys() == {"model_error", "invalid_request"}
    assert failed["invalid_request"] == "wrong"


def test_a_bus_that_is_away_is_told_on_entry(tmp_path: Path) -> None:
    file, reply_to = kafka_pipeline(tmp_path, "127.0.0.1:1")

    async def main() -> None:
        async with Client(file, reply_to=reply_to):
            pytest.fail("it reached a broker where nothing listens")

    with pytest.raises(Unavailable, match=r"^kafka: no broker answered"):
        asyncio.run(main())


@pytest.mark.broker
def test_an_answer_that_does_not_come_is_a_timeout_and_the_client_goes_on(kafka: Kafka, tmp_path: Path) -> None:
    source, replies = kafka.topic(1), kafka.topic(1)
    file, _ = kafka_pipeline(tmp_path, kafka.brokers, source, replies)

    async def main() -> float:
        async with Client(file, reply_to=replies) as client:
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=r"^no answer to request [0-9a-f]{32} within 0.3 s$"):
                await client.predict({"x": [[1.0, 2.0, 3.0]]}, timeout=0.3)
            assert not client._waiting
            return time.monotonic() - began

    assert asyncio.run(main()) < 10.0


async def send_for_ever(client: Client) -> None:
    while True:
        await client.send({"x": [[1.0, 2.0, 3.0]]})


@pytest.mark.broker
def test_a_client_whose_bus_breaks_says_so_and_still_closes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    served = Served(request, tmp_path, "rabbitmq")

    def broken() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with served.client() as client:
            client._sink._connection.call(broken)  # type: ignore[attr-defined]
            with pytest.raises(Fatal, match="the client broke"):
                await send_for_ever(client)
            with pytest.raises(Fatal, match="the client broke"):
                await client.predict({"x": [[1.0, 2.0, 3.0]]}, timeout=PATIENCE)

    asyncio.run(main())


def kafka_pipeline(folder: Path, brokers: str, source: str = "in", replies: str = "back") -> tuple[Path, str]:
    pipeline = {
        "name": "c",
        "model": "none.onnx",
        "replies": {"allow": [replies]},
        "source": {"kafka": {"brokers": brokers, "topic": source}},
        "sink": {"kafka": {"topic": "out"}},
    }
    (folder / "p.yaml").write_text(yaml.safe_dump(pipeline))
    return folder / "p.yaml", replies


def test_an_address_that_the_pipeline_does_not_answer_to_is_told_at_once(tmp_path: Path) -> None:
    file, _ = kafka_pipeline(tmp_path, "h")
    with pytest.raises(Misconfigured, match=r"replies.allow does not allow 'c.replies'; add a pattern that does"):
        Client(file)


def test_nobody_can_ask_where_requests_are_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("name: c\nmodel: m.onnx\nsource: {file: {path: in.jsonl}}\nsink: {file: {path: out}}\n")
    with pytest.raises(Misconfigured, match=r"nobody can ask there; expected a source on Kafka, RabbitMQ or SQS"):
        Client(file)


@pytest.mark.parametrize(
    ("values", "datatype", "shape"),
    [
        ([[1.5, 2.0]], "FP32", [1, 2]),
        ([[1, 2], [3, 4]], "INT64", [2, 2]),
        ([True, False], "BOOL", [2]),
        (["a", "é"], "BYTES", [2]),
        (np.zeros((1, 2), np.float64), "FP64", [1, 2]),
        (np.zeros((1, 2), ">i4"), "INT32", [1, 2]),
        (np.zeros((2, 0), np.float16), "FP16", [2, 0]),
    ],
)
def test_inputs_become_tensors_of_the_datatype_they_have(values: Any, datatype: str, shape: list[int]) -> None:
    (tensor,) = orjson.loads(request_body({"x": values}, "v2"))["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("x", datatype, shape)
    assert tensor["data"] == np.asarray(values).reshape(-1).tolist()


def test_other_formats_take_what_they_are_named_for() -> None:
    assert orjson.loads(request_body({"a": 1.5, "b": "x"}, "json")) == {"a": 1.5, "b": "x"}
    assert request_body(b"\x00\x01", "raw") == b"\x00\x01"
    assert request_body("é", "text") == "é".encode()
    with pytest.raises(Misconfigured, match=r"requests.format is raw: expected bytes, got dict"):
        request_body({}, "raw")
    with pytest.raises(Misconfigured, match=r"requests.format is v2: expected a mapping of inputs by name, got str"):
        request_body("x", "v2")
    with pytest.raises(
        Misconfigured, match=r"input 'x': expected rows of numbers, booleans or strings, got complex128"
    ):
        request_body({"x": [1j]}, "v2")


def test_what_is_no_prediction_is_not_taken_for_one() -> None:
    assert outputs_of(b'{"outputs": {"y": 1.5}}')["y"] == 1.5
    for body in (b"oops", b"{}", b'{"outputs": [{"name": "y"}]}', b'{"outputs": 3}'):
        with pytest.raises(Unavailable, match=r"does something else write to the address of replies"):
            outputs_of(body)
