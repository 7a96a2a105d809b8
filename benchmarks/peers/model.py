"""What every peer does with a batch: JSON decode, stack, predict, JSON encode; nothing checked, as in the bare loop."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson


def arguments() -> argparse.Namespace:
    """What a contest tells its workers."""
    parser = argparse.ArgumentParser()
    for name in ("brokers", "source", "sink", "group", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--prefetch", type=int, help="of RabbitMQ")
    parser.add_argument("--unconfirmed", action="store_true", help="publish to RabbitMQ without confirms")
    return parser.parse_args()


class Model:
    """One session of onnxruntime."""

    def __init__(self, path: str) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def answer(self, documents: list[dict[str, Any]]) -> Iterable[bytes]:
        """Bodies of the answers to V2 requests."""
        batch = np.array([d["inputs"][0]["data"] for d in documents], "<f4")
        answers = [a.tolist() for a in self._session.run(self._outputs, {self._input: batch})]
        for i, row in enumerate(zip(*answers, strict=True)):
            outputs = [{"name": n, "data": a} for n, a in zip(self._outputs, row, strict=True)]
            yield orjson.dumps({"id": str(i), "outputs": outputs})
