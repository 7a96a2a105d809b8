"""SQS on a real server, and the mapping between records and messages by itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferbus.connectors.aws import Loop
from inferbus.connectors.base import (
    Bell,
    Failure,
    Headers,
    Message,
    Misconfigured,
    Records,
    Source,
    TooLarge,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.sqs import SqsSink, SqsSource, _Entry, _Outgoing, _Write
from inferbus.connectors.sqs_mapping import Malformed, decoded, encoded, group_of, size_of
from tests.connector_contract import (
    PATIENCE,
    ConnectorContract,
    Place,
    Seen,
    no_drain,
    opened,
    receive,
    records,
    settle,
    write,
)
from tests.servers import Sqs

SHORT = 2.0  # seconds of visibility: how long a test waits for what a crash held back


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "inferbus")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class SqsPlace(Place):
    def __init__(self, server: Sqs, *, fifo: bool = False) -> None:
        self.server = server
        self.requests = server.queue(fifo=fifo)
        self.answers = server.queue(fifo=fifo)
        self._fifo = fifo
        self._count = 0

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        text, attributes, _ = encoded(key, body, headers)
        self.send(text, attributes, key)

    def send(self, text: str, attributes: dict[str, Any], key: bytes | None = None) -> None:
        self._count += 1
        own = f"{self._count}"
        fifo = {"MessageGroupId": group_of(key, own), "MessageDeduplicationId": own} if self._fifo else {}
        url = self.server.address(self.requests)
        self.server.client.send_message(QueueUrl=url, MessageBody=text, MessageAttributes=attributes, **fifo)

    def source(self, group: str = "g", **settings: Any) -> SqsSource:  # noqa: ARG002 - a queue has no groups
        settings = {"visibility_timeout": SHORT, "max_inflight": 100, **settings}
        return SqsSource(self.requests, region=self.server.region, endpoint_url=self.server.url, **settings)

    def sink(self, **settings: Any) -> SqsSink:
        return SqsSink(self.answers, region=self.server.region, endpoint_url=self.server.url, **settings)

    def raw(self) -> list[dict[str, Any]]:
        """Everything in the sink's queue, as SQS has it; deleted from there."""
        url = self.server.address(self.answers)
        found: list[dict[str, Any]] = []
        wanted = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"], "MaxNumberOfMessages": 10}
        while came := self.server.client.receive_message(QueueUrl=url, **wanted).get("Messages", []):
            found += came
            for m in came:  # or a FIFO queue keeps the rest of the group back
                self.server.client.delete_message(QueueUrl=url, ReceiptHandle=m["ReceiptHandle"])
        return found

    def seen(self) -> list[Seen]:
        found: list[Seen] = []
        for raw in self.raw():
            key, body, headers = decoded(raw)
            found.append(Seen(key, body, list(headers)))
        return found

    def left(self) -> tuple[int, int]:
        """Messages of the requests that are visible, and that are not."""
        url = self.server.address(self.requests)
        found = self.server.client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        return int(found["ApproximateNumberOfMessages"]), int(found["ApproximateNumberOfMessagesNotVisible"])

    def kill(self, source: Source) -> None:
        assert isinstance(source, SqsSource)
        source._disconnect(orderly=False)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


