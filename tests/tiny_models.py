"""Models small enough to build in a test: ONNX graphs of a few nodes, and a `model.py` that doubles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path,
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    external: str | None = None,
) -> Path:
    """Write a graph; `external` names a file beside it that takes the weights."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def floats(name: str, shape: Sequence[int | str | None] | None) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def linear(path: Path, features: int = 64, classes: int = 10, seed: int = 0, external: str | None = None) -> Path:
    """`x` FP32 [-1, features] -> `probabilities` FP32 [-1, classes], `label` INT64 [-1]."""
    weights = np.random.default_rng(seed).normal(size=(features, classes)).astype(np.float32)
    return save(
        path,
        [
            helper.make_node("MatMul", ["x", "weights"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        ],
        [floats("x", ["batch", features])],
        [
            floats("probabilities", ["batch", classes]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        weights={"weights": weights},
        external=external,
    )


def lookup(path: Path) -> Path:
    """`row` INT64 [-1] -> `value` FP32 [-1, 2] from a table of four; any other row number raises."""
    return save(
        path,
        [helper.make_node("Gather", ["table", "row"], ["value"])],
        [helper.make_tensor_value_info("row", TensorProto.INT64, ["batch"])],
        [floats("value", ["batch", 2])],
        weights={"table": np.arange(8, dtype=np.float32).reshape(4, 2)},
    )


def echo(path: Path) -> Path:
    """`text` BYTES [-1] -> `echo` BYTES [-1], the same."""
    return save(
        path,
        [helper.make_node("Identity", ["text"], ["echo"])],
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])],
        [helper.make_tensor_value_info("echo", TensorProto.STRING, ["batch"])],
    )


def copying(path: Path, inputs: Any, outputs: Any) -> Path:
    """A copy of one tensor, with whatever is said about its type and shape."""
    return save(path, [helper.make_node("Identity", [inputs.name], [outputs.name])], [inputs], [outputs])


def with_zipmap(path: Path) -> Path:
    """A classifier as scikit-learn's converter exports it by default: a sequence of maps comes out."""
    node = helper.make_node("ZipMap", ["x"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    return save(path, [node], [floats("x", ["batch", 2])], [helper.make_value_info("scores", maps)])


DOUBLING = """
from inferbus.models import Model


class Doubling(Model):
    def load(self):
        self.factor = 2

    def predict(self, inputs):
        if (inputs["x"] == 666).any():
            raise ValueError("a poison row")
        return {"y": inputs["x"] * self.factor}
"""

DOUBLING_YAML = """
inputs: [{name: x, datatype: FP32, shape: [-1, 3]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 3]}]
"""


def python_model(folder: Path, source: str = DOUBLING, yaml: str = DOUBLING_YAML) -> Path:
    """A `model.py` and its `model.yaml`. The default: `x` FP32 [-1, 3] -> `y` = 2x; a 666 in a row raises."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml)
    path = folder / "model.py"
    path.write_text(source)
    return path
