"""Read once, ask many: a text is compressed into a file, and questions are asked from it, all at once.

python examples/ask_many.py
python examples/ask_many.py --model Qwen/Qwen3-4B --text book.txt --question "Who is ...?" --question "Where is ...?"
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from kara_hf import CompressedCache, KaraCache
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.integration.generation import for_forward, generate, greedy
from kara_hf.integration.loading import LoadedModel
from kara_hf.tasks.reasoner import make_problem

# What the bundled model is asked: what stands behind each of these words in a text.
TEXT, *_ = make_problem("recall", length=300, seed=1).prompt.partition("? recall")
QUESTIONS = [f"? recall {word} >" for word in ("k03", "k04", "k07", "k28")]


def read(loaded: LoadedModel, text: str, retention: float, file: Path) -> None:
    """Reads the text once, and writes what is kept of it."""
    cache = KaraCache(loaded.model, retention=retention, window=64, recent=32, compress_prompt=True)
    with torch.inference_mode():
        loaded.model(loaded.encode_text(text, chat=True), **for_forward(loaded.model, cache))
    cache.save(file)


def ask(loaded: LoadedModel, questions: list[str], file: Path, max_new_tokens: int) -> list[str]:
    """The answers to questions about the text, from one cache that is forked: its blocks are shared by all."""
    cache = CompressedCache.load(file, loaded.model)
    cache.batch_repeat_interleave(len(questions))
    asked = [loaded.encode_question(question, chat=True)[0] for question in questions]
    longest = max(len(ids) for ids in asked)
    ids = torch.zeros(len(asked), cache.columns + longest, dtype=torch.long, device=loaded.device)
    mask = torch.ones_like(ids)
    for row, question in enumerate(asked):  # padding is between the text and a shorter question
        ids[row, ids.shape[1] - len(question) :] = question
        mask[row, cache.columns : ids.shape[1] - len(question)] = 0
    config = greedy(loaded.model, loaded.tokenizer, max_new_tokens=max_new_tokens)
    out = generate(loaded.model, cache, config, input_ids=ids, attention_mask=mask)
    return [text.strip() for text in loaded.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = str(BUNDLED_MODEL),
    text: Annotated[Path | None, typer.Option(help="Text file [default: lines that the bundled model knows].")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Repeat it to ask several.")] = None,
    retention: Annotated[float, typer.Option(help="Share of every window that is kept.")] = 0.5,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 32,
    out: Annotated[Path, typer.Option(help="File of the cache.")] = Path("text.safetensors"),
) -> None:
    """Compress a text into a file, and answer questions about it from there."""
    loaded = LoadedModel(model)
    read(loaded, text.read_text() if text else TEXT, retention, out)
    questions = question or QUESTIONS
    for asked, answer in zip(questions, ask(loaded, questions, out, max_new_tokens), strict=True):
        print(f"{asked}\n    {answer}")


if __name__ == "__main__":
    typer.run(main)
