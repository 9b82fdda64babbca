"""Checkpoints of several ranks: checkpoint_ranks.py on two; kill -9 of any; and torchrun that starts them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from checkpoint_kills import LAST, differences, made, step
from checkpoint_ranks import CHECKS
from checks import SETTINGS, failures, heard_of_ranks, torchrun
from conftest import TESTS, run

pytestmark = pytest.mark.xdist_group("checkpoint_ranks")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(2, tmp_path_factory.mktemp("ranks"), "checkpoint_ranks.py")


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(results, check):
    assert failures(results, check) == ""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[dict, Path]:
    place = tmp_path_factory.mktemp("kills")
    done = run(sys.executable, TESTS / "checkpoint_kills.py", place, "--kills", 6, **SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), place


def test_kill_9_of_any_rank_at_any_moment(killed):
    said, _ = killed
    assert said["kills"] == 6
    assert len(set(said["tags"])) > 2, "they got somewhere"


def test_torchrun_starts_it_again_and_it_ends_as_if_nothing_had_been(killed, tmp_path):
    _, place = killed
    command = [*torchrun(2), "--max-restarts", 1, TESTS / "checkpoint_kills.py", tmp_path]
    done = run(*command, **SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("exitcode: -9") == 1
    assert (tmp_path / "latest").read_text().strip() == f"step{LAST}"
    assert differences(tmp_path / f"step{LAST}", place / "told") == []
    # As one rank it goes on from there.
    e = made()
    e.load_checkpoint(tmp_path)
    step(e)
    assert e.global_steps == LAST + 1
