"""Parquet as requests: what a row's body is, what it is called, and what no row can be."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from inferbus.connectors.base import Bell, Message, Misconfigured, Unreadable
from inferbus.connectors.file import Files
from inferbus.connectors.job import JobSource
from inferbus.connectors.request_rows import Known, Parquet
from inferbus.connectors.rows import parquet
from inferbus.models.base import ModelInfo, Signature, TensorSpec
from inferbus.models.codecs import codec
from tests.connector_contract import no_drain, records


def stored(table: pa.Table, **how: Any) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(table, file, **how)
    file.seek(0)
    return file


def bodies(table: pa.Table, columns: Sequence[str] | None = None, limit: int = 1000) -> list[bytes]:
    """The body of every row, read so many at a time."""
    file = stored(table)
    rows = Parquet(columns).rows("t.parquet", file, len(file.getvalue()), 0, Known(0, 0))
    found: list[bytes] = []
    with closing(rows):
        while (chunk := rows.read(limit)).count:
            found += chunk.bodies
    return found


def values(column: pa.Array) -> list[Any]:
    return [orjson.loads(body)["x"] for body in bodies(pa.table({"x": column}))]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, -2, 3], pa.int8()),
        pa.array([2**64 - 1, 0], pa.uint64()),
        pa.array([-(2**63), None, 5], pa.int64()),
        pa.array([True, False, None]),
        pa.array([True, False]),
        pa.array([0.5, None, -1e300], pa.float64()),
        pa.array(["", 'quote " and \n line', "grün", None]),
        pa.array(["large"], pa.large_string()),
        pa.array(["a", "b", "a", None]).dictionary_encode(),
        pa.array([[1, 2], [3, 4]]),
        pa.array([[1, 2], [], None, [3]]),
        pa.array([[1.5, None], [2.5, 3.5]]),
        pa.array([["a", "b"], ["c", None]], pa.large_list(pa.string())),
        pa.array([["a"], ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
        pa.array([[[1], [2, 3]], [], [[4]], None]),
        pa.array([[True, False], [False, True]], pa.list_(pa.bool_(), 2)),
        pa.array([[1.5, 2.5], None, [3.5, 4.5]], pa.list_(pa.float32(), 2)),
        pa.array([[[1, 2], [3, 4]]], pa.list_(pa.list_(pa.int16(), 2), 2)),
    ],
    ids=str,
)
def test_a_value_is_told_as_it_stands_in_the_table(column: pa.Array) -> None:
    assert values(column) == column.to_pylist()


def test_what_json_has_no_number_for_is_null() -> None:
    assert values(pa.array([float("nan"), float("inf"), 1.0])) == [None, None, 1.0]
    assert values(pa.array([[float("nan"), 1.0]], pa.list_(pa.float32()))) == [[None, 1.0]]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda kind: st_numpy.arrays(
            kind,
            st.integers(1, 30),
            elements=st_numpy.from_dtype(np.dtype(kind), allow_nan=False, allow_infinity=False),
        )
    )
)
def test_floats_arrive_bit_by_bit(numbers: np.ndarray[Any, Any]) -> None:
    read = np.array(values(pa.array(numbers)), np.float64)
    assert np.array_equal(read.astype(numbers.dtype).view(np.uint8), numbers.view(np.uint8))


def test_a_float32_whose_shortest_spelling_would_be_rounded_twice_arrives_exactly() -> None:
    number = np.float32(7.038531e-26)
    spec = TensorSpec("x", "FP32", (-1,))
    rows = codec("v2", Signature((spec,), (spec,)), ModelInfo("m", "1", "e", "cpu"), of_tables=True)
    (group,) = rows.decode(bodies(pa.table({"x": pa.array([number])})), [()]).groups
    assert group.columns["x"][0] == number


def test_columns_are_the_keys_and_those_of_the_message_are_none() -> None:
    table = pa.table({"b": [1], 'a"': ["x"], "id": ["i"], "key": ["k"], "headers": [[("h", "v")]]})
    headers = pa.array([[("h", "v")]], pa.map_(pa.string(), pa.string()))
    table = table.set_column(4, "headers", headers)
    assert bodies(table) == [b'{"b":1,"a\\"":"x"}']
    assert bodies(table, ["id", "b"]) == [b'{"id":"i","b":1}']


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_every_row_comes_once_however_many_are_asked_for(limit: int) -> None:
    table = pa.table({"x": range(2500), "y": [[i, i + 1] for i in range(2500)]})
    assert bodies(table, limit=limit) == [b'{"x":%d,"y":[%d,%d]}' % (i, i, i + 1) for i in range(2500)]


@pytest.mark.parametrize("row", [0, 1, 99, 100, 101, 250, 299, 300])
def test_reading_goes_on_in_the_middle_of_a_row_group(row: int) -> None:
    file = stored(pa.table({"x": range(300)}), row_group_size=100)
    rows = Parquet().rows("t.parquet", file, 1000, row, Known(0, 0))
    assert rows.left == 300 - row
    found: list[int] = []
    with closing(rows):
        while (chunk := rows.read(64)).count:
            assert list(chunk.rows) == [orjson.loads(body)["x"] for body in chunk.bodies]
            assert chunk.end == Known(chunk.rows[-1] + 1, 1000 * (chunk.rows[-1] + 1) // 300)
            found += chunk.rows
    assert found == list(range(row, 300))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (
            {"when": pa.array([0], pa.timestamp("us"))},
            r'"when" is timestamp\[us\]; expected numbers, booleans, text or',
        ),
        ({"price": [Decimal("1.5")]}, r'"price" is decimal128\(2, 1\); expected'),
        ({"x": [[{"a": 1}]]}, r'"x" is list<.*struct'),
        ({"x": [None]}, '"x" is null; expected'),
        ({"id": ["a"], "key": ["b"]}, "there is no column for the model; expected one for each of its inputs"),
        ({"x": [1], "id": [1.5]}, '"id" is double; expected text or a whole number'),
        ({"x": [1], "key": [1]}, '"key" is int64; expected text or bytes'),
        ({"x": [1], "headers": ["a"]}, '"headers" is string; expected a list of structs `name`, `value`, or a map'),
    ],
)
def test_a_table_that_is_no_requests_is_refused_before_a_row_is_read(
    tmp_path: Path, table: dict[str, Any], why: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    source = JobSource(Files(tmp_path / "in.parquet"), Parquet(), tmp_path / "p")
    with pytest.raises(Misconfigured, match=rf"^file:in.parquet: .*{why}"):
        source.open(Bell(), no_drain)


def test_a_column_that_is_not_there_or_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "in.parquet")
    source = JobSource(Files(tmp_path / "in.parquet"), Parquet(["z"]), tmp_path / "p")
    with pytest.raises(Misconfigured, match=r'column "z" is not there; there are "x", "y"$'):
        source.open(Bell(), no_drain)
    for content in (b"", b"no table at all", b"PAR1"):
        (tmp_path / "in.parquet").write_bytes(content)
        source = JobSource(Files(tmp_path / "in.parquet"), Parquet(), tmp_path / "p")
        with pytest.raises(Misconfigured, match="cannot be read as Parquet; expected a whole file of that format"):
            source.open(Bell(), no_drain)


def test_a_description_longer_than_the_first_look_at_it_is_read_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"column-{i}": [i] for i in range(2000)}), tmp_path / "in.parquet")
    (message,) = received(tmp_path, pq.read_table(tmp_path / "in.parquet"))
    assert orjson.loads(message.body) == {f"column-{i}": i for i in range(2000)}


def test_two_columns_of_one_name_are_refused() -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pytest.raises(Misconfigured, match=r'^t.parquet: column "x" is there twice; expected names that differ$'):
        bodies(twice)


def test_a_later_file_with_other_columns_ends_the_job(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([0], pa.date32())}), tmp_path / "b.parquet")
    source = JobSource(Files(tmp_path), Parquet(), tmp_path / "p")
    source.open(Bell(), no_drain)
    assert len(source.receive(10)) == 1
    with pytest.raises(Misconfigured, match=r'b.parquet: column "x" is date32'):
        source.receive(10)
    source.close()


def test_a_table_that_is_broken_inside_ends_the_job(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(10_000)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    source = JobSource(Files(path), Parquet(), tmp_path / "p")
    source.open(Bell(), no_drain)
    with pytest.raises(Misconfigured, match=r"^file:in.parquet: is broken as Parquet, from about row 1 on$"):
        source.receive(10)
    source.close()


def received(tmp_path: Path, table: pa.Table) -> list[Message]:
    pq.write_table(table, tmp_path / "in.parquet")
    source = JobSource(Files(tmp_path / "in.parquet"), Parquet(), tmp_path / "p")
    source.open(Bell(), no_drain)
    messages = source.receive(100)
    source.close()
    return messages


def test_ids_keys_and_headers_are_the_messages_own(tmp_path: Path) -> None:
    headers = pa.array(
        [[("inferbus-id", "mine"), ("a", "1")], [], None, [("b", None)]], pa.map_(pa.string(), pa.string())
    )
    table = pa.table({"x": [1, 2, 3, 4], "id": [7, None, 8, 9], "key": [b"\xff", None, b"", b"k"], "headers": headers})
    assert [(m.id, m.key, m.headers) for m in received(tmp_path, table)] == [
        ("mine", b"\xff", (("inferbus-id", b"mine"), ("a", b"1"))),
        ("in.parquet-1", None, ()),
        ("8", b"", ()),
        ("9", b"k", (("b", b""),)),
    ]


def test_an_empty_id_is_none(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2], "id": ["", "b"]})
    assert [m.id for m in received(tmp_path, table)] == ["in.parquet-0", "b"]


def test_headers_are_read_as_our_own_tables_have_them(tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    given = records(2)
    for own in given.headers:
        own.append(("inferbus-error", b"{}"))
    (tmp_path / "errors/e.parquet").write_bytes(parquet(given))
    told = pq.read_table(tmp_path / "errors/e.parquet")
    messages = received(tmp_path, pa.table({"x": [1, 2], "headers": told["headers"]}))
    assert [m.headers for m in messages] == [tuple(own[:-1]) for own in given.headers]


def test_bytes_are_text_or_make_their_row_alone_invalid(tmp_path: Path) -> None:
    x = pa.array([b"text", b"\xff\xfe", None, "grün".encode()], pa.binary())
    y = pa.array([[b"a"], [b"b"], [b"\x80"], [b"c"]], pa.list_(pa.binary()))
    messages = received(tmp_path, pa.table({"x": x, "y": y, "key": ["k"] * 4}))
    assert [type(m) for m in messages] == [Message, Unreadable, Unreadable, Message]
    assert [m.body for m in messages] == [b'{"x":"text","y":["a"]}', b"", b"", '{"x":"grün","y":["c"]}'.encode()]
    wrong = [(m.code, m.reason, m.key) for m in messages if isinstance(m, Unreadable)]
    assert wrong == [
        ("invalid_request", '"x" is not UTF-8, expected text', b"k"),
        ("invalid_request", '"y" is not UTF-8, expected text', b"k"),
    ]


def test_a_header_that_is_not_as_it_says_makes_its_row_invalid(tmp_path: Path) -> None:
    told = [
        [{"name": "a", "value": "%%%", "value_encoding": "base64"}],
        [{"name": "a", "value": "b"}],
        [{"name": None}],
    ]
    kind = pa.list_(pa.struct([(name, pa.string()) for name in ("name", "value", "value_encoding")]))
    messages = received(tmp_path, pa.table({"x": [1, 2, 3], "headers": pa.array(told, kind)}))
    assert [isinstance(m, Unreadable) for m in messages] == [True, False, True]


def test_text_that_is_none_harms_its_row_alone_and_a_key_not_even_that(tmp_path: Path) -> None:
    def text(*several: bytes) -> pa.Array:
        return pa.array(several, pa.binary()).view(pa.string())  # as writers do that do not look

    header = pa.StructArray.from_arrays([text(b"a", b"b", b"c"), text(b"1", b"\xff", b"3")], ["name", "value"])
    columns = {
        "x": pa.array([1, 2, 3]),
        "id": text(b"one", b"two", b"\xfe"),
        "key": text(b"\xff", b"k", b"k"),
        "headers": pa.ListArray.from_arrays([0, 1, 2, 3], header),
    }
    messages = received(tmp_path, pa.table(columns))
    assert [(m.id, m.key, m.headers) for m in messages] == [
        ("one", b"\xff", (("a", b"1"),)),
        ("two", b"k", ()),
        ("in.parquet-2", b"k", (("c", b"3"),)),
    ]
    assert [m.reason for m in messages if isinstance(m, Unreadable)] == [
        '"headers" has a value that is not as it says, or no name',
        '"id" is not UTF-8, expected text',
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_table_is_as_large_as_its_rows_and_not_as_its_file(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array([*"abcdefgh", *["y" * 1_000_000] * 500], pa.string())
    pq.write_table(pa.table({"x": texts.cast(kind)}), tmp_path / "in.parquet")
    file = (tmp_path / "in.parquet").open("rb")
    rows = Parquet().rows("t", file, 1, 0, Known(0, 0))
    counts = []
    while chunk := rows.read(1000).count:
        counts.append(chunk)
    rows.close()
    assert sum(counts) == 508
    assert max(counts) < 20


def test_rows_left_are_told_by_the_table_itself(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(100)}), tmp_path / "in.parquet")
    source = JobSource(Files(tmp_path / "in.parquet"), Parquet(), tmp_path / "p")
    source.open(Bell(), no_drain)
    assert source.lag() is None
    source.receive(40)
    assert source.lag() == 60
    source.receive(100)
    assert source.lag() == 0
    assert source.ended()
    source.close()


def test_a_wide_table_is_read_few_rows_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [["y" * 100_000]] * 200}), tmp_path / "in.parquet", use_dictionary=False)
    file = (tmp_path / "in.parquet").open("rb")
    rows: Any = Parquet().rows("t", file, 1, 0, Known(0, 0))
    assert 1 <= rows.read(1000).count < 100
    rows.close()


@pytest.mark.parametrize("format_", ["v2", "raw", "text"])
def test_rows_of_tables_are_read_as_json_and_answered_as_the_format_says(format_: str) -> None:
    inputs = TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "BYTES", (-1,))
    signature = Signature(inputs, (TensorSpec("y", "INT64", (-1,)),))
    info = ModelInfo("m", "1", "e", "cpu")
    rows = codec(format_, signature, info, of_tables=True)
    decoded = rows.decode(bodies(pa.table({"a": [[1.5, 2.5], [3.5, None]], "b": ["x", "y"]})), [(), ()])
    assert [(at, str(why)) for at, why in decoded.rejects] == [(1, '"a"[1] is null, expected a number (FP32)')]
    (group,) = decoded.groups
    answers, _ = rows.encode({"y": np.array([7])}, group.rows, group.asks, ["one"])
    assert orjson.loads(answers[0])["outputs"] == [{"name": "y", "datatype": "INT64", "shape": [1], "data": [7]}]
    assert orjson.loads(answers[0])["id"] == "one"
    (answer,), _ = codec("json", signature, info, of_tables=True).encode({"y": np.array([7])}, [1], [None], ["one"])
    assert orjson.loads(answer)["outputs"] == {"y": 7}
