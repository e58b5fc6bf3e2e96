"""What is asked of the evaluation kit, by purpose. The answers are kept in the kit's own folder of results, a run that
was stopped goes on, and `kara-hf report` makes a page of them.

Without a model it is the bundled one, whose problems show whether a method keeps what *that* model needs, and nothing
about large models. With `--set model=ID --set tasks=...` it is any other.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..common.case import Job, register
from ..common.models import DEEP
from ..common.rows import Row
from ..common.run import Run
from .kit import COLUMNS, RESULTS, evaluator_of, folder_of, rows_of, shared_settings_of, tasks_of

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
SIZES: Row = {
    "model": "",
    "tasks": "trace:generated=300,fact:generated=300",
    "budgets": BUDGETS,
    "equal": "bytes",
    "n": 200,
    "batch": 16,
    "out": str(RESULTS),
}
SMOKE: Row = {"tasks": "trace:generated=48", "budgets": (0.25,), "equal": "tokens", "n": 2, "batch": 2}


def asked(
    run: Run, methods: list[Any], rules: list[str], sizes: Row, reference: str = "random", **more: Any
) -> Iterator[Job]:
    """A job for each task: what is missing in the folder is answered, and a row for every cell comes of it."""
    from kara_hf.evaluation.measure.evaluator import Request
    from kara_hf.methods.registry import make_method

    evaluator = evaluator_of(sizes["model"], dtype=run.dtype_name)
    request = Request(
        methods=[make_method(method) if isinstance(method, str) else method for method in methods],
        budgets=sizes["budgets"],
        rules=rules,
        equal=sizes["equal"],
        n=sizes["n"],
        batch=sizes["batch"],
        reference=make_method(reference),
        shared=shared_settings_of(sizes["model"]),
        keep_text=not run.smoke,
        **more,
    )
    for task in tasks_of(sizes["tasks"], evaluator.tokenizer):
        measure = partial(answered, run, evaluator, task, request, sizes["out"], reference)
        yield Job({"model": evaluator.name, "task": task.name}, measure)


def answered(run: Run, evaluator: Any, task: Any, request: Any, out: str, reference: str) -> list[Row]:
    with folder_of(out, run.smoke) as folder:
        evaluator.measure(task, request, folder)
        return rows_of(folder, task.name, [method.name for method in request.methods], reference)


def snapkv(model: Any, plan: Any) -> Any:
    """SnapKV ranks tokens of a row as these metrics do; its queries vote once, at the end of the prompt."""
    from kara_hf.methods.registry import evictions

    return evictions(metric="l1", levels=1, accumulate=False)(model, plan)


@register(
    "quality.windows",
    "the kit's ladder: what is kept of every window, the prompt pinned",
    COLUMNS,
    sizes=SIZES,
    smoke=SMOKE,
    device="any",
    keep=False,
)
def window_jobs(run: Run, **sizes: Any) -> Iterator[Job]:
    methods = ["full", "random", "random-chunks", "recency", "causal", "kara-top-k", "kara", "oracle"]
    yield from asked(run, methods, ["prompt-kept"], sizes)


@register(
    "quality.eviction",
    "one budget over prompt and answer: whether heads may differ, beside uniform heads, SnapKV and controls",
    COLUMNS,
    sizes=SIZES | {"tasks": "recall:length=384,copy:length=384"},
    smoke=SMOKE | {"tasks": "recall:length=96"},
    device="any",
    keep=False,
)
def eviction_jobs(run: Run, **sizes: Any) -> Iterator[Job]:
    from kara_hf.methods.registry import Method

    methods = ["full", "kv-compress-random", "kv-compress", "kv-compress-ragged", "streaming-llm"]
    tried = Method("snapkv", snapkv, "l1 votes of the prompt's last queries alone, uniform heads")
    yield from asked(run, [*methods, tried], ["query-aware", "query-agnostic"], sizes, reference="kv-compress-random")


@register(
    "quality.pod",
    "shared keys of distant tokens, alone and with Kara, on a model whose layers are alike",
    COLUMNS,
    sizes=SIZES | {"model": str(DEEP), "sharing": str(DEEP), "budgets": (0.75, 0.5)},
    smoke=SMOKE,
    device="any",
    keep=False,
)
def pod_jobs(run: Run, sharing: str, **sizes: Any) -> Iterator[Job]:
    from kara_hf import PoDSharing

    shared = PoDSharing.from_pretrained(sharing)
    yield from asked(run, ["full", "random", "pod", "kara", "kara+pod"], ["prompt-kept"], sizes, sharing=shared)


@register(
    "quality.bits",
    "all tokens in fewer bits",
    COLUMNS,
    sizes=SIZES | {"budgets": (0.25,)},
    smoke=SMOKE,
    device="any",
    keep=False,
)
def bit_jobs(run: Run, **sizes: Any) -> Iterator[Job]:
    yield from asked(run, ["full", "float8", "quantized-4", "quantized-2"], ["prompt-kept"], sizes, reference="full")
