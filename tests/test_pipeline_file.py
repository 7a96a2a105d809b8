import pickle
import re
import types
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from pydantic import BaseModel

from inferbus.connectors.settings import (
    KafkaSinkSettings,
    KafkaSourceSettings,
    seconds,
    size,
    spell_seconds,
    spell_size,
)
from inferbus.worker.pipeline_file import PipelineFileError, load, schema
from inferbus.worker.settings import PipelineSettings, Redactor, SinkSettings, effective

GOOD = """\
name: digits
model: digits.onnx
source:
  kafka: {brokers: "localhost:9092", topic: digits.requests}
sink:
  kafka: {topic: digits.predictions}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "p.yaml") -> Path:
        Path(name).write_text(text)
        return Path(name)

    return write


@pytest.fixture
def problems(write: Any) -> Any:
    """What is wrong with a file: each problem a line."""

    def problems(text: str, *overrides: str, **environ: str) -> list[str]:
        with pytest.raises(PipelineFileError) as caught:
            load(write(text), overrides, environ)
        return list(caught.value.problems)

    return problems


def source_of(settings: PipelineSettings) -> KafkaSourceSettings:
    assert settings.source.kafka is not None
    return settings.source.kafka


def sink_of(place: SinkSettings) -> KafkaSinkSettings:
    assert place.kafka is not None
    return place.kafka


# What a file means


def test_the_shortest_file_has_every_default(write: Any) -> None:
    settings = load(write(GOOD))
    assert settings.model.path == Path("digits.onnx")
    assert settings.requests.format == "v2"
    assert (settings.batch.max_rows, settings.batch.max_delay, settings.batch.max_bytes) == (
        256,
        0.0,
        64 * 2**20,
    )
    assert (settings.flow.max_inflight, settings.flow.max_inflight_bytes) == (8192, 256 * 2**20)
    assert (settings.flow.max_message_bytes, settings.flow.max_resident) == (16 * 2**20, None)
    assert (settings.delivery, settings.order, settings.non_finite) == ("at-least-once", "none", "error")
    assert (settings.drain, settings.retry.start, settings.retry.bounded) == (20.0, 30.0, 300.0)
    assert settings.retry.max_backoff == 10.0
    assert settings.http is not None
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8080)


def test_what_is_not_said_of_the_bus_comes_from_the_name_and_the_source(write: Any) -> None:
    settings = load(
        write(
            """
            name: digits
            model: digits.onnx
            source: {kafka: {brokers: "a:1,b:2", topic: in, config: {client.id: me, linger.ms: 5, ssl: true}}}
            sink: {kafka: {topic: out}}
            """
        )
    )
    source, sink, errors = source_of(settings), sink_of(settings.sink[0]), sink_of(settings.errors[0])
    assert (source.group, source.start) == ("digits", "earliest")
    assert source.config == {"client.id": "me", "linger.ms": "5", "ssl": "true"}
    assert (sink.brokers, sink.config) == (source.brokers, source.config)
    assert (errors.topic, errors.brokers, errors.config) == ("digits.errors", source.brokers, source.config)


def test_what_is_said_of_a_sink_stays_even_when_it_is_empty(write: Any) -> None:
    text = GOOD.replace("topic: digits.requests}", "topic: in, config: {client.id: me}}")
    sink = sink_of(load(write(text.replace("topic: digits.predictions", "topic: out, config: {}"))).sink[0])
    assert (sink.brokers, sink.config) == ("localhost:9092", {})


def test_sink_and_errors_take_a_list(write: Any) -> None:
    text = GOOD.replace(
        "sink:\n  kafka: {topic: digits.predictions}",
        "sink: [{kafka: {topic: a}}, {kafka: {topic: b, brokers: h:1}}]\nerrors: [{kafka: {topic: c}}]",
    )
    settings = load(write(text))
    assert [(sink_of(s).topic, sink_of(s).brokers) for s in settings.sink] == [
        ("a", "localhost:9092"),
        ("b", "h:1"),
    ]
    assert [sink_of(s).topic for s in settings.errors] == ["c"]


@pytest.mark.parametrize(
    ("written", "path", "name"),
    [
        ("digits.onnx", "conf/digits.onnx", None),
        ("../m/digits.onnx", "conf/../m/digits.onnx", None),
        ("/abs/digits.onnx", "/abs/digits.onnx", None),
        ("models/digits", "conf/models/digits", None),
        ("digits", None, "digits"),
        ("digits@3", None, "digits@3"),
        ("digits@live", None, "digits@live"),
        (
            "{path: digits.onnx, device: 'cuda:0', replicas: 2, options: {threads: 4}}",
            "conf/digits.onnx",
            None,
        ),
        ("{name: digits@1.5, executor: onnxruntime}", None, "digits@1.5"),
    ],
)
def test_a_model_is_a_file_beside_the_pipeline_file_or_a_name(
    write: Any, written: str, path: str | None, name: str | None
) -> None:
    Path("conf").mkdir(exist_ok=True)
    text = GOOD.replace("model: digits.onnx", f"model: {written}\nrepository: models")
    settings = load(write(text, "conf/p.yaml"))
    assert settings.model.path == (None if path is None else Path(path))
    assert settings.model.name == name
    assert settings.repository == Path("conf/models")


def test_librdkafka_is_given_numbers_as_they_are_written(write: Any) -> None:
    text = GOOD.replace(
        "topic: digits.requests}",
        "topic: in, config: {sasl.password: 0123, a: 1_000, b: 1.10, c: 1:30, d: True}}",
    )
    config = source_of(load(write(text), ["source.kafka.config.e=0123"])).config
    assert config == {
        "sasl.password": "0123",
        "a": "1_000",
        "b": "1.10",
        "c": "1:30",
        "d": "true",
        "e": "0123",
    }


def test_http_can_be_turned_off(write: Any) -> None:
    assert load(write(GOOD + "http: null\n")).http is None


def test_anchors_and_merge_keys_work_and_own_keys_win(write: Any) -> None:
    settings = load(
        write(
            """
            name: digits
            model: digits.onnx
            source: {kafka: &cluster {brokers: "a:1", topic: in, config: {client.id: me}}}
            sink: {kafka: {<<: {brokers: "b:2", topic: never}, topic: out}}
            """
        )
    )
    assert (sink_of(settings.sink[0]).brokers, sink_of(settings.sink[0]).topic) == ("b:2", "out")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("250ms", 0.25),
        ("5s", 5.0),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("0ms", 0.0),
        (0, 0.0),
        ("0", 0.0),
    ],
)
def test_durations_become_seconds(text: object, value: float) -> None:
    assert seconds(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text", [5, 5.0, "5", "5 s", "-5s", "5d", "", None, True, "s", "1e3s", [], float("nan")])
def test_a_duration_without_a_unit_we_know_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a number and its unit, such as 250ms, 5s, 2m or 1h"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512B", 512), ("64KiB", 65536), ("16MiB", 2**24), ("1GiB", 2**30), (4096, 4096), ("4096", 4096)],
)
def test_sizes_become_bytes(text: object, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["64MB", "64 MiB", "1.5GiB", 1.5, -1, 0, "0B", "", None, True, "KiB", []])
def test_a_size_that_is_none_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        size(text)


@given(st.integers(0, 10**9).map(lambda ms: ms / 1000))
def test_a_duration_reads_back_as_it_was_spelled(value: float) -> None:
    assert seconds(spell_seconds(value)) == pytest.approx(value, abs=1e-9)


@given(st.integers(1, 2**50))
def test_a_size_reads_back_as_it_was_spelled(value: int) -> None:
    assert size(spell_size(value)) == value


# Overrides


def test_overrides_win_over_the_file_and_later_ones_over_earlier(write: Any) -> None:
    settings = load(
        write(GOOD),
        [
            "batch.max_rows=7",
            "batch.max_rows=8",
            "http.port=0",
            "source.kafka.brokers=other:9092",
            "source.kafka.config.sasl.password=pw",
            "source.kafka.config.linger.ms=3",
            "drain=1s",
            "requests={format: raw}",
        ],
    )
    assert settings.batch.max_rows == 8
    assert settings.http is not None
    assert settings.http.port == 0
    assert source_of(settings).brokers == "other:9092"
    assert source_of(settings).config == {"sasl.password": "pw", "linger.ms": "3"}
    assert settings.drain == 1.0
    assert settings.requests.format == "raw"


def test_an_override_reaches_into_a_list_by_position(write: Any) -> None:
    text = GOOD.replace("sink:\n  kafka: {topic: digits.predictions}", "sink: [{kafka: {topic: a}}]")
    assert sink_of(load(write(text), ["sink.0.kafka.topic=b"]).sink[0]).topic == "b"


@pytest.mark.parametrize(
    "written", ["sink: {kafka: {topic: a}}", "sink: [{kafka: {topic: a}}]", "sink: {kafka: {topic: a}}\nerrors:"]
)
def test_position_0_is_also_the_only_place_where_there_is_no_list(write: Any, written: str) -> None:
    text = GOOD.replace("sink:\n  kafka: {topic: digits.predictions}", written)
    settings = load(write(text), ["sink.0.kafka.topic=b", "errors.0={kafka: {topic: c}}"])
    assert [sink_of(place).topic for place in (*settings.sink, *settings.errors)] == ["b", "c"]


@pytest.mark.parametrize(
    ("written", "path", "name"),
    [
        ("digits.onnx", "digits.onnx", None),
        ("digits@3", None, "digits@3"),
        ("${FILE}", "m/digits.onnx", None),
        ("${NAME}@${VERSION:-7}", None, "digits@7"),
    ],
)
def test_an_override_reaches_into_a_model_in_its_short_form(
    write: Any, written: str, path: str | None, name: str | None
) -> None:
    text = GOOD.replace("model: digits.onnx", f"model: {written}\nrepository: models")
    environ = {"FILE": "m/digits.onnx", "NAME": "digits"}
    model = load(write(text), ["model.replicas=2", "model.device=cuda"], environ).model
    assert (model.replicas, model.device) == (2, "cuda")
    assert (model.path, model.name) == (None if path is None else Path(path), name)


def test_an_override_of_the_path_replaces_a_model_in_its_short_form(write: Any) -> None:
    assert load(write(GOOD), ["model=a.onnx", "model.path=b.onnx"]).model.path == Path("b.onnx")


def test_an_override_beside_a_short_model_that_is_wrong_tells_it_once(problems: Any) -> None:
    assert problems(GOOD.replace("digits.onnx", "${FILE}"), "model.replicas=2") == [
        "p.yaml:2: model.name: the variable FILE is not set; set it, or write ${FILE:-default}"
    ]


def test_an_override_replaces_null_by_a_mapping(write: Any) -> None:
    settings = load(write(GOOD + "http: null\n"), ["http.port=1"])
    assert settings.http is not None
    assert settings.http.port == 1


def test_a_wrong_override_is_named_in_place_of_file_and_line(problems: Any) -> None:
    assert problems(GOOD, "batch.max_rows=x", "batch.max_row=3", "name.path=a.onnx", "sink.kafka={topik: x}") == [
        "--set batch.max_row: unknown key; did you mean max_rows?",
        "--set batch.max_rows: expected a whole number, got 'x'",
        "--set name.path: cannot be set: name is no mapping in the file",
        "--set sink.kafka: sink.kafka.topic: is missing; expected: Topic the records are written to. It must exist.",
        "--set sink.kafka: sink.kafka.topik: unknown key; did you mean topic?",
    ]


@pytest.mark.parametrize("override", ["batch.max_rows", "=3", "batch.=3", ".x=3"])
def test_an_override_that_is_none_says_what_one_looks_like(problems: Any, override: str) -> None:
    (problem,) = problems(GOOD, override)
    assert problem == f"--set {override.partition('=')[0]}: expected a.b=value"


def test_an_override_outside_a_list_says_how_long_the_list_is(problems: Any) -> None:
    text = GOOD.replace("sink:\n  kafka: {topic: digits.predictions}", "sink: [{kafka: {topic: a}}]")
    assert problems(text, "sink.1.kafka.topic=b") == [
        "--set sink.1.kafka.topic: sink.1: cannot be set: sink is a list of 1 in the file"
    ]


# Variables


def test_variables_are_expanded_in_values(write: Any, tmp_path: Path) -> None:
    (tmp_path / "topic.txt").write_text("from-a-file\n")
    text = f"""
        name: digits
        model: ${{DIR}}/digits.onnx
        batch: {{max_rows: "${{ROWS:-64}}", max_delay: "${{DELAY:-5}}ms"}}
        source: {{kafka: {{brokers: "${{HOST}}:${{PORT:-9092}}", topic: "${{EMPTY:-in}}",
                           config: {{client.id: "a$$b$${{C}}"}}}}}}
        sink: {{kafka: {{topic: "${{file:{tmp_path}/topic.txt}}"}}}}
        errors: {{kafka: {{topic: "${{file:topic.txt}}.errors"}}}}
        """
    settings = load(write(text), environ={"DIR": "m", "HOST": "h", "EMPTY": ""})
    assert settings.model.path == Path("m/digits.onnx")
    assert (settings.batch.max_rows, settings.batch.max_delay) == (64, 0.005)
    assert (source_of(settings).brokers, source_of(settings).topic) == ("h:9092", "in")
    assert source_of(settings).config == {"client.id": "a$b${C}"}
    assert sink_of(settings.sink[0]).topic == "from-a-file"
    assert sink_of(settings.errors[0]).topic == "from-a-file.errors"


def test_variables_are_expanded_in_overrides_too(write: Any) -> None:
    assert load(write(GOOD), ["drain=${WAIT}"], {"WAIT": "3s"}).drain == 3.0


def test_a_variable_that_has_no_value_is_named_with_its_line(problems: Any) -> None:
    text = GOOD + "drain: ${WAIT}\nretry:\n  start: ${file:gone}\n  bounded: ${1x}\n  max_backoff: ${OPEN\n"
    assert problems(text, "order=${ORDER}") == [
        "p.yaml:7: drain: the variable WAIT is not set; set it, or write ${WAIT:-default}",
        "p.yaml:9: retry.start: ${file:gone} cannot be read: No such file or directory",
        "p.yaml:10: retry.bounded: expected ${VAR}, ${VAR:-default} or ${file:/path}; a plain $ is written $$",
        "p.yaml:11: retry.max_backoff: expected ${VAR}, ${VAR:-default} or ${file:/path}; a plain $ is written $$",
        "--set order: the variable ORDER is not set; set it, or write ${ORDER:-default}",
    ]


def test_a_secret_that_cannot_be_read_is_told_with_its_path(problems: Any) -> None:
    text = GOOD.replace("requests}", "requests, config: {sasl.password: 'hunter2-${file:/nope/password}'}}")
    (problem,) = problems(text)
    assert problem.endswith(": ${file:/nope/password} cannot be read: No such file or directory")


# Mistakes


@pytest.mark.parametrize("brokers", ["h:port", "a:1, h:port", "h:", "h:0", "h:65536", "ssl://h:port", "[::1]:port"])
def test_an_address_whose_port_is_no_number_is_named(problems: Any, brokers: str) -> None:
    port = brokers.rpartition(":")[2]
    address = brokers.rpartition(", ")[2]
    assert problems(GOOD.replace("localhost:9092", brokers)) == [
        f"p.yaml:4: source.kafka.brokers: {port!r} in {address!r} is no port; expected host:port"
    ]
    told = problems(GOOD, f"sink.kafka.brokers='{brokers}'")
    assert told == [f"--set sink.kafka.brokers: {port!r} in {address!r} is no port; expected host:port"]


@pytest.mark.parametrize("brokers", ["h", "h:1,g:65535", "[::1]:9092", "[::1]", "SASL_SSL://h:9092", "ssl://h"])
def test_an_address_needs_no_port_and_may_have_a_protocol(write: Any, brokers: str) -> None:
    assert source_of(load(write(GOOD.replace("localhost:9092", brokers)))).brokers == brokers


def test_every_mistake_is_told_at_once_with_its_line(problems: Any) -> None:
    assert problems(
        """\
