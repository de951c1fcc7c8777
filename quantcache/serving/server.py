"""transformers' OpenAI-compatible server over a manager of int8 blocks. Needs the extra ``serve``.

Its routes, handlers and streams are transformers'. Added is what many users need: each request samples as it asks; one
that cannot be served, or of which a field would be passed over, is refused by itself, with a reason; one whose client
has gone gives its blocks back.
"""

import asyncio
import contextvars
import queue
import signal
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, cast

import openai  # noqa: F401 - transformers' handlers are defined only where it is installed
import starlette.exceptions
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import CBGenerateManager, GenerationState

from quantcache.serving import _host, stopping
from quantcache.serving.asked import DEFAULT_NEW_TOKENS, LENGTHS, check_body, sampling_of
from quantcache.serving.choices import Choices, UpToStop
from quantcache.serving.manager import Int8BatchingManager

GRACE_SECONDS: Final = 5
"""What answers at work may take once the server is to end."""

KEEP_ALIVE_SECONDS: Final = 60
"""How long a connection is kept for another request. Clients give theirs up after 5 s, which is uvicorn's default
too: a request could then meet a connection that is being closed."""

POLL_SECONDS: Final = 0.01
"""Between looks at whether the manager has let go of a request that was cancelled."""

ROUTES: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
"""Those of transformers' server that stay. The others list, load or throw away models, or want an encoder."""

_REQUEST_ID: Final = b"x-request-id"

_options: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("quantcache_options")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def build_app(
    manager: Int8BatchingManager, model: PreTrainedModel, tokenizer: Any, name: str, most_tokens: int
) -> FastAPI:
    """The application of transformers' server over a running manager.

    Args:
        manager: made with the configs of ``asked``, started; it is not stopped here.
        model: its model.
        tokenizer: of the model.
        name: what clients call the model.
        most_tokens: of a prompt and its answer together, that the pool and the model hold.
    """
    models: Any = ModelManager(device="cpu")  # it loads nothing: the one model is there already
    models.process_model_name = lambda model_id: model_id  # no revision of the hub behind it
    models.force_model = name
    models.loaded_models[name] = _KeptModel(model, timeout_seconds=-1, processor=tokenizer)
    state = GenerationState(continuous_batching=True)
    manager.stop_strings.tokenizer, manager.stop_strings.in_prompt = tokenizer, False
    manager.stop_strings.texts()  # while no client waits for it
    requests = _Requests(manager, most_tokens)
    state._cb_manager, state._cb_model_id = requests, name
    app: FastAPI = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completion(models, state),
        response_handler=_Response(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "quantcache"}]}
    app.add_api_route("/v1/models", lambda: listed, methods=["GET"])
    app.add_api_route("/report", lambda: asdict(manager.report()), methods=["GET"])
    app.add_exception_handler(starlette.exceptions.HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _not_json)
    app.add_middleware(_WhileTheClientWaits, requests=requests)
    return app


class _KeptModel(TimedModel):
    """The model, which stays: transformers would start a thread at each request, to unload it when none comes."""

    def reset_timer(self) -> None:
        """Nothing."""


