"""Claims: how a message says that its body lies in an object, which places are allowed, and how we say so ourselves.

Three spellings are read: our header `inferbus-claim`, CloudEvents' `ce_dataref`, and the pointers of the SQS extended
client. Pure functions: nothing here knows a client.

Invariant: no claim comes out of here that leads to another place than those allowed. Keys are taken literally, nothing
in them is decoded or normalized, and what some server might normalize is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from inferbus.connectors.base import Message
from inferbus.connectors.sqs_mapping import ENCODING, POINTED

CLAIM = "inferbus-claim"
DATAREF = "ce_dataref"
POINTERS = ("software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.sqs.javamessaging.MessageS3Pointer")
"""What a pointer of the extended client calls itself, and what it did in its first version."""

LONGEST = 1024  # bytes of a key

_URL = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{2,254})/([^?#]*)")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_KEYS = re.compile(r"[^\x00-\x1f\x7f]+")


class Malformed(ValueError):
    """A claim that cannot be followed; the text names the field and what was expected."""


class Place(NamedTuple):
    """A bucket, or a folder in it: what its keys begin with, empty or with `/` at the end."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> Place:
        """`s3://bucket` or `s3://bucket/prefix`; a prefix is a folder, with or without `/` at its end."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        return cls(bucket, prefix and prefix.rstrip("/") + "/")


class Claim(NamedTuple):
    """Where the body of a message lies.

    Attributes:
        field: Which field says so, for people.
        bucket: The bucket.
        key: The object's key.
        size: Its size in bytes, if it was said.
        sha256: Its SHA-256 in lower-case hex digits, if it was said.
        base64: Whether it is in base64.
    """

    field: str
    bucket: str
    key: str
    size: int | None = None
    sha256: str | None = None
    base64: bool = False


def claim_of(message: Message, allow: Sequence[Place]) -> Claim | None:
    """What a message claims, or None where it carries its body.

    Raises:
        Malformed: The claim is not what it must be, or leads to no place that is allowed.
    """
    if not message.headers:
        return None
    found = dict(message.headers)
    if (given := found.get(CLAIM)) is not None:
        claim = _of_header(given)
    elif not message.body and (given := found.get(DATAREF)):
        claim = Claim(f"header {DATAREF}", *_split(f"header {DATAREF}", given.decode("utf-8", "replace")))
    elif not found.keys().isdisjoint(POINTED):
        claim = _of_pointer(message.body, found)
    else:
        return None
    if not any(claim.bucket == place.bucket and claim.key.startswith(place.prefix) for place in allow):
        raise Malformed(f"{claim.field}: expected an object in a place that claim_check.allow names")
    return claim


def _of_header(given: bytes) -> Claim:
    field = f"header {CLAIM}"
    try:
        said = orjson.loads(given)
    except orjson.JSONDecodeError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("url"), str):
        raise Malformed(f'{field}: expected a JSON object with "url": "s3://bucket/key"')
    size, digest = said.get("size"), said.get("sha256")
    if size is not None and (type(size) is not int or size < 0):
        raise Malformed(f'{field}: expected "size" as a number of bytes')
    if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise Malformed(f'{field}: expected "sha256" as 64 hex digits')
    return Claim(field, *_split(field, said["url"]), size, digest and digest.lower())


def _of_pointer(body: bytes, found: Mapping[str, bytes]) -> Claim:
    field = "body"
    try:
        name, place = orjson.loads(body)
        bucket, key = place["s3BucketName"], place["s3Key"]
    except (orjson.JSONDecodeError, ValueError, TypeError, KeyError):
        name = bucket = key = None
    if name not in POINTERS or not isinstance(bucket, str) or not isinstance(key, str):
        raise Malformed(
            f"{field}: expected a pointer of the SQS extended client, as attribute "
            f'{next(name for name in POINTED if name in found)} says: ["{POINTERS[0]}", '
            '{"s3BucketName": "...", "s3Key": "..."}]'
        )
    encoding = found.get(ENCODING)
    if encoding not in (None, b"base64"):
        raise Malformed(f"attribute {ENCODING}: expected base64")
    return Claim(field, bucket, _checked(field, key), base64=encoding is not None)


def _split(field: str, url: str) -> tuple[str, str]:
    """Bucket and key."""
    found = _URL.fullmatch(url)
    if found is None:
        raise Malformed(f"{field}: expected s3://bucket/key, without query or fragment")
    return found[1], _checked(field, found[2])


def _checked(field: str, key: str) -> str:
    if not _KEYS.fullmatch(key) or len(key.encode()) > LONGEST or not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise Malformed(f"{field}: expected a key of 1 to {LONGEST} bytes, with no part of it empty, '.' or '..'")
    return key


def header(place: Place, name: str, size: int, sha256: str) -> tuple[str, bytes]:
    """Our header, for an object in `place`."""
    return CLAIM, orjson.dumps({"url": f"s3://{place.bucket}/{place.prefix}{name}", "size": size, "sha256": sha256})


def pointer(place: Place, name: str) -> bytes:
    """The body of a message as the extended client writes it."""
    said: list[Any] = [POINTERS[0], {"s3BucketName": place.bucket, "s3Key": place.prefix + name}]
    return orjson.dumps(said)
