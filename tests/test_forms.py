"""How masters and moments are stored: what is exact is exact, what is rounded is rounded as it is said."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BACKENDS, HALVES, NAMES, OURS, TYPICAL, difference, give_gradients, kept, parameters, trained
from torch import nn

import deepfast
from deepfast import reference
from deepfast.optim.state import HALF

SATURATES = float.fromhex("0x1.FFp127")  # from here on bf16 would round to infinity
FP16, BF16 = torch.float16, torch.bfloat16


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.int32)


def every_weight(dtype: torch.dtype) -> torch.Tensor:
    """fp32 [65536], NaN and infinities among them."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()


def around(weights: torch.Tensor, spread: int, samples: int = 64) -> torch.Tensor:
    """fp32 values next to each of the finite weights: up to ``spread`` in the last place of their bits."""
    finite = weights[weights.isfinite()]
    g = torch.Generator().manual_seed(0)
    near = torch.randint(-spread, spread + 1, (samples, len(finite)), generator=g, dtype=torch.int32)
    near[:5] = torch.tensor([[-spread], [-1], [0], [1], [spread]])
    size = (bits(finite) & 0x7FFFFFFF) + near
    x = torch.where(size < 0, 0, size).to(torch.int32).view(torch.float32).copysign(finite)
    return x[x.isfinite()]


