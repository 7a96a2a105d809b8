#!/usr/bin/env python3
"""Real servers on this machine for tests and examples, without Docker.

    python deploy/local/servers.py start kafka           # none named: all four
    python deploy/local/servers.py start kafka=9092      # on a port of your choice
    python deploy/local/servers.py status
    python deploy/local/servers.py stop

Apache Kafka and ElasticMQ (SQS) come from Maven Central, RabbitMQ from the operating system, versitygw (S3)
from its Go module; so does toxiproxy, which stands before another server to slow and cut connections, and is started
only where it is named. What is downloaded stays in `.servers/`; what runs is listed in `.servers/running.json`;
messages and objects lie in a temporary folder until `stop`. Every server listens on 127.0.0.1 alone, and a
server that died is started again on its old port with what it had stored.

Standard library only, so that it runs before anything is installed.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".servers"
START_TIMEOUT = 90.0
LOG = "server.log"
VERSITYGW = "v1.8.0"
MOTO = "5.2.5"
TOXIPROXY = "v2.12.0"


class NotInstalledError(Exception):
    """Something that a server needs is not on this machine and did not come; the text names the cure."""


class StartError(Exception):
    """A server was started and did not come to answer; the text ends with what it logged."""


@dataclass(frozen=True)
class Running:
    """One server that was started; it may have died since."""

    name: str
    pid: int
    born: str
    ports: list[int]
    folder: str
    address: str

    def alive(self) -> bool:
        """Whether this very process still runs: a pid alone may belong to someone else by now."""
        return _born(self.pid) == self.born

    def kill(self) -> None:
        """End the server at once, as `kill -9` does; its folder stays."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)

    def discard(self) -> None:
        """End the server and delete what it stored."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Server:
    """How one kind of server is installed, started and asked whether it is ready.

    install: makes the program available and returns where it is; raises NotInstalledError. Packages of the
        operating system are installed only if its argument is true.
    command: writes the settings into a folder, once per folder formats it, and returns the command line.
        It is given as many loopback ports as `port_count`; clients use the first.
    ready: whether a server on this port answers a real request; OSError means not yet.
    address: what a client is given, with `{port}` in it.
    unasked: whether it is one of those that `start` starts when none is named.
    """

    name: str
    install: Callable[[bool], Path]
    command: Callable[[Path, Path, list[int]], list[str]]
    ready: Callable[[int], bool]
    address: str
    port_count: int = 1
    unasked: bool = True


def kafka_command(jars: Path, folder: Path, ports: list[int], extra: Mapping[str, str] | None = None) -> list[str]:
    """`Server.command` of Kafka; `extra` overrides our properties and may name the ports {broker} and {controller}."""
    java = ["java", "-Xmx512m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{jars}/*"]
    settings = folder / "server.properties"
    more = "".join(f"{name}={value}\n" for name, value in (extra or {}).items())  # of two, the last one counts
    settings.write_text((_KAFKA_SETTINGS + more).format(broker=ports[0], controller=ports[1], folder=folder))
    if not (folder / "log/meta.properties").exists():
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # = : an id that starts with a dash would be read as an option
        _run([*java, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", f"--config={settings}"])
    return [*java, "kafka.Kafka", str(settings)]


def _kafka_ready(port: int) -> bool:
    # A Metadata request, version 1, for no topics. A broker is listed once it is unfenced, which is when its
    # partitions have leaders: the port alone is open before that.
    request = struct.pack(">hhihi", 3, 1, 0, -1, 0)
    answer = _ask(port, struct.pack(">i", len(request)) + request)
    return len(answer) >= 12 and struct.unpack_from(">i", answer, 8)[0] > 0


def _rabbitmq_install(system: bool) -> Path:
    # Debian's own command on PATH changes to the user `rabbitmq`, who may not write to our folder.
    plain = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if plain.exists():
        return plain
    _need("rabbitmq-server", apt="rabbitmq-server", brew="rabbitmq", system=system)
    return plain if plain.exists() else Path("rabbitmq-server")


def _rabbitmq_command(program: Path, folder: Path, ports: list[int]) -> list[str]:
    port, distribution, mapper = ports
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nlog.console = true\n")
    (folder / "enabled_plugins").write_text("[].\n")
    env = {
        "HOME": folder,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": mapper,
        "RABBITMQ_NODENAME": f"inferbus-{port}@localhost",
        "RABBITMQ_DIST_PORT": distribution,
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": folder / "rabbitmq.conf",
        "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "enabled_plugins",
        "RABBITMQ_MNESIA_BASE": folder / "mnesia",
        "RABBITMQ_LOG_BASE": folder,
        "RABBITMQ_PID_FILE": folder / "pid",
    }
    # The port mapper is started here, in our process group: RabbitMQ would leave one running for good.
    script = f"epmd -port {mapper} -address 127.0.0.1 & exec {program}"
    return ["env", *(f"{key}={value}" for key, value in env.items()), "sh", "-c", script]


def _rabbitmq_ready(port: int) -> bool:
    # The greeting of AMQP 0-9-1 is answered with a method frame on channel 0: connection.start.
    return _ask(port, b"AMQP\x00\x00\x09\x01").startswith(b"\x01\x00\x00")


def _sqs_command(jars: Path, folder: Path, ports: list[int]) -> list[str]:
    settings = folder / "elasticmq.conf"
    settings.write_text(_SQS_SETTINGS.format(port=ports[0], folder=folder))
    java = ["java", "-Xmx256m", f"-Dconfig.file={settings}", "-cp", f"{jars}/*"]
    return [*java, "org.elasticmq.server.Main"]


def _s3_install(system: bool) -> Path:
    if shutil.which("go"):
        return _cached(f"versitygw-{VERSITYGW}", _fetch_versitygw) / "versitygw"
    _say("Go is not here: S3 is moto instead of versitygw, and forgets its objects when it dies")
    if importlib.util.find_spec("pip") is None:
        _need("pip3", apt="python3-pip", brew="python", system=system)
    return _cached(f"moto-{MOTO}", _fetch_moto)


def _fetch_versitygw(folder: Path) -> None:
    _say("Building versitygw with Go (once, about a minute)")
    _go_install(f"github.com/versity/versitygw/cmd/versitygw@{VERSITYGW}", folder)


def _fetch_moto(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, "--target", str(folder), f"moto[server,s3]=={MOTO}"])


def _toxiproxy_install(_system: bool) -> Path:
    _need("go", apt="golang-go", brew="go", system=False)  # that of Debian 12 is too old to build it, or versitygw
    return _cached(f"toxiproxy-{TOXIPROXY}", _fetch_toxiproxy) / "server"


def _fetch_toxiproxy(folder: Path) -> None:
    _say("Building toxiproxy with Go (once, about a quarter of a minute)")
    _go_install(f"github.com/Shopify/toxiproxy/v2/cmd/server@{TOXIPROXY}", folder)


def _go_install(module: str, folder: Path) -> None:
    _run(["env", f"GOBIN={folder}", "go", "install", module])


def _s3_command(program: Path, folder: Path, ports: list[int]) -> list[str]:
    if program.is_dir():
        moto = ["env", f"PYTHONPATH={program}", sys.executable, "-m", "moto.server"]
        return [*moto, "-H", "127.0.0.1", "-p", str(ports[0])]
    objects, metadata = folder / "objects", folder / "metadata"
    objects.mkdir(exist_ok=True)
    metadata.mkdir(exist_ok=True)
    gateway = [str(program), "--quiet", "--port", f"127.0.0.1:{ports[0]}"]
    keys = ["--access", "inferbus", "--secret", "inferbus"]
    # Metadata beside the objects: not every temporary folder has extended attributes.
    return [*gateway, *keys, "posix", "--sidecar", str(metadata), str(objects)]


SERVERS = {
    server.name: server
    for server in (
        Server(
            name="kafka",
            install=lambda system: _maven("kafka", system),
            command=kafka_command,
            ready=_kafka_ready,
            address="127.0.0.1:{port}",
            port_count=2,
        ),
        Server(
            name="rabbitmq",
            install=_rabbitmq_install,
            command=_rabbitmq_command,
            ready=_rabbitmq_ready,
            address="amqp://guest:guest@127.0.0.1:{port}/",
            port_count=3,
        ),
        Server(
            name="sqs",
            install=lambda system: _maven("sqs", system),
            command=_sqs_command,
            ready=lambda port: _answers_http(port, "/?Action=ListQueues"),
            address="http://127.0.0.1:{port}",
        ),
        Server(
            name="s3",
            install=_s3_install,
            command=_s3_command,
            ready=lambda port: _answers_http(port, "/"),
            address="http://127.0.0.1:{port}",
        ),
        Server(
            name="toxiproxy",
            install=_toxiproxy_install,
            command=lambda program, _folder, ports: [str(program), "-host", "127.0.0.1", "-port", str(ports[0])],
            ready=lambda port: _answers_http(port, "/version"),
            address="http://127.0.0.1:{port}",
            unasked=False,
        ),
    )
}


def launch(server: Server, program: Path, *, ports: list[int], folder: Path) -> Running:
    """Start a server in `folder`, with what an earlier start on the same ports stored there.

    Returns at once: `await_ready` tells when it answers. Raises NotInstalledError, StartError.
    """
    for port in ports:
        with socket.socket() as probe:
            # Whoever is there would answer `ready` in our server's place.
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise StartError(f"{server.name} cannot have port {port}: something else answers there")
    folder.mkdir(mode=0o700, exist_ok=True)
    command = server.command(program, folder, ports)
    log = str(folder / LOG)
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,  # a process group of its own: one signal ends all of it, and a Ctrl-C here none of it
    )
    address = server.address.format(port=ports[0])
    return Running(server.name, pid, _born(pid) or "", ports, str(folder), address)


def await_ready(running: Running) -> None:
    """Return once the server answers. Raises StartError when it ends or stays silent, and kills it."""
    server, until = SERVERS[running.name], time.monotonic() + START_TIMEOUT
    while running.alive() and time.monotonic() < until:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.ready(running.ports[0]):
                return
        time.sleep(0.05)
    running.kill()
    tail = "\n".join((Path(running.folder) / LOG).read_text(errors="replace").splitlines()[-20:])
    raise StartError(f"{running.name} did not come to answer on port {running.ports[0]}; it logged:\n{tail}")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on.

    Below the range that systems take for outgoing connections: there, a client that calls a killed server
    back can be given that very port, connect to itself, and keep the server from coming up again.
    """
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(20_000, 32_000)  # noqa: S311
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def new_folder(name: str) -> Path:
    """Where a server may keep what it stores: a name for `launch` to make, in the temporary folder."""
    return Path(tempfile.gettempdir()) / f"inferbus-{name}-{uuid.uuid4().hex[:12]}"


