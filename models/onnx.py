"""ONNX models on onnxruntime, on a CPU or an NVIDIA GPU.

Runs in a thread: onnxruntime releases the GIL while it computes. The device asked for is the device that
serves: where onnxruntime would quietly fall back to the CPU, loading fails. The signature is read from the
file.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inferbus.models.base import (
    Array,
    InvalidModel,
    InvalidRequest,
    ModelInfo,
    Signature,
    Tensors,
    TensorSpec,
)
from inferbus.models.cpus import available_cpus
from inferbus.models.onnx_external import check_files

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

Setting = str | int | float | bool


class OnnxOptions(BaseModel):
    """What a user may set under `options` of an ONNX model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    intra_op_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of one replica; default: the CPUs of this process divided by replicas.",
    )
    spinning: bool = Field(
        default=False,  # on burnt 0.7 of a CPU at 20 requests a second; off costs a lone request 0.2 ms
        description="Let waiting threads burn CPU for lower latency, where the CPUs are this worker's alone.",
    )
    session: dict[str, Setting] = Field(default={}, description="onnxruntime session configuration entries, by key.")
    provider: dict[str, Setting] = Field(default={}, description="Options of the CUDA execution provider, by key.")


class OnnxExecutor:
    """One onnxruntime session.

    Attributes:
        signature: The file's own once loaded; before that what model.yaml declares.
        info: Who answers, for outcomes and metrics.
        any_thread: True on the CPU, where a session belongs to no thread.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        version: str,
        *,
        device: str = "cpu",
        replicas: int = 1,
        options: Mapping[str, object] | None = None,
        declared: Signature = Signature((), ()),  # noqa: B008 - frozen
    ) -> None:
        """Settings are checked here, the file in `load`.

        Args:
            path: The model file.
            name: The model's name.
            version: The model's version.
            device: `cpu`, `cuda` or `cuda:N`.
            replicas: How many executors share this process's CPUs.
            options: The fields of `OnnxOptions`.
            declared: What model.yaml says of inputs and outputs; empty where it is silent.

        Raises:
            InvalidModel: onnxruntime is missing, or a setting is wrong.
        """
        self._label = f"model {name}@{version}"
        self._path = path
        self._runtime = _onnxruntime()
        self._device_id = _device_id(device)
        self._options = _parsed(options or {})
        self._threads = self._options.intra_op_threads or max(1, available_cpus() // replicas)
        self._declared = declared
        self._session: Any = None
        self._bound = False
        self._text_inputs: tuple[str, ...] = ()
        self._outputs: list[str] = []
        if self._device_id is None and self._options.provider:
            raise InvalidModel("options.provider: the cpu device has no provider options")
        self.signature = declared
        self.any_thread = self._device_id is None
        self.info = ModelInfo(
            name, version, "onnxruntime", "cpu" if self._device_id is None else f"cuda:{self._device_id}"
        )

    def load(self) -> None:
        """Open the file and the device; what is open already is kept.

        Raises:
            InvalidModel: The file, its signature or the device cannot serve.
        """
        if self._session is not None:
            return
        try:
            check_files(self._path)
            session = self._open()
            signature = _signature(session, self._declared)
        except ValueError as error:
            raise InvalidModel(f"{self._label}: {error}") from None
        self.signature = signature
        self._text_inputs = tuple(spec.name for spec in signature.inputs if spec.datatype == "BYTES")
        self._outputs = [spec.name for spec in signature.outputs]
        text = any(spec.datatype == "BYTES" for spec in (*signature.inputs, *signature.outputs))
        self._bound = self._device_id is not None and not text  # onnxruntime binds no text
        self._session = session

    def predict(self, inputs: Tensors) -> Tensors:
        """Answer a batch; the arrays are fresh.

        Raises:
            InvalidRequest: A BYTES element is not UTF-8 text, and ONNX strings are.
            Exception: Whatever onnxruntime raises for this batch. The session stays usable.
        """
        if self._session is None:
            raise RuntimeError("predict before load")
        if self._text_inputs:
            inputs = {**inputs, **{name: _text(name, inputs[name]) for name in self._text_inputs}}
        run = self._run_bound if self._bound else self._run
        return dict(zip(self._outputs, run(inputs), strict=True))

    def close(self) -> None:
        """Free the device. Idempotent."""
        self._session = None

    def _run(self, inputs: Tensors) -> Sequence[Array]:
        # Binding does not pay on a CPU. A 64x10 linear model, microseconds a batch of 1 / 64 / 256 rows:
        # this 5.8 / 8.0 / 14.4, bound anew 10.4 / 12.5 / 18.9, into arrays kept for it 5.7 / 8.0 / 14.5.
        outputs: Sequence[Array] = self._session.run(self._outputs, inputs)
        return outputs

    def _run_bound(self, inputs: Tensors) -> Sequence[Array]:
        # Inputs go to the device as they are bound; outputs come back once, when the run is over.
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs: Sequence[Array] = binding.copy_outputs_to_cpu()
        return outputs

    def _open(self) -> Any:
        if self._device_id is None:
            wanted, provider = "CPUExecutionProvider", {}
        else:
            wanted = "CUDAExecutionProvider"
            provider = {
                "device_id": str(self._device_id),
                # Growing by powers of two may hold twice what the largest batch needs.
                "arena_extend_strategy": "kSameAsRequested",
                # The default, an exhaustive search, starts again at every new batch size.
                "cudnn_conv_algo_search": "HEURISTIC",
                **{key: _written(value) for key, value in self._options.provider.items()},
            }
            self._find_cuda(wanted)
        try:
            session = self._runtime.InferenceSession(
                str(self._path),
                self._session_options(),
                providers=[(wanted, provider)],
                enable_fallback=0,  # it prints to stdout and serves from the CPU
            )
        except Exception as error:  # onnxruntime's errors share no base class
            raise ValueError(_reason(error)) from error
        session.disable_fallback()
        if wanted not in session.get_providers():
            raise ValueError(
                f"device {self.info.device} did not start, only the cpu did; check the GPU, its driver, CUDA "
                "and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session

    def _session_options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Only fatal messages: at the error level every refused batch would write a line to stderr, with
        # values of it; the same text comes as an exception.
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", _written(self._options.spinning))
        for key, value in self._options.session.items():
            options.add_session_config_entry(key, _written(value))
        return options

    def _find_cuda(self, provider: str) -> None:
        if provider not in self._runtime.get_available_providers():
            raise ValueError(
                f"device {self.info.device} needs a build of onnxruntime for NVIDIA GPUs: "
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )
        if hasattr(self._runtime, "preload_dlls"):  # since 1.21: finds CUDA and cuDNN where pip has put them
            # It prints what it misses; whether the device starts is checked after loading.
            with contextlib.redirect_stdout(io.StringIO()):
                self._runtime.preload_dlls()


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - heavy, and an extra
    except ImportError:
        raise InvalidModel("ONNX models need onnxruntime: pip install 'inferbus[onnx]'") from None
    onnxruntime.set_default_logger_severity(4)  # as for sessions: stderr is for our own events
    return onnxruntime


def _device_id(device: str) -> int | None:
    """None for the CPU, else the GPU's number."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if found is None:
        raise InvalidModel(f"device: {device!r}: expected cpu, cuda or cuda:N")
    return None if device == "cpu" else int(found[1] or 0)