class SqsContract(ConnectorContract):
    """The contract, and what only SQS promises."""

    def test_what_is_held_stays_ours_for_longer_than_its_timeout(self, place: SqsPlace) -> None:
        place.publish(b"one", key=b"k")
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
            with opened(place.source()) as other:
                until_then = time.monotonic() + 1.7 * SHORT
                while time.monotonic() < until_then:
                    assert other.receive(1) == []
                    time.sleep(0.05)
            assert not source.void(message)
            settle(source, [message])
            assert source.inflight() == (0, 0)
        assert place.left() == (0, 0)

    def test_closing_leaves_nothing_invisible_and_nothing_settled(self, place: SqsPlace) -> None:
        for i in range(30):
            place.publish(b"%d" % i, key=b"k%d" % i)
        source = place.source(visibility_timeout=600.0)
        source.open(Bell(), no_drain)
        messages = receive(source, 20)
        source.settle(messages[:5])
        began = time.monotonic()
        source.close()
        assert time.monotonic() - began < 2.5
        assert place.left() == (25, 0)
        assert source.inflight() == (0, 0)

    def test_what_is_released_is_there_for_others_at_once(self, place: SqsPlace) -> None:
        for i in range(12):
            place.publish(b"%d" % i, key=b"k%d" % i)
        with opened(place.source(visibility_timeout=600.0)) as source:
            messages = receive(source, 12)
            source.release(messages)
            until(lambda: place.left() == (12, 0))  # and the source itself takes no more
            assert all(source.void(m) for m in messages)
            source.settle(messages)  # changes nothing
            source.tick(time.monotonic())
            assert source.inflight() == (0, 0)
        with opened(place.source()) as other:
            again = receive(other, 12)
            assert sorted(m.body for m in again) == sorted(m.body for m in messages)
            settle(other, again)
        assert place.left() == (0, 0)

    def test_bodies_that_are_forgotten_make_room_and_are_settled_as_any(self, place: SqsPlace) -> None:
        for i in range(3):
            place.publish(b"%d" % i * 2000, key=b"%d" % i)
        with opened(place.source(max_inflight_bytes=2100)) as source:
            messages = receive(source, 1)
            source.forget_bodies(messages)
            source.forget_bodies(messages)  # changes nothing
            assert source.inflight() == (1, 1)
            assert [m.body for m in messages] == [b""]
            messages += receive(source, 1)
            assert len(messages) == 2
            run = source.run(messages)
            assert run is not None
            assert run[0].startswith(f"{place.requests}/")
            assert run[1] == messages
            settle(source, messages)
            assert source.inflight() == (0, 0)

    def test_attempts_are_counted_over_crashes(self, place: SqsPlace) -> None:
        place.publish(b"one")
        for attempt in (1, 2):
            source = place.source()
            source.open(Bell(), no_drain)
            assert [m.attempts for m in receive(source, 1)] == [attempt]
            place.kill(source)

    def test_no_more_is_held_than_there_is_room_for(self, place: SqsPlace) -> None:
        for i in range(60):
            place.publish(b"%d" % i, key=b"k%d" % i)
        with opened(place.source(max_inflight=25)) as source:
            until(lambda: place.left()[1] == 25)
            messages = receive(source, 25)
            for _ in range(20):
                assert source.receive(10) == []
                time.sleep(0.02)
            assert place.left() == (35, 25)
            settle(source, messages)
            settle(source, receive(source, 25))
            settle(source, receive(source, 10))
        assert place.left() == (0, 0)

    def test_a_message_larger_than_all_the_room_is_served_alone(self, place: SqsPlace) -> None:
        for i in range(3):
            place.publish(b"%d" % i * 2000, key=b"k%d" % i)
        with opened(place.source(max_inflight_bytes=1000)) as source:
            settle(source, receive(source, 1))
            for _ in range(2):
                messages = receive(source, 1)
                assert len(messages) == 1
                assert place.left()[1] == 1
                settle(source, messages)

    def test_records_of_many_sizes_all_arrive(self, place: SqsPlace) -> None:
        sink = place.sink()
        sink.open(Bell())
        given = records(200)
        given.bodies = [b"%d:" % i + b"x" * (i * 370 % 50_000) for i in range(200)]
        assert write(sink, given) == []
        sink.close(1.0)
        assert sorted(seen.body for seen in place.seen()) == sorted(given.bodies)

    def test_a_record_over_the_limit_harms_only_itself(self, place: SqsPlace) -> None:
        sink = place.sink()
        sink.open(Bell())
        given = records(10)
        given.bodies = [b"x" * (2**20 + 1 if i == 3 else 300_000 if i == 7 else 100_000) for i in range(10)]
        failures = write(sink, given)  # the server at hand takes 256 KiB in one call, the real one 1 MiB
        assert [position for position, _ in failures] == [3, 7]
        assert all(isinstance(error, TooLarge) for _, error in failures)
        sink.close(1.0)
        assert len(place.seen()) == 8


@pytest.mark.broker
class TestStandardQueue(SqsContract):
    @pytest.fixture
    def place(self, sqs: Sqs) -> Place:
        return SqsPlace(sqs)


