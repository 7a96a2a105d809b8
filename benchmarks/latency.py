"""How long a request waits for its answer, in an open loop (load.py).

    python -m benchmarks.latency [--seconds S] [--runs N]

First 500 requests a second against Inferbus and the bare one-message loop (bare_one.py) in alternating turns. Then
Inferbus alone at 20 % and 70 % of what it can serve beside the same generator and reader, which take their part of the
machine; and at the same rates the bus alone, the requests read where they were written: nothing can be faster.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common import (
    HERE,
    Bus,
    Child,
    Figure,
    Neighbours,
    arguments,
    await_quiet,
    free_port,
    kafka,
    median,
    percentiles,
    quietest,
    save,
    table,
)
from benchmarks.contest import Job, inferbus
from benchmarks.material import json_requests, tiny_model

RATE = 500.0
FLOOD = 100_000.0  # requests a second, more than a worker serves beside the generator
SETTLE = 1.0  # seconds at the start of a turn that do not count: first fetches, first connections


class Lane:
    """One turn of one worker: a source, a sink, and the worker between them."""

    def __init__(self, bus: Bus, model: Path, folder: Path) -> None:
        self.bus, self.folder = bus, folder
        self.port = free_port()
        self.source, self.sink, self.errors = bus.topic(), bus.topic(), bus.topic()
        self.answers = self.sink
        group = f"bench-{uuid.uuid4().hex[:8]}"
        self.job = Job(bus.brokers, self.source, self.sink, self.errors, group, model, 0, 256, False, 2**20, folder)

    def inferbus(self) -> Sequence[str | Path]:
        """A worker with its defaults."""
        return inferbus(self.job, http={"port": self.port})

    def bare(self) -> Sequence[str | Path]:
        """The hand-written loop."""
        job = self.job
        return [sys.executable, HERE / "bare_one.py", "--brokers", job.brokers, "--source", job.source,
                "--sink", job.sink, "--group", job.group, "--model", job.model]  # fmt: skip

    def nobody(self) -> Sequence[str | Path]:
        """No worker: the requests themselves are read."""
        self.answers = self.source
        return [sys.executable, "-c", "import time; time.sleep(3600)"]

    def turn(self, command: Sequence[str | Path], rate: float, seconds: float) -> dict[str, Any]:
        """Offer so many requests a second; latencies in milliseconds, and what the worker says of its batches."""
        server = self.bus.server
        neighbours = Neighbours(*([server.pid] if server else []))
        with Child(command) as worker:
            self.bus.fill(self.source, 1, json_requests())
            self._await(lambda: self.bus.count(self.answers), worker, 60.0)
            before = self._batches()
            count, file = int(rate * seconds), self.folder / f"{uuid.uuid4().hex}.npy"
            load = [sys.executable, "-m", "benchmarks.load"]
            with Child([*load, "read", self.bus.brokers, self.answers, str(count + 1), file]) as reader:
                self._await(lambda: "ready" in reader.log(), reader, 30.0)
                with Child([*load, "write", self.bus.brokers, self.source, str(rate), str(count)]) as writer:
                    self._await(reader.ended, worker, seconds + 90.0)
                    self._await(writer.ended, worker, 30.0)
                    begin, late = map(float, writer.log().split())
                    # Of a broker that was given nothing tells which process it is.
                    taken = neighbours.share(sum(c.cpu() for c in (worker, reader, writer))) if server else 0.0
            after = self._batches()
        came = np.load(file)[:count]
        due = begin + np.arange(count) / rate
        steady = due >= begin + SETTLE
        waits = (came - due)[steady]
        missing = int(np.isnan(waits).sum())
        waits = waits[~np.isnan(waits)]
        served = np.count_nonzero((came > begin + SETTLE) & (came <= begin + seconds)) / (seconds - SETTLE)
        done: dict[str, Any] = {
            **percentiles(waits),
            "missing": missing,
            "served_per_second": round(served),
            "generator_late_p99": late,
            "neighbours": round(taken, 3),
        }
        if after is not None and before is not None:
            batches, rows, predict = (b - a for a, b in zip(before, after, strict=True))
            done |= {"batch_rows": round(rows / batches, 1), "batch_predict_ms": round(1000 * predict / batches, 3)}
        return done

    def _await(self, happened: Callable[[], object], child: Child, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not happened():
            if child.ended() or time.monotonic() > until:
                raise RuntimeError(f"it ended, or took longer than {seconds:.0f} s; it said:\n{child.log()}")
            time.sleep(0.05)

    def _batches(self) -> tuple[float, float, float] | None:
        """Batches, rows and seconds of predict so far; None when nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5.0) as answer:
                text = answer.read().decode()
        except OSError:
            return None
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        batches = sum(s.value for s in samples if s.name == "inferbus_batches_total")
        rows = sum(s.value for s in samples if s.name == "inferbus_batch_rows_sum")
        wanted = {"stage": "predict"}
        predict = sum(s.value for s in samples if s.name == "inferbus_stage_seconds_sum" and s.labels == wanted)
        return batches, rows, predict

    def close(self) -> None:
        """Delete the topics."""
        self.bus.drop(self.source, self.sink, self.errors)


