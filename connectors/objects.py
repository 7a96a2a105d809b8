"""Stores: records gathered into objects of many, each request settled once its object is complete.

Between delivery and a folder or a bucket. Rows wait in heaps, one for each stream of the source (a Kafka partition, a
file, a whole queue). A heap becomes an object when it has rows or bytes enough, is old enough, or nothing more will
come.

Invariant: an object from a stream with an order is a run of it without gaps, and its name is where the stream would
begin again after a crash, which the source vouches for: what is delivered again overwrites, and no row is doubled.
A life before this one may have stored its last stretch and not have told the source: under the first name of each
stream here every store has what is of this stretch now, or nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import inf
from operator import itemgetter
from typing import Protocol

from inferbus.connectors.base import Bell, Kept, Message, Records, Source
from inferbus.connectors.rows import Form

LOOK = 0.02  # seconds between looks at a heap whose object must wait for the source's confirmation
ROW = 200  # bytes a row takes beside its outputs: names, headers, structure


Make = Callable[[], bytes | None]


class Shelf(Protocol):
    """Where objects are put: a folder, a bucket. Works on threads of its own, and tries again what fails."""

    name: str

    def open(self, bell: Bell) -> None:
        """As of a sink."""

    def put(self, name: str, make: Make, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """Store what `make` answers under a name, durably, in place of what had it; then, from `tick`, call `done`.

        Where `make` answers None nothing is to have that name. `make` and `wanted` are called on another thread.
        `wanted` is asked before each try: once it says no nothing is stored, for the name is another worker's by now.
        """

    def tick(self) -> None:
        """Call the `done` of what is durable.

        Raises:
            Fatal: An object can never be stored, for a fault of ours.
        """

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self, timeout: float) -> None:
        """Give what is under way so many seconds, then drop it. Idempotent."""


@dataclass(slots=True, eq=False)
class _Share:
    """Records of one write to one store, or those of them that are of one stream."""

    store: ObjectStore
    records: Records
    positions: Sequence[int]
    kept: Kept
    since: float
    size: float  # bytes of one record

    def messages(self) -> Sequence[Message]:
        """The requests they answer."""
        if len(self.positions) == len(self.records):
            return self.records.messages
        return [self.records.messages[i] for i in self.positions]

    def taken(self) -> Records:
        """These records alone."""
        return self.records if len(self.positions) == len(self.records) else self.records.take(self.positions)

    def only(self, positions: Sequence[int]) -> _Share:
        """A part of it."""
        return _Share(self.store, self.records, positions, self.kept, self.since, self.size)


@dataclass(slots=True)
class _Heap:
    """What waits of one stream, for all stores, and how much of it for each."""

    shares: list[_Share] = field(default_factory=list)
    counts: Counter[ObjectStore] = field(default_factory=Counter)
    sizes: defaultdict[ObjectStore, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, share: _Share) -> None:
        self.shares.append(share)
        self.counts[share.store] += len(share.positions)
        self.sizes[share.store] += share.size * len(share.positions)

    def full(self) -> bool:
        """One of the stores has enough for an object."""
        return any(
            count >= store.max_rows or self.sizes[store] >= store.max_bytes for store, count in self.counts.items()
        )

    def due_at(self) -> float:
        """When the oldest has waited long enough."""
        return min(share.since + share.store.max_age for share in self.shares)


class Gathering:
    """The heaps of one pipeline: its stores make their objects of one stretch of a stream together.

    For a request is a row in one store or in another, a prediction or an error; each alone would have a gap where the
    other has a row, and where a stretch begins is confirmed only once all of it is stored.

    Args:
        source: Whose messages the records answer.
        clock: Monotonic seconds.
    """

    def __init__(self, source: Source, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.hurry = False
        self.stores: list[ObjectStore] = []
        self._source = source
        self._heaps: dict[Hashable, _Heap] = {}
        self._begun: set[Hashable] = set()  # streams with an object

    def add(self, store: ObjectStore, records: Records, kept: Kept) -> None:
        """Put records on the heaps of their streams."""
        now = self.clock()
        size = ROW + _bytes(records) / max(1, len(records))
        streams = list(map(self._source.stream, records.messages))
        parts: dict[Hashable, Sequence[int]] = {streams[0]: range(len(streams))}
        if streams.count(streams[0]) < len(streams):
            parts = {name: [i for i, own in enumerate(streams) if own == name] for name in dict.fromkeys(streams)}
        for name, positions in parts.items():
            self._heaps.setdefault(name, _Heap()).add(_Share(store, records, positions, kept, now, size))

    def tick(self) -> None:
        """Seal what is due."""
        now = self.clock()
        hurry, self.hurry = self.hurry, False
        for name, heap in list(self._heaps.items()):
            if name is not None and self._source.void(heap.shares[0].messages()[0]):
                # A stream with an order is given away as a whole; here nothing waits for it any more.
                del self._heaps[name]
                _tell(heap.shares)
            elif hurry or heap.full() or now >= heap.due_at():
                self._seal(name, heap)

    def _seal(self, stream: Hashable, heap: _Heap) -> None:
        """Make an object for each store of the run at the front of the heap; the rest of it waits on."""
        # Those of a stream with an order are void together, of which `tick` takes care.
        shares = heap.shares if stream is not None else self._without_void(heap.shares)
        messages = [m for share in shares for m in share.messages()]
        if len(heap.counts) > 1:
            messages = list({id(m): m for m in messages}.values())  # one may be a row in several stores
        found = self._source.run(messages) if messages else None
        sealed: list[_Share] = []
        left = shares
        if found is not None:
            # Mostly the heap is the run, and writes need not be cut; to look at each message takes twice the time.
            sealed, left = _whole(shares) if found[1] is messages else ([], shares)
            if not sealed:
                sealed, left = _cut(shares, found[1])
            if sealed:
                self._put(stream, found[0], sealed)
        del self._heaps[stream]
        for share in left:
            self._heaps.setdefault(stream, _Heap()).add(share)

    def _put(self, stream: Hashable, name: str, sealed: Sequence[_Share]) -> None:
        """One object for each store; when all are there, whoever wrote the records learns of it."""
        stores = dict.fromkeys(share.store for share in sealed)
        if stream is not None and stream not in self._begun:
            self._begun.add(stream)
            stores = dict.fromkeys(self.stores)  # a life before may have cut another stretch here, with rows for all
        first, void = sealed[0].messages()[0], self._source.void
        missing = set(stores)

        def stored(store: ObjectStore) -> None:
            missing.discard(store)
            if not missing:
                _tell(sealed)

        for store in stores:
            taken = [share.taken() for share in sealed if share.store is store]
            records = Records.joined(taken) if taken else None
            store.put(name, records, partial(stored, store), lambda: stream is None or not void(first))

    def _without_void(self, shares: list[_Share]) -> list[_Share]:
        """Those that have gone to another worker, one by one, as on SQS, come again there."""
        void = self._source.void
        left: list[_Share] = []
        for share in shares:
            lost = [i for i in share.positions if void(share.records.messages[i])]
            if lost:
                share.kept(lost)
                share = share.only([i for i in share.positions if i not in set(lost)])
            if share.positions:
                left.append(share)
        return left

    def wake_at(self) -> float:
        """When the oldest is due; soon, while something is that could not be sealed."""
        now = self.clock()
        due = (now + LOOK if heap.full() else max(heap.due_at(), now + LOOK) for heap in self._heaps.values())
        return min(due, default=inf)


class ObjectStore:
    """A `Store` on a shelf.

    Args:
        gathering: The heaps it shares with the pipeline's other stores.
        shelf: Where objects go.
        form: How they are written.
        max_rows: Requests in an object, at most.
        max_bytes: About so many bytes of rows, before compression.
        max_age: Seconds a record waits for others, at most.
    """

    def __init__(
        self, gathering: Gathering, shelf: Shelf, form: Form, *, max_rows: int, max_bytes: int, max_age: float
    ) -> None:
        self.name = shelf.name
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.max_age = max_age
        self._gathering = gathering
        self._shelf = shelf
        self._form = form
        self._opened = self._closed = False
        gathering.stores.append(self)

    def open(self, bell: Bell) -> None:
        """Reach the shelf and see that it can be written."""
        self._shelf.open(bell)
        self._opened = True

    def keep(self, records: Records, kept: Kept) -> None:
        """Let records wait for their object."""
        self._gathering.add(self, records, kept)

    def put(self, name: str, records: Records | None, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """Store an object; None: there is none of that name."""
        make = partial(self._form.encode, records) if records is not None else _nothing
        self._shelf.put(name + self._form.suffix, make, done, wanted)

    def drain(self) -> None:
        """Complete at the next tick what can be completed."""
        self._gathering.hurry = True

    def tick(self) -> None:
        """Tell of objects that are complete, and seal what is due."""
        self._shelf.tick()
        self._gathering.tick()

    def wake_at(self) -> float:
        """When an object is due."""
        return self._gathering.wake_at()

    def healthy(self) -> str | None:
        """What keeps the shelf from storing."""
        return self._shelf.healthy()

    def close(self, timeout: float) -> None:
        """Let what is under way become durable."""
        if self._opened and not self._closed:
            self._closed = True
            self._shelf.close(timeout)


def _nothing() -> None:
    """The content of an object that is not there."""


def _bytes(records: Records) -> float:
    if records.columns is None:
        return sum(map(len, records.bodies))
    return sum(column.nbytes for column in records.columns.outputs.values())


def _whole(shares: list[_Share]) -> tuple[list[_Share], list[_Share]]:
    """As many shares as no store has too many of for an object, and the others."""
    heap = _Heap()
    for n, share in enumerate(shares):
        heap.add(share)
        if _over(heap, share.store):
            return shares[:n], shares[n:]
    return shares, []


def _cut(shares: list[_Share], run: list[Message]) -> tuple[list[_Share], list[_Share]]:
    """The messages of a run, in its order, as far as they fit into objects, and the others."""
    places: defaultdict[int, list[tuple[_Share, int]]] = defaultdict(list)
    for share in shares:
        for i in share.positions:
            places[id(share.records.messages[i])].append((share, i))
    heap = _Heap()
    sealed: list[tuple[_Share, int]] = []
    for m in run:
        own = places[id(m)]
        for share, i in own:
            heap.add(share.only((i,)))
        if sealed and any(_over(heap, share.store) for share, _ in own):
            break
        sealed += places.pop(id(m))
    return _gathered(sealed), _gathered(place for own in places.values() for place in own)


def _over(heap: _Heap, store: ObjectStore) -> bool:
    return heap.counts[store] > store.max_rows or heap.sizes[store] > store.max_bytes


def _gathered(places: Iterable[tuple[_Share, int]]) -> list[_Share]:
    """Neighbours of one share together."""
    return [
        share.only([i for _, i in own]) for share, several in groupby(places, itemgetter(0)) for own in [list(several)]
    ]


def _tell(shares: Sequence[_Share]) -> None:
    """Whoever wrote these learns that they are durable."""
    for share in shares:
        share.kept(share.positions)
