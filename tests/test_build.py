"""What the pipeline file leaves open, the model's own settings may say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inferbus.connectors.base import Misconfigured
from inferbus.models.base import InvalidModel
from inferbus.worker import build
from inferbus.worker.pipeline_file import load
from tests.tiny_models import python_model

PIPELINE = """
name: tiny
model: {path: model.py}
source: {kafka: {brokers: localhost, topic: in}}
sink: {kafka: {topic: out}}
"""


def pipeline(folder: Path, batch: str, own: str = "") -> Path:
    python_model(folder)
    with (folder / "model.yaml").open("a") as settings:
        settings.write(f"\nbatch: {batch}\n")
    (folder / "pipeline.yaml").write_text(PIPELINE + own)
    return folder / "pipeline.yaml"


def test_the_models_batch_counts_where_the_pipeline_is_silent(tmp_path: Path) -> None:
    settings = load(pipeline(tmp_path, "{max_rows: 7, max_delay: 5ms}"))
    limits = build.limits(settings, build.artefact(settings))
    assert (limits.max_rows, limits.max_delay) == (7, 0.005)


def test_the_pipeline_file_has_the_last_word(tmp_path: Path) -> None:
    settings = load(pipeline(tmp_path, "{max_rows: 7, max_delay: 5ms}", "batch: {max_rows: 9}"))
    limits = build.limits(settings, build.artefact(settings))
    assert (limits.max_rows, limits.max_delay) == (9, 0.005)


def test_a_wrong_batch_in_the_model_is_an_invalid_model_that_names_it(tmp_path: Path) -> None:
    settings = load(pipeline(tmp_path, "{max_delay: soon}"))
    with pytest.raises(InvalidModel, match=r"model\.yaml: batch\.max_delay: expected a number and its unit"):
        build.limits(settings, build.artefact(settings))


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("kafka", "confluent_kafka", "kafka"), ("rabbitmq", "pika", "rabbitmq"), ("sqs", "aiobotocore", "aws"),
     ("s3", "aiobotocore", "aws"), ("s3_files", "aiobotocore", "aws")],
)  # fmt: skip
def test_a_library_that_is_missing_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str, extra: str
) -> None:
    for loaded in list(sys.modules):
        if loaded.startswith(("inferbus.connectors.", f"{library}.")):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Misconfigured, match=rf"the client is not installed: pip install 'inferbus\[{extra}\]'"):
        build.client(name)


def test_a_job_on_tables_names_the_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pipeline(tmp_path, "{}")
    to_tables = {"{kafka: {brokers: localhost, topic: in}}": "{file: {path: in, format: parquet}}",
                 "{kafka: {topic: out}}": "{file: {path: out}}"}  # fmt: skip
    for old, new in to_tables.items():
        file.write_text(file.read_text().replace(old, new))
    settings = load(file)
    for loaded in [name for name in sys.modules if name.startswith("pyarrow.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Misconfigured, match=r"its library is not installed: pip install 'inferbus\[parquet\]'$"):
        build.source(settings, settings.source.place)
