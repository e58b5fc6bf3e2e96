"""What a pass asks of a press, and how the inputs of attention modules get there."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..cache.bound_model import BoundModel
from ..cache.budget_compression import BudgetCompression
from ..cache.layer import CompressedLayer
from ..cache.pending_queries import PendingQueries
from ..cache.sequence import Sequence
from ..cache.state import CacheState
from ..cache.step import Step
from ..config import KVCompressConfig, Pins
from ..kernels import softcapped
from ..policy import Eviction, KVCompressPolicy
from ..storage import MemoryMeter


class Press(Protocol):
    """What is asked of a press: kvpress's `ScorerPress` without the rest of it."""

    compression_ratio: float

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """What tokens are worth, ``[1, H, T]``, larger is better kept.

        Args:
            module: the attention module. While it is asked, its `rotary_emb` is that of the model.
            hidden_states: ``[1, n, D]``, inputs of the module for the newest n <= T tokens; for a prompt all.
            keys: ``[1, H, T, Dk]``, stored, after RoPE, in the order of true positions.
            values: ``[1, H, T, Dv]``.
            attentions: probabilities ``[1, Hq, n, T]`` of the newest n queries, where they were asked for.
            kwargs: "position_embeddings", cosine and sine ``[1, n, Dr]`` of the same n tokens, if the model has them.
        """


class PressPolicy(KVCompressPolicy):
    """`KVCompressPolicy` whose tokens are ranked by a press, and not by votes.

    Args:
        config: the settings; of those of the metric none is read.
        press: asked for scores; its `compression_ratio` is another for that long.
        protected: newest tokens that are never evicted, from 0 on, in place of the setting.
        observation: newest hidden states held while decoding; None: of no token, not even of a prompt.
        attentions: whether the press is given attention probabilities.

    Attributes:
        listener: what hands over the inputs of attention modules, once there is a model.
    """

    def __init__(
        self, config: KVCompressConfig, press: Press, *, protected: int, observation: int | None, attentions: bool
    ):
        super().__init__(config)
        self.press, self.protected = press, protected
        self.observation, self.attentions = observation, attentions
        self.listener: Listener | None = None

    @property
    def votes(self) -> bool:
        return False

    def safe(self, tokens: int, pins: Pins) -> int:
        return self.protected

    def __deepcopy__(self, memo: dict[int, Any]) -> "PressPolicy":
        return self  # a press may hold a model of its own


@dataclass
class Arrival:
    """What an attention module was called with: hidden states ``[B, S, D]`` and, if given, cosine and sine."""

    module: torch.nn.Module
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None


class Listener:
    """Hooks on a model's attention modules that leave the inputs of a forward with the `PressCache` that it uses.

    They go at the first forward after the last copy of that cache is gone, or after the model was detached: not before,
    because caches are collected at any time, and torch does not let hooks be removed while it is about to call them.

    Args:
        model: their owner, held weakly.
        binding: of the cache.
    """

    def __init__(self, model: torch.nn.Module, binding: BoundModel):
        handles: list[Any] = []
        alive = weakref.ref(self)

        def hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if alive() is None or not binding.answers:
                while handles:
                    handles.pop().remove()
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            # Some versions and models call the cache's argument `cache`, others `past_key_values`.
            used = (getattr(argument, "compression", None) for argument in (*args, *kwargs.values()))
            compression = next((each for each in used if isinstance(each, PressCompression)), None)
            if compression is not None and isinstance(hidden, torch.Tensor):
                compression.arrival = Arrival(module, hidden.detach(), kwargs.get("position_embeddings"))

        for module in model.modules():
            if sum(hasattr(part, "layer_idx") for part in module.modules()) == 1 and hasattr(module, "layer_idx"):
                handles.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))
        rotary = (getattr(module, "rotary_emb", None) for module in model.modules())
        found = next((module for module in rotary if isinstance(module, torch.nn.Module)), None)
        self._rotary = None if found is None else weakref.ref(found)

    @property
    def rotary(self) -> torch.nn.Module | None:
        """The module that makes cosine and sine of positions, if the model has one."""
        return None if self._rotary is None else self._rotary()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Listener":
        return self


