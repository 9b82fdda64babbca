"""Sharded training, ZeRO 1 and 2: the checks of zero_ranks.py and zero_edges.py, in one start of ranks each."""

from __future__ import annotations

import pytest
from checks import failures, heard_of_pair, heard_of_ranks
from zero_edges import CHECKS as EDGES
from zero_edges import ON_HOSTS
from zero_killed import MOMENTS
from zero_ranks import CHECKS


def wrong(said: list[dict[str, str]]) -> list[str]:
    return [text for check in said[0] if (text := failures(said, check))]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_give_the_bits_of_one_process(tmp_path, ranks):
    said = heard_of_ranks(ranks, tmp_path, "zero_ranks.py")
    assert said[0].keys() == CHECKS.keys()
    assert wrong(said) == []


def test_what_else_happens_to_a_sharded_engine(tmp_path):
    said = heard_of_ranks(2, tmp_path, "zero_edges.py")
    assert said[0].keys() | {"all_optimizers_and_types"} == EDGES.keys()
    assert wrong(said) == []


@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_a_rank_is_killed(tmp_path, moment):
    alone, killed = heard_of_pair(tmp_path, "zero_killed.py", moment)
    assert (alone, killed) == ({MOMENTS[moment]: ""}, {})


@pytest.mark.xdist_group("comm_played")
def test_gpus_played_on_the_host(cuda_on_host, tmp_path):
    assert wrong(heard_of_ranks(2, tmp_path, "zero_played.py", "cuda", cuda_on_host.library)) == []


def test_between_hosts(tmp_path):
    said = heard_of_ranks(2, tmp_path, "zero_edges.py", "hosts")
    assert set(ON_HOSTS) == said[0].keys()
    assert wrong(said) == []
