"""The gap tracker: which receipts of one epoch are settled, and up to where without a gap.

Kafka offsets and AMQP delivery tags are both settled by position: committing n, or acking n with `multiple`, settles
everything before it. Predictions finish out of order, so the position to commit is the first receipt that is not
settled yet, or one past the highest settled one when none is open. Only receipts that were really received are
tracked: compaction and transaction markers leave holes that nobody will ever settle.

Invariant: `position` never passes an unsettled receipt and never moves back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import eq
from typing import TypeVar

Item = TypeVar("Item")


class Gaps:
    """Receipts of one epoch of one partition or channel, received in ascending order, settled in any.

    In flight means received and not covered by a *confirmed* position: what a crash now would bring again. Chunks are
    freed whole, so the counts may err upwards by less than a chunk, never downwards.
    """

    __slots__ = ("_chunks", "_highest", "_open", "confirmed", "inflight_bytes", "inflight_messages")

    def __init__(self) -> None:
        self._open: dict[int, None] = {}  # insertion order is receipt order, so the first key is the lowest
        self._chunks: deque[list[int]] = deque()  # [highest receipt, messages, bytes still held] as received
        self._highest: int | None = None
        self.confirmed: int | None = None
        self.inflight_messages = 0
        self.inflight_bytes = 0

    def __len__(self) -> int:
        """Open receipts."""
        return len(self._open)

    def __contains__(self, receipt: int) -> bool:
        """Whether it is open."""
        return receipt in self._open

    def receive(self, receipts: Sequence[int], size: int) -> None:
        """Track a chunk of `size` bytes; its receipts ascend and are higher than every earlier one.

        Raises:
            ValueError: They are not. A stale chunk from an older epoch, tracked here, could let the position pass
                messages nobody has served.
        """
        if not receipts:
            return
        if self._highest is not None and receipts[0] <= self._highest:
            raise ValueError(f"receipt {receipts[0]} came after {self._highest}")
        if self.confirmed is None:
            self.confirmed = receipts[0]  # whatever lies below is not ours: the bus brought us here
        self._open.update(dict.fromkeys(receipts))
        self._highest = receipts[-1]
        self._chunks.append([receipts[-1], len(receipts), size])
        self.inflight_messages += len(receipts)
        self.inflight_bytes += size

    def settle(self, receipts: Iterable[int]) -> None:
        """Their outcomes are durable. Settling twice, or what was never received, changes nothing."""
        close = self._open.pop
        for receipt in receipts:
            close(receipt, None)

    def shed(self, sizes: Iterable[tuple[int, int]]) -> None:
        """So many bytes of each of these open receipts are held no longer: (receipt, bytes)."""
        left = deque(sorted(sizes))
        for chunk in self._chunks:
            while left and left[0][0] <= chunk[0]:
                size = left.popleft()[1]
                chunk[2] -= size
                self.inflight_bytes -= size

    def run(self, receipts: Sequence[int], items: list[Item]) -> list[Item]:
        """The items of these open receipts in ascending order, up to the first open one that is not among them.

        The list itself, where that is all of it in its own order.
        """
        if len(receipts) <= len(self._open) and all(map(eq, self._open, receipts)):
            return items  # the usual case, seen without looking at what else is open
        own = dict(zip(receipts, items, strict=True))
        other = next((receipt for receipt in self._open if receipt not in own), None)
        return [own[receipt] for receipt in sorted(own) if other is None or receipt < other]

    @property
    def position(self) -> int | None:
        """The first receipt still open, or one past the highest received; None before the first receipt."""
        for receipt in self._open:
            return receipt
        return None if self._highest is None else self._highest + 1

    @property
    def highest(self) -> int | None:
        """The highest receipt received."""
        return self._highest

    def confirm(self, position: int) -> None:
        """The bus has acknowledged everything below `position`; frees what it covers."""
        if self.confirmed is None or position > self.confirmed:
            self.confirmed = position
        chunks = self._chunks
        while chunks and chunks[0][0] < position:
            _, messages, size = chunks.popleft()
            self.inflight_messages -= messages
            self.inflight_bytes -= size

    def idle(self) -> bool:
        """True when everything received is settled."""
        return not self._open

    def unconfirmed(self) -> int | None:
        """The position to confirm next, or None when the confirmed one stands there already."""
        position = self.position
        if position is None or self.confirmed is None or position <= self.confirmed:
            return None
        return position
