"""`inferbus demo`: handwritten digits through Kafka's protocol and back, every one accounted for.

All but the broker is what a user has: a pipeline file, `inferbus run` on it in a process of its own, requests
published and outcomes read by the Kafka client. The broker is the embedded one, so there is nothing to install.

Invariant: what the summary counts was read back from the topics; nothing is taken from what the worker says of itself.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from inferbus.connectors.base import Message, Misconfigured
from inferbus.worker import access, build
from inferbus.worker.pipeline_file import load
from inferbus.worker.supervisor import COMMAND

DONE, BUG = 0, 70

PIPELINE = """\
# Handwritten digits from one Kafka topic; what they show to another.
name: digits
model: digits.onnx
source:
  kafka: {brokers: "${BROKERS:-localhost:9092}", topic: digits.requests}
sink:
  kafka: {topic: digits.predictions}
errors:
  kafka: {topic: digits.errors}
"""

SHIPPED = Path(__file__).parent / "digits"
RIGHT_AT_LEAST = 0.95  # of all digits, and of those held out from training; the shipped model has 0.97
PATIENCE = 60.0  # seconds the worker has for its first answer, for all others, and to end
# The embedded broker answers a fetch that found nothing only when its wait is over; a real one as soon as records come.
FETCH_SOON = "source.kafka.config.fetch.wait.max.ms=10"
SHADES = " .:+#"  # of a pixel, from 0 to 16


class Digit(NamedTuple):
    """An image: 64 pixels from 0 to 16, what it shows, and whether the model was trained without it."""

    pixels: list[int]
    label: int
    held_out: bool


class Request(NamedTuple):
    """One request; `digit` is None where it is malformed on purpose."""

    id: str
    body: bytes
    digit: Digit | None


@dataclass(slots=True)
class Outcomes:
    """What came back, and when; times are monotonic seconds by request id.

    Attributes:
        sent: When it was published.
        seen: When its outcome was first read.
        predictions: Every prediction the topic held once the worker had ended.
        errors: Every error record.
        code: The worker's exit code.
    """

    sent: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    predictions: list[Message] = field(default_factory=list)
    errors: list[Message] = field(default_factory=list)
    code: int = 0


class Answer(NamedTuple):
    """A digit, what the model took it for, and how sure it was, from 0 to 1."""

    digit: Digit
    label: int
    probability: float


def demo(out: Path) -> int:
    """Run the demo, leave its files in the folder `out`, print a summary; answers the exit code.

    Raises:
        Misconfigured: The folder cannot be written, or the Kafka client is not installed.
    """
    requests = _requests(_digits())
    pipeline = _prepared(out, requests)
    digits = sum(request.digit is not None for request in requests)
    _say(f"\n{digits:,} handwritten digits, there and back over Kafka's own protocol.\n")
    with _broker() as brokers:
        _say(f"  An embedded Kafka broker listens at {brokers}.")
        _say(f"  `inferbus run {pipeline}` starts and joins a consumer group: about five seconds.")
        outcomes = _exchanged(pipeline, brokers, requests)
    if code := outcomes.code:
        return _failed(f"the worker ended with code {code}: {_last_words(out)}", code if code > 0 else BUG)
    if wrong := _unaccounted(requests, outcomes):
        log = out / "worker.log"
        return _failed(f"{len(wrong):,} outcomes are not as they must be: {', '.join(wrong[:3])}; see {log}", BUG)
    answers = _written(out, requests, outcomes)
    _say_summary(out, requests, outcomes, answers)
    if (share := min(_share_right(answers), _share_right(answers, held_out=True))) < RIGHT_AT_LEAST:
        return _failed(f"the accuracy is {share:.1%}; expected at least {RIGHT_AT_LEAST:.0%}", BUG)
    _say_next(pipeline)
    return DONE


# Before


def _digits() -> list[Digit]:
    with gzip.open(SHIPPED / "digits.jsonl.gz") as lines:
        return [Digit(**orjson.loads(line)) for line in lines]


def _requests(digits: Sequence[Digit]) -> list[Request]:
    """A V2 request for each digit, and three that are malformed among them."""
    requests = [Request(f"digit-{n:04}", _body(f"digit-{n:04}", digit.pixels), digit) for n, digit in enumerate(digits)]
    pixels: list[Any] = list(digits[0].pixels)
    malformed = (
        _body("malformed-1", pixels)[:100],
        _body("malformed-2", pixels[1:]),
        _body("malformed-3", [*pixels[1:], "seven"]),
    )
    for n, body in enumerate(malformed, 1):
        requests.insert(450 * n, Request(f"malformed-{n}", body, None))
    return requests


def _body(id_: str, pixels: Sequence[Any]) -> bytes:
    image = {"name": "image", "shape": [1, len(pixels)], "datatype": "FP32", "data": pixels}
    return orjson.dumps({"id": id_, "inputs": [image]})


def _prepared(out: Path, requests: Sequence[Request]) -> Path:
    """The pipeline file, written with its model and the requests beside it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("predictions.jsonl", "errors.jsonl"):
            (out / name).unlink(missing_ok=True)  # those of an earlier run, should this one fail
        shutil.copyfile(SHIPPED / "digits.onnx", out / "digits.onnx")
        (out / "requests.jsonl").write_bytes(b"".join(request.body + b"\n" for request in requests))
        (out / "digits.yaml").write_text(PIPELINE)
    except OSError as error:
        raise Misconfigured(f"{out}: cannot be written: {error.strerror}; choose another folder with --out") from None
    return out / "digits.yaml"


