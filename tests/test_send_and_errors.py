import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from inferbus.connectors.base import Message, Unavailable
from inferbus.connectors.kafka_tools import KafkaPublisher, KafkaReader
from inferbus.worker import errors
from inferbus.worker.cli import main
from inferbus.worker.pipeline_file import load
from tests.servers import Kafka

pytestmark = pytest.mark.broker

Headers = list[tuple[str, bytes]]


class Bench:
    """A pipeline file whose topics are there, and hands to write and read them with."""

    def __init__(self, kafka: Kafka, folder: Path) -> None:
        self.brokers = kafka.brokers
        self.source, self.sink, self.errors = kafka.topic(), kafka.topic(), kafka.topic()
        self.producer = Producer({"bootstrap.servers": kafka.brokers})
        self.file = str(folder / "p.yaml")
        Path(self.file).write_text(
            f"""
            name: bench
            model: none.onnx
            source: {{kafka: {{brokers: "{kafka.brokers}", topic: {self.source}}}}}
            sink: {{kafka: {{topic: {self.sink}}}}}
            errors: {{kafka: {{topic: {self.errors}}}}}
            """
        )

    def write(self, topic: str, body: bytes, headers: Headers, key: bytes | None = None) -> None:
        self.producer.produce(topic, body, key, headers=[*headers])
        assert self.producer.flush(10) == 0

    def fail(self, id_: str, code: str = "model_error", headers: Headers | None = None, **error: Any) -> None:
        """Write an error record as a worker does."""
        said = {
            "id": id_,
            "code": code,
            "message": f"why {id_}",
            "stage": "predict",
            "source": f"kafka:{self.source}/0/7",
            "attempts": 1,
            "model": "m@1",
            "time": 1_700_000_000.0,
            **error,
        }
        own = headers or []
        body = b"" if "body" in error else f"body of {id_}".encode()
        self.write(self.errors, body, [*own, ("inferbus-error", json.dumps(said).encode())], b"key")

    def taken(self, topic: str) -> list[tuple[bytes | None, bytes, Headers]]:
        """Key, body and headers of all that is in a topic."""
        return [(m.key(), m.value() or b"", m.headers() or []) for m in self._all(topic)]

    def _all(self, topic: str) -> Iterator[Any]:
        consumer = Consumer({"bootstrap.servers": self.brokers, "group.id": "none"})
        try:
            for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
                low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
                consumer.assign([TopicPartition(topic, partition, low)])
                for _ in range(low, high):
                    message = consumer.poll(10)
                    assert message is not None
                    assert message.error() is None
                    yield message
        finally:
            consumer.close()


@pytest.fixture
def bench(kafka: Kafka, tmp_path: Path) -> Bench:
    return Bench(kafka, tmp_path)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], str]:
    def rows(text: str) -> str:
        (tmp_path / "rows.jsonl").write_bytes(text.encode())
        return str(tmp_path / "rows.jsonl")

    return rows


# send


