"""What a user can set about each bus, and the spellings of durations and sizes that all settings share.

Settings are read from the pipeline file before anything is opened. A new bus adds its own here.

Invariant: settings do not show themselves. Any value may hold a secret, so their `repr` is the type's name
alone, and pydantic keeps what it was given out of its errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_DURATION = r"^(\d+(?:\.\d+)?)(ms|s|m|h)$"
_SIZE = r"^(\d+)(B|KiB|MiB|GiB)$"


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, silent about its values."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    __str__ = __repr__


def seconds(value: object) -> float:
    """Seconds of `250ms`, `5s`, `1.5m`, `1h`, or of a bare 0; raises `ValueError` for anything else."""
    if value == "0" or (value == 0 and not isinstance(value, bool)):
        return 0.0
    found = re.match(_DURATION, value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"expected a number and its unit, such as 250ms, 5s, 2m or 1h, got {value!r}")
    return float(found[1]) * _SECONDS[found[2]]


def spell_seconds(value: float) -> str:
    """The shortest exact spelling that `seconds` reads back: 300.0 is `5m`."""
    for unit in ("h", "m", "s"):
        if value and value % _SECONDS[unit] == 0:
            return f"{int(value / _SECONDS[unit])}{unit}"
    return f"{value * 1000:.6f}".rstrip("0").rstrip(".") + "ms" if value else "0s"


def size(value: object) -> int:
    """Bytes of `512B`, `64KiB`, `16MiB`, `1GiB`, or of a bare whole number; else `ValueError`."""
    found = re.match(_SIZE, value) if isinstance(value, str) else None
    if found is not None:
        count = int(found[1]) * _BYTES[found[2]]
    elif isinstance(value, str) and value.isdecimal():
        count = int(value)
    elif type(value) is int:
        count = value
    else:
        raise ValueError(f"expected a size such as 512B, 64KiB, 16MiB or 1GiB, or a number of bytes, got {value!r}")
    if count < 1:
        raise ValueError("expected a size of at least 1B")
    return count


def spell_size(value: int) -> str:
    """The shortest exact spelling that `size` reads back: 65536 is `64KiB`."""
    for unit in ("GiB", "MiB", "KiB"):
        if value % _BYTES[unit] == 0:
            return f"{value // _BYTES[unit]}{unit}"
    return f"{value}B"


def _not_a_truth(value: object) -> object:
    # True is an int to Python, and would silently become 1.
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {str(value).lower()}")  # noqa: TRY004 - pydantic wants it
    return value


def _as_text(value: object) -> object:
    # librdkafka takes text; YAML users write `true` and `500` without quotes.
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def matching(pattern: str, words: str) -> AfterValidator:
    """Text that matches `pattern` whole; `words` say what is allowed."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            raise ValueError(f"{value!r} is not allowed; expected {words}")
        return value

    return AfterValidator(check)


Duration = Annotated[
    float,
    BeforeValidator(seconds),
    PlainSerializer(spell_seconds, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": _DURATION}, {"const": 0}], "unit": "seconds"}),
]
"""Seconds; written `250ms`, `5s`, `2m`, `1h`."""

Size = Annotated[
    int,
    BeforeValidator(size),
    PlainSerializer(spell_size, when_used="json"),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _SIZE}, {"type": "integer", "minimum": 1}], "unit": "bytes"}
    ),
]
"""Bytes, at least 1; written `512B`, `64KiB`, `16MiB`, `1GiB` or as a bare number."""

Count = Annotated[int, Field(ge=1), BeforeValidator(_not_a_truth)]
"""A whole number of at least 1."""

Port = Annotated[int, Field(ge=0, le=65535), BeforeValidator(_not_a_truth)]
"""A TCP port; 0 lets the system choose."""

Text = Annotated[str, Field(min_length=1)]
"""Text that says something."""

Topic = Annotated[
    str,
    matching(r"[A-Za-z0-9._-]{1,249}", "1 to 249 letters, digits, '.', '_' or '-'"),
    Field(json_schema_extra={"pattern": "^[A-Za-z0-9._-]{1,249}$"}),
]
"""A Kafka topic's name."""

