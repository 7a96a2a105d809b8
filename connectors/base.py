"""What every bus and store promises the pipeline: the nouns and the two protocols, `Source` and `Sink`.

The pipeline is one thread. It asks a source for what is there, hands records to sinks, and is told of completions when
it calls `tick`. Nothing here blocks and nothing awaits: a Kafka revocation callback runs inside a poll and must be able
to pump everything to its end without an event loop. A connector whose client needs threads or a loop of its own keeps
them to itself, hands its results over through plain queues, and rings the bell.

Invariant: a message is settled only after its outcome is durable; a receipt whose epoch has passed is void.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

Headers = tuple[tuple[str, bytes], ...]
"""Headers in the order they came, duplicates kept."""


class ConnectorError(Exception):
    """Root of what connectors raise. Subclasses are named for what the caller does next."""


class Misconfigured(ConnectorError):
    """The user's settings are wrong (a missing extra, an unknown property): say so and exit 1."""


class Unavailable(ConnectorError):
    """The outside is away or refuses (broker down, topic missing, no permission): back off, keep all, try again."""


class Fatal(ConnectorError):
    """This process cannot go on (fenced, client broken): drain and exit; the bus redelivers."""


class Refused(ConnectorError):
    """The sink will never take this record: it alone needs another form."""


class TooLarge(Refused):
    """The record is larger than the sink takes: a smaller form may do."""


class Message:
    """One delivery: a message as one source handed it over.

    Attributes:
        id: The request's id, never empty; resolved before decoding.
        key: The bus's key, byte for byte, or None.
        body: The payload, byte for byte.
        headers: As they came; duplicates and order kept.
        created_at: Unix seconds by the bus's clock, or None.
        attempts: How often the bus says it was delivered, this time included; 1 where it does not count.
        receipt: The source's private mark for settling.
    """

    __slots__ = ("attempts", "body", "created_at", "headers", "id", "key", "receipt")

    def __init__(
        self,
        id: str,  # noqa: A002 - the field's name on the wire
        key: bytes | None,
        body: bytes,
        headers: Headers,
        created_at: float | None,
        attempts: int,
        receipt: object,
    ) -> None:
        self.id = id
        self.key = key
        self.body = body
        self.headers = headers
        self.created_at = created_at
        self.attempts = attempts
        self.receipt = receipt


