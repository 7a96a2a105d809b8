"""A user's own `model.py`."""

import sys
from pathlib import Path

import numpy as np
import pytest

from inferbus.models.base import Executor, InvalidModel, Signature, Tensors, TensorSpec, WrongAnswer
from inferbus.models.codecs import check_outputs
from inferbus.models.python import PythonExecutor
from tests import tiny_models
from tests.executor_contract import ExecutorContract

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1, 3)),))
ONES = {"x": np.ones((2, 3), np.float32)}


def made(folder: Path, source: str = tiny_models.DOUBLING) -> PythonExecutor:
    return PythonExecutor(tiny_models.python_model(folder, source), "tiny", "1", signature=SIGNATURE)


def refused(folder: Path, source: str) -> str:
    """One line of why the model cannot be served; nothing of it is left behind."""
    before = set(sys.modules)
    executor = made(folder, source)
    with pytest.raises(InvalidModel) as caught:
        executor.load()
    assert not [name for name in set(sys.modules) - before if name.startswith("_inferbus")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDoubling(ExecutorContract):
    def make(self, folder: Path) -> Executor:
        return made(folder)

    def inputs(self, rows: int) -> Tensors:
        return {"x": np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)}

    def bad(self, rows: int) -> Tensors:
        inputs = self.inputs(rows)
        inputs["x"][-1] = 666
        return inputs


def test_two_executors_of_one_file_share_nothing(tmp_path: Path) -> None:
    source = "CALLS = []\n" + tiny_models.DOUBLING.replace(
        'return {"y": inputs["x"]', 'CALLS.append(1)\n        return {"y": len(CALLS) + 0 * inputs["x"]'
    )
    first, second = made(tmp_path, source), made(tmp_path, source)
    for executor in (first, second):
        executor.load()
    first.predict(ONES)
    assert second.predict(ONES)["y"][0, 0] == 1


def test_the_files_folder_is_on_no_path_and_no_cache_is_written(tmp_path: Path) -> None:
    path = list(sys.path)
    executor = made(tmp_path)
    executor.load()
    assert sys.path == path
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.py", "model.yaml"]


def test_a_changed_file_is_read_anew_within_the_same_second(tmp_path: Path) -> None:
    executor = made(tmp_path)
    executor.load()
    executor.close()
    tiny_models.python_model(tmp_path, tiny_models.DOUBLING.replace("factor = 2", "factor = 3"))
    executor.load()
    assert executor.predict(ONES)["y"][0, 0] == 3


def test_the_module_knows_its_own_file_and_classes_find_their_module(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "@dataclass\nclass Weights:\n    factor: int\n"
        + tiny_models.DOUBLING.replace(
            "self.factor = 2",
            "self.factor = Weights(int((Path(__file__).parent / 'factor').read_text())).factor",
        )
    )
    (tmp_path / "factor").write_text("5")
    executor = made(tmp_path, source)
    executor.load()
    assert executor.predict(ONES)["y"][0, 0] == 5


def test_load_is_optional(tmp_path: Path) -> None:
    source = tiny_models.DOUBLING.replace("    def load(self):\n        self.factor = 2\n", "    factor = 2\n")
    executor = made(tmp_path, source)
    executor.load()
    assert executor.predict(ONES)["y"].tolist() == [[2, 2, 2], [2, 2, 2]]


def test_a_syntax_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    line = refused(tmp_path, "x = 1\n\ndef broken(:\n")
    assert line == "model tiny@1: model.py line 3: SyntaxError: invalid syntax"


def test_an_error_while_the_file_runs_names_the_line(tmp_path: Path) -> None:
    line = refused(tmp_path, "x = 1\ny = x / 0\n")
    assert line == "model tiny@1: model.py line 2: ZeroDivisionError: division by zero"


def test_an_error_in_load_names_the_line_in_the_users_file(tmp_path: Path) -> None:
    line = refused(tmp_path, tiny_models.DOUBLING.replace("self.factor = 2", "open('/no/such/file')"))
    assert line.startswith("model tiny@1: model.py line 7: FileNotFoundError:")


