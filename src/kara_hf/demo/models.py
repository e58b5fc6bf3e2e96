"""The models that visitors may choose: the bundled ones, folders named when the demo was started, and hub ids."""

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED_MODEL
from ..integration.adapter import load_adapter
from ..integration.attach import attach
from ..integration.loading import LoadedModel, find_device, is_folder
from ..policy.sharing import FILE, PoDSharing
from .control import FifoLock
from .generation import take_over_settings

BUNDLED = {BUNDLED_MODEL.name: BUNDLED_MODEL}
SUGGESTED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the hub: small, and knows English
MAPS = {SUGGESTED: "smollm2-135m-pod"}  # of what layers share, with the adapter for it; they come with the package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
KEPT = 3  # models from a hub that stay loaded
SMALL = 50_000_000  # parameters, below which several threads slow a step down
HUB_SECONDS = 5.0  # for the hub to answer; loading itself tries again and again for most of a minute


class Loaded:
    """A model in memory, attached once and for all: every run uses it as it is, and a full cache sees no difference.

    Args:
        name: what it was chosen by.
        place: folder or hub id.
        sharing: folder or hub id with a map for PoD; None: the one beside the model, or of `MAPS`, if there is one.
        options: of `kara_hf.integration.loading.LoadedModel`.

    Attributes:
        own_words: whether it knows only the words of its own problems, as the bundled one.
        limit: positions that it has.
        turn: held by the run whose step it is.
        threads: that a step runs on, on a CPU.

    Raises:
        OSError: it cannot be loaded.
        ValueError: it cannot be used, or brings a `generate` of its own.
    """

    def __init__(self, name: str, place: str, sharing: str | None, **options: Any):
        runner = LoadedModel(place, **options)
        self.name = name
        self.model, self.tokenizer, self.limit = runner.model, runner.tokenizer, runner.limit
        self.encode, self.pins = runner.encode, runner.pins
        unknown = self.tokenizer.unk_token_id
        self.own_words = unknown is not None and unknown in self.tokenizer("Any text in English")["input_ids"]
        self.sharing = sharing or (place if has_map(place) else MAPS.get(name))
        if self.sharing is not None:
            load_adapter(self.model, self.sharing, PoDSharing.from_pretrained(self.sharing))
        self.turn = FifoLock()
        take_over_settings(self.model, self.tokenizer, name)
        try:
            attach(self.model)
        except ValueError:
            pass  # the full cache works, and any other says what is wrong when it is made
        small = sum(weights.numel() for weights in self.model.parameters()) < SMALL
        self.threads = 1 if small else os.cpu_count() or 1


class Models:
    """Loads each model once, for all who ask for it.

    Args:
        folders: local models that may be chosen, named when the demo was started. No other folder can be.
        sharing: folder or hub id of the PoD map of the first of `folders`.
        hub: whether hub ids may be chosen.
        options: of `kara_hf.integration.loading.LoadedModel`.

    Raises:
        ValueError: a folder has no model, two folders have one name, or the device is not there.
        OSError: there is no such map.
    """

    def __init__(self, folders: Sequence[str] = (), *, sharing: str | None = None, hub: bool = True, **options: Any):
        find_device(options.get("device"))
        self.places: dict[str, str] = {}
        for place in folders:
            name = Path(place).resolve().name if is_folder(place) else place
            if name in self.places or name in BUNDLED:
                raise ValueError(f"model={place!r} is not possible: another model is called {name}; rename its folder")
            self.places[name] = place
        self.places |= {name: str(folder) for name, folder in BUNDLED.items()}
        if sharing is not None:
            PoDSharing.from_pretrained(sharing)  # refuses one that is not there, or says what is not possible
        self.sharing = {next(iter(self.places)): sharing} if folders and sharing else {}
        self.hub, self.options = hub, options
        self._loaded: dict[str, Loaded] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.places)

    @property
    def with_map(self) -> str | None:
        """A model that has a map for PoD: of those named when the demo was started, or the suggested one."""
        named = (name for name, place in self.places.items() if name in self.sharing or has_map(place))
        return next(named, SUGGESTED if self.hub else None)

    def load(self, name: str) -> Loaded:
        """The model of that name, loaded if it is not yet.

        Raises:
            ValueError: it may not be chosen.
            OSError: it cannot be loaded.
        """
        name = name.strip()
        place = self.places.get(name)
        if place is None:
            if not HUB_ID.fullmatch(name) or Path(name).exists():
                raise ValueError(
                    f"model={name[:100]!r} is not possible: choose {', '.join(self.names)} or a hub id like "
                    "Qwen/Qwen3-0.6B; a folder has to be named when the demo is started, with --model"
                )
            if not self.hub:
                raise ValueError(f"model={name!r} is not possible: this demo offers {', '.join(self.names)} only")
        with self._guard:
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:  # who wants another model does not wait for this one
            loaded = self._loaded.get(name)
            if loaded is None:
                loaded = Loaded(name, place or on_hub(name), self.sharing.get(name), **self.options)
            with self._guard:
                self._loaded.pop(name, None)
                self._loaded[name] = loaded  # the newest is last
                for each in [each for each in self._loaded if each not in self.places][:-KEPT]:
                    del self._loaded[each]
            return loaded


def has_map(place: str) -> bool:
    """Whether a folder has a map for PoD."""
    return (Path(place) / FILE).is_file()


def on_hub(name: str) -> str:
    """Where a model of a hub is loaded from: its id, or a local copy if the hub cannot be reached.

    Raises:
        OSError: there is no such model, or neither a hub nor a copy.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        raise OSError(
            f"model={name!r} cannot be loaded: the hub has no model of that name that is open to this machine"
        ) from error
    except Exception as error:  # of whichever library makes the connection
        copy = try_to_load_from_cache(name, "config.json")
        if not isinstance(copy, str):
            raise OSError(
                f"model={name!r} cannot be loaded: the hub cannot be reached from here, and there is no copy on this "
                "machine; choose a bundled model"
            ) from error
        return str(Path(copy).parent)
    return name
