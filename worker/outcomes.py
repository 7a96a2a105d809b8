"""Outcomes as records: what a prediction and an error look like on the wire.

Every record answers exactly one delivery and carries its key and id; nothing of another request, of the model's own
words, or of this machine ever gets into one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import orjson

from inferbus.connectors.base import Columns, Message, Records
from inferbus.models.base import ModelInfo

Code = Literal[
    "invalid_request",
    "too_large",
    "expired",
    "unknown_model",
    "model_error",
    "non_finite_output",
    "poison",
    "internal",
]
Stage = Literal["receive", "decode", "predict", "encode", "write"]

Fault = tuple[Message, Code, Stage, str]
"""A delivery that ends as an error: what, why, where, and the sentence its requester reads."""

LONGEST = 1024
"""Of an id in characters, of a key in bytes, where nothing else is left to leave out."""

SENTENCE = 300
"""Characters of the message, likewise."""

CARRIED = frozenset({"traceparent", "tracestate", "correlation_id"})
"""Request headers that go on into the prediction."""


def predictions(
    messages: Sequence[Message],
    bodies: Sequence[bytes],
    formats: Sequence[Sequence[tuple[str, bytes]]],
    shared: Sequence[tuple[str, bytes]],
) -> Records:
    """Predictions as records.

    Args:
        messages: The requests answered.
        bodies: One encoded answer each.
        formats: Per answer, the headers its encoding needs, `content-type` first.
        shared: Headers equal for the whole batch.
    """
    headers = [[("inferbus-id", m.id.encode()), *shared, *form] for m, form in zip(messages, formats, strict=True)]
    for own, m in zip(headers, messages, strict=True):
        if m.headers:
            own += [h for h in m.headers if h[0] in CARRIED]
    return Records(messages, [m.key for m in messages], bodies, headers)


def rows(messages: Sequence[Message], columns: Columns, shared: Sequence[tuple[str, bytes]]) -> Records:
    """Predictions that nobody but stores takes: without bodies, and with headers only where they say something more.

    Args:
        messages: The requests answered.
        columns: What the model answered them.
        shared: Headers equal for the whole batch.
    """
    same = list(shared)
    headers = [[*shared, *(h for h in m.headers if h[0] in CARRIED)] if m.headers else same for m in messages]
    return Records(messages, [m.key for m in messages], [b""] * len(messages), headers, columns)


def shared_headers(info: ModelInfo, batch: str, rows: int, seconds: float, worker: str) -> list[tuple[str, bytes]]:
    """The headers every prediction of a batch carries."""
    timing = {"batch": batch, "rows": rows, "predict_ms": round(seconds * 1000, 3), "worker": worker}
    return [
        ("inferbus-status", b"ok"),
        ("inferbus-model", f"{info.name}@{info.version}".encode()),
        ("inferbus-timing", orjson.dumps(timing)),
    ]


def errors(
    faults: Sequence[Fault],
    info: ModelInfo,
    locate: Callable[[Message], str],
    *,
    now: float | None = None,
) -> Records:
    """Error records: the request byte for byte, and one header that says what went wrong.

    Args:
        faults: What failed.
        info: The model the requests were for.
        locate: Where a message lies on the bus.
        now: Unix seconds; by default the wall clock.
    """
    at = time.time() if now is None else now
    model = f"{info.name}@{info.version}"
    headers: list[list[tuple[str, bytes]]] = []
    bodies: list[bytes] = []
    for message, code, stage, text in faults:
        error = {
            "id": message.id,
            "code": code,
            "message": text,
            "stage": stage,
            "source": locate(message),
            "attempts": message.attempts,
            "model": model,
            "time": round(at, 3),
        }
        body = message.fail()
        if body is None:
            error["body"] = "omitted"
        bodies.append(body or b"")
        own = [h for h in message.headers if h[0] != "inferbus-error"]
        headers.append([*own, ("inferbus-error", orjson.dumps(error))])
    messages = [fault[0] for fault in faults]
    return Records(messages, [m.key for m in messages], bodies, headers)


def without_body(records: Records) -> Records:
    """Error records without the body of the request; its headers stay."""
    headers = [[*rest, (name, _amended(value))] for *rest, (name, value) in records.headers]
    return Records(records.messages, records.keys, [b""] * len(records), headers)


def bare(records: Records) -> Records:
    """Error records that say what went wrong and no more, with id, key and message cut; `source` leads to the rest."""
    keys = [key and key[:LONGEST] for key in records.keys]
    headers = [[(name, _amended(value, id=LONGEST, message=SENTENCE))] for *_, (name, value) in records.headers]
    return Records(records.messages, keys, [b""] * len(records), headers)


SMALLER: tuple[Callable[[Records], Records], ...] = (without_body, bare)
"""What is done, one after the other, to error records that a sink refuses for their size."""


def _amended(error: bytes, **longest: int) -> bytes:
    """The error of a record that goes without the request, with these fields cut to so many characters."""
    fields = orjson.loads(error)
    cut = {name: fields[name][:most] for name, most in longest.items()}
    return orjson.dumps({**fields, **cut, "body": "omitted"})