class Inputs(PendingQueries):
    """What a press reads of a layer's newest tokens beside keys and values, in order, ``[B, 1, n, E]``.

    Hidden state, cosine, sine and, where they are asked for, queries lie side by side. All of a prompt or turn that is
    not cut yet is held, later the newest.
    """

    def __init__(self, meter: MemoryMeter):
        super().__init__(meter)
        self.module: weakref.ref[torch.nn.Module] | None = None
        self.widths: list[int] = []

    def parts(self, sequence: int) -> list[torch.Tensor] | None:
        """The parts side by side of one sequence, each ``[1, n, *]``; None if nothing is held."""
        held = self.of(sequence)
        return None if held is None else list(held.split(self.widths, dim=-1))

    def trim(self, window: int) -> None:
        """Lets go of all but the newest `window`."""
        if window == 0:
            self.close()
        elif self.queries is not None and self.valid is not None:
            self.add(self.queries[:, :, :0], self.valid[:, :0], window)
            self.commit(0)

    def crop(self, tokens: np.ndarray) -> None:
        self.undecided = max(0, self.undecided - int(tokens.max()))
        if self.valid is not None:
            behind = self.valid.sum(1, keepdim=True) - self.valid.cumsum(1)
            self.valid &= behind >= torch.from_numpy(tokens).to(behind.device)[:, None]


