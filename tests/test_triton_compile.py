"""Triton's kernels compiled ahead of time for four generations of GPUs; no GPU is needed, and no interpreter."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from conftest import run
from test_cuda_compile import ARCHITECTURES, cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepfast import reference
from deepfast.kernels import collectives, formulas, norms, refresh, statistics, step

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


class Stored(NamedTuple):
    """The types of a span's streams; master: None where there is none."""

    param: tl.dtype
    master: tl.dtype | None
    grad: tl.dtype
    moment: tl.dtype = tl.float32  # int8: in groups, of those that are never negative uint8
    chance: bool = False

    def moments(self, rule: str) -> list[tl.dtype]:
        forms = {torch.int8: tl.int8, torch.uint8: tl.uint8}
        names = reference.RULES[rule].keeps
        return [forms[reference.grouped_dtype(name)] if self.moment == tl.int8 else self.moment for name in names]

    def constants(self, rule: str) -> dict:
        moments = self.moments(rule)
        widest = max(t.primitive_bitwidth for t in (*self[:3], *moments) if t is not None)
        return {"PARAM_TYPE": self.param, "MASTER_TYPE": self.master, "GRAD_TYPE": self.grad,
                "MOMENT_TYPES": tuple(moments), "PACK": 128 // widest}  # fmt: skip


STORED = {
    "fp32": Stored(tl.float32, None, tl.float32),
    "fp32, moments in bf16": Stored(tl.float32, None, tl.float32, tl.bfloat16),
    "bf16, master": Stored(tl.bfloat16, tl.float32, tl.bfloat16),
    "fp16, no master": Stored(tl.float16, None, tl.float16),
    "bf16, split": Stored(tl.bfloat16, tl.int16, tl.bfloat16),
    "bf16, split, moments in bf16": Stored(tl.bfloat16, tl.int16, tl.bfloat16, tl.bfloat16),
    "fp16, split, moments in fp16": Stored(tl.float16, tl.int16, tl.float16, tl.float16),
    "bf16, by chance, moments in bf16": Stored(tl.bfloat16, None, tl.bfloat16, tl.bfloat16, True),
    "fp16, by chance": Stored(tl.float16, None, tl.float16, tl.float32, True),
    "fp32, moments in int8": Stored(tl.float32, None, tl.float32, tl.int8),
    "bf16, split, moments in int8": Stored(tl.bfloat16, tl.int16, tl.bfloat16, tl.int8),
    "bf16, by chance, moments in int8": Stored(tl.bfloat16, None, tl.bfloat16, tl.int8, True),
}


def wide(accesses: Counter, access: str, bits: int = 128) -> int:
    return sum(count for name, count in accesses.items() if name.startswith(access) and name.endswith(f".{bits}"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rule", formulas.RULES)
def test_steps_move_16_bytes_at_a_time(rule, stored, arch, tmp_path):
    after = reference.RESET if rule != "sgd" else reference.WRITTEN
    what, form = formulas.RULES[rule], STORED[stored]
    constants = {"UPDATE": what.update, "COUNT": what.constants, **form.constants(rule), "CHANCE": form.chance,
                 "AFTER": after, "sinks": None, "SINKS": 0}  # fmt: skip
    ptx, accesses, used = machine_code(step.step_kernel, constants, arch, tmp_path)
    assert "STACK:0" in used
    assert not any(name.startswith(("LDL", "STL")) for name in accesses)
    first_pass = what.move is not None  # it has read the gradient and stored the moments
    weight = {None: [form.param], tl.float32: [tl.float32], tl.int16: [form.param, tl.int16]}[form.master]
    moments = form.moments(rule)
    loads = [*weight, *moments, *([] if first_pass else [form.grad])]
    stores = [form.param, form.grad, *([form.master] if form.master else []), *([] if first_pass else moments)]
    # 1024 elements, 128 threads: two accesses of a thread in each stream of four values at a time, one of eight.
    pack = constants["PACK"]
    for access, streams in (("LDG", loads), ("STG", stores)):
        for bits in {128, 16 * pack}:
            count = sum(t.primitive_bitwidth * pack == bits for t in streams)
            assert wide(accesses, access, bits) >= 8 // pack * count, (access, bits)
    assert not re.search(r"\.approx|\.ftz|div\.full", ptx)
    assert not re.search(r"\b(mul|add|sub)\.f(32|64)", ptx), "without .rn the assembler may fuse them"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_go_to_seven_others_16_bytes_at_a_time(arch, tmp_path):
    adam = formulas.RULES["adam"]
    constants = {"UPDATE": adam.update, "COUNT": adam.constants, **STORED["fp32"].constants("adam"), "CHANCE": False,
                 "AFTER": reference.KEPT}  # fmt: skip
    _, alone, _ = machine_code(step.step_kernel, {**constants, "sinks": None, "SINKS": 0}, arch, tmp_path)
    _, sent, used = machine_code(step.step_kernel, {**constants, "SINKS": 7}, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(sent, "STG") >= wide(alone, "STG") + 2 * 7


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "stored", ["fp32", "bf16, split", "fp16, split, moments in fp16", "bf16, split, moments in int8"]
)
def test_norms(stored, arch, tmp_path):
    lamb, form = formulas.RULES["lamb"], STORED[stored]
    constants = {"MOVE": lamb.move, "DIRECTION": lamb.direction, "COUNT": lamb.constants, **form.constants("lamb")}
    _, accesses, used = machine_code(norms.norms_kernel, constants, arch, tmp_path)
    assert "STACK:0" in used
    weight = {None: [form.param], tl.int16: [form.param, tl.int16]}[form.master]
    streams = [*weight, form.grad, form.moment, form.moment]
    for bits in (128, 64):  # a thread has four elements of a tile: 64 bits of a stream of 16-bit values
        count = sum(t.primitive_bitwidth * 4 == bits for t in streams)
        assert wide(accesses, "LDG", bits) >= count
        assert wide(accesses, "STG", bits) >= 2 * (form.moment.primitive_bitwidth * 4 == bits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_kernels_too(arch, tmp_path):
    _, accesses, used = machine_code(statistics.squares_kernel, {"GRAD_TYPE": tl.float32, "PACK": 4}, arch, tmp_path)
    assert "STACK:0" in used
    assert wide(accesses, "LDG") >= statistics.UNROLL.value
    for param, master, pack, each in (
        (tl.bfloat16, tl.float32, 4, 2),
        (tl.bfloat16, tl.int16, 8, 1),
        (tl.float16, tl.int16, 8, 1),
    ):
        constants = {"PARAM_TYPE": param, "MASTER_TYPE": master, "PACK": pack}
        _, accesses, used = machine_code(refresh.refresh_kernel, constants, arch, tmp_path)
        assert "STACK:0" in used
        assert wide(accesses, "LDG") >= each * (1 if master == tl.float32 else 2)
        assert wide(accesses, "STG") >= each


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
