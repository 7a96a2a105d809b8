"""Stores: which records come into which object, under which name, and when their requests are settled."""

from __future__ import annotations

import base64
import gzip
import io
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inferbus.connectors.base import Bell, Columns, Message, Records
from inferbus.connectors.memory import PLACE, MemoryBus, MemorySource
from inferbus.connectors.objects import Gathering, Make, ObjectStore
from inferbus.connectors.rows import Format, form


class Desk:
    """A shelf in memory, on which things lie only once `tick` has come by."""

    name = "desk"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.stuck = False
        self._puts: deque[tuple[str, bytes | None, Callable[[], None], Callable[[], bool]]] = deque()

    def open(self, bell: Bell) -> None:
        """Nothing to reach."""

    def put(self, name: str, make: Make, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        self._puts.append((name, make(), done, wanted))

    def tick(self) -> None:
        while self._puts and not self.stuck:
            name, content, done, wanted = self._puts.popleft()
            if wanted():
                self.objects.pop(name, None)
                if content is not None:
                    self.objects[name] = content
            done()

    def healthy(self) -> str | None:
        return None

    def close(self, timeout: float) -> None:  # noqa: ARG002 - nothing lasts
        self.tick()


class Scene:
    """A queue in memory, a store of its outcomes, and a clock that is set by hand."""

    def __init__(self, format: Format = "jsonl", **limits: Any) -> None:  # noqa: A002 - as the setting is called
        self.now = 100.0
        self.bus = MemoryBus()
        self.source = MemorySource(self.bus)
        self.source.open(Bell(), lambda _finished, _budget: None)
        self.desk = Desk()
        given = {"max_rows": 4, "max_bytes": 2**20, "max_age": 10.0, **limits}
        self.gathering = Gathering(self.source, lambda: self.now)
        self.store = ObjectStore(self.gathering, self.desk, form(format, compressed=False), **given)
        self.store.open(Bell())

    def receive(self, count: int) -> list[Message]:
        for i in range(count):
            self.bus.publish(b"request", b"k%d" % i)
        return self.source.receive(count)

    def keep(self, messages: list[Message]) -> None:
        """Predictions for these; each settled once it is kept."""
        self.store.keep(predictions(messages), lambda at: self.source.settle([messages[i] for i in at]))

    def places(self, desk: Desk) -> list[int]:
        """The requests whose records lie there."""
        return sorted(orjson.loads(line)["y"] for content in desk.objects.values() for line in content.splitlines())

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [orjson.loads(line) for line in content.splitlines()] for name, content in self.desk.objects.items()
        }


def predictions(messages: list[Message], outputs: dict[str, np.ndarray[Any, Any]] | None = None) -> Records:
    """One row each: y is the place of its request."""
    places = np.array([PLACE(m.receipt) for m in messages], np.int64) if outputs is None else np.zeros(0, np.int64)
    columns = Columns(outputs or {"y": places}, [1] * len(messages), "m", "7", 1.5)
    return Records(
        messages, [m.key for m in messages], [b""] * len(messages),
        [[("inferbus-id", m.id.encode()), ("inferbus-timing", b"{}")] for m in messages], columns,
    )  # fmt: skip


def test_a_full_object_is_sealed_under_the_place_where_it_begins() -> None:
    scene = Scene()
    scene.keep(scene.receive(4))
    for _ in range(2):
        scene.store.tick()
    assert list(scene.desk.objects) == ["memory/00000000000000000000.jsonl"]
    (rows,) = scene.rows().values()
    assert [row["y"] for row in rows] == [0, 1, 2, 3]
    assert scene.source.settled == [0, 1, 2, 3]


def test_fewer_records_wait_until_they_are_old_or_nothing_more_comes() -> None:
    scene = Scene()
    scene.keep(scene.receive(2))
    scene.store.tick()
    assert scene.desk.objects == {}
    assert scene.store.wake_at() == 110.0
    scene.now = 110.0
    scene.store.tick()
    scene.store.tick()
    assert scene.source.settled == [0, 1]
    scene.keep(scene.receive(1))
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert scene.source.settled == [0, 1, 2]
    assert scene.store.wake_at() == float("inf")


