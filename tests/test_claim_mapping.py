"""What a message may claim about where its body lies: three spellings, and nothing but the places allowed."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferbus.connectors.base import Headers, Message
from inferbus.connectors.claim_mapping import POINTERS, Claim, Malformed, Place, claim_of
from inferbus.connectors.sqs_mapping import decoded, encoded

ALLOW = [Place.of("s3://images/requests"), Place.of("s3://other")]
DIGEST = "0123456789abcdef" * 4


def message(headers: Headers = (), body: bytes = b"") -> Message:
    return Message("id", None, body, headers, None, 1, None)


def claiming(url: object, **more: object) -> Message:
    return message((("inferbus-claim", orjson.dumps({"url": url, **more})),))


def pointing(bucket: object, key: object, *, name: str = POINTERS[0], headers: Headers = ()) -> Message:
    body = orjson.dumps([name, {"s3BucketName": bucket, "s3Key": key}])
    return message((("ExtendedPayloadSize", b"123"), *headers), body)


def claimed(m: Message) -> Claim:
    claim = claim_of(m, ALLOW)
    assert claim is not None
    return claim


def test_our_header_names_an_object_and_perhaps_what_it_is() -> None:
    assert claimed(claiming("s3://images/requests/a/b")) == Claim("header inferbus-claim", "images", "requests/a/b")
    whole = claimed(claiming("s3://other/x", size=5, sha256=DIGEST.upper()))
    assert whole == Claim("header inferbus-claim", "other", "x", 5, DIGEST)


def test_it_counts_also_beside_a_body() -> None:
    m = claiming("s3://other/x")
    m.body = b"anything"
    assert claimed(m).key == "x"


def test_the_reference_of_a_cloud_event_counts_where_there_is_no_body() -> None:
    headers = (("ce_dataref", b"s3://other/x"),)
    assert claimed(message(headers)) == Claim("header ce_dataref", "other", "x")
    assert claim_of(message(headers, b"body"), ALLOW) is None


@pytest.mark.parametrize("name", POINTERS)
@pytest.mark.parametrize("size", ["ExtendedPayloadSize", "SQSLargePayloadSize"])
def test_a_pointer_of_the_extended_client_is_one_by_its_attribute(name: str, size: str) -> None:
    m = pointing("images", "requests/0c2d", name=name)
    assert claim_of(message((("other", b"1"),), m.body), ALLOW) is None
    found = claim_of(message(((size, b"300000"),), m.body), ALLOW)
    assert found == Claim("body", "images", "requests/0c2d")


def test_the_object_of_a_pointer_may_be_base64() -> None:
    assert claimed(pointing("other", "x", headers=(("inferbus-encoding", b"base64"),))).base64
    with pytest.raises(Malformed, match=r"^attribute inferbus-encoding: expected base64$"):
        claim_of(pointing("other", "x", headers=(("inferbus-encoding", b"gzip"),)), ALLOW)


def test_a_message_without_such_a_field_carries_its_body() -> None:
    assert claim_of(message(), ALLOW) is None
    assert claim_of(message((("tenant", b"7"),)), ALLOW) is None


HEADER = "^header inferbus-claim: expected "


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", 'a JSON object with "url": "s3://bucket/key"$'),
        (b"[]", "a JSON object"),
        (b'{"url": 7}', "a JSON object"),
        (b'{"url": "s3://other/x", "size": "5"}', '"size" as a number of bytes$'),
        (b'{"url": "s3://other/x", "size": true}', '"size" as a number of bytes$'),
        (b'{"url": "s3://other/x", "size": -1}', '"size" as a number of bytes$'),
        (b'{"url": "s3://other/x", "sha256": "abc"}', '"sha256" as 64 hex digits$'),
        (b'{"url": "s3://other/x", "sha256": 7}', '"sha256" as 64 hex digits$'),
    ],
)
def test_a_claim_that_is_not_one_is_told_what_was_expected(said: bytes, expected: str) -> None:
    with pytest.raises(Malformed, match=HEADER + expected):
        claim_of(message((("inferbus-claim", said),)), ALLOW)


@pytest.mark.parametrize(
    "url",
    ["", "other/x", "/other/x", "S3://other/x", "http://other/x", "https://other.s3.amazonaws.com/x", "file:///etc/passwd",
     "s3://user@other/x", "s3://user:password@other/x", "s3://other:9000/x", "s3://other/x?versionId=7", "s3://other/x#y",
     "s3:///x", "s3://other", "s3:other/x", "s3://other\\x"],
)  # fmt: skip
def test_only_a_plain_s3_url_is_one(url: str) -> None:
    with pytest.raises(Malformed, match=HEADER + "s3://bucket/key, without query or fragment$"):
        claim_of(claiming(url), ALLOW)


@pytest.mark.parametrize(
    "key",
    ["", "/", "/x", "x/", "a//b", "..", "../x", "a/../b", "a/..", ".", "./x", "a/./b", "a\nb", "a\x00", "ä" * 513],
)
def test_a_key_that_some_server_might_read_differently_is_refused(key: str) -> None:
    for m in (claiming(f"s3://other/{key}"), pointing("other", key)):
        with pytest.raises(
            Malformed, match=r"expected a key of 1 to 1024 bytes, with no part of it empty, '.' or '..'$"
        ):
            claim_of(m, ALLOW)


@pytest.mark.parametrize(
    "url",
    ["s3://images/x", "s3://images/requests", "s3://images/requests-secret/x", "s3://images/Requests/x",
     "s3://Images/requests/x", "s3://images.requests/x", "s3://others/x", "s3://images/requests%2F..%2Fx"],
)  # fmt: skip
def test_a_place_that_is_not_allowed_is_refused(url: str) -> None:
    with pytest.raises(Malformed, match=HEADER + "an object in a place that claim_check.allow names$"):
        claim_of(claiming(url), ALLOW)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"not JSON", b'["x", {}]', b'["x", {"s3BucketName": "a", "s3Key": "b"}]']
)
def test_a_body_that_is_no_pointer_though_an_attribute_says_so_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed, match=r"^body: expected a pointer of the SQS extended client, as attribute SQSLarge"):
        claim_of(message((("SQSLargePayloadSize", b"9"),), body), ALLOW)


def test_a_pointer_whose_parts_are_no_texts_is_refused() -> None:
    for m in (pointing(7, "x"), pointing("other", None), pointing(["other"], "x")):
        with pytest.raises(Malformed, match=r"^body: expected a pointer"):
            claim_of(m, ALLOW)


PARTS = st.lists(st.sampled_from(["..", ".", "", "requests", "images", "%2e%2e", "a", "\\", "ü"]) | st.text(max_size=5))


@given(st.sampled_from(["s3://images/requests/", "s3://images/", "s3://other/", "s3://", ""]), PARTS)
def test_whatever_is_claimed_what_comes_out_lies_in_a_place_that_is_allowed(start: str, parts: list[str]) -> None:
    try:
        encoded_ = orjson.dumps({"url": start + "/".join(parts)})
    except TypeError:  # half of a character
        return
    try:
        claim = claim_of(message((("inferbus-claim", encoded_),)), ALLOW)
    except Malformed:
        return
    assert claim is not None
    assert claim.bucket == "other" or (claim.bucket == "images" and claim.key.startswith("requests/"))
    assert {"", ".", ".."}.isdisjoint(claim.key.split("/"))


def test_a_prefix_is_a_folder_with_or_without_its_slash() -> None:
    assert Place.of("s3://b/p") == Place.of("s3://b/p/") == Place("b", "p/")
    assert Place.of("s3://b") == Place.of("s3://b/") == Place("b", "")


# As SQS carries it


def received(headers: Headers, body: bytes) -> tuple[bytes | None, bytes, Headers]:
    text, attributes, _ = encoded(None, body, headers)
    return decoded({"Body": text, "MessageAttributes": attributes})


@pytest.mark.parametrize("name", ["ExtendedPayloadSize", "SQSLargePayloadSize"])
def test_the_size_of_a_pointer_is_a_number_among_attributes(name: str) -> None:
    body = pointing("other", "x").body
    _, attributes, _ = encoded(None, body, ((name, b"300000"),))
    assert attributes[name] == {"DataType": "Number", "StringValue": "300000"}
    many = tuple((f"h{i}", b"1") for i in range(10))
    _, attributes, _ = encoded(None, body, ((name, b"300000"), *many))
    assert attributes[name] == {"DataType": "Number", "StringValue": "300000"}
    assert received(((name, b"300000"), *many), body) == (None, body, ((name, b"300000"), *many))


def test_a_pointer_stays_one_where_its_object_is_base64() -> None:
    m = pointing("other", "x")
    text = {"DataType": "String", "StringValue": "base64"}
    number = {"DataType": "Number", "StringValue": "300000"}
    attributes = {"inferbus-encoding": text, "ExtendedPayloadSize": number}
    key, body, headers = decoded({"Body": m.body.decode(), "MessageAttributes": attributes})
    assert (key, body) == (None, m.body)
    assert dict(headers) == {"ExtendedPayloadSize": b"300000", "inferbus-encoding": b"base64"}
    assert received(headers, body) == (None, body, headers)
    assert claimed(message(headers, body)).base64


def test_a_record_whose_body_is_left_out_is_no_pointer() -> None:
    assert received((("ExtendedPayloadSize", b"300000"),), b"") == (None, b"", (("ExtendedPayloadSize", b"300000"),))
