"""What every bus and store promises the pipeline: the nouns and the two protocols, `Source` and `Sink`.

The pipeline is one thread. It asks a source for what is there, hands records to sinks, and is told of completions when
it calls `tick`. Nothing here blocks and nothing awaits: a Kafka revocation callback runs inside a poll and must be able
to pump everything to its end without an event loop. A connector whose client needs threads or a loop of its own keeps
them to itself, hands its results over through plain queues, and rings the bell.

Invariant: a message is settled only after its outcome is durable; a receipt whose epoch has passed is void.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

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

    def fail(self) -> bytes | None:
        """It ends as an error: its body as it came, for the error record; None where that could not be read."""
        return self.body


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
        headers: Headers = (),
        attempts: int = 1,
    ) -> None:
        super().__init__(id, key, body, headers, created_at, attempts, receipt)
        self.code: Literal["too_large", "invalid_request"] = code
        self.reason = reason

    def fail(self) -> bytes | None:
        """Nothing is no body here, but one that could not be read."""
        return self.body or None


@dataclass(frozen=True, slots=True)
class Columns:
    """What the model answered to several requests, for stores that keep columns.

    Attributes:
        outputs: By name, the rows of all these requests stacked: axis 0 has sum(rows) elements.
        rows: Rows of each request, in order.
        model: Name of the model.
        version: Its version.
        time: Unix seconds at which it was answered.
    """

    outputs: Mapping[str, npt.NDArray[Any]]
    rows: Sequence[int]
    model: str
    version: str
    time: float

    @classmethod
    def joined(cls, several: Sequence[Columns]) -> Columns:
        """The requests of all of these, one after the other; answered by one model, at the time of the first."""
        first = several[0]
        outputs = {name: np.concatenate([columns.outputs[name] for columns in several]) for name in first.outputs}
        return cls(outputs, [n for columns in several for n in columns.rows], first.model, first.version, first.time)

    def take(self, positions: Sequence[int]) -> Columns:
        """The requests at `positions`, in that order."""
        ends = list(accumulate(self.rows))
        chosen = [row for i in positions for row in range(ends[i] - self.rows[i], ends[i])]
        outputs = {name: column[chosen] for name, column in self.outputs.items()}
        return Columns(outputs, [self.rows[i] for i in positions], self.model, self.version, self.time)


class Records:
    """Outcomes on their way out, column by column: element i of every column answers `messages[i]`.

    Columns and not objects: a record costs the pipeline four list slots. Predictions on their way to a store have
    `columns` as well; where nothing but stores takes them, their bodies are empty.
    """

    __slots__ = ("bodies", "columns", "headers", "keys", "messages")

    def __init__(
        self,
        messages: Sequence[Message],
        keys: Sequence[bytes | None],
        bodies: Sequence[bytes],
        headers: Sequence[list[tuple[str, bytes]]],
        columns: Columns | None = None,
    ) -> None:
        self.messages = messages
        self.keys = keys
        self.bodies = bodies
        self.headers = headers
        self.columns = columns

    def __len__(self) -> int:
        return len(self.bodies)

    @classmethod
    def joined(cls, several: Sequence[Records]) -> Records:
        """The records of all of these, one after the other; all of one kind."""
        if len(several) == 1:
            return several[0]
        columns = [records.columns for records in several if records.columns is not None]
        return cls(
            [m for records in several for m in records.messages],
            [key for records in several for key in records.keys],
            [body for records in several for body in records.bodies],
            [own for records in several for own in records.headers],
            Columns.joined(columns) if columns else None,
        )

    def take(self, positions: Sequence[int]) -> Records:
        """The records at `positions`, in that order."""
        return Records(
            [self.messages[i] for i in positions],
            [self.keys[i] for i in positions],
            [self.bodies[i] for i in positions],
            [self.headers[i] for i in positions],
            None if self.columns is None else self.columns.take(positions),
        )


def resolve_id(headers: Headers, named: str | None = None) -> str | None:
    """The id the sender gave; None when there is none.

    Args:
        headers: Where it is `inferbus-id`, or else that of a CloudEvent.
        named: The bus's own property for it, which comes second.
    """
    found = dict(headers)  # a repeated header counts as its last
    if given := found.get("inferbus-id"):
        return given.decode("utf-8", "replace")
    if named:
        return named
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
            Misconfigured: What is there is not what the settings say, as seen only now: the user's to mend.
        """

    def settle(self, messages: Sequence[Message]) -> None:
        """Their outcomes are durable: never deliver them again. Receipts of a past epoch are ignored."""

    def release(self, messages: Sequence[Message]) -> None:
        """They were not served; give them back. Only while draining. Kafka: they come again to the next owner."""

    def inflight(self) -> tuple[int, int]:
        """Messages and bytes received and not yet durably settled: what a `kill -9` now would repeat."""

    def holds(self, message: Message) -> bool:
        """Whether the bus may deliver it again: False only once it is durably settled; True for good if void before."""

    def tick(self, now: float) -> float:
        """Make progress (commits, leases, checks); returns the monotonic time at which it wants to be called again."""

    def rest(self) -> None:
        """The pipeline is about to wait: ring the bell once `receive` would return something."""

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Their bodies are not needed any more, only their receipts: let them go, and count their bytes no longer."""

    def stream(self, message: Message) -> Hashable:
        """What comes again together: messages of one stream become void together. None where each is for itself."""

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        """Which of these, unsettled and all of one stream, a crash now would bring again first, in their order.

        Returns:
            A name, and the longest run of them that nothing else unsettled interrupts. In a stream with an order the
            name is that of the place where it would begin again, so whatever is written under it is overwritten
            then, and never doubled; else nothing had the name before. The list given, where all of it is the run and
            in order. None: not to be told now; what was settled before is not confirmed yet.
        """

    def lag(self) -> int | None:
        """Messages on the bus not yet received by this worker, as last known without asking; None if unknown."""

    def ended(self) -> bool:
        """True when nothing will come any more, as of a file that was read; of a bus never."""

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
    """Somewhere records become durable. Used by the pipeline's thread only.

    Attributes:
        name: Connector and topic, queue or folder.
    """

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
        """Make progress and call the `done` of what has finished. Never blocks.

        Raises:
            Fatal: This client cannot go on.
        """

    def rest(self) -> None:
        """The pipeline is about to wait: ring the bell when something has finished."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self, timeout: float) -> None:
        """Give pending writes at most `timeout` seconds, then drop them. Idempotent."""


