"""How an outcome becomes durable and its request settled, together: the one seam for guarantees.

`AtLeastOnce` writes to every sink of the outcome's kind and settles when all have confirmed. What a sink could not take
is written again after a back-off, in order, for as long as it takes: a dead letter is never dropped. While a sink holds
something back, later writes to it queue behind, so a failure does not reorder what follows it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from inferbus.connectors.base import Failure, Message, Records, Sink, Source, TooLarge

log = structlog.get_logger("inferbus.delivery")

FIRST_BACKOFF = 0.1  # seconds

Kind = Literal["prediction", "error"]


@dataclass(slots=True, eq=False)
class Outcomes:
    """Outcomes of one kind on their way out.

    Attributes:
        kind: Where they go: predictions to the sinks, errors to the error sinks.
        records: One per outcome.
        arrivals: (monotonic seconds, requests): when these requests were received, for the latency metric.
        started: Monotonic seconds when delivery began.
        left: Sinks that have not confirmed yet.
        settling: Seconds it took to settle their requests.
        diverted: Messages (by identity) whose outcome goes out in another form; that settles them.
    """

    kind: Kind
    records: Records
    arrivals: Sequence[tuple[float, int]]
    started: float = 0.0
    left: int = 0
    settling: float = 0.0
    diverted: set[int] = field(default_factory=set)


class Delivery(Protocol):
    """How outcomes become durable and their requests settled."""

    def deliver(self, outcomes: Outcomes) -> None:
        """Take charge of the outcomes; returns at once."""

    def tick(self) -> None:
        """Make progress."""

    def pending(self) -> int:
        """Outcomes taken charge of whose requests are not settled."""


@dataclass(slots=True, eq=False)
class _Outlet:
    """A sink and what waits for it after a failure."""

    sink: Sink
    waiting: deque[tuple[Outcomes, Records]]
    retry_at: float = 0.0
    backoff: float = 0.0


class AtLeastOnce:
    """Write, then settle.

    Args:
        source: Whose messages are settled.
        sinks: Where each kind of outcome goes; every one must confirm.
        too_large: Called with the kind, messages and reasons of records a sink refuses for their size; answers the
            outcomes to deliver in their place.
        settled: Called with outcomes whose requests have been settled.
        max_backoff: Seconds between tries, at most.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        source: Source,
        sinks: dict[Kind, Sequence[Sink]],
        too_large: Callable[[Kind, Records], Outcomes],
        settled: Callable[[Outcomes], None],
        *,
        max_backoff: float,
        clock: Callable[[], float],
    ) -> None:
        self._source = source
        self._outlets = {kind: [_Outlet(sink, deque()) for sink in several] for kind, several in sinks.items()}
        self._all = list(itertools.chain(*self._outlets.values()))
        self._too_large = too_large
        self._settled = settled
        self._max_backoff = max_backoff
        self._clock = clock
        self._pending = 0

    def deliver(self, outcomes: Outcomes) -> None:
        """Write to every sink of this kind; settle when all have confirmed."""
        outlets = self._outlets[outcomes.kind]
        outcomes.started = self._clock()
        outcomes.left = len(outlets)
        self._pending += len(outcomes.records)
        for outlet in outlets:
            self._write(outlet, outcomes, outcomes.records)

    def _write(self, outlet: _Outlet, outcomes: Outcomes, records: Records) -> None:
        if outlet.waiting:
            outlet.waiting.append((outcomes, records))
            return
        outlet.sink.write(records, lambda failures: self._written(outlet, outcomes, records, failures))

    def _written(self, outlet: _Outlet, outcomes: Outcomes, records: Records, failures: Sequence[Failure]) -> None:
        if not failures:
            outlet.backoff = 0.0
            self._confirm(outcomes)
            return
        again = [i for i, error in failures if not isinstance(error, TooLarge)]
        large = [i for i, error in failures if isinstance(error, TooLarge)]
        if large:
            self._divert(outcomes, records.take(large))
        if again:
            self._back_off(outlet, str(next(error for i, error in failures if i == again[0])))
            outlet.waiting.append((outcomes, records.take(again)))
        else:
            self._confirm(outcomes)

    def _divert(self, outcomes: Outcomes, records: Records) -> None:
        """Deliver these in another form; that, and not this, settles their requests."""
        fresh = records.take([i for i, m in enumerate(records.messages) if id(m) not in outcomes.diverted])
        if len(fresh):
            outcomes.diverted.update(map(id, fresh.messages))
            self._pending -= len(fresh)
            self.deliver(self._too_large(outcomes.kind, fresh))

    def _back_off(self, outlet: _Outlet, why: str) -> None:
        outlet.backoff = min(self._max_backoff, max(FIRST_BACKOFF, outlet.backoff * 2))
        outlet.retry_at = self._clock() + outlet.backoff * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        log.warning("write_failed", sink=outlet.sink.name, reason=why, retry_in=round(outlet.backoff, 3))

    def _confirm(self, outcomes: Outcomes) -> None:
        outcomes.left -= 1
        if outcomes.left == 0:
            messages: Sequence[Message] = outcomes.records.messages
            if outcomes.diverted:
                messages = [m for m in messages if id(m) not in outcomes.diverted]
            began = time.perf_counter()
            self._source.settle(messages)
            outcomes.settling = time.perf_counter() - began
            self._pending -= len(messages)
            self._settled(outcomes)

    def tick(self) -> None:
        """Let every sink report, then write again what is due."""
        for outlet in self._all:
            outlet.sink.tick()
            if outlet.waiting and self._clock() >= outlet.retry_at:
                waiting, outlet.waiting = outlet.waiting, deque()
                for outcomes, records in waiting:
                    self._write(outlet, outcomes, records)

    def rest(self) -> None:
        """The pipeline is about to wait."""
        for outlet in self._all:
            outlet.sink.rest()

    def wake_at(self) -> float:
        """Monotonic time of the next retry, or infinity."""
        return min((o.retry_at for o in self._all if o.waiting), default=float("inf"))

    def pending(self) -> int:
        """Outcomes whose requests are not settled."""
        return self._pending

    def healthy(self) -> str | None:
        """None, or what keeps a sink from confirming."""
        for outlet in self._all:
            if problem := outlet.sink.healthy():
                return problem
            if outlet.waiting:
                return f"{outlet.sink.name}: {len(outlet.waiting)} writes wait to be tried again"
        return None
