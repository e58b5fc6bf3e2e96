"""Sessions: runs of one prompt that are watched together, one session for each visitor."""

import secrets
import threading
from typing import Any

from ..methods.caches import ConfiguredCache
from .control import RunControl
from .generation import Generation
from .models import Loaded
from .recorder import origin
from .recording import FORMAT
from .runs import RecordedRun, TokenTexts


class Session:
    """Runs of one prompt that are watched together.

    Args:
        task: what the prompt asks, for readers.
        loaded: the model.
        methods: of the runs, by what they are called; the last is what the session is about.
        generation: what they generate.
        paused: whether they wait for steps.
        pace: tokens per second at most, 0 for no limit.

    Raises:
        ValueError: the model does not support one of the methods.
    """

    def __init__(
        self,
        task: str,
        loaded: Loaded,
        methods: dict[str, ConfiguredCache],
        generation: Generation,
        *,
        paused: bool = False,
        pace: float = 0.0,
    ):
        self.key = secrets.token_urlsafe(16)
        self.control = RunControl(paused=paused, pace=pace)
        self.runs = [RecordedRun(title, loaded, method, generation, self.control) for title, method in methods.items()]
        texts = TokenTexts(loaded.tokenizer)
        self.head: dict[str, Any] = {
            "format": FORMAT,
            "title": " and ".join(methods),
            "model": loaded.name,
            "task": task,
            "temperature": generation.temperature,
            "seed": generation.seed,
            "origin": origin(str(loaded.model.device)),
            "prompt": [texts.next(token) for token in generation.ids[0].tolist()],
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
        return {**head, "paused": self.control.paused, "done": self.done, "runs": parts}

    def to_dict(self) -> dict[str, Any]:
        """The recording of all runs, for JSON; what `player.js` plays."""
        return {**self.head, "runs": [run.recording.to_dict() for run in self.runs]}


class Sessions:
    """The sessions of all visitors, one for each."""

    def __init__(self) -> None:
        self._of: dict[str, Session] = {}
        self._guard = threading.Lock()

    def put(self, visitor: str, session: Session) -> None:
        """Starts a session; the visitor's last one is stopped and forgotten."""
        with self._guard:
            before, self._of[visitor] = self._of.get(visitor), session
        if before is not None:
            before.control.stop()
        session.start()

    def of(self, visitor: str) -> Session | None:
        return self._of.get(visitor)

    def find(self, key: str) -> Session | None:
        """The session of that key, which only those know who were given it."""
        with self._guard:
            return next((session for session in self._of.values() if session.key == key), None)

    def close(self, visitor: str) -> None:
        """The visitor has gone: stops what runs and forgets it."""
        with self._guard:
            session = self._of.pop(visitor, None)
        if session is not None:
            session.control.stop()

    def busy(self, visitor: str) -> int:
        """Other visitors whose sessions go on."""
        with self._guard:
            return sum(not session.done for name, session in self._of.items() if name != visitor)

    @property
    def live(self) -> int:
        """Runs that hold a cache."""
        with self._guard:
            sessions = list(self._of.values())
        return sum(run.cache is not None for session in sessions for run in session.runs)
