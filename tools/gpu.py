"""All that needs a GPU, the most valuable first, in the time there is; what is known is on disk after every stage.

    python tools/gpu.py [--out DIR] [--budget SECONDS] [--only NAMES] [--skip NAMES] [--commit NAME]    (make gpu)
    python tools/gpu.py --rehearse DIR    without a GPU: the kernels played on the host, Triton's on a libcuda that only
                                          says yes (both are compiled into DIR); what fails then is the session itself

Nothing is installed. OUT gets gpu.json, log.txt, figures.jsonl and JUnit's XML. The exit code says whether all passed.
A machine without a compiler, a network or git takes what `make gpu-carry` has built: `.gpu` and `deepfast/prebuilt`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from gpu_stages import Session, Stage, replace

ROOT = Path(__file__).resolve().parent.parent
TOOLS, TESTS = ROOT / "tools", ROOT / "tests"
CARRIED = ROOT / ".gpu"
PYTHON = sys.executable
# What the harness (tests/harness.cu) is asked: scenario, cases; and how many of them a sanitizer gets.
SCENARIOS = {"step": (70, 14), "one": (28, 7), "limit": (14, 0), "limit-groups": (14, 0), "thousands": (2, 0),
             "empty": (14, 0), "rows": (10, 0), "fold": (20, 4), "statistics": (100, 20), "statistics-many": (4, 0),
             "accumulate": (40, 10), "accumulate-many": (4, 0), "scaler": (60, 10)}  # fmt: skip
BUILD = """
import time
from deepfast import build
start = time.perf_counter(); build.build(library=build.CPU); cpu = time.perf_counter()
build.build(library=build.CUDA); cuda = time.perf_counter()
build.build(library=build.COMM); comm = time.perf_counter()
print("cold build: CPU %.1f s, CUDA %.1f s, Comm %.1f s" % (cpu - start, cuda - cpu, comm - cuda))
"""
KERNELS = "regex:(step|norms|statistics)_kernel"
# Of the tests on a GPU, those that the kernels played on the host cannot take: graphs, streams, waits, memory.
NEEDS_A_DEVICE = "graph or captur or stream or launches or waits or leaked or this_gpu or two_processes or triton"
# Of the other tests, the files with tests that are given a backend and that are run with a GPU's.
OPTIMIZER_TESTS = [
    f"tests/test_{name}.py"
    for name in "optimizers gradients masters edges plan replaced_states forms chance int8 bias_correction".split()
]


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def said_by(*command: object) -> str:
    try:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, timeout=20, check=False, cwd=ROOT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip()


def stages(programs: Mapping[str, Path], out: Path, scratch: Path, rehearsed: bool) -> list[Stage]:
    """What is done, in order."""
    tests = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-rfE"]  # -v: it may be cut short
    workers = ["-n", min(12, os.cpu_count() or 1), "--max-worker-restart", 40] if importable("xdist") else []
    if importable("pytest_timeout"):
        workers += ["--timeout", 90, "--timeout-method", "thread"]
    if rehearsed:
        tests, workers = [*tests, "-p", "gpu_played"], []
    bench = [PYTHON, "benchmarks/bench_gpu.py"]
    on_gpu = {} if rehearsed else {"DEEPFAST_TEST_DEVICE": "cuda"}
    one_thread = {"OMP_NUM_THREADS": "1"}

    def programs_of(cases: Callable[[int, int], int], *before: object) -> list[list[object]]:
        chosen = {name: cases(*counts) for name, counts in SCENARIOS.items()}
        harness = [[*before, programs["harness"], name, count, 3] for name, count in chosen.items() if count]
        return [*harness, [*before, programs["ranks"], cases(100, 10), 3]]

    def sanitizer(tool: str, *more: object) -> Stage:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        command = [found, "--tool", tool, "--launch-timeout", 0, "--error-exitcode", 9, "--print-limit", 20, *more]
        if rehearsed:  # the played programs have sanitizers inside
            return Stage(tool, 45, programs_of(lambda _, few: few and 1), one_thread, says="cases")
        return Stage(tool, 45, programs_of(lambda _, few: few, *command), one_thread, says="SUMMARY: ")

    def junit(name: str) -> str:
        return f"--junitxml={out}/{name}.xml"

    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    sections = [f"--section={name}" for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy")]
    as_they_are = ["--clock-control", "none", "--pipeline-boost-state", "dynamic"]
    profiler = [] if rehearsed else [ncu, *as_they_are, "--kernel-name", KERNELS, *sections]
    few = "-k", "cuda and SGD" if rehearsed else "cuda or triton"
    engine = {"engine": "cuda"}
    if not rehearsed:  # at once: most of the time goes into imports, and into what Triton compiles
        engine |= {"engine-triton": "triton and not two_processes", "engine-triton-2": "triton and two_processes"}
    return [
        Stage("facts", 150, [[PYTHON, TOOLS / "gpu.py", "--facts", scratch / "facts.json"]]),
        Stage("torch-free", 60, programs_of(lambda many, _: min(many, 7) if rehearsed else many),
              one_thread, says="cases"),
        Stage("bits", 60, [[PYTHON, TOOLS / "gpu_bits.py"]], again=True),
        Stage("bandwidth", 100, [[*bench, "cuda"]], again=True),
        Stage("tests", 120, [[*tests, *workers, "-m", "gpu", "tests/test_gpu.py", junit("tests"), "-k",
                              f"not ({NEEDS_A_DEVICE})" if rehearsed else "not two_processes"]]),
        Stage("collectives", 80, [[*tests, "-m", "gpu", "tests/test_gpu.py", junit("collectives"), "-k",
                                   "two_processes and cuda" if rehearsed else "two_processes"]],
              {"GLOO_SOCKET_IFNAME": "lo"}),
        Stage("engine", 240 if rehearsed else 150, [
            [*tests, "-m", "gpu", "tests/test_gpu_engine.py", junit(name), "-k", which]
            for name, which in engine.items()], {"GLOO_SOCKET_IFNAME": "lo", **one_thread}),
        sanitizer("memcheck"),
        sanitizer("racecheck", "--racecheck-num-workers", 2),
        sanitizer("synccheck"),
        Stage("profile", 60, [[*profiler, *bench, "cuda", "--probe"]], says="" if rehearsed else "Speed Of Light"),
        Stage("optimizer tests", 120, [[*tests, *workers, *OPTIMIZER_TESTS, junit("optimizers"), *few]], on_gpu),
        Stage("triton bandwidth", 80, [[*bench, "triton"]], again=True),
    ]  # fmt: skip


def facts(path: Path) -> int:
    """What machine this is, and what was found on it; the kernels are compiled where they are not at hand."""
    import torch

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    told = {
        "driver": said_by("nvidia-smi", "--query-gpu=name,driver_version,compute_mode,mig.mode.current,memory.total,"
                      "clocks.max.sm,clocks.max.mem,ecc.mode.current", "--format=csv,noheader"),
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
        "nvcc": said_by("nvcc", "--version").splitlines()[-2:],
        "compiler": said_by("g++", "--version").splitlines()[:1],
        "modules": [m for m in ("pytest", "xdist", "pytest_timeout", "hypothesis", "triton") if importable(m)],
        "cores": len(os.sched_getaffinity(0)), "cpu": cpu[1] if cpu else "unknown", "system": os.uname().release,
    }  # fmt: skip
    replace(path, json.dumps(told, indent=1))  # before anything that can fail
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        told["gpu"] = {"name": p.name, "count": torch.cuda.device_count(), "capability": f"{p.major}.{p.minor}",
                       "multiprocessors": p.multi_processor_count, "gib": round(p.total_memory / 2**30, 1),
                       "l2_mib": p.L2_cache_size >> 20}  # fmt: skip
        replace(path, json.dumps(told, indent=1))
    from deepfast import build, ops

    told["library"] = str(ops.LIBRARY or ops.BUILD_ERROR)
    wrong = ops.BUILD_ERROR
    if torch.cuda.is_available():
        found = ops.cuda()
        wrong = wrong or (found if isinstance(found, str) else None)
        told["cuda_library"] = found if isinstance(found, str) else str(build.find(build.CUDA))
    replace(path, json.dumps(told, indent=1))
    print(json.dumps(told, indent=1))
    if wrong and build.PREBUILT.is_dir():
        print(f"{wrong}\nwhat was built ahead is put away, and compiled here")
        build.PREBUILT.rename(build.PREBUILT.with_name("prebuilt.unfit"))
        os.execv(PYTHON, [PYTHON, __file__, "--facts", str(path)])  # noqa: S606
    if wrong:
        print(wrong)
    from deepfast.engine import config  # noqa: F401 (the one that takes pydantic)

    return int(wrong is not None)


def sees_a_gpu() -> bool:
    """Asked in a process of its own: this one keeps no context on it."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, check=False).returncode == 0


