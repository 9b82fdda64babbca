"""torch's own tests of a process group, on ``init_process_group("deepfast")``: one start of torch_distributed.py."""

from __future__ import annotations

import re

import pytest
from checks import heard
from torch_distributed import ON_CPU, names

pytestmark = pytest.mark.xdist_group("comm_torch")

# Those that cannot run, and torch's words for it.
NOT_APPLICABLE = {
    "test_broadcast_object_list": "Test is failing, see https://github.com/pytorch/pytorch/pull/113620",
    "test_gather_object": "Test requires an exact world size of 4",
    "test_gather_object_subgroup": "Test requires an exact world size of 4",
    # DDP's log knows the names of torch's own backends.
    "test_ddp_logging_data_cpu": "'custom' != 'deepfast'",
    # torch.distributed looks at the name. (test_monitored_barrier_gloo_rank_0_timeout calls the group's own method.)
    "test_monitored_barrier_failure_order": "monitored_barrier is only implemented for GLOO backend",
    "test_monitored_barrier_gloo": "monitored_barrier is only implemented for GLOO backend",
    "test_monitored_barrier_gloo_subgroup": "monitored_barrier is only implemented for GLOO backend",
    "test_monitored_barrier_wait_all_ranks": "monitored_barrier is only implemented for GLOO backend",
}
# They want a GPU for each rank, or NCCL, and are shown none.
GPU = re.compile("test_.*(cuda|nccl).*|test_monitored_barrier_allreduce_hang.*")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    return heard(tmp_path_factory.mktemp("torch") / "results.json", "torch_distributed.py")


@pytest.mark.parametrize("name", names())
def test_torchs_own(results, name):
    if name in NOT_APPLICABLE:
        assert NOT_APPLICABLE[name] in results[name]
    elif GPU.fullmatch(name) and not ON_CPU.fullmatch(name):
        assert re.match("skipped: .*(CUDA|nccl)", results[name], re.IGNORECASE)
    else:
        assert results[name] == ""


def test_they_are_there(results):
    assert set(NOT_APPLICABLE) <= set(names())
    assert set(results) == set(names())
    for name in ("test_all_reduce_sum", "test_DistributedDataParallelCPU", "test_reduce_scatter_tensor_cuda"):
        assert results[name] == ""
