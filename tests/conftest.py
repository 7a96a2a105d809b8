"""Fixtures for tests that need a real server; mark such tests with `broker`."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.servers import (
    S3,
    Kafka,
    KafkaServer,
    RabbitMQ,
    RabbitMQServer,
    Sqs,
    SqsServer,
    Toxiproxy,
    started_kafka,
    started_rabbitmq,
    started_s3,
    started_sqs,
    started_toxiproxy,
)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """The session's Apache Kafka: the one at INFERBUS_TEST_KAFKA (host:port), else one started for it."""
    if brokers := os.environ.get("INFERBUS_TEST_KAFKA"):
        yield Kafka(brokers)
    else:
        with started_kafka() as server:
            yield server


@pytest.fixture
def restartable_kafka() -> Iterator[KafkaServer]:
    """An Apache Kafka of this test's own, to be killed and restarted."""
    with started_kafka() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """The session's RabbitMQ: the one at INFERBUS_TEST_RABBITMQ (amqp://...), else one started for it."""
    if url := os.environ.get("INFERBUS_TEST_RABBITMQ"):
        yield RabbitMQ(url)
    else:
        with started_rabbitmq() as server:
            yield server


@pytest.fixture
def restartable_rabbitmq() -> Iterator[RabbitMQServer]:
    """A RabbitMQ of this test's own, to be killed and restarted."""
    with started_rabbitmq() as server:
        yield server


@pytest.fixture(scope="session")
def sqs() -> Iterator[Sqs]:
    """The session's SQS: the one at INFERBUS_TEST_SQS (http://host:port), else an ElasticMQ started for it."""
    if url := os.environ.get("INFERBUS_TEST_SQS"):
        with contextlib.closing(Sqs(url)) as server:
            yield server
    else:
        with started_sqs() as server:
            yield server


@pytest.fixture
def restartable_sqs() -> Iterator[SqsServer]:
    """An ElasticMQ of this test's own, to be killed and started again."""
    with started_sqs() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """The session's S3: the one at INFERBUS_TEST_S3 (http://host:port), else a versitygw started for it."""
    if url := os.environ.get("INFERBUS_TEST_S3"):
        with contextlib.closing(S3(url)) as server:
            yield server
    else:
        with started_s3() as server:
            yield server


@pytest.fixture(scope="session")
def toxiproxy() -> Iterator[Toxiproxy]:
    """A toxiproxy started for the session, to put proxies before servers."""
    with started_toxiproxy() as server:
        yield server
