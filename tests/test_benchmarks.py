"""The benchmarks: who computes something else gets no figure, drift is not in a share, the chart is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("pytest_benchmark")
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_step  # noqa: E402
import figures  # noqa: E402
import measure  # noqa: E402

# Contenders of a case: right ones, and some that compute nothing, forget their state or stop halfway.
FAKES = """
import measure, pytest, torch
from measure import Case, Contender

def sgd(params): return torch.optim.SGD(params, lr=0.1, momentum=0.9).step
def noop(params): return lambda: None
def forgetful(params): return torch.optim.SGD(params, lr=0.1).step
def half(params): return torch.optim.SGD([p.detach()[: len(p) // 2] for p in params], lr=0.1, momentum=0.9).step
def late(params):
    steps = iter([torch.optim.SGD(params, lr=0.1, momentum=0.9).step])
    return lambda: next(steps, lambda: None)()
def absent(params): raise ImportError("No module named 'absent'")

makes = {name: Contender(make) for name, make in globals().items() if name in
         ("sgd", "noop", "forgetful", "half", "late")}
makes["absent"] = Contender(absent, package="pip-absent")
CASE = Case("a case", 20, makes, lambda params, repeats: sgd(params), small=1 << 16)

@pytest.mark.parametrize("contender", makes)
def test_step(benchmark, contender): measure.contest(benchmark, CASE, contender, 1 << 17)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    """What pytest says of them, and the JSON."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "bench_fakes.py").write_text(FAKES)
    (folder / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", str(ROOT))])}
    for name in [name for name in env if name.startswith("PYTEST_")]:  # of xdist
        del env[name]
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "-rs", "--tb=short"]
    done = subprocess.run(
        [*command, "bench_fakes.py", "--benchmark-json", "out.json"],
        check=False,  # some have to fail
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_a_wrong_result_has_no_figure(run):
    said, found = run
    assert [b["params"]["contender"] for b in found["benchmarks"]] == ["sgd"], said
    for name in ("noop", "forgetful", "half", "late"):
        assert f"{name} computes something else" in said
    assert "(pip install pip-absent)" in said


def test_the_json_is_small_and_names_no_machine(run):
    _, found = run
    (figure,) = found["benchmarks"]
    assert set(found["machine_info"]) == {"cpu", "cores", "capability", "torch", "python", "gpu"}
    assert found["commit_info"] == {}
    assert figure["extra_info"]["bytes"] == 20 << 17
    assert 0 < figure["extra_info"]["error"] < 1e-6
    assert len(json.dumps(found)) < 2000


class Machine:
    """Whose memory has another speed each time it is asked."""

    def __init__(self, *speeds: float) -> None:
        self.now, self.speeds, self.speed = 0.0, speeds, 1.0

    def move(self, moved: float) -> None:
        self.now += moved / self.speed

    def pedantic(self, run, setup, rounds) -> list[float]:
        seconds = []
        for turn in range(rounds):
            self.speed = self.speeds[turn % len(self.speeds)]
            setup()
            start = self.now
            run()
            seconds.append(self.now - start)
        return seconds


@pytest.mark.parametrize("speeds", [(100e9,), (70e9, 130e9, 90e9)], ids=["steady", "drifting"])
def test_drift_is_not_in_a_share(speeds):
    machine = Machine(*speeds)
    yardstick = measure.Yardstick(lambda: machine.move(8e6), 8_000_000, lambda: machine.now)
    seconds = machine.pedantic(lambda: machine.move(28e6 / 0.8), yardstick, 9)
    found = measure.figures(seconds, yardstick.seconds, 28_000_000, yardstick.moved)
    assert found["share"] == pytest.approx(0.8)
    assert found["share_spread"] == pytest.approx(0)
    assert found["yardstick_gb_per_s"] == pytest.approx(sorted(speeds)[len(speeds) // 2] / 1e9)


def test_every_case_is_a_contest():
    for name, case in bench_step.CASES.items():
        ours, *peers = case.contenders
        assert ours == figures.OURS, name
        assert peers, name
    assert len({case.title for case in bench_step.CASES.values()}) == len(bench_step.CASES)


def test_the_inputs_let_nothing_pass_that_does_nothing():
    for name in ("adamw", "lion", "fp16", "bf16"):
        before, once, twice = measure.expected(bench_step.CASES[name], 16)
        assert measure.error([before], before, once) == pytest.approx(1), name
        assert measure.error([once], before, twice) > 0.2, name


def result(**changed) -> dict:
    """A small result file."""

    def figure(contender: str, share: float) -> dict:
        extra = {"bytes": 28 << 20, "share": share, "yardstick_gb_per_s": 100}
        return {
            "name": contender,
            "group": "AdamW, fp32, 1M parameters",
            "params": {"contender": contender},
            "stats": {"median": 3e-4 / share},
            "extra_info": extra,
        }

    machine = {"cpu": "a CPU", "cores": 2, "capability": "AVX512", "torch": "2.13.0", "python": "3.11", "gpu": None}
    benchmarks = [figure("deepfast", 0.9), figure("torch_fused", 0.8), figure("torchao_8bit", 0.02)]
    return {"machine_info": machine, "datetime": "2026-11-26", "benchmarks": benchmarks, **changed}


def plotted(tmp_path, text: str) -> subprocess.CompletedProcess:
    (tmp_path / "result.json").write_text(text)
    command = [sys.executable, BENCHMARKS / "plot.py", tmp_path / "result.json", "-o", tmp_path / "chart.png"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_chart(tmp_path):
    pytest.importorskip("matplotlib")
    done = plotted(tmp_path, json.dumps(result()))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        (json.dumps(result(benchmarks=[])), "there are no figures in it"),
        (json.dumps(result(machine_info={})), "there is no 'cpu' in it"),
    ],
    ids=["cut off", "another", "empty", "nameless"],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, text, reason):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(figures.BrokenError, match="not a result of `make bench`") as refused:
        figures.read(tmp_path / "result.json")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_chart_refuses_a_broken_file(tmp_path):
    pytest.importorskip("matplotlib")
    done = plotted(tmp_path, "{")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
