"""What decoding and encoding cost a message, beside the shortest loop that does the same without checks or headers.

    python benchmarks/codec_cost.py

Both take turns in one process; the figure is the lower quartile of CPU time in microseconds a message, and their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import orjson

from inferbus.models.base import ModelInfo, Signature, TensorSpec
from inferbus.models.codecs import codec

ROUNDS = 60
INFO = ModelInfo("digits", "0123456789ab", "onnx", "cpu")
JSON_LENGTH = "inference-header-content-length"
HEADERS = (("inferbus-id", b"7f1c2d"), ("content-type", b"application/json"))
DIGITS = Signature((TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("probabilities", "FP32", (-1, 10)),))
IMAGES = Signature((TensorSpec("x", "FP32", (-1, 3, 224, 224)),), DIGITS.outputs)
TABLE = Signature(
    (*(TensorSpec(f"f{i}", "FP32", (-1, 1)) for i in range(10)), TensorSpec("country", "BYTES", (-1, 1))),
    (TensorSpec("score", "FP32", (-1,)),),
)
rng = np.random.default_rng(0)


def compare(what: str, messages: int, ours: Callable[[], object], bare: Callable[[], object]) -> None:
    """Run both in turns and print a line of the table."""
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for run, times in zip((ours, bare), spent, strict=True):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    own, other = (statistics.quantiles(times, n=4)[0] / messages * 1e6 for times in spent)
    print(f"{what:<44} {own:9.2f} {other:9.2f} {own / other:8.2f}")


def digits(count: int, name: str = "r") -> list[bytes]:
    """Requests of 450 bytes: one row of 64 numbers."""
    rows = np.round(rng.random((count, 64)), 3).tolist()
    return [
        orjson.dumps(
            {"id": f"{name}-{i}", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": row}]}
        )
        for i, row in enumerate(rows)
    ]


def decode_json(what: str, bodies: Sequence[bytes], *, plain: Sequence[bytes] = ()) -> None:
    """V2 JSON against parsing and one array; `plain` stands in where the bare loop cannot read what we can."""
    the = codec("v2", DIGITS, INFO)
    headers = [HEADERS] * len(bodies)

    def bare() -> object:
        return np.array([orjson.loads(body)["inputs"][0]["data"] for body in plain or bodies], "f4")

    compare(what, len(bodies), lambda: the.decode(bodies, headers), bare)


def encode_json(count: int) -> None:
    """V2 JSON against a dump of a dict for each row."""
    the = codec("v2", DIGITS, INFO)
    outputs = {"probabilities": rng.random((count, 10), np.float32)}
    ids = [f"r-{i}" for i in range(count)]

    def bare() -> object:
        return [
            orjson.dumps(
                {
                    "model_name": INFO.name,
                    "model_version": INFO.version,
                    "id": id_,
                    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [1, 10], "data": row}],
                }
            )
            for id_, row in zip(ids, outputs["probabilities"].tolist(), strict=True)
        ]

    compare(f"v2 encode, chunk {count}", count, lambda: the.encode(outputs, [1] * count, [None] * count, ids), bare)


def decode_table(count: int) -> None:
    """Rows of ten numbers and a string."""
    names = [spec.name for spec in TABLE.inputs[:-1]]
    bodies = [
        orjson.dumps(dict(zip(names, row, strict=True)) | {"country": "DE"})
        for row in np.round(rng.random((count, 10)), 3).tolist()
    ]
    the = codec("json", TABLE, INFO)

    def bare() -> object:
        rows = [orjson.loads(body) for body in bodies]
        columns = [np.array([[row[name]] for row in rows], "f4") for name in names]
        return columns, np.array([[row["country"]] for row in rows], object)

    compare(f"json decode, 11 columns, chunk {count}", count, lambda: the.decode(bodies, [HEADERS] * count), bare)


def decode_raw(count: int) -> None:
    """Images of 600 KB behind their JSON, in any alignment but the first's: one is a view, several are one copy."""
    bodies, headers = [], []
    for i in range(count):
        image = rng.random((1, 3, 224, 224), np.float32)
        tensor = {"name": "x", "datatype": "FP32", "shape": list(image.shape)}
        head = orjson.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": image.nbytes}}]})
        head += b" " * (-len(head) % 16 if i == 0 else i % 4)
        bodies.append(head + image.tobytes())
        headers.append((*HEADERS, (JSON_LENGTH, b"%d" % len(head))))
    the = codec("v2", IMAGES, INFO)

    def bare() -> object:
        arrays = [
            np.frombuffer(body, "f4", offset=int(head[-1][1])).reshape(
                orjson.loads(body[: int(head[-1][1])])["inputs"][0]["shape"]
            )
            for body, head in zip(bodies, headers, strict=True)
        ]
        return np.concatenate(arrays) if count > 1 else arrays[0]

    compare(f"v2 raw 600 KB, {count} at a time", count, lambda: the.decode(bodies, headers), bare)


def main() -> None:
    """Print the table."""
    print(f"{'microseconds a message':<44} {'inferbus':>9} {'bare':>9} {'ratio':>8}")
    for count in (256, 1024):
        decode_json(f"v2 decode, chunk {count}", digits(count))
        encode_json(count)
    bodies = digits(1024)
    decode_json("v2 decode, ids that spell `true`", digits(1024, "true"))
    decode_json("v2 decode, nested", [body.replace(b"[0.", b"[[0.").replace(b"]}]", b"]]}]") for body in bodies])
    one = bodies[-1].replace(b'"FP32"', b'"FP64"')
    decode_json("v2 decode, one bad in 100", [one if i % 100 == 50 else body for i, body in enumerate(bodies)])
    decode_table(256)
    for count in (1, 8):
        decode_raw(count)


if __name__ == "__main__":
    main()