name: Digits
modle: digits.onnx
model: {path: a.onnx, nam: x}
batch: {max_rows: 0, max_delay: 5, max_byte: 3}
flow:
  max_inflight: true
  max_inflight_bytes: 64MB
source:
  kafka: {brokers: 9092, topic: in, start: newest, config: [a]}
sink:
  - kafka: {topic: "a b"}
  - kafka: {brokers: "h:1"}
errors:
order: keys
order: none
http: {port: 99999}
zzz: 1
"""
    ) == [
        "p.yaml:1: name: 'Digits' is not allowed; expected 1 to 200 lower-case letters, digits or '-'",
        "p.yaml:2: modle: unknown key; did you mean model?",
        "p.yaml:3: model.nam: unknown key; did you mean name?",
        "p.yaml:4: batch.max_rows: expected at least 1, got 0",
        "p.yaml:4: batch.max_delay: expected a number and its unit, such as 250ms, 5s, 2m or 1h, got 5",
        "p.yaml:4: batch.max_byte: unknown key; did you mean max_bytes?",
        "p.yaml:6: flow.max_inflight: expected a whole number, got true",
        "p.yaml:7: flow.max_inflight_bytes: expected a size such as 512B, 64KiB, 16MiB or 1GiB, "
        "or a number of bytes, got '64MB'",
        "p.yaml:9: source.kafka.brokers: expected text, got 9092; put it in quotes",
        "p.yaml:9: source.kafka.start: expected 'earliest' or 'latest', got 'newest'",
        "p.yaml:9: source.kafka.config: expected a mapping (`key: value`), got a list",
        "p.yaml:11: sink.0.kafka.topic: 'a b' is not allowed; expected 1 to 249 letters, digits, '.', '_' or '-'",
        "p.yaml:12: sink.1.kafka.topic: is missing; expected: Topic the records are written to. It must exist.",
        "p.yaml:13: errors: expected a mapping (`key: value`), got nothing",
        "p.yaml:15: order: is written twice, first in line 14; keep one",
        "p.yaml:16: http.port: expected at most 65535, got 99999",
        "p.yaml:17: zzz: unknown key; allowed: name, model, repository, requests, batch, flow, source, sink, "
        "errors, delivery, order, drain, replies, claim_check, retry, non_finite, http",
    ]


def test_an_empty_file_is_told_what_it_must_hold(problems: Any) -> None:
    assert [re.sub(r"; expected.*", "", problem) for problem in problems("# nothing\n")] == [
        "p.yaml:1: name: is missing",
        "p.yaml:1: model: is missing",
        "p.yaml:1: source: is missing",
        "p.yaml:1: sink: is missing",
    ]


def test_what_later_releases_will_know_is_not_available_yet(problems: Any) -> None:
    assert problems(
        """\
