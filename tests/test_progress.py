"""The progress line as a terminal sees it."""

from __future__ import annotations

import io
from typing import TextIO, cast

import structlog

from inferbus.worker.logs import Screen
from inferbus.worker.metrics import Metrics
from inferbus.worker.progress import ProgressLine

ERASE = "\r\x1b[2K"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def taken(self) -> str:
        """What was written since the last look."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


def test_the_line_says_rate_lag_in_flight_and_outcomes() -> None:
    terminal, metrics = Terminal(), Metrics()
    line = ProgressLine(metrics, Screen(terminal))
    metrics.set_lag("kafka:t", 12_000)
    metrics.set_inflight(512, 1)
    line.tick(10.0)
    metrics.outcomes("m", "1", "ok", 2_998)
    metrics.outcomes("m", "1", "expired", 2)
    terminal.taken()
    line.tick(12.0)
    assert terminal.taken() == f"{ERASE}1,500/s  lag 12,000  in flight 512  ok 2,998  errors 2"


def test_an_unknown_lag_is_left_out() -> None:
    terminal = Terminal()
    ProgressLine(Metrics(), Screen(terminal)).tick(0.0)
    assert terminal.taken() == f"{ERASE}0/s  in flight 0  ok 0  errors 0"


def test_the_rate_is_that_of_the_last_two_seconds() -> None:
    terminal, metrics = Terminal(), Metrics()
    line = ProgressLine(metrics, Screen(terminal))
    for quarter in range(40):  # ten seconds at 1000/s ..
        metrics.outcomes("m", "1", "ok", 250)
        line.tick(quarter * 0.25)
    assert "1,000/s" in terminal.taken()
    for quarter in range(40, 49):  # .. then nothing comes
        line.tick(quarter * 0.25)
    assert f"{ERASE}0/s" in terminal.taken()


def test_it_is_redrawn_at_most_four_times_a_second() -> None:
    terminal, metrics = Terminal(), Metrics()
    line = ProgressLine(metrics, Screen(terminal))
    for hundredth in range(100):
        metrics.outcomes("m", "1", "ok", 1)
        line.tick(hundredth / 100)
    assert terminal.taken().count(ERASE) == 4


def test_a_log_line_is_written_above_it() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    ProgressLine(Metrics(), screen).tick(0.0)
    line = terminal.taken().removeprefix(ERASE)
    screen.write("draining\n")
    assert terminal.taken() == f"{ERASE}draining\n{line}"


def test_structlog_writes_above_it_too() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    screen.show("1,000/s")
    structlog.WriteLogger(cast("TextIO", screen)).info("draining")
    assert terminal.taken() == f"{ERASE}1,000/s{ERASE}draining\n1,000/s"


def test_closing_takes_the_line_away_and_logs_follow_plainly() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    line = ProgressLine(Metrics(), screen)
    line.tick(0.0)
    terminal.taken()
    line.close()
    screen.write("done\n")
    assert terminal.taken() == f"{ERASE}done\n"


def test_a_line_that_has_not_changed_is_not_drawn_again() -> None:
    terminal = Terminal()
    line = ProgressLine(Metrics(), Screen(terminal))
    line.tick(0.0)
    terminal.taken()
    line.tick(1.0)
    assert terminal.taken() == ""


def test_a_line_never_fills_the_last_column() -> None:
    terminal = Terminal()
    Screen(terminal).show("x" * 500)
    assert terminal.taken() == ERASE + "x" * 79


def test_where_nobody_looks_nothing_is_drawn() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    line = ProgressLine(Metrics(), screen)
    line.tick(0.0)
    line.close()
    screen.write("draining\n")
    assert stream.getvalue() == "draining\n"
