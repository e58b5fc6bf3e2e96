"""The Triton kernels against their references, under Triton's interpreter, and which code runs when.

The interpreter has to be asked for before triton is imported and changes it for the whole process. The checks of the
kernels therefore run in a process of their own: first the tests of every op as they are, then the `check_` functions
below and those of decode steps. It is slow, so `make test` shows each branch once. bfloat16 is left to GPUs, because
the interpreter computes it wrongly.
"""

import importlib.util
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.architectures import build
from support.interpreter import run
from support.kernel_cases import (
    HIDES_ALL,
    NAN,
    AttendCase,
    assert_error_bounded,
    assert_observed,
    attend_inputs,
    attend_plain,
    bounded_loosely,
    clone,
    dtype_id,
    make_rows,
    observe_plain,
    with_followers,
)
from support.marks import few, slow

from kara_hf import PoDCache, PoDSharing
from kara_hf.kernels import (
    Proximal,
    attend,
    attend_reference,
    attend_shared_reference,
    backend,
    merge,
    merge_reference,
    window_scores,
    window_scores_reference,
)

HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)


def checks():
    """The `check_` functions of this file and of the decode steps, which only the interpreter runs."""
    own = [f"{__file__}::{name}" for name in globals() if name.startswith("check_")]
    return [*own, f"{Path(__file__).parents[1] / 'cache' / 'test_decode.py'}::check_the_kernels_themselves"]


OPS, DTYPES, ROUNDED = (
    Path(__file__).with_name(name) for name in ("test_kernels.py", "test_kernel_dtypes.py", "test_rounded_kernels.py")
)
THOROUGH = ["-m", "slow or hypothesis", "--hypothesis-profile", "thorough"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("what", "chosen"),
    [
        ([OPS, DTYPES, ROUNDED, checks], ["-m", "not slow"]),
        *(slow([what], THOROUGH) for what in (OPS, DTYPES, ROUNDED, checks)),
    ],
    ids=["few", "ops", "dtypes", "rounded", "checks"],
)
def test_interpreted(what, chosen):
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = [str(path) for each in what for path in (checks() if each is checks else [each])]
    run_checks = ["-o", "python_functions=test_* check_*"]
    done = run(*flags, *run_checks, *tests, *chosen, KARA_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------ which code runs
@pytest.fixture
def on_gpu(monkeypatch):
    """Makes a stand-in for a tensor on a GPU of the given kind, on a machine that has none."""
    remembering = (backend._missing, backend._warn_once)

    def make(capability=(9, 0), dtype=torch.float16, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)

    monkeypatch.delenv("KARA_BACKEND", raising=False)
    for function in remembering:
        function.cache_clear()
    yield make
    for function in remembering:
        function.cache_clear()


@pytest.mark.parametrize("asked", [None, "", "auto", "triton"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_a_gpu_runs_kernels(on_gpu, asked, capability, dtype, monkeypatch, recwarn):
    pytest.importorskip("triton", reason="triton is not installed")
    tensor = on_gpu(capability, dtype)
    if asked is not None:
        monkeypatch.setenv("KARA_BACKEND", asked)
    assert backend.use_triton(tensor, 192, 128)
    monkeypatch.setenv("KARA_BACKEND", "reference")
    assert not backend.use_triton(tensor, 192, 128) and not recwarn


@dataclass(frozen=True)
class Obstacle:
    """triton: the version that is installed, None for none; error: of KARA_BACKEND=triton."""

    name: str
    reason: str
    gpu: dict = field(default_factory=dict)
    head_size: int = 64
    triton: str | None = "3.6.0"
    error: type = RuntimeError


OBSTACLES = [
    Obstacle("no-triton", "triton is not installed; pip install triton", triton=None),
    Obstacle("old-triton", "triton 3.5.1 is older than 3.6; pip install -U triton", triton="3.5.1"),
    Obstacle("old-gpu", "its kernels need compute capability 8.0", {"capability": (7, 5)}),
    Obstacle("not-nvidia", "its kernels are made for NVIDIA GPUs", {"cuda": None}),
    Obstacle("dtype", "no kernel is made for torch.float64", {"dtype": torch.float64}, error=ValueError),
    Obstacle("head-size", "no kernel is made for heads of size 576", head_size=576, error=ValueError),
]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.name)
def test_a_gpu_that_cannot_run_a_kernel_warns_once(on_gpu, obstacle, monkeypatch, recwarn):
    module = None if obstacle.triton is None else SimpleNamespace(__version__=obstacle.triton)
    monkeypatch.setitem(sys.modules, "triton", module)
    tensor = on_gpu(**obstacle.gpu)
    for _ in range(3):
        assert not backend.use_triton(tensor, obstacle.head_size)
    (warning,) = recwarn
    assert obstacle.reason in str(warning.message) and "KARA_BACKEND=reference" in str(warning.message)
    monkeypatch.setenv("KARA_BACKEND", "triton")
    with pytest.raises(obstacle.error, match=f"KARA_BACKEND=triton, but {re.escape(obstacle.reason)}"):
        backend.use_triton(tensor, obstacle.head_size)


def test_every_reason_is_told(on_gpu):
    pytest.importorskip("triton", reason="triton is not installed")
    for size in (300, 576):
        with pytest.warns(UserWarning, match=f"heads of size {size}"):
            assert not backend.use_triton(on_gpu(), size)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_what_is_on_no_gpu_is_left_to_plain_torch_silently(device, monkeypatch, recwarn):
    monkeypatch.setenv("KARA_BACKEND", "auto")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not backend.use_triton(SimpleNamespace(device=torch.device(device), dtype=torch.float64), 999)
    assert not recwarn


def test_a_backend_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setenv("KARA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="KARA_BACKEND='cuda' is not known; set it to 'auto', 'reference' or 'triton'"):
        window_scores(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), scaling=1.0)


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "no-triton"])
def test_plain_torch_needs_no_triton(installed):
    """Also on a machine that has none; where there is one, it is not even imported. And kernels that were asked for and
    cannot run are not replaced.
    """
    code = ("" if installed else "import sys; sys.modules['triton'] = None\n") + (
        "import os, sys, torch\n"
        "from kara_hf.kernels import window_scores\n"
        "for chosen in (None, '', 'auto', 'reference', 'triton'):\n"
        "    os.environ.pop('KARA_BACKEND', None) if chosen is None else os.environ.update(KARA_BACKEND=chosen)\n"
        "    assert sys.modules.get('triton') is None\n"
        "    print(window_scores(*torch.ones(2, 1, 1, 2, 4), scaling=1.0).tolist())\n"
    )
    done = run("-c", code)
    assert done.stdout == 4 * "[[[0.5, 0.5]]]\n" and done.returncode == 1, done.stderr
    remedy = "TRITON_INTERPRET=1 on a CPU" if installed and importlib.util.find_spec("triton") else "pip install triton"
    assert "RuntimeError: KARA_BACKEND=triton, but" in done.stderr and remedy in done.stderr


