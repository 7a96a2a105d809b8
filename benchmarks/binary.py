"""Large tensors: V2 requests with the binary data extension, an image of 600 KB each, and a model that reads it once.

    python -m benchmarks.binary [--messages N] [--runs N]

Inferbus against the bare loop in alternating turns.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import arguments, kafka, save
from benchmarks.contest import Contest, bare, inferbus, ratio
from benchmarks.material import binary_requests, image_model

ROWS = 32  # 19 MB a batch; the bare loop is slower with 256, and no faster with 16
LARGEST = 2**20


def main() -> None:
    """Fill a topic, let both serve it, print and keep the rates."""
    parser = arguments(__doc__, messages=6144, runs=5)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of a batch, alike for both (default %(default)s)")
    args = parser.parse_args()
    began = os.getloadavg()
    images = np.random.default_rng(2).random((16, 3, 224, 224), "f4")
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus:
        folder = Path(scratch)
        source = bus.topic()
        bus.fill(source, args.messages, binary_requests("x", "FP32", images))
        contest = Contest(bus, source, image_model(folder), args.messages, args.rows, folder, binary=True)
        contest.rounds(args.runs, ("bare", bare), ("inferbus", inferbus))
    contest.show()
    figures = [ratio(contest, 0.85)]
    save(args.out, began, figures, {"request_bytes": images[0].nbytes, **contest.result(args.runs)})


if __name__ == "__main__":
    main()
