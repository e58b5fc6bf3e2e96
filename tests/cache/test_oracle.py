"""The end-to-end oracle: attention over what is stored equals dense attention with -inf at every evicted token.

A second model runs on a DynamicCache that keeps everything; its attention masks, per layer, head and true position,
what the compressed cache evicted. The logits of every step must agree.
"""

import itertools
from collections.abc import Callable

import pytest
from support.marks import few
from support.oracle import check
from support.scores import VALUE_NORM

from kara_hf import KaraCache
from kara_hf.policy import SCORES

OTHERS = ["gemma2", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3"]


@pytest.mark.parametrize(  # one model tries every score
    ("name", "score"),
    few(
        [*(("llama", score) for score in sorted(SCORES)), *itertools.product(OTHERS, ["bidirectional", "random"])],
        *(("llama", score) for score in ("bidirectional", "random-chunks", VALUE_NORM)),
        ("gemma3", "bidirectional"),
        ("deepseek-v3", "random"),
    ),
)
def test_scores(name, score):
    assert check(name, [3, 0], kara(score=score, retention=0.25)) > 0


@pytest.mark.parametrize("steps", [[24, 1, 1, 9, 1, 30, 1], [40] + [1] * 22], ids=["turns", "tokens"])
@pytest.mark.parametrize("compress_prompt", [True, False])
@pytest.mark.parametrize("padding", [[0, 0], [5, 0], [0, 17]], ids=str)
def test_steps(padding, compress_prompt, steps):
    make = kara(compress_prompt=compress_prompt, retention=0.5, anchor_share=0.6)
    evictions = check("llama", padding, make, steps)
    assert evictions > 0 or not (compress_prompt or len(steps) > 20)


def kara(**settings) -> Callable[..., KaraCache]:
    return lambda model: KaraCache(model, window=16, recent=4, block_size=4, **settings)
