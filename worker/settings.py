"""Everything a pipeline file can say, as frozen models: defaults with reasons, numbers with units.

`pipeline_file.load` is the one way from a file to a `PipelineSettings`. It also fills in what defaults to
another setting (the consumer group, the sink's brokers, the errors topic), so no reader needs a default.

Invariant: durations are float seconds, sizes are int bytes, paths lead from the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from inferbus.connectors.settings import (
    Count,
    Duration,
    Endpoint,
    FilePath,
    FileSinkSettings,
    FileSourceSettings,
    JobSourceSettings,
    KafkaSinkSettings,
    KafkaSourceSettings,
    Port,
    RabbitmqSinkSettings,
    RabbitmqSourceSettings,
    S3SinkSettings,
    S3SourceSettings,
    Settings,
    SinkPlace,
    Size,
    SourcePlace,
    SqsSinkSettings,
    SqsSourceSettings,
    StoreSettings,
    Text,
    matching,
    spell_size,
)

Way = tuple[str | int, ...]
"""The way to a setting from the top: keys of mappings and positions in lists."""

_ARTEFACT = re.compile(r"[/\\]|\.(onnx|pt2|pt|safetensors|py)$")
_SECRET_KEY = re.compile(
    r"pass(word|wd|phrase)|secret|token|credential|(access|api|private)[._-]?key|key\.pem|^sasl\.(?!mechanisms?$)",
    re.IGNORECASE,
)


def is_secret_key(key: str) -> bool:
    """Whether the value of a setting called `key` must never be shown."""
    return _SECRET_KEY.search(key) is not None


@dataclass(frozen=True, slots=True, repr=False)
class Redactor:
    """Replaces known secrets by `***` in any text, also where they stand escaped as in JSON or a `repr`."""

    secrets: frozenset[str] = frozenset()
    _pattern: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        forms = {form for secret in self.secrets for form in _forms(secret) if form.strip()}
        # The longest first: one secret may be the beginning of another. A short one only as a whole word:
        # else a password of "1" would blank every number in the logs.
        parts = [
            re.escape(form) if len(form) >= 8 else rf"(?<!\w){re.escape(form)}(?!\w)"
            for form in sorted(forms, key=len, reverse=True)
        ]
        object.__setattr__(self, "_pattern", re.compile("|".join(parts)) if parts else None)

    def __call__(self, text: str) -> str:
        """`text` without any secret."""
        return text if self._pattern is None else self._pattern.sub("***", text)


def _forms(secret: str) -> Iterable[str]:
    whole = secret.strip()
    lines = [line for line in whole.splitlines() if len(line) >= 8]  # each line of a PEM key counts
    for text in (whole, *lines):
        yield text
        yield repr(text)[1:-1]
        yield text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class ModelSettings(Settings):
    """Which model answers, and on what it runs."""

    path: FilePath | None = Field(default=None, description="Model file, relative to this file's folder.")
    name: (
        Annotated[
            str,
            matching(
                r"[A-Za-z0-9._-]+(@[A-Za-z0-9._-]+)?",
                "a model file (.onnx or .py), or `name[@version|@alias]`",
            ),
        ]
        | None
    ) = Field(default=None, description="`name`, `name@version` or `name@alias` in `repository`.")
    executor: Text | None = Field(default=None, description="What runs the model. Default: by the kind of the file.")
    device: Text = Field(default="cpu", description="Where it runs, such as `cpu` or `cuda:0`.")
    replicas: Count = Field(
        # One session already spreads over the cores; more copies help only where one leaves the device idle.
        default=1,
        description="Copies of the model that answer side by side in one worker.",
        json_schema_extra={"unit": "copies"},
    )
    options: dict[str, Any] = Field(default={}, description="Options of the executor itself.")

    @model_validator(mode="after")
    def _names_one_model(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("expected either `path` (a model file) or `name` (a model in `repository`)")
        return self


def model_key(short: str) -> Literal["path", "name"]:
    """What `model: short` says of the model."""
    return "path" if _ARTEFACT.search(short) else "name"


def _spelled_out(value: object) -> object:
    if isinstance(value, str):
        return {model_key(value): value}
    if not isinstance(value, dict | ModelSettings):
        raise ValueError("expected a model file, a name in `repository`, or a mapping")  # noqa: TRY004 - pydantic's way
    return value


def _listed(value: object) -> object:
    if value == []:
        raise ValueError("expected at least one place to write to")
    return value if isinstance(value, list | tuple) else [value]


class RequestsSettings(Settings):
    """How request bodies are written."""

    format: Literal["v2", "json", "raw", "text"] = Field(
        default="v2",
        description="v2: Open Inference Protocol. json: one object, one row. raw: bytes of the single input. "
        "text: one string for a model with one BYTES input. "
        "Rows of Parquet are read as json, and answered as said here.",
    )


class BatchSettings(Settings):
    """When a batch is full, and how long it may wait to fill."""

    max_rows: Count = Field(
        default=256, description="Most rows the model is given at once.", json_schema_extra={"unit": "rows"}
    )
    max_delay: Duration = Field(
        # An idle model takes what is there; while it is busy the next batch grows by itself.
        default="0ms",
        validate_default=True,
        description="How long an idle model waits for a fuller batch.",
    )
    max_bytes: Size = Field(
        default="64MiB",
        validate_default=True,
        description="Most bytes of input tensors the model is given at once.",
    )


class FlowSettings(Settings):
    """How much may be under way: the bound on memory, and on what a crash repeats."""

    max_inflight: Count = Field(
        # 32 full batches: enough to keep the model busy over one commit interval.
        default=8192,
        description="Most messages received and not yet settled, per worker.",
        json_schema_extra={"unit": "messages"},
    )
    max_inflight_bytes: Size = Field(
        default="256MiB",
        validate_default=True,
        description="Most bytes of messages received and not yet settled.",
    )
    max_message_bytes: Size = Field(
        default="16MiB",
        validate_default=True,
        description="A larger request is answered with the error `too_large`.",
    )
    max_resident: Size | None = Field(
        # What a client decompresses cannot be capped; stopping beats being killed without notice.
        default=None,
        description="A worker whose resident memory grows past this drains and ends. "
        "Default: 90 % of the memory limit of its container or machine.",
        json_schema_extra={"unit": "bytes"},
    )


class OneOf(Settings):
    """A place on one of several buses or stores: exactly one of the fields is given."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        named = self._named()
        if len(named) != 1:
            every = ", ".join(type(self).model_fields)
            raise ValueError(f"expected one of {every}" + (f", got {' and '.join(named)}" if named else ""))
        return self

    def _named(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        """Which it is, such as `kafka`."""
        return self._named()[0]


class SourceSettings(OneOf):
    """Where requests come from: one of these."""

    kafka: KafkaSourceSettings | None = Field(default=None, description="A Kafka topic.")
    rabbitmq: RabbitmqSourceSettings | None = Field(default=None, description="A RabbitMQ queue.")
    sqs: SqsSourceSettings | None = Field(default=None, description="An SQS queue.")
    s3: S3SourceSettings | None = Field(default=None, description="Objects in a bucket, read once: a bounded job.")
    file: FileSourceSettings | None = Field(default=None, description="Files, read once: a bounded job.")

    @property
    def place(self) -> SourcePlace:
        """Its settings."""
        place: SourcePlace = getattr(self, self.kind)
        return place


class SinkSettings(OneOf):
    """Where records go: one of these."""

    kafka: KafkaSinkSettings | None = Field(default=None, description="A Kafka topic.")
    rabbitmq: RabbitmqSinkSettings | None = Field(default=None, description="A RabbitMQ exchange, or a queue.")
    sqs: SqsSinkSettings | None = Field(default=None, description="An SQS queue.")
    s3: S3SinkSettings | None = Field(default=None, description="Objects in a bucket.")
    file: FileSinkSettings | None = Field(default=None, description="Files in a folder.")

    @property
    def place(self) -> SinkPlace:
        """Its settings."""
        place: SinkPlace = getattr(self, self.kind)
        return place


Sinks = Annotated[
    tuple[SinkSettings, ...],
    BeforeValidator(_listed, json_schema_input_type=SinkSettings | list[SinkSettings]),
]
"""One place or a list of them: every record goes to each."""


class RepliesSettings(Settings):
    """Who is answered directly, beside the sinks."""

    allow: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        # An address comes with a message: without a list anyone could have us write anywhere we may.
        description="Addresses that header `inferbus-reply-to` may name on the source's bus: topics or queues, "
        "with `*` and `?` as in file names."
    )


