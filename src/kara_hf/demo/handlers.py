"""What happens when a visitor presses a button or leaves: the handlers of the page, each for one visitor's own show."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from .models import Models
from .request import Limits, Wish, show_for
from .sessions import Show, Shows

BEAT = 0.5  # seconds between two looks at whether a visitor is still there
PATIENCE = 600.0  # seconds after which a show that waits for its visitor is ended
REASONS = (ValueError, TypeError, OSError, ImportError, RuntimeError, IndexError)  # of a show that cannot be made
PAUSED = "paused "  # how the ticket of a run begins that waits for steps


class Desk:
    """The handlers. A button gives out a ticket; `begin` runs for it, once there is a place, until the run ends.

    Args:
        models: what can be chosen.
        limits: what may be asked for.
        shows: where running shows are kept.
        settings: names of the methods' settings, in the order of the page's fields.
    """

    def __init__(self, models: Models, limits: Limits, shows: Shows, settings: Sequence[str]):
        self.models, self.limits, self.shows, self.settings = models, limits, shows, settings

    async def start(self, request: gr.Request) -> tuple[str, str]:
        """Ends the visitor's last run. Gives a new ticket, and what there is to say, in HTML."""
        await self.stop(request)
        return _ticket(), self._waiting(request)

    async def begin(self, request: gr.Request, ticket: str, *values: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Runs what `values` ask for. Gives the show's key, in JSON, and what there is to say, in HTML."""
        wish = Wish.of(values, self.settings)
        yield gr.skip(), f"Loading {escape(str(wish.model)[:100])} ..."
        try:
            show = await asyncio.to_thread(show_for, wish, self.models, self.limits, ticket.startswith(PAUSED))
        except REASONS as reason:
            text = escape(" ".join(str(reason).split())[:500])
            yield gr.skip(), f"<div class='error' role='alert'>{text}</div>"
            return
        self.shows.put(str(request.session_hash), show)
        try:
            yield json.dumps({"show": show.key}), ""
            moved, before = time.monotonic(), -1
            while not show.done:
                await asyncio.sleep(BEAT)
                if show.generated != before:
                    moved, before = time.monotonic(), show.generated
                if time.monotonic() - moved > PATIENCE:
                    show.remote.stop()
                yield gr.skip(), gr.skip()  # where Gradio ends this, if the visitor has gone
        finally:
            show.remote.stop()

    async def stop(self, request: gr.Request) -> None:
        show = self._live(request)
        if show is not None:
            show.remote.stop()

    async def pause(self, request: gr.Request) -> None:
        """Pauses, or goes on."""
        show = self._live(request)
        if show is not None:
            show.remote.allow(None if show.remote.paused else show.generated)

    async def step(self, request: gr.Request) -> tuple[Any, Any]:
        """One token more; without a run the ticket of one that is paused."""
        show = self._live(request)
        if show is None:
            return PAUSED + _ticket(), self._waiting(request)
        show.remote.allow(show.generated + 1)
        return gr.skip(), gr.skip()

    def close(self, request: gr.Request) -> None:
        self.shows.close(str(request.session_hash))

    def _live(self, request: gr.Request) -> Show | None:
        show = self.shows.of(str(request.session_hash))
        return None if show is None or show.done else show

    def _waiting(self, request: gr.Request) -> str:
        runs = self.limits.runs
        taken = self.shows.busy(str(request.session_hash)) >= runs
        return f"All {runs} places are taken; your run starts when one is free." if taken else ""


def _ticket() -> str:
    """What no ticket was before."""
    return str(time.monotonic_ns())
