"""Whole workers on an Apache Kafka that asks who is there: TLS, SASL and access rights, granted and refused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
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
from tests.end_to_end import Scene, good_ones
from tests.servers import Kafka, started_kafka

pytestmark = pytest.mark.broker

PASSWORDS = {user: f"{user}-4-{user[::-1]}" for user in ("worker", "stranger", "reader")}
READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
SCRAM = "listener.name.secured.scram-sha-512"


class Secured(Kafka):
    """A Kafka with users. `brokers` is its plain listener, open to the test alone; workers come to `secured`."""

    def __init__(self, brokers: str, secured: str, ca: Path) -> None:
        super().__init__(brokers)
        self.secured = secured
        self.ca = ca
        self._admin = AdminClient({"bootstrap.servers": brokers})

    def add_users(self) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        users = [UserScramCredentialUpsertion(user, info, word.encode()) for user, word in PASSWORDS.items()]
        for added in self._admin.alter_user_scram_credentials(users).values():
            added.result(30.0)

    def allow(self, user: str, operation: AclOperation, *topics: str) -> None:
        self._allow(user, operation, ResourceType.TOPIC, topics)

    def allow_group(self, user: str, operation: AclOperation, group: str) -> None:
        self._allow(user, operation, ResourceType.GROUP, (group,))

    def _allow(self, user: str, operation: AclOperation, kind: ResourceType, names: tuple[str, ...]) -> None:
        who, literal, allow = f"User:{user}", ResourcePatternType.LITERAL, AclPermissionType.ALLOW
        rights = [AclBinding(kind, name, literal, who, "*", operation, allow) for name in names]
        for granted in self._admin.create_acls(rights).values():
            granted.result(30.0)


def authority(folder: Path) -> Path:
    """A throw-away certificate authority: `ca.pem`, and `server.pem` with a key and its certificate for 127.0.0.1."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-subj", "/CN=an authority", "-keyout", "ca.key", "-out", "ca.pem", cwd=folder)
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    signed += ["-addext", "basicConstraints=critical,CA:FALSE"]
    openssl("req", "-x509", *key, *signed, "-subj", "/CN=kafka", "-keyout", "s.key", "-out", "s.crt", cwd=folder)
    (folder / "server.pem").write_text((folder / "s.key").read_text() + (folder / "s.crt").read_text())
    return folder / "ca.pem"


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)  # noqa: S603, S607


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("authority")
    ca = authority(folder)
    secured = f"127.0.0.1:{servers.free_ports(1)[0]}"
    everywhere = f"PLAINTEXT://127.0.0.1:{{broker}},SECURED://{secured}"
    with started_kafka(
        **{
            "listeners": f"{everywhere},CONTROLLER://127.0.0.1:{{controller}}",
            "advertised.listeners": everywhere,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_SSL",
            "listener.name.secured.ssl.keystore.type": "PEM",
            "listener.name.secured.ssl.keystore.location": str(folder / "server.pem"),
            "listener.name.secured.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            f"{SCRAM}.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # the broker itself, and the test, on the plain listener
        }
    ) as server:
        found = Secured(server.brokers, secured, ca)
        found.add_users()
        yield found


@pytest.fixture(scope="module")
def scene(kafka: Secured, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A pipeline of the user `worker`, who may do what it needs and no more."""
    config = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "worker",
        "sasl.password": "${KAFKA_PASSWORD}",
        "ssl.ca.location": str(kafka.ca),
    }
    requests, group = kafka.topic(), "the-group"
    source = {"brokers": kafka.secured, "topic": requests, "group": group, "config": config}
    folder = tmp_path_factory.mktemp("scene")
    with Scene(kafka, folder, requests=requests, source={"kafka": source}) as the:
        kafka.allow("worker", READ, requests)
        kafka.allow_group("worker", READ, group)
        kafka.allow("worker", WRITE, the.sink, the.errors)
        yield the


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORDS["worker"])
    return PASSWORDS["worker"]


def test_x(scene, kafka, monkeypatch):
    import time
    def go(*a, **k):
        w = scene.worker("--set=retry.start=3s", "--until-idle=0.5", "--set=retry.bounded=1s", *a, **k)
        t=time.time()
        print("=====", a, k, w.ended(), time.time()-t)
        print(w.log())
    scene.publish(good_ones(20))
    go()
    print(scene.accounted())
    other = kafka.topic()
    described = kafka.topic()
    kafka.allow("worker", DESCRIBE, described)
    kafka.allow_group("worker", DESCRIBE, "described-group")
    go("--set=source.kafka.topic="+other)
    go("--set=source.kafka.topic="+described)
    go("--set=source.kafka.group=foo")
    go("--set=source.kafka.group=described-group")
    go("--set=sink.kafka.topic="+other)
    go("--set=sink.kafka.topic="+described)
    go("--set=errors.kafka.topic="+other)
    go("--set=errors.kafka.topic="+described)
    go(security_protocol="plaintext")
    go(security_protocol="ssl")
    go(security_protocol="sasl_plaintext")
    go(sasl_mechanism="PLAIN")
    go("--set=source.kafka.brokers=127.0.0.1:9")
    go("--set=source.kafka.brokers=no.such.host:9")
    monkeypatch.setenv("KAFKA_PASSWORD", "wrong-word")
    go()
