"""Builds a pipeline's parts from its settings: the one place that knows every connector and every model kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

from inferbus.connectors.base import Misconfigured, Replies, Sink, Source, Store
from inferbus.connectors.file import Files, Folder
from inferbus.connectors.job import JobSource
from inferbus.connectors.objects import Gathering, ObjectStore, Shelf
from inferbus.connectors.request_rows import JsonLines, Parquet
from inferbus.connectors.rows import form
from inferbus.connectors.settings import (
    FileSinkSettings,
    FileSourceSettings,
    KafkaSinkSettings,
    KafkaSourceSettings,
    RabbitmqSinkSettings,
    RabbitmqSourceSettings,
    S3SinkSettings,
    S3SourceSettings,
    SinkPlace,
    SourcePlace,
    SqsSinkSettings,
    SqsSourceSettings,
    StoreSettings,
)
from inferbus.models.base import Codec, InvalidModel, ModelInfo, Signature
from inferbus.models.codecs import codec
from inferbus.models.repository import Artefact, executors, locate
from inferbus.models.warmup import warm_up_input
from inferbus.worker.metrics import Metrics
from inferbus.worker.pipeline import Limits, Pipeline
from inferbus.worker.settings import ClaimCheckSettings, PipelineSettings, SinkSettings
from inferbus.worker.supervisor import child_count


def artefact(settings: PipelineSettings) -> Artefact:
    """The model the pipeline file names.

    Raises:
        InvalidModel: It is not there, or not as it must be.
    """
    model = settings.model
    wanted = {"path": str(model.path)} if model.path else {"name": model.name}
    return locate({**wanted, "executor": model.executor}, settings.repository)


def limits(settings: PipelineSettings, found: Artefact) -> Limits:
    """Batch and flow limits; what the pipeline file leaves open, the model's own `batch` may say."""
    batch, flow = settings.batch, settings.flow
    own = found.settings.batch
    if own:
        try:
            batch = type(batch).model_validate({**own, **batch.model_dump(mode="json", exclude_unset=True)})
        except ValidationError as error:
            first = error.errors()[0]
            words = first["msg"].removeprefix("Value error, ")
            raise InvalidModel(f"model.yaml: batch.{first['loc'][0]}: {words}") from None
    return Limits(
        max_rows=batch.max_rows,
        max_delay=batch.max_delay,
        max_batch_bytes=batch.max_bytes,
        max_inflight=flow.max_inflight,
        max_inflight_bytes=flow.max_inflight_bytes,
        max_message_bytes=flow.max_message_bytes,
        max_backoff=settings.retry.max_backoff,
    )


def codecs(settings: PipelineSettings, bounds: Limits) -> Callable[[Signature, ModelInfo], Codec]:
    """Makes the codec for the pipeline's requests, once the model's signature is known; see `models.codecs.codec`."""
    limit = bounds.max_message_bytes
    return partial(codec, settings.requests.format, max_message_bytes=limit, of_tables=settings.of_tables)


