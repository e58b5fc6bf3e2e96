"""Where the HTTP server lets requests in: each is checked in full before the engine hears of it.

`Gate` reads the body and hands it on; `CheckedManager` sees what the server made of it, token ids and lengths, just
before the engine gets it. Until then whatever goes wrong is the request's own affair and is answered with a 4xx and the
reason; from then on it is the server's.
"""

import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from transformers.cli.serving import utils

from .admission import RequestRefused
from .bodies import CHECKS, check_load, read_body, states_length
from .session import Serving

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 64 * 2**20  # bytes


@dataclass
class Passage:
    """A request on its way in.

    Attributes:
        states_length: whether it says how long its answer may be.
        admitted: whether the engine has it.
    """

    states_length: bool = False
    admitted: bool = False


_passage: ContextVar[Passage] = ContextVar("passage")


class EngineUnavailable(Exception):
    """The engine could not be started, which is no request's fault."""


class Refused(Exception):
    """An answer that ends a request: its status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Gate:
    """An ASGI middleware that refuses, with the reason, what no handler or engine should see.

    Args:
        app: what is behind it.
        model: name of the one model that is served.
        text_only: whether the model takes nothing but text.
    """

    def __init__(self, app: Any, model: str, text_only: bool):
        self.app, self.model, self.text_only = app, model, text_only

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        passage, begun = Passage(), False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        token = _passage.set(passage)
        try:
            await self.app(scope, await self._checked(scope, receive, passage), sending)
        except Refused as refused:
            await _answer(send, refused.status, str(refused))
        except EngineUnavailable as error:
            await _answer(send, 503, str(error), "server_error")
        except Exception as error:
            if begun or scope["path"] not in CHECKS:
                raise
            if not passage.admitted:
                await _answer(send, 400, str(error) if isinstance(error, RequestRefused) else _reason(error))
            elif isinstance(error, RuntimeError):  # what the engine says of a request that it could not finish
                await _answer(send, 500, str(error), "server_error")
            else:
                raise
        finally:
            _passage.reset(token)

    async def _checked(self, scope: Message, receive: Receive, passage: Passage) -> Receive:
        """Reads and checks the body of a path that has one. Returns what hands it on."""
        path = scope["path"]
        if path == "/v1/audio/transcriptions":
            raise Refused(404, "this server answers with text to text; it transcribes nothing")
        if path not in CHECKS and path != "/load_model":
            return receive
        kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(415, f"content-type {kind.decode('latin-1')!r} is not possible; send application/json")
        data, disconnect = await _read(receive)
        if disconnect is None:
            try:
                body = read_body(data)
                if path == "/load_model":
                    check_load(body, self.model)
                else:
                    CHECKS[path](body, self.text_only)
                    passage.states_length = states_length(body)
                    if body.get("max_completion_tokens") is not None:  # some versions know the older name alone
                        data = json.dumps(body | {"max_tokens": body["max_completion_tokens"]}).encode()
            except RequestRefused as error:
                raise Refused(400, str(error)) from None
        message = disconnect or {"type": "http.request", "body": data, "more_body": False}
        return _replayed(message, receive)


async def _read(receive: Receive) -> tuple[bytes, Message | None]:
    """The whole body; or the message that says that the client is gone."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b"", message
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY:
            raise Refused(413, f"the body is longer than {MAX_BODY} bytes; shorten it")
    return b"".join(parts), None


def _replayed(message: Message, receive: Receive) -> Receive:
    """`receive` with `message` before what is still to come."""
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _reason(error: Exception) -> str:
    """Why a request could not be made into a prompt; the class names what an error of a chat template does not say."""
    return f"the request cannot be read: {type(error).__name__}: {error}"


async def _answer(send: Send, status: int, reason: str, kind: str = "invalid_request_error") -> None:
    """An error as OpenAI's API has it."""
    body = json.dumps({"error": {"message": reason, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def checked_manager(serving: Serving) -> type[utils.CBGenerateManager]:
    """A class that stands for the server's `CBGenerateManager` and checks requests by the limits of their engine."""

    class CheckedManager(utils.CBGenerateManager):
        def init_cb(self, model: Any, gen_config: Any) -> None:
            """Starts the engine when the first request comes, and has it ready when this returns."""
            if self._cb is not None:
                return
            try:
                manager = model.init_continuous_batching(
                    generation_config=gen_config, continuous_batching_config=self._cb_config
                )
                manager.warmup()
                manager.start()
            except Exception as error:
                raise EngineUnavailable(f"the engine cannot be started: {error}") from error
            self._cb: Any = manager

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
        ) -> Any:
            self._admit(inputs["input_ids"], gen_config, request_id)
            queue, streamer = super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )
            manager = self._cb

            def cancel() -> None:
                manager.cancel_request(request_id)
                with manager.output_router._lock:
                    manager.output_router.result_handlers.pop(request_id, None)

            streamer.cancel = cancel
            return queue, streamer

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
        ) -> Any:
            self._admit(inputs["input_ids"], gen_config, request_id)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

        def _admit(self, tokens: list[int], gen_config: Any, request_id: str) -> None:
            """Raises RequestRefused for what the engine must not get; fits an answer's default length to the model."""
            self._check_alive(request_id)
            engine, manager, passage = serving.engine, self._cb, _passage.get(None) or Passage(states_length=True)
            if engine is None:
                raise EngineUnavailable("the engine is gone; start the server again")
            try:
                if request_id in manager.output_router.result_handlers:
                    raise RequestRefused(f"a request {request_id!r} is running; give each an x-request-id of its own")
                if engine.limits.positions is not None and not passage.states_length and tokens:
                    room = max(1, engine.limits.positions - len(tokens))
                    gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
                engine.check(tokens, gen_config.max_new_tokens)
                engine.limits.check_positions(len(tokens), gen_config.max_new_tokens)
            except RequestRefused:
                engine.metrics.refused += 1
                raise
            passage.admitted = True

    return CheckedManager
