"""Requests to a server that scores: retried, limited in their rate, and clear about a server that is away.

What happens is counted (`posttrain.rewards.counts`) under these keys:

    requests            attempts, the repeated ones included
    retries             attempts that repeat an earlier one
    connection_errors   attempts without a connection, or whose connection broke
    timeouts            attempts without an answer in time
    http_503, …         answers with that status, for each status that says no
    garbage             answers that are no JSON, or not what the caller's `check` wants
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from posttrain.errors import RecipeError, RewardError, RewardUnavailable
from posttrain.rewards.counts import count

if TYPE_CHECKING:
    import aiohttp

BACKOFF_BASE = 0.5
"""Seconds: the longest wait before the first repetition (or one attempt's time-out, where that is shorter);
it doubles with each."""
BACKOFF_CAP = 30.0
"""Seconds: the longest wait there is, unless a server asks for more by Retry-After."""
RETRY_AFTER_CAP = 60.0
"""Seconds that a Retry-After is believed."""
RETRIED = frozenset({408, 429})
"""Status codes below 500 of requests that may succeed when they are repeated."""
AWAY = frozenset({429, 502, 503, 504})
"""Status codes that say nothing about the request, only that nobody has time for it now."""
BODY_SHOWN = 200
"""Characters of an answer that a message shows."""


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed: what it is counted as, whether to repeat it, whether the server seems away."""

    kind: str
    text: str
    retry: bool = True
    away: bool = False
    retry_after: float = 0.0


class JsonClient:
    """JSON over HTTP to one server, for async rewards.

    Failed attempts are repeated after a random wait of at most BACKOFF_BASE · 2ⁿ seconds ("full jitter",
    Brooker, "Exponential backoff and jitter", AWS Architecture Blog 2015). Status codes from 400 to 499 other
    than 408 and 429 fail at once, and redirections are not followed.

    Args:
        name: the reward's, for messages.
        url: where to; `path` of the methods is appended to it.
        headers: sent with every request.
        token_env: environment variable whose value is sent as bearer token. It is in no message.
        timeout: seconds of one attempt.
        retries: repetitions of a failed attempt.
        rate: requests per second, repetitions included; None sets no limit.
        socket: path of a Unix domain socket to connect through.

    Raises:
        RecipeError: the URL is none, or the environment variable is not set.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token_env: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        rate: float | None = None,
        socket: str | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"reward {name!r}: {url!r} is not an address like http://node1:8000/score")
        self.name = name
        self.place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        """The URL as messages show it: without user, password and query."""
        self._url = url
        self._token = None
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if token_env is not None:
            self._token = os.environ.get(token_env)
            if not self._token:
                raise RecipeError(f"reward {name!r}: the environment variable {token_env} is not set")
            self._headers["Authorization"] = f"Bearer {self._token}"
        self._timeout = timeout
        self._retries = retries
        self._rate = rate
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None
        self._random = random.Random()
        self._turn = asyncio.Lock()
        self._next_request = 0.0
        self._successes = 0

    def patience(self, concurrency: int = 1) -> float:
        """Seconds that a call may take at most, with `concurrency` calls under way at once."""
        queue = concurrency / self._rate if self._rate else 0.0
        waits = self._retries * max(BACKOFF_CAP, RETRY_AFTER_CAP)
        return (self._retries + 1) * (self._timeout + queue) + waits

    async def post(self, body: Any, path: str = "", check: Callable[[Any], Any] | None = None) -> Any:
        """Send JSON; returns the parsed answer, or what `check` makes of it.

        `check` raises a ValueError, or whatever it comes across, for an answer that is not what it should
        be: such an answer is garbage, and the request is repeated.

        Raises:
            RewardUnavailable: every attempt found the server away (no connection, no answer in time, status
                429, 502, 503 or 504), and no other request of this client has succeeded meanwhile: else it is
                this request that the server cannot answer.
            RewardError: the request failed, with status and the start of the body.
        """
        return await self._call("POST", path, json.dumps(body).encode(), check)

    async def get(self, path: str = "", check: Callable[[Any], Any] | None = None) -> Any:
        """The same without a body."""
        return await self._call("GET", path, None, check)

    async def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(
        self, method: str, path: str, data: bytes | None, check: Callable[[Any], Any] | None
    ) -> Any:
        session = self._open()
        started = time.monotonic()
        away = True
        before = seen = self._successes
        for attempt in range(self._retries + 1):
            await self._take_turn()
            count("requests")
            if attempt:
                count("retries")
                # Not after the last attempt: a server may come back while that one is under way.
                seen = self._successes
            answer = await self._attempt(session, method, path, data, check)
            if not isinstance(answer, _Failure):
                self._successes += 1
                return answer
            count(answer.kind)
            away = away and answer.away
            if attempt == 0:
                seen = self._successes
                if answer.kind != "timeouts":  # before that, the server was well
                    before = seen
            if not answer.retry:
                break
            if attempt < self._retries:
                await asyncio.sleep(max(self._backoff(attempt), answer.retry_after))
        seconds = time.monotonic() - started
        tries = f"{attempt + 1} attempts in {seconds:.3g} s, the last: " if attempt else ""
        text = f"{self.place}{path} failed ({tries}{answer.text})"
        if self._token:
            text = text.replace(self._token, "…")  # servers may repeat it
        if away and seen == before:
            raise RewardUnavailable(text)
        raise RewardError(text)

    def _open(self) -> aiohttp.ClientSession:
        """The session, made in the loop that is running."""
        if self._session is None:
            import aiohttp  # takes a third of a second, which `posttrain plan` has not

            connector = (
                aiohttp.UnixConnector(self._socket, limit=0)
                if self._socket is not None
                else aiohttp.TCPConnector(limit=0)
            )
            limit = aiohttp.ClientTimeout(total=self._timeout)
            self._session = aiohttp.ClientSession(connector=connector, timeout=limit, headers=self._headers)
        return self._session

    async def _attempt(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        data: bytes | None,
        check: Callable[[Any], Any] | None,
    ) -> Any:
        """One request: the answer, or a `_Failure`."""
        import aiohttp

        try:
            async with session.request(
                method, self._url.rstrip("/") + path if path else self._url, data=data, allow_redirects=False
            ) as response:
                body = await response.read()
        except TimeoutError:
            return _Failure("timeouts", f"no answer within {self._timeout:g} s", away=True)
        except (aiohttp.ClientError, OSError) as error:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
            return _Failure("connection_errors", text, away=True)
        if response.status >= 300:
            return _Failure(
                f"http_{response.status}",
                f"status {response.status} {response.reason or ''}: {_start(body)}",
                retry=response.status in RETRIED or response.status >= 500,
                away=response.status in AWAY,
                retry_after=_retry_after(response.headers.get("Retry-After")),
            )
        try:
            answer = json.loads(body)
            return answer if check is None else check(answer)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            why = "no JSON" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {error}"
            return _Failure("garbage", f"the answer is not usable, {why}: {_start(body)}")

    def _backoff(self, attempt: int) -> float:
        """Seconds to wait after a failed attempt, counted from 0."""
        base = min(BACKOFF_BASE, self._timeout)
        return self._random.uniform(0.0, min(BACKOFF_CAP, base * 2**attempt))

    async def _take_turn(self) -> None:
        """Wait until the rate allows a request, and until the one before it is on its way.

        One by one also without a rate: of answers that come together, none would otherwise be followed by a
        request before all of them are read; those would leave together, and be answered together again.
        """
        async with self._turn:
            await asyncio.sleep(self._next_request - time.monotonic() if self._rate else 0.0)
            if self._rate:
                self._next_request = time.monotonic() + 1.0 / self._rate


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return 0.0
    try:
        numeric = value.replace(".", "", 1).isdigit()
        seconds = float(value) if numeric else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP)


def _start(body: bytes) -> str:
    """The beginning of an answer on one line."""
    text = " ".join(body[: 4 * BODY_SHOWN].decode("utf-8", "replace").split())
    return text[:BODY_SHOWN] + ("…" if len(text) > BODY_SHOWN else "")