def starts(program: Path) -> bool:
    """Asked nothing, the programs end with exit code 2."""
    with contextlib.suppress(OSError):
        program.chmod(0o755)
        return subprocess.run([program], capture_output=True, check=False, timeout=60).returncode == 2
    return False


def unpacked_wheels(into: Path) -> list[Path]:
    """Packages that this machine lacks, of those that were carried here."""
    wheels = sorted(CARRIED.glob("*.whl"))
    missing = [w for w in wheels if not importable(w.name.split("-")[0])]
    for wheel in missing:
        zipfile.ZipFile(wheel).extractall(into)
    for program in into.glob("*.data/scripts/*"):  # ninja
        program.chmod(0o755)
    return [into] if missing else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "output/gpu", help="default: output/gpu")
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS", help="for everything; default: 900")
    parser.add_argument("--only", default="", metavar="NAMES", help="of stages, with commas")
    parser.add_argument("--skip", default="", metavar="NAMES")
    parser.add_argument("--commit", default="", metavar="NAME", help="what is measured, where git cannot say")
    parser.add_argument("--rehearse", type=Path, metavar="DIR")
    parser.add_argument("--facts", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(TESTS)]
    if chosen.facts:
        return facts(chosen.facts)
    rehearsed = chosen.rehearse is not None
    if not rehearsed and not sees_a_gpu():
        print("make gpu: torch sees no GPU here (--rehearse DIR needs none)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        return session(chosen, Path(scratch), rehearsed)


def session(chosen: argparse.Namespace, scratch: Path, rehearsed: bool) -> int:
    commit = chosen.commit or said_by("git", "describe", "--always", "--dirty")
    path = [ROOT, TOOLS, TESTS, *unpacked_wheels(scratch / "wheels"), os.environ.get("PYTHONPATH")]
    scripts = (scratch / "wheels").glob("*.data/scripts")
    env = {"PYTHONPATH": os.pathsep.join(str(p) for p in path if p),
           "PATH": os.pathsep.join([*map(str, scripts), os.environ.get("PATH", os.defpath)])}  # fmt: skip
    if not rehearsed:
        env["DEEPFAST_CACHE_DIR"] = str(scratch / "cache")  # builds are cold, but for what was carried
    home, kind = (chosen.rehearse.resolve(), "") if rehearsed else (CARRIED, "gpu_")  # as tests/on_host.py names them
    programs = {name: home / f"{kind}{name}" / name for name in ("harness", "ranks")}
    plan = stages(programs, chosen.out.resolve(), scratch, rehearsed)
    names = [stage.name for stage in plan]
    only, skip = (list(filter(None, listed.split(","))) for listed in (chosen.only, chosen.skip))
    if unknown := [name for name in (*only, *skip) if name not in names]:
        print(f"make gpu: no stage {unknown[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    chosen_stages = [s for s in plan if s.name not in skip and (not only or s.name in only)]
    session = Session(chosen.out, scratch, chosen.budget, env, ROOT, {"commit": commit, "rehearsed": rehearsed})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if rehearsed:
            import gpu_played

            session.env.update(gpu_played.prepared(chosen.rehearse.resolve()))
        elif not only:
            session.begin_behind("cold build", PYTHON, "-c", BUILD,
                                 env={"MAX_JOBS": "2", "DEEPFAST_CACHE_DIR": str(scratch / "cold")})  # fmt: skip
        if not rehearsed and not all(map(starts, programs.values())):
            session.run(Stage("programs", 200, [[PYTHON, TOOLS / "gpu_carry.py", "--programs"]]))
        for stage in chosen_stages:
            session.run(stage)
        return int(not session.finish())
    finally:
        session.end()


if __name__ == "__main__":
    raise SystemExit(main())