@pytest.mark.broker
class TestFifoQueue(SqsContract):
    @pytest.fixture
    def place(self, sqs: Sqs) -> Place:
        return SqsPlace(sqs, fifo=True)

    def test_the_messages_of_a_group_come_in_order(self, place: SqsPlace) -> None:
        for i in range(40):
            place.publish(b"%d" % i, key=b"k%d" % (i % 3))
        came: list[Message] = []
        with opened(place.source()) as source:
            while len(came) < 40:
                messages = receive(source, 1)
                assert messages
                came += messages
                settle(source, messages)
        for key in (b"k0", b"k1", b"k2"):
            numbers = [int(m.body) for m in came if m.key == key]
            assert numbers == sorted(numbers)

    def test_the_records_of_a_key_arrive_in_the_order_of_their_writes(self, place: SqsPlace) -> None:
        sink = place.sink()
        sink.open(Bell())
        verdicts: list[Sequence[Failure]] = []
        for i in range(50):
            sink.write(plain([b"k0", b"k1", b"k2"], b"%d" % i), verdicts.append)
        until(lambda: reported(sink, verdicts, 50))
        assert not any(verdicts)
        sink.close(1.0)
        found = place.raw()
        for key in ("k0", "k1", "k2"):
            numbers = [int(raw["Body"]) for raw in found if raw["Attributes"]["MessageGroupId"] == key]
            assert numbers == list(range(50))

    def test_a_record_written_again_is_there_once_and_two_outcomes_of_one_id_are_both(self, place: SqsPlace) -> None:
        sink = place.sink()
        sink.open(Bell())
        given = plain([b"k", b"k"], b"same")
        given.messages = [given.messages[0], Message("m0", b"k", b"", (), None, 1, None)]
        first = _Write(given.messages, lambda _: None, 0.0)
        first.tokens = {i: sink._token(m) for i, m in enumerate(given.messages)}
        for i, token in first.tokens.items():
            request = {"MessageBody": "same", "MessageGroupId": "k", "MessageDeduplicationId": token}
            sink._sends.put([_Outgoing(first, i, request, 10, "k")])
        until(lambda: first.left == 0)
        first.failures = [(i, Unavailable("the answer was lost")) for i in (0, 1)]
        sink._remember(first)
        assert write(sink, given) == []
        sink.close(1.0)
        assert len(place.raw()) == 2

    def test_nothing_overtakes_what_is_to_be_written_again(self, place: SqsPlace) -> None:
        sink = place.sink()
        sink.open(Bell())
        sink._failing = Unavailable("as if a call had failed")
        verdicts: list[Sequence[Failure]] = []
        for _ in range(2):
            sink.write(plain([b"k"], b"x"), verdicts.append)
        until(lambda: reported(sink, verdicts, 2))
        assert [[position for position, _ in failures] for failures in verdicts] == [[0], [0]]
        assert write(sink, plain([b"k"], b"x")) == []
        sink.close(1.0)


def reported(sink: SqsSink, verdicts: Sequence[object], count: int) -> bool:
    sink.tick()
    return len(verdicts) == count


def plain(keys: Sequence[bytes | None], body: bytes) -> Records:
    messages = [Message(f"m{i}", key, b"", (), None, 1, None) for i, key in enumerate(keys)]
    return Records(messages, keys, [body] * len(keys), [[] for _ in keys])


@pytest.fixture
def place(sqs: Sqs) -> SqsPlace:
    return SqsPlace(sqs)


@pytest.mark.broker
def test_a_queue_is_found_by_its_url_alone(place: SqsPlace) -> None:
    place.publish(b"one")
    source = SqsSource(place.server.address(place.requests), region="us-east-1", visibility_timeout=SHORT)
    with opened(source):
        (message,) = receive(source, 1)
        assert source.locate(message) == f"sqs:{place.requests}/{message.id}"
        assert message.created_at == pytest.approx(time.time(), abs=60)


@pytest.mark.broker
def test_a_missing_queue_is_one_clear_line(sqs: Sqs) -> None:
    where = {"region": sqs.region, "endpoint_url": sqs.url}
    expected = '^sqs: queue "no-such" does not exist; create it, or correct the name$'
    with pytest.raises(Unavailable, match=expected):
        SqsSource("no-such", **where).open(Bell(), no_drain)  # type: ignore[arg-type]
    sink = SqsSink("no-such", **where)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=expected):
        sink.open(Bell())
    sqs.client.create_queue(QueueName="no-such")
    sink.open(Bell())  # may be called again
    sink.close(0.1)
    sqs.client.delete_queue(QueueUrl=sqs.address("no-such"))


def test_a_wrong_endpoint_is_one_clear_line_without_the_password_in_it() -> None:
    source = SqsSource("q", region="us-east-1", endpoint_url="http://me:secret@127.0.0.1:1")
    with pytest.raises(Unavailable, match=r'^sqs: queue "q": no answer from 127\.0\.0\.1:1 ') as caught:
        source.open(Bell(), no_drain)
    assert "secret" not in str(caught.value)