class _Requests(CBGenerateManager):
    """Hands requests to the manager, each with its own sampling, and forgets those that have ended."""

    def __init__(self, manager: Int8BatchingManager, most_tokens: int) -> None:
        super().__init__()
        self.manager, self.most_tokens = manager, most_tokens
        self.names: dict[str, list[str]] = {}
        """Of the answers to each request at work, in the order of its choices."""
        self._cb = cast(Any, _Gate(manager, self.names))

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        with self._as_asked(model, inputs, gen_config):
            queue, streamer = super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )
        if gen_config.stop_strings:
            streamer._queue = cast(Any, UpToStop(queue, gen_config))
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        with self._as_asked(model, inputs, gen_config):
            text, prompt_len, tokens = await super().generate_non_streaming(
                model, processor, inputs, gen_config, request_id
            )
        shown = stopping.cut(text, gen_config.stop_strings)
        if shown != text:
            gen_config.max_new_tokens = None  # by which transformers tells an answer that was too long
        return shown, prompt_len, tokens

    def has(self, request_id: str) -> bool:
        """Whether a request has been handed to the manager and not forgotten."""
        return request_id in self.manager.output_router.result_handlers

    def stop(self) -> None:
        """Nothing: who made the manager ends it."""

    async def cancel(self, request_id: str) -> None:
        """Give the blocks of a request back, if it has any, and wait until nothing goes by its name any more."""
        names, manager = self.names.get(request_id, [request_id]), self.manager
        for name in names:
            manager.cancel_request(name)
        while manager.is_running() and (
            manager.cancel_queue.qsize() or any(_host.has_request(manager.batch_processor, name) for name in names)
        ):
            await asyncio.sleep(POLL_SECONDS)

    def forget(self, request_id: str) -> None:
        """Let go of where the output of a request went; what a cancelled one has still delivered belongs to nobody."""
        router = self.manager.output_router
        with router._lock:
            for name in self.names.pop(request_id, [request_id]):
                router.result_handlers.pop(name, None)
        while True:
            try:
                router.output_queue.get_nowait()
            except queue.Empty:
                return

    @contextmanager
    def _as_asked(self, model: Any, inputs: Any, gen_config: Any) -> Iterator[None]:
        """The request's length, checked, and what else it asks for, for the calls that transformers' code makes inside.

        Raises:
            HTTPException: 400, it is empty or does not fit.
        """
        prompt_len = len(inputs["input_ids"])
        room = self.most_tokens - prompt_len
        if not prompt_len:
            raise HTTPException(400, "the prompt must have at least one token, got none.")
        if gen_config.max_new_tokens is None:
            gen_config.max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        if gen_config.max_new_tokens > room:
            raise HTTPException(
                400,
                f"a prompt and its answer must have at most {self.most_tokens:,} tokens together, got "
                f"{prompt_len:,} and {gen_config.max_new_tokens:,}.",
            )
        sampling = sampling_of(gen_config, model.config.get_text_config().vocab_size)
        stops, answers = gen_config.stop_strings, gen_config.num_return_sequences
        token = _options.set({**sampling, "stop_strings": stops, "num_return_sequences": answers})
        try:
            yield
        finally:
            _options.reset(token)


class _Gate:
    """The manager, as transformers' handlers call it."""

    def __init__(self, manager: Int8BatchingManager, names: dict[str, list[str]]) -> None:
        self._manager, self._names = manager, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def add_request(self, input_ids: list[int], *, request_id: str, **options: Any) -> str:
        if _host.CHILD in request_id:  # which came with the first answer
            return request_id
        options |= _options.get()
        names = _host.names_of_answers(request_id, options["num_return_sequences"])[::-1]
        # A streaming request is added before its handler is registered; what is delivered in between waits for that.
        router = self._manager.output_router

        def deliver_later(output: Any) -> None:
            entry = router.result_handlers.get(output.request_id)
            if entry is not None and entry[0] is not deliver_later:
                entry[0](output)

        with router._lock:
            for name in names:
                router.result_handlers.setdefault(name, (deliver_later, asyncio.get_running_loop()))
        self._names[request_id] = names
        try:
            added: str | None = self._manager.add_request(input_ids, request_id=request_id, **options)
        except ValueError as error:
            with router._lock:
                for name in names:
                    router.result_handlers.pop(name, None)
            raise HTTPException(400, str(error)) from error
        if added is None:
            raise HTTPException(503, "the server is stopping and takes no more requests.")
        return added


