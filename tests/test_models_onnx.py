"""ONNX models on onnxruntime."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from inferbus.models.base import Executor, InvalidModel, InvalidRequest, Signature, Tensors, TensorSpec
from inferbus.models.cpus import available_cpus
from inferbus.models.onnx import OnnxExecutor
from inferbus.models.warmup import warm_up_input
from tests import tiny_models
from tests.executor_contract import ExecutorContract, equal

CUDA = "CUDAExecutionProvider"
HAS_CUDA = CUDA in onnxruntime.get_available_providers()


def opened(path: Path, **settings: Any) -> OnnxExecutor:
    executor = OnnxExecutor(path, "tiny", "1", **settings)
    executor.load()
    return executor


def refused(path: Path, **settings: Any) -> str:
    """One line of why the model cannot be served."""
    with pytest.raises(InvalidModel) as caught:
        opened(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLinear(ExecutorContract):
    device = "cpu"

    def make(self, folder: Path) -> Executor:
        return OnnxExecutor(tiny_models.linear(folder / "m.onnx"), "tiny", "1", device=self.device)

    def inputs(self, rows: int) -> Tensors:
        return {"x": np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)}

    def bad(self, rows: int) -> Tensors:
        return {"x": np.zeros((rows, 63), np.float32)}


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason=f"onnxruntime has no {CUDA} here")
class TestLinearOnCuda(TestLinear):
    device = "cuda:0"


class TestLookup(ExecutorContract):
    """Errors from inside a graph, not from its front door."""

    def make(self, folder: Path) -> Executor:
        return OnnxExecutor(tiny_models.lookup(folder / "m.onnx"), "tiny", "1")

    def inputs(self, rows: int) -> Tensors:
        return {"row": np.arange(rows, dtype=np.int64) % 4}

    def bad(self, rows: int) -> Tensors:
        return {"row": np.full(rows, 9, np.int64)}


class TestEcho(ExecutorContract):
    def make(self, folder: Path) -> Executor:
        return OnnxExecutor(tiny_models.echo(folder / "m.onnx"), "tiny", "1")

    def inputs(self, rows: int) -> Tensors:
        return {"text": np.array([f"row {row}" for row in range(rows)], object)}

    def bad(self, rows: int) -> Tensors:
        return {"text": np.array([b"\xff"] * rows, object)}


def test_the_signature_is_the_files(tmp_path: Path) -> None:
    executor = opened(tiny_models.linear(tmp_path / "m.onnx", features=3, classes=2))
    assert executor.signature == Signature(
        (TensorSpec("x", "FP32", (-1, 3)),),
        (TensorSpec("probabilities", "FP32", (-1, 2)), TensorSpec("label", "INT64", (-1,))),
    )
    assert (executor.info.name, executor.info.version) == ("tiny", "1")
    assert (executor.info.executor, executor.info.device) == ("onnxruntime", "cpu")


def test_free_sizes_are_minus_one_whether_named_or_not(tmp_path: Path) -> None:
    shape = ["batch", "length", None, 4]
    path = tiny_models.copying(tmp_path / "m.onnx", tiny_models.floats("x", shape), tiny_models.floats("y", shape))
    assert opened(path).signature.inputs[0].shape == (-1, -1, -1, 4)


@pytest.mark.parametrize(
    ("element", "datatype"),
    [("BOOL", "BOOL"), ("UINT8", "UINT8"), ("INT32", "INT32"), ("FLOAT16", "FP16"), ("DOUBLE", "FP64")],
)
def test_element_types_are_those_of_the_protocol(tmp_path: Path, element: str, datatype: str) -> None:
    kind = getattr(TensorProto, element)
    tensors = [helper.make_tensor_value_info(name, kind, ["batch", 2]) for name in ("x", "y")]
    executor = opened(tiny_models.copying(tmp_path / "m.onnx", *tensors))
    spec = executor.signature.inputs[0]
    assert spec.datatype == datatype
    ones = np.ones((3, 2), spec.dtype)
    assert equal(executor.predict({"x": ones}), {"y": ones})


def test_text_goes_in_as_str_or_utf_8_bytes_and_comes_out_as_str(tmp_path: Path) -> None:
    executor = opened(tiny_models.echo(tmp_path / "m.onnx"))
    rows = np.array(["ä", "ä".encode(), "", "a\0b\0", b"\0"], object)
    assert executor.predict({"text": rows})["echo"].tolist() == ["ä", "ä", "", "a\0b\0", "\0"]


def test_bytes_that_are_no_text_are_an_invalid_request_that_names_the_input(tmp_path: Path) -> None:
    executor = opened(tiny_models.echo(tmp_path / "m.onnx"))
    with pytest.raises(InvalidRequest, match="input 'text': expected UTF-8 text"):
        executor.predict({"text": np.array(["fine", b"\xff"], object)})


def test_a_fixed_batch_axis_is_refused_with_the_cure(tmp_path: Path) -> None:
    tensors = [tiny_models.floats(name, [1, 4]) for name in ("x", "y")]
    line = refused(tiny_models.copying(tmp_path / "m.onnx", *tensors))
    assert "model tiny@1: input 'x' has a fixed batch axis of 1" in line
    assert "dynamic_axes={'x': {0: 'batch'}}" in line


def test_a_sequence_of_maps_is_refused_with_the_cure(tmp_path: Path) -> None:
    line = refused(tiny_models.with_zipmap(tmp_path / "m.onnx"))
    assert "output 'scores'" in line
    assert "export with zipmap off" in line


def test_a_type_no_message_can_carry_is_refused(tmp_path: Path) -> None:
    tensors = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, ["batch", 2]) for n in ("x", "y")]
    assert "tensor(bfloat16), which a message cannot carry" in refused(
        tiny_models.copying(tmp_path / "m.onnx", *tensors)
    )


def squeezing(path: Path) -> Path:
    """`x` FP32 [-1, 3] -> `y`, of which the file cannot say the shape."""
    return tiny_models.save(
        path,
        [helper.make_node("Squeeze", ["x"], ["y"])],
        [tiny_models.floats("x", ["batch", 3])],
        [tiny_models.floats("y", None)],
    )


X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "FP32", (-1, 3))


def test_a_shape_the_file_leaves_open_must_be_declared(tmp_path: Path) -> None:
    path = squeezing(tmp_path / "m.onnx")
    assert "output 'y' has no shape in the file: give it in model.yaml" in refused(path)
    assert opened(path, declared=Signature((), (Y,))).signature == Signature((X,), (Y,))


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (Signature((TensorSpec("x", "FP64", (-1, 3)),), ()), "input 'x' is FP32 in the file and FP64 in"),
        (
            Signature((TensorSpec("x", "FP32", (-1, 4)),), ()),
            "input 'x' has shape [-1, 3] in the file and [-1, 4]",
        ),
        (
            Signature((), (Y, TensorSpec("z", "FP32", (-1,)))),
            "outputs of model.yaml must be those of the file: y",
        ),
    ],
)
def test_a_declaration_that_contradicts_the_file_is_refused(tmp_path: Path, declared: Signature, reason: str) -> None:
    assert reason in refused(squeezing(tmp_path / "m.onnx"), declared=declared)


def test_a_declaration_may_narrow_a_free_size(tmp_path: Path) -> None:
    tensors = [tiny_models.floats(name, ["batch", "length"]) for name in ("x", "y")]
    path = tiny_models.copying(tmp_path / "m.onnx", *tensors)
    assert opened(path, declared=Signature((X,), (Y,))).signature == Signature((X,), (Y,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "m.onnx is not an ONNX file"),
        (b"hello", "m.onnx is not an ONNX file"),
        (b"\x3a\xff\xff\xff\xff\x0f", "m.onnx is not an ONNX file"),  # a graph longer than the file
        (bytes(8), "Protobuf parsing failed"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert reason in refused(path)


def test_a_model_onnxruntime_cannot_run_is_refused_in_its_words_without_the_path(tmp_path: Path) -> None:
    tensors = [tiny_models.floats(name, ["batch"]) for name in ("x", "y")]
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    line = refused(tiny_models.save(tmp_path / "m.onnx", [node], tensors[:1], tensors[1:]))
    assert "NoSuchOperator" in line
    assert str(tmp_path) not in line


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "missing.onnx: No such file or directory" in refused(tmp_path / "missing.onnx")
    assert "folder.onnx is not a regular file" in refused(tmp_path / "folder.onnx")
    assert "pipe.onnx is not a regular file" in refused(tmp_path / "pipe.onnx")


class TestExternalFiles:
    """Weights beside the model: its own plain files only."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        return tiny_models.linear(folder / "m.onnx", external="weights.bin")

    @pytest.fixture
    def weights(self, model: Path) -> Path:
        return model.with_name("weights.bin")

    def test_weights_beside_the_model_are_served(self, model: Path, tmp_path: Path) -> None:
        inputs = warm_up_input(opened(model).signature, 3)
        whole = tiny_models.linear(tmp_path / "whole.onnx")
        assert equal(opened(model).predict(inputs), opened(whole).predict(inputs))

    def test_a_link_within_the_folder_is_served(self, model: Path, weights: Path) -> None:
        weights.rename(weights.with_name("v1.bin"))
        weights.symlink_to("v1.bin")
        assert opened(model).signature.inputs[0].name == "x"

    def test_a_hard_link_is_refused(self, model: Path, weights: Path, tmp_path: Path) -> None:
        os.link(weights, tmp_path / "other-name.bin")
        assert "external file 'weights.bin' is a hard link" in refused(model)

    def test_a_link_out_of_the_folder_is_refused(self, model: Path, weights: Path, tmp_path: Path) -> None:
        weights.rename(tmp_path / "out.bin")
        weights.symlink_to(tmp_path / "out.bin")
        assert "external file 'weights.bin' leaves the model's folder" in refused(model)

    def test_a_missing_file_is_refused(self, model: Path, weights: Path) -> None:
        weights.unlink()
        assert "external file 'weights.bin': No such file" in refused(model)

    def test_a_pipe_is_refused(self, model: Path, weights: Path) -> None:
        weights.unlink()
        os.mkfifo(weights)
        assert "external file 'weights.bin' is not a regular file" in refused(model)

    @pytest.mark.parametrize("location", ["../weights.bi", "/etc/hostname", "x/../../etc"])
    def test_a_path_out_of_the_folder_is_refused(self, model: Path, location: str) -> None:
        content = onnx.load(model, load_external_data=False)
        external = content.graph.initializer[0].external_data
        next(entry for entry in external if entry.key == "location").value = location
        onnx.save(content, model)
        assert f"external file {location!r} leaves the model's folder" in refused(model)

    def test_a_tensor_deep_inside_the_graph_is_found(self, tmp_path: Path) -> None:
        tensor = numpy_helper.from_array(np.zeros(1, np.float32), "hidden")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        constant = helper.make_node("Constant", [], ["y"], value=tensor)
        branch = helper.make_graph([constant], "branch", [], [tiny_models.floats("y", [1])])
        choice = helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)
        path = tiny_models.save(
            tmp_path / "m.onnx",
            [choice],
            [helper.make_tensor_value_info("yes", TensorProto.BOOL, [1])],
            [tiny_models.floats("z", [1])],
        )
        assert "external file '../secret' leaves the model's folder" in refused(path)

    def test_nesting_without_end_is_refused_and_not_a_crash(self, tmp_path: Path) -> None:
        graph = helper.make_graph([], "inner", [], [])
        content = onnx.ModelProto(graph=graph, ir_version=9).SerializeToString()
        for _ in range(3000):  # a graph with a node with an attribute with a graph ...
            content = _field(1, _field(5, _field(6, content)))
        (tmp_path / "m.onnx").write_bytes(_field(7, content))
        assert refused(tmp_path / "m.onnx")


