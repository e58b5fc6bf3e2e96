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

from kara_hf.kernels.triton_ import append, attend, compact, configs, merge, window_scores

TARGETS = (80, 90)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_SHARED = 99 * 1024  # what a program may have on every GPU of compute capability 8.0 to 9.0

# Pointers whose type is not the model's; everything else that has no default here is a 32-bit integer.
POINTERS = {
    **dict.fromkeys(["key_table", "value_table", "lengths", "hidden", "real_before", "start", "slots"], "*i32"),
    **dict.fromkeys(["positions", "new_positions", "held_positions"], "*i32"),
    **dict.fromkeys(["sinks", "parts", "lse", "totals", "scores"], "*fp32"),
    "sequences": "*i64",
    "scaling": "fp32",
    "softcap": "fp32",
}
SIZES = ("block_size", "key_size", "value_size", "size")
OF_THE_MODEL = {"query", "queries", "keys", "values", "out", "new_keys", "new_values", "held_keys", "held_values"}


def compiled(kernel, dtype, target, constants):
    """`kernel` for a model of `dtype`, with tensors and strides aligned as a model's are."""
    options = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        of_the_model = name in OF_THE_MODEL and not (kernel is merge.merge_kernel and name == "queries")
        kind = "*" + TYPES[dtype] if of_the_model else POINTERS.get(name, "i32")
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


def shipped():
    """(id, kernel, dtype, constants) of all there is; what has products with every feature of a model and with none."""
    for dtype, every in itertools.product(configs.DTYPES, (True, False)):
        name = f"{TYPES[dtype]}-{'every' if every else 'plain'}"
        for sizes, rows in itertools.product(configs.PAIRS, (configs.FEW, configs.FEW + 1)):
            constants = configs.attend_config(dtype, *sizes, rows) | {"SOFTCAP": every}
            constants |= {} if every else {"hidden": None, "sinks": None}
            yield f"attend-{sizes[0]}-{sizes[1]}-{rows}-{name}", attend.attend_kernel, dtype, constants
        for size in configs.PADS:
            constants = configs.score_config(dtype, size) | {"SOFTCAP": every, "CAUSAL": every}
            for kernel in (window_scores.query_totals_kernel, window_scores.key_means_kernel):
                yield f"{kernel.__name__}-{size}-{name}", kernel, dtype, constants
            yield f"compact-{size}-{name}", compact.compact_kernel, dtype, configs.copy_config(size) | {"GATHER": every}
            if every:
                yield f"append-{size}-{name}", append.append_kernel, dtype, configs.copy_config(size)
                yield f"merge-{size}-{name}", merge.merge_kernel, dtype, configs.merge_config(size)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in shipped()])
def test_fits(case, target, tmp_path):
    registers, spilled, shared = resources(compiled(*case[:2], target, case[2]), tmp_path)
    print(f"registers {registers}, spilled {spilled}, shared {shared}")
    assert spilled == 0
    assert registers <= configs.MAX_REGISTERS
    assert shared <= MAX_SHARED
