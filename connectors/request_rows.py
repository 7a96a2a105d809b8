"""Requests as rows of files: how a job reads JSON lines, plain or gzipped, and Parquet.

A line is a request body as it is. A Parquet row becomes a JSON object of its columns, made column by column: a `dict`
for each row takes many times as long.

Invariant: a number arrives as it stood in the table. Floats are written as doubles, which hold every narrower one
exactly and are read back exactly; the shortest spelling of a float32 is not, once it is read as a double and rounded.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast

import numpy as np
import orjson

from inferbus.connectors.base import Headers, Misconfigured, resolve_id
from inferbus.connectors.rows import json_texts, pyarrow

FormatName = Literal["jsonl", "parquet"]

SUFFIXES: Mapping[FormatName, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "parquet": (".parquet",),
}
BUFFER = 2**20  # bytes read at once
CHUNK_BYTES = 8 * 2**20  # of lines that are read at once, about
PIECE = 2**13  # bytes of a line that are read at once
PIECES = 1024  # so many of them
BATCH = 1024, 4 * 2**20  # rows and about as many bytes of a table that are in memory at once
FIRST = 16  # rows of a table that are read to learn how large they are
FOOTER = 2**16  # bytes in which a table's description mostly fits

_NOT_TEXT = b"\xff"  # stands for bytes that are no text; in JSON it never stands for itself


class Known(NamedTuple):
    """Row `row` begins at byte `byte`; behind the last row, at the file's size."""

    row: int
    byte: int


Wrong = tuple[Literal["too_large", "invalid_request"], str]
"""Why a row cannot be a request: the code of its error, and its text."""

Extra = tuple[str | None, bytes | None, Headers, Wrong | None]
"""Of a row: its id, its key, its headers, and why it cannot be a request."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that follow one another in a file.

    Attributes:
        count: How many; 0 at the end of the file.
        rows: Numbers of those that are requests: blank lines are none.
        bodies: Of each of these.
        end: What is known of the place behind them.
        extra: Of each, what a row says beside its body.
    """

    count: int
    rows: Sequence[int]
    bodies: Sequence[bytes]
    end: Known
    extra: Sequence[Extra] | None = None


class Rows(Protocol):
    """The rows of an open file, from one of them on."""

    @property
    def left(self) -> int | None:
        """How many are not read yet, where the file says so."""

    def read(self, limit: int) -> Chunk | None:
        """At most `limit` rows more; None where those to be passed over take longer than a moment: ask again.

        Raises:
            OSError: It cannot be read now.
            Misconfigured: What is in it is broken.
        """

    def close(self) -> None:
        """Close the file."""


class Format(Protocol):
    """How rows are read from files."""

    name: FormatName

    def seekable(self, name: str) -> bool:
        """Whether a row is found by its byte, without anything that stands before it."""

    def check(self, where: str, tail: Callable[[int], bytes]) -> None:
        """See before the first row whether a file can be read; `tail` gives its last bytes.

        Raises:
            Misconfigured: It cannot; says what was expected.
            Unavailable: The file cannot be had.
        """

    def rows(self, where: str, file: BinaryIO, size: int, row: int, known: Known) -> Rows:
        """Begin at a row; of the bytes before `known` only those need be there that the format needs.

        Args:
            where: The file's name, for people.
            file: Open, and from now on the rows' to close.
            size: Bytes of the file.
            row: The first to be read.
            known: A place at or before it.

        Raises:
            Misconfigured: The file cannot be read so; says what was expected.
        """


