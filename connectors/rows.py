"""Outcomes as rows of files: what an analyst finds in an object.

A prediction is a row for each row of its request: `id`, `row`, `key`, `status`, `model`, `version`, `time`, `headers`,
and a field for each output. An error record is a row: `id`, `key`, `headers`, `error`, `body`. What is not UTF-8 is
base64, and a field beside it says so: `key_encoding`, `body_encoding`.

Serves the stores. Invariant: an object holds nothing of a request but its own rows, and says nothing that the records
on a bus do not say.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import orjson

from inferbus.connectors.base import Columns, Misconfigured, Records

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["jsonl", "parquet"]

FIXED = ("id", "row", "key", "key_encoding", "status", "model", "version", "time", "headers")
"""Names of a prediction's own fields; an output called like one of them becomes `output_<name>`."""

_TOLD = frozenset(
    {"inferbus-id", "inferbus-status", "inferbus-model", "content-type"}
)  # by a field, or meant for a body


class Form(NamedTuple):
    """How objects are written."""

    suffix: str
    encode: Callable[[Records], bytes]


def form(format: Format, *, compressed: bool) -> Form:  # noqa: A002 - as the setting is called
    """The form of objects: JSON lines, gzipped if `compressed`, or Parquet, which always is.

    Raises:
        Misconfigured: pyarrow, which writes Parquet, is not installed.
    """
    if format == "parquet":
        pyarrow()
        return Form(".parquet", parquet)
    return Form(".jsonl.gz", lambda records: gzip.compress(jsonl(records), 5)) if compressed else Form(".jsonl", jsonl)


def jsonl(records: Records) -> bytes:
    """The records as JSON, a line for each row."""
    if records.columns is not None:
        return b"".join(_prediction_lines(records, records.columns))
    return b"".join([orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in _errors(records)])


def text(content: bytes | None, name: str) -> dict[str, str | None]:
    """A field for some bytes, and one for their encoding where they are not UTF-8."""
    if content is None:
        return {name: None}
    try:
        return {name: content.decode()}
    except UnicodeDecodeError:
        return {name: base64.b64encode(content).decode(), f"{name}_encoding": "base64"}


def _headers(headers: Iterable[tuple[str, bytes]]) -> list[dict[str, str | None]]:
    return [{"name": name, **text(value, "value")} for name, value in headers if name not in _TOLD]


def _prediction_lines(records: Records, columns: Columns) -> Iterator[bytes]:
    """Written column by column: a `dict` for each row takes five times as long."""
    moment = datetime.fromtimestamp(columns.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    shared = {"status": "ok", "model": columns.model, "version": columns.version, "time": moment}
    # Requests of one batch mostly share one list of headers.
    told = {id(headers): orjson.dumps(_headers(headers)) for headers in {id(h): h for h in records.headers}.values()}
    ids = json_texts([m.id for m in records.messages])
    keys = [_key(key) for key in records.keys]
    headers = [told[id(own)] for own in records.headers]
    numbers: Iterable[bytes] = repeat(b',"row":0,')
    if max(columns.rows) > 1:
        which = [i for i, count in enumerate(columns.rows) for _ in range(count)]
        ids, keys, headers = ([texts[i] for i in which] for texts in (ids, keys, headers))
        numbers = [b',"row":%d,' % row for count in columns.rows for row in range(count)]
    fields = [
        repeat(b'{"id":'),
        ids,
        numbers,
        keys,
        repeat(b"," + orjson.dumps(shared)[1:-1] + b',"headers":'),
        headers,
    ]
    for name, column in columns.outputs.items():
        fields += repeat(b"," + orjson.dumps(field(name)) + b":"), _row_texts(column)
    return map(b"".join, zip(*fields, repeat(b"}\n"), strict=False))  # some repeat for ever


def _key(key: bytes | None) -> bytes:
    return b'"key":null' if key is None else orjson.dumps(text(key, "key"))[1:-1]


def json_texts(strings: Sequence[str | None]) -> list[bytes]:
    """Each string as JSON, written in one pass."""
    # A raw newline never stands inside a JSON string, so the indentation is a separator nobody can forge.
    return orjson.dumps(strings, option=orjson.OPT_INDENT_2)[4:-2].split(b",\n  ")


def _row_texts(column: np.ndarray[Any, Any]) -> list[bytes]:
    """Every row of an output as JSON, without the batch axis; NaN and infinity are null."""
    if column.dtype == object:
        return [orjson.dumps(row) for row in _decoded(column).tolist()]
    column = np.ascontiguousarray(column)
    if column.ndim > 2 or not column.size:
        return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in column]
    whole = orjson.dumps(column, option=orjson.OPT_SERIALIZE_NUMPY)
    if column.ndim == 1:
        return whole[1:-1].split(b",")
    # Digits and null hold no bracket, so this cuts at the ends of rows and nowhere else.
    return [b"[%b]" % row for row in whole[2:-2].split(b"],[")]


