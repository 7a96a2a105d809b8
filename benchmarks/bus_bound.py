"""The bus alone: small JSON requests and a model that costs nothing.

    python -m benchmarks.bus_bound [--messages N] [--runs N] [--no-peers]

Inferbus against the bare loop (bare.py) in alternating turns, then peers on the same topic with the same model.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.common import arguments, environment_of, kafka, save
from benchmarks.contest import Contest, bare, inferbus, peer, ratio
from benchmarks.material import json_requests, tiny_model

ROWS = 256
SHARED = ("numpy", "onnxruntime", "orjson")
PEERS = {  # environment and program: what is installed, and the packages every peer needs
    "faststream": ("faststream[confluent]==0.7.*", *SHARED),
    "arroyo": ("sentry-arroyo==2.48.*", *SHARED),
}


def main() -> None:
    """Fill a topic, let everyone serve it, print and keep the rates."""
    parser = arguments(__doc__, messages=300_000, runs=3)
    parser.add_argument("--peer-messages", type=int, default=60_000, help="a peer is stopped after so many answers")
    parser.add_argument("--no-peers", action="store_true", help="only the bare loop and Inferbus")
    args = parser.parse_args()
    began = os.getloadavg()
    peers = {} if args.no_peers else {name: environment_of(name, *packages) for name, packages in PEERS.items()}
    with tempfile.TemporaryDirectory() as scratch, kafka() as bus:
        folder = Path(scratch)
        source = bus.topic()
        bus.fill(source, args.messages, json_requests())
        contest = Contest(bus, source, tiny_model(folder), args.messages, ROWS, folder)
        contest.rounds(args.runs, ("bare", bare), ("inferbus", inferbus))
        for _ in range(args.runs):
            for name, python in peers.items():
                served = min(args.messages, args.peer_messages)
                contest.turn(name, peer(python, f"{name}_worker.py"), served)
    contest.show()
    figures = [ratio(contest, 0.9)] + [ratio(contest, 5, name) for name in peers]
    save(args.out, began, figures, contest.result(args.runs))


if __name__ == "__main__":
    main()