def test_a_missing_region_and_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match=r"^sqs: no region: set `region`, or AWS_REGION in the environment$"):
        SqsSource("q").open(Bell(), no_drain)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(Unavailable, match=r"^sqs: no credentials were found; check AWS_ACCESS_KEY_ID"):
        SqsSink("q", region="us-east-1", endpoint_url="http://127.0.0.1:1").open(Bell())


@pytest.mark.broker
def test_the_source_tells_when_the_queue_goes_away_and_goes_on_when_it_is_back(place: SqsPlace) -> None:
    with opened(place.source()) as source:
        place.server.client.delete_queue(QueueUrl=place.server.address(place.requests))

        def told() -> bool:
            try:
                return source.receive(1) != []
            except Unavailable as error:
                return "does not exist" in str(error)

        until(told)
        assert "does not exist" in (source.healthy() or "")
        place.server.client.create_queue(QueueName=place.requests)
        place.publish(b"back")
        until(lambda: source.healthy() is None)
        settle(source, receive(source, 1))
        assert source.inflight() == (0, 0)


@pytest.mark.broker
def test_a_message_that_comes_anew_while_it_is_held_is_served_once_and_deleted_by_its_newest_receipt(
    place: SqsPlace,
) -> None:
    place.publish(b"one")
    with opened(place.source(visibility_timeout=600.0)) as source:
        (message,) = receive(source, 1)
        receipt: Any = message.receipt
        first = receipt.receipt
        url = place.server.address(place.requests)
        # Behind the source's back, as if it had not been renewed in time.
        place.server.client.change_message_visibility(QueueUrl=url, ReceiptHandle=first, VisibilityTimeout=0)
        until(lambda: receipt.receipt != first)
        assert source.receive(10) == []
        settle(source, [message])
        assert source.inflight() == (0, 0)
    assert place.left() == (0, 0)


@pytest.mark.broker
def test_a_message_that_others_took_is_void_and_frees_its_room(place: SqsPlace) -> None:
    place.publish(b"one")
    place.publish(b"two")
    url = place.server.address(place.requests)
    with opened(place.source()) as source:
        one, two = receive(source, 2)
        receipt: Any = one.receipt
        place.server.client.delete_message(QueueUrl=url, ReceiptHandle=receipt.receipt)  # as whoever took it does
        until(lambda: source.void(one))
        source.tick(time.monotonic())
        assert source.inflight() == (1, 3)
        assert not source.void(two)
        settle(source, [one, two])
        assert source.inflight() == (0, 0)


@pytest.mark.broker
def test_of_a_call_of_ten_only_what_failed_is_lost_from_hold(place: SqsPlace) -> None:
    for i in range(10):
        place.publish(b"%d" % i)
    url = place.server.address(place.requests)
    with opened(place.source(visibility_timeout=600.0)) as source:
        messages = receive(source, 10)
        receipt: Any = messages[4].receipt
        place.server.client.delete_message(QueueUrl=url, ReceiptHandle=receipt.receipt)
        settle(source, messages)
        assert [source.void(m) for m in messages] == [i == 4 for i in range(10)]
        assert source.inflight() == (0, 0)
    assert place.left() == (0, 0)


@pytest.mark.broker
def test_a_message_that_is_not_what_it_says_becomes_unreadable_and_harms_no_other(place: SqsPlace) -> None:
    base64 = {"inferbus-encoding": {"DataType": "String", "StringValue": "base64"}}
    own = {"inferbus-id": {"DataType": "String", "StringValue": "mine"}}
    place.send("not base64!", base64 | own)
    place.publish(b"fine")
    with opened(place.source()) as source:
        bad, good = sorted(receive(source, 2), key=lambda m: m.body, reverse=True)
        assert isinstance(bad, Unreadable)
        assert (bad.id, bad.code, bad.body) == ("mine", "invalid_request", b"not base64!")
        assert bad.reason == "the body is not base64, as attribute inferbus-encoding says"
        assert good.body == b"fine"
        settle(source, [bad, good])


@pytest.mark.broker
def test_connectors_may_share_a_loop_which_ends_with_the_last(place: SqsPlace) -> None:
    loop = Loop()
    source, sink = place.source(loop=loop), place.sink(loop=loop)
    source.open(Bell(), no_drain)
    sink.open(Bell())
    thread = loop._thread
    source.close()
    assert thread.is_alive()
    assert write(sink, records(3)) == []
    sink.close(1.0)
    assert not thread.is_alive()


