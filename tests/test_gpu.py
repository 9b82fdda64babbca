"""On a GPU: the same bits as on a CPU, graphs, streams, and a host that never waits. Run by ``make gpu``.

Everything is compared with the CPU kernels, which the rest of the tests compare with everything else.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from cases import EVERY, NAMES, OURS, TYPICAL, VARIANTS, difference
from checks import failures, heard_of_pair
from peers_ranks import CHECKS as PEERS
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import deepfast
from deepfast import ops

pytestmark = pytest.mark.gpu
BACKENDS = ["cuda", "triton"]
PLAYED = os.environ.get("DEEPFAST_PLAYED")  # no GPU: a rehearsal, on the CPU (tools/gpu_played.py)
SHAPES = [(64, 33), (5,), (), (0, 3), (3000, 7), (1, 4097), (1 << (14 if PLAYED else 20),)]


@pytest.fixture(autouse=True, params=range(torch.cuda.device_count() or 1))
def device(request):
    """Each GPU in turn, while the first one is the current one."""
    return torch.device("cpu") if PLAYED else torch.device("cuda", request.param)


def parameters(dtype, device, shapes=SHAPES, seed=0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same on a CPU and on the device."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.to(device, copy=True)) for v in values]


def give_gradients(here: list[nn.Parameter], there: list[nn.Parameter], seed=0, scale=1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p, q in zip(here, there, strict=True):
        grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)
        p.grad, q.grad = grad, grad.to(q.device, copy=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().cpu(), b.detach().cpu())


def assert_same(mine: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for group, others in zip(mine.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], others["params"], strict=True):
            assert same(p, q)
            assert p.grad is None or same(p.grad, q.grad)
            for key, value in mine.state.get(p, {}).items():
                assert same(value, other.state[q][key]), key


def test_this_gpu_runs_compiled_kernels(device):
    found = ops.cuda()
    assert not isinstance(found, str), found
    assert ops.select("auto", device, torch.float32) is found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_whole_steps_give_the_same_bits_as_on_a_cpu(name, variant, dtype, backend, device):
    here, there = parameters(dtype, device)
    options = {**VARIANTS[name][variant], "max_grad_norm": 1.0, "reset_grad": True}
    cpu, gpu = OURS[name](here, backend="cpu", **options), OURS[name](there, backend=backend, **options)
    for step in range(3):
        give_gradients(here, there, step, 10.0 ** (step - 1))
        cpu.step()
        gpu.step()
        assert same(cpu.grad_norm, gpu.grad_norm)
    assert_same(cpu, gpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_tensors_of_every_kind(name, backend, device):
    """The table overflows a launch's parameters; sizes, types and alignments are mixed."""
    g = torch.Generator().manual_seed(0)
    here, there = [], []
    for i in range(60 if PLAYED else 1500):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        values = torch.randn(int(torch.randint(0, 300, (), generator=g)) + 8, generator=g).to(dtype)
        here.append(nn.Parameter(values.clone()[i % 8 :]))
        there.append(nn.Parameter(values.to(device, copy=True)[i % 8 :]))
    cpu, gpu = OURS[name](here, **TYPICAL[name]), OURS[name](there, backend=backend, **TYPICAL[name])
    for step in range(3):
        give_gradients(here, there, step)
        cpu.step()
        gpu.step()
    assert_same(cpu, gpu)


