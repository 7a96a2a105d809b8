"""A connection to RabbitMQ on a thread of its own, and channels on it that are opened anew whenever they close.

That thread is the only one that touches pika, and it does nothing else: heartbeats never wait for a prediction. Others
hand it calls, one for a batch. It reconnects by itself, for as long as anybody uses it.

Invariant: a channel that closed is never used again; whoever had it is told before there is a new one.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop
from pika.channel import Channel
from pika.exceptions import (
    AMQPHeartbeatTimeout,
    ChannelClosed,
    ChannelClosedByClient,
    ConnectionClosed,
    IncompatibleProtocolError,
    InvalidFrameError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)
from pika.frame import Body, Header, Method, decode_frame
from pika.spec import (
    FRAME_BODY,
    FRAME_END,
    FRAME_END_SIZE,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    FRAME_METHOD,
    Basic,
    BasicProperties,
)

from inferbus.connectors.base import ConnectorError, Misconfigured, Unavailable
from inferbus.connectors.settings import AmqpTls

REACH = 10.0  # seconds a broker has to answer at start
ANSWER = 5.0  # seconds it has for a question later
GOODBYE = 3.0  # seconds for closing in order
BACKOFF = 0.1, 10.0  # seconds until the next try, at first and at most
CORK = 64 * 2**10  # bytes sent with one call
RECEIVE = 128 * 2**10  # bytes received with one

log = logging.getLogger("inferbus.rabbitmq")
# pika logs each failed connection at length, with stacks; what is wrong is said here, once and in a line.
logging.getLogger("pika").setLevel(logging.CRITICAL)

PREFIX = struct.Struct(">BHL")  # of a frame: kind, channel, bytes
CONTENT = struct.Struct(">xxxxQ")  # before the properties: the body's bytes
DELIVER = struct.pack(">L", Basic.Deliver.INDEX)

UNREADABLE = object()
"""Stands for the header table of a message where pika could not read it."""


class Client(pika.SelectConnection):  # type: ignore[misc]  # pika ships no type information
    """pika's connection, which outlives a message it cannot read and spends less on each.

    It reads frames where they lie, and takes those of a message past the table of callbacks, where pika looks each up.
    It sends the frames of a batch with one call.
    """

    _corked: list[bytes] | None = None
    _frame_buffer: bytes

    def _proto_connection_made(self, transport: Any) -> None:
        # Each call gives up the interpreter, and has it back only when the pipeline's thread lets go of it. By pika's
        # 4 KiB that would be for every dozen messages.
        transport._MAX_RECV_BYTES = RECEIVE  # noqa: SLF001 - it can be told nowhere else
        super()._proto_connection_made(transport)

    def _on_data_available(self, chunk: bytes) -> None:
        if not self.is_open:  # the handshake has frames of its own
            super()._on_data_available(chunk)
            return
        buffer = self._frame_buffer + chunk
        at, end = 0, len(buffer)
        while end - at >= FRAME_HEADER_SIZE:
            kind, number, size = PREFIX.unpack_from(buffer, at)
            stop = at + FRAME_HEADER_SIZE + size + FRAME_END_SIZE
            if stop > end:
                break
            if buffer[stop - 1] != FRAME_END:
                raise InvalidFrameError("the end of a frame is not where it should be")
            content = _content(kind, number, buffer[at + FRAME_HEADER_SIZE : stop - FRAME_END_SIZE])
            if content is None or number not in self._channels:
                self._process_frame(decode_frame(buffer[at:stop])[1])
            else:
                self.frames_received += 1
                self._channels[number]._handle_content_frame(content)  # noqa: SLF001 - pika's own next step
            at = stop
        self._frame_buffer = buffer[at:]
        self.bytes_received += at

    def publish(self, method: bytes, number: int, properties: Any, body: bytes) -> None:
        """As `basic_publish` on channel `number`, with a method frame that is the same for all records of a sink."""
        most = self._body_max_length
        frames = [method, Header(number, len(body), properties).marshal()]
        frames += [Body(number, body[i : i + most]).marshal() for i in range(0, len(body), most)]
        self._output_marshaled_frames(frames)

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Keep frames until the end, and write them together: each write is a system call, three a message."""
        self._corked = []
        try:
            yield
        finally:
            frames, self._corked = self._corked, None
            start = size = 0
            for i, frame in enumerate(frames, 1):
                size += len(frame)
                if size >= CORK or i == len(frames):
                    super()._adapter_emit_data(b"".join(frames[start:i]))
                    start, size = i, 0

    def _adapter_emit_data(self, frame: bytes) -> None:
        if self._corked is None:
            super()._adapter_emit_data(frame)
        else:
            self._corked.append(frame)


