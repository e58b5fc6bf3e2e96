"""Every causal language model of the installed Transformers in miniature, and what kara_hf's caches do with it.

`check` says of one class, for each attention implementation that it has: whether each cache gives the logits of
`DynamicCache` or refuses with its reason, and whether making, using and dropping a cache changes anything for others.
"""

import contextlib
import copy
import gc
import importlib
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from support.architectures import _enliven
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.generation import utils as generation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import getattribute_from_module
from transformers.models.auto.configuration_auto import model_type_to_module_name

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing

from .tiny_configs import shrink

MAPPINGS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "images": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
CACHE_ARGUMENT = "cache" if "cache" in getattr(generation, "ALL_CACHE_NAMES", ()) else "past_key_values"
IMPLEMENTATIONS = ("sdpa", "eager")
PROMPT, NEW, TURN, PADDING = 20, 28, 5, 7
# Largest difference from the logits of DynamicCache that counts as rounding, as a share of the largest logit.
TOLERANCE = 1e-4
MOST_PARAMETERS = 10**8


def classes() -> dict[str, tuple[str, str]]:
    """Class name -> its kind ("text", "images") and one model type that Transformers maps to it."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, name in mapping.items():
            found.setdefault(name, (kind, model_type))
    return found


def model_class(name: str) -> type[PreTrainedModel]:
    _, model_type = classes()[name]
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattribute_from_module(module, name)


def build(name: str, implementation: str, seed: int = 0) -> PreTrainedModel:
    """The named class in miniature, float32, in eval mode; weights depend on `seed` alone.

    Raises:
        ValueError: it has no such attention implementation, or is not small. Otherwise whatever Transformers raises.
    """
    model_type = model_class(name)
    if implementation == "sdpa" and not model_type._supports_sdpa:
        raise ValueError(f"{name} has no sdpa attention")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        size = sum(p.numel() for p in model_type._from_config(shrink(model_type.config_class)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left in the miniature of {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = shrink(model_type.config_class)
        model = model_type._from_config(config, dtype=torch.float32, attn_implementation=implementation)
        with contextlib.suppress(NotImplementedError):  # a model that has no input embedding, at the last step
            _enliven(model)
        _enliven_rest(model)
    if not hasattr(model, "generation_config") or model.generation_config is None:
        model.generation_config = GenerationConfig()
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    settings.bos_token_id, settings.pad_token_id, settings.max_length = 1, 0, None
    return model.eval()


@torch.no_grad()
def _enliven_rest(model: PreTrainedModel) -> None:
    """Redraws matrices that are no `Linear`, `Embedding` or expert and were left next to zero."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and 0 < parameter.std() < 0.05:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


# ----------------------------------------------------------------------------------------------------------- generating
class _Forced(LogitsProcessor):
    """Makes generation take given tokens, whatever the model says."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.tokens[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def _ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def _follow(model: PreTrainedModel, cache: Any, text: torch.Tensor, start: int, mask: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, S, V]`` of every token of `text` from `start` on, each decoded as a step of its own."""
    out = GenerationMixin.generate(
        model,
        text[:, :start],
        attention_mask=mask[:, :start],
        max_new_tokens=text.shape[1] - start,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[_Forced(text[:, start:], start)],
        **({} if cache is None else {CACHE_ARGUMENT: cache}),
    )
    return torch.stack(out.logits, dim=1).float()


