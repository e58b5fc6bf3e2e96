"""Runs of the kit: every method answers the same examples, and every answer is on the disk before the next batch."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from ...cache.compressed import CompressedCache
from ...config import KaraConfig
from ...integration.generation import end_tokens, for_forward, generate, greedy, pad_token, read_prompt
from ...integration.reading import Reading
from ...methods.oracle import Future, future_attention
from ...methods.registry import METHODS, Method, Plan, SharedSettings, window_settings
from ...methods.rules import QUERY_AGNOSTIC
from ...needs import check_needs
from ...tasks.task import Task
from .equal_bytes import TRIAL_EXAMPLES, EqualBytes
from .identity import method_identity, model_identity, task_identity
from .memory import AllocatorPeak, MemoryWatch, held_bytes, peak_bytes
from .provenance import provenance
from .request import Answers, Request, TokenizedExample
from .results import Cell, CellFile
from .stand_in import stand_in, will_do

LOOP = 4  # repetitions at the end of an answer that count as a loop
LONGEST_PERIOD = 64  # tokens


class Evaluator:
    """A model that answers examples under one method after the other.

    Answers are greedy, with a cache, up to the model's end tokens: no other field of its `generation_config` counts.

    Args:
        model: a Transformers causal LM in evaluation mode.
        tokenizer: its tokenizer, which gets left padding.
        name: of the model in results.
        weights: which weights these are.
        limit: positions that the model has.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, weights: str, limit: int):
        self.model, self.tokenizer, self.name, self.weights, self.limit = model, tokenizer, name, weights, limit
        self.pad = pad_token(model, tokenizer)
        self.equal_bytes = EqualBytes(self._trial)
        self._readings = _Readings(model)
        self._token_bytes: float | None = None

    @property
    def ends(self) -> set[int]:
        """Ids that end an answer, as the model says now."""
        return set(end_tokens(self.model))

    # --------------------------------------------------------------------------------------------------------- prompts
    def prompt(self, task: Task, number: int) -> TokenizedExample:
        """The example of that number as token ids.

        Raises:
            ValueError: the model has not so many positions.
        """
        example = task.example(number)
        context, question, special = example.context, example.question, True
        if task.chat and self.tokenizer.chat_template:
            content = [{"role": "user", "content": context + question}]
            whole = self.tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
            place = whole.rfind(question.strip()) if question.strip() else len(whole)
            if place < 0:
                raise ValueError(f"the chat template of {self.name} changes the question of {task.name}; use --no-chat")
            context, question, special = whole[:place], whole[place:], False
        first = self._ids(context, special)
        last = self._ids(question) if question else []
        if special and question and first and first[-1] in self.ends:
            first = first[:-1]  # a tokenizer that ends every text
        if len(first) + len(last) + example.max_new_tokens > self.limit:
            raise ValueError(
                f"example {number} of {task.name} takes {len(first) + len(last)} tokens and {example.max_new_tokens} "
                f"for its answer, and {self.name} has {self.limit} positions; choose a shorter length"
            )
        expected = example.max_new_tokens
        if example.reference is not None:
            expected = min(expected, len(self._ids(example.reference)) + 1)
        return TokenizedExample(example, first, last, expected)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    # ------------------------------------------------------------------------------------------------------- answering
    def batch(self, parts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-padded ids and mask, each ``[B, S]`` int64."""
        width = max(map(len, parts))
        ids = [[self.pad] * (width - len(part)) + list(part) for part in parts]
        mask = [[0] * (width - len(part)) + [1] * len(part) for part in parts]
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
            "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
        }

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[TokenizedExample], method: Method, plan: Plan, *, room: int, forced: bool = False
    ) -> Answers:
        """Greedy answers of at most `room` tokens; exactly so many if `forced`.

        Raises:
            ValueError: the model does not support the method, or leaves the cache that it was given.
        """
        if method.oracle and not forced:
            plan = replace(plan, future=self._future(prompts, plan, room))
        late = plan.rule == QUERY_AGNOSTIC
        inputs = self.batch([prompt.context if late else prompt.ids for prompt in prompts])
        reading = self._readings.of(inputs)
        start = time.perf_counter()
        with AllocatorPeak(self.model.device) as allocator:
            cache = method.make(self.model, plan)
            if reading is None or not reading.fits(cache):
                reading = None
            else:
                reading.into(cache, complete=not late)
            if late:
                inputs = self._with_questions(prompts, cache, inputs, is_read=reading is not None)
            first = self._first_tokens(reading, forced) if reading is not None and not late else None
            new, watch = self._generate(cache, inputs, room, forced, first)
        seconds = time.perf_counter() - start + (0.0 if reading is None else reading.seconds)
        most = watch.most or held_bytes(cache)
        return Answers(
            tokens=[self._until_end(row) for row in new.tolist()],
            mean_bytes=watch.mean,
            resident_bytes=most,
            peak_bytes=max(most, peak_bytes(cache)),
            allocated_bytes=allocator.bytes,
            steps=new.shape[1],
            seconds=seconds,
        )

    def _first_tokens(self, reading: Reading, forced: bool) -> torch.Tensor:
        """What follows a prompt that was read, ``[B, 1]`` int64; no end if answers are `forced`."""
        logits = reading.logits.float()
        if forced:
            logits[:, sorted(self.ends)] = -math.inf
        return logits.argmax(-1, keepdim=True)

    def _generate(
        self, cache: Cache, inputs: dict[str, torch.Tensor], room: int, forced: bool, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, MemoryWatch]:
        """New tokens ``[B, n]``, `first` among them where the prompt was read before, and what was held."""
        watch = MemoryWatch(cache, reads=first is None)
        begun = inputs["input_ids"].shape[1]
        if first is not None:
            if room == 1 or all(int(token) in self.ends for token in first):
                return first, watch
            inputs = {
                "input_ids": torch.cat([inputs["input_ids"], first], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1),
            }
            room -= 1
        least = {"min_new_tokens": room} if forced else {}
        config = greedy(self.model, self.tokenizer, max_new_tokens=room, **least)
        ids = generate(self.model, cache, config, **inputs, stopping_criteria=StoppingCriteriaList([watch]))
        return ids[:, begun:], watch

    def _with_questions(
        self, prompts: Sequence[TokenizedExample], cache: Cache, inputs: dict[str, torch.Tensor], is_read: bool
    ) -> dict[str, torch.Tensor]:
        """Compresses the contexts in `cache`, which are read first if they are not; the inputs with their questions."""
        if not is_read:
            read_prompt(self.model, cache, **inputs)
        if isinstance(cache, CompressedCache):
            cache.compress()
        question = self.batch([prompt.question for prompt in prompts])
        return {name: torch.cat([inputs[name], question[name]], dim=1) for name in inputs}

    def _until_end(self, row: list[int]) -> list[int]:
        ends = self.ends
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        return row[:stop]

    def _future(self, prompts: Sequence[TokenizedExample], plan: Plan, room: int) -> Future:
        """What the oracle knows: attention in a run of the full cache over the same prompts."""
        full = self.answer(prompts, METHODS["full"], replace(plan, rule="none"), room=room)
        whole = self.batch([prompt.ids + new for prompt, new in zip(prompts, full.tokens, strict=True)])
        contexts = [len(prompt.context) if plan.rule == QUERY_AGNOSTIC else 0 for prompt in prompts]
        config = KaraConfig(**window_settings(plan))
        return future_attention(self.model, whole["input_ids"], whole["attention_mask"], plan.prompts, contexts, config)

    def _trial(self, prompts: Sequence[TokenizedExample], method: Method, plan: Plan, room: int) -> int:
        """Most bytes held while exactly `room` tokens are generated; by a stand-in where that tells, which is cheap."""
        light = self._light if will_do(method, plan) else None
        return (light or self).most_held(prompts, method, plan, room)

    @torch.inference_mode()
    def most_held(self, prompts: Sequence[TokenizedExample], method: Method, plan: Plan, room: int) -> int:
        """Most bytes held while `room` tokens, whatever they are, are decoded behind the prompts: by a cache of this
        package many in one forward, those of the prompts over again.
        """
        cache = method.make(self.model, plan)
        if not isinstance(cache, CompressedCache):
            return self.answer(prompts, method, plan, room=room, forced=True).resident_bytes
        late = plan.rule == QUERY_AGNOSTIC
        inputs = self.batch([prompt.context if late else prompt.ids for prompt in prompts])
        seen = 0
        if late:
            seen = inputs["input_ids"].shape[1]
            inputs = self._with_questions(prompts, cache, inputs, is_read=False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        read_prompt(self.model, cache, ids[:, seen:], mask)
        again = ids[:, torch.arange(room) % ids.shape[1]]
        seen, most = 1, 0  # the last token that is generated is not read
        with cache.replaying():
            while seen < room:
                part = again[:, seen : seen + cache.replayable]
                mask = torch.cat([mask, mask.new_ones(part.shape)], 1)
                read_prompt(self.model, cache, part, mask)
                seen, most = seen + part.shape[1], max(most, held_bytes(cache))
        return most or held_bytes(cache)

    @cached_property
    def _light(self) -> "Evaluator | None":
        """The same for a model that stands in for this one, if there is one."""
        model = stand_in(self.model)
        return model and Evaluator(model, self.tokenizer, name=self.name, weights="", limit=self.limit)

    @torch.inference_mode()
    def token_bytes(self) -> float:
        """Bytes that the full cache takes for a token more, of one sequence."""
        if self._token_bytes is None:
            sizes = []
            for length in (16, 32):
                cache = METHODS["full"].make(self.model, Plan(SharedSettings(), "none", 1.0, [length]))
                ids = torch.full((1, length), self.pad, device=self.model.device)
                self.model(ids, logits_to_keep=1, **for_forward(self.model, cache))
                sizes.append(held_bytes(cache))
            self._token_bytes = (sizes[1] - sizes[0]) / 16
        return self._token_bytes

    # ------------------------------------------------------------------------------------------------------- measuring
    def measure(
        self,
        task: Task,
        request: Request,
        out: Path,
        *,
        process: int = 0,
        processes: int = 1,
        barrier: Callable[[], object] = lambda: None,
        progress: Callable[[str, float], object] = lambda *_: None,
    ) -> None:
        """Runs every cell of a task that is not done yet, and appends each batch to its file in `out`.

        A batch is read once and answered under one method after the other.

        Args:
            process, processes: which part of the examples this process does, of how many.
            barrier: waits until all processes come here.
            progress: called with the name of a cell and which further part of it is done; parts of a cell sum to 1.

        Raises:
            ValueError: a rule does not fit the task, an example the model, or a method the model; what is measured
                until then stays. Or `out` holds results of other settings; they are not added to.
            ImportError: a method needs a package that is not installed; nothing is measured then.
        """
        check_needs(request.needs())
        numbers = range(request.n if task.size is None else min(request.n, task.size))
        examples = _Examples(lambda number: self.prompt(task, number))
        if QUERY_AGNOSTIC in request.rules and not examples[0].question:
            raise ValueError(
                f"task {task.name!r} has no question apart from its context, so it cannot come after compression; "
                f"leave out the rule {QUERY_AGNOSTIC!r}"
            )
        trial = [examples[number] for number in numbers[:TRIAL_EXAMPLES]]
        of_model = model_identity(self.model, self.tokenizer)
        of_run = {"batch": request.batch, "shared": asdict(request.shared), "model": of_model}
        of_run |= {"task": task_identity(task, examples[0])}
        cells = [self._open(*cell, task.name, request, trial, of_run, out, process) for cell in request.cells()]
        barrier()
        mine = [number for number in numbers if number % processes == process]
        for cell in cells:
            progress(cell.label, sum(number in cell.file.done for number in mine) / max(1, len(mine)))
        mine.sort(key=lambda number: (examples[number].example.max_new_tokens, len(examples[number].ids)))
        for first in range(0, len(mine), request.batch):
            for cell in cells:
                missing = [number for number in mine[first : first + request.batch] if number not in cell.file.done]
                if missing:
                    part = [examples[number] for number in missing]
                    cell.file.append(self._measured(part, cell.method, cell.plan, request.keep_text))
                    progress(cell.label, len(missing) / len(mine))
        self._readings.clear()
        barrier()

    def _open(
        self,
        rule: str,
        method: Method,
        budget: float,
        seed: int,
        task: str,
        request: Request,
        trial: Sequence[TokenizedExample],
        of_run: dict[str, Any],
        out: Path,
        process: int,
    ) -> "_OpenCell":
        """A cell with the share that it is measured with, and its file."""
        plan = Plan(request.shared, rule, budget, [], seed, request.sharing)
        share = self.equal_bytes.share(trial, method, plan, request) if method.budgeted else 1.0
        plan = replace(plan, share=share)
        settings = {"share": share, **of_run, **method_identity(method, plan, self.model)}
        origin = provenance(str(self.model.device)) | {"dtype": of_run["model"]["dtype"]}
        cell = Cell(self.name, self.weights, task, rule, method.name, budget, request.equal, seed)
        label = f"{task} {rule} {method.name}" + (f" {100 * budget:g} %" if method.budgeted else "")
        return _OpenCell(label, method, plan, CellFile(out, cell, settings, origin, process))

    def _measured(
        self, part: Sequence[TokenizedExample], method: Method, plan: Plan, keep_text: bool
    ) -> list[dict[str, Any]]:
        """Answers a batch: one line of results for each example."""
        room = max(prompt.example.max_new_tokens for prompt in part)
        plan = replace(plan, prompts=[len(prompt.ids) for prompt in part])
        return self.lines(part, self.answer(part, method, plan, room=room), room, keep_text)

    def lines(
        self, prompts: Sequence[TokenizedExample], answers: Answers, room: int, keep_text: bool
    ) -> list[dict[str, Any]]:
        """One line of results for each example of a batch."""
        lines, size = [], len(prompts)
        for prompt, tokens in zip(prompts, answers.tokens, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            truncated = len(tokens) == room and tokens[-1] not in self.ends
            lines.append(
                {
                    "number": prompt.example.number,
                    "score": float(prompt.example.score(text)),
                    "generated": len(tokens),
                    "truncated": truncated,
                    "looped": truncated and loops(tokens),
                    "distance": prompt.example.distance,
                    "prompt": len(prompt.ids),
                    "mean_bytes": answers.mean_bytes / size,
                    "resident_bytes": answers.resident_bytes // size,
                    "peak_bytes": answers.peak_bytes // size,
                    "allocated_bytes": None if math.isnan(answers.allocated_bytes) else answers.allocated_bytes / size,
                    "full_bytes": round((len(prompt.ids) + answers.steps - 1) * self.token_bytes()),
                    "seconds": answers.seconds / size,
                    "text": text if keep_text else "",
                }
            )
        return lines


@dataclass(frozen=True)
class _OpenCell:
    """A cell that is being measured."""

    label: str
    method: Method
    plan: Plan
    file: CellFile


class _Readings:
    """Prompts as they were read last, whole and without their questions, for all methods that answer them.

    On a GPU nothing is shared: what its allocator gives out for a method, the reading included, is measured there.
    """

    def __init__(self, model: Any):
        self.model = model
        self._kept: dict[bytes, Reading] = {}

    def of(self, inputs: dict[str, torch.Tensor]) -> Reading | None:
        """The reading of ids and mask, each ``[B, S]``; None on a GPU."""
        if self.model.device.type == "cuda":
            return None
        key = b"".join(inputs[name].cpu().numpy().tobytes() for name in ("input_ids", "attention_mask"))
        if key not in self._kept:
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = Reading(self.model, **inputs)
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()


class _Examples(dict[int, TokenizedExample]):
    """Examples by number, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], TokenizedExample]):
        super().__init__()
        self._make = make

    def __missing__(self, number: int) -> TokenizedExample:
        self[number] = self._make(number)
        return self[number]


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end repeats one piece of at most `LONGEST_PERIOD` tokens `LOOP` times, or for 32 tokens if longer."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // LOOP) + 1):
        span = max(LOOP * period, 32)
        tail = tokens[-span:]
        if len(tail) == span and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False
