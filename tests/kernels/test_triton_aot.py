"""Every kernel configuration that is shipped, compiled to machine code for sm_80 and sm_90; this needs no GPU."""

import itertools
import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kara_hf.kernels.triton_ import (
    append,
    attend,
    attend_rounded,
    attend_shared,
    compact,
    configs,
    merge,
    observe,
    window_scores,
)

TARGETS = (80, 90)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_SHARED = 99 * 1024  # what a program may have on every GPU of compute capability 8.0 to 9.0

# Pointers whose type is not the model's; everything else that has no default here is a 32-bit integer.
POINTERS = {
    **dict.fromkeys(["key_table", "value_table", "lengths", "num_unseen", "real_before", "source", "target"], "*i32"),
    **dict.fromkeys(["positions", "new_positions", "held_positions", "slot_positions", "roles", "named"], "*i32"),
    **dict.fromkeys(["metric", "held_metric", "parts", "lse", "observed", "totals", "scores"], "*fp32"),
    **dict.fromkeys(["beside"], "*fp32"),
    **dict.fromkeys(["key_ranges", "value_ranges"], "*u16"),
    "whole_lengths": "*i32",
    "sequences": "*i64",
    "scaling": "fp32",
    "softcap": "fp32",
}
SIZES = ("block_size", "key_size", "value_size", "size", "width", "scores_width")
OF_THE_MODEL = {"query", "queries", "keys", "values", "sink_logits", "out", "new_keys", "new_values"}
OF_THE_MODEL |= {"held_keys", "held_values", "proximal_keys"}
# Under autocast keys are float32 where they come from a rotary embedding, and all else is bfloat16.
AUTOCAST = dict.fromkeys(OF_THE_MODEL, torch.bfloat16) | dict.fromkeys(["keys", "proximal_keys"], torch.float32)


def compiled(kernel, dtype, target, constants):
    """`kernel` for a model of `dtype`, or of `AUTOCAST`, with tensors and strides aligned as a model's are."""
    options = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        of_the_model = name in OF_THE_MODEL and not (kernel is merge.merge_kernel and name == "queries")
        records = kernel is attend_rounded.attend_rounded_kernel and name in ("keys", "values")
        kind = POINTERS.get(name, "i32")
        if of_the_model:
            kind = "*" + ("u8" if records else TYPES[dtype[name] if isinstance(dtype, dict) else dtype])
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or "stride" in name or name in SIZES):
            aligned[place,] = [["tt.divisibility", 16]]
    assert set(constants) <= set(signature)
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(binary, directory):
    """Registers of a thread, bytes of its stack and local memory (where spills go), bytes of shared memory."""
    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    shown = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], check=True, capture_output=True, text=True
    ).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared


def variants(**absent):
    """(name, constants) for every set of the named optional arguments: absent ones are None."""
    for given in itertools.product((True, False), repeat=len(absent)):
        chosen = dict(zip(absent, given, strict=True))
        missing = itertools.chain.from_iterable(absent[name] for name in absent if not chosen[name])
        yield "-".join(name for name in absent if chosen[name]) or "bare", dict.fromkeys(missing)


def attend_variants(dtype):
    """(name, whether it is observed, constants) of attend: with every feature of a model and with none."""
    every, bare = {"SOFTCAP": True}, {"SOFTCAP": False, "num_unseen": None, "sink_logits": None}
    if dtype != torch.bfloat16:
        yield "bare", False, bare
        yield "every-observed", True, every
    if dtype != torch.float16:
        yield "every", False, every
        yield "bare-observed", True, bare


def shared_variants(dtype, sizes):
    """(name, constants) of attend_shared: with every feature, of rows in order, of a layer that leads alone."""
    bare = {"SOFTCAP": False, "sink_logits": None, "observed": None, "totals": None, "slot_positions": None}
    if dtype != torch.float16:
        yield "every", {"SOFTCAP": True}
    else:
        yield "in-order", bare
        if sizes == (128, 128):
            yield "leads", bare | {"proximal_keys": None}


def rounded_variants(dtype):
    """(name, constants) of attend over records: with every feature, and with none in other bits."""
    if dtype != torch.float16:
        yield "every-4-4", {"SOFTCAP": True, "KEY_BITS": 4, "VALUE_BITS": 4}
    if dtype != torch.bfloat16:
        bare = {"SOFTCAP": False, "num_unseen": None, "observed": None}
        yield "bare-8-2", bare | {"KEY_BITS": 8, "VALUE_BITS": 2}