def test_kernels_start_on_the_gpu_of_their_tensors(monkeypatch):
    """A model may lie on several; the current one is whichever the program chose."""
    pytest.importorskip("triton", reason="triton is not installed")
    from kara_hf.kernels.triton_.common import on_its_device

    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    on_second = SimpleNamespace(device=torch.device("cuda", 1))
    rows = replace(make_rows([[1]], block_size=4), keys=on_second)
    for first in (on_second, rows, torch.zeros(1)):
        assert on_its_device(lambda first, number, *, double: number * double)(first, 3, double=2) == 6
    assert entered == [on_second.device] * 2


# -------------------------------------------------------------------------------------------------------------- kernels
SIZES = [(64, 64, 16), (80, 80, 64), (96, 96, 32), (128, 128, 128), (192, 128, 16), (256, 256, 16), (40, 112, 128)]
PLAIN, ODD, LARGE = SIZES[0], SIZES[-1], SIZES[-2]  # no powers of 2 in large blocks, and the largest


def sizes_of(numbers, *chosen):
    return [
        pytest.param(SIZES[n], id=str(SIZES[n]), marks=[pytest.mark.slow] * (SIZES[n] not in chosen)) for n in numbers
    ]


@HALF_AND_SINGLE
@pytest.mark.parametrize("sizes", sizes_of(range(7), PLAIN, ODD))
def check_attend(sizes, dtype):
    """Around the edges of blocks, in one range and in several; unused slots are NaN and would spread."""
    from kara_hf.kernels.triton_.attend import attend as attend_split

    p = sizes[2]
    decode = AttendCase("", [[0, 1], [p - 1, p + 1], [p, 2 * p + 5]], group=3, dims=sizes[:2])
    for case in (decode, replace(decode, new=7, softcap=3.0, sink_logits=True)):
        query, rows, settings = attend_inputs(case, dtype, p, "shuffled", unused=NAN)
        # As a model has it: the head and token dimensions of a view are swapped.
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        exact = attend_plain(query, rows, torch.float64, **settings)
        plain = attend_plain(query, rows, dtype, **settings)
        for splits, loosely in ((1, False), (4, True)):
            bound = bounded_loosely(rows) if loosely else rows
            got = attend_split(query, bound, **settings, splits=splits)
            assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
            assert_error_bounded(got, plain, exact)


