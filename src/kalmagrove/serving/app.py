"""The endpoints: models, completions and chat completions."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import anyio
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kalmagrove.errors import UsageError
from kalmagrove.evaluation.generation import check_room, encode_prompt
from kalmagrove.serving.answers import END_OF_STREAM, ChatForm, CompletionForm, event, usage
from kalmagrove.serving.errors import RequestError
from kalmagrove.serving.generating import Job, pieces_of, unless_disconnected
from kalmagrove.serving.models import ServedModels
from kalmagrove.serving.options import SECONDS_FOR_A_BODY, ServeLimits
from kalmagrove.serving.requests import Wanted, chat_of, completion_of, parse_json
from kalmagrove.serving.slots import Slots

CLIENT_CLOSED_REQUEST = 499
"""What nobody reads; the number is a custom of servers."""
TIMES_TOO_LARGE = 8
"""A request that is larger than allowed by more than this is not read to its end."""
Parse = Callable[..., tuple[Wanted, Any]]


@dataclass(frozen=True)
class Service:
    """What the endpoints share.

    Attributes:
        served: The models.
        limits: Of the server.
        slots: Its places.
        seeds: Of requests that have none, one after the other.
        say: Takes a line about each answer.
        steps: Lets one forward through at a time.
        started: Seconds since 1970.
    """

    served: ServedModels
    limits: ServeLimits
    slots: Slots
    seeds: count[int]
    say: Callable[[str], None]
    steps: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    started: int = field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> Starlette:
    """The application of a server."""
    completions = partial(_answer, service, completion_of, CompletionForm, "/v1/completions")
    chat = partial(_answer, service, chat_of, ChatForm, "/v1/chat/completions")
    routes = [
        Route("/health", partial(_health, service), methods=["GET"]),
        Route("/v1/models", partial(_list_models, service), methods=["GET"]),
        Route("/v1/models/{name:path}", partial(_one_model, service), methods=["GET"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    handlers = {RequestError: _refused, HTTPException: _no_route, Exception: _failed}
    # Handlers of one kind of error each, where any is expected.
    return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]


async def _health(service: Service, request: Request) -> Response:
    if service.slots.is_stopping:
        raise RequestError(503, "the server stops", code="server_stopping")
    return JSONResponse({"status": "ok"})


async def _list_models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in service.served.models]})


async def _one_model(service: Service, request: Request) -> Response:
    return JSONResponse(_described(service, service.served.find(request.path_params["name"])[0]))


def _described(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "kalmagrove"}


async def _answer(
    service: Service, parse: Parse, form_of: type[CompletionForm], path: str, request: Request
) -> Response:
    """The endpoint of both kinds of answers."""
    body = parse_json(await _read_body(request, service.limits.max_body))
    wanted, content = parse(body, most_tokens=service.limits.max_tokens, next_seed=partial(next, service.seeds))
    # Tokens of a long text take a while, in which others are answered.
    name, job = await anyio.to_thread.run_sync(_job, service.served, wanted, content)
    form, began = form_of(name), time.monotonic()

    def told(outcome: str, tokens: int) -> None:
        service.say(f"{path}: {len(job.prompt)} + {tokens} tokens in {time.monotonic() - began:.1f} s, {outcome}")

    with ExitStack() as stack:
        stack.enter_context(service.slots.place())
        if wanted.stream:
            return EventStream(service, job, form, wanted.include_usage, told, stack.pop_all())
        answer = await unless_disconnected(request.receive, partial(_whole, service, job, form, told))
    if answer is None:
        told("the client went away", 0)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(answer)


def _job(served: ServedModels, wanted: Wanted, content: Any) -> tuple[str, Job]:
    name, opened = served.find(wanted.model)
    if isinstance(content, str) or not isinstance(content[0], int):
        is_chat = not isinstance(content, str)
        text = served.messages_prompt(content) if is_chat else content
        try:
            prompt = encode_prompt(opened, text, is_templated=is_chat)
        except UsageError as error:
            raise RequestError(400, str(error), code="invalid_value") from error
    else:
        prompt, vocabulary = content, opened.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in prompt):
            raise RequestError(400, f"the tokens of prompt must be from 0 to {vocabulary - 1}", param="prompt")
    try:
        check_room(opened, prompt)
    except UsageError as error:
        raise RequestError(400, str(error), code="context_length_exceeded") from error
    return name, Job(opened, prompt, wanted.sampling)


async def _whole(
    service: Service, job: Job, form: CompletionForm, told: Callable[[str, int], None]
) -> dict[str, Any] | None:
    texts, tokens, finish = [], 0, "length"
    async with pieces_of(job, service.slots, service.steps) as pieces:
        async for piece in pieces:
            texts.append(piece.text)
            tokens, finish = piece.tokens, piece.finish or finish
    told(finish, tokens)
    return form.whole("".join(texts), finish, usage(len(job.prompt), tokens))


class EventStream(Response):
    """An answer in pieces, as server-sent events.

    Args:
        service: What the endpoints share.
        job: What is generated.
        form: Of the answer.
        include_usage: Whether the tokens are counted at the end.
        told: Is told how the answer ended, and of how many tokens.
        held: Is closed at the end.
    """

    def __init__(
        self,
        service: Service,
        job: Job,
        form: CompletionForm,
        include_usage: bool,
        told: Callable[[str, int], None],
        held: ExitStack,
    ) -> None:
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream"
        self.body = b""
        self.init_headers({"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._job, self._form, self._include_usage = service, job, form, include_usage
        self._told, self._held, self._tokens = told, held, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "the client went away"
        with self._held:
            try:
                outcome = await unless_disconnected(receive, partial(self._stream, send)) or outcome
            except RequestError as error:
                outcome = error.message
                await self._end(send, event(error.to_dict()))
            # The answer has begun, so that nobody else can tell the client.
            except Exception:
                outcome = "failed"
                traceback.print_exc(file=sys.stderr)
                await self._end(send, event(RequestError(500, "the generation failed").to_dict()))
            self._told(outcome, self._tokens)

    async def _stream(self, send: Send) -> str:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        finish = ""
        async with pieces_of(self._job, self._service.slots, self._service.steps) as pieces:
            for opening in self._form.opening():
                await _send(send, event(opening))
            async for piece in pieces:
                self._tokens = piece.tokens
                if piece.text or piece.finish:
                    await _send(send, event(self._form.piece(piece.text, piece.finish)))
                    finish = piece.finish or finish
        counts = event(self._form.counts(usage(len(self._job.prompt), self._tokens))) if self._include_usage else b""
        await self._end(send, counts + END_OF_STREAM)
        return finish

    async def _end(self, send: Send, content: bytes) -> None:
        await send({"type": "http.response.body", "body": content, "more_body": False})


async def _send(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})


async def _read_body(request: Request, most: int) -> bytes:
    """The request's JSON, as bytes.

    Raises:
        RequestError: It is too large, too slow, or not called JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "send the header Content-Type: application/json")
    content, size = bytearray(), 0
    try:
        with anyio.fail_after(SECONDS_FOR_A_BODY):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    content += chunk
                # What is somewhat too large is read to its end: its sender would not see an answer before.
                elif size > TIMES_TOO_LARGE * most:
                    break
    except TimeoutError:
        raise RequestError(408, f"the request did not arrive within {SECONDS_FOR_A_BODY:.0f} seconds") from None
    except ClientDisconnect:
        raise RequestError(CLIENT_CLOSED_REQUEST, "the client went away") from None
    if size > most:
        raise RequestError(413, f"the request is larger than {most:,} bytes", code="request_too_large")
    return bytes(content)


async def _refused(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.to_dict(), status_code=error.status, headers=error.headers())


async def _no_route(request: Request, error: HTTPException) -> Response:
    message = {404: "there is no such page", 405: f"{request.method} is not possible here"}
    found = RequestError(error.status_code, message.get(error.status_code, str(error.detail)))
    return JSONResponse(found.to_dict(), status_code=error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, "the server failed; its output says why").to_dict(), status_code=500)
