"""Claim check: bodies that lie in S3 while the bus carries where. A `Source` around a source, a `Sink` around a sink.

On the way in an object is fetched before the pipeline sees its message; on the way out a large prediction is stored
before its record is written. All calls to S3 are made on a thread of their own, and what is fetched or stored comes
back through a deque and the bell. The source around which this one is knows its own messages alone: it settles,
releases and voids them as they came.

Invariant: a message is overtaken by none of its key, and of those of a key one is fetched at a time, so what takes room
here never waits for another; what was fetched counts as in flight until it is settled; an object is deleted only once
its request is answered and the bus will never deliver it again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Literal

from inferbus.connectors.aws import ended
from inferbus.connectors.base import (
    Bell,
    ConnectorError,
    Done,
    Failure,
    Fatal,
    Message,
    Records,
    Refused,
    Sink,
    Source,
    TooLarge,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.claim_mapping import Claim, Malformed, Place, claim_of, header, pointer
from inferbus.connectors.s3 import BACKOFF, Storage
from inferbus.connectors.sqs_mapping import POINTED

AT_ONCE = 16  # calls of one kind
CONNECTIONS = 3 * AT_ONCE  # to fetch, to store and to delete
AHEAD = 2 * AT_ONCE  # claims that wait for their objects, beyond which no more are looked for
LOOK_EVERY = 0.25  # seconds between looks for what was lost, and for what may be deleted
DELETE_AFTER = (0.0, 0.5, 2.0)  # seconds of pause before each try to delete an object
DELETES = 10_000  # objects that wait to be deleted, beyond which they are left: as many may be settled at one moment
PAUSE = 0.005  # seconds between looks for writes that must end before closing
CLOSING = 5.0  # seconds closing waits for deletes
QUIET = 30.0  # seconds between two log lines about objects that are left

log = logging.getLogger("inferbus.claims")


class Claimed(Message):
    """A message whose body lay elsewhere and is here now.

    Attributes:
        origin: The message as it came.
        claim: Where the body lay.
        failed: Its outcome is an error, which tells others where the body lies.
        size: Bytes for which it takes room; 0 once that was let go.
    """

    __slots__ = ("claim", "failed", "origin", "size")

    def __init__(self, origin: Message, claim: Claim, body: bytes) -> None:
        o = origin
        super().__init__(o.id, o.key, body, o.headers, o.created_at, o.attempts, o.receipt)
        self.origin = origin
        self.claim = claim
        self.failed = False
        self.size = len(body)

    def fail(self) -> bytes | None:
        """The body as it came; the object stays."""
        self.failed = True
        return self.origin.fail()


class Unclaimed(Unreadable):
    """A message whose body cannot be had: what it says of it is wrong, or the object is."""

    __slots__ = ()

    def __init__(self, origin: Message, code: Literal["too_large", "invalid_request"], reason: str) -> None:
        o = origin
        super().__init__(o.id, o.created_at, o.receipt, code, reason, o.key, o.body, o.headers, o.attempts)

    def fail(self) -> bytes | None:
        """The body as it came, however little that is."""
        return self.body


class _Entry:
    """A message that cannot be handed over yet: its object is under way, or that of one before it of its key."""

    __slots__ = ("claim", "origin", "outcome", "size", "task")

    def __init__(self, origin: Message, claim: Claim | None) -> None:
        self.origin = origin
        self.claim = claim
        # Of the loop's thread, until the entry has arrived:
        self.outcome: Message | None = None
        self.size = 0  # bytes for which there is room
        self.task: asyncio.Task[None] | None = None


class ClaimSource:
    """A source whose messages may have their bodies in S3.

    Args:
        source: Where the messages come from.
        storage: S3.
        allow: Places that a message may name.
        delete: Whether an object is deleted once its request is answered for good.
        max_message_bytes: A larger body is not fetched.
        max_inflight: The pipeline's cap in messages.
        max_inflight_bytes: The pipeline's cap in bytes; what is fetched stays under it, unless it is one alone.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        source: Source,
        storage: Storage,
        allow: Sequence[Place],
        *,
        delete: bool = False,
        max_message_bytes: int = 16 * 2**20,
        max_inflight: int = 8192,
        max_inflight_bytes: int = 256 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = source.name
        self._source = source
        self._storage = storage
        self._allow = allow
        self._delete = delete
        self._max_message = max_message_bytes
        self._max_inflight = max_inflight
        self._max_bytes = max_inflight_bytes
        self._clock = clock
        self._opened = False
        # The pipeline's thread alone:
        self._held: dict[_Entry, None] = {}  # in the order they came
        self._lines: dict[bytes, deque[_Entry]] = {}  # those that have a key, by it; of each the first is being fetched
        self._ready: deque[Message] = deque()
        self._given: dict[int, Claimed] = {}  # to the pipeline, with a body that takes room
        self._answered: list[tuple[Message, Claim]] = []  # as they came; objects to be deleted
        self._look_at = 0.0
        # Each written by one thread; together the bytes that are fetched, or about to be, and not let go:
        self._admitted = 0  # by the loop's
        self._freed = 0  # by the pipeline's
        self._plain = 0  # bytes the source counts itself, as the pipeline's last knew
        # Between the two threads:
        self._arrived: deque[_Entry] = deque()
        # The loop's thread alone:
        self._fetches: set[asyncio.Task[None]] = set()
        self._deletes: set[asyncio.Task[None]] = set()
        self._troubles: dict[_Entry, str] = {}
        self._left = 0  # objects that could not be deleted
        self._said_at = -QUIET

    # Opening and closing

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:
        """Reach every bucket a message may name, then the source."""
        self._bell = bell
        self._slots, self._delete_slots = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        self._door = asyncio.Lock()  # whoever waits for room; the others queue, so that none waits for ever
        self._moved = asyncio.Event()  # there may be room now
        self._storage.open()
        try:
            reach(self._storage, self._allow, None)
            self._source.open(bell, drain)
        except BaseException:
            self._storage.close()
            raise
        self._opened = True

    def close(self) -> None:
        """Fetch no more, and close the source; objects of what is settled for good are deleted."""
        if not self._opened:
            return
        self._storage.loop.run(self._stop())
        try:
            self._source.close()
            self._delete_answered()
        finally:
            self._opened = False
            self._storage.loop.run(self._finish(CLOSING))
            self._storage.close()

    async def _stop(self) -> None:
        await ended(set(self._fetches))

    async def _finish(self, patience: float) -> None:
        if self._deletes:
            await asyncio.wait(self._deletes, timeout=patience)
        await ended(set(self._deletes))

    # Receiving

    def receive(self, limit: int) -> list[Message]:
        """What needs nothing from S3, or has it; at most `limit`."""
        self._collect()
        problem: Unavailable | None = None
        try:
            self._look_for_more(limit)
        except Unavailable as error:
            problem = error
        messages: list[Message] = []
        while self._ready and len(messages) < limit:
            m = self._ready.popleft()
            if self.void(m):
                self._let_go([m])
                continue
            if isinstance(m, Claimed):
                self._given[id(m)] = m
            messages.append(m)
        if problem is not None and not messages:
            raise problem
        return messages

    def _look_for_more(self, limit: int) -> None:
        """Ask the source, also past messages that must wait: S3 is asked for several objects at once."""
        wanted = limit - len(self._ready)
        while wanted > 0:
            came = self._source.receive(wanted)
            if not came:
                return
            for m in came:
                self._sort(m)
            if len(self._held) >= AHEAD:
                return
            wanted = min(limit - len(self._ready), self._max_inflight - self._source.inflight()[0])

    def _sort(self, m: Message) -> None:
        claim = None
        if not isinstance(m, Unreadable):
            try:
                claim = claim_of(m, self._allow)
                if claim is not None:
                    self._small_enough(claim, claim.size or 0)
            except Malformed as error:
                claim, m = None, Unclaimed(m, "invalid_request", str(error))
            except TooLarge as error:
                claim, m = None, Unclaimed(m, "too_large", str(error))
        line = self._lines.get(m.key) if m.key is not None else None
        if claim is None and line is None:
            self._ready.append(m)
            return
        entry = _Entry(m, claim)
        self._held[entry] = None
        if line is not None:
            line.append(entry)
            return
        if m.key is not None:
            self._lines[m.key] = deque([entry])
        self._storage.loop.call(partial(self._begin, entry))

    def _collect(self) -> None:
        """Let go on what has arrived, and what waited behind it."""
        while self._arrived:
            entry = self._arrived.popleft()
            assert entry.outcome is not None  # noqa: S101 - narrows the type; it is why the entry is here
            if entry not in self._held:
                self._let_go([entry.outcome])  # lost on the way
                continue
            del self._held[entry]
            self._ready.append(entry.outcome)
            if (key := entry.origin.key) is not None:
                self._lines[key].popleft()
                self._advance(key)

    def _advance(self, key: bytes) -> None:
        """What is first in its line now goes on, or is fetched."""
        line = self._lines[key]
        while line and line[0].claim is None:
            entry = line.popleft()
            del self._held[entry]
            self._ready.append(entry.origin)
        if line:
            self._storage.loop.call(partial(self._begin, line[0]))
        else:
            del self._lines[key]

    def _drop_void(self) -> None:
        """Whoever owns these now will fetch and serve them."""
        lost = [entry for entry in self._held if self._source.void(entry.origin)]
        for entry in lost:
            del self._held[entry]
            self._storage.loop.call(partial(self._cancel, entry))
        for key in {key for entry in lost if (key := entry.origin.key) is not None}:
            line = self._lines[key]
            self._lines[key] = deque(entry for entry in line if entry in self._held)
            if line[0] not in self._held:
                self._advance(key)
        self._let_go([m for m in self._given.values() if self.void(m)])

    def _let_go(self, messages: Iterable[Message]) -> None:
        """Their bodies take no room any more."""
        before = self._freed
        for m in messages:
            if isinstance(m, Claimed):
                self._given.pop(id(m), None)
                self._freed += m.size
                m.size = 0
        if self._freed > before and self._opened:
            self._storage.loop.call(self._moved.set)

    # Fetching, on the loop's thread

    def _begin(self, entry: _Entry) -> None:
        entry.task = asyncio.create_task(self._fetch(entry))
        self._fetches.add(entry.task)
        entry.task.add_done_callback(partial(self._fetch_ended, entry))

    def _fetch_ended(self, entry: _Entry, task: asyncio.Task[None]) -> None:
        self._fetches.discard(task)
        self._troubles.pop(entry, None)

    def _cancel(self, entry: _Entry) -> None:
        if entry.task is not None:
            entry.task.cancel()

    async def _fetch(self, entry: _Entry) -> None:
        """Until the body is here, or known never to be; tried for as long as S3 is away."""
        pause, longest = BACKOFF
        while entry.outcome is None:
            async with self._slots:
                await self._try(entry)
            if entry.outcome is None:  # the others need not wait for this one's next try
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
                pause = min(longest, 2 * pause)
        self._arrived.append(entry)
        self._bell.ring()

    async def _try(self, entry: _Entry) -> None:
        """Give the entry its outcome, if S3 lets us; of the room it took, what its body does not need is given back."""
        claim, origin = entry.claim, entry.origin
        assert claim is not None  # noqa: S101 - narrows the type; no other is fetched
        body = b""
        try:
            content = await self._storage.get(claim.bucket, claim.key, partial(self._admit, entry, claim))
            body = _verified(claim, content)
            entry.outcome = Claimed(origin, claim, body)
        except Malformed as error:
            entry.outcome = Unclaimed(origin, "invalid_request", str(error))
        except TooLarge as error:
            entry.outcome = Unclaimed(origin, "too_large", str(error))
        except Refused as error:
            reason = f"{claim.field}: expected an object there ({error})"
            entry.outcome = Unclaimed(origin, "invalid_request", reason)
        except ConnectorError as error:
            self._troubles[entry] = str(error)
        finally:
            self._admitted -= entry.size - len(body)
            entry.size = 0
            self._moved.set()

    async def _admit(self, entry: _Entry, claim: Claim, size: int) -> None:
        """Before anything of the body is read: it must be as large as was said, and there must be room.

        There will be: room is taken by what is being read and by what nothing keeps from the pipeline, and when all of
        it is free anything fits.
        """
        self._troubles.pop(entry, None)
        self._small_enough(claim, size)
        if claim.size not in (None, size):
            raise Malformed(f"{claim.field}: expected an object of {claim.size} bytes, it has {size}")
        async with self._door:
            while not self._fits(size):
                self._moved.clear()
                await self._moved.wait()
            self._admitted += size
            entry.size = size

    def _small_enough(self, claim: Claim, size: int) -> None:
        most = self._max_message * 3 // 2 if claim.base64 else self._max_message
        if size > most:
            text = f"the body has {size} bytes, at most {self._max_message} are allowed (flow.max_message_bytes)"
            raise TooLarge(text)

    def _fits(self, size: int) -> bool:
        reserved = self._admitted - self._freed
        return not reserved or self._plain + reserved + size <= self._max_bytes

    # Settling

    def settle(self, messages: Sequence[Message]) -> None:
        """Settle them as they came."""
        self._let_go(messages)
        if self._delete:
            self._answered += [(m.origin, m.claim) for m in messages if isinstance(m, Claimed) and not m.failed]
        self._source.settle(_origins(messages))

    def release(self, messages: Sequence[Message]) -> None:
        """Give them back, and what waits here."""
        waiting = [entry.origin for entry in self._held] + _origins(self._ready)
        for entry in self._held:
            self._storage.loop.call(partial(self._cancel, entry))
        self._let_go([*messages, *self._ready])
        self._held.clear()
        self._lines.clear()
        self._ready.clear()
        self._source.release([*_origins(messages), *waiting])

    def holds(self, message: Message) -> bool:
        """As the source knows it."""
        return self._source.holds(_origin(message))

    def inflight(self) -> tuple[int, int]:
        """What the source counts, and the bytes fetched.

        What is ready here counts as well, but never keeps itself from being received: with however little of a body,
        the one before all that is settled and not confirmed may be among it.
        """
        messages, self._plain = self._source.inflight()
        size = self._plain + self._admitted - self._freed
        if self._ready:
            messages = min(messages, self._max_inflight - len(self._ready))
            size = min(size, self._max_bytes - max(1, sum([len(m.body) for m in self._ready])))
        return max(0, messages), max(0, size)

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        self._let_go(messages)
        for m in messages:
            if isinstance(m, Claimed):
                m.body = b""
        self._source.forget_bodies(_origins(messages))

    def tick(self, now: float) -> float:
        """Take what has arrived; from time to time drop what was lost, and delete what may be."""
        self._collect()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self._drop_void()
            self._delete_answered()
            if self._held:
                self._storage.loop.call(self._moved.set)  # the source may count less than it did
        wake = self._source.tick(now)
        return min(wake, self._look_at) if self._held or self._answered else wake

    # Deleting

    def _delete_answered(self) -> None:
        """Begin to delete what the bus will never bring again; what it will bring to another is kept."""
        kept: list[tuple[Message, Claim]] = []
        for origin, claim in self._answered:
            if not self._source.holds(origin):
                self._storage.loop.call(partial(self._remove, claim))
            elif not self._source.void(origin):
                kept.append((origin, claim))
        self._answered = kept

    def _remove(self, claim: Claim) -> None:
        if len(self._deletes) >= DELETES:
            self._leave("too many wait for it")
            return
        task = asyncio.create_task(self._deleted(claim))
        self._deletes.add(task)
        task.add_done_callback(self._deletes.discard)

    async def _deleted(self, claim: Claim) -> None:
        why = ""
        for pause in DELETE_AFTER:
            await asyncio.sleep(pause)
            try:
                async with self._delete_slots:
                    await self._storage.delete(claim.bucket, claim.key)
            except ConnectorError as error:
                why = str(error)
            else:
                return
        self._leave(why)

    def _leave(self, why: str) -> None:
        """An object stays that was to be deleted."""
        self._left += 1
        if self._clock() - self._said_at > QUIET:
            self._said_at = self._clock()
            log.warning("%s: %d objects could not be deleted and stay: %s", self.name, self._left, why)

    # Asked by others

    def rest(self) -> None:
        """The loop's thread rings by itself."""
        self._source.rest()

    def stream(self, message: Message) -> Hashable:
        """As the source knows it."""
        return self._source.stream(_origin(message))

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        """As the source knows it."""
        origins = _origins(messages)
        found = self._source.run(origins)
        if found is None or found[1] is origins:
            return found and (found[0], messages)
        outer = {id(origin): m for origin, m in zip(origins, messages, strict=True)}
        return found[0], [outer[id(origin)] for origin in found[1]]

    def lag(self) -> int | None:
        """As the source knows it."""
        return self._source.lag()

    def ended(self) -> bool:
        """Nothing will come of the source, and nothing waits here."""
        return not self._held and not self._ready and self._source.ended()

    def exhausted(self) -> bool:
        """Nothing is left there or here."""
        return not self._held and not self._ready and self._source.exhausted()

    def void(self, message: Message) -> bool:
        """As the source knows it."""
        return self._source.void(_origin(message))

    def locate(self, message: Message) -> str:
        """Where the message lies, not its body."""
        return self._source.locate(_origin(message))

    def healthy(self) -> str | None:
        """What is wrong with the source, or keeps an object from being fetched."""
        return self._source.healthy() or next(iter(list(self._troubles.values())), None)


