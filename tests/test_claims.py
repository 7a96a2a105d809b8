"""Bodies in a real S3 while the bus, in memory here, carries where: in both directions, and when S3 is away."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import orjson
import pytest
from botocore.exceptions import ClientError

from inferbus.connectors.base import (
    Bell,
    Failure,
    Fatal,
    Headers,
    Message,
    Records,
    Refused,
    Sink,
    Source,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.claim_mapping import Place as S3Place
from inferbus.connectors.claims import AT_ONCE, CONNECTIONS, Claimed, ClaimSink, ClaimSource
from inferbus.connectors.memory import PLACE, MemoryBus, MemorySink, MemorySource
from inferbus.connectors.s3 import Storage
from inferbus.models.codecs import codec
from inferbus.models.warmup import warm_up_input
from inferbus.worker.metrics import Metrics
from inferbus.worker.pipeline import Limits, Pipeline
from tests.connector_contract import PATIENCE, ConnectorContract, Place, Seen, no_drain, receive, write
from tests.connector_contract import settle as settle_
from tests.servers import S3, Toxiproxy
from tests.test_pipeline import Doubler

pytestmark = pytest.mark.broker

MIB = 2**20
CLAIM = "inferbus-claim"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3.credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3.credentials[1])


class Shop(Place):
    """A bus in memory and a bucket; what is published goes by either, in turn."""

    def __init__(self, s3: S3, url: str | None = None) -> None:
        self.s3 = s3
        self.bucket = s3.bucket()
        self.bus = MemoryBus()
        self.inner = MemorySource(self.bus)
        self.out = MemorySink()
        self.url = url or s3.url
        self._numbers = itertools.count()

    def put(self, body: bytes, key: str | None = None) -> str:
        """Store an object; answers its key."""
        key = key or f"in/{next(self._numbers)}"
        self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body)
        return key

    def claim(self, key: str, **more: object) -> Headers:
        return ((CLAIM, orjson.dumps({"url": f"s3://{self.bucket}/{key}", **more})),)

    def ask(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> str:
        """Publish a message whose body lies in the bucket; answers where."""
        at = self.put(body)
        self.bus.publish(b"", key, (*headers, *self.claim(at)))
        return at

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        if next(self._numbers) % 2:
            self.bus.publish(body, key, headers)
        else:
            self.ask(body, key, headers)

    def storage(self) -> Storage:
        return Storage(self.s3.region, self.url, CONNECTIONS)

    def source(self, group: str = "g", **settings: Any) -> ClaimSource:  # noqa: ARG002 - one bus, one group
        self.inner = MemorySource(self.bus)
        return ClaimSource(self.inner, self.storage(), [S3Place(self.bucket, "in/")], **settings)

    def sink(self, over: int = 8, **settings: Any) -> ClaimSink:
        return ClaimSink(self.out, self.storage(), S3Place(self.bucket, "out/"), over, **settings)

    def seen(self) -> list[Seen]:
        return [self.resolved(key, body, headers) for _, key, body, headers in self.out.written]

    def resolved(self, key: bytes | None, body: bytes, headers: list[tuple[str, bytes]]) -> Seen:
        if CLAIM not in dict(headers):
            return Seen(key, body, headers)
        assert body == b""
        *headers, (name, value) = headers
        assert name == CLAIM
        claim = orjson.loads(value)
        bucket, _, at = claim["url"].removeprefix("s3://").partition("/")
        content: bytes = self.s3.client.get_object(Bucket=bucket, Key=at)["Body"].read()
        assert (claim["size"], claim["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        return Seen(key, content, headers)

    def kill(self, source: Source) -> None:
        source.close()

    def stored(self) -> set[str]:
        return set(self.s3.objects(self.bucket))


@contextmanager
def opened(source: ClaimSource) -> Iterator[ClaimSource]:
    source.open(Bell(), no_drain)
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def shop(s3: S3) -> Shop:
    return Shop(s3)


class TestClaims(ConnectorContract):
    @pytest.fixture
    def place(self, s3: S3) -> Place:
        return Shop(s3)

    def test_keys_bodies_and_headers_come_byte_for_byte(self, place: Place) -> None:
        assert isinstance(place, Shop)
        headers = (("a", b"1"), ("a", b"2"), ("raw", bytes(range(256))))
        at = place.ask(bytes(range(256)), b"\x00\xffkey", headers)
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
        assert (message.key, message.body) == (b"\x00\xffkey", bytes(range(256)))
        assert message.headers == (*headers, *place.claim(at))
        assert message.fail() == b""


def until(happened: Callable[[], object], source: Source | None = None) -> None:
    last = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < last, "it did not come to that"
        if source is not None:
            source.tick(time.monotonic())
        time.sleep(0.005)


# In


def test_a_message_waits_for_those_before_it_of_its_key_and_others_pass(shop: Shop) -> None:
    shop.ask(b"1", b"a")
    for body, key in ((b"2", b"a"), (b"3", b"b"), (b"4", None)):
        shop.bus.publish(body, key)
    shop.ask(b"5", b"a")
    shop.bus.publish(b"6", b"a")
    with opened(shop.source()) as source:
        assert [m.body for m in source.receive(10)] == [b"3", b"4"]
        assert not source.exhausted()
        assert [m.body for m in receive(source, 4)] == [b"1", b"2", b"5", b"6"]


def test_many_of_a_few_keys_come_in_the_order_of_each(shop: Shop) -> None:
    for i in range(200):
        (shop.ask if i % 3 else partial(shop.bus.publish))(b"%d" % i, b"k%d" % (i % 5))
    with opened(shop.source(max_inflight=64)) as source:
        came: list[Message] = []
        while len(came) < 200:
            some = receive(source, 1)
            assert some
            came += some
            source.settle(some)
    for key in range(5):
        assert [int(m.body) for m in came if m.key == b"k%d" % key] == list(range(key, 200, 5))


def refusal(shop: Shop, headers: Headers, body: bytes = b"", **settings: Any) -> Unreadable:
    shop.bus.publish(body, b"k", headers)
    with opened(shop.source(**settings)) as source:
        (m,) = receive(source, 1)
        assert isinstance(m, Unreadable)
        assert (m.key, m.headers, m.fail()) == (b"k", headers, body)
        assert source.inflight() == (1, len(body))
        settle_(source, [m])
    return m


def test_an_object_that_is_not_there_or_not_what_was_said_is_an_invalid_request(shop: Shop) -> None:
    at = shop.put(b"12345")
    good = hashlib.sha256(b"12345").hexdigest()
    for headers, reason in (
        (shop.claim("in/none"), "header inferbus-claim: expected an object there (NoSuchKey)"),
        (shop.claim("in/" + "x" * 300), None),  # longer than a name this server can keep
        (shop.claim(at, size=4), "header inferbus-claim: expected an object of 4 bytes, it has 5"),
        (shop.claim(at, sha256="0" * 64), "header inferbus-claim: expected an object with that sha256, it has another"),
        (shop.claim("out/x"), "header inferbus-claim: expected an object in a place that claim_check.allow names"),
        ((("ce_dataref", b"https://x/y"),), "header ce_dataref: expected s3://bucket/key, without query or fragment"),
    ):
        m = refusal(shop, headers)
        assert m.code == "invalid_request"
        assert reason in (m.reason, None)
    shop.bus.publish(b"", None, shop.claim(at, size=5, sha256=good))
    with opened(shop.source()) as source:
        assert receive(source, 1)[0].body == b"12345"


def test_an_object_that_is_too_large_is_not_read(shop: Shop) -> None:
    text = "the body has 101 bytes, at most 100 are allowed (flow.max_message_bytes)"
    for headers in (shop.claim("in/none", size=101), shop.claim(shop.put(b"x" * 101))):
        m = refusal(shop, headers, max_message_bytes=100)
        assert (m.code, m.reason) == ("too_large", text)


def pointer(shop: Shop, at: str, *headers: tuple[str, bytes]) -> tuple[bytes, Headers]:
    name = "software.amazon.payloadoffloading.PayloadS3Pointer"
    body = orjson.dumps([name, {"s3BucketName": shop.bucket, "s3Key": at}])
    return body, (("ExtendedPayloadSize", b"9"), *headers)


def test_a_pointer_of_the_extended_client_leads_to_its_body_and_goes_back_as_it_came(shop: Shop) -> None:
    body, headers = pointer(shop, shop.put(b"\x00payload"))
    shop.bus.publish(body, None, headers)
    other, encoded = pointer(shop, shop.put(b"AHBh\neWxvYWQ="), ("inferbus-encoding", b"base64"))
    shop.bus.publish(other, None, encoded)
    with opened(shop.source()) as source:
        one, two = receive(source, 2)
        assert (one.body, two.body) == (b"\x00payload", b"\x00payload")
        assert (one.fail(), one.headers) == (body, headers)
        assert source.inflight() == (2, len(body) + len(other) + 16)
        settle_(source, [one, two])
        assert source.inflight() == (0, 0)


def test_an_object_that_is_not_base64_though_its_pointer_says_so_is_an_invalid_request(shop: Shop) -> None:
    body, headers = pointer(shop, shop.put(b"\x00"), ("inferbus-encoding", b"base64"))
    assert refusal(shop, headers, body).reason == "the object is not base64, as attribute inferbus-encoding says"


def test_what_is_fetched_stays_under_the_cap_and_one_alone_may_be_larger(shop: Shop) -> None:
    shop.ask(b"y" * 5 * MIB)
    for _ in range(20):
        shop.ask(b"x" * MIB)
    with opened(shop.source(max_inflight_bytes=4 * MIB)) as source:
        served = 0
        while served < 21:
            messages = receive(source, 1)
            assert messages
            time.sleep(0.02)  # for more to be fetched than may
            fetched = source._admitted - source._freed
            assert fetched <= (4 * MIB if served else 5 * MIB)
            source.settle(messages)
            served += len(messages)
        assert source.inflight() == (0, 0)


def test_bodies_that_are_forgotten_or_given_back_count_no_longer(shop: Shop) -> None:
    for _ in range(3):
        shop.ask(b"12345")
    with opened(shop.source()) as source:
        one, two, three = receive(source, 3)
        assert source.inflight() == (3, 15)
        source.forget_bodies([one])
        assert (one.body, source.inflight()) == (b"", (3, 10))
        source.release([two])
        assert source.inflight() == (2, 5)
        settle_(source, [one, three])
        assert source.inflight() == (0, 0)


def test_what_waits_when_its_epoch_ends_is_dropped_and_comes_again(shop: Shop, toxiproxy: Toxiproxy) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    for i in range(5):
        shop.ask(b"%d" % i, b"k")
        shop.bus.publish(b"plain", b"k")
    with opened(shop.source()) as source:
        with proxy.silent():
            assert source.receive(10) == []
            time.sleep(0.1)
            shop.inner.lose()
            assert source.inflight() == (0, 0)
            source.tick(time.monotonic())
        assert not source._held
        assert not source._lines
        came = receive(source, 10)
        assert [m.body for m in came] == [b for i in range(5) for b in (b"%d" % i, b"plain")]
        assert {m.attempts for m in came} == {2}
        settle_(source, came)
        assert source.inflight() == (0, 0)


def test_while_s3_is_away_others_pass_nothing_is_lost_and_the_source_says_so(shop: Shop, toxiproxy: Toxiproxy) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    with opened(shop.source()) as source:
        assert source.healthy() is None
        with proxy.cut():
            shop.ask(b"late")
            shop.bus.publish(b"plain")
            assert [m.body for m in receive(source, 1)] == [b"plain"]
            until(source.healthy, source)
            assert f's3: bucket "{shop.bucket}": no answer from {proxy.address}' in (source.healthy() or "")
        assert [m.body for m in receive(source, 1)] == [b"late"]
        assert source.healthy() is None


@contextmanager
def answering(source: ClaimSource, faults: dict[str, Exception]) -> Iterator[None]:
    """S3 answers with a fault whoever asks for these keys, for as long as they are in `faults`."""
    client = source._storage._client
    get = client.get_object

    async def get_object(**asked: Any) -> Any:
        if (fault := faults.get(asked["Key"])) is not None:
            raise fault
        return await get(**asked)

    client.get_object = get_object
    try:
        yield
    finally:
        del client.get_object


FORBIDDEN = ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject")


def test_an_object_that_is_forbidden_holds_up_its_key_alone_until_it_is_allowed(shop: Shop) -> None:
    faults: dict[str, Exception] = {shop.ask(b"a0", b"a"): FORBIDDEN}
    for i in range(1, AT_ONCE + 2):  # more than are fetched at once
        shop.ask(b"a%d" % i, b"a")
    for i in range(2 * AT_ONCE):
        shop.ask(b"%d" % i, b"k%d" % (i % 3))
    with opened(shop.source()) as source, answering(source, faults):
        others = receive(source, 2 * AT_ONCE)
        assert {m.key for m in others} == {b"k0", b"k1", b"k2"}
        assert len(others) == 2 * AT_ONCE
        assert source.healthy() == f's3: bucket "{shop.bucket}": not allowed; grant s3:GetObject'
        faults.clear()
        assert [m.body for m in receive(source, AT_ONCE + 2)] == [b"a%d" % i for i in range(AT_ONCE + 2)]
        assert source.healthy() is None


def test_many_objects_that_are_forbidden_leave_others_their_turn(shop: Shop) -> None:
    faults: dict[str, Exception] = {shop.ask(b"forbidden"): FORBIDDEN for _ in range(2 * AT_ONCE)}
    for i in range(10):
        shop.ask(b"%d" % i)
    with opened(shop.source()) as source, answering(source, faults):
        assert {m.body for m in receive(source, 10)} == {b"%d" % i for i in range(10)}
        faults.clear()
        assert [m.body for m in receive(source, 2 * AT_ONCE)] == [b"forbidden"] * 2 * AT_ONCE


def test_what_the_client_does_not_announce_is_said_once_and_tried_again(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    faults: dict[str, Exception] = {shop.ask(b"1"): RuntimeError("expired"), shop.ask(b"2"): KeyError("Body")}
    with opened(shop.source()) as source, answering(source, faults):
        assert source.receive(10) == []
        until(lambda: len(source._troubles) == 2, source)
        where = f's3: bucket "{shop.bucket}": GetObject failed in the client'
        assert set(source._troubles.values()) == {f"{where} (RuntimeError)", f"{where} (KeyError)"}
        time.sleep(0.3)  # for it to be tried again
        assert len(caplog.messages) == 2
        faults.clear()
        assert {m.body for m in receive(source, 2)} == {b"1", b"2"}


def test_the_trouble_of_an_object_that_waits_for_room_is_over(shop: Shop) -> None:
    shop.ask(b"1234567890")
    with opened(shop.source(max_inflight_bytes=10)) as source:
        first = receive(source, 1)
        faults: dict[str, Exception] = {shop.ask(b"12345"): FORBIDDEN}
        with answering(source, faults):
            assert source.receive(1) == []
            until(source.healthy, source)
            faults.clear()
            until(lambda: source.healthy() is None, source)
            assert receive_now(source) == []
            source.settle(first)
            assert [m.body for m in receive(source, 1)] == [b"12345"]


def receive_now(source: ClaimSource) -> list[Message]:
    time.sleep(0.1)
    return source.receive(10)


def test_what_is_lost_before_it_was_even_asked_for_stands_in_nobodys_way(shop: Shop) -> None:
    for i in range(3 * AT_ONCE):
        shop.ask(b"%d" % i, b"k%d" % (i % 5))
    with opened(shop.source()) as source:
        for i in range(5):
            assert source.receive(100) == []
            shop.inner.lose()
            source.tick(time.monotonic() + i)
        came = receive(source, 3 * AT_ONCE)
        assert sorted(int(m.body) for m in came) == list(range(3 * AT_ONCE))
        settle_(source, came)
        assert source.inflight() == (0, 0)
        assert source._admitted == source._freed


def test_what_is_given_back_while_it_is_fetched_takes_no_room(shop: Shop) -> None:
    for i in range(AT_ONCE):
        shop.ask(b"12345", b"k%d" % (i % 3))
    with opened(shop.source()) as source:
        some = receive(source, 2)
        source.release(some)
        until(lambda: source.inflight() == (0, 0) and not source._fetches, source)
        assert source._admitted == source._freed
        assert len(receive(source, AT_ONCE)) == AT_ONCE


def test_a_message_that_could_not_be_read_is_not_looked_at(shop: Shop) -> None:
    broken = Unreadable("id", None, None, "invalid_request", "half of it is missing", None, b"", shop.claim("in/x"))
    source = shop.source()
    source._sort(broken)
    assert list(source._ready) == [broken]


def test_a_source_is_open_only_when_every_bucket_is_there(shop: Shop) -> None:
    source = ClaimSource(shop.inner, shop.storage(), [S3Place(shop.bucket, ""), S3Place("no-such-one", "")])
    with pytest.raises(Unavailable, match=r'^s3: bucket "no-such-one" does not exist; create it, or correct the name$'):
        source.open(Bell(), no_drain)
    shop.inner.away = "the bus is away"
    with pytest.raises(Unavailable, match="the bus is away"):
        shop_source(shop).open(Bell(), no_drain)


def shop_source(shop: Shop) -> ClaimSource:
    return ClaimSource(shop.inner, shop.storage(), [S3Place(shop.bucket, "in/")])


# Deleting


def test_an_object_is_deleted_once_its_request_is_answered_and_settled_and_only_then(shop: Shop) -> None:
    ok, failed, unsettled = (shop.ask(b"%d" % i) for i in range(3))
    with opened(shop.source(delete=True)) as source:
        one, two, _ = receive(source, 3)
        assert isinstance(two, Claimed)
        assert two.fail() == b""
        assert shop.stored() == {ok, failed, unsettled}
        source.settle([one, two])
        until(lambda: ok not in shop.stored(), source)
    assert shop.stored() == {failed, unsettled}


def test_what_was_settled_last_is_deleted_on_closing(shop: Shop) -> None:
    for i in range(2 * AT_ONCE):
        shop.ask(b"%d" % i)
    with opened(shop.source(delete=True)) as source:
        source.settle(receive(source, 2 * AT_ONCE))
    assert shop.stored() == set()


def test_a_message_that_is_void_deletes_nothing(shop: Shop) -> None:
    at = shop.ask(b"1")
    with opened(shop.source(delete=True)) as source:
        messages = receive(source, 1)
        shop.inner.lose()
        source.settle(messages)
        source.tick(time.monotonic() + 1.0)
        assert source._answered == []
    assert shop.stored() == {at}


def test_an_object_that_cannot_be_deleted_stays_and_holds_nothing_up(
    shop: Shop, toxiproxy: Toxiproxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    at = shop.ask(b"1")
    source = shop.source(delete=True)
    with opened(source):
        messages = receive(source, 1)
        with proxy.cut():
            settle_(source, messages)
            until(lambda: caplog.messages, source)
    assert shop.stored() == {at}
    assert "1 objects could not be deleted and stay: s3: bucket" in caplog.text


def test_objects_whose_deletes_pile_up_are_left(
    shop: Shop, toxiproxy: Toxiproxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferbus.connectors.claims.DELETES", 2)
    monkeypatch.setattr("inferbus.connectors.claims.CLOSING", 0.1)
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    for _ in range(5):
        shop.ask(b"1")
    with opened(shop.source(delete=True)) as source:
        messages = receive(source, 5)
        with proxy.silent():
            settle_(source, messages)
            until(lambda: source._left, source)
            assert (source._left, len(source._deletes)) == (3, 2)
    assert "objects could not be deleted and stay: too many wait for it" in caplog.text


# Out


def outcome(serial: int, size: int) -> tuple[Message, bytes]:
    return Message(f"m{serial}", b"k", b"", (), None, 1, None), b"%d" % serial * size


def outcomes(*sizes: int, first: int = 0) -> Records:
    several = [outcome(i, size) for i, size in enumerate(sizes, first)]
    messages = [m for m, _ in several]
    headers = [[("inferbus-id", m.id.encode()), ("content-type", b"x")] for m in messages]
    return Records(messages, [m.key for m in messages], [body for _, body in several], headers)


def test_a_large_record_lies_in_s3_a_small_one_on_the_bus_and_each_in_its_turn(shop: Shop) -> None:
    sink = shop.sink(over=10)
    sink.open(Bell())
    done: list[Sequence[Failure]] = []
    sink.write(outcomes(11, 10, 20 * MIB), done.append)
    sink.write(outcomes(1, first=3), done.append)
    sink.write(outcomes(50, first=4), done.append)
    until(lambda: sink.tick() or len(done) == 3)  # type: ignore[func-returns-value, redundant-expr]
    sink.close(1.0)
    assert done == [[], [], []]
    assert [name for name, *_ in shop.out.written] == ["m0", "m1", "m2", "m3", "m4"]
    assert [len(body) for _, _, body, _ in shop.out.written] == [0, 10, 0, 1, 0]
    assert [s.body for s in shop.seen()] == [b"0" * 11, b"1" * 10, b"2" * 20 * MIB, b"3", b"4" * 50]
    assert {tuple(s.headers[1:]) for s in shop.seen()} == {(("content-type", b"x"),)}


def test_an_object_that_is_stored_again_overwrites_itself(shop: Shop) -> None:
    for _ in range(2):
        sink = shop.sink(over=10)
        sink.open(Bell())
        assert write(sink, outcomes(11)) == []
        sink.close(1.0)
    name = hashlib.sha256(b"m0" + b"0" * 11).hexdigest()
    assert shop.stored() == {f"out/{name}"}
    assert len(shop.out.written) == 2


def test_a_pointer_is_written_where_the_extended_client_may_read_it(shop: Shop) -> None:
    sink = shop.sink(over=10, pointers=True)
    sink.open(Bell())
    assert write(sink, outcomes(11)) == []
    sink.close(1.0)
    ((_, _, body, headers),) = shop.out.written
    name, place = orjson.loads(body)
    assert name == "software.amazon.payloadoffloading.PayloadS3Pointer"
    assert shop.s3.objects(place["s3BucketName"])[place["s3Key"]] == b"0" * 11
    assert dict(headers)["ExtendedPayloadSize"] == b"11"
    assert orjson.loads(dict(headers)[CLAIM])["url"] == f"s3://{place['s3BucketName']}/{place['s3Key']}"


def test_what_cannot_be_stored_fails_with_all_that_is_behind_it(shop: Shop, toxiproxy: Toxiproxy) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    sink = shop.sink(over=10)
    sink.open(Bell())
    done: list[Sequence[Failure]] = []
    with proxy.cut():
        sink.write(outcomes(1, 11), done.append)
        sink.write(outcomes(1, first=2), done.append)
        until(lambda: sink.tick() or len(done) == 2)  # type: ignore[func-returns-value, redundant-expr]
        assert [[i for i, _ in failures] for failures in done] == [[0, 1], [0]]
        assert all(isinstance(error, Unavailable) for failures in done for _, error in failures)
        assert "no answer" in (sink.healthy() or "")
    assert shop.out.written == []
    assert write(sink, outcomes(1, 11)) == []
    assert sink.healthy() is None
    sink.close(1.0)


class Outlet:
    """Writes records of rising size, and keeps what became of each write."""

    def __init__(self, shop: Shop) -> None:
        self.sink = shop.sink(over=10)
        self.sink.open(Bell())
        self.done: list[tuple[str, int]] = []  # id of the first record, failures

    def write(self, records: Records) -> None:
        id_ = records.messages[0].id
        self.sink.write(records, lambda failures: self.done.append((id_, len(failures))))

    def comes_to(self, count: int) -> list[tuple[str, int]]:
        until(lambda: self.sink.tick() or len(self.done) >= count)  # type: ignore[func-returns-value, redundant-expr]
        return self.done


def test_what_the_sink_could_not_write_takes_with_it_all_that_waits_behind_it(shop: Shop) -> None:
    the = Outlet(shop)
    away = Unavailable("away")
    shop.out.refuse = lambda body: away if body else None
    the.write(outcomes(1))
    the.write(outcomes(20, first=1))
    the.write(outcomes(1, first=2))
    the.sink.tick()  # before anything can have been stored
    assert the.comes_to(3) == [("m0", 1), ("m1", 1), ("m2", 1)]
    assert shop.out.written == []
    shop.out.refuse = lambda _: None
    for i, size in enumerate((1, 20, 1)):
        the.write(outcomes(size, first=i))
    assert the.comes_to(6)[3:] == [("m0", 0), ("m1", 0), ("m2", 0)]
    assert [id_ for id_, *_ in shop.out.written] == ["m0", "m1", "m2"]
    the.sink.close(1.0)


def test_what_could_not_be_stored_fails_after_all_that_is_before_it(shop: Shop, toxiproxy: Toxiproxy) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    the = Outlet(shop)
    shop.out.held = True
    with proxy.cut():
        the.write(outcomes(1))
        the.write(outcomes(20, first=1))
        until(lambda: the.sink._writes[0].error)
        the.sink.tick()
        assert the.done == []
        shop.out.held = False
        shop.out.refuse = lambda _: Unavailable("away")
        assert the.comes_to(2) == [("m0", 1), ("m1", 1)]
    the.sink.close(1.0)


def test_a_record_that_is_refused_takes_no_other_with_it(shop: Shop) -> None:
    the = Outlet(shop)
    shop.out.refuse = lambda body: Refused("never") if body == b"0" else None
    the.write(outcomes(1))
    the.write(outcomes(20, first=1))
    assert the.comes_to(2) == [("m0", 1), ("m1", 0)]
    the.sink.close(1.0)


def test_a_fault_of_the_client_fails_a_write_and_is_over_once_nothing_waits(shop: Shop) -> None:
    the = Outlet(shop)
    client = the.sink._storage._client

    async def put_object(**_: Any) -> None:
        raise RuntimeError("expired")

    client.put_object = put_object
    the.write(outcomes(20))
    assert the.comes_to(1) == [("m0", 1)]
    assert the.sink.healthy() == f's3: bucket "{shop.bucket}": PutObject failed in the client (RuntimeError)'
    the.write(outcomes(1, first=1))
    the.write(outcomes(20, first=2))
    assert the.comes_to(3)[1:] == [("m1", 0), ("m2", 1)]
    assert "RuntimeError" in (the.sink.healthy() or "")
    the.write(outcomes(1, first=3))  # nobody asks for the others again
    assert the.comes_to(4)[3:] == [("m3", 0)]
    assert the.sink.healthy() is None
    the.sink.close(1.0)


class Spent(MemorySink):
    """A sink that can go on no more."""

    def tick(self) -> None:
        raise Fatal("fenced")

    def close(self, timeout: float) -> None:  # noqa: ARG002 - as of a sink
        self.held = True


def test_closing_goes_on_where_the_sink_cannot(shop: Shop) -> None:
    shop.out = Spent()
    the = Outlet(shop)
    the.write(outcomes(20))
    the.sink.close(1.0)
    assert shop.out.held


# A whole pipeline


class Setting:
    """A pipeline on the shop's bus."""

    def __init__(self, shop: Shop, over: int = 100, delete: bool = False, **limits: Any) -> None:
        self.shop = shop
        given = Limits(**{"max_rows": 8, "max_inflight": 64, **limits})
        caps: dict[str, Any] = {"max_inflight": given.max_inflight, "max_inflight_bytes": given.max_inflight_bytes}
        self.source = shop.source(delete=delete, max_message_bytes=given.max_message_bytes, **caps)
        self.errors = MemorySink("memory:errors")
        sinks: list[Sink] = [shop.sink(over)]
        self.pipeline = Pipeline(
            self.source,
            sinks,
            [self.errors],
            partial(codec, "v2", max_message_bytes=given.max_message_bytes),
            [Doubler()],
            lambda signature: warm_up_input(signature, given.max_rows),
            given,
            Metrics(),
            ordered=True,
        )

    def serve(self, count: int) -> None:
        until_ = time.monotonic() + PATIENCE
        self.pipeline.run(lambda now: self.answered() < count and now < until_)
        assert self.answered() == count

    def answered(self) -> int:
        return len(self.shop.out.written) + len(self.errors.written)


