"""The routes of a server, and what happens around each request: keys, origins, counts, errors.

An endpoint reads its body, checks it in a thread of its own (texts are encoded there), hands jobs
to the scheduler and waits for their pieces. A caller who goes away frees its slots.
To add a route, add it to `build_app` and to `openapi.PATHS`.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any

from gptjax.config.errors import UserError
from gptjax.serving import bodies, openapi
from gptjax.serving.answers import Answer
from gptjax.serving.chat import Chat
from gptjax.serving.completions import Completions
from gptjax.serving.embeddings import Embeddings
from gptjax.serving.errors import ApiError
from gptjax.serving.page_files import page_routes
from gptjax.serving.scheduler import Piece, Scheduler
from gptjax.serving.served import Served

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BODY_BYTES = 10_000_000
_LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # origins of pages of this machine


def build_app(
    served: Served,
    scheduler: Scheduler,
    *,
    api_key: str = "",
    hosts: Collection[str] = (),
    body_bytes: int = BODY_BYTES,
) -> Starlette:
    """The ASGI application.

    api_key: what requests must bring as a bearer token; pages of any origin may ask then, and else
        those of this machine alone.
    hosts: names by which this server may be addressed, so that no foreign name can be made to
        point at it; empty: any.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    api = _Api(served, scheduler, body_bytes)
    routes = [
        Route("/v1/models", _answering(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _answering(api.model), methods=["GET"]),
        Route("/v1/completions", _answering(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", _answering(api.chat), methods=["POST"]),
        Route("/v1/embeddings", _answering(api.embeddings), methods=["POST"]),
        Route("/health", _answering(api.health), methods=["GET"]),
        Route("/metrics", _answering(api.metrics), methods=["GET"]),
        Route("/openapi.json", _answering(api.openapi), methods=["GET"]),
        *page_routes(),
    ]
    paths = {route.path for route in routes}
    origins: dict[str, Any] = {"allow_origin_regex": _LOCAL}
    if api_key:
        origins = {"allow_origins": ["*"]}
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_Counted, metrics=scheduler.metrics, paths=paths),
            Middleware(
                CORSMiddleware,
                **origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "X-Request-Id"],
            ),
            Middleware(_Guarded, api_key=api_key, hosts=set(hosts)),
        ],
        exception_handlers={HTTPException: _refuse_route},
    )