def _field(number: int, content: bytes) -> bytes:
    size, varint = len(content), b""
    while size > 127:
        varint += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + content


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str) -> None:
    assert "expected cpu, cuda or cuda:N" in refused(tiny_models.linear(tmp_path / "m.onnx"), device=device)


@pytest.mark.skipif(HAS_CUDA, reason="onnxruntime has CUDA here")
def test_cuda_without_a_build_for_it_is_refused_with_the_cure(tmp_path: Path) -> None:
    line = refused(tiny_models.linear(tmp_path / "m.onnx"), device="cuda:1")
    assert "device cuda:1 needs a build of onnxruntime for NVIDIA GPUs" in line
    assert "pip install onnxruntime-gpu" in line


@pytest.mark.skipif(HAS_CUDA, reason="onnxruntime has CUDA here")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_silent_fallback_to_the_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build that lists CUDA and a machine where it does not start: the session has the CPU alone.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    line = refused(tiny_models.linear(tmp_path / "m.onnx"), device="cuda")
    assert "device cuda:0 did not start, only the cpu did" in line


def test_bound_arrays_give_the_same_answers_as_a_plain_run(tmp_path: Path) -> None:
    # How a GPU is fed, on the device that is always there.
    executor = opened(tiny_models.linear(tmp_path / "m.onnx"))
    inputs = {"x": np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)}
    plain, bound = executor._run(inputs), executor._run_bound(inputs)
    assert [array.tolist() for array in bound] == [array.tolist() for array in plain]


