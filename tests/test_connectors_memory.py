"""The bus in memory keeps the promises of the real ones, and fails when told to."""

from __future__ import annotations

import pytest

from inferbus.connectors.base import Bell, Headers, Source, TooLarge, Unavailable
from inferbus.connectors.memory import MemoryBus, MemorySink, MemorySource
from tests.connector_contract import ConnectorContract, Place, Seen, no_drain, receive, records, write


class MemoryPlace(Place):
    def __init__(self) -> None:
        self.bus = MemoryBus()
        self.store = MemorySink()

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        self.bus.publish(body, key, headers)

    def source(self, group: str = "g") -> MemorySource:  # noqa: ARG002 - one bus, one group
        return MemorySource(self.bus)

    def sink(self) -> MemorySink:
        return self.store

    def seen(self) -> list[Seen]:
        return [Seen(key, body, headers) for _, key, body, headers in self.store.written]

    def kill(self, source: Source) -> None:
        source.close()  # a queue in memory takes back what a dead reader held


class TestMemory(ConnectorContract):
    @pytest.fixture
    def place(self) -> Place:
        return MemoryPlace()


def test_an_epoch_that_ends_voids_receipts_and_brings_the_messages_again() -> None:
    place = MemoryPlace()
    place.publish(b"one")
    source = place.source()
    source.open(Bell(), no_drain)
    (old,) = receive(source, 1)
    source.lose()
    source.settle([old])
    (again,) = receive(source, 1)
    assert again.attempts == 2
    assert source.void(old)
    assert not source.void(again)


def test_a_source_that_is_away_says_so() -> None:
    source = MemoryPlace().source()
    source.away = "the bus is away"
    with pytest.raises(Unavailable, match="the bus is away"):
        source.receive(1)
    assert source.healthy() == "the bus is away"


def test_a_sink_fails_the_records_it_is_told_to_and_no_others() -> None:
    sink = MemorySink()
    sink.refuse = lambda body: Unavailable("not this one") if body == b'{"n": 1}' else None
    sink.max_bytes = 8
    given = records(3)
    given.bodies = [*given.bodies[:2], b"much too large"]
    failures = write(sink, given)
    assert [i for i, _ in failures] == [1, 2]
    assert isinstance(failures[1][1], TooLarge)
    assert [body for _, _, body, _ in sink.written] == [b'{"n": 0}']