class Unreadable(Message):
    """A delivery the client could not read, or not whole: it gets an error record with `code` and `reason`.

    What could not be read is empty here and absent from the error record.
    """

    __slots__ = ("code", "reason")

    def __init__(
        self,
        id: str,  # noqa: A002 - as above
        created_at: float | None,
        receipt: object,
        code: Literal["too_large", "invalid_request"],
        reason: str,
        key: bytes | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(id, key, body, (), created_at, 1, receipt)
        self.code: Literal["too_large", "invalid_request"] = code
        self.reason = reason


class Records:
    """Outcomes on their way out, column by column: element i of every column answers `messages[i]`.

    Columns and not objects: a record costs the pipeline four list slots.
    """

    __slots__ = ("bodies", "headers", "keys", "messages")

    def __init__(
        self,
        messages: Sequence[Message],
        keys: Sequence[bytes | None],
        bodies: Sequence[bytes],
        headers: Sequence[list[tuple[str, bytes]]],
    ) -> None:
        self.messages = messages
        self.keys = keys
        self.bodies = bodies
        self.headers = headers

    def __len__(self) -> int:
        return len(self.bodies)

    def take(self, positions: Sequence[int]) -> Records:
        """The records at `positions`, in that order."""
        return Records(
            [self.messages[i] for i in positions],
            [self.keys[i] for i in positions],
            [self.bodies[i] for i in positions],
            [self.headers[i] for i in positions],
        )


def resolve_id(headers: Headers) -> str | None:
    """The id the sender gave: header `inferbus-id`, else CloudEvents source and id; None when there is neither."""
    found = dict(headers)  # a repeated header counts as its last
    if given := found.get("inferbus-id"):
        return given.decode("utf-8", "replace")
    if (event := found.get("ce_id")) and (origin := found.get("ce_source")):
        return f"{origin.decode('utf-8', 'replace')}/{event.decode('utf-8', 'replace')}"
    return None


Failure = tuple[int, ConnectorError]
"""Position of a record that was not written, and why: `Unavailable` (write it again) or `Refused`."""

Done = Callable[[Sequence[Failure]], None]
"""Called once per write, on the pipeline's thread, from `write` or `tick`: empty when every record is durable."""


class Bell:
    """Wakes the pipeline's thread: `ring` from any thread or signal handler, `wait` from the pipeline's only."""

    __slots__ = ("_rings",)

    def __init__(self) -> None:
        # SimpleQueue.put is reentrant; a Condition would deadlock when a signal handler rings during a wait.
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wake the pipeline now, or make its next `wait` return at once."""
        self._rings.put(None)

    def wait(self, timeout: float) -> None:
        """Sleep until the bell rings, at most `timeout` seconds; forgets all rings so far."""
        try:
            self._rings.get(timeout=timeout)
            while True:
                self._rings.get_nowait()
        except queue.Empty:
            return


class Source(Protocol):
    """At-least-once deliveries from one topic, queue or store. Used by the pipeline's thread only."""

    name: str
    """Metric label: connector and topic or queue, `kafka:digits.requests`."""

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:
        """Connect and check that the place exists and may be read.

        `drain(finished, budget)` pumps the pipeline without receiving until `finished()` or `budget` seconds have
        passed; a source calls it, on the pipeline's thread, before it must give messages away.

        Raises:
            Unavailable: Away, missing or forbidden; `open` may be called again.
            Misconfigured: The settings cannot work.
        """

    def receive(self, limit: int) -> list[Message]:
        """What is there now, at most `limit` messages; empty when nothing is. Never blocks.

        Raises:
            Unavailable: The bus is away; nothing is lost, ask again later.
            Fatal: This client cannot go on.
        """

    def settle(self, messages: Sequence[Message]) -> None:
        """Their outcomes are durable: never deliver them again. Receipts of a past epoch are ignored."""

    def release(self, messages: Sequence[Message]) -> None:
        """They were not served; give them back. Only while draining. Kafka: they come again to the next owner."""

    def inflight(self) -> tuple[int, int]:
        """Messages and bytes received and not yet durably settled: what a `kill -9` now would repeat."""

    def tick(self, now: float) -> float:
        """Make progress (commits, leases, checks); returns the monotonic time at which it wants to be called again."""

    def rest(self) -> None:
        """The pipeline is about to wait: ring the bell once `receive` would return something."""

    def lag(self) -> int | None:
        """Messages on the bus not yet received by this worker, as last known without asking; None if unknown."""

    def exhausted(self) -> bool:
        """True when nothing is left for anyone in this group; may ask the bus and block for a few seconds."""

    def void(self, message: Message) -> bool:
        """True when its receipt's epoch has passed: someone else will serve it."""

    def locate(self, message: Message) -> str:
        """Where the message lies, for people: `kafka:topic/partition/offset`."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self) -> None:
        """Make settled messages durable, leave the group, free everything. Idempotent."""


class Sink(Protocol):
    """Somewhere records become durable. Used by the pipeline's thread only."""

    name: str

    def open(self, bell: Bell) -> None:
        """Connect and check that the place exists and may be written.

        Raises:
            Unavailable: Away, missing or forbidden; `open` may be called again.
            Misconfigured: The settings cannot work.
        """

    def write(self, records: Records, done: Done) -> None:
        """Start writing; `done` is called once when every record is durable or has failed. Several may be under way.

        Records are written in order, and writes in the order they were started.
        """

    def tick(self) -> None:
        """Make progress and call the `done` of what has finished. Never blocks."""

    def rest(self) -> None:
        """The pipeline is about to wait: ring the bell when something has finished."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self, timeout: float) -> None:
        """Give pending writes at most `timeout` seconds, then drop them. Idempotent."""
