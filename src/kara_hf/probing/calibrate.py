"""`calibrate`: the model reads samples, and for every head a quadratic is fitted to which keys it went back to.

calibration = calibrate(model, samples)
calibration.save_pretrained("calibration")
out = model.generate(**inputs, cache=KaraCache(model, retention=0.25, score="calibration"))
"""

from collections.abc import Callable, Iterable

import torch
import transformers

from ..cache.bound_model import BoundModel
from ..config import is_int, require
from ..integration.attach import decoder_config, unwrap
from ..integration.shape import model_name, model_shape
from ..policy import KeyCalibration
from .attention import Attention, Recorder

QUERY_CHUNK = 256  # queries of one KV head whose attention to everything lies in memory at once
FIRST_TOKENS = 4096  # keys of a layer, at least, whose principal directions its features are made of
RIDGE = 1e-3  # of the variance of a feature


def calibrate(
    model: torch.nn.Module,
    samples: Iterable[torch.Tensor],
    *,
    window: int = 256,
    recent: int = 32,
    rank: int = 32,
    progress: Callable[[int], object] | None = None,
) -> KeyCalibration:
    """Fits a `KeyCalibration` to `model`, which runs once over each sample and is left as it was.

    What is fitted is a token's share of the attention to its window, from all queries of the group that come `recent`
    tokens behind the window or later, when the window is sealed:

        y[j] = sum over i of a[i, j] / sum over i and j' in the window of a[i, j']

    Least squares with a ridge on the r(r+1)/2 + r monomials of a key's principal coordinates. Beside what the model's
    own run takes there are in memory a sample's keys and queries of all layers and, on the CPU, 2 r^4 bytes for each
    head: 2 MiB for r = 32.

    Args:
        model: a Transformers causal LM, or one wrapped by PEFT; it may lie on several devices.
        samples: token ids ``[N]`` int64 each, longer than `window` + `recent`: text as the model reads and writes it,
            at the lengths at which it will, and none that it will be judged by.
        window, recent: as in `KaraConfig`; they need not be those that are used later.
        rank: r, principal directions of a head's keys whose products count; at most D.
        progress: called after each sample with the number of samples done.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: a setting is out of range, a sample is too short, there are too few, or the model has no full
            attention that can be measured.
    """
    require(is_int(window) and window >= 2, "window", window, "a whole number of tokens from 2 on")
    require(is_int(recent) and recent >= 0, "recent", recent, "a whole number of tokens from 0 on")
    require(is_int(rank) and rank >= 1, "rank", rank, "a whole number from 1 on")
    inner = unwrap(model)
    binding = BoundModel(inner)
    full = binding.observable_layers()
    fits = [QuadraticFit(rank) for _ in full]
    tokens: list[int] = []
    recorder = Recorder(set(full), queries=2**31)
    with recorder.watching(inner):
        for ids in samples:
            needed = window + recent + 1
            if ids.ndim != 1 or ids.is_floating_point() or len(ids) < needed:
                raise ValueError(
                    f"sample {len(tokens)} must be token ids [N] int64, at least {needed:,} (window={window}, "
                    f"recent={recent} and a query behind them), got {list(ids.shape)} {ids.dtype}"
                )
            for fit, recorded in zip(fits, recorder.run(inner, ids), strict=True):
                shares = future_shares(recorded, window, recent)
                fit.add(recorded.key[:, : shares.shape[1]], shares)
            tokens.append(len(ids))
            if progress is not None:
                progress(len(tokens))
    if not tokens:
        raise ValueError("there is no sample to calibrate on; give some")
    return KeyCalibration(
        layers={layer: fit.solve() for layer, fit in zip(full, fits, strict=True)},
        model=model_shape(decoder_config(inner)),
        origin={
            "model_name": model_name(inner) or binding.name,
            "samples": len(tokens),
            "tokens": sum(tokens),
            "window": window,
            "recent": recent,
            "transformers": transformers.__version__,
        },
    )


