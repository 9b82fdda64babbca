"""What a checkpoint may say, whoever has written it, and what loading it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import COUNTING, DROPINS, NAMES, OURS, PEERS, TYPICAL, give_gradients, parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepfast
from deepfast import reference


def trained(cls, params, steps=5, **options):
    optimizer = cls(params, **options)
    for i in range(steps):
        give_gradients(params, seed=i)
        optimizer.step()
    return optimizer


def test_an_adam_checkpoint_leaves_adamw_decoupled():
    """torch's Adam writes ``decoupled_weight_decay: False``; torch's AdamW puts that right."""
    saved = trained(torch.optim.Adam, parameters(), lr=0.1).state_dict()
    assert saved["param_groups"][0]["decoupled_weight_decay"] is False
    ours, theirs = parameters(), parameters()
    a, b = (cls(ps, weight_decay=0.5) for cls, ps in ((deepfast.AdamW, ours), (torch.optim.AdamW, theirs)))
    for optimizer, params in ((a, ours), (b, theirs)):
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.param_groups[0]["weight_decay"] = 0.5
        for i in range(5):
            give_gradients(params, seed=i)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    plain = deepfast.Adam(parameters())
    plain.load_state_dict(trained(torch.optim.AdamW, parameters()).state_dict())
    assert plain.param_groups[0]["decoupled_weight_decay"], "in Adam it is a setting, as in torch"


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("count", [200, torch.tensor([200])])
def test_steps_that_are_counted_in_the_group(name, count):
    """As apex' fused optimizers do, and what descends from them."""
    state = trained(OURS[name], parameters()).state_dict()
    expected = copy.deepcopy(state)
    for values in expected["state"].values():
        values["step"] = torch.tensor(200.0)
    for values in state["state"].values():
        del values["step"]
    state["param_groups"][0]["step"] = count
    ours, theirs = parameters(), parameters()
    a, b = OURS[name](ours), OURS[name](theirs)
    a.load_state_dict(state), b.load_state_dict(expected)
    assert all(a.state[p]["step"] == 200 for p in ours)
    give_gradients(ours, theirs)
    a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", COUNTING)
def test_moments_that_nobody_has_counted_are_refused(name):
    """Bias correction would begin anew; in a checkpoint, and in a state that somebody has put together."""
    params = parameters()
    optimizer = trained(OURS[name], params)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    del state["state"][1]["step"]
    with pytest.raises(ValueError, match=f"state of {name} has .* but no 'step'"):
        optimizer.load_state_dict(state)
    for i, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before["state"][i][k]) for k, v in values.items())
    del optimizer.state[params[1]]["step"]
    give_gradients(params)
    with pytest.raises(ValueError, match=f"state of {name} has .* but no 'step'"):
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 5, "nothing was written"


def test_momentum_that_somebody_puts_there_has_begun():
    """torch's SGD does not count: dampening leaves out the first step only."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    a, b = deepfast.SGD([p], **options), torch.optim.SGD([q], **options)
    for optimizer, t in ((a, p), (b, q)):
        optimizer.state[t]["momentum_buffer"] = torch.full((3,), 2.0)
        t.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", DROPINS)
@pytest.mark.parametrize("own", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize(
    "saved", [{}, {"fused": True}, {"foreach": True}, {"fused": False}, {"foreach": True, "-": "fused"}]
)
def test_flags_of_old_checkpoints(name, own, saved):
    """How a step is done is not a checkpoint's to say; and what torch loads, loads."""
    state = trained(PEERS[name], parameters(), lr=0.1).state_dict()
    group = state["param_groups"][0]
    group.update({k: v for k, v in saved.items() if k != "-"})
    group.pop(saved.get("-"), None)
    params = parameters()
    optimizer = OURS[name](params, **own)
    before = {k: optimizer.param_groups[0][k] for k in ("fused", "foreach")}
    optimizer.load_state_dict(copy.deepcopy(state))
    PEERS[name](parameters(), **own).load_state_dict(copy.deepcopy(state))
    assert {k: optimizer.param_groups[0][k] for k in ("fused", "foreach")} == before
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("how", ["asked for", "loaded"])
def test_fused_false_steps_as_fast_as_any(how):
    params = parameters()
    optimizer = deepfast.AdamW(params, fused=False if how == "asked for" else None)
    if how == "loaded":
        optimizer.load_state_dict(trained(torch.optim.AdamW, parameters(), fused=False).state_dict())
    give_gradients(params)
    optimizer.step()
    assert all(launch.backend is not reference for launch in optimizer._launches)
    slow = deepfast.AdamW(parameters(), backend="reference")
    give_gradients(slow.param_groups[0]["params"])
    slow.step()
    assert all(launch.backend is reference for launch in slow._launches)


class Allocated(TorchDispatchMode):
    """The bytes of all tensors that are made within. (Not of the state's, whose memory is not the operators'.)"""

    def __init__(self):
        super().__init__()
        self.total, self.storages = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and "set_" not in str(func):
            known = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            storage = result.untyped_storage()
            if result.device.type == "cpu" and storage.data_ptr() not in known:
                self.total += storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fresh", [False, True])
def test_loading_makes_no_tensor_but_the_state(dtype, fresh):
    params = [nn.Parameter(torch.ones(100_000, dtype=dtype)) for _ in range(4)]
    saved = copy.deepcopy(trained(deepfast.AdamW, params).state_dict(compact=True))
    optimizer = deepfast.AdamW(params)
    if not fresh:
        optimizer.init_state()
    with Allocated() as seen:
        optimizer.load_state_dict(saved)
        counted = seen.total
        torch.zeros(100_000)
    assert counted < 200_000
    assert seen.total - counted == 400_000
    assert all(
        torch.equal(v, saved["state"][i][k]) for i, p in enumerate(params) for k, v in optimizer.state[p].items()
    )


def test_groups_of_another_size_give_torchs_error():
    def message(cls):
        a, b = cls(parameters()[:3]), trained(cls, parameters()[:2])
        with pytest.raises(ValueError, match="group") as caught:
            a.load_state_dict(b.state_dict())
        return str(caught.value)

    assert message(deepfast.AdamW) == message(torch.optim.AdamW)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_may_make_of_a_state_dict_what_they_like(name):
    params = parameters()
    optimizer = trained(OURS[name], params, **TYPICAL[name])
    seen = []

    def wrap(_, state_dict):
        seen.extend(type(values) for values in state_dict["state"].values())
        return {"format": 2, "optimizer": state_dict}

    hook = optimizer.register_state_dict_post_hook(wrap)
    wrapped = optimizer.state_dict()
    assert wrapped.keys() == {"format", "optimizer"}
    assert set(seen) == {dict}
    hook.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["optimizer"])
    optimizer.load_state_dict(wrapped)
    assert "optimizer" not in optimizer.state_dict()