def format_of(name: str) -> FormatName | None:
    """The format that files of such a name are of."""
    return next((form for form, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


class JsonLines:
    """A request body a line; files called `.gz` are unpacked.

    Args:
        max_message_bytes: A longer line is not read, and told as too large.
    """

    name: FormatName = "jsonl"

    def __init__(self, max_message_bytes: int = 16 * 2**20) -> None:
        self._longest = max_message_bytes

    def seekable(self, name: str) -> bool:
        """See `Format`: all but what is packed."""
        return not name.endswith(".gz")

    def check(self, where: str, tail: Callable[[int], bytes]) -> None:  # noqa: ARG002 - nothing to complain of
        """See `Format`: any line may be a request, so it is enough that the file may be read."""
        tail(1)

    def rows(self, where: str, file: BinaryIO, size: int, row: int, known: Known) -> Rows:
        """See `Format`."""
        if self.seekable(where):
            return Lines(file, row, known, self._longest)
        return PackedLines(where, file, size, row, self._longest)


class Cut:
    """The lines of a file, of any length, a bounded piece at a time.

    Args:
        file: At the beginning of a line.
        longest: Bytes of a line, at most; of a longer one only that it is there.
    """

    def __init__(self, file: io.BufferedIOBase | BinaryIO, longest: int) -> None:
        self.ended = False
        self._pieces = iter(partial(file.readline, PIECE), b"")
        self._longest = longest
        self._begun: list[bytes] = []  # of a line that is not whole yet
        self._size = 0  # bytes of that, also of those that are not kept

    def read(self, limit: int) -> tuple[list[bytes | None], int]:
        """At most `limit` lines more, None for one too long, and their bytes; fewer, even none, where they are long."""
        lines: list[bytes | None] = []
        size = looked = 0
        while len(lines) < limit and looked < CHUNK_BYTES and not self.ended:
            count = min(PIECES, limit - len(lines))
            pieces = list(islice(self._pieces, count))
            self.ended = len(pieces) < count
            sizes = list(map(len, pieces))
            looked += (total := sum(sizes))
            if not self._size and max(sizes, default=0) < PIECE:
                lines += pieces  # the usual case: each is a line
                size += total
            else:
                size += self._join(pieces, lines)
        if self.ended and self._size:
            size += self._size
            lines.append(self._whole())
        return lines, size

    def _join(self, pieces: Sequence[bytes], lines: list[bytes | None]) -> int:
        """Add those that make lines to these; the bytes of them."""
        size = 0
        for piece in pieces:
            self._size += len(piece)
            if self._size <= self._longest:
                self._begun.append(piece)
            else:
                self._begun.clear()
            if piece.endswith(b"\n"):
                size += self._size
                lines.append(self._whole())
        return size

    def _whole(self) -> bytes | None:
        line = None if self._size > self._longest else b"".join(self._begun)
        self._begun.clear()
        self._size = 0
        return line


class Lines:
    """The lines of a file, from one of them on."""

    left: int | None = None

    def __init__(self, file: BinaryIO, row: int, known: Known, longest: int) -> None:
        self._file = file
        file.seek(known.byte)
        self._start(file, row, known, longest)

    def _start(self, file: io.BufferedIOBase | BinaryIO, row: int, known: Known, longest: int) -> None:
        self._cut = Cut(file, longest + len(b"\r\n"))
        self._longest = longest
        self._first = row
        self._end = known

    def read(self, limit: int) -> Chunk | None:
        """See `Rows`."""
        if self._end.row < self._first:
            self._next(self._first - self._end.row)
        if self._end.row < self._first and not self._cut.ended:
            return None
        first = self._end.row
        lines = self._next(limit)
        if not lines and not self._cut.ended:
            return None
        return _requests(lines, first, self._end, self._longest)

    def _next(self, limit: int) -> list[bytes | None]:
        lines, size = self._cut.read(limit)
        self._end = Known(self._end.row + len(lines), self._end.byte + size)
        return lines

    def close(self) -> None:
        """See `Rows`."""
        self._file.close()


class PackedLines(Lines):
    """The lines of a gzipped file. To begin at one all before it are unpacked again."""

    def __init__(self, where: str, file: BinaryIO, size: int, row: int, longest: int) -> None:
        self._where = where
        self._packed = file
        self._size = size
        self._file = cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=file)), BUFFER))
        self._start(self._file, row, Known(0, 0), longest)

    def _next(self, limit: int) -> list[bytes | None]:
        row = self._end.row
        try:
            lines, _ = self._cut.read(limit)
            whole = self._cut.ended or not cast("io.BufferedReader", self._file).peek(1)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise Misconfigured(f"{self._where}: is not whole as gzip, from about row {row + 1} on") from None
        # What is unpacked may be all there is before anybody has looked: the place behind the last row is the size.
        self._end = Known(row + len(lines), self._size if whole else min(self._packed.tell(), self._size - 1))
        return lines

    def close(self) -> None:
        """See `Rows`."""
        super().close()
        self._packed.close()


def _requests(lines: Sequence[bytes | None], first: int, end: Known, longest: int) -> Chunk:
    rows: Sequence[int] = range(first, end.row)
    if not all(lines):  # a line has its end at least
        wrong: Wrong = "too_large", f"the line has more than {longest} bytes (flow.max_message_bytes)"
        extra: list[Extra] = [(None, None, (), wrong if line is None else None) for line in lines]
        kept = [i for i, line in enumerate(lines) if line is None or line.strip()]
        bodies = [(lines[i] or b"").strip() for i in kept]
        return Chunk(len(lines), [first + i for i in kept], bodies, end, [extra[i] for i in kept])
    bodies = list(map(bytes.strip, cast("Sequence[bytes]", lines)))
    if not all(bodies):
        rows = [row for row, body in zip(rows, bodies, strict=True) if body]
        bodies = list(filter(None, bodies))
    return Chunk(len(lines), rows, bodies, end)


