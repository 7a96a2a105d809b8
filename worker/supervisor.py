"""`--workers N`: one parent that spawns N workers, watches them and speaks for them.

Around the path of a message, never in it: each child is a whole `inferbus run` with its own source, batches
and sink. Parent and child hold the two ends of one socket. The child writes its HTTP port to it, once; the
parent writes nothing, so that the end of the stream tells the child that its parent is gone, however it
went, and the child drains.

Invariant: no child outlives its parent by more than its drain, and none is stopped but by a signal it can
drain on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from inferbus.worker.http import Listener
from inferbus.worker.metrics import parse_and_sum

COMMAND = (sys.executable, "-m", "inferbus.worker.cli")
CHILD = "INFERBUS_CHILD"
READY_FD = "INFERBUS_READY_FD"

PROBE_TIMEOUT = 0.8  # orchestrators give a probe one second by default
SCRAPE_TIMEOUT = 3.0
ORPHAN_GRACE = 5.0


class HttpSettings(Protocol):
    """The `http` mapping of the pipeline file."""

    @property
    def host(self) -> str:
        """Address to listen on."""

    @property
    def port(self) -> int:
        """0 for any."""


def child_index() -> int | None:
    """Which child this process is, from 0; None when it is not a child."""
    place = os.environ.get(CHILD)
    return int(place.partition("/")[0]) if place else None


def child_count() -> int:
    """How many processes serve this pipeline on this machine, this one included."""
    place = os.environ.get(CHILD)
    return int(place.partition("/")[2]) if place else 1


def join_parent(port: int, drain: float) -> None:
    """Tell the parent where this child answers HTTP, and drain when the parent dies.

    Does nothing in a process that is no child. An orphan drains as on SIGTERM: its handler must be in place.

    Args:
        port: Of the child's own listener on 127.0.0.1.
        drain: Seconds the drain may take; an orphan that is still there well after that is ended.
    """
    descriptor = os.environ.pop(READY_FD, None)
    if descriptor is None:
        return
    link = socket.socket(fileno=int(descriptor))
    link.set_inheritable(False)  # whoever else held it would keep this child alive in the parent's eyes
    with contextlib.suppress(OSError):  # the parent has just died: the thread below sees it too
        link.sendall(json.dumps({"port": port}).encode() + b"\n")
    threading.Thread(target=_drain_as_orphan, args=(link, drain), name="parent", daemon=True).start()


def _drain_as_orphan(link: socket.socket, drain: float) -> None:
    with contextlib.suppress(OSError):
        link.recv(1)  # returns only when the parent is gone
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(drain + ORPHAN_GRACE)
    os._exit(70)  # hung: nobody is left to notice, and what was in flight is delivered again


def supervise(
    argv_tail: list[str],
    workers: int,
    http_settings: HttpSettings | None,
    until_idle: float | None,
    logger: FilteringBoundLogger,
    *,
    command: Sequence[str] = COMMAND,
) -> int:
    """Run `workers` children until they have ended; call it on the main thread.

    Args:
        argv_tail: What the user typed after `inferbus`; each child gets it whole.
        workers: How many children.
        http_settings: Where the parent serves; None where nobody asks.
        until_idle: Set in a bounded run: it is over when every child has ended with 0.
        logger: For the life of the children.
        command: What `argv_tail` is appended to.

    Returns:
        The exit code that ended the run, where no restart would help, else the worst of the children's.

    Raises:
        PortBusy: The parent cannot listen; no child was started.
    """
    crew = _Crew([*command, *argv_tail], workers, until_idle is not None, logger)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_signal_numbers())
        stack.callback(crew.close)
        if http_settings is not None:
            listener = Listener(
                http_settings.host,
                http_settings.port,
                live=crew.live,
                ready=crew.ready,
                render=crew.render,
                logger=logger,
            )
            stack.callback(listener.close)
        return crew.run(signals)


class Backoff:
    """Seconds to wait before a child is started again: 1, 2, 4 .. 30; 1 again after a life of a minute."""

    def __init__(self) -> None:
        self._next = 1.0

    def after(self, lived: float) -> float:
        """The wait after a life of `lived` seconds."""
        wait = 1.0 if lived >= 60.0 else self._next
        self._next = min(2 * wait, 30.0)
        return wait


class _Life:
    """One child process from start to end. The listener's threads use `port` and `metrics`."""

    def __init__(self, command: Sequence[str], index: int, count: int, now: float) -> None:
        self.started = now
        self.port: int | None = None
        self.metrics = ""  # as last read
        self._heard = b""
        self.link, theirs = socket.socketpair()
        self.link.setblocking(False)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self.link.close)
            environ = {**os.environ, CHILD: f"{index}/{count}", READY_FD: str(theirs.fileno())}
            # A process group of its own: Ctrl-C must reach the child once, through the parent. If the
            # terminal sent it as well, that would count as the second signal, which releases at once.
            self.process = subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=subprocess.DEVNULL,
                env=environ,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
            undo.pop_all()

    def listen(self) -> bool:
        """Take in what the child has written; False when it has closed its end."""
        try:
            received = self.link.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard += received
        line, newline, _ = self._heard.partition(b"\n")
        if newline and self.port is None:
            self.port = int(json.loads(line)["port"])
        return received != b""


