"""Kafka on the real thing, and on librdkafka's broker in memory."""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition, cimpl
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions, NewTopic

from inferbus.connectors.base import (
    Bell,
    Failure,
    Headers,
    Message,
    Misconfigured,
    Records,
    Refused,
    Source,
    TooLarge,
    Unavailable,
    Unreadable,
)
from inferbus.connectors.kafka import KafkaProducer, KafkaSink, KafkaSource
from inferbus.connectors.kafka_client import consumer_config, producer_config
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
from tests.servers import Kafka


class KafkaPlace(Place):
    def __init__(self, brokers: str, requests: str, answers: str, **config: Any) -> None:
        self.brokers = brokers
        self.requests = requests
        self.answers = answers
        self.config = {"bootstrap.servers": brokers, "session.timeout.ms": 6000, **config}
        self._group = uuid.uuid4().hex[:8]
        self._producer = Producer({"bootstrap.servers": brokers, "linger.ms": 0})

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        self._producer.produce(self.requests, body, key, headers=list(headers))
        assert self._producer.flush(PATIENCE) == 0

    def source(self, group: str = "g") -> KafkaSource:
        return KafkaSource(self.requests, f"{self._group}-{group}", self.config, max_inflight=100)

    def sink(self) -> KafkaSink:
        return KafkaSink(self.answers, KafkaProducer({"bootstrap.servers": self.brokers}))

    def seen(self) -> list[Seen]:
        return self.first_of(4)

    def first_of(self, count: int) -> list[Seen]:
        """What the first so many partitions hold."""
        reader = Consumer({"bootstrap.servers": self.brokers, "group.id": "reader", "enable.auto.commit": False})
        try:
            partitions = [TopicPartition(self.answers, p, 0) for p in range(count)]
            ends = sum(reader.get_watermark_offsets(p, PATIENCE)[1] for p in partitions)
            reader.assign(partitions)
            found: list[Seen] = []
            while len(found) < ends:
                m = reader.poll(PATIENCE)
                assert m is not None
                assert m.error() is None
                found.append(Seen(m.key(), m.value(), m.headers()))
            return found
        finally:
            reader.close()

    def kill(self, source: Source) -> None:
        assert isinstance(source, KafkaSource)
        source._disconnect(commit=False)  # what the broker sees of a crash, without waiting for the session to end


class KafkaContract(ConnectorContract):
    """The contract, and what only Kafka promises."""

    def test_an_outcome_lands_on_the_partition_number_of_its_request(self, place: KafkaPlace) -> None:
        for i in range(20):
            place.publish(b"%d" % i, key=b"k%d" % i)
        sink = place.sink()
        sink.open(Bell())
        with opened(place.source()) as source:
            messages = receive(source, 20)
            given = records(20)
            given.messages = messages
            assert write(sink, given) == []
            wanted = sorted(int(source.locate(m).split("/")[1]) for m in messages)
        sink.close(1.0)
        reader = Consumer({"bootstrap.servers": place.brokers, "group.id": "reader"})
        ends = [reader.get_watermark_offsets(TopicPartition(place.answers, p), PATIENCE)[1] for p in range(4)]
        reader.close()
        assert ends == [wanted.count(p) for p in range(4)]

    def test_a_fatal_error_of_the_producer_fails_what_was_pending_and_the_next_one_takes_over(
        self, place: KafkaPlace
    ) -> None:
        sink = place.sink()
        sink.open(Bell())
        failures: list[Sequence[Failure]] = []
        for _ in range(20):
            sink.write(records(100), failures.append)
        before = sink._client.producer
        # The client's own way to have one. The address of its C object stands behind the two words of a Python object.
        handle = ctypes.c_void_p.from_address(id(before) + 16)
        assert ctypes.CDLL(cimpl.__file__).rd_kafka_test_fatal_error(handle, 45, b"as if") == 0

        def all_reported() -> bool:
            sink.tick()
            return len(failures) == 20

        until(all_reported)
        assert sink._client.producer is not before
        assert write(sink, records(100)) == []
        failed = sum(map(len, failures))
        assert all(isinstance(error, Unavailable) for some in failures for _, error in some)
        assert len(place.seen()) >= 2100 - failed
        sink.close(1.0)

    def test_an_unreadable_header_id_falls_back_and_never_raises(self, place: KafkaPlace) -> None:
        place.publish(b"x", headers=(("inferbus-id", b"\xff\xfe"),))
        place.publish(b"y", headers=(("inferbus-id", b""),))
        with opened(place.source()) as source:
            ids = {m.body: m.id for m in receive(source, 2)}
        assert ids[b"x"] == "\ufffd\ufffd"
        assert ids[b"y"].startswith(place.requests)

    def test_a_missing_topic_is_one_clear_line(self, place: KafkaPlace) -> None:
        source = KafkaSource("no-such-topic", "g", place.config)
        with pytest.raises(Unavailable, match='topic "no-such-topic" does not exist'):
            source.open(Bell(), no_drain)


