"""Moments in 8 bits in Triton's kernels: the code against plain torch's, whole steps against the CPU's, bit by bit.

In Triton's interpreter, like test_triton.py.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from cases import HALVES, HYPER, NAMES, OURS, TYPICAL, give_gradients, parameters
from played import exact_fma
from test_triton import assert_same
from test_triton_forms import assert_bits
from torch import Tensor, nn

from deepfast import ops, reference
from deepfast.kernels import codec, int8
from deepfast.kernels.table import span_of
from deepfast.reference.noise import dither

pytestmark = pytest.mark.triton
GROUPED = [torch.int8, torch.uint8]
SHAPES = [(63,), (64,), (1025,), (0, 3), (), (1, 4097), (65,), (1023,)]
ONCE = torch.tensor([1.0, 0.0, 0.0])  # a record


@pytest.fixture(scope="module", autouse=True)
def backend():
    assert os.environ.get("TRITON_INTERPRET") == "1"
    return ops.triton()


@pytest.fixture(scope="module")
def exact() -> bool:
    return exact_fma()


def same(a: Tensor, b: Tensor, exact: bool) -> None:
    """Where the interpreter's fma rounds twice, codes say little."""
    assert_same(a, b, exact) if a.is_floating_point() or not exact else assert_bits(a.short(), b.short())


def of_all_sizes(signed: bool) -> Tensor:
    """fp32 in groups: wide and narrow ones, near the least and the greatest numbers, with zeros, infinities and NaN."""
    g = torch.Generator().manual_seed(0)
    exponent = torch.randint(-150, 128, (3000, 1), generator=g)
    spread = torch.tensor([0.0, 0.02, 0.5, 3.0, 30.0])[torch.arange(3000) % 5][:, None]
    x = torch.ldexp(1 + torch.rand(3000, 64, generator=g), exponent)
    x = (x * torch.exp2(torch.randn(3000, 64, generator=g) * spread)).nan_to_num(posinf=3.4e38)
    x[::7][torch.rand(429, 64, generator=g) < 0.3] = 0.0
    odd = [0.0, 1e-45, 1e-40, 2.0**-126, 2.0**127, 1.875 * 2.0**127, 1.9375 * 2.0**127, 3.4028234e38, torch.inf]
    for k, value in enumerate([*odd, torch.nan]):
        x[11 * k] = value
        x[11 * k + 1, k] = value
        x[11 * k + 2, 1:] = 0.0
    if signed:
        x = torch.where(torch.rand(3000, 64, generator=g) < 0.5, -x, x)
        x[5, :3] = torch.tensor([-0.0, 0.0, -1e-45])
    return x.flatten()[:-23]


BLOCK = tl.constexpr(1024)


@triton.jit
def places(codes, n):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    return i, i < n, (codes.to(tl.pointer_type(tl.uint8)) + i, int8.words_of(codes, n) + group)


@triton.jit
def pack_kernel(x, chance, codes, n, SIGNED: tl.constexpr):
    i, mask, at = places(codes, n)
    drawn = codec.fetch(chance + i, mask).to(tl.uint32)
    int8.store(at, int8.pack(tl.load(x + i), mask, drawn, SIGNED), mask)  # what the mask leaves out is anything


@triton.jit
def unpack_kernel(codes, out, n, SIGNED: tl.constexpr):
    i, mask, at = places(codes, n)
    tl.store(out + i, int8.load(at, mask, SIGNED), mask)


@triton.jit
def dither_kernel(seed, step, place, out, MOMENT: tl.constexpr):
    i = tl.arange(0, BLOCK)
    key = codec.dither(tl.load(seed), tl.load(step), MOMENT)
    tl.store(out + i, codec.dither_bits(key, tl.load(place) + i).to(tl.int64))


