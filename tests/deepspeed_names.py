"""Run by test_deepspeed_names.py as one process, in which ``deepspeed`` is deepfast's."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import deepspeed_training
import pytest
import torch
from checks import run_checks
from engines import batches, engine, equal, state, train
from torch import nn


def refused(statement: str) -> Exception:
    with pytest.raises((AttributeError, ImportError)) as caught:
        exec(statement, {})  # noqa: S102
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)
    return caught.value


def check_it_is_one_module_by_two_names():
    import deepspeed

    import deepfast.deepspeed

    assert deepspeed is deepfast.deepspeed
    assert deepspeed.DeepSpeedEngine is deepfast.Engine
    assert deepspeed.initialize is deepfast.initialize
    assert deepspeed.__version__.startswith("0.19.8+deepfast")
    assert importlib.import_module("deepfast.deepspeed.ops.adam") is deepspeed.ops.adam
    for name in ("deepspeed", "deepspeed.ops", "deepspeed.runtime.zero.partition_parameters"):
        assert importlib.util.find_spec(name) is not None


def check_every_name_of_the_table_is_there():
    from deepfast.deepspeed import surface
    from deepfast.deepspeed.names import NAMES

    for path in NAMES:
        module = importlib.import_module(path)
        for name, _, _ in surface._entries(path):
            assert getattr(module, name) is not None, f"{path}.{name}"
            assert name in dir(module)


def check_a_name_that_is_not_there_says_what_to_do():
    import deepspeed

    assert isinstance(refused("import deepspeed; deepspeed.init_inference"), AttributeError)
    assert "engine.module" in str(refused("import deepspeed; deepspeed.init_inference"))
    for statement in (
        "from deepspeed import PipelineModule",
        "from deepfast.deepspeed import PipelineModule",
        "import deepspeed.pipe",
        "import deepspeed.runtime.pipe.topology",
    ):
        error = refused(statement)
        assert isinstance(error, ModuleNotFoundError)
        assert "not cut into stages" in str(error)
    assert "deepspeed.moe.layer: there is no mixture" in str(refused("from deepspeed.moe.layer import MoE"))
    assert "deepspeed.utils.nothing" in str(refused("from deepspeed.utils import nothing"))
    assert not hasattr(deepspeed, "nothing")
    refused("import deepspeed.optimizers")  # a file of this package's own, which would be loaded twice
    importlib.import_module("deepfast.deepspeed.optimizers")


def check_one_process_is_a_group_of_one():
    from deepspeed import comm

    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    assert not comm.is_initialized()
    comm.destroy_process_group()
    t = torch.arange(4.0)
    comm.all_reduce(t, op=comm.ReduceOp.SUM, prof=True, log_name="mine")  # DeepSpeed's own arguments
    comm.broadcast(t, src=0)
    comm.barrier()
    comm.monitored_barrier()
    assert comm.is_initialized()
    work = comm.all_reduce(t, async_op=True)
    work.wait()
    assert torch.equal(t, torch.arange(4.0))
    for gather in (comm.all_gather_into_tensor, comm.reduce_scatter_tensor, comm.all_to_all_single):
        out = torch.empty(4)
        gather(out, t)
        assert torch.equal(out, t)
    out = [torch.empty(4)]
    comm.all_gather(out, t)
    assert torch.equal(out[0], t)
    objects = ["mine"]
    comm.broadcast_object_list(objects, src=0)
    assert objects == ["mine"]
    assert comm.get_world_size(comm.new_group([0])) == 1
    assert comm.get_all_ranks_from_group() == [0]
    comm.destroy_process_group()
    assert not comm.is_initialized()
    import deepspeed

    assert deepspeed.init_distributed(dist_backend="nccl", timeout=None) is None
    assert torch.distributed.get_rank() == 0  # what scripts ask directly


def check_a_group_of_one_trains_and_saves_as_no_group(tmp):
    import deepspeed

    deepspeed.comm.destroy_process_group()
    without = engine()
    train(without, batches(8))
    deepspeed.init_distributed()
    within = engine()
    train(within, batches(8))
    assert equal(state(within), state(without))
    within.save_checkpoint(tmp / "group")
    without.load_checkpoint(tmp / "group")


def check_groups_of_ranks():
    from deepspeed.utils import groups

    assert groups._get_data_parallel_world_size() == groups.get_model_parallel_world_size() == 1
    assert groups._get_data_parallel_rank() == groups.get_tensor_model_parallel_rank() == 0
    assert torch.distributed.get_world_size(groups._get_data_parallel_group()) == 1


def check_the_accelerator():
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    a = get_accelerator()
    assert deepspeed.get_accelerator() is a
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert a.device_name() == kind
    assert torch.ones(1, device=a.current_device_name()).device.type == kind
    assert a.on_accelerator(torch.ones(1, device=kind))
    assert (a.is_available(), a.is_bf16_supported(), a.is_fp16_supported()) == (True, True, True)
    assert a.device_count() >= 1
    assert a.communication_backend_name() == ("nccl" if kind == "cuda" else "gloo")
    a.set_device(a.current_device())
    a.synchronize(), a.empty_cache(), a.reset_peak_memory_stats(), a.range_push("a"), a.range_pop()
    with a.stream(a.Stream()), a.device(0):
        pass
    a.manual_seed(3), a.manual_seed_all(3)
    before = a.get_rng_state()
    first = torch.rand(2, device=kind)
    a.set_rng_state(before)
    assert torch.equal(torch.rand(2, device=kind), first)
    assert a.total_memory() >= a.available_memory() > 0
    held = torch.ones(1 << 24, device=kind)
    assert a.memory_allocated() >= held.nbytes
    now = a.memory_allocated()
    assert a.max_memory_allocated() >= now
    assert a.pin_memory(torch.ones(2)).sum() == 2
    with pytest.raises(AttributeError, match="accelerator has no create_op_builder"):
        a.create_op_builder("x")


def check_activations_are_computed_again():
    from deepspeed import checkpointing

    assert not checkpointing.is_configured()
    net, calls = nn.Linear(3, 3), []
    x = torch.randn(2, 3, requires_grad=True)

    def layer(x, *, twice):
        calls.append(1)
        return net(x).tanh() * twice

    layer(x, twice=2.0).sum().backward()
    expected = (net.weight.grad.clone(), x.grad.clone())
    net.weight.grad = x.grad = None
    calls.clear()
    checkpointing.checkpoint(layer, x, twice=2.0).sum().backward()
    assert len(calls) == 2, "once more in backward"
    assert equal((net.weight.grad, x.grad), expected)
    checkpointing.configure(None, partition_activations=False)
    assert checkpointing.is_configured()


def check_named_random_states():
    from deepspeed import checkpointing

    checkpointing.model_parallel_cuda_manual_seed(5)
    states = checkpointing.get_cuda_rng_tracker()
    plain = [torch.rand(1).item() for _ in range(4)]
    checkpointing.model_parallel_cuda_manual_seed(5)
    mixed = []
    for _ in range(2):
        mixed.append(torch.rand(1).item())
        with states.fork():
            mixed.append(torch.rand(1).item())
    assert mixed[::2] == plain[:2], "a fork leaves the others alone"
    g = torch.Generator().manual_seed(5 + 2718)
    assert mixed[1::2] == [torch.rand(1, generator=g).item() for _ in range(2)], "and goes on where it was"
    with pytest.raises(ValueError, match="already"):
        states.add("model-parallel-rng", 1)


def check_zero_without_stage_3():
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path={}, dtype=torch.float16), deepspeed.zero.Init(enabled=False):
        net = nn.Linear(2, 2)
    with deepspeed.zero.GatheredParameters(net.parameters(), modifier_rank=0):
        net.weight.data.fill_(3.0)
    assert (net.weight == 3.0).all()
    with pytest.raises(KeyError), deepspeed.zero.GatheredParameters(net.weight):
        raise KeyError
    deepspeed.zero.register_external_parameter(net, net.weight)
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    assert not hasattr(net.weight, "ds_status")
    assert ZeroParamStatus.NOT_AVAILABLE is deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE


def check_there_are_no_experts():
    from deepspeed.moe import utils as moe

    net = nn.Linear(2, 2)
    assert moe.has_moe_layers(net) == (False, 0)
    assert not moe.is_moe_param(net.weight)
    group = {"params": [net.weight], "name": "all"}
    assert moe.split_params_into_different_moe_groups_for_optimizer(group) == [group]
    assert moe.split_params_into_different_moe_groups_for_optimizer((group, group)) == [group, group]
    assert moe.split_params_into_shared_and_expert_params([net.weight]) == ([net.weight], [])


def check_leaves_and_attributes():
    from deepspeed import utils

    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    assert utils.set_z3_leaf_modules(net, [nn.Linear]) == utils.set_z3_leaf_modules(net, ["Linear"]) == [net[0]]
    with pytest.raises(ValueError, match="no module"):
        utils.set_z3_leaf_modules(net, [nn.Conv2d])
    assert utils.set_z3_leaf_modules(net, [nn.Conv2d], raise_if_not_found=False) == []
    assert utils.recursive_getattr(net, "1.0") is net[1][0]
    utils.recursive_setattr(net, "1.0", nn.ReLU())
    utils.recursive_setattr(net, "mark", 1)
    assert isinstance(net[1][0], nn.ReLU)
    assert net.mark == 1


def check_a_loader_without_an_end():
    from deepspeed.utils import RepeatingLoader

    loader = RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert next(iter(loader)) == 2


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def check_the_logger():
    import deepspeed

    said = Said()
    deepspeed.logger.addHandler(said)
    try:
        deepspeed.comm.destroy_process_group()
        deepspeed.utils.logger.warning("a")
        deepspeed.utils.logger.warning_once("once")
        deepspeed.utils.logger.warning_once("once")
        deepspeed.utils.log_dist("alone", level=logging.ERROR)
        deepspeed.init_distributed()
        for ranks in ([0], [-1], [1], None):
            deepspeed.utils.log_dist(f"to {ranks}", ranks=ranks, level=logging.ERROR)
    finally:
        deepspeed.logger.removeHandler(said)
    assert said.lines == ["a", "once", "[Rank -1] alone", "[Rank 0] to [0]", "[Rank 0] to [-1]"]


def check_what_does_nothing_says_so_once():
    import deepspeed

    said = Said()
    deepspeed.logger.addHandler(said)
    try:
        deepspeed.utils.logging.warning_once.cache_clear()
        for _ in range(2):
            deepspeed.zero.Init(pin_memory=True)
            deepspeed.checkpointing.configure(None, partition_activations=True, checkpoint_in_cpu=True)
            deepspeed.ops.lamb.FusedLamb([nn.Parameter(torch.ones(2))])
    finally:
        deepspeed.logger.removeHandler(said)
    assert len(said.lines) == 3
    for line, word in zip(said.lines, ("pin_memory has no effect", "checkpoint_in_cpu", "paper's"), strict=True):
        assert word in line
        assert len(line) <= 200


CHECKS = {name: check for name, check in vars().items() if name.startswith("check_")} | deepspeed_training.CHECKS

if __name__ == "__main__":
    importlib.import_module("deepfast.deepspeed")  # from here on
    torch.set_num_threads(1)
    out = Path(sys.argv[1])

    def bound(check):
        return (lambda: check(out.parent)) if check.__code__.co_varnames[:1] == ("tmp",) else check

    run_checks({name: bound(check) for name, check in CHECKS.items()}, out)
