"""The kit's methods in lm-evaluation-harness: the model ``kara_hf``, which answers generate_until tasks.

    python -m kara_hf.evaluation.harness run --model kara_hf --tasks gsm8k_cot --batch_size 8 \\
        --model_args pretrained=Qwen/Qwen3-0.6B,method=kara,budget=0.25,window=256,recent=32

The harness knows a model by name once its class is imported: this command is its own, with all its options, behind
that import. From Python it is ``lm_eval.simple_evaluate(model=KaraLM("Qwen/Qwen3-0.6B", budget=0.25), tasks=[...])``.
The harness's `--use_cache` does not tell models apart, so give every method a file of its own there.
"""

from dataclasses import fields, replace
from typing import Any

import torch

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("lm-evaluation-harness cannot be imported; run: pip install 'kara_hf[harness]'") from error

from ..config import is_number, require
from ..integration.adapter import load_adapter
from ..integration.generation import check_used, for_generate, greedy, only
from ..methods.registry import METHODS, Method, Plan, SharedSettings, make_method, needs_of
from ..methods.rules import SINGLE_TEXT_RULES, rule_named
from ..needs import check_needs
from ..policy.sharing import PoDSharing
from .measure.memory import held_bytes

SHARED = {field.name for field in fields(SharedSettings)}


def make_plan(
    method: Method, budget: float | None, rule: str | None, seed: int, sharing: str | None, shared: SharedSettings
) -> Plan:
    """What the caches of `method` are made for, the prompts apart.

    Raises:
        ValueError: an argument is missing, not possible, or not for this method.
    """
    name = method.name
    require(not method.oracle, "method", name, "one that does not have to know the answer before it is given")
    what = "the folder of a sharing map" if method.shares else "left out"
    require((sharing is not None) == method.shares, "sharing", sharing, f"{what} with method {name!r}")
    rule = None if rule is None else rule_named(rule)
    if method.budgeted:
        possible = budget is not None and is_number(budget) and 0 < budget <= 1
        require(possible, "budget", budget, f"a share in (0, 1] with method {name!r}")
        require(rule is None or rule in SINGLE_TEXT_RULES, "rule", rule, f"one of {', '.join(SINGLE_TEXT_RULES)}")
    else:
        for setting, value in (("budget", budget), ("rule", rule)):
            require(value is None, setting, value, f"left out with method {name!r}, which has no budget")
    return Plan(
        shared,
        rule=(rule or SINGLE_TEXT_RULES[0]) if method.budgeted else "none",
        share=1.0 if budget is None else budget,
        prompts=[],
        seed=seed,
        sharing=None if sharing is None else PoDSharing.from_pretrained(sharing),
    )


@register_model("kara_hf")
class KaraLM(HFLM):
    """A causal LM of Transformers that answers with the cache of one method, a new one for every batch.

    Args:
        pretrained: hub id or folder, as for the harness's model ``hf``.
        method: a name that `kara_hf.methods.registry.make_method` knows.
        budget: share of the tokens that is kept, in (0, 1]; for methods that have one.
        rule: "prompt-kept" (whole) or "query-aware" (it is compressed, too); for methods with a budget.
        seed: of what is random in the method.
        sharing: folder of a sharing map, for methods with PoD.
        settings: fields of `kara_hf.methods.registry.SharedSettings`, and what ``hf`` takes.

    Raises:
        ValueError: there is no such method, or an argument is missing, not possible, or not for this method.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str = "kara",
        budget: float | None = None,
        rule: str | None = None,
        seed: int = 0,
        sharing: str | None = None,
        **settings: Any,
    ):
        shared = SharedSettings(**{name: settings.pop(name) for name in SHARED & settings.keys()})
        check_needs({method: needs_of(method)})
        self.method = make_method(method)
        self.plan = make_plan(self.method, budget, rule, seed, sharing, shared)
        self._held: list[float] = []
        super().__init__(pretrained, **settings)
        if sharing is not None:
            load_adapter(self.model, sharing, self.plan.sharing)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: also the bytes of a sequence's cache at the end of its answer."""
        info: dict[str, Any] = super().get_model_info()
        return info | ({"cache_bytes": round(sum(self._held) / len(self._held))} if self._held else {})

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Ids ``[B, S + new]`` from those of prompts ``[B, S]``, left-padded.

        Of the model's own `generation_config` only the end tokens count; what the task asks for comes on top.
        """
        prompts = generation_kwargs["attention_mask"].sum(1).tolist()
        cache = self.method.make(self.model, replace(self.plan, prompts=prompts))
        with only(self.model, greedy(self.model, self.tokenizer)):
            out = super()._model_generate(context, max_length, stop, **for_generate(cache), **generation_kwargs)
        ids = check_used(self.model, cache, out)
        self._held += len(prompts) * [held_bytes(cache) / len(prompts)]
        return ids

    def _loglikelihood_tokens(self, *arguments: Any, **settings: Any) -> Any:
        if self.method is not METHODS["full"]:
            raise ValueError(
                f"method={self.method.name!r} is not possible for loglikelihood and multiple-choice tasks: the "
                "harness scores a whole text in one forward pass, which reads no cache, so nothing would be "
                "compressed; choose generate_until tasks, or method=full"
            )
        return super()._loglikelihood_tokens(*arguments, **settings)


if __name__ == "__main__":
    cli_evaluate()
