"""Parameters over several ranks: DTensors, FSDP2, DDP. All checks of sharded_ranks.py, in one start of four ranks."""

from __future__ import annotations

import pytest
from checks import failures, heard_of_ranks
from sharded_ranks import CHECKS

pytestmark = pytest.mark.xdist_group("sharded")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "sharded_ranks.py")


@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(results, check):
    assert failures(results, check) == ""
