"""What every benchmark shares: a broker, topics, children whose CPU is counted, and how results are kept.

A figure is always a ratio of two workers that took turns in the same run: the machine cancels out. Speed is read off
the topic that the answers went to, by the broker's clock, alike for every worker and without its help.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition, libversion
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from deploy.local import servers

# Programs start from compiled files, as installed ones do, also where the environment forbids to keep those.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
PARTITIONS = 4
PATIENCE = 600.0  # seconds after which a worker that has not finished is given up
LOOK = 0.1  # seconds between looks at how far a worker has come

Request = tuple[bytes, Mapping[str, bytes] | None]
"""Body and headers."""


# The broker


@contextlib.contextmanager
def kafka() -> Iterator[Bus]:
    """The Kafka that INFERBUS_BENCH_KAFKA names (host:port), else one started for this run alone."""
    given = os.environ.get("INFERBUS_BENCH_KAFKA")
    with contextlib.ExitStack() as stack:
        bus = Bus(given) if given else Bus(*stack.enter_context(broker()))
        stack.callback(bus.close)
        yield bus


@contextlib.contextmanager
def broker() -> Iterator[tuple[str, servers.Running]]:
    """An Apache Kafka of one's own: its address and its process. What it stored is deleted at the end."""
    with serving(servers.SERVERS["kafka"]) as running:
        yield running.address, running


@contextlib.contextmanager
def serving(server: servers.Server) -> Iterator[servers.Running]:
    """A server of one's own. What it stored is deleted at the end."""
    # In memory where there is memory: disks of shared machines stall for seconds, and every worker with them.
    memory = Path("/dev/shm")  # noqa: S108 - a folder of ours with a random name in it
    name = f"inferbus-benchmark-{uuid.uuid4().hex[:8]}"
    folder = (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())) / name
    program = server.install(False)
    running = servers.launch(server, program, ports=servers.free_ports(server.port_count), folder=folder)
    try:
        servers.await_ready(running)
        yield running
    finally:
        running.discard()


class Bus:
    """Topics on one cluster; `close` deletes those made here. `server` is its process, where it is ours."""

    def __init__(self, brokers: str, server: servers.Running | None = None) -> None:
        self.brokers = brokers
        self.server = server
        self._admin = AdminClient({"bootstrap.servers": brokers, "log_level": 2})
        self._reader = Consumer({"bootstrap.servers": brokers, "group.id": "bench", "log_level": 2})
        self._topics: list[str] = []

    def topic(self, max_message: int = 2**20) -> str:
        """A new topic whose records carry the broker's time."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        config = {
            "message.timestamp.type": "LogAppendTime",
            "max.message.bytes": str(max_message),
            "file.delete.delay.ms": "1000",  # the default keeps a deleted topic in memory for a minute
        }
        self._admin.create_topics([NewTopic(name, PARTITIONS, 1, config=config)])[name].result(30.0)
        self._topics.append(name)
        until = time.monotonic() + 30.0
        while True:  # the controller has made it; the broker hears that it leads it a moment later
            try:
                self._reader.list_topics(name, 10.0)  # makes the client forget that it did not know the topic
                self._ends(name)
            except KafkaException:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                return name

    def drop(self, *topics: str) -> None:
        """Delete topics made here."""
        for future in self._admin.delete_topics(list(topics)).values():
            future.result(30.0)
        self._topics = [name for name in self._topics if name not in topics]

    def close(self) -> None:
        """Delete every topic made here."""
        self._reader.close()
        if self._topics:
            self.drop(*self._topics)

    def fill(self, topic: str, messages: int, request: Callable[[int], Request]) -> None:
        """Write so many requests, spread evenly, each with its number as the key."""
        producer = Producer({
            "bootstrap.servers": self.brokers, "linger.ms": 50, "message.max.bytes": 10**9,
            "queue.buffering.max.messages": 200_000, "queue.buffering.max.kbytes": 128 * 1024,
        })  # fmt: skip
        for i in range(messages):
            body, headers = request(i)
            while True:
                try:
                    producer.produce(topic, body, b"%d" % i, i % PARTITIONS, headers=headers)
                    break
                except BufferError:
                    producer.poll(0.05)
        if producer.flush(PATIENCE):
            raise TimeoutError(f"{topic} could not be filled")
        if self.count(topic) != messages:
            raise RuntimeError(f"{topic} should hold {messages} messages, and holds {self.count(topic)}")

    def count(self, topic: str) -> int:
        """Messages written to the topic so far."""
        return sum(high - low for low, high in self._ends(topic))

    def _ends(self, topic: str) -> list[tuple[int, int]]:
        return [self._reader.get_watermark_offsets(TopicPartition(topic, p), 10.0) for p in range(PARTITIONS)]

    def written_in(self, topic: str) -> float:
        """Seconds between the first and the last record of the topic, by the broker's clock."""
        times: list[int] = []
        for partition, (low, high) in enumerate(self._ends(topic)):
            for offset in {low, high - 1} if high > low else ():
                times.append(self._read(topic, partition, offset).timestamp()[1])
        return (max(times) - min(times)) / 1000

    def one(self, topic: str) -> str:
        """The headers of one record, for saying what went wrong; empty when there is none."""
        for partition, (low, high) in enumerate(self._ends(topic)):
            if high > low:
                return repr(self._read(topic, partition, low).headers())
        return ""

    def _read(self, topic: str, partition: int, offset: int) -> Message:
        self._reader.assign([TopicPartition(topic, partition, offset)])
        message = self._reader.poll(10.0)
        self._reader.unassign()
        if message is None or message.error():
            raise RuntimeError(f"{topic}/{partition} could not be read at {offset}")
        return message


