"""When a worker ends, with time as an argument."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inferbus.models.base import Signature
from inferbus.worker.logs import Screen
from inferbus.worker.pipeline_file import load
from inferbus.worker.progress import ProgressLine
from inferbus.worker.run import AWAY, BUG, DONE, Watch, drain, serve
from tests.test_pipeline import Doubler, Setting

PIPELINE = """
name: tiny
model: model.py
source: {kafka: {brokers: localhost, topic: in}}
sink: {kafka: {topic: out}}
retry: {start: 1s, bounded: 30s}
"""


class Worker:
    """A pipeline in memory and the watch over it."""

    def __init__(self, folder: Path, *overrides: str, until_idle: float | None = None) -> None:
        (folder / "pipeline.yaml").write_text(PIPELINE)
        self.settings = load(folder / "pipeline.yaml", overrides)
        self.model = Doubler()
        self.setting = Setting(self.model)
        self.pipeline = self.setting.pipeline
        progress = ProgressLine(self.setting.metrics, Screen(io.StringIO()))
        self.watch = Watch(self.settings, self.pipeline, until_idle, progress)

    def started(self) -> Worker:
        self.pipeline.start(1.0)
        return self

    def serve(self) -> int:
        return serve(self.settings, self.pipeline, self.watch, self.setting.metrics)


def test_a_bounded_run_ends_once_it_has_been_idle_that_long(tmp_path: Path) -> None:
    w = Worker(tmp_path, until_idle=5.0).started()
    assert w.watch.keep_going(100.0)
    assert w.watch.keep_going(104.5)
    assert not w.watch.keep_going(105.1)
    assert w.watch.code == DONE


def test_a_message_on_the_bus_or_in_flight_stops_the_clock(tmp_path: Path) -> None:
    w = Worker(tmp_path, until_idle=5.0).started()
    assert w.watch.keep_going(100.0)
    w.setting.ask(1.0)
    assert w.watch.keep_going(106.0)
    w.pipeline.step()
    assert w.watch.keep_going(112.0)
    w.setting.run()
    assert w.watch.keep_going(118.0)
    assert w.watch.keep_going(122.0)
    assert not w.watch.keep_going(123.1)


def test_what_another_reader_holds_is_not_idle(tmp_path: Path) -> None:
    w = Worker(tmp_path, until_idle=1.0).started()
    place = w.setting.ask(1.0)
    w.setting.bus.take(1)
    assert w.watch.keep_going(100.0)
    assert w.watch.keep_going(200.0)
    w.setting.bus.give_back([place])
    w.setting.run()
    assert w.watch.keep_going(300.0)
    assert not w.watch.keep_going(302.0)


def test_a_bounded_run_gives_up_on_a_dependency_and_an_unbounded_one_never(tmp_path: Path) -> None:
    bounded = Worker(tmp_path, until_idle=1.0).started()
    endless = Worker(tmp_path).started()
    for w in (bounded, endless):
        w.setting.source.away = "the bus is away"
    assert bounded.watch.keep_going(100.0)
    assert bounded.watch.keep_going(129.0)
    assert not bounded.watch.keep_going(131.0)
    assert bounded.watch.code == AWAY
    assert all(endless.watch.keep_going(100.0 * i) for i in range(1, 50))


def test_a_worker_over_its_memory_limit_drains_and_ends_as_a_failure(tmp_path: Path) -> None:
    small = [f"{limit}=1MiB" for limit in ("flow.max_inflight_bytes", "flow.max_message_bytes", "batch.max_bytes")]
    w = Worker(tmp_path, *small, "flow.max_resident=2MiB").started()
    assert not w.watch.keep_going(100.0)
    assert w.watch.code == BUG


def test_the_first_signal_drains_and_the_second_releases(tmp_path: Path) -> None:
    w = Worker(tmp_path).started()
    w.watch.on_signal(15, None)
    assert not w.watch.keep_going(100.0)
    assert not w.watch.released
    w.watch.on_signal(15, None)
    assert w.watch.released


def test_the_first_signal_after_a_fatal_error_is_still_the_first(tmp_path: Path) -> None:
    w = Worker(tmp_path).started()
    w.pipeline._die("the device is sick")
    w.watch.on_signal(15, None)
    assert not w.watch.released


def test_what_a_drain_has_no_time_for_is_released(tmp_path: Path) -> None:
    w = Worker(tmp_path).started()
    w.setting.sink.held = True
    for i in range(5):
        w.setting.ask(float(i))
    w.setting.run(lambda: w.pipeline._delivery.pending() == 5)
    drain(0.05, w.pipeline, w.watch)
    w.pipeline.close(0.0)
    assert w.setting.source.settled == []
    assert len(w.setting.bus) == 5


def test_a_served_run_ends_with_everything_settled(tmp_path: Path) -> None:
    w = Worker(tmp_path, until_idle=0.0)
    for i in range(50):
        w.setting.ask(float(i))
    assert w.serve() == DONE
    assert sorted(w.setting.source.settled) == list(range(50))


def test_a_sick_device_is_a_failure_for_the_supervisor(tmp_path: Path) -> None:
    w = Worker(tmp_path)
    warm_up = iter([False])
    w.model.before = lambda: setattr(w.model, "sick", next(warm_up, True))
    w.setting.ask(1.0)
    assert w.serve() == BUG
    assert w.setting.errors.written == []


def test_a_signal_while_the_model_loads_ends_the_worker_cleanly_and_never_ready(tmp_path: Path) -> None:
    w, loading = Worker(tmp_path), threading.Event()

    def load() -> None:
        w.watch.on_signal(15, None)
        loading.wait(5.0)

    w.model.load = load  # type: ignore[method-assign]
    w.model.signature = Signature((), ())  # not known before the model is loaded
    with capture_logs() as logs:
        assert w.serve() == DONE
    loading.set()
    assert [entry["event"] for entry in logs] == ["stopped"]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_before_the_bus_is_reached_ends_the_wait(tmp_path: Path, signals: int) -> None:
    w = Worker(tmp_path)
    w.setting.source.away = "the bus is away"
    for _ in range(signals):
        w.watch.on_signal(15, None)
    assert w.serve() == DONE
