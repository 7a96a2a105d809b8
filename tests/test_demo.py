"""The demo, whole: over the embedded broker, with the worker in a process of its own."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferbus.connectors.base import Message
from inferbus.worker import demo as module
from inferbus.worker.cli import main
from inferbus.worker.demo import PIPELINE, Outcomes, Request
from inferbus.worker.pipeline_file import load


def run(out: Path) -> str:
    """What the demo prints."""
    command = [sys.executable, "-m", "inferbus.worker.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "of" / "digits"


@pytest.fixture(scope="module")
def printed(out: Path) -> str:
    return run(out)


def test_the_summary_accounts_for_every_request(printed: str) -> None:
    assert re.search(r"requests +1,800 +1,797 digits, and 3 malformed on purpose", printed)
    assert re.search(r"predictions +1,797 +exactly one for each digit", printed)
    assert re.search(r"errors +3 +exactly one for each malformed request", printed)
    assert printed.count("invalid_request: ") == 3


def test_the_summary_tells_how_right_and_how_fast_it_was(printed: str) -> None:
    accuracy = re.search(r"accuracy +([\d.]+)% +and ([\d.]+)% on the 899 digits the model never saw", printed)
    assert accuracy
    assert min(map(float, accuracy.groups())) >= 95.0
    assert re.search(r"throughput +[\d,]+ +requests a second", printed)
    assert re.search(r"latency +\d+ ms +median .* p99 \d+ ms", printed)
    assert re.search(r"batches +\d+ +of \d+ to \d+ digits; the model took [\d.]+ ms", printed)


def test_the_next_line_is_the_same_pipeline_on_a_real_broker(printed: str, out: Path) -> None:
    assert f"  BROKERS=localhost:9092 inferbus run {out}/digits.yaml\n" in printed
    assert "topics digits.requests, digits.predictions and digits.errors" in printed
    source = load(out / "digits.yaml", environ={}).source.kafka
    assert source is not None
    assert source.brokers == "localhost:9092"
    assert (out / "digits.yaml").read_text() == PIPELINE


def test_every_digit_has_its_own_prediction_in_the_file(printed: str, out: Path) -> None:
    assert printed
    with gzip.open(module.SHIPPED / "digits.jsonl.gz", "rt") as lines:
        truth = [json.loads(line) for line in lines]
    found = rows(out / "predictions.jsonl")
    assert [row["id"] for row in found] == [row["key"] for row in found] == [f"digit-{n:04}" for n in range(1797)]
    assert [row["truth"] for row in found] == [digit["label"] for digit in truth]
    assert sum(row["label"] == row["truth"] for row in found) >= 0.95 * 1797
    assert {len(row["probabilities"]) for row in found} == {10}
    assert {row["status"] for row in found} == {"ok"}


def test_every_malformed_request_has_its_error_record_in_the_file(printed: str, out: Path) -> None:
    assert printed
    found = rows(out / "errors.jsonl")
    assert [row["id"] for row in found] == ["malformed-1", "malformed-2", "malformed-3"]
    assert {row["error"]["code"] for row in found} == {"invalid_request"}
    sent = (out / "requests.jsonl").read_text().splitlines()
    assert all(row["body"] in sent for row in found)


def test_the_worker_logged_to_its_own_file_and_ended_cleanly(printed: str, out: Path) -> None:
    assert printed
    last = rows(out / "worker.log")[-1]
    assert (last["event"], last["received"], last["ok"], last["errors"]) == ("stopped", 1800, 1797, 3)


def test_running_it_again_in_the_same_folder_works(printed: str, out: Path) -> None:
    assert printed
    assert "exactly one for each digit" in run(out)
    assert len(rows(out / "predictions.jsonl")) == 1797


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"inferbus: {tmp_path / 'file'}: cannot be written: File exists; choose another folder with --out\n"
    )


# When something is wrong: what came back is made up here


def prediction(id_: str, label: int) -> Message:
    outputs = [{"name": "label", "data": [label]}, {"name": "probabilities", "data": [1.0]}]
    body = orjson.dumps({"model_name": "digits", "model_version": "1", "outputs": outputs})
    timing = orjson.dumps({"batch": "1", "rows": 1, "predict_ms": 1.0})
    return Message(id_, None, body, (("inferbus-timing", timing),), 0.0, 1, None)


def error_record(id_: str) -> Message:
    error = orjson.dumps({"id": id_, "code": "invalid_request", "message": "so"})
    return Message(id_, None, b"", (("inferbus-error", error),), 0.0, 1, None)


def came_back(requests: Sequence[Request], label: int | None = None) -> Outcomes:
    """Everything as it must be; with `label`, that is what each digit was taken for."""
    return Outcomes(
        {request.id: float(n) for n, request in enumerate(requests)},
        {request.id: n + 0.5 for n, request in enumerate(requests)},
        [prediction(r.id, r.digit.label if label is None else label) for r in requests if r.digit],
        [error_record(r.id) for r in requests if not r.digit],
    )


def told(
    outcomes: Outcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    (tmp_path / "worker.log").write_text("one\ninferbus: the last word\n")
    monkeypatch.setattr(module, "_exchanged", lambda *_: outcomes)
    return main(["demo", "--out", str(tmp_path)]), capsys.readouterr().err


@pytest.fixture
def requests() -> list[Request]:
    return module._requests(module._digits())


def test_a_digit_without_a_prediction_and_a_second_one_are_told(
    requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = came_back(requests)
    outcomes.predictions[7] = outcomes.predictions[8]
    assert told(outcomes, tmp_path, monkeypatch, capsys) == (
        70,
        "inferbus demo: 2 outcomes are not as they must be: digit-0007 has no prediction, "
        f"digit-0008 has one prediction more; see {tmp_path / 'worker.log'}\n",
    )


def test_a_model_that_is_wrong_too_often_is_told(
    requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = told(came_back(requests, label=3), tmp_path, monkeypatch, capsys)
    assert code == 70
    assert re.fullmatch(r"inferbus demo: the accuracy is [\d.]+%; expected at least 95%\n", err)


@pytest.mark.parametrize(("code", "answered"), [(1, 1), (3, 3), (-9, 70)])
def test_a_worker_that_fails_is_told_with_its_last_words(
    code: int, answered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(Outcomes(code=code), tmp_path, monkeypatch, capsys) == (
        answered,
        f"inferbus demo: the worker ended with code {code}: the last word\n",
    )