def main() -> int:
    """Run the command line: 0 done, 1 a server failed, 2 usage, 3 something is missing on this machine."""
    parser = argparse.ArgumentParser(description="Real servers on 127.0.0.1 for tests, without Docker.")
    parser.add_argument("action", choices=["start", "stop", "status"])
    names = ", ".join(SERVERS)
    parser.add_argument(
        "servers", nargs="*", metavar="SERVER", help=f"{names}, or NAME=PORT; default: all but toxiproxy"
    )
    options = parser.parse_args()
    wanted: dict[str, int | None] = {}
    unasked = [name for name in SERVERS if SERVERS[name].unasked or options.action != "start"]
    for text in options.servers or unasked:
        name, _, port = text.partition("=")
        if name not in SERVERS or not (port.isdecimal() or text == name):
            parser.error(f"{text!r} is not one of {names}, nor NAME=PORT")
        wanted[name] = int(port) if port else None
    try:
        with _registry() as running:
            {"start": _start, "stop": _stop, "status": _status}[options.action](wanted, running)
    except (NotInstalledError, StartError) as error:
        _say(str(error))
        return 3 if isinstance(error, NotInstalledError) else 1
    return 0


def _start(wanted: dict[str, int | None], running: dict[str, Running]) -> None:
    programs = {name: SERVERS[name].install(True) for name in wanted}
    for name, port in wanted.items():
        old = running.get(name)
        if old and port not in (None, old.ports[0]):
            raise StartError(f"{name} has port {old.ports[0]} already: stop it first")
        if old and old.alive():
            continue
        ports = old.ports if old else free_ports(SERVERS[name].port_count)
        if port:
            ports[0] = port
        folder = Path(old.folder) if old else new_folder(name)
        running[name] = launch(SERVERS[name], programs[name], ports=ports, folder=folder)
    for name in wanted:
        await_ready(running[name])
        _say(f"{name} answers on port {running[name].ports[0]} (pid {running[name].pid})")
        # Standard output is for the shell:  eval "$(python deploy/local/servers.py start kafka)"
        print(f"export INFERBUS_TEST_{name.upper()}={running[name].address}")


