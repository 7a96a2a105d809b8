"""Plain JSON requests: one object, a key for every input of the model, one row.

For `requests: {format: json}`. Values come without the batch axis, nested as the row is; where a row has shape [] or [1]
a scalar will do. Where the signature leaves a dimension free the lists tell it. Of a key that comes twice the last one
counts. Answers look alike: `{"id": …, "model": "name@version", "outputs": {name: value}}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from inferbus.models.base import Array, InvalidRequest, ModelInfo, Signature, Tensors, TensorSpec
from inferbus.models.columns import (
    JSON_ANSWER,
    ChunkDecoder,
    Headers,
    Packers,
    Part,
    Share,
    check_shape,
    dims_text,
    index_text,
    json_texts,
    kind,
    parse_object,
    quote,
    refuse,
    row_texts,
    unnest,
)


class JsonCodec(ChunkDecoder):
    """`requests: {format: json}`: see the module."""
