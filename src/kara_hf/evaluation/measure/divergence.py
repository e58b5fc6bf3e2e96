"""Divergence: how far every method moves a model from its full cache, token by token, at equal resident bytes.

    documents = [Document(ids, prompt=256) for ids in texts]
    frame = divergence(model, documents, ["kara", "random"], [0.5, 0.25], out="results")

It costs what reading costs: each method reads a document once, in forwards of many tokens. Where its bytes have to be
made equal, a small model that stands in reads one more often.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from ...config import KaraConfig, is_int, require
from ...integration.attach import unwrap
from ...integration.identity import forward_identity, short_digest
from ...methods.oracle import Future, future_attention
from ...methods.registry import Method, Plan, make_method, window_settings
from ...methods.rules import SINGLE_TEXT_RULES
from ...needs import check_needs
from .diverged import LINES, TASK, arrays_of, load_divergence
from .equal_bytes import ShareCurve
from .forced import Document, Outcome, read_together
from .identity import method_identity, weights_of
from .provenance import provenance
from .request import Request
from .results import Cell, CellFile, stored_settings
from .stand_in import stand_in, will_do

T = TypeVar("T")
ROUNDS = 4  # readings of the document on which bytes are made equal, at most


@dataclass
class Work:
    """A cell, and how far it is.

    Attributes:
        file: None until its share is known.
        tried: what the document on which bytes are made equal said, by share.
    """

    cell: Cell
    method: Method
    plan: Plan
    settings: dict[str, Any]
    file: CellFile | None = None
    tried: dict[float, Outcome] = field(default_factory=dict)

    @property
    def label(self) -> str:
        share = f" {100 * self.cell.budget:g} %" if self.method.budgeted else ""
        return f"{self.method.name}{share}, {self.cell.rule}"


def divergence(
    model: Any,
    documents: Sequence[Document],
    methods: Sequence[str | Method],
    budgets: Sequence[float],
    *,
    out: str | Path,
    data: str = "documents",
    step: int = 32,
    batch: int = 4,
    together: int = 16,
    name: str | None = None,
    weights: str | None = None,
    progress: Callable[[str, float], object] = lambda *_: None,
    **settings: Any,
) -> pd.DataFrame:
    """Forces documents through every method and the full cache, and keeps a line for each document and cell in `out`.

    What `out` holds already is not measured again. A budget is a share of the full cache's bytes, of which a method
    holds so much at most; the share of tokens that it has to keep for that is found on one document. With
    ``equal="tokens"`` the budget is that share.

    Args:
        model: a Transformers causal LM in evaluation mode.
        documents: from `Document`.
        methods: names that `kara_hf.evaluation.make_method` knows, or methods.
        budgets: in (0, 1].
        out: folder of results.
        data: what the documents are called in results.
        step: tokens of each document that are read at once, and whose logits lie in memory.
        batch: documents that are read together where they have one length.
        together: caches that are read together, beside the full one.
        name, weights: of the model in results; None: from its `name_or_path`.
        progress: called with what is read and how many further documents of all cells were read, in parts.
        settings: of `Request`: rules ("prompt-kept", "query-aware"), seeds, equal, shared, sharing.

    Returns:
        As `load_divergence`, of all that `out` holds.

    Raises:
        ValueError: something asked is not possible, or `out` holds results of other settings or documents.
        ImportError: a method needs a package that is not installed.
    """
    request = Request([make_method(each) if isinstance(each, str) else each for each in methods], budgets, **settings)
    for key, value in (("step", step), ("batch", batch), ("together", together)):
        require(is_int(value) and value >= 1, key, value, "a whole number from 1 on")
    for rule in request.rules:
        require(rule in SINGLE_TEXT_RULES, "rules", rule, f"one of {', '.join(SINGLE_TEXT_RULES)} for documents")
    _check_documents(model, documents)
    check_needs({method.name: method.needs for method in request.methods})
    place = str(getattr(unwrap(model).config, "_name_or_path", "") or "model")
    run = _Run(
        model,
        documents,
        request,
        Path(out),
        name=name or Path(place).name,
        weights=weights or weights_of(model, place),
        data=data,
        step=step,
        batch=batch,
        together=together,
        progress=progress,
    )
    run.measure()
    return load_divergence(out)


def _check_documents(model: Any, documents: Sequence[Document]) -> None:
    require(len(documents) > 0, "documents", list(documents), "at least one")
    config = unwrap(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    words = model.get_input_embeddings().num_embeddings
    for number, document in enumerate(documents):
        if limit is not None and len(document.ids) > limit:
            raise ValueError(
                f"document {number} has {len(document.ids)} tokens, and the model has {limit} positions; cut it"
            )
        most, least = max(document.ids), min(document.ids)
        if least < 0 or most >= words:
            raise ValueError(
                f"document {number} has the token {least if least < 0 else most}, and the model's vocabulary goes from "
                f"0 to {words - 1}; make its ids with the model's own tokenizer"
            )


def _told(works: Sequence[Work]) -> str:
    return works[0].label if len(works) == 1 else f"{works[0].label} and {len(works) - 1} more"


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class _Run:
    """One call of `divergence`."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Document],
        request: Request,
        out: Path,
        *,
        name: str,
        weights: str,
        data: str,
        step: int,
        batch: int,
        together: int,
        progress: Callable[[str, float], object],
    ):
        self.model, self.documents, self.request, self.out = model, documents, request, out
        self.step, self.batch, self.together, self.progress = step, batch, together, progress
        self.digests = [short_digest([list(map(int, each.ids)), each.prompt]) for each in documents]
        self.origin = provenance(str(model.device))
        self.works = []
        of_model = forward_identity(model)
        for rule, method, budget, seed in request.cells():
            cell = Cell(name, weights, TASK + data, rule, method.name, budget, request.equal, seed)
            plan = Plan(request.shared, rule, budget, [], seed, request.sharing)
            fixed = {"shared": asdict(request.shared), "step": step, "model": of_model, "resident": "most"}
            work = Work(cell, method, plan, fixed | method_identity(method, plan, model))
            found = stored_settings(out, cell, LINES)
            if found is not None:
                self._open(work, found.get("share"))
            elif not method.budgeted or request.equal == "tokens":
                self._open(work, plan.share)
            self.works.append(work)

    def measure(self) -> None:
        lengths = sorted(range(len(self.documents)), key=lambda number: len(self.documents[number].ids))
        trial = lengths[len(lengths) // 2]
        if self._open_works() and (light := stand_in(self.model)) is not None:
            self._make_equal([work for work in self._open_works() if will_do(work.method, work.plan)], light, trial)
        self._make_equal(self._open_works(), self.model, trial)
        for numbers in self._batches(lengths):
            missing = [work for work in self.works if work.file and not work.file.done.issuperset(numbers)]
            for part in _parts(missing, self.together):
                outcomes = self._read(self.model, part, [work.plan for work in part], numbers, counted=True)
                for work, found in zip(part, outcomes, strict=True):
                    for number, outcome in zip(numbers, found, strict=True):
                        self._keep(work, number, outcome)

    def _batches(self, numbers: Iterable[int]) -> Iterable[Sequence[int]]:
        """Numbers of documents that are not done by all, in batches of one shape."""
        left = [number for number in numbers if any(work.file and number not in work.file.done for work in self.works)]

        def shape(number: int) -> tuple[int, int]:
            return len(self.documents[number].ids), self.documents[number].prompt

        for _, alike in groupby(sorted(left, key=shape), key=shape):
            yield from _parts(list(alike), self.batch)

    # ----------------------------------------------------------------------------------------------------- equal bytes
    def _open_works(self) -> list[Work]:
        """Cells whose share is not known."""
        return [work for work in self.works if work.file is None]

    def _make_equal(self, open_works: list[Work], model: Any, trial: int) -> None:
        """Finds the shares of cells that have none yet: `model`, which may stand in for the one that is measured, reads
        the document `trial`. What the measured one says of it counts.
        """
        curves: dict[tuple[str, str], ShareCurve] = {}
        next_share = {id(work): work.cell.budget for work in open_works}
        for last in (False,) * (ROUNDS - 1) + (True,):
            for part in _parts(open_works, self.together):
                plans = [replace(work.plan, share=next_share[id(work)]) for work in part]
                for work, plan, (outcome,) in zip(part, plans, self._read(model, part, plans, [trial]), strict=True):
                    work.tried[plan.share] = outcome
                    curve = curves.setdefault((work.cell.rule, work.method.name), ShareCurve(plan.shared.window))
                    curve.add(plan.share, outcome.resident_bytes / outcome.full_bytes)
            still = []
            for work in open_works:
                curve = curves[work.cell.rule, work.method.name]
                share = None if last else curve.next_share(work.cell.budget, tried=work.tried)
                if share is not None:
                    next_share[id(work)] = share
                    still.append(work)
                    continue
                self._open(work, curve.best(work.cell.budget, work.tried))
                if model is self.model:
                    self._keep(work, trial, work.tried[work.plan.share])
                    self.progress(work.label, 1)
            open_works = still

    # --------------------------------------------------------------------------------------------------------- reading
    def _read(
        self, model: Any, works: Sequence[Work], plans: Sequence[Plan], numbers: Sequence[int], counted: bool = False
    ) -> list[list[Outcome]]:
        """Outcomes of each of `works` under its plan with `model`; `counted`: as far as progress goes."""
        documents = [self.documents[number] for number in numbers]
        prompts = [document.prompt for document in documents]
        futures: dict[str, Future] = {}
        makers = []
        for work, plan in zip(works, plans, strict=True):
            plan = replace(plan, prompts=prompts)
            if work.method.oracle:
                if plan.rule not in futures:
                    futures[plan.rule] = self._future(model, plan, documents)
                plan = replace(plan, future=futures[plan.rule])
            makers.append(lambda work=work, plan=plan: work.method.make(model, plan))
        told = _told(works) if counted else f"equal bytes, {_told(works)}"
        each = sum(not (work.file and number in work.file.done) for work in works for number in numbers)
        of_a_token = each / (documents[0].prompt + documents[0].forced) if counted else 0.0
        self.progress(told, 0)
        return read_together(
            model, documents, makers, step=self.step, progress=lambda read: self.progress(told, read * of_a_token)
        )

    @staticmethod
    def _future(model: Any, plan: Plan, documents: Sequence[Document]) -> Future:
        """What the oracle knows: attention in the full cache over the same documents."""
        import torch

        ids = torch.tensor([list(document.ids) for document in documents], device=model.device)
        config = KaraConfig(**window_settings(plan))
        return future_attention(model, ids, torch.ones_like(ids), plan.prompts, [0] * len(ids), config)

    # --------------------------------------------------------------------------------------------------------- keeping
    def _open(self, work: Work, share: Any) -> None:
        """The share of a cell is known: opens its file, and looks whether what it holds is of these documents."""
        work.plan = replace(work.plan, share=float(share))
        origin = self.origin | {"dtype": work.settings["model"]["dtype"]}
        work.file = CellFile(self.out, work.cell, {"share": float(share)} | work.settings, origin, lines=LINES)
        for line in work.file.held():
            number = line["number"]
            if number < len(self.digests) and line["document"] != self.digests[number]:
                raise ValueError(
                    f"{work.file.path} holds another document {number}; choose another folder, give the data another "
                    "name, or remove the file to measure again"
                )

        self.progress(work.label, len(work.file.done.intersection(range(len(self.documents)))))

    def _keep(self, work: Work, number: int, outcome: Outcome) -> None:
        assert work.file is not None
        if number in work.file.done:
            return
        path = arrays_of(self.out, work.cell, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(outcome, name) for name in ("kl", "same", "loss", "full_loss")}
        fresh = path.with_name(f"{path.name}.new")
        with fresh.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(fresh, path)
        middle, high = np.quantile(outcome.kl, [0.5, 0.99])
        line = {
            "number": number,
            "document": self.digests[number],
            "prompt": self.documents[number].prompt,
            "tokens": len(outcome.kl),
            "kl_mean": float(outcome.kl.mean(dtype=np.float64)),
            "kl_median": float(middle),
            "kl_99": float(high),
            "kl_max": float(outcome.kl.max()),
            "same": float(outcome.same.mean()),
            "loss": float(outcome.loss.mean(dtype=np.float64)),
            "full_loss": float(outcome.full_loss.mean(dtype=np.float64)),
            "resident_bytes": outcome.resident_bytes,
            "end_bytes": outcome.end_bytes,
            "full_bytes": outcome.full_bytes,
            "seconds": outcome.seconds,
        }
        work.file.append([line])
