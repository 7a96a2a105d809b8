"""Fixtures for tests that need a real server; mark such tests with `broker`."""

import os
from collections.abc import Iterator

import pytest

from tests.servers import Kafka, KafkaServer, started_kafka


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
