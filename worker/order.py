"""`order: key`: per key, outcomes leave in the order their requests came.

Batches still mix keys freely and finish in any order; an outcome that is early is held until those before it under the
same key have left. Requests without a key have no order.

Invariant: what is held is a subset of what is in flight, so the flow caps bound it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from inferbus.connectors.base import Message, Records
from inferbus.worker.delivery import Kind, Outcomes

_Ready = tuple[Kind, Records, float]
"""One outcome: its kind, itself, and when its request came."""


class KeyOrder:
    """Holds early outcomes back."""

    def __init__(self) -> None:
        self._expected: dict[bytes, deque[Message]] = {}
        self._outcomes: dict[int, _Ready | None] = {}  # of every request expected, once it is there

    def receive(self, messages: Sequence[Message]) -> None:
        """Requests came, in this order."""
        for m in messages:
            if m.key is not None:
                self._expected.setdefault(m.key, deque()).append(m)
                self._outcomes[id(m)] = None

    def release(self, outcomes: Outcomes) -> list[Outcomes]:
        """What may leave now, in order: of the given outcomes and of those held before.

        Of a request that is expected no more none leaves: its next owner answers it.
        """
        leaving: list[_Ready] = []
        arrivals = (at for at, count in outcomes.arrivals for _ in range(count))
        for i, (m, arrived) in enumerate(zip(outcomes.records.messages, arrivals, strict=True)):
            ready: _Ready = (outcomes.kind, outcomes.records.take([i]), arrived)
            if m.key is None:
                leaving.append(ready)
            elif id(m) in self._outcomes:
                self._outcomes[id(m)] = ready
                leaving += self._unblock(m.key)
        return self._gather(leaving)

    def _unblock(self, key: bytes) -> list[_Ready]:
        expected = self._expected[key]
        free: list[_Ready] = []
        while expected and (ready := self._outcomes[id(expected[0])]) is not None:
            del self._outcomes[id(expected.popleft())]
            free.append(ready)
        if not expected:
            del self._expected[key]
        return free

    def forget(self, messages: Sequence[Message]) -> list[Outcomes]:
        """These requests get no outcome from this worker; what waited behind them may leave."""
        leaving: list[_Ready] = []
        for m in messages:
            if m.key is not None and id(m) in self._outcomes:
                del self._outcomes[id(m)]
                self._expected[m.key] = deque(e for e in self._expected[m.key] if e is not m)
                leaving += self._unblock(m.key)
        return self._gather(leaving)

    def _gather(self, leaving: list[_Ready]) -> list[Outcomes]:
        """Consecutive outcomes of one kind together."""
        runs: list[tuple[Kind, list[_Ready]]] = []
        for ready in leaving:
            if not runs or runs[-1][0] != ready[0]:
                runs.append((ready[0], []))
            runs[-1][1].append(ready)
        return [
            Outcomes(kind, Records.joined([records for _, records, _ in run]), [(arrived, 1) for *_, arrived in run])
            for kind, run in runs
        ]
