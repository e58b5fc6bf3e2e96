"""What adaptation leaves in a folder: an adapter or a model, the sharing map, its settings and a model card."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..integration.attach import unwrap
from ..integration.shape import model_name
from ..policy.sharing import PoDSharing
from .config import AdaptConfig

if TYPE_CHECKING:
    from peft import PeftModel

SETTINGS = "pod_adapt.json"
METRICS = "metrics.jsonl"
LOGS = "logs"

STATES = {
    "unshared": "base model, nothing shared",
    "shared": "base model, keys shared",
    "adapted": "adapted model, keys shared",
}


def write(
    folder: Path,
    model: "PreTrainedModel | PeftModel",
    sharing: PoDSharing,
    config: AdaptConfig,
    measured: dict[str, float],
    weights: dict[str, torch.Tensor] | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Writes everything; the model's files in the standard form of PEFT or Transformers.

    Args:
        weights: the state of `model`, where it was sharded over processes and had to be gathered.
        measured: mean losses of held-out tokens by the state that the model was in.
        tokens: trained on.
    """
    options: dict[str, Any] = {"state_dict": weights}
    if config.rank:
        options["save_embedding_layers"] = False  # they are not trained, and asking whether they were asks a hub
    model.save_pretrained(str(folder), **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    sharing.save_pretrained(folder)
    settings = {
        "kara_hf": __version__,
        "base_model": model_name(unwrap(model)),
        "config": asdict(config),
        "tokens": tokens,
        "held_out_loss": measured,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "README.md").write_text(card(model_name(unwrap(model)), sharing, config, measured, tokens))


def card(base: str, sharing: PoDSharing, config: AdaptConfig, measured: dict[str, float], tokens: int) -> str:
    """A model card that says what was done and measured, and leaves the rest to its author."""
    title = base.rpartition("/")[2] or "A model"
    load = ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    if config.rank:
        load = [
            f'base = AutoModelForCausalLM.from_pretrained("{base or "base"}")',
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    head = ["---", f"library_name: {'peft' if config.rank else 'transformers'}"]
    head += [f"base_model: {base}"] if "/" in base else []
    head += ["pipeline_tag: text-generation", "tags:", "- kara_hf", "- pod", "- kv-cache", "---"]
    how = f"LoRA of rank {config.rank}" if config.rank else "all weights"
    loss = f"{config.distill:g} KL divergence from the base model + {1 - config.distill:g} cross-entropy"
    rows = [
        f"| {what} | {measured[state]:.4f} | {math.exp(measured[state]):.4g} |"
        for state, what in STATES.items()
        if state in measured
    ]
    table = ["| | loss of a held-out token | perplexity |", "|---|---|---|", *rows] if rows else []
    return "\n".join(
        [
            *head,
            "",
            f"# {title}, adapted to share keys between layers",
            "",
            f"{sharing.followers_share:.0%} of the (layer, KV head) pairs of this model store keys of the first "
            f"{sharing.sinks:,} and the newest {sharing.recent:,} tokens only; for tokens between them they use the "
            'keys of another layer (PoD, "Compressing KV Cache for Long-Context LLM Inference with Inter-Layer '
            'Attention Similarity", arXiv 2412.02252). `pod_sharing.json` says whose.',
            "",
            f"Trained: {how}, {config.steps:,} steps, {tokens:,} tokens; loss: {loss}. All settings are in "
            f"`{SETTINGS}`.",
            "",
            *table,
            *([""] if table else []),
            "```python",
            "from kara_hf import PoDCache, PoDSharing",
            *(["from peft import PeftModel"] if config.rank else []),
            "from transformers import AutoModelForCausalLM",
            "",
            *load,
            "cache = PoDCache(model, PoDSharing.from_pretrained(folder))",
            "model.generate(**inputs, cache=cache)  # past_key_values=cache where Transformers does not know it yet",
            "```",
            "",
        ]
    )


def push(folder: Path, repo_id: str) -> None:
    """Uploads what `write` wrote to a model repository, which is created if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[METRICS, f"{LOGS}/**"])
