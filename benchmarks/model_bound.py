"""A model that takes all the time there is: Google's magika, file types from the first and last bytes of a file.

    python -m benchmarks.model_bound [--messages N] [--runs N] [--rows N]

The batch size is the best of a sweep over the bare session, in the same run; then Inferbus against the bare loop at
that size in alternating turns.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.common import arguments, kafka, save, table
from benchmarks.contest import Contest, bare, inferbus, ratio
from benchmarks.material import binary_requests

SIZES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    """Find the best batch size, fill a topic, let both serve it, print and keep the rates."""
    parser = arguments(__doc__, messages=2048, runs=5)
    parser.add_argument("--rows", type=int, help="batch size, in place of the sweep's best")
    args = parser.parse_args()
    began = os.getloadavg()
    model = magika()
    name, length = tensor(model)
    rows = np.random.default_rng(3).integers(0, 256, (256, length), "<i4")
    swept = sweep(model, name, rows) if args.rows is None else {}
    best = args.rows or max(swept, key=lambda size: swept[size])
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus:
        source = bus.topic()
        bus.fill(source, args.messages, binary_requests(name, "INT32", rows))
        contest = Contest(bus, source, model, args.messages, best, Path(scratch), binary=True)
        contest.rounds(args.runs, ("bare", bare), ("inferbus", inferbus))
    contest.show()
    figures = [ratio(contest, 0.97)]
    sizes = {size: round(rate, 1) for size, rate in swept.items()}
    save(args.out, began, figures, {"rows_per_second_by_batch_size": sizes, **contest.result(args.runs)})


def magika() -> Path:
    """The model that the package brings."""
    package = importlib.util.find_spec("magika")
    found = sorted(Path(package.origin).parent.rglob("*.onnx")) if package and package.origin else []
    if not found:
        sys.exit("The model comes with a package that is not installed: pip install magika")
    return found[-1]


def tensor(model: Path) -> tuple[str, int]:
    """Name and length of the model's only input."""
    (only,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()
    return only.name, only.shape[1]


def sweep(model: Path, name: str, rows: np.ndarray, seconds: float = 2.0) -> dict[int, float]:
    """Rows per second of the bare session by batch size: the better of two passes, since neighbours only slow down."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rates: dict[int, float] = {}
    for size in SIZES * 2:
        batch = rows[:size]
        session.run(None, {name: batch})
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 2:
            session.run(None, {name: batch})
            runs += 1
        rates[size] = max(rates.get(size, 0.0), runs * size / (time.perf_counter() - began))
    table(("rows of a batch", "rows/s"), list(rates.items()))
    return rates


if __name__ == "__main__":
    main()
