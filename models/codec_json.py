"""Plain JSON requests: one object, a key for every input of the model, one row.

For `requests: {format: json}`. Values come without the batch axis, nested as the row is; where a row has shape [] or
[1] a scalar will do. Where the signature leaves a dimension free the lists tell it. Of a key that comes twice the last
one counts. Answers look alike: `{"id": …, "model": "name@version", "outputs": {name: value}}`.
"""
# ruff: noqa: ARG002 - this format needs less than the protocol gives

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
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

    def __init__(self, signature: Signature, info: ModelInfo, max_elements: int) -> None:
        ChunkDecoder.__init__(self, signature.inputs, max_elements)
        self.outputs = {spec.name: spec for spec in signature.outputs}
        self._packers = {spec.name: Packers(spec.datatype) for spec in self.inputs}
        model, *names = json_texts([f"{info.name}@{info.version}", *self.outputs])
        whole = b'{"id":\0,"model":' + model + b',"outputs":{' + b",".join(name + b":\0" for name in names) + b"}}"
        self._template = whole.replace(b"%", b"%%").replace(b"\0", b"%b")  # JSON text never holds a NUL

    def at_once(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterable[Share]:
        """See `ChunkDecoder.at_once`: a run whose values agree in shape."""
        requests = list(map(orjson.loads, bodies))
        if set(map(len, requests)) != {len(self.inputs)}:
            raise LookupError
        lane: list[tuple[int, ...]] = []
        parts: list[Sequence[Part]] = []
        for spec in self.inputs:
            values = [request[spec.name] for request in requests]
            dims = self._dims(spec, values[0])
            if type(values[0]) is list:
                values = unnest(values, (len(values), *dims), "")
            lane.append(dims)
            parts.append([self._packers[spec.name].exactly(values, str)])
        return [Share(tuple(lane), [1] * len(requests), [None] * len(requests), parts)]

    def exact(self, body: bytes, headers: Headers) -> Share:
        """See `ChunkDecoder.exact`."""
        request = parse_object(body)
        if unknown := request.keys() - self._packers.keys():
            raise refuse(f"{quote(min(unknown))} is unknown, expected {_names(self._packers)}")
        if missing := self._packers.keys() - request.keys():
            raise refuse(f"{_names(missing)} missing")
        lane, parts = zip(*(self._read_value(spec, request[spec.name]) for spec in self.inputs), strict=True)
        return Share(lane, [1], [None], [[part] for part in parts])

    def _read_value(self, spec: TensorSpec, value: Any) -> tuple[tuple[int, ...], Part]:
        name, dims = quote(spec.name), self._dims(spec, value)
        indexes = dims if type(value) is list else ()
        values = unnest(value, dims, name) if type(value) is list else [value]
        return dims, self._packers[spec.name].exactly(values, lambda at: name + index_text(at, indexes))

    def _dims(self, spec: TensorSpec, value: Any) -> tuple[int, ...]:
        """Shape of a value's row: the signature's, free dimensions as the first list of each depth has them."""
        if type(value) is not list and spec.row_shape in {(), (1,)}:
            return spec.row_shape
        dims: list[int] = []
        for depth in range(len(spec.row_shape)):
            if type(value) is not list:
                raise refuse(f"{quote(spec.name)}{'[0]' * depth} is {kind(value)}, expected a list")
            dims.append(len(value))
            if not value:  # an empty list tells nothing of what would be in it
                dims += [max(dim, 0) for dim in spec.row_shape[depth + 1 :]]
                break
            value = value[0]
        try:
            check_shape(spec, (1, *dims), self.max_elements)
        except InvalidRequest:
            shapes = f"{dims_text(dims)}, expected {dims_text(spec.row_shape)}"
            raise refuse(f"{quote(spec.name)} has shape {shapes} of at most {self.max_elements} elements") from None
        return tuple(dims)

    def encode(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], ids: Sequence[str]
    ) -> tuple[list[bytes], list[Headers]]:
        """See `Codec.encode`: a request is one row, so there is nothing to ask and nothing to count."""
        values = [_row_values(spec, outputs[name]) for name, spec in self.outputs.items()]
        bodies = [self._template % fields for fields in zip(json_texts(ids), *values, strict=True)]
        return bodies, [JSON_ANSWER] * len(bodies)


def _row_values(spec: TensorSpec, output: Array) -> list[bytes]:
    """Every row of an output as a JSON value, nested as its shape is."""
    if output.ndim == 1:
        return row_texts(spec, output)
    texts = row_texts(spec, output.reshape(prod(output.shape[:-1]), output.shape[-1]))
    for axis in range(output.ndim - 2, 0, -1):
        lists, dim = [b"[%b]" % text for text in texts], output.shape[axis]
        texts = [b",".join(lists[i * dim : (i + 1) * dim]) for i in range(prod(output.shape[:axis]))]
    return [b"[%b]" % text for text in texts]


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(quote, sorted(names)))
