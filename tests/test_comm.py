"""Collectives over one to four ranks: all checks of comm_ranks.py, in one start for each number of ranks."""

from __future__ import annotations

import time

import pytest
import torch
from checks import failures, heard, heard_of_pair, heard_of_ranks, torchrun
from comm_faults import CHECKS as FAULTS
from comm_ranks import wanted
from conftest import python, run
from peers_ranks import CHECKS as PEERS

from deepfast.comm.watch import Watch

SIZES = (1, 2, 3, 4)
_results: dict[int, list[dict[str, str]]] = {}


@pytest.fixture
def results(size, tmp_path_factory) -> list[dict[str, str]]:
    if size not in _results:
        _results[size] = heard_of_ranks(size, tmp_path_factory.mktemp("ranks"), "comm_ranks.py", "cpu")
    return _results[size]


@pytest.mark.parametrize(
    ("size", "check"),
    [
        pytest.param(size, check, marks=pytest.mark.xdist_group(f"comm{size}"))
        for size in SIZES
        for check in wanted(size)
    ],
)
def test_ranks(results, size, check):
    assert failures(results, check) == ""


def test_without_a_process_group():
    import deepfast

    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        deepfast.comm.Communicator()


ENGINE = """
import logging, torch, torch.distributed as dist, deepfast
logging.basicConfig()
net = torch.nn.Linear(4, 2, bias=False)
torch.nn.init.ones_(net.weight)
config = {"train_batch_size": 2, "gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
engine, *_ = deepfast.initialize(model=net, config=config)
engine.backward(engine(torch.full((1, 4), dist.get_rank() + 1.0)).sum())
engine.step()
assert (net.weight == 1.0 - 1.5).all(), net.weight
"""


GOODBYE = """
import atexit, os
def tell():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    print(dist.is_initialized(), sum("gloo_runloop" in name for name in names) > 0)
atexit.register(tell)  # before the others, so it is called after them
import torch, torch.distributed as dist, deepfast
%s
p = torch.nn.Parameter(torch.ones(3))
optimizer = deepfast.SGD([p], lr=1.0)  # imports more of torch
deepfast.init_distributed()
dist.all_reduce(torch.ones(3))
"""


@pytest.mark.parametrize(
    ("begin", "left"), [("deepfast.init_distributed()", False), ("dist.init_process_group('gloo')", True)]
)
def test_a_process_group_is_ended_by_whoever_began_it(begin, left):
    """Before Python ends: it is aborted by a thread of gloo that lets go of a tensor then."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = python(GOODBYE % begin, env=alone)
    assert (done.returncode, done.stdout) == (0, f"{left} {left}\n"), done.stderr


LATE = """
import os, torch, torch.distributed as dist, deepfast
%s
deepfast.init_distributed()
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))  # it has the group for good, and the group its threads
core = {sorted(os.sched_getaffinity(0))[dist.get_rank() %% os.cpu_count()]}
os.sched_setaffinity(0, core)
for task in os.listdir("/proc/self/task"):
    if "gloo_runloop" in open(f"/proc/self/task/{task}/comm").read():  # they run where nobody else wants to
        os.sched_setaffinity(int(task), core)
        os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
dist.all_reduce(torch.ones(3))
%s
"""


@pytest.mark.parametrize("begin", ["", "dist.init_process_group('gloo')"], ids=["ours", "theirs"])
@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()"], ids=["left", "destroyed"])
def test_threads_that_let_go_of_a_tensor_late_do_not_abort_python(begin, end, tmp_path):
    (tmp_path / "late.py").write_text(LATE % (begin, end))
    done = run(*torchrun(2), tmp_path / "late.py", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_engine_without_a_compiler(tmp_path, compiled):
    """Gradients are then reduced by torch.distributed, after a warning, to the same result."""
    (tmp_path / "engine.py").write_text(ENGINE)
    env = {} if compiled else {"DEEPFAST_DISABLE_JIT": "1", "DEEPFAST_CACHE_DIR": str(tmp_path)}
    done = run(*torchrun(2), tmp_path / "engine.py", env={"OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("gradients are reduced by torch.distributed" in done.stderr) != compiled


WATCH = """
import atexit, threading
def tell():
    print([thread.name for thread in threading.enumerate() if thread.daemon])
atexit.register(tell)  # before the others, so it is called after them
import torch
from deepfast.comm.watch import Watch
watch = Watch(torch.zeros(16, dtype=torch.int32), [0, 1], list, 10.0, 0.0)
assert threading.active_count() == 2
"""


def test_the_watch_ends_the_waits_of_ranks_that_disagree():
    """With less elements a peer has less thread blocks: who waits for the others would wait until the timeout."""
    status = torch.zeros(Watch.MISSING + 8, dtype=torch.int32)
    watch = Watch(status, [0, 1], list, 1000.0, 0.0)
    status[Watch.BEGUN] = 1
    time.sleep(0.2)
    assert not status[Watch.GIVE_UP], "a rank may be slow"
    status[Watch.DISAGREE] = 1
    assert watch.found.wait(10.0)
    assert status[Watch.GIVE_UP]


@pytest.mark.parametrize("dropped", [True, False])
def test_the_watch_ends_before_python_does(dropped):
    """A daemon thread that came back from C++ into a Python that had ended would abort the process."""
    done = python(WATCH + ("del watch\nassert threading.active_count() == 1" if dropped else ""))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.xdist_group("comm_played")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gpus_played_on_the_host(cuda_on_host, tmp_path, size):
    """The CUDA kernels between processes, over memory that all map; ranks run ahead of each other as they like."""
    said = heard_of_ranks(size, tmp_path, "comm_ranks.py", "cuda", cuda_on_host.file)
    assert [failures(said, check) for check in wanted(size, "cuda") if failures(said, check)] == []


@pytest.mark.xdist_group("comm_played")
def test_a_rank_is_killed_beside_gpus_played_on_the_host(cuda_on_host, tmp_path):
    said = heard_of_pair(tmp_path, "peers_ranks.py", "cuda", cuda_on_host.file)
    assert [failures(said, check) for check in PEERS if failures(said, check)] == []


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str]:
    return heard(tmp_path_factory.mktemp("faults") / "results.json", "comm_faults.py")


@pytest.mark.xdist_group("comm_faults")
@pytest.mark.parametrize("check", FAULTS)
def test_ranks_that_die_or_hang(faults, check):
    assert faults[check] == ""
