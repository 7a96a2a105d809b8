"""Workers take turns at serving the same full topic with the same model; what counts is the rate of their answers.

A worker is a function from a `Job` to a command line. The rate is that of the topic answers go to: answers over the
time between the broker's stamp on the first and on the last. CPU time is counted from the first answer seen to the
last, so what a worker needs to start is in neither figure.
"""

from __future__ import annotations

import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from benchmarks.common import (
    HERE,
    LOOK,
    PATIENCE,
    Bus,
    Child,
    Figure,
    Neighbours,
    await_quiet,
    median,
    own,
    quietest,
    table,
)


@dataclass(frozen=True)
class Job:
    """What one turn is about; every worker is told the same."""

    brokers: str
    source: str
    sink: str
    errors: str
    group: str
    model: Path
    messages: int
    rows: int
    binary: bool
    max_message: int
    folder: Path


Worker = Callable[[Job], Sequence[str | Path]]


def bare(job: Job) -> Sequence[str | Path]:
    """The hand-written loop."""
    command = [sys.executable, HERE / "bare.py", *_told(job)]
    return [*command, "--binary"] if job.binary else command


def inferbus(job: Job, **settings: Any) -> Sequence[str | Path]:
    """A worker as a user starts it: defaults, but for the batch size that all contestants share."""
    pipeline = {
        "name": "bench",
        "model": str(job.model),
        "batch": {"max_rows": job.rows},
        "source": {"kafka": {"brokers": job.brokers, "topic": job.source, "group": job.group}},
        "sink": {"kafka": {"topic": job.sink}},
        "errors": {"kafka": {"topic": job.errors}},
        "http": {"port": 0},
        **settings,
    }
    file = job.folder / f"{job.group}.yaml"
    file.write_text(yaml.safe_dump(pipeline))
    return [own("inferbus"), "run", file]


def peer(python: Path, script: str) -> Worker:
    """A program of `peers/`, run by the Python of its own environment."""
    return lambda job: [python, HERE / "peers" / script, *_told(job)]


def _told(job: Job) -> list[str | Path]:
    return ["--brokers", job.brokers, "--source", job.source, "--sink", job.sink, "--group", job.group,
            "--model", job.model, "--messages", str(job.messages), "--rows", str(job.rows)]  # fmt: skip


class Turns(ABC):
    """Workers that take turns at the same job, and what came of it.

    Args:
        messages: Requests to serve in a turn.
        rows: Most requests in a batch.

    Attributes:
        turns: What each worker did, by its name.
    """

    costs: ClassVar[Mapping[str, str]] = {"cpu_us": "CPU us/message"}
    """Beside the rate: what else a turn measures, and how it is called in the table."""

    def __init__(self, messages: int, rows: int) -> None:
        self.messages = messages
        self.rows = rows
        self.turns: dict[str, list[dict[str, float]]] = {}

    @abstractmethod
    def attempt(self, name: str, worker: Worker, messages: int | None) -> dict[str, float]:
        """One turn, however busy the neighbours are: `rate`, the `costs`, and `neighbours`.

        Raises:
            RuntimeError: As `turn`.
        """

    def turn(self, name: str, worker: Worker, messages: int | None = None) -> dict[str, float]:
        """Let one worker serve, until `messages` answers are there (by default one for each request).

        Raises:
            RuntimeError: It ended early, answered too much, or refused a request.
        """
        done = quietest(lambda: self.attempt(name, worker, messages))
        self.turns.setdefault(name, []).append(done)
        return done

    def rounds(self, runs: int, *workers: tuple[str, Worker]) -> None:
        """Turn by turn, each round in the other order than the one before: what drifts harms all alike.

        A first turn of each does not count: a broker that has just started gets faster with every message.
        """
        for name, worker in workers:
            self.turn(name, worker)
        self.turns.clear()
        for i in range(runs):
            for name, worker in workers if i % 2 == 0 else reversed(workers):
                self.turn(name, worker)

    def median(self, name: str, what: str = "rate") -> float:
        """The median of one worker's turns."""
        return median(turn[what] for turn in self.turns[name])

    def show(self) -> None:
        """Print the medians."""
        columns = ("messages_per_second", "of_bare", *(f"{cost}_per_message" for cost in self.costs))
        rows = [(name, *(done[c] for c in columns)) for name, done in self.summary().items()]
        table(("", "messages/s", "of bare", *self.costs.values()), rows)

    def result(self, runs: int) -> dict[str, Any]:
        """What is kept of the contest."""
        return {"messages": self.messages, "runs": runs, "rows": self.rows, "workers": self.summary()}

    def summary(self) -> dict[str, Mapping[str, Any]]:
        """Per worker the medians and all turns."""
        return {
            name: {
                "messages_per_second": round(self.median(name)),
                **{f"{cost}_per_message": round(self.median(name, cost), 2) for cost in self.costs},
                "of_bare": round(self.median(name) / self.median("bare"), 4),
                "turns": [
                    {"messages_per_second": round(t["rate"]), "neighbours": round(t["neighbours"], 3)} for t in turns
                ],
            }
            for name, turns in self.turns.items()
        }


