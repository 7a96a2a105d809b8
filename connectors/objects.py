"""Stores: records gathered into objects of many, each request settled once its object is complete.

Between delivery and a folder or a bucket. Rows wait in heaps, one for each stream of the source (a Kafka partition, a
file, a whole queue). A heap becomes an object when it has rows or bytes enough, is old enough, or nothing more will
come.

Invariant: an object from a stream with an order is a run of it without gaps, and its name is where the stream would
begin again after a crash, which the source vouches for: what is delivered again overwrites, and no row is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from math import inf
from typing import Protocol

from inferbus.connectors.base import Bell, Kept, Message, Records, Source
from inferbus.connectors.rows import Form

LOOK = 0.02  # seconds between looks at a heap whose object must wait for the source's confirmation
ROW = 200  # bytes a row takes beside its outputs: names, headers, structure


class Shelf(Protocol):
    """Where objects are put: a folder, a bucket. Works on threads of its own, and tries again what fails."""

    name: str

    def open(self, bell: Bell) -> None:
        """As of a sink."""

    def put(self, name: str, make: Callable[[], bytes], done: Callable[[], None]) -> None:
        """Store what `make` answers under a name, durably, in place of what had it; then, from `tick`, call `done`.

        `make` is called on another thread.
        """

    def tick(self) -> None:
        """Call the `done` of what is durable."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self, timeout: float) -> None:
        """Give what is under way so many seconds, then drop it. Idempotent."""


@dataclass(slots=True)
class _Share:
    """Records of one write, or those of them that are of one stream."""

    records: Records
    positions: Sequence[int]
    kept: Kept

    def messages(self) -> Sequence[Message]:
        """The requests they answer."""
        if len(self.positions) == len(self.records):
            return self.records.messages
        return [self.records.messages[i] for i in self.positions]

    def taken(self) -> Records:
        """These records alone."""
        return self.records if len(self.positions) == len(self.records) else self.records.take(self.positions)


@dataclass(slots=True)
class _Heap:
    since: float
    shares: list[_Share] = field(default_factory=list)
    count: int = 0
    size: float = 0.0

    def add(self, share: _Share, size: float) -> None:
        self.shares.append(share)
        self.count += len(share.positions)
        self.size += size * len(share.positions)


class ObjectStore:
    """A `Store` on a shelf.

    Args:
        shelf: Where objects go.
        form: How they are written.
        source: Whose messages the records answer.
        max_rows: Requests in an object, at most.
        max_bytes: About so many bytes of rows, before compression.
        max_age: Seconds a record waits for others, at most.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        shelf: Shelf,
        form: Form,
        source: Source,
        *,
        max_rows: int,
        max_bytes: int,
        max_age: float,
        clock: Callable[[], float],
    ) -> None:
        self.name = shelf.name
        self._shelf = shelf
        self._form = form
        self._source = source
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._clock = clock
        self._heaps: dict[Hashable, _Heap] = {}
        self._hurry = False
        self._opened = self._closed = False

    def open(self, bell: Bell) -> None:
        """Reach the shelf and see that it can be written."""
        self._shelf.open(bell)
        self._opened = True

    def keep(self, records: Records, kept: Kept) -> None:
        """Put records on the heaps of their streams."""
        now = self._clock()
        size = ROW + _bytes(records) / max(1, len(records))
        streams = list(map(self._source.stream, records.messages))
        parts: dict[Hashable, Sequence[int]] = {streams[0]: range(len(streams))}
        if streams.count(streams[0]) < len(streams):
            parts = {name: [i for i, own in enumerate(streams) if own == name] for name in dict.fromkeys(streams)}
        for name, positions in parts.items():
            self._heaps.setdefault(name, _Heap(now)).add(_Share(records, positions, kept), size)

    def drain(self) -> None:
        """Complete at the next tick what can be completed."""
        self._hurry = True

    def tick(self) -> None:
        """Tell of objects that are complete, and seal what is due."""
        self._shelf.tick()
        now = self._clock()
        hurry, self._hurry = self._hurry, False
        for name, heap in list(self._heaps.items()):
            if self._source.void(heap.shares[0].messages()[0]):
                del self._heaps[name]
                _tell(heap.shares)  # they come again elsewhere; here nothing waits for them any more
            elif hurry or self._due(heap, now):
                self._seal(name, heap, now)

    def _due(self, heap: _Heap, now: float) -> bool:
        return heap.count >= self._max_rows or heap.size >= self._max_bytes or now >= heap.since + self._max_age

    def _seal(self, stream: Hashable, heap: _Heap, now: float) -> None:
        """Make an object of the run at the front of the heap; the rest of it waits on."""
        messages = [m for share in heap.shares for m in share.messages()]
        found = self._source.run(messages)
        if found is None or not found[1]:
            return
        name, run = found
        size = heap.size / heap.count
        most = max(1, min(self._max_rows, int(self._max_bytes / size)))
        # Mostly the heap is the run, and writes need not be cut; to look at each message takes twice the time.
        sealed, left = _whole(heap.shares, most) if run is messages else ([], heap.shares)
        if not sealed:
            sealed, left = _cut(heap.shares, run[:most])
        del self._heaps[stream]
        if left:
            rest = self._heaps[stream] = _Heap(now)
            for share in left:
                rest.add(share, size)
        records = Records.joined([share.taken() for share in sealed])
        self._shelf.put(name + self._form.suffix, lambda: self._form.encode(records), lambda: _tell(sealed))

    def wake_at(self) -> float:
        """When the oldest heap is due; soon, while one is that could not be sealed."""
        now = self._clock()
        due = (now + LOOK if self._due(heap, now) else heap.since + self._max_age for heap in self._heaps.values())
        return min(due, default=inf)

    def healthy(self) -> str | None:
        """What keeps the shelf from storing."""
        return self._shelf.healthy()

    def close(self, timeout: float) -> None:
        """Let what is under way become durable."""
        if self._opened and not self._closed:
            self._closed = True
            self._shelf.close(timeout)


def _bytes(records: Records) -> float:
    if records.columns is None:
        return sum(map(len, records.bodies))
    return sum(column.nbytes for column in records.columns.outputs.values())


def _whole(shares: list[_Share], most: int) -> tuple[list[_Share], list[_Share]]:
    """As many shares as hold no more than `most` messages together, and the others."""
    fit = sum(count <= most for count in accumulate(len(share.positions) for share in shares))
    return shares[:fit], shares[fit:]


def _cut(shares: list[_Share], run: list[Message]) -> tuple[list[_Share], list[_Share]]:
    """The messages of a run, in its order, and the others."""
    places = {id(share.records.messages[i]): (share, i) for share in shares for i in share.positions}
    sealed = [places.pop(id(m)) for m in run]
    return _gathered(sealed), _gathered(places.values())


def _gathered(places: Iterable[tuple[_Share, int]]) -> list[_Share]:
    """Neighbours of one share together."""
    return [
        _Share(share.records, [i for _, i in own], share.kept)
        for _, several in groupby(places, lambda place: id(place[0]))
        for own in [list(several)]
        for share in [own[0][0]]
    ]


def _tell(shares: Sequence[_Share]) -> None:
    """Whoever wrote these learns that they are durable."""
    for share in shares:
        share.kept(share.positions)
