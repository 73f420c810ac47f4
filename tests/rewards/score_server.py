"""A real HTTP server that answers, and fails, as a test says."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Act = Any
"""JSON to answer with; or a status; a (status, text, headers); a text to send with 200; `hang`; `drop`."""


class Server:
    """Answers POST and GET on every path.

    `rule` says from a request's body what to do; without one a score of 1 is answered. `seen` has (method,
    path, body, headers) of every request, `times` when it came, `acts` how often each fault was played.
    """

    def __init__(self, rule: Callable[[Any], Act] = lambda body: {"score": 1}):
        self.rule = rule
        self.seen: list[tuple[str, str, Any, dict[str, str]]] = []
        self.times: list[float] = []
        self.acts: Counter[Any] = Counter()

    async def __aenter__(self) -> Server:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.method, request.path, body, dict(request.headers)))
        self.times.append(time.monotonic())
        act = self.rule(body)
        self.acts[act if isinstance(act, int | str) else "answer"] += 1
        if act == "hang":
            await asyncio.sleep(60.0)  # the client goes away before
        if act == "drop":
            assert request.transport is not None
            request.transport.close()
        if isinstance(act, str):
            return web.Response(text=act)
        if isinstance(act, tuple):
            status, text, headers = act
            return web.Response(status=status, text=text, headers=headers)
        return web.Response(status=act, text="sorry") if isinstance(act, int) else web.json_response(act)


def script(*acts: Act) -> Callable[[Any], Act]:
    """A rule that plays these acts one after the other, and then answers."""
    left = list(acts)
    return lambda body: left.pop(0) if left else {"score": 1}


@contextmanager
def serving(rule: Callable[[Any], Act]) -> Iterator[Server]:
    """A server in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(rule)
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
        yield server
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
