"""Storage forms in Triton's kernels: the codec against plain torch's, whole steps against the CPU kernels, bit by bit.

In Triton's interpreter, like test_triton.py; there the forms take part in steps over random spans, too.
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
from torch import Tensor

from deepfast import ops, reference
from deepfast.kernels import codec
from deepfast.kernels.table import DTYPES, span_of
from deepfast.reference.noise import noise, stochastic

pytestmark = pytest.mark.triton
SHAPES = [(16, 17), (5,), (), (0, 3), (1, 1030), (33, 7)]
FORMS = {
    "fp32 masters": {"master": "fp32"},
    "split, moments as their parameters": {"master": "split", "state_dtype": "param"},
    "split, moments in bf16": {"master": "split", "state_dtype": "bf16"},
    "no masters, moments in bf16": {"master": "none", "state_dtype": "bf16"},
    "by chance": {"master": "none", "rounding": "stochastic", "seed": 3},
    "by chance, moments in bf16": {"master": "none", "rounding": "stochastic", "state_dtype": "bf16"},
}


@pytest.fixture(scope="module", autouse=True)
def backend():
    assert os.environ.get("TRITON_INTERPRET") == "1"
    return ops.triton()


def bits(t: Tensor) -> Tensor:
    """NaN as one and the same."""
    t = t.detach().contiguous()
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.fixture(scope="module")
def exact() -> bool:
    """Else the interpreter's fma rounds twice, and results are compared to rounding."""
    return exact_fma()


def assert_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))


