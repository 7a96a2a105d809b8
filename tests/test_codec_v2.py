"""The V2 codec: requests as clients write them, good and bad, and answers as they read them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inferbus.models.base import DATATYPES, Array, Codec, InvalidModel, Signature, Tensors, TensorSpec, WrongAnswer
from inferbus.models.codec_v2 import V2Codec
from inferbus.models.codecs import check_outputs, codec, finite_rows
from inferbus.models.columns import Headers
from tests.codec_contract import (
    INFO,
    JSON_LENGTH,
    QUICK,
    CodecContract,
    Request,
    anything,
    decode,
    outputs_for,
    per_request,
    read_v2,
    refusal,
    same,
    tensor,
)
from tests.malformed import malformed, raw_request, v2_request

ONE = Signature((TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
MANY = Signature(
    tuple(
        TensorSpec(name.lower(), name, (-1, *shape))
        for name, shape in zip(
            DATATYPES, [(2,), (), (1,), (3,), (2, 2), (1, 2), (2,), (), (4,), (2,), (2,), (), (2,)], strict=True
        )
    ),
    tuple(
        TensorSpec(f"out %b {name}", name, (-1, *shape))
        for name, shape in zip(
            DATATYPES, [(), (2,), (1,), (2,), (2, 2), (1, 2), (2,), (), (4,), (5,), (2,), (-1, 2), (2,)], strict=True
        )
    ),
)


def v2(signature: Signature) -> Codec:
    return codec("v2", signature, INFO)


def strings(*texts: str | bytes) -> Array:
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def one_input(datatype: str, shape: tuple[int, ...] = (-1, 3)) -> Codec:
    return v2(Signature((TensorSpec("x", datatype, shape),), ONE.outputs))


def asking(datatype: str, values: str, shape: str = "[1,3]") -> bytes:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{values}}}]}}'.encode()


def the_input(codec: Codec, body: bytes, headers: Headers = ()) -> Array:
    decoded = codec.decode([body], [headers])
    assert not decoded.rejects
    return decoded.groups[0].columns["x"]


class TestOneInput(CodecContract):
    format = "v2"
    signature = ONE

    def good(self, serial: int) -> Request:
        x = np.random.default_rng(serial).random((1, 64), np.float32)
        return Request(orjson.dumps({"id": f"true {serial}", "inputs": [tensor("x", "FP32", x)]}), {"x": x})

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        return list(malformed())


class TestSeveralRowsNestedOrFlatInLanes(CodecContract):
    format = "v2"
    signature = Signature(
        (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("image", "FP32", (-1, 2, -1, 3))),
        (TensorSpec("y", "FP64", (-1, 2)), TensorSpec("label", "INT64", (-1,)), TensorSpec("text", "BYTES", (-1, 2))),
    )

    def good(self, serial: int) -> Request:
        rng = np.random.default_rng(serial)
        rows, length, height = 1 + serial % 3, 1 + serial % 2, 1 + serial % 4
        ids = rng.integers(-(2**62), 2**62, (rows, length))
        image = rng.random((rows, 2, height, 3), np.float32)
        tensors = [tensor("ids", "INT64", ids), tensor("image", "FP32", image)]
        if serial % 5 == 0:
            tensors[1]["data"] = image.tolist()
            tensors[0]["parameters"] = {"content_type": "np"}
        return Request(orjson.dumps({"inputs": tensors}), {"ids": ids, "image": image})

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        inputs: Tensors = self.good(1).inputs  # two rows
        ids, image = tensor("ids", "INT64", inputs["ids"]), tensor("image", "FP32", inputs["image"])
        other = tensor("image", "FP32", inputs["image"][:1])
        wrong: dict[str, Any] = {
            "one is missing": [ids],
            "rows differ": [ids, other],
            "no rows": [tensor("ids", "INT64", np.zeros((0, 2), int)), tensor("image", "FP32", np.zeros((0, 2, 1, 3)))],
            "an empty dimension beside a huge one": [ids | {"shape": [2, 2**40], "data": []}, image],
            "rows that cost nothing": [
                {"name": "ids", "datatype": "INT64", "shape": [2**20, 0], "data": []},
                {"name": "image", "datatype": "FP32", "shape": [2**20, 2, 0, 3], "data": []},
            ],
            "a negative free dimension": [ids | {"shape": [2, -2]}, image],
            "a product that fits and a shape that does not": [ids, image | {"shape": [2, 3, 2, 2]}],
            "nested as another shape": [ids, image | {"data": inputs["image"].reshape(2, 3, 2, 2).tolist()}],
            "nested a level short": [ids, image | {"data": inputs["image"].reshape(2, -1).tolist()}],
            "a string deep inside": [ids, image | {"data": [[[["a"] * 3] * 2] * 2] * 2}],
        }
        return [(name, orjson.dumps({"inputs": tensors}), ()) for name, tensors in wrong.items()]


class TestEveryDatatype(CodecContract):
    format = "v2"
    signature = MANY

    def good(self, serial: int) -> Request:
        rows = 1 + serial % 2
        inputs = outputs_for(MANY.inputs, rows, np.random.default_rng(serial))
        tensors = [tensor(spec.name, spec.datatype, inputs[spec.name]) for spec in MANY.inputs]
        return Request(orjson.dumps({"inputs": tensors[::-1]}), inputs)

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        wrong: dict[str, Sequence[Any]] = {
            "BOOL": [1, 0, 1.0, "true", None, [True]],
            "UINT8": [-1, 256, 300, 1.0, 1.7, True, "1", None],
            "UINT16": [-1, 2**16, 3.0, True],
            "UINT32": [-1, 2**32, 3.0, False],
            "UINT64": [-1, float(2**64), 1.5, True],
            "INT8": [128, -129, 0.0, True],
            "INT16": [2**15, 2.0, False],
            "INT32": [2**31, -(2**31) - 1, 1e3, True],
            "INT64": [2**63, float(-(2**64)), 1.0, True, "7", {}],
            "FP16": [70000, 65520, -1e5, True, "1"],
            "FP32": [1e39, -1e300, False, "nan", None],
            "FP64": [True, "1", None, []],
            "BYTES": [1, 1.5, True, None, ["a"], {"a": "b"}],
        }
        bad = []
        for spec in MANY.inputs:
            for value in wrong[spec.datatype]:
                request = orjson.loads(self.good(0).body)
                (own,) = [tensor for tensor in request["inputs"] if tensor["name"] == spec.name]
                own["data"][-1] = value
                bad.append((f"{value!r} for {spec.datatype}", orjson.dumps(request), ()))
        return bad


class TestRawTensors(CodecContract):
    format = "v2"
    signature = MANY

    def good(self, serial: int) -> Request:
        rows = 1 + serial % 2
        inputs = outputs_for(MANY.inputs, rows, np.random.default_rng(serial))
        tensors, raws = [], []
        for i, spec in enumerate(MANY.inputs[::-1]):
            tensors.append(tensor(spec.name, spec.datatype, inputs[spec.name]))
            if (i + serial) % 3:
                raws.append(in_raw(inputs[spec.name]))
                del tensors[-1]["data"]
                tensors[-1]["parameters"] = {"binary_data_size": len(raws[-1])}
                if spec.datatype == "BYTES":
                    inputs[spec.name] = encoded(inputs[spec.name])
        head = orjson.dumps({"inputs": tensors})
        name = JSON_LENGTH.title() if serial % 2 else JSON_LENGTH
        return Request(b"".join([head, *raws]), inputs, (("other", b""), (name, b"%d" % len(head))))

    def usual(self) -> list[Request]:
        # Requests with both kinds of tensors are read one by one.
        return TestEveryDatatype().goods(64)

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        good = self.good(3)
        (_, length) = good.headers[1]
        bad: list[tuple[str, bytes, Headers]] = [
            ("no header", good.body, ()),
            ("a byte short", good.body[:-1], good.headers),
            ("a byte long", good.body + b"\0", good.headers),
            ("header one less", good.body, ((JSON_LENGTH, b"%d" % (int(length) - 1)),)),
            ("header one more", good.body, ((JSON_LENGTH, b"%d" % (int(length) + 1)),)),
        ]
        return [*bad, *((name, body, headers) for name, body, headers in malformed() if name.startswith("raw"))]


class TestOnlyRawTensorsInLanes(CodecContract):
    format = "v2"
    signature = Signature(
        (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("on", "BOOL", (-1,)), TensorSpec("half", "FP16", (-1, 2))),
        (TensorSpec("y", "FP16", (-1, 2)), TensorSpec("on", "BOOL", (-1,))),
    )

    def good(self, serial: int) -> Request:
        rng = np.random.default_rng(serial)
        rows = 1 + serial % 3
        inputs = outputs_for(self.signature.inputs, rows, rng)
        inputs["ids"] = inputs["ids"][:, : 1 + serial % 2].copy()
        return self.raw(inputs)

    def raw(self, inputs: Tensors, *tail: bytes, **changes: Any) -> Request:
        specs = self.signature.inputs[::-1]
        tensors = [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": list(inputs[spec.name].shape),
                "parameters": {"binary_data_size": inputs[spec.name].nbytes},
            }
            for spec in specs
        ]
        tensors[1].update(changes)
        head = orjson.dumps({"id": "true", "inputs": tensors})
        body = b"".join([head, *(inputs[spec.name].tobytes() for spec in specs), *tail])
        return Request(body, inputs, ((JSON_LENGTH, b"%d" % len(head)),))

    def bad(self) -> Sequence[tuple[str, bytes, Headers]]:
        good = self.good(1)  # two rows
        nan = good.inputs | {"half": np.full((2, 2), np.nan, np.float16)}
        two = good.inputs | {"on": np.array([1, 2], np.uint8)}
        changed = {
            "NaN": self.raw(nan),
            "a boolean of two": self.raw(two),
            "a byte more": self.raw(good.inputs, b"\0"),
            "rows differ": self.raw(good.inputs | {"on": np.array([True])}),
            "no rows": self.raw({name: array[:0] for name, array in good.inputs.items()}),
            "a size too small": self.raw(good.inputs, parameters={"binary_data_size": 1}),
            "a size of true": self.raw(good.inputs, parameters={"binary_data_size": True}),
            "a negative size": self.raw(good.inputs, parameters={"binary_data_size": -2}),
            "a size too large": self.raw(good.inputs, parameters={"binary_data_size": 2**40}),
            "no size": self.raw(good.inputs, parameters={}),
            "another datatype of that size": self.raw(good.inputs, datatype="UINT8"),
        }
        return [(name, request.body, request.headers) for name, request in changed.items()]


def in_raw(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(item.encode()).to_bytes(4, "little") + item.encode() for item in array.ravel())


def encoded(array: Array) -> Array:
    raw = np.empty(array.shape, object)
    raw.ravel()[:] = [item.encode() for item in array.ravel()]
    return raw


def test_there_are_at_least_forty_kinds_of_malformed_requests_with_names_of_their_own() -> None:
    names = [name for name, _, _ in malformed()]
    assert len(names) == len(set(names)) >= 40


def test_the_request_they_are_made_from_is_good() -> None:
    body, headers = raw_request(np.full(64, 0.5, np.float32).tobytes())
    decoded = v2(ONE).decode([orjson.dumps(v2_request()), body], [(), headers])
    assert not decoded.rejects
    assert [list(group.positions) for group in decoded.groups] == [[0, 1]]


# What an error says


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (asking("FP32", '[1,2,"3"]'), 'inputs[0] "x": data[2] is a string, expected a number (FP32)'),
        (asking("FP32", '[[1,2,"3"]]'), 'inputs[0] "x": data[0][2] is a string, expected a number (FP32)'),
        (asking("FP32", "[1,true,3]"), 'inputs[0] "x": data[1] is a boolean, expected a number (FP32)'),
        (asking("FP32", "[1,2,1e39]"), 'inputs[0] "x": data[2] is out of range for FP32'),
        (asking("FP32", "[1,2]"), 'inputs[0] "x": data has 2 elements, expected 3 for shape [1,3]'),
        (asking("FP32", "[[1,2]]"), 'inputs[0] "x": data[0] has 2 elements, expected a list of 3'),
        (asking("INT32", "[1,2,3]"), 'inputs[0] "x": datatype is "INT32", expected FP32'),
        (asking("FP32", "[1,2]", "[1,2]"), 'input "x": shape [1,2] does not fit, expected [-1,3]'),
        (asking("FP32", "[1,2,3]", "[1.0,3]"), 'inputs[0] "x": shape[0] is a decimal number, expected an integer'),
        (asking("FP32", "{}"), 'inputs[0] "x": data is an object, expected a list'),
    ],
)
def test_an_error_names_the_input_and_what_was_expected(body: bytes, text: str) -> None:
    assert refusal(one_input("FP32"), body) == text


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("INT64", "[1,2.0,3]", "data[1] is a decimal number, expected an integer (INT64)"),
        ("UINT8", "[1,2,300]", "data[2] is out of range for UINT8"),
        ("UINT8", "[-1,2,3]", "data[0] is out of range for UINT8"),
        ("FP16", "[1,70000,3]", "data[1] is out of range for FP16"),
        ("BOOL", "[true,1,false]", "data[1] is an integer, expected a boolean (BOOL)"),
        ("BYTES", '["a","b",null]', "data[2] is null, expected a string (BYTES)"),
    ],
)
def test_an_error_names_the_element_for_every_kind_of_datatype(datatype: str, values: str, text: str) -> None:
    assert refusal(one_input(datatype), asking(datatype, values)) == f'inputs[0] "x": {text}'


def test_an_error_shows_a_hostile_name_escaped_and_short() -> None:
    name = '"\\\r\n\x00\x1b[31m\u202e' + "é" * 10_000
    text = refusal(v2(ONE), orjson.dumps(v2_request(name=name)))
    assert text == 'inputs[0] "\\"\\\\\\r\\n\\x00\\x1b[31m\\u202e' + "é" * 14 + '…" is unknown, expected "x"'


def test_an_error_does_not_show_values() -> None:
    assert "secret" not in refusal(one_input("FP32"), asking("FP32", '["secret",1,2]'))
    assert "secret" not in refusal(one_input("FP32"), b'{"secret')
    assert "secret" not in refusal(one_input("FP32"), b"{}", ((JSON_LENGTH, b"secret"),))


def test_finding_the_culprit_among_a_million_numbers_is_quick() -> None:
    # Quick by construction (halving in C); the limit only catches a walk over them one by one with exceptions.
    values = [0.5] * 1_000_000
    values[777_777] = 1e39
    body = orjson.dumps(v2_request(values, shape=[1_000_000 // 50, 50]))
    assert refusal(one_input("FP32", (-1, 50)), body) == 'inputs[0] "x": data[777777] is out of range for FP32'


# What is taken


def test_integers_are_numbers_for_a_float_input_and_round_like_numbers() -> None:
    assert the_input(one_input("FP32"), asking("FP32", "[1,-2,16777217]")).tolist() == [[1.0, -2.0, 16777216.0]]
    assert the_input(one_input("FP64"), asking("FP64", "[1,2,18446744073709551616]")).tolist() == [[1.0, 2.0, 2.0**64]]


def test_fractions_round_to_the_nearest_float_and_small_ones_to_zero() -> None:
    expected = np.array([[0.1, 1e-50, 3.4028235e38]], np.float64).astype(np.float32)
    assert np.array_equal(the_input(one_input("FP32"), asking("FP32", "[0.1,1e-50,3.4028235e38]")), expected)


def test_halves_are_taken_from_json() -> None:
    found = the_input(one_input("FP16"), asking("FP16", "[0.1,65504,-1]"))
    assert np.array_equal(found, np.array([[0.1, 65504, -1]], np.float16))


def test_the_last_of_a_key_that_comes_twice_counts() -> None:
    body = asking("FP32", "[1,2,3]").replace(b'"data"', b'"data":[7,8,9],"data"')
    assert the_input(one_input("FP32"), body).tolist() == [[1.0, 2.0, 3.0]]


def test_unknown_keys_and_parameters_and_nulls_are_passed_over() -> None:
    request = v2_request(parameters={"content_type": "np"}, extra=[1]) | {
        "id": None,
        "outputs": None,
        "parameters": {"tenant": "a"},
        "model_name": "other",
    }
    decoded = v2(ONE).decode([orjson.dumps(request)] * 70, [()] * 70)
    assert not decoded.rejects
    assert set(decoded.groups[0].asks) == {None}


def test_a_boolean_outside_the_numbers_is_no_reason_to_refuse() -> None:
    requests = [
        v2_request(parameters={"flag": True, "other": False}),
        v2_request() | {"id": "true", "parameters": {"x": False}},
        v2_request([[0.5] * 64]) | {"id": "false"},
    ]
    assert not v2(ONE).decode([*map(orjson.dumps, requests)], [()] * 3).rejects


@pytest.mark.parametrize("count", [1, 64])
def test_a_boolean_among_numbers_is_found_however_the_data_lie(count: int) -> None:
    for values in ("[1,true,3]", "[[1,true,3]]", "[[1,2,false]]"):
        assert len(one_input("FP32").decode([asking("FP32", values)] * count, [()] * count).rejects) == count
        assert len(one_input("INT8").decode([asking("INT8", values)] * count, [()] * count).rejects) == count


def test_a_shape_of_booleans_or_decimals_is_refused_after_the_same_shape_of_integers() -> None:
    the = one_input("FP32")
    bodies = [asking("FP32", "[1,2,3]", shape) for shape in ("[1,3]", "[true,3]", "[1.0,3]", "[1,3]", "[1,3.0]")]
    assert [position for position, _ in the.decode(bodies, [()] * 5).rejects] == [1, 2, 4]


def test_a_free_dimension_may_be_empty() -> None:
    the = one_input("FP32", (-1, -1))
    for values in ("[]", "[[]]"):
        assert the_input(the, asking("FP32", values, "[1,0]")).shape == (1, 0)


def test_free_dimensions_make_lanes_and_rows_do_not() -> None:
    the = one_input("INT64", (-1, -1))
    shapes = [(1, 2), (1, 3), (2, 2), (1, 3), (3, 2)]
    bodies = [orjson.dumps({"inputs": [tensor("x", "INT64", np.full(shape, i))]}) for i, shape in enumerate(shapes)]
    first, second = the.decode(bodies, [()] * 5).groups
    assert (list(first.positions), list(first.rows), first.lane) == ([0, 2, 4], [1, 2, 3], ((2,),))
    assert first.columns["x"].tolist() == [[0, 0], [2, 2], [2, 2], [4, 4], [4, 4], [4, 4]]
    assert (list(second.positions), list(second.rows), second.lane) == ([1, 3], [1, 1], ((3,),))


def test_more_elements_than_a_message_can_hold_are_refused_from_the_shape_alone() -> None:
    the = codec("v2", one_input_signature("UINT8", (-1, -1)), INFO, max_message_bytes=1000)
    assert the_input(the, asking("UINT8", str([1] * 1000), "[1,1000]")).shape == (1, 1000)
    for shape in ("[1,1001]", "[1001,1]", "[1001,0]", "[2,9999999999999]"):
        text = refusal(the, asking("UINT8", "[]", shape))
        assert text == f'input "x": shape {shape} is too large, expected at most 1000 elements'


def one_input_signature(datatype: str, shape: tuple[int, ...]) -> Signature:
    return Signature((TensorSpec("x", datatype, shape),), ONE.outputs)


# Raw tensors


@pytest.mark.parametrize("count", [1, 3])
def test_a_large_raw_tensor_is_not_copied(count: int) -> None:
    x = np.random.default_rng(0).random((256, 64), np.float32)
    body, ((name, length),) = raw_request(x.tobytes(), x.nbytes, shape=[256, 64])
    head = body[: int(length)]
    head += b" " * (-len(head) % 16)
    body = head + x.tobytes()
    column = the_input(v2(ONE), body, ((name, b"%d" % len(head)),))
    assert np.array_equal(column, x)
    assert np.shares_memory(column, np.frombuffer(body, np.uint8))
    unaligned = head + b" " + x.tobytes()
    odd = the_input(v2(ONE), unaligned, ((name, b"%d" % (len(head) + 1)),))
    assert np.array_equal(odd, x)
    assert np.shares_memory(odd, np.frombuffer(unaligned, np.uint8))
    groups = v2(ONE).decode([body] * count, [((name, b"%d" % len(head)),)] * count).groups
    # One group each: only the batch is stacked, or every tensor would be copied twice.
    assert [position for group in groups for position in group.positions] == list(range(count))
    for group in groups:
        assert np.array_equal(group.columns["x"], x)
        assert np.shares_memory(group.columns["x"], np.frombuffer(body, np.uint8))


def test_a_run_of_small_raw_tensors_is_read_at_once_and_its_one_bad_element_found() -> None:
    rows = np.random.default_rng(0).random((64, 64), np.float32)
    requests = [raw_request(row.tobytes()) for row in rows]
    bodies, headers = zip(*requests, strict=True)
    the = v2(ONE)
    assert isinstance(the, V2Codec)
    assert [list(share.rows) for share in the.at_once(bodies, headers)] == [[1] * 64]
    assert np.array_equal(the.decode(bodies, headers).groups[0].columns["x"], rows)
    rows[40, 7] = np.nan
    bodies, headers = zip(*(raw_request(row.tobytes()) for row in rows), strict=True)
    decoded = the.decode(bodies, headers)
    ((position, reason),) = decoded.rejects
    assert (position, str(reason)) == (40, 'inputs[0] "x": raw element 7 is not finite, expected a number (FP32)')
    assert np.array_equal(decoded.groups[0].columns["x"], np.delete(rows, 40, axis=0))


def test_raw_strings_are_bytes_and_json_strings_are_text() -> None:
    the = one_input("BYTES", (-1, 2))
    raw = b"\x01\0\0\0\xff\x00\0\0\0"
    head = orjson.dumps(
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1, 2], "parameters": {"binary_data_size": len(raw)}}]}
    )
    body, headers = head + raw, ((JSON_LENGTH, b"%d" % len(head)),)
    (group,) = the.decode([body, asking("BYTES", '["a","b"]', "[1,2]")], [headers, ()]).groups
    assert group.columns["x"].tolist() == [[b"\xff", b""], ["a", "b"]]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "has 0 raw elements and 0 bytes more, expected 2"),
        (b"\x01\0\0\0a", "has 1 raw elements and 0 bytes more, expected 2"),
        (b"\x01\0\0\0a\x05\0\0\0b", "raw element 1 ends 4 bytes after its tensor"),
        (b"\x01\0\0\0a\x01\0", "raw element 1 ends 3 bytes after its tensor"),
        (b"\xff\xff\xff\xffa", "raw element 0 ends 4294967294 bytes after its tensor"),
        (b"\x01\0\0\0a" * 3, "has 2 raw elements and 5 bytes more, expected 2"),
    ],
)
def test_raw_strings_that_do_not_add_up_are_refused(raw: bytes, text: str) -> None:
    head = orjson.dumps(
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1, 2], "parameters": {"binary_data_size": len(raw)}}]}
    )
    assert (
        refusal(one_input("BYTES", (-1, 2)), head + raw, ((JSON_LENGTH, b"%d" % len(head)),))
        == f'inputs[0] "x": {text}'
    )


@pytest.mark.parametrize(
    ("datatype", "raw", "text"),
    [
        ("BOOL", b"\0\1\2", "raw element 2 is not 0 or 1, expected a boolean (BOOL)"),
        ("FP16", struct.pack("<3e", 1, float("inf"), 1), "raw element 1 is not finite, expected a number (FP16)"),
        ("FP64", struct.pack("<3d", float("nan"), 1, 1), "raw element 0 is not finite, expected a number (FP64)"),
        ("INT16", b"\0" * 8, "has 8 raw bytes, expected 6 for its shape and INT16"),
    ],
)
def test_raw_elements_are_held_against_their_datatype(datatype: str, raw: bytes, text: str) -> None:
    head = orjson.dumps(
        {"inputs": [{"name": "x", "datatype": datatype, "shape": [1, 3], "parameters": {"binary_data_size": len(raw)}}]}
    )
    assert refusal(one_input(datatype), head + raw, ((JSON_LENGTH, b"%d" % len(head)),)) == f'inputs[0] "x": {text}'


# Answers


def answers(
    the: Codec, requests: Sequence[dict[str, Any]], outputs: Tensors, ids: Sequence[str]
) -> list[tuple[bytes, Headers]]:
    (group,) = the.decode([*map(orjson.dumps, requests)], [()] * len(requests)).groups
    return list(zip(*the.encode(outputs, group.rows, group.asks, ids), strict=True))


def test_an_answer_is_written_as_the_protocol_has_it() -> None:
    y = np.array([[0.5, 1, 1e-7, 1e20, 0.1, -0.0, 2, 3, 4, 5]], np.float32)
    (((body, headers)),) = answers(v2(ONE), [v2_request()], {"y": y}, ["delivery"])
    assert body == (
        b'{"model_name":"dig%its","model_version":"v\\"1","id":"one","outputs":[{"name":"y","datatype":"FP32",'
        b'"shape":[1,10],"data":[0.5,1.0,1e-7,1e+20,0.1,-0.0,2.0,3.0,4.0,5.0]}]}'
    )
    assert tuple(headers) == (("content-type", b"application/json"),)


def test_the_id_of_the_body_comes_back_else_the_delivery_s() -> None:
    bodies: list[Any] = [
        v2_request() | {"id": "a"},
        v2_request() | {"id": None},
        v2_request() | {"id": ""},
        v2_request(),
    ]
    del bodies[3]["id"]
    found = answers(v2(ONE), bodies, {"y": np.zeros((4, 10), np.float32)}, ["1", "2", "3", "4"])
    assert [orjson.loads(body)["id"] for body, _ in found] == ["a", "2", "", "4"]


def test_outputs_can_be_chosen_ordered_and_asked_for_raw() -> None:
    signature = Signature(ONE.inputs, MANY.outputs)
    names = [spec.name for spec in MANY.outputs]
    raw, text = {"binary_data": True}, {"binary_data": False}
    asked: list[tuple[dict[str, Any], list[str], set[str]]] = [
        ({}, names, set()),
        ({"outputs": []}, names, set()),
        ({"parameters": {"binary_data_output": True}}, names, set(names)),
        ({"outputs": [{"name": names[3]}, {"name": names[0]}]}, [names[3], names[0]], set()),
        ({"outputs": [{"name": names[12], "parameters": raw}, {"name": names[9]}]}, [names[12], names[9]], {names[12]}),
        (
            {
                "outputs": [{"name": names[9], "parameters": text}, {"name": names[0], "parameters": {}}],
                "parameters": {"binary_data_output": True},
            },
            [names[9], names[0]],
            {names[0]},
        ),
    ]
    rows = [1, 3, 2, 1, 2, 3]
    requests = [v2_request([0.5] * 64 * n, shape=[n, 64]) | ask for n, (ask, _, _) in zip(rows, asked, strict=True)]
    outputs = outputs_for(MANY.outputs, sum(rows), np.random.default_rng(0))
    start = 0
    for (body, headers), n, (_, order, in_raw_form) in zip(
        answers(v2(signature), requests, outputs, [""] * 6), rows, asked, strict=True
    ):
        told = dict(headers)
        assert told["content-type"] == (b"application/octet-stream" if in_raw_form else b"application/json")
        head = orjson.loads(body[: int(told.get(JSON_LENGTH, len(body)))])
        assert [t["name"] for t in head["outputs"]] == order
        assert {t["name"] for t in head["outputs"] if "data" not in t} == in_raw_form
        assert same(
            read_v2(body, headers, MANY.outputs).outputs, {name: outputs[name][start : start + n] for name in order}
        )
        start += n


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"outputs": [{"name": "z"}]}, 'outputs[0] "z" is unknown, expected "y"'),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, 'outputs[1] "y" is there twice, expected once'),
        ({"outputs": [{}]}, "outputs[0]: name is missing, expected a string"),
        ({"outputs": {"name": "y"}}, "outputs is an object, expected a list"),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            'outputs[0] "y": binary_data is an integer, expected true or false',
        ),
        ({"parameters": {"binary_data_output": "true"}}, "binary_data_output is a string, expected true or false"),
        ({"parameters": 5}, "parameters is an integer, expected an object"),
    ],
)
def test_what_is_asked_wrongly_is_refused(more: dict[str, Any], text: str) -> None:
    assert refusal(v2(ONE), orjson.dumps(v2_request() | more)) == text


def test_integers_beyond_what_floats_hold_keep_their_digits() -> None:
    signature = Signature(ONE.inputs, (TensorSpec("y", "INT64", (-1,)), TensorSpec("z", "UINT64", (-1,))))
    outputs = {"y": np.array([-(2**63), 2**53 + 1]), "z": np.array([2**64 - 1, 0], np.uint64)}
    bodies, _ = v2(signature).encode(outputs, [2], [None], ["a"])
    assert b'"data":[-9223372036854775808,9007199254740993]' in bodies[0]
    assert b'"data":[18446744073709551615,0]' in bodies[0]


def test_what_is_not_finite_is_null_in_json_and_itself_in_raw_form() -> None:
    y = np.full((2, 10), np.nan, np.float32)
    y[1] = np.inf
    plain, raw = answers(
        v2(ONE), [v2_request(), v2_request() | {"parameters": {"binary_data_output": True}}], {"y": y}, ["", ""]
    )
    assert orjson.loads(plain[0])["outputs"][0]["data"] == [None] * 10
    assert np.array_equal(read_v2(*raw, ONE.outputs).outputs["y"], y[1:])


def test_half_a_surrogate_pair_can_be_answered_in_no_form() -> None:
    signature = Signature(ONE.inputs, (TensorSpec("y", "BYTES", (-1,)),))
    request = orjson.dumps(v2_request() | {"parameters": {"binary_data_output": True}})
    asks = v2(signature).decode([request], [()]).groups[0].asks
    with pytest.raises(WrongAnswer, match="'y' holds half a surrogate pair"):
        v2(signature).encode({"y": strings("\ud800")}, [1], asks, ["a"])


def test_strings_that_are_not_utf8_can_be_answered_raw_but_not_as_json() -> None:
    signature = Signature(ONE.inputs, (TensorSpec("y", "BYTES", (-1,)),))
    for bad in (b"\xff", "\ud800"):
        with pytest.raises(WrongAnswer, match="'y' is not UTF-8"):
            v2(signature).encode({"y": strings("fine", bad)}, [1, 1], [None, None], ["a", "b"])
    asks = (
        decode(v2(signature), [Request(orjson.dumps(v2_request() | {"parameters": {"binary_data_output": True}}), {})])
        .groups[0]
        .asks
    )
    bodies, _ = v2(signature).encode({"y": strings(b"\xff")}, [1], asks, ["a"])
    assert bodies[0].endswith(b"\x01\0\0\0\xff")


# What a model may answer


OUT = Signature(
    ONE.inputs, (TensorSpec("p", "FP32", (-1, 3)), TensorSpec("s", "BYTES", (-1,)), TensorSpec("n", "INT64", (-1, -1)))
)


def good_outputs() -> dict[str, Any]:
    return {"p": np.zeros((2, 3), np.float32), "s": np.array(["a", "b"], object), "n": np.zeros((2, 5), np.int64)}


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("p", None, r"answered \['n', 's'\], expected \['n', 'p', 's'\]"),
        ("q", np.zeros(2), r"answered \['n', 'p', 'q', 's'\]"),
        ("p", [[0.0] * 3] * 2, "'p' is list, expected a numpy array"),
        ("p", np.zeros((3, 3), np.float32), r"'p' has shape \[3, 3\], expected \[2, 3\]"),
        ("p", np.zeros((2, 4), np.float32), r"'p' has shape \[2, 4\], expected \[2, 3\]"),
        ("p", np.zeros((2, 3, 1), np.float32), "'p' has shape"),
        ("p", np.zeros((), np.float32), "'p' has shape"),
        ("p", np.zeros((2, 3)), r"'p' is float64, expected float32 \(FP32\)"),
        ("p", np.zeros((2, 3), np.int32), "'p' is int32"),
        ("p", np.zeros((2, 3), object), "'p' is object"),
        ("n", np.zeros((2, 5), np.int32), "'n' is int32, expected int64"),
        ("n", np.zeros((2, 5), np.uint64), "'n' is uint64"),
        ("s", np.zeros(2), "'s' holds other things than strings"),
        ("s", np.array(["a", 1], object), "'s' holds other things than strings"),
        ("s", np.array(["a", None], object), "'s' holds other things than strings"),
    ],
)
def test_an_answer_that_is_not_the_signature_s_is_wrong(name: str, wrong: Any, text: str) -> None:
    outputs = good_outputs() | {name: wrong}
    if wrong is None:
        del outputs[name]
    with pytest.raises(WrongAnswer, match=text):
        check_outputs(outputs, 2, OUT)


def test_an_answer_that_is_no_dict_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="ndarray, expected a dict"):
        check_outputs(np.zeros((2, 3), np.float32), 2, OUT)


def test_a_good_answer_comes_back_in_order_contiguous_and_little_endian() -> None:
    outputs = good_outputs()
    outputs = {
        "n": np.arange(10, dtype=">i8").reshape(5, 2).T,
        "s": np.array(["a", "bc"]),
        "p": np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2],
    }
    checked = check_outputs(outputs, 2, OUT)
    assert list(checked) == ["p", "s", "n"]
    assert checked["n"].dtype == DATATYPES["INT64"]
    assert all(output.flags.c_contiguous for output in checked.values())
    assert checked["n"].tolist() == outputs["n"].tolist()
    assert checked["p"].tolist() == outputs["p"].tolist()
    assert checked["s"].tolist() == ["a", "bc"]
    v2(OUT).encode(checked, [1, 1], [None, None], ["a", "b"])


def test_an_answer_in_order_already_is_not_copied() -> None:
    outputs = good_outputs()
    assert all(np.shares_memory(output, outputs[name]) for name, output in check_outputs(outputs, 2, OUT).items())


def test_rows_that_are_not_finite_are_told() -> None:
    x, y = np.zeros((4, 2, 2), np.float32), np.zeros(4)
    labels = np.arange(4)
    assert finite_rows({"x": x, "y": y, "labels": labels}) is None
    x[1, 0, 1], y[3] = np.nan, np.inf
    mask = finite_rows({"x": x, "y": y, "labels": labels, "s": strings("a", "b", "c", "d")})
    assert mask is not None
    assert mask.tolist() == [True, False, True, False]


def test_an_unknown_format_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidModel, match="'avro', expected one of v2, json, raw, text"):
        codec("avro", ONE, INFO)


# Properties


@st.composite
def arrays(draw: st.DrawFn) -> tuple[TensorSpec, Array]:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    elements: dict[str, Any] = {"elements": st.text(max_size=5)} if datatype == "BYTES" else {}
    if datatype.startswith("FP"):
        elements["elements"] = {"allow_nan": False, "allow_infinity": False}
    array = draw(hnp.arrays(DATATYPES[datatype], shape, **elements))
    row = tuple(draw(st.sampled_from([dim, -1])) for dim in shape[1:])
    return TensorSpec("x", datatype, (-1, *row)), array


@given(given_=arrays(), nested=st.booleans(), company=st.integers(0, 70))
@settings(max_examples=150, deadline=None)
def test_a_good_request_comes_through_as_numpy_has_it(
    given_: tuple[TensorSpec, Array], nested: bool, company: int
) -> None:
    spec, array = given_
    values = array.tolist() if nested else array.ravel().tolist()
    body = orjson.dumps({"inputs": [tensor("x", spec.datatype, array, data=values)]})
    the = v2(Signature((spec,), (spec,)))
    found = per_request(the.decode([body] * (company + 1), [()] * (company + 1)))
    assert len(found) == company + 1
    assert all(same(inputs, {"x": array}) for inputs in found.values())


@given(given_=arrays(), raw=st.booleans())
@settings(max_examples=150, deadline=None)
def test_an_answer_comes_through_as_numpy_has_it(given_: tuple[TensorSpec, Array], raw: bool) -> None:
    spec, array = given_
    the = v2(Signature(ONE.inputs, (spec,)))
    request = v2_request() | ({"parameters": {"binary_data_output": True}} if raw else {})
    asks = the.decode([orjson.dumps(request)], [()]).groups[0].asks
    bodies, headers = the.encode({"x": array}, [len(array)], asks, ["a"])
    assert same(read_v2(bodies[0], headers[0], [spec]).outputs, {"x": array})


mangled = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["ids", "image", "x"]) | anything,
        "datatype": st.sampled_from(["INT64", "FP32"]) | anything,
        "shape": st.lists(st.sampled_from([1, 2, 3, 0, -1, True, 1.0, 2**40, "1"]), max_size=4) | anything,
        "data": st.lists(st.sampled_from([1, 0.5, True, None, "1", 2**63, [1], [1, 2], []]), max_size=6) | anything,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), anything, max_size=2) | anything,
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(mangled | anything, max_size=3)},
    optional={
        "id": st.text() | anything,
        "outputs": st.lists(mangled, max_size=2) | anything,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_output", "x"]), anything, max_size=2) | anything,
    },
)


@given(
    strange=st.lists(requests.map(orjson.dumps), min_size=1, max_size=3),
    length=st.none() | st.integers(-1, 200) | st.binary(max_size=3),
)
@QUICK
def test_nearly_right_requests_are_read_alike_in_company_alone_and_exactly(strange: list[bytes], length: Any) -> None:
    headers: Headers = ()
    if length is not None:
        headers = ((JSON_LENGTH, length if isinstance(length, bytes) else b"%d" % length),)
    TestSeveralRowsNestedOrFlatInLanes().each_position_once([Request(body, {}, headers) for body in strange])
