"""Requests that cannot be answered: each fails alone, with its reason; the engine and everybody else go on."""

import gc
import json
import logging
import queue
import re
import shutil
import threading
import weakref
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.serving import ServingConfig, kara_continuous_batching
from kara_hf.serving.engine import Engine
from kara_hf.serving.seams import LEAST_TRANSFORMERS

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

KARA = {"retention": 0.5, "window": 8, "recent": 3, "period": 1}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GOOD = [[5, 6, 7, 8, 9], [11] * 13]


def make(config=None, **changes):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SIZES | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return make()


def pool(**changes):
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 100, "max_batch_tokens": 64} | changes)


def generation(tokens=20):
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def answers(model, inputs, config=None):
    out = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=config or pool())
    return list(out.values())


# ------------------------------------------------------------------------------------------------------- in the engine
REFUSED = {
    "nothing": ([], "the prompt has no tokens"),
    "longer than the pool": ([7] * 400, "needs room for 401 tokens and the pool holds 400"),
    "an unknown id": ([5, 320], "320 among its ids, which must be whole numbers from 0 to 319"),
    "a negative id": ([-1, 5], "-1 among its ids"),
    "a fraction": ([5, 2.5], "2.5 among its ids"),
    "NaN": ([float("nan")], "nan among its ids"),
    "text": (["a", "b"], "'a' among its ids"),
    "None": ([None], "None among its ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_prompt_fails_alone(model, name):
    prompt, reason = REFUSED[name]
    sharing = pool(allow_block_sharing=False)  # with it, the engine sorts prompts before any is given in
    with kara_continuous_batching(model, **KARA) as serving:
        expected = [result.generated_tokens for result in answers(model, GOOD)]
        results = answers(model, [GOOD[0], prompt, GOOD[1]], sharing)
        assert serving.metrics.refused == 1 and serving.metrics.failed == 0
    assert [results[0].generated_tokens, results[2].generated_tokens] == expected
    assert reason in results[1].error and results[1].generated_tokens == []


@pytest.mark.parametrize("prompt", [np.array([5, 6, 7, 8, 9]), torch.tensor([5, 6, 7, 8, 9])], ids=["numpy", "torch"])
def test_ids_of_other_types_are_ids(model, prompt):
    with kara_continuous_batching(model, **KARA):
        expected, found = (answers(model, [each], pool(allow_block_sharing=False)) for each in (GOOD[0], prompt))
    assert found[0].generated_tokens == expected[0].generated_tokens


@pytest.mark.parametrize("length", [0, -3, 2.5, float("nan"), "20", True])
def test_a_bad_length_fails_alone(model, length):
    with kara_continuous_batching(model, **KARA):
        manager = model.init_continuous_batching(generation(), pool())
        manager.start()
        for key, tokens in (("before", 20), ("bad", length), ("after", 20)):
            manager.add_request(GOOD[0], request_id=key, max_new_tokens=tokens)
        results = {result.request_id: result for result in (manager.get_result(timeout=20) for _ in range(3))}
        manager.stop()
    assert f"max_new_tokens={length!r} is not possible" in results["bad"].error
    assert results["before"].generated_tokens == results["after"].generated_tokens
    assert len(results["after"].generated_tokens) == 20


def test_a_request_of_the_same_name_fails_alone(model):
    """The engine knows requests by name: a second one would take the first one's blocks."""
    with kara_continuous_batching(model, **KARA):
        manager = model.init_continuous_batching(generation(), pool())
        for prompt in GOOD:
            manager.add_request(prompt, request_id="same")
        manager.start()
        refused, answered = manager.get_result(timeout=20), manager.get_result(timeout=20)
        manager.stop()
        assert "request same is there already" in refused.error
        assert answered.generated_tokens == answers(model, GOOD[:1])[0].generated_tokens


@pytest.mark.parametrize(
    "setting", [{"temperature": 1e-40}, {"temperature": float("nan")}, {"top_p": float("nan")}, {"top_k": 10**12}]
)
def test_bad_sampling_fails_alone(model, setting):
    """What makes probabilities NaN ends the engine's thread when it draws from them."""
    sampled = GenerationConfig(
        max_new_tokens=9, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, eos_token_id=-1, pad_token_id=0
    )
    with kara_continuous_batching(model, **KARA):
        manager = model.init_continuous_batching(sampled, pool(per_request_processors=True))
        manager.start()
        manager.add_request(GOOD[0], request_id="bad", **setting)
        manager.add_request(GOOD[0], request_id="good", temperature=0.5)
        results = {result.request_id: result for result in (manager.get_result(timeout=20) for _ in range(2))}
        manager.stop()
    assert f"{next(iter(setting))}=" in results["bad"].error and "is not possible" in results["bad"].error
    assert len(results["good"].generated_tokens) == 9


def test_several_answers_to_one_token(model):
    config = generation()
    config.num_return_sequences = 2  # of greedy ones both are equal, which no user wants and a test does
    with kara_continuous_batching(model, **KARA):
        out = model.generate_batch([[5], GOOD[0]], generation_config=config, continuous_batching_config=pool())
    results = list(out.values())
    assert len(results) == 4
    for result in results[:2]:
        assert "num_return_sequences=2 needs a prompt of two tokens or more" in result.error
    assert [len(result.generated_tokens) for result in results[2:]] == [20, 20]


def test_positions_that_are_rows_of_a_table():
    """Behind the last row there is nothing; RoPE goes on."""
    learned = make(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=48))
    with kara_continuous_batching(learned, **KARA):
        results = answers(learned, [[5] * 60, [5] * 30, [5] * 28])
    assert "the prompt has 60 tokens and the model 48 positions" in results[0].error
    assert "ask for 18 tokens or less (max_new_tokens)" in results[1].error
    assert len(results[2].generated_tokens) == 20
    rotary = make()
    with kara_continuous_batching(rotary, **KARA):
        assert [len(result.generated_tokens) for result in answers(rotary, [[5] * 60])] == [20]


def test_an_error_in_a_step_ends_that_step_s_requests(model, monkeypatch):
    forward, calls = type(model).forward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise torch.OutOfMemoryError("no room for this batch")
        return forward(self, *args, **kwargs)

    with kara_continuous_batching(model, **KARA) as serving:
        expected = answers(model, GOOD)
        monkeypatch.setattr(type(model), "forward", failing)
        manager = model.init_continuous_batching(generation(), pool(allow_block_sharing=False))
        manager.start()
        manager.add_request(GOOD[0], request_id="first")
        failed = manager.get_result(timeout=20)
        manager.add_request(GOOD[1], request_id="second")
        answered = manager.get_result(timeout=20)
        manager.stop()
    assert "no room for this batch" in failed.error and len(failed.generated_tokens) == 9
    assert answered.generated_tokens == expected[1].generated_tokens
    assert serving.metrics.failed == 1 and serving.metrics.used_blocks == 0


# ------------------------------------------------------------------------------------------------------ what is let go
@pytest.fixture
def no_collector(monkeypatch):
    """Objects go by their reference count alone; Transformers' engine calls the collector when it stops."""
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    logging.disable()  # pytest keeps what is logged, and with an error all that its frames hold
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("family", [LlamaConfig, Gemma2Config])
@pytest.mark.parametrize("score", ["bidirectional", "key-difference"])
def test_memory_goes_with_the_last_reference(family, score, no_collector, monkeypatch):
    """The pool when the engine stops, while the session goes on; the manager and the model when they are let go."""
    seen, begin = {}, Engine.__init__

    def watch(engine, processor, *args):
        begin(engine, processor, *args)
        parts = (engine, processor, engine.cache, engine.scheduler, engine.batch, engine.pool, engine.compressor)
        seen.update({type(part).__name__: weakref.ref(part) for part in parts})

    monkeypatch.setattr(Engine, "__init__", watch)
    changes = {} if family is LlamaConfig else {"sliding_window": 16, "query_pre_attn_scalar": 8}
    model = make(family(**SIZES | changes))
    model.set_attn_implementation("eager")
    with kara_continuous_batching(model, **KARA, score=score) as serving:
        manager = model.init_continuous_batching(generation(), pool())
        manager.start()
        for prompt in [*GOOD, []]:
            manager.add_request(prompt)
        results = [manager.get_result(timeout=20) for _ in range(3)]
        assert sum(result.error is None for result in results) == 2
        assert all(part() is not None for part in seen.values())
        manager.stop()
        assert [name for name, part in seen.items() if part() is not None] == []
        gone = weakref.ref(manager)
        del manager
        assert gone() is None
        assert serving.engine is None and serving.metrics.windows > 0
    gone = weakref.ref(model)
    del model
    assert gone() is None


# ------------------------------------------------------------------------------------------------------ over HTTP
TEMPLATE = """{% for message in messages %}{% if message.role == "function" %}{{ raise_exception("no functions here") }}
{%- endif %}{{ message.content }}{{ message.undefined.thing if message.role == "tool" }}{% endfor %}"""
PATHS = {
    "/v1/completions": {"prompt": "ka : 7 ;", "max_tokens": 4, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ka : 7 ;"}], "max_tokens": 4},
    "/v1/responses": {"input": "ka : 7 ;", "max_output_tokens": 4, "stream": False},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The server with a small model that has a chat template, in this process, as a client sees it."""
    pytest.importorskip("openai")
    uvicorn = pytest.importorskip("uvicorn")
    from fastapi.testclient import TestClient

    from kara_hf.serving.server import run_server

    folder = tmp_path_factory.mktemp("served")
    make().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": 1, "pad_token_id": 0}')
    clients: queue.Queue = queue.Queue()
    over = threading.Event()

    def run(server):
        with TestClient(server.config.app, raise_server_exceptions=False) as client:
            clients.put(client)
            over.wait()

    def serve():
        try:
            run_server(
                ServingConfig.of(**KARA, score="key-difference", conversations=8),
                force_model=str(folder),
                page=4,
                num_blocks=40,
                max_batch_tokens=64,
                device="cpu",
            )
        except BaseException as error:
            clients.put(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", run)
        thread = threading.Thread(target=serve)
        thread.start()
        client = clients.get(timeout=60)
        if isinstance(client, BaseException):
            raise client
        client.model = str(folder)
        yield client
        over.set()
        thread.join()


def plain(client):
    """What three good requests are answered, one of them in a stream."""
    texts = []
    for path, body in PATHS.items():
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        texts.append(json.dumps(answer.json().get("choices") or answer.json()["output"]))
    with client.stream("POST", "/v1/completions", json=PATHS["/v1/completions"] | {"stream": True}) as answer:
        pieces = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert json.dumps(text)[1:-1] in texts[0]
    return re.sub(r'"id": "[^"]*"', "", "\n".join(texts))


def check(answer, status=None):
    """Answered, or refused with the reason in OpenAI's form."""
    code = answer.status_code
    assert code == status or (status is None and (code == 200 or 400 <= code < 500)), (code, answer.text)
    if code != 200:
        error = answer.json()["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        return error["message"]
    assert '{"error"' not in answer.text and "response.failed" not in answer.text, answer.text
    return None


CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "ka"}
BAD_BODIES = [
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, "the prompt has no tokens"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "the prompt has no tokens"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "the prompt has no tokens"),
    (CHAT, {"messages": []}, "messages: [] is not possible"),
    (CHAT, {"messages": None}, "messages: null"),
    (CHAT, {"messages": "hello"}, 'messages: "hello"'),
    (CHAT, {"messages": ["hello"]}, 'messages[0]: "hello"'),
    (CHAT, {"messages": [{"content": "ka"}]}, "messages[0].role: null"),
    (CHAT, {"messages": [{"role": "king", "content": "ka"}]}, 'messages[0].role: "king"'),
    (CHAT, {"messages": [{"role": "function", "content": "ka"}]}, "no functions here"),
    (CHAT, {"messages": [{"role": "tool", "content": "ka"}]}, "UndefinedError"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content: 5"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text: null"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "the model reads text",
    ),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "arguments: null"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments",
    ),
    (CHAT, {"tools": [5]}, "tools[0]: 5"),
    (CHAT, {"tools": "f"}, 'tools: "f"'),
    (CHAT, {"chat_template_kwargs": {"tokenize": False}}, 'chat_template_kwargs: ["tokenize"]'),
    (CHAT, {"chat_template_kwargs": None}, "chat_template_kwargs: null"),
    (CHAT, {"max_completion_tokens": 10**30}, "positions"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": None}, "prompt: null"),
    (TEXT, {"prompt": [5, 6]}, "prompt: [5, 6]"),
    (TEXT, {"prompt": "ka " * 50}, "the model 48 positions"),
    (TEXT, {"prompt": "ka " * 200}, "needs room for"),
    (TEXT, {"max_tokens": 0}, "max_tokens: 0"),
    (TEXT, {"max_tokens": -5}, "max_tokens: -5"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens: 1.5"),
    (TEXT, {"max_tokens": "many"}, 'max_tokens: "many"'),
    (TEXT, {"max_tokens": True}, "max_tokens: true"),
    (TEXT, {"max_tokens": 46}, "ask for 44 tokens or less"),
    (TEXT, {"temperature": -1}, "temperature: -1"),
    (TEXT, {"temperature": 1e-40}, "temperature: 1e-40"),
    (TEXT, {"temperature": "hot"}, 'temperature: "hot"'),
    (TEXT, {"temperature": 10**400}, "temperature: 1000"),
    (TEXT, {"top_p": 7}, "top_p: 7"),
    (TEXT, {"seed": 10**30}, "seed: 1000"),
    (TEXT, {"seed": "x"}, 'seed: "x"'),
    (TEXT, {"stream": "yes"}, 'stream: "yes"'),
    (TEXT, {"n": 10**9}, "n: 1000000000"),
    (TEXT, {"stop": ["a"]}, 'stop: ["a"]'),
    (TEXT, {"frequency_penalty": 1}, "frequency_penalty: 1"),
    (TEXT, {"generation_config": "{"}, "generation_config"),
    (TEXT, {"generation_config": '{"max_new_tokens": -1}'}, "max_new_tokens: -1"),
    (TEXT, {"generation_config": '{"num_beams": 4}'}, 'generation_config: ["num_beams"]'),
    (TEXT, {"generation_config": '{"eos_token_id": "x"}'}, 'eos_token_id: "x"'),
    (TEXT, {"model": "another/model"}, "pinned"),
    (TEXT, {"model": 5}, "model: 5"),
    (TEXT, {"wrong": 5}, "Unexpected fields"),
    (ITEMS, {"input": ""}, 'input: ""'),
    (ITEMS, {"input": []}, "input: []"),
    (ITEMS, {"input": [{"role": "user", "content": ""}]}, "the prompt has no tokens"),
    (ITEMS, {"input": [{"type": "input_image", "image_url": "x"}]}, "the model reads text"),
    (ITEMS, {"input": [USER, {"type": "function_call", "name": "f"}]}, "call_id: null"),
    (ITEMS, {"input": [USER, {"type": "dance"}]}, 'input[1].type: "dance"'),
    (ITEMS, {"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    (ITEMS, {"instructions": 5}, "instructions: 5"),
    ("/load_model", {"model": "another/model"}, "the one that this server has"),
    ("/load_model", {"model": 5}, "the one that this server has"),
]
BAD_BYTES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "null": b"null",
    "NaN": b'{"prompt": "ka", "temperature": NaN}',
    "infinity": b'{"prompt": "ka", "temperature": -Infinity}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "ka"}'.encode("utf-16"),
    "half of a pair": b'{"prompt": "\\ud800"}',
    "half of a pair as a key": b'{"\\udfff": 1}',
    "too deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number too long": b'{"seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path, changes, reason", BAD_BODIES, ids=[f"{p} {c}"[:80] for p, c, _ in BAD_BODIES])
def test_a_bad_body_is_refused_with_its_reason(client, path, changes, reason):
    for stream in (False, True):
        body = PATHS.get(path, {}) | {"stream": stream} | changes
        assert reason in check(client.post(path, json=body), 422 if "wrong" in changes else 400)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("name", BAD_BYTES)
@pytest.mark.parametrize("path", PATHS)
def test_bad_bytes_are_refused(client, path, name):
    answer = client.post(path, content=BAD_BYTES[name], headers={"content-type": "application/json"})
    assert "the body" in check(answer, 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types_are_refused(client, kind):
    answer = client.post(TEXT, content=b"\xff", headers={} if kind is None else {"content-type": kind})
    assert "send application/json" in check(answer, 415)


def test_other_endpoints(client):
    assert "transcribes nothing" in check(client.post("/v1/audio/transcriptions", files={"file": b"x"}), 404)
    assert client.post("/load_model", json={"model": client.model}).status_code == 200
    assert "kara_refused" in client.get("/metrics").text
    assert client.get("/v1/completions").status_code == 405


def test_an_answer_s_default_length_ends_with_the_positions(client):
    answer = client.post(TEXT, json={"prompt": "ka : 7 ;"}).json()
    assert answer["usage"]["total_tokens"] <= SIZES["max_position_embeddings"]


def test_what_asks_for_nothing_is_no_error(client):
    neutral = {"n": 1, "stop": None, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    assert check(client.post(CHAT, json=PATHS[CHAT] | neutral)) is None


def test_a_running_request_keeps_its_name(client):
    """A second request under the same x-request-id would take over the first one's answer."""
    name, body = {"x-request-id": "mine"}, {"prompt": "ka : 7 ;", "max_tokens": 40, "stream": True}
    begun, gate, count = threading.Event(), threading.Event(), Engine._count

    def slow(engine, running):
        begun.set()
        gate.wait(20)
        count(engine, running)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_count", slow)
        first: Future = Future()
        thread = threading.Thread(target=lambda: first.set_result(client.post(TEXT, json=body, headers=name)))
        thread.start()
        assert begun.wait(20)
        refused = client.post(TEXT, json=body, headers=name)
        gate.set()
        thread.join()
    assert "request 'mine' is running" in check(refused, 400)
    assert check(first.result()) is None
    assert check(client.post(TEXT, json=body, headers=name)) is None


def read_metrics(client):
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_turns_of_a_chat_find_their_past(client):
    """The template renders all of the conversation anew; only what was not there before is computed."""
    messages, before = [], read_metrics(client)
    for word in (" ka ", " ru ", " xa "):
        messages.append({"role": "user", "content": word})  # spaces, as this template has nothing in between
        answer = client.post(CHAT, json={"messages": messages, "max_tokens": 12, "temperature": 0})
        check(answer, 200)
        messages.append(answer.json()["choices"][0]["message"])
    counted = {name: value - before[name] for name, value in read_metrics(client).items()}
    assert counted["kara_found_pasts"] == 2
    # Of a turn, the word in it and the last token of the answer before, and the answer but for its last token.
    assert counted["kara_computed_tokens"] == 3 * (1 + 11) + 2
    assert counted["kara_found_tokens"] == 12 + 25
    assert counted["kara_pasts"] == 1


# ------------------------------------------------------------------------------------------------------------ anything
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.sampled_from([0, -1, 1e-300, 1e308, 2**63, -(2**64), 10**40, 0.5, 1.0, 2.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["", "user", "system", "assistant", "tool", "function", "text", "image_url", "input_text", "{}"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "name", "arguments", "function"]), inner)
    ),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "output_text", "image_url", "video_url", "x"])},
    optional={"text": SCALARS, "image_url": VALUES},
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": SCALARS, "arguments": VALUES})})
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "function", "king"])},
    optional={"content": st.text(max_size=12) | st.lists(PARTS, max_size=2) | VALUES, "tool_calls": st.lists(CALLS)},
)
FIELDS = {
    "messages": st.lists(MESSAGES, max_size=3) | VALUES,
    "prompt": st.text(max_size=80) | VALUES,
    "input": st.text(max_size=12) | st.lists(MESSAGES | PARTS, max_size=3) | VALUES,
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": VALUES}), max_size=2) | VALUES,
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["x", "tools", "padding", "conversation"]), VALUES),
    "generation_config": st.dictionaries(
        st.sampled_from(["max_new_tokens", "eos_token_id", "temperature", "num_beams", "do_sample"]), VALUES
    ).map(json.dumps)
    | VALUES,
    **dict.fromkeys(
        ["max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p", "seed", "n", "stop"],
        VALUES,
    ),
    **dict.fromkeys(["logit_bias", "frequency_penalty", "model", "suffix", "instructions", "response_format"], VALUES),
    "stream": st.booleans() | VALUES,
}


