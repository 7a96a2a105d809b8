"""Kafka as a Source and a Sink, on librdkafka through confluent-kafka.

The clients have C threads of their own, so the pipeline's thread polls them without blocking. Only when there is
nothing to do does a client park: one thread sits in its `poll` and rings the bell at the first sign of work. A client
is used either by the pipeline or by its parked thread, never by both: the binding lets one call into a consumer at a
time, and a second one waits for as long as the poll lasts. So commits are asynchronous and confirmed by a callback that
any poll serves, and whatever must ask the cluster and wait asks through a client of its own.

Offsets are committed as the contiguous prefix of settled ones, per partition and assignment epoch. A partition that is
revoked is drained first, then committed, then fenced; a receipt of a fenced epoch is void. The client's revocation
callback cannot be deferred, which is why everything it waits for works without an event loop.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby, repeat
from operator import itemgetter
from queue import SimpleQueue
from types import MethodType
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as Raw
from confluent_kafka.admin import AclOperation

from inferbus.connectors.base import (
    Bell,
    ConnectorError,
    Done,
    Failure,
    Fatal,
    Message,
    Records,
    Unavailable,
    Unreadable,
    resolve_id,
)
from inferbus.connectors.gaps import Gaps
from inferbus.connectors.kafka_client import (
    FENCED,
    NEVER_TAKEN,
    REACH,
    UNREADABLE,
    Config,
    Trouble,
    administrator,
    consumer_config,
    headers_of,
    largest_batch,
    may,
    new_client,
    producer_config,
    reach_topic,
    reads_from_start,
    translated,
    write_error,
)
from inferbus.connectors.kafka_probe import probing
from inferbus.connectors.threads import Clerk, Parking

DRAIN_BUDGET = 5.0  # seconds a revocation may wait: the whole group waits with it
COMMIT_EVERY = 0.05  # seconds after the prefix moved; with a parked round, 0.1 at the latest
PARK = 0.05  # seconds of one parked poll: how long a commit may wait for the client
STARVED = 1.0  # seconds without credit until fetching is paused: a pause throws the prefetched away
STASH = 64  # messages kept from polls made without credit
WATCH_EVERY = 5.0  # seconds between looks for partitions that do not move
JOINING = 8.0  # seconds leaving may wait for a join under way: two heartbeats of the others, and some
SINGLY = 60.0  # seconds records go one by one after the broker has refused a batch
STALLED = 60.0  # seconds assigned, behind, asked and not moving: then the client is built anew

# A receipt of this source is (Lease, offset).
RECEIPT_LEASE: Callable[[Any], Lease] = itemgetter(0)
RECEIPT_OFFSET: Callable[[Any], int] = itemgetter(1)


class Revocation:
    """Partitions taken away while the client was parked, and the two signals its threads give each other."""

    __slots__ = ("drained", "fenced", "leases")

    def __init__(self, leases: list[Lease]) -> None:
        self.leases = leases
        self.drained = threading.Event()
        self.fenced = threading.Event()


class Lease:
    """One assignment of one partition: its epoch. Receipts point here; a closed lease voids them."""

    __slots__ = ("gaps", "moved_at", "open", "partition", "repeated", "siblings", "suspected")

    def __init__(self, partition: int, siblings: int, now: float) -> None:
        self.partition = partition
        self.siblings = siblings  # partitions of the topic, this one included
        self.open = True
        self.gaps = Gaps()
        self.moved_at = now  # monotonic seconds of the last sign of progress
        self.repeated = False  # offsets came that had come before: did the log itself go back?
        self.suspected: int | None = None  # a readable offset ahead that the client had not brought, one look ago


class KafkaSource:
    """At-least-once deliveries from one topic for one consumer group.

    Args:
        topic: The topic's name.
        group: The consumer group; its committed offsets are where this source begins.
        config: librdkafka properties, `bootstrap.servers` among them; they override the defaults chosen here.
        start: `earliest` or `latest`: where a group without committed offsets begins.
        max_inflight: The pipeline's cap in messages; sizes prefetching and commit steps.
        max_inflight_bytes: The pipeline's cap in bytes; sizes prefetching.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        topic: str,
        group: str,
        config: Config,
        *,
        start: str = "earliest",
        max_inflight: int = 8192,
        max_inflight_bytes: int = 256 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"kafka:{topic}"
        self._topic = topic
        self._clock = clock
        self._config = consumer_config(config, group, start, max_inflight, max_inflight_bytes)
        self._earliest = reads_from_start(self._config)
        self._commit_step = max(1, max_inflight // 4)
        self._consumer: Consumer | None = None
        self._leases: dict[int, Lease] = {}
        self._stash: list[Raw] = []  # received by a poll that was made for other reasons
        self._committing: list[tuple[Lease, int]] = []  # positions sent and not acknowledged
        self._commit_answers: deque[str | None] = deque()
        self._lags: dict[int, int] = {}
        self._asked_at = clock()  # when the pipeline last had credit and asked
        self._served_at = self._asked_at  # when the client's callbacks were last served
        self._paused = False
        self._commit_at: float | None = None  # when the moved prefix must be committed at the latest
        self._watch_at = 0.0
        self._trouble = Trouble(self._statistics)
        self._problem: str | None = None  # assigned, behind and not moving
        self._revocations: SimpleQueue[Revocation] = SimpleQueue()
        self._joining_since: float | None = None  # asked to be let into the group, and not answered

    # Opening and closing

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:
        """Reach the cluster, see that the topic is there, and join the group."""
        self._bell = bell
        self._drain = drain
        self._thread = threading.get_ident()
        self._connect()

    def _connect(self) -> None:
        self._trouble = Trouble(self._statistics)
        callbacks = self._trouble.callbacks() | {"on_commit": self._on_commit}
        consumer = new_client(Consumer, self._config | callbacks)
        try:
            listed = reach_topic(consumer, self._topic, self._trouble)
            may(AclOperation.READ, administrator(self._config, listed), self._topic, self._config["group.id"])
        except ConnectorError:
            consumer.close()
            raise
        self._partitions = listed.partitions
        self._consumer = consumer
        self._joining_since = self._clock()
        self._watcher = Clerk(self._bell)
        self._parking = Parking(lambda: self._park(consumer), self._bell)
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def close(self) -> None:
        """Commit what is settled, then leave the group: after leaving, the generation may be gone."""
        if self._consumer is None:
            return
        self._disconnect(commit=True)

    def _disconnect(self, *, commit: bool) -> None:
        consumer = self._consumer
        assert consumer is not None  # noqa: S101 - narrows the type; every caller has looked
        self._parking.close(meanwhile=self._serve_revocations)
        self._watcher.close()
        leases = list(self._leases.values())
        if commit:
            self._commit_now(consumer, leases)
        self._committing = []
        self._fence(leases)
        if commit:
            self._leave_cleanly(consumer)
        self._fence(list(self._leases.values()))
        self._stash = []
        self._consumer = None
        with translated("close"):
            consumer.close()

    def _leave_cleanly(self, consumer: Consumer) -> None:
        """Be let into the group before leaving it.

        The broker answers a join when all members have come, and reads nothing else of that connection until then.
        Closed meanwhile, the client would be gone and its member not, and the group would wait for a ghost.
        """
        until = self._clock() + JOINING
        while self._joining_since is not None and self._clock() < until and not self._trouble.away():
            with contextlib.suppress(KafkaException, RuntimeError):
                consumer.poll(PARK)  # what comes is dropped: nothing of it is committed
        with contextlib.suppress(KafkaException, RuntimeError):
            if not consumer.assignment():
                # Nor does the client say goodbye when it closes without a partition; to unsubscribe does.
                consumer.unsubscribe()
                consumer.poll(2 * PARK)

    # Receiving

    def receive(self, limit: int) -> list[Message]:
        """Everything the client holds, at most `limit`; [] while it is parked, for then there is nothing."""
        consumer = self._consumer
        if consumer is None:
            return self._reconnect()
        self._asked_at = self._clock()
        self._serve_revocations()
        if self._parking.parked:
            return []
        if self._paused:
            self._resume(consumer)
        if len(self._stash) < limit:
            with translated("receive"):  # what the stash holds must survive an error: the client is past it
                fresh = consumer.consume(limit - len(self._stash), 0)
            self._stash += fresh  # not in one step with the call, in which a revocation may purge the stash
            self._served_at = self._asked_at
        raw, self._stash = self._stash[:limit], self._stash[limit:]
        return self._accept(raw) if raw else []

    def _accept(self, raw: list[Raw]) -> list[Message]:
        """Messages of the leases held now, tracked; records that carry an error are dealt with."""
        messages: list[Message] = []
        failed: list[Raw] = []
        if any(map(Raw.error, raw)):
            failed = [m for m in raw if m.error() is not None]
            raw = [m for m in raw if m.error() is None]
        if raw:
            self._trouble.clear_refusal()
        for partition, run in groupby(raw, Raw.partition):
            lease = self._leases.get(partition)
            if lease is not None:  # else revoked while the client handed these over; the next owner gets them
                messages += self._track(lease, list(run))
        for m in failed:  # last: an unreadable batch is reported ahead of the records before it
            messages += self._on_error(m)
        return messages

    def _track(self, lease: Lease, run: list[Raw]) -> list[Message]:
        """Consecutive records of one partition as messages."""
        lease.moved_at = self._asked_at
        highest = lease.gaps.highest
        if highest is not None and run[0].offset() <= highest:
            # Around a rebalance the client may hand over once more what it just did: that is being served.
            run = [m for m in run if m.offset() > highest]
            self._watch_at = 0.0
            lease.repeated = True
        stem = f"{self._topic}-{lease.partition}-"
        offsets = list(map(Raw.offset, run))
        bodies = [body or b"" for body in map(Raw.value, run)]
        headers, unread = headers_of(run)
        ids = [(own and resolve_id(own)) or f"{stem}{offset}" for own, offset in zip(headers, offsets, strict=True)]
        keys = list(map(Raw.key, run))
        created = [stamp[1] / 1000 if stamp[1] >= 0 else None for stamp in map(Raw.timestamp, run)]
        receipts = [(lease, offset) for offset in offsets]
        size = sum(map(len, bodies)) + sum(map(len, filter(None, keys)))
        if any(headers):
            size += sum(len(value) for own in headers for _, value in own if value)
        lease.gaps.receive(offsets, size)
        messages = list(map(Message, ids, keys, bodies, headers, created, repeat(1), receipts))
        for i in unread:
            m, why = messages[i], "the name of a header is not UTF-8, so the headers could not be read"
            messages[i] = Unreadable(m.id, m.created_at, m.receipt, "invalid_request", why, m.key, m.body)
        return messages

    def _on_error(self, m: Raw) -> list[Message]:
        """An event in place of a message: note it, or skip a batch that can never be read."""
        error = m.error()
        code = error.code()
        if error.fatal() or code in FENCED:
            raise Fatal(f"kafka: {error.str()}")
        if code in UNREADABLE and m.partition() in self._leases:
            try:
                return self._skip(self._leases[m.partition()], m.offset(), error.str())
            except Unavailable as unavailable:  # the client will report the batch again
                self._trouble.say("skip", str(unavailable))
        self._trouble.note(error)
        return []

    def _skip(self, lease: Lease, bad: int, reason: str) -> list[Message]:
        """One `Unreadable` for each offset of the poison batch that holds `bad`, and the client moved past it.

        The client would report the same batch for ever: its position never moves, and it does not say where the batch
        ends. So a second client, outside the group, looks for the first offset after it that can be read.
        """
        assert self._consumer is not None  # noqa: S101 - narrows the type
        highest = lease.gaps.highest
        with probing(self._config) as probe:
            first = probe.begin(self._topic, lease.partition) if highest is None else highest + 1
            if first < bad and probe.look(self._topic, lease.partition, first)[0] == "message":
                return []  # records before the batch are still to come; the client will report it again after them
            end = probe.end_of_unreadable(self._topic, lease.partition, max(first, bad))
        with translated("seek"):
            self._consumer.seek(TopicPartition(self._topic, lease.partition, end))
        offsets = range(max(first, bad), end)
        lease.gaps.receive(offsets, 0)
        text = f"the record batch could not be read by the client ({reason})"
        return [
            Unreadable(f"{self._topic}-{lease.partition}-{o}", None, (lease, o), "too_large", text) for o in offsets
        ]

    # Settling

    def settle(self, messages: Sequence[Message]) -> None:
        """Mark as done; the prefix is committed once it grew by a quarter of the flow, or 100 ms after it moved."""
        for lease, run in groupby([m.receipt for m in messages], RECEIPT_LEASE):
            lease.gaps.settle(map(RECEIPT_OFFSET, run))
        if self._commit_at is None:
            self._commit_at = self._clock() + COMMIT_EVERY

    def release(self, messages: Sequence[Message]) -> None:
        """Nothing to tell the broker: an offset that is not committed comes again to the next owner."""

    def inflight(self) -> tuple[int, int]:
        """Received and not covered by an acknowledged commit."""
        messages = size = 0
        for lease in self._leases.values():
            messages += lease.gaps.inflight_messages
            size += lease.gaps.inflight_bytes
        return messages, size

    def holds(self, message: Message) -> bool:
        """Not covered by an acknowledged commit."""
        confirmed = RECEIPT_LEASE(message.receipt).gaps.confirmed
        return confirmed is None or RECEIPT_OFFSET(message.receipt) >= confirmed

    def tick(self, now: float) -> float:
        """Commit what is due, keep the client alive without credit, watch for partitions that do not move."""
        consumer = self._consumer
        if consumer is None:
            return now + 1.0
        self._serve_revocations()
        self._watcher.tick()
        if self._consumer is not consumer:
            return now  # the watcher has put it away; the next `receive` makes a new one
        if not self._parking.parked:
            self._parking.catch_up()
            if now - self._asked_at > STARVED:
                self._idle_without_credit(consumer)
            elif self._committing and now > self._served_at and len(self._stash) < STASH:
                self._serve_callbacks(consumer, now)
        while self._commit_answers:
            self._committed(self._commit_answers.popleft())
        if self._commit_at is not None and not self._committing:
            self._commit_if_due(consumer, now)
        if now >= self._watch_at:
            self._watch_at = now + WATCH_EVERY
            self._watch(now)
        wake = min(self._watch_at, now + STARVED)
        if not self._committing:
            return min(wake, self._commit_at or wake)
        # A parked poll rings for the acknowledgement; else nobody polls while the pipeline rests, so come back for it.
        return wake if self._parking.parked else now + 0.001

    def _serve_callbacks(self, consumer: Consumer, now: float) -> None:
        """Without credit nothing is received, but the acknowledgement that frees credit comes through a poll too."""
        with translated("poll"):
            m = consumer.poll(0)
        self._served_at = now
        if m is not None:
            self._stash.append(m)

    def _commit_if_due(self, consumer: Consumer, now: float) -> None:
        ready = self._unconfirmed(self._leases.values())
        if not ready:
            self._commit_at = None
            return
        grown = sum(position - (lease.gaps.confirmed or 0) for lease, position in ready)
        if grown < self._commit_step and self._commit_at is not None and now < self._commit_at:
            return
        self._commit_at = None
        if self._parking.parked:
            # A call now would wait until the parked poll ends: let the parked thread make it before its next round.
            self._parking.before_next = partial(self._send_commit, consumer, ready)
        else:
            self._send_commit(consumer, ready)
        self._committing = ready

    def _unconfirmed(self, leases: Iterable[Lease]) -> list[tuple[Lease, int]]:
        return [(lease, at) for lease in leases if (at := lease.gaps.unconfirmed()) is not None]

    def _send_commit(self, consumer: Consumer, ready: list[tuple[Lease, int]]) -> None:
        # A revocation may have come first: what it committed must not be moved back, or the new owner repeats it.
        ready = [(lease, at) for lease, at in ready if lease.open]
        if not ready:
            self._commit_answers.append(None)
            return
        try:
            consumer.commit(offsets=self._places(ready), asynchronous=True)
        except (KafkaException, RuntimeError) as error:
            self._commit_answers.append(str(error))

    def _places(self, ready: list[tuple[Lease, int]]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, lease.partition, position) for lease, position in ready]

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """On whichever thread polls; the pipeline applies it at its next tick."""
        failed = error or next((p.error for p in partitions if p.error), None)
        self._commit_answers.append(failed and failed.str())
        self._bell.ring()

    def _committed(self, failure: str | None) -> None:
        ready, self._committing = self._committing, []
        if failure is None:
            for lease, position in ready:
                lease.gaps.confirm(position)
        elif ready:
            # Not covered, not freed: the next try carries the same positions or later ones. In a rebalance the new
            # owner serves what we could not commit.
            self._trouble.say("commit", failure)
        if self._commit_at is None:
            self._commit_at = self._clock() + COMMIT_EVERY

    # For stores

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        by_lease = groupby(messages, lambda m: RECEIPT_LEASE(m.receipt))
        for lease, run in by_lease:
            lease.gaps.shed([(RECEIPT_OFFSET(m.receipt), len(m.body)) for m in run])
        for m in messages:
            m.body = b""

    def stream(self, message: Message) -> Lease:
        """A partition, as long as it is assigned."""
        return RECEIPT_LEASE(message.receipt)

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        """`topic/partition/offset`, where a crash now would make the group begin again, and the run from there."""
        lease = RECEIPT_LEASE(messages[0].receipt)
        if lease.gaps.unconfirmed() is not None:
            return None
        name = f"{self._topic}/{lease.partition}/{lease.gaps.position or 0:020}"
        return name, lease.gaps.run([RECEIPT_OFFSET(m.receipt) for m in messages], messages)

    # Rebalances

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        now = self._clock()
        self._joining_since = None
        self._trouble.clear_refusal()  # of the group; one of the topic comes again
        # Partitions may have been added; that they are more than we know is all that matters here.
        self._partitions = max([self._partitions, *(p.partition + 1 for p in partitions)])
        if not self._earliest:
            self._hold_places(consumer, partitions)
        # A fresh dict, because another thread may be reading the old one.
        self._leases = {**self._leases, **{p.partition: Lease(p.partition, self._partitions, now) for p in partitions}}
        # The client keeps a pause over an assignment: a partition lost while paused would never be read again.
        consumer.resume([*consumer.assignment(), *partitions] if self._paused else partitions)
        self._paused = False

    def _hold_places(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit where a group without offsets begins at the end, or a crash before its first commit skips requests."""
        try:
            held = consumer.committed([TopicPartition(self._topic, p.partition) for p in partitions], REACH)
            fresh = [p for p in held if p.offset < 0]
            for p in fresh:
                p.offset = consumer.get_watermark_offsets(p, REACH)[1]
            if fresh:
                consumer.commit(offsets=fresh, asynchronous=False)
        except (KafkaException, RuntimeError) as error:
            self._trouble.say("latest", str(error))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Drain within the budget, commit, fence: in this order, or finished work would be served twice."""
        self._joining_since = self._clock()  # as all members do when partitions move
        leases = [self._leases[p.partition] for p in partitions if p.partition in self._leases]
        if threading.get_ident() == self._thread:
            self._drain(lambda: all(lease.gaps.idle() for lease in leases), DRAIN_BUDGET)
            self._commit_now(consumer, leases)
            self._fence(leases)
            return
        # Parked: only the pipeline's thread may pump, and only this one may use the client.
        revocation = Revocation(leases)
        self._revocations.put(revocation)
        self._bell.ring()
        revocation.drained.wait(DRAIN_BUDGET + REACH)
        self._commit_now(consumer, leases)
        self._fence(leases)
        revocation.fenced.set()

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._joining_since = self._clock()
        # Another member may own them already: committing here would move its offsets.
        self._fence([self._leases[p.partition] for p in partitions if p.partition in self._leases])
        self._bell.ring()

    def _serve_revocations(self) -> None:
        """Drain for a revocation that came to the parked thread, and wait while it commits."""
        while not self._revocations.empty():  # and nobody else takes from it
            revocation = self._revocations.get()
            self._drain(lambda r=revocation: all(lease.gaps.idle() for lease in r.leases), DRAIN_BUDGET)  # type: ignore[misc]  # mypy loses the default
            revocation.drained.set()
            revocation.fenced.wait(REACH)

    def _commit_now(self, consumer: Consumer, leases: list[Lease]) -> None:
        ready = self._unconfirmed(leases)
        if not ready:
            return
        try:
            consumer.commit(offsets=self._places(ready), asynchronous=False)
        except (KafkaException, RuntimeError) as error:
            self._trouble.say("commit", str(error))
            return
        for lease, position in ready:
            lease.gaps.confirm(position)

    def _fence(self, leases: list[Lease]) -> None:
        for lease in leases:
            lease.open = False
        self._leases = {p: lease for p, lease in self._leases.items() if lease.open}
        # Assigned anew, these partitions begin at what is committed, so what waits here comes again.
        self._stash = [m for m in self._stash if m.error() is not None or m.partition() in self._leases]

    # Without credit, without messages, without progress

    def _idle_without_credit(self, consumer: Consumer) -> None:
        """Keep polling so that the group goes on, with fetching paused so that nothing arrives."""
        with translated("poll"):
            if not self._paused:
                self._paused = True
                consumer.pause(consumer.assignment())
        self._serve_callbacks(consumer, self._clock())

    def _resume(self, consumer: Consumer) -> None:
        self._paused = False
        with translated("resume"):
            consumer.resume(consumer.assignment())

    def rest(self) -> None:
        """Park a thread in the client's poll until something comes."""
        if self._consumer is not None and not self._stash and not self._paused:
            self._parking.park()

    def _park(self, consumer: Consumer) -> bool:
        """One round on the parked thread; True when there is something for the pipeline."""
        try:
            m = consumer.poll(PARK)
        except (KafkaException, RuntimeError) as error:
            self._trouble.say("poll", str(error))
            return True
        if m is None:
            return False
        self._stash.append(m)
        return True

    def _watch(self, now: float) -> None:
        """A partition that is asked for, has something to read and does not move is a stalled client: build it anew."""
        if self._joining_since is not None and now - self._joining_since > WATCH_EVERY:
            self._trouble.say("group", "not let into the group yet: it waits for its other members, or for a lost one")
        back = next((lease for lease in self._leases.values() if lease.repeated), None)
        if back is not None and not self._watcher.busy:
            self._watcher.ask(partial(self._went_back, back), self._begin_anew)
        if self._trouble.refused and self._leases and not self._watcher.busy:
            # The client does not say when it is let in again, and no message need come to tell.
            self._watcher.ask(partial(self._try_to_read, next(iter(self._leases.values()))), self._let_in)
        asking = not self._paused and now - self._asked_at <= STARVED and self._trouble.away() is None
        still = [lease for lease in self._leases.values() if now - lease.moved_at > STALLED]
        if not asking:
            for lease in self._leases.values():  # it does not move because we do not ask, or nobody answers
                lease.moved_at = now
        elif still and not self._watcher.busy:
            self._watcher.ask(partial(self._look_ahead, still), self._judge)

    def _went_back(self, lease: Lease) -> bool:
        """On the watcher's thread: whether the log ends before what it has given us: the topic was made anew."""
        lease.repeated = False
        with contextlib.suppress(ConnectorError, KafkaException), probing(self._config) as probe:
            return probe.end(self._topic, lease.partition) <= (lease.gaps.highest or 0)
        return False

    def _begin_anew(self, went_back: bool) -> None:
        """Forget everything of the log that was: its offsets mean other requests now."""
        if went_back:
            self._trouble.say("log", "offsets went back: the topic was made anew, or lost its end; it is read anew")
            self._disconnect(commit=False)

    def _try_to_read(self, lease: Lease) -> bool:
        """On the watcher's thread: whether the topic may be read."""
        with contextlib.suppress(ConnectorError, KafkaException), probing(self._config) as probe:
            reached = lease.gaps.highest
            probe.look(self._topic, lease.partition, 0 if reached is None else reached + 1)
            return True
        return False

    def _let_in(self, readable: bool) -> None:
        if readable:
            self._trouble.clear_refusal()

    def _look_ahead(self, leases: list[Lease]) -> list[tuple[Lease, int | None]]:
        """On the watcher's thread, through a client of its own: what each lease could read next."""
        found: list[tuple[Lease, int | None]] = []
        with contextlib.suppress(ConnectorError, KafkaException), probing(self._config) as probe:
            for lease in leases:
                if lease.open and not self._watcher.closing:
                    reached = lease.gaps.highest
                    start = probe.begin(self._topic, lease.partition) if reached is None else reached + 1
                    found.append((lease, probe.readable_from(self._topic, lease.partition, start)))
        return found

    def _judge(self, found: list[tuple[Lease, int | None]]) -> None:
        now = self._clock()
        for lease, readable in found:
            if readable is None or now - lease.moved_at <= STALLED:
                lease.suspected = None
                lease.moved_at = now
            elif lease.suspected != readable:
                lease.suspected = readable  # it may have come this very moment: look once more
            elif lease.open:
                self._problem = f"partition {lease.partition} does not move past offset {readable}"
                self._trouble.say("stalled", self._problem)
                self._disconnect(commit=True)
                return

    def _reconnect(self) -> list[Message]:
        self._connect()
        self._problem = None
        return []

    # Asked by others

    def _statistics(self, told: dict[str, Any]) -> None:
        """Once a second, on whichever thread polls: how far behind the end each partition is, and we in the group."""
        if told.get("cgrp", {}).get("join_state") == "steady":
            self._joining_since = None  # without a partition, or `_on_assign` would have said so
        partitions = told["topics"].get(self._topic, {}).get("partitions", {})
        self._lags = {int(p): s["consumer_lag"] for p, s in partitions.items() if s["consumer_lag"] >= 0}

    def lag(self) -> int | None:
        """Offsets not yet received in the partitions held, as last told; None before the first word of it."""
        lags = self._lags
        known = [lags[p] for p in self._leases if p in lags]
        return sum(known) if known else None

    def ended(self) -> bool:
        """Never."""
        return False

    def exhausted(self) -> bool:
        """Every partition of the topic is committed to its end, or read to it by this worker."""
        with probing(self._config) as probe:
            for partition in range(probe.partitions(self._topic)):
                lease = self._leases.get(partition)
                reached = lease.gaps.highest if lease else None
                start = probe.begin(self._topic, partition) if reached is None else reached + 1
                if probe.readable_from(self._topic, partition, start) is not None:
                    return False
        return True

    def void(self, message: Message) -> bool:
        """The partition was revoked, lost, or assigned anew since."""
        return not RECEIPT_LEASE(message.receipt).open

    def locate(self, message: Message) -> str:
        """`kafka:topic/partition/offset`."""
        receipt = message.receipt
        return f"{self.name}/{RECEIPT_LEASE(receipt).partition}/{RECEIPT_OFFSET(receipt)}"

    def healthy(self) -> str | None:
        """A stalled partition, brokers away, or a refusal."""
        return self._problem or self._trouble.away()


# The sink


class KafkaProducer:
    """One producer, shared by the sinks of one cluster; after a fatal error the next one takes over.

    Raises:
        Misconfigured: A property cannot work.
    """

    def __init__(self, config: Config) -> None:
        self.config = producer_config(config)
        self._open = 0
        self.trouble = Trouble()
        self.suspicious = False  # the broker refused a batch, and did not say for the sake of which record
        self._singly_until: float | None = None
        self.pending: dict[_Write, None] = {}
        self.finished: deque[_Write] = deque()
        self._connect()

    def open(self, bell: Bell) -> None:
        """Take another sink into the count of those that `close`."""
        self._open += 1
        if self._open == 1:
            self._bell = bell
            self._allow_parking()

    def _connect(self) -> None:
        # It connects by itself from here on, while the model loads and the source opens.
        singly = {} if self._singly_until is None else {"batch.num.messages": 1}
        self.producer = new_client(Producer, self.config | singly | self.trouble.callbacks())
        self.fatal = self.suspicious = False

    def _allow_parking(self) -> None:
        # The pipeline rests, so nothing will join what is queued: flush, which ignores linger, instead of a poll.
        self._parking = Parking(lambda: self._serve(self.producer.flush, PARK) == 0, self._bell)

    def _serve(self, call: Callable[[float], int], timeout: float) -> int:
        """Make a call that serves the client's callbacks; it raises a fatal error, once, and then answers nothing."""
        try:
            return call(timeout)
        except KafkaException as error:
            self.trouble.note(error.args[0])
            self.fatal = True
            return 0

    def limit_batches(self, limit: float) -> None:
        """Send no larger batch than a topic takes: it would refuse every record in it for the sake of one."""
        if limit < int(self.config.get("batch.size", 1_000_000)):
            self.config["batch.size"] = limit
            self._parking.close()
            self._connect()
            self._allow_parking()

    def tick(self) -> None:
        """Serve delivery reports, then tell whoever wrote."""
        if not self._parking.parked:
            self._serve(self.producer.poll, 0)
        while self.finished:
            write = self.finished.popleft()
            self.pending.pop(write, None)
            if not write.failures:
                self.trouble.clear_refusal()
            write.done(sorted(write.failures, key=itemgetter(0)))
        if self.suspicious:
            self.trouble.say("refused", f"a batch was refused: for {SINGLY:.0f} s records go one by one, to find which")
            self._replace(singly_until=time.monotonic() + SINGLY)
        elif self.fatal or (self._singly_until is not None and time.monotonic() > self._singly_until):
            self._replace(singly_until=None)

    def _replace(self, singly_until: float | None) -> None:
        """The next client takes over. What the broker does not confirm now is written again by its owner."""
        self._parking.close()
        self._serve(self.producer.flush, 1.0)
        self.producer.purge()
        self._serve(self.producer.flush, 1.0)
        self._singly_until = singly_until  # not before: what the last client reports here it sent in its own way
        self._connect()
        self._allow_parking()

    def why(self, error: KafkaError, size: int) -> ConnectorError:
        """Why a record of `size` bytes was not written, as the broker or the client says.

        Said of a batch it may be meant for another record. Alone in its batch is one as large as a batch may be, and
        every one while they go singly.
        """
        if error.fatal():
            self.fatal = True
        alone = self._singly_until is not None or size >= int(self.config.get("batch.size", 1_000_000))
        if error.code() in NEVER_TAKEN and not alone:
            self.suspicious = True
            return Unavailable(f"kafka: {error.str()}")
        return write_error(error)

    def finish(self, write: _Write) -> None:
        """All reports of a write are in; on whichever thread serves them."""
        self.finished.append(write)
        if self._parking.parked:
            self._bell.ring()

    def rest(self) -> None:
        """Park a thread in the producer's flush while reports are awaited."""
        if self.pending:
            self._parking.park()

    def close(self, timeout: float) -> None:
        """For the last sink that closes: wait for what is pending, then drop it."""
        self._open -= 1
        if self._open:
            return
        self._parking.close()
        for patience in (timeout, 0.1):
            self._serve(self.producer.flush, patience)
            self.producer.purge()
        self.fatal = False  # nobody writes again
        self.tick()


class _Write:
    """The records of one `write` and what became of them; `left` counts reports to come."""

    __slots__ = ("client", "done", "failures", "left", "records", "since")

    def __init__(self, client: KafkaProducer, records: Records, done: Done, since: float) -> None:
        self.client = client
        self.records = records
        self.left = len(records)
        self.done = done
        self.failures: list[Failure] = []
        self.since = since

    def report(self, position: int, error: KafkaError | None, _message: Raw | None) -> None:
        if error is not None:
            self.fail(position, self.client.why(error, self._size(position)))
            return
        self.left -= 1
        if not self.left:
            self.client.finish(self)

    def _size(self, position: int) -> int:
        records = self.records
        headers = sum(len(name) + len(value or b"") for name, value in records.headers[position])
        return len(records.bodies[position]) + len(records.keys[position] or b"") + headers

    def fail(self, position: int, error: ConnectorError) -> None:
        self.failures.append((position, error))
        self.left -= 1
        if not self.left:
            self.client.finish(self)


class KafkaSink:
    """Records to one topic, durable when every in-sync replica has them.

    A record goes to the partition number its request came from when both topics have as many partitions, so a keyed
    request and its outcome stay together; else the key decides, as Java producers do.
    """

    def __init__(self, topic: str, client: KafkaProducer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = f"kafka:{topic}"
        self._topic = topic
        self._client = client
        self._clock = clock
        self._opened = False
        self._closed = False

    def open(self, bell: Bell) -> None:
        """Start the client and see that the topic is there and may be written."""
        if not self._opened:
            self._client.open(bell)
            self._opened = True
        listed = reach_topic(self._client.producer, self._topic, self._client.trouble)
        self._partitions = listed.partitions
        admin = administrator(self._client.config, listed)
        may(AclOperation.WRITE, admin, self._topic)
        self._client.limit_batches(largest_batch(admin, self._topic))

    def write(self, records: Records, done: Done) -> None:
        """Hand all records to the client at once; `done` comes with the last delivery report."""
        client = self._client
        write = _Write(client, records, done, self._clock())
        client.pending[write] = None
        produce, topic, report = client.producer.produce, self._topic, write.report
        columns = zip(records.bodies, records.keys, self._places(records.messages), records.headers, strict=False)
        for position, (body, key, partition, headers) in enumerate(columns):
            try:
                # A method of the position: a third of the cost of a `partial`, which brings a dict. All by position (no
                # second callback, time stamped by the client): a keyword would add a fifth to the call.
                produce(topic, body, key, partition, MethodType(report, position), None, 0, headers)
            except BufferError:
                write.fail(position, Unavailable("kafka: the producer's queue is full"))
            except KafkaException as error:
                client.fatal |= error.args[0].fatal()
                write.fail(position, write_error(error.args[0]))  # the client's own word is about this record

    def _places(self, messages: Sequence[Message]) -> Iterable[int]:
        """The partition for each record; -1 lets the key decide. Messages of one write come from one source."""
        receipt = messages[0].receipt
        if not (type(receipt) is tuple and type(receipt[0]) is Lease):
            return repeat(-1)
        leases = [RECEIPT_LEASE(m.receipt) for m in messages]
        # Each of them, not the first: partitions are added while we run, and a lease is as old as its assignment.
        if any(lease.siblings != self._partitions for lease in set(leases)):
            return repeat(-1)
        return [lease.partition for lease in leases]

    def tick(self) -> None:
        """Serve the client's callbacks."""
        self._client.tick()

    def rest(self) -> None:
        """Park the client while reports are awaited."""
        self._client.rest()

    def healthy(self) -> str | None:
        """Brokers away or refusing, or a write unconfirmed for ten seconds."""
        for write in list(self._client.pending)[:1]:  # a copy: the listener's thread asks too
            if self._clock() - write.since > 2 * REACH:
                return f"{self.name}: a write has not been confirmed for {self._clock() - write.since:.0f} s"
        return self._client.trouble.away()

    def close(self, timeout: float) -> None:
        """Wait for pending writes, then drop them."""
        if self._opened and not self._closed:
            self._closed = True
            self._client.close(timeout)


class KafkaReplies:
    """Replies to topics, by a client of its own: it gives up soon, and what it waits for holds nobody else back.

    Args:
        config: librdkafka properties, `bootstrap.servers` among them.
    """

    def __init__(self, config: Config) -> None:
        self.name = "kafka:replies"
        self.sent = 0
        self.failed = 0
        trouble = Trouble()
        impatient = {"message.timeout.ms": 10_000, "acks": 1, "enable.idempotence": False, "linger.ms": 1}
        self._client = new_client(Producer, producer_config(config) | impatient | trouble.callbacks())

    def open(self, bell: Bell) -> None:
        """Nothing to do: it connects by itself."""

    def send(self, address: str, records: Records) -> None:
        """Hand all records to the client."""
        for body, key, headers in zip(records.bodies, records.keys, records.headers, strict=True):
            try:
                self._client.produce(address, body, key, on_delivery=self._report, headers=headers)
            except (BufferError, KafkaException):
                self.failed += 1
            else:
                self.sent += 1

    def _report(self, error: KafkaError | None, _message: Raw) -> None:
        if error is not None:
            self.failed += 1
            self.sent -= 1

    def tick(self) -> None:
        """Serve delivery reports."""
        with contextlib.suppress(KafkaException):
            self._client.poll(0)

    def close(self, timeout: float) -> None:
        """Wait for the last ones."""
        with contextlib.suppress(KafkaException):
            self._client.flush(timeout)
            self._client.purge()
