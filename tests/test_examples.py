"""What stands in examples/ is what it says, and runs."""

import subprocess
import uuid
from pathlib import Path

import orjson
import pytest

from examples import create_topics
from inferbus.models.codecs import codec
from inferbus.models.repository import executors
from inferbus.worker import build
from inferbus.worker.cli import main
from inferbus.worker.demo import PIPELINE, SHIPPED
from inferbus.worker.pipeline_file import load
from inferbus.worker.supervisor import COMMAND
from tests.servers import Kafka

EXAMPLES = Path(__file__).parents[1] / "examples"
PIPELINES = [
    EXAMPLES / "digits.yaml",
    EXAMPLES / "digits_job.yaml",
    EXAMPLES / "digits_to_s3.yaml",
    EXAMPLES / "python_model" / "pipeline.yaml",
]


def test_every_pipeline_is_known_here() -> None:
    assert sorted(EXAMPLES.rglob("*.yaml")) == sorted([*PIPELINES, EXAMPLES / "python_model" / "model.yaml"])


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_pipeline_passes_check(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(pipeline)]) == 0
    assert capsys.readouterr().err == ""


def test_the_digits_are_those_of_the_demo() -> None:
    assert (EXAMPLES / "digits.yaml").read_text() == PIPELINE
    assert (EXAMPLES / "digits.onnx").read_bytes() == (SHIPPED / "digits.onnx").read_bytes()


def test_the_python_model_answers_its_requests_but_the_wrong_one() -> None:
    folder = EXAMPLES / "python_model"
    settings = load(folder / "pipeline.yaml")
    (executor,) = executors(build.artefact(settings))
    executor.load()
    payments = codec(settings.requests.format, executor.signature, executor.info)
    bodies = (folder / "requests.jsonl").read_bytes().splitlines()

    decoded = payments.decode(bodies, [()] * len(bodies))
    assert [position for position, _ in decoded.rejects] == [3]
    (group,) = decoded.groups
    answers, _ = payments.encode(executor.predict(group.columns), group.rows, group.asks, ["a", "b", "c"])
    outputs = [orjson.loads(answer)["outputs"] for answer in answers]
    assert [output["review"] for output in outputs] == [False, True, False]
    assert outputs[0]["risk"] == pytest.approx(0.0112, abs=1e-4)


def test_the_job_answers_every_line_and_a_second_run_has_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "inferbus-demo").mkdir()
    for name in ("digits_job.yaml", "digits.onnx"):
        (tmp_path / "examples" / name).write_bytes((EXAMPLES / name).read_bytes())
    good = orjson.dumps({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]})
    (tmp_path / "inferbus-demo" / "requests.jsonl").write_bytes(good + b"\n{}\n" + good + b"\n")
    for _ in range(2):
        job = [*COMMAND, "run", "examples/digits_job.yaml"]
        done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, timeout=60.0, check=False)  # noqa: S603 - our own command
        assert done.returncode == 0, done.stderr
    rows = [
        orjson.loads(line)
        for place in ("predictions", "errors")
        for file in sorted((tmp_path / "inferbus-demo" / place).rglob("*.jsonl"))
        for line in file.read_bytes().splitlines()
    ]
    assert [row["id"] for row in rows] == ["requests.jsonl-0", "requests.jsonl-2", "requests.jsonl-1"]


@pytest.mark.broker
def test_topics_are_created_where_they_are_missing(kafka: Kafka, capsys: pytest.CaptureFixture[str]) -> None:
    there, missing = kafka.topic(), f"t-{uuid.uuid4().hex}"
    assert create_topics.main([kafka.brokers, there, missing, missing, "--partitions", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{there}: is there already",
        f"{missing}: created with 3 partitions",
    ]
    assert create_topics.main([kafka.brokers, "no topic's name"]) == 1
    assert "no topic's name: " in capsys.readouterr().err