class _Child:
    """One of the N places: the process in it, if any, and when the next one is due."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.life: _Life | None = None
        self.due: float | None = 0.0  # monotonic time of the next start; None: no further one
        self.starts = 0
        self.code = 0  # of the last life
        self.backoff = Backoff()


class _Crew:
    """The children, and what the parent says of them.

    `run` is the main thread's; `live`, `ready` and `render` are called by the listener's threads.
    """

    def __init__(self, command: Sequence[str], count: int, bounded: bool, logger: FilteringBoundLogger) -> None:
        self._command = command
        self._bounded = bounded
        self._logger = logger
        self._children = [_Child(index) for index in range(count)]
        self._stopping = False
        self._verdict: int | None = None
        self._selector = selectors.DefaultSelector()
        self._retired = ""  # the metrics of ended lives, added up
        self._lock = threading.Lock()  # so that render counts the metrics of a life that ends once, never twice
        self._pool = ThreadPoolExecutor(2 * count, thread_name_prefix="ask")  # a slow scrape leaves room for a probe

    def run(self, signals: socket.socket) -> int:
        """Start the children, keep them running, and return when all have ended for good."""
        self._selector.register(signals, selectors.EVENT_READ)
        while self._start_what_is_due() or any(child.life for child in self._children):
            for key, _ in self._selector.select(self._time_to_next_start()):
                if key.data is not None:
                    if not key.data.listen():
                        self._selector.unregister(key.fileobj)
                else:
                    for number in signals.recv(4096):
                        if number in (signal.SIGTERM, signal.SIGINT):
                            self._logger.info("stopping", signal=signal.Signals(number).name)
                            self._stop()
            for child in self._children:
                if child.life is not None and child.life.process.poll() is not None:
                    self._ended(child, child.life)
        return max(child.code for child in self._children) if self._verdict is None else self._verdict

    def close(self) -> None:
        """Free what the parent holds; children that still run see their parent gone."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._selector.close()
        for child in self._children:
            if child.life is not None:
                child.life.link.close()

    def _start_what_is_due(self) -> bool:
        """True while a start is yet to come."""
        now = time.monotonic()
        for child in self._children:
            if child.due is None or child.due > now:
                continue
            child.starts += 1
            try:
                life = _Life(self._command, child.index, len(self._children), now)
            except OSError as error:  # out of processes or memory: as if it had died at once
                child.due, child.code = now + child.backoff.after(0.0), 70
                self._logger.warning("worker_not_started", worker=child.index, reason=error.strerror)
                continue
            child.due, child.life = None, life
            self._selector.register(life.link, selectors.EVENT_READ, life)
            self._logger.info("worker_started", worker=child.index, pid=life.process.pid)
        return any(child.due is not None for child in self._children)

    def _time_to_next_start(self) -> float | None:
        dues = [child.due for child in self._children if child.due is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _stop(self) -> None:
        """Pass a signal on, always as SIGTERM: to SIGINT a child still starting answers with a traceback."""
        self._stopping = True
        for child in self._children:
            child.due = None
            if child.life is not None:
                child.life.process.send_signal(signal.SIGTERM)

    def _ended(self, child: _Child, life: _Life) -> None:
        """The place's process is gone: take its last metrics, and start another, or stop all, or leave it."""
        lived = time.monotonic() - life.started
        with contextlib.suppress(KeyError):
            self._selector.unregister(life.link)
        life.link.close()
        with self._lock:
            child.life = None
            self._retired = parse_and_sum([], [self._retired, life.metrics]).decode()
        code = life.process.returncode
        stopped_early = self._stopping and code == -signal.SIGTERM and life.port is None  # nothing to drain yet
        child.code = 0 if stopped_early else 128 - code if code < 0 else code
        if self._stopping or (self._bounded and code == 0):
            self._logger.info("worker_ended", worker=child.index, code=child.code)
        elif self._is_final(child):
            self._logger.error("worker_ended", worker=child.index, code=child.code)
            self._verdict = child.code
            self._stop()
        else:
            wait = child.backoff.after(lived)
            child.due = time.monotonic() + wait
            self._logger.warning("worker_ended", worker=child.index, code=child.code, restart_in=wait)

    def _is_final(self, child: _Child) -> bool:
        """Whether another start would end the same way, as far as the exit code tells."""
        if child.code in (1, 2):
            return True
        if child.code == 3:  # a dependency is away: final at start, as it is for a single worker
            return self._bounded or child.starts == 1
        return self._bounded and child.code < 128  # what one signal ended may well finish the next time

    def live(self) -> list[str]:
        """Why this process should be restarted. A child that is gone is no reason: the parent is at it."""
        lives = [(child.index, child.life) for child in self._children]
        return self._ask("/livez", [(index, life.port) for index, life in lives if life and life.port])

    def ready(self) -> list[str]:
        """Why not every child serves."""
        if self._stopping:
            return ["draining"]
        reasons = []
        asked = []
        for child in self._children:
            life = child.life
            if life is not None and life.port is not None:
                asked.append((child.index, life.port))
            elif life is not None or child.due is not None:
                reasons.append(f"worker {child.index}: {'not running' if life is None else 'starting'}")
        return reasons + self._ask("/readyz", asked)

    def render(self) -> bytes:
        """The metrics of all children, added up. A child that does not answer counts as when it last did."""
        lives = [life for child in self._children if (life := child.life) is not None]
        texts = self._pool.map(lambda life: _get(life.port, "/metrics", SCRAPE_TIMEOUT), lives)
        for life, (status, text) in zip(lives, texts, strict=True):
            if status == 200:
                life.metrics = text
        with self._lock:
            running = [child.life.metrics for child in self._children if child.life is not None]
            return parse_and_sum(running, [self._retired])

    def _ask(self, path: str, children: list[tuple[int, int]]) -> list[str]:
        answers = self._pool.map(lambda child: _get(child[1], path, PROBE_TIMEOUT), children)
        reasons = []
        for (index, _), (status, text) in zip(children, answers, strict=True):
            if status != 200:
                theirs = json.loads(text)["reasons"] if status == 503 else ["does not answer"]
                reasons += [f"worker {index}: {reason}" for reason in theirs]
        return reasons


def _get(port: int | None, path: str, timeout: float) -> tuple[int, str]:
    """Status and body of a child's page; status 0 when there was no answer."""
    if port is None:
        return 0, ""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


@contextlib.contextmanager
def _signal_numbers() -> Iterator[socket.socket]:
    """A socket that brings each SIGTERM, SIGINT and SIGCHLD as one byte, its number, and so ends a select."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        # The byte is written only for a signal that has a handler in Python, even one that does nothing.
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
