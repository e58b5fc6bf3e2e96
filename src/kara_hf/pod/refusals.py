"""What adaptation needs and what it cannot do, found out before anything is changed."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import get_token
from transformers import PreTrainedModel

from ..config import require
from ..integration.attach import decoder_config, unwrap
from ..integration.shape import layer_kinds, model_shape
from ..needs import Check, Need, Package, extra
from ..policy.sharing import PoDSharing
from ..probing.data import needs_of
from .config import AdaptConfig
from .samples import Sample, Start, ids_of
from .student import lora_targets

TRACKERS = {"none": "", "tensorboard": "tensorboard|tensorboardX", "trackio": "trackio"}


def needs_of_adaptation(
    config: AdaptConfig,
    data: str | Sequence[Sample] | Start,
    output: Path,
    log: str = "none",
    push_to_hub: str | None = None,
) -> list[Need]:
    """What `adapt` needs, with arguments as there: packages, files, a folder to write to, a login to the hub.

    Raises:
        ValueError: there is no such tracker.
    """
    require(log in TRACKERS, "log", log, f"one of {', '.join(TRACKERS)}")
    needs: list[Need] = [Package("accelerate", extra("train"))]
    needs += [Package("peft", extra("train"))] if config.rank else []
    needs += [Package(TRACKERS[log], f"pip install {log}")] if TRACKERS[log] else []
    needs += needs_of(data) if isinstance(data, str) else []
    needs += [Check(lambda: check_folder("teacher", Path(str(config.teacher))))] if config.teacher is not None else []
    return [*needs, Check(lambda: check_folder("output", output)), Check(lambda: check_login(push_to_hub))]


def check_folder(name: str, folder: Path) -> None:
    """Raises ValueError if `folder` is something else than a folder."""
    require(folder.is_dir() or not folder.exists(), name, str(folder), "a folder, or the name of a new one")


def check_login(push_to_hub: str | None) -> None:
    """Raises ValueError if something is to be uploaded and nobody is logged in."""
    if push_to_hub is not None and get_token() is None:
        raise ValueError(
            f"push_to_hub={push_to_hub!r} is not possible: nobody is logged in to the hub; run: hf auth login, or set "
            "HF_TOKEN"
        )


def check_model(model: PreTrainedModel, sharing: PoDSharing, config: AdaptConfig) -> None:
    """Raises ValueError if `model` cannot be taught this sharing, or there is nothing to teach."""
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters of PEFT already; merge them first (model = model.merge_and_unload()) or take them "
            "out (model = model.unload())"
        )
    decoder = decoder_config(unwrap(model))
    sharing.check(model_shape(decoder), layer_kinds(decoder))
    if not sharing.followers_share:
        raise ValueError(
            "this sharing has no followers: every layer uses its own keys, and there is nothing to learn; make one "
            "with `kara-hf pod explore`, with a lower threshold"
        )
    dropout = getattr(decoder, "attention_dropout", None)
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not possible where layers share keys; set model.config.attention_dropout=0"
        )
    if config.rank:
        lora_targets(model, config.targets)


def check_dtype(model: PreTrainedModel) -> None:
    """Raises ValueError if weights that are trained are in half precision."""
    half = {weight.dtype for weight in model.parameters() if weight.requires_grad} - {torch.float32, torch.float64}
    if half:
        raise ValueError(
            f"training all weights in {', '.join(map(str, half))} is not possible: small steps would be rounded away; "
            "load the model with dtype=torch.float32, and set precision='bf16' to compute in bfloat16"
        )


def longest_of(data: Sequence[Sample] | Start) -> int:
    """Tokens of the longest sample; of the first where a function gives them. 0 if there are none."""
    known = islice(data(0), 1) if callable(data) else data
    return max((len(ids_of(sample)) for sample in known), default=0)


def check_length(longest: int, sharing: PoDSharing, model: PreTrainedModel) -> None:
    """Raises ValueError if no sample has a token that is distant to a query, or one has more tokens than positions."""
    if longest < sharing.proximal + 2:  # the first query with a distant token, and the token that it predicts
        raise ValueError(
            f"samples of {longest:,} tokens are not possible: with sinks={sharing.sinks:,} and recent="
            f"{sharing.recent:,} only samples of {sharing.proximal + 2:,} tokens or more have any for which keys are "
            "shared; take longer samples, several times as long, or a sharing with a lower recent"
        )
    limit = getattr(decoder_config(unwrap(model)), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"samples of {longest:,} tokens are not possible: the model has {limit:,} positions; take shorter ones"
        )