@pytest.mark.broker
def test_an_idle_source_asks_with_one_call_and_a_busy_one_with_more(place: SqsPlace) -> None:
    entries = [{"Id": str(i), "MessageBody": "x"} for i in range(10)]
    for _ in range(60):
        place.server.client.send_message_batch(QueueUrl=place.server.address(place.requests), Entries=entries)
    with opened(place.source(max_inflight=2000, receivers=8)) as source:
        most, left = 0, 600
        while left:
            messages = receive(source, 1, limit=100)
            most = max(most, len(source._polls))  # type: ignore[attr-defined]
            left -= len(messages)
            source.settle(messages)
        assert 1 < most <= 8
        until(lambda: len(source._polls) == 1)  # type: ignore[attr-defined]


@pytest.mark.broker
def test_lag_is_what_waits_on_the_queue(place: SqsPlace) -> None:
    for i in range(7):
        place.publish(b"%d" % i)
    with opened(place.source()) as source:
        assert source.lag() == 7


def test_nothing_is_held_for_longer_than_sqs_allows() -> None:
    source = SqsSource("q", visibility_timeout=600.0)
    source._bell = Bell()
    source._closing = True
    entry = _Entry({"MessageId": "m", "ReceiptHandle": "r", "Body": "x"}, 0.0)
    source._held, source._held_bytes = {"m": entry}, entry.size
    for now, deadline, due in ((100, 600, False), (400, 600, True), (43_000, 43_100, True), (43_050, 43_140, False)):
        entry.deadline = float(deadline)
        assert source._due(float(now)) == ([entry] if due else [])
    assert source._reach(entry, 43_000.0) <= 43_200.0
    assert source._held == {"m": entry}
    assert source._due(43_141.0) == []
    assert source._held == {}
    assert entry.void


# The mapping


def as_received(text: str, attributes: dict[str, Any], group: str | None = None) -> dict[str, Any]:
    raw: dict[str, Any] = {"MessageId": "m", "Body": text, "MessageAttributes": attributes, "Attributes": {}}
    if group:
        raw["Attributes"]["MessageGroupId"] = group
    return raw


NAMES = st.sampled_from(["inferbus-id", "a", "b.c", "d..e", "AWS.x", "amazon.y", ".f", "é", "\ufffe", "inferbus-key"])
HEADERS = st.lists(st.tuples(NAMES | st.text(max_size=5), st.binary(max_size=20)), max_size=13)


@given(st.none() | st.binary(min_size=1, max_size=20), st.binary(max_size=50), HEADERS)
def test_a_record_comes_back_as_it_went(key: bytes | None, body: bytes, headers: list[tuple[str, bytes]]) -> None:
    text, attributes, size = encoded(key, body, headers)
    assert text
    assert len(attributes) <= 10
    assert size >= len(text.encode())
    back_key, back_body, back_headers = decoded(as_received(text, attributes))
    assert (back_key, back_body) == (key, body)
    if "inferbus-headers" in attributes:
        assert list(back_headers) == headers
    else:
        assert sorted(back_headers) == sorted(headers)


@given(st.text(max_size=50))
def test_text_that_sqs_allows_travels_as_it_is(text: str) -> None:
    sent, attributes, _ = encoded(None, text.encode(), [])
    forbidden = any((ord(c) < 32 and c not in "\t\n\r") or c in "\ufffe\uffff" for c in text)
    assert (sent == text) == (bool(text) and not forbidden)
    assert ("inferbus-encoding" in attributes) == (sent != text)


def test_headers_are_attributes_where_sqs_can_carry_them() -> None:
    headers = [("inferbus-id", b"r1"), ("content-type", b"application/json"), ("raw", b"\xff")]
    text, attributes, size = encoded(b"k", b"{}", headers)
    assert text == "{}"
    assert attributes == {
        "inferbus-key": {"DataType": "String", "StringValue": "k"},
        "inferbus-id": {"DataType": "String", "StringValue": "r1"},
        "content-type": {"DataType": "String", "StringValue": "application/json"},
        "raw": {"DataType": "Binary", "BinaryValue": b"\xff"},
    }
    names = sum(len(name) + 6 for name in attributes)  # each with its type, String or Binary
    assert size == 2 + names + 1 + 2 + 16 + 1


