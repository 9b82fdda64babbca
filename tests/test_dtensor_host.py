"""What a step on DTensors does on the host. All checks of dtensor_host_ranks.py, in one start of two ranks."""

from __future__ import annotations

import pytest
from checks import failures, heard_of_ranks
from dtensor_host_ranks import CHECKS
from wholes import check_a_plan_of_shards

from deepfast import ops, reference

pytestmark = pytest.mark.xdist_group("dtensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(2, tmp_path_factory.mktemp("ranks"), "dtensor_host_ranks.py")


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(results, check):
    assert failures(results, check) == ""


@pytest.mark.parametrize("backend", [ops.native, reference], ids=["cpu", "reference"])
def test_plans_of_shards(backend):
    check_a_plan_of_shards(backend.Plan)
