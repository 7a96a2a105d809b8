"""The bare loop for files: read, parse, batch, predict, write. No progress, no check, one file."""

from __future__ import annotations

import argparse
from itertools import islice

import numpy as np
import onnxruntime as ort
import orjson


def main() -> None:
    """Serve every line of a file and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sink", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [o.name for o in session.get_outputs()]
    number = 0
    with open(args.source, "rb") as source, open(args.sink, "wb") as sink:  # noqa: PTH123 - as one would write it
        while lines := list(islice(source, args.rows)):
            batch = np.array([orjson.loads(line)["inputs"][0]["data"] for line in lines], "<f4")
            answers = [a.tolist() for a in session.run(outputs, {name: batch})]
            for row in zip(*answers, strict=True):
                answer = {"id": number, **dict(zip(outputs, row, strict=True))}
                sink.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
                number += 1


if __name__ == "__main__":
    main()
