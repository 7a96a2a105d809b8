"""The plain JSON codec: one object, one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferbus.models.base import Codec, Signature, TensorSpec, WrongAnswer
from inferbus.models.codecs import codec
from inferbus.models.columns import Headers
from tests.codec_contract import INFO, QUICK, Answer, CodecContract, Request, anything, refusal

TABLE = Signature(
    (
        TensorSpec("amount", "FP32", (-1, 1)),
        TensorSpec("country", "BYTES", (-1, 1)),
        TensorSpec("age", "INT64", (-1,)),
        TensorSpec("new", "BOOL", (-1,)),
    ),
    (TensorSpec("label", "INT64", (-1,)), TensorSpec("why", "BYTES", (-1, 2)), TensorSpec("p", "FP64", (-1, 1))),
)
NESTED = Signature(
    (TensorSpec("tokens", "INT32", (-1, -1)), TensorSpec("image", "FP32", (-1, 2, -1, 3))),
    (
        TensorSpec("boxes", "FP32", (-1, -1, 4)),
        TensorSpec("names", "BYTES", (-1, 2, 1)),
        TensorSpec("deep", "BOOL", (-1, 2, 3, 1)),
        TensorSpec("nothing", "FP32", (-1, 0, 2)),
    ),
)


def json(signature: Signature) -> Codec:
    return codec("json", signature, INFO)


class JsonContract(CodecContract):
    format = "json"

    def read(self, body: bytes, headers: Headers) -> Answer:
        assert tuple(headers) == (("content-type", b"application/json"),)
        answer = orjson.loads(body)
        assert list(answer) == ["id", "model", "outputs"]
        assert answer["model"] == f"{INFO.name}@{INFO.version}"
        outputs = {}
        for spec in self.signature.outputs:
            value = np.array(answer["outputs"][spec.name], spec.dtype)
            outputs[spec.name] = (
                value.reshape(1, *value.shape) if value.size else np.zeros((1, *spec.row_shape), spec.dtype)
            )
        assert list(outputs) == list(answer["outputs"])
        return Answer(answer["id"], outputs)


class TestTable(JsonContract):
    signature = TABLE

    def good(self, serial: int) -> Request:
        rng = np.random.default_rng(serial)
        row: dict[str, Any] = {
            "amount": float(rng.random(dtype=np.float32)),
            "country": f"true {serial} ü",
            "age": int(rng.integers(-(2**63), 2**63 - 1)),
            "new": bool(serial % 2),
        }
        inputs = {
            spec.name: np.array([row[spec.name]], spec.dtype).reshape(1, *spec.row_shape) for spec in TABLE.inputs
        }
        if serial % 70 == 69:
            row["amount"] = [row["amount"]]  # a list will do as well, rarely
        return Request(orjson.dumps(dict(reversed(row.items()))), inputs)

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        row = {"amount": 12.5, "country": "DE", "age": 7, "new": True}
        wrong: dict[str, Sequence[Any]] = {
            "amount": ["12.5", True, None, 1e39, [], [1.0, 2.0], [[1.0]], {}],
            "country": [1, None, ["DE", "FR"], [["DE"]]],
            "age": [7.0, True, "7", 2**63, [7], None],
            "new": [1, 0, "true", None, [True]],
        }
        changed = [row | {name: value} for name, values in wrong.items() for value in values]
        changed += [{k: v for k, v in row.items() if k != name} for name in row]
        changed += [row | {"id": "x"}, row | {"Amount": 1.0}, {}]
        bad: list[tuple[str, bytes, Headers]] = [(str(request), orjson.dumps(request), ()) for request in changed]
        bodies = [b"", b"[]", b"null", b"1", b"{", b"\xff", b'{"amount": NaN, "country": "DE", "age": 7, "new": true}']
        return [*bad, *((str(body), body, ()) for body in bodies)]


class TestNested(JsonContract):
    signature = NESTED

    def good(self, serial: int) -> Request:
        rng = np.random.default_rng(serial)
        tokens = rng.integers(0, 100, (1, 1 + serial % 3), np.int32)
        image = rng.random((1, 2, 1 + serial % 2, 3), np.float32)
        body = orjson.dumps({"tokens": tokens[0].tolist(), "image": image[0].tolist()})
        return Request(body, {"tokens": tokens, "image": image})

    def usual(self) -> list[Request]:
        return [self.good(0), *self.goods(60, 6)[::6]]  # those of one lane

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        image = [[[1, 2, 3]], [[4, 5, 6]]]
        wrong: list[dict[str, Any]] = [
            {"tokens": 1, "image": image},
            {"tokens": [1.0], "image": image},
            {"tokens": [[1]], "image": image},
            {"tokens": [1], "image": [1, 2, 3, 4, 5, 6]},
            {"tokens": [1], "image": [image]},
            {"tokens": [1], "image": image[:1]},
            {"tokens": [1], "image": [[[1, 2, 3]], [[4, 5]]]},
            {"tokens": [1], "image": [[[1, 2, 3]], [[4, 5, 6], [7, 8, 9]]]},
            {"tokens": [1], "image": [[[1, 2, 3]], [4, 5, 6]]},
            {"tokens": [1], "image": [[[1, 2, 3]], [[4, 5, True]]]},
            {"tokens": [1], "image": []},
            {"tokens": [1], "image": "image"},
            {"tokens": [1], "image": {"0": 1}},
        ]
        return [(str(request), orjson.dumps(request), ()) for request in wrong]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"amount": "1"}, '"amount" is a string, expected a number (FP32)'),
        ({"amount": [1, 2]}, '"amount" has shape [2], expected [1] of at most 16777216 elements'),
        ({"age": [1]}, '"age" is a list, expected an integer (INT64)'),
        ({"age": 2**63}, '"age" is out of range for INT64'),
        ({"colour": 1}, '"colour" is unknown, expected "age", "amount", "country", "new"'),
    ],
)
def test_an_error_names_the_key(row: dict[str, Any], text: str) -> None:
    good = {"amount": 12.5, "country": "DE", "age": 7, "new": True}
    assert refusal(json(TABLE), orjson.dumps(good | row)) == text


def test_an_error_names_the_keys_that_are_missing() -> None:
    assert refusal(json(TABLE), b'{"age": 1, "country": "DE"}') == '"amount", "new" missing'


def test_an_error_names_the_place_in_nested_lists() -> None:
    body = orjson.dumps({"tokens": [1, 2], "image": [[[1, 2, 3]], [[4, "5", 6]]]})
    assert refusal(json(NESTED), body) == '"image"[1][0][1] is a string, expected a number (FP32)'
    body = orjson.dumps({"tokens": [1, 2], "image": [[[1, 2, 3]], [[4, 5]]]})
    assert refusal(json(NESTED), body) == '"image"[1][0] has 2 elements, expected a list of 3'
    assert refusal(json(NESTED), b'{"tokens": 5, "image": []}') == '"tokens" is an integer, expected a list'


def test_empty_lists_have_the_shape_that_the_signature_leaves_them() -> None:
    the = json(Signature((TensorSpec("x", "FP32", (-1, -1, 4)),), TABLE.outputs))
    (group,) = the.decode([b'{"x": []}'] * 2, [()] * 2).groups
    assert group.columns["x"].shape == (2, 0, 4)
    assert group.lane == ((0, 4),)


def test_an_answer_is_written_with_values_as_they_came() -> None:
    outputs = {
        "label": np.array([3]),
        "why": np.array([["a", b"b"]], object),
        "p": np.array([[0.25]]),
    }
    bodies, _ = json(TABLE).encode(outputs, [1], [None], ["one"])
    assert bodies == [b'{"id":"one","model":"dig%its@v\\"1","outputs":{"label":3,"why":["a","b"],"p":[0.25]}}']


def test_what_is_not_finite_is_null() -> None:
    the = json(Signature(TABLE.inputs, (TensorSpec("p", "FP32", (-1,)),)))
    bodies, _ = the.encode({"p": np.array([np.nan, 1], np.float32)}, [1, 1], [None, None], ["a", "b"])
    assert [orjson.loads(body)["outputs"] for body in bodies] == [{"p": None}, {"p": 1.0}]


def test_strings_that_are_not_utf8_cannot_be_answered() -> None:
    the = json(Signature(TABLE.inputs, (TensorSpec("s", "BYTES", (-1,)),)))
    with pytest.raises(WrongAnswer, match="'s' is not UTF-8"):
        the.encode({"s": np.array([b"\xff"], object)}, [1], [None], ["a"])


rows = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.lists(st.sampled_from([1, 2, 1.0, True, "1", [1]]), max_size=3) | anything,
        "image": st.lists(st.lists(st.lists(st.sampled_from([1, 0.5, True, None]), max_size=3), max_size=2), max_size=2)
        | anything,
        "other": anything,
    },
)


@given(strange=st.lists(rows.map(orjson.dumps), min_size=1, max_size=3))
@QUICK
def test_nearly_right_requests_are_read_alike_in_company_alone_and_exactly(strange: list[bytes]) -> None:
    TestNested().each_position_once([Request(body, {}) for body in strange])
