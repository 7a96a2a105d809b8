"""Text requests: the body is one row, a UTF-8 string, for a model with one BYTES input.

For `requests: {format: text}`. The string may be empty. The answers are V2 responses.
"""
# ruff: noqa: ARG002 - this format needs less than the protocol gives

from __future__ import annotations

from collections.abc import Iterable, Sequence

from inferbus.models.base import InvalidModel, ModelInfo, Signature
from inferbus.models.codec_v2 import V2Answers
from inferbus.models.columns import ChunkDecoder, Headers, Share, refuse


class TextCodec(ChunkDecoder, V2Answers):
    """`requests: {format: text}`: see the module."""

    def __init__(self, signature: Signature, info: ModelInfo, max_elements: int) -> None:
        ChunkDecoder.__init__(self, signature.inputs, max_elements)
        V2Answers.__init__(self, signature, info)
        shapes = {(), (1,), (-1,)}
        if len(self.inputs) != 1 or self.inputs[0].datatype != "BYTES" or self.inputs[0].row_shape not in shapes:
            found = ", ".join(f"{spec.name!r} {spec.datatype} {list(spec.shape)}" for spec in self.inputs)
            raise InvalidModel(f"requests.format text needs a model with one BYTES input [-1] or [-1,1], not {found}")
        self._lane = ((1,) * len(self.inputs[0].row_shape),)

    def at_once(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterable[Share]:
        """See `ChunkDecoder.at_once`."""
        return [self._share([body.decode() for body in bodies])]

    def exact(self, body: bytes, headers: Headers) -> Share:
        """See `ChunkDecoder.exact`."""
        try:
            return self._share([body.decode()])
        except UnicodeDecodeError as error:
            raise refuse(f"body is not UTF-8 at byte {error.start}, expected text") from None

    def _share(self, strings: Sequence[str]) -> Share:
        return Share(self._lane, [1] * len(strings), [None] * len(strings), [[tuple(strings)]])