def test_an_object_has_no_gap_where_an_outcome_is_still_to_come() -> None:
    scene = Scene()
    messages = scene.receive(5)
    scene.keep([messages[0], messages[1], messages[3], messages[4]])
    for _ in range(2):
        scene.store.tick()
    assert scene.source.settled == [0, 1]
    scene.keep([messages[2]])
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert [[row["y"] for row in rows] for rows in scene.rows().values()] == [[0, 1], [2, 3, 4]]


def test_a_request_settled_in_another_way_leaves_no_gap() -> None:
    scene = Scene()
    messages = scene.receive(4)
    scene.keep([messages[0], messages[1], messages[3]])
    scene.source.settle([messages[2]])  # it became an error record
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert [row["y"] for rows in scene.rows().values() for row in rows] == [0, 1, 3]
    assert scene.source.inflight()[0] == 0


def test_nothing_is_settled_before_its_object_is_stored() -> None:
    scene = Scene()
    scene.desk.stuck = True
    scene.keep(scene.receive(4))
    for _ in range(3):
        scene.store.tick()
    assert scene.source.settled == []
    scene.desk.stuck = False
    scene.store.tick()
    assert scene.source.settled == [0, 1, 2, 3]


def test_two_stores_make_their_objects_of_one_stretch_and_settle_it_together() -> None:
    scene = Scene()
    other = Desk()
    errors = ObjectStore(
        scene.gathering, other, form("jsonl", compressed=False), max_rows=100, max_bytes=2**20, max_age=99.0
    )
    messages = scene.receive(9)
    for m in messages:
        even = PLACE(m.receipt) % 2 == 0
        (scene.store if even else errors).keep(predictions([m]), lambda _, m=m: scene.source.settle([m]))  # type: ignore[misc]
    other.stuck = True
    for _ in range(3):
        scene.store.tick()
        errors.tick()
    assert scene.source.settled == []  # a restart begins at 0, and must find all of the stretch under that name
    other.stuck = False
    for _ in range(3):
        scene.store.tick()
        errors.tick()
    assert sorted(scene.source.settled) == list(range(8))
    name = "memory/00000000000000000000.jsonl"
    assert [row["y"] for row in scene.rows()[name]] == [0, 2, 4, 6]
    assert [orjson.loads(line)["y"] for line in other.objects[name].splitlines()] == [1, 3, 5, 7]


def test_a_stretch_that_a_life_before_stored_and_did_not_settle_is_not_there_twice() -> None:
    scene = Scene(max_rows=100)
    errors = Desk()
    given = {"max_rows": 100, "max_bytes": 2**20, "max_age": 99.0}

    def serve(count: int) -> None:
        """Receive so many, of which the ninth fails, and store them, as a worker that has just begun."""
        gathering = Gathering(scene.source, lambda: scene.now)
        desks = (scene.desk, errors)
        stores = [ObjectStore(gathering, desk, form("jsonl", compressed=False), **given) for desk in desks]  # type: ignore[arg-type]
        for part in (scene.source.receive(count), scene.source.receive(10 - count)):
            for m in part:
                stores[PLACE(m.receipt) == 8].keep(predictions([m]), lambda _, m=m: settled.append(m))  # type: ignore[misc]
            for store in stores:
                store.drain()
            for _ in range(3):
                for store in stores:
                    store.tick()
            if saving:
                scene.source.settle(settled)

    settled: list[Message] = []
    for _ in range(10):
        scene.bus.publish(b"request")
    saving = False
    serve(10)
    assert scene.places(errors) == [8]
    scene.source.lose()  # killed before anything is settled
    saving = True
    settled.clear()
    serve(5)
    assert scene.places(scene.desk) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert scene.places(errors) == [8]
    assert scene.source.settled == list(range(10))