def _stop(wanted: dict[str, int | None], running: dict[str, Running]) -> None:
    for name in wanted:
        if one := running.pop(name, None):
            one.discard()
            _say(f"{name} stopped, and what it stored deleted")


def _status(wanted: dict[str, int | None], running: dict[str, Running]) -> None:
    for name in wanted:
        one = running.get(name)
        if one is None:
            print(f"{name:9} not started")
        elif one.alive():
            print(f"{name:9} {one.address}  pid {one.pid}")
        else:
            print(f"{name:9} {one.address}  has died: `start` brings it back, `stop` forgets it")


@contextlib.contextmanager
def _registry() -> Iterator[dict[str, Running]]:
    """What runs, read from and written back to running.json; one command at a time."""
    path = _cache() / "running.json"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(path.read_text()) if path.exists() else {}
        running = {name: Running(**fields) for name, fields in known.items()}
        try:
            yield running
        finally:
            path.write_text(json.dumps({name: asdict(one) for name, one in running.items()}, indent=2) + "\n")


def _cache() -> Path:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE


def _cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled aside first: half a download is never found under its name."""
    folder = _cache() / name
    if not folder.exists():
        aside = Path(tempfile.mkdtemp(dir=CACHE, prefix="fetching-"))
        try:
            fill(aside)
            with contextlib.suppress(OSError):  # another command was faster; its folder is as good
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _maven(name: str, system: bool) -> Path:
    """A folder with the jars that `<name>.pom.xml` asks for."""
    _need("java", apt="default-jdk-headless", brew="openjdk", system=system)
    pom = HERE / f"{name}.pom.xml"

    def fill(folder: Path) -> None:
        _need("mvn", apt="maven", brew="maven", system=system)
        _say(f"Fetching the jars of {name} from Maven Central (once)")
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={folder}", "-DincludeScope=runtime"]
        _run(["mvn", "-B", "-q", "-f", str(pom), *goal])

    return _cached(f"{name}-{hashlib.sha256(pom.read_bytes()).hexdigest()[:8]}", fill)


def _need(program: str, *, apt: str, brew: str, system: bool) -> None:
    """Make sure that `program` is on PATH; on Debian, as root and if `system`, by installing its package."""
    if shutil.which(program):
        return
    debian = Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None
    if not debian or not system or os.geteuid() != 0:
        cure = f"brew install {brew}" if platform.system() == "Darwin" else f"sudo apt-get install {apt}"
        raise NotInstalledError(f"`{program}` is not on PATH: install it, for example with `{cure}`")
    _say(f"Installing the Debian package {apt} with apt-get, since `{program}` is not here")
    apt_get = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    _run([*apt_get, "update"])
    _run([*apt_get, "install", "-y", "--no-install-recommends", apt])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-10:])
        raise NotInstalledError(f"`{' '.join(command)}` failed:\n{tail}")


def _ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def _answers_http(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status < 500  # S3 refuses an unsigned request, and is ready


def _born(pid: int) -> str | None:
    """When the process started, in whatever words the system has for it; None once it has ended."""
    with contextlib.suppress(ChildProcessError):  # not a child of ours, or reaped already
        os.waitpid(pid, os.WNOHANG)
    try:
        if Path("/proc/self/stat").exists():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            state, born = fields[0], fields[19]
        else:
            ps = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
            line = subprocess.run(ps, capture_output=True, text=True, check=True).stdout
            state, _, born = line.strip().partition(" ")
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if state.startswith("Z") else born.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_KAFKA_SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder}/log
num.partitions=4
auto.create.topics.enable=false
# After a kill the controller waits this long for the broker that died before it lets it register again.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# A group starts at once instead of waiting for more members; both group protocols are on offer.
group.initial.rebalance.delay.ms=0
group.coordinator.rebalance.protocols=classic,consumer
# One node holds the only replica of everything.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""

_SQS_SETTINGS = """\
node-address {{ protocol = http, host = "127.0.0.1", port = {port}, context-path = "" }}
rest-sqs {{ enabled = true, bind-hostname = "127.0.0.1", bind-port = {port}, sqs-limits = strict }}
rest-stats {{ enabled = false, bind-hostname = "127.0.0.1", bind-port = 0 }}
generate-node-address = false
aws {{ region = us-east-1, accountId = 000000000000 }}
pekko.http.server.parsing.illegal-header-warnings = off  # it dislikes headers that every AWS client sends
queues {{}}
queues-storage {{ enabled = false, path = "{folder}/queues.conf" }}
messages-storage {{
  enabled = true, driver-class = "org.h2.Driver", uri = "jdbc:h2:{folder}/messages;WRITE_DELAY=0"
  username = "sa", password = "", prune-data-on-init = false
}}
"""

if __name__ == "__main__":
    sys.exit(main())