@HALF_AND_SINGLE
@pytest.mark.parametrize("sizes", sizes_of(range(7), PLAIN, LARGE))
def check_attend_observes(sizes, dtype):
    """As above; slots behind a row's tokens and slots of no row are NaN in the metric too, and stay what they are."""
    from kara_hf.kernels.triton_.attend import attend as attend_split

    p = sizes[2]
    decode = AttendCase("", [[0, 1], [p - 1, p + 1], [p, 2 * p + 5]], group=3, dims=sizes[:2])
    num_unseen = [[HIDES_ALL, 1, 0], [HIDES_ALL, p, 0], [2, 1, 0]]
    for case, metric_power in (
        (decode, 2),
        (replace(decode, new=3, num_unseen=num_unseen, softcap=3.0, sink_logits=True), 1),
    ):
        query, rows, settings = attend_inputs(case, dtype, p, "shuffled", unused=NAN, metric=True)
        exact = attend_plain(query, rows, torch.float64, **settings)
        plain = attend_plain(query, rows, dtype, **settings)
        metrics = [
            observe_plain(query, rows, kind, metric_power, **settings) for kind in (torch.float32, torch.float64)
        ]
        for splits, loosely in ((1, False), (4, True)):
            observed = clone(bounded_loosely(rows) if loosely else rows)
            got = attend_split(query, observed, **settings, splits=splits, metric_power=metric_power)
            assert_error_bounded(got, plain, exact)
            assert_observed(observed, rows, *metrics)


@pytest.mark.parametrize("group", [1, 7, 40, slow(71)])
def check_attend_any_group(group):
    """Also where the query heads of a row are more than a tile."""
    case = AttendCase("", [[0, 37]], group=group, dims=(16, 16), sink_logits=True)
    query, rows, settings = attend_inputs(case, torch.float32, 16, "shuffled", unused=NAN, metric=True)
    exact = attend_plain(query, rows, torch.float64, **settings)
    before = clone(rows)
    plain = attend_reference(query, rows, **settings)
    assert_error_bounded(attend(query, rows, **settings, metric_power=2), plain, exact)
    metrics = [observe_plain(query, before, kind, 2, **settings) for kind in (torch.float32, torch.float64)]
    assert_observed(rows, before, *metrics)