def session_options(path: Path, options: Mapping[str, object] | None = None, replicas: int = 1) -> Any:
    return opened(path, options=options, replicas=replicas)._session.get_session_options()


def test_threads_are_the_cpus_of_this_process_divided_by_replicas(tmp_path: Path) -> None:
    path = tiny_models.linear(tmp_path / "m.onnx")
    assert session_options(path).intra_op_num_threads == available_cpus()
    assert session_options(path, replicas=1000).intra_op_num_threads == 1
    assert session_options(path, {"intra_op_threads": 3}, replicas=2).intra_op_num_threads == 3
    assert session_options(path).inter_op_num_threads == 1


def test_threads_do_not_spin_unless_asked_to(tmp_path: Path) -> None:
    path, key = tiny_models.linear(tmp_path / "m.onnx"), "session.intra_op.allow_spinning"
    assert session_options(path).get_session_config_entry(key) == "0"
    assert session_options(path, {"spinning": True}).get_session_config_entry(key) == "1"


def test_session_entries_are_handed_on(tmp_path: Path) -> None:
    path = tiny_models.linear(tmp_path / "m.onnx")
    options = session_options(path, {"session": {"session.set_denormal_as_zero": True}})
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"threads": 2}, "options.threads: unknown; there is intra_op_threads, spinning, session, provider"),
        ({"intra_op_threads": 0}, "options.intra_op_threads: Input should be greater than or equal to 1"),
        ({"spinning": "yes"}, "options.spinning: Input should be a valid boolean"),
        ({"provider": {"gpu_mem_limit": 1}}, "options.provider: the cpu device has no provider options"),
    ],
)
def test_a_wrong_option_is_refused_by_name(tmp_path: Path, options: Mapping[str, object], reason: str) -> None:
    assert reason in refused(tiny_models.linear(tmp_path / "m.onnx"), options=options)