def body_of(value: float, rows: int = 1) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [value] * 2 * rows}
    return orjson.dumps({"inputs": [tensor]})


@pytest.fixture
def running(shop: Shop) -> Iterator[Callable[..., Setting]]:
    started: list[Setting] = []

    def start(**settings: Any) -> Setting:
        started.append(Setting(shop, **settings))
        started[0].pipeline.start(5.0)
        return started[0]

    yield start
    for setting in started:
        setting.pipeline.close(1.0)


@pytest.mark.parametrize("limits", [{"max_inflight": 1}, {"max_inflight": 3}, {"max_inflight_bytes": 1000}, {}])
def test_whatever_the_caps_every_request_gets_its_answer_in_the_order_of_its_key(
    shop: Shop, running: Callable[..., Setting], limits: dict[str, Any]
) -> None:
    for i in range(60):
        publish = shop.ask if i % 4 else partial(shop.bus.publish)
        publish(body_of(i, rows=1 + i % 7), b"k%d" % (i % 3), (("inferbus-id", b"%d" % i),))
    s = running(**limits)
    s.serve(60)
    for key in range(3):
        assert [int(i) for i, k, _, _ in shop.out.written if k == b"k%d" % key] == list(range(key, 60, 3))
    for (id_, *_), seen in zip(shop.out.written, shop.seen(), strict=True):
        assert set(orjson.loads(seen.body)["outputs"][0]["data"]) == {2.0 * int(id_)}
    until(s.pipeline.idle)
    assert s.source.inflight() == (0, 0)