name: digits
model: digits.onnx
requests: {format: avro}
source: {file: {path: in.jsonl}}
sink: {kafka: {topic: out, brokers: h}}
delivery: exactly-once
shadow: {candidates: {}}
"""
    ) == [
        "p.yaml:3: requests.format: avro is not available yet",
        "p.yaml:6: delivery: exactly-once is not available yet",
        "p.yaml:7: shadow: not available yet",
    ]


RABBIT = """\
name: digits
model: digits.onnx
source: {rabbitmq: {url: "amqp://me:hunter22@rabbit:5673/shop", queue: in}}
sink: {rabbitmq: {exchange: results, routing_key: digits}}
"""

SQS = """\
name: digits
model: digits.onnx
source: {sqs: {queue: in, region: eu-west-1, endpoint_url: "http://localhost:9324"}}
sink: {sqs: {queue: out.fifo}}
"""


def test_a_sink_on_the_sources_bus_has_its_server_and_errors_go_beside_the_requests(write: Any) -> None:
    settings = load(write(RABBIT))
    source, sink, errors = settings.source.rabbitmq, settings.sink[0].rabbitmq, settings.errors[0].rabbitmq
    assert source is not None
    assert sink is not None
    assert errors is not None
    assert sink.url == errors.url == source.url
    assert (errors.exchange, errors.routing_key) == ("", "digits.errors")
    settings = load(write(SQS))
    places = settings.source.sqs, settings.sink[0].sqs, settings.errors[0].sqs
    assert [place and (place.queue, place.region, place.endpoint_url) for place in places] == [
        ("in", "eu-west-1", "http://localhost:9324"),
        ("out.fifo", "eu-west-1", "http://localhost:9324"),
        ("digits-errors", "eu-west-1", "http://localhost:9324"),
    ]


def test_a_sink_on_another_bus_than_the_source_says_itself_where_that_is(problems: Any, write: Any) -> None:
    text = SQS.replace("{sqs: {queue: out.fifo}}", "[{kafka: {topic: out}}, {rabbitmq: {routing_key: out}}]")
    assert problems(text) == [
        "p.yaml:4: sink.0.kafka.brokers: is missing; the source is on sqs, so it must be said here",
        "p.yaml:4: sink.1.rabbitmq.url: is missing; the source is on sqs, so it must be said here",
    ]
    settings = load(write(text), ["sink.0.kafka.brokers=h", "sink.1.rabbitmq.url=amqps://h"])
    assert [sink.kind for sink in settings.sink] == ["kafka", "rabbitmq"]
    assert [sink.kind for sink in settings.errors] == ["sqs"]


def test_objects_are_as_large_as_what_may_be_in_flight_allows(write: Any) -> None:
    def sizes(text: str, *overrides: str) -> tuple[int, int]:
        settings = load(write(text), overrides)
        assert settings.sink[0].file is not None
        return settings.flow.max_inflight, settings.sink[0].file.max_rows

    to_files = RABBIT.replace("{rabbitmq: {exchange: results, routing_key: digits}}", "{file: {path: out}}")
    of_files = "name: j\nmodel: m.onnx\nsource: {file: {path: in.jsonl}}\nsink: {file: {path: out}}\n"
    assert sizes(of_files) == (200_000, 50_000)
    assert sizes(of_files, "flow.max_inflight=300") == (300, 150)
    assert sizes(of_files, "sink.file.max_rows=10") == (8192, 10)
    assert sizes(to_files) == (65_535, 32_767)


JOB = "name: j\nmodel: m.onnx\nsource: {}\nsink: {}\n"


def test_a_job_on_a_bucket_keeps_its_errors_and_its_progress_where_no_run_reads_them(write: Any) -> None:
    source = "{s3: {bucket: abc, prefix: in/, region: eu-west-1, endpoint_url: 'http://h:1', format: parquet}}"
    path = write(JOB.format(source, "{s3: {bucket: other, format: parquet}}"))
    settings = load(path)
    assert settings.source.s3 is not None
    assert settings.source.s3.progress == path.parent / "j.progress"
    assert settings.of_tables
    errors, sink = settings.errors[0].s3, settings.sink[0].s3
    assert errors is not None
    assert sink is not None
    assert (errors.bucket, errors.prefix) == ("abc", "j.errors/")
    assert [(place.region, place.endpoint_url) for place in (errors, sink)] == [("eu-west-1", "http://h:1")] * 2
    elsewhere = load(path, ["source.s3.progress=state/p", "sink.s3.region=us-east-1"])
    assert elsewhere.source.s3 is not None
    assert elsewhere.source.s3.progress == path.parent / "state/p"
    assert elsewhere.sink[0].s3 is not None
    assert elsewhere.sink[0].s3.region == "us-east-1"


@pytest.mark.parametrize(
    ("source", "sink", "why"),
    [
        (
            "{s3: {bucket: abc}}",
            "{file: {path: out}}",
            "p.yaml:1: errors.s3: s3://abc/j.errors/ lies where requests are read from, and would be read as such; "
            "expected one beside s3://abc/",
        ),
        (
            "{s3: {bucket: abc, prefix: 2026/in}}",  # objects of 2026/in/a.jsonl would be called 2026/in/a-jsonl/...
            "{s3: {bucket: abc, prefix: 2026/}}",
            "p.yaml:4: sink.s3: s3://abc/2026/ lies where requests are read from, and would be read as such; "
            "expected one beside s3://abc/2026/in",
        ),
        (
            "{s3: {bucket: abc, prefix: in}}",
            "{s3: {bucket: abc, prefix: inside/}}",
            "p.yaml:4: sink.s3: s3://abc/inside/ lies where requests are read from, and would be read as such; "
            "expected one beside s3://abc/in",
        ),
        (
            "{file: {path: in}}",
            "{file: {path: other/../in/out}}",
            "p.yaml:4: sink.file: folder other/../in/out lies where requests are read from, and would be read as such; "
            "expected one beside file in",
        ),
        (
            "{file: {path: in, columns: [x]}}",
            "{file: {path: out}}",
            "p.yaml:3: source.file: `columns` are Parquet's; expected `format: parquet`, or no `columns`",
        ),
        (
            "{file: {path: in, format: parquet, columns: []}}",
            "{file: {path: out}}",
            "p.yaml:3: source.file.columns: ",
        ),
    ],
)
def test_a_job_that_would_read_what_it_writes_or_cannot_be_is_refused(
    problems: Any, source: str, sink: str, why: str
) -> None:
    (problem,) = problems(JOB.format(source, sink))
    assert problem.startswith(why)


def test_the_password_in_a_url_is_never_shown(write: Any) -> None:
    shown = effective(load(write(RABBIT)))
    assert "hunter22" not in shown
    assert "amqp://me:***@rabbit:5673/shop" in shown


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("{}", "sink: expected one of kafka, rabbitmq, sqs, s3, file"),
        (
            "{sqs: {queue: a}, kafka: {topic: b}}",
            "sink: expected one of kafka, rabbitmq, sqs, s3, file, got kafka and sqs",
        ),
        ("{rabbitmq: {}}", "sink.rabbitmq: expected `exchange`, or `routing_key` with the name of a queue"),
        (
            "{rabbitmq: {url: 'http://h', exchange: e}}",
            "sink.rabbitmq.url: expected amqp://user:password@host:port/vhost, or amqps:// for TLS",
        ),
        (
            "{rabbitmq: {routing_key: in}}",
            "sink.rabbitmq: queue in is where requests are read from; expected another one",
        ),
        (
            "{s3: {bucket: abc, max_rows: 40000}}",
            "sink.s3.max_rows: 40000 requests would wait for one object, and at most 65534 may be unsettled "
            "(flow.max_inflight, rabbitmq); expected half of that or less",
        ),
        ("{sqs: {queue: 'a b'}}", "sink.sqs.queue: 'a b' is not allowed; expected 1 to 80 letters, digits, '-' or '_' "
         "(`.fifo` at the end of a FIFO queue), or the queue's URL"),
    ],
)  # fmt: skip
def test_a_place_on_rabbitmq_or_sqs_that_cannot_be_is_named(problems: Any, place: str, why: str) -> None:
    text = RABBIT.replace("{rabbitmq: {exchange: results, routing_key: digits}}", place)
    assert problems(text) == [f"p.yaml:4: {why}"]


def test_a_repository_at_an_address_is_not_available_yet(problems: Any) -> None:
    assert problems(GOOD + "repository: s3://bucket/models\n") == [
        "p.yaml:7: repository: addresses are not available yet; expected a path on this machine"
    ]


def test_settings_that_contradict_each_other_are_told_beside_other_mistakes(problems: Any) -> None:
    assert problems(
        """\
