"""What a worker holds while a backlog waits and its sink has stopped.

    python -m benchmarks.memory [--messages N] [--seconds S]

A worker that is ready and has nothing to do is the base. Then a worker starts on the backlog; as soon as it is ready
the broker of its sink is stopped (SIGSTOP: connections stay, nothing answers), and its resident memory is watched.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

from benchmarks.common import Bus, Child, Figure, arguments, broker, free_port, kafka, save, table
from benchmarks.contest import Job, inferbus
from benchmarks.material import json_requests, tiny_model

MIB = 2**20


def main() -> None:
    """Measure, print and keep the memory."""
    parser = arguments(__doc__, messages=1_000_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to watch (default %(default)s)")
    args = parser.parse_args()
    began = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus, broker() as (sink_address, sink_broker):
        sinks = Bus(sink_address, sink_broker)
        folder = Path(scratch)
        source, empty, sink, errors = bus.topic(), bus.topic(), sinks.topic(), bus.topic()
        bus.fill(source, args.messages, json_requests())
        model = tiny_model(folder)

        def worker(topic: str) -> tuple[Child, int]:
            port = free_port()
            group = f"bench-{uuid.uuid4().hex[:8]}"
            job = Job(bus.brokers, topic, sink, errors, group, model, 0, 256, False, MIB, folder)
            apart = {"kafka": {"topic": sink, "brokers": sink_address}}
            return Child(inferbus(job, http={"port": port}, sink=apart)), port

        child, port = worker(empty)
        with child:
            await_ready(child, port)
            time.sleep(5.0)
            base = child.memory()
        child, port = worker(source)
        with child:
            await_ready(child, port)
            os.kill(sink_broker.pid, signal.SIGSTOP)
            try:
                samples = watch(child, args.seconds)
                peak = child.memory("VmHWM")
            finally:
                os.kill(sink_broker.pid, signal.SIGCONT)
            child.stop(0.0)  # what it cannot write it would try to drain
        served = sinks.count(sink)
        sinks.close()
    most = max(samples)
    rows = [
        ("ready, nothing to do", base / MIB),
        ("sink stopped, most seen", most / MIB),
        ("sink stopped, at the end", samples[-1] / MIB),
        ("peak, start-up included", peak / MIB),
    ]
    table(("resident", "MiB"), rows)
    print(f"{args.messages - served:,} requests were waiting")
    figures = [Figure("above a ready worker", (peak - base) / 1e6, 150.0, at_least=False, unit="MB")]
    result = {"messages": args.messages, "waiting": args.messages - served, "seconds": args.seconds,
              "resident_bytes": {"base": base, "most": most, "last": samples[-1], "peak": peak}}  # fmt: skip
    save(args.out, began, figures, result)


def await_ready(child: Child, port: int) -> None:
    """Return once the worker says it can serve."""
    until = time.monotonic() + 60.0
    while not is_ready(port):
        if child.ended() or time.monotonic() > until:
            raise RuntimeError(f"the worker did not become ready; it said:\n{child.log()}")
        time.sleep(0.01)


def is_ready(port: int) -> bool:
    """Whether `/readyz` answers 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5.0):
            return True
    except OSError:
        return False


def watch(child: Child, seconds: float) -> list[int]:
    """Resident bytes, twice a second."""
    samples: list[int] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        samples.append(child.memory())
        time.sleep(0.5)
    return samples


if __name__ == "__main__":
    main()
