"""An optimizer's state: where it lies, for whom it is made, and that looking at it takes no time."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import BACKENDS, NAMES, OURS, TYPICAL, give_gradients, parameters
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepfast
from deepfast.engine.sums import GradientSums
from deepfast.optim import memory

BLOCK = 16 << 10


def stepped(params, name="AdamW", **options):
    optimizer = OURS[name](params, **options)
    give_gradients(params)
    optimizer.step()
    return optimizer


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


# Where it lies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_state_tensor_drags_no_other_along(dtype):
    params = parameters(dtype, shapes=[(50_000,), (3, 3), (600, 1000), (0,), (4096,)] * 8)
    optimizer = stepped(params)
    for p in params:
        for value in optimizer.state[p].values():
            kept = value.untyped_storage().nbytes()
            assert kept <= max(BLOCK, value.nbytes)
            assert len(pickle.dumps(value)) < kept + 2000
            assert saved(value) < kept + 4000
            assert copy.deepcopy(value).untyped_storage().nbytes() <= kept


def test_states_that_are_dropped_are_freed():
    params = parameters(shapes=[(50_000,)] * 40)
    optimizer = stepped(params)
    storages = [
        v.untyped_storage()._weak_ref() for p in params[1:] for k, v in optimizer.state[p].items() if k != "step"
    ]
    for p in params[1:]:
        del optimizer.state[p]
    gc.collect()
    assert len(storages) == 78
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)


@pytest.mark.parametrize("shapes", [[], [(0,)], [(), (0,), ()], [(4096,), (4097,), (1,), (5000,), (2,)], [(8,)] * 1000,
                                    [(1 << 20,), (3,), (1 << 19,)]])  # fmt: skip
def test_zeroed_tensors_share_only_blocks(shapes):
    models = [torch.ones(shape) for shape in shapes]
    made = memory.zeros_like_each(models, torch.float32, torch.device("cpu"))
    assert [t.shape for t in made] == [t.shape for t in models]
    for i, t in enumerate(made):
        assert not t.any()
        assert t.data_ptr() % 64 == 0 or not t.numel()
        t.fill_(i + 1)
    assert all((t == i + 1).all() for i, t in enumerate(made)), "none lies in another"
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made if t.numel()}
    sizes = [t.nbytes for t in made]
    assert all(size <= BLOCK or any(0 <= size - own < 64 for own in sizes) for size in storages.values())
    assert len(storages) <= sum(size > BLOCK for size in sizes) + sum(max(s, 64) for s in sizes) // (BLOCK // 2) + 1


def test_a_tensor_takes_no_more_memory_than_its_size():
    """One that fills a huge page and a bit does not touch two."""
    from conftest import python

    code = """
