"""Norms and overflows over all meshes of four ranks. All checks of two scripts, in one start of four ranks each."""

from __future__ import annotations

import mesh_norm_ranks
import mesh_overflow_ranks
import pytest
from checks import failures, heard_of_ranks

pytestmark = pytest.mark.xdist_group("mesh norms")


@pytest.fixture(scope="module")
def norms(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "mesh_norm_ranks.py")


@pytest.fixture(scope="module")
def overflows(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "mesh_overflow_ranks.py")


@pytest.mark.parametrize("check", mesh_norm_ranks.CHECKS)
def test_one_norm(norms, check):
    assert failures(norms, check) == ""


@pytest.mark.parametrize("check", mesh_overflow_ranks.CHECKS)
def test_one_verdict(overflows, check):
    assert failures(overflows, check) == ""
