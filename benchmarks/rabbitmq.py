"""RabbitMQ alone: small JSON requests and a model that costs nothing, from a durable queue to a durable queue.

    python -m benchmarks.rabbitmq [--messages N] [--runs N] [--no-peers]

Inferbus against the bare loop (bare_rabbitmq.py) in alternating turns, then peers with the same model. All have the
same prefetch, and all messages survive a restart of the broker.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pika

from benchmarks.common import PATIENCE, Request, arguments, environment_of, own, save, serving
from benchmarks.contest import Job, Worker, inferbus, peer, ratio
from benchmarks.material import json_requests, tiny_model
from benchmarks.queues import QueueContest
from deploy.local import servers

ROWS = 256
PREFETCH = 2048
SHARED = ("numpy", "onnxruntime", "orjson")
FASTSTREAM = ("faststream[rabbit]==0.7.*", *SHARED)
CELERY = ("celery==5.6.*", "celery-batches==0.11.*", *SHARED)
# Since 3.12 every classic queue is lazy. An older one keeps in memory what nobody takes yet, as the answers of a turn,
# and so spends most of its time on collecting garbage: it would be that which is measured.
LAZY = {"x-queue-mode": "lazy"}
HELD = ("faststream", "celery")  # peers with a target; one that confirms nothing does less than the job


def main() -> None:
    """Let everyone empty a queue, print and keep the rates."""
    parser = arguments(__doc__, messages=100_000, runs=5)
    parser.add_argument("--peer-messages", type=int, default=20_000, help="requests of a peer's turn")
    parser.add_argument("--no-peers", action="store_true", help="only the bare loop and Inferbus")
    args = parser.parse_args()
    began = os.getloadavg()
    peers = {} if args.no_peers else others()
    with tempfile.TemporaryDirectory() as scratch, serving(servers.SERVERS["rabbitmq"]) as server:
        bus = Rabbit(server)
        request, folder = json_requests(), Path(scratch)
        contest = QueueContest(
            bus,
            tiny_model(folder),
            args.messages,
            ROWS,
            request,
            folder,
            {name: partial(celery_task, request) for name in peers if name.startswith("celery")},
        )
        contest.rounds(args.runs, ("bare", bare), ("inferbus", ours))
        for _ in range(args.runs):
            for name, worker in peers.items():
                contest.turn(name, worker, args.peer_messages)
        bus.close()
    contest.show()
    figures = [ratio(contest, 0.8)] + [ratio(contest, 3, name) for name in HELD if name in peers]
    save(args.out, began, figures, {**contest.result(args.runs), "prefetch": PREFETCH, "server": bus.version})


def bare(job: Job) -> Sequence[str | Path]:
    """The hand-written loop."""
    return told(peer(own("python"), "../bare_rabbitmq.py"))(job)


def others() -> dict[str, Worker]:
    """The peers, each in an environment of its own."""
    faststream = environment_of("faststream_rabbitmq", *FASTSTREAM)
    celery = peer(environment_of("celery", *CELERY), "celery_worker.py")
    return {
        "faststream": told(peer(faststream, "faststream_rabbitmq_worker.py")),
        "celery": told(celery),
        "celery unconfirmed": told(celery, "--unconfirmed"),
    }


def told(worker: Worker, *options: str) -> Worker:
    """The same worker, told the prefetch and more."""
    return lambda job: [*worker(job), "--prefetch", str(PREFETCH), *options]


def ours(job: Job) -> Sequence[str | Path]:
    """A worker as a user starts it: defaults, but for the batch size and the prefetch that all share."""
    source = {"url": job.brokers, "queue": job.source, "prefetch": PREFETCH}
    return inferbus(job, source={"rabbitmq": source}, sink={"rabbitmq": {"routing_key": job.sink}},
                    errors={"rabbitmq": {"routing_key": job.errors}})  # fmt: skip


def celery_task(request: Callable[[int], Request], i: int) -> Request:
    """A request as Celery's own client would send it: a call of the task `predict`."""
    body, _ = request(i)
    call = {"lang": "py", "task": "predict", "id": str(uuid.uuid4())}
    return b'[[%b],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]' % body, {
        name: text.encode() for name, text in call.items()
    }


class Rabbit:
    """Durable classic queues, which keep messages on disk, on a server of our own."""

    look = 0.1

    def __init__(self, server: servers.Running) -> None:
        self.address = server.address
        self.server = server.pid
        parameters = pika.URLParameters(server.address)
        parameters.heartbeat = 0  # nobody answers one while a turn is awaited
        self._connection = pika.BlockingConnection(parameters)
        self._channel = self._connection.channel()
        about: Mapping[str, Any] = self._connection._impl.server_properties  # noqa: SLF001 - told nowhere else
        self.version = f"RabbitMQ {about['version']}"

    def make(self) -> str:
        """A new queue; its name."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        self._channel.queue_declare(name, durable=True, arguments=LAZY)
        return name

    def drop(self, *queues: str) -> None:
        """Delete queues."""
        for name in queues:
            self._channel.queue_delete(name)

    def fill(self, queue: str, messages: int, request: Callable[[int], Request]) -> None:
        """Write so many requests; return when all are there."""
        plain = pika.BasicProperties(delivery_mode=2)
        for i in range(messages):
            body, headers = request(i)
            properties = plain
            if headers:
                table = {name: value.decode() for name, value in headers.items()}
                properties = pika.BasicProperties("application/json", "utf-8", table, delivery_mode=2)
            self._channel.basic_publish("", queue, body, properties)
        until = time.monotonic() + PATIENCE
        while (count := self.count(queue)) < messages:
            if time.monotonic() > until:
                raise TimeoutError(f"{count} of {messages} requests came into the queue")
            time.sleep(0.1)

    def count(self, queue: str) -> int:
        """Messages that are ready."""
        return int(self._channel.queue_declare(queue, passive=True).method.message_count)

    def left(self, queue: str) -> int:
        """Messages that are not settled: all are ready again once their consumer has gone."""
        return self.count(queue)

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


if __name__ == "__main__":
    main()
