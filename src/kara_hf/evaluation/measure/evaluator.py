"""Runs of the kit: every method answers the same examples, and every answer is on the disk before the next batch."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from ...cache.compressed import CompressedCache
from ...config import KaraConfig
from ...integration.generation import end_tokens, for_forward, generate, greedy, pad_token
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
        start = time.perf_counter()
        with AllocatorPeak(self.model.device) as allocator:
            cache = method.make(self.model, plan)
            late = plan.rule == QUERY_AGNOSTIC
            inputs = self._read_contexts(prompts, cache) if late else self.batch([p.ids for p in prompts])
            watch = MemoryWatch(cache)
            least = {"min_new_tokens": room} if forced else {}
            config = greedy(self.model, self.tokenizer, max_new_tokens=room, **least)
            ids = generate(self.model, cache, config, **inputs, stopping_criteria=StoppingCriteriaList([watch]))
            new = ids[:, inputs["input_ids"].shape[1] :]
        seconds = time.perf_counter() - start
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

    def _read_contexts(self, prompts: Sequence[TokenizedExample], cache: Cache) -> dict[str, torch.Tensor]:
        """Puts the contexts into `cache` and compresses them; the inputs with which their questions follow."""
        inputs = self.batch([prompt.context for prompt in prompts])
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        self.model(**inputs, position_ids=positions, logits_to_keep=1, **for_forward(self.model, cache))
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
        """Most bytes held while exactly `room` tokens are generated."""
        return self.answer(prompts, method, plan, room=room, forced=True).resident_bytes

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
        of_task = task_identity(task, examples[0])
        for rule, method, budget, seed in request.cells():
            cell = Cell(self.name, self.weights, task.name, rule, method.name, budget, request.equal, seed)
            plan = Plan(request.shared, rule, budget, [], seed, request.sharing, request.calibration)
            share = self.equal_bytes.share(trial, method, plan, request) if method.budgeted else 1.0
            plan = replace(plan, share=share)
            settings = {"share": share, "batch": request.batch, "shared": asdict(request.shared)}
            settings |= {"model": of_model, "task": of_task, **method_identity(method, plan)}
            origin = provenance(str(self.model.device)) | {"dtype": of_model["dtype"]}
            file = CellFile(out, cell, settings, origin, process)
            mine = [number for number in numbers if number % processes == process]
            missing = [number for number in mine if number not in file.done]
            label = f"{task.name} {rule} {method.name}" + (f" {100 * budget:g} %" if method.budgeted else "")
            progress(label, 1 - len(missing) / max(1, len(mine)))
            missing.sort(key=lambda number: (examples[number].example.max_new_tokens, len(examples[number].ids)))
            for first in range(0, len(missing), request.batch):
                part = [examples[number] for number in missing[first : first + request.batch]]
                file.append(self._measured(part, method, plan, request.keep_text))
                progress(label, len(part) / len(mine))
            barrier()

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
