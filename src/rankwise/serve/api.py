"""OpenAI's API over an engine: completions, chats, streams, models; vLLM's calls to load and unload adapters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from rankwise import __version__
from rankwise.errors import RankwiseError
from rankwise.serve.adapter_store import check_confined, check_directory
from rankwise.serve.answers import AnswerForm, ChatForm, CompletionForm
from rankwise.serve.engine import Engine, Generation, Piece
from rankwise.serve.guard import Guard, error_body, error_response, rankwise_error_body
from rankwise.serve.metrics import Metrics
from rankwise.serve.prompts import Limits, check_prompts, prompts_of, sampling_of
from rankwise.serve.schema import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest

T = TypeVar("T")
_CLIENT_GONE = 499  # nginx's status for it; nobody reads it
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SHOWN = 3  # errors of a malformed request that are told


@dataclass(frozen=True)
class Service:
    """What the API answers with.

    Attributes:
        limits: of requests.
        api_key: which ``/v1`` asks for; None: nothing.
        roots: the directories that adapters may be loaded from at run time; None: any.
    """

    engine: Engine
    metrics: Metrics
    limits: Limits
    api_key: str | None = None
    roots: tuple[Path, ...] | None = ()


@dataclass
class Answers:
    """The answers to one request, as they come from the engine."""

    generations: list[Generation] = field(default_factory=list)
    _events: asyncio.Queue[tuple[int, Piece | RankwiseError]] = field(default_factory=asyncio.Queue)

    def deliver_to(self, index: int, loop: asyncio.AbstractEventLoop, event: Piece | RankwiseError) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server went down
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The number of an answer, and its next token, until all have ended.

        Raises:
            RankwiseError: one of them failed.
        """
        left = len(self.generations)
        while left:
            index, event = await self._events.get()
            if isinstance(event, RankwiseError):
                raise event
            left -= event.finish_reason is not None
            yield index, event

    async def whole(self) -> list[list[Piece]]:
        """All tokens of all answers."""
        answers: list[list[Piece]] = [[] for _ in self.generations]
        async for index, piece in self.pieces():
            answers[index].append(piece)
        return answers

    def cancel(self) -> None:
        """Nobody waits for them any more; their rows are free from the next step on."""
        for generation in self.generations:
            generation.cancelled = True

    @property
    def prompt_tokens(self) -> int:
        """Tokens read."""
        return sum(len(generation.prompt) for generation in self.generations)


class EventStream(StreamingResponse):
    """A stream of server-sent events that frees its rows, however it ends."""

    def __init__(self, events: AsyncIterator[str], answers: Answers) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


def make_app(service: Service) -> FastAPI:
    """The server's application. It closes the engine when it ends."""
    engine, store = service.engine, service.engine.store

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="rankwise", version=__version__, lifespan=lifespan)
    app.add_middleware(Guard, api_key=service.api_key, max_body=service.limits.body)
    _add_error_handlers(app)
    page = files("rankwise.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if engine.alive else {"status": "stopping"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        base = {"id": store.base, "object": "model", "created": 0, "owned_by": "rankwise", "parent": None}
        adapters = [
            {**base, "id": adapter.name, "created": adapter.created, "parent": store.base}
            for adapter in list(store.adapters.values())
        ]
        return {"object": "list", "data": [base, *adapters]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, body, CompletionForm(body.model, engine.tokenizer), request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, body, ChatForm(body.model, engine.tokenizer), request)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadRequest) -> Response:
        directory = Path(body.lora_path)
        if service.roots is not None:
            check_confined(directory, service.roots)
        await run_in_threadpool(check_directory, directory)
        await asyncio.wrap_future(engine.call(partial(store.add, body.lora_name, directory)))
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadRequest) -> Response:
        await asyncio.wrap_future(engine.call(partial(store.retire, body.lora_name)))
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    return app


async def _answer(
    service: Service, body: CompletionRequest | ChatRequest, form: AnswerForm, request: Request
) -> Response:
    answers = await run_in_threadpool(_asked, service, body, asyncio.get_running_loop())
    service.engine.submit(answers.generations)
    try:
        if not body.stream:
            whole = await _unless_gone(request, answers.whole())
            return JSONResponse(form.whole(whole, answers.prompt_tokens))
        pieces = answers.pieces()
        first = await _unless_gone(request, anext(pieces))  # an error until then still has its own status
    except BaseException:
        answers.cancel()
        raise
    events = _events(first, pieces, form, answers, include_usage=body.stream_options.include_usage)
    return EventStream(events, answers)


def _asked(service: Service, body: CompletionRequest | ChatRequest, loop: asyncio.AbstractEventLoop) -> Answers:
    """The generations that a request asks for, within the limits."""
    engine, limits = service.engine, service.limits
    adapter = engine.store.find(body.model)
    prompts = prompts_of(body, engine.tokenizer)
    check_prompts(prompts, body.n, engine.model.get_input_embeddings().weight.shape[0], limits)
    answers = Answers()
    for prompt in prompts:
        for choice in range(body.n):
            deliver = partial(answers.deliver_to, len(answers.generations), loop)
            sampling = sampling_of(body, prompt, choice, limits)
            answers.generations.append(Generation(prompt, sampling, adapter, deliver))
    return answers


async def _events(
    first: tuple[int, Piece],
    rest: AsyncIterator[tuple[int, Piece]],
    form: AnswerForm,
    answers: Answers,
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    begun: set[int] = set()
    written = 0
    try:
        async for index, piece in _chained(first, rest):
            yield _event(form.chunk(index, piece, first=index not in begun))
            begun.add(index)
            written += 1
    except RankwiseError as error:  # the status has been sent
        yield _event(rankwise_error_body(error)[1])
        return
    if include_usage:
        yield _event(form.usage_chunk(answers.prompt_tokens, written))
    yield "data: [DONE]\n\n"


async def _chained(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer for as long as its client does.

    Raises:
        ClientDisconnect: it is gone.
    """
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RankwiseError)
    def refused(_: Request, error: RankwiseError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(_told(error.errors()), "invalid_request_error", "RequestError"), 400)

    @app.exception_handler(HTTPException)
    def failed(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error", None), error.status_code)

    @app.exception_handler(ClientDisconnect)
    def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    def broken(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(
            error_body("an error of the server's own; its log has the trace", "server_error", None), 500
        )


def _told(errors: Sequence[Any]) -> str:
    """What is wrong with a request, one fault after the other."""
    faults = []
    for error in errors[:_SHOWN]:
        place = ".".join(str(part) for part in error["loc"][1:]) or "the request"
        found = "" if error["type"] in ("missing", "value_error") else f", found {error.get('input')!r:.80}"
        faults.append(f"{place}: {error['msg'].removeprefix('Value error, ')}{found}")
    return "; ".join(faults)