_OURS = {
    "bootstrap.servers": "set `brokers` instead",
    "metadata.broker.list": "set `brokers` instead",
    "group.id": "set `group` instead",
    "auto.offset.reset": "set `start` instead",
    "enable.auto.commit": "offsets are committed once outcomes are durable",
    "enable.auto.offset.store": "offsets are committed once outcomes are durable",
}


def _not_ours(config: dict[str, str]) -> dict[str, str]:
    taken = [f"{key!r} cannot be set here: {_OURS[key]}" for key in config if key in _OURS]
    if taken:
        raise ValueError("; ".join(taken))
    return config


Properties = Annotated[
    dict[str, Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | int | float | bool)]],
    AfterValidator(_not_ours),
]
"""librdkafka properties by name; numbers and truths become the text librdkafka reads."""


def _from_the_files_folder(path: Path, info: ValidationInfo) -> Path:
    folder: Path = info.context["folder"] if info.context else Path()
    return folder / path


def _local(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        raise ValueError("addresses are not available yet; expected a path on this machine")
    return value


def normalised(path: Path) -> Path:
    """Whole, and without `..`, whether it is there or not."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `absolute` keeps `..`, and `resolve` follows links


FilePath = Annotated[Path, BeforeValidator(_local, json_schema_input_type=str), AfterValidator(_from_the_files_folder)]
"""A path; in the pipeline file it is relative to the file's own folder."""


class SinkPlace(Settings):
    """One place that records go to."""

    def completed(self, source: SourcePlace) -> Self:
        """With everything that defaults to the source's, where that is on a bus of the same kind."""
        raise NotImplementedError

    def identity(self) -> Hashable:
        """Equal for settings that mean the same place."""
        raise NotImplementedError

    def label(self) -> str:
        """The place for people, such as `topic "digits.errors"`."""
        raise NotImplementedError

    def reading(self) -> SourcePlace | None:
        """The settings of a source that reads this place; None where it cannot be read."""
        raise NotImplementedError

    def _after(self, source: SourcePlace, names: tuple[str, ...]) -> Self:
        """A copy in which what was not given is the source's."""
        inherited = {name: getattr(source, name) for name in names if name not in self.model_fields_set}
        return self.model_copy(update=inherited)


class SourcePlace(Settings):
    """One place that requests come from."""

    most_unsettled: ClassVar[int | None] = None
    """Messages the bus itself hands out at most before some are settled."""

    bounded: ClassVar[bool] = False
    """It comes to an end by itself: a job."""

    def completed(self, pipeline: str) -> Self:  # noqa: ARG002 - most have nothing that defaults to it
        """With everything that defaults to the pipeline's name."""
        return self

    def errors(self, pipeline: str) -> SinkPlace:
        """Where error records go if the pipeline file does not say: on the same bus."""
        raise NotImplementedError

    def writing(self) -> SinkPlace:
        """The settings of a sink that writes to this place."""
        raise NotImplementedError

    def identity(self) -> Hashable:
        """Equal for settings that mean the same place, those of a sink included."""
        raise NotImplementedError

    def covers(self, sink: SinkPlace) -> bool:  # noqa: ARG002 - a topic or a queue has no inside
        """Whether what is written there is read from here by the next run."""
        return False

    def label(self) -> str:
        """The place for people, such as `topic "digits.requests"`."""
        raise NotImplementedError


def _with_ports(brokers: str) -> str:
    for address in map(str.strip, brokers.split(",")):
        _, colon, port = address.rpartition("://")[2].rpartition(":")
        # Without a port it is 9092; an IPv6 address without one ends in a bracket.
        if colon and "]" not in port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{port!r} in {address!r} is no port; expected host:port")
    return brokers


Brokers = Annotated[Text, AfterValidator(_with_ports)]
"""Addresses `host:port`, separated by commas."""


def _topic_at(brokers: str, topic: str) -> Hashable:
    return "kafka", frozenset(address.strip() for address in brokers.split(",")), topic


class KafkaSourceSettings(SourcePlace):
    """One topic, read as a member of one consumer group."""

    brokers: Brokers = Field(description="Where to reach the cluster first: `host:port`, several separated by commas.")
    topic: Topic = Field(description="Topic the requests are read from.")
    group: Text = Field(default="", description="Consumer group. Default: the pipeline's name.")
    start: Literal["earliest", "latest"] = Field(
        # Requests published before the first worker came up are requests still.
        default="earliest",
        description="Where a group that never committed begins: the oldest message kept, or the next one.",
    )
    config: Properties = Field(default={}, description="Any librdkafka property, such as `sasl.password`.")

    def completed(self, pipeline: str) -> Self:
        """With the pipeline's name for the group."""
        return self.model_copy(update={"group": self.group or pipeline})

    def errors(self, pipeline: str) -> KafkaSinkSettings:
        """Topic `<pipeline>.errors`."""
        return KafkaSinkSettings(topic=f"{pipeline}.errors")

    def writing(self) -> KafkaSinkSettings:
        """The same topic."""
        return KafkaSinkSettings(topic=self.topic, brokers=self.brokers, config=self.config)

    def identity(self) -> Hashable:
        """Brokers and topic."""
        return _topic_at(self.brokers, self.topic)

    def label(self) -> str:
        """The topic."""
        return f"topic {self.topic}"


class KafkaSinkSettings(SinkPlace):
    """One topic, written with acknowledgement by all replicas in sync."""

    topic: Topic = Field(description="Topic the records are written to. It must exist.")
    brokers: Brokers = Field(default="", description="`host:port`, several separated by commas. Default: the source's.")
    config: Properties = Field(default={}, description="Any librdkafka property. Default: the source's.")

    def completed(self, source: SourcePlace) -> Self:
        """With the source's brokers and properties."""
        return self._after(source, ("brokers", "config")) if isinstance(source, KafkaSourceSettings) else self

    def reading(self) -> KafkaSourceSettings:
        """The same topic."""
        return KafkaSourceSettings(topic=self.topic, brokers=self.brokers, config=self.config)

    def identity(self) -> Hashable:
        """Brokers and topic."""
        return _topic_at(self.brokers, self.topic)

    def label(self) -> str:
        """The topic."""
        return f"topic {self.topic}"


def _amqp(url: str) -> str:
    found = urlsplit(url)
    try:
        port = found.port
    except ValueError:
        port = -1
    if found.scheme not in ("amqp", "amqps") or not found.hostname or port == -1:
        raise ValueError("expected amqp://user:password@host:port/vhost, or amqps:// for TLS")
    return url


AmqpUrl = Annotated[Text, AfterValidator(_amqp)]
"""Where a RabbitMQ is and who we are there."""

ShortText = Annotated[str, matching(r".{0,255}", "at most 255 characters")]
"""A name in AMQP."""


class AmqpTls(Settings):
    """How an `amqps://` connection is trusted; the system's certificates are, where nothing is said."""

    ca_file: Text | None = Field(default=None, description="Certificates of the authorities that are trusted, PEM.")
    cert_file: Text | None = Field(default=None, description="Our own certificate, PEM.")
    key_file: Text | None = Field(default=None, description="The key of our own certificate, PEM.")


class AmqpDeclare(Settings):
    """How the queue is to be, declared at start; one that is there with other properties is refused."""

    type: Literal["quorum", "classic"] = Field(default="quorum", description="quorum: replicated. classic: one node.")
    delivery_limit: Count | None = Field(
        default=None,
        json_schema_extra={"unit": "deliveries"},
        description="Deliveries after which a quorum queue dead-letters. It counts crashes of workers as well.",
    )
    dead_letter_exchange: ShortText | None = Field(default=None, description="Where what is dead-lettered goes.")
    dead_letter_routing_key: ShortText | None = Field(default=None, description="With this key. Default: its own.")


def _amqp_server(url: str) -> tuple[str, int, str]:
    found = urlsplit(url)
    port = found.port or (5671 if found.scheme == "amqps" else 5672)
    return found.hostname or "", port, unquote(found.path[1:]) or "/"


class RabbitmqSourceSettings(SourcePlace):
    """One queue."""

    most_unsettled = 65_535

    url: AmqpUrl = Field(description="`amqp://user:password@host:port/vhost`; `amqps://` for TLS.")
    queue: Annotated[Text, matching(r".{1,255}", "1 to 255 characters")] = Field(
        description="Queue the requests are read from. It must exist, or be declared."
    )
    prefetch: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None,
        json_schema_extra={"unit": "messages"},
        description="Most messages the broker hands out before they are acknowledged. Default: as many as `flow` "
        "allows of messages as large as they have been of late.",
    )
    declare: AmqpDeclare | None = Field(
        default=None, description="Declare the queue at start. Default: it must be there."
    )
    tls: AmqpTls = Field(default_factory=AmqpTls, description="For `amqps://`.")

    def errors(self, pipeline: str) -> RabbitmqSinkSettings:
        """Queue `<pipeline>.errors`."""
        return RabbitmqSinkSettings(routing_key=f"{pipeline}.errors")

    def writing(self) -> RabbitmqSinkSettings:
        """The same queue, through the default exchange."""
        return RabbitmqSinkSettings(url=self.url, routing_key=self.queue, tls=self.tls)

    def identity(self) -> Hashable:
        """Server and queue."""
        return "rabbitmq", _amqp_server(self.url), "", self.queue

    def label(self) -> str:
        """The queue."""
        return f"queue {self.queue}"


