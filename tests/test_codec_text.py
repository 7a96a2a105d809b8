"""The text codec: one string, one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferbus.models.base import InvalidModel, Signature, TensorSpec
from inferbus.models.codecs import codec
from inferbus.models.columns import Headers
from tests.codec_contract import INFO, CodecContract, Request, refusal

OUTPUTS = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("label", "BYTES", (-1,)))


class TestText(CodecContract):
    format = "text"
    signature = Signature((TensorSpec("text", "BYTES", (-1,)),), OUTPUTS)

    def good(self, serial: int) -> Request:
        text = '"Größe"\n\0' * serial
        strings = np.empty((1, *(1 for _ in self.signature.inputs[0].row_shape)), object)
        strings[:] = text
        return Request(text.encode(), {"text": strings})

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        return [
            ("Latin-1", "Größe".encode("latin-1"), ()),
            ("half a character", "ü".encode()[:1], ()),
            ("a surrogate", b"\xed\xa0\x80", ()),
            ("too long a form", b"\xc0\x80", ()),
        ]


class TestTextInAListOfOne(TestText):
    signature = Signature((TensorSpec("text", "BYTES", (-1, 1)),), OUTPUTS)


def test_an_error_tells_the_byte() -> None:
    the = codec("text", TestText.signature, INFO)
    assert refusal(the, "Größe".encode("latin-1")) == "body is not UTF-8 at byte 2, expected text"


@pytest.mark.parametrize(
    "inputs",
    [
        [TensorSpec("a", "FP32", (-1, 1))],
        [TensorSpec("a", "BYTES", (-1, 2))],
        [TensorSpec("a", "BYTES", (-1,)), TensorSpec("b", "BYTES", (-1,))],
    ],
)
def test_only_a_model_with_one_string_can_be_asked_in_text(inputs: list[TensorSpec]) -> None:
    with pytest.raises(InvalidModel, match="a model with one BYTES input"):
        codec("text", Signature(tuple(inputs), OUTPUTS), INFO)
