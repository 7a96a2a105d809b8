"""How a key, a body and headers travel on SQS, which knows text and up to ten message attributes: both ways.

Headers are message attributes. Where SQS cannot carry them so (a repeated name, a name or an empty value it forbids,
more than fit) all of them go, in order, as JSON in one attribute: `[["name", "text"], ["name", {"base64": "..."}]]`.
A body that is not text SQS allows goes as base64. Pure functions: nothing here knows a client.

Invariant: `decoded` gives back the bytes that `encoded` was given. Two things SQS has no room for: the order of headers
that are attributes, and the difference between an empty key and none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import orjson

from inferbus.connectors.base import Headers

KEY = "inferbus-key"
ENCODING = "inferbus-encoding"
HEADERS = "inferbus-headers"
ID = "inferbus-id"
OURS = frozenset({KEY, ENCODING, HEADERS})
"""Attributes that are no headers."""

POINTED = ("ExtendedPayloadSize", "SQSLargePayloadSize")
"""Headers by which the extended client knows that a body is a pointer to an object: attributes that are numbers."""

MOST = 10  # attributes of a message

Attribute = dict[str, Any]
"""A message attribute as the client takes it: `DataType`, and `StringValue` or `BinaryValue`."""

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAME = re.compile(r"(?!aws\.|amazon\.)[A-Z0-9_-]+(\.[A-Z0-9_-]+)*", re.IGNORECASE | re.ASCII)
_GROUP = re.compile(rb"[!-~]{1,128}")
# An empty body cannot be sent, and the base64 of nothing is nothing: decoders skip white space.
_NOTHING = "\n"


class Malformed(ValueError):
    """A message that says of itself what is not so; the text names the attribute and what was expected."""


def encoded(
    key: bytes | None, body: bytes, headers: Sequence[tuple[str, bytes]]
) -> tuple[str, dict[str, Attribute], int]:
    """A record as SQS takes it.

    Returns:
        The message's body, its attributes, and its size in bytes as SQS counts it.
    """
    attributes: dict[str, Attribute] = {}
    text = _text(body)
    if text is None:
        text = base64.b64encode(body).decode("ascii") or _NOTHING
        attributes[ENCODING] = _attribute(b"base64")
    if key:
        attributes[KEY] = _attribute(key)
    if _fit(headers, MOST - len(attributes)):
        attributes.update((name, _attribute(value)) for name, value in headers)
    else:
        attributes[HEADERS] = _attribute(_packed(headers))
        found = dict(headers)
        for name in (ID, *POINTED):  # so that anyone can match an outcome to its request, and find its body
            if given := found.get(name):
                attributes[name] = _attribute(given)
    for name in POINTED:
        if attributes.get(name, {}).get("StringValue", "").encode().isdigit():
            attributes[name]["DataType"] = "Number"
    size = len(body) if ENCODING not in attributes else len(text)
    for name, attribute in attributes.items():
        value = attribute.get("BinaryValue") or attribute["StringValue"].encode()
        size += len(name) + len(attribute["DataType"]) + len(value)
    return text, attributes, size


def decoded(raw: Mapping[str, Any]) -> tuple[bytes | None, bytes, Headers]:
    """Key, body and headers of a message as received. Without a key of its own, that of its group.

    A pointer of the extended client stays what it is; how its object is encoded is a header then.

    Raises:
        Malformed: Its attributes are not what they say.
    """
    group = raw.get("Attributes", {}).get("MessageGroupId")
    key = group.encode() if group else None
    body: str = raw["Body"]
    attributes = raw.get("MessageAttributes")
    if not attributes:
        return key, body.encode(), ()
    values = {name: _value(attribute) for name, attribute in attributes.items()}
    key = values.pop(KEY, key)
    encoding = values.pop(ENCODING, None)
    packed = values.pop(HEADERS, None)
    headers = tuple(values.items())
    if packed is not None:
        first = _unpacked(packed)
        known = {name for name, _ in first}  # our own id is in both places
        headers = (*first, *(header for header in headers if header[0] not in known))
    if encoding is not None and body.startswith("[") and not values.keys().isdisjoint(POINTED):
        # A pointer, which is no base64; it is the object that is encoded so.
        return key, body.encode(), (*headers, (ENCODING, encoding))
    if encoding is None:
        return key, body.encode(), headers
    if encoding != b"base64":
        raise Malformed(f"attribute {ENCODING}: expected base64")
    try:
        return key, base64.b64decode("".join(body.split()), validate=True), headers
    except ValueError:
        raise Malformed(f"the body is not base64, as attribute {ENCODING} says") from None


def size_of(raw: Mapping[str, Any]) -> int:
    """About how many bytes a message as received takes: its body and the values of its attributes."""
    size = len(raw["Body"])
    for attribute in raw.get("MessageAttributes", {}).values():
        size += len(attribute.get("BinaryValue") or attribute.get("StringValue", ""))
    return size


def group_of(key: bytes | None, request: str) -> str:
    """The FIFO group of a record: its key, or a hash where SQS does not allow the key as a name.

    A record without a key belongs to nobody else's order: its group is its request's own.
    """
    if key and _GROUP.fullmatch(key):
        return key.decode("ascii")
    return hashlib.sha256(key or request.encode()).hexdigest()


def _text(value: bytes) -> str | None:
    """As text SQS allows; None if it is not, or is empty."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return text if text and not _FORBIDDEN.search(text) else None


def _attribute(value: bytes) -> Attribute:
    text = _text(value)
    if text is None:
        return {"DataType": "Binary", "BinaryValue": value}
    return {"DataType": "String", "StringValue": text}


def _value(attribute: Attribute) -> bytes:
    binary: bytes | None = attribute.get("BinaryValue")
    return attribute.get("StringValue", "").encode() if binary is None else binary


def _fit(headers: Sequence[tuple[str, bytes]], room: int) -> bool:
    return (
        len(headers) <= room
        and all(value and _allowed(name) for name, value in headers)
        and len({name for name, _ in headers}) == len(headers)
    )


@lru_cache(maxsize=4096)
def _allowed(name: str) -> bool:
    return len(name) <= 256 and name not in OURS and _NAME.fullmatch(name) is not None


def _packed(headers: Sequence[tuple[str, bytes]]) -> bytes:
    listed: list[tuple[str, object]] = []
    for name, value in headers:
        try:
            listed.append((name, (value or b"").decode()))
        except UnicodeDecodeError:
            listed.append((name, {"base64": base64.b64encode(value).decode("ascii")}))
    # ASCII alone: a name may hold characters that SQS forbids.
    return json.dumps(listed, separators=(",", ":")).encode("ascii")


def _unpacked(packed: bytes) -> list[tuple[str, bytes]]:
    headers: list[tuple[str, bytes]] = []
    try:
        for name, value in orjson.loads(packed):
            given = value.encode() if type(value) is str else base64.b64decode(value["base64"], validate=True)
            headers.append((str.__str__(name), given))  # a TypeError for what is no text
    except (binascii.Error, TypeError, ValueError, KeyError):
        text = f'attribute {HEADERS}: expected a JSON list of ["name", "text"] or ["name", {{"base64": "..."}}]'
        raise Malformed(text) from None
    return headers
