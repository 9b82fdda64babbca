"""Puts between markers in README.md and docs/ what is generated: the configuration's table, the benchmarks' tables."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from deepfast.engine import config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from figures import OURS, Figure, Results, duration, label, read  # noqa: E402
from plot_summary import CASES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("fp32", "fp16", "bf16")


def benchmarks(folder: Path = RESULTS) -> str:
    """Of the step, a few columns for each instruction set; of the sums between ranks; of sharded training. What was not
    measured is left out."""
    files = sorted(folder.glob("cpu-*.json"), key=lambda path: (path.stem != "cpu-avx512", path.name))
    text = steps([read(path) for path in files], [path.name for path in files]) if files else ""
    for name, made in (("scaling", scaling), ("dtensors", dtensors), ("comm", sums), ("zero", sharded)):
        file = folder / f"{name}.json"
        text += f"\n{made(read(file))}" if file.exists() else ""
    return text


def steps(results: list[Results], names: list[str]) -> str:
    links = (
        f"[{r.capability}](../benchmarks/results/{name}): {r.described}" for r, name in zip(results, names, strict=True)
    )
    head = [
        "",
        *(f"{r.capability}{what}" for r in results for what in ("", ", of streaming", ", best of torch")),
        "best of others",
    ]
    rows = [head, ["---"] * len(head)]
    for case in dict.fromkeys(case for r in results for case in r.cases):
        row, found = [case], [r.cases.get(case, {}) for r in results]
        for contenders in found:
            ours = contenders.get(OURS)
            streams = ours is not None and ours.streams
            row += [
                duration(ours.seconds) if ours else "",
                f"{ours.share:.2f}" if ours and streams else "",
                best(contenders, lambda name: name.startswith("torch_")),
            ]
        row.append(best(found[0], lambda name: not name.startswith(("torch_", OURS))))
        rows.append(row)
    return f"{'; '.join(links)}.\n\n{table(rows)}"


def dtensors(results: Results) -> str:
    """How long the host is busy with steps on many small DTensors, and how many times as long others are."""
    peers = list(dict.fromkeys(n for contenders in results.cases.values() for n in contenders if n != OURS))
    rows = [["", label(OURS), *map(label, peers)], ["---"] * (2 + len(peers))]
    for case, contenders in results.cases.items():
        ours = contenders[OURS].seconds
        ratios = (f"{contenders[n].seconds / ours:.1f}×" if n in contenders else "–" for n in peers)
        rows.append([case, duration(ours), *ratios])
    return f"\nDTensors ([figures](../benchmarks/results/dtensors.json)): {results.described}.\n\n{table(rows)}"


def scaling(results: Results) -> str:
    """How long steps of more and more take, and how many times as long others'; the chart shows the same."""
    peers = list(dict.fromkeys(n for contenders in results.cases.values() for n in contenders if n != OURS))
    rows = [["", label(OURS), *map(label, peers)], ["---"] * (2 + len(peers))]
    for case, contenders in results.cases.items():
        if OURS in contenders:
            ours = contenders[OURS]
            ratios = (f"{contenders[n].times(ours):.2f}×" if n in contenders else "–" for n in peers)
            rows.append([case, duration(ours.seconds), *ratios])
    return f"Scaling ([figures](../benchmarks/results/scaling.json)): {results.described}.\n\n{table(rows)}"


def machines(folder: Path = RESULTS) -> str:
    """What the README's chart was drawn from, and on what."""
    on: dict[str, list[str]] = {}
    for file in dict.fromkeys(file for file, *_ in CASES):
        results = read(folder / file)
        about = f"{results.machine['cpu']}, {results.machine['cores']} cores, {results.capability}"
        about += f", torch {results.machine['torch']}, {results.date}"
        on.setdefault(about, []).append(f"[{file}](benchmarks/results/{file})")
    said = "; ".join(f"{about} ({', '.join(links)})" for about, links in on.items())
    return f"{said}. Made by `make bench readme`.\n"


def examples() -> str:
    """The lines by which each example is other than its twin in plain torch; but for the import."""
    texts = []
    for twin in sorted((ROOT / "examples" / "plain_torch").glob("*.py")):
        own = twin.parent.parent / twin.name
        before, after = (path.read_text(encoding="utf-8").splitlines() for path in (twin, own))
        found = [*difflib.unified_diff(before, after, n=0, lineterm="")][2:]
        changes = [line for line in found if line[0] in "+-" and line not in ("+", "-", "+import deepfast")]
        texts.append([f"# examples/{own.name}", *changes])
    lines = [line for text in sorted(texts, key=len) for line in text]
    return "\n".join(["```diff", *lines, "```", ""])


def gpu(folder: Path = RESULTS) -> str:
    """What a GPU has shown, of the CUDA kernels."""
    known = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    machine, ratios = known["machine"], {}
    for figure in known["figures"]:
        ours = next((figure[name]["ms"] for name in ("step", "full step", "deepfast") if name in figure), 0)
        torchs = next((figure[name]["ms"] for name in ("torch fused", "torch's parts") if name in figure), 0)
        if torchs and figure["title"].endswith(", cuda"):
            ratios[figure["title"].removesuffix(", cuda")] = torchs / ours
    plain = [ratio for title, ratio in ratios.items() if ", fp32, " in title]
    many = ratios["AdamW, 2000 tensors of 256"]
    return (
        f"On one {machine['gpu']['name']} ({known['date']}, torch {machine['torch']}, "
        f"[gpu.json](benchmarks/results/gpu.json)) the full fp16 AdamW step of 64M parameters took "
        f"{ratios['full fp16 AdamW step, 64M']:.2f} times less than torch's parts, fp32 steps of 64M to 1024M "
        f"{min(plain):.2f} to {max(plain):.2f} times less than torch's fused ones, AdamW on 2000 small tensors "
        f"{many:.1f} times less: [what ran](docs/gpu.md#what-ran-on-a-gpu).\n"
    )


