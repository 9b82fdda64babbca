"""The compiled operators: same bits on every instruction set and for any number of threads, and what torch expects."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from cases import HYPER
from conftest import ROOT, python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import deepfast
from deepfast import build, ops, reference

native = torch.ops.deepfast

_DIGEST = """
import hashlib, torch, deepfast
h = hashlib.sha256()
def add(t):
    h.update(t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
g = torch.Generator().manual_seed(0)
def rnd(n, scale=1.0):  # torch.randn itself differs between instruction sets
    size = (n,) if isinstance(n, int) else n
    return torch.randint(-(1 << 23), 1 << 23, size, generator=g) / 2.0**21 * scale
import sys
sys.path.insert(0, "tests")
from cases import EVERY, OURS, VARIANTS
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for name, variant in [*EVERY, ("AdamW", None)]:
        options = VARIANTS[name][variant] if variant else {"master": "none"}
        params = [torch.nn.Parameter(rnd(n).to(dtype)) for n in (1, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 70001)]
        o = OURS[name](params, lr=1e-2, max_grad_norm=1.0, backend="cpu", **options)
        for step in range(3):
            for p in params:
                p.grad = rnd(p.shape, 10.0 ** (step - 1)).to(dtype)
            o.step()
        for p in params:
            add(p)
            for v in o.state[p].values():
                add(v)
        add(o.grad_norm)
bits = torch.arange(0, 1 << 16, dtype=torch.int32)
sums = torch.zeros(1 << 16)
torch.ops.deepfast.accumulate_([sums], [bits.to(torch.int16).view(torch.float16)], 1.0, True)
add(sums)
print(torch.backends.cpu.get_cpu_capability(), h.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    """The scalar build of the formulas is the oracle of the vectorized ones."""
    said = {}
    for wanted in ("default", "avx2", "avx512"):
        done = python(_DIGEST, env={"ATEN_CPU_CAPABILITY": wanted})
        assert done.returncode == 0, done.stderr
        capability, digest = done.stdout.split()
        said[capability] = digest
    assert "DEFAULT" in said
    if build.capability() in build.INSTRUCTION_SETS:
        assert len(said) > 1
    assert len(set(said.values())) == 1, said


@pytest.mark.parametrize("capability", ["DEFAULT", *build.INSTRUCTION_SETS])
def test_a_register_of_floats_does_what_a_float_does(capability, tmp_path):
    """Rounding, saturation, infinities and NaN of every kind included."""
    order = ["DEFAULT", *build.INSTRUCTION_SETS]
    if capability != "DEFAULT" and build.capability() not in order[order.index(capability) :]:
        pytest.skip(f"torch's instruction set here is {build.capability()}, below {capability}")
    program, flags = tmp_path / "packs", build.INSTRUCTION_SETS.get(capability, ())
    cxx = build.compiler()
    source = str(ROOT / "tests/packs.cpp")
    subprocess.run([*cxx.command, *build.COMMON_FLAGS, *build.KERNEL_FLAGS, *flags, "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    at_once = {"DEFAULT": 1, "AVX2": 8, "AVX512": 16}[capability]
    assert done.stdout == f"{at_once} at once\n"
    assert done.returncode == 0


def test_the_same_bits_for_any_number_of_threads():
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 70_001, 300_001, 0, 2048)]
    seen = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            seen.add(native.statistics(grads)[0].item())
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1
    exact = sum(g.double().square().sum() for g in grads).item()
    assert seen.pop() == pytest.approx(exact, rel=1e-7)


def lamb_norms(params, hyper):
    state = [torch.zeros_like(p) for p in (*params, *params)]
    steps = [torch.zeros(()) for _ in params]
    groups = torch.zeros(len(params), dtype=torch.int32)
    plan = ops.native.Plan("lamb", params, [torch.empty(0)] * len(params), state, steps, groups)
    grads = [torch.sin(torch.arange(p.numel(), dtype=torch.float32)) for p in params]
    plan.gather(grads, False)
    return plan.norms(hyper, [], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-30])
def test_lambs_norms_are_the_same_for_any_number_of_threads(scale):
    params = [torch.linspace(-1, 1, n) * scale for n in (3, 70_001, 300_001, 1, 2048)]
    hyper = torch.tensor([[1.0, *HYPER["lamb"]]], dtype=torch.float64)
    hyper[0, 5] = 0.0  # no decay: the direction is then m / (|g| + eps)
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            seen.append(lamb_norms(params, hyper))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(norms, seen[0]) for norms in seen)
    torch.testing.assert_close(
        seen[0][:, 0], torch.stack([p.double().square().sum() for p in params]), rtol=1e-6, atol=0
    )
    gradients = [torch.sin(torch.arange(p.numel(), dtype=torch.float32)).double() for p in params]
    directions = [g / (g.abs() + 1e-6) for g in gradients]
    torch.testing.assert_close(seen[0][:, 1], torch.stack([d.square().sum() for d in directions]), rtol=1e-5, atol=0)


