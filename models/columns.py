"""What the codecs share: JSON values and raw bytes to columns, exactly, and rows to JSON.

A codec decodes a chunk in runs of a few dozen messages. A run is first read at once, in passes that only find out
whether all is as usual; where not, it is read message by message, by code that knows all that is allowed and names
what is wrong. Both give `Share`s, which are stacked by lane when the chunk is through.

The invariant: a value becomes an element only if the datatype holds it as it is (rounding of fractions apart), else
its request is refused. `struct` is that strict, and quick; numpy would let "0.5", true, null and 1e39 through.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, cast

import numpy as np
import orjson

from inferbus.models.base import (
    Array,
    Decoded,
    Group,
    InvalidRequest,
    TensorSpec,
    WrongAnswer,
)

Headers = Sequence[tuple[str, bytes]]
Lane = tuple[tuple[int, ...], ...]
"""Trailing shapes of the inputs, in the signature's order: requests that agree in it stack."""
Part = bytes | memoryview | tuple[str | bytes, ...]
"""Elements of one input in C order: little-endian bytes, or for BYTES the objects themselves."""
Pack = Callable[..., Part]

JSON_ANSWER: Headers = (("content-type", b"application/json"),)

_RUN = 128  # messages read at once: more of them save nothing
_FEW = 8  # after an odd message
_LARGE = 64 << 10  # bytes of a message's tensors from which copying them twice would be felt
_RUN_BYTES = 4 << 20  # a heavier run is read one by one, so that only one message's Python objects are alive
_MOST_COUNTS = 4096  # packers kept per datatype; dropped together beyond, so that no sender can grow the worker
_LONGEST_TEXT = 300
_LONGEST_NAME = 40

_INTS = {"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q"}
_INTS |= {"INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"}
_FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}
_CODES = _INTS | _FLOATS  # as `struct` names them
_KINDS: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    list: "a list",
    dict: "an object",
    type(None): "null",
    type(...): "missing",
}


