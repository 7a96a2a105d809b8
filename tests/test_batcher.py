"""The batcher, with time as an argument."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from inferbus.connectors.base import Message
from inferbus.models.base import Array
from inferbus.worker.batcher import PATIENCE, Batch, Batcher, Piece


def piece(rows: list[int], arrived: float = 0.0, deadline: float | None = None, name: str = "m") -> Piece:
    messages = [Message(f"{name}{i}", None, b"", (), None, 1, None) for i in range(len(rows))]
    column = owned(range(sum(rows)))
    return Piece(messages, rows, [None] * len(rows), {"x": column}, arrived, 4.0, deadline)


def owned(values: Iterable[float]) -> Array:
    """A column that is no view, so that its memory is held exactly as long as it or a part of it is."""
    return np.array([[value] for value in values], np.float64)


def ids(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [m.id for m in batch.messages]


def test_an_idle_device_takes_what_is_there_at_once() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1, 1]))
    batch = batcher.take(0.0, idle=True)
    assert ids(batch) == ["m0", "m1"]
    assert batch is not None
    assert batch.reason == "idle"


def test_a_busy_device_gets_only_a_batch_that_cannot_grow() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1, 1]))
    assert batcher.take(0.0, idle=False) is None
    batcher.put("lane", piece([1, 1, 1], name="n"))
    batch = batcher.take(0.0, idle=False)
    assert ids(batch) == ["m0", "m1", "n0", "n1"]
    assert batch is not None
    assert batch.reason == "full"
    assert batch.inputs["x"].ravel().tolist() == [0, 1, 0, 1]
    assert len(batcher) == 1


def test_a_delay_holds_a_partial_batch_and_no_longer() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0.5)
    batcher.put("lane", piece([1], arrived=1.0))
    assert batcher.take(1.4, idle=True) is None
    assert batcher.wake_at(idle=True) == 1.5
    batch = batcher.take(1.5, idle=True)
    assert batch is not None
    assert batch.reason == "delay"


def test_draining_does_not_wait_for_the_delay() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0.5)
    batcher.put("lane", piece([1]))
    batch = batcher.take(0.0, idle=True, flush=True)
    assert batch is not None
    assert batch.reason == "drain"


def test_bytes_limit_a_batch_like_rows_do() -> None:
    batcher = Batcher(max_rows=100, max_bytes=12, max_delay=0)
    batcher.put("lane", piece([1] * 7))
    sizes = []
    while (batch := batcher.take(0.0, idle=True)) is not None:
        sizes.append(batch.total_rows)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_batch_is_aligned_wherever_its_one_request_lay_in_its_message(shift: int) -> None:
    message = bytes(shift) + np.arange(6, dtype=np.float32).tobytes()
    alone = piece([1])
    alone.columns = {"x": np.frombuffer(message, np.float32, offset=shift).reshape(1, 6)}
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("lane", alone)
    batch = batcher.take(0.0, idle=True)
    assert batch is not None
    assert batch.inputs["x"].flags.aligned
    assert batch.inputs["x"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_unlike_requests_never_share_a_batch() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("short", piece([1], name="s"))
    batcher.put("long", piece([1], name="l", arrived=0.1))
    assert ids(batcher.take(1.0, idle=True)) == ["s0"]
    assert ids(batcher.take(1.0, idle=True)) == ["l0"]


def test_the_most_urgent_deadline_goes_first_and_nothing_starves() -> None:
    batcher = Batcher(max_rows=1, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1], arrived=0.0, name="patient"))
    batcher.put("lane", piece([1], arrived=0.1, deadline=0.9, name="urgent"))
    batcher.put("lane", piece([1], arrived=0.2, deadline=PATIENCE + 5.0, name="later"))
    order = [ids(batcher.take(0.3, idle=True))[0] for _ in range(3)]
    assert order == ["urgent0", "patient0", "later0"]


def test_a_request_larger_than_a_batch_is_cut_and_put_together_again() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1, 10, 1]))
    whole = None
    seen: list[tuple[str, int]] = []
    while (batch := batcher.take(0.0, idle=True)) is not None:
        row = 0
        for i, (m, rows) in enumerate(zip(batch.messages, batch.rows, strict=True)):
            seen.append((m.id, rows))
            if i in batch.parts:
                assembly, part = batch.parts[i]
                whole = assembly.add(part, {"y": batch.inputs["x"][row : row + rows] * 2}) or whole
            row += rows
    assert Counter(rows for name, rows in seen if name == "m1") == {4: 2, 2: 1}
    assert whole is not None
    assert whole["y"].ravel().tolist() == [2.0 * i for i in range(1, 11)]


def test_a_part_that_fails_fails_its_request_once() -> None:
    batcher = Batcher(max_rows=2, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([6]))
    first, second, third = (batcher.take(0.0, idle=True) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assembly, part = first.parts[0]
    assert second.parts[0][0].fail("model_error", "why")
    assert not third.parts[0][0].fail("model_error", "why")
    assert assembly.add(part, {"y": np.zeros((2, 1))}) is None


def test_a_request_with_a_deadline_is_not_queued_behind_a_busy_device() -> None:
    batcher = Batcher(max_rows=2, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1, 1]))
    batcher.put("lane", piece([1], deadline=9.0, name="urgent"))
    assert batcher.take(0.0, idle=False) is None
    assert ids(batcher.take(0.0, idle=True)) == ["m0", "m1"]
    assert ids(batcher.take(0.0, idle=True)) == ["urgent0"]


def test_expired_requests_come_out_without_a_device() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1], deadline=5.0, name="a"))
    batcher.put("lane", piece([9], deadline=5.0, name="b"))
    batcher.put("lane", piece([1], deadline=6.0, name="c"))
    assert batcher.expire(4.9) == []
    assert sorted(m.id for m in batcher.expire(5.0)) == ["a0", "b0"]
    assert ids(batcher.take(5.0, idle=True)) == ["c0"]
    assert len(batcher) == 0


def test_what_is_discarded_leaves_the_others_with_their_own_rows() -> None:
    batcher = Batcher(max_rows=10, max_bytes=1000, max_delay=0)
    batcher.put("lane", piece([1, 2, 1]))
    discarded = batcher.discard(lambda m: m.id == "m1")
    assert [m.id for m in discarded] == ["m1"]
    batch = batcher.take(0.0, idle=True)
    assert ids(batch) == ["m0", "m2"]
    assert batch is not None
    assert batch.inputs["x"].ravel().tolist() == [0, 3]


def test_what_came_out_is_not_held_until_its_deadline_passes() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    held = []
    for rows in ([1], [9]):  # the second is cut
        urgent = piece(rows, deadline=1e12)
        held.append(weakref.ref(urgent.columns["x"]))
        batcher.put("lane", urgent)
        del urgent
    while batcher.take(0.0, idle=True) is not None:
        pass
    assert [column() for column in held] == [None, None]


class Counted(float):
    """Seconds that count how often they are compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        Counted.compared += 1
        return float(self) < float(other)

    def __le__(self, other: float) -> bool:
        Counted.compared += 1
        return float(self) <= float(other)

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return float.__eq__(self, other)

    __hash__ = float.__hash__