class _Write:
    """The records of one `write`, of which some must be stored first; `left` counts those that are under way."""

    __slots__ = ("done", "error", "left", "records", "stored")

    def __init__(self, records: Records, done: Done, left: int) -> None:
        self.records = records
        self.done = done
        self.left = left
        self.stored: dict[int, tuple[str, str]] = {}  # by position: name and SHA-256
        self.error: ConnectorError | None = None

    def fail(self, error: ConnectorError) -> None:
        """None of it was written."""
        self.error = error  # so that no more of it is stored
        self.done([(i, error) for i in range(len(self.records))])


class ClaimSink:
    """A sink whose large records have their bodies in S3.

    An object's name is made of the record's id and body, so one that is written again overwrites itself. What fails,
    in S3 or in the sink, fails with all that is behind it: whoever writes it again then does so in order.

    Args:
        sink: Where the records go.
        storage: S3.
        to: Where the bodies go.
        over: Bytes of a body beyond which it is stored.
        pointers: Whether records are also to be read by the SQS extended client.
    """

    def __init__(self, sink: Sink, storage: Storage, to: Place, over: int, *, pointers: bool = False) -> None:
        self.name = sink.name
        self._sink = sink
        self._storage = storage
        self._to = to
        self._over = over
        self._pointers = pointers
        self._opened = False
        self._writes: deque[_Write] = deque()  # those that are not with the sink yet
        self._inside = 0  # those that are, and not done
        self._problem: str | None = None
        self._uploads: set[asyncio.Task[None]] = set()  # of the loop's thread

    def open(self, bell: Bell) -> None:
        """See that objects can be stored, then reach the sink."""
        self._bell = bell
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._storage.open()
        try:
            reach(self._storage, (), self._to)
            self._sink.open(bell)
        except BaseException:
            self._storage.close()
            raise
        self._opened = True

    def write(self, records: Records, done: Done) -> None:
        """Store what is large, then write; later writes wait for earlier ones."""
        large = [i for i, body in enumerate(records.bodies) if len(body) > self._over]
        write = _Write(records, done, len(large))
        if not large and not self._writes:
            self._pass_on(write)
            return
        self._writes.append(write)
        if large:
            self._storage.loop.call(partial(self._begin, write, large))

    # On the loop's thread

    def _begin(self, write: _Write, positions: Sequence[int]) -> None:
        for i in positions:
            task = asyncio.create_task(self._store(write, i))
            self._uploads.add(task)
            task.add_done_callback(self._uploads.discard)

    async def _store(self, write: _Write, i: int) -> None:
        try:
            async with self._slots:
                if write.error is None:
                    write.stored[i] = await self._stored(write.records.messages[i].id, write.records.bodies[i])
        except ConnectorError as error:
            write.error = error
        finally:
            write.left -= 1
            if write.error is not None or not write.left:
                self._bell.ring()

    async def _stored(self, id_: str, body: bytes) -> tuple[str, str]:
        """Name and SHA-256 of the object that has this body now."""
        own = hashlib.sha256(id_.encode())
        own.update(body)
        name = own.hexdigest()
        await self._storage.put(self._to.bucket, self._to.prefix + name, body)
        return name, hashlib.sha256(body).hexdigest()

    # Asked by the pipeline

    def tick(self) -> None:
        """Write what is stored. What could not be is to be written again once all before it is durable, or is too."""
        while self._writes and not self._writes[0].left and self._writes[0].error is None:
            self._pass_on(self._writes.popleft())
        if self._writes and (error := self._writes[0].error) is not None and not self._inside:
            self._problem = str(error)
            self._fail_waiting(error)
        self._sink.tick()

    def _pass_on(self, write: _Write) -> None:
        self._inside += 1
        self._sink.write(self._claiming(write), partial(self._written, write))

    def _written(self, write: _Write, failures: Sequence[Failure]) -> None:
        self._inside -= 1
        write.done(failures)
        held = next((error for _, error in failures if not isinstance(error, Refused)), None)
        if held is not None:
            self._fail_waiting(held)
        elif write.stored or not self._writes:
            self._problem = None  # S3 answers, or nothing waits for it

    def _fail_waiting(self, error: ConnectorError) -> None:
        """What came before will be written again: so must this be, behind it."""
        waiting, self._writes = self._writes, deque()
        for write in waiting:
            write.fail(error)

    def _claiming(self, write: _Write) -> Records:
        """The records, with claims in place of what is stored."""
        if not write.stored:
            return write.records
        r = write.records
        bodies, headers = list(r.bodies), list(r.headers)
        for i, (name, digest) in write.stored.items():
            size = len(bodies[i])
            headers[i] = [*headers[i], header(self._to, name, size, digest)]
            if self._pointers:
                headers[i].append((POINTED[0], str(size).encode()))
            bodies[i] = pointer(self._to, name) if self._pointers else b""
        return Records(r.messages, r.keys, bodies, headers)

    def rest(self) -> None:
        """The loop's thread rings by itself."""
        self._sink.rest()

    def healthy(self) -> str | None:
        """What is wrong with the sink, or keeps an object from being stored."""
        failed = (str(write.error) for write in self._writes if write.error is not None)
        return self._sink.healthy() or next(failed, self._problem)

    def close(self, timeout: float) -> None:
        """Wait for pending writes, then drop them."""
        if not self._opened:
            return
        self._opened = False
        until = time.monotonic() + timeout
        with contextlib.suppress(Fatal):  # the sink can go on no more: nor can what is pending
            while self._writes and time.monotonic() < until:
                self.tick()
                time.sleep(PAUSE)
        self._writes.clear()
        self._storage.loop.run(self._stop())
        self._storage.close()
        self._sink.close(max(0.0, until - time.monotonic()))

    async def _stop(self) -> None:
        await ended(set(self._uploads))


def reach(storage: Storage, allow: Sequence[Place], to: Place | None) -> None:
    """See that the buckets of `allow` are there, and that `to` may be written.

    Raises:
        Unavailable: One is away, missing or forbidden.
    """
    storage.open()
    try:
        for bucket in dict.fromkeys(place.bucket for place in allow):
            storage.loop.run(storage.reach(bucket))
        if to is not None:
            storage.loop.run(storage.try_to_write(*to))
    finally:
        storage.close()


def _verified(claim: Claim, content: bytes) -> bytes:
    """The body that lies in an object.

    Raises:
        Malformed: It is not what it was said to be.
    """
    if claim.sha256 is not None and hashlib.sha256(content).hexdigest() != claim.sha256:
        raise Malformed(f"{claim.field}: expected an object with that sha256, it has another")
    if not claim.base64:
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except ValueError:
        raise Malformed("the object is not base64, as attribute inferbus-encoding says") from None


def _origin(m: Message) -> Message:
    return m.origin if isinstance(m, Claimed) else m


def _origins(messages: Iterable[Message]) -> list[Message]:
    return [m.origin if isinstance(m, Claimed) else m for m in messages]
