"""What it is worth to a conversation that its next turn begins with its compressed past, on the bundled model.

Conversations of several turns, all of which say as much and are answered with as many tokens, whatever they are. Each
turn's prompt is all that was said before. The engine without this package finds blocks of whole tokens by their
content, as long as nobody needs their room; with Kara it finds those of prompts alone, unless pasts are remembered.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from kara_hf.evaluation.measure.provenance import digest
from kara_hf.tasks.reasoner import make_problem

from ..common.case import Job, register
from ..common.models import TINY
from ..common.rows import Row
from ..common.run import Run
from .serving import PAGE, Counted, bundled_to_serve

KARA: Row = {
    "window": 32,
    "recent": 16,
    "retention": 0.25,
    "score": "key-difference",
    "anchor_share": 1.0,
    "period": 16,
}


@register(
    "turns",
    "conversations while serving: what is read again from the second turn on",
    [
        ("blocks", "{blocks}"),
        ("method", "{method}"),
        ("tokens read", "{read:,}"),
        ("steps", "{steps:,}"),
        ("preempted", "{preemptions}"),
        ("CPU time, s", "{cpu_seconds:.0f}"),
    ],
    sizes={"conversations": 8, "turns": 5, "said": 32, "answered": 160, "blocks": (520, 360)},
    smoke={"conversations": 2, "turns": 2, "said": 8, "answered": 72, "blocks": (60,)},
)
def turns_jobs(run: Run, conversations: int, turns: int, said: int, answered: int, blocks: list[int]) -> Iterator[Job]:
    methods = {
        "engine alone": None,
        "Kara, 25 %": KARA,
        "Kara, 25 %, pasts remembered": KARA | {"conversations": conversations},
    }
    for room in blocks:
        for name, kara in methods.items():
            labels = {"conversations": conversations, "turns": turns, "said": said, "answered": answered}
            measure = partial(held, kara, conversations, turns, said, answered, room)
            yield Job(labels | {"blocks": room, "method": name}, measure)


def held(kara: Row | None, conversations: int, turns: int, said: int, answered: int, blocks: int) -> Row:
    """Holds the same conversations with one method; counts from the second turn on."""
    from kara_hf.serving import kara_continuous_batching

    model, tokenizer = bundled_to_serve()
    texts = [make_problem("trace", generated=900, seed=70_000 + number).completion for number in range(conversations)]
    users = [tokenizer(text)["input_ids"] for text in texts]
    past: list[list[int]] = [[] for _ in users]
    engine: Any = Counted(model) if kara is None else kara_continuous_batching(model, **kara)
    begun = (0.0, 0, 0, 0)
    with engine as serving:
        for turn in range(turns):
            if turn == 1:
                begun = counted(serving)
            inputs = [old + user[turn * said :][:said] for old, user in zip(past, users, strict=True)]
            results = model.generate_batch(
                inputs,
                generation_config=GenerationConfig(max_new_tokens=answered, do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE, num_blocks=blocks, max_batch_tokens=1024
                ),
                persistent_manager=True,
            )
            past = [prompt + result.generated_tokens for prompt, result in zip(inputs, results.values(), strict=True)]
        ended = counted(serving)
    model.destroy_cached_continuous_batching_manager()
    cpu, computed, steps, preemptions = (after - before for after, before in zip(ended, begun, strict=True))
    return {
        "settings_of_kara": kara,
        "cpu_seconds": cpu,
        "read": int(computed) - conversations * (turns - 1) * (answered - 1),
        "steps": int(steps),
        "preemptions": int(preemptions),
        "weights": digest(TINY),
    }


def counted(serving: Any) -> tuple[float, int, int, int]:
    """Time of the CPU, and what an engine has done: tokens computed, steps, preemptions."""
    metrics = getattr(serving, "metrics", serving)
    return time.process_time(), metrics.computed_tokens, metrics.steps, metrics.preemptions
