"""What is installed is what the clone holds: every module and every source, by way of the sdist too; and it runs."""

from __future__ import annotations

import email
import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from checks import SETTINGS, torchrun
from conftest import ROOT, SITE, TRAIN, python, run

pytestmark = pytest.mark.xdist_group("wheel")  # they share one build

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def made(what: str, source: Path, out: Path) -> Path:
    """What pip asks setuptools for, without the environment that pip would download for it."""
    out.mkdir(exist_ok=True)
    done = run(sys.executable, "-c", BUILD, what, out, cwd=source, env={"DEEPFAST_PREBUILD": ""})
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages` configuration" not in done.stderr
    return out / done.stdout.splitlines()[-1]


def ignored_by_git(folder: str, names: list[str]) -> set[str]:
    lines = (ROOT / ".gitignore").read_text().split()
    here = [Path(line).name for line in lines if not line.startswith("/") or Path(folder) == ROOT]
    return shutil.ignore_patterns(".git", *here)(folder, names)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """The sdist and the wheel of a copy of the clone, the wheel of the sdist, and the folder it is installed in."""
    tmp = tmp_path_factory.mktemp("wheel")
    clone, unpacked, site = tmp / "clone", tmp / "unpacked", tmp / "site"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored_by_git)
    sdist = made("build_sdist", clone, tmp / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    wheel = made("build_wheel", source, tmp / "from_sdist")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    done = run(sys.executable, *install)
    assert done.returncode == 0, done.stderr
    wheels = [made("build_wheel", clone, tmp / "wheel"), wheel]
    return SimpleNamespace(sdist=sdist, wheels=wheels, site=site, tmp=tmp)


def files_of(folder: Path) -> set[str]:
    """All files of the clone's folder, links followed, but for what running it leaves there."""
    found = {Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names}
    return {str(p.relative_to(folder)) for p in found if not {"__pycache__", "prebuilt"} & {*p.parts}}


def test_the_wheel_holds_what_the_clone_does(built):
    clone = {f"deepfast/{name}" for name in files_of(ROOT / "deepfast")}
    clone |= {f"deepfast/csrc/{name}" for name in files_of(ROOT / "csrc")}
    assert {"deepfast/comm/communicator.py", "deepfast/kernels/step.py", "deepfast/csrc/cuda/step.cu"} <= clone
    direct, by_way_of_the_sdist = ({m.filename: m.CRC for m in zipfile.ZipFile(w).infolist()} for w in built.wheels)
    assert direct == by_way_of_the_sdist
    for wheel in built.wheels:
        names = zipfile.ZipFile(wheel).namelist()
        assert len(names) == len(set(names))
        about = {name for name in names if name.split("/")[0].startswith("deepfast-")}
        assert any(name.endswith("scripts/ds_train.py") for name in about)
        (entries,) = (name for name in about if name.endswith("entry_points.txt"))
        assert b"deepfast = deepfast.deepspeed.launcher:main" in zipfile.ZipFile(wheel).read(entries)
        assert set(names) - about == clone


def test_what_a_package_index_shows(built):
    """Of the wheel that went by way of the sdist: name, version, licence, its text, the README, the extras."""
    import deepfast

    with zipfile.ZipFile(built.wheels[1]) as file:
        place = f"deepfast-{deepfast.__version__}.dist-info"
        about = email.message_from_bytes(file.read(f"{place}/METADATA"))
        licence = file.read(f"{place}/licenses/LICENSE").decode()
    assert (about["Name"], about["Version"]) == ("deepfast", deepfast.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    assert (about["Author"], about["License-File"]) == ("The deepfast authors", "LICENSE")
    assert licence == (ROOT / "LICENSE").read_text()
    assert "Copyright 2026 The deepfast authors" in licence
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    assert {"train", "test", "bench", "dev"} == set(about.get_all("Provides-Extra"))
    oldest = about["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in about.get_all("Classifier")
    assert not any(kind.startswith("License ::") for kind in about.get_all("Classifier")), "the expression says it"


def test_the_changelog_is_of_this_version(built):
    import deepfast

    with tarfile.open(built.sdist) as file:
        names = {Path(*Path(member.name).parts[1:]).name for member in file}
    assert {"CHANGELOG.md", "LICENSE", "README.md"} <= names
    assert f"## [{deepfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_uninstalled_it_leaves_nothing(built):
    """All that was installed is on the list that pip deletes; what Python has compiled of it lies beside that."""
    installed = {path.relative_to(built.site) for path in built.site.rglob("*") if path.is_file()}
    (record,) = built.site.glob("deepfast-*.dist-info/RECORD")
    listed = {Path(line.split(",")[0]) for line in record.read_text().splitlines()}
    listed = {Path("bin", path.name) if "bin" in path.parts else path for path in listed}  # of --target
    assert {path for path in installed if "__pycache__" not in path.parts} <= listed


def test_without_a_compiler_it_steps_after_one_warning(built):
    code = (
        "import torch, deepfast; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "deepfast.SGD([p], lr=0.5).step(); deepfast.AdamW([p]); print(p.tolist())"
    )
    env = {"PYTHONPATH": str(built.site), "PATH": str(built.tmp), "CXX": ""}
    env["DEEPFAST_CACHE_DIR"] = str(built.tmp / "no cache")
    done = run(sys.executable, "-c", code, cwd=built.tmp, env=env)
    assert done.stdout == "[0.5, 0.5, 0.5]\n", done.stderr
    assert done.stderr.count("Warning") == 1
    assert "deepfast runs without compiled kernels" in done.stderr
    assert "apt install g++" in done.stderr


def test_the_trainer_says_what_to_install(built):
    """Of the extra that is not there, in one line. (Here they are: the folder that hides them comes first.)"""
    hidden = built.tmp / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('tqdm', 'transformers') else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(hidden), str(built.site)])
    done = run(sys.executable, built.site / "bin" / "ds_train.py", "--config", "x.json", env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ds_train.py: tqdm, transformers not installed: pip install 'deepfast[train]'\n"


def test_the_sdist_holds_no_more_than_it_takes(built):
    with tarfile.open(built.sdist) as file:
        names = [Path(*Path(member.name).parts[1:]) for member in file if member.isfile()]
    assert {name.parts[0] for name in names if len(name.parts) > 1} == {"deepfast", "csrc", "deepfast.egg-info"}
    assert {str(name) for name in names if len(name.parts) == 1 and name.suffix == ".py"} == {"setup.py", "ds_train.py"}


OWN = """
import sys
from pathlib import Path
def check_own(site):
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "deepfast" and module.__file__:
            assert Path(site) in Path(module.__file__).parents, (name, module.__file__)
"""
IMPORTS = f"""{OWN}
import importlib, pkgutil
import torch
import deepfast
site = sys.argv[1]
found = [m.name for m in pkgutil.walk_packages(deepfast.__path__, "deepfast.") if m.name != "deepfast.__main__"]
assert "deepfast.comm.communicator" in found and "deepfast.kernels.step" in found, found
for name in ["deepfast", *found]:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public) is not None
p = torch.nn.Parameter(torch.ones(10))
optimizer = deepfast.AdamW([p], lr=0.1, backend="cpu")
for _ in range(2):
    p.grad = torch.ones(10)
    optimizer.step()
check_own(site)
print(len(found), round(p[0].item(), 4))
"""


def test_every_name_can_be_imported_and_trains(built):
    """From elsewhere, and from nowhere else: the clone may be installed as well."""
    elsewhere = built.tmp / "elsewhere"
    elsewhere.mkdir()
    done = run(sys.executable, "-c", IMPORTS, built.site, cwd=elsewhere, env={"PYTHONPATH": str(built.site)})
    assert done.returncode == 0, done.stderr
    modules, value = done.stdout.split()
    held = [name for name in zipfile.ZipFile(built.wheels[1]).namelist() if name.endswith(".py")]
    scripts = sum("/scripts/" in name for name in held)
    assert int(modules) == len(held) - scripts - 2, "all but deepfast itself and what python -m runs"
    assert value == "0.7981"  # of 1: twice lr less, and lr * 0.01 of itself


RANKS = f"""{OWN}
import torch, torch.distributed as dist, deepfast
net = torch.nn.Linear(4, 2, bias=False)
torch.nn.init.ones_(net.weight)
config = {{"train_batch_size": 2, "gradient_clipping": 0, "optimizer": {{"type": "SGD", "params": {{"lr": 1.0}}}}}}
engine, *_ = deepfast.initialize(model=net, config=config)
for _ in range(2):
    engine.backward(engine(torch.full((1, 4), dist.get_rank() + 1.0)).sum())
    engine.step()
assert (net.weight == 1.0 - 2 * 1.5).all(), net.weight
assert "deepfast.comm.communicator" in sys.modules
check_own(sys.argv[1])
"""


def test_two_ranks_train_with_the_engine(built):
    script = built.tmp / "ranks" / "train.py"
    script.parent.mkdir()
    script.write_text(RANKS)
    env = {**SETTINGS["env"], "PYTHONPATH": str(built.site)}
    done = run(*torchrun(2), script, built.site, cwd=script.parent, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_doctor_finds_all_it_needs(built):
    done = run(sys.executable, "-m", "deepfast", "doctor", cwd=built.tmp, env={"PYTHONPATH": str(built.site)})
    assert done.returncode == 0, done.stderr
    assert f"({built.site / 'deepfast'})" in done.stdout
    assert "on a CPU       compiled kernels" in done.stdout
    assert "none: " not in next(line for line in done.stdout.splitlines() if line.startswith("communication"))


def test_its_command_runs_a_deepspeed_script(built):
    """The installed `deepfast`, in a folder where there is nothing else."""
    place = built.tmp / "launched"
    place.mkdir()
    (place / "train.py").write_text("import deepspeed, sys; print(deepspeed.__file__, sys.argv[1:])")
    env = {**SETTINGS["env"], "PYTHONPATH": str(built.site)}
    done = run(sys.executable, built.site / "bin" / "deepfast", "--num_gpus", 1, "train.py", cwd=place, env=env)
    assert done.stdout == f"{built.site / 'deepfast' / 'deepspeed' / '__init__.py'} ['--local_rank=0']\n", done.stderr


def test_all_processes_test_the_same_package(tmp_path):
    """`make test` means the wheel: a process that found the clone would test something else."""
    import deepfast

    of_this = str(SITE / "deepfast" / "__init__.py")
    assert deepfast.__file__ == of_this
    code = "import deepfast; print(deepfast.__file__)"
    assert python(code).stdout.strip() == python(code, cwd=tmp_path).stdout.strip() == of_this
    loaded = run(sys.executable, "-v", TRAIN).stderr
    assert set(re.findall(r"(?:matches|code object from) '?(.*/deepfast/__init__\.py)", loaded)) == {of_this}
