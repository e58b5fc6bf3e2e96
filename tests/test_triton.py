"""The Triton kernels against their references, under Triton's interpreter, and which code runs when.

The interpreter has to be asked for before triton is imported and changes it for the whole process. The checks of the
kernels therefore run in processes of their own: first the tests of every op as they are, then the `check_` functions
below. bfloat16 is left to GPUs, because the interpreter computes it wrongly.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    NAN,
    AttendCase,
    assert_error_bounded,
    assert_same_pools,
    attend_inputs,
    attend_plain,
    clone,
    dtype_id,
    make_rows,
)

from kara_hf.kernels import (
    append,
    append_reference,
    attend,
    attend_reference,
    compact,
    compact_reference,
    merge,
    merge_reference,
    window_scores,
    window_scores_reference,
)

HERE = Path(__file__).parent
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)


def run(*arguments, **environment):
    """A process with the given environment variables on top; those of the backend are unset otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("KARA_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, cwd=HERE.parent)


@pytest.mark.parametrize(
    "arguments",
    [
        ["test_kernels.py", "-k", "test_attend and not bfloat16 and not contiguous and not chunk"],
        ["test_kernels.py", "-k", "not test_attend and not bfloat16 and not contiguous"],
        ["test_triton.py", "-o", "python_functions=check_*"],
    ],
    ids=["attend", "other-ops", "checks"],
)
def test_interpreted(arguments):
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = run(*flags, str(HERE / arguments[0]), *arguments[1:], KARA_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------ which code runs
def test_a_backend_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setenv("KARA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="KARA_BACKEND='cuda' is not known; set it to 'reference' or 'triton'"):
        window_scores(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), scaling=1.0)


@pytest.mark.parametrize("chosen", [None, "", "reference"])
def test_plain_torch_needs_no_triton(chosen):
    """Also on a machine that has none."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from kara_hf.kernels import window_scores; "
        "print(window_scores(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), scaling=1.0).tolist())"
    )
    done = run("-c", code, **({} if chosen is None else {"KARA_BACKEND": chosen}))
    assert done.stdout == "[[[0.5, 0.5]]]\n", done.stderr


@pytest.mark.parametrize("installed", [True, False], ids=["no-interpreter", "no-triton"])
def test_kernels_that_cannot_run_are_not_replaced(installed):
    if installed:
        pytest.importorskip("triton", reason="triton is not installed")
    code = ("" if installed else "import sys; sys.modules['triton'] = None; ") + (
        "import torch; "
        "from kara_hf.kernels import window_scores; window_scores(*torch.ones(2, 1, 1, 2, 4), scaling=1.0)"
    )
    done = run("-c", code, KARA_BACKEND="triton")
    remedy = "TRITON_INTERPRET=1 on a CPU" if installed else "pip install triton"
    assert done.returncode == 1 and "RuntimeError: KARA_BACKEND=triton, but" in done.stderr and remedy in done.stderr


# -------------------------------------------------------------------------------------------------------------- kernels
SIZES = [(64, 64, 16), (80, 80, 64), (96, 96, 32), (128, 128, 128), (192, 128, 16), (256, 256, 16), (40, 112, 128)]


@HALF_AND_SINGLE
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def check_attend(sizes, dtype):
    """Around the edges of blocks, in one range and in several; unused slots are NaN and would spread."""
    from kara_hf.kernels.triton_.attend import attend as attend_split

    p = sizes[2]
    decode = AttendCase("", [[0, 1], [p - 1, p + 1], [p, 2 * p + 5]], group=3, dims=sizes[:2])
    for case in (decode, replace(decode, new=7, softcap=3.0, sinks=True)):
        query, rows, settings = attend_inputs(case, dtype, p, "shuffled", unused=NAN)
        # As a model has it: the head and token dimensions of a view are swapped.
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        exact = attend_plain(query, rows, torch.float64, **settings)
        plain = attend_plain(query, rows, dtype, **settings)
        for splits in (1, 4):
            got = attend_split(query, rows, **settings, splits=splits)
            assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
            assert_error_bounded(got, plain, exact)


@pytest.mark.parametrize("group", [1, 7, 40, 71])
def check_attend_any_group(group):
    """Also where the query heads of a row are more than a tile."""
    case = AttendCase("", [[0, 37]], group=group, dims=(16, 16), sinks=True)
    query, rows, settings = attend_inputs(case, torch.float32, 16, "shuffled", unused=NAN)
    exact = attend_plain(query, rows, torch.float64, **settings)
    assert_error_bounded(attend(query, rows, **settings), attend_reference(query, rows, **settings), exact)


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
    sinks = torch.randn(3) if with_sinks else None
    got, expected = (op(values, lse, sinks, dtype=torch.float32) for op in (merge, merge_reference))
    assert (got[0, 1, 2] == 0).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KARA_BACKEND", "reference")
        torch.testing.assert_close(merge(values, lse, sinks), expected, rtol=1e-5, atol=1e-6)


@HALF_AND_SINGLE
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("shape", [(2, 2, 63, 64), (1, 2, 65, 80), (1, 1, 130, 192), (1, 1, 17, 256)], ids=str)
def check_window_scores(shape, causal, dtype):
    """Windows around a tile, read in place from larger tensors whose other elements are NaN."""
    batch, heads, window, size = shape
    wide = torch.full((batch, window + 70, 3 * heads, size + 8), NAN, dtype=dtype)
    wide[:, 3 : window + 3, :, :size] = torch.randn(batch, window, 3 * heads, size).to(dtype)
    queries = wide[:, 3 : window + 3, : 2 * heads, :size].transpose(1, 2)
    keys = wide[:, 3 : window + 3, 2 * heads :, :size].transpose(1, 2)
    got, expected = (
        op(queries, keys, scaling=size**-0.5, causal=causal) for op in (window_scores, window_scores_reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@st.composite
def drawn_rows(draw, room=0):
    """Rows of any lengths in blocks anywhere; what nobody stored is NaN."""
    heads = draw(st.integers(1, 3))
    length = st.one_of(st.integers(0, 5), st.integers(0, 80))
    lengths = draw(st.lists(st.lists(length, min_size=heads, max_size=heads), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 9999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    sizes = draw(st.sampled_from([(8, 8), (24, 16), (80, 80)]))
    block_size = draw(st.sampled_from([1, 4, 16, 32]))
    return make_rows(lengths, block_size=block_size, dims=sizes, dtype=dtype, room=room)


@settings(max_examples=15)
@given(rows=drawn_rows(room=6), new=st.integers(1, 6), group=st.integers(1, 5), padded=st.booleans(), data=st.data())
def check_drawn_append_and_attend(rows, new, group, padded, data):
    """A step as a cache takes it: new tokens are stored, then seen by their own queries."""
    (batch, heads), dtype = rows.lengths.shape, rows.keys.dtype
    keys = torch.randn(batch, new, heads, rows.keys.shape[-1]).to(dtype).transpose(1, 2)
    values = torch.randn(batch, new, heads, rows.values.shape[-1]).to(dtype).transpose(1, 2)
    positions = torch.randint(0, 999, (batch, new), dtype=torch.int32)
    marks = st.lists(st.booleans(), min_size=new, max_size=new)
    real = torch.tensor(data.draw(st.lists(marks, min_size=batch, max_size=batch))) if padded else None
    expected = clone(rows)
    append_reference(expected, keys, values, positions, real)
    append(rows, keys, values, positions, real)
    assert_same_pools(rows, expected)

    count = torch.full((batch, 1), new) if real is None else real.sum(1, keepdim=True)
    lengths = (rows.lengths + count).to(torch.int32)
    rows = replace(rows, lengths=lengths, max_length=int(lengths.max()), uniform=False)
    query = torch.randn(batch, heads * group, new, rows.keys.shape[-1]).to(dtype)
    hidden = None if real is None else (count - real.cumsum(1)).to(torch.int32)
    asked = {"scaling": 0.3, "hidden": hidden}
    exact = attend_plain(query, rows, torch.float64, **asked, softcap=None, sinks=None)
    assert_error_bounded(attend(query, rows, **asked), attend_reference(query, rows, **asked), exact)


@settings(max_examples=15)
@given(rows=drawn_rows(room=1), data=st.data())
def check_drawn_compact(rows, data):
    """Any survivors in any order, in any sequences."""
    shortest = int(rows.lengths.min(1).values.min())
    sequences = data.draw(st.lists(st.sampled_from(range(len(rows.lengths))), unique=True))
    keep = data.draw(st.integers(0, shortest))
    start = [data.draw(st.integers(0, shortest - keep)) for _ in sequences]
    slots = torch.zeros(len(sequences), rows.lengths.shape[1], keep, dtype=torch.int32)
    for i, b in enumerate(sequences):
        for h in range(slots.shape[1]):
            slots[i, h] = start[i] + torch.randperm(int(rows.lengths[b, h]) - start[i])[:keep]
    moved = torch.tensor(sequences, dtype=torch.int64), torch.tensor(start, dtype=torch.int32), slots
    expected = clone(rows)
    compact_reference(expected, *moved)
    compact(rows, *moved)
    assert_same_pools(rows, expected)


def check_dtypes_are_not_cast_silently():
    rows = make_rows([[3]], block_size=4)
    with pytest.raises(ValueError, match="query of dtype torch.float16 do not fit a pool of torch.float32"):
        attend(torch.zeros(1, 1, 1, 8, dtype=torch.float16), rows, scaling=1.0)
    with pytest.raises(ValueError, match="no kernel is made for torch.float64"):
        attend(torch.zeros(1, 1, 1, 8, dtype=torch.float64), rows, scaling=1.0)
