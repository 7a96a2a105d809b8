"""How an outcome becomes durable and its request settled, together: the one seam for guarantees.

`AtLeastOnce` writes to every sink of the outcome's kind and settles when all have confirmed. What a sink could not take
is written again after a back-off, in order, for as long as it takes: a dead letter is never dropped. While a sink holds
something back, later writes to it queue behind, so a failure does not reorder what follows it. A store confirms record
by record, as its objects are completed; then each request is settled by itself.

Invariant: what waits is not settled, so the flow caps bound it; a request that has gone to another worker is that
worker's to answer, and its outcome waits here no longer than until the next try.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import structlog

from inferbus.connectors.base import ConnectorError, Failure, Message, Records, Refused, Sink, Source, Store

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
        cuts: How often these records were made smaller, for a sink that refused them for their size.
        started: Monotonic seconds when delivery began.
        left: Sinks and stores that have not confirmed yet.
        singly: For each record the sinks and stores that have not confirmed it, once a store has confirmed one.
        size: Bytes of the requests that these outcomes will settle, as long as they are held.
        settling: Seconds it took to settle their requests.
        done: Records that all sinks and stores have confirmed.
        elsewhere: Messages (by identity) not settled by these: their outcome goes out in another form, or their next
            owner answers them.
    """

    kind: Kind
    records: Records
    arrivals: Sequence[tuple[float, int]]
    cuts: int = 0
    started: float = 0.0
    left: int = 0
    singly: list[int] | None = None
    size: int = 0
    settling: float = 0.0
    done: int = 0
    elsewhere: set[int] = field(default_factory=set)