S3Place = Annotated[
    str,
    matching(
        r"s3://[A-Za-z0-9][A-Za-z0-9._-]{2,254}(/(?!\.{0,2}(/|$))[^/?#\x00-\x1f]+)*/?",
        "s3://bucket or s3://bucket/prefix, with no part of it empty, '.' or '..'",
    ),
]
"""A bucket, or a folder in it."""


class ClaimCheckSettings(Settings):
    """Bodies that lie in S3 while the bus carries where."""

    allow: Annotated[tuple[S3Place, ...], Field(min_length=1)] = Field(
        # A place comes with a message: without a list anyone could have us read anything we may.
        description="Places from which a message may have its body: `s3://bucket/prefix`, all that lies below."
    )
    over: Size = Field(
        # SQS and a Kafka broker as it comes take 1 MiB; headers need some of it.
        default="512KiB",
        validate_default=True,
        description="A larger prediction goes to S3, and only where it lies to a bus.",
    )
    delete: bool = Field(
        default=False, description="Delete an object once its request is answered, unless with an error."
    )
    to: S3Place = Field(default="", description="Where large predictions go. Default: the first place of `allow`.")
    region: Text | None = Field(default=None, description="AWS region. Default: that of the environment.")
    endpoint_url: Endpoint | None = Field(default=None, description="Where S3 is, if not at AWS.")

    def completed(self) -> Self:
        """With the place where predictions go."""
        return self.model_copy(update={"to": self.to or self.allow[0]})