def test_each_line_is_published_as_one_request_with_an_id_of_its_own(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows('{"x": 1}\n\n  \n{"id": "", "x": 2}\r\n{"id": 3}\n[]\nno JSON')
    assert main(["send", bench.file, "--file", file]) == 0
    taken = bench.taken(bench.source)
    assert sorted(body for _, body, _ in taken) == [b"[]", b"no JSON", b'{"id": "", "x": 2}', b'{"id": 3}', b'{"x": 1}']
    assert {key for key, _, _ in taken} == {None}
    assert len({uuid.UUID(dict(headers)["inferbus-id"].decode()) for _, _, headers in taken}) == 5
    assert capsys.readouterr().err == f"inferbus: 5 requests published to topic {bench.source}\n"


def test_a_request_is_called_by_the_id_in_its_body(bench: Bench, rows: Callable[[str], str]) -> None:
    file = rows('{"id": "own", "inputs": []}\n{"id": "größer", "inputs": []}\n')
    assert main(["send", bench.file, "--file", file]) == 0
    ids = {dict(headers)["inferbus-id"].decode() for _, _, headers in bench.taken(bench.source)}
    assert ids == {"own", "größer"}


def test_an_input_called_id_is_no_id(bench: Bench, rows: Callable[[str], str]) -> None:
    file = rows('{"id": "a customer, say"}\n')
    assert main(["send", bench.file, "--file", file, "--set", "requests.format=json"]) == 0
    ((_, _, headers),) = bench.taken(bench.source)
    assert len(uuid.UUID(dict(headers)["inferbus-id"].decode()).bytes) == 16


def test_an_empty_file_is_told_as_no_requests(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    for wait in ([], ["--wait"]):
        assert main(["send", bench.file, "--file", rows(""), *wait]) == 0
        assert capsys.readouterr() == ("", f"inferbus: 0 requests published to topic {bench.source}\n")


def test_a_line_that_is_no_text_is_named_before_anything_is_published(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latin1.jsonl"
    file.write_bytes(b'{}\n\n{"x": "\xe9"}\n')
    for form in ("v2", "json", "text"):
        assert main(["send", bench.file, "--file", str(file), "--set", f"requests.format={form}"]) == 1
        told = f"inferbus: {file}:3: is not text in UTF-8, as requests.format {form} is\n"
        assert capsys.readouterr().err == told
    assert bench.taken(bench.source) == []
    assert main(["send", bench.file, "--file", str(file), "--set", "requests.format=raw"]) == 0
    assert len(bench.taken(bench.source)) == 2


def test_the_lines_of_a_pipe_are_sent_though_they_can_be_read_only_once(bench: Bench, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"1\n2\n",))
    writer.start()
    assert main(["send", bench.file, "--file", str(pipe)]) == 0
    writer.join()
    assert sorted(body for _, body, _ in bench.taken(bench.source)) == [b"1", b"2"]


def answer(bench: Bench, count: int) -> None:
    """What a worker does, in a few lines: the first half of the requests fail."""
    with KafkaReader(bench.source, "answer", {"bootstrap.servers": bench.brokers}) as reader:
        seen: list[Message] = []
        while len(seen) < count:
            seen += reader.read(0.1)
    for i, message in enumerate(seen):
        if i < count // 2:
            bench.fail(message.id)
        else:
            body = b"\xff\xfe" if i == count - 1 else b'{"outputs": []}'
            bench.write(bench.sink, body, [("inferbus-id", message.id.encode()), ("inferbus-status", b"ok")])


def test_wait_prints_the_outcome_of_each_request_and_of_no_other(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(bench.sink, b"{}", [("inferbus-id", b"someone else's, before")])
    worker = threading.Thread(target=answer, args=(bench, 5))
    watcher = threading.Thread(target=answer_to_nobody, args=(bench,))
    worker.start()
    watcher.start()
    code = main(["send", bench.file, "--file", rows('{"x": 1}\n' * 5), "--wait"])
    worker.join()
    watcher.join()
    assert code == 0
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = {dict(headers)["inferbus-id"].decode() for _, _, headers in bench.taken(bench.source)}
    assert {outcome["id"] for outcome in outcomes} == ids
    assert len(outcomes) == 5
    failed = [outcome for outcome in outcomes if outcome["status"] == "error"]
    assert [(o["error"]["code"], o["error"]["id"]) for o in failed] == [("model_error", o["id"]) for o in failed]
    fine = [outcome["outcome"] for outcome in outcomes if outcome["status"] == "ok"]
    assert sorted(fine, key=str) == [{"base64": "//4="}, {"outputs": []}, {"outputs": []}]


def test_wait_waits_for_each_of_the_requests_that_share_an_id(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    worker = threading.Thread(target=answer, args=(bench, 3))
    worker.start()
    code = main(["send", bench.file, "--file", rows('{"id": "twice"}\n{"id": "once"}\n{"id": "twice"}\n'), "--wait"])
    worker.join()
    captured = capsys.readouterr()
    assert code == 0
    assert sorted(json.loads(line)["id"] for line in captured.out.splitlines()) == ["once", "twice", "twice"]
    assert captured.err == f"inferbus: 3 requests published to topic {bench.source}\n"


def answer_to_nobody(bench: Bench) -> None:
    bench.write(bench.sink, b"{}", [("inferbus-id", b"someone else's, meanwhile")])
    bench.write(bench.errors, b"{}", [])


def test_outcomes_that_do_not_come_are_counted_and_exit_3(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows('{"x": 1}\n{"x": 2}\n')
    assert main(["send", bench.file, "--file", file, "--wait", "--timeout", "0.2"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"inferbus: 2 requests published to topic {bench.source}",
        "inferbus: 2 requests without an outcome after 0.2 s; is a worker running?",
    ]


def test_a_file_that_is_not_there_and_a_topic_that_is_not_there_are_named(
    bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["send", bench.file, "--file", "gone.jsonl"]) == 1
    assert capsys.readouterr().err == "inferbus: gone.jsonl: cannot be read: No such file or directory\n"
    assert main(["send", bench.file, "--file", rows("{}"), "--set", "source.kafka.topic=gone"]) == 3
    assert 'topic "gone" does not exist' in capsys.readouterr().err


def test_a_request_larger_than_the_topic_takes_is_the_users_to_mend(
    kafka: Kafka, bench: Bench, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = kafka.topic(**{"max.message.bytes": 1000})
    file = rows("1" * 2000)
    assert main(["send", bench.file, "--file", file, "--set", f"source.kafka.topic={small}"]) == 1
    assert "a request is larger than the source takes" in capsys.readouterr().err


# errors list and show


def test_error_records_are_listed_as_a_table(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fail("a")
    bench.write(bench.errors, b"no error record", [])
    bench.write(bench.errors, b"nor this", [("inferbus-error", b"{")])
    assert main(["errors", "list", bench.file]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "code", "stage", "time", "source", "message"]
    (row,) = rows
    assert row.split() == [
        "a",
        "model_error",
        "predict",
        "2023-11-14T22:13:20Z",
        f"kafka:{bench.source}/0/7",
        "why",
        "a",
    ]


def test_error_records_are_chosen_by_code_stage_time_and_number(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    bench.fail("a", "invalid_request", stage="decode", time=now - 7200)
    bench.fail("b", "expired", stage="predict", time=now)
    bench.fail("c", "model_error", stage="predict", time=now)

    def listed(*flags: str) -> set[str]:
        assert main(["errors", "list", bench.file, "--json", *flags]) == 0
        return {json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()}

    assert listed() == {"a", "b", "c"}
    assert listed("--code", "expired") == {"b"}
    assert listed("--code", "expired", "--code", "invalid_request") == {"a", "b"}
    assert listed("--stage", "predict") == {"b", "c"}
    assert listed("--since", "1h") == {"b", "c"}
    assert listed("--since", "1970-01-01T00:00:00Z") == {"a", "b", "c"}
    assert listed("--since", "2100-01-01") == set()
    assert len(listed("--limit", "2")) == 2


def test_what_a_requester_wrote_does_not_steer_the_terminal(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fail("a\x1b[2J", message="x\r\n\x9b1m")
    assert main(["errors", "list", bench.file]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[2J" in out
    assert "x\\x0d\\x0a\\x9b1m" in out


def test_a_record_is_shown_whole_and_bytes_that_are_no_text_in_base64(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fail("a")
    bench.fail("b", headers=[("h", b"1"), ("h", b"\xff")])
    assert main(["errors", "show", bench.file, "b"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["error"].pop("message") == "why b"
    assert shown | {"error": None} == {
        "id": "b",
        "key": "key",
        "headers": [["h", "1"], ["h", {"base64": "/w=="}]],
        "error": None,
        "body": "body of b",
    }


def test_an_id_without_an_error_record_is_the_users_mistake(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["errors", "show", bench.file, "gone"]) == 1
    assert capsys.readouterr().err == f"inferbus: no error record of a request 'gone' in topic {bench.errors}\n"


# errors replay


def test_a_replay_publishes_key_body_and_headers_again_and_keeps_the_id(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fail("a", headers=[("inferbus-id", b"a"), ("x", b"1"), ("x", b"2")])
    bench.fail("no-id-of-its-own")
    assert main(["errors", "replay", bench.file]) == 0
    assert capsys.readouterr().out == "2 replayed\n"
    assert sorted(bench.taken(bench.source)) == [
        (b"key", b"body of a", [("inferbus-id", b"a"), ("x", b"1"), ("x", b"2"), ("inferbus-replays", b"1")]),
        (
            b"key",
            b"body of no-id-of-its-own",
            [("inferbus-id", b"no-id-of-its-own"), ("inferbus-replays", b"1")],
        ),
    ]


def test_a_replay_leaves_what_has_no_body_and_what_was_replayed_enough(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fail("large", body="omitted")
    bench.fail("often", headers=[("inferbus-replays", b"3")])
    bench.fail("twice", headers=[("inferbus-replays", b"2")])
    bench.fail("forged", headers=[("inferbus-replays", b"9" * 9999)])
    assert main(["errors", "replay", bench.file]) == 0
    assert capsys.readouterr().out == (
        "2 replayed; 1 left, for their records were too large to keep the body; "
        "1 left, for they were replayed enough (--max-replays 3)\n"
    )
    taken = {body: dict(headers)["inferbus-replays"] for _, body, headers in bench.taken(bench.source)}
    assert taken == {b"body of twice": b"3", b"body of forged": b"1"}


def test_a_request_with_several_records_is_replayed_once_and_as_often_as_its_newest_says(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    for replays in (0, 2, 1):
        # The count decides: clocks of workers may differ.
        own = [("inferbus-id", b"a"), *([("inferbus-replays", b"%d" % replays)] if replays else [])]
        bench.fail("a", headers=own, time=1_700_000_000.0 - replays)
    for i in (1, 3, 2):
        bench.fail("b", headers=[("inferbus-id", b"b"), ("attempt", b"%d" % i)], time=1_700_000_000.0 + i)
    for flags in (["--dry-run"], []):
        assert main(["errors", "replay", bench.file, *flags]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("2 ")
    assert sorted(headers for _, _, headers in bench.taken(bench.source)) == [
        [("inferbus-id", b"a"), ("inferbus-replays", b"3")],
        [("inferbus-id", b"b"), ("attempt", b"3"), ("inferbus-replays", b"1")],
    ]


def test_a_request_that_always_fails_is_replayed_three_times_by_however_many_commands(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fail("a", headers=[("inferbus-id", b"a")])
    for i in range(5):
        assert main(["errors", "replay", bench.file]) == 0
        for _, _, headers in bench.taken(bench.source)[i:]:
            bench.fail("a", headers=headers, time=1_700_000_001.0 + i)
    assert len(bench.taken(bench.source)) == 3
    assert (
        capsys.readouterr().out.splitlines()[3:]
        == ["0 replayed; 1 left, for they were replayed enough (--max-replays 3)"] * 2
    )


def test_only_the_newest_record_of_a_request_says_whether_it_is_meant(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fail("a", "model_error")
    bench.fail("a", "invalid_request", headers=[("inferbus-replays", b"1")])
    assert main(["errors", "replay", bench.file, "--code", "model_error"]) == 0
    assert main(["errors", "replay", bench.file, "--code", "invalid_request"]) == 0
    assert capsys.readouterr().out == "0 replayed\n1 replayed\n"


def test_a_request_whose_deadline_has_passed_is_left(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    soon = int(time.time() * 1000) + 3_600_000
    bench.fail("past", "expired", headers=[("inferbus-deadline-ms", b"1700000000000")])
    bench.fail("ahead", "model_error", headers=[("inferbus-deadline-ms", b"%d" % soon)])
    bench.fail("relative", "expired", headers=[("inferbus-timeout-ms", b"5")])
    assert main(["errors", "replay", bench.file]) == 0
    assert capsys.readouterr().out == "2 replayed; 1 left, for their deadlines (inferbus-deadline-ms) have passed\n"
    assert {body for _, body, _ in bench.taken(bench.source)} == {b"body of ahead", b"body of relative"}


def test_a_dry_run_says_what_it_would_replay_and_publishes_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    for id_ in ("a", "b", "c"):
        bench.fail(id_)
    assert main(["errors", "replay", bench.file, "--id", "a", "--id", "c", "--dry-run"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert {row.split()[0] for row in rows} == {"a", "c"}
    assert last == "2 would be replayed"
    assert bench.taken(bench.source) == []


def test_a_replay_keeps_to_its_rate(bench: Bench) -> None:
    for id_ in ("a", "b", "c"):
        bench.fail(id_)
    slept: list[float] = []
    now = [100.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    errors.replay(load(bench.file), errors.Choice(), rate=10.0, clock=lambda: now[0], sleep=sleep)
    assert slept == pytest.approx([0.0, 0.1, 0.1])
    assert len(bench.taken(bench.source)) == 3


# The reader and the publisher


def test_a_reader_reads_to_the_end_it_saw_and_no_further(bench: Bench) -> None:
    for i in range(50):
        bench.producer.produce(bench.source, str(i).encode())
    bench.producer.flush(10)
    with KafkaReader(bench.source, "g", {"bootstrap.servers": bench.brokers}) as reader:
        bench.write(bench.source, b"late", [])
        assert sorted(int(m.body) for m in reader.to_end()) == list(range(50))


def test_a_reader_passes_transaction_markers_at_the_end(bench: Bench) -> None:
    producer = Producer({"bootstrap.servers": bench.brokers, "transactional.id": bench.source})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(bench.source, b"x")
    producer.commit_transaction(30)
    until = time.monotonic() + 30
    read: list[bytes] = []
    while not read and time.monotonic() < until:  # the marker is written a moment after the commit returns
        with KafkaReader(bench.source, "g", {"bootstrap.servers": bench.brokers}) as reader:
            read = [m.body for m in reader.to_end()]
    assert read == [b"x"]


def test_an_empty_topic_is_read_to_its_end_at_once(bench: Bench) -> None:
    with KafkaReader(bench.source, "g", {"bootstrap.servers": bench.brokers}) as reader:
        assert list(reader.to_end()) == []


def test_a_cluster_that_is_not_there_is_told_in_one_line(free_port_brokers: str) -> None:
    with pytest.raises(Unavailable, match="no broker answered within 5 s"):  # noqa: SIM117
        with KafkaPublisher("t", {"bootstrap.servers": free_port_brokers}):
            pytest.fail("it opened")


@pytest.fixture
def free_port_brokers() -> str:
    return "127.0.0.1:1"  # tcpmux: nothing has listened there for decades