@pytest.mark.parametrize("sizes", sizes_of([0, 1, 4, 5, 6], SIZES[1]))
def check_attend_shared(sizes):
    """Heads that lead and that follow, in one range and in several, and more query heads than a tile. All that nobody
    wrote is NaN: slots, logits, and places for keys of followers.
    """
    from kara_hf.kernels.triton_.attend_shared import attend_shared as shared_split

    dtype = torch.float32 if sizes[2] == 16 and sizes[0] < 256 else torch.float16
    p = sizes[2]
    for group, ordered in ((3, False), (20, True)):
        now = [p + 1, 2 * p + 70]
        lengths = [[n] * 3 if ordered else [n, 1, n - 1] for n in now]
        rows = make_rows(lengths, block_size=p, dims=sizes[:2], dtype=dtype, metric=True)
        rows = with_followers(rows, [1, 2], Proximal(2, p), now, p + 3, ordered)
        query = torch.randn(2, 1, 3 * group, sizes[0]).to(dtype).transpose(1, 2)
        scores = torch.randn(2, 3, group, 1, rows.max_length)
        held = torch.arange(rows.max_length) < rows.lengths[..., None]
        scores.masked_fill_(~held[:, :, None, None], NAN)[:, 0] = NAN
        settings = {
            "positions": torch.tensor(now, dtype=torch.int32)[:, None] - 1,
            "leading": [0],
            "scaling": sizes[0] ** -0.5,
            "softcap": 3.0 if ordered else None,
            "sink_logits": torch.randn(3 * group) if ordered else None,
            "metric_power": 1 if ordered else 2,
        }
        plain = clone(rows)
        expected, handed_on = attend_shared_reference(query, plain, scores.clone(), **settings)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
        for splits in (1, 4):
            got_rows = clone(bounded_loosely(rows) if splits == 4 else rows)
            got, got_scores = shared_split(query, got_rows, scores.clone(), **settings, splits=splits)
            assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(got, expected, **tolerance)
            got_scores = got_scores[..., : rows.max_length]
            torch.testing.assert_close(got_scores, handed_on, rtol=1e-4, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(got_rows.metric, plain.metric, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("more", few([{}, {"distant_query": "own"}, {"skip": 0.6}], {"distant_query": "own"}), ids=str)
def check_a_model_that_shares_keys(more):
    """Decode steps over a batch with padding are those of plain torch; one layer follows in one head, one in both."""
    model = build("llama")
    sharing = PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=1, recent=4, **more)
    ids = torch.randint(3, 100, (2, 15))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def logits():
        cache, found = PoDCache(model, sharing, block_size=4), []
        for start, stop in [(0, 12), *((t, t + 1) for t in range(12, 15))]:
            part = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            found.append(model(**part, attention_mask=mask[:, :stop], past_key_values=cache).logits[:, -1])
        return torch.stack(found)

    got = logits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KARA_BACKEND", "reference")
        expected = logits()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("x", [1e-6, 0.01, 0.2, 0.26, 1.0, 20.0, 200.0])
def check_softcap_is_precise(x):
    """One key against one whose logit is known: the weight shows the capped logit."""
    keys = torch.tensor([[[[x], [0.0]]]])
    got = window_scores(torch.ones(1, 1, 2, 1), keys, scaling=1.0, softcap=1.0)[0, 0].double()
    assert math.log(got[0] / got[1]) == pytest.approx(math.tanh(x), rel=1e-6, abs=3e-7)


@pytest.mark.parametrize("parts", [1, 2, 9])
@pytest.mark.parametrize("with_sinks", [True, False], ids=["sinks", "plain"])
def check_merge(parts, with_sinks):
    """What an empty part holds is not read, and a query without any part gets zeros."""
    lse = 3 * torch.randn(parts, 2, 3, 4)
    lse[torch.rand_like(lse) < 0.4] = float("-inf")
    lse[:, 0, 1, 2] = float("-inf")
    values = torch.randn(*lse.shape, 24).masked_fill((lse == float("-inf"))[..., None], NAN)
    sink_logits = torch.randn(3) if with_sinks else None
    got, expected = (op(values, lse, sink_logits, dtype=torch.float32) for op in (merge, merge_reference))
    assert (got[0, 1, 2] == 0).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KARA_BACKEND", "reference")
        torch.testing.assert_close(merge(values, lse, sink_logits), expected, rtol=1e-5, atol=1e-6)


@HALF_AND_SINGLE
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("count", [None, 7], ids=["all", "sample"])
@pytest.mark.parametrize(
    "shape", [slow((2, 2, 63, 64)), (1, 2, 65, 80), slow((1, 1, 130, 192)), (1, 1, 17, 256)], ids=str
)
def check_window_scores(shape, count, causal, dtype):
    """Windows around a tile, read in place from larger tensors whose other elements are NaN."""
    batch, heads, window, size = shape
    wide = torch.full((batch, window + 70, 3 * heads, size + 8), NAN, dtype=dtype)
    wide[:, 3 : window + 3, :, :size] = torch.randn(batch, window, 3 * heads, size).to(dtype)
    queries = wide[:, 3 : window + 3, : 2 * heads, :size].transpose(1, 2)
    keys = wide[:, 3 : window + 3, 2 * heads :, :size].transpose(1, 2)
    queries = queries[:, :, :count]
    got, expected = (
        op(queries, keys, scaling=size**-0.5, causal=causal) for op in (window_scores, window_scores_reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", ["query", "keys", "values"])
def check_a_dtype_without_a_kernel_is_refused(place):
    """Wherever it is; those that have one may be mixed."""
    query, rows = torch.zeros(1, 1, 1, 8), make_rows([[3]], block_size=4)
    if place == "query":
        query = query.double()
    else:
        rows = replace(rows, **{place: getattr(rows, place).double()})
    with pytest.raises(ValueError, match="no kernel is made for torch.float64"):
        attend(query, rows, scaling=1.0)
