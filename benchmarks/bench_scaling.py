"""How a step's time grows: with the parameters, 1M to 1024M, and with the tensors that they are in, 1 to 10,000.

    pytest benchmarks/bench_scaling.py [-k "parameters and torch_fused"]

How it grows with the ranks: bench_zero.py on 1, 2 and 4 of them (``make bench-scaling`` runs both). What does not fit
into the memory that is free is skipped, with the figures.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import bench_step
import measure
import pytest
from measure import Case

PARAMETERS = tuple(1 << power for power in (20, 22, 24, 26, 28, 30))
TENSORS = (1, 10, 100, 1000, 10_000)
TOGETHER = 1 << 24  # parameters in those tensors
SPARE = 3 << 30  # bytes, for the yardstick and what is there already

# Bytes a parameter: weight, gradient, state, and what a step makes on its way.
NEEDED = {
    "adamw": {"deepfast": 16, "torch_fused": 16, "torch_foreach": 28, "deepspeed": 16},
    "fp16": {"deepfast": 14, "torch_fused": 25, "deepspeed": 25},
}


def free() -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def chosen(case: str, **changed: object) -> Case:
    """Of bench_step.py's case those contenders."""
    whole = bench_step.CASES[case]
    some = {name: whole.contenders[name] for name in NEEDED[case]}
    if case == "fp16":  # torch adds up norms in fp32: of 256M elements 2.5 % is lost, and with it of what is clipped
        some = {name: c if name == "deepfast" else dataclasses.replace(c, tolerance=0.04) for name, c in some.items()}
    return dataclasses.replace(whole, contenders=some, small=64 << 20, **changed)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize(
    ("case", "contender"), [pytest.param(case, name, id=f"{case}-{name}") for case in NEEDED for name in NEEDED[case]]
)
def test_parameters(benchmark, case, contender, parameters):
    needed = NEEDED[case][contender] * parameters + SPARE
    if needed > free():
        pytest.skip(f"needs {needed >> 30} GiB of memory, {free() >> 30} are free")
    measure.contest(benchmark, chosen(case), contender, parameters)
    gc.collect()  # an optimizer's cycles hold gigabytes


@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize("contender", NEEDED["adamw"])
def test_tensors(benchmark, contender, tensors):
    shapes = ((TOGETHER // tensors,),) * tensors
    case = chosen("adamw", shapes=shapes, empty=measure.ordinary, title=f"AdamW, fp32, 16M parameters in {tensors}")
    measure.contest(benchmark, case, contender, TOGETHER)
    gc.collect()
