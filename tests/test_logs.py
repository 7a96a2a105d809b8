"""What reaches stderr, in which shape, and what never does."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from inferbus.worker.logs import LONGEST, Screen, Seldom, UnknownLogFormat, configure


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def failure(error: Exception) -> Exception:
    """The same exception, with a traceback."""

    def fail() -> None:
        raise error

    with contextlib.suppress(Exception):
        fail()
    return error


def hide(text: str) -> str:
    return text.replace("s3cret", "***")


def test_away_from_a_terminal_an_event_is_one_json_line_with_its_fields() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    structlog.get_logger().info("http_listening", host="127.0.0.1", port=8080)
    (event,) = logged(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event.pop("timestamp"))
    assert event == {"level": "info", "event": "http_listening", "host": "127.0.0.1", "port": 8080}


def test_at_a_terminal_an_event_is_for_eyes() -> None:
    stream = Terminal()
    configure(Screen(stream), environ={})
    structlog.get_logger().info("http_listening", port=8080)
    assert not stream.getvalue().startswith("{")
    assert "\x1b[" in stream.getvalue()
    assert "http_listening" in stream.getvalue()


def test_no_color_is_honoured() -> None:
    stream = Terminal()
    configure(Screen(stream), environ={"NO_COLOR": "1"})
    structlog.get_logger().info("http_listening", port=8080)
    assert "\x1b" not in stream.getvalue()
    assert "port=8080" in stream.getvalue()


@pytest.mark.parametrize(("form", "starts"), [("json", "{"), ("console", "2")])
def test_the_environment_overrides_the_form(form: str, starts: str) -> None:
    stream = io.StringIO() if form == "console" else Terminal()
    configure(Screen(stream), environ={"INFERBUS_LOG": form})
    structlog.get_logger().info("draining")
    assert stream.getvalue().startswith(starts)


def test_an_unknown_form_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(UnknownLogFormat, match="INFERBUS_LOG is 'yaml'; expected json or console"):
        configure(Screen(io.StringIO()), environ={"INFERBUS_LOG": "yaml"})


def test_debug_is_not_said() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    structlog.get_logger().debug("every_little_thing")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_secret_appears_nowhere_however_deep_it_lies(form: str) -> None:
    stream = io.StringIO()
    configure(Screen(stream), hide, environ={"INFERBUS_LOG": form})
    log = structlog.get_logger()
    log.warning("login as s3cret", url="kafka://u:s3cret@b", config={"a": ["s3cret", {"s3cret": ("s3cret",)}]})
    log.warning("refused", error=ValueError("password s3cret is wrong"), raw=b"s3cret")
    log.error("bug", exc_info=failure(RuntimeError("s3cret")))
    logging.getLogger("library").error("connecting with %s", "s3cret")
    assert "s3cret" not in stream.getvalue()
    assert stream.getvalue().count("***") >= 8
    assert "Traceback" in stream.getvalue()


def test_a_long_value_keeps_its_ends_and_says_what_is_left_out() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    structlog.get_logger().info("said", text="a" * LONGEST + "b" * LONGEST, short="c" * LONGEST)
    (event,) = logged(stream)
    assert event["text"].startswith("aaa")
    assert event["text"].endswith("bbb")
    assert f"{LONGEST} characters left out" in event["text"]
    assert len(event["text"]) < LONGEST + 100
    assert event["short"] == "c" * LONGEST


def test_a_secret_that_straddles_the_cut_is_taken_out_before_it() -> None:
    stream = io.StringIO()
    configure(Screen(stream), hide, environ={})
    half = LONGEST // 2
    structlog.get_logger().info("said", text="a" * (half - 3) + "s3cret" + "b" * LONGEST)
    assert "s3c" not in stream.getvalue()


def test_values_json_cannot_carry_become_text() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    odd = {"nan": float("nan"), "inf": float("-inf"), "big": 2**70, "name": "\udcff", 3: {4}, "none": None}
    structlog.get_logger().info("odd", fields=odd, flag=True)
    (event,) = logged(stream)
    fields = {"nan": "nan", "inf": "-inf", "big": 2**70, "name": "\udcff", "3": [4], "none": None}
    assert (event["fields"], event["flag"]) == (fields, True)


def test_text_from_outside_cannot_forge_a_line_or_steer_the_terminal() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={"INFERBUS_LOG": "console"})
    structlog.get_logger().warning("odd\nname", topic="x\n2026-01-01 [info] all is well\x1b[2J\r\x9b2J")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert not {"\x1b", "\r", "\x9b"} & set(text)


def test_a_traceback_keeps_its_lines_at_a_console() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={"INFERBUS_LOG": "console"})
    structlog.get_logger().error("bug", exc_info=failure(ValueError("\x1b[2Jwrong")))
    assert len(stream.getvalue().splitlines()) > 3
    assert "\x1b" not in stream.getvalue()


def test_what_libraries_log_and_warn_takes_the_same_way() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    logging.captureWarnings(False)  # pytest watches warnings by itself; it begins again below
    logging.getLogger("kafka.client").warning("broker %d is away", 3)
    logging.getLogger("kafka.client").info("not worth a line")
    logging.getLogger("kafka.client").error("%d brokers", "three")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old option", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    events = logged(stream)
    assert [(event["level"], event["logger"]) for event in events] == [
        ("warning", "kafka.client"),
        ("error", "kafka.client"),
        ("warning", "py.warnings"),
    ]
    assert events[0]["event"] == "broker 3 is away"
    assert events[1]["event"] == "%d brokers"
    assert "DeprecationWarning: old option" in events[2]["event"]


def test_what_a_library_logs_with_an_exception_keeps_its_traceback() -> None:
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    logging.getLogger("library").error("lost", exc_info=failure(OSError("gone")))
    assert "OSError: gone" in logged(stream)[0]["exception"]


def test_configuring_again_replaces_the_secrets_and_doubles_nothing() -> None:
    stream = io.StringIO()
    log = structlog.get_logger()
    configure(Screen(stream), environ={})
    log.info("before")
    configure(Screen(stream), hide, environ={})
    log.info("s3cret")
    logging.getLogger("library").warning("once")
    assert [event["event"] for event in logged(stream)] == ["before", "***", "once"]


def test_a_stream_that_is_gone_does_not_stop_the_work() -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    configure(Screen(Gone()), environ={})
    structlog.get_logger().info("nobody_hears")
    stream = io.StringIO()
    configure(Screen(stream), environ={})
    stream.close()
    structlog.get_logger().info("nobody_hears")


def test_a_repeated_event_is_said_once_per_interval_with_the_number_kept_back() -> None:
    with capture_logs() as logs:
        seldom = Seldom(structlog.get_logger(), every=10.0)
        for second in range(25):
            seldom.warning(100.0 + second, "sink_away", "kafka:predictions", reason="no leader")
    said = {"event": "sink_away", "log_level": "warning", "reason": "no leader"}
    assert logs == [said, {**said, "suppressed": 9}, {**said, "suppressed": 9}]


def test_events_and_keys_are_held_apart() -> None:
    with capture_logs() as logs:
        seldom = Seldom(structlog.get_logger(), every=10.0)
        seldom.warning(0.0, "sink_away", "a", sink="a")
        seldom.warning(0.0, "sink_away", "b", sink="b")
        seldom.warning(0.0, "source_away", "a", source="a")
        seldom.warning(9.9, "sink_away", "a", sink="a")
        seldom.warning(10.0, "sink_away", "b", sink="b")
    assert [(entry["event"], entry.get("sink"), entry.get("suppressed")) for entry in logs] == [
        ("sink_away", "a", None),
        ("sink_away", "b", None),
        ("source_away", None, None),
        ("sink_away", "b", None),
    ]


def test_ever_new_keys_do_not_fill_the_memory() -> None:
    with capture_logs() as logs:
        seldom = Seldom(structlog.get_logger())
        for number in range(5000):
            seldom.warning(0.0, "odd", str(number))
    assert len(logs) == 5000
    assert len(seldom._said) == 1024
