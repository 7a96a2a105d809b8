"""SQS alone: small JSON requests and a model that costs nothing, from one standard queue to another.

    python -m benchmarks.sqs [--messages N] [--runs N]

Inferbus against the bare loop (bare_sqs.py) with as many receive calls at once, in alternating turns, on an ElasticMQ
that keeps its queues in memory. The server shares the machine, so read the CPU of the worker and the server's beside
the rate: at AWS the server's would be someone else's. Headers are message attributes, dear to client and server alike;
what they cost anyone is seen on a bare loop that sends them too.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks.common import Request, arguments, own, save, serving
from benchmarks.contest import Job, inferbus, peer, ratio
from benchmarks.material import json_requests, tiny_model
from benchmarks.queues import QueueContest
from deploy.local import servers

ROWS = 256
RECEIVERS = 16  # at once; what Inferbus does by itself
TEN = 10  # entries of one call
HEADED = "bare with headers"
WRITERS = 8  # calls at once while a queue is filled


def main() -> None:
    """Let both empty a queue, print and keep the rates."""
    args = arguments(__doc__, messages=40_000, runs=5).parse_args()
    began = os.getloadavg()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as scratch, serving(elasticmq()) as server, Sqs(server) as bus:
        folder = Path(scratch)
        contest = QueueContest(bus, tiny_model(folder), args.messages, ROWS, json_requests(), folder)
        contest.rounds(args.runs, ("bare", bare), (HEADED, headed), ("inferbus", ours))
    contest.show()
    cpu = contest.median("bare", "cpu_us") / contest.median("inferbus", "cpu_us")
    print(f"bare CPU / inferbus CPU: {cpu:.3g}")
    result = {**contest.result(args.runs), "receivers": RECEIVERS, "server": "ElasticMQ 1.6.14, in memory"}
    save(
        args.out,
        began,
        [ratio(contest, 0.85), ratio(contest, 0.85, HEADED)],
        {**result, "bare_cpu_over_inferbus_cpu": round(cpu, 4)},
    )


def bare(job: Job) -> Sequence[str | Path]:
    """The hand-written loop."""
    return [*peer(own("python"), "../bare_sqs.py")(job), "--receivers", str(RECEIVERS)]


def headed(job: Job) -> Sequence[str | Path]:
    """The same, with headers on its answers."""
    return [*bare(job), "--headers"]


def ours(job: Job) -> Sequence[str | Path]:
    """A worker as a user starts it: defaults, but for the batch size and the number of receivers."""
    source = {"queue": job.source, "endpoint_url": job.brokers, "receivers": RECEIVERS}
    return inferbus(job, source={"sqs": source}, sink={"sqs": {"queue": job.sink}},
                    errors={"sqs": {"queue": job.errors}})  # fmt: skip


def elasticmq() -> servers.Server:
    """ElasticMQ with its queues in memory: its database would be all that is measured."""
    on_disk = servers.SERVERS["sqs"]

    def command(jars: Path, folder: Path, ports: list[int]) -> list[str]:
        java, heap, *rest = on_disk.command(jars, folder, ports)
        return [java, heap, "-Xmx1g", "-Dmessages-storage.enabled=false", *rest]  # of two heaps the last one counts

    return replace(on_disk, command=command)


class Sqs:
    """Standard queues on a server of our own."""

    look = 0.25  # it goes through all messages to count them

    def __init__(self, server: servers.Running) -> None:
        self.address = server.address
        self.server = server.pid
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        config = AioConfig(max_pool_connections=WRITERS)
        self._context: Any = get_session().create_client("sqs", endpoint_url=self.address, config=config)
        self._client: Any = self._runner.run(self._context.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._context.__aexit__(None, None, None))
        self._runner.close()

    def make(self) -> str:
        """A new queue; its name."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        self._runner.run(self._client.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "60"}))
        return name

    def drop(self, *queues: str) -> None:
        """Delete queues."""
        for name in queues:
            self._runner.run(self._client.delete_queue(QueueUrl=self._url(name)))

    def fill(self, queue: str, messages: int, request: Callable[[int], Request]) -> None:
        """Write so many requests; return when all are there."""
        tens = iter(range(0, messages, TEN))

        async def write() -> None:
            for start in tens:
                chosen = range(start, min(start + TEN, messages))
                entries = [{"Id": str(i), "MessageBody": request(i)[0].decode()} for i in chosen]
                await self._client.send_message_batch(QueueUrl=self._url(queue), Entries=entries)

        async def all_of_them() -> None:
            await asyncio.gather(*(write() for _ in range(WRITERS)))

        self._runner.run(all_of_them())
        if self.count(queue) != messages:
            raise RuntimeError(f"the queue should hold {messages} messages, and holds {self.count(queue)}")

    def count(self, queue: str) -> int:
        """Messages that are visible; ElasticMQ's number is exact."""
        return self._told(queue, "ApproximateNumberOfMessages")

    def left(self, queue: str) -> int:
        """Messages that are not deleted."""
        return self.count(queue) + self._told(queue, "ApproximateNumberOfMessagesNotVisible")

    def _told(self, queue: str, name: str) -> int:
        asked = self._client.get_queue_attributes(QueueUrl=self._url(queue), AttributeNames=[name])
        return int(self._runner.run(asked)["Attributes"][name])

    def _url(self, queue: str) -> str:
        return f"{self.address}/000000000000/{queue}"


if __name__ == "__main__":
    main()
