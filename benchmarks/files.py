"""A job of files: JSON lines in, JSON lines out, small requests and a model that costs nothing.

    python -m benchmarks.files [--messages N] [--runs N]

`inferbus run` from start to end, against the bare loop (bare_files.py) from start to end, in alternating turns.
Inferbus names every row's model and time, keeps its progress, and makes each file durable before it moves on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import (
    HERE,
    Figure,
    Neighbours,
    arguments,
    await_quiet,
    median,
    own,
    quietest,
    save,
    table,
)
from benchmarks.material import json_requests, tiny_model

ROWS = 256


def main() -> None:
    """Write the requests, let both serve them, print and keep the rates."""
    args = arguments(__doc__, messages=1_500_000, runs=5).parse_args()
    began = os.getloadavg()
    turns: dict[str, list[dict[str, Any]]] = {"bare": [], "inferbus": []}
    # In memory where there is memory: disks of shared machines stall for seconds.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of ours with a random name
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        folder = Path(scratch)
        request = json_requests()
        with (folder / "requests.jsonl").open("wb") as file:
            file.writelines(request(i)[0] + b"\n" for i in range(args.messages))
        workers = {"bare": bare(folder), "inferbus": inferbus(folder)}
        for i in range(-1, args.runs):  # a first turn of each does not count
            for name in workers if i % 2 else reversed(workers):
                done = quietest(lambda name=name: turn(folder, workers[name], args.messages))  # type: ignore[misc]
                print(f"  {name:<12}{done['rate']:>10,.0f} rows/s {done['cpu_us']:>8.1f} us CPU each", flush=True)
                if i >= 0:
                    turns[name].append(done)
    summary = {
        name: {what: round(median(one[what] for one in each), 2) for what in ("rate", "cpu_us")}
        for name, each in turns.items()
    }
    table(("", "rows/s", "CPU us/row"), [(name, one["rate"], one["cpu_us"]) for name, one in summary.items()])
    figures = [Figure("inferbus / bare", summary["inferbus"]["rate"] / summary["bare"]["rate"], 0.7)]
    save(args.out, began, figures, {"messages": args.messages, "runs": args.runs, "workers": summary, "turns": turns})


def bare(folder: Path) -> Sequence[str | Path]:
    """The hand-written loop."""
    model = tiny_model(folder)
    return [sys.executable, HERE / "bare_files.py", "--source", folder / "requests.jsonl", "--sink",
            folder / "bare.jsonl", "--model", model, "--rows", str(ROWS)]  # fmt: skip


def inferbus(folder: Path) -> Sequence[str | Path]:
    """A job as a user starts it: defaults, but for the batch size."""
    pipeline = {
        "name": "bench",
        "model": str(tiny_model(folder)),
        "batch": {"max_rows": ROWS},
        "source": {"file": {"path": "requests.jsonl"}},
        "sink": {"file": {"path": "predictions"}},
        "http": None,
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(pipeline))
    return [own("inferbus"), "run", folder / "bench.yaml"]


def turn(folder: Path, command: Sequence[str | Path], rows: int) -> dict[str, Any]:
    """Serve every line once; rows a second from start to end, and CPU microseconds a row.

    Raises:
        RuntimeError: It failed, or did not answer every line.
    """
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    for made in ("requests.jsonl.bench.progress", "bare.jsonl"):
        (folder / made).unlink(missing_ok=True)
    await_quiet()
    neighbours = Neighbours()
    before, start = os.times(), time.monotonic()
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=600)
    seconds, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    answers = sum(_lines(path) for path in [folder / "bare.jsonl", *(folder / "predictions").rglob("*.jsonl")])
    if done.returncode or answers != rows:
        raise RuntimeError(f"{answers} answers to {rows} requests; it said:\n{done.stderr.decode()}")
    return {"rate": rows / seconds, "cpu_us": 1e6 * cpu / rows, "neighbours": neighbours.share(cpu)}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main()
