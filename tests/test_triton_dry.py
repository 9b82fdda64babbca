"""Triton's own compiler and launcher, as the backend calls them, without a GPU: see triton_dry/play.py.

That everything compiles for an H100 as it is called, how often it is launched, and that a second optimizer compiles
nothing. No arithmetic is done: that is what test_triton.py (the interpreter) and test_gpu.py are for.
"""

from __future__ import annotations

import pytest
from checks import heard
from dry_triton import CHECKS

pytestmark = pytest.mark.xdist_group("triton_dry")


@pytest.fixture(scope="module")
def said(tmp_path_factory, triton_dry) -> dict[str, str]:
    """One process for all: Triton takes one driver, and the kernels are compiled once."""
    return heard(tmp_path_factory.mktemp("said") / "dry.json", "dry_triton.py", triton_dry)


@pytest.mark.parametrize("check", CHECKS)
def test_triton_without_a_gpu(said, check):
    assert not said[check], said[check]