class PressCompression(BudgetCompression):
    """`kara_hf.cache.budget_compression.BudgetCompression` of tokens that a press ranks, anew in every pass."""

    policy: PressPolicy

    def __init__(self, state: CacheState, policy: PressPolicy):
        super().__init__(state, policy)
        self.arrival: Arrival | None = None
        self.left = np.zeros(0, np.int64)

    def layer_state(self) -> Inputs:
        return Inputs(self.state.meter)

    def stored(
        self, layer: CompressedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None
    ) -> None:
        super().stored(layer, step, query, key, present)
        arrival, self.arrival, state = self.arrival, None, layer.state
        if arrival is None or getattr(arrival.module, "layer_idx", None) != layer.index:
            raise RuntimeError(
                f"the hidden states of layer {layer.index} of {self.state.binding.name} did not reach the cache: the "
                "model was detached since the cache was made, or does not pass them to its attention together with the "
                "cache; make a new PressCache, or use another model"
            )
        state.module = weakref.ref(arrival.module)
        window = self.policy.observation if self.decoding else self.state.columns + step.new  # more than are held
        if not window or self.policy.observation is None or not self.policy.compresses:
            return
        parts = [arrival.hidden_states, *(arrival.position_embeddings or ())]
        if self.policy.attentions:
            parts.append(query.transpose(1, 2).flatten(2))
        if any(part.ndim != 3 for part in parts):
            raise ValueError(
                f"position embeddings {[tuple(part.shape) for part in parts[1:3]]} of {self.state.binding.name} are "
                "nothing that presses can read; expected [B, S, D]"
            )
        state.widths = [part.shape[-1] for part in parts]
        inputs = torch.cat([part.expand(len(query), -1, -1) for part in parts], dim=-1)
        state.add(inputs[:, None], None if step.real is None else step.real.to(inputs.device), window)

    def done(self, step: Step) -> list[Sequence]:
        for layer in self.state.compressed_layers:
            layer.state.commit(0 if self.decoding else step.new)
        return step.after

    def _pass(self, ahead: int, counted: int) -> None:
        super()._pass(ahead, counted)
        for layer in self.state.compressed_layers:
            layer.state.trim(self.policy.observation or 0)

    @property
    def _rows_are_apart(self) -> bool:
        return False  # what all rows are left with is counted before the first is scored

    def _count_votes(self, layers: list[CompressedLayer], sequences: list[Sequence]) -> list[Sequence]:
        return sequences  # what the newest tokens say is asked in `_ranked`

    def _rank(self, lengths: np.ndarray, tokens: np.ndarray, quota: np.ndarray) -> Eviction:
        blocks = -(-lengths // self.block_size)
        # Tokens that a row is left with, on average; 0 in a sequence that loses none, which is not scored.
        self.left = np.where(quota > 0, (blocks.sum(1) - quota) // lengths.shape[1] * self.block_size, 0)
        return super()._rank(lengths, tokens, quota)

    def _ranked(self, layer: CompressedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        metric, positions = super()._ranked(layer)
        metric = torch.zeros_like(metric)
        for sequence in np.flatnonzero(self.left):
            self._score_into(metric[sequence], layer, int(sequence))
        return metric, positions

    def _score_into(self, metric: torch.Tensor, layer: CompressedLayer, sequence: int) -> None:
        """Writes scores to the `metric` ``[H, N]`` of one sequence, in slot order.

        A press takes as many tokens of every head. Heads of one length are scored together, in the place of all others
        the first of them.
        """
        lengths = layer.stored().lengths[sequence]
        rows = [layer.stored().read(sequence, head) for head in range(len(lengths))]
        orders = [positions.argsort() for _, _, positions in rows]
        for length in np.unique(lengths[lengths > 0]):
            heads = np.flatnonzero(lengths == length)
            chosen = [head if lengths[head] == length else heads[0] for head in range(len(lengths))]
            keys, values, positions = (
                torch.stack([rows[head][part][orders[head]] for head in chosen])[None] for part in range(3)
            )
            scores = self._ask(layer, sequence, keys, values, positions)
            for head in heads:
                metric[head].scatter_(0, orders[head], scores[head])

    def _rotary(self) -> torch.nn.Module | None:
        listener = self.policy.listener
        return None if listener is None else listener.rotary

    @torch.no_grad()
    def _ask(
        self, layer: CompressedLayer, sequence: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Scores ``[H, T]`` float32 of a sequence's `keys` and `values` ``[1, H, T, D]`` at ``[1, H, T]``."""
        press, module = self.policy.press, layer.state.module()
        name, seen = type(press).__name__, self.state.sequences[sequence].tokens
        hidden, *further = layer.state.parts(sequence) or [keys.new_zeros(1, 0, 0)]
        attentions = None
        if self.policy.attentions and further:
            attentions = probabilities(layer, further.pop(), keys, positions, seen)
        tokens, held = keys.shape[2], hidden.shape[1]
        # Rounded down, as presses do it, the share that this ratio leaves is what will be left.
        ratio = max(0.0, 1 - (int(self.left[sequence]) + 0.5) / tokens)
        kwargs = {"position_embeddings": tuple(further)} if further else {}
        try:
            with _asking(press, ratio, module, self._rotary(), seen - held):
                scores = press.score(module, hidden, keys, values, attentions, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} cannot score {tokens} tokens of layer {layer.index} of {self.state.binding.name} with the "
                f"hidden states of the newest {held}: {error or type(error).__name__}"
            ) from error
        if scores.shape != keys.shape[:3]:
            raise ValueError(
                f"{name} gave scores {tuple(scores.shape)} for keys {tuple(keys.shape)} and {held} hidden states; "
                "expected one for every head and token. If it scores whole prompts only, pass continual=False"
            )
        return scores[0].float()


@contextlib.contextmanager
def _asking(
    press: Press, ratio: float, module: torch.nn.Module, rotary: torch.nn.Module | None, before: int
) -> Iterator[None]:
    """Lends a press what kvpress would: the ratio, and in `module` the rotary embedding.

    Presses count positions from the first hidden state that they are given, `before` tokens in.
    """
    asked = press.compression_ratio
    press.compression_ratio = ratio
    if rotary is not None:
        vars(module)["rotary_emb"] = Later(rotary, before) if before else rotary
    try:
        yield
    finally:
        press.compression_ratio = asked
        vars(module).pop("rotary_emb", None)


class Later:
    """A rotary embedding whose positions begin at `before`."""

    def __init__(self, own: torch.nn.Module, before: int):
        self._own, self._before = own, before

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._own(x, position_ids + self._before, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def probabilities(
    layer: CompressedLayer, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Attention probabilities of a sequence's newest queries over what is stored, as the model's eager attention.

    Args:
        layer: gives scaling, soft-capping and sink logits.
        queries: ``[1, n, Hq * D]``, of the newest n of all tokens.
        keys: ``[1, H, T, D]``.
        positions: ``[1, H, T]``, true ones.
        tokens: tokens seen.

    Returns:
        ``[1, Hq, n, T]``, in the dtype of `queries`.
    """
    newest = queries.shape[1]
    queries = queries.unflatten(2, (-1, keys.shape[3])).transpose(1, 2)
    group = queries.shape[1] // keys.shape[1]
    logits = softcapped(queries @ keys.repeat_interleave(group, 1).mT * layer.scaling, layer.softcap)
    places = torch.arange(tokens - newest, tokens, device=keys.device)
    later = positions.repeat_interleave(group, 1)[:, :, None] > places[:, None]
    logits = logits.masked_fill(later, float("-inf")).float()
    if layer.sink_logits is not None:
        sink_logits = layer.sink_logits.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink_logits], dim=-1)
    return logits.softmax(-1)[..., : keys.shape[2]].to(queries.dtype)
