"""The path of a message, in the order it is walked: receive, decode, batch, predict, encode, write, settle.

One thread walks it, a chunk at a time; `step` does what can be done now and `run` rests until something rings. Nothing
is awaited, queued or timed per message. Devices answer through a queue, sinks through `tick`; so when a source must
give messages away in the middle of a poll, `_pump` can bring everything in flight to its end right there.

Invariants: every received message gets exactly one outcome (or is released while draining); a source is asked only
while messages and bytes in flight are under their caps.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

import numpy as np
import structlog

from inferbus.connectors.base import (
    Bell,
    Columns,
    ConnectorError,
    Fatal,
    Message,
    Misconfigured,
    Records,
    Replies,
    Sink,
    Source,
    Store,
    TooLarge,
    Unavailable,
    Unreadable,
)
from inferbus.models.base import Array, Codec, Executor, Group, ModelInfo, Signature, Tensors, WrongAnswer
from inferbus.models.codecs import finite_rows
from inferbus.worker import outcomes as wire
from inferbus.worker.batcher import Batch, Batcher, Piece
from inferbus.worker.delivery import AtLeastOnce, Kind, Outcomes
from inferbus.worker.devices import Answer, Device, Segment
from inferbus.worker.metrics import Metrics
from inferbus.worker.order import KeyOrder
from inferbus.worker.replies import Answering

log = structlog.get_logger("inferbus.pipeline")

CHUNK = 1024  # messages asked for at once: enough that the cost of a chunk vanishes, few enough that devices start soon
CHUNK_BYTES = 8 * 2**20  # and about as many bytes
AHEAD = 0.01  # seconds of full batches queued at a device, for it to work on while the pipeline decodes
AHEAD_BYTES = 16 * 2**20  # and at most so many bytes of them, if that is a batch: memory in use fits no cache
REST = 0.2  # seconds the pipeline sleeps at most
ALIVE = 60.0  # seconds without a step after which the process reports itself dead

SPARE = 4  # batches that wait for each device, or AHEAD_BYTES, beyond which nothing more is received

CONTROL = frozenset({"inferbus-deadline-ms", "inferbus-timeout-ms", "inferbus-model"})


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of `batch` and `flow`: rows, messages, bytes and seconds."""

    max_rows: int = 256
    max_delay: float = 0.0
    max_batch_bytes: int = 64 * 2**20
    max_inflight: int = 8192
    max_inflight_bytes: int = 256 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_backoff: float = 10.0


Shared = list[tuple[str, bytes]]
"""Headers that every prediction of a batch carries."""


@dataclass(slots=True)
class Share:
    """Requests of a batch and what the model answered them, column by column; rows stacked in `outputs`."""

    messages: Sequence[Message]
    rows: Sequence[int]
    asks: Sequence[object]
    outputs: Tensors
    arrivals: Sequence[tuple[float, int]]

    @classmethod
    def of(cls, batch: Batch, segment: Segment, outputs: Tensors) -> Share:
        """What one segment answers; usually the whole batch."""
        start, stop = segment.start, segment.stop
        if stop - start == len(batch.messages):
            return cls(batch.messages, batch.rows, batch.asks, outputs, batch.arrivals)
        arrivals = [(batch.arrivals[0][0], stop - start)]
        return cls(batch.messages[start:stop], batch.rows[start:stop], batch.asks[start:stop], outputs, arrivals)

    def singly(self) -> Iterator[Share]:
        """Each request by itself."""
        for i, end in enumerate(accumulate(self.rows)):
            own = {name: column[end - self.rows[i] : end] for name, column in self.outputs.items()}
            yield Share([self.messages[i]], [self.rows[i]], [self.asks[i]], own, [(self.arrivals[0][0], 1)])

    def only(self, keep: Array) -> Share:
        """Without the requests that are not to be kept; `keep` is one bool per request."""
        mask = np.repeat(keep, self.rows)
        messages = list(compress(self.messages, keep))
        return Share(
            messages,
            list(compress(self.rows, keep)),
            list(compress(self.asks, keep)),
            {name: column[mask] for name, column in self.outputs.items()},
            [(self.arrivals[0][0], len(messages))],
        )


