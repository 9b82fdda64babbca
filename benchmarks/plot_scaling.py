"""The chart of scaling: a step's time over the parameters, over the tensors that they are in, and over the ranks.

    python benchmarks/plot_scaling.py benchmarks/results -o benchmarks/results/scaling.png

Reads ``scaling.json`` and ``scaling-<ranks>-ranks.json`` of that folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from figures import OURS, Figure, Results, draw_as_told, label, read

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

FLOOR = "#b5372a"
COLOURS = {"deepfast": "#0072b2", "torch": "#6b7780", "ddp": "#6b7780", "deepspeed": "#e69f00"}
MARKS = {"torch_foreach": "s", "deepfast_0": "s"}
Curve = dict[float, Figure]


def curves(results: Results, title: str, x: Callable[[re.Match[str]], float]) -> dict[str, Curve]:
    """Of the cases that are called so (a pattern): each contender's figures, by what its name says of the place."""
    found: dict[str, Curve] = {}
    for case, contenders in results.cases.items():
        if match := re.fullmatch(title, case):
            for name, figure in contenders.items():
                found.setdefault(name, {})[x(match)] = figure
    return found


def draw(ax: Axes, found: dict[str, Curve], y: Callable[[Figure], float]) -> None:
    for name, curve in found.items():
        colour = next(colour for kind, colour in COLOURS.items() if name.startswith(kind))
        ours = name.startswith(OURS)
        points = sorted((x, y(figure)) for x, figure in curve.items())
        ax.plot(*zip(*points, strict=True), MARKS.get(name, "o") + "-", color=colour, label=label(name),
                linewidth=2 if ours else 1.2, markersize=4, zorder=3 if ours else 2)  # fmt: skip


def chart(folder: Path) -> plt.Figure:
    results = read(folder / "scaling.json")
    ranks = {int(path.stem.split("-")[1]): read(path) for path in sorted(folder.glob("scaling-*-ranks.json"))}
    log = {"xscale": "log", "yscale": "log"}
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained", subplot_kw=log)
    (fp32, fp16), (tensors, several) = axes

    for ax, title, pattern, xlabel in (
        (fp32, "AdamW, fp32", r"AdamW, fp32, (\d+)M parameters", "million parameters, one tensor"),
        (fp16, "full fp16 AdamW step", r"full fp16 AdamW step, (\d+)M parameters", "million parameters, one tensor"),
        (tensors, "AdamW, fp32, 16M parameters", r"AdamW, fp32, 16M parameters in (\d+)", "tensors that they are in"),
    ):
        found = curves(results, pattern, lambda match: int(match[1]))
        draw(ax, found, lambda figure: figure.cost)
        ax.axhline(1, linestyle="--", color=FLOOR, linewidth=1, label="its bytes at streaming speed")
        ax.set(title=title, xlabel=xlabel, ylabel="time, in multiples of that")
        places = sorted(found[OURS])
        ax.set_xticks(places, [f"{x:,}" for x in places])
    on: dict[str, Curve] = {}
    for n, of in ranks.items():
        for name in ("deepfast_2", "deepfast_0", "ddp", "deepspeed_2"):
            (case,) = of.cases.values()
            if name in case:
                on.setdefault(name, {})[n] = case[name]
    several.margins(y=0.3)  # room for the legend
    draw(several, on, lambda figure: figure.seconds * 1e3)
    several.set(title="backward and step, bf16, 16M parameters", xlabel="ranks, one thread each", ylabel="ms")
    for ax in axes.flat:
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.legend(fontsize=7.5, frameon=False)
    several.set_xticks(sorted(ranks), [str(n) for n in sorted(ranks)])
    fig.supxlabel(f"{results.capability}: {results.described}", fontsize=8)
    return fig


if __name__ == "__main__":
    sys.exit(draw_as_told(__doc__, chart))