class _Checked:
    """Before a handler of transformers: what it would pass over, or stumble over, is refused with its name."""

    generation_state: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        check_body(body)
        body.setdefault("stream", False)  # OpenAI's default, and not that of transformers' /v1/responses
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc] # of the handler beside it
        except (AttributeError, KeyError, TemplateError, TypeError, ValueError) as error:
            if self.generation_state._cb_manager.has(request_id):
                raise
            # Nothing was generated yet: transformers' code, or the chat template, reads what the client wrote.
            raise HTTPException(400, f"the request cannot be read: {type(error).__name__}: {error}") from error

    def _build_generation_config(self, body: dict[str, Any], own: GenerationConfig, use_cb: bool = False) -> Any:
        made = super()._build_generation_config(body, own, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") or body.get("top_p") is not None:
            made.do_sample = body.get("temperature") != 0
        if all(body.get(name) is None for name in LENGTHS):
            made.max_new_tokens = None  # as many as fit
        stop = made.stop_strings
        made.stop_strings = [stop] if isinstance(stop, str) else list(stop or ())
        made.num_return_sequences = body.get("n") or 1
        return made


class _Chat(_Checked, Choices, ChatCompletionHandler):
    _unused_fields = ChatCompletionHandler._unused_fields - {"n"}


class _Completion(_Checked, Choices, CompletionHandler):
    _unused_fields = CompletionHandler._unused_fields - {"n"}


class _Response(_Checked, ResponseHandler):
    pass


class _WhileTheClientWaits:
    """ASGI middleware: a request whose client has gone is cancelled, and every request is forgotten at its end."""

    def __init__(self, app: Any, requests: _Requests) -> None:
        self.app, self.requests = app, requests
        self.active: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] != _REQUEST_ID]
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _REQUEST_ID), None)
        request_id = given or str(uuid.uuid4())
        if _host.CHILD in request_id:
            await _error(400, f"x-request-id must not have {_host.CHILD!r} in it, got {given!r}.")(scope, receive, send)
            return
        scope["headers"] = [*headers, (_REQUEST_ID, request_id.encode("latin-1"))]
        body = [await receive()]
        while body[-1].get("more_body"):
            body.append(await receive())
        if body[-1]["type"] == "http.disconnect":
            return
        if request_id in self.active:
            await _error(409, f"x-request-id must differ from those at work, got {given!r} again.")(
                scope, receive, send
            )
            return
        gone = asyncio.Event()
        parts = iter(body)

        async def again() -> MutableMapping[str, Any]:
            if (part := next(parts, None)) is not None:
                return part
            await gone.wait()
            return {"type": "http.disconnect"}

        at_work = [request_id]

        def release() -> None:
            if at_work:
                at_work.clear()
                self.active.discard(request_id)
                self.requests.forget(request_id)

        async def send_on(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                release()  # before the client can use the name again
            await send(message)

        self.active.add(request_id)
        answer = asyncio.ensure_future(self.app(scope, again, send_on))
        left = asyncio.ensure_future(receive())  # nothing but the client's end comes after the body
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                gone.set()
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)  # a stream cancels its request, too
                if at_work:
                    await self.requests.cancel(request_id)
            else:
                answer.result()
        finally:
            left.cancel()
            answer.cancel()
            release()


def _error(status: int, message: str) -> JSONResponse:
    """As OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


# Handlers are coroutines: others would run in a thread each.


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, starlette.exceptions.HTTPException)
    return _error(error.status_code, str(error.detail))


async def _not_json(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    reason = found.get("ctx", {}).get("error") or found["msg"]
    return _error(400, f"the body must be a JSON object, got: {reason}.")


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can reach.

    Args:
        host: address to listen on.
        port: to listen on; 0 takes a free one.

    Raises:
        OSError: nothing can listen there.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise type(error)(f"listen: {host} and port {port} must be free on this machine, got: {error}.") from error


def run(app: FastAPI, listening: socket.socket, log_level: str, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or a termination, and then until the answers at work are given, ``GRACE_SECONDS`` at most.

    Args:
        app: see ``build_app``.
        listening: see ``listen``; closed at the end.
        log_level: of uvicorn.
        tell: called with the URL once clients are answered.
    """
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        app, log_level=log_level, timeout_graceful_shutdown=GRACE_SECONDS, timeout_keep_alive=KEEP_ALIVE_SECONDS
    )
    _Server(config, lambda: tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")).run([listening])


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it has started and takes Ctrl-C for its end."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Those that end the server; uvicorn would raise them again behind it."""
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
