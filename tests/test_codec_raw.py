"""The raw codec: bytes of one input, whole rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from inferbus.models.base import InvalidModel, Signature, TensorSpec
from inferbus.models.codecs import codec
from inferbus.models.columns import Headers
from tests.codec_contract import INFO, CodecContract, Request, refusal

OUTPUTS = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("label", "BYTES", (-1,)))


class TestFloats(CodecContract):
    format = "raw"
    signature = Signature((TensorSpec("x", "FP32", (-1, 2, 3)),), OUTPUTS)

    def good(self, serial: int) -> Request:
        x = np.random.default_rng(serial).random((1 + serial % 3, 2, 3), np.float32)
        return Request(x.tobytes(), {"x": x}, (("inference-header-content-length", b"not for this format"),))

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        row = self.good(0).body
        bad = {
            "empty": b"",
            "a byte short": row[:-1],
            "a byte long": row + b"\0",
            "half a row more": row + row[:12],
            "NaN": row[:-4] + struct.pack("<f", float("nan")),
            "infinity": struct.pack("<f", float("inf")) + row[4:],
        }
        return [(name, body, ()) for name, body in bad.items()]


class TestBooleans(CodecContract):
    format = "raw"
    signature = Signature((TensorSpec("x", "BOOL", (-1,)),), OUTPUTS)

    def good(self, serial: int) -> Request:
        x = np.random.default_rng(serial).random(1 + serial % 5) < 0.5
        return Request(x.tobytes(), {"x": x})

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        return [("empty", b"", ()), ("two", b"\0\1\2", ()), ("text", b"true", ())]


class TestIntegers(CodecContract):
    format = "raw"
    signature = Signature((TensorSpec("x", "UINT16", (-1, 1)),), OUTPUTS)

    def good(self, serial: int) -> Request:
        x = np.random.default_rng(serial).integers(0, 2**16, (1, 1), np.uint16)
        return Request(x.astype("<u2").tobytes(), {"x": x})

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        return [("empty", b"", ()), ("three bytes", b"abc", ())]

    # Any two bytes are a good request here, so garbage is mostly read: the contract tries both.


def test_an_error_tells_the_size_of_a_row() -> None:
    the = codec("raw", TestFloats.signature, INFO)
    assert refusal(the, b"abc") == "body has 3 bytes, expected one or more times 24: a row is 6 FP32"
    bad = struct.pack("<6f", 0, 0, 0, float("nan"), 0, 0)
    assert refusal(the, bad) == "raw element 3 is not finite, expected a number (FP32)"


def test_one_body_is_looked_at_where_it_lies() -> None:
    body = np.arange(6, dtype=np.float32).tobytes()
    (group,) = codec("raw", TestFloats.signature, INFO).decode([body], [()]).groups
    assert np.shares_memory(group.columns["x"], np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            [TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "FP32", (-1, 2))],
            "a model with one input, this one has 2",
        ),
        ([TensorSpec("a", "BYTES", (-1,))], r"'a' is BYTES \[-1\]"),
        ([TensorSpec("a", "FP32", (-1, -1))], r"'a' is FP32 \[-1, -1\]"),
        ([TensorSpec("a", "FP32", (-1, 0))], r"'a' is FP32 \[-1, 0\]"),
    ],
)
def test_a_model_whose_rows_have_no_size_cannot_be_asked_raw(inputs: list[TensorSpec], text: str) -> None:
    with pytest.raises(InvalidModel, match=text):
        codec("raw", Signature(tuple(inputs), OUTPUTS), INFO)
