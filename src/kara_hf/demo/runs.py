"""Runs in the background: each generates in a thread of its own, and those on one model take turns, step by step."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from ..cache.compressed import CompressedCache
from ..config import KaraConfig
from ..methods.caches import Full, Method
from ..tasks.reasoner import final_answer
from ..tasks.task import Example
from .models import Loaded
from .recorder import Recorder
from .recording import Recording

TAIL = 120  # letters of a text that has no marked answer


class Remote:
    """What is done to the runs of a show from outside: stopping, pausing, single steps, and how fast they may go."""

    def __init__(self, *, paused: bool = False, pace: float = 0.0):
        self.pace = pace  # tokens per second at most, 0 for no limit
        self.stopped = False
        self._allowed: int | None = 0 if paused else None  # tokens that each run may have; None for any number
        self._changed = threading.Condition()

    @property
    def paused(self) -> bool:
        return self._allowed is not None

    def stop(self) -> None:
        self.stopped = True
        self.allow(None)

    def allow(self, generated: int | None) -> None:
        """Lets every run go on until it has so many tokens, and wait there; None: without end."""
        with self._changed:
            self._allowed = generated
            self._changed.notify_all()

    def wait(self, generated: int, since: float) -> None:
        """Returns once a run that has `generated` tokens, the last one begun at `since`, may make the next."""
        with self._changed:
            while not self.stopped:
                early = since + 1 / self.pace - time.perf_counter() if self.pace and generated else 0.0
                if self._allowed is not None and generated >= self._allowed:
                    self._changed.wait()
                elif early > 0:
                    self._changed.wait(early)
                else:
                    return


class Noise(LogitsProcessor):
    """Sampling by the Gumbel trick, from numbers of its own: runs with one seed draw alike, whatever else runs.

    Args:
        temperature: above 0.
        seed: of the draws.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        uniform = torch.rand(scores.shape, generator=self.generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)  # type: ignore[return-value]


@dataclass(frozen=True)
class Plan:
    """What all runs of a show have in common.

    Attributes:
        ids: token ids of the prompt, ``[1, S]``.
        max_new_tokens: tokens generated at most.
        temperature: 0 for greedy.
        seed: of sampling.
        example: what the prompt asks, where its answer is known.
    """

    ids: torch.Tensor
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    example: Example | None = None


class Texts:
    """The text of each token where it stands, which for many tokenizers differs from its text alone."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self._before = tokenizer, -1
        self._known: dict[tuple[int, int], str] = {}

    def next(self, token: int) -> str:
        pair = self._before, token
        if pair not in self._known:
            if self._before < 0:
                self._known[pair] = self._decode([token])
            else:
                self._known[pair] = self._decode([*pair]).removeprefix(self._decode([self._before]))
        self._before = token
        return self._known[pair]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class Run(threading.Thread):
    """One generation under one cache, recorded. The cache is let go of as soon as the run ends, however it ends.

    Args:
        title: what the method is called where it is shown.
        loaded: the model.
        method: what makes the cache.
        plan: what to generate.
        remote: what it is driven by.

    Raises:
        ValueError: the model does not support the cache.
    """

    def __init__(self, title: str, loaded: Loaded, method: Method, plan: Plan, remote: Remote):
        super().__init__(daemon=True, name=title)
        self.loaded, self.plan, self.remote = loaded, plan, remote
        full = isinstance(method, Full)  # made here, since `Full.make` detaches, and others may be using the model
        self.cache: Any = DynamicCache(config=loaded.model.config) if full else method.make(loaded.model)
        self.recording = _empty(title, method, self.cache, plan.ids.shape[1])
        self.recorder: Recorder | None = Recorder(self.cache, self.recording, method)
        self.texts = Texts(loaded.tokenizer)
        for token in plan.ids[0].tolist():
            self.texts.next(token)

    def run(self) -> None:
        end: dict[str, Any] = {"reason": "error"}
        torch.set_num_threads(self.loaded.threads)  # of this thread
        begun = time.perf_counter()
        try:
            end = self._generate()
        except Exception as error:  # whatever it is, it is shown, and the demo goes on
            end["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        finally:
            recorder, self.recorder, self.cache = self.recorder, None, None
            assert recorder is not None
            recorder.finish({**end, "seconds": round(time.perf_counter() - begun, 3)})

    def _generate(self) -> dict[str, Any]:
        plan, loaded = self.plan, self.loaded
        self.remote.wait(0, 0.0)
        step = Step(self)
        loaded.turns.take()
        try:
            if self.remote.stopped:
                return {"reason": "stopped"}
            step.begun = time.perf_counter()
            ids = loaded.model.generate(
                input_ids=plan.ids,
                attention_mask=torch.ones_like(plan.ids),
                past_key_values=self.cache,
                max_new_tokens=plan.max_new_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=[Noise(plan.temperature, plan.seed)] if plan.temperature else [],
                stopping_criteria=[step],
            )
        finally:
            loaded.turns.pass_on()
        return self._verdict(ids[0, plan.ids.shape[1] :], step.last)

    def _verdict(self, new: torch.Tensor, last: bool) -> dict[str, Any]:
        """How it ended, and for a run to its end whether the answer is right."""
        example = self.plan.example
        if not last:
            return {"reason": "stopped"}
        end: dict[str, Any] = {"reason": "end" if len(new) < self.plan.max_new_tokens else "limit"}
        if example is not None:
            text = self.loaded.tokenizer.decode(new, skip_special_tokens=True)
            answer = final_answer(text) if self.loaded.bundled else text.strip()[-TAIL:]
            end |= {"answer": answer, "expected": ", ".join(example.answers), "score": example.score(text)}
        return end


class Step(StoppingCriteria):
    """What happens between two steps of a run: the last is recorded, and the next one waits for its turn."""

    def __init__(self, run: Run):
        self.run, self.generated = run, 0
        self.begun = 0.0
        self.last = False
        ends = run.loaded.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        run, token = self.run, int(input_ids[0, -1])
        now = time.perf_counter()
        self.generated += 1
        assert run.recorder is not None
        run.recorder.step(run.texts.next(token), now - self.begun)
        self.last = token in self.ends or self.generated >= run.plan.max_new_tokens
        if not self.last:
            run.loaded.turns.pass_on()
            try:
                run.remote.wait(self.generated, self.begun)
            finally:
                run.loaded.turns.take()
        self.begun = time.perf_counter()
        stop = run.remote.stopped and not self.last
        return torch.full((len(input_ids),), stop, device=input_ids.device)  # type: ignore[return-value]


def _empty(title: str, method: Method, cache: Any, prompt: int) -> Recording:
    """The recording of a run that has not begun."""
    settings = method.describe()
    if not isinstance(cache, CompressedCache):
        return Recording(title, settings, "all", prompt, pinned=prompt, recent=0)
    config = cache.policy.config
    if isinstance(config, KaraConfig):
        pinned = 0 if config.compress_prompt else prompt
        return Recording(title, settings, "windows", prompt, pinned, config.recent, config.block_size)
    return Recording(title, settings, "budget", prompt, 0, config.protected, config.block_size)