def connectors(settings: PipelineSettings, child: int | None = None) -> Connectors:
    """Everything a pipeline is connected to, none of it opened yet.

    Args:
        settings: Completed settings.
        child: Number of this worker among several of one machine; keeps a static group membership unique.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    shared: Shared = {}
    requests = source(settings, settings.source.place, child)
    claims = None if settings.claim_check is None else Claims(settings, settings.claim_check)
    if claims is not None:
        requests = claims.source(requests)

    gathering = Gathering(requests, time.monotonic)

    def several(places: Sequence[SinkSettings], claims: Claims | None = None) -> list[Sink | Store]:
        made: list[Sink | Store] = []
        for place in (one.place for one in places):
            if isinstance(place, StoreSettings):
                made.append(store(place, gathering))
            else:
                made.append(sink(place, shared) if claims is None else claims.sink(sink(place, shared), place))
        return made

    sinks, errors = several(settings.sink, claims), several(settings.errors)
    wanted = None if settings.replies is None else replies(settings.source.place, shared)
    return Connectors(requests, sinks, errors, wanted)


class Connectors(NamedTuple):
    """What a pipeline is connected to."""

    source: Source
    sinks: list[Sink | Store]
    errors: list[Sink | Store]
    replies: Replies | None


class Claims:
    """What goes around sources and sinks where bodies may lie in S3.

    Raises:
        Misconfigured: The client library is missing.
    """

    def __init__(self, settings: PipelineSettings, chosen: ClaimCheckSettings) -> None:
        self._claims = client("claims")
        self._flow = settings.flow
        self._delete = chosen.delete
        self._over = chosen.over
        self._allow = [self._claims.Place.of(url) for url in chosen.allow]
        self._to = self._claims.Place.of(chosen.to)
        self._storage = self._claims.Storage(chosen.region, chosen.endpoint_url, self._claims.CONNECTIONS)

    def source(self, source: Source) -> Source:
        """A source whose messages may have their bodies in S3."""
        flow = self._flow
        made = self._claims.ClaimSource(
            source,
            self._storage,
            self._allow,
            delete=self._delete,
            max_message_bytes=flow.max_message_bytes,
            max_inflight=flow.max_inflight,
            max_inflight_bytes=flow.max_inflight_bytes,
        )
        return cast("Source", made)

    def sink(self, sink: Sink, place: SinkPlace) -> Sink:
        """A sink whose large records have their bodies in S3."""
        pointers = isinstance(place, SqsSinkSettings)
        made = self._claims.ClaimSink(sink, self._storage, self._to, self._over, pointers=pointers)
        return cast("Sink", made)

    def reach(self, *, write: bool) -> None:
        """See that every place can be reached, and that predictions can be written, if they are.

        Raises:
            Unavailable: One cannot.
        """
        self._claims.reach(self._storage, self._allow, self._to if write else None)


Shared = dict[Hashable, Any]
"""Clients that several sinks use, by what they are connected to."""


def source(settings: PipelineSettings, place: SourcePlace, child: int | None = None) -> Source:
    """A source, not opened; its memory is bounded by `flow`.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    flow = settings.flow
    bounds = {"max_inflight": flow.max_inflight, "max_inflight_bytes": flow.max_inflight_bytes}
    match place:
        case KafkaSourceSettings():
            config: dict[str, Any] = {"bootstrap.servers": place.brokers, **place.config}
            if child is not None and "group.instance.id" in config:
                config["group.instance.id"] = f"{config['group.instance.id']}-{child}"
            group = place.group or settings.name
            made = client("kafka").KafkaSource(place.topic, group, config, start=place.start, **bounds)
        case RabbitmqSourceSettings():
            made = client("rabbitmq").RabbitmqSource(
                place.url, place.queue, prefetch=place.prefetch, declare=place.declare, tls=place.tls, **bounds
            )
        case SqsSourceSettings():
            made = client("sqs").SqsSource(
                place.queue,
                region=place.region,
                endpoint_url=place.endpoint_url,
                visibility_timeout=place.visibility_timeout,
                receivers=place.receivers,
                **bounds,
            )
        case FileSourceSettings() | S3SourceSettings():
            made = job(place, flow.max_message_bytes)
        case _:
            raise TypeError(place)
    return cast("Source", made)


def job(place: FileSourceSettings | S3SourceSettings, max_message_bytes: int) -> JobSource:
    """The rows of files, not opened.

    Raises:
        Misconfigured: A library is missing.
    """
    assert place.progress is not None  # noqa: S101 - completed
    if isinstance(place, S3SourceSettings):
        at = {"region": place.region, "endpoint_url": place.endpoint_url}
        files = client("s3_files").Objects(place.bucket, place.prefix, **at)
    else:
        files = Files(place.path)
    form = Parquet(place.columns) if place.format == "parquet" else JsonLines(max_message_bytes)
    return JobSource(files, form, place.progress)


