"""The session on a GPU, rehearsed without one: an error in it must not be found when there are fifteen minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import HANGS, ROOT, run

pytestmark = pytest.mark.xdist_group("gpu_session")
COPIED = ("benchmarks", "csrc", "deepfast", "kernels", "tests", "tools", "pyproject.toml")


def session(folder: Path, out: Path, *options: object, root: Path = ROOT, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "tools/gpu.py", "--rehearse", folder, "--out", out, *options]
    return run(*command, timeout=2 * HANGS, cwd=root, **more)


def known(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


@pytest.fixture(scope="module")
def played(host_builds, cuda_on_host, harness, ranks) -> Path:
    """What a rehearsal needs is compiled."""
    return host_builds


@pytest.fixture(scope="module")
def rehearsed(played, tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    return session(played, out, "--budget", 1500, "--commit", "abc"), out


def test_every_stage_passes(rehearsed):
    done, out = rehearsed
    assert done.returncode == 0, (out / "log.txt").read_text()[-5000:]
    said = known(out)
    assert {stage["verdict"] for stage in said["stages"].values()} == {"passed"}
    assert list(said["stages"])[:4] == ["facts", "torch-free", "bits", "bandwidth"], "the most valuable first"
    assert said["commit"] == "abc"
    assert said["rehearsed"] is True
    assert said["machine"]["torch"]
    xml = {"tests.xml", "collectives.xml", "engine.xml", "optimizers.xml"}
    assert {path.name for path in out.iterdir()} == {"gpu.json", "log.txt", "figures.jsonl", *xml}


def test_figures_come_with_what_was_expected(rehearsed):
    done, out = rehearsed
    figures = {row["title"]: row for row in known(out)["figures"]}
    expected = json.loads((ROOT / "benchmarks/gpu_expected.json").read_text())["share_of_copy"]
    assert expected.keys() <= figures.keys()
    for title, share in expected.items():
        assert figures[title]["expected"] == share
        assert f"{title}: " in done.stdout
    assert figures["AdamW, fp32, 64M, cuda"].keys() >= {"step", "torch fused", "copy", "tb_per_s", "share_of_copy"}
    assert len((out / "figures.jsonl").read_text().splitlines()) == len(known(out)["figures"])


PLANTED = {
    "tools/gpu.py": [
        ('"cuda": torch.version.cuda', '"cuda": torch.version.cudart'),  # facts
        ('"one": (28, 7)', '"two": (28, 7)'),  # torch-free, memcheck and the like
    ],
    "tools/gpu_bits.py": [("reset_grad", "resets_grad")],
    "benchmarks/bench_gpu.py": [
        ("launch.decide", "launch.decides"),  # bandwidth
        ("full = {", "fulls = {"),  # profile
    ],
    "tests/test_gpu.py": [
        ("def test_any_layout(backend, form, device):", "def test_any_layout(backend, form, device, layout):")
    ],
    "tests/peers_ranks.py": [("reference.reduced(tensors", "reference.reduce(tensors")],
    "tests/zero_ranks.py": [("engine.module.loss(", "engine.module.lost(")],  # engine
    "tests/test_plan.py": [("import torch\n", "import torch\nimport torch_\n")],
    "kernels/scaler.py": [("tl.store(", "tl.stores(")],
}


def test_an_error_in_any_stage_is_found_and_keeps_no_other_from_running(rehearsed, played, tmp_path):
    """One is planted in each, in a copy: all of them fail, to the last."""
    clone = tmp_path / "clone"
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    for name, faults in PLANTED.items():
        path = clone / name
        for right, wrong in faults:
            assert right in path.read_text(), (name, right)
            path.write_text(path.read_text().replace(right, wrong))
    done = session(played, tmp_path / "out", "--budget", 1500, root=clone)
    stages = known(tmp_path / "out")["stages"]
    assert stages.keys() == known(rehearsed[1])["stages"].keys()
    assert [name for name, stage in stages.items() if stage["verdict"] in ("passed", "running")] == []
    assert done.returncode == 1
    assert f"Not passed: {', '.join(stages)}" in done.stdout


@pytest.mark.parametrize("after", [0.5, 3.0, 10.0])
def test_whoever_kills_it_keeps_what_was_known(played, tmp_path, after):
    command = [sys.executable, ROOT / "tools/gpu.py", "--rehearse", played, "--out", tmp_path, "--budget", "60"]
    running = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, start_new_session=True, cwd=ROOT)
    try:
        while not (tmp_path / "gpu.json").exists():
            time.sleep(0.05)
        time.sleep(after)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    said = known(tmp_path)
    assert said["seconds"] <= after + 60
    begun = list(said["stages"])
    assert [s["verdict"] for s in said["stages"].values()][:-1] == ["passed"] * (len(begun) - 1)
    log = (tmp_path / "log.txt").read_text() if begun else ""
    assert all(f"== {name}, " in log for name in begun)


def test_a_budget_is_kept(played, tmp_path):
    """What does not fit is not begun, what runs is ended whole, and all of it is told."""
    start = time.monotonic()
    done = session(played, tmp_path, "--budget", 30)
    assert time.monotonic() - start < 30 + 60
    stages = known(tmp_path)["stages"]
    verdicts = [stage["verdict"] for stage in stages.values()]
    assert verdicts[0] == "passed"
    assert verdicts[-1] == "no time was left"
    assert done.returncode == 1
    assert "Not passed" in done.stdout


def test_stages_are_chosen_by_name(played, tmp_path):
    assert session(played, tmp_path, "--only", "facts").returncode == 0
    assert list(known(tmp_path)["stages"]) == ["facts"]
    wrong = session(played, tmp_path, "--skip", "fact")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "no stage 'fact'; there are: facts, torch-free" in wrong.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(sys.executable, ROOT / "tools/gpu.py", "--out", tmp_path, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "torch sees no GPU here" in done.stderr


DYING = """
import sys, types
from gpu_stages import each, report
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None)
def error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def dies():
    torch.cuda.synchronize = error
    raise RuntimeError("a kernel could not be launched")
