"""Workers take turns at emptying a queue: a contest where serving a request takes it away.

So every turn has queues of its own, filled before it begins. The rate is read off the sink queue's length, which the
bus tells whoever asks: how far it grew between the first look that found an answer and the first that found all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from benchmarks.common import PATIENCE, Child, Neighbours, Request, await_quiet, cpu_of, members
from benchmarks.contest import Job, Turns, Worker

SETTLED = 1.0  # seconds a worker has after the last answer to settle the last requests


class Queues(Protocol):
    """A bus of queues."""

    address: str
    server: int  # group of its processes
    look: float  # seconds between looks at a queue's length, of which none may slow the server

    def make(self) -> str:
        """A new queue; its name."""

    def drop(self, *queues: str) -> None:
        """Delete queues."""

    def fill(self, queue: str, messages: int, request: Callable[[int], Request]) -> None:
        """Write so many requests; return when all are there."""

    def count(self, queue: str) -> int:
        """Messages that may be received."""

    def left(self, queue: str) -> int:
        """Messages that are not settled, now that nobody receives any more."""


class QueueContest(Turns):
    """Queues and one model.

    Args:
        bus: Where the queues are.
        model: The model's file.
        messages: Requests of a turn.
        rows: Most requests in a batch.
        request: The request of each number.
        folder: For files of the workers.
        requests: In place of `request`, for workers that want another envelope around the same bodies.
    """

    costs: ClassVar[Mapping[str, str]] = {"cpu_us": "CPU us/message", "server_us": "server's"}

    def __init__(
        self,
        bus: Queues,
        model: Path,
        messages: int,
        rows: int,
        request: Callable[[int], Request],
        folder: Path,
        requests: Mapping[str, Callable[[int], Request]] | None = None,
    ) -> None:
        super().__init__(messages, rows)
        self.bus = bus
        self.model = model
        self.request = request
        self.folder = folder
        self.requests = requests or {}

    def attempt(self, name: str, worker: Worker, messages: int | None) -> dict[str, float]:
        """See `Turns`."""
        wanted = messages or self.messages
        source, sink, errors = (self.bus.make() for _ in range(3))
        job = Job(self.bus.address, source, sink, errors, f"bench-{uuid.uuid4().hex[:8]}", self.model, wanted,
                  self.rows, False, 2**20, self.folder)  # fmt: skip
        try:
            self.bus.fill(source, wanted, self.requests.get(name, self.request))
            await_quiet()
            neighbours = Neighbours(*members(self.bus.server))
            with Child(worker(job)) as child:
                done = self._watch(child, job)
                done["neighbours"] = neighbours.share(_cpu(child.pid))
                until = time.monotonic() + SETTLED
                while not child.ended() and time.monotonic() < until:
                    time.sleep(0.05)
            total, left = self.bus.count(sink), self.bus.left(source)
            if total != wanted or left:
                raise RuntimeError(f"{name} gave {total} answers to {wanted} requests and left {left} unsettled")
        finally:
            self.bus.drop(source, sink, errors)
        print(f"  {name:<20}{done['rate']:>10,.0f} messages/s {done['cpu_us']:>8.1f} us CPU each, and the server "
              f"{done['server_us']:.1f}; neighbours took {done['neighbours']:.0%}", flush=True)  # fmt: skip
        return done

    def _watch(self, child: Child, job: Job) -> dict[str, float]:
        """Until the last answer is there: messages a second since the first, and what CPU each took."""
        until = time.monotonic() + PATIENCE
        first: tuple[int, float, float, float] | None = None
        while True:
            ended = child.ended()
            count, now = self.bus.count(job.sink), time.monotonic()
            if first is None and count:
                first = count, now, _cpu(child.pid), _cpu(self.bus.server)
            if first is not None and count >= job.messages:
                break
            if ended or now > until:
                refused = self.bus.count(job.errors)
                raise RuntimeError(f"{count} of {job.messages} answers, {refused} refused; it said:\n{child.log()}")
            time.sleep(self.bus.look)
        start, began, cpu, server = first
        answers = count - start
        if not answers:
            raise RuntimeError(f"{job.messages} messages are too few to take a rate from")
        return {
            "rate": answers / (now - began),
            "cpu_us": 1e6 * (_cpu(child.pid) - cpu) / answers,
            "server_us": 1e6 * (_cpu(self.bus.server) - server) / answers,
        }


def _cpu(group: int) -> float:
    """CPU seconds of a group of processes."""
    return sum(map(cpu_of, members(group)))
