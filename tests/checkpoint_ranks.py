"""Run by test_checkpoint_ranks.py on two ranks: all of them see a checkpoint's one outcome."""

from __future__ import annotations

import datetime
import errno
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS
from engines import batches, engine, equal, state, train

from deepfast.engine import checkpoint
from deepfast.engine.checkpoint import CheckpointError
from deepfast.engine.ranks import SharedError, of_rank_0


def trained(seed=0):
    e = engine({"train_batch_size": 16}, seed)
    train(e, batches(8)[RANK::2])
    return e


def place() -> Path:
    return Path(of_rank_0(tempfile.mkdtemp(dir=sys.argv[1])))


def full(patch, rank, name):
    """Writing ``name`` fails on ``rank``, a while after the others are through."""
    write = checkpoint.write_tensors

    def maybe(path, *arguments):
        if RANK == rank and path.name == name:
            time.sleep(0.2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *arguments)

    patch.setattr(checkpoint, "write_tensors", maybe)


def check_when_it_returns_the_checkpoint_is_there_for_all():
    directory, e = place(), trained()
    for wait in (True, False):
        path = e.save_checkpoint(directory, f"wait={wait}", wait=wait)
        e.wait_for_checkpoint()
        assert checkpoint.fault(path) is None
    assert {p.name for p in path.glob("model*")} == {"model-0.safetensors", "model-1.safetensors"}
    expected = torch.rand(2)
    loaded = trained(seed=4)
    loaded.load_checkpoint(directory)
    assert torch.equal(torch.rand(2), expected), "each rank's own random state"
    assert equal(state(loaded), state(e))
    train(loaded, batches(4)), train(e, batches(4))
    assert equal(state(loaded), state(e))


def check_one_ranks_full_disk_is_an_error_on_all():
    for rank in range(2):
        directory, e = place(), trained()
        e.save_checkpoint(directory, "a")
        for wait in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                full(patch, rank, f"random-{rank}.safetensors")
                if not wait:
                    e.save_checkpoint(directory, "b", wait=False)
                with pytest.raises(CheckpointError, match="b: cannot be written: No space left") as caught:
                    e.save_checkpoint(directory, "b")
            assert f"random-{rank}.safetensors" in str(caught.value)
            assert isinstance(caught.value, SharedError) == (RANK != 0), "one of them prints it"
            assert sorted(p.name for p in directory.iterdir()) == ["a", "latest"]
            dist.barrier()
        assert e.load_checkpoint(directory)[0] == str(directory / "a")


def check_what_only_one_rank_cannot_save_is_an_error_on_all():
    directory, e = place(), trained()
    with pytest.raises(CheckpointError, match=r"no pickles.*not function"):
        e.save_checkpoint(directory, "a", {"x": place if RANK == 1 else 1})
    with pytest.raises(CheckpointError, match="name of a folder"):
        e.save_checkpoint(directory, "../a" if RANK == 1 else "a")
    assert list(directory.iterdir()) == []
    e.save_checkpoint(directory, "a")
    assert checkpoint.fault(directory / "a") is None


def check_a_damaged_file_that_one_rank_finds_is_an_error_on_all():
    directory, e = place(), trained()
    for tag in ("a", "b"):
        path = e.save_checkpoint(directory, tag)
    before = state(e)
    for name in ("model-0.safetensors", "model-1.safetensors", "random-1.safetensors", "state.json"):
        original = (path / name).read_bytes()
        dist.barrier()
        if RANK == 0:
            (path / name).write_bytes(original[:-1] + b"?")
        dist.barrier()
        with pytest.raises(CheckpointError, match=f"b/{name} is damaged.*'a' is intact"):
            e.load_checkpoint(directory)
        if RANK == 0:
            (path / name).write_bytes(original)
        dist.barrier()
    assert equal(state(e), before)
    assert e.load_checkpoint(directory)[0] == str(path)


CHECKS = {name: check for name, check in vars().items() if name.startswith("check_")}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 3))
    RANK = dist.get_rank()
    run_checks(CHECKS, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()
