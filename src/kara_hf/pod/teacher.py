"""The teacher of distillation: what the unshared base model predicts, kept in a folder so that it is computed once.

A sample's predictions are a file of their own, named by a digest of its token ids and moved into its place whole. So
runs of any order, batch, seed and sharing map find what others left, several may fill a folder at once, and a kill
loses one batch. `IDENTITY` says whose predictions they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..integration.identity import forward_identity, short_digest, weights_fingerprint
from .loss import Predictions
from .samples import Sample, collate, ids_of

IDENTITY = "teacher.json"


class PredictionFolder:
    """Predictions of `model` for samples, in a folder that is made if it is not there.

    A sample of S tokens takes ``S * (6 * top_k + 2)`` bytes: ids int32 and log-probabilities float16.

    Args:
        model: the base model as it will not be trained. The dtype of its weights is no part of what it is: predictions
            are those of the run that came first.

    Raises:
        ValueError: the folder has the predictions of another model, or another number of them.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, top_k: int):
        self.folder, self.model, self.top_k = folder, model, top_k
        weights = weights_fingerprint(model, torch.float32)[:16]
        identity = {"weights": weights, "config": forward_identity(model)["config"], "top_k": top_k}
        kept = folder / IDENTITY
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _replace(kept, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n"))
        found = json.loads(kept.read_text())
        differing = [
            f"{name} was {found.get(name)} and is {identity[name]}"
            for name in identity
            if found.get(name) != identity[name]
        ]
        if differing:
            raise ValueError(
                f"teacher={str(folder)!r} has predictions that are not those asked for: {'; '.join(differing)}; give "
                "another folder, or the model and top_k that this one was filled with"
            )

    def fill(self, samples: Iterable[Sample], batch: int, accelerator: Accelerator) -> None:
        """Computes what is missing, `batch` samples at a time; of several processes each computes its share.

        The model attends as it is, in eval mode, and moves to the device of `accelerator`.
        """
        missing: dict[Path, Sample] = {}
        for number, sample in enumerate(samples):
            path = self._path(sample)
            if number % accelerator.num_processes == accelerator.process_index and not path.exists():
                missing[path] = sample
            if len(missing) == batch:
                self._add(missing, accelerator)
        if missing:
            self._add(missing, accelerator)
        accelerator.wait_for_everyone()

    def read(self, samples: Sequence[Sample], device: torch.device | str) -> Predictions:
        """Predictions ``[B, S, ...]`` for samples that the folder has, S being the longest."""
        files = [load_file(self._path(sample)) for sample in samples]
        ids, log_probs = (
            pad_sequence([file[name] for file in files], batch_first=True).to(device) for name in ("ids", "log_probs")
        )
        return Predictions(ids, log_probs)

    def _path(self, sample: Sample) -> Path:
        return self.folder / f"{short_digest(ids_of(sample).to('cpu', torch.int64).numpy().tobytes())}.safetensors"

    @torch.no_grad()
    def _add(self, samples: dict[Path, Sample], accelerator: Accelerator) -> None:
        ids, _ = collate(list(samples.values()), accelerator.device)
        self.model.to(accelerator.device).eval()
        with accelerator.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits
        for (path, sample), row in zip(samples.items(), logits, strict=True):
            found = Predictions.of(row[: len(ids_of(sample))], self.top_k)
            _replace(path, partial(save_file, {"ids": found.ids, "log_probs": found.log_probs}))
        samples.clear()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Puts what `write` makes into the place of `path`, whole."""
    fresh = path.with_name(f"{path.name}.{uuid4().hex}.fresh")
    write(fresh)
    os.replace(fresh, path)
