"""Parameters over several ranks: DTensors, FSDP2, DDP. All checks of sharded_ranks.py, in one start of four ranks."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT, run
from sharded_ranks import CHECKS

pytestmark = pytest.mark.xdist_group("sharded")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    place = tmp_path_factory.mktemp("ranks")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    done = run(*torchrun, ROOT / "tests/sharded_ranks.py", place, env={"OMP_NUM_THREADS": "1"}, timeout=400)
    files = sorted(place.glob("*.json"))
    assert len(files) == 4, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(results, check):
    failures = [f"rank {rank}: {said[check]}" for rank, said in enumerate(results) if said[check]]
    assert not failures, "\n".join(failures)
