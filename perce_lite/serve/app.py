"""The routes: OpenAI's /v1/models, /v1/chat/completions and /v1/completions, and the page."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from perce_lite.console import PIR_BOUNDS, warn
from perce_lite.errors import PerceLiteError
from perce_lite.model.answering import Stop
from perce_lite.serve.answers import Answers
from perce_lite.serve.desk import Desk, in_loop
from perce_lite.serve.directory import Directory, Entry, HeldOut, user_id
from perce_lite.serve.guard import PAGE, Guard, Hosts, parsed
from perce_lite.serve.keys import Keys
from perce_lite.serve.wire import (
    DONE,
    Answer,
    Begun,
    ChatQuestion,
    Form,
    PromptQuestion,
    Question,
    RequestError,
    event,
    model_object,
)

T = TypeVar("T")

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_OWN = "; ".join(f"{what}-src 'self'" for what in ("script", "style", "connect"))
_POLICY = f"default-src 'none'; {_OWN}; img-src data:"


class Service:
    """Everything that the routes need.

    answer_seconds: after which an answer is ended as one that has no tokens left
    framed: whether other pages may show this one in a frame
    """

    def __init__(
        self,
        directory: Directory,
        answers: Answers,
        desk: Desk,
        answer_seconds: float = 600.0,
        framed: bool = False,
    ) -> None:
        self.directory, self.answers, self.desk = directory, answers, desk
        self.answer_seconds, self.framed = answer_seconds, framed
        self.held_out = HeldOut(directory.reference)

    def entry(self, request: Request, model: str) -> Entry:
        """The model that `request` asks for; raises RequestError, the same for one that is another's as for none."""
        entry = self.directory.find(model)
        if entry is None or not entry.seen_by(request.state.caller):
            caller, day = request.state.caller.user, None
            if caller is None or user_id(caller) == user_id(model.removeprefix("user:")):
                day = self.directory.deleted_on(model)
            gone = "does not exist" if day is None else f"was deleted on {day}"
            raise RequestError(404, "model_not_found", f"The model {model!r} {gone}.", "model")
        return entry