def best(contenders: dict[str, Figure], among) -> str:
    """The fastest of those, and how many times as long as ours it takes."""
    peers = {name: figure for name, figure in contenders.items() if among(name)}
    if OURS not in contenders or not peers:
        return ""
    name = min(peers, key=lambda name: peers[name].cost)
    ratio = peers[name].cost / contenders[OURS].cost
    return f"{ratio:.{2 if ratio < 10 else 0}f}× ({label(name.removeprefix('torch_'))})"


# As quality.py calls a form, and as bench_forms.py calls the contender that has it.
FORMS = {
    "fp32": "deepfast_fp32",
    "bf16, split master": "deepfast",
    "fp16, split master": "",
    "bf16, split master, bf16 moments": "deepfast_bf16_moments",
    "bf16, split master, int8 moments": "deepfast_int8_moments",
    "bf16, no master, stochastic rounding": "deepfast_stochastic_rounding",
    "bf16, no master": "",
}


def forms(folder: Path = RESULTS) -> str:
    """What a form costs, and what it does to training; then the memory that others need."""
    if not all((folder / name).exists() for name in ("quality.json", "forms.json")):
        return ""
    known = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    memory = read(folder / "forms.json")
    (peaks,) = memory.cases.values()
    finals = {form: [run["validation"][-1] for run in runs.values()] for form, runs in known["runs"].items()}
    rows = [
        ["AdamW", "validation loss, three seeds", "against fp32", "peak memory of a step of GPT-2 124M"],
        ["---"] * 4,
    ]
    for form, contender in FORMS.items():
        if form in finals:
            off = [100 * (a / b - 1) for a, b in zip(finals[form], finals["fp32"], strict=True)]
            change = "" if form == "fp32" else f"{min(off):+.2f} to {max(off):+.2f} %"
            rows.append([form, " ".join(f"{x:.3f}" for x in finals[form]), change, _needed(peaks.get(contender))])
    others = ", ".join(f"{label(name)} {_needed(peak)}" for name, peak in peaks.items() if name not in FORMS.values())
    about = known["about"]
    return (
        f"{table(rows)}\nGPT-2 tiny on the standard library's source, {about['steps']} steps of {about['batch']} "
        f"sequences of {about['length']}, learning rate {about['lr']} with warm-up and cosine "
        f"([figures](../benchmarks/results/quality.json), the same seeds and data for all). Memory of one process, "
        f"beyond what it had before the model ([figures](../benchmarks/results/forms.json): {memory.described}); "
        f"others: {others}.\n\n![Validation loss against fp32's](../benchmarks/results/quality.png)\n"
    )


def sums(results: Results) -> str:
    """A row a size, of three types; from the cases' names: what, device, type, size."""
    sizes: dict[str, dict[str, dict[str, Figure]]] = {}
    for case, contenders in results.cases.items():
        what, _, dtype, *size = case.split(", ")
        for name, figure in contenders.items():
            sizes.setdefault(", ".join([what, *size]), {}).setdefault(name, {})[dtype] = figure
    columns = list(dict.fromkeys(name for of in sizes.values() for name in of))
    rows = [["; ".join(DTYPES), *map(label, columns)], ["---"] * (len(columns) + 1)]
    for size, of in sizes.items():
        types = [dtype for dtype in DTYPES if any(dtype in figures for figures in of.values())]
        cells = ("; ".join(_duration(of.get(name, {}).get(dtype)) for dtype in types) for name in columns)
        rows.append([size, *cells])
    return f"Two ranks ([figures](../benchmarks/results/comm.json)): {results.described}.\n\n{table(rows)}"


def _duration(figure: Figure | None) -> str:
    return duration(figure.seconds) if figure else "–"


SHARDED = {
    "deepfast_2": "deepfast, stage 2",
    "deepfast_0": "deepfast, stage 0",
    "ddp": "DDP over gloo, torch's parts",
    "deepspeed_2": "DeepSpeed, stage 2",
}


def sharded(results: Results) -> str:
    """A row a case; times are of the first column."""
    rows = [["", *SHARDED.values()], ["---"] * (len(SHARDED) + 1)]
    for case, contenders in results.cases.items():
        ours, *others = (contenders.get(name) for name in SHARDED)
        cells = [_needed(ours) + (f", {ours.share:.2f} of streaming" if ours and ours.streams else "")]
        cells += [_needed(other) + (f" ({other.times(ours):.2f}×)" if other and ours else "") for other in others]
        rows.append([case, *cells])
    return f"Sharded, two ranks ([figures](../benchmarks/results/zero.json)): {results.described}.\n\n{table(rows)}"


def _needed(figure: Figure | None) -> str:
    return f"{figure.peak:.0f} MiB" if figure and figure.peak else _duration(figure)


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def between(text: str, name: str, generated: str) -> str:
    """``text`` with this between the markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"there are no markers for {name}: {begin.strip()}, {end}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{generated}{end}{after}"


# Page, marker, and what stands there.
PAGES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("README.md", "machines", machines),
    ("README.md", "gpu", gpu),
    ("README.md", "examples", examples),
    ("docs/configuration.md", "configuration", lambda: config.table() + "\n"),
    ("docs/storage-forms.md", "forms", forms),
    ("docs/benchmarks.md", "benchmarks", benchmarks),
)


if __name__ == "__main__":
    for page, name, generated in PAGES:
        file = ROOT / page
        file.write_text(between(file.read_text(encoding="utf-8"), name, generated()), encoding="utf-8")
