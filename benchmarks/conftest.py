"""pytest-benchmark's results, without what names a machine or a place, and small."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

collect_ignore = ["bench_gpu.py"]  # a script


def pytest_addoption(parser):
    parser.addoption("--elements", type=int, default=64 << 20, help="of the tensors that fill the memory")
    parser.addoption("--device", default="cpu", help="of bench_comm.py: cpu or cuda")
    parser.addoption("--tokens", type=int, default=128, help="of bench_zero.py's memory: of each rank's sequence")


@pytest.fixture
def elements(request) -> int:
    return request.config.getoption("--elements")


@pytest.fixture(scope="module")
def ranks(request):
    """This process among torchrun's; imported where it is asked for."""
    from ranks import joined

    yield from joined(request.config.getoption("--device"), request.path.name)


def pytest_configure(config):
    if os.environ.get("RANK", "0") != "0":  # of several ranks the first one writes
        config.option.benchmark_json = None


def pytest_benchmark_generate_machine_info(config):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def pytest_benchmark_generate_commit_info(config):
    return {}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["datetime"] = output_json["datetime"][:10]
    for figure in output_json["benchmarks"]:
        del figure["options"]
        for name in ("data", "total", "iqr_outliers", "stddev_outliers"):  # what pytest-benchmark itself does not read
            figure["stats"].pop(name, None)
        for part in (figure["stats"], figure["extra_info"]):
            part.update({key: float(f"{x:.6g}") for key, x in part.items() if isinstance(x, float)})