def test_a_file_that_exits_is_refused(tmp_path: Path) -> None:
    assert "model.py line 2: SystemExit: 3" in refused(tmp_path, "import sys\nsys.exit(3)\n")


def test_a_missing_module_says_that_siblings_are_not_importable(tmp_path: Path) -> None:
    (tmp_path / "features.py").write_text("")
    line = refused(tmp_path, "import features\n")
    assert "model.py line 1: ModuleNotFoundError: No module named 'features'" in line
    assert "files beside model.py cannot be imported" in line


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from inferbus.models import Model\n", "none"),
        ("class Doubling:\n    pass\n", "none"),
        (tiny_models.DOUBLING + "\n\nclass Second(Doubling):\n    pass\n", "Doubling, Second"),
    ],
)
def test_none_or_two_models_are_refused_with_their_names(tmp_path: Path, source: str, found: str) -> None:
    assert refused(tmp_path, source).endswith(
        f"model.py: ValueError: expected exactly one subclass of inferbus.models.Model, found {found}"
    )


def test_a_model_without_predict_is_refused(tmp_path: Path) -> None:
    source = "from inferbus.models import Model\nclass Empty(Model):\n    pass\n"
    assert "Empty has no predict(self, inputs)" in refused(tmp_path, source)


def test_a_model_without_a_signature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"give its inputs and outputs in model\.yaml beside model\.py"):
        PythonExecutor(tmp_path / "model.py", "tiny", "1", signature=Signature((), ()))


def test_a_model_that_works_in_place_leaves_the_batch_as_it_was_even_when_it_fails(tmp_path: Path) -> None:
    source = (
        "from inferbus.models import Model\n\n\nclass InPlace(Model):\n    def predict(self, inputs):\n"
        "        inputs['x'] *= 2\n        assert inputs['x'].max() < 9\n        return {'y': inputs['x']}\n"
    )
    executor = made(tmp_path, source)
    executor.load()
    view = np.frombuffer(np.ones(6, np.float32).tobytes(), np.float32).reshape(2, 3)  # as of a raw tensor: read-only
    assert executor.predict({"x": view})["y"].tolist() == [[2.0] * 3] * 2
    poison = {"x": np.array([[1, 1, 1], [5, 5, 5]], np.float32)}
    with pytest.raises(AssertionError):
        executor.predict(poison)
    assert poison["x"].tolist() == [[1, 1, 1], [5, 5, 5]]
    executor.close()


def test_a_model_that_fills_one_array_again_and_again_changes_no_answer_given_before(tmp_path: Path) -> None:
    source = (
        "import numpy as np\nfrom inferbus.models import Model\n\n\nclass Buffered(Model):\n"
        "    def load(self):\n        self.out = np.empty((8, 3), np.float32)\n\n"
        "    def predict(self, inputs):\n        out = self.out[:len(inputs['x'])]\n"
        "        np.multiply(inputs['x'], 2, out=out)\n        return {'y': out}\n"
    )
    executor = made(tmp_path, source)
    executor.load()
    first = executor.predict(ONES)
    executor.predict({"x": ONES["x"] * 5})
    assert first["y"].tolist() == [[2.0] * 3] * 2
    executor.close()


@pytest.mark.parametrize("answer", ["None", "[1]", "{'y': [1]}"])
def test_what_is_no_dict_of_arrays_is_left_to_the_check_of_outputs(tmp_path: Path, answer: str) -> None:
    source = "from inferbus.models import Model\nclass Odd(Model):\n    def predict(self, inputs):\n        return "
    executor = made(tmp_path, source + answer)
    executor.load()
    with pytest.raises(WrongAnswer):
        check_outputs(executor.predict(ONES), 2, SIGNATURE)


def test_an_error_of_predict_has_a_note_of_the_line_in_the_users_file(tmp_path: Path) -> None:
    executor = made(tmp_path)
    executor.load()
    with pytest.raises(ValueError, match="a poison row") as caught:
        executor.predict({"x": np.full((1, 3), 666, np.float32)})
    assert caught.value.__notes__ == ["model.py line 11"]
    executor.close()
