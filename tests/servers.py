"""Apache Kafka for tests: a server shared by the session, and servers of one's own that may be killed.

Topics are made through the ordinary admin client and are usable, leaders and all, once `topic` returns.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from deploy.local import servers

_KAFKA = servers.SERVERS["kafka"]


class Kafka:
    """An Apache Kafka that answers at `brokers` ("host:port")."""

    def __init__(self, brokers: str) -> None:
        self.brokers = brokers

    def topic(self, partitions: int = 4, **config: str | int) -> str:
        """A new topic with a name of its own; dots in settings: `topic(**{"max.message.bytes": 1000})`."""
        name = f"t-{uuid.uuid4().hex[:12]}"
        admin = AdminClient({"bootstrap.servers": self.brokers})
        settings = {key: str(value) for key, value in config.items()}
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=settings)
        admin.create_topics([topic])[name].result(timeout=30.0)
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            # The controller has made it; the broker hears of its leaders a moment later.
            found = admin.list_topics(name, timeout=10.0).topics[name].partitions
            if len(found) == partitions and all(partition.leader >= 0 for partition in found.values()):
                return name
            time.sleep(0.01)
        raise TimeoutError(f"{name} was made, but its partitions have no leader")


class KafkaServer(Kafka):
    """An Apache Kafka of one's own, which keeps its port and its messages through `kill` and `restart`.

    `properties` override those of `deploy/local/servers.py`, in the same spelling.
    """

    def __init__(self, **properties: str) -> None:
        self._server = replace(_KAFKA, command=partial(servers.kafka_command, extra=properties))
        self._ports = servers.free_ports(_KAFKA.port_count)
        self._folder = servers.new_folder("kafka")
        self._running: servers.Running | None = None
        super().__init__(f"127.0.0.1:{self._ports[0]}")

    def start(self) -> None:
        """Return once it answers. Raises NotInstalledError, StartError."""
        # Packages of the operating system are installed unasked only where a machine is thrown away after.
        program = self._server.install("CI" in os.environ)
        self._running = servers.launch(self._server, program, ports=self._ports, folder=self._folder)
        servers.await_ready(self._running)

    def kill(self) -> None:
        """End it at once (SIGKILL), and return when it has ended."""
        if self._running:
            self._running.kill()

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port with the same messages."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill it and delete its messages."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def started_kafka(**properties: str) -> Iterator[KafkaServer]:
    """A server that runs; where it cannot be had, the test is skipped at a desk and fails in CI."""
    server = KafkaServer(**properties)
    try:
        server.start()
        yield server
    except servers.NotInstalledError as error:
        reason = f"Apache Kafka is not here: {error}"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(f"{reason}; or set INFERBUS_TEST_KAFKA=host:port")
    finally:
        server.close()