@contextlib.contextmanager
def _broker() -> Iterator[str]:
    embedded = build.client("embedded")
    with embedded.embedded_broker("digits.requests", "digits.predictions", "digits.errors") as brokers:
        yield brokers


# There and back


def _exchanged(pipeline: Path, brokers: str, requests: Sequence[Request]) -> Outcomes:
    """Start a worker, publish the requests, read what becomes of them, stop the worker."""
    outcomes = Outcomes()
    settings = load(pipeline, [FETCH_SOON], {"BROKERS": brokers})
    sink, errors = settings.sink[0].place, settings.errors[0].place
    with ExitStack() as stack:
        publisher = stack.enter_context(access.publisher(settings.source.place))
        readers = [stack.enter_context(access.reader(settings, place)) for place in (sink, errors)]
        worker = stack.enter_context(_worker(pipeline, brokers))
        # The first one alone: once it is answered the worker has its partitions, and the rest sees it at work.
        for part in (requests[:1], requests[1:]):
            for id_, body, _ in part:
                outcomes.sent[id_] = time.monotonic()
                publisher.publish(body, id_.encode(), (("inferbus-id", id_.encode()),))
            _await(outcomes, readers, worker)
        worker.terminate()  # SIGTERM: it drains and leaves
        outcomes.code = worker.wait(PATIENCE)
    for place, kind in ((sink, outcomes.predictions), (errors, outcomes.errors)):
        with access.reader(settings, place) as reader:
            kind += reader.to_end()
    return outcomes


@contextlib.contextmanager
def _worker(pipeline: Path, brokers: str) -> Iterator[subprocess.Popen[bytes]]:
    """`inferbus run`, its log beside the pipeline file."""
    command = [*COMMAND, "run", str(pipeline), "--set", "http=null", "--set", FETCH_SOON]
    # Should the demo be killed, its broker goes with it, and the worker gives up instead of waiting for its return.
    command += ["--until-idle", "30", "--set", "retry.bounded=10s"]
    with (pipeline.parent / "worker.log").open("wb") as log:
        worker = subprocess.Popen(  # noqa: S603 - our own command line
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "BROKERS": brokers}
        )
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def _await(outcomes: Outcomes, readers: Sequence[access.Reader], worker: subprocess.Popen[bytes]) -> None:
    """Return when everything sent has an outcome, or when no more is to be expected."""
    until = time.monotonic() + PATIENCE
    while len(outcomes.seen) < len(outcomes.sent) and worker.poll() is None and time.monotonic() < until:
        came = [message.id for reader in readers for message in reader.read(0.005)]
        now = time.monotonic()
        for id_ in came:
            outcomes.seen.setdefault(id_, now)


def _last_words(out: Path) -> str:
    lines = (out / "worker.log").read_text(errors="replace").splitlines()
    return lines[-1].removeprefix("inferbus: ") if lines else "it said nothing"


# After


def _unaccounted(requests: Sequence[Request], outcomes: Outcomes) -> list[str]:
    """What is not as it must be: one prediction for each digit, one error record for each malformed request."""
    found = Counter((m.id, "prediction") for m in outcomes.predictions)
    found += Counter((m.id, "error record") for m in outcomes.errors)
    wanted = Counter((r.id, "prediction" if r.digit else "error record") for r in requests)
    missing, extra = (wanted - found).elements(), (found - wanted).elements()
    return [*(f"{id_} has no {kind}" for id_, kind in missing), *(f"{id_} has one {kind} more" for id_, kind in extra)]


