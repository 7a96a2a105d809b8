"""The whole path on a bus in memory: what becomes of every request when something on its way goes wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from structlog.testing import capture_logs

from inferbus.connectors.base import Fatal, Headers, Refused, TooLarge, Unavailable
from inferbus.connectors.memory import MemoryBus, MemorySink, MemorySource
from inferbus.models.base import (
    Decoded,
    Executor,
    InvalidModel,
    InvalidRequest,
    ModelInfo,
    Signature,
    Tensors,
    TensorSpec,
)
from inferbus.models.codec_v2 import V2Codec
from inferbus.models.codecs import codec
from inferbus.models.python import PythonExecutor
from inferbus.models.warmup import warm_up_input
from inferbus.worker.devices import warm_up
from inferbus.worker.metrics import Metrics
from inferbus.worker.pipeline import Limits, Pipeline
from tests import tiny_models

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))


class Doubler:
    """y = 2x; raises on a row that begins with 666, answers a row too few on 667, NaN on 668, refuses 669."""

    signature = SIGNATURE
    info = ModelInfo("doubler", "1", "fake", "cpu")

    def __init__(self, *, any_thread: bool = False) -> None:
        self.any_thread = any_thread
        self.batches: list[int] = []
        self.threads: list[int] = []
        self.sick = False
        self.before: Callable[[], object] = lambda: None

    def load(self) -> None:
        """Nothing to load."""

    def predict(self, inputs: Tensors) -> Tensors:
        x = inputs["x"]
        self.batches.append(len(x))
        self.threads.append(threading.get_ident())
        self.before()
        if self.sick or (x[:, 0] == 666).any():
            raise RuntimeError("secret of the model: /etc/passwd")
        if (x[:, 0] == 669).any():
            raise InvalidRequest("input 'x': expected anything but 669")
        y = x * 2
        y[x[:, 0] == 668] = np.nan
        return {"y": y[:-1] if (x[:, 0] == 667).any() else y}

    def close(self) -> None:
        """Nothing to free."""


class Raising(Doubler):
    """Raises an error on a row that begins with a number."""

    def __init__(self, error: BaseException, on: float) -> None:
        super().__init__()
        self.error, self.on = error, on

    def predict(self, inputs: Tensors) -> Tensors:
        if (inputs["x"][:, 0] == self.on).any():
            raise self.error
        return super().predict(inputs)


class Setting:
    """A pipeline in memory and what came out of it."""

    def __init__(self, *executors: Executor, limits: Limits | None = None, **options: Any) -> None:
        self.bus = MemoryBus()
        self.source = MemorySource(self.bus)
        self.sink = MemorySink()
        self.errors = MemorySink("memory:errors")
        self.metrics = Metrics()
        limits = limits or Limits(max_rows=8, max_inflight=64)
        sinks: Sequence[MemorySink] = options.pop("sinks", [self.sink])
        self.pipeline = Pipeline(
            self.source,
            sinks,
            [self.errors],
            partial(codec, "v2", max_message_bytes=limits.max_message_bytes),
            executors or [Doubler()],
            lambda signature: warm_up_input(signature, limits.max_rows),
            limits,
            self.metrics,
            **options,
        )

    def ask(self, value: float, rows: int = 1, key: bytes | None = None, headers: Headers = (), **more: Any) -> int:
        data = [value + i for i in range(rows) for _ in range(2)]
        tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": data}
        return self.bus.publish(orjson.dumps({"inputs": [tensor], **more}), key, headers)

    def run(self, enough: Callable[[], bool] | None = None) -> None:
        """Until everything is answered and settled, or `enough`."""
        finished = enough or (lambda: self.pipeline.idle() and not len(self.bus))
        until = time.monotonic() + 20
        self.pipeline.run(lambda now: not finished() and now < until)
        assert finished(), "the pipeline did not come to its end"

    def answers(self) -> dict[str, list[float]]:
        """Data of each prediction by id."""
        return {i: orjson.loads(body)["outputs"][0]["data"] for i, _, body, _ in self.sink.written}

    def faults(self) -> dict[str, dict[str, Any]]:
        """The error of each error record by id."""
        return {i: orjson.loads(dict(headers)["inferbus-error"]) for i, _, _, headers in self.errors.written}


def started(*executors: Executor, **options: Any) -> Setting:
    setting = Setting(*executors, **options)
    setting.pipeline.start(5.0)
    return setting


def test_every_request_gets_its_own_prediction_and_is_settled() -> None:
    s = started()
    places = [s.ask(float(i), key=b"k%d" % i) for i in range(100)]
    s.run()
    assert s.answers() == {f"memory-{i}": [2.0 * i, 2.0 * i] for i in places}
    assert sorted(s.source.settled) == places
    assert [key for _, key, _, _ in s.sink.written] == [b"k%d" % i for i in range(100)]


def test_a_prediction_says_which_model_and_batch_made_it() -> None:
    s = started()
    s.ask(1.0, headers=(("inferbus-id", b"mine"), ("traceparent", b"00-ab"), ("private", b"x")))
    s.run()
    ((name, _, body, headers),) = s.sink.written
    found = dict(headers)
    assert name == "mine"
    assert found["inferbus-id"] == b"mine"
    assert found["inferbus-status"] == b"ok"
    assert found["inferbus-model"] == b"doubler@1"
    assert found["traceparent"] == b"00-ab"
    assert found["content-type"] == b"application/json"
    assert "private" not in found
    assert set(orjson.loads(found["inferbus-timing"])) == {"batch", "rows", "predict_ms", "worker"}
    assert orjson.loads(body)["model_name"] == "doubler"


def test_a_bad_request_harms_only_itself_and_comes_back_byte_for_byte() -> None:
    s = started()
    s.ask(1.0)
    s.bus.publish(b'{"inputs": "nonsense', b"key", (("h", b"1"), ("h", b"2")))
    s.ask(2.0)
    s.run()
    assert sorted(s.answers()) == ["memory-0", "memory-2"]
    ((_, key, body, headers),) = s.errors.written
    assert key == b"key"
    assert body == b'{"inputs": "nonsense'
    assert headers[:2] == [("h", b"1"), ("h", b"2")]
    error = s.faults()["memory-1"]
    assert error["code"] == "invalid_request"
    assert error["stage"] == "decode"
    assert error["source"] == "memory:requests/1"
    assert error["model"] == "doubler@1"
    assert error["attempts"] == 1
    assert sorted(s.source.settled) == [0, 1, 2]


@pytest.mark.parametrize("poison", [666.0, 667.0])
def test_a_row_the_model_fails_on_is_found_by_halving_and_fails_alone(poison: float) -> None:
    s = started()
    for i in range(8):
        s.ask(poison if i == 5 else float(i))
    s.run()
    assert len(s.answers()) == 7
    (error,) = s.faults().values()
    assert error["id"] == "memory-5"
    assert error["code"] == "model_error"
    assert "secret" not in error["message"]


def test_a_request_its_executor_finds_to_blame_is_told_why() -> None:
    s = started()
    for i in range(8):
        s.ask(669.0 if i == 5 else float(i))
    s.run()
    assert len(s.answers()) == 7
    (error,) = s.faults().values()
    assert (error["id"], error["code"], error["stage"]) == ("memory-5", "invalid_request", "predict")
    assert error["message"] == "input 'x': expected anything but 669"


def test_an_output_that_is_not_finite_is_an_error_and_never_null() -> None:
    s = started()
    s.ask(668.0)
    s.ask(1.0)
    s.run()
    assert s.answers() == {"memory-1": [2.0, 2.0]}
    assert s.faults()["memory-0"]["code"] == "non_finite_output"


def test_a_pipeline_may_allow_outputs_that_are_not_finite() -> None:
    s = started(allow_non_finite=True)
    s.ask(668.0)
    s.run()
    assert s.answers() == {"memory-0": [None, None]}


def test_a_sick_device_ends_the_worker_and_blames_no_request() -> None:
    model = Doubler()
    s = started(model)
    model.sick = True
    for i in range(20):
        s.ask(float(i))
    s.run(lambda: s.pipeline.fatal is not None)
    s.pipeline.close(1.0)
    assert s.errors.written == []
    assert s.sink.written == []
    assert s.source.settled == []
    assert len(s.bus) == 20


class Broken(MemorySink):
    """Its client cannot go on."""

    def tick(self) -> None:
        raise Fatal("broken")


def test_a_sink_whose_client_is_broken_ends_the_worker_and_settles_nothing() -> None:
    sink = Broken()
    s = started(sinks=[sink])
    s.ask(1.0)
    s.run(lambda: s.pipeline.fatal is not None)
    assert s.pipeline.fatal == "broken"
    assert s.source.settled == []


def test_a_model_that_fails_its_warm_up_is_never_served() -> None:
    model = Doubler()
    model.sick = True
    with pytest.raises(InvalidModel, match="the warm-up batch failed"):
        started(model)


STRANGE = [SystemExit(2), asyncio.CancelledError(), KeyboardInterrupt()]  # no `Exception` is among them


@pytest.mark.parametrize("error", STRANGE, ids=repr)
def test_whatever_a_model_raises_fails_its_request_alone_and_the_device_lives_on(error: BaseException) -> None:
    s = started(Raising(error, on=7.0))
    for i in range(20):
        s.ask(float(i))
    with capture_logs() as logs:
        s.run()
    assert sorted(s.answers()) == sorted(f"memory-{i}" for i in range(20) if i != 7)
    assert [(e["id"], e["code"]) for e in s.faults().values()] == [("memory-7", "model_error")]
    assert [entry["id"] for entry in logs if entry["event"] == "predict_failed"] == ["memory-7"]
    assert s.pipeline.live() == []


@pytest.mark.parametrize("error", STRANGE, ids=repr)
def test_whatever_a_model_raises_at_its_warm_up_is_told_and_not_waited_for(error: BaseException) -> None:
    with pytest.raises(InvalidModel, match=type(error).__name__):
        started(Raising(error, on=0.0))


def compute_for(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_short_predictions_are_made_where_the_batch_is_and_long_ones_on_the_thread_of_the_device() -> None:
    model = Doubler(any_thread=True)
    s = started(model)
    (loading,) = set(model.threads)
    here = threading.get_ident()
    places: list[int] = []

    def serve_until(finished: Callable[[], bool]) -> None:
        while not finished():
            assert len(places) < 500, "it never came to that"
            places.append(s.ask(float(len(places))))
            s.run(lambda: len(s.source.settled) == len(places))

    serve_until(lambda: model.threads[-1] == here)  # the first predictions of a process may be slow
    model.before = lambda: compute_for(0.002)
    serve_until(lambda: model.threads[-1] == loading)
    model.before = lambda: None
    serve_until(lambda: model.threads[-1] == here)
    assert s.answers() == {f"memory-{i}": [2.0 * i, 2.0 * i] for i in places}
    assert set(model.threads) == {loading, here}


def test_a_model_that_belongs_to_its_thread_is_never_asked_on_another() -> None:
    model = Doubler()
    s = started(model)
    for i in range(200):
        s.ask(float(i))
    s.run()
    assert len(s.answers()) == 200
    assert len(set(model.threads)) == 1
    assert threading.get_ident() not in model.threads


def test_a_poison_row_among_short_predictions_fails_alone_and_a_sick_device_ends_the_worker() -> None:
    model = Doubler(any_thread=True)
    s = started(model)
    for i in range(200):
        s.ask(666.0 if i == 150 else float(i))
    s.run()
    assert sorted(s.answers()) == sorted(f"memory-{i}" for i in range(200) if i != 150)
    assert s.faults()["memory-150"]["code"] == "model_error"
    model.sick = True
    s.ask(1.0)
    s.run(lambda: s.pipeline.fatal is not None)
    assert len(s.errors.written) == 1


def test_a_device_whose_thread_has_ended_is_reported_as_dead_until_it_is_closed() -> None:
    s = started()
    (device,) = s.pipeline._devices
    device._batches.put(None)
    device._thread.join()
    assert s.pipeline.live() == ["the device's thread has ended"]
    s.pipeline.close(0.0)
    assert s.pipeline.live() == []


def test_a_warm_up_that_fails_names_the_line_of_the_users_file(tmp_path: Path) -> None:
    source = "from inferbus.models import Model\n\n\nclass Wrong(Model):\n    def predict(self, inputs):\n"
    path = tiny_models.python_model(tmp_path, source + "        return inputs['z']\n")
    executor = PythonExecutor(path, "wrong", "1", signature=SIGNATURE)
    executor.load()
    with pytest.raises(InvalidModel, match=r"^the warm-up batch failed: KeyError: 'z' \(model\.py line 6\)$"):
        warm_up(executor, warm_up_input(SIGNATURE, 8))


def test_a_refusal_is_cut_to_what_any_record_can_carry() -> None:
    s = started(Raising(InvalidRequest("\ud800" + "v" * 2_000_000), on=7.0))
    s.ask(7.0)
    s.run()
    assert s.faults()["memory-0"]["message"] == "?" + "v" * 299


class Fragile(V2Codec):
    """Has bugs: one request it fails to read, to another it fails to write the answer."""

    def decode(self, bodies: Sequence[bytes], headers: Sequence[Sequence[tuple[str, bytes]]]) -> Decoded:
        if any(b"unread" in body for body in bodies):
            raise ZeroDivisionError("secret of the codec")
        return super().decode(bodies, headers)

    def encode(
        self, outputs: Tensors, rows: Sequence[int], asks: Sequence[object], ids: Sequence[str]
    ) -> tuple[list[bytes], list[Sequence[tuple[str, bytes]]]]:
        if "unwritten" in asks:
            raise ZeroDivisionError("secret of the codec")
        return super().encode(outputs, rows, asks, ids)


@pytest.mark.parametrize(("name", "stage"), [("unread", "decode"), ("unwritten", "encode")])
def test_an_error_of_a_codec_ends_one_request_as_internal_and_says_nothing_of_it(name: str, stage: str) -> None:
    s = Setting()
    s.pipeline._codec_for = lambda signature, info: Fragile(signature, info, 1000)
    s.pipeline.start(5.0)
    for i in range(8):
        s.ask(float(i), id=name if i == 5 else "fine")
    with capture_logs() as logs:
        s.run()
    assert len(s.answers()) == 7
    (error,) = s.faults().values()
    assert (error["id"], error["code"], error["stage"]) == ("memory-5", "internal", stage)
    assert "secret" not in error["message"]
    (entry,) = [entry for entry in logs if entry["event"] == f"{stage}_failed"]
    assert (entry["id"], type(entry["exc_info"])) == ("memory-5", ZeroDivisionError)


def test_a_request_larger_than_a_batch_comes_back_whole() -> None:
    model = Doubler()
    s = started(model)
    s.ask(0.0, rows=30)
    s.ask(100.0)
    s.run()
    assert s.answers()["memory-0"] == [2.0 * i for i in range(30) for _ in range(2)]
    assert s.answers()["memory-1"] == [200.0, 200.0]
    assert max(model.batches) <= 8


def test_a_large_request_with_one_bad_row_fails_once() -> None:
    s = started()
    s.ask(650.0, rows=30)  # rows 650..679: 666, 667 and 668 are among them
    s.run()
    assert s.answers() == {}
    assert len(s.errors.written) == 1
    assert s.faults()["memory-0"]["code"] == "model_error"


def test_an_expired_request_never_reaches_the_device() -> None:
    model = Doubler()
    s = started(model, wall=lambda: 1000.0)
    warm_ups = len(model.batches)
    s.ask(1.0, headers=(("inferbus-deadline-ms", b"999999"),))
    s.bus.publish(b"{}", None, (("inferbus-timeout-ms", b"500"),), created_at=999.0)
    s.run()
    assert {e["code"] for e in s.faults().values()} == {"expired"}
    assert len(s.errors.written) == 2
    assert len(model.batches) == warm_ups


def test_a_request_expires_in_the_queue_while_the_device_is_busy() -> None:
    model = Doubler()
    s = started(model, limits=Limits(max_rows=1, max_inflight=64))
    model.before = lambda: time.sleep(0.2)
    s.ask(1.0)
    s.run(lambda: bool(s.pipeline._devices[0].queued))
    s.ask(2.0)
    s.ask(3.0, headers=(("inferbus-timeout-ms", b"50"),))
    s.run()
    assert [e["id"] for e in s.faults().values()] == ["memory-2"]
    assert sorted(s.answers()) == ["memory-0", "memory-1"]


@pytest.mark.parametrize("value", [b"soon", b"-1", b"1.5", b"9" * 16, b""])
def test_a_control_header_that_makes_no_sense_is_an_invalid_request(value: bytes) -> None:
    s = started()
    s.ask(1.0, headers=(("inferbus-timeout-ms", value),))
    s.run()
    error = s.faults()["memory-0"]
    assert error["code"] == "invalid_request"
    assert "inferbus-timeout-ms" in error["message"]


def test_a_request_for_another_model_is_refused_by_name() -> None:
    s = started()
    for wanted in (b"doubler", b"doubler@1", b"tripler", b"doubler@2"):
        s.ask(1.0, headers=(("inferbus-model", wanted),))
    s.run()
    assert sorted(s.answers()) == ["memory-0", "memory-1"]
    assert {e["code"] for e in s.faults().values()} == {"unknown_model"}
    assert sorted(s.faults()) == ["memory-2", "memory-3"]


def test_a_body_over_the_limit_is_too_large_before_it_is_parsed() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=64, max_message_bytes=200))
    s.ask(1.0)
    s.bus.publish(b"[" * 201)
    s.run()
    assert sorted(s.answers()) == ["memory-0"]
    error = s.faults()["memory-1"]
    assert error["code"] == "too_large"
    assert error["stage"] == "receive"


def test_a_prediction_the_sink_refuses_for_its_size_becomes_an_error_record() -> None:
    s = started()
    s.sink.max_bytes = 400
    s.ask(1.0)
    s.ask(0.0, rows=8)
    s.ask(0.5, rows=200)
    s.run()
    assert sorted(s.answers()) == ["memory-0", "memory-1"]
    error = s.faults()["memory-2"]
    assert error["code"] == "too_large"
    assert error["stage"] == "write"
    assert sorted(s.source.settled) == [0, 1, 2]


def test_a_prediction_the_sink_never_takes_becomes_an_error_record() -> None:
    s = started()
    s.sink.refuse = lambda body: Refused("memory: no key") if b"memory-1" in body else None
    places = [s.ask(float(i)) for i in range(3)]
    s.run()
    assert sorted(s.answers()) == ["memory-0", "memory-2"]
    error = s.faults()["memory-1"]
    assert (error["code"], error["stage"]) == ("internal", "write")
    assert error["message"] == "the sink does not take the prediction (memory: no key)"
    assert sorted(s.source.settled) == places


def test_an_error_record_too_large_for_its_sink_goes_without_the_body() -> None:
    s = started()
    s.errors.max_bytes = 10
    s.bus.publish(b"not json, and longer than ten bytes")
    s.run()
    ((_, _, body, _),) = s.errors.written
    assert body == b""
    assert s.faults()["memory-0"]["body"] == "omitted"


def test_an_error_record_no_form_of_which_is_taken_waits_in_its_smallest() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=4, max_backoff=0.01))
    s.errors.refuse = lambda _: TooLarge("over 10 bytes")
    s.bus.publish(b"not json", b"k" * 2000, (("inferbus-id", b"i" * 2000),))
    with capture_logs() as logs:
        s.run(lambda: len([entry for entry in logs if entry["event"] == "unwritable"]) == 3)
    assert s.source.settled == []
    s.errors.refuse = lambda _: None
    s.run()
    ((_, key, body, headers),) = s.errors.written
    assert (key, body, [name for name, _ in headers]) == (b"k" * 1024, b"", ["inferbus-error"])
    (error,) = s.faults().values()
    assert (error["id"], error["code"], error["body"]) == ("i" * 1024, "invalid_request", "omitted")
    assert s.source.settled == [0]


def test_a_sink_that_is_away_loses_nothing_and_stops_the_intake() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=16, max_backoff=0.2))
    s.sink.refuse = lambda _: Unavailable("away")
    for i in range(100):
        s.ask(float(i))
    s.run(lambda: any("memory:sink" in reason for reason in s.pipeline.ready()) and s.source.inflight()[0] == 16)
    assert s.source.settled == []
    assert len(s.bus) == 84
    s.sink.refuse = lambda _: None
    s.run()
    assert len(s.sink.written) == len(s.answers()) == 100
    assert s.pipeline.ready() == []


def test_only_what_failed_is_written_again() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=16, max_backoff=0.2))
    failed: list[bytes] = []

    def refuse_each_once(body: bytes) -> Unavailable | None:
        if b'"data":[4.0,4.0]' in body and body not in failed:
            failed.append(body)
            return Unavailable("once")
        return None

    s.sink.refuse = refuse_each_once
    for i in range(8):
        s.ask(float(i))
    s.run()
    assert len(failed) == 1
    assert len(s.sink.written) == 8
    assert sorted(s.source.settled) == list(range(8))


def test_a_failing_error_sink_holds_its_requests_and_never_drops_them() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=4, max_backoff=0.2))
    s.errors.refuse = lambda _: Unavailable("away")
    for _ in range(10):
        s.bus.publish(b"bad")
    s.run(lambda: s.source.inflight()[0] == 4)
    assert s.source.settled == []
    s.errors.refuse = lambda _: None
    s.run()
    assert len(s.errors.written) == 10
    assert sorted(s.source.settled) == list(range(10))


def test_a_request_is_settled_only_when_every_sink_has_it() -> None:
    first, second = MemorySink("memory:first"), MemorySink("memory:second")
    s = Setting(sinks=[first, second])
    s.pipeline.start(5.0)
    second.held = True
    s.ask(1.0)
    s.run(lambda: bool(first.written))
    s.pipeline.step()
    assert s.source.settled == []
    second.held = False
    s.run()
    assert len(second.written) == 1
    assert s.source.settled == [0]


def test_one_of_two_sinks_refusing_for_size_settles_only_after_the_error_record() -> None:
    first, second = MemorySink("memory:first"), MemorySink("memory:second")
    s = Setting(sinks=[first, second])
    s.pipeline.start(5.0)
    first.max_bytes = 10
    second.held = True
    s.errors.held = True
    s.ask(1.0)
    s.run(lambda: s.pipeline._delivery.pending() == 1 and not s.pipeline._busy() and len(s.bus) == 0)
    second.held = False
    for _ in range(20):
        s.pipeline.step()
    assert s.source.settled == []
    s.errors.held = False
    s.run()
    assert s.source.settled == [0]
    assert s.faults()["memory-0"]["code"] == "too_large"


def test_a_source_that_is_away_is_asked_again_later() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=16, max_backoff=0.2))
    s.source.away = "the bus is away"
    s.ask(1.0)
    s.run(lambda: "the bus is away" in s.pipeline.ready())
    s.source.away = None
    s.run()
    assert len(s.sink.written) == 1
    assert s.pipeline.ready() == []


def test_in_flight_never_exceeds_the_cap() -> None:
    s = started(limits=Limits(max_rows=4, max_inflight=10))
    highest = 0

    def look() -> bool:
        nonlocal highest
        highest = max(highest, s.source.inflight()[0])
        return s.pipeline.idle() and not len(s.bus)

    for i in range(200):
        s.ask(float(i))
    s.run(look)
    assert highest == 10
    assert len(s.sink.written) == 200


def test_a_revocation_brings_what_is_in_flight_to_its_end() -> None:
    s = started(limits=Limits(max_rows=4, max_inflight=64))
    for i in range(40):
        s.ask(float(i))
    s.run(lambda: s.source.inflight()[0] == 40)
    s.source.revoke(budget=10.0)
    assert len(s.sink.written) == 40
    assert len(s.source.settled) == 40
    s.run()
    assert len(s.sink.written) == 40


def test_what_a_revocation_has_no_time_for_is_left_to_the_next_owner() -> None:
    model = Doubler()
    s = started(model, limits=Limits(max_rows=2, max_inflight=64))
    model.before = lambda: time.sleep(0.05)
    for i in range(20):
        s.ask(float(i))
    s.run(lambda: s.source.inflight()[0] == 20)
    s.source.revoke(budget=0.01)
    s.run()
    # Nothing is lost; what was on the device when the time ran out may be answered twice, what waited is not.
    assert sorted(s.source.settled) == list(range(20))
    assert set(s.answers()) == {f"memory-{i}" for i in range(20)}
    assert len(s.sink.written) <= 20 + 2 * 17


def test_a_deadline_that_passes_during_a_revocation_is_kept() -> None:
    model, told = Doubler(), threading.Event()
    s = started(model, limits=Limits(max_rows=1, max_inflight=64))
    model.before = lambda: told.wait(5.0)
    s.errors.refuse = lambda _: told.set()
    s.ask(1.0)
    s.run(lambda: bool(s.pipeline._devices[0].queued))
    s.ask(2.0, headers=(("inferbus-timeout-ms", b"50"),))
    s.run(lambda: s.source.inflight()[0] == 2)
    s.source.revoke(budget=10.0)
    assert sorted(s.answers()) == ["memory-0"]
    assert s.faults()["memory-1"]["code"] == "expired"


def test_an_outcome_that_comes_after_its_request_was_given_away_harms_nothing_in_order() -> None:
    model, gate = Doubler(), threading.Event()
    s = started(model, limits=Limits(max_rows=2, max_inflight=64), ordered=True)
    model.before = lambda: gate.wait(5.0)
    s.ask(666.0, rows=20, key=b"k")  # ten parts, the first fails in the model
    s.ask(1.0, key=b"k")
    s.run(lambda: bool(s.pipeline._devices[0].queued))
    s.source.revoke(budget=0.0)
    s.source.away = "nothing of this key comes again yet"
    s.pipeline.step()
    gate.set()
    s.run(lambda: not s.pipeline._busy())
    s.source.away = None
    s.run()
    assert sorted(s.answers()) == ["memory-1"]
    assert len(s.errors.written) == 1
    assert s.source.settled == [0, 1]


def test_outcomes_of_requests_given_away_are_dropped_when_their_sink_is_tried_again() -> None:
    s = started(limits=Limits(max_rows=8, max_inflight=16, max_backoff=0.01))
    s.sink.refuse = lambda _: Unavailable("away")
    delivery, highest = s.pipeline._delivery, 0

    def everything_waits() -> bool:
        nonlocal highest
        highest = max(highest, delivery.pending())
        return s.source.inflight()[0] == delivery.pending() == 16

    for i in range(16):
        s.ask(float(i))
    for _ in range(5):
        s.run(everything_waits)
        s.source.revoke(budget=0.0)
    s.run(everything_waits)
    s.sink.refuse = lambda _: None
    s.run()
    assert highest == 16
    assert sorted(s.answers()) == sorted(f"memory-{i}" for i in range(16))
    assert len(s.sink.written) == 16
    assert sorted(s.source.settled) == list(range(16))
    assert (delivery.pending(), delivery.size()) == (0, 0)


@pytest.mark.parametrize("limits", [Limits(8, max_inflight=16), Limits(8, max_inflight_bytes=16 * 80)])
def test_outcomes_of_requests_given_away_take_room_while_their_sink_has_them(limits: Limits) -> None:
    s = started(limits=limits)
    s.sink.held = True
    for i in range(100):
        s.ask(float(i))
    s.run(lambda: s.pipeline._credit() == 0 and s.source.inflight()[0] == s.pipeline._delivery.pending())
    taken = s.source.inflight()
    s.source.lose()
    for _ in range(20):
        s.pipeline.step()
    assert s.source.inflight() == (0, 0)
    assert (s.pipeline._delivery.pending(), s.pipeline._delivery.size()) == taken
    s.sink.held = False
    s.run()
    assert sorted(s.source.settled) == list(range(100))


def test_draining_finishes_what_came_and_takes_no_more() -> None:
    s = started(limits=Limits(max_rows=4, max_delay=60.0, max_inflight=64))
    s.ask(1.0)
    s.run(lambda: s.source.inflight()[0] == 1)
    s.pipeline.stop()
    s.ask(2.0)
    s.run(s.pipeline.drained)
    assert sorted(s.answers()) == ["memory-0"]
    assert len(s.bus) == 1
    assert "draining" in s.pipeline.ready()


def test_released_requests_go_back_to_the_bus() -> None:
    model = Doubler()
    s = started(model, limits=Limits(max_rows=2, max_delay=60.0, max_inflight=64))
    s.ask(1.0)
    s.run(lambda: s.source.inflight()[0] == 1)
    s.pipeline.stop()
    assert s.pipeline.release() == 1
    assert len(s.bus) == 1
    assert s.pipeline.drained()


def test_outcomes_keep_the_order_of_their_key_however_devices_race() -> None:
    slow, fast, faster = Doubler(), Doubler(), Doubler()
    s = started(slow, fast, faster, limits=Limits(max_rows=2, max_inflight=512), ordered=True)
    slow.before = lambda: time.sleep(0.02)
    fast.before = lambda: time.sleep(0.003)
    for i in range(200):
        s.ask(666.0 if i % 50 == 7 else float(i), key=b"%d" % (i % 5))
    s.run()
    outcomes = s.sink.written
    for key in range(5):
        order = [int(i.split("-")[1]) for i, k, _, _ in outcomes if k == b"%d" % key]
        assert order == sorted(order)
    assert len(outcomes) + len(s.errors.written) == 200
    assert slow.batches
    assert fast.batches


def test_metrics_account_for_every_request() -> None:
    s = started()
    for i in range(30):
        s.ask(666.0 if i == 3 else float(i))
    s.bus.publish(b"bad")
    s.run()
    s.run(lambda: s.metrics.totals().lag == 0)  # gauges are looked at a few times a second
    totals = s.metrics.totals()
    assert totals.lag == 0
    assert (totals.received, totals.ok, totals.errors, totals.inflight) == (31, 29, 2, 0)
    rendered = s.metrics.render().decode()
    for stage in ("queue", "decode", "predict", "encode", "write", "settle"):
        series = f'inferbus_stage_seconds_count{{stage="{stage}"}} '
        (count,) = [line for line in rendered.splitlines() if line.startswith(series)]
        assert float(count.split()[1]) > 0, stage
