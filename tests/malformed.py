"""Malformed V2 requests for a model with one input `x`, FP32 [-1,64]: one of each kind, none may be answered."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import orjson

WIDTH = 64
Headers = tuple[tuple[str, bytes], ...]


def v2_request(values: Any = None, **changes: Any) -> dict[str, Any]:
    """A good request of one row, but for the changes to its input."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": [0.5] * WIDTH if values is None else values}
    return {"id": "one", "inputs": [tensor | changes]}


def raw_request(
    raw: bytes, size: Any = 4 * WIDTH, *, length: bytes | None = None, **changes: Any
) -> tuple[bytes, Headers]:
    """A request whose input lies raw behind the JSON, and its headers."""
    request = v2_request(parameters={"binary_data_size": size}, **changes)
    if "data" not in changes:
        del request["inputs"][0]["data"]
    head = orjson.dumps(request)
    announced = b"%d" % len(head) if length is None else length
    return head + raw, (("inference-header-content-length", announced),)


def malformed() -> Iterator[tuple[str, bytes, Headers]]:
    """Every kind: its name, a body and the headers it needs."""
    good = orjson.dumps(v2_request())
    yield "empty body", b"", ()
    yield "not JSON", b"hello", ()
    yield "half a request", good[: len(good) // 2], ()
    yield "something after the request", good + b"x", ()
    yield "two requests", good + good, ()
    yield "not UTF-8", good.replace(b"one", b"\xff\xfe"), ()
    yield "a byte order mark", b"\xef\xbb\xbf" + good, ()
    yield "a control character in a string", good.replace(b"one", b"o\x00e"), ()
    yield "half a surrogate pair", good.replace(b"one", b"\\ud800"), ()
    yield "nested too deep", b"[" * 100_000 + b"]" * 100_000, ()
    yield "data nested too deep", orjson.dumps(v2_request([0])).replace(b"[0]", b"[" * 5000 + b"]" * 5000), ()
    yield "a list", b"[" + good + b"]", ()
    yield "a string", b'"x"', ()
    yield "a number", b"1", ()
    yield "null", b"null", ()
    yield "no inputs", b'{"id":"one"}', ()
    yield "inputs is an object", orjson.dumps({"inputs": {"x": [0.5] * WIDTH}}), ()
    yield "inputs is null", b'{"inputs":null}', ()
    yield "inputs is empty", b'{"inputs":[]}', ()
    yield "an input is a number", b'{"inputs":[1]}', ()
    yield "an input twice", orjson.dumps({"inputs": v2_request()["inputs"] * 2}), ()
    yield "an unknown input", orjson.dumps(v2_request(name="y")), ()
    yield (
        "an unknown input beside the good one",
        orjson.dumps({"inputs": [*v2_request()["inputs"], *v2_request(name="y")["inputs"]]}),
        (),
    )
    yield "a hostile name", orjson.dumps(v2_request(name='x"\n\x1b[31m\u202e' * 1000)), ()
    yield "a name that is a number", orjson.dumps(v2_request(name=1)), ()
    yield "a name that is a list", orjson.dumps(v2_request(name=["x"])), ()
    yield "another case of the name", orjson.dumps(v2_request(name="X")), ()
    yield "a datatype of the wrong width", orjson.dumps(v2_request(datatype="FP64")), ()
    yield "an unknown datatype", orjson.dumps(v2_request(datatype="float32")), ()
    yield "a datatype that is null", orjson.dumps(v2_request(datatype=None)), ()
    for key in ("name", "datatype", "shape", "data"):
        request = v2_request()
        del request["inputs"][0][key]
        yield f"no {key}", orjson.dumps(request), ()
    yield "an id that is a number", orjson.dumps(v2_request() | {"id": 7}), ()
    yield "an id that is a list", orjson.dumps(v2_request() | {"id": ["one"]}), ()
    shapes: dict[str, Any] = {
        "too short a row": [1, WIDTH - 1],
        "too long a row": [1, WIDTH + 1],
        "a rank too few": [WIDTH],
        "a rank too many": [1, 1, WIDTH],
        "no rank": [],
        "no rows": [0, WIDTH],
        "negative rows": [-1, WIDTH],
        "a negative row": [1, -WIDTH],
        "more rows than there are": [2, WIDTH],
        "huge rows": [2**40, WIDTH],
        "a huge row": [1, 2**40],
        "huge and empty": [0, 2**40],
        "overflowing": [2**62, 2**62],
        "beyond 64 bits": [2**70, WIDTH],
        "a decimal": [1.0, WIDTH],
        "a boolean": [True, WIDTH],
        "a string": ["1", WIDTH],
        "null in it": [None, WIDTH],
        "nested": [[1], WIDTH],
        "a number": WIDTH,
        "text": "1,64",
        "an object": {"1": WIDTH},
        "null": None,
    }
    for name, shape in shapes.items():
        text = orjson.dumps(shape) if name != "beyond 64 bits" else b"[%d,%d]" % (2**70, WIDTH)
        yield f"shape: {name}", good.replace(b"[1,64]", text), ()
    values: dict[str, bytes] = {
        "a string": b'"0.5"',
        "true": b"true",
        "false": b"false",
        "null": b"null",
        "a list": b"[0.5]",
        "an object": b"{}",
        "NaN": b"NaN",
        "Infinity": b"Infinity",
        "1e999": b"1e999",
        "too large for FP32": b"1e39",
        "too small for FP32": b"-3.5e38",
        "a hexadecimal": b"0x1p3",
        "nothing": b"",
    }
    for name, value in values.items():
        yield (
            f"data: {name} among numbers",
            orjson.dumps(v2_request([0.5] * 63 + [7])).replace(b",7]", b",%b]" % value),
            (),
        )
    yield "data: one too few", orjson.dumps(v2_request([0.5] * 63)), ()
    yield "data: one too many", orjson.dumps(v2_request([0.5] * 65)), ()
    yield "data: none", orjson.dumps(v2_request([])), ()
    yield "data: a number", orjson.dumps(v2_request(0.5)), ()
    yield "data: a string", orjson.dumps(v2_request("0" * WIDTH)), ()
    yield "data: an object", orjson.dumps(v2_request({str(i): 0.5 for i in range(WIDTH)})), ()
    yield "data: null", orjson.dumps(v2_request(0)).replace(b'"data":0', b'"data":null'), ()
    yield "data: only booleans", orjson.dumps(v2_request([True] * WIDTH)), ()
    yield "data: ragged", orjson.dumps(v2_request([[0.5] * 60, [0.5] * 4])), ()
    yield "data: ragged rows", orjson.dumps(v2_request([[0.5] * 64, [0.5] * 63], shape=[2, WIDTH])), ()
    yield "data: nested once too often", orjson.dumps(v2_request([[[0.5] * WIDTH]])), ()
    yield "data: nested the other way round", orjson.dumps(v2_request([[0.5]] * WIDTH)), ()
    yield "data: half nested", orjson.dumps(v2_request([[0.5] * WIDTH, 0.5], shape=[2, WIDTH])), ()
    yield "outputs that are not there", orjson.dumps(v2_request() | {"outputs": [{"name": "nothing"}]}), ()
    yield "outputs that are a string", orjson.dumps(v2_request() | {"outputs": "y"}), ()
    yield "outputs of numbers", orjson.dumps(v2_request() | {"outputs": [1]}), ()
    yield "parameters that are a list", orjson.dumps(v2_request() | {"parameters": []}), ()
    yield (
        "binary_data_output that is a string",
        orjson.dumps(v2_request() | {"parameters": {"binary_data_output": "yes"}}),
        (),
    )
    yield "an input's parameters that are a list", orjson.dumps(v2_request(parameters=[])), ()
    row = struct.pack(f"<{WIDTH}f", *[0.5] * WIDTH)
    yield "raw: no header", raw_request(row)[0], ()
    yield "raw: no header and nothing raw", raw_request(b"")[0], ()
    for name, length in {
        "empty": b"",
        "negative": b"-1",
        "signed": b"+100",
        "spaced": b" 100",
        "text": b"long",
        "a decimal": b"1.5",
        "past the end": b"100000",
        "endless": b"9" * 100_000,
        "not ASCII": "٣".encode(),
        "zero": b"0",
        "within the JSON": b"50",
        "within the tensor": b"200",
    }.items():
        yield f"raw: header {name}", *raw_request(row, length=length)
    body, headers = raw_request(row)
    yield "raw: header twice and different", body, (*headers, ("Inference-Header-Content-Length", b"1"))
    yield "raw: too short", *raw_request(row[:-4])
    yield "raw: too long", *raw_request(row + b"\0")
    yield "raw: size and shape differ", *raw_request(row[:-4], 4 * WIDTH - 4)
    yield "raw: negative size", *raw_request(row, -1)
    yield "raw: huge size", *raw_request(row, 2**62)
    yield "raw: a size that is a string", *raw_request(row, "256")
    yield "raw: a size that is a decimal", *raw_request(row, 256.0)
    yield "raw: a size that is true", *raw_request(row, True)
    yield "raw: data as well", *raw_request(row, data=[0.5] * WIDTH)
    yield "raw: NaN", *raw_request(row[:-4] + struct.pack("<f", float("nan")))
    yield "raw: infinity", *raw_request(struct.pack("<f", float("-inf")) + row[4:])
    yield "raw: huge shape", *raw_request(row, shape=[2**40, WIDTH])
