"""The benchmarks: who computes something else gets no figure, drift is not in a share, the chart is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("pytest_benchmark")
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

sys.path.insert(0, str(ROOT / "tools"))

import bench_scaling  # noqa: E402
import bench_step  # noqa: E402
import bench_step_dtensors  # noqa: E402
import bench_zero  # noqa: E402
import figures  # noqa: E402
import measure  # noqa: E402
import plot_scaling  # noqa: E402
import plot_summary  # noqa: E402
import readme  # noqa: E402
import sharded  # noqa: E402

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

# On two ranks: one that is right, one that forgets the other rank's gradients, one whose second rank does nothing.
FAKES_OF_RANKS = """
import dataclasses, bench_zero, measure, pytest, sharded

def alone(module, dtype):
    def reduce(grads):
        for p, g in zip(module.parameters(), grads): p.grad = g
    return dataclasses.replace(sharded.ddp(module, dtype), reduce=reduce)

def idle(module, dtype):
    training = sharded.ddp(module, dtype)
    return training if sharded.dist.get_rank() == 0 else dataclasses.replace(training, step=lambda: None)

sharded.TRAINERS.update(alone=sharded.Trainer(alone, "torch"), idle=sharded.Trainer(idle, "torch"))

@pytest.mark.parametrize("contender", ["deepfast_2", "alone", "idle"])
@pytest.mark.benchmark(timer=measure.told)
def test_step(benchmark, ranks, contender):
    benchmark.group = "a step"
    bench_zero.contest(benchmark, ranks, contender, sharded.torch.float16, 1 << 20, bench_zero.from_gradients)
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "0", "-m"]


def benchmarked(folder: Path, fakes: str, *launch: str) -> tuple[str, dict]:
    """What pytest says of them, and the JSON."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "bench_fakes.py").write_text(fakes)
    (folder / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", str(ROOT))])}
    for name in [name for name in env if name.startswith("PYTEST_")]:  # of xdist
        del env[name]
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", *launch, "pytest", "-p", "pytest_benchmark.plugin", "-rs", "--tb=short"]
    done = subprocess.run(
        [*command, "bench_fakes.py", "--benchmark-json", "out.json"],
        check=False,  # some have to fail
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    return done.stdout, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    return benchmarked(tmp_path_factory.mktemp("bench"), FAKES)


def test_a_wrong_result_of_one_rank_has_no_figure(tmp_path):
    said, found = benchmarked(tmp_path, FAKES_OF_RANKS, *TORCHRUN)
    (figure,) = found["benchmarks"]
    assert (figure["params"], figure["extra_info"]["ranks"]) == ({"contender": "deepfast_2"}, 2), said
    assert figure["extra_info"]["bytes"] == 20 << 20
    for name in ("alone", "idle"):
        assert f"{name} has another result" in said


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
    cases = [*bench_step.CASES.items(), *bench_step_dtensors.CASES.items(), *bench_step_dtensors.FIRST.items()]
    for name, case in cases:
        ours, *peers = case.contenders
        assert ours == figures.OURS, name
        assert peers, name
    assert len({case.title for _, case in cases}) == len(cases)


def test_the_inputs_let_nothing_pass_that_does_nothing():
    for name in ("adamw", "lion", "fp16", "bf16"):
        before, once, twice = measure.expected(bench_step.CASES[name], 16)
        assert measure.error([before], before, once) == pytest.approx(1), name
        assert measure.error([once], before, twice) > 0.2, name


@pytest.mark.parametrize(
    ("dtype", "stage", "both"),
    [
        (torch.float16, 2, 2 * 2 + 4 + 28 + 2 * 2),
        (torch.float16, 0, 2 * 2 + 4 + 2 * 28 + 2 * 2),
        (torch.float32, 1, 2 * 4 + 4 + 24 + 2 * 4),
    ],
)
def test_the_floor_of_two_ranks(dtype, stage, both):
    assert bench_zero.floor(dtype, stage, ranks=2) * 2 == both


def test_the_table_of_dtensors():
    times = {"deepfast": 0.01, "torch_loop": 0.4, "torch_fused": 0.025}
    cases = {"many": {n: figures.Figure("many", n, s, 0, 0, 0) for n, s in times.items() if n != "torch_fused"}}
    cases |= {"few": {n: figures.Figure("few", n, s, 0, 0, 0) for n, s in times.items()}}
    text = readme.dtensors(figures.Results({"cpu": "a CPU", "cores": 2, "torch": "2.13.0"}, "2026-11-26", cases))
    assert "| many | 10.0 ms | 40.0× | – |" in text
    assert "| few | 10.0 ms | 40.0× | 2.5× |" in text


def test_the_table_of_sharded_training():
    """Who has more bytes to move is not excused: of the same share with twice the bytes the ratio is 2."""
    assert set(readme.SHARDED) < set(sharded.TRAINERS)
    sharing = figures.Figure("a step", "deepfast_2", 0.05, 0.6, 20 << 26, 80e9)
    whole = figures.Figure("a step", "ddp", 0.1, 0.6, 40 << 26, 80e9)
    peaks = [figures.Figure("peak", name, 1, 0, 0, 0, peak) for name, peak in (("ours", 2000.4), ("theirs", 3000.6))]
    cases = {
        "a step": {"deepfast_2": sharing, "ddp": whole},
        "peak": dict(zip(("deepfast_2", "deepspeed_2"), peaks, strict=True)),
    }
    text = readme.sharded(figures.Results({"cpu": "a CPU", "cores": 2, "torch": "2.13.0"}, "2026-11-26", cases))
    assert "| a step | 50.0 ms, 0.60 of streaming | – | 100 ms (2.00×) | – |" in text
    assert "| peak | 2000 MiB | – | – | 3001 MiB (1.50×) |" in text


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


def test_the_readmes_chart_compares_what_was_measured():
    """In each case somebody else, too; a ratio is the table's."""
    cases = plot_summary.compared(readme.RESULTS)
    assert len(cases) == len(plot_summary.CASES)
    assert all(others for *_, others in cases)
    shown = {ours.case: others for _, ours, others in cases}
    full = shown["full fp16 AdamW step, 64M parameters"]["torch_fused"]
    assert f"{full:.2f}× (fused)" in readme.benchmarks()
    assert f"{shown['AdamW, fp32, 1000 DTensors of 4']['torch_fused']:.1f}×" in readme.benchmarks()


def test_the_chart_of_scaling():
    """A curve's places are what the cases' names say; who is missing somewhere has a shorter one."""
    cases = {
        f"AdamW, fp32, {size}M parameters": {
            name: figures.Figure("", name, size * 1e-3, 0.5, size << 20, 1e9)
            for name in ("deepfast", "torch_fused")
            if (name, size) != ("torch_fused", 1024)
        }
        for size in (1, 1024)
    }
    results = figures.Results({}, "2026-11-27", cases)
    found = plot_scaling.curves(results, r"AdamW, fp32, (\d+)M parameters", lambda match: int(match[1]))
    assert {name: sorted(curve) for name, curve in found.items()} == {"deepfast": [1, 1024], "torch_fused": [1]}
    assert found["deepfast"][1024].seconds == 1.024
    plot_scaling.chart(readme.RESULTS).clear()


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(bench_scaling, "free", lambda: 19 << 30)
    with pytest.raises(pytest.skip.Exception, match="needs 28 GiB of memory, 19 are free"):
        bench_scaling.test_parameters(None, "fp16", "torch_fused", 1 << 30)


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
