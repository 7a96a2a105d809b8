"""The codec for a format of requests, and the checks of what a model answered.

The checks stand between predicting and encoding: an answer that passed them can be cut into rows and written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inferbus.models.base import (
    Array,
    Codec,
    Decoded,
    InvalidModel,
    ModelInfo,
    Signature,
    Tensors,
    TensorSpec,
    WrongAnswer,
)
from inferbus.models.codec_json import JsonCodec
from inferbus.models.codec_raw import RawCodec
from inferbus.models.codec_text import TextCodec
from inferbus.models.codec_v2 import V2Answers, V2Codec
from inferbus.models.columns import Headers

_CODECS: dict[str, Callable[[Signature, ModelInfo, int], Codec]] = {
    "v2": V2Codec,
    "json": JsonCodec,
    "raw": RawCodec,
    "text": TextCodec,
}


class _TableRows(NamedTuple):
    """Rows of tables come as plain JSON, and are answered in V2 like everything that is not."""

    requests: JsonCodec
    answers: V2Answers

    def decode(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Decoded:
        return self.requests.decode(bodies, headers)

    def encode(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], ids: Sequence[str]
    ) -> tuple[list[bytes], list[Headers]]:
        return self.answers.encode(outputs, rows, asks, ids)


def codec(
    format: str,  # noqa: A002 - as the setting is called
    signature: Signature,
    info: ModelInfo,
    *,
    max_message_bytes: int = 16 << 20,
    of_tables: bool = False,
) -> Codec:
    """The codec for `requests.format`.

    Args:
        format: v2, json, raw or text.
        signature: Of the model.
        info: How answers name the model.
        max_message_bytes: Of one request. In every format an element takes a byte at least, so no tensor may claim
            more elements than this; shapes that are large on paper only are refused before anything is allocated.
        of_tables: Requests are rows of tables, and come as `json` does; the format is that of the answers.

    Raises:
        InvalidModel: There is no such format, or the model's inputs cannot come in it.
    """
    if format not in _CODECS:
        raise InvalidModel(f"requests.format is {format!r}, expected one of {', '.join(_CODECS)}")
    if of_tables and format != "json":
        return _TableRows(JsonCodec(signature, info, max_message_bytes), V2Answers(signature, info))
    return _CODECS[format](signature, info, max_message_bytes)


def check_outputs(outputs: object, rows: int, signature: Signature) -> Tensors:
    """Hold what a model answered against its signature.

    Args:
        outputs: Whatever `predict` returned.
        rows: Rows of the batch it was given.
        signature: Of the model.

    Returns:
        The outputs in the signature's order, C-contiguous, little endian; BYTES as arrays of str or bytes objects.

    Raises:
        WrongAnswer: A name, row count, dimension or datatype is not the signature's. Nothing is cast: a model that
            answers float64 where it declares FP32 is wrong about itself.
    """
    if not isinstance(outputs, dict):
        raise WrongAnswer(f"the model answered {type(outputs).__name__}, expected a dict of arrays")
    names = {spec.name for spec in signature.outputs}
    if outputs.keys() != names:
        raise WrongAnswer(f"the model answered {sorted(map(str, outputs))}, expected {sorted(names)}")
    return {spec.name: _check_output(spec, outputs[spec.name], rows) for spec in signature.outputs}


def _check_output(spec: TensorSpec, output: object, rows: int) -> Array:
    if not isinstance(output, np.ndarray):
        raise WrongAnswer(f"output {spec.name!r} is {type(output).__name__}, expected a numpy array")
    want = (rows, *spec.row_shape)
    if output.ndim != len(want) or any(w not in (-1, d) for d, w in zip(output.shape, want, strict=True)):
        raise WrongAnswer(f"output {spec.name!r} has shape {list(output.shape)}, expected {list(want)}")
    if spec.datatype == "BYTES":
        return _check_strings(spec, output)
    if output.dtype.newbyteorder("<") != spec.dtype:
        raise WrongAnswer(f"output {spec.name!r} is {output.dtype}, expected {spec.dtype} ({spec.datatype})")
    return np.ascontiguousarray(output, spec.dtype)


def _check_strings(spec: TensorSpec, output: Array) -> Array:
    # Python models answer numpy's own strings as often as objects.
    objects: Array = np.ascontiguousarray(output, object)
    if output.dtype.kind not in "OUS" or any(
        not issubclass(stranger, (str, bytes)) for stranger in set(map(type, objects.flat))
    ):
        raise WrongAnswer(f"output {spec.name!r} holds other things than strings, expected str or bytes (BYTES)")
    return objects


def finite_rows(outputs: Tensors) -> npt.NDArray[np.bool_] | None:
    """Which rows hold finite numbers only, as a mask; None where all do."""
    masks = [
        np.isfinite(output).reshape(len(output), -1).all(axis=1)
        for output in outputs.values()
        if output.dtype.kind == "f" and not np.isfinite(output).all()
    ]
    return np.logical_and.reduce(masks) if masks else None
