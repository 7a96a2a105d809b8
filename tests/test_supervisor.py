"""A real parent with real children: small stand-ins that speak the child's side and die as they are told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from inferbus.worker.http import PortBusy
from inferbus.worker.supervisor import Backoff, child_count, child_index, supervise

# Says what `place` tells it to, notes there what happens to it, and ends as its plan says.
CHILD = """
import json, os, pathlib, signal, sys, threading
import structlog
from inferbus.worker import supervisor
from inferbus.worker.http import Listener
from inferbus.worker.metrics import Metrics

supervisor.ORPHAN_GRACE = 0.1
place, plan = pathlib.Path(sys.argv[1]), sys.argv[2]
index, count = supervisor.child_index(), supervisor.child_count()
mark = lambda what: (place / f"{what}-{index}").open("a").write(f"{os.getpid()}\\n")
signals = threading.Semaphore(0)
signal.signal(signal.SIGTERM, lambda *_: signals.release())
first = not (place / f"started-{index}").exists()
mark("started")
if plan == "killed-first":
    if index == 0 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)
if plan == "quit":
    sys.exit(0)
if plan == "exit" and index == 0:
    sys.exit(int(sys.argv[3]))
metrics = Metrics()
metrics.received(f"kafka:{count}", 10)
metrics.set_inflight(1, 100)
def reasons(page):
    file = place / f"{page}-{index}"
    return [file.read_text()] if file.exists() else []
listener = Listener("127.0.0.1", 0, live=lambda: reasons("not-live"), ready=lambda: reasons("not-ready"),
                    render=metrics.render, logger=structlog.get_logger(), public=False)
if plan != "silent":
    supervisor.join_parent(listener.port, 0.0)
if plan == "hang":
    threading.Event().wait()
signals.acquire()
mark("draining")
if plan == "slow":
    signals.acquire()
    mark("released")
mark("ended")
sys.exit(int(sys.argv[3]) if plan == "end" and index == 0 else 0)
"""

PARENT = """
import json, sys
from types import SimpleNamespace
import structlog
from inferbus.worker import logs
from inferbus.worker.supervisor import supervise

logs.configure(logs.Screen(sys.stderr))
told = json.loads(sys.argv[1])
http = SimpleNamespace(host="127.0.0.1", port=0)
sys.exit(supervise(told["argv"], told["workers"], http, told["until_idle"], structlog.get_logger(),
                   command=told["command"]))
"""


@dataclass
class Run:
    """A parent under test: its process, the place its children write to, and what it has logged so far."""

    process: subprocess.Popen[str]
    place: Path
    log: list[dict[str, Any]]
    told: threading.Condition

    def event(self, name: str, **fields: object) -> dict[str, Any]:
        """The first such event, waited for."""

        def find() -> dict[str, Any] | None:
            wanted = {"event": name, **fields}.items()
            return next((entry for entry in self.log if wanted <= entry.items()), None)

        with self.told:
            assert self.told.wait_for(find, timeout=30), f"no {name} {fields} in {self.log}"
        found = find()
        assert found is not None
        return found

    def ask(self, path: str) -> tuple[int, str]:
        port = self.event("http_listening")["port"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def until_ready(self) -> None:
        eventually(lambda: self.ask("/readyz")[0] == 200)

    def marks(self, what: str) -> list[int]:
        """Process ids that marked this, of all children."""
        return [int(pid) for file in self.place.glob(f"{what}-*") for pid in file.read_text().split()]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def eventually(true: Callable[[], object]) -> None:
    """Real processes tell nobody when they are there: look again and again, for at most half a minute."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to take note does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(
            *plan: str,
            workers: int = 2,
            until_idle: float | None = None,
            command: tuple[str, ...] = (sys.executable, "-c", CHILD),
        ) -> Run:
            argv = [str(tmp_path), *plan]
            told = {"argv": argv, "workers": workers, "until_idle": until_idle, "command": command}
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - the script above
                    [sys.executable, "-c", PARENT, json.dumps(told)], stderr=subprocess.PIPE, text=True
                )
            )
            run = Run(process, tmp_path, [], threading.Condition())
            reader = threading.Thread(target=listen, args=(run,))
            reader.start()
            stack.callback(reader.join)
            stack.callback(end, run)
            return run

        yield begin