def fails():
    raise RuntimeError("other bits")
def figure(title):
    return lambda: report({"title": title})
raise SystemExit(each({"one": figure("one"), "two": dies, "three": fails, "four": figure("four")}))
"""
LINGERS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])
%s
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_stages

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made = gpu_stages.Session(tmp_path, scratch, 120, {"PYTHONPATH": str(ROOT / "tools")}, ROOT, {})
    return gpu_stages, made


def test_a_cuda_error_ends_its_process_and_the_cases_behind_it_run_in_another(stages, tmp_path):
    module, made = stages
    made.run(module.Stage("dying", 60, [[sys.executable, "-c", DYING]], again=True))
    said = known(tmp_path)
    assert [row["title"] for row in said["figures"]] == ["one", "four"]
    assert said["stages"]["dying"]["verdict"] == "exit code 3; then exit code 1"
    assert made.begun.read_text().split() == ["one", "two", "three", "four"]


def test_nothing_begins_for_a_session_that_has_died():
    code = "import gpu_stages, os, sys; gpu_stages.die_with(int(sys.argv[1])); print('begun')"
    env = {"PYTHONPATH": str(ROOT / "tools")}
    assert run(sys.executable, "-c", code, os.getpid(), env=env).stdout == "begun\n"
    gone = run(sys.executable, "-c", "import os; print(os.getpid())").stdout.strip()
    done = run(sys.executable, "-c", code, gone, env=env)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("then", "limit", "verdict"), [("", 60, "passed"), ("time.sleep(600)", 2, "stopped at its time limit")]
)
def test_a_stage_is_ended_with_all_that_it_has_started(stages, then, limit, verdict):
    module, made = stages
    started = f"stage-{os.getpid()}-{limit}"
    made.run(module.Stage("lingers", limit, [[sys.executable, "-c", LINGERS % (then or "0"), started]] * 2))
    assert made.stages["lingers"]["verdict"] == verdict
    children = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(started.encode() in command for command in children)


def test_a_checker_that_says_nothing_has_not_passed(stages):
    module, made = stages
    says, silent = ([sys.executable, "-c", code] for code in ("print('SUMMARY: 0 errors')", "0"))
    made.run(module.Stage("checked", 60, [says, says], says="SUMMARY"))
    made.run(module.Stage("not checked", 60, [says, silent], says="SUMMARY"))
    assert made.stages["checked"]["verdict"] == "passed"
    assert made.stages["not checked"]["verdict"] == '1 of 2 have not said "SUMMARY"'


def test_a_command_that_is_missing_fails_its_stage(stages):
    module, made = stages
    made.run(module.Stage("missing", 60, [["/no/such/program"], [sys.executable, "-c", "0"]]))
    assert made.stages["missing"]["verdict"].startswith("could not be run")
    assert made.finish() is False


POISONED = """
import torch
def test_poisons():
    def error():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), error
    error()
def test_comes_after(): assert not torch.cuda.is_initialized()
def test_and_another(): assert not torch.cuda.is_initialized()
"""
OURS = """
import importlib.util
spec = importlib.util.spec_from_file_location("ours", %r)
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
pytest_runtest_logfinish = ours.pytest_runtest_logfinish
"""


def test_a_cuda_error_ends_its_worker_and_no_other_test(tmp_path):
    (tmp_path / "test_some.py").write_text(POISONED)
    (tmp_path / "conftest.py").write_text(OURS % str(ROOT / "tests/conftest.py"))
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-n", "1", "--max-worker-restart", "4", tmp_path]
    done = run(*command, cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTEST_XDIST_WORKER": ""})
    assert "2 passed" in done.stdout
    assert "crashed while running 'test_some.py::test_poisons'" in done.stdout


def test_packages_that_are_missing_come_from_the_wheels_that_were_carried(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu

    for name in ("pytest", "no_such_package"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{name}-1.0.data/scripts/{name}", "#!/bin/sh")
    monkeypatch.setattr(gpu, "CARRIED", tmp_path)
    assert gpu.unpacked_wheels(tmp_path / "into") == [tmp_path / "into"]
    assert {path.name for path in (tmp_path / "into").iterdir()} == {
        "no_such_package.py",
        "no_such_package-1.0.data",
    }
    assert run(tmp_path / "into" / "no_such_package-1.0.data" / "scripts" / "no_such_package").returncode == 0
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "none")
    assert gpu.unpacked_wheels(tmp_path / "into") == []
