"""Triton's kernels compiled ahead of time for four generations of GPUs; no GPU is needed, and no interpreter."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest
import triton
import triton.language as tl
from conftest import run
from test_cuda_compile import ARCHITECTURES, cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepfast import reference
from deepfast.kernels import collectives, formulas, refresh, statistics, step

ARGUMENTS = {"rows": "*i64", "owners": "*i32", "constants": "*fp32", "record": "*fp32", "partial": "*fp64",
            "directions": "*fp64", "first": "i32", "end": "i32", "shared": ("i64",) * 8, "numel": "i64", "place": "i64",
            "factor": "i64", "statistics": "*fp64", "found_inf": "*fp32", "status": "i64", "sinks": "*i64"}  # fmt: skip


CUBIN = "kernel.cubin"


def machine_code(kernel, constants: dict, arch: str, folder, others=()) -> tuple[str, Counter, str]:
    """A kernel's PTX, the memory accesses of its machine code, and what the assembler says it uses."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    names = kernel.arg_names
    types = {**ARGUMENTS, **dict(others)}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False})
    cubin = folder / CUBIN
    cubin.write_bytes(compiled.asm["cubin"])
    code = run(cuobjdump(), "-sass", cubin).stdout
    accesses = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\.?[\w.]*)", code))
    used = run(cuobjdump(), "-res-usage", cubin)
    return compiled.asm["ptx"], accesses, used.stdout + used.stderr


# Parameter, whether it has a master, gradient.
STORED = {
    "fp32": (tl.float32, False, tl.float32),
    "bf16, master": (tl.bfloat16, True, tl.bfloat16),
    "fp16, no master": (tl.float16, False, tl.float16),
}


def wide(accesses: Counter, access: str, bits: int = 128) -> int:
    return sum(count for name, count in accesses.items() if name.startswith(access) and name.endswith(f".{bits}"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rule", formulas.RULES)
def test_steps_move_16_bytes_at_a_time(rule, stored, arch, tmp_path):
    after = reference.RESET if rule != "sgd" else reference.WRITTEN
    what, (param, master, grad) = formulas.RULES[rule], STORED[stored]
    fp32 = what.moments + (1 if master or param == tl.float32 else 0)
    pack = 4 if fp32 else 8
    constants = {"UPDATE": what.update, "MOMENTS": what.moments, "COUNT": what.constants, "PARAM_TYPE": param,
                 "HAS_MASTER": master, "GRAD_TYPE": grad, "PACK": pack, "AFTER": after, "sinks": None,
                 "SINKS": 0}  # fmt: skip
    ptx, accesses, used = machine_code(step.step_kernel, constants, arch, tmp_path)
    assert "STACK:0" in used
    assert not any(name.startswith(("LDL", "STL")) for name in accesses)
    reads_grad = what.move is None
    # Two accesses of a thread in each stream: 1024 elements, 128 threads, four values at a time. One where it is eight.
    each = 2 if pack == 4 else 1
    loads = fp32 + (grad == tl.float32 and reads_grad) if fp32 else 2
    stores = (fp32 if reads_grad else fp32 - what.moments) + (grad == tl.float32) if fp32 else 2
    assert wide(accesses, "LDG") >= each * loads
    assert wide(accesses, "STG") >= each * stores
    assert not re.search(r"\.approx|\.ftz|div\.full", ptx)
    assert not re.search(r"\b(mul|add|sub)\.f(32|64)", ptx), "without .rn the assembler may fuse them"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_go_to_seven_others_16_bytes_at_a_time(arch, tmp_path):
    adam = formulas.RULES["adam"]
    constants = {"UPDATE": adam.update, "MOMENTS": 2, "COUNT": adam.constants, "PARAM_TYPE": tl.float32,
                 "HAS_MASTER": False, "GRAD_TYPE": tl.float32, "PACK": 4, "AFTER": reference.KEPT}  # fmt: skip
    _, alone, _ = machine_code(step.step_kernel, {**constants, "sinks": None, "SINKS": 0}, arch, tmp_path)
    _, sent, used = machine_code(step.step_kernel, {**constants, "SINKS": 7}, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(sent, "STG") >= wide(alone, "STG") + 2 * 7


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_kernels_too(arch, tmp_path):
    lamb = formulas.RULES["lamb"]
    constants = {"DIRECT": lamb.direct, "DIRECTION": lamb.direction, "MOMENTS": 2, "COUNT": lamb.constants,
                 "PARAM_TYPE": tl.float32, "HAS_MASTER": False, "GRAD_TYPE": tl.float32, "PACK": 4}  # fmt: skip
    _, accesses, used = machine_code(step.norms_kernel, constants, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(accesses, "LDG") >= 4
    assert wide(accesses, "STG") >= 2
    _, accesses, used = machine_code(statistics.squares_kernel, {"GRAD_TYPE": tl.float32, "PACK": 4}, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(accesses, "LDG") >= statistics.UNROLL.value
    _, accesses, used = machine_code(refresh.refresh_kernel, {"PARAM_TYPE": tl.bfloat16, "PACK": 4}, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(accesses, "LDG") >= 2
    assert wide(accesses, "STG") >= 2


# Kind, whether all is summed in one shot, types, whether the result is measured.
COLLECTIVES = {
    "one-shot": (0, True, tl.bfloat16, tl.bfloat16, False),
    "two-shot, measured": (0, False, tl.float32, tl.float32, True),
    "reduce-scatter": (1, False, tl.bfloat16, tl.float32, False),
    "all-gather": (2, False, tl.int64, tl.int64, False),
}


def loops(code: str) -> list[str]:
    """The innermost loops that move data. (With eight ranks' addresses, some words are put aside before.)"""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)
    place = {int(at, 16): i for i, (at, _) in enumerate(lines)}
    spans = []
    for end, (_, line) in enumerate(lines):
        target = re.search(r"\bBRA\b.* (0x[0-9a-f]+)", line)
        if target and (begin := place[int(target[1], 16)]) < end:
            spans.append((begin, end))
    inner = [(b, e) for b, e in spans if not any((b, e) != (c, f) and b <= c and f <= e for c, f in spans)]
    inside = ["\n".join(line for _, line in lines[b : e + 1]) for b, e in inner]
    return [loop for loop in inside if re.search(r"LDG.*\bSTG", loop, re.DOTALL)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("what", COLLECTIVES)
def test_collectives(what, arch, tmp_path):
    kind, one_shot, source, out, measured = COLLECTIVES[what]
    pack = 128 // max(source.primitive_bitwidth, out.primitive_bitwidth)
    constants = {"KIND": kind, "IN": source, "OUT": out, "PACK": pack, "RANK": 1, "RANKS": 8, "ONE_SHOT_SUM": one_shot,
                 "WHAT": 0, **({} if measured else {"statistics": None, "found_inf": None})}  # fmt: skip
    kernel = collectives.collective_kernel
    sources, targets = (1 if one_shot else 8), (1 if one_shot or kind == 1 else 8)
    addresses = {"sources": ("i64",) * sources, "targets": ("i64",) * targets}
    ptx, accesses, _ = machine_code(kernel, constants, arch, tmp_path, addresses)
    moving = loops(run(cuobjdump(), "-sass", tmp_path / CUBIN).stdout)
    assert moving
    assert not any(re.search(r"\b(LDL|STL)", loop) for loop in moving)
    assert wide(accesses, "LDG", pack * source.primitive_bitwidth) >= 8
    assert wide(accesses, "STG") >= 2
    assert ptx.count("sys.release.exch") == ptx.count("sys.acquire.add") == (1 if one_shot else 2)
