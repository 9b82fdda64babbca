"""All that needs a GPU, in one go: build, tests, compute-sanitizer, benchmarks; and one JSON of what came out.

    python tools/gpu.py [--out FILE]        (make gpu)

Nothing is installed. A stage that fails does not keep the next ones from running; the exit code says whether one did.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def say(*command: object) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return done.stdout.strip()


def machine() -> dict[str, object]:
    import torch

    from deepfast import build

    def version(package: str) -> str:
        return say(sys.executable, "-c", f"import {package}; print({package}.__version__)")

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": str(build.nvcc()),
        "triton": version("triton"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": say("git", "rev-parse", "HEAD"),
        "changed_files": say("git", "status", "--porcelain").splitlines(),
        "date": time.strftime("%Y-%m-%d"),
    }


class Stages:
    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.results: dict[str, dict[str, object]] = {}

    def run(self, name: str, *command: object, env: dict[str, str] | None = None, limit: int = 240) -> str:
        """Runs one stage and shows what it says. Returns its output."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        log = self.scratch / f"{name.replace(' ', '-')}.log"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                       "PYTHONUNBUFFERED": "1", "DEEPFAST_CACHE_DIR": str(self.scratch / "cache"),
                       **(env or {})}  # fmt: skip
        with log.open("w") as out:
            try:
                code = subprocess.run([str(c) for c in command], check=False, stdout=out, stderr=subprocess.STDOUT,
                                      cwd=ROOT, timeout=limit, env=environment).returncode  # fmt: skip
                verdict = "passed" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                verdict = f"stopped after {limit} s"
            except OSError as error:
                verdict = f"could not be run: {error}"
        said = log.read_text(errors="replace")
        tail = said.splitlines()[-1:] if verdict == "passed" else said.splitlines()[-40:]
        print("\n".join([*tail, f"{name}: {verdict} in {time.perf_counter() - start:.0f} s"]), flush=True)
        self.results[name] = {"verdict": verdict, "seconds": round(time.perf_counter() - start, 1), "said": tail}
        return said


BUILD = """
import time, torch
from deepfast import build
torch.cuda.init()
start = time.perf_counter(); build.build(); cpu = time.perf_counter()
build.build(library=build.CUDA); print("COLD", cpu - start, time.perf_counter() - cpu)
"""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="default: benchmarks/results/<the GPU's name>.json")
    chosen = options.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here (make test needs none)", file=sys.stderr)
        return 2
    about = machine()
    print(json.dumps(about, indent=1))
    slug = re.sub(r"\W+", "-", str(about["gpu"]).lower()).strip("-")
    out = chosen.out or ROOT / "benchmarks" / "results" / f"{slug}.json"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        stages = Stages(scratch)
        python = sys.executable
        # Two jobs: what is published is the time on two cores.
        cold = stages.run("cold build", python, "-c", BUILD, env={"MAX_JOBS": "2"})
        seconds = re.search(r"COLD (\S+) (\S+)", cold)
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        stages.run("tests on a GPU", *tests, "-m", "gpu", "tests/test_gpu.py")
        stages.run("optimizer tests on a GPU", *tests, "tests/test_optimizers.py", "tests/test_plan.py", "-k",
                   "cuda or triton", env={"DEEPFAST_TEST_DEVICE": "cuda"})  # fmt: skip
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has its own bounds
        for tool in ("memcheck", "racecheck", "initcheck"):
            # Libraries ask the runtime for what it may not have: only the kernels' own errors count.
            quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
            stages.run(f"compute-sanitizer {tool}", sanitizer, "--tool", tool, *quiet, "--error-exitcode", 1, python,
                       "tests/gpu_small.py", "cuda", env=uncached, limit=150)  # fmt: skip
        figures = scratch / "figures.json"
        stages.run("benchmarks", *tests, "-m", "gpu", "-s", "benchmarks/bench_gpu.py",
                   env={"DEEPFAST_RESULTS": str(figures)})  # fmt: skip
        rows = json.loads(figures.read_text())["results"] if figures.is_file() else []
    kept = {
        "machine": about,
        "cold_build_seconds": {"cpu": float(seconds[1]), "cuda": float(seconds[2])} if seconds else None,
        "stages": stages.results,
        "results": rows,
    }
    out.write_text(json.dumps(kept, indent=1) + "\n")
    failed = [name for name, stage in stages.results.items() if stage["verdict"] != "passed"]
    print(f"\n{out}: {', '.join(failed) + ' did not pass' if failed else 'all passed'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
