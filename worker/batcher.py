"""The batcher: decoded requests in, batches out. Pure: time is an argument, nothing here waits or calls out.

A lane holds requests that may share a batch. In a lane the most urgent come first: a request with a deadline by its
deadline, one without as if it were due `PATIENCE` after it came, so that deadlines go first and nothing starves.
Batches are work-conserving: an idle device takes what is there at once, and while all are busy the next batch grows.
Rows and bytes are counted, never requests; a request larger than a batch is cut into parts and put together again.

Invariant: every request put in comes out exactly once, in a batch (as all of its parts), as expired, or as discarded.
What came out is not held here any longer, and what is empty is gone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from inferbus.connectors.base import Message
from inferbus.models.base import Array, Tensors

PATIENCE = 1.0  # seconds after which a request without a deadline is as urgent as one whose deadline is now

Reason = Literal["full", "idle", "delay", "deadline", "drain"]


class Assembly:
    """A request cut into parts: collects their outputs until all are there, or the first failure of one."""

    __slots__ = ("_outputs", "failure")

    def __init__(self, parts: int) -> None:
        self._outputs: list[Tensors | None] = [None] * parts
        self.failure: tuple[str, str] | None = None

    def add(self, part: int, outputs: Tensors) -> Tensors | None:
        """The outputs of one part; answers the whole request's once the last one is in."""
        self._outputs[part] = outputs
        whole = [o for o in self._outputs if o is not None]
        if len(whole) < len(self._outputs) or self.failure:
            return None
        return {name: np.concatenate([o[name] for o in whole]) for name in whole[0]}

    def fail(self, code: str, text: str) -> bool:
        """One part failed; True when it is the first, for one failure is the request's outcome."""
        first = self.failure is None
        self.failure = self.failure or (code, text)
        return first


@dataclass(slots=True, eq=False)
class Piece:
    """Requests of one chunk with the same urgency, stacked. The batcher eats it from the front."""

    messages: Sequence[Message]
    rows: Sequence[int]
    asks: Sequence[object]
    columns: Tensors
    arrived: float  # monotonic seconds
    row_bytes: float
    deadline: float | None = None  # monotonic seconds; only a piece of one request has one
    part: tuple[Assembly, int] | None = None  # only a piece of one request, cut
    at: int = 0  # first request not taken
    row: int = 0  # its first row in `columns`

    @property
    def rows_left(self) -> int:
        """Rows not taken."""
        return len(next(iter(self.columns.values()))) - self.row


@dataclass(slots=True)
class Batch:
    """What one `predict` gets: requests of one lane in order, their rows stacked.

    Attributes:
        parts: Position of a request that is a part of a larger one -> its assembly and the part's place in it.
        arrivals: (monotonic seconds, requests) for each chunk the batch drew on.
    """

    messages: list[Message]
    rows: list[int]
    asks: list[object]
    inputs: Tensors
    reason: Reason
    parts: dict[int, tuple[Assembly, int]]
    arrivals: list[tuple[float, int]]

    @property
    def total_rows(self) -> int:
        """Length of axis 0 of the inputs."""
        return sum(self.rows)


@dataclass(slots=True)
class _Lane:
    oldest: float  # arrival
    heap: list[tuple[float, int, Piece]] = field(default_factory=list)
    rows: int = 0
    size: float = 0.0
    urgent: int = 0  # pieces with a deadline


