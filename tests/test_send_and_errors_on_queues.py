"""`send`, `errors` and `check --connect` where places are queues: what is read there goes back."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferbus.worker import access
from inferbus.worker.cli import main
from inferbus.worker.pipeline_file import load
from tests import tiny_models

pytestmark = pytest.mark.broker


@pytest.fixture(params=["rabbitmq", "sqs"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline file on that bus."""
    server = request.getfixturevalue(request.param)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "inferbus")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "inferbus")
    monkeypatch.chdir(tmp_path)
    source, sink, errors = (server.queue() for _ in range(3))
    if request.param == "rabbitmq":
        places = [{"url": server.url, "queue": source}, {"routing_key": sink}, {"routing_key": errors}]
    else:
        places = [
            {"queue": source, "region": server.region, "endpoint_url": server.url},
            {"queue": sink},
            {"queue": errors},
        ]
    tiny_models.python_model(tmp_path)
    named = {"source": places[0], "sink": places[1], "errors": places[2]}
    wanted = {use: {request.param: place} for use, place in named.items()}
    (tmp_path / "p.yaml").write_bytes(orjson.dumps({"name": "p", "model": "model.py", "http": None, **wanted}))
    return tmp_path / "p.yaml"


def held(file: Path, use: str) -> list[Any]:
    """What lies in a place, looked at as `errors` does."""
    settings = load(file, environ=dict(os.environ))
    place = settings.source.place if use == "source" else settings.errors[0].place
    with access.reader(settings, place) as reader:
        return list(reader.to_end())


def test_lines_are_sent_as_requests_with_their_ids(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"id": "a", "inputs": []}\n\n{"inputs": []}\n')
    assert main(["send", "p.yaml", "--file", "rows.jsonl"]) == 0
    assert "2 requests published to queue" in capsys.readouterr().err
    found = {m.id: m.body for m in held(pipeline, "source")}
    assert len(found) == 2
    assert found["a"] == b'{"id": "a", "inputs": []}'
    assert {m.id for m in held(pipeline, "source")} == set(found)  # looking takes nothing away


def test_outcomes_are_awaited_on_queues_only_where_replies_are_allowed(pipeline: Path, capsys: Any) -> None:
    Path("rows.jsonl").write_text('{"inputs": []}\n')
    assert main(["send", "p.yaml", "--file", "rows.jsonl", "--wait"]) == 1
    assert "--wait: outcomes are awaited as replies here, and replies.allow does not allow" in capsys.readouterr().err
    assert held(pipeline, "source") == []


def test_error_records_are_listed_shown_and_replayed_once_each(pipeline: Path, capsys: Any) -> None:
    settings = load(pipeline, environ=dict(os.environ))
    ids = [f"r-{i}-{uuid.uuid4().hex[:4]}" for i in range(3)]
    with access.publisher(settings.errors[0].place) as publisher:
        for id_ in (*ids, ids[0]):
            error = {"id": id_, "code": "model_error", "message": "m", "stage": "predict", "source": "s",
                     "attempts": 1, "model": "m@1", "time": 1.5}  # fmt: skip
            headers = (("inferbus-id", id_.encode()), ("inferbus-error", orjson.dumps(error)))
            publisher.publish(b"body of " + id_.encode(), b"k", headers)
        publisher.finish()
    assert main(["errors", "list", "p.yaml", "--json"]) == 0
    listed = [orjson.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(listed) == sorted([*ids, ids[0]])
    assert main(["errors", "show", "p.yaml", ids[1]]) == 0
    assert orjson.loads(capsys.readouterr().out)["body"] == f"body of {ids[1]}"
    assert main(["errors", "replay", "p.yaml"]) == 0
    assert capsys.readouterr().out == "3 replayed\n"
    replayed = held(pipeline, "source")
    assert sorted(m.id for m in replayed) == sorted(ids)
    assert {m.body for m in replayed} == {f"body of {id_}".encode() for id_ in ids}
    assert {m.key for m in replayed} == {b"k"}
    assert len(held(pipeline, "errors")) == 4


def test_every_place_is_reached_or_the_one_that_is_not_is_named(pipeline: Path, capsys: Any) -> None:
    del pipeline
    assert main(["check", "p.yaml", "--connect"]) == 0
    told = capsys.readouterr().err
    assert [line.partition(":")[0] for line in told.splitlines()] == ["source", "sink", "errors"]
    assert all(line.endswith(": reached") for line in told.splitlines())
    kind = "rabbitmq" if "rabbitmq" in told else "sqs"
    key = "routing_key" if kind == "rabbitmq" else "queue"
    assert main(["check", "p.yaml", "--connect", "--set", f"sink.{kind}.{key}=not-there"]) == 3
    assert "not-there" in capsys.readouterr().err