def sink(place: SinkPlace, shared: Shared) -> Sink:
    """A sink, not opened.

    Args:
        place: Where it writes.
        shared: What sinks made before may share with this one.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    match place:
        case KafkaSinkSettings():
            kafka = client("kafka")
            cluster = {"bootstrap.servers": place.brokers, **place.config}
            producer = _shared(shared, ("kafka", *sorted(cluster.items())), lambda: kafka.KafkaProducer(cluster))
            made = kafka.KafkaSink(place.topic, producer)
        case RabbitmqSinkSettings():
            rabbitmq = client("rabbitmq")
            connection = _shared(shared, place.url, lambda: rabbitmq.Connection(place.url, place.tls))
            made = rabbitmq.RabbitmqSink(connection, place.exchange, place.routing_key)
        case SqsSinkSettings():
            made = client("sqs").SqsSink(place.queue, region=place.region, endpoint_url=place.endpoint_url)
        case _:
            raise TypeError(place)
    return cast("Sink", made)


def store(place: StoreSettings, gathering: Gathering) -> Store:
    """A store, not opened, which makes its objects together with the others of `gathering`.

    Raises:
        Misconfigured: A library is missing.
    """
    return ObjectStore(
        gathering,
        shelf(place),
        form(place.format, compressed=place.compression == "gzip"),
        max_rows=place.max_rows,
        max_bytes=place.max_bytes,
        max_age=place.max_age,
    )


def shelf(place: StoreSettings) -> Shelf:
    """Where a store puts its objects."""
    match place:
        case FileSinkSettings():
            return Folder(place.path)
        case S3SinkSettings():
            made = client("s3").Bucket(place.bucket, place.prefix, region=place.region, endpoint_url=place.endpoint_url)
            return cast("Shelf", made)
        case _:
            raise TypeError(place)


def replies(place: SourcePlace, shared: Shared) -> Replies:
    """The way back to requesters, on the bus their requests came from.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    match place:
        case KafkaSourceSettings():
            made = client("kafka").KafkaReplies({"bootstrap.servers": place.brokers, **place.config})
        case RabbitmqSourceSettings():
            rabbitmq = client("rabbitmq")
            connection = _shared(shared, place.url, lambda: rabbitmq.Connection(place.url, place.tls))
            made = rabbitmq.RabbitmqReplies(connection)
        case SqsSourceSettings():
            made = client("sqs").SqsReplies(region=place.region, endpoint_url=place.endpoint_url)
        case _:
            raise TypeError(place)
    return cast("Replies", made)


def _shared(shared: Shared, name: Hashable, make: Callable[[], Any]) -> Any:
    if name not in shared:
        shared[name] = make()
    return shared[name]


_EXTRAS = {
    "kafka": "kafka",
    "kafka_tools": "kafka",
    "embedded": "kafka",
    "rabbitmq": "rabbitmq",
    "sqs": "aws",
    "s3": "aws",
    "s3_files": "aws",
    "claims": "aws",
}


def client(name: str) -> Any:
    """A module of `connectors` whose library is an extra.

    Raises:
        Misconfigured: The library is not installed; says how to.
    """
    try:
        return import_module(f"inferbus.connectors.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("inferbus"):
            raise
        extra = _EXTRAS[name]
        raise Misconfigured(f"{extra}: the client is not installed: pip install 'inferbus[{extra}]'") from None


def pipeline(settings: PipelineSettings, metrics: Metrics, child: int | None = None) -> Pipeline:
    """A pipeline, not started.

    Raises:
        InvalidModel: The model is not there, or not as it must be.
        Misconfigured: A connector's settings cannot work.
    """
    found = artefact(settings)
    bounds = limits(settings, found)
    reached = connectors(settings, child)
    model = settings.model
    return Pipeline(
        reached.source,
        reached.sinks,
        reached.errors,
        codecs(settings, bounds),
        executors(found, model.device, model.replicas, model.options, sharers=child_count()),
        lambda signature: warm_up_input(signature, bounds.max_rows, found.settings.warmup),
        bounds,
        metrics,
        ordered=settings.order == "key",
        allow_non_finite=settings.non_finite == "allow",
        replies=reached.replies,
        reply_to=settings.replies.allow if settings.replies else (),
    )