class PrefixSource(MemorySource):
    """Counts, as Kafka's does, what is settled behind something that is not."""

    def __init__(self, bus: MemoryBus) -> None:
        super().__init__(bus)
        self._sizes: dict[int, int] = {}

    def receive(self, limit: int) -> list[Message]:
        messages = super().receive(limit)
        self._sizes |= {PLACE(m.receipt): len(m.body) for m in messages}
        return messages

    def inflight(self) -> tuple[int, int]:
        first = min(self._inflight, default=None)
        behind = [size for place, size in self._sizes.items() if first is not None and place >= first]
        return len(behind), sum(behind)


def test_a_body_that_is_nothing_is_received_where_all_else_waits_for_it(
    shop: Shop, running: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.MemorySource", PrefixSource)
    shop.bus.publish(b"", None, shop.claim("in/none"))
    for i in range(20):
        shop.bus.publish(body_of(i))
    s = running(max_inflight_bytes=20 * len(body_of(0)))
    s.serve(21)
    until(s.pipeline.idle)


def test_an_error_record_is_the_message_as_it_came_and_its_object_stays(
    shop: Shop, running: Callable[..., Setting]
) -> None:
    asked = {
        "ok": shop.ask(body_of(1), b"k", (("inferbus-id", b"ok"),)),
        "decode": shop.ask(b"{", b"k", (("inferbus-id", b"decode"), ("h", b"1"), ("h", b"2"))),
        "predict": shop.ask(body_of(666), None, (("inferbus-id", b"predict"),)),
    }
    missing = (("inferbus-id", b"receive"), *shop.claim("in/none"))
    shop.bus.publish(b"", b"key", missing)
    s = running(delete=True)
    s.serve(4)
    until(lambda: asked["ok"] not in shop.stored(), s.source)
    assert {asked["decode"], asked["predict"]} <= shop.stored()
    records = {i: (key, body, headers) for i, key, body, headers in s.errors.written}
    errors = {i: orjson.loads(headers[-1][1]) for i, (_, _, headers) in records.items()}
    assert {(i, error["stage"]) for i, error in errors.items()} == {(i, i) for i in ("receive", "decode", "predict")}
    assert all("body" not in error for error in errors.values())
    key, body, headers = records["decode"]
    assert (key, body) == (b"k", b"")
    assert tuple(headers[:-1]) == (("inferbus-id", b"decode"), ("h", b"1"), ("h", b"2"), *shop.claim(asked["decode"]))
    assert records["receive"] == (b"key", b"", [*missing, headers_of(records["receive"])])


def headers_of(record: tuple[Any, Any, list[tuple[str, bytes]]]) -> tuple[str, bytes]:
    return record[2][-1]


def test_when_s3_is_away_predictions_wait_and_are_written_in_order(
    shop: Shop, toxiproxy: Toxiproxy, running: Callable[..., Setting]
) -> None:
    proxy = toxiproxy.before(shop.s3.url.rpartition("/")[2])
    shop.url = f"http://{proxy.address}"
    s = running(over=200)
    with proxy.cut():
        for i in range(30):
            shop.bus.publish(body_of(i, rows=20 if i % 3 == 1 else 1), b"k", (("inferbus-id", b"%d" % i),))
        until_ = time.monotonic() + 1.0
        s.pipeline.run(lambda now: now < until_)
        assert s.pipeline.ready()
    s.serve(30)
    assert [int(i) for i, *_ in shop.out.written] == list(range(30))
    assert [len(body) == 0 for _, _, body, _ in shop.out.written] == [i % 3 == 1 for i in range(30)]
    until(s.pipeline.idle)