@pytest.mark.broker
class TestRealKafka(KafkaContract):
    @pytest.fixture
    def place(self, kafka: Kafka) -> Place:
        return KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic())


@pytest.mark.broker
class TestRealKafkaWithTheNewGroupProtocol(KafkaContract):
    @pytest.fixture
    def place(self, kafka: Kafka) -> Place:
        place = KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic())
        place.config = {"bootstrap.servers": kafka.brokers, "group.protocol": "consumer"}
        return place


class Pumped:
    """A source stepped on a thread of its own, as a pipeline would, until told to stop."""

    def __init__(self, source: KafkaSource, drain: Callable[[Callable[[], bool], float], None]) -> None:
        self.source = source
        self.bodies: list[bytes] = []
        self._drain = drain
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        bell = Bell()
        self.source.open(bell, self._drain)
        while not self._stop.is_set():
            messages = self.source.receive(10)
            self.bodies += [m.body for m in messages]
            self.source.settle(messages)
            self.source.tick(time.monotonic())
            self.source.rest()
            bell.wait(0.05)
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_that_joins_takes_partitions_without_a_message_served_twice(kafka: Kafka, protocol: str) -> None:
    topic = kafka.topic(partitions=4)
    place = KafkaPlace(kafka.brokers, topic, topic)
    place.config = {"bootstrap.servers": kafka.brokers, "group.protocol": protocol}
    with Pumped(place.source(), no_drain) as one:
        for i in range(200):
            place.publish(b"a%d" % i, key=b"%d" % i)
        until(lambda: len(one.bodies) == 200)
        with Pumped(place.source(), no_drain) as two:
            until(lambda: len(two.source._leases) == 2 and len(one.source._leases) == 2)
            for i in range(200):
                place.publish(b"b%d" % i, key=b"%d" % i)
            until(lambda: len(one.bodies) + len(two.bodies) >= 400)
        until(lambda: len(one.source._leases) == 4)
        for i in range(50):
            place.publish(b"c%d" % i, key=b"%d" % i)
        until(lambda: len(one.bodies) + len(two.bodies) >= 450)
    served = one.bodies + two.bodies
    assert len(served) == len(set(served)) == 450
    assert two.bodies


@pytest.mark.broker
def test_a_revocation_drains_what_is_in_flight_before_the_partition_goes(kafka: Kafka) -> None:
    topic = kafka.topic(partitions=2)
    place = KafkaPlace(kafka.brokers, topic, topic)
    held: list[Any] = []
    drained: list[float] = []

    source = place.source()

    def drain(finished: Callable[[], bool], budget: float) -> None:
        assert not finished() or not held
        drained.append(budget)
        source.settle(held)
        held.clear()
        assert finished()

    bell = Bell()
    source.open(bell, drain)
    for i in range(20):
        place.publish(b"%d" % i, key=b"%d" % i)
    held += receive(source, 20)
    with Pumped(place.source(), no_drain) as other:

        def moved() -> bool:
            source.tick(time.monotonic())
            assert source.receive(10) == []
            source.rest()
            bell.wait(0.02)
            return len(other.source._leases) == 1

        until(moved)
        assert drained == [5.0] * len(drained)
        assert drained
        assert other.bodies == []
    source.close()


