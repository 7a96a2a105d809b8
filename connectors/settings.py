"""What a user can set about each bus, and the spellings of durations and sizes that all settings share.

Settings are read from the pipeline file before anything is opened. A new bus adds its own here.

Invariant: settings do not show themselves. Any value may hold a secret, so their `repr` is the type's name
alone, and pydantic keeps what it was given out of its errors.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
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


class KafkaSourceSettings(Settings):
    """One topic, read as a member of one consumer group."""

    brokers: Text = Field(description="Where to reach the cluster first: `host:port`, several separated by commas.")
    topic: Topic = Field(description="Topic the requests are read from.")
    group: Text = Field(default="", description="Consumer group. Default: the pipeline's name.")
    start: Literal["earliest", "latest"] = Field(
        # Requests published before the first worker came up are requests still.
        default="earliest",
        description="Where a group that never committed begins: the oldest message kept, or the next one.",
    )
    config: Properties = Field(default={}, description="Any librdkafka property, such as `sasl.password`.")


class KafkaSinkSettings(Settings):
    """One topic, written with acknowledgement by all replicas in sync."""

    topic: Topic = Field(description="Topic the records are written to. It must exist.")
    brokers: Text = Field(default="", description="`host:port`, several separated by commas. Default: the source's.")
    config: Properties = Field(default={}, description="Any librdkafka property. Default: the source's.")