def shipped():
    """(id, kernel, dtype, constants) of all there is.

    The two half precisions have the same configurations, and share the variants of what has products, to save time.
    """
    for dtype in configs.DTYPES:
        kind = TYPES[dtype]
        for sizes, rows in itertools.product(configs.PAIRS, (configs.FEW, configs.FEW + 1)):
            for name, observed, constants in attend_variants(dtype):
                constants = constants | configs.attend_config(dtype.itemsize, *sizes, rows, observed)
                constants |= {} if observed else {"observed": None, "totals": None}
                yield f"attend-{sizes[0]}-{sizes[1]}-{rows}-{kind}-{name}", attend.attend_kernel, dtype, constants
        for sizes in configs.PAIRS:
            for name, constants in shared_variants(dtype, sizes):
                constants = constants | configs.attend_shared_config(dtype.itemsize, *sizes)
                kernel = attend_shared.attend_shared_kernel
                yield f"attend_shared-{sizes[0]}-{sizes[1]}-{kind}-{name}", kernel, dtype, constants
        for sizes, rows in itertools.product(configs.PAIRS, (configs.FEW, configs.FEW + 1)):
            for name, constants in rounded_variants(dtype):
                constants = constants | configs.attend_rounded_config(*sizes, rows)
                kernel = attend_rounded.attend_rounded_kernel
                yield f"attend_rounded-{sizes[0]}-{sizes[1]}-{rows}-{kind}-{name}", kernel, dtype, constants
        for size in configs.PADS:
            if dtype != torch.bfloat16:
                constants = configs.lead_scores_config(dtype.itemsize, size) | {"SOFTCAP": dtype == torch.float32}
                yield f"lead_scores-{size}-{kind}", attend_shared.lead_scores_kernel, dtype, constants
            for every in {torch.float16: (True,), torch.bfloat16: (False,)}.get(dtype, (True, False)):
                for kernel, config in (
                    (window_scores.query_totals_kernel, configs.totals_config),
                    (window_scores.key_means_kernel, configs.means_config),
                ):
                    constants = config(dtype, size) | {"SOFTCAP": every, "CAUSAL": every}
                    yield f"{kernel.__name__}-{size}-{kind}-{every}", kernel, dtype, constants
            for name, constants in variants(sink_logits=["sink_logits"], totals=["totals"]):
                constants |= configs.merge_config(size)
                yield f"merge-{size}-{kind}-{name}", merge.merge_kernel, dtype, constants
            if dtype == torch.float16:  # what only moves elements of one size is the same code
                continue
            for name, constants in variants(padding=["real_before"], metric=["metric"]):
                constants |= configs.copy_config(size)
                yield f"append-{size}-{kind}-{name}", append.append_kernel, dtype, constants
            for gather, (name, constants) in itertools.product(
                (True, False), variants(metric=["metric", "held_metric"])
            ):
                constants = constants | configs.copy_config(size) | {"GATHER": gather}
                yield f"compact-{size}-{kind}-{name}-{gather}", compact.compact_kernel, dtype, constants
    for square, (name, constants) in itertools.product((True, False), variants(num_unseen=["num_unseen"])):
        constants = constants | configs.OBSERVE | {"SQUARE": square}
        yield f"observe-{name}-{square}", observe.observe_kernel, torch.float32, constants


def mixed():
    """What reads keys and values, where they differ: with every feature and all elements as wide as the widest."""
    for sizes in configs.PAIRS:
        for rows in (configs.FEW, configs.FEW + 1):
            constants = configs.attend_config(4, *sizes, rows, True) | {"SOFTCAP": True}
            yield f"attend-{sizes[0]}-{sizes[1]}-{rows}-autocast", attend.attend_kernel, AUTOCAST, constants
        constants = configs.attend_shared_config(4, *sizes) | {"SOFTCAP": True}
        kernel = attend_shared.attend_shared_kernel
        yield f"attend_shared-{sizes[0]}-{sizes[1]}-autocast", kernel, AUTOCAST, constants
    for size in configs.PADS:
        constants = configs.lead_scores_config(4, size) | {"SOFTCAP": True}
        yield f"lead_scores-{size}-autocast", attend_shared.lead_scores_kernel, AUTOCAST, constants


def with_ones():
    """The first case of every kernel with one KV head, and one query head to it: Triton makes constants of ones."""
    seen = set()
    for name, kernel, dtype, constants in shipped():
        ones = {"heads", "group", "followers", "named_heads"} & set(kernel.arg_names)
        if kernel not in seen and ones:
            seen.add(kernel)
            yield f"{name}-ones", kernel, dtype, constants | dict.fromkeys(ones, 1)


def cases():
    """Those with heads of 128, which have least room of the sizes that most models have, and all others slow."""
    for name, *case in [*shipped(), *mixed(), *with_ones()]:
        few = "128" in name.split("-")[1:3] or name.endswith("-ones") or case[0] is observe.observe_kernel
        yield pytest.param(case, id=name, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", list(cases()))
def test_fits(case, target, tmp_path):
    registers, spilled, shared = resources(compiled(*case[:2], target, case[2]), tmp_path)
    print(f"registers {registers}, spilled {spilled}, shared {shared}")
    assert spilled == 0
    assert registers <= configs.MAX_REGISTERS
    assert shared <= MAX_SHARED
