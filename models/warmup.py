"""Input that fits a signature and means nothing: to warm a model up, or to ask a failing device how it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inferbus.models.base import Array, InvalidModel, Signature, Tensors, TensorSpec


def warm_up_input(signature: Signature, rows: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Tensors:
    """Zeros, or "" for BYTES, of `rows` rows for every input; free sizes are 1 unless `shapes` says more.

    Args:
        signature: The model's, after loading.
        rows: Length of axis 0.
        shapes: Shape of one row by input name, as in `warmup` of model.yaml.

    Raises:
        InvalidModel: `shapes` names no input of the model, or does not fit it.
    """
    asked = dict(shapes or {})
    tensors = {spec.name: _blank(spec, rows, asked.pop(spec.name, None)) for spec in signature.inputs}
    if asked:
        known = ", ".join(tensors)
        raise InvalidModel(f"warmup: {next(iter(asked))}: no such input; the model has {known}")
    return tensors


def _blank(spec: TensorSpec, rows: int, shape: tuple[int, ...] | None) -> Array:
    expected = spec.row_shape
    if shape is None:
        shape = tuple(1 if size == -1 else size for size in expected)
    elif len(shape) != len(expected) or any(e not in (-1, s) for e, s in zip(expected, shape, strict=True)):
        raise InvalidModel(f"warmup: {spec.name}: {list(shape)} does not fit a row of shape {list(expected)}")
    return np.full((rows, *shape), "" if spec.datatype == "BYTES" else 0, spec.dtype)
