"""Whole workers on an Apache Kafka that asks who is there: TLS, SASL and access rights, granted and refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from deploy.local import servers
from tests.end_to_end import Scene, good_ones, refused
from tests.servers import Kafka, started_kafka

pytestmark = pytest.mark.broker

PASSWORD = "correct-horse-battery-staple"  # noqa: S105 - of every user, on a server that lives for a minute
READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
GROUP = "the-group"
SASL = "listener.name.secured.scram-sha-512.sasl"


class SecuredKafka(Kafka):
    """Users come to `secured`; `brokers` is a plain listener for the test alone, which may do anything."""

    def __init__(self, brokers: str, secured: str, ca: Path) -> None:
        super().__init__(brokers)
        self.secured = secured
        self.ca = ca
        self._admin = AdminClient({"bootstrap.servers": brokers, "log_level": 0})

    def add_users(self, *names: str) -> None:
        how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        users = [UserScramCredentialUpsertion(name, how, PASSWORD.encode()) for name in names]
        for added in self._admin.alter_user_scram_credentials(users).values():
            added.result(30.0)

    def allow(self, user: str, operation: AclOperation, *topics: str, group: str | None = None) -> None:
        """Rights on topics and on a group."""
        names = [(ResourceType.TOPIC, topic) for topic in topics]
        names += [(ResourceType.GROUP, group)] if group else []
        rights = [AclBinding(*name, *self._right(user, operation)) for name in names]
        for granted in self._admin.create_acls(rights).values():
            granted.result(30.0)

    def forbid(self, user: str, operation: AclOperation, topic: str) -> None:
        """Take a right away again."""
        right = AclBindingFilter(ResourceType.TOPIC, topic, *self._right(user, operation))
        for taken in self._admin.delete_acls([right]).values():
            assert len(taken.result(30.0)) == 1

    @staticmethod
    def _right(user: str, operation: AclOperation) -> tuple[object, ...]:
        return ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW


def authority(folder: Path) -> Path:
    """A throw-away certificate authority, `ca.pem`, and `server.pem`: a key and its certificate for 127.0.0.1."""
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    openssl(folder, "req", "-x509", *new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    signed += ["-addext", "subjectAltName=IP:127.0.0.1"]
    openssl(folder, "req", "-x509", *new, *signed, "-subj", "/CN=kafka", "-keyout", "key", "-out", "certificate")
    (folder / "server.pem").write_text((folder / "key").read_text() + (folder / "certificate").read_text())
    return folder / "ca.pem"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    ca = authority(tmp_path_factory.mktemp("authority"))
    secured = f"127.0.0.1:{servers.free_ports(1)[0]}"
    for_clients = f"PLAINTEXT://127.0.0.1:{{broker}},SECURED://{secured}"
    with started_kafka(
        **{
            "listeners": f"{for_clients},CONTROLLER://127.0.0.1:{{controller}}",
            "advertised.listeners": for_clients,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_SSL",
            "listener.name.secured.ssl.keystore.type": "PEM",
            "listener.name.secured.ssl.keystore.location": str(ca.with_name("server.pem")),
            "listener.name.secured.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            f"{SASL}.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # whoever comes to the plain listeners: the test, and the broker itself
        }
    ) as server:
        found = SecuredKafka(server.brokers, secured, ca)
        found.add_users("worker", "reader", "stranger")
        yield found


@pytest.fixture(scope="module")
def scene(kafka: SecuredKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A pipeline of the user `worker`, who may do what it needs and nothing more."""
    config = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "worker",
        "sasl.password": "${KAFKA_PASSWORD}",
        "ssl.ca.location": str(kafka.ca),
    }
    requests = kafka.topic()
    source = {"brokers": kafka.secured, "topic": requests, "group": GROUP, "config": config}
    with Scene(kafka, tmp_path_factory.mktemp("scene"), requests=requests, source={"kafka": source}) as the:
        kafka.allow("worker", READ, the.topic, group=GROUP)
        kafka.allow("worker", WRITE, the.sink, the.errors)
        kafka.allow("reader", READ, the.topic, group=GROUP)
        kafka.allow("reader", DESCRIBE, the.sink)
        yield the


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)


def last_words(the: Scene, *arguments: str, **config: object) -> str:
    """Why a worker that cannot start gave up: the one line for people at the end of its log, and exit code 3."""
    worker = the.worker("--set=retry.start=3s", *arguments, **config)
    assert worker.ended() == 3, worker.log()
    (line,) = [line for line in worker.log().splitlines() if not line.startswith("{")]
    assert PASSWORD not in worker.log()
    return line.removeprefix("inferbus: ")


