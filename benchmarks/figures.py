"""What pytest-benchmark's JSON says, as the chart and the README's tables show it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "deepfast"
SMALL = 1 << 24  # bytes: below, the caches and the host's work decide, not the memory
LABELS = {"deepspeed": "DeepSpeed", "ddp": "DDP", "8bit": "8-bit", "ordinary": "(ordinary memory)", "0": "(stage 0)",
          "2": "(stage 2)"}  # fmt: skip


class BrokenError(ValueError):
    """A file that is not one of these results; one line says why."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Of one contender in one case.

    ``share`` is its part of the yardstick's speed (0: it ran beside none), ``bytes`` what the case has to move (0: it
    has no such floor), ``speed`` the yardstick's, bytes a second; ``peak`` the memory it needs, in MiB, where that is
    what was measured.
    """

    case: str
    contender: str
    seconds: float
    share: float
    bytes: int
    speed: float
    peak: float = 0

    @property
    def cost(self) -> float:
        """What ratios are formed of: where there was a yardstick, drift is not in it."""
        return 1 / self.share if self.share else self.seconds

    def times(self, other: Figure) -> float:
        """How many times what ``other`` needs; who has more bytes to move is not excused."""
        if self.peak:
            return self.peak / other.peak
        return self.cost * max(self.bytes, 1) / (other.cost * max(other.bytes, 1))

    @property
    def streams(self) -> bool:
        """Memory decides."""
        return self.bytes >= SMALL


@dataclasses.dataclass(frozen=True)
class Results:
    machine: dict[str, object]
    date: str
    cases: dict[str, dict[str, Figure]]  # case -> contender -> figure, in the tests' order

    @property
    def capability(self) -> str:
        return str(self.machine["capability"]).replace("AVX512", "AVX-512")

    @property
    def described(self) -> str:
        return f"{self.machine['cpu']}, {self.machine['cores']} cores, torch {self.machine['torch']}, {self.date}"


def read(path: Path) -> Results:
    """Raises BrokenError where the file is not there, no JSON, or not of these benchmarks."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        cases: dict[str, dict[str, Figure]] = {}
        for benchmark in said["benchmarks"]:
            figure = _figure(benchmark)
            cases.setdefault(figure.case, {})[figure.contender] = figure
        if not cases:
            raise ValueError("there are no figures in it")
        machine = {key: said["machine_info"][key] for key in ("cpu", "cores", "capability", "torch")}
        return Results(machine, said["datetime"][:10], cases)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = f"there is no {problem} in it" if isinstance(problem, KeyError) else problem
        raise BrokenError(f"{path}: not a result of `make bench`: {reason}") from problem


def _figure(benchmark: dict) -> Figure:
    extra, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
    if not 0 < seconds < math.inf:
        raise ValueError(f"{benchmark['name']} took {seconds} s")
    names = benchmark["group"], benchmark["params"]["contender"]
    speed = extra.get("yardstick_gb_per_s", 0) * 1e9
    return Figure(*names, seconds, extra.get("share", 0), extra.get("bytes", 0), speed, extra.get("peak_mib", 0))


def label(contender: str) -> str:
    return " ".join(LABELS.get(word, word) for word in contender.split("_"))


def duration(seconds: float) -> str:
    """In three digits."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            break
    value = seconds / size
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def draw_as_told(about: str, chart: Callable[..., Any], dpi: int = 130) -> int:
    """The command line of a chart: it is drawn of the paths that are given, in a file. Returns the exit code."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        chart(*args.results).savefig(args.out, dpi=dpi, metadata={"Software": None})
    except (BrokenError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0
