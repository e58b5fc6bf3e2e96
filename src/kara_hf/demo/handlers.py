"""What happens when a visitor presses a button or leaves: the handlers of the page, each for one visitor's session."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from .models import Models
from .request import DemoRequest, Limits, open_session
from .sessions import Session, Sessions

POLL_SECONDS = 0.5  # between two looks at whether a visitor is still there
IDLE_SECONDS = 600.0  # after which a session that waits for its visitor is ended
REASONS = (ValueError, TypeError, OSError, ImportError, RuntimeError, IndexError)  # of a session that cannot be made
PAUSED = "paused "  # how the ticket of a session begins that waits for steps


class Handlers:
    """The handlers. A button gives out a ticket; `begin` runs for it, once there is a place, until the runs end.

    Args:
        models: what can be chosen.
        limits: what may be asked for.
        sessions: where those that go on are kept.
        settings: names of the methods' settings, in the order of the page's fields.
    """

    def __init__(self, models: Models, limits: Limits, sessions: Sessions, settings: Sequence[str]):
        self.models, self.limits, self.sessions, self.settings = models, limits, sessions, settings

    async def start(self, visit: gr.Request) -> tuple[str, str]:
        """Ends the visitor's last session. Gives a new ticket, and what there is to say, in HTML."""
        await self.stop(visit)
        return _ticket(), self._waiting(visit)

    async def begin(self, visit: gr.Request, ticket: str, *values: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Runs what `values` ask for. Gives the session's key, in JSON, and what there is to say, in HTML."""
        request = DemoRequest.of(values, self.settings)
        yield gr.skip(), f"Loading {escape(str(request.model)[:100])} ..."
        paused = ticket.startswith(PAUSED)
        try:
            session = await asyncio.to_thread(open_session, request, self.models, self.limits, paused)
        except REASONS as reason:
            text = escape(" ".join(str(reason).split())[:500])
            yield gr.skip(), f"<div class='error' role='alert'>{text}</div>"
            return
        self.sessions.put(str(visit.session_hash), session)
        try:
            yield json.dumps({"session": session.key}), ""
            moved, before = time.monotonic(), -1
            while not session.done:
                await asyncio.sleep(POLL_SECONDS)
                if session.generated != before:
                    moved, before = time.monotonic(), session.generated
                if time.monotonic() - moved > IDLE_SECONDS:
                    session.control.stop()
                yield gr.skip(), gr.skip()  # where Gradio ends this, if the visitor has gone
        finally:
            session.control.stop()

    async def stop(self, visit: gr.Request) -> None:
        session = self._live(visit)
        if session is not None:
            session.control.stop()

    async def pause(self, visit: gr.Request) -> None:
        """Pauses, or goes on."""
        session = self._live(visit)
        if session is not None:
            session.control.allow(None if session.control.paused else session.generated)

    async def step(self, visit: gr.Request) -> tuple[Any, Any]:
        """One token more; without a session the ticket of one that is paused."""
        session = self._live(visit)
        if session is None:
            return PAUSED + _ticket(), self._waiting(visit)
        session.control.allow(session.generated + 1)
        return gr.skip(), gr.skip()

    def close(self, visit: gr.Request) -> None:
        self.sessions.close(str(visit.session_hash))

    def _live(self, visit: gr.Request) -> Session | None:
        session = self.sessions.of(str(visit.session_hash))
        return None if session is None or session.done else session

    def _waiting(self, visit: gr.Request) -> str:
        runs = self.limits.runs
        taken = self.sessions.busy(str(visit.session_hash)) >= runs
        return f"All {runs} places are taken; your run starts when one is free." if taken else ""


def _ticket() -> str:
    """What no ticket was before."""
    return str(time.monotonic_ns())