def conversation(model: PreTrainedModel, make: Callable[[], Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Logits of a prompt's answer and of the answer to a later turn, alone and in a left-padded batch, part by part."""
    for batch, new in ((1, NEW), (2, NEW // 3)):
        cache, length = make(), PROMPT + new
        text = _ids(batch, length + TURN + 3, seed=batch)
        mask = torch.ones_like(text)
        text[1:, :PADDING] = mask[1:, :PADDING] = 0
        where = " of a padded batch" if batch > 1 else ""
        yield "answer" + where, _follow(model, cache, text[:, :length], PROMPT, mask[:, :length])
        yield "turn" + where, _follow(model, cache, text, length + TURN, mask)


# ------------------------------------------------------------------------------------------------------------- checking
def _no_sharing(model: PreTrainedModel) -> PoDSharing:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    return PoDSharing.none(getattr(config, "num_hidden_layers", 1), heads, sinks=2, recent=6)


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "kara": lambda model: KaraCache(model, retention=1.0, window=16, recent=8, block_size=8),
    "kv_compress": lambda model: KVCompressCache(model, retention=1.0, protected=8, block_size=8),
    "pod": lambda model: PoDCache(model, _no_sharing(model), block_size=8),
}


@dataclass
class Reference:
    """What DynamicCache gave: logits of each part of the conversation, or why there are none."""

    parts: dict[str, torch.Tensor]
    failure: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reference":
        parts: dict[str, torch.Tensor] = {}
        try:
            for part, logits in conversation(model, lambda: DynamicCache(config=model.config)):
                parts[part] = logits
        except Exception as error:
            return cls(parts, _named(error))
        return cls(parts)


def outcome(model: PreTrainedModel, make: Callable[[PreTrainedModel], Any], reference: Reference) -> str:
    """ "exact", "refused: reason", or what is wrong: "differs: ...", "fault: ..."."""
    made: list[Any] = []

    def one() -> Any:
        made.append(make(model))
        return made[-1]

    try:
        for part, logits in conversation(model, one):
            if part not in reference.parts:
                return f"fault: goes on with the {part}, where DynamicCache does not ({reference.failure})"
            expected = reference.parts[part]
            off = (logits - expected).abs().max().item()
            if not off <= TOLERANCE * expected.abs().max().item():
                return f"differs: by {off:.2g} of {expected.abs().max().item():.2g} in the {part}"
    except Exception as error:
        if reference.failure and reference.failure == _named(error):
            return f"as DynamicCache: {reference.failure}"
        return _failure(error, made)
    layers, before = len(made[0].layers), len(DynamicCache(config=model.config).layers)
    return "exact" if layers == before else f"fault: the model made {layers} layers of the cache's {before}"


def _failure(error: Exception, made: list[Any]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = "/kara_hf/" in frames[-1].filename
    where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"
    if not (ours and isinstance(error, ValueError | NotImplementedError | RuntimeError | TypeError)):
        return f"fault: {type(error).__name__}: {_line(error)} at {where}"
    if made and made[-1].report().seen.tolist():
        return f"fault: refused after something was stored: {_line(error)} at {where}"
    return f"refused: {_line(error)}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ------------------------------------------------------------------------------------------------------ being invisible
def _computed(model: PreTrainedModel) -> dict[str, Any]:
    """What a model computes for somebody who has none of our caches, and the settings it shows."""
    ids = _ids(2, 12, seed=3)
    mask = torch.ones_like(ids)
    return {
        "no cache": _tried(lambda: [model(input_ids=ids, attention_mask=mask, use_cache=False).logits]),
        "DynamicCache": _tried(lambda: [_follow(model, DynamicCache(config=model.config), ids, 8, mask)]),
        "name of the attention implementation": _names(model),
        "saved config": model.config.to_json_string(use_diff=False),
    }


def _computed_last(model: PreTrainedModel) -> dict[str, Any]:
    """What leaves a mark on the model by itself: hooks that capture attentions, an engine that failed."""

    def attentions() -> list[torch.Tensor]:
        out = model(input_ids=_ids(2, 12, seed=3), output_attentions=True, use_cache=False)
        return [out.logits, *(x for x in getattr(out, "attentions", None) or () if x is not None)]

    return {"attentions": _tried(attentions), "generate_batch": _tried(lambda: _batched(model))}


@torch.no_grad()
def _tried(compute: Callable[[], Any]) -> Any:
    """What it gives, or its error as text."""
    torch.manual_seed(0)
    try:
        return compute()
    except Exception as error:
        return _named(error)


def _batched(model: PreTrainedModel) -> list[list[int]]:
    """Tokens of Transformers' engine for two prompts. What it leaves behind when it fails is taken back."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    names = [getattr(config, "_attn_implementation", None) for config in configs]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    pool = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=32)
    ids = _ids(2, 10, seed=5).tolist()
    try:
        out = model.generate_batch(ids, generation_config=settings, continuous_batching_config=pool)
    finally:
        for config, name in zip(configs, names, strict=True):
            if getattr(config, "_attn_implementation", None) != name:
                config._attn_implementation = name
    return [answer.generated_tokens for answer in out.values()]


def _names(model: PreTrainedModel) -> list[str | None]:
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [getattr(config, "_attn_implementation", None) for config in configs.values()]


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """What is written on a model and on a pickled copy of it, and what Transformers has registered."""

    def marks(model: PreTrainedModel) -> list[Any]:
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        return [_names(model), hooks, {path: sorted(vars(module)) for path, module in model.named_modules()}]

    return {
        "attributes or hooks": marks(model),
        "pickle": _tried(lambda: marks(pickle.loads(pickle.dumps(model)))),
        "registered attention functions": dict(ALL_ATTENTION_FUNCTIONS),
        "registered mask functions": dict(ALL_MASK_ATTENTION_FUNCTIONS),
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, list) and isinstance(after, list) and before and isinstance(before[0], torch.Tensor):
        return len(before) == len(after) and all(map(_equal, before, after))
    return type(before) is type(after) and before == after


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def _changes(before: dict[str, Any], after: dict[str, Any], when: str) -> list[str]:
    return [f"{what} {when}" for what in before if not _same(before[what], after[what])]


def visible(model: PreTrainedModel, make: Callable[[PreTrainedModel], Any]) -> list[str]:
    """What somebody without a cache of ours can see of one that is made, used and dropped: nothing, it should be."""
    last = _computed_last(copy.deepcopy(model))
    computed, state = _computed(model), _state(model)
    found: list[str] = []
    try:
        cache = make(model)
    except Exception:  # refused: that must leave no trace either
        cache = None
    else:
        found += _changes(computed, _computed(model), "while a cache lives")
        ids = _ids(1, 12, seed=4)
        with contextlib.suppress(Exception):  # `outcome` judges that
            _follow(model, cache, ids, 8, torch.ones_like(ids))
        found += _changes(computed, _computed(model), "while a used cache lives")
    del cache
    gc.collect()
    found += _changes(computed, _computed(model), "after the last cache")
    found += _changes(state, _state(model), "after the last cache")
    found += _changes(last, _computed_last(model), "after the last cache")
    return sorted(set(found))


def check(name: str, implementations: tuple[str, ...] = IMPLEMENTATIONS) -> dict[str, Any]:
    """Everything about one class, as its row of the result.

    All caches are tried under the first of `implementations` that the class has, and `KaraCache` under the other:
    caches differ behind the attention function, not in front of it.

    Returns:
        "kind", "model_type", and either "not_built" with the reason, or "layers" (Transformers' own cache layers) and
        for each implementation "reference" (why DynamicCache fails; "" if it does not), the outcome of each cache, and
        "visible" (a list).
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind, _ = classes()[name]
    row: dict[str, Any] = {"kind": kind, "model_type": model_class(name).config_class.model_type}
    reasons: list[str] = []
    caches = tuple(CACHES)
    for implementation in implementations:
        try:
            model = build(name, implementation)
        except Exception as error:
            reasons.append(_named(error))
            continue
        row.setdefault("layers", _layer_types(model))
        row[implementation] = _judged(model, caches)
        caches = caches[:1]
    return row if "layers" in row else row | {"not_built": reasons[-1]}


def _judged(model: PreTrainedModel, caches: tuple[str, ...]) -> dict[str, Any]:
    reference = Reference.of(model)
    seen = visible(model, CACHES[caches[0]])
    outcomes = {name: outcome(model, CACHES[name], reference) for name in caches}
    return {"reference": reference.failure, **outcomes, "visible": seen}


def _layer_types(model: PreTrainedModel) -> list[str]:
    """Transformers' own cache layers for this model."""
    try:
        return [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    except Exception as error:
        return [_named(error)]
