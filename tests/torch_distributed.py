"""Run by test_comm_torch.py: torch's own tests of a process group, on CPU tensors and our backend.

torch/testing/_internal/distributed/distributed_test.py decides at its import, from $BACKEND, what a backend can do. It
is asked for gloo, which ours extends; then the name becomes "deepfast", and that is what each rank's group is made of.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import unittest
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from checks import run_checks

WORLD_SIZE = 3  # subgroups in these tests are of ranks 1 and 2
SELECTED = re.compile(
    "test_((sparse_)?all_reduce|all_gather|reduce|DistributedDataParallelCPU|accumulate_gradients_no_sync|get_future|"
    "grads_same_across_ranks_with_no_sync|static_graph_api_cpu|ddp_create_graph|ddp_logging_data_cpu|"
    "broadcast|gather|scatter|send_recv|isend|irecv|barrier(?!_timeout)|monitored_barrier)"
)
# Whose sums and copies must be our own; all others' must be gloo's.
OURS = re.compile(
    "test_(all_reduce_((full_)?group_)?sum(_async|_complex)?|DistributedDataParallelCPU.*|accumulate_gradients_no_sync.*|"
    "get_future|grads_same_across_ranks_with_no_sync|static_graph_api_cpu|ddp_create_graph|ddp_logging_data_cpu|"
    "all_gather_into_.*_tensor_cuda|reduce_scatter_tensor_cuda)"
)
# torch has these for NCCL alone. Nothing in them needs a GPU but for where the tensors lie; here that is the CPU.
ON_CPU = re.compile("test_(all_gather_into_(cat|stack)_tensor|reduce_scatter_tensor)_cuda")


def names() -> list[str]:
    """Those of torch's tests that are meant here, found without the import."""
    source = Path(torch.__file__).parent / "testing/_internal/distributed/distributed_test.py"
    return sorted(filter(SELECTED.match, re.findall(r"^        def (test_\w+)\(", source.read_text(), re.MULTILINE)))


def announced() -> dict[str, bytes]:
    """Of each communicator's ranks the page where they say what they are about to do: every operation of ours changes
    it, and no other does. By the numbers of the files."""
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one of gloo's threads has just closed it
            if "memfd:deepfast" in os.readlink(fd):
                found[fd.name] = os.pread(int(fd.name), 4096, 0)
    return found


def worked_since(before: dict[str, bytes]) -> bool:
    now = announced()
    return any(now.get(fd) != page for fd, page in before.items())


def make_tests() -> type[unittest.TestCase]:
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(WORLD_SIZE), DISTRIBUTED_TESTS_DEFAULT_TIMEOUT="60")
    from torch.testing._internal import common_distributed

    # "Tests with this decorator were always skipped": it asks for eight ranks, and they need three.
    common_distributed.skip_if_small_worldsize = lambda test: test
    from torch.testing._internal.distributed import distributed_test

    base = distributed_test.DistributedTest._DistTestBase
    distributed_test.BACKEND = os.environ["BACKEND"] = "deepfast"

    class Tests(distributed_test.TestDistBackend, base):
        expected = None
        calls = 0  # that were ours

        def setUp(self):
            super().setUp()
            self._start_processes(multiprocessing.get_context("fork").Process)  # spawned, each would import it all

        def run_test(self, name, pipe):
            """On each rank."""
            test = getattr(self, name)

            def checked():
                assert dist.get_backend() == "deepfast"
                assert dist.group.WORLD._get_backend(torch.device("cpu")).name() == "deepfast"
                before = announced()
                assert len(before) == WORLD_SIZE
                if name.startswith("test_accumulate_gradients"):
                    distributed_test.BACKEND = "gloo"  # they ask for it once more, to choose between CPU and GPU
                test()
                in_group = self.rank in (1, 2) or not re.search("(?<!full)_group_", name)
                ours = self.calls > 0 or worked_since(before)
                assert ours == (in_group and OURS.fullmatch(name) is not None), f"by deepfast itself: {ours}"

            setattr(self, name, checked)
            super().run_test(name, pipe)

        def call_dist_op(self, title, is_async, op, *args, **options):
            if OURS.fullmatch(self._testMethodName) and "all_reduce" in title:  # the profiler is to show them
                distributed_test.PROFILING_SUPPORTED_BACKENDS.append("deepfast")
            before = announced()
            super().call_dist_op(title, is_async, op, *args, **options)
            ours = worked_since(before)
            self.calls += ours
            assert ours == (OURS.fullmatch(self._testMethodName) is not None), f"by deepfast itself: {ours}"
            if self.expected is not None:
                assert torch.equal(args[0], torch.full_like(args[0], self.expected)), args[0]

        def _test_all_reduce_helper(self, group, group_id, rank, op, master, worker, expected, *args, **options):
            self.expected = expected  # torch does not look at it
            super()._test_all_reduce_helper(group, group_id, rank, op, master, worker, expected, *args, **options)

        def _all_gather_into_tensor_helper(self, out, t, group_id, rank, *_):
            return super()._all_gather_into_tensor_helper(out, t, group_id, rank, cuda=False)

        def _reduce_scatter_tensor_helper(self, out, t, group_id, rank, *_):
            return super()._reduce_scatter_tensor_helper(out, t, group_id, rank, cuda=False)

    for name in filter(ON_CPU.fullmatch, names()):
        setattr(Tests, name, getattr(base, name).__wrapped__)
    return Tests


def result(tests, name):
    found = unittest.TestResult()
    tests(name).run(found)
    wrong = [text for _, text in found.failures + found.errors]
    return "\n".join(wrong + [f"skipped: {why}" for _, why in found.skipped])


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with fewer GPUs than ranks torch would skip everything
    import deepfast
    from deepfast import build

    torch.set_num_threads(1)
    deepfast.comm.register_backend()
    build.load_comm()
    Tests = make_tests()
    assert len(os.listdir("/proc/self/task")) == 1, "threads, and a fork may not have any: set OMP_NUM_THREADS=1"
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        run_checks({name: partial(result, Tests, name) for name in names()}, Path(sys.argv[1]))