def listen(run: Run) -> None:
    assert run.process.stderr is not None
    for line in run.process.stderr:
        with run.told:
            run.log.append(json.loads(line) if line.startswith("{") else {"event": line})
            run.told.notify_all()


def end(run: Run) -> None:
    """Leave nothing behind, also when the test has failed."""
    run.process.kill()
    for pid in run.marks("started"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_the_parent_speaks_for_all_its_children(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    assert run.ask("/livez") == (200, '{"status": "ok", "reasons": []}\n')
    _, text = run.ask("/metrics")
    assert 'inferbus_messages_received_total{source="kafka:2"} 20.0\n' in text
    assert "inferbus_inflight_bytes 200.0\n" in text
    assert run.stop() == 0


def test_only_the_parents_address_is_logged(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    assert [entry["event"] for entry in run.log].count("http_listening") == 1


def test_one_child_that_is_not_ready_or_not_live_says_why_through_the_parent(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    (run.place / "not-ready-1").write_text("kafka: away")
    (run.place / "not-live-0").write_text("device: hung")
    status, body = run.ask("/readyz")
    assert (status, json.loads(body)["reasons"]) == (503, ["worker 1: kafka: away"])
    status, body = run.ask("/livez")
    assert (status, json.loads(body)["reasons"]) == (503, ["worker 0: device: hung"])


def test_children_that_have_not_reported_are_starting_and_no_reason_to_restart(start: Start) -> None:
    run = start("silent")
    eventually(lambda: len(run.marks("started")) == 2)
    status, body = run.ask("/readyz")
    assert (status, json.loads(body)["reasons"]) == (503, ["worker 0: starting", "worker 1: starting"])
    assert run.ask("/livez")[0] == 200
    assert run.ask("/metrics") == (200, "")


def test_a_child_that_hangs_is_named_within_the_time_of_a_probe(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    (pid,) = (int(text) for text in (run.place / "started-1").read_text().split())
    os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    status, body = run.ask("/livez")
    assert time.monotonic() - before < 5
    assert (status, json.loads(body)["reasons"]) == (503, ["worker 1: does not answer"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_every_child(start: Start, number: signal.Signals) -> None:
    run = start("serve", workers=3)
    run.until_ready()
    assert run.stop(number) == 0
    assert sorted(run.marks("ended")) == sorted(run.marks("started"))
    assert run.event("stopping")["signal"] == number.name


def test_a_second_signal_is_passed_on_and_readyz_is_down_meanwhile(start: Start) -> None:
    run = start("slow")
    run.until_ready()
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: len(run.marks("draining")) == 2)
    status, body = run.ask("/readyz")
    assert (status, json.loads(body)["reasons"]) == (503, ["draining"])
    assert run.marks("released") == []
    assert run.stop() == 0
    assert len(run.marks("released")) == 2


def test_ctrl_c_at_a_terminal_reaches_a_child_through_the_parent_only(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    groups = {os.getpgid(pid) for pid in run.marks("started")}
    assert len(groups) == 2
    assert os.getpgid(run.process.pid) not in groups


def test_a_signal_before_the_children_are_up_ends_the_run_in_peace(start: Start) -> None:
    run = start("serve")
    run.event("worker_started", worker=1)
    assert run.stop() == 0


def test_a_child_that_is_killed_is_restarted_and_no_counter_falls(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    assert "} 20.0\n" in run.ask("/metrics")[1].split("inferbus_outcomes")[0]
    (pid,) = (int(text) for text in (run.place / "started-0").read_text().split())
    (run.place / "not-ready-0").write_text("held back")  # so that the new one cannot be ready too soon for us
    os.kill(pid, signal.SIGKILL)
    assert run.event("worker_ended", worker=0, code=137)["restart_in"] == 1.0
    status, body = run.ask("/readyz")
    states = ("not running", "starting", "held back")
    assert status == 503
    assert json.loads(body)["reasons"] in [[f"worker 0: {state}"] for state in states]
    assert run.ask("/livez")[0] == 200
    received = 'inferbus_messages_received_total{source="kafka:2"}'
    text = run.ask("/metrics")[1]
    assert f"{received} 20.0\n" in text or f"{received} 30.0\n" in text
    (run.place / "not-ready-0").unlink()
    run.until_ready()
    text = run.ask("/metrics")[1]
    assert f"{received} 30.0\n" in text
    assert "inferbus_inflight_messages 2.0\n" in text
    assert run.stop() == 0


@pytest.mark.parametrize("code", [1, 2])
def test_a_child_that_finds_the_users_input_wrong_stops_all(start: Start, code: int) -> None:
    run = start("exit", str(code))
    assert run.process.wait(30) == code
    eventually(lambda: not any(alive(pid) for pid in run.marks("started")))
    assert len(run.marks("started")) <= 2


def test_a_dependency_away_at_the_first_start_stops_all(start: Start) -> None:
    run = start("exit", "3")
    assert run.process.wait(30) == 3


def test_a_bounded_run_ends_when_every_child_has(start: Start) -> None:
    run = start("quit", until_idle=1.0)
    assert run.process.wait(30) == 0
    assert len(run.marks("started")) == 2


def test_a_child_that_has_finished_its_bounded_run_leaves_the_others_be(start: Start) -> None:
    run = start("exit", "0", until_idle=1.0)
    run.event("worker_ended", worker=0, code=0)
    run.until_ready()
    assert run.stop() == 0
    assert len(run.marks("started")) == 2


def test_a_bounded_run_survives_a_killed_child(start: Start) -> None:
    run = start("killed-first", until_idle=1.0)
    assert run.process.wait(30) == 0
    assert len((run.place / "started-0").read_text().split()) == 2
    assert len((run.place / "started-1").read_text().split()) == 1


def test_a_bug_ends_a_bounded_run_instead_of_repeating_for_ever(start: Start) -> None:
    run = start("exit", "70", until_idle=1.0)
    assert run.process.wait(30) == 70


def test_a_child_the_system_cannot_start_is_tried_again_later(start: Start) -> None:
    run = start(workers=1, command=("/no/such/program",))
    assert run.event("worker_not_started", worker=0)["reason"] == "No such file or directory"
    assert json.loads(run.ask("/readyz")[1])["reasons"] == ["worker 0: not running"]
    assert run.stop() == 70


def test_a_run_that_is_stopped_ends_with_the_worst_code(start: Start) -> None:
    run = start("end", "70")
    run.until_ready()
    assert run.stop() == 70


def test_children_drain_when_their_parent_is_killed(start: Start) -> None:
    run = start("serve")
    run.until_ready()
    run.process.kill()
    eventually(lambda: len(run.marks("ended")) == 2)
    eventually(lambda: not any(alive(pid) for pid in run.marks("started")))


def test_an_orphan_that_hangs_is_ended_all_the_same(start: Start) -> None:
    run = start("hang")
    run.until_ready()
    run.process.kill()
    eventually(lambda: not any(alive(pid) for pid in run.marks("started")))
    assert run.marks("ended") == []


def test_a_busy_port_is_found_before_any_child_is_started(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = SimpleNamespace(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(PortBusy):
            supervise(
                [str(tmp_path / "started")],
                2,
                settings,
                None,
                structlog.get_logger(),
                command=["/usr/bin/touch"],
            )
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_wait_before_a_restart_doubles_up_to_half_a_minute() -> None:
    backoff = Backoff()
    assert [backoff.after(5.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_a_life_of_a_minute_makes_the_next_wait_short_again() -> None:
    backoff = Backoff()
    assert [backoff.after(lived) for lived in (0.0, 0.0, 0.0, 60.0, 0.0)] == [1, 2, 4, 1, 2]


def test_a_process_knows_whether_it_is_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERBUS_CHILD", raising=False)
    assert (child_index(), child_count()) == (None, 1)
    monkeypatch.setenv("INFERBUS_CHILD", "0/4")
    assert (child_index(), child_count()) == (0, 4)