@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend, form, device):
    here, there = parameters(torch.float32, device, [(6, 5, 4, 3), (33, 17)])
    for params in (here, there):
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    cpu = deepfast.AdamW(here, reset_grad=True, state_dtype=form)
    gpu = deepfast.AdamW(there, reset_grad=True, state_dtype=form, backend=backend)
    for step in range(2):
        give_gradients(here, there, step)
        for params in (here, there):
            params[1].grad = params[1].grad.t().contiguous().t()
        cpu.step()
        gpu.step()
    assert_same(cpu, gpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling(overflow, backend, device):
    here, there = parameters(torch.float16, device)
    made = []
    for params, chosen in ((here, "cpu"), (there, backend)):
        optimizer = deepfast.AdamW(params, max_grad_norm=0.5, reset_grad=True, backend=chosen)
        made.append((optimizer, deepfast.LossScaler(init_scale=256.0, growth_interval=2)))
    for step in range(4):
        give_gradients(here, there, step)
        if overflow and step == 1:
            here[0].grad[3] = there[0].grad[3] = torch.inf
        for (optimizer, scaler), params in zip(made, (here, there), strict=True):
            scaler.scale(torch.ones((), device=params[0].device))
            scaler.step(optimizer)
            scaler.update()
    assert made[0][1].state_dict() == made[1][1].state_dict()
    assert made[1][1].skipped_steps == overflow
    assert_same(made[0][0], made[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_current_stream_is_used(backend, device):
    """Gradients that are still being computed on a side stream are waited for, by that stream alone."""
    here, there = parameters(torch.float32, device)
    cpu, gpu = deepfast.AdamW(here), deepfast.AdamW(there, backend=backend)
    give_gradients(here, there)
    late = [q.grad for q in there]
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        for q, grad in zip(there, late, strict=True):
            q.grad = torch.full_like(grad, torch.nan)
        torch.cuda._sleep(50_000_000)
        for q, grad in zip(there, late, strict=True):
            q.grad.copy_(grad)
        gpu.step()
    torch.cuda.synchronize(device)
    cpu.step()
    assert_same(cpu, gpu)


def graph_on(device, graph: torch.cuda.CUDAGraph):
    """torch's own capture stream lies on whichever GPU came first."""
    return torch.cuda.graph(graph, stream=torch.cuda.Stream(device))


def capture(optimizer, scaler, device) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with graph_on(device, graph):
        scaler.step(optimizer)
        scaler.update()
    return graph


@pytest.mark.parametrize("count", [7, 600])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "form"), [*((name, "fp32") for name in NAMES), ("Adam", "int8"), ("LAMB", "int8")])
def test_a_graph_of_the_whole_step_skips_where_it_has_to(name, form, backend, count, device):
    options = {**TYPICAL[name], "state_dtype": form}
    shapes = SHAPES if count == len(SHAPES) else [(37,)] * count
    here, there = parameters(torch.float16, device, shapes)
    with torch.cuda.device(device):
        rates = torch.tensor([0.1, 0.1, 0.05, 0.05, 0.02, 0.02]).tolist()  # what fp32 holds of them
        lr = torch.tensor(rates[0], device=device)
        cpu = OURS[name](here, lr=rates[0], max_grad_norm=1.0, **options)
        gpu = OURS[name](there, lr=lr, max_grad_norm=1.0, backend=backend, **options)
        scalers = [deepfast.LossScaler(d, init_scale=128.0, growth_interval=2) for d in ("cpu", device)]
        give_gradients(here, there)
        for optimizer, scaler in zip((cpu, gpu), scalers, strict=True):  # warm-up: state, workspaces, compilation
            scaler.step(optimizer)
            scaler.update()
        static = [q.grad for q in there]
        graph = capture(gpu, scalers[1], device)
        for step, rate in enumerate(rates):
            give_gradients(here, there, step)
            if step in (1, 4):
                here[0].grad[0] = there[0].grad[0] = torch.inf
            for q, grad in zip(there, static, strict=True):
                q.grad = grad.copy_(q.grad)
            cpu.param_groups[0]["lr"] = rate
            lr.fill_(rate)
            scalers[0].step(cpu)
            scalers[0].update()
            graph.replay()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert scalers[1].skipped_steps == 2
        assert_same(cpu, gpu)
        assert same(cpu.grad_norm, gpu.grad_norm)


def test_a_graph_stays_right_when_the_optimizer_goes_on_without_it(device):
    """What the plan keeps between steps is not the graph's."""
    with torch.cuda.device(device):
        _, there = parameters(torch.float32, device, [(40,)] * 600)
        optimizer = deepfast.SGD(there, lr=torch.tensor(1.0, device=device), backend="cuda")
        for q in there:
            q.grad = torch.ones_like(q)
        static = [q.grad for q in there]
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with graph_on(device, graph):
            optimizer.step()
        for q in there:
            q.grad = torch.full_like(q, 3.0)
        optimizer.step()
        before = [q.detach().clone() for q in there]
        graph.replay()
        assert all((q == b - g).all() for q, b, g in zip(there, before, static, strict=True))


def test_capturing_a_float_learning_rate_is_an_error(device):
    with torch.cuda.device(device):
        p = nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.ones_like(p)
        optimizer = deepfast.AdamW([p], lr=0.5)
        optimizer.init_state()
        wanted = r"lr=torch.tensor\(0.5, device='cuda'\)"
        with pytest.raises(RuntimeError, match=wanted), graph_on(device, torch.cuda.CUDAGraph()):
            optimizer.step()
        torch.cuda.synchronize()
        fresh = deepfast.AdamW([p], lr=torch.tensor(0.5, device=device))
        with pytest.raises(RuntimeError, match="step once"), graph_on(device, torch.cuda.CUDAGraph()):
            fresh.step()
        torch.cuda.synchronize()


@pytest.fixture
def full_step(device):
    """A full fp16 step, warmed up; call it to do one."""
    _, there = parameters(torch.float16, device, [(1000, 70)] * 20)
    optimizer = deepfast.AdamW(there, max_grad_norm=1.0, reset_grad=True, backend="cuda")
    scaler = deepfast.LossScaler(device)
    for q in there:
        q.grad = torch.ones_like(q)

    def run() -> None:
        scaler.step(optimizer)

    for _ in range(3):
        run()
        scaler.update()
    torch.cuda.synchronize(device)
    return run, scaler


def watched(run) -> tuple[list[str], int]:
    """What the device did (kernels, copies), and how often the host waited for it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
    events = recorded.events()
    # The ranges that torch names (the optimizer's step) are shown on the device as well.
    on_device = [e.name for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return on_device, sum("Synchronize" in event.name for event in events)


def test_a_full_step_is_two_launches_and_no_wait(full_step):
    run, scaler = full_step
    watched(lambda: None)  # the first one is told more
    _, own_waits = watched(lambda: None)  # the profiler itself waits at its end
    done, waits = watched(run)
    assert len(done) == 2, done
    assert "statistics_kernel" in done[0]
    assert "step_kernel" in done[1]
    assert waits == own_waits
    scaler.update()


def test_nothing_waits_for_the_device(full_step):
    run, scaler = full_step
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        scaler.update()
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_not_leaked(full_step, device):
    run, scaler = full_step
    seen = []
    for _ in range(20):
        run()
        scaler.update()
        seen.append(torch.cuda.memory_allocated(device))
    assert all(b == a for a, b in pairwise(seen[2:]))


def test_torchs_grad_scaler(device):
    here, there = parameters(torch.float32, device)
    made = []
    for params in (here, there):
        scaler = torch.amp.GradScaler(params[0].device.type, init_scale=64.0)
        scaler.scale(torch.ones((), device=params[0].device))
        made.append((deepfast.AdamW(params), scaler))
    for step in range(3):
        give_gradients(here, there, step)
        if step == 1:
            here[0].grad[0] = there[0].grad[0] = torch.nan
        for optimizer, scaler in made:
            scaler.step(optimizer)
            scaler.update()
    assert difference(here, [q.cpu() for q in there]) == 0.0


def test_states_travel_between_devices(device):
    here, there = parameters(torch.float16, device)
    cpu, gpu = deepfast.AdamW(here), deepfast.AdamW(there)
    give_gradients(here, there)
    cpu.step()
    gpu.load_state_dict(cpu.state_dict())
    with torch.no_grad():
        for p, q in zip(here, there, strict=True):
            q.copy_(p)
    give_gradients(here, there, 1)
    cpu.step()
    gpu.step()
    assert_same(cpu, gpu)


def test_the_engine_trains_in_half_precision(device):
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 1))
    config = {"train_batch_size": 16, "fp16": {"enabled": True, "initial_scale_power": 8}, "gradient_clipping": 1.0,
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}  # fmt: skip
    engine, *_ = deepfast.initialize(model=model, config=config)
    x = torch.randn(16, 32, device=engine.device)
    losses = []
    for _ in range(60):
        loss = (engine(x).float().squeeze(-1) - x.sum(-1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_collectives_between_two_processes(backend, tmp_path):
    """Both on the first GPU: sums, a graph's replays, and the death of one of them."""
    where = ("cuda", f"{PLAYED}/backend/on_host.so") if PLAYED else ("gpu", backend)
    said = heard_of_pair(tmp_path, "peers_ranks.py", *where)
    assert [failures(said, check) for check in PEERS if failures(said, check)] == []
