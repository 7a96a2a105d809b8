"""What every bus promises the pipeline. Subclass `ConnectorContract` once per bus and give it a `Place`.

A place is one queue or topic for requests and one for records, with the means to look at both from outside.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from inferbus.connectors.base import Bell, Failure, Headers, Message, Records, Sink, Source

PATIENCE = 30.0  # seconds a real server may take


@dataclass
class Seen:
    """A record as a reader of the sink finds it."""

    key: bytes | None
    body: bytes
    headers: list[tuple[str, bytes]]


class Place(ABC):
    """A bus under test."""

    @abstractmethod
    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        """Put one request on the bus."""

    @abstractmethod
    def source(self, group: str = "g") -> Source:
        """A source of the requests, not opened."""

    @abstractmethod
    def sink(self) -> Sink:
        """A sink, not opened."""

    @abstractmethod
    def seen(self) -> list[Seen]:
        """Everything durable in the sink."""

    def kill(self, source: Source) -> None:
        """End a source as a crash would: nothing committed, nothing released."""
        raise NotImplementedError


def no_drain(_finished: Callable[[], bool], _budget: float) -> None:
    """For sources nothing is taken from while a test looks."""


@contextmanager
def opened(source: Source) -> Iterator[Source]:
    source.open(Bell(), no_drain)
    try:
        yield source
    finally:
        source.close()


def receive(source: Source, count: int, limit: int = 100) -> list[Message]:
    """Exactly `count` messages, or whatever came in time."""
    messages: list[Message] = []
    until = time.monotonic() + PATIENCE
    while len(messages) < count and time.monotonic() < until:
        messages += source.receive(min(limit, count - len(messages)))
        source.tick(time.monotonic())
        time.sleep(0.002)
    return messages


def settle(source: Source, messages: Sequence[Message]) -> None:
    """Settle, and wait until the bus has confirmed."""
    source.settle(messages)
    until = time.monotonic() + PATIENCE
    while source.inflight()[0] and time.monotonic() < until:
        source.tick(time.monotonic())
        source.rest()
        time.sleep(0.01)


def write(sink: Sink, records: Records) -> list[Failure]:
    """Write and wait for the verdict."""
    verdicts: list[Sequence[Failure]] = []
    sink.write(records, verdicts.append)
    until = time.monotonic() + PATIENCE
    while not verdicts and time.monotonic() < until:
        sink.tick()
        time.sleep(0.002)
    assert len(verdicts) == 1, "done is called exactly once"
    return list(verdicts[0])


def records(count: int) -> Records:
    messages = [Message(f"m{i}", b"k%d" % i, b"", (), None, 1, None) for i in range(count)]
    return Records(
        messages,
        [m.key for m in messages],
        [b'{"n": %d}' % i for i in range(count)],
        [
            [("inferbus-id", m.id.encode()), ("twice", b"1"), ("twice", b"2"), ("raw", bytes(range(256)))]
            for m in messages
        ],
    )


class ConnectorContract:
    """Subclass and give the fixture `place`."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError

    def test_an_unsettled_message_comes_again_after_a_crash(self, place: Place) -> None:
        place.publish(b"one")
        first = place.source()
        first.open(Bell(), no_drain)
        assert [m.body for m in receive(first, 1)] == [b"one"]
        place.kill(first)
        with opened(place.source()) as second:
            assert [m.body for m in receive(second, 1)] == [b"one"]

    def test_a_settled_message_is_gone(self, place: Place) -> None:
        place.publish(b"one")
        with opened(place.source()) as first:
            settle(first, receive(first, 1))
            assert first.inflight() == (0, 0)
        place.publish(b"two")
        with opened(place.source()) as second:
            assert [m.body for m in receive(second, 1)] == [b"two"]

    def test_settling_out_of_order_never_loses_what_lies_between(self, place: Place) -> None:
        for i in range(4):
            place.publish(b"%d" % i, key=b"same")
        first = place.source()
        first.open(Bell(), no_drain)
        messages = receive(first, 4)
        first.settle([m for m in messages if m.body != b"1"])
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            first.tick(time.monotonic())
            first.receive(1)
            time.sleep(0.01)
        place.kill(first)
        with opened(place.source()) as second:
            assert b"1" in [m.body for m in receive(second, 1)]

    def test_ids_are_stable_across_deliveries_and_given_ids_win(self, place: Place) -> None:
        place.publish(b"plain")
        place.publish(b"named", headers=(("inferbus-id", b"mine"),))
        place.publish(b"event", headers=(("ce_id", b"7"), ("ce_source", b"/shop")))
        first = place.source()
        first.open(Bell(), no_drain)
        before = {m.body: m.id for m in receive(first, 3)}
        place.kill(first)
        with opened(place.source()) as second:
            after = {m.body: m.id for m in receive(second, 3)}
        assert before == after
        assert before[b"named"] == "mine"
        assert before[b"event"] == "/shop/7"
        assert before[b"plain"]

    def test_the_limit_is_kept_and_an_empty_bus_answers_at_once(self, place: Place) -> None:
        with opened(place.source()) as source:
            assert source.receive(10) == []
            for i in range(5):
                place.publish(b"%d" % i)
            chunks: list[list[Message]] = []
            until = time.monotonic() + PATIENCE
            while sum(map(len, chunks)) < 5 and time.monotonic() < until:
                chunks.append(source.receive(2))
                time.sleep(0.002)
            assert max(map(len, chunks)) <= 2
            assert sum(map(len, chunks)) == 5

    def test_keys_bodies_and_headers_come_byte_for_byte(self, place: Place) -> None:
        headers = (("a", b"1"), ("a", b"2"), ("raw", bytes(range(256))), ("empty", b""))
        place.publish(bytes(range(256)), key=b"\x00\xffkey", headers=headers)
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
        assert message.body == bytes(range(256))
        assert message.key == b"\x00\xffkey"
        assert message.headers == headers
        assert message.attempts == 1

    def test_in_flight_counts_messages_and_bytes_until_settled(self, place: Place) -> None:
        place.publish(b"12345")
        place.publish(b"123")
        with opened(place.source()) as source:
            messages = receive(source, 2)
            assert source.inflight() == (2, 8)
            settle(source, messages)
            assert source.inflight() == (0, 0)

    def test_a_message_is_held_until_it_is_settled_for_good_and_for_ever_if_it_was_not(self, place: Place) -> None:
        place.publish(b"one")
        place.publish(b"two")
        source = place.source()
        with opened(source):
            first, second = receive(source, 2)
            assert source.holds(first)
            source.settle([first])
            until = time.monotonic() + PATIENCE
            while source.holds(first) and time.monotonic() < until:
                source.tick(time.monotonic())
                source.receive(1)
                time.sleep(0.01)
            assert not source.holds(first)
            assert source.holds(second)
        assert not source.holds(first)
        assert source.holds(second)

    def test_the_bus_is_exhausted_only_when_nothing_is_left_for_anyone(self, place: Place) -> None:
        with opened(place.source()) as source:
            assert source.exhausted()
            place.publish(b"one")
            assert not source.exhausted()
            settle(source, receive(source, 1))
            assert source.exhausted()

    def test_a_message_says_where_it_lies(self, place: Place) -> None:
        place.publish(b"one")
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
            assert source.locate(message).startswith(source.name)

    def test_a_receipt_is_void_once_its_epoch_has_passed(self, place: Place) -> None:
        place.publish(b"one")
        with opened(place.source()) as source:
            (message,) = receive(source, 1)
            assert not source.void(message)
        assert source.void(message)
        source.settle([message])  # changes nothing and harms nothing
        with opened(place.source()) as second:
            assert [m.body for m in receive(second, 1)] == [b"one"]

    def test_a_write_is_durable_when_it_is_done_and_nothing_is_changed(self, place: Place) -> None:
        sink = place.sink()
        sink.open(Bell())
        given = records(20)
        assert write(sink, given) == []
        seen = {s.body: s for s in place.seen()}
        sink.close(1.0)
        assert len(seen) == 20
        for key, body, headers in zip(given.keys, given.bodies, given.headers, strict=True):
            assert seen[body].key == key
            assert seen[body].headers == headers

    def test_opening_and_closing_twice_is_harmless(self, place: Place) -> None:
        source, sink = place.source(), place.sink()
        source.open(Bell(), no_drain)
        sink.open(Bell())
        for _ in range(2):
            source.close()
            sink.close(0.1)
        with opened(place.source()) as again:
            place.publish(b"one")
            assert [m.body for m in receive(again, 1)] == [b"one"]