# Parquet


class Parquet:
    """A request a row: a JSON object of its columns.

    Columns `id`, `key` and `headers` are the message's own.

    Args:
        columns: Those that are the model's inputs, in their order; None: all but the message's own.

    Raises:
        Misconfigured: pyarrow, which reads Parquet, is not installed.
    """

    name: FormatName = "parquet"

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = columns
        pyarrow()

    def seekable(self, name: str) -> bool:  # noqa: ARG002 - whatever it is called
        """See `Format`: a table is described at its end."""
        return False

    def check(self, where: str, tail: Callable[[int], bytes]) -> None:
        """See `Format`: its columns are such as JSON has."""
        footer = tail(FOOTER)
        length = 8 + int.from_bytes(footer[-8:-4], "little")
        if length > len(footer) and footer.endswith(b"PAR1"):  # else the length is none
            footer = tail(length)
        _layout(where, _opened(where, io.BytesIO(footer)).schema_arrow, self._columns)

    def rows(self, where: str, file: BinaryIO, size: int, row: int, known: Known) -> TableRows:  # noqa: ARG002
        """See `Format`."""
        return TableRows(where, file, size, row, self._columns)


def _opened(where: str, file: BinaryIO) -> Any:
    arrow = pyarrow()
    try:
        return arrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        _pass_on(error)
        raise Misconfigured(f"{where}: cannot be read as Parquet; expected a whole file of that format") from None