Kept = Callable[[Sequence[int]], None]
"""Called with positions of records that are durable now; in the end each position was in one call."""


@runtime_checkable
class Store(Protocol):
    """Somewhere records are kept in objects of many; used as a `Sink` is. What is away is tried again in here.

    A record is durable when the object is complete that holds it, so those of one write may be so at different times.
    """

    name: str

    def open(self, bell: Bell) -> None:
        """As of a sink."""

    def keep(self, records: Records, kept: Kept) -> None:
        """Take records into the objects that grow; `kept` is called from `tick`."""

    def drain(self) -> None:
        """Complete at the next tick what can be completed, however small: nobody will wait for more."""

    def tick(self) -> None:
        """Make progress and tell of what is durable. Never blocks."""

    def wake_at(self) -> float:
        """Monotonic time at which `tick` has something to do, or infinity."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self, timeout: float) -> None:
        """Give what is under way at most `timeout` seconds, then drop it. Idempotent."""


class Replies(Protocol):
    """Sends answers to requesters who wait for them: once, soon, and without anybody waiting for it.

    What cannot be sent is counted and dropped: the outcome is in its sink, and a requester gives up by itself.
    """

    name: str

    sent: int
    """Handed to the bus and not known to have failed."""

    failed: int

    def open(self, bell: Bell) -> None:
        """Connect; that there is a place for a reply is seen when it is sent.

        Raises:
            Unavailable: Away; `open` may be called again.
            Misconfigured: The settings cannot work.
        """

    def send(self, address: str, records: Records) -> None:
        """Send records to one topic or queue; returns at once."""

    def tick(self) -> None:
        """Make progress."""

    def close(self, timeout: float) -> None:
        """Give what is under way at most `timeout` seconds. Idempotent."""