def _content(kind: int, number: int, payload: bytes) -> Any:
    """A frame that is part of a delivery; None for any other."""
    if kind == FRAME_BODY:
        return Body(number, payload)
    if kind == FRAME_METHOD:
        return Method(number, Basic.Deliver().decode(payload, 4)) if payload.startswith(DELIVER) else None
    if kind != FRAME_HEADER:
        return None
    try:
        properties = BasicProperties().decode(payload, CONTENT.size)
    except Exception:  # noqa: BLE001 - whatever pika trips over, such as a time out of range
        # Raised, it would end the connection, and the message would come again, and so on for ever.
        properties = BasicProperties(headers=UNREADABLE)
    return Header(number, CONTENT.unpack_from(payload)[0], properties)


def publishing(number: int, exchange: str, routing_key: str) -> bytes:
    """The method frame for `Client.publish`."""
    method = Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
    return bytes(Method(number, method).marshal())


class Connection:
    """One connection, shared by the channels that stand on it; runs while there are any.

    Attributes:
        place: Its broker, `host:port`.
        client: While connected; for the connection's thread only.
        away: Why it is not connected.
        blocked: Why the broker takes nothing from publishers, while that is so.
        broken: Why it will never be connected again: an error of ours or of pika's.

    Raises:
        Misconfigured: `url` or `tls` cannot work.
    """

    def __init__(self, url: str, tls: AmqpTls) -> None:
        self._parameters = parameters(url, tls)
        self.place = f"{self._parameters.host}:{self._parameters.port}"
        self.client: Client | None = None
        self.away: str | None = None
        self.blocked: str | None = None
        self.broken: str | None = None
        self._standing: dict[StandingChannel, None] = {}
        self._trying: Client | None = None
        self._backoff = BACKOFF[0]
        self._since = 0.0  # monotonic seconds of the last connection
        self._closing = False
        self._users = 0
        self._loop: Any = None
        self._thread: threading.Thread | None = None

    # For any thread

    def call(self, call: Callable[[], None]) -> None:
        """Make a call on the connection's thread, after those handed over before; never once it is closed."""
        self._loop.add_callback_threadsafe(call)

    def ask(self, question: Callable[[Client, Future[Any]], None]) -> Any:
        """Wait for the answer to a question that is put on the connection's thread.

        Raises:
            Unavailable: Not connected, or no answer in time.
        """
        answer: Future[Any] = Future()

        def put() -> None:
            if self.client is None:
                answer.set_exception(Unavailable(self.away or f"rabbitmq: not connected to {self.place} yet"))
            else:
                question(self.client, answer)

        self.call(put)
        try:
            return answer.result(ANSWER)
        except TimeoutError:
            raise Unavailable(f"rabbitmq: {self.place} did not answer within {ANSWER:.0f} s") from None

    # For the thread of those who use it, all on one

    def enter(self, channel: StandingChannel) -> None:
        """Let a channel stand on this connection, which starts with the first."""
        if not self._users:
            self._loop = IOLoop()
            self._closing = False
            self.away = self.broken = None
            self._backoff = BACKOFF[0]
            self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
            self._thread.start()
        self._users += 1
        self.call(partial(self._add, channel))

    def leave(self, channel: StandingChannel) -> None:
        """Close that channel, and with the last one the connection; waits until the broker knows, or seconds."""
        self._users -= 1
        self.call(partial(self._remove, channel))
        thread = self._thread
        if self._users or thread is None:
            return
        self.call(self._shut)
        thread.join(GOODBYE)
        if thread.is_alive():  # the broker does not answer: it will find the socket closed
            self.call(self._loop.stop)
            thread.join()
        if self.client is not None or self._trying is not None:
            self._drop_socket()
        self._loop.close()
        self._thread = None

    def _drop_socket(self) -> None:
        for client in filter(None, (self.client, self._trying)):
            transport = client._transport  # noqa: SLF001 - pika closes no socket without a loop that runs
            with suppress(OSError, AttributeError):
                transport._sock.close()  # noqa: SLF001 - as above
        self.client = self._trying = None

    # On the connection's thread

    def _run(self) -> None:
        try:
            self._loop.start()
        except Exception as error:
            log.exception("the client of %s broke", self.place)
            self.broken = f"rabbitmq: the client broke ({type(error).__name__}); see the log"
            self._tell(Unavailable(self.broken))

    def _add(self, channel: StandingChannel) -> None:
        self._standing[channel] = None
        if self.client is None:
            self._connect()
        else:
            channel.begin(self.client)

    def _remove(self, channel: StandingChannel) -> None:
        self._standing.pop(channel, None)
        channel.end()

    def _connect(self) -> None:
        if self._closing or self.client is not None or self._trying is not None:
            return
        self._trying = Client(self._parameters, self._opened, self._failed, self._closed, custom_ioloop=self._loop)
        self._trying.add_on_connection_blocked_callback(self._on_blocked)
        self._trying.add_on_connection_unblocked_callback(self._on_unblocked)

    def _opened(self, client: Client) -> None:
        self.client, self._trying = client, None
        self.away = self.blocked = None
        self._since = time.monotonic()
        for channel in self._standing:
            channel.begin(client)

    def _failed(self, _client: Client, error: BaseException) -> None:
        self._trying = None
        self._lost(refusal(error, self._parameters))

    def _closed(self, _client: Client, error: BaseException) -> None:
        self.client = None
        if time.monotonic() - self._since > BACKOFF[1]:
            self._backoff = BACKOFF[0]
        self._lost(refusal(error, self._parameters))

    def _lost(self, error: ConnectorError) -> None:
        if self._closing:
            self._loop.stop()
            return
        if self.away != str(error):
            log.warning("%s; trying again", error)
        self.away = str(error)
        self.blocked = None
        self._tell(error)
        self._loop.call_later(self._backoff, self._connect)
        self._backoff = min(BACKOFF[1], 2 * self._backoff)

    def _tell(self, error: ConnectorError) -> None:
        for channel in self._standing:
            channel.cut(error)

    def _on_blocked(self, _client: Client, frame: Any) -> None:
        self.blocked = f"rabbitmq: the broker at {self.place} blocks publishers ({frame.method.reason})"
        log.warning("%s", self.blocked)

    def _on_unblocked(self, _client: Client, _frame: Any) -> None:
        self.blocked = None

    def _shut(self) -> None:
        self._closing = True
        client = self.client or self._trying
        if client is None or client.is_closed or client.is_closing:
            self._loop.stop()
        else:
            client.close()


