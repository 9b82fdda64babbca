"""The README's chart: how many times as long as deepfast others take, in six cases.

    python benchmarks/plot_summary.py benchmarks/results -o benchmarks/results/summary.png

Ratios are those of the tables in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from figures import OURS, BrokenError, Figure, draw_as_told, duration, label, read

mpl.use("Agg")
from matplotlib import pyplot as plt

# File, case, what the chart calls it, and who takes part.
STEP, PEERS = "cpu-avx512.json", ("torch_fused", "torch_foreach", "deepspeed", "bitsandbytes")
CASES = (
    (STEP, "full fp16 AdamW step, 64M parameters", "fp16 step: unscale, check, clip, AdamW, master; 64M", PEERS),
    (STEP, "AdamW, fp32, 64M parameters", "AdamW, fp32, one tensor of 64M: memory decides", PEERS),
    (STEP, "AdamW, fp32, 10,000 parameters of 4", "AdamW, fp32, 10,000 small tensors", PEERS),
    ("dtensors.json", "AdamW, fp32, 1000 DTensors of 4", "AdamW, fp32, 1000 small DTensors (FSDP2)", PEERS),
    ("comm.json", "all-reduce, cpu, bf16, 25 MiB, rotating", "all-reduce, bf16, 2 ranks", ("gloo", "deepspeed")),
    ("zero.json", "backward and step, bf16, 64M parameters", "sharded bf16 step, 2 ranks, 64M", ("ddp", "deepspeed_2")),
)
COLOURS = {"deepfast": "#0072b2", "torch": "#9aa3ab", "ddp": "#9aa3ab", "gloo": "#9aa3ab"}
NAMES = {"ddp": "DDP over gloo, torch's parts", "deepspeed_2": "DeepSpeed, stage 2", "gloo": "gloo (torch)"}


def compared(folder: Path) -> list[tuple[str, Figure, dict[str, float]]]:
    """Of each case its name, our figure, and how many times as long others take."""
    found = []
    for file, case, shown, peers in CASES:
        contenders = read(folder / file).cases.get(case, {})
        ours = contenders.get(OURS) or contenders.get("deepfast_2")
        if ours is None:
            raise BrokenError(f"{folder / file}: there is no {case!r} of ours in it")
        some = {name: contenders[name] for name in peers if name in contenders}
        found.append((shown, ours, {name: times(figure, ours) for name, figure in some.items()}))
    return found


def times(figure: Figure, ours: Figure) -> float:
    """Of the host's work, beside which no memory streams as it does alone, of the times themselves."""
    return figure.seconds / ours.seconds if "DTensors" in figure.case else figure.times(ours)


def chart(folder: Path) -> plt.Figure:
    cases = compared(folder)
    rows = sum(len(others) + 2.2 for *_, others in cases)
    fig, ax = plt.subplots(figsize=(8, 0.2 * rows + 0.6), layout="constrained")
    end = 5 * max(value for *_, others in cases for value in others.values())
    y = 0.0
    for shown, ours, others in cases:
        ax.text(0.5, y, shown, fontsize=9, fontweight="bold", va="center")
        bars = [(OURS, 1.0), *sorted(others.items(), key=lambda pair: pair[1])]
        for name, value in bars:
            y += 1
            colour = next((colour for kind, colour in COLOURS.items() if name.startswith(kind)), "#e69f00")
            ax.barh(y, value - 0.5, left=0.5, height=0.78, color=colour)
            time = duration(ours.seconds) if name == OURS else f"{value:.{2 if value < 10 else 0}f}×"
            recipe = " in torch's recipe" if name != OURS and "full" in ours.case else ""
            ax.text(value * 1.05, y, f"{NAMES.get(name, label(name))}{recipe}  {time}", va="center", fontsize=8)
        y += 1.2
    ax.axvline(1, color="#0072b2", linewidth=0.8)
    ax.set(xscale="log", xlim=(0.5, end), ylim=(y - 0.6, -0.8), yticks=[], xticks=[1, 10, 100])
    ax.xaxis.set_major_formatter("{x:g}×")
    ax.minorticks_off()
    ax.spines[:].set_visible(False)
    ax.set_xlabel("times as long as deepfast takes (a logarithmic scale)", fontsize=8)
    return fig


if __name__ == "__main__":
    sys.exit(draw_as_told(__doc__, chart))