def test_threads_are_torchs_own():
    """Two OpenMP runtimes would fight over the cores."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "gomp" in line}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_decoded_exactly(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.zeros(1 << 16)
    native.accumulate_([out], [every], 1.0, True)
    expected = every.float()
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.signbit(), expected.signbit())


def encoded(x: torch.Tensor, dtype: torch.dtype, master: bool) -> torch.Tensor:
    """``x`` as a step that changes nothing writes it."""
    numel = x.numel()
    p = x.to(dtype) if not master else torch.zeros(numel, dtype=dtype)
    zeros = [torch.zeros(numel) for _ in range(3)]
    hyper = torch.tensor([[1.0, 0.0, 0.9, 0.99, 1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    record = torch.tensor([1.0, 0.0, 0.0])
    native.step_("adam", [p], [zeros[0]], [x.clone() if master else torch.empty(0)], zeros[1:], [torch.zeros(())],
                 hyper, torch.zeros(1, dtype=torch.int32), record, False)  # fmt: skip
    return p


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_with_a_master_are_rounded_by_one_rule(dtype):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=g, dtype=torch.int64).to(torch.int32)
    every = torch.arange(1 << 16, dtype=torch.int32)
    ties = (every << 16) | 0x8000  # halfway between bf16 neighbours
    half_ties = every.to(torch.int16).view(torch.float16).float()
    between = torch.nextafter(half_ties, torch.full_like(half_ties, torch.inf)).view(torch.int32)
    x = torch.cat([bits, every << 16, ties, between, half_ties.view(torch.int32)]).view(torch.float32)
    x = x[x.isfinite()] + 0.0  # a step makes +0 of -0
    got, expected = encoded(x, dtype, master=True), reference.round_master(x, dtype)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
    assert encoded(torch.tensor([torch.nan]), dtype, master=True).isnan().all()


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
                  st.floats(-30, 20), st.sampled_from([None, torch.inf, -torch.inf, torch.nan])),
        min_size=1, max_size=5),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_statistics(parts):
    grads = []
    for n, dtype, exponent, poison in parts:
        g = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 10.0**exponent).to(dtype)
        if poison is not None and n:
            g[n // 2] = poison
        grads.append(g)
    got, expected = native.statistics(grads), reference.statistics(grads)
    assert (got[1] > 0) == (expected[1] > 0)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", ["fp32", "none"])
def test_weights_written_past_the_caches_are_the_same(dtype, master):
    """From 4M elements on; here of a misaligned view, against its two halves."""
    n = (4 << 20) + 77
    whole = torch.linspace(-3, 3, n + 1).to(dtype)[1:]
    grad = torch.sin(torch.arange(n, dtype=torch.float32)).to(dtype)
    halves = [t.clone() for t in whole.chunk(2)]
    for p, g in ((whole, grad), *zip(halves, grad.chunk(2), strict=True)):
        p.requires_grad_()
        p.grad = g.clone()
        deepfast.AdamW([p], lr=1e-2, master=master, backend="cpu").step()
    assert torch.equal(whole, torch.cat(halves))


def test_accumulate_sums_in_fp32():
    grads = [torch.full((3000,), 2.0**-11, dtype=torch.float16) for _ in range(3)]
    total = torch.full((3000,), 77.0)
    for i, g in enumerate(grads):
        native.accumulate_([total], [g], 2.0, i == 0)
    assert (total == 3 * 2.0**-10).all()
    total = torch.ones(3000)
    native.accumulate_([total], grads[:1], 1.0, False)
    assert (total == 1 + 2.0**-11).all()  # fp16 would have rounded this to 1


@pytest.mark.parametrize("layout", ["sums", "grads"])
def test_accumulate_any_layout(layout):
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = a + b
    sums = a.t().contiguous().t() if layout == "sums" else a.clone()
    grads = b.t().contiguous().t() if layout == "grads" else b
    native.accumulate_([sums], [grads], 1.0, False)
    torch.testing.assert_close(sums, expected)


def step_arguments(dtype=torch.float32, rule="adam"):
    n, what = 3, reference.RULES[rule]
    params = [torch.randn(4, 3).to(dtype) for _ in range(n)]
    masters = [p.float() if dtype != torch.float32 else torch.empty(0) for p in params]
    return (
        rule,
        params,
        [torch.randn_like(p) for p in params],
        masters,
        [torch.rand(4, 3) for _ in range(what.moments * n)],
        [torch.zeros(()) for _ in range(n if what.counts_steps else 0)],
        torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64),
        torch.zeros(n, dtype=torch.int32),
        torch.tensor([1.0, 0.0, 0.0]),
        True,
    )


SAMPLES = {
    "statistics": ([torch.randn(5), torch.randn(2, 3)],),
    "decide_": (torch.zeros(3), torch.tensor([4.0, 0.0], dtype=torch.float64), torch.tensor(2.0), None, 1.0, True),
    "step_": step_arguments(torch.float16),
    "accumulate_": ([torch.randn(3)], [torch.randn(3)], 0.5, False),
    "scaler_update_": (torch.tensor([4.0, 0, 1, 0]), [torch.zeros(())], 2.0, 0.5, 10, 1, False, True, 1.0, 64.0),
}


CHECKS = [("step_", step_arguments(rule=rule)) for rule in reference.RULES]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*SAMPLES.items(), *CHECKS],
    ids=[*SAMPLES, *(f"step_-{rule}" for rule in reference.RULES)],
)
def test_opcheck(name, arguments):
    operator = getattr(native, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(operator, arguments, test_utils=tests)


def test_every_operator_is_checked():
    known = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("deepfast::")}
    assert known - {"all_reduce"} == set(SAMPLES), "that one by comm_ranks.py, between ranks"
    assert all(callable(getattr(reference, name)) for name in SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", list(reference.RULES))
def test_reference_takes_the_same_arguments(rule, dtype):
    torch.manual_seed(0)
    first = step_arguments(dtype, rule)
    second = [[t.clone() for t in a] if isinstance(a, list) else a for a in first]
    native.step_(*first)
    reference.step_(*second)
    for a, b in zip(first[1:6], second[1:6], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", list(reference.RULES))
def test_nothing_is_read_that_was_not_given_and_nothing_written_beside(rule, dtype):
    """Outputs, and what lies around every buffer, are poisoned with NaN."""
    what = reference.RULES[rule]
    for n in (1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4097):
        whole = []

        def inside(value, dtype=torch.float32, n=n, whole=whole):
            t = torch.full((n + 128,), torch.nan, dtype=dtype)
            whole.append(t)
            return t[64 : 64 + n].copy_(value) if value is not None else t[64 : 64 + n]

        x = torch.linspace(-2, 2, n)
        master = inside(x) if dtype != torch.float32 else torch.empty(0)
        param = inside(None if dtype != torch.float32 else x, dtype)  # with a master, the weight is only written
        grad = inside(x + 0.5, dtype)
        moments = [inside(0.25) for _ in range(what.moments)]
        steps = [torch.zeros(())] if what.counts_steps else []
        hyper = torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64)
        native.step_(rule, [param], [grad], [master], moments, steps, hyper, torch.zeros(1, dtype=torch.int32),
                     torch.tensor([1.0, 0.0, 0.0]), True)  # fmt: skip
        for t in whole:
            assert t[:64].isnan().all()
            assert t[64 + n :].isnan().all()
            assert t[64 : 64 + n].isfinite().all()
        assert not grad.any()
        assert (param.float() != x).any() or n == 1


def test_any_found_inf_above_zero_skips():
    arguments = list(step_arguments())
    before = [p.clone() for p in arguments[1]]
    arguments[8] = torch.tensor([1.0, 2.0, 0.0])
    native.step_(*arguments)
    assert all(torch.equal(p, b) for p, b in zip(arguments[1], before, strict=True))
    assert not any(g.any() for g in arguments[2]), "the reset happens all the same"


def wrong(index, value):
    arguments = list(step_arguments())
    arguments[index] = value
    return tuple(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(0, "adamx"), "no rule named 'adamx'"),
        (wrong(2, [torch.randn(4, 3)]), "3 tensors of gradients expected, got 1"),
        (wrong(2, [torch.randn(3, 4)] * 3), r"gradient has shape \[3, 4\], its parameter \[4, 3\]"),
        (wrong(2, [torch.zeros(4, 3, dtype=torch.int32)] * 3), "dtype Int"),
        (wrong(4, [torch.zeros(4, 3)] * 5), "6 tensors of moments expected, got 5"),
        (wrong(4, [torch.zeros(4, 3).double()] * 6), "moment has dtype Double"),
        (wrong(5, [torch.zeros(2)] * 3), "step count must be 1"),
        (wrong(6, torch.zeros(1, 6)), "float64 matrix"),
        (wrong(6, torch.zeros(1, 3, dtype=torch.float64)), "'adam' takes 8 hyperparameters, got 3"),
        (wrong(7, torch.ones(3, dtype=torch.int32)), "group 1 of 1"),
        (wrong(8, torch.zeros(2)), "record must be 3"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(arguments, message):
    before = [p.clone() for p in arguments[1]]
    with pytest.raises(RuntimeError, match=message):
        native.step_(*arguments)
    assert all(torch.equal(p, b) for p, b in zip(arguments[1], before, strict=True))


def test_compiled_models_can_hold_the_operators():
    def f(x):
        native.accumulate_([x], [torch.ones(3)], 2.0, False)
        return x * 2

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 6.0))


def test_backends_are_chosen_by_device_and_dtype(monkeypatch):
    cpu = torch.device("cpu")
    assert ops.select("auto", cpu, torch.float16, torch.float32) is ops.native
    assert ops.select("auto", cpu, torch.float64) is reference
    assert ops.select("reference", cpu, torch.float32) is reference
    monkeypatch.setenv("DEEPFAST_BACKEND", "reference")
    assert ops.forced() == "reference"
    assert ops.forced("cpu") == "cpu"
    monkeypatch.setenv("DEEPFAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        ops.forced()
    with pytest.raises(RuntimeError, match="but the parameter lies on meta"):
        ops.select("cpu", torch.device("meta"), torch.float32)