# Children


class Child:
    """A program started here: its CPU time, its resident memory, its end."""

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._popen = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.pid = self._popen.pid

    def cpu(self) -> float:
        """CPU seconds used so far; also right after it has ended, until `stop`."""
        return cpu_of(self.pid)

    def memory(self, field: str = "VmRSS") -> int:
        """Resident bytes: now, or the most so far (`VmHWM`)."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        if found is None:
            raise RuntimeError(f"the worker has ended:\n{self.log()}")
        return int(found[1]) * 1024

    def ended(self) -> bool:
        """Whether it has ended, without taking its figures away."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def log(self) -> str:
        """The last of what it printed."""
        # Not `seek`: the place in the file is the child's too.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 3000, max(0, size - 3000)).decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, grace: float = 20.0) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds, to it and its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace)
                break
        self._log.close()


# Neighbours


def cpu_of(pid: int) -> float:
    """CPU seconds a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def members(group: int) -> list[int]:
    """The processes of a group: a server may start its own from a script, and a worker have children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _text(stat).rpartition(")")[2].split()
        if fields and int(fields[2]) == group:
            found.append(int(stat.parent.name))
    return found


def await_quiet(patience: float = 30.0) -> None:
    """Return once the machine has been idle for half a second, or when patience is over: neighbours spoil a turn."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        watched = Neighbours()
        time.sleep(0.5)
        if watched.share() < 0.2:
            return


class Neighbours:
    """What share of the machine others have taken since this was made; `mine` are processes that are not others."""

    def __init__(self, *mine: int) -> None:
        self._mine = mine
        self._began = time.monotonic()
        self._start = self._others()

    def share(self, more: float = 0.0) -> float:
        """0 for nothing, 1 for everything; `more` CPU seconds were used by someone else who is not one of them."""
        taken = self._others() - self._start - more
        return max(0.0, taken / (time.monotonic() - self._began) / (os.cpu_count() or 1))

    def _others(self) -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, _text("/proc/stat").splitlines()[0].split()[1:9])
        everyone, ours = (user + nice + system + irq + softirq + steal) / TICKS, os.times()
        return everyone - ours.user - ours.system - sum(map(cpu_of, self._mine))


def quietest(turn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A turn, taken again while `neighbours` took more than a tenth of the machine; of three the quietest.

    What others did decides which turn counts, never what came out.
    """
    tries = [turn()]
    while tries[-1]["neighbours"] > 0.1 and len(tries) < 3:
        tries.append(turn())
    return min(tries, key=lambda one: float(one["neighbours"]))


def free_port() -> int:
    """A port that nothing listens on."""
    return servers.free_ports(1)[0]


def own(program: str) -> Path:
    """A program of this environment."""
    return Path(sys.executable).with_name(program)


def environment_of(name: str, *packages: str) -> Path:
    """The Python of a peer's own environment, made and filled when it is not there."""
    folder = HERE.parent / f".venv-bench-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"Installing {', '.join(packages)} into {folder.name} (once)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run([python, *install], check=True, timeout=900)
        (folder / "complete").touch()
    return python


# Results


class Figure(NamedTuple):
    """One number that is held against a target: `limit` is the least where `at_least`, else the most."""

    name: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = ""

    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met() else "MISSED"
        return f"{self.name}: {self.value:.3g}{unit} (target {sign} {self.limit:g}{unit}: {verdict})"


def arguments(about: str | None, *, messages: int = 0, runs: int = 0) -> argparse.ArgumentParser:
    """The options all benchmarks share; those without a default do not apply."""
    # As an exit, so that brokers and workers end with us: they are in groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if messages:
        parser.add_argument("--messages", type=int, default=messages, help="requests (default %(default)s)")
    if runs:
        parser.add_argument("--runs", type=int, default=runs, help="turns of each (default %(default)s)")
    name = Path(sys.argv[0]).stem
    results = HERE / "results" / f"{name}.json"
    parser.add_argument("--out", type=Path, default=results, help="where the JSON goes (default results/)")
    return parser


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s+(\d+)", _text("/proc/meminfo"))
    packages = ("inferbus", "confluent-kafka", "pika", "aiobotocore", "numpy", "onnxruntime", "orjson")
    kafka = re.search(r"kafka_.*?<version>(.*?)<", _text(servers.HERE / "kafka.pom.xml"), re.DOTALL)
    here = f"Apache Kafka {kafka and kafka[1]}, on this machine"
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages} | {"librdkafka": libversion()[0]},
        "kafka": "given" if "INFERBUS_BENCH_KAFKA" in os.environ else here,
    }


def _text(path: str | Path) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def save(out: Path, began: Sequence[float], figures: Sequence[Figure], result: Mapping[str, Any]) -> None:
    """Print the figures and write everything to `out`. `began` is the load average before the run."""
    for figure in figures:
        print(figure)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": {"before": began[0], "after": os.getloadavg()[0]},
        "figures": [{**figure._asdict(), "value": round(figure.value, 4), "met": figure.met()} for figure in figures],
        **result,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    texts = [list(map(_cell, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        print("  ".join((row[0].ljust(widths[0]), *padded[1:])))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and p99.9 in milliseconds."""
    ordered = sorted(seconds)
    return {name: round(1000 * float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]), 3)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}  # fmt: skip


median = statistics.median