def on_all(kernel, n: int, *arguments) -> None:
    kernel[(-(-n // BLOCK.value),)](*arguments)


@pytest.mark.parametrize("dtype", GROUPED)
@pytest.mark.parametrize("drawn", ["any", "least", "most"])
def test_moments_are_packed_as_the_reference_does(dtype, drawn):
    x = of_all_sizes(dtype == torch.int8)
    n = x.numel()
    chance = torch.randint(0, 1 << 32, (n,), generator=torch.Generator().manual_seed(2))
    if drawn != "any":
        chance[:] = 0 if drawn == "least" else (1 << 32) - 1
    packed = torch.full((reference.packed_size(n),), 77, dtype=dtype)
    beyond = torch.cat((x, torch.full((BLOCK.value,), 3e38)))
    on_all(pack_kernel, n, beyond, chance, packed.data_ptr(), n, dtype == torch.int8)
    wanted = reference.pack(x, dtype, chance)
    assert torch.equal(packed, wanted)
    out = torch.empty(n)
    on_all(unpack_kernel, n, packed.data_ptr(), out, n, dtype == torch.int8)
    assert_bits(out, reference.unpack(wanted, x.shape))
    if drawn == "any":  # or nothing has been tested
        finite = x.isfinite() & (x.abs() > 2.0**-120)
        assert (out[finite] != 0).sum() > n // 3
        assert out.isinf().any()
        assert out.isnan().any()


@pytest.mark.parametrize("dtype", GROUPED)
def test_every_code_is_unpacked_as_the_reference_does(dtype):
    least = torch.arange(1, 0x7F8 - (127 if dtype == torch.int8 else 0), 3)
    widths = torch.tensor([8]) if dtype == torch.int8 else torch.arange(9)
    words = (least[:, None] << 4 | widths).repeat_interleave(4)
    codes = torch.arange(256).repeat(len(words) // 4)
    packed = torch.cat((codes, torch.stack((words & 255, words >> 8), 1).flatten())).to(torch.uint8).view(dtype)
    out = torch.empty(codes.numel())
    on_all(unpack_kernel, out.numel(), packed.data_ptr(), out, out.numel(), dtype == torch.int8)
    assert_bits(out, reference.unpack(packed, out.shape))


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 0x1234567890ABCDEF])
def test_random_bits_are_the_references(seed):
    for moment, step, place in ((0, 1.0, 0), (1, 2.0**24, 7), (2, 12345.0, 2**32 - 5), (1, 3.0, 2**32 + 1)):
        out = torch.empty(1024, dtype=torch.int64)
        dither_kernel[(1,)](torch.tensor([seed]), torch.tensor([step]), torch.tensor([place]), out, moment)
        assert torch.equal(out, dither(seed, torch.tensor(step), moment, place, 1024))


FORMS = {
    "int8": {"state_dtype": "int8"},
    "fp32 masters": {"state_dtype": "int8", "master": "fp32"},
    "by chance": {"state_dtype": "int8", "master": "none", "rounding": "stochastic", "seed": 3},
}


def form_of(name: str, form: str) -> dict:
    """AMSGrad's second moments are not kept so."""
    return FORMS[form] | ({"state_dtype": {"exp_avg": "int8"}} if "amsgrad" in TYPICAL[name] else {})


def stepped(chosen: str, params: list[Tensor], name: str, steps: int = 2, **options) -> list[Tensor]:
    """All that is left of some steps."""
    optimizer = OURS[name](params, backend=chosen, max_grad_norm=1.0, **options)
    for step in range(steps):
        give_gradients(params, seed=step, scale=10.0 ** (step - 1))
        if step == 1 and params[0].numel() > 3:
            params[0].grad.view(-1)[3] = 1e4
        optimizer.step()
    return [t for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "int8"), *((dtype, form) for dtype in HALVES for form in FORMS)]
)
@pytest.mark.parametrize("name", NAMES)
def test_whole_steps_give_the_same_bits(name, dtype, form, exact):
    mine, theirs = (
        stepped(chosen, parameters(dtype, SHAPES), name, **form_of(name, form), **TYPICAL[name])
        for chosen in ("triton", "cpu")
    )
    assert any(t.dtype in GROUPED and t.any() for t in mine)
    for a, b in zip(mine, theirs, strict=True):
        same(a, b, exact)