def test_many_requests_that_expire_at_once_are_taken_out_in_one_walk() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    for _ in range(400):
        batcher.put("lane", piece([1], deadline=Counted(5.0)))
    batcher.put("lane", piece([1], deadline=Counted(6.0), name="later"))
    Counted.compared = 0
    assert len(batcher.expire(5.0)) == 400
    assert Counted.compared < 400 * 10
    assert ids(batcher.take(5.0, idle=True)) == ["later0"]


class Shape:
    """The name of a lane, whose end can be seen."""


@pytest.mark.parametrize("end", ["taken", "expired", "discarded"])
def test_a_lane_ends_with_its_last_request(end: str) -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0)
    shape = Shape()
    seen = weakref.ref(shape)
    batcher.put(shape, piece([1, 2], deadline=None if end == "taken" else 5.0))
    del shape
    assert seen() is not None
    if end == "taken":
        batcher.take(0.0, idle=True)
    elif end == "expired":
        batcher.expire(5.0)
    else:
        batcher.discard(lambda _: True)
    assert seen() is None
    assert len(batcher) == 0
    assert batcher.size() == 0


def test_a_delay_that_has_ended_wakes_nobody_while_every_device_is_busy() -> None:
    batcher = Batcher(max_rows=4, max_bytes=1000, max_delay=0.5)
    batcher.put("lane", piece([1], arrived=1.0))
    assert batcher.wake_at(idle=False) == math.inf
    batcher.put("lane", piece([1], arrived=1.0, deadline=9.0))
    assert batcher.wake_at(idle=False) == 9.0
    assert batcher.wake_at(idle=True) == 1.5