def refuse(text: str) -> InvalidRequest:
    """The error for the requester, cut to a length that fits a header."""
    return InvalidRequest(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…")


def quote(name: str) -> str:
    """A name from a message, fit to stand in an error: escaped where it does not print, and short."""
    escaped = "".join(map(_printable, name[:_LONGEST_NAME]))[:_LONGEST_NAME]
    return f'"{escaped}"' if len(name) <= _LONGEST_NAME else f'"{escaped}…"'


def _printable(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def kind(value: object) -> str:
    """What a JSON value is, in words; `...` stands for one that is not there."""
    return _KINDS.get(type(value), "something else")


def dims_text(dims: Sequence[int]) -> str:
    """A shape as JSON writes it, short."""
    text = "[" + ",".join(map(str, dims[:_LONGEST_NAME])) + "]"
    return text if len(text) <= 2 * _LONGEST_NAME else text[: 2 * _LONGEST_NAME] + "…"


def index_text(flat: int, dims: Sequence[int]) -> str:
    """The place of a flat index in an array of that shape, as in `[1][3]`."""
    indexes = []
    for dim in reversed(dims):
        flat, index = divmod(flat, dim)
        indexes.append(f"[{index}]")
    return "".join(reversed(indexes))


def expected(datatype: str) -> str:
    """What an element of the datatype is, in words."""
    if datatype in _FLOATS:
        return f"a number ({datatype})"
    return {"BOOL": "a boolean (BOOL)", "BYTES": "a string (BYTES)"}.get(datatype, f"an integer ({datatype})")


def parse_object(body: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a body; of a key that comes twice the last one counts.

    Raises:
        InvalidRequest: It is not JSON, or not an object.
    """
    if not body:
        raise refuse("body is empty, expected a JSON object")
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise refuse(f"body is not JSON: {error.msg} at character {error.pos}") from None
    if type(request) is not dict:
        raise refuse(f"body is {kind(request)}, expected a JSON object")
    return request


def spell_booleans(bodies: Iterable[bytes]) -> list[int]:
    """Places of the bodies in which the letters `true` or `false` stand, as a value or in a string.

    A rare letter is looked for first and from the end: that is a memchr, a fifth of the cost of finding the word.
    """
    return [
        i
        for i, body in enumerate(bodies)
        if (108 in body and body.find(b"false", 0, body.rfind(b"l") + 3) >= 0)
        or (114 in body and body.find(b"true", 0, body.rfind(b"r") + 3) >= 0)
    ]


def element_types(datatype: str) -> set[type]:
    """The types that JSON values of the datatype may have."""
    if datatype in _FLOATS:
        return {float, int}
    if datatype in _INTS:
        return {int}
    return {bool} if datatype == "BOOL" else {str}


class Packers(dict[int, Pack]):
    """Functions that take that many JSON values as arguments and return them as one `Part`.

    They refuse (`struct.error`, `OverflowError`) any other type or range, but for one thing that is the caller's to
    look for: a boolean passes for a number.
    """

    def __init__(self, datatype: str) -> None:
        super().__init__()
        self.datatype = datatype
        self._types = element_types(datatype)

    def __missing__(self, count: int) -> Pack:
        if len(self) >= _MOST_COUNTS:
            self.clear()
        code = _CODES.get(self.datatype)
        self[count] = pack = struct.Struct(f"<{count}{code}").pack if code else self._pack
        return pack

    def _pack(self, *values: Any) -> Part:
        if not self._types.issuperset(map(type, values)):
            raise struct.error("another type")
        return bytes(values) if self.datatype == "BOOL" else values

    def exactly(self, values: list[Any], place: Callable[[int], str]) -> Part:
        """Pack the values, or name the first that does not fit; `place` names an index, as in `data[3]`.

        Raises:
            InvalidRequest: A value is no element of the datatype.
        """
        if not self._types.issuperset(map(type, values)):
            at = next(i for i, value in enumerate(values) if type(value) not in self._types)
            raise refuse(f"{place(at)} is {kind(values[at])}, expected {expected(self.datatype)}")
        try:
            return self[len(values)](*values)
        except (struct.error, OverflowError):
            raise refuse(f"{place(self._misfit(values))} is out of range for {self.datatype}") from None

    def _misfit(self, values: list[Any]) -> int:
        # Halving keeps it in C: looking at the values one by one takes seconds for the largest message.
        low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                struct.pack(f"<{middle - low}{_CODES[self.datatype]}", *values[low:middle])
            except (struct.error, OverflowError):
                high = middle
            else:
                low = middle
        return low


def unnest(nested: object, dims: Sequence[int], place: str) -> list[Any]:
    """Flatten lists nested exactly as `dims` say, row-major.

    Raises:
        InvalidRequest: A list is missing, too short or too long; it is named as in `data[1]`.
    """
    level: list[Any] = [nested]
    for depth, dim in enumerate(dims):
        if not {list}.issuperset(map(type, level)) or not {dim}.issuperset(map(len, level)):
            at = next(i for i, item in enumerate(level) if type(item) is not list or len(item) != dim)
            wrong = level[at]
            found = f"has {len(wrong)} elements" if type(wrong) is list else f"is {kind(wrong)}"
            raise refuse(f"{place}{index_text(at, dims[:depth])} {found}, expected a list of {dim}")
        level = list(chain.from_iterable(level))
    return level


def check_shape(spec: TensorSpec, dims: tuple[int, ...], max_elements: int) -> None:
    """Hold a claimed shape, row axis first, against the signature, before anything is allocated for it.

    Args:
        spec: Of the input.
        dims: As claimed, all of them ints.
        max_elements: At most so many, an empty dimension counted as 1.

    Raises:
        InvalidRequest: The text starts with `shape`.
    """
    if len(dims) != len(spec.shape) or any(
        dim != want and (want != -1 or dim < 0) for dim, want in zip(dims[1:], spec.row_shape, strict=True)
    ):
        raise refuse(f"shape {dims_text(dims)} does not fit, expected {dims_text((-1, *spec.row_shape))}")
    if dims[0] < 1:
        raise refuse(f"shape {dims_text(dims)} has no rows, expected at least 1")
    # Python's ints do not overflow; an empty dimension must not hide a huge one beside it.
    if prod(max(dim, 1) for dim in dims) > max_elements:
        raise refuse(f"shape {dims_text(dims)} is too large, expected at most {max_elements} elements")


@dataclass(slots=True)
class Share:
    """Requests that follow one another in a chunk and share a lane, not yet stacked.

    Attributes:
        lane: See `Lane`.
        rows: Rows of each request.
        asks: What `encode` needs to know of each.
        parts: Per input, in the signature's order, the elements of all of them in any number of parts.
    """

    lane: Lane
    rows: Sequence[int]
    asks: Sequence[object]
    parts: Sequence[Sequence[Part]]


@dataclass(slots=True)
class _Stack:
    """One lane of a chunk while it grows."""

    parts: Sequence[list[Part]]
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    asks: list[object] = field(default_factory=list)


class ChunkDecoder(ABC):
    """`Codec.decode`: a run at once where all is as usual, message by message where not."""

    def __init__(self, inputs: Sequence[TensorSpec], max_elements: int) -> None:
        self.inputs = tuple(inputs)
        self.max_elements = max_elements

    @abstractmethod
    def at_once(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterable[Share]:
        """Read a whole run. Whatever odd values make it raise (`UNUSUAL`), the run is then read exactly."""

    @abstractmethod
    def exact(self, body: bytes, headers: Headers) -> Share:
        """Read one message.

        Raises:
            InvalidRequest: It is wrong; the text says where, and what was expected.
        """

    def decode(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Decoded:
        """See `Codec.decode`."""
        stacks: dict[Lane, _Stack] = {}
        rejects: list[tuple[int, InvalidRequest]] = []
        position = 0
        for share in self._shares(bodies, headers):
            if isinstance(share, InvalidRequest):
                rejects.append((position, share))
                position += 1
                continue
            stack = stacks.get(share.lane)
            if stack is None:
                stack = stacks[share.lane] = _Stack([[] for _ in self.inputs])
            stack.positions.extend(range(position, position + len(share.rows)))
            stack.rows.extend(share.rows)
            stack.asks.extend(share.asks)
            for parts, more in zip(stack.parts, share.parts, strict=True):
                parts.extend(more)
            position += len(share.rows)
        return Decoded([g for lane, stack in stacks.items() for g in self._groups(lane, stack)], rejects)

    def _shares(self, bodies: Sequence[bytes], headers: Sequence[Headers]) -> Iterator[Share | InvalidRequest]:
        """What every message comes to, in order."""
        start, size = 0, _RUN
        while start < len(bodies):
            run = bodies[start : start + size], headers[start : start + size]
            try:
                if sum(map(len, run[0])) > _RUN_BYTES:
                    raise ValueError
                shares = list(self.at_once(*run))
            except UNUSUAL:
                # One odd message slows down the few around it only; then runs grow again.
                if size > _FEW:
                    size = _FEW
                    continue
                yield from map(self._exact_or_reason, *run)
            else:
                yield from shares
                size = min(2 * size, _RUN)
            start += len(run[0])

    def _exact_or_reason(self, body: bytes, headers: Headers) -> Share | InvalidRequest:
        try:
            return self.exact(body, headers)
        except InvalidRequest as reason:
            return reason

    def _groups(self, lane: Lane, stack: _Stack) -> list[Group]:
        """One group, or one for each message where messages are so large that only the batch should be stacked."""
        count = len(stack.positions)
        single = all(len(parts) == count for parts in stack.parts)
        if count == 1 or not single or sum(len(parts[0]) for parts in stack.parts) < _LARGE:
            return [self._group(lane, stack)]
        return [
            self._group(lane, _Stack([[p[i]] for p in stack.parts], [position], [stack.rows[i]], [stack.asks[i]]))
            for i, position in enumerate(stack.positions)
        ]

    def _group(self, lane: Lane, stack: _Stack) -> Group:
        total = sum(stack.rows)
        columns = {
            spec.name: _column(spec, parts, (total, *trailing))
            for spec, parts, trailing in zip(self.inputs, stack.parts, lane, strict=True)
        }
        return Group(stack.positions, stack.rows, columns, stack.asks, lane)


UNUSUAL = (InvalidRequest, struct.error, AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""What `ChunkDecoder.at_once` may raise: its own refusals, and what odd values do to code that expects others."""


def _column(spec: TensorSpec, parts: Sequence[Part], shape: tuple[int, ...]) -> Array:
    """Parts laid end to end as one array of the signature's dtype.

    A single raw tensor is not copied: the array is a read-only view of its message, aligned or not.
    """
    if spec.datatype == "BYTES":
        objects = np.empty(prod(shape), object)
        objects[:] = list(chain.from_iterable(parts))
        return objects.reshape(shape)
    if len(parts) > 1 or type(parts[0]) is bytes:
        return np.ndarray(shape, spec.dtype, bytearray().join(cast("Sequence[bytes]", parts)))
    return np.ndarray(shape, spec.dtype, cast("memoryview", parts[0]))


def raw_elements(spec: TensorSpec, raw: memoryview, count: int) -> Part:
    """The elements of one raw tensor, as many as its shape says; all but BYTES are left where they are.

    Raises:
        InvalidRequest: Too few or too many bytes, a boolean that is not 0 or 1, a number that is not finite.
    """
    if spec.datatype == "BYTES":
        return _raw_strings(raw, count)
    size = count * spec.dtype.itemsize
    if len(raw) != size:
        raise refuse(f"has {len(raw)} raw bytes, expected {size} for its shape and {spec.datatype}")
    if spec.datatype == "BOOL":
        good = np.frombuffer(raw, np.uint8) <= 1 if raw else np.True_
        if not good.all():
            raise refuse(f"raw element {good.argmin()} is not 0 or 1, expected {expected('BOOL')}")
    elif spec.datatype in _FLOATS and raw:
        good = np.isfinite(np.frombuffer(raw, spec.dtype))
        if not good.all():
            raise refuse(f"raw element {good.argmin()} is not finite, expected {expected(spec.datatype)}")
    return raw


def _raw_strings(raw: memoryview, count: int) -> tuple[bytes, ...]:
    strings: list[bytes] = []
    offset = 0
    while offset < len(raw) and len(strings) < count:
        end = offset + 4 + int.from_bytes(raw[offset : offset + 4], "little")
        if end > len(raw):
            raise refuse(f"raw element {len(strings)} ends {end - len(raw)} bytes after its tensor")
        strings.append(bytes(raw[offset + 4 : end]))
        offset = end
    if len(strings) != count or offset != len(raw):
        raise refuse(f"has {len(strings)} raw elements and {len(raw) - offset} bytes more, expected {count}")
    return tuple(strings)


def row_texts(spec: TensorSpec, output: Array) -> list[bytes]:
    """Every row of an output as JSON: its elements, row-major, separated by commas. NaN and infinity are null.

    Raises:
        WrongAnswer: A string is not UTF-8.
    """
    width = prod(output.shape[1:])
    if width == 0:
        return [b""] * len(output)
    if spec.datatype != "BYTES":
        flat = np.ascontiguousarray(output).reshape(len(output), width)
        # Digits and null hold no bracket, so this cuts at the ends of rows and nowhere else.
        return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
    try:
        texts = json_texts([item.decode() if isinstance(item, bytes) else str(item) for item in output.flat])
    except (UnicodeDecodeError, orjson.JSONEncodeError):
        raise WrongAnswer(f"output {spec.name!r} is not UTF-8, so it cannot be written as JSON") from None
    return [b",".join(texts[start : start + width]) for start in range(0, len(texts), width)]


def json_texts(strings: Sequence[str]) -> list[bytes]:
    """Each string as JSON, written in one pass."""
    # A raw newline never stands inside a JSON string, so the indentation is a separator nobody can forge.
    return orjson.dumps(list(strings), option=orjson.OPT_INDENT_2)[4:-2].split(b",\n  ")
