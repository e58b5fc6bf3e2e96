"""Saving a cache and loading it again: `SavableCache`, which `CompressedCache` is."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..hub import find_file, push_file
from ..integration.attach import unwrap
from ..policy import KaraPolicy, KVCompressPolicy
from ..policy.sharing import PoDSharing
from ..storage import PoolExhausted
from .saved_contents import (
    check_model,
    restore_contents,
    restored_policy,
    saved_contents,
    saved_model,
    saved_policy,
)
from .saved_file import read_saved, write_saved
from .state import CacheState
from .steps import Steps

FILE = "cache.safetensors"


class SavableCache:
    """A cache that goes on from a file as if it had never been away."""

    policy: KaraPolicy | KVCompressPolicy
    state: CacheState
    steps: Steps

    @classmethod
    def made(
        cls,
        model: Any,
        *,
        policy: KaraPolicy | KVCompressPolicy,
        sharing: PoDSharing | None,
        max_bytes: int | None,
        cuda_graph: bool,
    ) -> Self:
        """A new cache of this class; see `CompressedCache`."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Writes the cache to one file, which `load` reads: keys and values as they are stored, and all that belongs
        to them. A file that is there already stays whole until the new one is.

        A forward that was broken off is taken back before. A CUDA graph is captured anew after loading. Of a subclass
        of your own only what this class has is saved.

        Raises:
            OSError: the file cannot be written.
            TypeError: the cache decides by something that is no setting, such as a press of kvpress.
            RuntimeError: the model is gone.
        """
        self.steps.sync()
        saved = {
            "class": type(self).__name__,
            "model": saved_model(self.state.binding.model),
            "policy": saved_policy(self.policy),
            "sharing": None if self.state.sharing is None else self.state.sharing.to_json(),
            "max_bytes": self.state.meter.max_bytes,
            "cuda_graph": self.state.steady,
            "contents": saved_contents(self.steps),
        }
        write_saved(Path(path), saved)

    @classmethod
    def load(cls, name_or_path: str | Path, model: Any, *, cuda_graph: bool | None = None, **hub: Any) -> Self:
        """The cache that `save` wrote, of the class that it had; it goes on bit for bit where the device is the same.

        The file is mapped, its digest checked, and what is in it copied to the devices of the model's layers.

        Args:
            name_or_path: the file, a folder with a `cache.safetensors`, or the hub id of a repository with one.
            model: the model that the cache was saved with, from anywhere.
            cuda_graph: as of `CompressedCache`; None: as it was.
            hub: `revision`, `token` and whatever else `huggingface_hub.hf_hub_download` takes.

        Raises:
            OSError: there is no such file, and no such repository can be reached.
            TypeError: `model` is no Transformers model.
            ValueError: it was saved with another model or is no such cache, is of another format, or is damaged; the
                message names the difference.
            PoolExhausted: it does not fit under its `max_bytes`.
        """
        path = Path(name_or_path)
        if path.suffix != ".safetensors":
            path = find_file(name_or_path, FILE, "cache", "write one with cache.save(path)", **hub)
        inner, saved = unwrap(model), read_saved(path)
        try:
            found = _class_of(saved["class"], path)
            if not issubclass(found, cls):
                raise ValueError(f"{path} holds a {found.__name__}; load it by {found.__name__}.load")
            check_model(saved["model"], inner)
            cache = found.made(
                model,
                policy=restored_policy(saved["policy"]),
                sharing=None if saved["sharing"] is None else PoDSharing.from_json(saved["sharing"]),
                max_bytes=saved["max_bytes"],
                cuda_graph=saved["cuda_graph"] if cuda_graph is None else cuda_graph,
            )
            restore_contents(cache.steps, saved["contents"])
        except (PoolExhausted, ValueError):
            raise
        except Exception as error:  # whatever a header leads to whose digest was made to fit
            raise ValueError(f"{path} is no cache that this version of kara_hf can take up: {error!r}") from error
        return cache

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Uploads `cache.safetensors` to a model repository, which is created if it is not there.

        Args:
            hub: `token`, `private` (of a new repository), `revision` and `commit_message`.

        Raises:
            As `save`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / FILE)
            push_file((Path(folder) / FILE).read_bytes(), FILE, repo_id, **hub)

    def __copy__(self) -> Self:
        raise TypeError(
            f"a copy of a {type(self).__name__} that shares its layers would change with it; use copy.deepcopy(cache), "
            "or cache.save(path) to keep it"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} belongs to a model in this process and cannot be pickled or saved by torch.save; "
            f"use cache.save(path) and {type(self).__name__}.load(path, model), or copy.deepcopy(cache) here"
        )


def _class_of(name: str, path: Path) -> type[SavableCache]:
    """The class of caches with this name. Raises ValueError if none is imported."""
    known = {kind.__name__: kind for kind in _kinds(SavableCache)}
    if name not in known:
        raise ValueError(f"{path} holds a {name}, and no such class of caches is known; import it first")
    return known[name]


def _kinds(kind: type[SavableCache]) -> Iterator[type[SavableCache]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)
