"""What every client of Kafka needs: its properties, its complaints in our words, the topic, and our rights on it.

Serves the source, the sink, and the tools for people at a terminal; knows nothing of deliveries.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka import Message as Raw
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource

from inferbus.connectors.base import ConnectorError, Fatal, Headers, Misconfigured, Refused, TooLarge, Unavailable

REACH = 5.0  # seconds a broker has to answer at start

Config = Mapping[str, Any]
log = logging.getLogger("inferbus.kafka")
# The client logs each failed connection, several a second; its error callback says the same, and `say` keeps it few.
log.addFilter(lambda record: not record.getMessage().startswith("FAIL "))


class Trouble:
    """What a client's callbacks say: brokers away, refusals, errors; and the log lines that follow, kept few."""

    def __init__(self, statistics: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.last: str | None = None
        self.shut_out: str | None = None
        self.refused: str | None = None
        self._told = statistics
        self._down: str | None = None
        self._said: dict[str, float] = {}

    def callbacks(self) -> dict[str, Any]:
        """Properties that make a client report here."""
        return {
            "error_cb": self.note,
            "stats_cb": self._statistics,
            "statistics.interval.ms": 1000,
            "logger": log,
        }

    def note(self, error: KafkaError) -> None:
        """An event of the client's."""
        code, text = error.code(), NOISE.sub("", error.str())
        if code == KafkaError._ALL_BROKERS_DOWN:
            self._down = f"kafka: {self.shut_out or 'no broker is reachable'}"
        else:
            self.last = text  # that all are down tells less than why the last one is
        if code in SHUT_OUT:
            self.shut_out = f"{text}; check {SHUT_OUT[code]}"
        elif code in REFUSED:
            self.refused = f"kafka: {text}"
        self.say(error.name(), text)

    def say(self, kind: str, text: str) -> None:
        """Log, at most once in half a minute for each kind."""
        now = time.monotonic()
        if now - self._said.get(kind, -1e9) > 30:
            self._said[kind] = now
            log.warning("%s: %s", kind, text)

    def _statistics(self, text: str) -> None:
        told = orjson.loads(text)
        if any(broker["state"] == "UP" for broker in told["brokers"].values()):
            self._down = self.shut_out = None
        self._told(told)

    def clear_refusal(self) -> None:
        """What was refused is granted again: something came through."""
        self.refused = None

    def away(self) -> str | None:
        """What keeps the cluster from us, or None."""
        return self.refused or self._down


def consumer_config(config: Config, group: str, start: str, max_inflight: int, max_bytes: int) -> dict[str, Any]:
    """Our defaults under the user's properties. Small prefetch, refilled at once: a backlog must not fill memory."""
    defaults: dict[str, Any] = {
        "group.id": group,
        "auto.offset.reset": start,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "queued.min.messages": min(100_000, max(1000, 2 * max_inflight)),
        "queued.max.messages.kbytes": max(1024, min(32 * 1024, max_bytes // 4096)),
        "fetch.queue.backoff.ms": 5,  # at the default 1000 a small prefetch starves: 8,000 messages/s
        "fetch.max.bytes": 16 * 2**20,
        "client.id": "inferbus",
        "log.connection.close": False,
    }
    if config.get("group.protocol") != "consumer":
        defaults["partition.assignment.strategy"] = "cooperative-sticky"
    merged = defaults | dict(config)
    for forbidden in ("enable.auto.commit", "enable.auto.offset.store"):
        if str(merged[forbidden]).lower() != "false":
            raise Misconfigured(f"source.kafka.config.{forbidden} must stay false: offsets are committed by outcome")
    return merged


def reads_from_start(config: Config) -> bool:
    """Whether a group without committed offsets begins at the start of the log."""
    return config.get("auto.offset.reset") in ("earliest", "smallest", "beginning")


def producer_config(config: Config) -> dict[str, Any]:
    """Our defaults under the user's properties: idempotent, acknowledged by all, never given up by the client."""
    consumer_only = ("group.", "fetch.", "queued.", "auto.offset", "max.poll", "session.", "heartbeat.", "isolation.")
    own = {k: v for k, v in config.items() if not k.startswith((*consumer_only, "partition.assignment"))}
    defaults: dict[str, Any] = {
        "acks": "all",
        "enable.idempotence": True,
        "linger.ms": 5,  # of a stream; once the pipeline has nothing else to do, it flushes
        "message.timeout.ms": 0,  # the client retries in order and without doubles; giving up would cost both
        "partitioner": "murmur2_random",  # where a Java producer would put the key
        "client.id": "inferbus",
        "log.connection.close": False,
    }
    return defaults | own


def new_client(kind: type[Any], config: Config) -> Any:
    """A client, or `Misconfigured` with librdkafka's own words about the property."""
    try:
        return kind(dict(config))
    except (KafkaException, TypeError, ValueError) as error:
        text = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        raise Misconfigured(f"kafka config: {text}") from None


class Listed(NamedTuple):
    """What the cluster says of a topic."""

    partitions: int
    embedded: bool  # the broker in this process, which answers no question about rights or settings


def reach_topic(client: Any, topic: str, trouble: Trouble) -> Listed:
    """Reach the cluster and see that the topic is there.

    Raises:
        Unavailable: No broker answers, the topic is missing, or reading about it is forbidden.
    """
    cluster = list_topic(client, topic, trouble)
    listed = cluster.topics[topic]
    if listed.error is None:
        return Listed(len(listed.partitions), embedded=cluster.controller_id not in cluster.brokers)
    if listed.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        raise Unavailable(f'kafka: topic "{topic}" does not exist; create it, or correct the name')
    if listed.error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        rights = "READ on it for a source, WRITE for a sink"
        raise Unavailable(f'kafka: topic "{topic}" may not be used with these credentials; grant them {rights}')
    raise Unavailable(f'kafka: topic "{topic}": {listed.error.str()}')


def list_topic(client: Any, topic: str, trouble: Trouble) -> ClusterMetadata:
    """The cluster and one of its topics.

    Raises:
        Unavailable: No broker answers within `REACH`; sooner where one has shown us the door.
    """
    for timeout in (REACH / 5, REACH * 4 / 5):
        with contextlib.suppress(KafkaException):
            return client.list_topics(topic, timeout=timeout)
        client.poll(0)  # serves the error callback, which knows more than the call
        if trouble.shut_out:
            raise Unavailable(f"kafka: {trouble.shut_out}")
    why = trouble.last or "check brokers and security.protocol"
    raise Unavailable(f"kafka: no broker answered within {REACH:.0f} s ({why})")


def administrator(config: Config, listed: Listed) -> AdminClient | None:
    """A client that asks about rights and settings; None for the embedded broker."""
    if listed.embedded:
        return None
    return AdminClient({k: v for k, v in config.items() if k != "enable.idempotence"} | {"log_level": 0})


def may(operation: AclOperation, admin: AdminClient | None, topic: str, group: str | None = None) -> None:
    """What may be seen, and not read or written, says so now, not with the first message.

    Raises:
        Unavailable: The broker lists our rights on the topic, or on the group, and `operation` is not among them.
    """
    if admin is None:
        return
    ask = {"include_authorized_operations": True, "request_timeout": REACH}
    asked = {f'topic "{topic}"': admin.describe_topics(TopicCollection([topic]), **ask)[topic]}
    if group is not None:
        asked[f'group "{group}"'] = admin.describe_consumer_groups([group], **ask)[group]
    for name, answer in asked.items():
        try:
            rights = answer.result().authorized_operations
            granted = not rights or operation in rights
        except KafkaException as error:  # an old broker, or no coordinator yet: the first message will tell
            granted = error.args[0].code() not in REFUSED
        if not granted:
            done = "read" if operation is AclOperation.READ else "written"
            raise Unavailable(
                f"kafka: {name} may not be {done} with these credentials; grant them {operation.name} on it"
            )


def largest_batch(admin: AdminClient | None, topic: str) -> float:
    """Bytes of the largest batch the topic takes; infinity where the cluster does not tell us."""
    if admin is None:
        return float("inf")
    place = ConfigResource(ConfigResource.Type.TOPIC, topic)
    try:
        settings = admin.describe_configs([place], request_timeout=REACH)[place].result()
    except KafkaException:  # not ours to see
        return float("inf")
    return int(settings["max.message.bytes"].value)


def headers_of(messages: Sequence[Raw]) -> tuple[list[Headers], list[int]]:
    """The headers of each message, and the positions of those whose headers cannot be read: a name is not UTF-8."""
    found: list[list[tuple[str, bytes]] | None] = []
    unread: list[int] = []
    asking = map(Raw.headers, messages)
    while len(found) < len(messages):
        try:
            found.extend(asking)
        except SystemError:  # asked a second time, the binding answers with a list that crashes whoever looks at it
            unread.append(len(found))
            found.append(None)
    return [tuple(own) if own else () for own in found], unread


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Errors of the client as ours."""
    try:
        yield
    except KafkaException as exception:
        error = exception.args[0]
        if error.fatal() or error.code() in FENCED:
            raise Fatal(f"kafka: {doing}: {error.str()}") from None
        raise Unavailable(f"kafka: {doing}: {error.str()}") from None


FENCED = {KafkaError.FENCED_INSTANCE_ID, KafkaError._FATAL}
UNREADABLE = {KafkaError._BAD_COMPRESSION, KafkaError._BAD_MSG}
REFUSED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
}
# What is wrong when a broker is there and no connection comes about: the settings to look at.
SHUT_OUT = {
    KafkaError._AUTHENTICATION: "sasl.mechanism, sasl.username and sasl.password",
    KafkaError._SSL: "ssl.ca.location, and that the broker's certificate names this host",
}
# What the client wraps around the reason: protocol, broker number, OpenSSL's codes, advice of its own, timing.
NOISE = re.compile(
    r"^\w+://|/(?:bootstrap|\d+)(?=: )|error:\w+:[^:]*:[^:]*:|: broker certificate could.*| \(after \d+ms in state.*"
)


TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
# Of a batch, the broker says these for the sake of one record in it: a key is missing on a compacted topic, and so on.
NEVER_TAKEN = TOO_LARGE | {
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_MSG,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.POLICY_VIOLATION,
}


def write_error(error: KafkaError) -> ConnectorError:
    """Why one record was not written, in terms of what to do next."""
    if error.code() in TOO_LARGE:
        return TooLarge(f"kafka: {error.str()}")
    if error.code() in NEVER_TAKEN:
        return Refused(f"kafka: {error.str()}")
    return Unavailable(f"kafka: {error.str()}")
