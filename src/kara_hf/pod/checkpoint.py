"""Checkpoints that a kill at any moment leaves whole, and a log of steps that never says one twice."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

SETTINGS = "settings.json"
TRAINED = "trained.safetensors"


class Checkpoint:
    """The last checkpoint of a run; the folder is swapped in whole, and the one before it is removed.

    Only weights that are trained are in it, beside the optimiser, the random state and what was registered with
    `accelerator`; FSDP and DeepSpeed write all weights, in shards of their own. All processes call all methods.

    Args:
        folder: on a file system that all processes share.
        settings: of the run; JSON values. A run that resumes another one must have the same.
        free: names of settings that may differ.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, settings: dict[str, Any], free: Collection[str] = ()):
        self.accelerator, self.folder = accelerator, folder
        self.settings = json.loads(json.dumps({name: settings[name] for name in settings if name not in free}))
        self.fresh, self.old = (folder.with_name(f"{folder.name}.{name}") for name in ("fresh", "old"))
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    @property
    def source(self) -> Path | None:
        """The newest whole checkpoint: a kill between the two renames of a swap leaves only the one before."""
        return next((folder for folder in (self.folder, self.old) if folder.exists()), None)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self.fresh, ignore_errors=True)
            self.fresh.mkdir(parents=True)
            (self.fresh / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(self.fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.folder.exists():
                shutil.rmtree(self.old, ignore_errors=True)
                self.folder.rename(self.old)
            self.fresh.rename(self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def check(self, resume: bool) -> None:
        """Raises ValueError if a run cannot start, or resume, with what is there."""
        if not resume:
            if self.source is not None:
                raise ValueError(
                    f"{self.source} has the checkpoint of a run that was killed; resume it, or remove the folder to "
                    "start anew"
                )
            return
        if self.source is None:
            raise ValueError(
                f"there is no checkpoint in {self.folder} to resume from: a run that has ended leaves none, and one "
                "that was killed before its first had none yet; start without resume"
            )
        before = json.loads((self.source / SETTINGS).read_text())
        changed = [
            f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted(before.keys() | self.settings.keys())
            if before.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run in {self.source} cannot go on with other settings: {'; '.join(changed)}; resume with those "
                "that it was started with, or start another one in another folder"
            )

    def load(self) -> None:
        self.accelerator.load_state(str(self.source))

    def remove(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in (self.fresh, self.old, self.folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _save_trained(self, models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        if not weights:  # FSDP and DeepSpeed have written theirs
            return
        weights.clear()
        if self.accelerator.is_main_process:
            trained = self._trained(models[0])
            save_file({name: weight.detach().contiguous() for name, weight in trained.items()}, Path(folder) / TRAINED)

    def _load_trained(self, models: list[torch.nn.Module], folder: str) -> None:
        if not models:
            return
        saved = load_file(Path(folder) / TRAINED)
        with torch.no_grad():
            for name, weight in self._trained(models.pop()).items():
                weight.copy_(saved[name])

    def _trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        inner = self.accelerator.unwrap_model(model)
        return {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}


class StepLog:
    """`metrics.jsonl`: one line of JSON for each step of the optimiser.

    Lines of steps behind `step`, and a line that a kill cut off, are removed when it is opened.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = [row for row in self.read() if row["step"] <= step]
        fresh = path.with_name(f"{path.name}.fresh")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(fresh, path)

    def read(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
