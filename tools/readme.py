"""Puts between its markers in README.md what is generated: the configuration table, the benchmarks' tables."""

from __future__ import annotations

import sys
from pathlib import Path

from deepfast.engine import config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from figures import OURS, Figure, Results, duration, label, read  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("fp32", "fp16", "bf16")


def benchmarks(folder: Path = RESULTS) -> str:
    """Of the step, a few columns for each instruction set; of the sums between ranks; of sharded training. What was not
    measured is left out."""
    files = sorted(folder.glob("cpu-*.json"), key=lambda path: (path.stem != "cpu-avx512", path.name))
    text = steps([read(path) for path in files], [path.name for path in files]) if files else ""
    for name, made in (("comm", sums), ("zero", sharded)):
        file = folder / f"{name}.json"
        text += f"\n{made(read(file))}" if file.exists() else ""
    return text


def steps(results: list[Results], names: list[str]) -> str:
    links = (
        f"[{r.capability}](benchmarks/results/{name}): {r.described}" for r, name in zip(results, names, strict=True)
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


def best(contenders: dict[str, Figure], among) -> str:
    """The fastest of those, and how many times as long as ours it takes."""
    peers = {name: figure for name, figure in contenders.items() if among(name)}
    if OURS not in contenders or not peers:
        return ""
    name = min(peers, key=lambda name: peers[name].cost)
    ratio = peers[name].cost / contenders[OURS].cost
    return f"{ratio:.{2 if ratio < 10 else 0}f}× ({label(name.removeprefix('torch_'))})"


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
    return f"Two ranks ([figures](benchmarks/results/comm.json)): {results.described}.\n\n{table(rows)}"


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
    return f"Sharded, two ranks ([figures](benchmarks/results/zero.json)): {results.described}.\n\n{table(rows)}"


def _needed(figure: Figure | None) -> str:
    return f"{figure.peak:.0f} MiB" if figure and figure.peak else _duration(figure)


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def between(text: str, name: str, generated: str) -> str:
    """``text`` with this between the markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"README.md has no markers for {name}: {begin.strip()}, {end}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{generated}{end}{after}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    text = between(text, "configuration", config.table() + "\n")
    README.write_text(between(text, "benchmarks", benchmarks()), encoding="utf-8")