# Granted


def test_requests_go_through_tls_and_sasl_and_the_password_shows_nowhere(scene: Scene) -> None:
    bad = refused(b"{", b"k", (("inferbus-id", b"bad"),), "invalid_request")
    scene.publish([*good_ones(50), bad])
    scene.serve()
    assert scene.accounted() == 0
    assert PASSWORD not in "".join(map(repr, scene.outcomes.read()))
    assert PASSWORD not in scene.workers[-1].log()


def test_check_reaches_every_topic_and_does_not_show_the_password(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(scene.file))
    command = [sys.executable, "-m", "inferbus.worker.cli", "check", str(path), "--connect"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": reached\n") == 3
    assert yaml.safe_load(done.stdout)["source"]["kafka"]["config"]["sasl.password"] == "***"
    assert PASSWORD not in done.stdout + done.stderr


@pytest.mark.parametrize(("operation", "place"), [(READ, "topic"), (WRITE, "sink")])
def test_a_right_that_is_taken_away_for_a_while_costs_no_request(
    kafka: SecuredKafka, scene: Scene, operation: AclOperation, place: str
) -> None:
    worker = scene.worker().is_ready()
    worker.answers("/readyz", 200)
    kafka.forbid("worker", operation, getattr(scene, place))
    scene.publish(good_ones(20, first=1000 * int(operation.value)))
    worker.answers("/readyz", 503)
    assert worker.running()
    kafka.allow("worker", operation, getattr(scene, place))
    scene.await_outcomes()
    worker.answers("/readyz", 200)
    worker.stop()
    assert scene.accounted() == 0


def test_a_worker_is_ready_again_once_it_may_read_though_nothing_comes(kafka: SecuredKafka, scene: Scene) -> None:
    worker = scene.worker().is_ready()
    worker.answers("/readyz", 200)
    kafka.forbid("worker", READ, scene.topic)
    worker.answers("/readyz", 503)
    kafka.allow("worker", READ, scene.topic)
    worker.answers("/readyz", 200)
    worker.stop()


# Refused


def test_a_wrong_password_is_told_as_such(kafka: SecuredKafka, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "incorrect")
    told = last_words(scene)
    assert told.startswith(f"kafka: {kafka.secured}: SASL authentication error: ")
    assert told.endswith("; check sasl.mechanism, sasl.username and sasl.password")
    assert "incorrect" not in scene.workers[-1].log()


def test_a_certificate_of_an_unknown_authority_is_told_as_such(
    kafka: SecuredKafka, scene: Scene, tmp_path: Path
) -> None:
    told = last_words(scene, ssl_ca_location=authority(tmp_path))
    assert told == (
        f"kafka: {kafka.secured}: SSL handshake failed: certificate verify failed; "
        "check ssl.ca.location, and that the broker's certificate names this host"
    )


def test_the_wrong_security_protocol_is_a_thing_to_check(scene: Scene) -> None:
    told = last_words(scene, security_protocol="sasl_plaintext")
    assert told == "kafka: no broker answered within 5 s (check brokers and security.protocol)"


def test_a_group_that_may_not_be_read_is_named(kafka: SecuredKafka, scene: Scene) -> None:
    kafka.allow("worker", DESCRIBE, group="described")
    for group in ("described", "unknown"):
        told = last_words(scene, f"--set=source.kafka.group={group}")
        assert told == f'kafka: group "{group}" may not be read with these credentials; grant them READ on it'


def test_a_topic_that_may_not_be_read_is_named(kafka: SecuredKafka, scene: Scene) -> None:
    seen = kafka.topic()
    kafka.allow("worker", DESCRIBE, seen)
    told = last_words(scene, f"--set=source.kafka.topic={seen}")
    assert told == f'kafka: topic "{seen}" may not be read with these credentials; grant them READ on it'


def test_a_topic_that_may_not_be_written_is_named(scene: Scene) -> None:
    told = last_words(scene, sasl_username="reader")
    assert told == f'kafka: topic "{scene.sink}" may not be written with these credentials; grant them WRITE on it'


def test_a_stranger_is_told_which_topic_is_forbidden(scene: Scene) -> None:
    told = last_words(scene, sasl_username="stranger")
    assert told.startswith(f'kafka: topic "{scene.topic}" may not be used with these credentials; grant them READ')
