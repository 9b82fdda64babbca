"""What a user's type checker sees of the installed package: everything has a type, and what is wrong is found."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from conftest import SITE, TESTS, run

TYPED = TESTS / "typed"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What mypy says of each script, from a folder where there is no configuration and no clone."""
    folder = tmp_path_factory.mktemp("typed")
    for script in TYPED.glob("*.py"):
        shutil.copy(script, folder)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", "--no-pretty")
    done = run(*mypy, "used.py", "misused.py", cwd=folder, env={"MYPYPATH": str(SITE)})
    assert done.returncode == 1, done.stdout + done.stderr
    ours = [line for line in done.stdout.splitlines() if re.match(r"\w+\.py:\d+: ", line)]
    return {name: "\n".join(line for line in ours if line.startswith(name)) for name in ("used.py", "misused.py")}


def test_what_users_write_has_types(said):
    assert said["used.py"] == ""
    assert "Any" not in re.findall(r"assert_type\(.*, (.*)\)", (TYPED / "used.py").read_text())


def test_what_is_wrong_is_found(said):
    lines = (TYPED / "misused.py").read_text().splitlines()
    wrong = [line for line in lines if line.endswith("# wrong")]
    found = {int(number) for number in re.findall(r":(\d+): error: ", said["misused.py"])}
    assert [lines[number - 1] for number in sorted(found)] == wrong
    assert len(wrong) > 40


def test_a_script_of_users_is_told_where_the_types_are():
    assert (SITE / "deepfast" / "py.typed").is_file()
