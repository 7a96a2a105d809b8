"""Apache Kafka, RabbitMQ, SQS and S3 for tests: shared by the session, or of one's own, to be killed; and a proxy.

Topics are made through the ordinary admin client and are usable, leaders and all, once `topic` returns.
"""

import contextlib
import http.client
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import botocore.session
import pika
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from deploy.local import servers


def await_silence(port: int) -> None:
    """Return when nothing answers on the port any more."""
    answers = True
    while answers:
        with socket.socket() as probe:
            answers = probe.connect_ex(("127.0.0.1", port)) == 0


class Own:
    """A server of one's own, which keeps its port and what it holds through `kill` and `restart`."""

    def __init__(self, server: servers.Server) -> None:
        self._server = server
        self._ports = servers.free_ports(server.port_count)
        self._folder = servers.new_folder(server.name)
        self._running: servers.Running | None = None

    @property
    def place(self) -> str:
        """Where it answers."""
        return self._server.address.format(port=self._ports[0])

    def start(self) -> None:
        """Return once it answers. Raises NotInstalledError, StartError."""
        # Packages of the operating system are installed unasked only where a machine is thrown away after.
        program = self._server.install("CI" in os.environ)
        self._running = servers.launch(self._server, program, ports=self._ports, folder=self._folder)
        servers.await_ready(self._running)

    def kill(self) -> None:
        """End it at once (SIGKILL), and return when nothing answers on its port any more."""
        if self._running:
            self._running.kill()
            await_silence(self._ports[0])  # its processes are several, and end one after the other

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port with what it held."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill it and delete what it held."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


Started = TypeVar("Started", bound=Own)


@contextlib.contextmanager
def started(server: Started, name: str, instead: str) -> Iterator[Started]:
    """The server, running; where it cannot be had, the test is skipped at a desk and fails in CI."""
    try:
        server.start()
        yield server
    except servers.NotInstalledError as error:
        reason = f"{name} is not here: {error}"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(f"{reason}; {instead}")
    finally:
        server.close()


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


class KafkaServer(Own, Kafka):
    """An Apache Kafka of one's own. `properties` override those of `deploy/local/servers.py`, in the same spelling."""

    def __init__(self, **properties: str) -> None:
        Own.__init__(self, replace(servers.SERVERS["kafka"], command=partial(servers.kafka_command, extra=properties)))
        Kafka.__init__(self, self.place)


def started_kafka(**properties: str) -> AbstractContextManager[KafkaServer]:
    """An Apache Kafka that runs."""
    return started(KafkaServer(**properties), "Apache Kafka", "or set INFERBUS_TEST_KAFKA=host:port")


class RabbitMQ:
    """A RabbitMQ that answers at `url` ("amqp://user:password@host:port/")."""

    def __init__(self, url: str) -> None:
        self.url = url

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel of pika's blocking client, with confirms."""
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel
        finally:
            if connection.is_open:
                connection.close()

    def queue(self, kind: str = "classic", arguments: Mapping[str, str | int] | None = None) -> str:
        """A new durable queue with a name of its own."""
        name = f"q-{uuid.uuid4().hex[:12]}"
        with self.channel() as channel:
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": kind, **(arguments or {})})
        return name


class RabbitMQServer(Own, RabbitMQ):
    """A RabbitMQ of one's own. `settings` are lines of rabbitmq.conf, by name."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = settings or {}
        self._plain = servers.SERVERS["rabbitmq"]
        Own.__init__(self, replace(self._plain, command=self._command))
        RabbitMQ.__init__(self, self.place)

    def _command(self, program: Path, folder: Path, ports: list[int]) -> list[str]:
        command = self._plain.command(program, folder, ports)
        with (folder / "rabbitmq.conf").open("a") as conf:
            conf.writelines(f"{name} = {value}\n" for name, value in self._settings.items())
        return command


def started_rabbitmq(settings: Mapping[str, str] | None = None) -> AbstractContextManager[RabbitMQServer]:
    """A RabbitMQ that runs."""
    instead = "or set INFERBUS_TEST_RABBITMQ=amqp://user:password@host:port/"
    return started(RabbitMQServer(settings), "RabbitMQ", instead)


class Sqs:
    """An SQS that answers at `url`, with queues made through the plain client. Any credentials will do."""

    region = "us-east-1"

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: Any = botocore.session.Session().create_client(
            "sqs",
            self.region,
            endpoint_url=url,
            aws_access_key_id="inferbus",
            aws_secret_access_key="inferbus",  # noqa: S106
        )

    def queue(self, *, fifo: bool = False, **attributes: str) -> str:
        """The name of a new queue."""
        name = f"t-{uuid.uuid4().hex[:12]}" + (".fifo" if fifo else "")
        attributes = {**attributes, **({"FifoQueue": "true"} if fifo else {})}
        self.client.create_queue(QueueName=name, Attributes=attributes)
        return name

    def address(self, queue: str) -> str:
        """The queue's URL."""
        return str(self.client.get_queue_url(QueueName=queue)["QueueUrl"])

    def close(self) -> None:
        """Close the client."""
        self.client.close()