class RabbitmqSinkSettings(SinkPlace):
    """One exchange, written with publisher confirms."""

    url: AmqpUrl = Field(default="", description="As of a source. Default: the source's.")
    exchange: ShortText = Field(
        default="", description="Exchange the records are published to. Default: the one that leads to the queue named."
    )
    routing_key: ShortText = Field(
        default="", description="With this routing key; without `exchange` the name of a queue, which must exist."
    )
    tls: AmqpTls = Field(default_factory=AmqpTls, description="For `amqps://`. Default: the source's.")

    @model_validator(mode="after")
    def _leads_somewhere(self) -> Self:
        if not self.exchange and not self.routing_key:
            raise ValueError("expected `exchange`, or `routing_key` with the name of a queue")
        return self

    def completed(self, source: SourcePlace) -> Self:
        """With the source's server."""
        return self._after(source, ("url", "tls")) if isinstance(source, RabbitmqSourceSettings) else self

    def reading(self) -> RabbitmqSourceSettings | None:
        """The queue; None for an exchange, which may lead to any."""
        if self.exchange:
            return None
        return RabbitmqSourceSettings(url=self.url, queue=self.routing_key, tls=self.tls)

    def identity(self) -> Hashable:
        """Server, exchange and routing key."""
        return "rabbitmq", _amqp_server(self.url), self.exchange, self.routing_key

    def label(self) -> str:
        """The exchange, or the queue."""
        return f"exchange {self.exchange}" if self.exchange else f"queue {self.routing_key}"