class StandingChannel:
    """A channel that is opened anew whenever it closes, with a back-off; used on the connection's thread alone.

    Args:
        connection: What it stands on.
        set_up: Makes a new channel ready, then calls `ready`.
        closed: Told that the channel is gone, and why; not called for one that was never ready.
        explain: Why the broker closes a channel: the reply's code and text as an error.
        last_words: What is sent before the channel is closed in order.
    """

    def __init__(
        self,
        connection: Connection,
        set_up: Callable[[Channel], None],
        closed: Callable[[ConnectorError], None],
        explain: Callable[[int, str], ConnectorError],
        last_words: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._set_up = set_up
        self._on_closed = closed
        self._explain = explain
        self._last_words = last_words
        self._channel: Channel | None = None
        self._answer: Future[None] | None = None
        self._ending = False
        self._ready = False
        self._problem: str | None = None
        self._backoff = BACKOFF[0]

    def open(self) -> None:
        """For the pipeline's thread: return once it is ready.

        Raises:
            Unavailable: It was not, at the first try.
            Misconfigured: It never will be.
        """
        answer: Future[None] = Future()
        self._answer = answer
        self._ending = False
        self._connection.enter(self)
        try:
            answer.result(REACH)
        except TimeoutError:
            self.close()
            raise Unavailable(f"rabbitmq: {self._connection.place} did not answer within {REACH:.0f} s") from None
        except ConnectorError:
            self.close()
            raise

    def close(self) -> None:
        """For the pipeline's thread: leave the connection."""
        self._connection.leave(self)

    def problem(self) -> str | None:
        """For any thread: why it cannot be used now."""
        return self._connection.broken or self._connection.away or self._problem

    def begin(self, client: Client) -> None:
        """Open a channel; called with each new connection."""
        self._channel = client.channel(on_open_callback=self._opened)
        self._channel.add_on_close_callback(self._closed)

    def ready(self) -> None:
        """It may be used from now on."""
        self._ready = True
        self._problem = None
        self._backoff = BACKOFF[0]
        if self._answer is not None:
            self._answer.set_result(None)
            self._answer = None

    def trouble(self, why: str) -> None:
        """It is open and does not work: say so until it is `ready` again."""
        if self._problem != why:
            log.warning("%s", why)
        self._problem = why

    def later(self, call: Callable[[], None]) -> None:
        """Try again after the back-off."""
        client = self._connection.client
        if client is not None:
            client.ioloop.call_later(self._backoff, call)
            self._backoff = min(BACKOFF[1], 2 * self._backoff)

    def cut(self, error: ConnectorError) -> None:
        """The connection was lost, or never came about."""
        self._channel = None
        self._problem = str(error)  # until it is ready on the next connection
        self._gone(error)

    def end(self) -> None:
        """Close it for good."""
        self._ending = True
        self._answer = None
        if self._channel is not None and self._channel.is_open:
            self._last_words()
            self._channel.close()
        self._gone(Unavailable("rabbitmq: closed"))

    def _opened(self, channel: Channel) -> None:
        if self._ending:
            channel.close()
        else:
            self._set_up(channel)

    def _closed(self, channel: Channel, reason: BaseException) -> None:
        if channel is not self._channel or self._ending or not isinstance(reason, ChannelClosed):
            return  # of an earlier life; or the connection is lost, of which `cut` tells
        self._channel = None
        error: ConnectorError = Unavailable("rabbitmq: the channel was closed")
        if not isinstance(reason, ChannelClosedByClient):
            error = self._explain(reason.reply_code, reason.reply_text)
        self.trouble(str(error))
        self._gone(error)
        self.later(self._again)

    def _gone(self, error: ConnectorError) -> None:
        if self._answer is not None:
            self._answer.set_exception(error)
            self._answer = None
        if self._ready:
            self._ready = False
            self._on_closed(error)

    def _again(self) -> None:
        client = self._connection.client
        if client is not None and client.is_open and self._channel is None and not self._ending:
            self.begin(client)


def parameters(url: str, tls: AmqpTls) -> Any:
    """What pika is to connect with.

    Raises:
        Misconfigured: The url, or a file that `tls` names, cannot be used.
    """
    try:
        found = pika.URLParameters(url)
    except (ValueError, TypeError, AttributeError):  # their texts may quote the password
        raise Misconfigured("rabbitmq url: expected amqp://user:password@host:port/vhost") from None
    found.client_properties = {"connection_name": "inferbus", **(found.client_properties or {})}
    found.stack_timeout = REACH
    if found.ssl_options is not None:
        try:
            context = ssl.create_default_context(cafile=tls.ca_file)
            if tls.cert_file is not None:
                context.load_cert_chain(tls.cert_file, tls.key_file)
        except (OSError, ssl.SSLError) as error:
            why = error.strerror or str(error)
            raise Misconfigured(f"rabbitmq tls: ca_file, cert_file or key_file cannot be used ({why})") from None
        found.ssl_options = pika.SSLOptions(context, found.host)
    return found


def refusal(error: BaseException, at: Any) -> ConnectorError:
    """Why a connection did not come about, or was lost, and the cure; never the password."""
    place, user, vhost = f"{at.host}:{at.port}", at.credentials.username, at.virtual_host
    cause = _cause(error)
    match cause:
        case ProbableAuthenticationError():
            text = f'{place} refuses user "{user}"; check user and password in `url`'
        case ProbableAccessDeniedError() if "not found" in str(cause):
            text = f'vhost "{vhost}" does not exist at {place}; create it, or correct `url`'
        case ProbableAccessDeniedError():
            text = f'user "{user}" may not use vhost "{vhost}" at {place}; grant permissions on it'
        case ssl.SSLError():
            why = getattr(cause, "verify_message", None) or cause.reason or "no TLS there"
            text = f"no TLS with {place} ({why}); check `tls.ca_file`, and that its certificate names this host"
        case ConnectionClosed():
            text = f"{place} closed the connection ({cause.reply_text})"
        case IncompatibleProtocolError():
            text = f"what answers at {place} is no RabbitMQ, or wants TLS (amqps://)"
        case AMQPHeartbeatTimeout():
            text = f"{place} has fallen silent"
        case socket.gaierror():
            text = f'host "{at.host}" is not known; check `url`'
        case OSError():
            text = f"no broker answers at {place} ({cause.strerror or 'no answer'}); check `url`, and that it runs"
        case _:
            text = f"the connection to {place} was lost"
    return Unavailable(f"rabbitmq: {text}")


def _cause(error: BaseException) -> BaseException:
    """What pika has wrapped, at the bottom."""
    while True:
        inner = getattr(error, "exceptions", None) or [getattr(error, "exception", None)]
        if inner[-1] is None:
            inner = [arg for arg in error.args if isinstance(arg, BaseException)]
        if not inner:
            return error
        error = inner[-1]
