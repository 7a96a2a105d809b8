"""The servers that other tests lean on: what they promise, tried on the real thing."""

import socket
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from deploy.local import servers
from tests.servers import Kafka, KafkaServer


def publish(kafka: Kafka, topic: str, bodies: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": kafka.brokers, "acks": "all"})
    for body in bodies:
        producer.produce(topic, body, partition=0)
    assert producer.flush(30.0) == 0


def read(kafka: Kafka, topic: str, count: int) -> list[bytes]:
    consumer = Consumer({"bootstrap.servers": kafka.brokers, "group.id": topic, "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    bodies: list[bytes] = []
    until = time.monotonic() + 30.0
    while len(bodies) < count and time.monotonic() < until:
        bodies += [message.value() or b"" for message in consumer.consume(count - len(bodies), timeout=1.0)]
    consumer.close()
    return bodies


@pytest.mark.broker
def test_what_is_published_is_read_back_in_order(kafka: Kafka) -> None:
    topic, bodies = kafka.topic(), [b"one", b"two", b"three"]
    publish(kafka, topic, bodies)
    assert read(kafka, topic, 3) == bodies


@pytest.mark.broker
def test_a_topic_has_the_partitions_and_the_settings_it_was_asked_for(kafka: Kafka) -> None:
    topic = kafka.topic(partitions=2, **{"max.message.bytes": 1000})
    producer = Producer({"bootstrap.servers": kafka.brokers})
    assert len(producer.list_topics(topic, timeout=10.0).topics[topic].partitions) == 2
    reports: list[KafkaError | None] = []
    producer.produce(topic, bytes(2000), on_delivery=lambda error, _message: reports.append(error))
    producer.flush(30.0)
    assert reports == [KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)]


@pytest.mark.broker
def test_a_killed_kafka_comes_back_on_its_port_with_its_messages(restartable_kafka: KafkaServer) -> None:
    topic, brokers = restartable_kafka.topic(), restartable_kafka.brokers
    publish(restartable_kafka, topic, [b"kept"])
    restartable_kafka.kill()
    client = Producer({"bootstrap.servers": brokers})
    with pytest.raises(KafkaException):
        client.list_topics(timeout=0.5)
    restartable_kafka.restart()
    assert restartable_kafka.brokers == brokers
    assert read(restartable_kafka, topic, 1) == [b"kept"]


def test_without_java_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(servers.NotInstalledError, match=r"`java` is not on PATH: install it"):
        KafkaServer().start()


def test_a_port_that_someone_answers_on_is_not_taken_for_the_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as someone:
        port = someone.getsockname()[1]
        with pytest.raises(servers.StartError, match=f"cannot have port {port}"):
            servers.launch(servers.SERVERS["sqs"], tmp_path, ports=[port], folder=tmp_path)