Endpoint = Annotated[Text, matching(r"https?://.+", "http:// or https:// and an address")]
"""Where a service that speaks AWS's protocol is, if not at AWS."""

Bucket = Annotated[Text, matching(r"[A-Za-z0-9.:_/-]{3,255}", "the name of a bucket, or an ARN")]
"""Where objects are."""

SqsQueue = Annotated[
    str,
    matching(
        r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo|https?://.+/[^/]+",
        "1 to 80 letters, digits, '-' or '_' (`.fifo` at the end of a FIFO queue), or the queue's URL",
    ),
]
"""A queue by its name, or by its URL."""


class SqsSourceSettings(SourcePlace):
    """One SQS queue, standard or FIFO."""

    most_unsettled = 120_000

    queue: SqsQueue = Field(description="Queue the requests are read from, by name or URL. It must exist.")
    region: Text | None = Field(default=None, description="AWS region. Default: that of the environment.")
    endpoint_url: Endpoint | None = Field(default=None, description="Where SQS is, if not at AWS.")
    visibility_timeout: Annotated[Duration, Field(ge=10, le=43200)] = Field(
        # Extended for as long as a request is under way: it is how long others wait after a crash, no more.
        default="60s",
        validate_default=True,
        description="How soon a request comes again after a crash. It is extended while one is under way.",
    )
    receivers: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None,
        description="Receive calls at once. Default: as many as the flow of messages asks for, up to 16.",
        json_schema_extra={"unit": "calls"},
    )

    def errors(self, pipeline: str) -> SqsSinkSettings:
        """Queue `<pipeline>-errors`."""
        return SqsSinkSettings(queue=f"{pipeline}-errors")

    def writing(self) -> SqsSinkSettings:
        """The same queue."""
        return SqsSinkSettings(queue=self.queue, region=self.region, endpoint_url=self.endpoint_url)

    def identity(self) -> Hashable:
        """Endpoint, region and the queue's name."""
        return "sqs", self.endpoint_url, self.region, self.queue.rpartition("/")[2]

    def label(self) -> str:
        """The queue."""
        return f"queue {self.queue.rpartition('/')[2]}"


