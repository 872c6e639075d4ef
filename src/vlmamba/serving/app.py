"""The HTTP application: chat completions, whole or streamed, the list of models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmamba.inference import Engine, Overloaded, Piece
from vlmamba.serving.answers import Answers
from vlmamba.serving.errors import RequestError, server_error
from vlmamba.serving.fetch import Fetcher, Limits, decode
from vlmamba.serving.protocol import ChatRequest, Writer, model_list, parse_request

BODY_SECONDS = 60.0  # for a request's body to arrive
RETRY_SECONDS = 1  # after which an overloaded server may be asked again
FETCHES = 32  # requests whose pictures are fetched at a time
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def create_app(
    engine: Engine, *, pictures: Limits | None = None, api_key: str | None = None, max_body: int = 32 << 20
) -> FastAPI:
    """The application over an engine, which stays the caller's to close.

    Args:
        pictures: what may be fetched for a request; None: the default limits.
        api_key: asked for by everything but /health; None: by nothing.
        max_body: bytes of a request.
    """
    service = _Service(engine, Fetcher(pictures or Limits()), max_body)
    guarded = APIRouter(dependencies=[Depends(_key_check(api_key))] if api_key else [])
    guarded.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    guarded.add_api_route("/v1/models", service.models, methods=["GET"])
    guarded.add_api_route("/metrics", service.metrics, methods=["GET"])
    app = FastAPI(title="VL-Mamba", openapi_url=None, redirect_slashes=False)
    app.include_router(guarded)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_exception_handler(RequestError, _refusal)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(_Backstop)
    return app


class _Service:
    """What the routes do."""

    def __init__(self, engine: Engine, fetcher: Fetcher, max_body: int) -> None:
        self._engine, self._fetcher, self._max_body = engine, fetcher, max_body
        self._began = int(time.time())
        self._fetching = ThreadPoolExecutor(FETCHES, "fetch")
        # Of decoded pictures there are only as many in memory as this has threads.
        self._preparing = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "prepare")

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse(model_list(self._engine.name, self._began))

    async def metrics(self) -> Response:
        return PlainTextResponse(prometheus(self._engine.stats()), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        body = await _read_body(request, self._max_body)
        wanted = await _on(self._preparing, lambda: parse_request(_parse_json(body), self._engine.name))
        links, encoded = wanted.links(), []
        if links:
            # Who waits for slow hosts holds up nobody else.
            pool = self._preparing if all(link.is_data for link in links) else self._fetching
            encoded = await _on(pool, lambda: self._fetcher.fetch(links))
        answers = Answers()
        watch = asyncio.create_task(_cancel_when_gone(request, answers))
        try:
            await _on(self._preparing, lambda: self._begin(answers, wanted, encoded))
        except BaseException:
            answers.cancel()
            watch.cancel()
            raise
        writer = Writer(self._engine.name, wanted.include_usage)
        if wanted.stream:
            events = _events(answers, writer, wanted.choices, watch)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await _whole(answers, writer, wanted.choices, watch)

    def _begin(self, answers: Answers, wanted: ChatRequest, encoded: list[bytes]) -> None:
        messages = wanted.with_pictures(decode(wanted.links(), encoded))
        try:
            answers.begin(self._engine, messages, wanted.sampling, wanted.choices)
        except Overloaded as error:
            wait = {"Retry-After": str(RETRY_SECONDS)}
            raise RequestError(
                f"the server is busy: {error}", code="overloaded", status=429, kind="rate_limit_error", headers=wait
            ) from error
        except ValueError as error:
            raise RequestError(str(error), "messages") from error


# ---------------------------------------------------------------------- answers


async def _whole(answers: Answers, writer: Writer, count: int, watch: asyncio.Task[None]) -> Response:
    texts, finishes = [""] * count, [""] * count
    try:
        async for index, piece in answers.pieces():
            if failure := _failure(piece):
                raise failure
            texts[index] += piece.text
            finishes[index] = piece.finish or ""
    finally:
        answers.cancel()
        watch.cancel()
    return JSONResponse(writer.response(list(zip(texts, finishes, strict=True)), answers.usage()))


async def _events(answers: Answers, writer: Writer, count: int, watch: asyncio.Task[None]) -> AsyncIterator[bytes]:
    """A stream's server-sent events."""
    try:
        for index in range(count):
            yield _event(writer.first_chunk(index))
        async for index, piece in answers.pieces():
            if failure := _failure(piece):
                yield _event(failure.body())
                return
            if piece.text:
                yield _event(writer.text_chunk(index, piece.text))
            if piece.finish is not None:
                yield _event(writer.last_chunk(index, piece.finish))
        if writer.include_usage:
            yield _event(writer.usage_chunk(answers.usage()))
        yield b"data: [DONE]\n\n"
    finally:
        answers.cancel()
        watch.cancel()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failure(piece: Piece) -> RequestError | None:
    """Why an answer ended that is none."""
    if piece.finish == "error":
        _LOG.error("an answer failed after %d tokens: %s", piece.tokens, piece.error)
        return server_error()
    if piece.finish == "cancelled":  # by the client, who sees nothing of this, or by the server's end
        return RequestError("the answer was cancelled", code="cancelled", status=503, kind="server_error")
    return None


async def _cancel_when_gone(request: Request, answers: Answers) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.cancel()


# ---------------------------------------------------------------------- requests


async def _read_body(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a foreign web page cannot send unasked
        raise RequestError(
            f"the content type is {kind!r:.80}; expected application/json", code="unsupported_media_type", status=415
        )
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            _check_size(int(declared) if declared.isdecimal() else 0, most)
            async for block in request.stream():
                body += block
                _check_size(len(body), most)
    except TimeoutError as error:
        raise RequestError("the request did not arrive in time", code="timeout", status=408) from error
    return bytes(body)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise RequestError(f"the request has more than {most} bytes", code="request_too_large", status=413)


def _parse_json(body: bytes) -> Any:
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
        return value
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}", code="invalid_json") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


async def _on(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def prometheus(stats: dict[str, float]) -> str:
    """The engine's numbers in Prometheus' text format; those whose names end in _total only grow."""
    lines = []
    for name, value in stats.items():
        lines.append(f"# TYPE vlmamba_{name} {'counter' if name.endswith('_total') else 'gauge'}")
        lines.append(f"vlmamba_{name} {value}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- refusals


def _key_check(api_key: str) -> Callable[[Request], Awaitable[None]]:
    expected = api_key.encode()

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Headers come decoded as latin-1.
        if scheme.lower() != "bearer" or not compare_digest(key.strip().encode("latin-1"), expected):
            raise RequestError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    """A path or method that is not there."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    refusal = RequestError(message, code="not_found" if error.status_code == 404 else None, status=error.status_code)
    return JSONResponse(refusal.body(), refusal.status, error.headers)


class _Backstop:
    """What nothing else caught: a line in the log (the traceback too where it logs debug messages), and to the client
    that something failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            return
        except Exception as error:
            words = " ".join(str(error).split())
            _LOG.error("%s: %s: %s", scope.get("path"), type(error).__name__, words, exc_info=_LOG.isEnabledFor(10))
            if scope["type"] == "http" and not begun:
                with contextlib.suppress(OSError):
                    await JSONResponse(server_error().body(), 500)(scope, receive, send)