class Delivery(Protocol):
    """How outcomes become durable and their requests settled."""

    def deliver(self, outcomes: Outcomes) -> None:
        """Take charge of the outcomes; returns at once."""

    def tick(self) -> None:
        """Make progress."""

    def pending(self) -> int:
        """Outcomes taken charge of whose requests are not settled."""

    def size(self) -> int:
        """Bytes of these requests."""


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
        stores: Likewise.
        refused: Called with outcomes, those of their records that a sink refuses, and why it does; answers the
            outcomes to deliver in their place, or None where there is no other form.
        settled: Called with outcomes whose requests have been settled.
        max_backoff: Seconds between tries, at most.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        source: Source,
        sinks: Mapping[Kind, Sequence[Sink]],
        stores: Mapping[Kind, Sequence[Store]],
        refused: Callable[[Outcomes, Records, Sequence[ConnectorError]], Outcomes | None],
        settled: Callable[[Outcomes], None],
        *,
        max_backoff: float,
        clock: Callable[[], float],
    ) -> None:
        self._source = source
        self._outlets = {kind: [_Outlet(sink, deque()) for sink in several] for kind, several in sinks.items()}
        self._all = list(itertools.chain(*self._outlets.values()))
        self._stores = stores
        self._refused = refused
        self._settled = settled
        self._max_backoff = max_backoff
        self._clock = clock
        self._pending = 0
        self._size = 0

    def deliver(self, outcomes: Outcomes) -> None:
        """Write to every sink and store of this kind; settle when all have confirmed."""
        outlets, stores = self._outlets[outcomes.kind], self._stores[outcomes.kind]
        records = outcomes.records
        outcomes.started = self._clock()
        outcomes.left = len(outlets) + len(stores)
        outcomes.size = _bytes(records.messages)
        self._pending += len(records)
        self._size += outcomes.size
        for outlet in outlets:
            self._write(outlet, outcomes, records)
        for store in stores:
            store.keep(records, partial(self._kept, outcomes))
        if not outlets:
            self._forget_bodies(outcomes)

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
        errors = dict(failures)
        refused = [i for i, error in failures if isinstance(error, Refused)]
        again = [i for i, error in failures if not isinstance(error, Refused)]
        if refused and not self._divert(outcomes, records.take(refused), [errors[i] for i in refused]):
            log.error("unwritable", sink=outlet.sink.name, reason=str(errors[refused[0]]), records=len(refused))
            again = sorted(errors)
        if again:
            self._back_off(outlet, str(errors[again[0]]))
            outlet.waiting.append((outcomes, records.take(again)))
        else:
            self._confirm(outcomes)

    def _divert(self, outcomes: Outcomes, records: Records, why: Sequence[ConnectorError]) -> bool:
        """Deliver these in another form; that, and not this, settles their requests. False if there is none."""
        fresh = [i for i, m in enumerate(records.messages) if id(m) not in outcomes.elsewhere]
        if fresh:
            other = self._refused(outcomes, records.take(fresh), [why[i] for i in fresh])
            if other is None:
                return False
            self._leave_out(outcomes, [records.messages[i] for i in fresh])
            self.deliver(other)
        return True

    def _leave_out(self, outcomes: Outcomes, messages: Sequence[Message]) -> None:
        """These are not settled by these outcomes."""
        fresh = [m for m in messages if id(m) not in outcomes.elsewhere]
        size = _bytes(fresh)
        outcomes.elsewhere.update(map(id, fresh))
        outcomes.size -= size
        self._pending -= len(fresh)
        self._size -= size

    def _back_off(self, outlet: _Outlet, why: str) -> None:
        outlet.backoff = min(self._max_backoff, max(FIRST_BACKOFF, outlet.backoff * 2))
        outlet.retry_at = self._clock() + outlet.backoff * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        log.warning("write_failed", sink=outlet.sink.name, reason=why, retry_in=round(outlet.backoff, 3))

    def _confirm(self, outcomes: Outcomes) -> None:
        """A sink has confirmed all of these."""
        outcomes.left -= 1
        if outcomes.singly is not None:
            self._count_down(outcomes, range(len(outcomes.singly)))
        elif outcomes.left == 0:
            self._settle(outcomes, outcomes.records.messages)
        if outcomes.left and outcomes.left == len(self._stores[outcomes.kind]):
            self._forget_bodies(outcomes)  # no sink is left that could refuse one of them

    def _kept(self, outcomes: Outcomes, positions: Sequence[int]) -> None:
        """A store has completed an object with these."""
        if len(positions) == len(outcomes.records) and outcomes.singly is None and outcomes.left == 1:
            outcomes.left = 0  # the usual case: all at once, and nobody else is waited for
            self._settle(outcomes, outcomes.records.messages)
            return
        if outcomes.singly is None:
            outcomes.singly = [outcomes.left] * len(outcomes.records)
        self._count_down(outcomes, positions)

    def _count_down(self, outcomes: Outcomes, positions: Sequence[int]) -> None:
        assert outcomes.singly is not None  # noqa: S101 - narrows the type; both callers have seen to it
        for i in positions:
            outcomes.singly[i] -= 1
        messages = outcomes.records.messages
        if ready := [messages[i] for i in positions if outcomes.singly[i] == 0]:
            self._settle(outcomes, ready)

    def _settle(self, outcomes: Outcomes, messages: Sequence[Message]) -> None:
        """All sinks and stores have confirmed these."""
        outcomes.done += len(messages)
        if outcomes.elsewhere:
            messages = [m for m in messages if id(m) not in outcomes.elsewhere]
        size = outcomes.size if outcomes.singly is None else _bytes(messages)
        began = time.perf_counter()
        self._source.settle(messages)
        outcomes.settling += time.perf_counter() - began
        outcomes.size -= size
        self._pending -= len(messages)
        self._size -= size
        if outcomes.done == len(outcomes.records):
            self._settled(outcomes)

    def _forget_bodies(self, outcomes: Outcomes) -> None:
        messages = [m for m in outcomes.records.messages if id(m) not in outcomes.elsewhere]
        self._source.forget_bodies(messages)
        self._size -= outcomes.size
        outcomes.size = 0

    def tick(self) -> None:
        """Let every sink and store report, then write again what is due."""
        for store in itertools.chain(*self._stores.values()):
            store.tick()
        for outlet in self._all:
            outlet.sink.tick()
            if outlet.waiting and self._clock() >= outlet.retry_at:
                waiting, outlet.waiting = outlet.waiting, deque()
                for outcomes, records in waiting:
                    self._write_again(outlet, outcomes, records)

    def _write_again(self, outlet: _Outlet, outcomes: Outcomes, records: Records) -> None:
        """Without the requests that have gone to another worker while these waited."""
        void = [m for m in records.messages if self._source.void(m)]
        if void:
            self._leave_out(outcomes, void)
            gone = set(map(id, void))
            records = records.take([i for i, m in enumerate(records.messages) if id(m) not in gone])
        if len(records):
            self._write(outlet, outcomes, records)
        else:
            self._confirm(outcomes)

    def rest(self) -> None:
        """The pipeline is about to wait."""
        for outlet in self._all:
            outlet.sink.rest()

    def drain(self) -> None:
        """What was given is to be durable soon: stores shall not wait for more."""
        for store in itertools.chain(*self._stores.values()):
            store.drain()

    def wake_at(self) -> float:
        """Monotonic time of the next retry, or of a store's next object; infinity for none."""
        retries = (outlet.retry_at for outlet in self._all if outlet.waiting)
        objects = (store.wake_at() for store in itertools.chain(*self._stores.values()))
        return min(itertools.chain(retries, objects), default=float("inf"))

    def pending(self) -> int:
        """Outcomes whose requests are not settled."""
        return self._pending

    def size(self) -> int:
        """Bytes of these requests."""
        return self._size

    def healthy(self) -> str | None:
        """None, or what keeps a sink from confirming."""
        for outlet in self._all:
            if problem := outlet.sink.healthy():
                return problem
            if outlet.waiting:
                return f"{outlet.sink.name}: {len(outlet.waiting)} writes wait to be tried again"
        for store in itertools.chain(*self._stores.values()):
            if problem := store.healthy():
                return problem
        return None


def _bytes(messages: Sequence[Message]) -> int:
    return sum([len(m.body) for m in messages])
