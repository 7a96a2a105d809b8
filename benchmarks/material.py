"""Models to serve and requests to ask of them, made here so that nothing is fetched while a benchmark runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import orjson
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import Request

DIFFERENT = 1000  # bodies that follow each other before the first comes again


def tiny_model(folder: Path) -> Path:
    """64 floats in; 10 probabilities and a label out: as good as no computation."""
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    return _save(folder / "tiny.onnx", nodes, [64], (64, 10))


def image_model(folder: Path) -> Path:
    """A 3x224x224 image in; 10 probabilities and a label out, after one pass over the pixels."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    return _save(folder / "image.onnx", nodes, [3, 224, 224], (3, 10))


def _save(path: Path, nodes: list[onnx.NodeProto], row: list[int], weights: tuple[int, int]) -> Path:
    values = np.random.default_rng(0).normal(size=weights).astype("<f4")
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *row])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(values, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def json_requests() -> Callable[[int], Request]:
    """V2 JSON with 64 floats: about 450 bytes."""
    numbers = np.random.default_rng(1).random((DIFFERENT, 64)).round(3)
    bodies = [
        orjson.dumps({"id": str(i), "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": row.tolist()}]})
        for i, row in enumerate(numbers)
    ]  # fmt: skip
    return lambda i: (bodies[i % DIFFERENT], None)


def binary_requests(name: str, datatype: str, tensors: np.ndarray) -> Callable[[int], Request]:
    """V2 with raw tensors; `tensors` holds one row for each different request."""
    requests: list[Request] = []
    for i, tensor in enumerate(tensors):
        shape = [1, *tensor.shape]
        parameters = {"binary_data_size": tensor.nbytes}
        tell = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
        head = orjson.dumps({"id": str(i), "inputs": [tell]})
        headers = {"inference-header-content-length": b"%d" % len(head)}
        requests.append((head + tensor.tobytes(), headers))
    return lambda i: requests[i % len(requests)]
