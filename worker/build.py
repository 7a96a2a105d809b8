"""Builds a pipeline's parts from its settings: the one place that knows every connector and every model kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from inferbus.connectors.base import Misconfigured, Sink, Source
from inferbus.connectors.settings import KafkaSinkSettings
from inferbus.models.base import InvalidModel
from inferbus.models.codecs import codec
from inferbus.models.repository import Artefact, executors, locate
from inferbus.models.warmup import warm_up_input
from inferbus.worker.metrics import Metrics
from inferbus.worker.pipeline import Limits, Pipeline
from inferbus.worker.settings import PipelineSettings, SinkSettings
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


def connectors(settings: PipelineSettings, child: int | None = None) -> tuple[Source, list[Sink], list[Sink]]:
    """The source, the sinks and the error sinks, none opened yet.

    Args:
        settings: Completed settings.
        child: Number of this worker among several of one machine; keeps a static group membership unique.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    try:
        from inferbus.connectors.kafka import KafkaProducer, KafkaSink, KafkaSource  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise Misconfigured("kafka: the client is not installed: pip install 'inferbus[kafka]'") from None
    kafka = settings.source.kafka
    config: dict[str, Any] = {"bootstrap.servers": kafka.brokers, **kafka.config}
    if child is not None and "group.instance.id" in config:
        config["group.instance.id"] = f"{config['group.instance.id']}-{child}"
    source = KafkaSource(
        kafka.topic,
        kafka.group or settings.name,
        config,
        start=kafka.start,
        max_inflight=settings.flow.max_inflight,
        max_inflight_bytes=settings.flow.max_inflight_bytes,
    )
    clients: dict[str, KafkaProducer] = {}

    def sink(place: KafkaSinkSettings) -> Sink:
        cluster = {"bootstrap.servers": place.brokers, **place.config}
        name = repr(sorted(cluster.items()))
        if name not in clients:
            clients[name] = KafkaProducer(cluster)
        return KafkaSink(place.topic, clients[name])

    def several(places: Sequence[SinkSettings]) -> list[Sink]:
        return [sink(place.kafka) for place in places]

    return source, several(settings.sink), several(settings.errors)


def pipeline(settings: PipelineSettings, metrics: Metrics, child: int | None = None) -> Pipeline:
    """A pipeline, not started.

    Raises:
        InvalidModel: The model is not there, or not as it must be.
        Misconfigured: A connector's settings cannot work.
    """
    found = artefact(settings)
    bounds = limits(settings, found)
    source, sinks, errors = connectors(settings, child)
    model = settings.model
    return Pipeline(
        source,
        sinks,
        errors,
        partial(codec, settings.requests.format, max_message_bytes=bounds.max_message_bytes),
        executors(found, model.device, model.replicas, model.options, sharers=child_count()),
        lambda signature: warm_up_input(signature, bounds.max_rows, found.settings.warmup),
        bounds,
        metrics,
        ordered=settings.order == "key",
        allow_non_finite=settings.non_finite == "allow",
    )
