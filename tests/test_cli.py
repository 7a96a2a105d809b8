import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest

from inferbus.connectors.base import Fatal, Misconfigured, TooLarge, Unavailable
from inferbus.models.base import InvalidModel
from inferbus.worker import pipeline_file
from inferbus.worker.cli import NOT_YET, main
from inferbus.worker.http import PortBusy
from inferbus.worker.logs import UnknownLogFormat
from inferbus.worker.outcomes import Code

GOOD = """\
name: digits
model: digits.onnx
source: {kafka: {brokers: "localhost:9092", topic: in, config: {sasl.password: hunter2-hunter2}}}
sink: {kafka: {topic: out}}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "p.yaml"
    path.write_text(GOOD)
    return str(path)


@pytest.fixture
def fail(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[BaseException], tuple[int, str]]:
    """What `main` answers and tells when a command raises."""
    monkeypatch.delenv("INFERBUS_DEBUG", raising=False)

    def fail(error: BaseException) -> tuple[int, str]:
        def send(*_: object, **__: object) -> NoReturn:
            raise error

        monkeypatch.setattr("inferbus.worker.send.send", send)
        return main(["send", file, "--file", "rows.jsonl"]), capsys.readouterr().err

    return fail


# Help


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["errors", "replay", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(argv: Sequence[str]) -> None:
    code = f"""
import sys
from inferbus.worker.cli import main
try:
    main({argv!r})
finally:
    heavy = "numpy pydantic confluent_kafka onnxruntime structlog orjson yaml prometheus_client".split()
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
    assert "inferbus" in done.stdout


def test_help_lists_the_commands_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "] == [
        "demo",
        "run",
        "check",
        "send",
        "errors",
        "schema",
    ]
    assert "3 a dependency is away" in out


# Usage


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["run"], "the following arguments are required: PIPELINE.yaml"),
        (["run", "p.yaml", "--worker", "2"], "unrecognized arguments: --worker 2"),
        (["run", "p.yaml", "--workers", "0"], "expected a whole number of at least 1, got '0'"),
        (["run", "p.yaml", "--until-idle", "-1"], "expected seconds, such as 3 or 3s, got '-1'"),
        (["run", "p.yaml", "--until-idle", "nan"], "expected seconds, such as 3 or 3s, got 'nan'"),
        (["run", "p.yaml", "--set", "drain"], "argument --set: expected a.b=value"),
        (["send", "p.yaml"], "the following arguments are required: --file"),
        (["errors"], "the following arguments are required: ACTION"),
        (
            ["errors", "list", "p.yaml", "--since", "yesterday"],
            "expected a duration such as 30m or 2h, or a",
        ),
        (["errors", "replay", "p.yaml", "--rate", "0/s"], "expected more than 0/s"),
        (["errors", "replay", "p.yaml", "--rate", "5m"], "expected a number, such as 10 or 10/s, got '5m'"),
        (["errors", "list", "p.yaml", "--code", "foo"], f"expected one of {', '.join(get_args(Code))}, got 'foo'"),
        (["errors", "replay", "p.yaml", "--stage", "decod"], "expected one of receive, decode, predict, encode, write"),
    ],
)
def test_what_cannot_be_meant_is_usage(argv: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chek"])
    err = capsys.readouterr().err
    assert [name for name in ("check", *NOT_YET) if name in err] == ["check"]


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["shadow", "report", "--comparisons", "x", "--gate"], "`inferbus shadow`"),
        (["model", "inspect", "m.onnx"], "`inferbus model`"),
        (["asyncapi", "--help"], "`inferbus asyncapi`"),
        (["run", "p.yaml", "--role", "shadow:x"], "`--role`"),
        (["run", "p.yaml", "--all"], "`--all`"),
    ],
)
def test_what_later_releases_will_do_is_not_available_yet(
    argv: Sequence[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"inferbus: {what} is not available yet\n"


# What a command answers


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == pipeline_file.schema()


def test_run_is_given_what_the_user_typed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def run(settings: Any, **flags: Any) -> int:
        given.append((settings.name, settings.drain, flags))
        return 42

    monkeypatch.setattr("inferbus.worker.run.run", run)
    flags = ["--workers", "3", "--until-idle", "1.5", "--set", "drain=3s", "--set", "name=other"]
    assert main(["run", file, *flags]) == 42
    assert given == [("other", 3.0, {"workers": 3, "until_idle": 1.5})]


@pytest.mark.parametrize(("written", "value"), [("3", 3.0), ("3s", 3.0), ("0.5", 0.5), ("2m", 120.0), ("0", 0.0)])
def test_seconds_are_typed_with_their_unit_or_without(
    written: str, value: float, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr("inferbus.worker.run.run", lambda *_, until_idle, **__: given.append(until_idle))
    monkeypatch.setattr("inferbus.worker.send.send", lambda *_, timeout, **__: given.append(timeout))
    main(["run", file, "--until-idle", written])
    main(["send", file, "--file", "rows.jsonl", "--timeout", written])
    assert given == [value, value]


def test_a_wrong_pipeline_file_is_told_line_by_line_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(GOOD + "ordre: key\ndrain: 5\n")
    assert main(["check", str(path), "--set", "order=x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"{path}:5: ordre: unknown key; did you mean order?",
        f"{path}:6: drain: expected a number and its unit, such as 250ms, 5s, 2m or 1h, got 5",
        "--set order: expected 'none' or 'key', got 'x'",
    ]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Misconfigured("m"), 1, "inferbus: m\n"),
        (TooLarge("m"), 1, "inferbus: m\n"),
        (InvalidModel("m"), 1, "inferbus: m\n"),
        (PortBusy("m"), 1, "inferbus: m\n"),
        (UnknownLogFormat("m"), 1, "inferbus: m\n"),
        (Unavailable("m"), 3, "inferbus: m\n"),
        (Unavailable("login as hunter2-hunter2 failed"), 3, "inferbus: login as *** failed\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            Fatal("hunter2-hunter2"),
            70,
            "inferbus: this is a bug in Inferbus: Fatal: ***; INFERBUS_DEBUG=1 shows the traceback\n",
        ),
    ],
)
def test_a_failure_becomes_one_line_and_an_exit_code(
    error: BaseException, code: int, told: str, fail: Callable[[BaseException], tuple[int, str]]
) -> None:
    assert fail(error) == (code, told)


def test_a_bug_shows_its_traceback_only_when_asked_and_without_secrets(
    fail: Callable[[BaseException], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERBUS_DEBUG", "1")
    code, err = fail(KeyError("hunter2-hunter2"))
    assert code == 70
    assert "Traceback" in err
    assert "hunter2" not in err
    assert err.endswith("inferbus: this is a bug in Inferbus: KeyError: '***'\n")


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m inferbus.worker.cli schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S603, S607
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")
