"""Models made in parts (zero.Init) and parts made whole (zero.GatheredParameters): the checks of four ranks."""

from __future__ import annotations

import gathered_ranks
import pytest
import zero_init_ranks
from checks import failures, heard_of_ranks

pytestmark = pytest.mark.xdist_group("zero_init")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("made"), "zero_init_ranks.py")


@pytest.fixture(scope="module")
def gathered(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(4, tmp_path_factory.mktemp("gathered"), "gathered_ranks.py")


@pytest.mark.parametrize("check", zero_init_ranks.CHECKS)
def test_a_model_is_made_in_parts(made, check):
    assert failures(made, check) == ""


@pytest.mark.parametrize("check", gathered_ranks.CHECKS)
def test_parts_are_made_whole(gathered, check):
    assert failures(gathered, check) == ""