def test_a_deadline_that_has_passed_wakes_nobody_again() -> None:
    batcher = Batcher(max_rows=1, max_bytes=1000, max_delay=0)
    for name, deadline in (("taken", 2.0), ("expired", 3.0), ("waiting", 4.0)):
        batcher.put("lane", piece([1], deadline=deadline, name=name))
    assert ids(batcher.take(1.0, idle=True)) == ["taken0"]
    assert batcher.expire(2.0) == []
    assert batcher.wake_at(idle=False) == 3.0
    assert [m.id for m in batcher.expire(3.0)] == ["expired0"]
    assert batcher.wake_at(idle=False) == 4.0


class BatcherMachine(RuleBasedStateMachine):
    """Whatever is put in comes out exactly once, whole, with its own rows, in batches within the limits.

    It expires when its deadline has passed and not before, and is not held once it came out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(max_rows=5, max_bytes=24, max_delay=0.2)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, list[float]] = {}
        self.deadlines: dict[str, float] = {}
        self.columns: list[tuple[list[str], weakref.ref[Array]]] = []

    @rule(rows=st.lists(st.integers(1, 13), min_size=1, max_size=5), lane=st.sampled_from("ab"))
    def put(self, rows: list[int], lane: str) -> None:
        self._put(rows, lane, None)

    @rule(rows=st.integers(1, 13), lane=st.sampled_from("ab"), patience=st.floats(0.01, 3))
    def put_urgent(self, rows: int, lane: str, patience: float) -> None:
        self._put([rows], lane, self.now + patience)

    def _put(self, rows: list[int], lane: str, deadline: float | None) -> None:
        messages = []
        values: list[float] = []
        for n in rows:
            self.count += 1
            own = [self.count + i / 100 for i in range(n)]
            messages.append(Message(f"{lane}{self.count}", None, b"", (), None, 1, None))
            self.waiting[messages[-1].id] = own
            self.deadlines[messages[-1].id] = math.inf if deadline is None else deadline
            values += own
        column = owned(values)
        self.columns.append(([m.id for m in messages], weakref.ref(column)))
        self.batcher.put(lane, Piece(messages, rows, [None] * len(rows), {"x": column}, self.now, 4.0, deadline))

    @rule(idle=st.booleans(), flush=st.booleans())
    def take(self, idle: bool, flush: bool) -> None:
        batch = self.batcher.take(self.now, idle=idle, flush=flush)
        if batch is None:
            return
        assert batch.total_rows <= 5
        assert idle or batch.reason == "full"
        assert len({m.id[0] for m in batch.messages}) == 1
        values = batch.inputs["x"].ravel().tolist()
        assert len(values) == batch.total_rows
        assert sum(count for _, count in batch.arrivals) == len(batch.messages)
        for m, rows in zip(batch.messages, batch.rows, strict=True):
            own, values = values[:rows], values[rows:]
            expected = self.waiting[m.id][:rows]
            assert own == expected
            self.waiting[m.id] = self.waiting[m.id][rows:]
            if not self.waiting[m.id]:
                del self.waiting[m.id]

    @rule(seconds=st.floats(0.01, 1))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = {name for name in self.waiting if self.deadlines[name] <= self.now}
        expired = self.batcher.expire(self.now)
        assert Counter(m.id for m in expired) == Counter(late)
        for name in late:
            del self.waiting[name]
        assert self.batcher.wake_at(idle=False) > self.now

    @rule()
    def devices_take_all_they_can(self) -> None:
        while len(self.batcher) and self.batcher.wake_at(idle=True) <= self.now:
            before = len(self.batcher)
            self.take(idle=True, flush=False)
            assert len(self.batcher) < before

    @rule(flush=st.booleans())
    def everything_comes_out(self, flush: bool) -> None:
        if flush:
            while len(self.batcher):
                self.take(idle=True, flush=True)
        else:
            self.discard("")
        assert not self.waiting
        assert self.batcher.size() == 0

    @rule(lane=st.sampled_from("ab"))
    def discard(self, lane: str) -> None:
        for m in self.batcher.discard(lambda m: m.id.startswith(lane)):
            self.waiting.pop(m.id, None)  # a request in parts comes once for each part

    @invariant()
    def what_waits_is_counted(self) -> None:
        assert len(self.batcher) == sum(map(len, self.waiting.values()))
        assert self.batcher.size() == 4 * len(self.batcher)

    @invariant()
    def what_came_out_is_not_held(self) -> None:
        self.columns = [(names, column) for names, column in self.columns if column() is not None]
        assert all(not self.waiting.keys().isdisjoint(names) for names, _ in self.columns)

    @invariant()
    def no_deadline_is_slept_through(self) -> None:
        earliest = min((self.deadlines[name] for name in self.waiting), default=math.inf)
        assert self.batcher.wake_at(idle=False) <= earliest


TestBatcher = BatcherMachine.TestCase
