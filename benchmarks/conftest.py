"""One registry for all comparisons: ours and the peers' in the same process, in turn, medians, results checked first.

pytest-benchmark times one function after the other; on a machine whose speed drifts only interleaved runs compare.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RESULTS: list[dict] = []


@dataclasses.dataclass
class Case:
    """One contender: ``run`` is timed, ``result`` gives what it has computed, to be compared before any ratio.

    A yardstick computes nothing that could be compared (``result`` None); it only gives a time.
    """

    name: str
    run: Callable[[], object]
    result: Callable[[], torch.Tensor] | None


def compare(title: str, cases: list[Case], *, bytes_moved: int = 0, rounds: int = 15, tolerance: float = 1e-4) -> dict:
    """Times the cases in turn. The first is ours; a peer whose result differs gets no ratio, and the test fails.

    Args:
        bytes_moved: by our case in one run, for its bandwidth; 0 = not told.
    """
    for case in cases:
        case.run()
    expected = cases[0].result() if cases[0].result else torch.empty(0)
    peers = {c.name: c.result() for c in cases[1:] if c.result}
    wrong = {name for name, got in peers.items() if not torch.allclose(expected, got, rtol=tolerance, atol=tolerance)}
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            start = time.perf_counter()
            case.run()
            times[case.name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = cases[0].name
    row = {
        "title": title,
        "ms": {name: round(value * 1e3, 3) for name, value in medians.items()},
        "times_as_fast_as": {
            name: None if name in wrong else round(value / medians[ours], 2)
            for name, value in medians.items()
            if name in peers
        },
    }
    if bytes_moved:
        row["gb_per_s"] = round(bytes_moved / medians[ours] / 1e9, 1)
    report(row)
    assert not wrong, f"other results: {wrong}"
    return row


def report(row: dict) -> None:
    RESULTS.append(row)
    print("\n" + json.dumps(row, indent=1))


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


@pytest.fixture(scope="session", autouse=True)
def _write_results():
    yield
    path = os.environ.get("DEEPFAST_RESULTS")
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "results": RESULTS}, indent=1) + "\n")
