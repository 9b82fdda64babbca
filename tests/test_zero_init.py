"""Models made in parts (zero.Init), and made whole for a while (zero.GatheredParameters): the checks of four ranks."""

from __future__ import annotations

import pytest
from checks import failures, heard_of_ranks
from zero_init_ranks import CHECKS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("ranks"), "zero_init_ranks.py")


@pytest.mark.parametrize("check", CHECKS)
def test_a_model_is_made_in_parts(results, check):
    assert failures(results, check) == ""