def of_all_sizes() -> Tensor:
    """fp32: any bits, what is beside each 16-bit value, where rounding begins to do something else."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=g).to(torch.int32)
    near = [every_half(dtype).float().view(torch.int32) + k for dtype in HALVES for k in (-0x8000, -0x1000, -1, 0, 1)]
    edges = [65504.0, 65519.0, 65520.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 1e-45, 3.39e38, torch.inf]
    signed = torch.tensor([*edges, *(-edge for edge in edges), 0.0, -0.0, torch.nan])
    return torch.cat([torch.cat([patterns, *near]).view(torch.float32), signed])


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


BLOCK = tl.constexpr(1 << 14)


@triton.jit
def decode_kernel(half, remainder, out, n, DTYPE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = codec.pointer(half, DTYPE, 1) + i
    decoded = codec.decode_split(codec.fetch(at, i < n), codec.fetch(remainder + i, i < n), DTYPE)
    tl.store(out + i, decoded, i < n)


@triton.jit
def encode_kernel(x, chance, halves, remainders, by_chance, n, DTYPE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = codec.fetch(x + i, i < n)
    half = codec.encode(value, DTYPE, True)
    tl.store(codec.pointer(halves, DTYPE, 1) + i, half, i < n)
    tl.store(remainders + i, codec.remainder(value, half, DTYPE), i < n)
    rounded = codec.stochastic(value, codec.fetch(chance + i, i < n).to(tl.uint32), DTYPE)
    tl.store(codec.pointer(by_chance, DTYPE, 1) + i, rounded, i < n)


@triton.jit
def noise_kernel(seed, step, place, out, n):
    i = tl.load(place) + tl.arange(0, BLOCK)
    drawn = codec.noise_bits(codec.noise(tl.load(seed), tl.load(step)), i)
    tl.store(out + tl.arange(0, BLOCK), drawn.to(tl.int64), tl.arange(0, BLOCK) < n)


def on_all(kernel, n: int, *arguments) -> None:
    kernel[(-(-n // BLOCK.value),)](*arguments)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_split_master_is_decoded_as_the_reference_does(dtype):
    g = torch.Generator().manual_seed(1)
    remainders = torch.randint(-0x8000, 0x8000, (7, 1 << 16), generator=g).to(torch.int16)
    remainders[:5] = torch.tensor([[-0x8000], [-1], [0], [1], [0x7FFF]])
    halves, n = every_half(dtype).repeat(7), remainders.numel()
    out = torch.empty(n)
    on_all(decode_kernel, n, halves.data_ptr(), remainders, out, n, DTYPES[dtype])
    known = ~halves.isnan()  # beside a NaN is nothing; and numpy does not make one quiet, as the hardware does
    assert_bits(out[known], reference.master_value(remainders.flatten(), halves)[known])
    assert out[2 << 16 : 3 << 16][every_half(dtype).isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_is_rounded_and_split_as_the_reference_does(dtype):
    x = of_all_sizes()
    n = x.numel()
    chance = torch.randint(0, 1 << 16, (n,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    chance[::5], chance[1::5] = 0, 0xFFFF
    halves, by_chance, remainders = (torch.empty(n, dtype=form) for form in (dtype, dtype, torch.int16))
    on_all(encode_kernel, n, x, chance, halves.data_ptr(), remainders, by_chance.data_ptr(), n, DTYPES[dtype])
    assert_bits(halves, reference.round_master(x, dtype))
    assert_bits(remainders, reference.master_of(x, dtype, torch.int16))
    assert_bits(by_chance, stochastic(x, dtype, chance.long()))


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 0x1234567890ABCDEF])
def test_random_bits_are_the_references(seed):
    for step in (0.0, 1.0, 12345.0, 2.0**24):
        for place in (0, 7, 2**32 - 5, 2**32 + 1):
            out = torch.empty(1000, dtype=torch.int64)
            noise_kernel[(1,)](torch.tensor([seed]), torch.tensor([step]), torch.tensor([place]), out, 1000)
            first = place % 2**32
            wanted = noise(seed, torch.tensor(step), first, torch.empty(1000))
            assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_steps_give_the_same_bits(name, form, dtype, exact):
    results = []
    for chosen in ("triton", "cpu"):
        params = parameters(dtype, SHAPES)
        optimizer = OURS[name](params, backend=chosen, max_grad_norm=1.0, **FORMS[form], **TYPICAL[name])
        for step in range(3):
            give_gradients(params, seed=step, scale=10.0 ** (step - 1))
            if step == 1:
                params[0].grad.view(-1)[3] = 1e4
                with torch.no_grad():  # the master takes it over
                    params[5].view(-1)[7:20] = 2.5
            optimizer.step()
        results.append([t for p in params for t in (p, *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        assert_bits(a, b) if exact else assert_same(a, b, exact)


def test_each_moment_in_its_own_type(exact):
    """Of AMSGrad, which has three; fp16 loses what is small, and overflows."""
    hyper = torch.tensor([[1.0, *HYPER["adam_amsgrad"]]], dtype=torch.float64)
    forms, results = (torch.float16, torch.bfloat16, torch.float32), []
    for plan_of in (ops.triton().Plan, ops.native.Plan):
        p, remainder = torch.linspace(-2, 2, 1500).half(), torch.zeros(1500, dtype=torch.int16)
        moments, steps = [torch.zeros(1500, dtype=form) for form in forms], [torch.zeros(())]
        plan = plan_of("adam_amsgrad", [p], [remainder], moments, steps, torch.zeros(1, dtype=torch.int32))
        for exponent in (-7, 0, 7):
            plan.gather([torch.linspace(-1, 1, 1500) * 10.0**exponent], reference.KEPT)
            plan.step(hyper, [], torch.tensor([1.0, 0.0, 0.0]), None)
        results.append([p, remainder, *moments, *steps])
    for a, b in zip(*results, strict=True):
        assert_bits(a, b) if exact else assert_same(a, b, exact)
    assert results[0][2].isinf().any()
    assert not torch.equal(results[0][3].float(), results[0][4])


@pytest.mark.parametrize("form", [torch.int16, torch.float32, None])
@pytest.mark.parametrize("rule", list(reference.RULES))
def test_nothing_is_written_beside(backend, rule, form):
    what = reference.RULES[rule]
    for n in (1, 63, 1025):
        whole = []

        def inside(value, dtype=torch.bfloat16, n=n, whole=whole):
            whole.append(torch.full((n + 128,), 77, dtype=dtype))
            return whole[-1][64 : 64 + n].copy_(value)

        x = torch.linspace(-2, 2, n)
        param, grad = inside(x), inside(x + 0.5)
        master = torch.empty(0) if form is None else inside(x if form.is_floating_point else 0, form)
        moments = [inside(0.25) for _ in range(what.moments)]
        steps = [torch.zeros(())] if what.counts_steps or form is None else []
        hyper = torch.tensor([[1.0, *HYPER[rule]]], dtype=torch.float64)
        plan = backend.Plan(rule, [param], [master], moments, steps, torch.zeros(1, dtype=torch.int32))
        if form is None:
            plan.by_chance([5], [0], True)
        plan.gather([grad], reference.RESET)
        record = torch.tensor([1.0, 0.0, 0.0])
        plan.step(hyper, [], record, plan.norms(hyper, [], record) if plan.needs_norms() else None)
        for t in whole:
            assert (t[:64] == 77).all()
            assert (t[64 + n :] == 77).all()
        assert not grad.any()
        assert steps == [] or steps[0] == 1


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_steps_are_counted_where_chance_is_asked_for(backend, skipped):
    """By rules that do not count, too; not where nothing is done."""
    hyper = torch.tensor([[1.0, *HYPER["lion"]]], dtype=torch.float64)
    p, m, steps = torch.ones(5).half(), torch.zeros(5), torch.tensor(4.0)
    plan = backend.Plan("lion", [p], [torch.empty(0)], [m], [steps], torch.zeros(1, dtype=torch.int32))
    plan.by_chance([1], [0], True)
    plan.gather([torch.ones(5)], reference.KEPT)
    plan.step(hyper, [], torch.tensor([1.0, skipped, 0.0]), None)
    assert steps == (4.0 if skipped else 5.0)
    assert torch.equal(p, torch.ones(5).half()) == bool(skipped)


def test_a_plan_takes_chance_whenever_it_is_told(backend):
    """Also after steps without it, with another seed, and not for a weight with a master."""
    hyper = torch.tensor([[1.0, *HYPER["sgd"]]], dtype=torch.float64)
    results = []
    for chosen in (backend, ops.native):
        p, q = torch.linspace(-1, 1, 300).bfloat16(), torch.linspace(-1, 1, 300).bfloat16()
        master, grads, steps = q.float(), [torch.linspace(0, 0.01, 300)] * 2, [torch.zeros(()), torch.zeros(())]
        groups = torch.zeros(2, dtype=torch.int32)
        plan = chosen.Plan("sgd", [p, q], [torch.empty(0), master], [], steps, groups)
        seen = []
        for seed in (None, 1, 2):
            if seed is not None:
                plan.by_chance([seed, seed], [0, 0], True)
            plan.gather(grads, reference.KEPT)
            plan.step(hyper, [], torch.tensor([1.0, 0.0, 0.0]), None)
            seen += [p.clone(), q.clone(), master.clone()]
        results.append(seen)
    for a, b in zip(*results, strict=True):
        assert_bits(a, b) if exact else assert_same(a, b, exact)


def test_chance_is_refused_in_the_words_of_the_compiled_plan(backend):
    for chosen in (backend, ops.native):
        p = [torch.ones(3).half()]
        plan = chosen.Plan("sgd", p, [torch.empty(0)], [], [], torch.zeros(1, dtype=torch.int32))
        with pytest.raises(RuntimeError, match="1 tensors of seeds expected, got 2"):
            plan.by_chance([1, 2], [0, 0], True)
        with pytest.raises(RuntimeError, match="1 tensors of places expected, got 0"):
            plan.by_chance([1], [], True)
        with pytest.raises(RuntimeError, match="rounding by chance needs step counts"):
            plan.by_chance([1], [0], True)


def test_16_bytes_of_the_widest_stream_move_at_once():
    bf16, fp32, i16 = torch.bfloat16, torch.float32, torch.int16
    at = 1 << 20
    assert span_of((at, bf16), (at, bf16), 9, (at, i16), [(at, bf16)] * 2).kind.pack == 8
    assert span_of((at, bf16), (at, bf16), 9, (at, i16), [(at, bf16), (at, fp32)]).kind.pack == 4
    assert span_of((at, bf16), (at, fp32), 9, (at, i16)).kind.pack == 4
    assert span_of((at, bf16), (at, bf16), 9, (at, fp32)).kind.pack == 4
    assert span_of((at, bf16), (at, bf16), 9, (at + 8, i16)).kind.pack == 1
    assert span_of((at, bf16), (at, bf16), 9, (at + 8, i16), [(at, fp32)]).kind.pack == 4
    assert span_of((at, bf16), (at, bf16), 9, moments=[(at + 8, bf16)]).kind.pack == 1
    chance = {"chance": (3, 4), "stochastic": True}
    assert span_of((at, bf16), (at, bf16), 9, **chance).kind.chance
    assert not span_of((at, fp32), (at, bf16), 9, **chance).kind.chance
    assert not span_of((at, bf16), (at, bf16), 9, (at, i16), **chance).kind.chance