class Pipeline:
    """From one source through one model to the sinks.

    Args:
        source: Where requests come from.
        sinks: Where predictions go, sinks and stores; all must confirm.
        errors: Where error records go; all must confirm.
        codec: Makes the codec between bytes and columns, once the model is loaded and its signature known.
        executors: Replicas of the model, each on a thread of its own.
        probe: Makes the warm-up input at the largest batch.
        limits: Batch and flow limits.
        metrics: What is counted.
        ordered: Whether outcomes keep the order of requests per key.
        allow_non_finite: Whether NaN and infinity may be published.
        replies: The way back to requesters; None answers nobody directly.
        reply_to: Patterns of the addresses that may be answered.
        clock: Monotonic seconds.
        wall: Unix seconds, for deadlines and error records.
    """

    def __init__(
        self,
        source: Source,
        sinks: Sequence[Sink | Store],
        errors: Sequence[Sink | Store],
        codec: Callable[[Signature, ModelInfo], Codec],
        executors: Sequence[Executor],
        probe: Callable[[Signature], Tensors],
        limits: Limits,
        metrics: Metrics,
        *,
        ordered: bool = False,
        allow_non_finite: bool = False,
        replies: Replies | None = None,
        reply_to: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.bell = Bell()
        self.worker = f"{os.getpid():x}-{secrets.token_hex(3)}"
        self._source = source
        self._sinks: list[Sink | Store] = [*sinks, *errors]
        self._codec_for = codec
        self._limits = limits
        self._metrics = metrics
        self._allow_non_finite = allow_non_finite
        self._clock = clock
        self._wall = wall
        self._batcher = Batcher(limits.max_rows, limits.max_batch_bytes, limits.max_delay)
        self._order = KeyOrder() if ordered else None
        stores: dict[Kind, list[Store]] = {
            "prediction": [place for place in sinks if isinstance(place, Store)],
            "error": [place for place in errors if isinstance(place, Store)],
        }
        # Where stores alone take predictions nobody reads bodies, so none are written.
        self._in_columns = bool(stores["prediction"])
        self._keeps = bool(stores["prediction"] or stores["error"])
        self._in_bodies = len(stores["prediction"]) < len(sinks) or replies is not None
        self._replies = replies
        self._answering = None if replies is None else Answering(replies, reply_to, metrics)
        self._delivery = AtLeastOnce(
            source,
            {
                "prediction": [place for place in sinks if not isinstance(place, Store)],
                "error": [place for place in errors if not isinstance(place, Store)],
            },
            stores,
            self._refused,
            self._on_settled,
            max_backoff=limits.max_backoff,
            clock=clock,
        )
        self._answers: deque[Answer] = deque()
        self._devices = [Device(executor, probe, self._answers, self.bell) for executor in executors]
        self.info: ModelInfo = executors[0].info
        self._batches = 0
        self._ahead = 1  # full batches a busy device may have queued
        self._largest = 1  # bytes of the largest message of late, for asking no more than fits
        self._opened: list[Source | Sink | Store | Replies] = []
        self._source_problem: str | None = None
        self._retry_at = 0.0
        self._backoff = 0.1
        self._stepped_at = clock()
        self._measure_at = 0.0
        self._leftovers = False
        self._received_at = clock()
        self.draining = False
        self.fatal: str | None = None
        self.misread = False  # what was fatal is the user's to mend

    # Starting

    def start(self, give_up: float) -> None:
        """Load the model and reach the outside, side by side.

        Args:
            give_up: Seconds the outside may be away.

        Raises:
            InvalidModel: The model cannot be loaded or fails its warm-up.
            Unavailable: Something outside is still away after `give_up`.
            Misconfigured: Settings that cannot work.

        Told to drain before the model is loaded, it returns: nothing was received, and `drained` is true.
        """
        for device in self._devices:
            device.start()
        until = self._clock() + give_up
        self._open(self._source, lambda: self._source.open(self.bell, self._pump), until)
        for sink in self._sinks:
            self._open(sink, lambda sink=sink: sink.open(self.bell), until)  # type: ignore[misc]  # mypy loses the default
        if (replies := self._replies) is not None:
            self._open(replies, lambda: replies.open(self.bell), until)
        while not all(device.warm for device in self._devices) and not self.draining:
            for device in self._devices:
                if device.failure is not None:
                    raise device.failure
            self._tick_source(self._clock())  # while the model loads, or the group waits for us
            self.bell.wait(REST)
        if not all(device.warm for device in self._devices):
            return  # told to drain: what the model takes is not known yet, so no codec can be made for it
        executor = self._devices[0].executor
        self.info = executor.info
        self._codec = self._codec_for(executor.signature, executor.info)
        self._metrics.set_model(self.info.name, self.info.version, self.info.executor, self.info.device)

    def _open(self, place: Source | Sink | Store | Replies, open_: Callable[[], None], until: float) -> None:
        backoff = 0.1
        while True:
            try:
                open_()
            except Unavailable as error:
                if self._clock() + backoff > until or self.draining:
                    raise
                log.warning("waiting", place=place.name, reason=str(error), retry_in=backoff)
                self._stepped_at = self._clock()
            else:
                self._opened.append(place)
                return
            self.bell.wait(backoff)
            backoff = min(self._limits.max_backoff, backoff * 2)

    # Running

    def run(self, keep_going: Callable[[float], bool]) -> None:
        """Step and rest until `keep_going(now)` says no."""
        while keep_going(self._clock()):
            if not self.step():
                self._rest()

    def stop(self) -> None:
        """Take no more; finish what is there. Safe in a signal's callback."""
        self.draining = True
        self.bell.ring()

    def drained(self) -> bool:
        """Nothing received is without its settled outcome."""
        return not len(self._batcher) and not self._busy() and not self._delivery.pending()

    def idle(self) -> bool:
        """Nothing is in flight, not even an unacknowledged commit."""
        return self.drained() and self._source.inflight()[0] == 0

    def finished(self) -> bool:
        """Nothing is in flight, and nothing will come any more."""
        return self.idle() and self._source.ended()

    def quiet_since(self) -> float:
        """Monotonic time of the last message received, or of the start."""
        return self._received_at

    def hurry(self) -> None:
        """No more is expected: stores complete the objects they have."""
        self._delivery.drain()

    def exhausted(self) -> bool:
        """Nothing is left on the bus for this group; may block for seconds."""
        return self._source.exhausted()

    def release(self) -> int:
        """Give back what no device has begun; answers how many messages."""
        left = self._batcher.discard(lambda _: True)
        self._source.release(left)
        return len(left)

    def _busy(self) -> bool:
        return any(device.queued for device in self._devices) or bool(self._answers)

    def step(self) -> bool:
        """Everything that can be done now; False when there was nothing."""
        now = self._clock()
        moved = self._collect()
        if self.draining or self._nothing_to_wait_for():
            self._delivery.drain()
        self._tick_delivery()
        self._tick_source(now)
        if self._leftovers:
            self._drop_leftovers()
        if not self.draining and now >= self._retry_at:
            moved |= self._receive(now)
        self._expire(now)
        return self._dispatch(now, flush=self.draining) or moved

    def _tick_delivery(self) -> None:
        try:
            self._delivery.tick()
        except Fatal as error:
            self._die(str(error))
        if self._answering is not None:
            self._answering.tick()

    def _nothing_to_wait_for(self) -> bool:
        """No request is between source and delivery, and none can come before stores have completed what they have."""
        if not self._keeps or len(self._batcher) or self._busy():
            return False
        return self._source.ended() or not self._credit()

    def _tick_source(self, now: float) -> None:
        self._stepped_at = now
        if now >= self._measure_at:
            self._measure_at = now + REST
            self._metrics.set_inflight(*self._source.inflight())
            self._metrics.set_lag(self._source.name, self._source.lag())
        try:
            self._source_tick = self._source.tick(now)
        except Unavailable as error:
            self._source_tick = now + REST
            self._source_away(now, str(error))
        except Fatal as error:
            self._source_tick = now + REST
            self._die(str(error))

    def _rest(self) -> None:
        now = self._clock()
        idle = any(not device.queued for device in self._devices)
        wake = min(self._source_tick, self._batcher.wake_at(idle=idle), self._delivery.wake_at(), now + REST)
        if self._retry_at > now:
            wake = min(wake, self._retry_at)
        elif not self.draining and self._credit() > 0:
            self._source.rest()
        self._delivery.rest()
        if wake > now:
            self.bell.wait(wake - now)

    def _pump(self, finished: Callable[[], bool], budget: float) -> None:
        """Bring what is in flight to its end without receiving, until `finished` or the budget is spent.

        What is in flight and not here yet is still in the source: no pumping will finish it.
        """
        until = self._clock() + budget
        while not finished() and not self.drained() and self._clock() < until:
            self._stepped_at = self._clock()
            moved = self._collect()
            self._delivery.drain()
            self._tick_delivery()
            self._expire(self._clock())
            moved |= self._dispatch(self._clock(), flush=True)
            if not moved and not finished():
                self._delivery.rest()
                self.bell.wait(0.02)
        self._leftovers |= not finished()

    def _drop_leftovers(self) -> None:
        """After a drain that ran out of time: what no device has begun is the next owner's to serve."""
        self._leftovers = False
        void = self._batcher.discard(self._source.void)
        if self._order is not None:
            for ready in self._order.forget(void):
                self._delivery.deliver(ready)

    # Receive and decode

    def _credit(self) -> int:
        """Messages that may be asked for now."""
        messages, size = self._source.inflight()
        # The source counts no request that has gone to another worker; its outcome takes room until its sink is back.
        messages, size = max(messages, self._delivery.pending()), max(size, self._delivery.size())
        limits = self._limits
        room = limits.max_inflight_bytes - size
        if messages >= limits.max_inflight or room <= 0 or self._stocked():
            return 0
        return min(CHUNK, limits.max_inflight - messages, max(1, min(room, CHUNK_BYTES) // self._largest))

    def _stocked(self) -> bool:
        """Devices have batches waiting and to spare: more would only fill memory and be repeated after a crash."""
        rows, full = len(self._batcher), self._limits.max_rows * len(self._devices)
        if rows < full:
            return False
        return rows >= max(CHUNK, SPARE * full) or self._batcher.size() >= AHEAD_BYTES

    def _receive(self, now: float) -> bool:
        limit = self._credit()
        if not limit:
            return False
        try:
            messages = self._source.receive(limit)
        except Unavailable as error:
            self._source_away(now, str(error))
            return False
        except (Fatal, Misconfigured) as error:
            self.misread = isinstance(error, Misconfigured)
            self._die(str(error))
            return False
        self._source_problem = None
        self._backoff = 0.1
        if not messages:
            return False
        self._received_at = now
        self._metrics.received(self._source.name, len(messages))
        self._accept(messages, now)
        return True

    def _source_away(self, now: float, why: str) -> None:
        self._source_problem = why
        log.warning("source_away", source=self._source.name, reason=why, retry_in=self._backoff)
        self._retry_at = now + self._backoff
        self._backoff = min(self._limits.max_backoff, self._backoff * 2)

    def _die(self, why: str) -> None:
        """Serve nothing more: what is not written now comes again elsewhere."""
        log.error("fatal", reason=why)
        self.fatal = why
        self.draining = True
        self._batcher.discard(lambda _: True)

    def _accept(self, messages: list[Message], now: float) -> None:
        """Refuse what must not be decoded, decode the rest, and let it wait for a batch."""
        if self._order is not None:
            self._order.receive(messages)
        sizes = [len(m.body) for m in messages]
        largest = max(sizes)
        self._largest = max(1, largest, self._largest // 2)
        faults: list[wire.Fault] = []
        deadlines: dict[int, float] = {}
        unreadable = any(issubclass(kind, Unreadable) for kind in set(map(type, messages)))
        if unreadable or largest > self._limits.max_message_bytes:
            messages = self._readable(messages, faults)
        if any(m.headers for m in messages):
            messages = self._controlled(messages, faults, deadlines, now)
        if faults:
            self._fail(faults, now)
        if messages:
            self._decode(messages, deadlines, now)

    def _readable(self, messages: list[Message], faults: list[wire.Fault]) -> list[Message]:
        """Without those the client could not read and those over the limit."""
        kept: list[Message] = []
        limit = self._limits.max_message_bytes
        for m in messages:
            if isinstance(m, Unreadable):
                faults.append((m, m.code, "receive", m.reason))
            elif len(m.body) > limit:
                text = f"the body has {len(m.body)} bytes, at most {limit} are allowed (flow.max_message_bytes)"
                faults.append((m, "too_large", "receive", text))
            else:
                kept.append(m)
        return kept

    def _controlled(
        self, messages: list[Message], faults: list[wire.Fault], deadlines: dict[int, float], now: float
    ) -> list[Message]:
        """Obey the control headers: without those for another model or past their deadline."""
        kept: list[Message] = []
        for m in messages:
            if m.headers:
                found = dict(m.headers)
                if not CONTROL.isdisjoint(found):
                    fault = self._obey(m, found, deadlines, now)
                    if fault is not None:
                        faults.append(fault)
                        continue
            kept.append(m)
        return kept

    def _obey(self, m: Message, found: dict[str, bytes], deadlines: dict[int, float], now: float) -> wire.Fault | None:
        wanted = found.get("inferbus-model")
        if wanted and not self._serves(wanted.decode("utf-8", "replace")):
            return (
                m,
                "unknown_model",
                "decode",
                f"header inferbus-model: expected {self.info.name} or nothing",
            )
        wall = self._wall()
        due = float("inf")
        for name, start in (("inferbus-deadline-ms", 0.0), ("inferbus-timeout-ms", m.created_at or wall)):
            if name in found:
                value = found[name] or b""  # a Kafka header may have no value
                if not value.isdigit() or len(value) > 15:
                    return m, "invalid_request", "decode", f"header {name}: expected whole milliseconds"
                due = min(due, start + int(value) / 1000)
        if due <= wall:
            return self._expired(m)
        if due != float("inf"):
            deadlines[id(m)] = now + due - wall
        return None

    def _serves(self, wanted: str) -> bool:
        return wanted in (self.info.name, f"{self.info.name}@{self.info.version}")

    def _expired(self, m: Message) -> wire.Fault:
        return m, "expired", "predict", "the deadline passed before the request reached the model"

    def _decode(self, messages: list[Message], deadlines: dict[int, float], now: float) -> None:
        began = time.perf_counter()
        try:
            decoded = self._codec.decode([m.body for m in messages], [m.headers for m in messages])
        except Exception as error:  # noqa: BLE001 - a fault of ours, and a message that brings it up harms only itself
            self._undecodable(messages, deadlines, now, error)
            return
        self._metrics.stage("decode", time.perf_counter() - began)
        if decoded.rejects:
            self._fail([(messages[i], "invalid_request", "decode", str(e)) for i, e in decoded.rejects], now)
        for group in decoded.groups:
            if len(group.positions) != len(messages):
                members: Sequence[Message] = [messages[i] for i in group.positions]
            else:
                members = messages
            self._enqueue(members, group, deadlines, now)

    def _undecodable(self, messages: list[Message], deadlines: dict[int, float], now: float, error: Exception) -> None:
        """Go one by one, so that only the message that brings the error up fails."""
        if len(messages) == 1:
            log.error("decode_failed", id=messages[0].id, exc_info=error)
            text = "the request could not be read: an error of the worker, which is in its log"
            self._fail([(messages[0], "internal", "decode", text)], now)
            return
        for m in messages:
            self._decode([m], deadlines, now)

    def _enqueue(self, messages: Sequence[Message], group: Group, deadlines: dict[int, float], now: float) -> None:
        if any(column.dtype.hasobject for column in group.columns.values()):
            row_bytes = sum(len(m.body) for m in messages) / sum(group.rows)
        else:
            row_bytes = sum(c.nbytes for c in group.columns.values()) / sum(group.rows)
        whole = Piece(messages, group.rows, group.asks, group.columns, now, row_bytes)
        if not deadlines:
            self._batcher.put(group.lane, whole)
            return
        # Each request with a deadline has an urgency of its own, so it waits as a piece of its own.
        for i, end in enumerate(accumulate(group.rows)):
            start = end - group.rows[i]
            columns = {name: column[start:end] for name, column in group.columns.items()}
            due = deadlines.get(id(messages[i]))
            piece = Piece([messages[i]], [group.rows[i]], [group.asks[i]], columns, now, row_bytes, due)
            self._batcher.put(group.lane, piece)

    # Batch and predict

    def _dispatch(self, now: float, *, flush: bool) -> bool:
        """Batches to devices: anything to an idle one, and full ones ahead to a busy one, since those cannot grow."""
        moved = False
        for ahead in range(self._ahead + 1):
            for device in self._devices:
                if device.queued != ahead or self.fatal:
                    continue
                batch = self._batcher.take(now, idle=not ahead, flush=flush)
                if batch is None:
                    break
                for arrived, count in batch.arrivals:
                    self._metrics.stage("queue", now - arrived, count)
                self._metrics.batch(self.info.name, batch.reason, batch.total_rows)
                device.submit(batch)
                moved = True
        return moved

    def _expire(self, now: float) -> None:
        expired = self._batcher.expire(now)
        if expired:
            self._fail([self._expired(m) for m in expired], now)

    # Encode and write

    def _collect(self) -> bool:
        """Answers of devices into outcomes."""
        moved = False
        while self._answers:
            moved = True
            answer = self._answers.popleft()
            answer.device.queued -= 1
            if answer.sick is not None:
                self._die(answer.sick)
            if self.fatal is None:
                self._finish(answer)
        return moved

    def _finish(self, answer: Answer) -> None:
        batch = answer.batch
        self._metrics.stage("predict", answer.seconds)
        size = sum(column.nbytes for column in batch.inputs.values())
        self._ahead = max(1, min(16, int(AHEAD / max(answer.seconds, 1e-6)), AHEAD_BYTES // max(size, 1)))
        self._batches += 1
        shared = wire.shared_headers(
            self.info, f"{self.worker}-{self._batches}", batch.total_rows, answer.seconds, self.worker
        )
        faults: list[wire.Fault] = []
        for segment in answer.segments:
            if segment.outputs is None:
                faults += self._failed(batch, segment)
                continue
            share = Share.of(batch, segment, segment.outputs)
            if batch.parts:
                self._publish_parts(batch, segment.start, share, shared, faults)
            else:
                self._publish(share, shared, faults)
        if faults:
            self._fail(faults, batch.arrivals[0][0])

    def _failed(self, batch: Batch, segment: Segment) -> list[wire.Fault]:
        """The faults of requests predict failed on alone; a request in parts fails once."""
        code: wire.Code = "model_error" if segment.refusal is None else "invalid_request"
        text = segment.refusal or "the model failed on this request, or answered it with the wrong number of rows"
        return [
            (batch.messages[i], code, "predict", text)
            for i in range(segment.start, segment.stop)
            if i not in batch.parts or batch.parts[i][0].fail(code, text)
        ]

    def _publish_parts(self, batch: Batch, start: int, share: Share, shared: Shared, faults: list[wire.Fault]) -> None:
        """Requests one by one, of a share that begins at `start`: parts go to their assembly, the last completes it."""
        for i, own in enumerate(share.singly(), start):
            if i in batch.parts:
                assembly, part = batch.parts[i]
                whole = assembly.add(part, own.outputs)
                if whole is None:
                    continue
                own.outputs, own.rows = whole, [next(iter(whole.values())).shape[0]]
            self._publish(own, shared, faults)

    def _publish(self, share: Share, shared: Shared, faults: list[wire.Fault]) -> None:
        """Encode and deliver; what cannot be published becomes a fault."""
        began = time.perf_counter()
        finite = None if self._allow_non_finite else finite_rows(share.outputs)
        if finite is not None:
            keep = np.logical_and.reduceat(finite, np.cumsum([0, *share.rows[:-1]]))
            text = "an output is NaN or infinite"
            faults += [
                (m, "non_finite_output", "encode", text) for m, k in zip(share.messages, keep, strict=True) if not k
            ]
            share = share.only(keep)
            if not share.messages:
                return
        try:
            records = self._records(share, shared)
        except Exception as error:  # noqa: BLE001 - whatever it is, one answer harms only its request
            self._unencodable(share, shared, faults, error)
            return
        self._metrics.stage("encode", time.perf_counter() - began)
        self._deliver(Outcomes("prediction", records, share.arrivals))

    def _records(self, share: Share, shared: Shared) -> Records:
        """Predictions as records, in the forms that sinks and stores take."""
        columns = None
        if self._in_columns:
            columns = Columns(share.outputs, share.rows, self.info.name, self.info.version, self._wall())
            if not self._in_bodies:
                return wire.rows(share.messages, columns, shared)
        bodies, formats = self._codec.encode(share.outputs, share.rows, share.asks, [m.id for m in share.messages])
        records = wire.predictions(share.messages, bodies, formats, shared)
        records.columns = columns
        return records

    def _unencodable(self, share: Share, shared: Shared, faults: list[wire.Fault], error: Exception) -> None:
        """One answer cannot be written in its format: go one by one, so that only it fails."""
        if len(share.messages) > 1:
            for own in share.singly():
                self._publish(own, shared, faults)
            return
        m = share.messages[0]
        if isinstance(error, WrongAnswer):
            log.warning("encode_failed", id=m.id, error=str(error))
            text = "the model's answer cannot be written in the format asked for"
            faults.append((m, "model_error", "encode", text))
        else:
            log.error("encode_failed", id=m.id, exc_info=error)
            text = "the model's answer could not be written: an error of the worker, which is in its log"
            faults.append((m, "internal", "encode", text))

    def _fail(self, faults: list[wire.Fault], arrived: float) -> None:
        """Error records for these."""
        records = wire.errors(faults, self.info, self._source.locate, now=self._wall())
        for _, code, _, _ in faults:
            self._metrics.outcomes(self.info.name, self.info.version, code, 1)
        self._deliver(Outcomes("error", records, [(arrived, len(faults))]))

    def _refused(self, outcomes: Outcomes, records: Records, why: Sequence[ConnectorError]) -> Outcomes | None:
        """Records a sink refuses, in another form; None where there is none."""
        at = [(self._clock(), len(records))]
        if outcomes.kind == "error":
            if outcomes.cuts == len(wire.SMALLER) or not all(isinstance(error, TooLarge) for error in why):
                return None
            return Outcomes("error", wire.SMALLER[outcomes.cuts](records), at, cuts=outcomes.cuts + 1)
        faults: list[wire.Fault] = []
        for m, error in zip(records.messages, why, strict=True):
            if isinstance(error, TooLarge):
                faults.append((m, "too_large", "write", "the prediction is larger than the sink takes"))
            else:
                faults.append((m, "internal", "write", f"the sink does not take the prediction ({error})"))
            self._metrics.outcomes(self.info.name, self.info.version, faults[-1][1], 1)
        return Outcomes("error", wire.errors(faults, self.info, self._source.locate, now=self._wall()), at)

    def _deliver(self, outcomes: Outcomes) -> None:
        for ready in [outcomes] if self._order is None else self._order.release(outcomes):
            self._delivery.deliver(ready)
            if self._answering is not None:
                self._answering.answer(ready)

    def _on_settled(self, outcomes: Outcomes) -> None:
        now = self._clock()
        self._metrics.stage("write", now - outcomes.started)
        self._metrics.stage("settle", outcomes.settling)
        for arrived, count in outcomes.arrivals:
            self._metrics.latency(self.info.name, now - arrived, count)
        if outcomes.kind == "prediction":
            done = len(outcomes.records) - len(outcomes.elsewhere)
            self._metrics.outcomes(self.info.name, self.info.version, "ok", done)

    # Ending and health

    def close(self, timeout: float) -> None:
        """Write what can be written in `timeout` seconds, commit, leave."""
        for sink in self._sinks:
            if sink in self._opened:
                sink.close(timeout)
        if self._replies is not None and self._replies in self._opened:
            self._replies.close(timeout)
        if self._source in self._opened:
            self._source.close()
        for device in self._devices:
            device.close(0.5)

    def live(self) -> list[str]:
        """Why this process should be restarted; empty when it should not."""
        reasons = [hung for device in self._devices if (hung := device.hung())]
        still = self._clock() - self._stepped_at
        if still > ALIVE:
            reasons.append(f"the pipeline has not moved for {still:.0f} s")
        return reasons

    def ready(self) -> list[str]:
        """Why this process cannot serve now; empty when it can."""
        reasons = ["the model is loading"] if not all(device.warm for device in self._devices) else []
        if len(self._opened) < 1 + len(self._sinks):
            reasons.append("connecting")
        if self.draining:
            reasons.append("draining")
        problem = self._source_problem or (self._source in self._opened and self._source.healthy())
        if problem:
            reasons.append(problem)
        if blocked := self._delivery.healthy():
            reasons.append(blocked)
        return reasons