class RetrySettings(Settings):
    """How long to keep trying when a dependency is away."""

    start: Duration = Field(
        default="30s",
        validate_default=True,
        description="At start: then exit 3 and let the supervisor try again.",
    )
    bounded: Duration = Field(
        default="5m", validate_default=True, description="In a job, or with `--until-idle`: then exit 3."
    )
    max_backoff: Duration = Field(
        default="10s", validate_default=True, gt=0, description="Longest pause between two attempts."
    )


class HttpSettings(Settings):
    """Where `/livez`, `/readyz` and `/metrics` are served."""

    host: Text = Field(
        # Metrics name models and topics: nobody else's business until the operator says so.
        default="127.0.0.1",
        description="Address to listen on; 0.0.0.0 for every interface.",
    )
    port: Port = Field(default=8080, description="0: any free port.", json_schema_extra={"unit": "TCP port"})


class PipelineSettings(Settings):
    """One pipeline: requests in, a model, outcomes out."""

    name: Annotated[
        str,
        matching(r"[a-z0-9-]{1,200}", "1 to 200 lower-case letters, digits or '-'"),
        Field(json_schema_extra={"pattern": "^[a-z0-9-]{1,200}$"}),
    ] = Field(description="Label of its metrics and default consumer group.")
    model: Annotated[ModelSettings, BeforeValidator(_spelled_out, json_schema_input_type=str | ModelSettings)] = Field(
        description="A model file, a name in `repository`, or a mapping with `path` or `name`."
    )
    repository: FilePath | None = Field(
        default=None,
        description="Folder of models, `<name>/<version>/` each, relative to this file's folder.",
    )
    requests: RequestsSettings = Field(default_factory=RequestsSettings, description="How request bodies are written.")
    batch: BatchSettings = Field(default_factory=BatchSettings, description="When a batch is full.")
    flow: FlowSettings = Field(default_factory=FlowSettings, description="How much may be under way.")
    source: SourceSettings = Field(description="Where requests come from.")
    sink: Sinks = Field(description="Where predictions go: one place, or a list of them.")
    errors: Sinks = Field(
        default=(),
        description="Where error records go: one or a list. Default: `<name>.errors` on the source's bus.",
    )
    delivery: Literal["at-least-once"] = Field(
        default="at-least-once", description="A request is settled once its outcome is durable."
    )
    order: Literal["none", "key"] = Field(
        # Keeping order holds finished work back; most readers join by id and do not need it.
        default="none",
        description="key: outcomes of one key leave in the order of its requests.",
    )
    drain: Duration = Field(
        # Under the 30 s that Kubernetes waits before it kills.
        default="20s",
        validate_default=True,
        description="How long a stopping worker may take to finish what is under way.",
    )
    replies: RepliesSettings | None = Field(
        default=None, description="Who is answered directly, beside the sinks. Default: nobody."
    )
    claim_check: ClaimCheckSettings | None = Field(
        default=None, description="Bodies that lie in S3 while the bus carries where. Default: none do."
    )
    retry: RetrySettings = Field(default_factory=RetrySettings, description="How long to keep trying.")
    non_finite: Literal["error", "allow"] = Field(
        # JSON has no NaN, and a NaN that passes for a prediction is found weeks later.
        default="error",
        description="error: an answer with NaN or infinity is an error record. allow: it is a prediction.",
    )
    http: HttpSettings | None = Field(
        default_factory=HttpSettings,
        description="Where health and metrics are served; null turns the listener off.",
    )

    _redact: Redactor = PrivateAttr(default_factory=Redactor)

    @property
    def of_tables(self) -> bool:
        """Requests are rows of tables, whatever `requests.format` says of answers."""
        place = self.source.place
        return isinstance(place, JobSourceSettings) and place.format == "parquet"

    def redact(self, text: str) -> str:
        """`text` with every secret of this pipeline's file replaced by `***`: for logs and messages."""
        return self._redact(text)


