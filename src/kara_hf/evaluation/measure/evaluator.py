"""Runs of the kit: every method answers the same examples, and every answer is on the disk before the next batch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList

from ...cache.compressed import CompressedCache
from ...config import KaraConfig, require
from ...integration.loading import any_name_of_the_cache
from ...methods.oracle import future_attention
from ...methods.registry import METHODS, RULES, Method, Plan, Skeleton, window_settings
from ...policy.sharing import PoDSharing
from ...tasks.task import Example, Task
from .memory import AllocatorPeak, MemoryWatch, held_bytes, peak_bytes
from .provenance import provenance
from .results import Cell, CellFile

REHEARSED = 8  # examples on which bytes are made equal
TOLERANCE = 0.005  # by how much of the reference's bytes a method may hold more, where it can help it
HALVINGS = 7
LOOP = 4  # repetitions at the end of an answer that count as a loop
LONGEST_PERIOD = 64  # tokens


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        methods: in the order in which they run.
        budgets: shares that are kept, in (0, 1].
        rules: keys of `kara_hf.methods.registry.RULES`.
        seeds: of random methods; others run with the first.
        n: examples of each task.
        batch: sequences generated together.
        equal: "bytes": each method gets the share with which it holds as many bytes as `reference` does with the
            budget for its share, or the budget if it cannot hold so few; "tokens": each gets the budget as its share.
        reference: the method whose bytes count.
        skeleton: what is the same for all methods.
        sharing: for methods with shared keys.
        calibration: for the method with a key calibration: its folder or hub id.
        keep_text: whether answers are kept.
    """

    methods: Sequence[Method]
    budgets: Sequence[float] = (0.5, 0.25, 0.125, 0.0625)
    rules: Sequence[str] = ("pinned",)
    seeds: Sequence[int] = (0,)
    n: int = 200
    batch: int = 16
    equal: Literal["bytes", "tokens"] = "bytes"
    reference: Method | None = None
    skeleton: Skeleton = field(default_factory=Skeleton)
    sharing: PoDSharing | None = None
    calibration: str | None = None
    keep_text: bool = True

    def __post_init__(self) -> None:
        for budget in self.budgets:
            require(0 < budget <= 1, "budgets", budget, "shares in (0, 1]")
        for rule in self.rules:
            require(rule in RULES, "rules", rule, f"one of {', '.join(RULES)}")
        require(self.equal in ("bytes", "tokens"), "equal", self.equal, "'bytes' or 'tokens'")
        for name in ("n", "batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        names = [method.name for method in self.methods]
        require(len(names) > 0, "methods", None, "the name of at least one")
        require(len(set(names)) == len(names), "methods", ",".join(names), "each of them named once")
        for method in self.methods:
            if method.shares and self.sharing is None:
                raise ValueError(f"method {method.name!r} needs a sharing map; pass --sharing DIR, or leave it out")
            if method.calibrated and self.calibration is None:
                raise ValueError(
                    f"method {method.name!r} needs a key calibration; pass --calibration DIR, or leave it out"
                )

    def cells(self) -> Iterator[tuple[str, Method, float, int]]:
        """Rule, method, budget and seed of everything that is measured of a task; what has no budget comes first."""
        for method in self.methods:
            if not method.budgeted:
                yield "none", method, 1.0, self.seeds[0]
        for rule in self.rules:
            for budget in self.budgets:
                for method in self.methods:
                    if method.budgeted:
                        for seed in self.seeds if method.random else self.seeds[:1]:
                            yield rule, method, budget, seed


@dataclass(frozen=True)
class Prompt:
    """An example as token ids: of the context, and of the question behind it (empty where it has none of its own)."""

    example: Example
    context: list[int]
    question: list[int]

    @property
    def ids(self) -> list[int]:
        return self.context + self.question


@dataclass(frozen=True)
class Answers:
    """What a batch generated, and what that took.

    Attributes:
        tokens: ids of each answer, end of sequence included.
        mean_bytes, resident_bytes, peak_bytes: of the cache, for the whole batch.
        allocated_bytes: what a GPU's allocator gave out at most for all of it; NaN elsewhere.
        steps: decode steps.
        seconds: wall time.
    """

    tokens: list[list[int]]
    mean_bytes: float
    resident_bytes: int
    peak_bytes: int
    allocated_bytes: float
    steps: int
    seconds: float


class Evaluator:
    """A model that answers examples under one method after the other.

    Args:
        model: a Transformers causal LM in evaluation mode.
        tokenizer: its tokenizer, which gets left padding.
        name: of the model in results.
        weights: which weights these are.
        limit: positions that the model has.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, weights: str, limit: int):
        self.model, self.tokenizer, self.name, self.weights, self.limit = model, tokenizer, name, weights, limit
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        self._held: dict[tuple[Any, ...], int] = {}
        self._token_bytes: float | None = None

    # --------------------------------------------------------------------------------------------------------- prompts
    def prompt(self, task: Task, number: int) -> Prompt:
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
        first = self.tokenizer(context, add_special_tokens=special)["input_ids"]
        last = self.tokenizer(question, add_special_tokens=False)["input_ids"] if question else []
        if special and question and first and first[-1] in self.ends:
            first = first[:-1]  # a tokenizer that ends every text
        if len(first) + len(last) + example.max_new_tokens > self.limit:
            raise ValueError(
                f"example {number} of {task.name} takes {len(first) + len(last)} tokens and {example.max_new_tokens} "
                f"for its answer, and {self.name} has {self.limit} positions; choose a shorter length"
            )
        return Prompt(example, first, last)

    # ------------------------------------------------------------------------------------------------------- answering
    def batch(self, parts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-padded ids and mask."""
        width = max(map(len, parts))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(part)) + list(part) for part in parts]
        mask = [[0] * (width - len(part)) + [1] * len(part) for part in parts]
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
            "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
        }

    @torch.inference_mode()
    @any_name_of_the_cache()
    def answer(
        self, prompts: Sequence[Prompt], method: Method, plan: Plan, *, room: int, forced: bool = False
    ) -> Answers:
        """Greedy answers of at most `room` tokens; exactly so many if `forced`."""
        if method.oracle and not forced:
            plan = replace(plan, future=self._future(prompts, plan, room))
        start = time.perf_counter()
        with AllocatorPeak(self.model.device) as allocator:
            cache = method.make(self.model, plan)
            inputs = (
                self._read_contexts(prompts, cache) if plan.rule == "after" else self.batch([p.ids for p in prompts])
            )
            watch = MemoryWatch(cache)
            new = self._generate(inputs, cache, room, forced, watch)
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

    def _read_contexts(self, prompts: Sequence[Prompt], cache: Any) -> dict[str, torch.Tensor]:
        """Puts the contexts into `cache` and compresses them; the inputs with which their questions follow."""
        inputs = self.batch([prompt.context for prompt in prompts])
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        self.model(**inputs, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        if isinstance(cache, CompressedCache):
            cache.compress()
        question = self.batch([prompt.question for prompt in prompts])
        return {name: torch.cat([inputs[name], question[name]], dim=1) for name in inputs}

    def _generate(
        self, inputs: dict[str, torch.Tensor], cache: Any, room: int, forced: bool, watch: MemoryWatch
    ) -> torch.Tensor:
        """New ids ``[B, steps]``."""
        out = self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=room,
            min_new_tokens=room if forced else None,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return out[:, inputs["input_ids"].shape[1] :]

    def _until_end(self, row: list[int]) -> list[int]:
        for place, token in enumerate(row):
            if token in self.ends:
                return row[: place + 1]
        return row

    def _future(self, prompts: Sequence[Prompt], plan: Plan, room: int) -> dict[int, torch.Tensor]:
        """What the oracle knows: attention in a run of the full cache over the same prompts."""
        full = self.answer(prompts, METHODS["full"], replace(plan, rule="none"), room=room)
        whole = self.batch([prompt.ids + new for prompt, new in zip(prompts, full.tokens, strict=True)])
        contexts = [len(prompt.context) if plan.rule == "after" else 0 for prompt in prompts]
        config = KaraConfig(**window_settings(plan))
        return future_attention(self.model, whole["input_ids"], whole["attention_mask"], plan.prompts, contexts, config)

    @torch.inference_mode()
    @any_name_of_the_cache()
    def token_bytes(self) -> float:
        """Bytes that the full cache takes for a token more, of one sequence."""
        if self._token_bytes is None:
            sizes = []
            for length in (16, 32):
                cache = METHODS["full"].make(self.model, Plan(Skeleton(), "none", 1.0, [length]))
                ids = torch.full((1, length), self.tokenizer.pad_token_id, device=self.model.device)
                self.model(ids, past_key_values=cache, logits_to_keep=1)
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
        together: Callable[[], object] = lambda: None,
        progress: Callable[[str, float], object] = lambda *_: None,
    ) -> None:
        """Runs every cell of a task that is not done yet, and appends each batch to its file in `out`.

        Args:
            process, processes: which part of the examples this process does, of how many.
            together: waits until all processes come here.
            progress: called with the name of a cell and which further part of it is done; parts of a cell sum to 1.

        Raises:
            ValueError: a rule does not fit the task, an example the model, or a method the model; what is measured
                until then stays.
        """
        numbers = range(request.n if task.size is None else min(request.n, task.size))
        prompts: dict[int, Prompt] = {}

        def of(number: int) -> Prompt:
            if number not in prompts:
                prompts[number] = self.prompt(task, number)
            return prompts[number]

        if "after" in request.rules and not of(0).question:
            raise ValueError(
                f"task {task.name!r} has no question apart from its context, so it cannot come after compression; "
                "leave out the rule 'after'"
            )
        rehearsed = [of(number) for number in list(numbers)[:REHEARSED]]
        for rule, method, budget, seed in request.cells():
            cell = Cell(self.name, self.weights, task.name, rule, method.name, budget, request.equal, seed)
            plan = Plan(request.skeleton, rule, budget, [], seed, request.sharing, request.calibration)
            share = self._share(rehearsed, method, plan, request) if method.budgeted else 1.0
            settings = {"share": share, "batch": request.batch, "skeleton": asdict(request.skeleton)}
            origin = provenance(str(self.model.device)) | {"dtype": str(self.model.dtype).removeprefix("torch.")}
            file = CellFile(out, cell, settings, origin, process)
            mine = [number for number in numbers if number % processes == process]
            missing = [number for number in mine if number not in file.done]
            label = f"{task.name} {rule} {method.name}" + (f" {100 * budget:g} %" if method.budgeted else "")
            progress(label, 1 - len(missing) / max(1, len(mine)))
            missing.sort(key=lambda number: (of(number).example.max_new_tokens, len(of(number).ids)))
            for first in range(0, len(missing), request.batch):
                part = [of(number) for number in missing[first : first + request.batch]]
                lengths = [len(prompt.ids) for prompt in part]
                room = max(prompt.example.max_new_tokens for prompt in part)
                answers = self.answer(part, method, replace(plan, share=share, prompts=lengths), room=room)
                file.append(self.lines(part, answers, room, request.keep_text))
                progress(label, len(part) / len(mine))
            together()

    def lines(self, prompts: Sequence[Prompt], answers: Answers, room: int, keep_text: bool) -> list[dict[str, Any]]:
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

    def _share(self, rehearsed: Sequence[Prompt], method: Method, plan: Plan, request: Request) -> float:
        """The largest share with which `method` holds no more than the reference does with the budget for its share.
        Where there is none, the budget: such a method keeps as many tokens, and holds more.
        """
        reference = request.reference
        if request.equal == "tokens" or reference is None or method.name == reference.name:
            return plan.share
        allowed = (1 + TOLERANCE) * self._rehearse(rehearsed, reference, plan)

        def fits(share: float) -> bool:
            return self._rehearse(rehearsed, method, replace(plan, share=share)) <= allowed

        low, high = 1 / request.skeleton.window, 1.0
        if fits(plan.share):
            if self._rehearse(rehearsed, method, plan) >= (1 - 3 * TOLERANCE) * allowed:
                return plan.share
            low = plan.share
        elif fits(low):
            high = plan.share
        else:
            return plan.share
        if high == 1.0 and fits(high):
            return high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _rehearse(self, prompts: Sequence[Prompt], method: Method, plan: Plan) -> int:
        """Most bytes held while so many tokens are generated as the examples' solutions have, whatever they are."""
        lengths = [len(prompt.ids) for prompt in prompts]
        room = round(sum(self._expected(prompt) for prompt in prompts) / len(prompts))
        key = (prompts[0].example.task, method.name, plan.rule, plan.share, plan.skeleton, room)
        if key not in self._held:
            plan = replace(plan, prompts=lengths, seed=0)
            self._held[key] = self.answer(prompts, method, plan, room=room, forced=True).resident_bytes
        return self._held[key]

    def _expected(self, prompt: Prompt) -> int:
        reference = prompt.example.reference
        if reference is None:
            return prompt.example.max_new_tokens
        solution = len(self.tokenizer(reference, add_special_tokens=False)["input_ids"])
        return min(prompt.example.max_new_tokens, solution + 1)


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end repeats one piece of at most `LONGEST_PERIOD` tokens `LOOP` times, or for 32 tokens if longer."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // LOOP) + 1):
        span = max(LOOP * period, 32)
        tail = tokens[-span:]
        if len(tail) == span and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False
