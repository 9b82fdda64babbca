"""The CUDA kernels as machine code for four generations of GPUs, and their build; no GPU is needed for either."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import python, run
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from deepfast import build, reference

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
pytestmark = pytest.mark.xdist_group("cuda_compile")


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings."""
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(own) if own.is_file() else shutil.which("cuobjdump")
    assert found
    return found


@pytest.fixture(scope="module")
def nvcc() -> build.Compiler:
    found = build.nvcc()
    assert isinstance(found, build.Compiler), found
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, nvcc):
    """What ptxas said of each source, and the memory accesses of each kernel on each architecture."""
    cxx = build.compiler()
    assert cxx is not None
    folder = tmp_path_factory.mktemp("cuda")
    said, accesses = "", {}
    for name in build.CUDA.kernels:
        command = [
            *nvcc.command,
            *COMMON_NVCC_FLAGS,
            *build.nvcc_flags(cxx.program, ARCHITECTURES),
            "-c",
            build.CSRC / name,
        ]
        obj = folder / f"{Path(name).stem}.o"
        done = run(*command, "--threads", 2, "-Xptxas", "-v", "-o", obj)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        said += done.stderr
        for arch in ARCHITECTURES:
            accesses.update({(arch, k): v for k, v in machine_code(obj, arch).items()})
    return said, accesses


def machine_code(obj: Path, arch: str) -> dict[str, Counter]:
    """kernel -> how many of each load and store it holds, and how many 128-bit loads at most are "under way" at once:
    without a store or a jump in between."""
    kernels: dict[str, Counter] = {}
    counts: Counter = Counter()
    under_way = 0
    for line in run(cuobjdump(), "-sass", "-arch", arch, obj).stdout.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            counts = kernels.setdefault(name[1], Counter())
        elif access := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LD|ST)[GL]?(?:\.\w+)*)[ ;]", line):
            counts[access[1]] += 1
            under_way = under_way + 1 if access[1] == "LDG.E.128" else under_way if access[1].startswith("LD") else 0
            counts["under way"] = max(counts["under way"], under_way)
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?BRA", line):
            under_way = 0
    return kernels


# As the compiler spells the rules in a kernel's name: Adam<true> is 4AdamILb1E.
SPELLED = {
    rule: f"{len(name)}{name}" + (f"ILb{int(variant == 'true')}E" if variant else "E")
    for rule, name, variant in re.findall(
        r'RULE\("(\w+)", (\w+?)(?:<(\w+)>)?\)', (build.CSRC / "math/rules.h").read_text(encoding="utf-8")
    )
}


def test_nothing_is_spilled(compiled):
    said, accesses = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) >= len(ARCHITECTURES) * (2 * len(reference.RULES) + 5)
    assert set(frames) == {("0", "0", "0")}
    for (arch, kernel), counts in accesses.items():
        local = [access for access in counts if access.startswith(("LDL", "STL"))]
        assert not local, (arch, kernel)


def kernel_of(compiled, arch: str, name: str, rule: str, asks: bool) -> Counter:
    """The accesses of a rule's kernel: of the one that knows its types, or the one that asks for them."""
    begins, ends = f"{name}INS_{SPELLED[rule]}", f"ELb{int(asks)}EEEvNS0_"
    (found,) = (v for (a, k), v in compiled[1].items() if a == arch and begins in k and ends in k)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rule", reference.RULES)
def test_steps_move_16_bytes_at_a_time(compiled, rule, arch):
    counts = kernel_of(compiled, arch, "step_kernel", rule, False)
    moments, reads_grad = reference.RULES[rule].moments, reference.RULES[rule].adapt is None
    # Of the eight combinations of weight (fp32; master; split; 16 bits) and gradient (fp32; 16 bits): the fp32 streams.
    # A gradient is read once more where it is written back, and stored there or where it is reset.
    combinations = [(wide, g) for wide in (1, 1, 0, 0) for g in (1, 0)]
    loads = sum(wide + moments + (g and reads_grad) + g for wide, g in combinations)
    stores = sum(wide + (moments if reads_grad else 0) + 2 * g for wide, g in combinations)
    if moments == 0:  # no fp32 stream at all: eight halves at a time, of a weight alone and of one with its remainder
        loads, stores = loads + 3 + 4, stores + 3 + 4
    stores += 2 + 2 * (moments == 0)  # to other ranks' weights: fp32 ones, and eight halves at a time
    stores += 2  # where a step is skipped, the gradients are reset by themselves
    assert counts["LDG.E.128"] == loads
    assert counts["STG.E.128"] == stores


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rule", reference.RULES)
def test_steps_that_ask_for_types_do_so_where_they_are_wide(compiled, rule, arch):
    """Each stream is loaded as fp32 or as halves, whatever it is, and all loads are under way at once. (At least: there
    are jumps, and compilers may make one access two, one on each way.)"""
    counts = kernel_of(compiled, arch, "step_kernel", rule, True)
    moments, reads_grad = reference.RULES[rule].moments, reference.RULES[rule].adapt is None
    together = 1 + moments + reads_grad
    assert counts["LDG.E.128"] >= together + 1  # and the gradient that is written back
    assert counts["LDG.E.64"] >= together + 2  # and the remainder
    # Weight, moments and gradient (reset, written), another rank's weight; where a step is skipped, what is reset.
    stores = 4 + (moments if reads_grad else 0)
    assert counts["STG.E.128"] >= stores + 2
    assert counts["STG.E.64"] >= stores + 1
    assert counts["under way"] >= together


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "loads", "stores", "under_way"),
    [
        ("norms_kernelINS_4LAMBELb0E", 16, 12, 8),  # two rows of parameter, gradient and two moments
        ("norms_kernelINS_4LAMBELb1E", 4, 2, 4),  # one row
        ("statistics_kernel", 16, 0, 8),
        ("accumulate_kernel", 3, 2, 2),
        ("refresh_kernel", 3, 2, 2),
        ("collective_kernelIffE", 32, 20, 8),
        ("collective_kernelIttE", 36, 24, 8),
        ("collective_kernelIddE", 24, 20, 8),
    ],
)
def test_other_kernels_do_so_too(compiled, kernel, loads, stores, under_way, arch):
    counts = next(v for (a, k), v in compiled[1].items() if a == arch and kernel in k)
    assert counts["LDG.E.128"] >= loads
    assert counts["STG.E.128"] >= stores
    assert counts["under way"] >= under_way