class Contest(Turns):
    """One full topic and one model."""

    def __init__(
        self,
        bus: Bus,
        source: str,
        model: Path,
        messages: int,
        rows: int,
        folder: Path,
        *,
        binary: bool = False,
        max_message: int = 2**20,
    ) -> None:
        super().__init__(messages, rows)
        self.bus = bus
        self.source = source
        self.model = model
        self.folder = folder
        self.binary = binary
        self.max_message = max_message

    def attempt(self, name: str, worker: Worker, messages: int | None) -> dict[str, float]:
        """See `Turns`."""
        wanted = messages or self.messages
        await_quiet()
        sink, errors = self.bus.topic(), self.bus.topic()
        job = Job(self.bus.brokers, self.source, sink, errors, f"bench-{uuid.uuid4().hex[:8]}", self.model,
                  wanted, self.rows, self.binary, self.max_message, self.folder)  # fmt: skip
        try:
            server = self.bus.server
            neighbours = Neighbours(*([server.pid] if server else []))
            with Child(worker(job)) as child:
                answers, cpu = self._watch(child, job, wanted)
                # Of a broker that was given nothing tells which process it is.
                taken = neighbours.share(child.cpu()) if server else 0.0
            seconds = self.bus.written_in(sink)
            total = self.bus.count(sink)
            if not messages and total != self.messages:
                raise RuntimeError(f"{name} gave {total} answers to {self.messages} requests")
        finally:
            self.bus.drop(sink, errors)
        done = {"rate": total / seconds, "cpu_us": 1e6 * cpu / answers, "neighbours": taken}
        print(f"  {name:<12}{done['rate']:>10,.0f} messages/s {done['cpu_us']:>8.1f} us CPU each; "
              f"neighbours took {taken:.0%} of the machine", flush=True)  # fmt: skip
        return done

    def _watch(self, child: Child, job: Job, wanted: int) -> tuple[int, float]:
        """Until the last answer is there: answers between the first look that found some and then, and CPU seconds."""
        until = time.monotonic() + PATIENCE
        first: tuple[int, float] | None = None
        while True:
            ended = child.ended()
            count, cpu = self.bus.count(job.sink), child.cpu()
            if count and first is None:
                first = (count, cpu)
            if first is not None and count >= wanted:
                break
            if ended or time.monotonic() > until:
                refused = self.bus.one(job.errors)
                raise RuntimeError(f"{count} of {wanted} answers came; refused: {refused}; it said:\n{child.log()}")
            time.sleep(LOOK)
        return max(1, count - first[0]), cpu - first[1]


def ratio(contest: Turns, least: float, other: str = "bare") -> Figure:
    """Inferbus over another worker."""
    return Figure(f"inferbus / {other}", contest.median("inferbus") / contest.median(other), least)
