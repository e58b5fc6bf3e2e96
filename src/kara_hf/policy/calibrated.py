"""A score that was fitted to one model: how much attention a key will get, from the key alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..hub import find_file, push_file
from .scores import Score, Window

FILE = "key_calibration.safetensors"
FORMAT = "1"
PARTS = ("mean", "basis", "quadratic", "linear", "constant")


@dataclass(frozen=True, eq=False)
class KeyCalibration:
    """What a key, as attention sees it, says about the attention that its token will get: a quadratic for each head.

        score(k) = z^T A z + b^T z + c    with z = P^T (k - m)

    Nothing has to be held of a sequence. `kara_hf.calibrate` makes one. Ours.

    Attributes:
        layers: for every layer of full attention by its index, for H heads of keys: m as ``mean`` ``[H, D]``, P as
            ``basis`` ``[H, D, r]``, A as ``quadratic`` ``[H, r, r]``, b as ``linear`` ``[H, r]``, c as ``constant``
            ``[H]``; float32, on the CPU.
        model: sizes of the model that it was fitted to.
        origin: how it was made; for readers.
    """

    layers: dict[int, dict[str, torch.Tensor]]
    model: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def rank(self, window: Window) -> torch.Tensor:
        """Scores of a window's tokens, ``[b, H, W]`` float32."""
        part = {name: tensor.to(window.keys.device) for name, tensor in self.layers[window.layer].items()}
        return predict(window.keys, **part).unflatten(1, (window.rows, -1)).mean(2)

    @property
    def score(self) -> Score:
        return Score(self.rank, queries=False, chunks=False)

    def check(self, model: dict[str, Any], layers: set[int]) -> None:
        """Raises ValueError if this was not fitted to a model of these sizes, or not to all of these layers.

        Args:
            model: sizes as in `model`.
            layers: indices of the layers that are to be compressed.
        """
        wrong = [
            f"{name} {self.model[name]} instead of {size}"
            for name, size in model.items()
            if size != self.model.get(name, size)
        ]
        missing = sorted(layers - self.layers.keys())
        if missing:
            wrong.append(f"nothing about layers {missing}")
        if wrong:
            raise ValueError(
                f"this key calibration was made for another model: {'; '.join(wrong)}; make one for this model with "
                "`kara-hf calibrate`"
            )

    # ------------------------------------------------------------------------------------------------- where it is kept
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `key_calibration.safetensors` into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_bytes(self._bytes())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> Self:
        """Reads what `save_pretrained` wrote: from a folder, from the file itself, or from a model hub.

        Args:
            hub: `revision`, `token` and whatever else `huggingface_hub.hf_hub_download` takes.

        Raises:
            FileNotFoundError: a folder without the file.
            OSError: no such repository can be reached.
            ValueError: the file is of another format.
        """
        path = find_file(name_or_path, FILE, "key calibration", "make one with `kara-hf calibrate`", **hub)
        layers: dict[int, dict[str, torch.Tensor]] = {}
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(
                    f"{path} has format {about.get('format')!r}, and this version of kara_hf reads {FORMAT}; update it"
                )
            for name in file.keys():  # noqa: SIM118  it is no dict
                layer, part = name.split(".")
                layers.setdefault(int(layer), {})[part] = file.get_tensor(name)
        return cls(layers, json.loads(about["model"]), json.loads(about["origin"]))

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Uploads `key_calibration.safetensors` to a model repository, which is created if it is not there.

        Args:
            hub: `token`, `private` (of a new repository), `revision` and `commit_message`.
        """
        push_file(self._bytes(), FILE, repo_id, **hub)

    def _bytes(self) -> bytes:
        tensors = {f"{layer}.{part}": self.layers[layer][part].contiguous() for layer in self.layers for part in PARTS}
        about = {"format": FORMAT, "model": json.dumps(self.model), "origin": json.dumps(self.origin)}
        return save(tensors, about)


def predict(
    keys: torch.Tensor,
    mean: torch.Tensor,
    basis: torch.Tensor,
    quadratic: torch.Tensor,
    linear: torch.Tensor,
    constant: torch.Tensor,
) -> torch.Tensor:
    """The quadratic of `KeyCalibration` at keys ``[..., H, W, D]``: ``[..., H, W]`` float32."""
    places = (keys.float() - mean[:, None]) @ basis
    return ((places @ quadratic + linear[:, None]) * places).sum(-1) + constant[:, None]