def test_a_missing_onnxruntime_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = refused(tiny_models.linear(tmp_path / "m.onnx"))
    assert line == "ONNX models need onnxruntime: pip install 'inferbus[onnx]'"


def test_importing_the_executor_does_not_load_onnxruntime() -> None:
    code = "import sys, inferbus.models.repository; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_a_failing_batch_writes_nothing_to_stdout_or_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    executor = opened(tiny_models.lookup(tmp_path / "m.onnx"))
    with pytest.raises(Exception, match="out of data bounds"):
        executor.predict({"row": np.array([9])})
    assert capfd.readouterr() == ("", "")


def test_the_warm_up_input_takes_free_sizes_from_the_settings(tmp_path: Path) -> None:
    tensors = [tiny_models.floats(name, ["batch", "length", 2]) for name in ("x", "y")]
    executor = opened(tiny_models.copying(tmp_path / "m.onnx", *tensors))
    shapes = [warm_up_input(executor.signature, 4, given)["x"].shape for given in ({}, {"x": (7, 2)})]
    assert shapes == [(4, 1, 2), (4, 7, 2)]
    with pytest.raises(InvalidModel, match=r"warmup: x: \[7, 3\] does not fit a row of shape \[-1, 2\]"):
        warm_up_input(executor.signature, 4, {"x": (7, 3)})
    with pytest.raises(InvalidModel, match="warmup: z: no such input; the model has x"):
        warm_up_input(executor.signature, 4, {"z": (7, 2)})
