"""What is known of an engine's requests beside what the engine knows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .compressor import Compressor
from .plans import ServedRequest
from .prompts import PromptCompressor
from .queries import QueryPool


class Requests:
    """The requests of which tokens can be evicted, or have queries held.

    Args:
        queries: that requests hold.
        compressor: of windows.
        prompts: of prompts.

    Attributes:
        known: by id: the engine's state, and what we know of it. A fork's state is None until the engine has made it.
    """

    def __init__(self, queries: QueryPool, compressor: Compressor, prompts: PromptCompressor):
        self.queries, self.compressor, self.prompts = queries, compressor, prompts
        self.known: dict[str, tuple[Any, ServedRequest]] = {}

    def find(self, state: Any) -> ServedRequest | None:
        """What is known of a state of the engine."""
        known, request = self.known.get(state.request_id, (None, None))
        return request if known is state else None

    def evicted(self, request_id: str) -> int:
        """Tokens that were evicted of a request, if any."""
        _, request = self.known.get(request_id, (None, None))
        return 0 if request is None else request.evicted

    def at(self, state: Any) -> ServedRequest | None:
        """What is known of a request; from its first step on in which tokens come that can be evicted, or that vote."""
        request, prompt = self.find(state), prompt_tokens(state)
        voters = self.prompts.voters(prompt)
        if request is None and state.position_offset + len(state.tokens_to_process) > prompt - voters:
            # Tokens of a trace that came as a shared prefix have no queries here: they stay.
            settled = max(prompt, state.position_offset)
            request = ServedRequest(
                state.request_id,
                settled,
                state.position_offset,
                prompt if voters else 0,
                pins=self.compressor.config.kara.pin,
            )
            self.known[state.request_id] = (state, request)
        return request

    def active(self, active: Mapping[str, Any]) -> list[ServedRequest]:
        """Those whose tokens are in the pool."""
        return [request for key, (_, request) in self.known.items() if key in active]

    def fork(self, state: Any, keys: Sequence[str]) -> None:
        """Children begin where their parent is in its prompt, with copies of the queries that it holds."""
        parent = self.find(state)
        if parent is not None:
            for key in keys:
                voters = self.queries.copy(parent.voters)
                prompt = 0 if voters is None else parent.prompt
                self.known[key] = (None, replace(parent, key=key, prompt=prompt, slots=[], voters=voters or []))

    def sweep(self, scheduler: Any) -> None:
        """Forgets requests that were cancelled while their blocks were elsewhere, and knows forks from now on."""
        for key, (state, request) in list(self.known.items()):
            found = scheduler.active_requests.get(key, scheduler.waiting_requests.get(key))
            if state is None and found is not None:
                self.known[key] = (found, request)
            elif found is None or found is not state:
                self.forget(key)

    def freed(self, request_id: str) -> None:
        """The blocks of a request are free; it is forgotten unless they went to come back."""
        if request_id in self.known:
            state, _ = self.known[request_id]
            if state is None or not state.is_cpu_offloaded:
                self.forget(request_id)

    def forget(self, key: str) -> None:
        """Of a request that is gone nothing is held any more."""
        _, request = self.known.pop(key)
        self.compressor.drop(request)
        self.prompts.drop(request)


def prompt_tokens(state: Any) -> int:
    """Of the prompt that a request came with, though its trace may have become part of what the engine reads."""
    tokens: int = state._true_initial_tokens or len(state.initial_tokens)
    return tokens
