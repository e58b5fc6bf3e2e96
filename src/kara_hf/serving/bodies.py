"""What the body of an HTTP request must be, endpoint by endpoint, before any handler of the server reads it."""

import inspect
import json
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NoReturn

from ..config import is_int, is_number
from .admission import RequestRefused

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = ("text", "input_text", "output_text")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

# Fields that would change the answer, which the engine cannot do for one request: the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ("", []),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
}
# Settings of a request's `generation_config` that the engine heeds.
GENERATION = ("max_new_tokens", "eos_token_id", "do_sample", "temperature", "top_p", "top_k")


def read_body(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestRefused: `data` is not UTF-8, not JSON, nested too deeply, has NaN or half of a surrogate pair in it, or
            is no object.
    """
    try:
        body = json.loads(data.decode(), parse_constant=_not_json)
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise RequestRefused(f"the body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise RequestRefused("the body is nested too deeply") from None
    except ValueError as error:
        raise RequestRefused(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestRefused(f"the body must be a JSON object, not {_kind(body)}")
    return body


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def check_chat(body: dict[str, Any], text_only: bool) -> None:
    """Of ``/v1/chat/completions``. Raises RequestRefused naming the field."""
    _check_shared(body)
    messages: Any = body.get("messages")
    _require(isinstance(messages, list) and messages, "messages", messages, "a list of messages, at least one")
    _check_messages(messages, "messages", text_only)
    _check_template(body)


def check_completion(body: dict[str, Any], text_only: bool) -> None:
    """Of ``/v1/completions``. Raises RequestRefused naming the field."""
    _check_shared(body)
    for name in ("prompt", "suffix"):
        _require(isinstance(body.get(name), str | None), name, body.get(name), "a string")
    _require(body.get("prompt"), "prompt", body.get("prompt"), "a text that is not empty")


def check_responses(body: dict[str, Any], text_only: bool) -> None:
    """Of ``/v1/responses``. Raises RequestRefused naming the field."""
    _check_shared(body)
    given, instructions = body.get("input"), body.get("instructions")
    _require(isinstance(given, str | list) and given, "input", given, "a text or a list of items, not empty")
    _require(isinstance(instructions, str | None), "instructions", instructions, "a string")
    parallel = body.get("parallel_tool_calls")
    _require("parallel_tool_calls" not in body or isinstance(parallel, bool), "parallel_tool_calls", parallel, "a bool")
    if isinstance(given, list):
        _objects(given, "input")
        if "role" in given[0]:
            _check_items(given, text_only)
        else:
            _check_content(given, "input", text_only)
    _check_template(body)


def check_load(body: dict[str, Any], model: str) -> None:
    """Of ``/load_model`` where the server has one model. Raises RequestRefused for another."""
    _require(body.get("model") == model, "model", body.get("model"), f"{model!r}, the one that this server has")


def states_length(body: dict[str, Any]) -> bool:
    """Whether a request says itself how long its answer may be."""
    config = json.loads(body.get("generation_config") or "{}")
    return any(body.get(name) is not None for name in LENGTHS) or config.get("max_new_tokens") is not None


# Checks by path, of the body and whether the model takes text alone.
CHECKS: dict[str, Callable[[dict[str, Any], bool], None]] = {
    "/v1/chat/completions": check_chat,
    "/v1/completions": check_completion,
    "/v1/responses": check_responses,
}


def _check_shared(body: dict[str, Any]) -> None:
    """What all endpoints that generate take."""
    for name, kind in {"model": str, "stream": bool, "generation_config": str}.items():
        _require(isinstance(body.get(name), kind | None), name, body.get(name), f"a {kind.__name__}")
    _check_numbers(body)
    if body.get("generation_config") is not None:
        _check_generation_config(body["generation_config"])
    for name in NEUTRAL.keys() & body.keys():
        value = body[name]
        asks_nothing = value is None or value in NEUTRAL[name]
        _require(asks_nothing, name, value, "left out, since the engine cannot do that for one request")


def _check_numbers(settings: dict[str, Any]) -> None:
    for name in (*LENGTHS, "max_new_tokens", "top_k"):
        value = settings.get(name)
        _require(value is None or (is_int(value) and value >= 1), name, value, "a whole number from 1 on")
    temperature, top_p, seed = (settings.get(name) for name in ("temperature", "top_p", "seed"))
    _require(
        temperature is None or (is_number(temperature) and (temperature == 0 or 0.01 <= temperature <= 2)),
        "temperature",
        temperature,
        "0, or a number from 0.01 to 2",
    )
    _require(top_p is None or (is_number(top_p) and 0 < top_p <= 1), "top_p", top_p, "a number in (0, 1]")
    _require(
        seed is None or (is_int(seed) and -(2**63) <= seed < 2**64), "seed", seed, "a whole number of at most 64 bits"
    )


def _check_generation_config(text: str) -> None:
    try:
        config = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        config = None
    _require(isinstance(config, dict), "generation_config", text, "the text of a JSON object")
    unknown = sorted(config.keys() - set(GENERATION))
    _require(not unknown, "generation_config", unknown, f"of {', '.join(GENERATION)} alone")
    _check_numbers(config)
    ids = config.get("eos_token_id")
    _require(
        ids is None or is_int(ids) or (isinstance(ids, list) and all(map(is_int, ids))),
        "eos_token_id",
        ids,
        "a token id or a list of them",
    )
    _require(isinstance(config.get("do_sample"), bool | None), "do_sample", config.get("do_sample"), "a bool")


def _check_messages(messages: list[Any], name: str, text_only: bool) -> None:
    for place, message in enumerate(_objects(messages, name)):
        where = f"{name}[{place}]"
        _require(message.get("role") in ROLES, f"{where}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        content = message.get("content")
        _require(isinstance(content, str | list | None), f"{where}.content", content, "a text or a list of parts")
        if isinstance(content, list):
            _check_content(content, f"{where}.content", text_only)
        calls = message.get("tool_calls")
        _require(isinstance(calls, list | None), f"{where}.tool_calls", calls, "a list of calls")
        for number, call in enumerate(_objects(calls or [], f"{where}.tool_calls")):
            _check_call(call.get("function") or call, f"{where}.tool_calls[{number}]")


def _check_content(parts: list[Any], name: str, text_only: bool) -> None:
    for place, part in enumerate(_objects(parts, name)):
        kind = part.get("type")
        _require(isinstance(kind, str), f"{name}[{place}].type", kind, "a string")
        if kind in TEXT_PARTS:
            _require(isinstance(part.get("text"), str), f"{name}[{place}].text", part.get("text"), "a string")
        else:
            _require(not text_only, f"{name}[{place}].type", kind, f"{' or '.join(TEXT_PARTS)}: the model reads text")


def _check_items(items: list[Any], text_only: bool) -> None:
    """Of a list of messages, calls and what they returned, as the Responses API has it."""
    for place, item in enumerate(items):
        where, kind = f"input[{place}]", item.get("type")
        if "role" in item:
            _check_messages([item], where, text_only)
        elif kind == "function_call":
            _require(isinstance(item.get("call_id"), str), f"{where}.call_id", item.get("call_id"), "a string")
            _check_call(item, where)
        elif kind == "function_call_output":
            for name in ("call_id", "output"):
                _require(isinstance(item.get(name), str), f"{where}.{name}", item.get(name), "a string")
        elif kind == "reasoning":
            content = item.get("content")
            _require(isinstance(content, list | None), f"{where}.content", content, "a list of parts")
            for part in _objects(content or [], f"{where}.content"):
                _require(isinstance(part.get("text"), str), f"{where}.content", part, "a part with a text")
        else:
            _require(False, f"{where}.type", kind, "message, function_call, function_call_output or reasoning")


def _check_call(function: Any, where: str) -> None:
    _require(isinstance(function, dict), where, function, "an object with a function")
    _require(isinstance(function.get("name"), str), f"{where}.name", function.get("name"), "a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    _require(isinstance(arguments, dict), f"{where}.arguments", function.get("arguments"), "the text of a JSON object")


def _check_template(body: dict[str, Any]) -> None:
    """What goes to the chat template: tools, and settings of its own."""
    tools = body.get("tools")
    _require(isinstance(tools, list | None), "tools", tools, "a list of tools")
    for place, tool in enumerate(_objects(tools or [], "tools")):
        function = tool.get("function", tool)
        _require(
            isinstance(function, dict) and isinstance(function.get("name"), str),
            f"tools[{place}]",
            tool,
            "an object with a function that has a name",
        )
    settings: Any = body.get("chat_template_kwargs")
    if "chat_template_kwargs" in body:
        _require(isinstance(settings, dict), "chat_template_kwargs", settings, "an object")
        _require(
            not settings.keys() & _template_parameters(),
            "chat_template_kwargs",
            sorted(settings.keys() & _template_parameters()),
            "what the model's template reads; these the server sets",
        )


@cache
def _template_parameters() -> frozenset[str]:
    """What steers `apply_chat_template` itself, or the tokenizer behind it."""
    from transformers import PreTrainedTokenizerBase

    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(names) - {"documents"} | {"load_audio_from_video", "num_frames"}


def _objects(items: Iterable[Any], name: str) -> Iterable[dict[str, Any]]:
    """`items`, of which each must be an object."""
    for place, item in enumerate(items):
        _require(isinstance(item, dict), f"{name}[{place}]", item, "an object")
    return items


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a bool", type(None): "null"}
    return kinds.get(type(value), "a number")


def _require(condition: Any, name: str, value: Any, expected: str) -> None:
    if not condition:
        shown = json.dumps(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise RequestRefused(f"{name}: {shown} is not possible; it must be {expected}")
