"""``deepspeed`` is deepfast's, in processes of their own: this one may need the other one."""

from __future__ import annotations

import pytest
from checks import failures, heard, heard_of_ranks
from conftest import python
from deepspeed_names import CHECKS as ALONE
from deepspeed_ranks import CHECKS as OF_RANKS

pytestmark = pytest.mark.xdist_group("deepspeed_names")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, str]:
    return heard(tmp_path_factory.mktemp("names") / "alone.json", "deepspeed_names.py")


@pytest.mark.parametrize("check", ALONE)
def test_one_process(alone, check):
    assert alone[check] == ""


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[str, str]]:
    return heard_of_ranks(2, tmp_path_factory.mktemp("ranks"), "deepspeed_ranks.py")


@pytest.mark.parametrize("check", OF_RANKS)
def test_two_ranks(of_ranks, check):
    assert failures(of_ranks, check) == ""


def test_the_import_is_cheap():
    done = python("import sys, deepfast, deepfast.deepspeed; print('torch' in sys.modules, 'deepspeed' in sys.modules)")
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert python("import sys, deepfast; print('deepspeed' in sys.modules)").stdout.split() == ["False"]


def test_another_deepspeed_that_is_imported_is_an_error(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("theirs = True\n")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = python(f"{path}import deepspeed, deepfast.deepspeed")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: another deepspeed is imported already")
    assert str(tmp_path) in last
    done = python(f"{path}import deepfast.deepspeed, deepspeed; print(hasattr(deepspeed, 'theirs'), deepspeed.ops)")
    assert done.stdout.startswith("False <module 'deepspeed.ops'"), done.stderr
