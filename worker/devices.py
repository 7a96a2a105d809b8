"""Executors on threads of their own: batches in through a queue, answers out through one, the bell rung for each.

The model is the only thing that computes for long and releases the interpreter lock, so it is the only thing in a
thread. While it does not compute for long it is asked right where the batch was made: to hand a batch over and its
answer back is two threads waiting for each other's lock, and costs more than such a prediction.

A batch that raises is bisected here, beside the device, so that the pipeline goes on meanwhile: the culprit alone
fails. When anything failed, the warm-up input is run again: if that fails too the device is sick, and nothing it said
counts.

Invariant: every batch given is answered, whatever the model raises. `SystemExit`, a cancelled task and a panic of
native code are no `Exception`, and would end the thread without a word.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import structlog

from inferbus.connectors.base import Bell
from inferbus.models.base import Executor, InvalidModel, InvalidRequest, Signature, Tensors
from inferbus.models.codecs import check_outputs
from inferbus.worker.batcher import Batch

log = structlog.get_logger("inferbus.devices")

HUNG = 300.0  # seconds one predict may take before the process reports itself dead
QUICK = 0.0005  # CPU seconds: a shorter prediction is not worth a thread; handing over costs 0.2 to 0.4 ms a batch
REFUSAL = 300  # characters of an executor's refusal that its requester is sent


@dataclass(slots=True)
class Segment:
    """Consecutive requests of a batch and their outputs, or None where predict failed on this request alone.

    Then `refusal` is what its requester may read, where the executor found the request to blame.
    """

    start: int
    stop: int
    outputs: Tensors | None
    refusal: str | None = None


@dataclass(slots=True)
class Answer:
    """What became of a batch; `sick` says that the device, not the data, is to blame, and then nothing else counts."""

    device: Device
    batch: Batch
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0
    sick: str | None = None


def warm_up(executor: Executor, inputs: Tensors) -> None:
    """Predict once on a loaded executor and look at what it answers.

    Args:
        executor: Loaded, by the thread that calls.
        inputs: A batch of one row or more, such as `warm_up_input` makes.

    Raises:
        InvalidModel: It failed, or answered something its signature does not allow; says how.
    """
    try:
        _predict(executor, inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a model raises at warm-up, it cannot be served
        raise InvalidModel(f"the warm-up batch failed: {_told(error)}") from error


def _predict(executor: Executor, inputs: Tensors) -> Tensors:
    rows = next(iter(inputs.values())).shape[0]
    return check_outputs(executor.predict(inputs), rows, executor.signature)


def _told(error: BaseException) -> str:
    """The error, and where it was raised if the executor has noted that. For the owner, never for a requester."""
    notes = dict.fromkeys(getattr(error, "__notes__", ()))  # each once: a model may raise one object again and again
    return f"{type(error).__name__}: {error}" + "".join(f" ({note})" for note in notes)


def _sendable(refusal: InvalidRequest) -> str:
    """What the requester reads: bounded, and text that every record can carry."""
    return str(refusal)[:REFUSAL].encode("utf-8", "replace").decode()


class Device:
    """One executor and its thread.

    Args:
        executor: Loaded, used and closed on the device's thread only.
        probe: Makes the warm-up input at the largest batch: run at start, and again to tell a sick device from bad
            rows.
        answers: Where answers go.
        bell: Rung after each answer, and when loading has ended.
    """

    def __init__(
        self, executor: Executor, probe: Callable[[Signature], Tensors], answers: deque[Answer], bell: Bell
    ) -> None:
        self.executor = executor
        self.queued = 0  # batches given and not yet answered to the pipeline
        self.warm = False
        self.failure: InvalidModel | None = None
        self._probe = probe
        self._slowest = 0.0  # CPU seconds of the slowest prediction of late, a third forgotten with each
        self._handed = self._served = 0  # batches given to the thread, and served by it
        self._answers = answers
        self._bell = bell
        self._busy_since: float | None = None
        self._closed = False
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin to load; `warm` or `failure` is set when done."""
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Have a batch predicted: now, if that is quick and the thread has nothing, else by the thread."""
        self.queued += 1
        if self._slowest < QUICK and self.executor.any_thread and self._handed == self._served:
            self._answers.append(self._serve(batch))
        else:
            self._handed += 1
            self._batches.put(batch)

    def hung(self) -> str | None:
        """In words, why it answers no more: a predict out for `HUNG` seconds, or a thread that has ended."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > HUNG:
            return f"a prediction has not returned for {time.monotonic() - since:.0f} s"
        if self._thread.ident is not None and not self._thread.is_alive() and not self._closed:
            return "the device's thread has ended"
        return None

    def close(self, timeout: float) -> None:
        """End the thread after what it is doing, if it ends in time; a daemon thread does not keep the process."""
        self._closed = True
        self._batches.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self.executor.load()
            self._warm_up = self._probe(self.executor.signature)
            with self._busy():
                began = time.thread_time()
                warm_up(self.executor, self._warm_up)
                self._slowest = time.thread_time() - began
            self.warm = True
        except InvalidModel as error:
            self.failure = error
        except BaseException as error:  # noqa: BLE001 - whoever waits for this device must learn that it has failed
            self.failure = InvalidModel(f"the model could not be loaded: {_told(error)}")
        self._bell.ring()
        while (batch := self._batches.get()) is not None:
            self._answers.append(self._serve(batch))
            self._served += 1
            self._bell.ring()
        self.executor.close()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _serve(self, batch: Batch) -> Answer:
        began, computed = time.perf_counter(), time.thread_time()
        answer = Answer(self, batch)
        answer.segments = self._bisect(batch, 0, len(batch.messages), 0)
        if any(segment.outputs is None and segment.refusal is None for segment in answer.segments):
            answer.sick = self._sick()
        answer.seconds = time.perf_counter() - began
        # Not the time that passed: the thread waits for the interpreter's lock, and would look slow for being one.
        self._slowest = max(time.thread_time() - computed, 0.7 * self._slowest)
        return answer

    def _bisect(self, batch: Batch, start: int, stop: int, row: int) -> list[Segment]:
        """Segments for requests start..stop, whose first row is `row`; halves until the culprit is alone."""
        rows = sum(batch.rows[start:stop])
        inputs = batch.inputs
        if rows < batch.total_rows:
            inputs = {name: column[row : row + rows] for name, column in inputs.items()}
        try:
            with self._busy():
                return [Segment(start, stop, _predict(self.executor, inputs))]
        except InvalidRequest as error:
            if stop - start == 1:
                return [Segment(start, stop, None, _sendable(error))]
        except BaseException as error:  # noqa: BLE001 - a model may raise anything, and one bad row harms only itself
            if stop - start == 1:
                log.warning("predict_failed", id=batch.messages[start].id, error=_told(error), rows=rows)
                return [Segment(start, stop, None)]
        middle = (start + stop) // 2
        left = self._bisect(batch, start, middle, row)
        return left + self._bisect(batch, middle, stop, row + sum(batch.rows[start:middle]))

    def _sick(self) -> str | None:
        try:
            with self._busy():
                _predict(self.executor, self._warm_up)
        except BaseException as error:  # noqa: BLE001 - as above
            return f"the device fails on its warm-up input too: {_told(error)}"
        return None
