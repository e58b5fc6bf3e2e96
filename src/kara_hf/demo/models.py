"""The models that visitors may choose: the bundled ones, folders named when the demo was started, and hub ids."""

import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED_MODEL
from ..integration.attention import attach
from ..integration.loading import LoadedModel
from ..policy.sharing import FILE

BUNDLED = {folder.name: folder for folder in (BUNDLED_MODEL, BUNDLED_MODEL.parent / "deep_reasoner")}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
KEPT = 3  # models from a hub that stay loaded
SMALL = 50_000_000  # parameters, below which several threads slow a step down
HUB_SECONDS = 5.0  # for the hub to answer; loading itself tries again and again for most of a minute


class Turns:
    """A lock that is given in the order in which it was asked for, so that runs on one model alternate."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def take(self) -> None:
        """Waits for the turn."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def pass_on(self) -> None:
        """Gives the turn to whoever has waited longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


class Loaded:
    """A model in memory, attached once and for all: every run uses it as it is, and a full cache sees no difference.

    Attributes:
        name: what it was chosen by.
        bundled: whether it knows only the words of its own problems.
        sharing: folder or hub id with a map for PoD, or None.
        turns: whose step it is.
        threads: that a step runs on, on a CPU.
    """

    def __init__(self, name: str, place: str, sharing: str | None, **options: Any):
        runner = LoadedModel(place, **options)
        self.name, self.bundled = name, name in BUNDLED
        self.model, self.tokenizer, self.limit, self.encode = (
            runner.model,
            runner.tokenizer,
            runner.limit,
            runner.encode,
        )
        beside = Path(place) / FILE
        self.sharing = sharing or (str(beside) if beside.is_file() else None)
        self.turns = Turns()
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
        ValueError: two folders have one name.
    """

    def __init__(self, folders: Sequence[str] = (), *, sharing: str | None = None, hub: bool = True, **options: Any):
        self.places: dict[str, str] = {}
        for place in folders:
            name = Path(place).resolve().name if Path(place).is_dir() else place
            if name in self.places or name in BUNDLED:
                raise ValueError(f"model={place!r} is not possible: another model is called {name}; rename its folder")
            self.places[name] = place
        self.places |= {name: str(folder) for name, folder in BUNDLED.items()}
        self.sharing = {next(iter(self.places)): sharing} if folders and sharing else {}
        self.hub, self.options = hub, options
        self._loaded: dict[str, Loaded] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.places)

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