class SqsSinkSettings(SinkPlace):
    """One SQS queue, standard or FIFO."""

    queue: SqsQueue = Field(description="Queue the records are sent to, by name or URL. It must exist.")
    region: Text | None = Field(default=None, description="AWS region. Default: the source's, else the environment's.")
    endpoint_url: Endpoint | None = Field(default=None, description="Where SQS is. Default: where the source's is.")

    def completed(self, source: SourcePlace) -> Self:
        """With the source's region and endpoint."""
        return self._after(source, ("region", "endpoint_url")) if isinstance(source, SqsSourceSettings) else self

    def reading(self) -> SqsSourceSettings:
        """The same queue."""
        return SqsSourceSettings(queue=self.queue, region=self.region, endpoint_url=self.endpoint_url)

    def identity(self) -> Hashable:
        """Endpoint, region and the queue's name."""
        return "sqs", self.endpoint_url, self.region, self.queue.rpartition("/")[2]

    def label(self) -> str:
        """The queue."""
        return f"queue {self.queue.rpartition('/')[2]}"


class JobSourceSettings(SourcePlace):
    """The rows of files, read once: a bounded job."""

    bounded = True

    format: Literal["jsonl", "parquet"] = Field(
        default="jsonl",
        description="jsonl: a request body a line, also in `.jsonl.gz`. parquet: a request a row, a column an input.",
    )
    columns: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Of Parquet, the columns that are inputs. Default: all but `id`, `key` and `headers`.",
    )

    @model_validator(mode="after")
    def _lines_have_no_columns(self) -> Self:
        if self.columns is not None and self.format != "parquet":
            raise ValueError("`columns` are Parquet's; expected `format: parquet`, or no `columns`")
        return self


class FileSourceSettings(JobSourceSettings):
    """Files on this machine."""

    path: FilePath = Field(description="A file, or a folder: every file in it and in its folders, by name.")
    progress: FilePath | None = Field(
        default=None,
        description="Where the job notes how far it has come, and begins again. Default: `<path>.<name>.progress`.",
    )

    def completed(self, pipeline: str) -> Self:
        """With the progress file beside the requests."""
        path = self.path if self.path.name.strip(".") else normalised(self.path)  # the name of `.` and of `..`
        beside = path.parent / f"{path.name}.{pipeline}.progress"
        return self.model_copy(update={"path": path, "progress": self.progress or beside})

    def errors(self, pipeline: str) -> FileSinkSettings:
        """Folder `<pipeline>.errors` beside the requests."""
        return FileSinkSettings(path=self.path.parent / f"{pipeline}.errors")

    def writing(self) -> FileSinkSettings:
        """Never: nobody adds to the requests of a job."""
        raise NotImplementedError

    def identity(self) -> Hashable:
        """The path."""
        return "file", self.path.absolute()

    def covers(self, sink: SinkPlace) -> bool:
        """A folder inside."""
        return isinstance(sink, FileSinkSettings) and normalised(sink.path).is_relative_to(normalised(self.path))

    def label(self) -> str:
        """The path."""
        return f"file {self.path}"


