"""Gradients by hand: where p.grad is what the step takes it may be used; elsewhere an error says what may."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import TESTS, run
from engines import batches, engine, equal, model, state
from torch import nn

import deepfast
from deepfast.engine.by_hand import safe_get_full_grad, safe_set_full_grad
from deepfast.optim import Optimizer

mse = nn.functional.mse_loss
ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
KINDS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
    "foreign": {},
}


def made(kind, config=None):
    options = {"optimizer": lambda params: torch.optim.RMSprop(params, lr=0.01)} if kind == "foreign" else {}
    return engine({**KINDS[kind], "gradient_clipping": 0.0, **(config or {})}, **options)


def passes(e, count, at_last=lambda: None):
    for i, (x, y) in enumerate(batches(count)):
        e.backward(mse(e(x).to(y.dtype), y))
        if i == count - 1:
            at_last()
        e.step()


def true_gradients(e, count):
    """The mean over the micro-batches, of a twin in fp32 with the same weights."""
    twin = model()
    twin.load_state_dict({name: t.float() for name, t in e.module.state_dict().items()})
    for x, y in batches(count):
        (mse(twin(x), y) / count).backward()
    return [p.grad for p in twin.parameters()]


def test_where_p_grad_is_what_the_step_takes_it_may_be_clipped():
    e = engine(ONE)
    norms = []
    passes(e, 1, lambda: norms.append(nn.utils.clip_grad_norm_(e.parameters(), 0.01)))
    assert norms[0] > 0.02
    assert e.get_global_grad_norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: nn.utils.clip_grad_norm_(p, 0.01),
        lambda p: [q.grad.norm() for q in p],
        lambda p: [q.grad.mul_(2) for q in p],
        lambda p: [q.grad.data.zero_() for q in p],
        lambda p: [setattr(q, "grad", torch.zeros_like(q)) for q in p],
        lambda p: [float(q.grad.sum()) for q in p],
    ],
)
@pytest.mark.parametrize("kind", ["accumulation", "fp16"])
def test_elsewhere_using_it_is_an_error_that_names_what_may_be_used(use, kind):
    e = engine({**ONE, **KINDS["fp16"]} if kind == "fp16" else {"gradient_clipping": 0.0})
    params = list(e.parameters())
    with pytest.raises(RuntimeError, match=r"\"gradient_clipping\".*safe_get_full_grad.*safe_set_full_grad") as caught:
        passes(e, e.gradient_accumulation_steps(), lambda: use(params))
    assert len(str(caught.value)) <= 200


def test_what_stands_there_can_be_printed():
    e = engine()
    passes(e, 1)
    assert "safe_get_full_grad" in repr(e.module[0].weight.grad)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_full_gradient(kind, accumulation):
    """Unscaled, a mean, in fp32; looking at it changes nothing."""
    config = {"train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    e, alone = made(kind, config), made(kind, config)
    expected, seen = true_gradients(e, accumulation), []
    passes(e, accumulation, lambda: seen.extend(safe_get_full_grad(p) for p in e.module.parameters()))
    for grad, truth in zip(seen, expected, strict=True):
        assert grad.dtype == torch.float32
        tolerance = 1e-6 if kind in ("fp32", "foreign") else 2e-2 if kind == "bf16" else 2e-3
        torch.testing.assert_close(grad, truth, rtol=tolerance, atol=tolerance)
    passes(alone, accumulation)
    assert equal(state(e), state(alone))
    assert e.get_global_grad_norm() == alone.get_global_grad_norm()
    assert all(safe_get_full_grad(p) is None for p in e.module.parameters())  # the step has used them


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_by_hand_has_effect(kind, accumulation):
    """By the global norm: the norm of the step is then the threshold, and the weights are those of a clipped run."""
    config = {"train_batch_size": 2 * accumulation, "gradient_accumulation_steps": accumulation}
    e, clipped = made(kind, config), made(kind, {**config, "gradient_clipping": 0.01})

    def clip():
        grads = [safe_get_full_grad(p) for p in e.module.parameters()]
        share = 0.01 / torch.nn.utils.get_total_norm(grads)
        for p, grad in zip(e.module.parameters(), grads, strict=True):
            safe_set_full_grad(p, grad * share)

    passes(e, accumulation, clip)
    passes(clipped, accumulation)
    assert e.get_global_grad_norm() == pytest.approx(0.01, rel=1e-2)
    assert not e._gradients._rewritten  # the next step's are not
    for p, q in zip(e.module.parameters(), clipped.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


def test_another_pass_after_a_look():
    """What was looked at is not forgotten, and not counted twice."""
    e, alone = engine(), engine()
    data = batches(5)
    for one in (e, alone):
        for i, (x, y) in enumerate(data):
            one.backward(mse(one(x), y))
            if one is e and i in (1, 3):
                safe_get_full_grad(one.module[0].weight)
            if i < 3:
                one.step()
        one.step()
    assert equal(state(e), state(alone))


def test_what_cannot_be():
    e = engine()
    p = e.module[0].weight
    assert safe_get_full_grad(p) is None
    with pytest.raises(RuntimeError, match="no backward"):
        safe_set_full_grad(p, torch.zeros_like(p))
    with pytest.raises(ValueError, match=r"shape \(3,\), for one of \(16, 6\)"):
        safe_set_full_grad(p, torch.zeros(3))
    loose = nn.Parameter(torch.ones(3))
    assert safe_get_full_grad(loose) is None
    safe_set_full_grad(loose, torch.ones(3))
    assert safe_get_full_grad(loose).tolist() == [1.0] * 3


def test_after_loss_backward_too():
    e = engine()
    expected = true_gradients(e, 1)
    x, y = batches(1)[0]
    mse(e(x), y).backward()
    torch.testing.assert_close(safe_get_full_grad(e.module[0].weight), expected[0] / 4)
    assert isinstance(e.optimizer, Optimizer)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("ranks", [2, 3])
def test_on_ranks(ranks):
    done = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        TESTS / "by_hand_ranks.py", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("seen") == 1, done.stdout


def test_a_module_can_be_copied_and_pickled_beside_its_engine(tmp_path):
    import copy

    e = engine({"fp16": True})
    passes(e, 3)
    twin = copy.deepcopy(e.module)
    torch.save(e.module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = torch.ones(2, 6)
    assert torch.equal(twin(x), loaded(x))
    deepfast.initialize(model=twin, config={"train_batch_size": 2, "optimizer": {"type": "AdamW"}})