@pytest.mark.broker
def test_what_the_client_hands_over_once_more_is_not_served_again(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    for i in range(20):
        place.publish(b"%d" % i)
    source = place.source()
    with opened(source):
        messages = receive(source, 20)
        assert source._consumer is not None
        # As around a rebalance of the new group protocol, where a fetch under way is not thrown away.
        source._consumer.seek(TopicPartition(place.requests, 0, 15))
        place.publish(b"20")
        messages += receive(source, 1)
        assert [m.body for m in messages] == [b"%d" % i for i in range(21)]
        settle(source, messages)


@pytest.mark.broker
def test_a_header_whose_name_is_not_utf_8_harms_its_message_alone(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    place.publish(b"before", headers=(("a", b"1"),))
    publish_with_raw_header(kafka.brokers, place.requests, b"odd", b"\xff\xfe")
    place.publish(b"after", headers=(("a", b"2"),))
    with opened(place.source()) as source:
        messages = receive(source, 3)
        assert [(m.body, m.headers) for m in messages] == [
            (b"before", (("a", b"1"),)),
            (b"odd", ()),
            (b"after", (("a", b"2"),)),
        ]
        odd = messages[1]
        assert isinstance(odd, Unreadable)
        assert odd.code == "invalid_request"
        assert odd.reason == "the name of a header is not UTF-8, so the headers could not be read"
        assert [m.id for m in messages] == [f"{place.requests}-0-{n}" for n in range(3)]
        settle(source, messages)


def publish_with_raw_header(brokers: str, topic: str, body: bytes, name: bytes) -> None:
    """One message with a header of that name; the binding takes only str, so the C library is called itself."""
    c = ctypes.CDLL(cimpl.__file__)
    c.rd_kafka_conf_new.restype = c.rd_kafka_new.restype = ctypes.c_void_p
    why = ctypes.create_string_buffer(512)
    conf = ctypes.c_void_p(c.rd_kafka_conf_new())
    assert c.rd_kafka_conf_set(conf, b"bootstrap.servers", brokers.encode(), why, ctypes.c_size_t(512)) == 0
    producer = ctypes.c_void_p(c.rd_kafka_new(0, conf, why, ctypes.c_size_t(512)))
    assert producer.value, why.value
    # Tags of what follows, from rdkafka.h: 1 topic, 7 flags (2: copy the payload), 4 value, 9 header, 0 the end.
    whole = (1, topic.encode(), 7, 2, 4, body, ctypes.c_size_t(len(body)), 9, name, b"value", ctypes.c_size_t(5), 0)
    assert c.rd_kafka_producev(producer, *whole) == 0
    assert c.rd_kafka_flush(producer, 10_000) == 0
    c.rd_kafka_destroy(producer)


@pytest.mark.broker
def test_a_batch_the_client_cannot_read_is_skipped_offset_by_offset(kafka: Kafka) -> None:
    topic = kafka.topic(partitions=1, **{"max.message.bytes": "8000000"})
    place = KafkaPlace(kafka.brokers, topic, topic)
    place.publish(b"before")
    bomb = Producer(
        {
            "bootstrap.servers": kafka.brokers,
            "compression.type": "zstd",
            "linger.ms": 500,
            "batch.num.messages": 7,
            "message.max.bytes": 8_000_000,
            "batch.size": 64_000_000,
        }
    )
    for _ in range(7):
        bomb.produce(topic, b"\0" * 3_000_000)
    assert bomb.flush(PATIENCE) == 0
    place.publish(b"after")
    place.config |= {"receive.message.max.bytes": 1_100_000, "fetch.max.bytes": 1_000_000, "message.max.bytes": 900_000}
    with opened(place.source()) as source:
        messages = receive(source, 9)
        assert [m.body for m in messages if not isinstance(m, Unreadable)] == [b"before", b"after"]
        unreadable = [m for m in messages if isinstance(m, Unreadable)]
        assert [source.locate(m).rsplit("/", 1)[1] for m in unreadable] == [str(i) for i in range(1, 8)]
        assert {m.code for m in unreadable} == {"too_large"}
        settle(source, messages)
        assert source.exhausted()


@pytest.mark.broker
def test_a_topic_that_ends_in_transaction_markers_is_exhausted(kafka: Kafka) -> None:
    topic = kafka.topic(partitions=1)
    place = KafkaPlace(kafka.brokers, topic, topic)
    producer = Producer({"bootstrap.servers": kafka.brokers, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(PATIENCE)
    for finish in (producer.commit_transaction, producer.abort_transaction):
        producer.begin_transaction()
        producer.produce(topic, b"one")
        producer.flush(PATIENCE)
        finish(PATIENCE)
    with opened(place.source()) as source:
        settle(source, receive(source, 1))
        assert source.exhausted()
    with opened(place.source()) as source:
        assert source.exhausted()


@pytest.fixture(scope="module")
def embedded() -> Iterator[str]:
    """librdkafka's broker in memory: speaks the protocol, keeps little, promises nothing."""
    host = Producer({"test.mock.num.brokers": 1})
    brokers = ",".join(f"{b.host}:{b.port}" for b in host.list_topics(timeout=10).brokers.values())
    yield brokers
    host.flush(1)


def test_the_embedded_broker_carries_requests_and_outcomes(embedded: str) -> None:
    requests, answers = uuid.uuid4().hex, uuid.uuid4().hex
    place = KafkaPlace(embedded, requests, answers)
    for i in range(10):
        place.publish(b"%d" % i)
    sink = place.sink()
    sink.open(Bell())
    with opened(place.source()) as source:
        messages = receive(source, 10)
        given = records(10)
        given.messages = messages
        assert write(sink, given) == []
        settle(source, messages)
        assert source.inflight() == (0, 0)
    sink.close(1.0)
    assert len(place.seen()) == 10


def test_wrong_brokers_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferbus.connectors.kafka_client.REACH", 0.5)
    source = KafkaSource("t", "g", {"bootstrap.servers": "127.0.0.1:1"})
    with pytest.raises(Unavailable, match="no broker answered within"):
        source.open(Bell(), no_drain)


def test_an_unknown_property_is_named() -> None:
    source = KafkaSource("t", "g", {"bootstrap.servers": "127.0.0.1:1", "no.such.property": "1"})
    with pytest.raises(Misconfigured, match=r"no\.such\.property"):
        source.open(Bell(), no_drain)


def test_commits_cannot_be_handed_to_the_client() -> None:
    with pytest.raises(Misconfigured, match="must stay false"):
        consumer_config({"enable.auto.commit": "true"}, "g", "earliest", 100, 100)


def test_the_new_group_protocol_gets_no_assignor_of_the_old_one() -> None:
    classic = consumer_config({}, "g", "earliest", 100, 100)
    new = consumer_config({"group.protocol": "consumer"}, "g", "earliest", 100, 100)
    assert classic["partition.assignment.strategy"] == "cooperative-sticky"
    assert "partition.assignment.strategy" not in new


def test_a_producer_takes_over_security_and_not_the_consumers_own_properties() -> None:
    config = {"bootstrap.servers": "b", "sasl.password": "s", "group.instance.id": "i", "fetch.wait.max.ms": 1}
    taken = producer_config(config)
    assert taken["sasl.password"] == "s"
    assert "group.instance.id" not in taken
    assert "fetch.wait.max.ms" not in taken


class Member:
    """A source on a thread of its own, which receives and settles until it is left."""

    def __init__(self, source: KafkaSource) -> None:
        self.source = source
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: bool(source._leases))

    def _run(self) -> None:
        with opened(self.source):
            while not self._leave.is_set():
                self.source.settle(self.source.receive(100))
                self.source.tick(time.monotonic())
                time.sleep(0.002)

    def leave(self) -> None:
        self._leave.set()
        self._thread.join()


@pytest.mark.broker
def test_a_member_that_leaves_while_it_joins_leaves_no_ghost(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic())
    place.config["heartbeat.interval.ms"] = 1000  # after which the member that is there hears of the other
    first = Member(place.source())
    with opened(place.source()):
        time.sleep(0.2)  # so that its join is under way, which waits for the first
    group = first.source._config["group.id"]
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    members = admin.describe_consumer_groups([group])[group].result().members
    first.leave()
    assert len(members) == 1


@pytest.mark.broker
def test_a_group_that_begins_at_the_end_skips_nothing_after_a_crash(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    place.publish(b"before")
    killed, next_life = (
        KafkaSource(place.requests, "g" + place.requests, place.config, start="latest") for _ in range(2)
    )
    killed.open(Bell(), no_drain)
    until(lambda: killed.receive(10) == [] and bool(killed._leases))
    place.publish(b"after")
    assert [m.body for m in receive(killed, 1)] == [b"after"]
    place.kill(killed)  # before it has committed anything of its own
    with opened(next_life):
        messages = receive(next_life, 1)
        assert [m.body for m in messages] == [b"after"]
        settle(next_life, messages)


@pytest.mark.broker
def test_a_topic_made_anew_is_read_from_its_new_start(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for i in range(20):
        place.publish(b"%d" % i)
    with opened(place.source()) as source:
        settle(source, receive(source, 20))
        admin.delete_topics([place.requests])[place.requests].result()
        until(lambda: place.requests not in admin.list_topics(timeout=PATIENCE).topics)
        admin.create_topics([NewTopic(place.requests, 1)])[place.requests].result()
        for i in range(10):
            place.publish(b"new %d" % i)
        messages = receive(source, 10)
        assert [m.body for m in messages] == [b"new %d" % i for i in range(10)]
        settle(source, messages)


@pytest.mark.broker
def test_outcomes_of_added_partitions_go_where_the_sink_has_room(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    place.config["topic.metadata.refresh.interval.ms"] = 500
    sink = place.sink()
    sink.open(Bell())
    with opened(place.source()) as source:
        until(lambda: source.receive(1) == [] and bool(source._leases))  # type: ignore[attr-defined]
        admin = AdminClient({"bootstrap.servers": kafka.brokers})
        admin.create_partitions([NewPartitions(place.requests, 3)])[place.requests].result()
        producer = Producer({"bootstrap.servers": kafka.brokers, "topic.metadata.refresh.interval.ms": 500})
        for partition in range(3):
            until(lambda p=partition: produced(producer, place.requests, p))  # type: ignore[misc]
        assert not source.exhausted()
        messages = receive(source, 3)
        assert len(messages) == 3
        assert write(sink, Records(messages, [None] * 3, [b""] * 3, [[]] * 3)) == []
        settle(source, messages)
        assert source.exhausted()
    sink.close(1.0)


def written_in_the_end(sink: KafkaSink, records: Records) -> dict[int, Exception]:
    """Write again what is to be written again, as delivery does; answers what was refused, by position."""
    left: list[int] = list(range(len(records)))
    refused: dict[int, Exception] = {}
    until_then = time.monotonic() + PATIENCE
    while left and time.monotonic() < until_then:
        failures = write(sink, records.take(left))
        refused |= {left[i]: error for i, error in failures if isinstance(error, Refused)}
        left = [left[i] for i, error in failures if not isinstance(error, Refused)]
    assert not left
    return refused


def plain(keys: Sequence[bytes | None], size: int = 10) -> Records:
    count = len(keys)
    messages = [Message(f"m{i}", key, b"", (), None, 1, None) for i, key in enumerate(keys)]
    return Records(messages, keys, [b"x" * size] * count, [[] for _ in keys])


@pytest.mark.broker
def test_a_record_the_topic_never_takes_is_found_among_those_of_its_batch(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic(1, **{"cleanup.policy": "compact"}))
    sink = place.sink()
    sink.open(Bell())
    keys: list[bytes | None] = [b"k%d" % i for i in range(20)]
    keys[7] = None
    refused = written_in_the_end(sink, plain(keys))
    assert list(refused) == [7]
    assert not isinstance(refused[7], TooLarge)
    sink.close(1.0)
    assert len({seen.key for seen in KafkaPlace(kafka.brokers, "", sink._topic).first_of(1)}) == 19


@pytest.mark.broker
def test_a_second_batch_refused_meanwhile_is_not_blamed_on_each_of_its_records(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic(1, **{"cleanup.policy": "compact"}))
    each = KafkaProducer({"bootstrap.servers": kafka.brokers, "batch.num.messages": 10})  # a batch for each write
    sink = KafkaSink(place.answers, each)
    sink.open(Bell())
    keys: list[bytes | None] = [b"k%d" % i for i in range(10)]
    keys[7] = None
    verdicts: list[list[Failure]] = []
    for _ in range(2):
        sink.write(plain(keys), lambda failures: verdicts.append(list(failures)))

    def confirmed() -> bool:
        sink.tick()
        return len(verdicts) == 2

    until(confirmed)
    for failures in verdicts:
        assert [position for position, _ in failures] == list(range(10))
        assert not any(isinstance(error, Refused) for _, error in failures)
    sink.close(1.0)


@pytest.mark.broker
def test_small_records_are_written_though_the_topic_takes_smaller_batches_than_it_did(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(), kafka.topic(1))
    sink = place.sink()
    sink.open(Bell())
    assert written_in_the_end(sink, plain([b"k"])) == {}
    resource = ConfigResource(
        ConfigResource.Type.TOPIC,
        sink._topic,
        incremental_configs=[ConfigEntry("max.message.bytes", "2000", incremental_operation=AlterConfigOpType.SET)],
    )
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    admin.incremental_alter_configs([resource])[resource].result()
    assert written_in_the_end(sink, plain([b"k"] * 50, size=500)) == {}
    refused = written_in_the_end(sink, plain([b"k"], size=5000))
    assert isinstance(refused[0], TooLarge)
    sink.close(1.0)


def produced(producer: Producer, topic: str, partition: int) -> bool:
    try:
        producer.produce(topic, b"x", partition=partition)
    except KafkaException:  # the client has yet to hear of the partition
        producer.poll(0.05)
        return False
    return bool(producer.flush(PATIENCE) == 0)


@pytest.mark.broker
def test_keys_and_headers_count_as_bytes_in_flight(kafka: Kafka) -> None:
    place = KafkaPlace(kafka.brokers, kafka.topic(1), kafka.topic(1))
    place.publish(b"body", key=b"k" * 10, headers=(("h", b"v" * 1000),))
    with opened(place.source()) as source:
        messages = receive(source, 1)
        assert source.inflight() == (1, 1014)
        settle(source, messages)


@pytest.mark.broker
def test_a_partition_that_is_behind_and_does_not_move_gets_a_new_client(kafka: Kafka) -> None:
    topic = kafka.topic(partitions=1)
    place = KafkaPlace(kafka.brokers, topic, topic)
    hurried = KafkaSource(topic, uuid.uuid4().hex, place.config, clock=lambda: time.monotonic() * 20)
    hurried.open(Bell(), no_drain)
    bodies: list[bytes] = []
    problems: set[str | None] = set()

    def came(count: int) -> Callable[[], bool]:
        def step() -> bool:
            messages = hurried.receive(10)
            bodies.extend(m.body for m in messages)
            hurried.settle(messages)
            hurried.tick(hurried._clock())
            problems.add(hurried.healthy())
            return len(bodies) == count

        return step

    place.publish(b"one")
    until(came(1))
    stuck = hurried._consumer
    assert stuck is not None
    stuck.pause(stuck.assignment())  # behind the source's back, as a client that silently stops fetching
    place.publish(b"two")
    until(came(2))
    assert bodies == [b"one", b"two"]
    assert hurried._consumer is not stuck
    assert "partition 0 does not move past offset 1" in problems
    assert hurried.healthy() is None
    hurried.close()