def build_app(service: Service, hosts: Hosts, keys: Keys) -> Guard:
    """The ASGI application."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_such_page)
    app.add_exception_handler(RequestValidationError, _misread)
    for path, name in PAGE.items():
        app.add_api_route(path, _file(name, service.framed), methods=["GET"])
    _add_models(app, service)
    for path, kind in (("/v1/chat/completions", ChatQuestion), ("/v1/completions", PromptQuestion)):
        app.add_api_route(path, partial(_reply, service, kind), methods=["POST"], response_model=None)
    return Guard(app, hosts, keys)


# What is there


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        seen = [entry for entry in service.directory.entries() if entry.seen_by(request.state.caller)]
        return {"object": "list", "data": [model_object(entry) for entry in seen]}

    @app.get("/v1/models/{model:path}")
    def model(request: Request, model: str) -> dict[str, Any]:
        return model_object(service.entry(request, model))

    @app.get("/perce/held-out")
    async def held_out(request: Request, model: str) -> dict[str, Any]:
        """Held-out questions of a user and what they wrote, for the blind test."""
        entry = service.entry(request, model)
        rows = []
        if entry.kind == "user":  # in the thread of answers: the file is read by one at a time
            rows = await _computed(await service.desk.start(partial(service.held_out.of, entry.name)))
        return {"rows": rows}

    @app.get("/perce/page")
    def page() -> dict[str, Any]:
        """What the page draws with."""
        return {"pir_bounds": PIR_BOUNDS}


def _file(name: str, framed: bool) -> Callable[[], Response]:
    path = files("perce_lite.serve") / "page" / name
    policy = _POLICY if framed else f"{_POLICY}; frame-ancestors 'none'"
    kind = _KINDS[name[name.index(".") :]]

    def send() -> Response:
        return Response(path.read_bytes(), media_type=kind, headers={"content-security-policy": policy})

    return send


# Answers


async def _reply(service: Service, kind: type[Question], request: Request) -> Response:
    question = _question(kind, await request.body())
    entry = await run_in_threadpool(service.entry, request, question.model)
    stop = Stop()
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Begun | str | None]()

    def emit(piece: Begun | str | None) -> None:
        in_loop(loop, pieces.put_nowait, piece)

    def work() -> Answer:
        try:
            return service.answers.answer(entry, question, stop, emit)
        finally:
            emit(None)

    gone, form = _Gone(request, stop), Form.of(question)
    with ExitStack() as until_answered:
        until_answered.callback(gone.leave)
        try:
            running = await gone.unless(service.desk.start(work))
            timer = loop.call_later(service.answer_seconds, stop.ask)
            running.add_done_callback(lambda _: timer.cancel())
            begun = await gone.unless(pieces.get())
            if not question.stream or not isinstance(begun, Begun):  # without a beginning it has failed
                return JSONResponse(form.whole(await gone.unless(_computed(running))))
        except _ClientGone:
            return Response(status_code=499)
        until_answered.pop_all()  # the stream leaves by itself
    return EventStream(_events(form, question, begun, pieces, running), gone)


def _question(kind: type[Question], body: bytes) -> Question:
    """The request; raises RequestError that names every field at fault, and no text of it."""
    try:
        return kind.model_validate(parsed(body))
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])) or "body", fault["msg"]) for fault in error.errors()]
        message = "; ".join(f"{where}: {what}" for where, what in faults[:8])
        raise RequestError(400, "invalid_request", message, faults[0][0]) from error


async def _computed(running: "Awaitable[T]") -> T:
    """What the thread computed; what it raised becomes an error in OpenAI's form, and is told without any text."""
    try:
        return await running
    except RequestError:
        raise
    except PerceLiteError as error:
        warn(f"a request failed: {error}")
        raise RequestError(500, "failed", "The server could not answer; its terminal says why.") from error
    except Exception as error:
        last = traceback.extract_tb(sys.exc_info()[2])[-1]
        warn(f"a request failed: {type(error).__name__} in {last.filename}, line {last.lineno}")
        raise RequestError(500, "failed", "The server could not answer; its terminal says where.") from error


async def _events(
    form: Form,
    question: Question,
    begun: Begun,
    pieces: "asyncio.Queue[Begun | str | None]",
    running: "asyncio.Future[Answer]",
) -> AsyncIterator[bytes]:
    """The server-sent events of an answer, from its second piece on as they come."""
    yield form.opening(begun)
    while isinstance(piece := await pieces.get(), str):
        yield form.piece(piece)
    try:
        answer = await _computed(running)
    except RequestError as error:
        yield event(error.body())
        return
    yield form.closing(answer)
    if question.stream_options is not None and question.stream_options.include_usage:
        yield form.usage(answer)
    yield DONE


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class _Gone:
    """Notices that the client went away, and stops the answer then."""

    def __init__(self, request: Request, stop: Stop) -> None:
        self._stop, self._listener = stop, asyncio.create_task(self._listen(request.receive))

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stop.ask()

    async def unless(self, awaited: Awaitable[T]) -> T:
        """What `awaited` gives; raises _ClientGone as soon as the client is gone."""
        task = asyncio.ensure_future(awaited)
        await asyncio.wait({task, self._listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise _ClientGone
        return await task

    def leave(self) -> None:
        """Stops listening, and the answer if it is under way."""
        self._listener.cancel()
        self._stop.ask()


class EventStream(Response):
    """Server-sent events; a client that goes away stops the answer, whose turn ends with its next token."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], gone: _Gone) -> None:
        super().__init__()
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            async for body in self._events:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._gone.leave()


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _no_such_page(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return await _refused(request, RequestError(error.status_code, "no_such_path", "There is nothing here."))


async def _misread(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _refused(request, RequestError(400, "invalid_request", "The query needs a model.", "model"))