import pathlib, torch
from deepfast.optim import memory
from deepfast.engine.sums import GradientSums
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
def make():
    like = [torch.empty((2 << 20) // 4 + 1000, device="meta")] * 20
    made = memory.zeros_like_each(like, torch.float32, torch.device("cpu"))
    for t in made: t.fill_(1.0)
    return made
make()
before = resident()
made = make()
print((resident() - before) / sum(t.nbytes for t in made))
"""
    assert float(python(code).stdout) < 1.2


def test_a_parameter_in_another_memory_format_takes_its_state_along():
    """Laid anew once, not copied in and out at each step."""
    net, twin = (nn.Conv2d(64, 64, 3) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    a, b = deepfast.AdamW(net.parameters(), lr=0.1), deepfast.AdamW(twin.parameters(), lr=0.1)
    for i in range(4):
        give_gradients(list(net.parameters()), list(twin.parameters()), seed=i)
        if i == 2:
            net.to(memory_format=torch.channels_last)
            net.weight.grad = net.weight.grad.to(memory_format=torch.channels_last)
        a.step(), b.step()
    assert a.state[net.weight]["exp_avg"].stride() == net.weight.stride() != twin.weight.stride()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[net.weight][key], b.state[twin.weight][key])
    assert torch.equal(net.weight, twin.weight)


def test_state_that_somebody_else_sees_too_stays_where_it_is():
    net = nn.Conv2d(64, 64, 3)
    optimizer = deepfast.Adagrad(net.parameters(), lr=0.1)
    optimizer.share_memory()
    flat = torch.zeros(2 * net.weight.numel())
    other = deepfast.Adagrad([nn.Parameter(net.weight.detach().clone())])
    (p,) = other.param_groups[0]["params"]
    other.state[p]["sum"] = flat[: p.numel()].view_as(p)
    net.to(memory_format=torch.channels_last)
    p.data = p.data.to(memory_format=torch.channels_last)
    for q in (p, net.weight):
        q.grad = torch.ones_like(q)
    optimizer.step(), other.step()
    assert optimizer.state[net.weight]["sum"].is_shared()
    assert (flat[: p.numel()] == 1).all()


# For whom it is made.


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Adagrad"])
def test_frozen_parameters_get_no_state_beforehand(name):
    frozen = [
        nn.Parameter(torch.zeros(8, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.int8, torch.float32, torch.float16)
    ]
    trained = parameters(torch.float16)
    optimizer = OURS[name](frozen + trained, **TYPICAL[name])
    optimizer.init_state()
    assert optimizer.state.keys() == set(trained)
    frozen[3].requires_grad_().grad = torch.ones(8, dtype=torch.float16)
    optimizer.step()
    assert frozen[3].any(), "it gets it with its first gradient"


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_counts_have_torchs_type(default, dtype):
    """fp64 under a default of fp64; where a kernel reads them fp32, as in torch's fused optimizers."""
    made = []
    torch.set_default_dtype(default)
    try:
        for cls, fused in ((deepfast.AdamW, None), (torch.optim.AdamW, dtype == torch.float32)):
            p = nn.Parameter(torch.ones(4, dtype=dtype))
            optimizer = cls([p], lr=0.1, fused=fused)
            for _ in range(2):
                p.grad = torch.ones(4, dtype=dtype)
                optimizer.step()
            made.append((optimizer.state[p]["step"], p))
    finally:
        torch.set_default_dtype(torch.float32)
    (step, p), (expected, q) = made
    assert step.dtype == expected.dtype
    assert step == 2
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["swapped", "put into the group"])
def test_parameters_without_memory_and_then_with(name, how):
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    optimizer = OURS[name](net.parameters(), lr=0.1, fused=True, **TYPICAL[name])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of support"
    ):
        optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(how == "swapped")
    try:
        net.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if how != "swapped":
        optimizer.param_groups[0]["params"] = list(net.parameters())
    for p in net.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_memory_are_taken(name):
    """To see how much a training would need."""
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = OURS[name]([p], max_grad_norm=1.0, **TYPICAL[name])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(v.is_meta for v in optimizer.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "reset_grad": True}])
@pytest.mark.parametrize("name", NAMES)
def test_fake_steps_leave_real_ones_alone(name, options, dtype):
    def train(*sizes):
        params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
        optimizer = OURS[name](params, lr=0.1, **options, **TYPICAL[name])
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return optimizer, params

    deepfast.optim.decide._RECORDS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with FakeTensorMode():
                for shapes in (((700, 1000), (3,)), ((5000,),), ((3,),)):
                    optimizer, params = train(*shapes)
                    assert all(type(v) is not torch.Tensor for p in params for v in optimizer.state[p].values())
            _, params = train((4,), (3,))
            assert all((p < 1).all() for p in params)


# Looking at it.


def plans(optimizer, monkeypatch):
    made = []
    plan = optimizer._plan
    monkeypatch.setattr(optimizer, "_plan", lambda: (made.append(1), plan()))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "odd",
    ["nothing", "frozen uint8", "frozen fp64", "frozen complex", "trained fp64", "trained complex",
     "a key of one's own", "a plain dict", "all plain dicts", "another optimizer's writes", "a copy's writes"],
)  # fmt: skip
def test_one_odd_thing_makes_no_plan_at_each_step(odd, backend, monkeypatch):
    params = parameters()
    kind, _, dtype = odd.partition(" ")
    if kind in ("frozen", "trained"):
        dtype = {"uint8": torch.uint8, "fp64": torch.float64, "complex": torch.complex64}[dtype]
        params.append(nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=kind == "trained"))
    twin = copy.deepcopy(params)
    optimizer, torchs = (cls(ps, lr=0.1) for cls, ps in ((deepfast.AdamW, params), (torch.optim.AdamW, twin)))
    optimizer.backend = backend
    other = deepfast.SGD([nn.Parameter(torch.ones(1))])

    def steps(count):
        for i in range(count):
            for p, q in zip(params, twin, strict=True):
                p.grad = q.grad = (
                    torch.sin(torch.arange(p.numel()) + i).reshape(p.shape).to(p) if p.requires_grad else None
                )
            other.state["mine"] = i
            optimizer.step(), torchs.step()
        for p, q in zip(params, twin, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    steps(1)
    if odd == "a key of one's own":
        optimizer.state["mine"] = 3
    elif odd == "a plain dict":
        optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    elif odd == "all plain dicts":
        optimizer.state = {p: dict(state) for p, state in optimizer.state.items()}
    elif odd == "a copy's writes":
        other = copy.deepcopy(optimizer)
    steps(1)
    made = plans(optimizer, monkeypatch)
    steps(4)
    assert not made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["its dict", "the whole state", "another optimizer's"])