class _Api:
    """The endpoints."""

    def __init__(self, served: Served, scheduler: Scheduler, body_bytes: int):
        self._served, self._scheduler, self._body_bytes = served, scheduler, body_bytes

    async def models(self, request: Request) -> Response:
        data = [self._served.describe(name) for name in self._served.engine.models]
        return _json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        adapter = self._served.adapter(request.path_params["model"])
        return _json(self._served.describe(adapter))

    async def completions(self, request: Request) -> Any:
        return await self._answer(request, Completions)

    async def chat(self, request: Request) -> Any:
        return await self._answer(request, Chat)

    async def embeddings(self, request: Request) -> Response:
        asked = await self._read(request, Embeddings)
        vectors = []
        gone = asyncio.create_task(_gone(request.receive))
        try:
            for index in range(len(asked.rows)):
                future = self._scheduler.call(functools.partial(asked.embed, index))
                wrapped = asyncio.wrap_future(future)
                await asyncio.wait({wrapped, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not wrapped.done():
                    wrapped.cancel()
                    return _nobody()
                vectors.append(wrapped.result())
        finally:
            gone.cancel()
        return _json(asked.response(vectors))

    async def health(self, request: Request) -> Response:
        status = "stopping" if self._scheduler.stopping else "ok"
        if status == "ok" and not self._scheduler.ready:
            status = "starting"  # requests are taken and wait for the first compiled program
        return _json({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        from starlette.responses import Response

        metrics = self._scheduler.metrics
        return Response(metrics.text(), media_type=metrics.content_type)

    async def openapi(self, request: Request) -> Response:
        return _json(openapi.describe())

    async def _read(self, request: Request, kind: Any) -> Any:
        """The body as a checked request, made in a thread: texts are encoded in it."""
        body = await bodies.read_bytes(request, self._body_bytes)
        return await asyncio.to_thread(lambda: kind(bodies.parse(body), self._served))

    async def _answer(self, request: Request, kind: Any) -> Any:
        answer: Answer = await self._read(request, kind)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def give(piece: Piece) -> None:  # in the scheduler's thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            ticket = await asyncio.to_thread(self._scheduler.submit, answer.jobs, give)
        except UserError as error:
            raise answer.fault(error) from None
        if answer.stream:
            return _EventStream(answer, pieces, lambda: self._scheduler.cancel(ticket))
        collecting = asyncio.create_task(_collect(answer, pieces))
        gone = asyncio.create_task(_gone(request.receive))
        try:
            await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return _nobody()
            await collecting  # raises its ApiError
        finally:
            collecting.cancel()
            gone.cancel()
            self._scheduler.cancel(ticket)
        return _json(answer.response())


async def _read_pieces(answer: Answer, pieces: asyncio.Queue[Piece]) -> AsyncIterator[Piece]:
    """The pieces until all texts have ended. Raises ApiError."""
    left = len(answer.jobs)
    while left:
        piece = await pieces.get()
        if piece.error:
            raise piece.error
        left -= bool(piece.reason)
        yield piece


async def _collect(answer: Answer, pieces: asyncio.Queue[Piece]) -> None:
    async for piece in _read_pieces(answer, pieces):
        answer.feed(piece)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the caller has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream:
    """A response of server-sent events. cancel: called at its end, whatever that is."""

    def __init__(self, answer: Answer, pieces: asyncio.Queue[Piece], cancel: Callable[[], None]):
        self._answer, self._pieces, self._cancel = answer, pieces, cancel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        except OSError:  # the caller went away while we wrote
            pass
        finally:
            sending.cancel()
            gone.cancel()
            self._cancel()

    async def _send(self, send: Any) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

        async def say(*chunks: Any) -> None:
            body = b"".join(_event(chunk) for chunk in chunks)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await say(*self._answer.first_chunks())
        try:
            async for piece in _read_pieces(self._answer, self._pieces):
                await say(*self._answer.feed(piece))
            await say(*self._answer.last_chunks())
        except ApiError as error:  # the status is sent already
            await say(error.body())
        end = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
        await send(end)


def _event(chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _json(body: Any, status: int = 200, headers: Any = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, headers)


def _nobody() -> Response:
    """For a caller who has gone away; nobody reads it."""
    from starlette.responses import Response

    return Response(status_code=499)


def _refusal(error: ApiError) -> Response:
    return _json(error.body(), error.status, error.headers)


def _answering(
    handler: Callable[[Request], Awaitable[Any]],
) -> Callable[[Request], Coroutine[Any, Any, Any]]:
    """The endpoint whose errors are responses."""

    async def endpoint(request: Request) -> Any:
        from starlette.requests import ClientDisconnect

        try:
            return await handler(request)
        except ApiError as error:
            return _refusal(error)
        except UserError as error:
            return _refusal(ApiError(400, str(error)))
        except ClientDisconnect:
            return _nobody()
        except Exception:
            traceback.print_exc()
            return _refusal(ApiError(500, "this is a fault of the server; its log says more"))

    return endpoint


async def _refuse_route(request: Request, error: Any) -> Response:
    """A path or a method that there is not."""
    path, method = request.url.path, request.method
    message = f"there is no path {path[:80]!r}"
    if error.status_code == 405:
        message = f"{path[:80]!r} does not answer {method[:20]}"
    return _refusal(ApiError(error.status_code, message, headers=error.headers or {}))


class _Guarded:
    """Refuses requests without the key, and those to a host that this server is not."""

    def __init__(self, app: Any, api_key: str, hosts: set[str]):
        self._app, self._key, self._hosts = app, api_key.encode(), hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http" and (error := self._problem(scope)):
            app = _refusal(error)
        await app(scope, receive, send)

    def _problem(self, scope: Any) -> ApiError | None:
        headers = dict(scope["headers"])
        host = re.sub(r":\d+\Z", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if not scope["http_version"].startswith(("1.", "2")):
            return ApiError(400, f"this server does not speak HTTP/{scope['http_version']}")
        if self._hosts and host not in self._hosts:
            return ApiError(403, f"this server is not {host[:80]!r}")
        needs_key = scope["path"].startswith("/v1/") or scope["path"] == "/metrics"
        if not self._key or not needs_key:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return ApiError(
            401,
            "this server needs its key, as the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class _Counted:
    """Counts requests by path and status, and their seconds; names each, as clients show it."""

    def __init__(self, app: Any, metrics: Any, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def watch(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                identity = (b"x-request-id", secrets.token_hex(8).encode())
                message = {**message, "headers": [*message.get("headers", []), identity]}
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request.observe(time.monotonic() - began)