@pytest.mark.parametrize("form", [{"exp_avg": "int8", "exp_avg_sq": "bf16"}, {"exp_avg_sq": "int8"}])
@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_beside_moments_in_other_forms(name, form, exact):
    mine, theirs = (stepped(b, parameters(torch.bfloat16, SHAPES), name, state_dtype=form) for b in ("triton", "cpu"))
    for a, b in zip(mine, theirs, strict=True):
        same(a, b, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_any_layout(name, dtype, exact):
    """Transposed, strided, beside a boundary: a group is neighbours in memory, or in the copy that is stepped."""
    results = []
    for chosen in ("triton", "cpu"):
        g = torch.Generator().manual_seed(0)
        x, y, z = (torch.randn(n, generator=g).to(dtype) for n in ((40, 60), (60, 80), 2001))
        params = [nn.Parameter(t) for t in (x.t(), y[:, ::2], z[1:], x.clone())]
        results.append(stepped(chosen, params, name, state_dtype="int8"))
    for a, b in zip(*results, strict=True):
        same(a, b, exact)


def plan_step(plan, grads: list[Tensor], hyper: Tensor, record: Tensor, after: int = reference.KEPT) -> Tensor | None:
    assert plan.gather(grads, after) == len(grads)
    norms = plan.norms(hyper, [], record) if plan.needs_norms() else None
    plan.step(hyper, [], record, norms)
    return norms


@pytest.mark.parametrize("forms", [(torch.int8, torch.uint8, torch.uint8), (torch.int8, torch.bfloat16, torch.uint8)])
@pytest.mark.parametrize("rule", [rule for rule, what in reference.RULES.items() if what.moments])
def test_places_and_seeds(backend, rule, forms, exact):
    """Of parts of parameters; a step that is skipped leaves all as it is; what lies beside stays."""
    what, results = reference.RULES[rule], []
    forms = [torch.uint8] if rule == "adagrad" else forms[: what.moments]
    hyper = torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64)
    sizes, offset = [1500, 64, 2000, 7], 8
    for chosen in (backend, ops.native):
        g = torch.Generator().manual_seed(1)
        params = [torch.randn(n, generator=g).bfloat16() for n in sizes]
        rooms = [
            torch.full((2 * offset + (reference.packed_size(n) if form in GROUPED else n),), 77).to(form)
            for form in forms
            for n in sizes
        ]
        moments = [room[offset:-offset].zero_() for room in rooms]
        steps = [torch.tensor(float(k)) for k in range(4)]
        groups, none = torch.zeros(4, dtype=torch.int32), [torch.empty(0)] * 4
        plan = chosen.Plan(rule, params, none, moments, steps, groups)
        seen: list[Tensor] = []
        for seed in (None, 5, -7):
            if seed is not None:
                plan.by_chance([seed, seed, seed + 1, seed], [0, 2**32 - 100, 64, 2**33 + 1], seed < 0)
            grads = [torch.randn(n, generator=g) * 10.0 ** (k - 2) for k, n in enumerate(sizes)]
            seen += [t for t in (plan_step(plan, grads, hyper, ONCE),) if t is not None]
            before = [t.clone() for t in (*params, *rooms, *steps)]
            plan_step(plan, grads, hyper, torch.tensor([1.0, 1.0, 0.0]))
            assert all(map(torch.equal, before, (*params, *rooms, *steps)))
            seen += before
        for room in rooms:
            assert (torch.cat((room[:offset], room[-offset:])) == torch.tensor(77).to(room.dtype)).all()
        results.append(seen)
    for a, b in zip(*results, strict=True):
        same(a, b, exact)


@pytest.mark.parametrize("exponent", [-22.0, 15.0])
def test_norms_that_fp32_cannot_hold(backend, exponent, exact):
    """The second look is at moments that the first has stored; the directions' sizes are eps's."""
    hyper = torch.tensor([[1.0, 0.1, 0.9, 0.99, 10.0**-exponent, 0.0, 0.0, 10.0]], dtype=torch.float64)
    results = []
    for chosen in (backend, ops.native):
        g = torch.Generator().manual_seed(1)
        p, grad = torch.randn(3000, generator=g), torch.randn(3000, generator=g) * 1e-3
        moments = [torch.zeros(reference.packed_size(3000), dtype=form) for form in GROUPED]
        steps, groups = [torch.zeros(())], torch.zeros(1, dtype=torch.int32)
        plan = chosen.Plan("lamb", [p], [torch.empty(0)], moments, steps, groups)
        norms = plan_step(plan, [grad], hyper, ONCE)
        results.append([p, norms, *moments])
    for a, b in zip(*results, strict=True):
        same(a, b, exact)


def test_what_does_not_fit_is_refused_in_the_words_of_the_compiled_plan(backend):
    groups, steps = torch.zeros(1, dtype=torch.int32), [torch.zeros(())]
    for chosen in (backend, ops.native):
        p, none, moment = [torch.ones(70)], [torch.empty(0)], torch.zeros(132, dtype=torch.int8)
        plan = chosen.Plan("lion", p, none, [moment], [], groups)
        with pytest.raises(RuntimeError, match="moments in 8 bits need step counts"):
            plan.gather([torch.ones(70)], reference.KEPT)
        for wrong in (moment[:-1], moment.view(2, 66), torch.zeros(264, dtype=torch.int8)[::2]):
            plan = chosen.Plan("lion", p, none, [wrong], steps, groups)
            with pytest.raises(RuntimeError, match="of 70 elements must be 132 contiguous bytes, got shape"):
                plan.gather([torch.ones(70)], reference.KEPT)


def test_codes_are_as_aligned_as_they_are():
    at, fp32, bf16, i8 = 1 << 20, torch.float32, torch.bfloat16, torch.int8
    assert span_of((at, fp32), (at, fp32), 9, moments=[(at + 4, i8)]).kind.pack == 4
    assert span_of((at, fp32), (at, fp32), 9, moments=[(at + 2, i8)]).kind.pack == 1
    assert span_of((at, bf16), (at, bf16), 9, moments=[(at + 8, i8)]).kind.pack == 8
    assert span_of((at, bf16), (at, bf16), 9, moments=[(at + 4, i8)]).kind.pack == 1