@pytest.mark.parametrize("name", build.CUDA.kernels)
def test_arithmetic_is_what_the_formulas_say(nvcc, tmp_path, name):
    """IEEE division and roots, denormals kept, and no multiply-add that is not written as one."""
    ptx = tmp_path / "kernels.ptx"
    done = run(
        *nvcc.command, *COMMON_NVCC_FLAGS, *build.CUDA_FLAGS, "-arch=compute_90", "-ptx", build.CSRC / name, "-o", ptx
    )
    assert done.returncode == 0, done.stderr
    text = ptx.read_text()
    assert not re.search(r"\.approx|\.ftz|div\.full", text)
    for exact in ("div.rn.f32", "sqrt.rn.f32", "fma.rn.f32", "mul.rn.f32") if "step" in name else ():
        assert exact in text
    assert not re.search(r"\b(mul|add|sub)\.f(32|64)", text), "without .rn the assembler may fuse them"


STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }'
BUILD = """
import torch
torch.version.cuda = "%s"
from deepfast import build, ops
found = ops.cuda()
assert not isinstance(found, str), found
assert torch._C._dispatch_has_kernel_for_dispatch_key("deepfast::step_", "CUDA")
print(build.find(build.CUDA), found.Plan)
"""


def test_the_library_builds_and_loads_without_a_gpu(nvcc, tmp_path, quick):
    """With stand-ins for what torch's CUDA build would give: one function."""
    cxx = build.compiler()
    assert cxx is not None
    (tmp_path / "stub.cpp").write_text(STUB)
    for stub in ("libtorch_cuda.so", "libc10_cuda.so"):
        done = run(*cxx.command, "-shared", "-fPIC", tmp_path / "stub.cpp", "-o", tmp_path / stub)
        assert done.returncode == 0, done.stderr
    env = {**quick, "LIBRARY_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0",
           "CC": "not for nvcc", "DEEPFAST_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    code = BUILD % nvcc.version
    first = python(code, env=env)
    assert first.returncode == 0, first.stderr
    assert "compiling the CUDA kernels for sm_90 with nvcc" in first.stderr
    assert "sm_90/libdeepfast_cuda.so" in first.stdout
    assert b"libcudart.so" not in Path(first.stdout.split()[0]).read_bytes(), "it is linked in"
    again = python(code, env=env)
    assert again.stdout.split()[0] == first.stdout.split()[0]
    assert "compiling" not in again.stderr
    other = python(code, env={**env, "TORCH_CUDA_ARCH_LIST": "8.0", "DEEPFAST_DISABLE_JIT": "1"})
    assert "DEEPFAST_DISABLE_JIT forbids compiling" in other.stderr, "not the library for another GPU"
    listed = python(code, env={**env, "TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert "'Hopper' is no compute capability" in listed.stderr
    unfit = python(BUILD % "11.8", env=env)
    assert "no nvcc of CUDA 11 found" in unfit.stderr
    assert f"is of CUDA {nvcc.version}" in unfit.stderr


def test_a_torch_without_cuda_is_named_as_the_reason():
    done = python("import torch; torch.version.cuda = None; from deepfast import ops; print(ops.cuda())")
    assert "is built without CUDA" in done.stdout


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("8.0", ("sm_80",)),
        ("8.0;9.0a, 12.0+PTX", ("sm_80", "sm_90a", "sm_120", "compute_120")),
        ("10.0 10.0", ("sm_100",)),
    ],
)
def test_architectures(monkeypatch, listed, names):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.architectures() == names
    flags = build.arch_flags(names)
    assert flags[1] == "arch=compute_" + names[0][3:] + ",code=" + names[0]


@pytest.mark.parametrize(
    ("listed", "here", "covered"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
    ],
)
def test_a_list_that_leaves_out_the_gpu_is_noticed(monkeypatch, listed, here, covered):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: here)
    if covered:
        build.check_covered(build.architectures())
    else:
        with pytest.raises(build.BuildError, match="leaves out the GPU that is here"):
            build.check_covered(build.architectures())


@pytest.mark.parametrize(("made_for", "here", "fits"), [("sm_90", (9, 0), True), ("sm_80", (9, 0), False)])
def test_a_prebuilt_library_serves_the_gpu_that_is_here_whatever_would_be_compiled(monkeypatch, made_for, here, fits):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: here)
    assert build.fits(build.CUDA, Path(f"nvcc-0123-{made_for}/{build.CUDA.file}")) == fits