def main() -> None:
    """Measure, print and keep the latencies."""
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a turn (default %(default)s)")
    args = parser.parse_args()
    began = os.getloadavg()
    turns: dict[str, list[dict[str, Any]]] = {"bare": [], "inferbus": []}
    loaded: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus:
        folder = Path(scratch)
        model = tiny_model(folder)

        def once(name: str, rate: float, seconds: float) -> dict[str, Any]:
            await_quiet()
            lane = Lane(bus, model, folder)
            try:
                worker = {"bare": lane.bare, "inferbus": lane.inferbus, "bus alone": lane.nobody}[name]
                return lane.turn(worker(), rate, seconds)
            finally:
                lane.close()

        def turn(name: str, rate: float, seconds: float) -> dict[str, Any]:
            return quietest(lambda: once(name, rate, seconds))

        once("inferbus", RATE, 3.0)  # a broker that has just started gets faster with every message
        for i in range(args.runs):
            for name in ("bare", "inferbus") if i % 2 == 0 else ("inferbus", "bare"):
                turns[name].append(turn(name, RATE, args.seconds))
                print(f"  {name:<10}", turns[name][-1], flush=True)
        capacity = turn("inferbus", FLOOD, 6.0)["served_per_second"]
        print(f"  serves {capacity:,} requests/s beside generator and reader", flush=True)
        for share in (20, 70):
            rate = round(capacity * share / 100)
            for name in ("bus alone", "inferbus"):
                loaded[f"{name}, {share} %"] = {"rate": rate, **turn(name, rate, args.seconds)}
    heads = ("p50", "p99", "p99.9")
    medians = {name: {head: median(t[head] for t in own) for head in heads} for name, own in turns.items()}
    rows = [(f"{name}, {RATE:.0f}/s", *(own[h] for h in heads), "", "") for name, own in medians.items()]
    for name, own in loaded.items():
        batches = (own.get("batch_rows", ""), own.get("batch_predict_ms", ""))
        rows.append((f"{name} ({own['rate']:,}/s)", *(own[h] for h in heads), *batches))
    table(("milliseconds", *heads, "rows a batch", "predict ms"), rows)
    extra = medians["inferbus"]["p50"] - medians["bare"]["p50"]
    figures = [Figure("median over the bare median", extra, 2.0, at_least=False, unit="ms")]
    result = {"rate": RATE, "seconds": args.seconds, "milliseconds": medians, "turns": turns,
              "capacity_per_second": capacity, "at_share_of_capacity": loaded}  # fmt: skip
    save(args.out, began, figures, result)


if __name__ == "__main__":
    main()
