"""A pipeline's topics from outside a worker: for `send`, `errors` and `check --connect`."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Literal

from inferbus.connectors.base import Misconfigured
from inferbus.connectors.settings import KafkaSinkSettings, KafkaSourceSettings
from inferbus.worker.settings import PipelineSettings

if TYPE_CHECKING:
    from inferbus.connectors.kafka_tools import KafkaPublisher, KafkaReader


def publisher(place: KafkaSourceSettings | KafkaSinkSettings) -> KafkaPublisher:
    """Writes to a place of the pipeline; a context.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    try:
        from inferbus.connectors.kafka_tools import KafkaPublisher  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise Misconfigured(MISSING) from None
    return KafkaPublisher(place.topic, {"bootstrap.servers": place.brokers, **place.config})


def reader(
    settings: PipelineSettings,
    place: KafkaSourceSettings | KafkaSinkSettings,
    at: Literal["start", "end"] = "start",
) -> KafkaReader:
    """Reads a place of the pipeline, from its start or its end; a context.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    try:
        from inferbus.connectors.kafka_tools import KafkaReader  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise Misconfigured(MISSING) from None
    config = {"bootstrap.servers": place.brokers, **place.config}
    return KafkaReader(place.topic, settings.source.kafka.group, config, at)


MISSING = "kafka: the client is not installed: pip install 'inferbus[kafka]'"


def readable(content: bytes | None) -> str | dict[str, str] | None:
    """Bytes from the bus as JSON can show them: text where they are UTF-8, else `{"base64": ...}`."""
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
