"""The courier: one thread that takes requests to the bus and brings replies, for a client on an event loop.

Between the client and connectors, which want a single thread that never blocks for long. Both ways go through plain
queues; the bell wakes the thread.

Invariant: every request handed over is reported once: written, or why it was not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from inferbus.connectors.base import Bell, ConnectorError, Failure, Message, Records, Sink, Unavailable
from inferbus.worker.inbox import Inbox

REST = 0.2  # seconds the thread sleeps at most
GOODBYE = 2.0  # seconds that what is under way has when the client closes

Written = Callable[[Exception | None], object]


class Courier:
    """Runs a sink for requests and an inbox of replies.

    Args:
        sink: Where requests go.
        inbox: Where replies come.
        came: Called on the thread with the replies that came together.
    """

    def __init__(self, sink: Sink, inbox: Inbox, came: Callable[[Sequence[Message]], None]) -> None:
        self._sink = sink
        self._inbox = inbox
        self._came = came
        self._bell = Bell()
        self._outgoing: deque[tuple[Message, Written]] = deque()
        self._under_way: dict[str, tuple[Message, Written]] = {}  # given to the sink, by id
        self._closing = False
        self._over: Exception | None = None  # why nothing is sent any more
        self._ended: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None

    def begin(self, opened: Callable[[Exception | None], object]) -> None:
        """Open sink and inbox on the thread; `opened` gets None, or why that failed."""
        self._thread = threading.Thread(target=self._run, args=(opened,), name="courier", daemon=True)
        self._thread.start()

    def send(self, request: Message, written: Written) -> None:
        """Hand a request over; `written` is called on the thread once it is durable, or with the reason why not."""
        self._outgoing.append((request, written))
        self._bell.ring()
        if self._over is not None:
            self._refuse(self._over)

    def _refuse(self, why: Exception) -> None:
        """On whichever thread: what was handed over is not sent any more."""
        with contextlib.suppress(IndexError):
            while True:
                self._outgoing.popleft()[1](why)

    def end(self, ended: Callable[[], object]) -> None:
        """Write what was handed over, leave the bus, call `ended`."""
        self._ended = ended
        self._closing = True
        self._bell.ring()
        if self._over is not None:
            ended()  # it was over before we said so

    def _run(self, opened: Callable[[Exception | None], object]) -> None:
        try:
            self._sink.open(self._bell)
            self._inbox.open(self._bell)
        except ConnectorError as error:
            self._sink.close(0.0)
            self._inbox.close()
            opened(error)
            return
        opened(None)
        over: Exception = Unavailable("the client is closed")
        try:
            self._serve()
        except ConnectorError as error:  # the client of the bus cannot go on
            over = error
        self._sink.close(GOODBYE)
        self._inbox.close()
        self._over = over
        for _, written in self._under_way.values():
            written(over)
        self._refuse(over)
        self._ended()

    def _serve(self) -> None:
        until = float("inf")
        while not (self._closing and not self._outgoing and not self._under_way) and time.monotonic() < until:
            if self._closing and until == float("inf"):
                until = time.monotonic() + GOODBYE
            if not self._step():
                self._sink.rest()
                self._inbox.rest()
                self._bell.wait(REST)

    def _step(self) -> bool:
        """Everything that can be done now; False when there was nothing."""
        sent = self._write()
        self._sink.tick()
        replies = self._inbox.take()
        if replies:
            self._came(replies)
        return sent or bool(replies)

    def _write(self) -> bool:
        batch: list[tuple[Message, Written]] = []
        while self._outgoing:
            batch.append(self._outgoing.popleft())
        if not batch:
            return False
        messages = [m for m, _ in batch]
        records = Records(
            messages, [m.key for m in messages], [m.body for m in messages], [[*m.headers] for m in messages]
        )
        self._under_way.update((m.id, (m, written)) for m, written in batch)
        self._sink.write(records, lambda failures: self._report(batch, failures))
        return True

    def _report(self, batch: list[tuple[Message, Written]], failures: Sequence[Failure]) -> None:
        errors = dict(failures)
        for position, (m, written) in enumerate(batch):
            del self._under_way[m.id]
            written(errors.get(position))
