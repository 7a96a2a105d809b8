from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from confluent_kafka.admin import AdminClient
from onnx import helper

from inferbus.worker.cli import main
from inferbus.worker.pipeline_file import load
from inferbus.worker.settings import effective
from tests.servers import Kafka
from tests.tiny_models import echo, floats, linear, save


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """A pipeline file with these lines beside a linear model, a model with two inputs, and one of text."""
    linear(tmp_path / "linear.onnx", features=4)
    save(
        tmp_path / "pair.onnx",
        [helper.make_node("Identity", ["a"], ["c"]), helper.make_node("Identity", ["b"], ["d"])],
        [floats("a", ["n", 2]), floats("b", ["n", 3])],
        [floats("c", ["n", 2]), floats("d", ["n", 3])],
    )
    echo(tmp_path / "echo.onnx")
    version = tmp_path / "models" / "digits" / "7"
    version.mkdir(parents=True)
    linear(version / "model.onnx")

    def write(lines: str) -> str:
        path = tmp_path / "p.yaml"
        path.write_text(
            "name: digits\n"
            'source: {kafka: {brokers: "127.0.0.1:1", topic: in, config: {sasl.password: hunter2-hunter2}}}\n'
            f"sink: {{kafka: {{topic: out}}}}\n{lines}"
        )
        return str(path)

    return write


def test_check_prints_the_effective_pipeline_and_what_the_model_takes_and_gives(
    write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("model: linear.onnx\n")
    assert main(["check", file, "--set", "drain=7s"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(effective(load(file, ["drain=7s"])))
    assert yaml.safe_load(captured.out)["drain"] == "7s"
    assert "hunter2" not in captured.out
    comments = [line for line in captured.out.splitlines() if line.startswith("#")]
    assert comments[0].startswith("# model: linear, version ")
    assert comments[0].endswith(", onnxruntime on cpu")
    assert comments[1:] == [
        "# input: x FP32 [-1, 4]",
        "# output: probabilities FP32 [-1, 10]",
        "# output: label INT64 [-1]",
    ]


def test_check_finds_a_name_in_the_repository(write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    file = write("model: digits\nrepository: models/\nbatch: {max_delay: 5ms}\n")
    (Path(file).parent / "models" / "digits" / "7" / "model.yaml").write_text("batch: {max_rows: 32, max_delay: 1s}")
    assert main(["check", file]) == 0
    out = capsys.readouterr().out
    assert "# model: digits, version 7, onnxruntime on cpu\n" in out
    assert out.endswith("# batch, with what model.yaml says: 32 rows, 5ms, 64MiB\n")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("model: liner.onnx\n", "did you mean 'linear.onnx'?"),
        ("model: digits@8\nrepository: models/\n", "no version '8'"),
        ("model: {path: linear.onnx, executor: python}\n", "executor: 'python' does not run linear.onnx"),
        ("model: {path: linear.onnx, options: {thread: 4}}\n", "thread"),
        ("model: pair.onnx\nrequests: {format: raw}\n", "raw"),
        ("model: linear.onnx\nrequests: {format: text}\n", "text"),
    ],
)
def test_a_model_that_cannot_serve_the_pipeline_is_told_in_one_line(
    lines: str, told: str, write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(lines)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("inferbus: ")
    assert told in captured.err


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("[1.0]", "the model answered list, expected a dict of arrays"),
        ("{'y': inputs['x'][:1]}", "expected [256, 2]"),
        ("{'y': inputs['x'].astype('float64')}", "is float64, expected float32"),
    ],
)
def test_a_python_model_that_fails_on_the_warm_up_batch_does_not_pass(
    answer: str, told: str, write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("model: model.py\n")
    tensor = "datatype: FP32, shape: [-1, 2]"
    Path(file).with_name("model.yaml").write_text(
        f"inputs: [{{name: x, {tensor}}}]\noutputs: [{{name: y, {tensor}}}]\n"
    )
    Path(file).with_name("model.py").write_text(
        "from inferbus.models import Model\n\n\n"
        f"class Mine(Model):\n    def predict(self, inputs):\n        return {answer}\n"
    )
    assert main(["check", file]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inferbus: the warm-up batch failed: ")
    assert told in captured.err


@pytest.mark.parametrize(
    "lines",
    [
        "model: linear.onnx\nrequests: {format: raw}\n",
        "model: echo.onnx\nrequests: {format: text}\n",
        "model: pair.onnx\nrequests: {format: json}\n",
    ],
)
def test_a_format_that_fits_the_signature_passes(lines: str, write: Callable[[str], str]) -> None:
    assert main(["check", write(lines)]) == 0


@pytest.mark.broker
def test_connect_reaches_every_place_and_joins_no_group(
    kafka: Kafka, write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, sink, group = kafka.topic(), kafka.topic(), kafka.topic()
    places = [
        f"source={{kafka: {{brokers: '{kafka.brokers}', topic: {source}, group: {group}}}}}",
        f"sink=[{{kafka: {{topic: {sink}}}}}]",
        "errors.kafka.topic=not-there",
    ]
    flags = [flag for place in places for flag in ("--set", place)]
    assert main(["check", write("model: linear.onnx\n"), "--connect", *flags]) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"source: kafka topic {source}: reached",
        f"sink: kafka topic {sink}: reached",
        'errors: kafka: topic "not-there" does not exist; create it, or correct the name',
    ]
    flags[-1] = f"errors.kafka.topic={kafka.topic()}"
    assert main(["check", write("model: linear.onnx\n"), "--connect", *flags]) == 0
    groups = AdminClient({"bootstrap.servers": kafka.brokers}).list_consumer_groups().result(10).valid
    assert group not in [found.group_id for found in groups]