@st.composite
def requests(draw):
    """A path, a body and headers: a good one of which some fields are changed, or its bytes."""
    path = draw(st.sampled_from(list(PATHS)))
    names = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=3, unique=True))
    body = PATHS[path] | {name: draw(FIELDS[name]) for name in names}
    body.pop(draw(st.sampled_from([*body, None])), None)
    data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place, junk = draw(st.integers(0, len(data))), draw(st.binary(max_size=3))
        data = data[:place] + junk + data[place + draw(st.integers(0, 5)) :]
    headers = {"content-type": draw(st.sampled_from(["application/json"] * 9 + ["text/plain"]))}
    if draw(st.booleans()):
        headers["x-request-id"] = draw(st.sampled_from(["a", "b", "a__child#0", "0"]))
    return path, data, headers


def fuzz(client, examples, **drawing):
    counts: Counter[int] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **drawing)
    @given(requests())
    def attempt(request):
        path, data, headers = request
        answer = client.post(path, content=data, headers=headers)
        check(answer)
        counts[answer.status_code] += 1

    before = plain(client)
    attempt()
    assert client.get("/health").json() == {"status": "ok"}
    assert plain(client) == before
    assert counts[200] > examples // 50 and counts[400] > examples // 4, counts


def test_the_server_outlives_any_request(client):
    fuzz(client, 60, derandomize=True)  # so few that chance might leave out good ones


@pytest.mark.slow
def test_the_server_outlives_500_requests(client):
    fuzz(client, 500)