def _pass_on(error: Exception) -> None:
    """What the system said is about the disk; without its number it is Arrow's own word for a broken file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


class _Layout(NamedTuple):
    """Which columns are what."""

    inputs: Sequence[str]
    own: Sequence[str]  # of `id`, `key`, `headers`, those that are there


def _layout(where: str, schema: Any, columns: Sequence[str] | None) -> _Layout:
    """What a table's columns are.

    Raises:
        Misconfigured: One is missing, twice there, or of a type that is no input.
    """
    names: Sequence[str] = schema.names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise Misconfigured(f"{where}: column {_quoted(twice[:1])} is there twice; expected names that differ")
    own = [name for name in _OWN if name in names and name not in (columns or ())]
    inputs = [name for name in names if name not in own] if columns is None else list(columns)
    if missing := [name for name in inputs if name not in names]:
        raise Misconfigured(f"{where}: column {_quoted(missing)} is not there; there are {_quoted(names)}")
    if not inputs:
        raise Misconfigured(f"{where}: there is no column for the model; expected one for each of its inputs")
    for name in inputs:
        if not _is_input(schema.field(name).type):
            raise Misconfigured(
                f"{where}: column {_quoted([name])} is {schema.field(name).type}; expected numbers, booleans, text or "
                "lists of these: cast it, or leave it out by naming the others in `columns`"
            )
    for name in own:
        fits, words = _OWN[name]
        if not fits(schema.field(name).type):
            raise Misconfigured(f"{where}: column {_quoted([name])} is {schema.field(name).type}; expected {words}")
    return _Layout(inputs, own)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _is_input(kind: Any) -> bool:
    types = pyarrow().types
    while _is_list(kind):
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any((types.is_boolean(kind), types.is_integer(kind), types.is_floating(kind), _is_text(kind)))


def _is_list(kind: Any) -> bool:
    types = pyarrow().types
    return any((types.is_list(kind), types.is_large_list(kind), types.is_fixed_size_list(kind)))


def _is_text(kind: Any) -> bool:
    types = pyarrow().types
    return any((types.is_string(kind), types.is_large_string(kind), _is_binary(kind)))


def _is_binary(kind: Any) -> bool:
    types = pyarrow().types
    return any((types.is_binary(kind), types.is_large_binary(kind), types.is_fixed_size_binary(kind)))


def _is_id(kind: Any) -> bool:
    types = pyarrow().types
    return any((types.is_integer(kind), types.is_string(kind), types.is_large_string(kind), types.is_null(kind)))


def _is_key(kind: Any) -> bool:
    return _is_text(kind) or bool(pyarrow().types.is_null(kind))


def _is_headers(kind: Any) -> bool:
    types = pyarrow().types
    if types.is_map(kind):
        return _is_text(kind.key_type) and _is_text(kind.item_type)
    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    known = {"name", "value"} <= fields.keys() <= {"name", "value", "value_encoding"}
    return known and all(map(_is_text, fields.values()))


_OWN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_is_id, "text or a whole number"),
    "key": (_is_key, "text or bytes"),
    "headers": (_is_headers, "a list of structs `name`, `value`, or a map of text to text"),
}


class TableRows:
    """The rows of a Parquet file; of a row group that was begun, what is left of it."""

    def __init__(self, where: str, file: BinaryIO, size: int, row: int, columns: Sequence[str] | None) -> None:
        self._where = where
        self._file = file
        self._size = size
        self._table = _opened(where, file)
        self._layout = _layout(where, self._table.schema_arrow, columns)
        self._row = row
        self._total: int = self._table.metadata.num_rows
        if row > self._total:
            raise Misconfigured(
                f"{where}: has {self._total} rows, and {row} are done; expected the file of the last run"
            )
        self._batches = self._from(row)
        self._batch: Any = None

    @property
    def left(self) -> int:
        """See `Rows`."""
        return self._total - self._row

    def _from(self, row: int) -> Iterator[Any]:
        """Record batches, the first of them cut to begin at a row."""
        metadata = self._table.metadata
        groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        first = 0
        while first < len(groups) and row >= groups[first].num_rows:
            row -= groups[first].num_rows
            first += 1
        if first == len(groups):
            return
        yield from self._batches_of(range(first, len(groups)), row)

    def _batches_of(self, groups: Sequence[int], row: int) -> Iterator[Any]:
        """Batches of row groups from a row on, begun again with fewer rows where those are larger than the first.

        What the file says of its size is that of its encoding, in which a long text that repeats is there once.
        """
        count = _fitting(next(self._read(groups, FIRST)))
        while True:
            passed = row
            for batch in self._read(groups, count):
                if passed < batch.num_rows:
                    yield batch.slice(passed)
                    row += batch.num_rows - passed
                passed = max(0, passed - batch.num_rows)
                if 2 * _fitting(batch) <= count:
                    count = _fitting(batch)
                    break
            else:
                return

    def _read(self, groups: Sequence[int], count: int) -> Iterator[Any]:
        columns = [*self._layout.inputs, *self._layout.own]
        batches = self._table.iter_batches(count, row_groups=groups, columns=columns, use_threads=False)
        return map(_decoded, batches)

    def read(self, limit: int) -> Chunk:
        """See `Rows`."""
        arrow = pyarrow()
        try:
            while self._batch is None or not self._batch.num_rows:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    return Chunk(0, (), (), Known(self._row, self._size))
        except (arrow.ArrowException, OSError) as error:
            _pass_on(error)
            raise Misconfigured(f"{self._where}: is broken as Parquet, from about row {self._row + 1} on") from None
        batch, self._batch = self._batch.slice(0, limit), self._batch.slice(limit)
        first = self._row
        self._row += batch.num_rows
        byte = self._size * self._row // self._total
        bodies, wrong = _bodies(batch, self._layout.inputs)
        own = self._layout.own
        extra = _extra(batch, own, wrong) if own or wrong else None
        return Chunk(batch.num_rows, range(first, self._row), bodies, Known(self._row, byte), extra)

    def close(self) -> None:
        """See `Rows`."""
        self._batches = iter(())
        self._table.close(force=True)
        self._file.close()


def _decoded(batch: Any) -> Any:
    """With each value where it stands: its size is that of the rows then."""
    arrow = pyarrow()
    columns = [c.dictionary_decode() if arrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _fitting(batch: Any) -> int:
    """How many rows like these are a batch."""
    most, size = BATCH
    return max(1, min(most, size * len(batch) // max(1, int(batch.nbytes))))


def _bodies(batch: Any, inputs: Sequence[str]) -> tuple[list[bytes], dict[int, str]]:
    """Each row as a JSON object, and the rows that cannot be one: why."""
    fields: list[Any] = []
    wrong: dict[int, str] = {}
    for n, name in enumerate(inputs):
        texts = _texts(batch.column(name))
        if _may_be_no_text(batch.column(name).type):
            wrong |= {
                row: f"{_quoted([name])} is not UTF-8, expected text" for row, t in enumerate(texts) if _NOT_TEXT in t
            }
        fields += repeat((b"," if n else b"{") + orjson.dumps(name) + b":"), texts
    bodies = list(map(b"".join, zip(*fields, repeat(b"}", batch.num_rows), strict=False)))  # some repeat for ever
    for row in wrong:
        bodies[row] = b""
    return bodies, wrong


def _may_be_no_text(kind: Any) -> bool:
    types = pyarrow().types
    while _is_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind)


def _texts(column: Any) -> list[bytes]:
    """Every value as JSON. What is not there, NaN and infinity are null; bytes that are no text are marked."""
    types = pyarrow().types
    if not len(column):
        return []
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_list(column.type):
        return _lists(column)
    if _is_text(column.type):
        return _strings(column)
    if column.null_count:
        return orjson.dumps(column.to_pylist())[1:-1].split(b",")
    return orjson.dumps(_numbers(column), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _numbers(column: Any) -> np.ndarray[Any, Any]:
    numbers = column.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(numbers, np.float64 if numbers.dtype.kind == "f" else None)


def _strings(column: Any) -> list[bytes]:
    arrow = pyarrow()
    try:
        strings = column.to_pylist()
        if _is_binary(column.type):
            strings = [None if item is None else item.decode() for item in strings]
        return json_texts(strings)
    except UnicodeDecodeError:
        return [_string(item) for item in column.cast(arrow.large_binary()).to_pylist()]


def _string(item: bytes | None) -> bytes:
    try:
        return orjson.dumps(None if item is None else item.decode())
    except UnicodeDecodeError:
        return _NOT_TEXT


def _lists(column: Any) -> list[bytes]:
    arrow = pyarrow()
    inner = column.flatten()  # without what lists that are not there might stand for
    lengths = arrow.compute.list_value_length(column)
    counts = lengths.fill_null(0).to_numpy(zero_copy_only=False)
    plain = not (lengths.null_count or inner.null_count or _is_list(inner.type) or _may_be_no_text(inner.type))
    if plain and counts[0] and (counts == counts[0]).all():
        if arrow.types.is_dictionary(inner.type):
            inner = inner.dictionary_decode()
        whole = orjson.dumps(_numbers(inner).reshape(len(counts), -1), option=orjson.OPT_SERIALIZE_NUMPY)
        # Digits, truths and null hold no bracket, so this cuts at the ends of rows and nowhere else.
        return [b"[%b]" % row for row in whole[2:-2].split(b"],[")]
    items = _texts(inner)
    ends = np.cumsum(counts).tolist()
    lists = [b"[%b]" % b",".join(items[start:end]) for start, end in zip(chain((0,), ends), ends, strict=False)]
    if lengths.null_count:
        lists = [text if there else b"null" for text, there in zip(lists, lengths.is_valid().to_pylist(), strict=True)]
    return lists


def _extra(batch: Any, own: Sequence[str], wrong: dict[int, str]) -> list[Extra]:
    """What rows say beside their bodies; headers that cannot be read make a row wrong as well."""
    count = batch.num_rows
    columns = {name: batch.column(name) for name in own}
    keys = _keys(columns["key"]) if "key" in own else [None] * count
    headers: list[Headers] = [()] * count
    if "headers" in own and columns["headers"].null_count < count:
        for row, several in enumerate(_values(columns["headers"])):
            try:
                headers[row] = _headers(several)
            except (ValueError, binascii.Error):
                wrong.setdefault(row, '"headers" has a value that is not as it says, or no name')
    ids = [""] * count
    for row, one in enumerate(_values(columns["id"]) if "id" in own else ()):
        if one is _NOT_TEXT:
            wrong.setdefault(row, '"id" is not UTF-8, expected text')
        elif one is not None:
            ids[row] = str(one)
    return [
        (
            resolve_id(several, id_ or None) if several else id_ or None,
            key,
            several,
            ("invalid_request", wrong[row]) if row in wrong else None,
        )
        for row, (id_, key, several) in enumerate(zip(ids, keys, headers, strict=True))
    ]


def _keys(column: Any) -> list[bytes | None]:
    """Byte for byte, also where text is none."""
    keys: list[bytes | None] = column.cast(pyarrow().large_binary()).to_pylist()
    return keys


def _values(column: Any) -> Sequence[Any]:
    """Each value, `_NOT_TEXT` for one with text that is none."""
    try:
        values: Sequence[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]
    return values


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return _NOT_TEXT


def _headers(several: Any) -> Headers:
    """A row's headers; `ValueError` where one of them is none."""
    if several is _NOT_TEXT:
        raise ValueError
    return tuple(map(_header, several or ()))


def _content(item: str | bytes | None) -> bytes | None:
    return item.encode() if isinstance(item, str) else item


def _header(entry: tuple[Any, Any] | dict[str, Any]) -> tuple[str, bytes]:
    """A header of a map's entry or of a struct; `ValueError` where it is none."""
    name, value, encoding = (
        (*entry, None) if isinstance(entry, tuple) else (entry["name"], entry["value"], entry.get("value_encoding"))
    )
    name = name.decode() if isinstance(name, bytes) else name
    if not name or encoding not in (None, "base64"):
        raise ValueError
    content = _content(value) or b""
    return name, base64.b64decode(content, validate=True) if encoding else content
