"""From start to ready: the model warm, the broker reached.

    python -m benchmarks.startup [--runs N]

`inferbus run` until /readyz answers 200, against a bare script (bare_start.py) that imports the same libraries, loads
the same model and lists the topic, in alternating turns; and `inferbus --help`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import HERE, Child, Figure, arguments, await_quiet, free_port, kafka, median, own, save, table
from benchmarks.contest import Job, inferbus
from benchmarks.material import tiny_model
from benchmarks.memory import await_ready


def main() -> None:
    """Measure, print and keep the times."""
    args = arguments(__doc__, runs=7).parse_args()
    began = os.getloadavg()
    seconds: dict[str, list[float]] = {"bare": [], "inferbus": [], "inferbus --help": []}
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus:
        folder = Path(scratch)
        model = tiny_model(folder)
        source, sink, errors = bus.topic(), bus.topic(), bus.topic()
        bare: Sequence[str | Path] = [sys.executable, HERE / "bare_start.py", model, bus.brokers, source]
        for i in range(-1, args.runs):  # the first turn fills the caches of the disk and does not count
            await_quiet()
            port = free_port()
            job = Job(bus.brokers, source, sink, errors, f"bench-{i + 1}", model, 0, 256, False, 2**20, folder)
            taken = {
                "bare": until_said(bare),
                "inferbus": until_ready(inferbus(job, http={"port": port}), port),
                "inferbus --help": to_end([own("inferbus"), "--help"]),
            }
            if i >= 0:
                for name, each in seconds.items():
                    each.append(taken[name])
    medians = {name: median(each) for name, each in seconds.items()}
    table(("", "seconds"), list(medians.items()))
    figures = [
        Figure("start to ready over the bare script", medians["inferbus"] / medians["bare"], 2.5, at_least=False),
        Figure("inferbus --help", medians["inferbus --help"], 0.5, at_least=False, unit="s"),
    ]
    turns = {name: [round(s, 3) for s in each] for name, each in seconds.items()}
    save(args.out, began, figures, {"runs": args.runs, "seconds": turns})


def until_said(command: Sequence[str | Path]) -> float:
    """Seconds until the program says `ready`."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        if child.stdout is None or child.stdout.readline() != "ready\n":
            raise RuntimeError("the bare script did not become ready")
        return time.perf_counter() - began


def until_ready(command: Sequence[str | Path], port: int) -> float:
    """Seconds until the worker is ready."""
    began = time.perf_counter()
    with Child(command) as child:
        await_ready(child, port)
        return time.perf_counter() - began


def to_end(command: Sequence[str | Path]) -> float:
    """Seconds until the program has ended."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=60)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