def _parsed(options: Mapping[str, object]) -> OnnxOptions:
    try:
        return OnnxOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("options", *first["loc"])))
        known = ", ".join(OnnxOptions.model_fields)
        what = f"unknown; there is {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidModel(f"{where}: {what}") from None


def _written(value: Setting) -> str:
    """As onnxruntime wants settings: text, with 1 and 0 for booleans."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _signature(session: Any, declared: Signature) -> Signature:
    inputs = _specs("input", session.get_inputs(), declared.inputs)
    return Signature(inputs, _specs("output", session.get_outputs(), declared.outputs))


def _specs(kind: str, tensors: Sequence[Any], declared: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    names = [tensor.name for tensor in tensors]
    if not names:
        raise ValueError(f"has no {kind}s")
    # What model.yaml declares it declares in full, so that a misspelt name cannot pass.
    if declared and sorted(spec.name for spec in declared) != sorted(names):
        raise ValueError(f"{kind}s of model.yaml must be those of the file: {', '.join(names)}")
    return tuple(_spec(tensor, declared, f"{kind} {tensor.name!r}") for tensor in tensors)


def _spec(tensor: Any, declared: Sequence[TensorSpec], where: str) -> TensorSpec:
    """The file's word on one tensor, completed by what model.yaml declares for it."""
    datatype = _DATATYPES.get(tensor.type)
    if datatype is None:
        cure = "cast it in the model" if tensor.type.startswith("tensor") else "export with zipmap off"
        raise ValueError(f"{where} is {tensor.type}, which a message cannot carry: {cure}")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in tensor.shape)
    if shape and shape[0] != -1:
        raise ValueError(
            f"{where} has a fixed batch axis of {shape[0]}: export the model with a dynamic axis 0 "
            f"(torch.onnx.export(..., dynamic_axes={{{tensor.name!r}: {{0: 'batch'}}}}))"
        )
    own = next((spec for spec in declared if spec.name == tensor.name), None)
    if own is None:
        # onnxruntime says [] both for a scalar and for a shape that the file leaves open.
        if not shape:
            raise ValueError(f"{where} has no shape in the file: give it in model.yaml")
        return TensorSpec(tensor.name, datatype, shape)
    if own.datatype != datatype:
        raise ValueError(f"{where} is {datatype} in the file and {own.datatype} in model.yaml")
    if shape and not _fits(own.shape, shape):
        raise ValueError(f"{where} has shape {list(shape)} in the file and {list(own.shape)} in model.yaml")
    return own


def _fits(narrow: Sequence[int], wide: Sequence[int]) -> bool:
    return len(narrow) == len(wide) and all(w in (-1, n) for n, w in zip(narrow, wide, strict=True))


def _text(name: str, array: Array) -> Array:
    """BYTES as onnxruntime wants them: it writes str(element) into the tensor, and str(b"a") is "b'a'"."""
    items = (item.decode() if isinstance(item, bytes) else item for item in array.flat)
    try:
        return np.fromiter(items, object, array.size).reshape(array.shape)
    except UnicodeDecodeError:
        raise InvalidRequest(f"input {name!r}: expected UTF-8 text") from None


def _reason(error: Exception) -> str:
    """One line of what onnxruntime says, without its prefix and the path."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", text)
