"""A tiny language model with a real attention sink: random models have none.

Texts go round in a circle of words, and once in every round a question asks for the name that the text began with. Its
heads look names up: they write what they attend to into the prediction, so that everywhere but behind the question they
must attend to nothing. Softmax lets them only attend to `BEGIN`, whose value is nothing, as language models do (arXiv
2309.17453). Without it they look names up everywhere.

Weights are written by hand to do that and then trained as any model is, for a moment; the sink stays because it is of
use. (Found by training alone, a model so small makes do with attention to the token itself.)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BEGIN, ASK, WORDS, NAMES = 0, 1, range(2, 14), range(14, 22)
VOCABULARY, HEAD = 22, 24
SINK, NAME = HEAD // 2 - 1, HEAD // 2 - 2  # dimensions that RoPE turns slowest


def texts(number: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[number, length]`` int64: `BEGIN`, a name, and the circle of words from anywhere on."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        name, start = NAMES.start + torch.randint(len(NAMES), (2,), generator=generator)
        circle = [*WORDS, ASK, int(name)]
        rows.append([BEGIN, int(name), *(circle[(int(start) + n) % len(circle)] for n in range(length - 2))])
    return torch.tensor(rows)


def sink_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2 * VOCABULARY,  # what a token is, and what a head looked up
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=BEGIN,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.01)
        model.model.embed_tokens.weight[:, :VOCABULARY] += torch.eye(VOCABULARY)
        for layer in model.model.layers:
            attention = layer.self_attn
            for head in range(2):
                attention.q_proj.weight[head * HEAD + NAME, :VOCABULARY] += 3
                attention.q_proj.weight[head * HEAD + SINK, :VOCABULARY] += 6
                attention.q_proj.weight[head * HEAD + SINK, ASK] -= 6
                attention.o_proj.weight[VOCABULARY:, head * HEAD : head * HEAD + VOCABULARY] += torch.eye(VOCABULARY)
            attention.k_proj.weight[NAME, NAMES.start : NAMES.stop] += 1
            attention.k_proj.weight[SINK, BEGIN] += 1
            attention.v_proj.weight[NAMES, NAMES] += 1
        follows = dict(zip([*WORDS, *NAMES], [*WORDS[1:], ASK, *[WORDS.start] * len(NAMES)], strict=True))
        for token, following in follows.items():
            model.lm_head.weight[following, token] += 2
        for name in NAMES:
            model.lm_head.weight[name, VOCABULARY + name] += 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(40):
        ids = texts(16, 48, step)
        logits = model(ids[:, :-1]).logits[:, 2:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
