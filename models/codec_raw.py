"""Raw requests: the bytes of the model's single input, C order, little endian, one or more whole rows.

For `requests: {format: raw}`. No header, no copy: a chunk of bodies is laid end to end, one body is looked at where it
lies. The answers are V2 responses.
"""
# ruff: noqa: ARG002 - this format needs less than the protocol gives

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from inferbus.models.base import InvalidModel, ModelInfo, Signature
from inferbus.models.codec_v2 import V2Answers
from inferbus.models.columns import ChunkDecoder, Headers, Share, raw_elements, refuse


class RawCodec(ChunkDecoder, V2Answers):
    """`requests: {format: raw}`: see the module."""

    def __init__(self, signature: Signature, info: ModelInfo, max_elements: int) -> None:
        ChunkDecoder.__init__(self, signature.inputs, max_elements)
        V2Answers.__init__(self, signature, info)
        if len(self.inputs) != 1:
            raise InvalidModel(f"requests.format raw needs a model with one input, this one has {len(self.inputs)}")
        (self._spec,) = self.inputs
        if self._spec.datatype == "BYTES" or any(dim < 1 for dim in self._spec.row_shape):
            raise InvalidModel(
                "requests.format raw needs an input of numbers or booleans whose rows have one size: "
                f"{self._spec.name!r} is {self._spec.datatype} {list(self._spec.shape)}"
            )
        self._row_elements = prod(self._spec.row_shape)
        self._row_bytes = self._row_elements * self._spec.dtype.itemsize

    def at_once(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterable[Share]:
        """See `ChunkDecoder.at_once`: no body has half a row."""
        if not all(bodies) or any(len(body) % self._row_bytes for body in bodies):
            raise ValueError
        whole = memoryview(bytearray().join(bodies) if len(bodies) > 1 else bodies[0])
        return [self._share(whole, [len(body) // self._row_bytes for body in bodies])]

    def exact(self, body: bytes, headers: Headers) -> Share:
        """See `ChunkDecoder.exact`."""
        if not body or len(body) % self._row_bytes:
            row = f"a row is {self._row_elements} {self._spec.datatype}"
            raise refuse(f"body has {len(body)} bytes, expected one or more times {self._row_bytes}: {row}")
        return self._share(memoryview(body), [len(body) // self._row_bytes])

    def _share(self, raw: memoryview, rows: Sequence[int]) -> Share:
        part = raw_elements(self._spec, raw, sum(rows) * self._row_elements)
        return Share((self._spec.row_shape,), rows, [None] * len(rows), [[part]])
