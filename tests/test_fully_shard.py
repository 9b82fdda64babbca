"""torch's fully_shard (FSDP2) with deepfast's optimizers, on four ranks; killed and restarted, and resumed on fewer."""

from __future__ import annotations

import re

import fully_shard_checkpoint_ranks
import fully_shard_ranks
import pytest
import torch
from checks import SETTINGS, failures, heard_of_ranks, torchrun
from conftest import TESTS, run

pytestmark = pytest.mark.xdist_group("fully_shard")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "fully_shard_ranks.py")


@pytest.mark.parametrize("check", fully_shard_ranks.CHECKS)
def test_four_ranks(results, check):
    assert failures(results, check) == ""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "fully_shard_checkpoint_ranks.py")


@pytest.mark.parametrize("check", fully_shard_checkpoint_ranks.CHECKS)
def test_checkpoints_of_four_ranks(checkpoints, check):
    assert failures(checkpoints, check) == ""


def test_torchrun_starts_it_again_and_it_ends_as_if_nothing_had_been(tmp_path):
    told = {}
    for place, dies in (("undisturbed", "never"), ("killed", "once")):
        folder = tmp_path / place
        folder.mkdir()
        done = run(*torchrun(2), "--max-restarts", 1, TESTS / "restarts_ranks.py", folder, dies, **SETTINGS)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("exitcode: -9") == (dies == "once")
        told[place] = torch.load(folder / "weights.pt")
        lives = sorted(int(begin) for begin in re.findall(r"begins at step (\d+)", done.stdout + done.stderr))
        assert lives == ([0, 4] if dies == "once" else [0])
    for p, q in zip(*told.values(), strict=True):
        assert torch.equal(p, q)


def test_gpt2_in_fp16_with_overflows_on_four_ranks_and_resumed_on_two(tmp_path):
    for ranks in (4, 2):
        for said in heard_of_ranks(ranks, tmp_path, "fully_shard_gpt2_ranks.py"):
            assert set(said.values()) == {""}, said
