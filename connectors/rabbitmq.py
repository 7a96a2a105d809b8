"""RabbitMQ as a Source and a Sink, on pika: each has a channel, on a connection with a thread of its own.

Deliveries come in on that thread as pika gives them and become messages on the pipeline's, a chunk at a time. They are
acknowledged up to the first that is unsettled; behind one that stays unsettled for long, singly. A channel is an
epoch: when it closes, the broker hands out again what was not acknowledged on it, so receipts of it are void.

A sink counts what the broker confirms, per write. A record that no queue takes is not written: it is tried again, as
one that a full queue refuses.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any, cast
from urllib.parse import quote

import orjson
from pika.channel import Channel
from pika.exceptions import ShortStringTooLong
from pika.spec import BasicProperties

from inferbus.connectors.base import (
    Bell,
    ConnectorError,
    Done,
    Failure,
    Fatal,
    Headers,
    Message,
    Misconfigured,
    Records,
    Refused,
    TooLarge,
    Unavailable,
    Unreadable,
    resolve_id,
)
from inferbus.connectors.gaps import Gaps
from inferbus.connectors.rabbitmq_client import UNREADABLE, Client, Connection, StandingChannel, publishing
from inferbus.connectors.settings import AmqpDeclare, AmqpTls

ACK_EVERY = 0.05  # seconds after something was settled
GAP = 0.1  # seconds an unsettled message may keep those behind it from being acknowledged
PREFETCH = 64  # messages at once before we know how large they are
MOST = 65535  # that AMQP can say
ADJUST_EVERY = 1.0  # seconds between changes of that number, since the consumer pauses for one
LAG_EVERY = 5.0  # seconds between questions how much is left
SLOW = 10.0  # seconds a write may be unconfirmed until we say so
ROOM = 4096  # bytes of a frame of headers for what is not headers

KEY = "inferbus-key"
COUNTERS = ("x-acquired-count", "x-delivery-count")  # of quorum queues; they change with each delivery

# A receipt of this source is (Epoch, delivery tag, bytes).
RECEIPT_EPOCH: Callable[[Any], Epoch] = itemgetter(0)
RECEIPT_TAG: Callable[[Any], int] = itemgetter(1)
RECEIPT_SIZE: Callable[[Any], int] = itemgetter(2)


class Epoch:
    """One channel of a source: what came on it, and what of that is settled. Receipts point here."""

    __slots__ = (
        "arrived",
        "channel",
        "full",
        "gaps",
        "loose",
        "lost",
        "messages",
        "moved_at",
        "open",
        "position",
        "size",
        "taken",
        "waiting",
    )

    def __init__(self, channel: Channel, now: float) -> None:
        self.channel = channel
        self.open = True
        self.lost = False  # not closed by us: nobody knows which acknowledgements arrived
        self.waiting: deque[tuple[Any, Any, bytes]] = deque()  # deliveries as pika gives them, not yet received
        self.arrived = 0  # bytes put there by the connection's thread, in all
        self.taken = 0  # and taken by the pipeline's
        self.full = False  # too much waits there: nothing is consumed until it is taken
        self.gaps = Gaps()
        self.loose: dict[int, int] = {}  # tag to bytes: settled and not acknowledged
        self.position = 0  # acknowledged up to here, this one not included
        self.moved_at = now  # monotonic seconds since which the position stands where it does
        self.messages = 0  # received and not acknowledged
        self.size = 0

    def settle(self, receipts: Iterable[tuple[Epoch, int, int]]) -> None:
        """Note what may be acknowledged."""
        fresh = self._unsettled(receipts)
        self.loose |= fresh
        self.gaps.settle(fresh)

    def _unsettled(self, receipts: Iterable[tuple[Epoch, int, int]]) -> dict[int, int]:
        # The broker closes a channel that acknowledges a tag twice.
        return {tag: size for _, tag, size in receipts if tag in self.gaps}

    def grown(self) -> int:
        """Tags that one acknowledgement would settle."""
        return (self.gaps.position or 0) - self.position

    def due(self, now: float) -> tuple[int | None, list[int]]:
        """What to acknowledge now: up to and with a tag, and tags singly. They count as acknowledged from here on."""
        position = self.gaps.position or 0
        if position != self.position:
            self.moved_at = now
        prefix = [tag for tag in self.loose if tag < position]
        singly = sorted(self.loose.keys() - prefix) if now - self.moved_at >= GAP else []
        for tag in (*prefix, *singly):
            self._free(tag)
        self.position = position
        self.gaps.confirm(position)
        # Named by its own highest: for one that it knows no more the broker would acknowledge all, then complain.
        return max(prefix, default=None), singly

    def holds(self, tag: int) -> bool:
        """Whether it is not acknowledged, or may not be."""
        return self.lost or tag in self.gaps or tag in self.loose

    def _free(self, tag: int) -> None:
        self.messages -= 1
        self.size -= self.loose.pop(tag)

    def give_back(self, receipts: Iterable[tuple[Epoch, int, int]]) -> list[int]:
        """Tags to be handed out again; they count no more."""
        fresh = self._unsettled(receipts)
        self.gaps.settle(fresh)
        self.messages -= len(fresh)
        self.size -= sum(fresh.values())
        return sorted(fresh)


class RabbitmqSource:
    """At-least-once deliveries from one queue.

    Args:
        url: `amqp://user:password@host:port/vhost`, or `amqps://`.
        queue: The queue's name.
        prefetch: Most messages the broker hands out unacknowledged; by default as many as the caps below allow of
            messages as large as they have been of late.
        declare: Declare the queue so; by default it must be there.
        temporary: Declare it as our own, which nobody else reads and which goes with the connection.
        tls: For `amqps://`.
        max_inflight: The pipeline's cap in messages.
        max_inflight_bytes: The pipeline's cap in bytes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        queue: str,
        *,
        prefetch: int | None = None,
        declare: AmqpDeclare | None = None,
        temporary: bool = False,
        tls: AmqpTls | None = None,
        max_inflight: int = 8192,
        max_inflight_bytes: int = 256 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"rabbitmq:{queue}"
        self._queue = short("queue", queue)
        self._declare = declare
        self._temporary = temporary
        self._adjusting = prefetch is None
        self._prefetch = prefetch or min(max_inflight, PREFETCH)
        self._max_inflight = max_inflight
        self._max_inflight_bytes = max_inflight_bytes
        self._clock = clock
        self._connection = Connection(url, tls or AmqpTls())
        self._channel = StandingChannel(
            self._connection, self._set_up, self._on_closed, self._explain, last_words=self._give_up
        )
        self._opened = False
        self._epoch: Epoch | None = None
        self._consumer = ""  # tag of the consumer; for the connection's thread
        self._resting = False
        self._mean_size = 0.0  # bytes of a message of late
        self._adjust_at = 0.0
        self._ack_at = float("inf")
        self._lag_at = 0.0
        self._ready: int | None = None  # messages in the queue for anyone, as last told

    # Opening and closing

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:  # noqa: ARG002 - nothing is taken away from us in good order
        """Connect, see or declare the queue, and begin to consume."""
        self._bell = bell
        self._channel.open()
        self._opened = True

    def close(self) -> None:
        """Acknowledge what is settled, give back the rest, disconnect."""
        if self._opened:
            self._opened = False
            if self._epoch is not None:
                self._ack(self._epoch, self._clock())
            self._channel.close()

    def _set_up(self, channel: Channel) -> None:
        """On the connection's thread, as all until `_give_up`: from a new channel to a consumer."""
        then = partial(self._consume, channel, Epoch(channel, self._clock()))
        channel.add_on_cancel_callback(lambda _: self._on_cancelled(then))
        told = partial(self._on_declared, then)
        if self._temporary:
            channel.queue_declare(self._queue, exclusive=True, auto_delete=True, callback=told)
        elif self._declare is None:
            channel.queue_declare(self._queue, passive=True, callback=told)
        else:
            channel.queue_declare(self._queue, durable=True, arguments=arguments(self._declare), callback=told)

    def _on_declared(self, then: Callable[[], None], frame: Any) -> None:
        self._ready = frame.method.message_count
        then()

    def _consume(self, channel: Channel, epoch: Epoch) -> None:
        if not channel.is_open:
            return
        put, most = epoch.waiting.append, self._max_inflight_bytes
        epoch.full = False

        def arrived(_channel: Channel, deliver: Any, properties: Any, body: bytes) -> None:
            put((deliver, properties, body))
            epoch.arrived += len(body)
            if self._resting:
                self._resting = False
                self._bell.ring()
            if epoch.arrived - epoch.taken > most and not epoch.full:
                epoch.full = True  # larger than those the prefetch was made for
                self._cancel(channel)

        channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _: None)
        self._consumer = channel.basic_consume(self._queue, arrived, callback=lambda _: self._on_consuming(epoch))

    def _on_consuming(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._channel.ready()

    def _on_cancelled(self, then: Callable[[], None]) -> None:
        """By the broker: the queue is gone or moves. What came before can still be settled on this channel."""
        self._channel.trouble(f'rabbitmq: the broker has cancelled the consumer of queue "{self._queue}"')
        self._channel.later(then)

    def _on_closed(self, _error: ConnectorError) -> None:
        if self._epoch is not None:
            self._epoch.lost = self._opened
            self._epoch.open = False
            self._epoch = None
        self._bell.ring()

    def _explain(self, code: int, text: str) -> ConnectorError:
        if code == 404:
            return Unavailable(
                f'rabbitmq: queue "{self._queue}" does not exist; create it, set `declare`, or correct the name'
            )
        if code == 403:
            return Unavailable(f'rabbitmq: queue "{self._queue}" may not be read with these credentials ({text})')
        if code == 406 and "inequivalent" in text:
            why = text.partition(" - ")[2]
            return Misconfigured(f"rabbitmq: the queue is there and not as `declare` says: {why}")
        return Unavailable(f'rabbitmq: the broker closed the channel of queue "{self._queue}" ({text})')

    def _give_up(self) -> None:
        """Say so of each message: a quorum queue counts one that a channel takes with it as a failed attempt."""
        epoch = self._epoch
        if epoch is not None:
            self._cancel(epoch.channel)
            epoch.channel.basic_nack(0, multiple=True, requeue=True)

    def _cancel(self, channel: Channel) -> None:
        channel.basic_cancel(self._consumer, callback=lambda _: None)
        # pika would reject what is on its way, of which a quorum queue takes count, and which we may have taken.
        channel._cancelled.discard(self._consumer)  # noqa: SLF001 - as said

    # Receiving

    def receive(self, limit: int) -> list[Message]:
        """What has come, at most `limit`; [] while the broker is away, for then there is nothing."""
        epoch = self._epoch
        if epoch is None:
            if self._connection.broken:
                raise Fatal(self._connection.broken)
            return []
        count = min(limit, len(epoch.waiting))
        if not count:
            return []
        take = epoch.waiting.popleft
        raw = [take() for _ in range(count)]
        epoch.taken += sum([len(body) for _, _, body in raw])
        messages = [message(epoch, *delivery) for delivery in raw]
        receipts: list[Any] = [m.receipt for m in messages]
        size = sum(map(RECEIPT_SIZE, receipts))
        epoch.gaps.receive(list(map(RECEIPT_TAG, receipts)), size)
        epoch.messages += count
        epoch.size += size
        weight = min(1.0, count / 256) if self._mean_size else 1.0
        self._mean_size += weight * (size / count - self._mean_size)
        return messages

    # Settling

    def settle(self, messages: Sequence[Message]) -> None:
        """Mark as done; acknowledged once a quarter of the prefetch has gathered, or 50 ms later."""
        for epoch, receipts in groupby([m.receipt for m in messages], RECEIPT_EPOCH):
            epoch.settle(receipts)  # type: ignore[arg-type]  # receipts are ours
        self._ack_at = min(self._ack_at, self._clock() + ACK_EVERY)

    def release(self, messages: Sequence[Message]) -> None:
        """Give back without counting it as a failed attempt; what comes from now on stays with the broker."""
        self._adjusting = False
        for epoch, receipts in groupby([m.receipt for m in messages], RECEIPT_EPOCH):
            self._connection.call(partial(self._nack, epoch, epoch.give_back(receipts)))  # type: ignore[arg-type]  # as above

    def inflight(self) -> tuple[int, int]:
        """Received and not acknowledged."""
        epoch = self._epoch
        return (0, 0) if epoch is None else (epoch.messages, epoch.size)

    def holds(self, message: Message) -> bool:
        """Not acknowledged."""
        return RECEIPT_EPOCH(message.receipt).holds(RECEIPT_TAG(message.receipt))

    def tick(self, now: float) -> float:
        """Acknowledge what is due, adjust the prefetch, ask how much is left."""
        epoch = self._epoch
        if epoch is None:
            return now + 1.0
        if epoch.loose and (now >= self._ack_at or epoch.grown() >= self._prefetch // 4):
            self._ack(epoch, now)
            self._ack_at = now + ACK_EVERY if epoch.loose else float("inf")
        if self._adjusting and now >= self._adjust_at:
            self._adjust_at = now + ADJUST_EVERY
            self._adjust(epoch)
        if epoch.full and epoch.arrived - epoch.taken <= self._max_inflight_bytes // 2:
            self._connection.call(partial(self._resume, epoch))
        if now >= self._lag_at:
            self._lag_at = now + LAG_EVERY
            self._connection.call(self._ask_lag)
        return min(self._ack_at, self._lag_at)

    def _ack(self, epoch: Epoch, now: float) -> None:
        upto, singly = epoch.due(now)
        if upto is not None or singly:
            self._connection.call(partial(self._send_acks, epoch, upto, singly))

    def _adjust(self, epoch: Epoch) -> None:
        """Consume anew where messages are so large, or so small, that the caps call for quite another prefetch."""
        if not self._mean_size:
            return
        fitting = int(self._max_inflight_bytes / max(self._mean_size, 1.0))
        wanted = max(1, min(self._max_inflight, fitting, MOST))
        if wanted >= 2 * self._prefetch or 2 * wanted <= self._prefetch:
            self._prefetch = wanted
            if not epoch.full:
                self._connection.call(partial(self._consume_anew, epoch))

    # For stores

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        for m in messages:
            epoch, tag, size = cast("tuple[Epoch, int, int]", m.receipt)
            epoch.size -= len(m.body)
            m.receipt = (epoch, tag, size - len(m.body))
            m.body = b""

    def stream(self, message: Message) -> Epoch:
        """The channel: what came on it is void together."""
        return RECEIPT_EPOCH(message.receipt)

    def run(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """All of them, under a name that was never used."""
        return f"{quote(self._queue, safe='')}/{time.time_ns()}-{uuid.uuid4().hex[:12]}", list(messages)

    # On the connection's thread

    def _send_acks(self, epoch: Epoch, upto: int | None, singly: list[int]) -> None:
        channel = epoch.channel
        if not channel.is_open:
            return
        with channel.connection.corked():
            if upto is not None:
                channel.basic_ack(upto, multiple=True)
            for tag in singly:
                channel.basic_ack(tag)

    def _nack(self, epoch: Epoch, tags: list[int]) -> None:
        channel = epoch.channel
        if not channel.is_open:
            return
        self._cancel(channel)
        with channel.connection.corked():
            for tag in tags:
                channel.basic_nack(tag, requeue=True)

    def _resume(self, epoch: Epoch) -> None:
        if epoch.full:
            self._consume(epoch.channel, epoch)

    def _consume_anew(self, epoch: Epoch) -> None:
        if epoch.channel.is_open and self._consumer:
            self._cancel(epoch.channel)
            self._consume(epoch.channel, epoch)

    def _ask_lag(self) -> None:
        if self._connection.client is not None:
            answer: Future[int] = Future()
            answer.add_done_callback(self._on_lag)
            self._count(self._connection.client, answer)

    def _on_lag(self, answer: Future[int]) -> None:
        if answer.exception() is None:
            self._ready = answer.result()

    def _count(self, client: Client, answer: Future[int]) -> None:
        """Messages in the queue for anyone; on a channel of its own, which the broker closes if the queue is gone."""

        def ask(channel: Channel) -> None:
            channel.queue_declare(self._queue, passive=True, callback=told)

        def told(frame: Any) -> None:
            answer.set_result(frame.method.message_count)
            asking.close()

        def closed(_channel: Channel, reason: BaseException) -> None:
            if not answer.done():
                code, text = getattr(reason, "reply_code", 0), getattr(reason, "reply_text", "connection lost")
                answer.set_exception(self._explain(code, text))

        asking = client.channel(on_open_callback=ask)
        asking.add_on_close_callback(closed)

    # Asked by others

    def rest(self) -> None:
        """Ring when something comes."""
        self._resting = True
        epoch = self._epoch
        if epoch is not None and epoch.waiting:  # it came before we said so
            self._resting = False
            self._bell.ring()

    def lag(self) -> int | None:
        """Messages in the queue as last told, and those that wait here."""
        epoch, ready = self._epoch, self._ready
        return ready if ready is None or epoch is None else ready + len(epoch.waiting)

    def ended(self) -> bool:
        """Never."""
        return False

    def exhausted(self) -> bool:
        """Nothing is ready in the queue, and nothing waits here: seen twice, for a delivery may be on its way."""
        for _ in range(2):
            epoch = self._epoch
            if (epoch is not None and epoch.waiting) or self._connection.ask(self._count):
                return False
        return True

    def void(self, message: Message) -> bool:
        """Its channel is closed: the broker hands it out again."""
        return not RECEIPT_EPOCH(message.receipt).open

    def locate(self, message: Message) -> str:
        """`rabbitmq:queue/id`: a message in a queue has no address but its name."""
        return f"{self.name}/{message.id[:255]}"

    def healthy(self) -> str | None:
        """The broker away, or the queue."""
        return self._channel.problem()


# From AMQP to messages


def message(epoch: Epoch, deliver: Any, properties: Any, body: bytes) -> Message:
    """A delivery as pika gives it, as a message."""
    tag = deliver.delivery_tag
    created_at = None if properties.timestamp is None else float(properties.timestamp)
    try:
        headers, key = headers_of(properties)
    except ValueError as error:
        own = text(properties.message_id) or body_id(body)
        why = f"the headers could not be read: {error}"
        return Unreadable(own, created_at, (epoch, tag, len(body)), "invalid_request", why, body=body)
    own = resolve_id(headers, text(properties.message_id)) or body_id(body or claim(headers))
    size = len(body)
    if headers or key:
        size += len(key or b"") + sum([len(value) for _, value in headers])
    return Message(own, key, body, headers, created_at, attempts(deliver, properties.headers), (epoch, tag, size))


def claim(headers: Headers) -> bytes:
    """Where an empty body says it lies: the next best to tell messages apart by."""
    found = dict(headers)
    return found.get("inferbus-claim") or found.get("ce_dataref") or b""


def attempts(deliver: Any, table: dict[str, Any] | None) -> int:
    """How often it was delivered, as far as the broker counts."""
    for name in COUNTERS:
        if table and isinstance(count := table.get(name), int):
            return count + 1
    return 2 if deliver.redelivered else 1


def body_id(body: bytes) -> str:
    """The id of a message that brings none: it is the same whenever it comes."""
    return f"body-{blake2b(body, digest_size=16).hexdigest()}"


def headers_of(properties: Any) -> tuple[Headers, bytes | None]:
    """Headers and key. Standard properties stand among the headers, unless a header of their name does.

    Raises:
        ValueError: pika could not read the table, or a name in it is not UTF-8.
    """
    table = properties.headers
    if table is UNREADABLE:
        raise ValueError("a value of a type or size that AMQP clients do not know")
    found: list[tuple[str, bytes]] = []
    key = None
    for name, value in (table or {}).items():
        if not isinstance(name, str):
            raise ValueError("a name is not UTF-8")  # noqa: TRY004 - not of ours, of the message's
        if name == KEY:
            key = plain(value)
        elif isinstance(value, list):
            found += [(name, plain(item)) for item in value]
        elif name not in COUNTERS:
            found.append((name, plain(value)))
    for name, property_ in (
        ("correlation_id", properties.correlation_id),
        ("inferbus-reply-to", properties.reply_to),
        ("content-type", properties.content_type),
        ("inferbus-timeout-ms", properties.expiration),
    ):
        if property_ is not None and name not in (table or ()):
            found.append((name, plain(property_)))
    return tuple(found), key


def plain(value: Any) -> bytes:
    """A header's value: text as UTF-8, bytes as they are, nothing as nothing, other types as JSON."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes) or value is None:
        return value or b""
    try:
        return orjson.dumps(value, default=text)
    except TypeError:  # a table in it has names that are no text
        return str(value).encode()


def text(value: Any) -> str | None:
    """As text, whatever it is; None stays None."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value and str(value)


def arguments(declare: AmqpDeclare) -> dict[str, Any]:
    """The arguments of a queue's declaration."""
    wanted = {
        "x-queue-type": declare.type,
        "x-delivery-limit": declare.delivery_limit,
        "x-dead-letter-exchange": declare.dead_letter_exchange,
        "x-dead-letter-routing-key": declare.dead_letter_routing_key,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def short(setting: str, value: str) -> str:
    """A name as AMQP takes it.

    Raises:
        Misconfigured: It is longer.
    """
    if len(value.encode()) > 255:
        raise Misconfigured(f"rabbitmq {setting}: expected at most 255 bytes of UTF-8")
    return value


# The sink


class _Write:
    """The records of one `write` and what became of them; `left` counts those the broker has yet to confirm."""

    __slots__ = ("done", "failures", "left", "records", "since")

    def __init__(self, records: Records, done: Done, since: float) -> None:
        self.records = records
        self.done = done
        self.left = len(records)
        self.failures: list[Failure] = []
        self.since = since


class RabbitmqSink:
    """Records to an exchange, durable when the broker has confirmed them. Each is a message that survives a restart.

    Args:
        connection: To the broker; sinks may share one.
        exchange: The exchange; empty for the one that leads to the queue named by the routing key.
        routing_key: The routing key of every record.
        clock: Monotonic seconds.
    """

    def __init__(
        self, connection: Connection, exchange: str, routing_key: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = f"rabbitmq:{exchange or routing_key}"
        self._connection = connection
        self._exchange = short("exchange", exchange)
        self._routing_key = short("routing_key", routing_key)
        self._clock = clock
        self._channel = StandingChannel(connection, self._set_up, self._on_closed, self._explain)
        self._opened = False
        self._resting = False
        self._pending: dict[_Write, None] = {}  # for the pipeline's thread
        self._finished: deque[_Write] = deque()
        # For the connection's thread:
        self._publishing: Channel | None = None
        self._sequence = 0  # of the record published last on this channel
        self._returned = 0  # of the record returned last
        self._unconfirmed: dict[int, tuple[_Write, int]] = {}  # by sequence: write and position
        self._largest = float("inf")  # bytes of the largest body the broker takes, once it said so

    def open(self, bell: Bell) -> None:
        """Connect and see that the exchange, or the queue, is there."""
        self._bell = bell
        self._channel.open()
        self._opened = True

    def close(self, timeout: float) -> None:
        """Wait for confirmations, then drop what is left."""
        if not self._opened:
            return
        self._opened = False
        until = self._clock() + timeout
        self._tell()
        while self._pending and self._clock() < until:
            time.sleep(0.002)
            self._tell()
        self._channel.close()
        self._tell()

    def write(self, records: Records, done: Done) -> None:
        """Hand all records over at once; `done` comes when the broker has answered for the last."""
        write = _Write(records, done, self._clock())
        self._pending[write] = None
        self._connection.call(partial(self._publish, write))

    def tick(self) -> None:
        """Tell whoever wrote."""
        if self._connection.broken:
            raise Fatal(self._connection.broken)
        self._tell()

    def _tell(self) -> None:
        while self._finished:
            write = self._finished.popleft()
            del self._pending[write]
            write.done(sorted(write.failures, key=itemgetter(0)))

    def rest(self) -> None:
        """Ring when a write is finished."""
        self._resting = True
        if self._finished:  # before we said so
            self._resting = False
            self._bell.ring()

    def healthy(self) -> str | None:
        """The broker away, blocking, or silent; the exchange or the queue gone."""
        if problem := self._channel.problem() or self._connection.blocked:
            return problem
        for write in list(self._pending)[:1]:  # a copy: the listener's thread asks too
            if self._clock() - write.since > SLOW:
                return f"{self.name}: a write has not been confirmed for {self._clock() - write.since:.0f} s"
        return None

    # On the connection's thread

    def _set_up(self, channel: Channel) -> None:
        def exists(_frame: Any) -> None:
            self._publishing = channel
            self._sequence = self._returned = 0
            self._channel.ready()

        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirmed, callback=lambda _: None)
        if self._exchange:
            channel.exchange_declare(self._exchange, passive=True, callback=exists)
        else:
            channel.queue_declare(self._routing_key, passive=True, callback=exists)

    def _explain(self, code: int, text: str) -> ConnectorError:
        place = f'exchange "{self._exchange}"' if self._exchange else f'queue "{self._routing_key}"'
        if code == 404:
            return Unavailable(f"rabbitmq: {place} does not exist; create it, or correct the name")
        if code == 403:
            return Unavailable(f"rabbitmq: {place} may not be written with these credentials ({text})")
        if found := re.search(r"larger than\D*(\d+)", text):
            self._largest = int(found[1])
        return Unavailable(f"rabbitmq: the broker closed the channel to {place} ({text})")

    def _publish(self, write: _Write) -> None:
        channel, records = self._publishing, write.records
        if channel is None or not channel.is_open:
            why = Unavailable(self._channel.problem() or "rabbitmq: closed")
            self._fail(write, range(len(records)), why)
            return
        client, number = channel.connection, channel.channel_number
        room = (client.params.frame_max or 131072) - ROOM
        publish, method = client.publish, publishing(number, self._exchange, self._routing_key)
        columns = zip(records.messages, records.keys, records.bodies, records.headers, strict=True)
        with client.corked():
            for position, (m, key, body, headers) in enumerate(columns):
                try:
                    if len(body) > self._largest:
                        raise TooLarge(f"rabbitmq: the broker takes at most {self._largest} bytes")
                    publish(method, number, properties_of(m.id, key, headers, room), body)
                except ShortStringTooLong:
                    self._fail(write, (position,), Refused("rabbitmq: a header's name is over 255 bytes"))
                except Refused as refused:
                    self._fail(write, (position,), refused)
                else:
                    self._sequence += 1
                    self._unconfirmed[self._sequence] = write, position

    def _on_confirmed(self, frame: Any) -> None:
        """An answer for one record, or for all up to it."""
        method, unconfirmed = frame.method, self._unconfirmed
        tag = method.delivery_tag
        if not method.multiple:
            answered = [tag] if tag in unconfirmed else []
        else:
            answered = []
            for sequence in unconfirmed:
                if sequence > tag:
                    break
                answered.append(sequence)
        nack = method.NAME == "Basic.Nack"
        for sequence in answered:
            write, position = unconfirmed.pop(sequence)
            if nack:
                self._fail(write, (position,), Unavailable(f"{self.name}: the broker could not take the record"))
            else:
                write.left -= 1
                if not write.left:
                    self._finish(write)

    def _on_return(self, _channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        """No queue took the record. It is confirmed as well, right after: so find it before."""
        # They come back in the order they were published in.
        for sequence in range(self._returned + 1, self._sequence + 1):
            write, position = self._unconfirmed.get(sequence, (None, 0))
            if write is None or body != write.records.bodies[position]:
                continue
            if properties.message_id == fitting(write.records.messages[position].id):
                self._returned = sequence
                del self._unconfirmed[sequence]
                why = f"{self.name}: no queue is bound that takes the record ({method.reply_text}); bind one"
                self._fail(write, (position,), Unavailable(why))
                return

    def _on_closed(self, error: ConnectorError) -> None:
        self._publishing = None
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for write, position in unconfirmed.values():
            size = len(write.records.bodies[position])
            why = TooLarge(str(error)) if size > self._largest else error
            self._fail(write, (position,), why)

    def _fail(self, write: _Write, positions: Sequence[int], why: ConnectorError) -> None:
        write.failures += [(position, why) for position in positions]
        write.left -= len(positions)
        if not write.left:
            self._finish(write)

    def _finish(self, write: _Write) -> None:
        self._finished.append(write)
        if self._resting:
            self._resting = False
            self._bell.ring()


class RabbitmqReplies:
    """Replies to queues, through the default exchange; not kept by the broker over a restart, nor confirmed.

    Args:
        connection: To the broker; may be that of a sink.
    """

    def __init__(self, connection: Connection) -> None:
        self.name = "rabbitmq:replies"
        self.sent = 0
        self.failed = 0
        self._connection = connection
        self._channel = StandingChannel(connection, self._set_up, self._on_closed, self._explain)
        self._publishing: Channel | None = None
        self._opened = False

    def open(self, bell: Bell) -> None:  # noqa: ARG002 - nobody waits for replies
        """Connect."""
        self._channel.open()
        self._opened = True

    def send(self, address: str, records: Records) -> None:
        """Hand all records over at once."""
        self._connection.call(partial(self._publish, address, records))

    def tick(self) -> None:
        """Nothing to do here."""

    def close(self, timeout: float) -> None:  # noqa: ARG002 - what was handed over is written before the channel closes
        """Leave the connection."""
        if self._opened:
            self._opened = False
            self._channel.close()

    # On the connection's thread

    def _set_up(self, channel: Channel) -> None:
        channel.add_on_return_callback(self._on_return)
        self._publishing = channel
        self._channel.ready()

    def _explain(self, code: int, text: str) -> ConnectorError:
        return Unavailable(f"rabbitmq: the broker closed the channel of replies ({code} {text})")

    def _on_closed(self, _error: ConnectorError) -> None:
        self._publishing = None

    def _on_return(self, _channel: Channel, _method: Any, _properties: Any, _body: bytes) -> None:
        """The queue is gone: whoever asked waits no longer."""
        self.failed += 1
        self.sent -= 1

    def _publish(self, address: str, records: Records) -> None:
        channel = self._publishing
        if channel is None or not channel.is_open:
            self.failed += len(records)
            return
        client, number = channel.connection, channel.channel_number
        room = (client.params.frame_max or 131072) - ROOM
        columns = zip(records.messages, records.keys, records.bodies, records.headers, strict=True)
        with client.corked():
            for m, key, body, headers in columns:
                try:
                    method = publishing(number, "", address)
                    client.publish(method, number, properties_of(m.id, key, headers, room), body)
                except (ShortStringTooLong, Refused):
                    self.failed += 1
                else:
                    self.sent += 1


# From records to AMQP


def properties_of(own: str, key: bytes | None, headers: Sequence[tuple[str, bytes]], room: int) -> BasicProperties:
    """The properties of a record: its headers, and those of them that AMQP has a place of its own for.

    Args:
        own: The record's id.
        key: Its key.
        headers: Its headers.
        room: Bytes of headers that one frame holds.

    Raises:
        TooLarge: They do not fit: the broker would close the connection.
    """
    table: dict[str, Any] = {}
    size = 0
    for name, value in headers:
        item: Any = text_if(value)
        size += len(name) + len(value or b"") + 8
        if name not in table:
            table[name] = item
        elif isinstance(table[name], list):
            table[name].append(item)
        else:
            table[name] = [table[name], item]
    if key is not None:
        table[KEY] = text_if(key)
        size += len(key)
    if size > room:
        raise TooLarge(f"rabbitmq: the headers have {size} bytes, at most {room} fit")
    return BasicProperties(
        content_type=fitting(table.get("content-type")),
        headers=table or None,
        delivery_mode=2,
        correlation_id=fitting(table.get("correlation_id")),
        message_id=fitting(own),
    )


def text_if(value: bytes) -> str | bytes:
    """Text where it is UTF-8, as most clients like it."""
    try:
        return value.decode()
    except (UnicodeDecodeError, AttributeError):  # a header of Kafka may have no value
        return value


def fitting(value: Any) -> str | None:
    """Text that AMQP takes as a property; None for what is no text, or over 255 bytes: the header has it anyway."""
    return value if isinstance(value, str) and len(value.encode()) <= 255 else None
