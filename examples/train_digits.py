"""Trains the demo's model and writes it with its images: `python examples/train_digits.py [--out FOLDER]`.

The images are scikit-learn's digits: the test set of "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, CC BY 4.0; 1,797 images of 8x8 pixels from 0 to 16. Half of them train a small network,
the other half is held out. Both halves hold images by the same 13 people, so the accuracy is one for known
hands.

Written:
- `digits.onnx`: `image` FP32 [-1, 64] -> `label` INT64 [-1], `probabilities` FP32 [-1, 10].
- `digits.jsonl.gz`: an image a line, `{"pixels": [64 integers], "label": n, "held_out": true or false}`.
- `LICENSE.txt`: where the images come from and on what terms.

Needs scikit-learn and onnx: `pip install 'inferbus[dev]'`.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

SEED = 0

LICENSE = """\
digits.jsonl.gz holds the test set of

    Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits [Dataset].
    UCI Machine Learning Repository. https://doi.org/10.24432/C50P49

which is licensed under a Creative Commons Attribution 4.0 International licence (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/. It was taken from the copy that scikit-learn carries
(sklearn.datasets.load_digits). Changed: the format, JSON lines compressed with gzip; added to each image:
whether it was held out from training.

digits.onnx is a model trained on half of these images by examples/train_digits.py of this project.
"""


def trained(pixels: Any, labels: Any, held_out: Any) -> MLPClassifier:
    """A network of 32 hidden units; held-out images are not looked at."""
    network = MLPClassifier((32,), max_iter=1000, random_state=SEED)
    return network.fit(pixels[~held_out] / 16, labels[~held_out])


def exported(network: MLPClassifier) -> onnx.ModelProto:
    """The network as a graph that takes pixels as they are: two layers, then softmax and argmax."""
    (w1, w2), (b1, b2) = network.coefs_, network.intercepts_
    weights = {"w1": w1 / 16, "b1": b1, "w2": w2, "b2": b2}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["image", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
        ],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    # Old enough for every onnxruntime since 1.20.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def main(arguments: list[str] | None = None) -> float:
    """Train, write, print; returns the accuracy on the held-out images."""
    parser = argparse.ArgumentParser(description="Train the digits model and write it with its images.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "worker" / "digits")
    folder: Path = parser.parse_args(arguments).out

    pixels, labels = load_digits(return_X_y=True)
    held_out = np.ones(len(labels), bool)
    held_out[np.random.default_rng(SEED).permutation(len(labels))[: len(labels) // 2]] = False
    network = trained(pixels, labels, held_out)
    accuracy = float(network.score(pixels[held_out] / 16, labels[held_out]))

    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(exported(network), folder / "digits.onnx")
    lines = (
        json.dumps({"pixels": row.astype(int).tolist(), "label": int(label), "held_out": bool(held)}) + "\n"
        for row, label, held in zip(pixels, labels, held_out, strict=True)
    )
    # No time stamp: the same images give the same file.
    (folder / "digits.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    (folder / "LICENSE.txt").write_text(LICENSE)
    print(f"{held_out.sum()} held-out images: {accuracy:.1%} right; written to {folder}")
    return accuracy


if __name__ == "__main__":
    main()