def test_writes_into_dictionaries_that_nobody_watches_are_seen(where, backend):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a, b = deepfast.AdamW([p], lr=0.1, backend=backend), torch.optim.AdamW([q], lr=0.1)

    def both():
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        a.step(), b.step()
        torch.testing.assert_close(p, q)

    both()
    if where == "another optimizer's":
        other = deepfast.AdamW([p])
        other.state[p].update(a.state[p])
        a.state[p] = other.state[p]
    elif where == "its dict":
        a.state[p] = dict(a.state[p])
    else:
        a.state = {p: dict(a.state[p])}
    both(), both()
    for value in (5.0, 0.0):
        a.state[p]["exp_avg"] = torch.full((3,), value)
        b.state[q]["exp_avg"] = torch.full((3,), value)
        both(), both()
    a.state[p]["step"], b.state[q]["step"] = 50, torch.tensor(50.0)
    both(), both()
    a.state[p], b.state[q] = {}, {}
    both(), both()
    if where == "the whole state":
        del a.state[p], b.state[q]
        a.state[p] = {}
        both(), both()


def test_states_are_copied_as_ordinary_dictionaries():
    optimizer = stepped(parameters())
    for clone in (copy.copy(optimizer.state), optimizer.state.copy()):
        assert type(clone[object()]) is dict
    entry = next(iter(optimizer.state.values()))
    assert type(copy.deepcopy(entry)) is type(pickle.loads(pickle.dumps(entry))) is dict  # noqa: S301


def test_a_gradient_that_no_kernel_takes_is_not_remembered():
    """The reference steps while it comes; the kernels again afterwards."""
    p = nn.Parameter(torch.ones(3))
    p.grad_dtype = None
    optimizer = deepfast.AdamW([p], lr=0.1)
    for dtype, kept in ((torch.float64, False), (torch.float32, True), (torch.float64, False), (torch.float32, True)):
        for _ in range(2):
            p.grad = torch.ones(3, dtype=dtype)
            optimizer.step()
        assert (optimizer._planned is not None) == kept


def in_page(*streams: torch.Tensor) -> list[int]:
    return [t.data_ptr() % 4096 for t in streams]


def apart(streams: list[torch.Tensor]) -> bool:
    """Whether no two begin at (nearly) the same place in a page, and so never meet in a cache's sets."""
    return all(64 <= (a - b) % 4096 <= 4032 for a, b in itertools.combinations(in_page(*streams), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("numel", "begins"), [(5000, 0), (5000, 4032), (600_001, 64), (600_001, 1088), (5 << 20, 0)])
@pytest.mark.parametrize("name", TYPICAL)
def test_no_two_streams_of_a_step_begin_at_the_same_place_in_a_page(name, numel, begins, dtype):
    """Else all of them fall into the same sets of the caches, and loads wait for stores: a step takes up to 1.4 times
    as long. Wherever the parameter is, and its gradient: at the same place, as torch's allocator has it.
    """
    p = nn.Parameter(memory.zeros(numel, dtype, torch.device("cpu"), begins))
    p.grad = memory.zeros(numel, dtype, torch.device("cpu"), begins).fill_(1e-3)
    optimizer = OURS[name]([p], **TYPICAL[name])
    optimizer.step()
    own = [v for v in optimizer.state[p].values() if v.numel() == numel]
    assert in_page(p, p.grad) == [begins, begins]
    assert apart([p, *own])
    assert all(v.data_ptr() % 64 == 0 for v in own)
    assert all(0 <= v.untyped_storage().nbytes() - v.nbytes < 64 for v in own)


def test_states_begin_apart_from_a_gradient_that_lies_elsewhere():
    p = nn.Parameter(memory.zeros(1 << 20, torch.float32, torch.device("cpu"), 64))
    p.grad = memory.zeros(1 << 20, torch.float32, torch.device("cpu"), 64 + 1088)
    optimizer = deepfast.AdamW([p], amsgrad=True)
    optimizer.step()
    assert apart([p, p.grad, *(v for k, v in optimizer.state[p].items() if k != "step")])


@pytest.mark.parametrize("shapes", [[(0,)], [(5000,), (0,)], [(0,), (5000,), (0, 3)]])
def test_parameters_without_elements_have_state(shapes):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = stepped(params)
    assert [optimizer.state[p]["exp_avg"].shape for p in params] == [p.shape for p in params]


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_gradients_begin_apart_from_parameters(shared, one_rank):
    """At the same place on every rank, wherever its parameters are."""
    layouts = []
    for begins in (0, 64, 192):
        sizes = (300_000, 70_000, 100, 1_000_000)
        params = [nn.Parameter(memory.zeros(n, torch.float32, torch.device("cpu"), begins)) for n in sizes]
        with deepfast.comm.Communicator() as comm:
            sums = GradientSums(params, comm if shared else None)
            assert all(apart([p, s]) for p, s in zip(params, sums.sums, strict=True) if p.numel() > 1 << 16)
            assert not sums.flat.any()
            layouts.append([s.storage_offset() - sums.flat.storage_offset() for s in sums.sums])
            del sums
    assert layouts[0] == layouts[1] == layouts[2]