@pytest.mark.parametrize(
    "headers",
    [
        [("a", b"1"), ("a", b"2")],
        [("a", b"")],
        [("AWS.a", b"1")],
        [("a b", b"1")],
        [("inferbus-headers", b"1")],
        [(f"h{i}", b"1") for i in range(11)],
    ],
)
def test_headers_sqs_cannot_carry_go_as_json_and_the_id_stays_where_anyone_finds_it(
    headers: list[tuple[str, bytes]],
) -> None:
    headers = [*headers, ("inferbus-id", b"r1")]
    _, attributes, _ = encoded(None, b"x", headers)
    assert set(attributes) == {"inferbus-headers", "inferbus-id"}
    assert orjson.loads(attributes["inferbus-headers"]["StringValue"]) == [[n, v.decode()] for n, v in headers]


def test_attributes_beside_the_json_are_headers_too() -> None:
    attributes = {
        "inferbus-headers": {"DataType": "String", "StringValue": '[["a","1"],["b",{"base64":"/w=="}]]'},
        "a": {"DataType": "String", "StringValue": "old"},
        "n": {"DataType": "Number", "StringValue": "7"},
    }
    assert decoded(as_received("x", attributes)) == (None, b"x", (("a", b"1"), ("b", b"\xff"), ("n", b"7")))


@pytest.mark.parametrize(
    "packed", ["{", "7", '"ab"', "[1]", '[["a"]]', '[["a",1]]', '[[1,"a"]]', '[["a",{}]]', '[["a",{"base64":"!"}]]']
)
def test_headers_that_are_no_such_list_are_malformed(packed: str) -> None:
    with pytest.raises(Malformed, match="attribute inferbus-headers: expected a JSON list"):
        decoded(as_received("x", {"inferbus-headers": {"DataType": "String", "StringValue": packed}}))


def test_an_encoding_nobody_knows_is_malformed() -> None:
    with pytest.raises(Malformed, match="attribute inferbus-encoding: expected base64"):
        decoded(as_received("x", {"inferbus-encoding": {"DataType": "String", "StringValue": "gzip"}}))


def test_the_group_of_a_message_is_its_key_unless_it_has_one() -> None:
    assert decoded(as_received("x", {}, "g"))[0] == b"g"
    assert decoded(as_received("x", encoded(b"k", b"x", [])[1], "g"))[0] == b"k"


def test_a_key_sqs_does_not_allow_as_a_group_is_hashed_and_no_key_gives_a_group_of_its_own() -> None:
    assert group_of(b"user-7", "r1") == "user-7"
    hashed = {group_of(key, "r1") for key in (b"a b", b"\xff", b"x" * 129, None)}
    assert len(hashed) == 4
    assert all(len(group) == 64 for group in hashed)
    assert group_of(None, "r1") != group_of(None, "r2")


def test_what_a_message_takes_counts_its_attributes() -> None:
    attributes = {"a": {"DataType": "Binary", "BinaryValue": b"123"}, "b": {"DataType": "String", "StringValue": "12"}}
    assert size_of(as_received("x" * 10, attributes)) == 15


# Packing


def outgoing(size: int, group: str | None = None) -> _Outgoing:
    return _Outgoing(_Write([], lambda _: None, 0.0), 0, {}, size, group)


def packed(sizes: Sequence[int]) -> list[list[int]]:
    sink = SqsSink("q")
    sink._busy = set()
    waiting = deque(outgoing(size) for size in sizes)
    calls: list[list[int]] = []
    while waiting:
        calls.append([o.size for o in sink._take(waiting)])
    return calls


@given(st.lists(st.integers(1, 2**20), max_size=40))
def test_calls_are_packed_in_order_by_count_and_by_bytes(sizes: list[int]) -> None:
    calls = packed(sizes)
    assert [size for call in calls for size in call] == sizes
    assert all(1 <= len(call) <= 10 for call in calls)
    assert all(len(call) == 1 or sum(call) < 2**20 for call in calls)


def test_a_call_is_as_full_as_can_be() -> None:
    assert list(map(len, packed([100] * 25))) == [10, 10, 5]
    assert list(map(len, packed([400_000] * 5))) == [2, 2, 1]


def test_a_group_with_a_call_under_way_waits() -> None:
    sink = SqsSink("q.fifo")
    sink._busy = set()
    waiting = deque(outgoing(1, group) for group in ("a", "b", "a", "c"))
    assert [o.group for o in sink._take(waiting)] == ["a", "b", "a", "c"]
    waiting.extend(outgoing(1, group) for group in ("d", "b", "e"))
    assert [o.group for o in sink._take(waiting)] == ["d"]
    assert sink._take(waiting) == []
    sink._busy.clear()
    assert [o.group for o in sink._take(waiting)] == ["b", "e"]
