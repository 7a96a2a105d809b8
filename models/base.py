"""What every model, executor and codec promises the pipeline.

A codec turns bytes into columns and back, a chunk of messages at a time, against a model's signature. An executor turns
columns into columns, blocking, on a thread of its own. Axis 0 of every array is the row; rows never mix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
"""A whole batch by tensor name; axis 0 is the row."""

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""Open Inference Protocol datatypes; BYTES elements are `str` or `bytes` objects."""


class ModelError(Exception):
    """Root of what models raise. The text is for the person who owns the pipeline, never for an error record."""


class InvalidModel(ModelError):
    """The model cannot be served as it stands (file, signature, provider): say so and exit 1."""


class InvalidRequest(ModelError):
    """This message alone is wrong. The text names the field and what was expected, and is sent to the requester."""


class WrongAnswer(ModelError):
    """The model answered something its signature does not allow (rows, names, shape)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: V2 datatype and shape, where shape[0] is the row axis (-1) and -1 elsewhere is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the V2 datatype, little endian."""
        return DATATYPES[self.datatype]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, without the batch axis."""
        return self.shape[1:]


@dataclass(frozen=True, slots=True)
class Signature:
    """What goes into a model and what comes out, in the model's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What outcomes and metrics say of the model that made them."""

    name: str
    version: str
    executor: str
    device: str


class Model:
    """Base of a user's own model: subclass it in `model.py`, give its signature in `model.yaml`.

    One instance is used by one thread at a time.
    """

    def load(self) -> None:
        """Called once, on the thread that will predict, before the first batch."""

    def predict(self, inputs: Tensors) -> Tensors:
        """Whole batch in, whole batch out: every output has as many rows, in the same order, as the inputs.

        The inputs are the model's to change, and it may fill the arrays it answers anew the next time: both are copied.
        """
        raise NotImplementedError


class Executor(Protocol):
    """Runs batches on one device. Blocking; one thread calls it, and `load`, `predict`, `close` share that thread.

    Attributes:
        signature: What goes in and what comes out; known once loaded.
        info: What outcomes say of it.
        any_thread: Whether `predict` may also be called on another thread, at times when the first makes no call.
    """

    signature: Signature
    info: ModelInfo
    any_thread: bool

    def load(self) -> None:
        """Make ready to predict. May be called again after `close`.

        Raises:
            InvalidModel: The artefact cannot be served as asked.
        """

    def predict(self, inputs: Tensors) -> Tensors:
        """Answer a batch: same rows, same order. May raise anything the model does.

        The arrays answered are the caller's to keep. The inputs stay as they were, whatever happens: a batch that fails
        is predicted again in halves.
        """

    def close(self) -> None:
        """Free the device. Idempotent."""


@dataclass(slots=True)
class Group:
    """Requests of one chunk that may share a batch, decoded and stacked.

    Attributes:
        positions: Their places in the chunk, ascending.
        rows: Rows of each request, at least 1.
        columns: One array per model input, axis 0 of length sum(rows), C order, the signature's dtype. A raw tensor
            that makes up a group alone may be a read-only view of its message, and then lies wherever it lies there.
        asks: What `encode` needs to know of each request, or None where nothing special was asked. Opaque to others.
        lane: Equal for groups that may share a batch: the trailing shapes of the inputs.
    """

    positions: Sequence[int]
    rows: Sequence[int]
    columns: Tensors
    asks: Sequence[object]
    lane: Hashable


@dataclass(slots=True)
class Decoded:
    """A chunk after decoding: good ones in groups, bad ones with their reason, every position in exactly one."""

    groups: list[Group]
    rejects: list[tuple[int, InvalidRequest]]


class Codec(Protocol):
    """Bytes to columns and back for one model, a chunk at a time. Stateless between calls."""

    def decode(self, bodies: Sequence[bytes], headers: Sequence[Sequence[tuple[str, bytes]]]) -> Decoded:
        """Check, convert and stack. Never raises for what a message holds: that is a reject."""

    def encode(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], ids: Sequence[str]
    ) -> tuple[list[bytes], list[Sequence[tuple[str, bytes]]]]:
        """Bodies of the answers, and per answer the headers its format needs (`content-type` first).

        Args:
            outputs: Checked against the signature; axis 0 has sum(rows) rows.
            rows: Rows of each request, in order.
            asks: From decoding, one per request.
            ids: The requests' ids, one per request.

        Raises:
            WrongAnswer: An output cannot be written in this format.
        """
