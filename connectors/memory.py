"""A bus in memory: a queue with settling, redelivery and faults on demand, and a place records land in.

For tests, of Inferbus and of pipelines built on it. It keeps the promises of the real ones, so it passes the same
contract suite, and it fails when told to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from inferbus.connectors.base import (
    Bell,
    ConnectorError,
    Done,
    Failure,
    Headers,
    Message,
    Records,
    TooLarge,
    Unavailable,
    resolve_id,
)

# A receipt of this source is (epoch, place).
EPOCH: Callable[[Any], int] = itemgetter(0)
PLACE: Callable[[Any], int] = itemgetter(1)

Entry = tuple[int, bytes | None, bytes, Headers, float | None]
"""Place, key, body, headers, created_at."""


class MemoryBus:
    """A queue that outlives the sources reading it: what is delivered and not settled comes again to the next one."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._attempts: dict[int, int] = {}
        self._count = 0
        self.open_deliveries: dict[int, Entry] = {}

    def publish(
        self, body: bytes, key: bytes | None = None, headers: Headers = (), created_at: float | None = None
    ) -> int:
        """Add a request; answers its place."""
        place = self._count
        self._count += 1
        self._waiting.append((place, key, body, headers, created_at))
        return place

    def take(self, limit: int) -> list[tuple[int, Entry]]:
        """Deliver at most `limit`: attempt and entry."""
        taken: list[tuple[int, Entry]] = []
        while self._waiting and len(taken) < limit:
            entry = self._waiting.popleft()
            self._attempts[entry[0]] = self._attempts.get(entry[0], 0) + 1
            self.open_deliveries[entry[0]] = entry
            taken.append((self._attempts[entry[0]], entry))
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        """Let these be delivered again, in their old order, before what waits."""
        returned = [self.open_deliveries.pop(p) for p in sorted(places) if p in self.open_deliveries]
        self._waiting.extendleft(reversed(returned))

    def __len__(self) -> int:
        return len(self._waiting)


class MemorySource:
    """Reads a `MemoryBus`. `away` makes it unavailable; `lose` is a connection lost: an epoch ends.

    Attributes:
        away: While set, receiving raises `Unavailable` with this text.
        settled: Places settled, in order.
    """

    def __init__(self, bus: MemoryBus, name: str = "memory:requests") -> None:
        self.name = name
        self.bus = bus
        self.away: str | None = None
        self.settled: list[int] = []
        self._epoch = 0
        self._inflight: dict[int, int] = {}

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:
        """Keep the bell and the pump; raises while `away`."""
        if self.away is not None:
            raise Unavailable(self.away)
        self._drain = drain

    def receive(self, limit: int) -> list[Message]:
        """At most `limit` messages."""
        if self.away is not None:
            raise Unavailable(self.away)
        messages = []
        for attempt, (place, key, body, headers, created_at) in self.bus.take(limit):
            self._inflight[place] = len(body)
            own = resolve_id(headers) or f"memory-{place}"
            messages.append(Message(own, key, body, headers, created_at, attempt, (self._epoch, place)))
        return messages

    def settle(self, messages: Sequence[Message]) -> None:
        """Done for good, unless the epoch has passed."""
        for m in messages:
            place = PLACE(m.receipt)
            if not self.void(m) and self._inflight.pop(place, None) is not None:
                del self.bus.open_deliveries[place]
                self.settled.append(place)

    def release(self, messages: Sequence[Message]) -> None:
        """Back to the bus."""
        places = [PLACE(m.receipt) for m in messages if not self.void(m)]
        for place in places:
            self._inflight.pop(place, None)
        self.bus.give_back(places)

    def revoke(self, budget: float) -> None:
        """As when the group rebalances: drain within the budget, then the epoch ends and the rest goes back."""
        self._drain(lambda: not self._inflight, budget)
        self.lose()

    def lose(self) -> None:
        """As when the connection breaks: the epoch ends, everything unsettled will be delivered again."""
        self._epoch += 1
        self.bus.give_back(list(self._inflight))
        self._inflight.clear()

    def inflight(self) -> tuple[int, int]:
        """Delivered and not settled."""
        return len(self._inflight), sum(self._inflight.values())

    def holds(self, message: Message) -> bool:
        """Not settled."""
        return PLACE(message.receipt) not in self.settled

    def tick(self, now: float) -> float:
        """Nothing to do."""
        return now + 1.0

    def rest(self) -> None:
        """Whoever publishes while a pipeline rests waits for its next look."""

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        for m in messages:
            if not self.void(m):
                self._inflight[PLACE(m.receipt)] -= len(m.body)
            m.body = b""

    def stream(self, message: Message) -> int:
        """One: the queue as it was published."""
        return EPOCH(message.receipt)

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        """The place of the first, and those without another between."""
        own = {PLACE(m.receipt): m for m in messages}
        other = min((place for place in self._inflight if place not in own), default=None)
        run = [own[place] for place in sorted(own) if other is None or place < other]
        return f"memory/{min(own):020}", run

    def lag(self) -> int | None:
        """What waits."""
        return len(self.bus)

    def ended(self) -> bool:
        """Never."""
        return False

    def exhausted(self) -> bool:
        """Nothing waits and nothing is out."""
        if self.away is not None:
            raise Unavailable(self.away)
        return not len(self.bus) and not self.bus.open_deliveries

    def void(self, message: Message) -> bool:
        """Its epoch has passed."""
        return EPOCH(message.receipt) != self._epoch

    def locate(self, message: Message) -> str:
        """`memory:requests/place`."""
        return f"{self.name}/{PLACE(message.receipt)}"

    def healthy(self) -> str | None:
        """What `away` says."""
        return self.away

    def close(self) -> None:
        """Everything unsettled goes back."""
        self.lose()


class MemorySink:
    """Keeps records. `refuse` decides what becomes of each; writes finish at `tick`, unless `held`.

    Attributes:
        written: (message id, key, body, headers) in the order they became durable.
        refuse: Called with each body; an error makes that record fail.
        held: While True nothing finishes, as when a broker does not answer.
        max_bytes: A larger body is `TooLarge`.
    """

    def __init__(self, name: str = "memory:sink") -> None:
        self.name = name
        self.written: list[tuple[str, bytes | None, bytes, list[tuple[str, bytes]]]] = []
        self.refuse: Callable[[bytes], ConnectorError | None] = lambda _: None
        self.held = False
        self.max_bytes: int | None = None
        self._under_way: deque[tuple[Records, Done]] = deque()

    def open(self, bell: Bell) -> None:
        """Nothing to reach."""

    def write(self, records: Records, done: Done) -> None:
        """Queue until the next tick."""
        self._under_way.append((records, done))

    def tick(self) -> None:
        """Make what is under way durable."""
        while self._under_way and not self.held:
            records, done = self._under_way.popleft()
            failures: list[Failure] = []
            for i, (m, key, body, headers) in enumerate(
                zip(records.messages, records.keys, records.bodies, records.headers, strict=True)
            ):
                if self.max_bytes is not None and len(body) > self.max_bytes:
                    failures.append((i, TooLarge(f"{self.name}: over {self.max_bytes} bytes")))
                elif (error := self.refuse(body)) is not None:
                    failures.append((i, error))
                else:
                    self.written.append((m.id, key, body, headers))
            done(failures)

    def rest(self) -> None:
        """Nothing to park."""

    def healthy(self) -> str | None:
        """Held or not."""
        return f"{self.name}: does not answer" if self.held else None

    def close(self, timeout: float) -> None:
        """Make durable what is under way, unless held."""
        self.tick()
