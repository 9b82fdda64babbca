"""The README's chart: how long each contender's step takes, in multiples of what the bytes take at streaming speed.

    python benchmarks/plot.py benchmarks/results/cpu-avx512.json [more.json] -o benchmarks/results/cpu.png

The bars are the first file's, the marks beside them the second's.
"""

from __future__ import annotations

import sys

import matplotlib as mpl
from figures import OURS, BrokenError, Figure, Results, draw_as_told, duration, label, read

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

END = 6.0  # of the axis; a longer bar is cut there, and says how long it is
FLOOR = "#b5372a"
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
COLOURS = {"deepfast": "#0072b2", "torch": "#9aa3ab", "others": "#e69f00"}  # told apart by the colour-blind, too


def kind(contender: str) -> str:
    return next((name for name in COLOURS if contender.startswith(name + "_") or contender == name), "others")


def bar(ax: Axes, y: float, figure: Figure) -> None:
    ax.barh(y, min(figure.cost, END), height=0.78, color=COLOURS[kind(figure.contender)])
    name, time = label(figure.contender), duration(figure.seconds)
    strong = {"fontweight": "bold"} if figure.contender == OURS else {}
    ax.text(-0.06, y, name, ha="right", va="center", fontsize=8, **strong)
    if figure.cost > END:
        ax.text(END - 0.08, y, f"{figure.cost:.0f}×,  {time}  ▸", ha="right", va="center", fontsize=8)
    elif figure.cost > END - 0.7:
        ax.text(figure.cost - 0.05, y, time, ha="right", va="center", fontsize=8, **strong)
    else:
        ax.text(figure.cost + 0.05, y, time, va="center", fontsize=8, **strong)


def chart(results: Results, *others: Results) -> plt.Figure:
    cases = {case: of for case, of in results.cases.items() if OURS in of and of[OURS].streams}
    if not cases:
        raise BrokenError(f"no case of these results is long enough for the memory to decide: {list(results.cases)}")
    rows = sum(len(of) + 1.7 for of in cases.values())
    fig, ax = plt.subplots(figsize=(8, 0.168 * rows + 1.1), layout="constrained")
    y = 0.0
    for case, contenders in cases.items():
        floor = contenders[OURS].bytes / contenders[OURS].speed
        ax.text(-1.35, y, case, fontsize=8.5, fontweight="bold", va="center", bbox=BLANK)
        ax.text(END, y, f"floor {duration(floor)}", fontsize=8, ha="right", va="center", color=FLOOR)
        for contender, figure in sorted(contenders.items(), key=lambda pair: pair[1].cost):
            y += 1
            bar(ax, y, figure)
            for other in others:
                beside = other.cases.get(case, {}).get(contender)
                if beside and beside.cost <= END:
                    ax.plot(beside.cost, y, "D", markersize=3.2, markerfacecolor="white", markeredgecolor="black")
        y += 1.7
    ax.axvline(1, color=FLOOR, linewidth=1)
    ax.set(xlim=(-1.35, END), ylim=(y - 0.9, -0.9), xticks=range(int(END) + 1), yticks=[])
    ax.xaxis.set_major_formatter("{x:.0f}×")
    ax.tick_params(labelsize=8, top=True, labeltop=True)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(f"time of a step; 1× is the case's bytes at streaming speed. {results.capability}: "
                  f"{results.described}", fontsize=8)  # fmt: skip
    keys: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    keys.append(Line2D([], [], color=FLOOR, linewidth=1, label="floor"))
    for other in others:
        shape = {"marker": "D", "markersize": 3.5, "markerfacecolor": "white", "linestyle": ""}
        keys.append(Line2D([], [], color="black", label=other.capability, **shape))
    fig.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False, fontsize=8.5)
    return fig


if __name__ == "__main__":
    sys.exit(draw_as_told(__doc__, lambda *files: chart(*map(read, files)), dpi=160))
