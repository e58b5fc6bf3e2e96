"""Shows: runs of one prompt that are watched together, one show for each visitor."""

import secrets
import threading
from typing import Any

from ..methods.caches import Method
from .models import Loaded
from .recorder import origin
from .recording import FORMAT
from .runs import Plan, Remote, Run, Texts


class Show:
    """Runs of one prompt that are watched together.

    Args:
        task: what the prompt asks, for readers.
        loaded: the model.
        methods: of the runs, by what they are called; the last is what the show is about.
        plan: what they generate.
        paused: whether they wait for steps.
        pace: tokens per second at most, 0 for no limit.
    """

    def __init__(
        self,
        task: str,
        loaded: Loaded,
        methods: dict[str, Method],
        plan: Plan,
        *,
        paused: bool = False,
        pace: float = 0.0,
    ):
        self.key = secrets.token_urlsafe(16)
        self.remote = Remote(paused=paused, pace=pace)
        self.runs = [Run(title, loaded, method, plan, self.remote) for title, method in methods.items()]
        texts = Texts(loaded.tokenizer)
        self.head: dict[str, Any] = {
            "format": FORMAT,
            "title": " and ".join(methods),
            "model": loaded.name,
            "task": task,
            "temperature": plan.temperature,
            "seed": plan.seed,
            "origin": origin(str(loaded.model.device)),
            "prompt": [texts.next(token) for token in plan.ids[0].tolist()],
        }

    def start(self) -> None:
        for run in self.runs:
            run.start()

    @property
    def done(self) -> bool:
        return not any(run.is_alive() for run in self.runs)

    @property
    def generated(self) -> int:
        """Tokens of the run that is furthest."""
        return max(len(run.recording.tokens) for run in self.runs)

    def since(self, have: list[dict[str, int]]) -> dict[str, Any]:
        """What a player does not have yet: everything at first, afterwards what runs have done since.

        Args:
            have: for every run how many entries of each list the player has; empty at first.
        """
        head = {} if have else self.head
        have = have or [{} for _ in self.runs]
        parts = [run.recording.since(entries) for run, entries in zip(self.runs, have, strict=True)]
        return {**head, "paused": self.remote.paused, "done": self.done, "runs": parts}

    def to_dict(self) -> dict[str, Any]:
        """The recording of all runs, for JSON; what `player.js` plays."""
        return {**self.head, "runs": [run.recording.to_dict() for run in self.runs]}


class Shows:
    """The shows of all visitors, one for each."""

    def __init__(self) -> None:
        self._of: dict[str, Show] = {}
        self._guard = threading.Lock()

    def put(self, visitor: str, show: Show) -> None:
        """Starts a show; the visitor's last one is stopped and forgotten."""
        with self._guard:
            before, self._of[visitor] = self._of.get(visitor), show
        if before is not None:
            before.remote.stop()
        show.start()

    def of(self, visitor: str) -> Show | None:
        return self._of.get(visitor)

    def find(self, key: Any) -> Show | None:
        """The show of that key, which only those know who were given it."""
        with self._guard:
            return next((show for show in self._of.values() if show.key == key), None)

    def close(self, visitor: str) -> None:
        """The visitor has gone: stops what runs and forgets it."""
        with self._guard:
            show = self._of.pop(visitor, None)
        if show is not None:
            show.remote.stop()

    def busy(self, visitor: str) -> int:
        """Other visitors whose shows go on."""
        with self._guard:
            return sum(not show.done for name, show in self._of.items() if name != visitor)

    @property
    def live(self) -> int:
        """Runs that hold a cache."""
        with self._guard:
            shows = list(self._of.values())
        return sum(run.cache is not None for show in shows for run in show.runs)
