"""The two threads a connector may keep beside the pipeline's: one parked in a client's poll, one for calls that block.

Both hand over through plain fields and queues and ring the bell; neither ever touches the pipeline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from inferbus.connectors.base import Bell


class Parking:
    """Runs `round_` over and over on its own thread, from `park` until it answers True, then rings the bell.

    While `parked` is True the client belongs to that thread.
    """

    def __init__(self, round_: Callable[[], bool], bell: Bell) -> None:
        self.parked = False
        self.before_next: Callable[[], None] | None = None  # made by the owner of the client before its next round
        self._round = round_
        self._bell = bell
        self._closing = False
        self._asks: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="parking", daemon=True)
        self._thread.start()

    def park(self) -> None:
        """Hand the client over; does nothing while it is handed over already."""
        if not self.parked:
            self.parked = True
            self._asks.put(True)

    def _run(self) -> None:
        while self._asks.get():
            try:
                while not self._closing and not self._round():
                    self.catch_up()
            finally:
                self.parked = False
                self._bell.ring()

    def catch_up(self) -> None:
        """Make the call left for the client's owner, by whoever owns it now."""
        call, self.before_next = self.before_next, None
        if call is not None:
            call()

    def close(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Take the client back for good. `meanwhile` serves what a callback on the parked thread may wait for."""
        self._closing = True
        self._asks.put(False)
        while self._thread.is_alive():
            meanwhile()
            self._thread.join(0.02)


class Clerk:
    """Makes one blocking call at a time on its own thread; the answer is given on the pipeline's, by `tick`."""

    def __init__(self, bell: Bell) -> None:
        self.busy = False
        self.closing = False
        self._bell = bell
        self._asks: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._then: Callable[[Any], None] = lambda _: None
        self._thread = threading.Thread(target=self._run, name="clerk", daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Start `call`, which must not raise; `then` gets what it returns. Only when not `busy`."""
        self.busy = True
        self._then = then
        self._asks.put(call)

    def tick(self) -> None:
        """Give the answer, if it is there."""
        if self.busy:
            try:
                answer = self._answers.get_nowait()
            except Empty:
                return
            self.busy = False
            self._then(answer)

    def _run(self) -> None:
        while (call := self._asks.get()) is not None:
            self._answers.put(call())
            self._bell.ring()

    def close(self) -> None:
        """Wait for the call under way and end the thread."""
        self.closing = True
        self._asks.put(None)
        self._thread.join()