def _written(out: Path, requests: Sequence[Request], outcomes: Outcomes) -> list[Answer]:
    """Write predictions and error records, a JSON line each; answers what the model took each digit for."""
    digits = {request.id: request.digit for request in requests if request.digit}
    answers = []
    with (out / "predictions.jsonl").open("wb") as file:
        for message in sorted(outcomes.predictions, key=lambda m: m.id):
            digit, body = digits[message.id], orjson.loads(message.body)
            outputs = {output["name"]: output["data"] for output in body["outputs"]}
            (label,), probabilities = outputs["label"], outputs["probabilities"]
            answers.append(Answer(digit, label, max(probabilities)))
            row = _row(message) | {"status": "ok", "model": body["model_name"], "version": body["model_version"]}
            row |= {"label": label, "probabilities": probabilities}
            file.write(orjson.dumps(row | {"truth": digit.label, "held_out": digit.held_out}) + b"\n")
    with (out / "errors.jsonl").open("wb") as file:
        for message in sorted(outcomes.errors, key=lambda m: m.id):
            row = _row(message) | {"error": _error(message), "body": access.readable(message.body)}
            file.write(orjson.dumps(row) + b"\n")
    return answers


def _row(message: Message) -> dict[str, Any]:
    headers = [[name, access.readable(value)] for name, value in message.headers if name != "inferbus-error"]
    return {"id": message.id, "key": access.readable(message.key), "time": message.created_at, "headers": headers}


def _error(message: Message) -> dict[str, Any]:
    error: dict[str, Any] = orjson.loads(dict(message.headers)["inferbus-error"])
    return error


def _share_right(answers: Sequence[Answer], *, held_out: bool = False) -> float:
    return statistics.fmean(a.label == a.digit.label for a in answers if a.digit.held_out or not held_out)


def _say_summary(out: Path, requests: Sequence[Request], outcomes: Outcomes, answers: Sequence[Answer]) -> None:
    first, *rest = (request.id for request in requests)
    sent, seen = outcomes.sent, outcomes.seen
    rate = len(rest) / (max(map(seen.__getitem__, rest)) - min(map(sent.__getitem__, rest)))
    waits = statistics.quantiles(((seen[id_] - sent[id_]) * 1000 for id_ in rest), n=100)
    timings = {t["batch"]: t for t in (orjson.loads(dict(m.headers)["inferbus-timing"]) for m in outcomes.predictions)}
    rows = [t["rows"] for t in timings.values()]
    predict = statistics.median(t["predict_ms"] for t in timings.values())
    held_out = sum(answer.digit.held_out for answer in answers)
    _say(f"  The first digit was answered after {seen[first] - sent[first]:.1f} s; then all others went at once.\n")
    _say(_drawn(answers))
    _say(f"""\
  requests     {len(requests):>7,}   {len(answers):,} digits, and {len(outcomes.errors)} malformed on purpose
  predictions  {len(outcomes.predictions):>7,}   exactly one for each digit
  errors       {len(outcomes.errors):>7,}   exactly one for each malformed request:""")
    for error in sorted((_error(m) for m in outcomes.errors), key=lambda error: str(error["id"])):
        _say(f"                         {error['code']}: {error['message']}")
    _say(f"""\
  accuracy     {_share_right(answers):>7.1%}   and {_share_right(answers, held_out=True):.1%} \
on the {held_out} digits the model never saw
  throughput   {rate:>7,.0f}   requests a second, in one burst of {len(rest):,}
  latency      {waits[49]:>4.0f} ms   median in that burst, from publishing to reading; p99 {waits[98]:.0f} ms
  batches      {len(rows):>7,}   of {min(rows)} to {max(rows)} digits; the model took {predict:.2f} ms for one (median)

  predictions    {out / "predictions.jsonl"}
  error records  {out / "errors.jsonl"}
  worker's log   {out / "worker.log"}
""")


def _drawn(answers: Sequence[Answer]) -> str:
    """Three held-out digits and one that was taken for another, drawn side by side with their answers."""
    held_out = [answer for answer in answers if answer.digit.held_out]
    right = [answer for answer in held_out if answer.label == answer.digit.label]
    wrong = [answer for answer in held_out if answer.label != answer.digit.label]
    shown = [*right[:3], *wrong[:1]]
    lines = []
    for row in range(8):
        images = ("".join(2 * SHADES[p // 4] for p in a.digit.pixels[8 * row : 8 * row + 8]) for a in shown)
        lines.append("   ".join(images))
    told = (f"{a.label}, {a.probability:.0%} sure" for a in shown)
    lines.append("   ".join(f"{text:^16}" for text in told))
    if wrong:
        lines.append(f"{57 * ' '}{f'(it is a {wrong[0].digit.label})':^16}")
    return "\n".join(f"  {line}".rstrip() for line in lines) + "\n"


def _say_next(pipeline: Path) -> None:
    requests = pipeline.with_name("requests.jsonl")
    _say(f"""\
The same pipeline on your own Kafka, with topics digits.requests, digits.predictions and digits.errors:

  BROKERS=localhost:9092 inferbus run {pipeline}
  BROKERS=localhost:9092 inferbus send {pipeline} --file {requests} --wait
""")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # a person is reading along


def _failed(why: str, code: int) -> int:
    sys.stderr.write(f"inferbus demo: {why}\n")
    return code
