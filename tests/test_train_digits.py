"""The shipped digits and the script that made them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.train_digits import main
from inferbus.models.base import Signature, TensorSpec
from inferbus.models.repository import executors, locate

SHIPPED = Path(__file__).parents[1] / "worker" / "digits"


def images(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(folder / "digits.jsonl.gz", "rt", encoding="utf-8")]


def held_out_accuracy(folder: Path) -> float:
    (executor,) = executors(locate(str(folder / "digits.onnx")))
    executor.load()
    held_out = [image for image in images(folder) if image["held_out"]]
    outputs = executor.predict({"image": np.array([image["pixels"] for image in held_out], np.float32)})
    assert np.allclose(outputs["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert (outputs["probabilities"].argmax(axis=1) == outputs["label"]).all()
    return float((outputs["label"] == [image["label"] for image in held_out]).mean())


@pytest.fixture(scope="module")
def trained_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert main(["--out", str(folder)]) >= 0.95
    return folder


def test_the_shipped_images_are_scikit_learns() -> None:
    shipped, (pixels, labels) = images(SHIPPED), load_digits(return_X_y=True)
    assert len(shipped) == 1797
    assert np.array_equal([image["pixels"] for image in shipped], pixels)
    assert np.array_equal([image["label"] for image in shipped], labels)
    assert sum(image["held_out"] for image in shipped) == 899


def test_the_shipped_model_is_right_about_images_it_never_saw() -> None:
    assert held_out_accuracy(SHIPPED) >= 0.95


def test_the_shipped_model_has_the_signature_the_demo_tells_of() -> None:
    (executor,) = executors(locate(str(SHIPPED / "digits.onnx")))
    executor.load()
    assert executor.signature == Signature(
        (TensorSpec("image", "FP32", (-1, 64)),),
        (TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 10))),
    )


def test_training_again_gives_as_good_a_model(trained_again: Path) -> None:
    assert held_out_accuracy(trained_again) >= 0.95


def test_training_again_gives_the_shipped_images_and_licence(trained_again: Path) -> None:
    # The compressed bytes may differ from one zlib to another.
    assert images(trained_again) == images(SHIPPED)
    assert (trained_again / "LICENSE.txt").read_text() == (SHIPPED / "LICENSE.txt").read_text()


def test_what_is_shipped_stays_small_and_says_its_licence() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 200_000
    licence = (SHIPPED / "LICENSE.txt").read_text()
    assert "CC BY 4.0" in licence
    assert "https://doi.org/10.24432/C50P49" in licence
