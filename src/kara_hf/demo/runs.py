"""Runs that are watched: each generates in a thread of its own, and those on one model take turns, step by step."""

import threading
import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import Cache

from ..cache.compressed import CompressedCache
from ..config import KaraConfig
from ..integration.generation import end_tokens
from ..methods.caches import ConfiguredCache, Full
from ..tasks.reasoner import final_answer
from .control import RunControl
from .generation import Generation, check_in_use, generate
from .models import Loaded
from .recorder import CacheRecorder
from .recording import Recording

TAIL = 120  # letters of a text that has no marked answer


class TokenTexts:
    """The text of each token where it stands, which for many tokenizers differs from its text alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
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
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class RecordedRun(threading.Thread):
    """One generation under one cache, recorded. The cache is let go of as soon as the run ends, however it ends.

    Args:
        title: what the method is called where it is shown.
        loaded: the model.
        method: what makes the cache.
        generation: what to generate.
        control: what it is driven by.

    Raises:
        ValueError: the model does not support the cache.
    """

    def __init__(
        self, title: str, loaded: Loaded, method: ConfiguredCache, generation: Generation, control: RunControl
    ):
        super().__init__(daemon=True, name=title)
        self.loaded, self.generation, self.control = loaded, generation, control
        full = isinstance(method, Full)  # made here, since `Full.make` detaches, and others may be using the model
        self.cache: Cache | None = DynamicCache(config=loaded.model.config) if full else method.make(loaded.model)
        self.recording = _empty(title, method, self.cache, generation.ids.shape[1])
        self.recorder: CacheRecorder | None = CacheRecorder(self.cache, self.recording, method)
        self.texts = TokenTexts(loaded.tokenizer)
        for token in generation.ids[0].tolist():
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
        self.control.wait(0, 0.0)
        gate = StepGate(self)
        with self.loaded.turn:
            if self.control.stopped:
                return {"reason": "stopped"}
            gate.begun = time.perf_counter()
            assert self.cache is not None
            ids = generate(self.loaded.model, self.cache, self.generation, [gate])
        return self._verdict(ids[0, self.generation.ids.shape[1] :], gate.last)

    def _verdict(self, new: torch.Tensor, last: bool) -> dict[str, Any]:
        """How it ended, and for a run to its end whether the answer is right."""
        example = self.generation.example
        if not last:
            return {"reason": "stopped"}
        end: dict[str, Any] = {"reason": "end" if len(new) < self.generation.max_new_tokens else "limit"}
        if example is not None:
            text = self.loaded.tokenizer.decode(new, skip_special_tokens=True)
            answer = final_answer(text) if self.loaded.own_words else text.strip()[-TAIL:]
            end |= {"answer": answer, "expected": ", ".join(example.answers), "score": example.score(text)}
        return end


class StepGate(StoppingCriteria):
    """What happens between two steps of a run: the last is recorded, and the next one waits for its turn.

    Attributes:
        begun: when the step began that goes on.
        last: whether the run generated all that it should.
    """

    def __init__(self, run: RecordedRun):
        self.run, self.generated = run, 0
        self.begun = 0.0
        self.last = False
        self.ends = end_tokens(run.loaded.model)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        run, token = self.run, int(input_ids[0, -1])
        now = time.perf_counter()
        self.generated += 1
        assert run.cache is not None and run.recorder is not None
        check_in_use(run.cache, run.generation.ids.shape[1] + self.generated - 1)
        run.recorder.step(run.texts.next(token), now - self.begun)
        self.last = token in self.ends or self.generated >= run.generation.max_new_tokens
        if not self.last:
            run.loaded.turn.release()
            try:
                run.control.wait(self.generated, self.begun)
            finally:
                run.loaded.turn.acquire()
        self.begun = time.perf_counter()
        stop = run.control.stopped and not self.last
        return torch.full((len(input_ids),), stop, device=input_ids.device)  # type: ignore[return-value]


def _empty(title: str, method: ConfiguredCache, cache: Cache, prompt: int) -> Recording:
    """The recording of a run that has not begun."""
    settings = method.describe()
    if not isinstance(cache, CompressedCache):
        return Recording(title, settings, "all", prompt, whole=prompt, recent=0)
    config = cache.policy.config
    pins = [list(stretch) for stretch in config.pin]
    if isinstance(config, KaraConfig):
        whole = 0 if config.compress_prompt else prompt
        return Recording(title, settings, "windows", prompt, whole, int(config.recent), config.block_size, pins=pins)
    return Recording(title, settings, "budget", prompt, 0, int(config.protected), config.block_size, pins=pins)
