"""Many requests in little memory: Transformers' continuous batching with Kara inside, beside the engine alone.

python examples/serve.py
python examples/serve.py --model Qwen/Qwen3-4B --prompts prompts.txt --blocks 2000 --retention 0.25
torchrun --nproc-per-node 2 examples/serve.py      # tensor parallel
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.serving import kara_continuous_batching
from kara_hf.tasks.reasoner import make_problem


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = str(BUNDLED_MODEL),
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line [default: 16 problems].")] = None,
    retention: Annotated[float, typer.Option(help="Share of a window that is kept.")] = 0.25,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 64,
    score: Annotated[str, typer.Option(help="What ranks the tokens of a window.")] = "key-difference",
    blocks: Annotated[int, typer.Option(help="Blocks of 16 tokens in the pool.")] = 120,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 400,
) -> None:
    """Answers the prompts with everything kept and with a share, from the same pool of blocks."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, tp_plan="auto" if processes > 1 else None).eval()
    if prompts is None:
        texts = [make_problem("trace", generated=300, seed=70_000 + i).prompt for i in range(16)]
    else:
        texts = prompts.read_text().splitlines()
    inputs = [tokenizer(text)["input_ids"] for text in texts]
    for share in (1.0, retention):
        with kara_continuous_batching(network, retention=share, window=window, score=score, period=16) as serving:
            results = network.generate_batch(
                inputs,
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=16, num_blocks=blocks, max_batch_tokens=512
                ),
            )
        if os.environ.get("RANK", "0") == "0":
            metrics = serving.metrics
            print(
                f"retention {share}: {len(results)} answers in {metrics.steps} steps, {metrics.mean_running:.1f} at "
                f"once, {metrics.preemptions} preempted, {metrics.evicted_tokens} tokens evicted"
            )


if __name__ == "__main__":
    typer.run(main)