def field(output: str) -> str:
    """The name of an output's field."""
    return f"output_{output}" if output in FIXED else output


def _decoded(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """BYTES as text."""
    decoded = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in column.flat]
    return np.array(decoded, object).reshape(column.shape)


def _errors(records: Records) -> Iterator[dict[str, Any]]:
    for m, key, body, headers in zip(records.messages, records.keys, records.bodies, records.headers, strict=True):
        error = orjson.loads(dict(headers)["inferbus-error"])
        own = [{"name": name, **text(value, "value")} for name, value in headers if name != "inferbus-error"]
        content = {"body": None} if error.get("body") == "omitted" else text(body, "body")
        yield {"id": m.id, **text(key, "key"), "headers": own, "error": error, **content}


# Parquet


def pyarrow() -> Any:
    """The library; `Misconfigured` where it is not installed."""
    try:
        import pyarrow.compute  # noqa: PLC0415 - an extra, and slow to import
        import pyarrow.parquet  # noqa: PLC0415
    except ModuleNotFoundError:
        raise Misconfigured("parquet: its library is not installed: pip install 'inferbus[parquet]'") from None
    return pyarrow


def parquet(records: Records) -> bytes:
    """The records as one Parquet file, zstd inside."""
    arrow = pyarrow()
    table = _error_table(records) if records.columns is None else _prediction_table(records, records.columns)
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _error_table(records: Records) -> pa.Table:
    arrow = pyarrow()
    string = arrow.string()
    error = [("id", string), ("code", string), ("message", string), ("stage", string), ("source", string),
             ("attempts", arrow.int64()), ("model", string), ("time", arrow.float64())]  # fmt: skip
    schema = arrow.schema(
        [("id", string), ("key", string), ("key_encoding", string), ("headers", _header_type()),
         ("error", arrow.struct(error)), ("body", string), ("body_encoding", string)]
    )  # fmt: skip
    return arrow.Table.from_pylist(list(_errors(records)), schema=schema)


def _header_type() -> pa.DataType:
    arrow = pyarrow()
    string = arrow.string()
    return arrow.list_(arrow.struct([("name", string), ("value", string), ("value_encoding", string)]))


def _prediction_table(records: Records, columns: Columns) -> pa.Table:
    arrow = pyarrow()
    count = sum(columns.rows)
    which = np.repeat(np.arange(len(records)), columns.rows)
    keys = [text(key, "key") for key in records.keys]
    moment = arrow.scalar(round(columns.time * 1e6), arrow.timestamp("us", tz="UTC"))

    def each(values: list[Any], kind: pa.DataType) -> pa.Array:
        return arrow.array(values, kind).take(arrow.array(which))

    own = {
        "id": each([m.id for m in records.messages], arrow.string()),
        "row": arrow.array([row for n in columns.rows for row in range(n)], arrow.int64()),
        "key": each([key["key"] for key in keys], arrow.string()),
        "key_encoding": each([key.get("key_encoding") for key in keys], arrow.string()),
        "status": arrow.repeat("ok", count),
        "model": arrow.repeat(columns.model, count),
        "version": arrow.repeat(columns.version, count),
        "time": arrow.repeat(moment, count),
        "headers": each([_headers(headers) for headers in records.headers], _header_type()),
    }
    outputs = {field(name): _nested(column) for name, column in columns.outputs.items()}
    return arrow.table({**own, **outputs})


def _nested(column: np.ndarray[Any, Any]) -> pa.Array:
    """An output as a column: its rows without the batch axis, lists of lists where they have dimensions."""
    arrow = pyarrow()
    flat = column.reshape(-1)
    if column.dtype == object:
        as_text = all(isinstance(item, str) for item in flat)
        array = arrow.array(flat.tolist() if as_text else [_bytes(item) for item in flat])
    else:
        array = arrow.array(flat)
    for axis in range(column.ndim - 1, 0, -1):
        lists = int(np.prod(column.shape[:axis]))
        array = arrow.ListArray.from_arrays(np.arange(lists + 1, dtype=np.int32) * column.shape[axis], array)
    return array


def _bytes(item: str | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.encode()
