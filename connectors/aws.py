"""What every connector to AWS needs: an event loop on a thread of its own, clients on it, its complaints in our words.

The pipeline never awaits: it hands over through plain queues and one call to the loop per batch. Everything a client
does happens on the loop's thread.

Invariant: no text here holds a credential or a body; it names the place, what is wrong, and the cure.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiobotocore
import aiohttp
import botocore
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession, get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    InvalidRegionError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError

from inferbus.connectors.base import ConnectorError, Misconfigured, Unavailable

REACH = 5.0  # seconds AWS has to answer, beyond what it was asked to wait
ATTEMPTS = 3  # of one call, by the client itself, before it counts as failed

# Said whole: botocore would put it together anew for each call, which is a tenth of what a call costs us.
USER_AGENT = f"inferbus aiobotocore/{aiobotocore.__version__} botocore/{botocore.__version__}"

TROUBLE = (BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError, OSError)
"""What a call to AWS raises when it fails, timeouts included."""

Answer = TypeVar("Answer")


class _Session(AIOHTTPSession):
    """The client's own, but that it follows no redirect: that may lead anywhere, and botocore follows none either."""

    async def _get_session(self, proxy_url: Any) -> Any:
        return _Straight(await super()._get_session(proxy_url))  # type: ignore[misc]  # its stubs lack it


class _Straight:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._session.request(method, **options, allow_redirects=False)


class Loop:
    """An event loop on a daemon thread, for one connector or for several; it ends with the last that closes it."""

    def __init__(self) -> None:
        self._users = 0

    def open(self) -> None:
        """Take another connector into the count of those that `close`; the first starts the thread."""
        self._users += 1
        if self._users == 1:
            self._loop = asyncio.new_event_loop()
            self._session: AioSession = get_session()
            self._thread = threading.Thread(target=self._loop.run_forever, name="aws", daemon=True)
            self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine to its end and wait for it. For opening and closing, not for the path of a message."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def call(self, callback: Callable[[], object]) -> None:
        """Have `callback` called on the loop's thread, soon."""
        self._loop.call_soon_threadsafe(callback)

    async def client(
        self, service: str, region: str | None, endpoint_url: str | None, connections: int, **options: Any
    ) -> Any:
        """A client with the credentials of the usual chain; `close` it on this loop.

        Args:
            service: `sqs`, `s3`, ...
            region: AWS region; None for that of the environment.
            endpoint_url: Where the service is, if not at AWS.
            connections: Calls at once.
            options: More of botocore's settings of a client.

        Raises:
            BotoCoreError: As `complaint` puts into words.
        """
        config = AioConfig(
            max_pool_connections=connections,
            connect_timeout=REACH,
            read_timeout=2 * REACH,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            parameter_validation=False,  # of what we make ourselves, for every message
            tcp_keepalive=True,
            user_agent=USER_AGENT,
            http_session_cls=_Session,
            **options,
        )
        create: Any = self._session.create_client  # typed, where it is, for each of AWS's services by name
        # botocore itself knows AWS_DEFAULT_REGION alone; in AWS's own containers it is AWS_REGION that is set.
        region = region or os.environ.get("AWS_REGION")
        return await create(service, region_name=region, endpoint_url=endpoint_url, config=config).__aenter__()

    def close(self) -> None:
        """End the thread, if nobody else is in the count."""
        self._users -= 1
        if self._users:
            return
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await ended(asyncio.all_tasks() - {asyncio.current_task()})
        await asyncio.sleep(0)  # transports of closed sessions close in the next round
        await self._loop.shutdown_default_executor()  # names are looked up there


async def ended(tasks: set[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or the role this runs under"

_UNKNOWN = {
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_FORBIDDEN = {"AccessDenied", "AccessDeniedException", "AuthorizationError", "KmsAccessDenied", "Forbidden", "403"}


def code_of(error: BaseException) -> str:
    """AWS's own word for what went wrong, without the name of its service; empty if AWS has not said."""
    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", "")).rpartition(".")[2]


def complaint(error: Exception, service: str, place: str, action: str, endpoint_url: str | None) -> ConnectorError:
    """What AWS or the client said, as what the caller does next: one line, with the cure where there is one.

    Args:
        error: One of `TROUBLE`.
        service: `sqs`, `s3`, ...
        place: For people: `queue "digits"`.
        action: The IAM action that was tried, `sqs:ReceiveMessage`.
        endpoint_url: Where the client asked; credentials in it are left out.
    """
    if isinstance(error, NoRegionError | InvalidRegionError):
        return Misconfigured(f"{service}: no region: set `region`, or AWS_REGION in the environment")
    if isinstance(error, ProfileNotFound):
        return Misconfigured(f"{service}: the profile named by AWS_PROFILE does not exist")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | TokenRetrievalError):
        return Unavailable(f"{service}: no credentials were found; {CREDENTIALS}")
    code = code_of(error)
    if code in _UNKNOWN:
        why = f"the credentials are not accepted ({code}); {CREDENTIALS}"
    elif code in _FORBIDDEN:
        why = f"{place}: not allowed; grant {action}"
    elif code:
        why = f"{place}: {action.partition(':')[2]} failed with {code}"
    else:
        why = f"{place}: no answer from {_host(endpoint_url)} ({type(error).__name__})"
    return Unavailable(f"{service}: {why}")


def _host(endpoint_url: str | None) -> str:
    return urlsplit(endpoint_url or "").netloc.rpartition("@")[2] or "AWS"