name: digits
model: digits
requests: {format: json}
batch: {max_rows: 300, max_bytes: 2GiB}
flow: {max_inflight: 200, max_message_bytes: 1GiB, max_resident: 1MiB, bogus: 1}
source:
  kafka: {brokers: "h:1, g:2", topic: in}
sink:
  kafka: {topic: in, brokers: "g:2,h:1"}
errors:
  - kafka: {topic: e}
  - kafka: {topic: e}
"""
    ) == [
        "p.yaml:2: model: 'digits' is a name, and no `repository` is set to look it up in; "
        "expected a model file (.onnx or .py), or `repository`",
        "p.yaml:4: batch.max_rows: 300 requests of one row each never come together while "
        "flow.max_inflight is 200; "
        "expected at most as many",
        "p.yaml:4: batch.max_bytes: 2GiB is more than flow.max_inflight_bytes, 256MiB; expected at most as much",
        "p.yaml:5: flow.bogus: unknown key; allowed: max_inflight, max_inflight_bytes, max_message_bytes, max_resident",
        "p.yaml:5: flow.max_message_bytes: 1GiB is more than flow.max_inflight_bytes, 256MiB; expected at most as much",
        "p.yaml:5: flow.max_resident: the messages alone may take 256MiB (flow.max_inflight_bytes); "
        "expected more than that",
        "p.yaml:9: sink.kafka: topic in is where requests are read from; expected another one",
        "p.yaml:12: errors.1.kafka: topic e is where error records go to; expected another one",
    ]


def test_a_mistake_is_not_told_again_as_a_contradiction(problems: Any) -> None:
    # With the default in its place, 256MiB, max_bytes would be too large.
    assert problems(GOOD, "batch.max_bytes=1GiB", "flow.max_inflight_bytes=2GB") == [
        "--set flow.max_inflight_bytes: "
        "expected a size such as 512B, 64KiB, 16MiB or 1GiB, or a number of bytes, got '2GB'",
    ]


def test_a_small_flow_does_not_contradict_defaults_nobody_chose(write: Any) -> None:
    settings = load(write(GOOD), ["flow.max_inflight=10", "flow.max_inflight_bytes=1MiB"])
    assert (settings.flow.max_inflight, settings.batch.max_rows) == (10, 256)


def test_the_same_topic_name_on_another_cluster_is_no_contradiction(write: Any) -> None:
    settings = load(write(GOOD), ["sink.kafka.topic=digits.requests", "sink.kafka.brokers=elsewhere:9092"])
    assert sink_of(settings.sink[0]).topic == source_of(settings).topic


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("group.id", "set `group` instead"),
        ("bootstrap.servers", "set `brokers` instead"),
        ("enable.auto.commit", ""),
    ],
)
def test_a_librdkafka_property_that_is_a_setting_of_ours_is_refused(problems: Any, key: str, cure: str) -> None:
    (problem,) = problems(GOOD, f"source.kafka.config.{key}=true")
    assert f"{key!r} cannot be set here: {cure}" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "p.yaml:2: is not valid YAML: did not find expected node content"),
        ("a: b: c", "p.yaml:1: is not valid YAML: mapping values are not allowed in this context"),
        (
            "a: 1\n---\nb: 2\n",
            "p.yaml:2: is not valid YAML: expected a single document in the stream but found another",
        ),
        ("a:\n\tb: 1", "p.yaml:2: is not valid YAML: it is indented with a tab; indent with spaces"),
        ("a:\n  b: 1\n\tc: 2", "p.yaml:3: is not valid YAML: it is indented with a tab; indent with spaces"),
        (
            "a:\n  b: {c: d, e: ${X:-h:9}, f: g}",
            "p.yaml:2: is not valid YAML: did not find expected ',' or '}'; put ${...} in quotes",
        ),
        ("a: [${X}]", "p.yaml:1: is not valid YAML: did not find expected ',' or ']'; put ${...} in quotes"),
        ("a: *gone", "p.yaml:1: is not valid YAML: found undefined alias"),
        ("a: &x {b: *x}", "p.yaml: is not valid YAML: it is nested without end"),
        ("a: \x01", "p.yaml: is not valid YAML: control characters are not allowed"),
        ("- a\n", "p.yaml:1: expected a mapping (`key: value`), got a list"),
    ],
)
def test_what_is_not_yaml_or_no_mapping_is_told_in_one_line(problems: Any, text: str, problem: str) -> None:
    (told,) = problems(text)
    assert told.startswith(problem)
    assert "\n" not in told


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineFileError, match=r"gone.yaml: cannot be read: No such file or directory$"):
        load(tmp_path / "gone.yaml")
    (tmp_path / "latin1.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(PipelineFileError, match=r"latin1.yaml: is not text in UTF-8$"):
        load(tmp_path / "latin1.yaml")


# Whatever is in the file, a mistake in it is told and never a bug of ours.

_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates())
_KEYS = st.sampled_from([*PipelineSettings.model_fields, "kafka", "topic", "config", "path", "shadow", "x", 3, "1"])
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings_of_hypothesis(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_any_values_are_settings_or_told_as_mistakes(tmp_path_factory: pytest.TempPathFactory, values: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(GOOD + yaml.safe_dump({"extra": values}) + yaml.safe_dump(values, allow_unicode=True))
    with pytest.raises(PipelineFileError) as caught:
        load(path)
    assert all(line.startswith(f"{path}:") for line in caught.value.problems)


# Secrets

WITH_SECRETS = """\
name: digits
model: digits.onnx
source:
  kafka:
    brokers: localhost:9092
    topic: digits.requests
    config:
      sasl.mechanism: PLAIN
      sasl.username: someone
      sasl.password: hunter2-in-the-file
      ssl.key.pem: "-----BEGIN-----\\nabcdefghijklmnop\\n-----END-----"
      client.id: ${file:id.txt}
      client.rack: ${MY_TOKEN}
      http.proxy: http://user:proxy-pass@proxy:8080
      broker.address.family: v4