def test_what_was_given_to_another_worker_is_dropped_and_waited_for_no_longer() -> None:
    scene = Scene()
    told: list[int] = []
    scene.store.keep(predictions(scene.receive(2)), told.extend)
    scene.source.lose()
    scene.store.tick()
    assert told == [0, 1]
    assert scene.desk.objects == {}
    scene.keep(scene.source.receive(2))
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert [row["y"] for rows in scene.rows().values() for row in rows] == [0, 1]


class Loose(MemorySource):
    """A queue whose messages go to others one by one, as when their visibility ends."""

    def __init__(self, bus: MemoryBus) -> None:
        super().__init__(bus)
        self.lost: set[int] = set()

    def stream(self, message: Message) -> None:  # type: ignore[override]
        """Each for itself."""

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        return f"loose/{PLACE(messages[0].receipt)}", messages

    def void(self, message: Message) -> bool:
        return PLACE(message.receipt) in self.lost or super().void(message)


@pytest.mark.parametrize("lost", [{0}, {1, 2}, {3}, {0, 1, 2, 3}])
def test_a_message_that_went_to_another_worker_takes_no_other_with_it(lost: set[int]) -> None:
    scene = Scene(max_rows=10)
    source = scene.source = Loose(scene.bus)
    gathering = Gathering(source, lambda: scene.now)
    given = {"max_rows": 10, "max_bytes": 2**20, "max_age": 10.0}
    scene.store = ObjectStore(gathering, scene.desk, form("jsonl", compressed=False), **given)  # type: ignore[arg-type]
    told: list[int] = []
    messages = scene.receive(4)
    scene.store.keep(predictions(messages[:2]), told.extend)
    scene.store.keep(predictions(messages[2:]), lambda at: told.extend(2 + i for i in at))
    source.lost = lost
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert sorted(told) == [0, 1, 2, 3]  # nobody waits for the lost ones either
    assert [row["y"] for rows in scene.rows().values() for row in rows] == [i for i in range(4) if i not in lost]
    assert scene.store.wake_at() == float("inf")


def test_an_object_that_could_not_be_stored_in_time_is_not_stored_over_that_of_the_next_owner() -> None:
    scene = Scene()
    scene.desk.stuck = True
    scene.keep(scene.receive(4))
    scene.store.tick()
    scene.source.lose()
    scene.desk.stuck = False
    scene.store.tick()
    assert scene.desk.objects == {}
    assert scene.source.settled == []


def test_an_object_ends_before_it_gets_too_large() -> None:
    scene = Scene(max_rows=1000, max_bytes=1000)
    scene.keep(scene.receive(12))  # some 208 bytes each
    for _ in range(9):
        scene.store.tick()
    assert [len(rows) for rows in scene.rows().values()] == [4, 4]
    scene.store.drain()
    for _ in range(2):
        scene.store.tick()
    assert [len(rows) for rows in scene.rows().values()] == [4, 4, 4]


def message(key: bytes | None = b"k", body: bytes = b"") -> Message:
    return Message("some-id", key, body, (), None, 1, (0, 0))


