"""What stands in examples/ is what it says, and runs."""

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
from tests.servers import Kafka

EXAMPLES = Path(__file__).parents[1] / "examples"
PIPELINES = [EXAMPLES / "digits.yaml", EXAMPLES / "python_model" / "pipeline.yaml"]


def test_every_pipeline_is_known_here() -> None:
    assert sorted(EXAMPLES.rglob("*.yaml")) == sorted([*PIPELINES, EXAMPLES / "python_model" / "model.yaml"])


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda path: path.parent.name)
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
