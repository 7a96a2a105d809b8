"""Ask a pipeline from asyncio: publish requests to its source, await the replies.

    async with Client("pipeline.yaml") as client:
        outputs = await client.predict({"image": pixels}, timeout=2.0)

One connection carries any number of requests in flight. A courier thread of its own talks to the bus, so the event loop
never waits for it; answers are matched by id. A prediction may be lost with its worker's reply, so a timeout does not
say that nothing was predicted: the outcome is in the pipeline's sink.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from inferbus.client.courier import Courier
from inferbus.connectors.base import Headers, Message, Misconfigured, Unavailable
from inferbus.models.base import DATATYPES
from inferbus.worker import build
from inferbus.worker.inbox import failure, inbox
from inferbus.worker.pipeline_file import load

Outputs = dict[str, npt.NDArray[Any]]
"""By name, with the row axis first."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class RequestFailed(Exception):
    """The pipeline's outcome for this request is an error.

    Attributes:
        code: As in an error record: `invalid_request`, `model_error`, ...
        message: What was wrong, for whoever sent the request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client:
    """Asks one pipeline; an async context, to be used from one event loop.

    Args:
        pipeline: The pipeline file. Its `source` is written to, its `replies.allow` must allow our address; the model
            is not looked at.
        reply_to: Where answers shall come: on Kafka a topic, by default `<name>.replies`, which must exist. On RabbitMQ
            and SQS a queue of our own is made and removed, and this is what its name begins with.
        overrides: Settings laid over the file, `a.b=value`.

    Raises:
        Misconfigured: The file is wrong, its source cannot be asked, or its pipeline does not answer to our address.
        Unavailable: On entry: the bus is away, or the place of requests or replies is missing.
    """

    def __init__(self, pipeline: str | Path, *, reply_to: str | None = None, overrides: Sequence[str] = ()) -> None:
        settings = load(Path(pipeline), overrides)
        self._format = settings.requests.format
        self._inbox = inbox(settings, reply_to)
        self._sink = build.sink(settings.source.place.writing(), {})
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._courier = Courier(self._sink, self._inbox, self._came)
        opened = self._loop.create_future()
        self._courier.begin(lambda error: self._loop.call_soon_threadsafe(_settle, opened, error))
        await opened
        return self

    async def __aexit__(self, *_: object) -> None:
        for future in self._waiting.values():
            future.cancel()
        ended = self._loop.create_future()
        self._courier.end(lambda: self._loop.call_soon_threadsafe(_settle, ended, None))
        await ended

    async def predict(
        self,
        inputs: Mapping[str, Any] | bytes | str,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109 - the pipeline is told as well
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes]] = (),
    ) -> Outputs:
        """Ask, and wait for the answer.

        Args:
            inputs: By name, the row axis first: arrays, or lists, of which decimal numbers count as FP32 and integers
                as INT64. Where `requests.format` is `json` one row without that axis; `raw` takes bytes, `text` a str.
            timeout: Seconds to wait. The pipeline does not begin what comes to it later than that.
            key: The bus's key, for `order: key` and for placing.
            headers: More headers.

        Raises:
            RequestFailed: The outcome is an error.
            TimeoutError: No answer came in time.
            Unavailable, TooLarge: The request could not be published.
        """
        patience = (("inferbus-timeout-ms", b"%d" % max(1, round(timeout * 1000))),)
        id_, published = self._publish(inputs, key, (*headers, *patience))
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[id_] = answer
        try:
            async with asyncio.timeout(timeout):
                await published
                return outputs_of(await answer)
        except TimeoutError:
            raise TimeoutError(f"no answer to request {id_} within {timeout:g} s") from None
        finally:
            del self._waiting[id_]

    async def send(
        self, inputs: Mapping[str, Any] | bytes | str, *, key: bytes | None = None, headers: Headers = ()
    ) -> str:
        """Publish a request and wait for no answer; returns its id once it is durable on the bus.

        Raises:
            Unavailable, TooLarge: It could not be published.
        """
        id_, published = self._publish(inputs, key, headers, reply=False)
        await published
        return id_

    def _publish(
        self,
        inputs: Mapping[str, Any] | bytes | str,
        key: bytes | None,
        headers: Iterable[tuple[str, bytes]],
        *,
        reply: bool = True,
    ) -> tuple[str, asyncio.Future[None]]:
        id_ = uuid.uuid4().hex
        own = [("inferbus-id", id_.encode()), *headers]
        if reply:
            own.append(("inferbus-reply-to", self._inbox.address.encode()))
        published: asyncio.Future[None] = self._loop.create_future()

        def written(error: Exception | None) -> None:
            self._loop.call_soon_threadsafe(_settle, published, error)

        body = request_body(inputs, self._format)
        self._courier.send(Message(id_, key, body, tuple(own), None, 1, None), written)
        return id_, published

    def _came(self, messages: Sequence[Message]) -> None:
        """On the courier's thread: replies."""
        self._loop.call_soon_threadsafe(self._answered, messages)

    def _answered(self, messages: Sequence[Message]) -> None:
        for m in messages:
            future = self._waiting.get(m.id)
            if future is None or future.done():
                continue  # of another client, or of ours and too late
            if dict(m.headers).get("inferbus-status") == b"ok":
                future.set_result(m.body)
            else:
                future.set_exception(RequestFailed(*failure(m)))


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return  # nobody waits any more
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # whoever timed out has not looked, and need not be told


def request_body(inputs: Mapping[str, Any] | bytes | str, format: str) -> bytes:  # noqa: A002 - as the setting is called
    """Inputs in the format of a pipeline's requests.

    Raises:
        Misconfigured: They cannot be written in it.
    """
    if isinstance(inputs, bytes) and format == "raw":
        return inputs
    if isinstance(inputs, str) and format == "text":
        return inputs.encode()
    if not isinstance(inputs, Mapping) or format in ("raw", "text"):
        wanted = {"raw": "bytes", "text": "a str"}.get(format, "a mapping of inputs by name")
        raise Misconfigured(f"requests.format is {format}: expected {wanted}, got {type(inputs).__name__}")
    if format == "json":
        return orjson.dumps(dict(inputs), option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.dumps({"inputs": [_tensor(name, values) for name, values in inputs.items()]})


def _tensor(name: str, values: Any) -> dict[str, Any]:
    array = np.asarray(values)
    if not isinstance(values, np.ndarray) and array.dtype.kind == "f":
        array = array.astype(np.float32)  # lists say nothing of precision, and this is what models mostly take
    if array.dtype.kind in "US":
        array = array.astype(object)
    datatype = _NAMES.get(array.dtype.newbyteorder("<"))
    if datatype is None or not array.ndim:
        raise Misconfigured(f"input {name!r}: expected rows of numbers, booleans or strings, got {array.dtype}")
    return {"name": name, "datatype": datatype, "shape": array.shape, "data": array.reshape(-1).tolist()}


def outputs_of(body: bytes) -> Outputs:
    """The outputs in a reply.

    Raises:
        Unavailable: It is none: something else writes to our address.
    """
    try:
        outputs = orjson.loads(body)["outputs"]
        if isinstance(outputs, dict):  # requests.format json
            return {name: np.asarray(value) for name, value in outputs.items()}
        return {
            output["name"]: np.array(output["data"], DATATYPES[output["datatype"]]).reshape(output["shape"])
            for output in outputs
        }
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
        raise Unavailable("the reply is no prediction: does something else write to the address of replies?") from None