def completed(settings: PipelineSettings) -> PipelineSettings:
    """The same pipeline with everything filled in that defaults to another setting."""
    kind = settings.source.kind
    source = settings.source.place.completed(settings.name)
    errors = settings.errors or (SinkSettings.model_validate({kind: source.errors(settings.name)}),)

    def like_the_source(sink: SinkSettings) -> SinkSettings:
        return sink.model_copy(update={sink.kind: sink.place.completed(source)})

    sinks = tuple(map(like_the_source, settings.sink))
    flow = _room_for_objects(settings.flow, sinks, source.most_unsettled)
    return settings.model_copy(
        update={
            "source": settings.source.model_copy(update={kind: source}),
            "sink": tuple(_fitting(sink, flow) for sink in sinks),
            "errors": tuple(_fitting(like_the_source(sink), flow) for sink in errors),
            "claim_check": settings.claim_check and settings.claim_check.completed(),
            "flow": flow,
        }
    )


def _fitting(sink: SinkSettings, flow: FlowSettings) -> SinkSettings:
    """Objects that can be filled, where their size is left to us: what waits for one is in flight."""
    place = sink.place
    if not isinstance(place, StoreSettings) or "max_rows" in place.model_fields_set:
        return sink
    rows = max(1, min(place.max_rows, flow.max_inflight // 2))
    return sink.model_copy(update={sink.kind: place.model_copy(update={"max_rows": rows})})


def _room_for_objects(flow: FlowSettings, sinks: Sequence[SinkSettings], most: int | None) -> FlowSettings:
    """Requests wait unsettled for their object, so by default twice the largest may be under way beside the next."""
    rows = max((sink.place.max_rows for sink in sinks if isinstance(sink.place, StoreSettings)), default=0)
    if "max_inflight" in flow.model_fields_set:
        return flow
    room = max(flow.max_inflight, 4 * rows)
    return flow.model_copy(update={"max_inflight": room if most is None else min(room, most)})


def contradictions(settings: PipelineSettings) -> Iterator[tuple[tuple[Way, ...], str]]:
    """What is right by itself and wrong together, in completed settings: the settings concerned, and why."""
    # Only what was asked for can contradict: a default gives way to whatever stands beside it.
    batch, flow = settings.batch, settings.flow
    one_row_each = settings.requests.format in ("json", "text") or settings.of_tables
    if "max_rows" in batch.model_fields_set and one_row_each and batch.max_rows > flow.max_inflight:
        yield (
            (("batch", "max_rows"), ("flow", "max_inflight"), ("requests", "format")),
            f"{batch.max_rows} requests of one row each never come together while flow.max_inflight is "
            f"{flow.max_inflight}; expected at most as many",
        )
    for section, limit in (("batch", "max_bytes"), ("flow", "max_message_bytes")):
        chosen = getattr(settings, section)
        value = getattr(chosen, limit)
        if limit in chosen.model_fields_set and value > flow.max_inflight_bytes:
            yield (
                ((section, limit), ("flow", "max_inflight_bytes")),
                f"{spell_size(value)} is more than flow.max_inflight_bytes, "
                f"{spell_size(flow.max_inflight_bytes)}; expected at most as much",
            )
    if flow.max_resident is not None and flow.max_resident <= flow.max_inflight_bytes:
        yield (
            (("flow", "max_resident"), ("flow", "max_inflight_bytes")),
            f"the messages alone may take {spell_size(flow.max_inflight_bytes)} (flow.max_inflight_bytes); "
            "expected more than that",
        )
    if settings.model.name is not None and settings.repository is None:
        yield (
            (("model",), ("repository",)),
            f"{settings.model.name!r} is a name, and no `repository` is set to look it up in; "
            "expected a model file (.onnx or .py), or `repository`",
        )
    if settings.replies is not None and settings.source.place.bounded:
        way = ("source", settings.source.kind)
        yield (("replies",), way), "rows of a file have no requester; expected no `replies`"
    yield from _hopeless_objects(settings)
    yield from _unreachable(settings)
    yield from _shared_places(settings)


def _hopeless_objects(settings: PipelineSettings) -> Iterator[tuple[tuple[Way, ...], str]]:
    """Objects that could not be filled: requests that wait for theirs count as in flight."""
    inflight, bound = settings.flow.max_inflight, settings.source.place.most_unsettled
    most = min(inflight, bound or inflight) // 2
    for use in ("sink", "errors"):
        for i, sink in enumerate(getattr(settings, use)):
            place = sink.place
            if isinstance(place, StoreSettings) and "max_rows" in place.model_fields_set and place.max_rows > most:
                yield (
                    ((use, i, sink.kind, "max_rows"), ("flow", "max_inflight")),
                    f"{place.max_rows} requests would wait for one object, and at most {2 * most} may be unsettled "
                    f"(flow.max_inflight{', ' + settings.source.kind if bound else ''}); expected half of that or less",
                )


def _unreachable(settings: PipelineSettings) -> Iterator[tuple[tuple[Way, ...], str]]:
    """Sinks that have no source on their bus to learn from where that is."""
    for use in ("sink", "errors"):
        for i, sink in enumerate(getattr(settings, use)):
            for key in ("brokers", "url"):
                if getattr(sink.place, key, None) == "":
                    text = f"is missing; the source is on {settings.source.kind}, so it must be said here"
                    yield ((use, i, sink.kind, key),), text


def _shared_places(settings: PipelineSettings) -> Iterator[tuple[tuple[Way, ...], str]]:
    way: Way = ("source", settings.source.kind)
    taken: dict[object, tuple[Way, str]] = {settings.source.place.identity(): (way, "requests are read from")}
    for place, use in (("sink", "predictions go to"), ("errors", "error records go to")):
        for i, sink in enumerate(getattr(settings, place)):
            way = (place, i, sink.kind)
            identity = sink.place.identity()
            if identity in taken:
                other, why = taken[identity]
                yield (way, other), f"{sink.place.label()} is where {why}; expected another one"
            elif settings.source.place.covers(sink.place):
                text = f"{sink.place.label()} lies where requests are read from, and would be read as such; expected"
                yield (way, ("source", settings.source.kind)), f"{text} one beside {settings.source.place.label()}"
            else:
                taken[identity] = way, use


def effective(settings: PipelineSettings) -> str:
    """The pipeline with its defaults filled in, as YAML that `load` reads again; secrets are `***`."""
    shown = _masked(settings.model_dump(mode="json"), settings.redact)
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _masked(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {k: "***" if v and is_secret_key(k) else _masked(v, redact) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(item, redact) for item in value]
    return redact(value) if isinstance(value, str) else value