class S3SourceSettings(JobSourceSettings):
    """Objects in a bucket."""

    bucket: Bucket = Field(description="The bucket.")
    prefix: str = Field(default="", description="What the keys begin with, such as `requests/`; or one key.")
    region: Text | None = Field(default=None, description="AWS region. Default: that of the environment.")
    endpoint_url: Endpoint | None = Field(default=None, description="Where S3 is, if not at AWS: MinIO, Google.")
    progress: FilePath | None = Field(
        default=None,
        description="Where, on this machine, the job notes how far it has come, and begins again. It must outlive the "
        "worker. Default: `<name>.progress` beside this file.",
    )

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _beside(self, info: ValidationInfo) -> Self:
        self._folder = info.context["folder"] if info.context else Path()
        return self

    def completed(self, pipeline: str) -> Self:
        """With the progress file beside the pipeline's."""
        return self.model_copy(update={"progress": self.progress or self._folder / f"{pipeline}.progress"})

    def errors(self, pipeline: str) -> S3SinkSettings:
        """Prefix `<pipeline>.errors/` in the same bucket."""
        return S3SinkSettings(bucket=self.bucket, prefix=f"{pipeline}.errors/")

    def writing(self) -> S3SinkSettings:
        """Never: nobody adds to the requests of a job."""
        raise NotImplementedError

    def identity(self) -> Hashable:
        """Endpoint, bucket and prefix."""
        return "s3", self.endpoint_url, self.bucket, self.prefix

    def covers(self, sink: SinkPlace) -> bool:
        """A prefix that begins with ours, by itself or with what names of our objects begin with."""
        within = self.prefix.rpartition("/")[2]
        return (
            isinstance(sink, S3SinkSettings)
            and (sink.endpoint_url, sink.bucket) == (self.endpoint_url, self.bucket)
            and (sink.prefix.startswith(self.prefix) or f"{sink.prefix}{within}".startswith(self.prefix))
        )

    def label(self) -> str:
        """Bucket and prefix."""
        return f"s3://{self.bucket}/{self.prefix}"


class StoreSettings(SinkPlace):
    """How outcomes are gathered into objects."""

    format: Literal["jsonl", "parquet"] = Field(default="jsonl", description="jsonl: JSON lines. parquet: columns.")
    max_rows: Count = Field(
        # Enough that the cost of an object vanishes; a row that waits for others takes some hundred bytes.
        default=50_000,
        description="Most requests in one object.",
        json_schema_extra={"unit": "requests"},
    )
    max_bytes: Size = Field(
        default="64MiB", validate_default=True, description="About so much in one object, before compression."
    )
    max_age: Duration = Field(
        default="60s", validate_default=True, gt=0, description="How long an outcome waits for others, at most."
    )
    compression: Literal["none", "gzip"] = Field(
        default="none", description="Of JSON lines; Parquet always is compressed."
    )


class FileSinkSettings(StoreSettings):
    """Files in a folder, each a run of requests."""

    path: FilePath = Field(description="The folder; it is made where it is not.")

    def completed(self, source: SourcePlace) -> Self:  # noqa: ARG002 - a folder is where it is
        """As it is."""
        return self

    def reading(self) -> None:
        """Rows are no requests."""

    def identity(self) -> Hashable:
        """The path."""
        return "file", self.path.absolute()

    def label(self) -> str:
        """The path."""
        return f"folder {self.path}"


class S3SinkSettings(StoreSettings):
    """Objects in a bucket, each a run of requests."""

    bucket: Bucket = Field(description="The bucket. It must exist.")
    prefix: str = Field(default="", description="What every key begins with, such as `predictions/`.")
    region: Text | None = Field(default=None, description="AWS region. Default: the source's, else the environment's.")
    endpoint_url: Endpoint | None = Field(
        default=None, description="Where S3 is. Default: where the source's is, or AWS."
    )

    def completed(self, source: SourcePlace) -> Self:
        """With the source's region and endpoint."""
        return self._after(source, ("region", "endpoint_url")) if isinstance(source, S3SourceSettings) else self

    def reading(self) -> None:
        """Rows are no requests."""

    def identity(self) -> Hashable:
        """Endpoint, bucket and prefix."""
        return "s3", self.endpoint_url, self.bucket, self.prefix

    def label(self) -> str:
        """Bucket and prefix."""
        return f"s3://{self.bucket}/{self.prefix}"
