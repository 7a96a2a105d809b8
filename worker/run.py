"""`inferbus run`: one worker process from start to clean exit, or a supervisor of several.

Stopping is numbered: 1. readiness off; 2. no more is received; 3. what is in flight is served, written and settled,
within `drain`; 4. what is left is released; 5. commit, leave, exit. A second signal goes straight to 4.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

import structlog

from inferbus.connectors.base import Misconfigured, Unavailable
from inferbus.worker import build, logs
from inferbus.worker.http import Listener
from inferbus.worker.memory import Memory, keep_freed
from inferbus.worker.metrics import Metrics
from inferbus.worker.pipeline import Pipeline
from inferbus.worker.progress import ProgressLine
from inferbus.worker.settings import PipelineSettings
from inferbus.worker.supervisor import child_count, child_index, join_parent, supervise

LOOK = 0.5  # seconds between looks at memory, idleness and dependencies

DONE, WRONG_INPUT, AWAY, BUG = 0, 1, 3, 70


class Watch:
    """Decides when a running worker ends: signals, idleness, memory, dependencies away in a bounded run."""

    def __init__(
        self, settings: PipelineSettings, pipeline: Pipeline, until_idle: float | None, progress: ProgressLine
    ) -> None:
        self.code = DONE
        self.released = False
        self._signalled = False
        self._pipeline = pipeline
        self._until_idle = until_idle
        self._job = settings.source.place.bounded  # with an end that needs no second look
        self._bounded = settings.retry.bounded
        self._progress = progress
        self._memory = Memory(child_count())
        if settings.flow.max_resident is not None:
            self._memory.limit, self._share = settings.flow.max_resident, 1.0
        else:
            self._share = 0.9
        self._look_at = 0.0
        self._idle_since: float | None = None
        self._away_since: float | None = None

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The first signal drains, the second releases."""
        self.released = self._signalled  # not `draining`, which a fatal error sets too
        self._signalled = True
        self._pipeline.stop()

    def keep_going(self, now: float) -> bool:
        """False when the worker must drain and end."""
        self._progress.tick(now)
        if self._pipeline.draining or (self._job and self._pipeline.finished()):
            return False
        if now < self._look_at:
            return True
        self._look_at = now + LOOK
        if self._memory.over_limit(self._share):
            log.error("memory_limit", resident=self._memory.resident(), limit=self._memory.limit)
            self.code = BUG
            return False
        return self._until_idle is None or not self._ends(now, self._until_idle)

    def _ends(self, now: float, until_idle: float) -> bool:
        if self._away(now):
            self.code = AWAY
            return True
        if not self._pipeline.idle():
            self._idle_since = None
            # A job tells the pipeline itself when its files have ended.
            if not self._job and now - self._pipeline.quiet_since() >= max(until_idle, LOOK):
                self._pipeline.hurry()  # what waits for a fuller object keeps the run from its end
            return False
        if self._idle_since is None:
            # The clock starts once nothing is left for anyone, and is read against a second look.
            self._idle_since = now if self._exhausted() else None
            return False
        if now - self._idle_since < until_idle:
            return False
        if self._exhausted():
            return True
        self._idle_since = None
        return False

    def _exhausted(self) -> bool:
        try:
            return self._pipeline.exhausted()
        except Unavailable:
            return False

    def _away(self, now: float) -> bool:
        reasons = self._pipeline.ready()
        if not reasons:
            self._away_since = None
            return False
        self._away_since = self._away_since or now
        if now - self._away_since < self._bounded:
            return False
        log.error("dependency_away", reasons=reasons, seconds=round(now - self._away_since))
        return True


log = structlog.get_logger("inferbus.run")


def run(settings: PipelineSettings, *, workers: int = 1, until_idle: float | None = None) -> int:
    """Serve until told to stop, or until idle; answers the exit code.

    Raises:
        InvalidModel, Misconfigured, PortBusy: The user's input is wrong.
        Unavailable: A dependency is away at start for `retry.start`.
    """
    screen = logs.Screen(sys.stderr)
    logs.configure(screen, settings.redact)
    child = child_index()
    bounded = settings.source.place.bounded
    if bounded and workers > 1:
        raise Misconfigured("--workers: one worker reads the files of a job; expected 1")
    if bounded and until_idle is None:
        until_idle = 0.0  # it ends with the files
    if workers > 1 and child is None:
        gc.enable()
        return supervise(sys.argv[1:], workers, settings.http, until_idle, log)
    keep_freed(settings.flow.max_inflight_bytes)
    metrics = Metrics()
    pipeline = build.pipeline(settings, metrics, child)
    watch = Watch(settings, pipeline, until_idle, ProgressLine(metrics, screen, bounded=bounded))
    with signals(watch), listening(settings, pipeline, metrics, child):
        return serve(settings, pipeline, watch, metrics)


def serve(settings: PipelineSettings, pipeline: Pipeline, watch: Watch, metrics: Metrics) -> int:
    """Start, run, drain, close."""
    began = time.monotonic()
    try:
        pipeline.start(settings.retry.start)
        # What is alive now stays alive: without this every full collection walks the libraries again.
        gc.collect()
        gc.freeze()
        # The path of a message makes no cycles; at the default threshold collections took a tenth of its time.
        gc.set_threshold(100_000, 20, 100)
        gc.enable()
        if not pipeline.draining:
            log.info(
                "ready",
                model=f"{pipeline.info.name}@{pipeline.info.version}",
                device=pipeline.info.device,
                seconds=round(time.monotonic() - began, 3),
            )
        pipeline.run(watch.keep_going)
        drain(settings.drain, pipeline, watch)
    except Unavailable:
        if not pipeline.draining:
            raise  # else told to stop while it waited for the outside: nothing was received, nothing is owed
    finally:
        pipeline.close(0.0 if watch.released else 1.0)
    totals = metrics.totals()
    log.info("stopped", received=totals.received, ok=totals.ok, errors=totals.errors)
    if pipeline.fatal:
        return WRONG_INPUT if pipeline.misread else BUG
    return watch.code


def drain(budget: float, pipeline: Pipeline, watch: Watch) -> None:
    """Finish what is in flight, within `budget` seconds or until a second signal; release the rest."""
    pipeline.stop()
    until = time.monotonic() + budget
    pipeline.run(lambda now: not pipeline.drained() and not watch.released and now < until)
    if left := pipeline.release():
        log.warning("released", messages=left)


@contextlib.contextmanager
def listening(settings: PipelineSettings, pipeline: Pipeline, metrics: Metrics, child: int | None) -> Iterator[None]:
    """The HTTP listener, if there is one; a child's is for its parent alone."""
    if child is None and settings.http is None:
        yield
        return
    own = settings.http if child is None else None
    listener = Listener(
        own.host if own else "127.0.0.1",
        own.port if own else 0,
        live=pipeline.live,
        ready=pipeline.ready,
        render=metrics.render,
        logger=log,
        public=child is None,
    )
    try:
        join_parent(listener.port, settings.drain)
        yield
    finally:
        listener.close()


@contextlib.contextmanager
def signals(watch: Watch) -> Iterator[None]:
    """SIGTERM and SIGINT drain."""
    before = {number: signal.signal(number, watch.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