def restored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` as a 16-bit weight and a remainder, and back."""
    remainder = reference.master_of(x, dtype, torch.int16)
    assert remainder.dtype == torch.int16
    return reference.master_value(remainder, reference.round_master(x, dtype))


def test_bf16_and_a_remainder_are_exact_wherever_rounding_does_not_saturate():
    x = around(every_weight(BF16), 0x8000)
    x = x[x.abs() < SATURATES]
    assert len(x) > 1 << 21
    assert torch.equal(bits(restored(x, BF16)), bits(x))
    beyond = torch.tensor([SATURATES, torch.finfo(torch.float32).max]).repeat(2) * torch.tensor([1.0, 1.0, -1.0, -1.0])
    nearest = torch.tensor(0x7F7F7FFF, dtype=torch.int32).view(torch.float32)  # as an int16 comes
    assert (restored(beyond, BF16).abs() == nearest).all()
    other = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    assert torch.equal(bits(restored(other, BF16))[:2], bits(other)[:2])
    assert torch.equal(bits(restored(other, BF16))[3:], bits(other)[3:])
    assert restored(other, BF16)[2].isnan()


def test_fp16_and_a_remainder_are_exact_where_fp16_is_normal_and_near_below():
    x = around(every_weight(FP16), 0x1000)
    normal = x[(x.abs() >= 2.0**-14) & (x.abs() <= 65504)]
    assert len(normal) > 1 << 21
    assert torch.equal(bits(restored(normal, FP16)), bits(normal))
    g = torch.Generator().manual_seed(0)
    exponents = torch.randint(-160, -14, (1 << 20,), generator=g).float()
    small = (
        (1 + torch.rand(1 << 20, generator=g)) * 2.0**exponents * (2 * torch.randint(0, 2, (1 << 20,), generator=g) - 1)
    )
    for below in (small, x[x.abs() < 2.0**-14], every_weight(FP16)[every_weight(FP16).abs() < 2.0**-14]):
        assert (restored(below, FP16).double() - below.double()).abs().max() <= 2.0**-40
        exact = below[below.abs() >= 2.0**-17]
        assert torch.equal(bits(restored(exact, FP16)), bits(exact))
        assert torch.equal(restored(below, FP16).signbit(), below.signbit())
    other = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 65519.0, -65504.0])
    assert torch.equal(bits(restored(other, FP16)), bits(other))
    assert restored(torch.tensor([1e30]), FP16) < 66000


def test_a_zero_that_was_written_past_a_remainder_is_a_zero():
    remainder = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)
    for zero in (0.0, -0.0):
        weight = torch.full((1 << 16,), zero, dtype=BF16)
        assert (reference.master_value(remainder, weight).abs() < 1e-40).all()
        weight = weight.to(FP16)
        assert (reference.master_value(remainder, weight).abs() <= 2.0**-25).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_training_with_a_split_master_has_the_bits_of_training_with_an_fp32_one(name, dtype, backend):
    runs = []
    for master in ("fp32", "split"):
        params = parameters(dtype)
        for p in params:
            p.grad_dtype = None
        optimizer = OURS[name](params, lr=1e-2, master=master, backend=backend, max_grad_norm=3.0, **TYPICAL[name])
        for i in range(6):
            give_gradients(params, seed=i)
            for p in params[:: 2 if i % 2 else 1]:  # gradients in fp32, too
                p.grad = p.grad.float() if i > 3 else p.grad
            optimizer.step()
        assert optimizer.state[params[0]]["master"].dtype == (torch.int16 if master == "split" else torch.float32)
        runs.append((params, optimizer))
    (ours, split), (theirs, whole) = runs[1], runs[0]
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        master, exact = split.get_master(p), whole.get_master(q)
        sure = exact.abs() >= (2.0**-17 if dtype == FP16 else 0)
        assert torch.equal(bits(master[sure]), bits(exact[sure]))
    masters, exact = [split.get_master(p) for p in ours], [whole.get_master(q) for q in theirs]
    assert difference(masters, exact) <= 2.0**-38


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_moments_are_kept_in_bf16_as_if_they_were_rounded_after_each_step(name, dtype, backend):
    """Which is what is done here to an optimizer that keeps them in fp32."""
    options = {"lr": 1e-2, "backend": backend, **TYPICAL[name]}
    ours, theirs = parameters(dtype), parameters(dtype)
    narrow, wide = OURS[name](ours, state_dtype="bf16", **options), OURS[name](theirs, **options)
    moments = narrow._moments(narrow.param_groups[0])
    wide.init_state()
    for q in theirs:
        for moment in moments:  # Adagrad's begin at a tenth
            wide.state[q][moment].copy_(wide.state[q][moment].bfloat16())
    for i in range(5):
        give_gradients(ours, theirs, seed=i)
        narrow.step(), wide.step()
        for p, q in zip(ours, theirs, strict=True):
            for moment in moments:
                assert narrow.state[p][moment].dtype == BF16
                t = wide.state[q][moment]
                t.copy_(t.bfloat16())
                assert torch.equal(narrow.state[p][moment].float(), t) or name == "LAMB"
            if name == "LAMB":  # its norms are of the direction that the rounded moments have
                torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)
            else:
                assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_moment_has_its_own_form(backend):
    for form, expected in (
        ({"exp_avg": "bf16"}, (BF16, torch.float32)),
        ({"exp_avg_sq": "param"}, (torch.float32, FP16)),
    ):
        (p,) = parameters(FP16, shapes=[(3000,)])
        optimizer = deepfast.AdamW([p], state_dtype=form, backend=backend, eps=1e-3)
        for _ in range(2):
            give_gradients([p])
            optimizer.step()
        state = optimizer.state[p]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == expected
        assert (state["exp_avg"] != 0).any()
        assert (state["exp_avg_sq"] > 0).any()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("dtype", HALVES)
def test_without_a_master_and_with_moments_like_the_parameter_it_is_torchs(name, dtype):
    ours, theirs, exact = parameters(dtype), parameters(dtype), [nn.Parameter(p.double()) for p in parameters(dtype)]
    options = {"lr": 1e-2, **TYPICAL[name], **({"eps": 1e-3} if "Ada" in name else {})}
    mine = OURS[name](ours, master="none", state_dtype="param", **options)
    peer, oracle = getattr(torch.optim, name)(theirs, **options), getattr(torch.optim, name)(exact, **options)
    for i in range(10):
        give_gradients(ours, theirs, seed=i)
        for e, p in zip(exact, ours, strict=True):
            e.grad = p.grad.double()
        mine.step(), peer.step(), oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        kinds = {k: v.dtype for k, v in mine.state[p].items()}
        assert kinds | {"step": None} == {k: v.dtype for k, v in peer.state[q].items()} | {"step": None}
    assert difference(ours, exact) <= 2 * difference(theirs, exact)
    mine.load_state_dict(copy.deepcopy(peer.state_dict()))
    peer.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("before", "after"), [("split", "fp32"), ("fp32", "split"), ("split", "none"), ("none", "split")]
)
def test_forms_can_be_changed_between_steps(before, after, dtype):
    params = parameters(dtype)
    optimizer = trained(deepfast.AdamW, params, master=before)
    exact = [kept(optimizer, p).float().clone() for p in params]
    optimizer.master, optimizer.state_dtype = after, {"exp_avg": "bf16"}
    optimizer.param_groups[0]["lr"] = 0.0
    give_gradients(params)
    optimizer.step()
    for p, e in zip(params, exact, strict=True):
        now = kept(optimizer, p)
        assert ("master" in optimizer.state[p]) == (after != "none")
        assert optimizer.state[p]["exp_avg"].dtype == BF16
        assert torch.equal(reference.round_master(e, dtype), p)
        assert torch.equal(now.float(), p.float() if after == "none" else e) or dtype == FP16
        torch.testing.assert_close(now.float(), e, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("into", ["fp32", "split"])
@pytest.mark.parametrize("compact", [False, True])
def test_state_travels_between_forms(dtype, into, compact):
    params = parameters(dtype)
    optimizer = trained(deepfast.AdamW, params, state_dtype="bf16")
    state = copy.deepcopy(optimizer.state_dict(compact=compact))
    assert state["state"][0]["master"].dtype == (torch.int16 if compact else torch.float32)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = deepfast.AdamW(others, master=into, lr=1e-3)
    other.load_state_dict(state)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(bits(optimizer.get_master(p)), bits(other.get_master(q)))
        assert torch.equal(optimizer.state[p]["exp_avg"].float(), other.state[q]["exp_avg"])
    give_gradients(params, others, seed=5)
    optimizer.step(), other.step()
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("master", ["split", "fp32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_master_begins_at_the_value_that_is_given(dtype, master):
    torch.manual_seed(0)
    exact = torch.randn(5, 40)
    p, q = nn.Parameter(torch.zeros(5, 40, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = deepfast.SGD([p, q], lr=1.0, master=master)
    optimizer.set_master(p, exact)
    assert torch.equal(p, reference.round_master(exact, dtype))
    assert torch.equal(optimizer.get_master(p), exact)
    p.grad = torch.full_like(p, 0.0)
    optimizer.step()
    assert torch.equal(optimizer.get_master(p), exact)
    optimizer.set_master(p, exact * 3)
    optimizer.step()
    assert torch.equal(optimizer.get_master(p), exact * 3)
    optimizer = deepfast.SGD([p, q], lr=1.0, master=master)
    optimizer.set_master(p, exact)
    with torch.no_grad():
        p[:2] = 7.0  # since then somebody has loaded other weights
    optimizer.step()
    assert (optimizer.get_master(p)[:2] == 7.0).all()
    assert torch.equal(optimizer.get_master(p)[2:], exact[2:])
    with pytest.raises(ValueError, match="not in the optimizer's groups"):
        optimizer.set_master(nn.Parameter(torch.zeros(2)), torch.zeros(2))
    assert p.dtype in HALF


def test_what_is_asked_for_in_vain_is_said():
    with pytest.warns(UserWarning, match="state_dtype has no effect: SGD keeps no moment"):
        deepfast.SGD(parameters(), lr=0.1, state_dtype="bf16")
    with pytest.warns(UserWarning, match="rounding has no effect: no parameter is 16 bits wide"):
        deepfast.SGD(parameters(), lr=0.1, master="none", rounding="stochastic")


class Mine(deepfast.AdamW):
    """A class of somebody's own."""


@pytest.mark.parametrize("kind", [*OURS.values(), Mine], ids=lambda kind: kind.__name__)
def test_a_warning_points_at_the_line_that_asked(kind):
    """However many constructors lie between."""
    optimizer = deepfast.SGD(parameters())
    in_vain = {"master": "none", "rounding": "stochastic"}
    lines = {
        "made": lambda: kind(parameters(), lr=0.1, **in_vain),
        "set": lambda: setattr(optimizer, "state_dtype", "bf16"),
        "functional": lambda: deepfast.functional.Optimizer(kind, lr=0.1, **in_vain).init(torch.ones(3)),
        "an engine's": lambda: deepfast.initialize(
            model=nn.Linear(2, 2),
            config={"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1, **in_vain}}},
        ),
    }
    for ask in lines.values():
        with pytest.warns(UserWarning, match="has no effect") as heard:
            ask()
        first = ask.__code__.co_firstlineno
        (said,) = [w for w in heard if "has no effect" in str(w.message)]
        assert (said.filename, said.lineno - first) in [(__file__, n) for n in range(2)]


def engine_of(precision, rate=1e-2, seed=0, **form):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 1))
    before = [p.detach().clone() for p in module.parameters()]
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": rate, **form}},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    engine, *_ = deepfast.initialize(model=module, config=config)
    return engine, before


def train(engine, steps=3):
    for i in range(steps):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(i))
        engine.backward(engine(x).float().square().mean())
        engine.step()


@pytest.mark.parametrize("master", ["split", "fp32"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_engine_starts_from_the_fp32_values_that_it_casts(precision, master):
    engine, before = engine_of(precision, rate=1e-30, master=master)
    train(engine, 1)
    assert engine.was_step_applied() or precision == "fp16"
    for p, exact in zip(engine.module.parameters(), before, strict=True):
        torch.testing.assert_close(engine.optimizer.get_master(p), exact, rtol=0, atol=2.0**-40)
        assert not torch.equal(exact, p.float())


FORMS = {
    "split": {},
    "fp32 master": {"master": "fp32"},
    "bf16 moments": {"state_dtype": "bf16"},
    "one in bf16": {"master": "fp32", "state_dtype": {"exp_avg": "bf16"}},
    "int8 moments": {"state_dtype": "int8"},
    "by chance": {"master": "none", "rounding": "stochastic"},
}


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_checkpoints_move_between_forms(tmp_path, before, after):
    first, _ = engine_of("bf16", **FORMS[before])
    train(first)
    first.save_checkpoint(tmp_path)
    second, _ = engine_of("bf16", seed=1, **FORMS[after])
    second.load_checkpoint(tmp_path)
    for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, q)
        if after != "by chance":
            assert torch.equal(second.optimizer.get_master(q), first.optimizer.get_master(p))
        for moment in ("exp_avg", "exp_avg_sq"):
            exact = first.optimizer.unpacked(p, moment, first.optimizer.state[p][moment])
            found = second.optimizer.unpacked(q, moment, second.optimizer.state[q][moment])
            if after == "int8 moments" != before:
                torch.testing.assert_close(found, exact.float(), rtol=1 / 15, atol=1e-6)
            else:
                assert torch.equal(found, exact.to(found.dtype))
        assert second.optimizer.state[q]["step"] == 3
    train(second, 1)
    if before == after:
        train(first, 1)
        assert all(map(torch.equal, first.module.parameters(), second.module.parameters()))


def test_an_engine_keeps_no_fp32_copy_of_what_is_frozen():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    module[0].requires_grad_(requires_grad=False)
    config = {"train_batch_size": 1, "bf16": {"enabled": True}}
    optimizer = deepfast.AdamW(module.parameters(), lr=0.1)
    engine, *_ = deepfast.initialize(model=module, optimizer=optimizer, config=config)
    assert set(engine.optimizer._given) == set(module[1].parameters())
    assert not engine._forward.originals
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    assert not engine.optimizer._given