def test_a_prediction_is_a_row_for_each_row_of_its_request() -> None:
    outputs = {"p": np.array([[0.5, 0.25], [1.0, 0.0], [0.0, 2.0]], np.float32), "id": np.array([1, 2, 3])}
    columns = Columns(outputs, [2, 1], "digits", "3", 1_700_000_000.25)
    headers: list[list[tuple[str, bytes]]] = [[("inferbus-model", b"digits@3"), ("traceparent", b"00-1")], []]
    records = Records([message(), message(b"\xff")], [b"k", b"\xff"], [b"", b""], headers, columns)
    shared = {"id": "some-id", "status": "ok", "model": "digits", "version": "3", "time": "2023-11-14T22:13:20.250Z"}
    first = {**shared, "key": "k", "headers": [{"name": "traceparent", "value": "00-1"}]}
    second = {**shared, "key": "/w==", "key_encoding": "base64", "headers": []}
    lines = form("jsonl", compressed=False).encode(records).splitlines()
    assert [orjson.loads(line) for line in lines] == [
        {**first, "row": 0, "p": [0.5, 0.25], "output_id": 1},
        {**first, "row": 1, "p": [1.0, 0.0], "output_id": 2},
        {**second, "row": 0, "p": [0.0, 2.0], "output_id": 3},
    ]
    assert gzip.decompress(form("jsonl", compressed=True).encode(records)).splitlines() == lines
    table = pq.read_table(io.BytesIO(form("parquet", compressed=False).encode(records)))
    assert table.schema.field("p").type == pa.list_(pa.float32())
    assert table.schema.field("time").type == pa.timestamp("us", tz="UTC")
    assert table["p"].to_pylist() == [[0.5, 0.25], [1.0, 0.0], [0.0, 2.0]]
    assert table["output_id"].to_pylist() == [1, 2, 3]
    assert table["row"].to_pylist() == [0, 1, 0]
    assert table["key"].to_pylist() == ["k", "k", "/w=="]
    assert table["key_encoding"].to_pylist() == [None, None, "base64"]
    assert table["headers"].to_pylist()[0] == [{"name": "traceparent", "value": "00-1", "value_encoding": None}]


@pytest.mark.parametrize(
    "column",
    [
        np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        np.array([True, False]),
        np.array([1.5, -2.0], np.float16),
        np.zeros((2, 0), np.float32),
        np.array([["a", "é"], ["", "b"]], object),
        np.array([2**64 - 1, 0], np.uint64),
    ],
    ids=lambda column: f"{column.dtype}{list(column.shape)}",
)
def test_outputs_keep_their_values_and_shape_in_both_formats(column: np.ndarray[Any, Any]) -> None:
    records = Records([message()] * 2, [None] * 2, [b""] * 2, [[], []], Columns({"y": column}, [1, 1], "m", "1", 0.0))
    lines = form("jsonl", compressed=False).encode(records).splitlines()
    assert [orjson.loads(line)["y"] for line in lines] == column.tolist()
    table = pq.read_table(io.BytesIO(form("parquet", compressed=False).encode(records)))
    assert table["y"].to_pylist() == column.tolist()


def test_an_error_record_is_a_row_with_the_request_as_it_came() -> None:
    error = {"id": "some-id", "code": "invalid_request", "message": "no", "stage": "decode", "source": "memory:r/1",
             "attempts": 2, "model": "m@1", "time": 1.25}  # fmt: skip
    told = ("inferbus-error", orjson.dumps(error))
    omitted = ("inferbus-error", orjson.dumps({**error, "body": "omitted"}))
    bodies = [b"{oops", b"\x00\xff", b""]
    headers: list[list[tuple[str, bytes]]] = [[("a", b"1"), ("a", b"\xff"), told], [told], [omitted]]
    records = Records([message()] * 3, [b"k", None, None], bodies, headers)
    rows = [orjson.loads(line) for line in form("jsonl", compressed=False).encode(records).splitlines()]
    assert rows[0] == {
        "id": "some-id",
        "key": "k",
        "headers": [{"name": "a", "value": "1"}, {"name": "a", "value": "/w==", "value_encoding": "base64"}],
        "error": error,
        "body": "{oops",
    }
    assert base64.b64decode(rows[1]["body"]) == b"\x00\xff"
    assert rows[1]["body_encoding"] == "base64"
    assert rows[2]["body"] is None
    assert rows[2]["error"]["body"] == "omitted"
    table = pq.read_table(io.BytesIO(form("parquet", compressed=False).encode(records)))
    assert table["error"].to_pylist()[0] == error
    assert table["body"].to_pylist() == ["{oops", "AP8=", None]
    assert table["body_encoding"].to_pylist() == [None, "base64", None]