class SqsServer(Own, Sqs):
    """An ElasticMQ of one's own."""

    def __init__(self) -> None:
        Own.__init__(self, servers.SERVERS["sqs"])
        Sqs.__init__(self, self.place)

    def close(self) -> None:
        """End it, and the client."""
        Sqs.close(self)
        Own.close(self)


def started_sqs() -> AbstractContextManager[SqsServer]:
    """An ElasticMQ that runs."""
    return started(SqsServer(), "ElasticMQ", "or set INFERBUS_TEST_SQS=http://host:port")


class S3:
    """An S3 that answers at `url`, with buckets made through the plain client."""

    region = "us-east-1"
    credentials = ("inferbus", "inferbus")

    def __init__(self, url: str) -> None:
        self.url = url
        key, secret = self.credentials
        self.client: Any = botocore.session.Session().create_client(
            "s3", self.region, endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret
        )

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"t-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """What lies in a bucket, marks left out."""
        listed = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        keys = [entry["Key"] for entry in listed if not entry["Key"].rpartition("/")[2].startswith("_")]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def close(self) -> None:
        """Close the client."""
        self.client.close()


class S3Server(Own, S3):
    """A versitygw of one's own."""

    def __init__(self) -> None:
        Own.__init__(self, servers.SERVERS["s3"])
        S3.__init__(self, self.place)

    def close(self) -> None:
        """End it, and the client."""
        S3.close(self)
        Own.close(self)


def started_s3() -> AbstractContextManager[S3Server]:
    """A versitygw that runs."""
    return started(S3Server(), "versitygw", "or set INFERBUS_TEST_S3=http://host:port")


class Proxy:
    """Stands between clients and a server: `address` ("host:port") leads to the server until the proxy does harm."""

    def __init__(self, toxiproxy: "Toxiproxy", server: str) -> None:
        self._toxiproxy = toxiproxy
        self.address = f"127.0.0.1:{servers.free_ports(1)[0]}"
        self._name = f"proxy-{uuid.uuid4().hex[:12]}"
        toxiproxy.ask("POST", "/proxies", {"name": self._name, "listen": self.address, "upstream": server})

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Break all connections, and refuse new ones for as long."""
        self._toxiproxy.ask("POST", f"/proxies/{self._name}", {"enabled": False})
        yield
        self._toxiproxy.ask("POST", f"/proxies/{self._name}", {"enabled": True})

    @contextlib.contextmanager
    def slow(self, *, latency: float = 0.0, rate: int = 0) -> Iterator[None]:
        """Delay what runs through by `latency` seconds; let through `rate` bytes a second. Both ways each."""
        toxics: dict[str, dict[str, int]] = {}
        if latency:
            toxics["latency"] = {"latency": round(latency * 1000), "jitter": round(latency * 250)}
        if rate:
            toxics["bandwidth"] = {"rate": rate // 1024}
        with self._toxics(toxics):
            yield

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Swallow everything, both ways; nobody is told."""
        with self._toxics({"timeout": {"timeout": 0}}):
            yield

    @contextlib.contextmanager
    def _toxics(self, toxics: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
        names = []
        for kind, attributes in toxics.items():
            for stream in ("upstream", "downstream"):
                toxic = {"name": f"{kind}-{stream}", "type": kind, "stream": stream, "attributes": attributes}
                self._toxiproxy.ask("POST", f"/proxies/{self._name}/toxics", toxic)
                names.append(toxic["name"])
        yield
        for name in names:
            self._toxiproxy.ask("DELETE", f"/proxies/{self._name}/toxics/{name}")


class Toxiproxy:
    """A toxiproxy that answers at `url`; it makes proxies."""

    def __init__(self, url: str) -> None:
        self._host = url.rpartition("/")[2]

    def before(self, server: str) -> Proxy:
        """A proxy that leads to `server` ("host:port")."""
        return Proxy(self, server)

    def ask(self, method: str, path: str, body: Any = None) -> None:
        """Ask its interface for something; it must agree."""
        connection = http.client.HTTPConnection(self._host, timeout=10.0)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body))
            answer = connection.getresponse()
            assert answer.status < 300, answer.read().decode()


class ToxiproxyServer(Own, Toxiproxy):
    """A toxiproxy of one's own."""

    def __init__(self) -> None:
        Own.__init__(self, servers.SERVERS["toxiproxy"])
        Toxiproxy.__init__(self, self.place)


def started_toxiproxy() -> AbstractContextManager[ToxiproxyServer]:
    """A toxiproxy that runs."""
    return started(ToxiproxyServer(), "toxiproxy", "no other is used in its place")