class Batcher:
    """Lanes of requests, and the rule when they become a batch.

    Args:
        max_rows: Most rows in a batch.
        max_bytes: Most bytes of input tensors in a batch; one row may exceed it alone.
        max_delay: Seconds an idle device waits for a batch to fill; 0 never waits.
    """

    def __init__(self, max_rows: int, max_bytes: int, max_delay: float) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_delay = max_delay
        self._lanes: dict[Hashable, _Lane] = {}
        self._rows = 0
        self._size = 0.0
        self._earliest = math.inf  # deadline; its request may be gone by now, but none that waits has an earlier one
        self._count = 0

    def __len__(self) -> int:
        """Rows waiting."""
        return self._rows

    def size(self) -> float:
        """Bytes waiting."""
        return self._size

    def put(self, lane: Hashable, piece: Piece) -> None:
        """Let a piece wait in its lane; oversized requests are cut into parts first."""
        if max(piece.rows) > self._row_limit(piece):
            for smaller in self._cut(piece):
                self._push(lane, smaller)
        else:
            self._push(lane, piece)

    def _row_limit(self, piece: Piece) -> int:
        return max(1, min(self._max_rows, int(self._max_bytes // max(piece.row_bytes, 1.0))))

    def _push(self, name: Hashable, piece: Piece) -> None:
        lane = self._lanes.setdefault(name, _Lane(piece.arrived))
        self._count += 1
        due = piece.arrived + PATIENCE if piece.deadline is None else piece.deadline
        heapq.heappush(lane.heap, (due, self._count, piece))
        self._tally(lane, piece, piece.rows_left)
        if piece.deadline is not None:
            lane.urgent += 1
            self._earliest = min(self._earliest, piece.deadline)

    def _tally(self, lane: _Lane, piece: Piece, rows: int) -> None:
        """Count rows of a piece that came, or, below zero, left."""
        size = rows * piece.row_bytes
        lane.rows += rows
        lane.size += size
        self._rows += rows
        self._size += size

    def _cut(self, piece: Piece) -> list[Piece]:
        """One piece for each request, and several for each request larger than a batch."""
        limit = self._row_limit(piece)
        pieces: list[Piece] = []
        for i, (rows, end) in enumerate(zip(piece.rows, accumulate(piece.rows), strict=True)):
            start = end - rows
            cuts = range(start, end, limit)
            assembly = Assembly(len(cuts)) if len(cuts) > 1 else None
            for n, cut in enumerate(cuts):
                stop = min(cut + limit, end)
                pieces.append(
                    Piece(
                        [piece.messages[i]],
                        [stop - cut],
                        [piece.asks[i]],
                        {name: column[cut:stop] for name, column in piece.columns.items()},
                        piece.arrived,
                        piece.row_bytes,
                        piece.deadline,
                        None if assembly is None else (assembly, n),
                    )
                )
        return pieces

    def take(self, now: float, *, idle: bool, flush: bool = False) -> Batch | None:
        """The next batch, or None.

        Args:
            now: Monotonic seconds.
            idle: A device waits; without one only a full batch without deadlines is given, since that cannot grow.
            flush: Do not wait for `max_delay`.
        """
        best: tuple[float, Reason, Hashable] | None = None
        for name, lane in self._lanes.items():
            reason = self._ready(lane, now, idle=idle, flush=flush)
            if reason is not None and (best is None or lane.heap[0][0] < best[0]):
                best = (lane.heap[0][0], reason, name)
        if best is None:
            return None
        return self._fill(best[2], best[1])

    def _ready(self, lane: _Lane, now: float, *, idle: bool, flush: bool) -> Reason | None:
        if lane.rows >= self._max_rows or lane.size >= self._max_bytes:
            # Queued behind a busy device, a request with a deadline could expire unseen.
            return "full" if idle or not lane.urgent else None
        if not idle:
            return None
        if flush:
            return "drain"
        if not self._max_delay:
            return "idle"
        if now >= lane.oldest + self._max_delay:
            return "delay"
        # Waiting longer could only make it expire.
        return "deadline" if lane.heap[0][2].deadline is not None else None

    def _fill(self, name: Hashable, reason: Reason) -> Batch:
        lane = self._lanes[name]
        batch = Batch([], [], [], {}, reason, {}, [])
        stacks: list[Tensors] = []
        room, size = self._max_rows, float(self._max_bytes)
        while lane.heap and room:
            piece = lane.heap[0][2]
            count, rows = self._fits(piece, room, size, first=not batch.messages)
            if not count:
                break
            if piece.part is not None:
                batch.parts[len(batch.messages)] = piece.part
            end = piece.at + count
            batch.messages += piece.messages[piece.at : end]
            batch.rows += piece.rows[piece.at : end]
            batch.asks += piece.asks[piece.at : end]
            batch.arrivals.append((piece.arrived, count))
            stacks.append({key: column[piece.row : piece.row + rows] for key, column in piece.columns.items()})
            piece.at, piece.row = end, piece.row + rows
            room -= rows
            size -= rows * piece.row_bytes
            self._tally(lane, piece, -rows)
            if end == len(piece.messages):
                lane.urgent -= piece.deadline is not None
                heapq.heappop(lane.heap)
        self._refresh(name)
        batch.inputs = {key: _stack([stack[key] for stack in stacks]) for key in stacks[0]}
        return batch

    def _fits(self, piece: Piece, room: int, size: float, *, first: bool) -> tuple[int, int]:
        """Requests and rows of the piece's front that fit; at least one request in an empty batch."""
        limit = min(room, int(size // max(piece.row_bytes, 1.0)))
        left = len(piece.messages) - piece.at
        if piece.rows_left == left:  # one row each, the usual case
            return (count := min(left, max(limit, int(first)))), count
        count = rows = 0
        for n in piece.rows[piece.at :]:
            if rows + n > limit and not (first and not count):
                break
            count, rows = count + 1, rows + n
        return count, rows

    def expire(self, now: float) -> list[Message]:
        """Requests whose deadline has passed, taken out; a request in parts comes once."""
        expired: list[Message] = []
        if now < self._earliest:
            return expired
        for name in [name for name, lane in self._lanes.items() if lane.urgent]:
            for piece in self._remove(name, lambda piece: piece.deadline is not None and piece.deadline <= now):
                if piece.part is None or piece.part[0].fail("expired", ""):
                    expired += piece.messages
        waiting = (piece for lane in self._lanes.values() if lane.urgent for _, _, piece in lane.heap)
        self._earliest = min((p.deadline for p in waiting if p.deadline is not None), default=math.inf)
        return expired

    def discard(self, unwanted: Callable[[Message], bool]) -> list[Message]:
        """Take out what is not wanted any more; only what no device has begun, so parts may remain under way."""
        discarded: list[Message] = []
        for name, lane in list(self._lanes.items()):
            for _, _, piece in lane.heap:
                if not any(unwanted(m) for m in piece.messages[piece.at :]):
                    continue
                discarded += [m for m in piece.messages[piece.at :] if unwanted(m)]
                self._keep(lane, piece, [not unwanted(m) for m in piece.messages[piece.at :]])
            self._remove(name, lambda piece: not piece.messages)
        return discarded

    def _keep(self, lane: _Lane, piece: Piece, wanted: list[bool]) -> None:
        """Reduce a piece to the requests wanted."""
        rows = piece.rows[piece.at :]
        mask = np.repeat(wanted, rows)
        before = piece.rows_left
        piece.columns = {name: column[piece.row :][mask] for name, column in piece.columns.items()}
        piece.messages = [m for m, w in zip(piece.messages[piece.at :], wanted, strict=True) if w]
        piece.asks = [a for a, w in zip(piece.asks[piece.at :], wanted, strict=True) if w]
        piece.rows = [r for r, w in zip(rows, wanted, strict=True) if w]
        piece.at = piece.row = 0
        self._tally(lane, piece, piece.rows_left - before)

    def _remove(self, name: Hashable, goes: Callable[[Piece], bool]) -> list[Piece]:
        """Take pieces out of a lane, all in one walk: thousands may go at once."""
        lane = self._lanes[name]
        gone = [piece for _, _, piece in lane.heap if goes(piece)]
        lane.heap = [entry for entry in lane.heap if not goes(entry[2])]
        heapq.heapify(lane.heap)
        for piece in gone:
            self._tally(lane, piece, -piece.rows_left)
            lane.urgent -= piece.deadline is not None
        self._refresh(name)
        return gone

    def _refresh(self, name: Hashable) -> None:
        """Bring a lane up to date that pieces left; an empty one goes, or one would stay for every shape ever seen."""
        lane = self._lanes[name]
        if lane.heap:
            lane.oldest = min(piece.arrived for _, _, piece in lane.heap)
        else:
            del self._lanes[name]

    def wake_at(self, *, idle: bool) -> float:
        """Monotonic time at which `expire` or `take` may answer differently; infinity when only other events count.

        Args:
            idle: A device waits; without one a delay that ends changes nothing.
        """
        if not idle or not self._max_delay:
            return self._earliest
        delayed = (lane.oldest + self._max_delay for lane in self._lanes.values())
        return min(self._earliest, min(delayed, default=math.inf))


def _stack(columns: list[Array]) -> Array:
    """Columns laid end to end; one alone is copied only where it is not aligned, on which native code may count."""
    alone = len(columns) == 1 and columns[0].flags.aligned
    return columns[0] if alone else np.concatenate(columns)