@torch.inference_mode()
def future_shares(recorded: Attention, window: int, recent: int) -> torch.Tensor:
    """Each token's share of the attention to its window from queries behind the window and `recent` tokens more.

    Returns:
        ``[H, n * window]`` float32 for the n windows that have such queries, from the first token on.
    """
    heads, tokens, _ = recorded.key.shape
    group = recorded.query.shape[0] // heads
    count = (tokens - recent - 1) // window
    total = torch.zeros(heads, count * window, device=recorded.key.device)
    seal = (torch.arange(count * window, device=recorded.key.device) // window + 1) * window + recent
    for head in range(heads):
        for start in range(0, group * tokens, QUERY_CHUNK):
            part = slice(start, min(start + QUERY_CHUNK, group * tokens))
            rows = recorded.rows(head, part, None)[:, : count * window]
            query = torch.arange(part.start, part.stop, device=rows.device) % tokens
            total[head] += rows.masked_fill_(query[:, None] < seal, 0.0).sum(0)
    windows = total.unflatten(1, (count, window))
    return (windows / windows.sum(2, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)).flatten(1)


class QuadraticFit:
    """Least squares of targets by a quadratic of keys, head by head, with no key held but the first ones.

    Args:
        rank: principal directions of a head's first keys, scaled to unit variance, that the quadratic is of.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.first: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mean = self.basis = torch.zeros(0)
        self.products = torch.zeros(0)  # of features, targets and 1 with each other, [H, F + 2, F + 2] float64

    def add(self, keys: torch.Tensor, targets: torch.Tensor) -> None:
        """Takes keys ``[H, T, D]`` and their targets ``[H, T]``. Raises ValueError if some are not finite."""
        if not (keys.isfinite().all() and targets.isfinite().all()):
            raise ValueError("the model's keys have NaN; load it in another dtype (bfloat16 or float32)")
        if len(self.basis):
            self._accumulate(keys, targets)
            return
        self.first.append((keys.float(), targets))
        if sum(keys.shape[1] for keys, _ in self.first) >= FIRST_TOKENS:
            self._begin()

    def solve(self) -> dict[str, torch.Tensor]:
        """A layer of `KeyCalibration`.

        Raises:
            ValueError: there are fewer keys than coefficients.
        """
        if not len(self.basis):
            self._begin()
        total = self.products / self.products[:, -1:, -1:]
        average = total[:, -1, :-1]
        cov = total[:, :-1, :-1] - average[:, :, None] * average[:, None]
        cov, against = cov[:, :-1, :-1], cov[:, :-1, -1]
        count, width = int(self.products[0, -1, -1]), cov.shape[1]
        if count <= width:
            raise ValueError(
                f"the samples have {count:,} tokens in whole windows, and {width:,} coefficients are to be fitted; "
                "give more samples or a lower rank"
            )
        spread = cov.diagonal(dim1=1, dim2=2).clamp(min=1e-12).sqrt()
        scaled = cov / (spread[:, :, None] * spread[:, None]) + RIDGE * torch.eye(width, dtype=cov.dtype)
        weights = torch.linalg.solve(scaled, against / spread) / spread
        constant = average[:, -1] - (weights * average[:, :-1]).sum(1)
        rank = self.basis.shape[2]
        upper = torch.triu_indices(rank, rank)
        quadratic = torch.zeros(len(weights), rank, rank, dtype=weights.dtype)
        quadratic[:, upper[0], upper[1]] = weights[:, rank:]
        found = {
            "mean": self.mean,
            "basis": self.basis,
            "quadratic": (quadratic + quadratic.mT) / 2,
            "linear": weights[:, :rank],
            "constant": constant,
        }
        return {name: tensor.float().cpu() for name, tensor in found.items()}

    def _begin(self) -> None:
        """Takes the principal directions of the first keys, and what has been waiting for them."""
        keys = torch.cat([keys for keys, _ in self.first], 1)
        self.mean = keys.mean(1)
        centred = keys - self.mean[:, None]
        values, vectors = torch.linalg.eigh((centred.mT @ centred / keys.shape[1]).double().cpu())
        rank = min(self.rank, keys.shape[2])
        scale = values[:, -rank:].clamp(min=1e-12).sqrt()
        self.basis = (vectors[:, :, -rank:] / scale[:, None]).float().to(keys.device)
        size = rank * (rank + 3) // 2 + 2
        self.products = torch.zeros(len(keys), size, size, dtype=torch.float64)
        for part in self.first:
            self._accumulate(*part)
        self.first = []

    def _accumulate(self, keys: torch.Tensor, targets: torch.Tensor) -> None:
        places = (keys.float() - self.mean[:, None]) @ self.basis
        upper = torch.triu_indices(places.shape[2], places.shape[2], device=places.device)
        pairs = places[..., upper[0]] * places[..., upper[1]]
        rows = torch.cat([places, pairs, targets[..., None], torch.ones_like(targets)[..., None]], 2)
        self.products += (rows.mT @ rows).double().cpu()