sink:
  kafka: {topic: digits.predictions}
"""
HIDDEN = ("hunter2-in-the-file", "abcdefghijklmnop", "id-from-a-file", "token-from-environ", "proxy-pass")


def test_secrets_are_in_the_settings_and_shown_nowhere(write: Any) -> None:
    Path("id.txt").write_text("id-from-a-file\n")
    settings = load(write(WITH_SECRETS), environ={"MY_TOKEN": "token-from-environ"})
    config = source_of(settings).config
    assert config["sasl.password"] == "hunter2-in-the-file"
    assert config["client.id"] == "id-from-a-file"
    shown = effective(settings)
    for text in (shown, repr(settings), str(settings), repr(settings.source), f"{settings.source.kafka}"):
        assert not [secret for secret in HIDDEN if secret in text]
    kafka = yaml.safe_load(shown)["source"]["kafka"]
    assert kafka["config"] == {
        "sasl.mechanism": "PLAIN",
        "sasl.username": "***",
        "sasl.password": "***",
        "ssl.key.pem": "***",
        "client.id": "***",
        "client.rack": "***",
        "http.proxy": "http://user:***@proxy:8080",
        "broker.address.family": "v4",
    }


def test_redact_takes_secrets_out_of_any_text(write: Any) -> None:
    Path("id.txt").write_text("id-from-a-file\n")
    redact = load(write(WITH_SECRETS), environ={"MY_TOKEN": "token-from-environ"}).redact
    assert redact("SASL failed for hunter2-in-the-file") == "SASL failed for ***"
    assert redact("line abcdefghijklmnop of the key") == "line *** of the key"
    assert redact("nothing of digits.requests is secret") == "nothing of digits.requests is secret"
    assert pickle.loads(pickle.dumps(redact))("id-from-a-file") == "***"  # noqa: S301 - our own


@pytest.mark.parametrize("override", ["source.kafka.config.sasl.password=[hunter2]", "flow.max_bytes=hunter2"])
def test_a_mistake_beside_a_secret_does_not_tell_it(problems: Any, override: str) -> None:
    text = GOOD.replace("topic: digits.requests}", "topic: in, config: {sasl.password: '${PW}', sasl.passwrd: 3}}")
    told = "\n".join(problems(text, override, "drain=${PW}", "order=${PW}", "http.port=${PW}", PW="hunter2"))
    assert "hunter2" not in told.replace(override, "")
    assert "--set drain: expected a number and its unit" in told
    assert "--set order: expected 'none' or 'key', got '***'" in told


def test_a_short_secret_is_hidden_as_a_word_and_leaves_other_words_alone() -> None:
    assert Redactor(frozenset(["abc"]))("abc abcd x-abc 'abc'") == "*** abcd x-*** '***'"


def test_a_secret_is_hidden_as_json_and_repr_write_it() -> None:
    hidden = 'two\nlines "quoted" \\ here'
    redact = Redactor(frozenset([hidden]))
    assert "quoted" not in redact(repr(hidden))
    assert "quoted" not in redact('{"a": "two\\nlines \\"quoted\\" \\\\ here"}')
    assert redact("plain") == "plain"


def test_a_secret_inside_a_longer_one_does_not_uncover_the_rest() -> None:
    assert Redactor(frozenset(["longsecret", "longsecret-and-more"]))("longsecret-and-more") == "***"


def test_settings_survive_the_way_to_a_child_process_with_their_redactor(write: Any) -> None:
    settings = load(write(GOOD), ["source.kafka.config.sasl.password=hunter2-xyz"])
    copy = pickle.loads(pickle.dumps(settings))  # noqa: S301 - our own
    assert copy == settings
    assert copy.redact("hunter2-xyz") == "***"


# What is shown


def test_the_effective_pipeline_is_a_pipeline_file_that_means_the_same(write: Any) -> None:
    settings = load(write(GOOD), ["drain=90s", "flow.max_resident=3GiB", "batch.max_delay=1.5ms"])
    shown = effective(settings)
    again = load(write(shown, "again.yaml"))
    assert effective(again) == shown
    assert again.batch == settings.batch
    assert "max_delay: 1.5ms" in shown
    assert "max_resident: 3GiB" in shown


# The schema


def test_the_schema_knows_every_key_and_spells_durations_and_sizes() -> None:
    found = schema()
    assert list(found["properties"]) == list(PipelineSettings.model_fields)
    assert found["additionalProperties"] is False
    assert found["required"] == ["name", "model", "source", "sink"]
    assert found["properties"]["drain"]["default"] == "20s"
    patterns = [form["pattern"] for form in found["properties"]["drain"]["anyOf"] if "pattern" in form]
    assert any(re.search(pattern, "250ms") for pattern in patterns)
    assert any(re.search(pattern, "${DRAIN}") for pattern in patterns)
    assert not any(re.search(pattern, "5") for pattern in patterns)


def _models(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _models(field.annotation)
    elif not isinstance(annotation, str | types.NoneType):
        for inner in get_args(annotation):
            yield from _models(inner)


def test_every_setting_is_described_and_every_number_has_a_unit() -> None:
    definitions = schema()["$defs"]
    for model in set(_models(PipelineSettings)):
        properties = (definitions.get(model.__name__) or schema())["properties"]
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            text = str(properties[name])
            if "'integer'" in text or "'number'" in text:
                assert "'unit': " in text or name == "config", f"{model.__name__}.{name} has no unit"
