"""What storage forms do to training: GPT-2 tiny on the standard library's source, from the same start, three seeds.

    python benchmarks/quality.py [--steps 400] [--seeds 3] [--out benchmarks/results]     (make bench-quality)

Writes OUT/quality.json, which keeps what is known after each run and goes on from there, and OUT/quality.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from tqdm import tqdm

import deepfast
from deepfast.train import data, gpt2

mpl.use("Agg")
from matplotlib import pyplot as plt

LENGTH, BATCH, HELD_OUT, EVERY = 64, 16, 256, 40
REFERENCE = "fp32"
# The type of weights and gradients, and what is asked of AdamW.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("fp32", {}),
    "bf16, split master": ("bf16", {"master": "split"}),
    "fp16, split master": ("fp16", {"master": "split"}),
    "bf16, split master, bf16 moments": ("bf16", {"master": "split", "state_dtype": "bf16"}),
    "bf16, split master, int8 moments": ("bf16", {"master": "split", "state_dtype": "int8"}),
    "bf16, no master, stochastic rounding": ("bf16", {"master": "none", "rounding": "stochastic"}),
    "bf16, no master": ("bf16", {"master": "none"}),
}


def prepared(folder: Path) -> None:
    """The standard library's source as tokens."""
    shape = gpt2.SHAPES["gpt2-tiny"]
    _, files = data.source_files("stdlib")
    tokenizer = data.train_tokenizer(files, shape["vocab_size"])
    data.prepare("stdlib", files, folder, tokenizer, shape["vocab_size"], shape["eos_token_id"])


def validation_loss(module: torch.nn.Module, sequences: data.Sequences) -> float:
    """Of the weights as they are, computed in fp32."""
    wide = {name: t.float() for name, t in module.named_parameters()}
    total = 0.0
    with torch.no_grad():
        for start in range(sequences.count - HELD_OUT, sequences.count, 64):
            ids = sequences.batch(start, 64)
            total += torch.func.functional_call(module, wide, kwargs={"input_ids": ids, "labels": ids}).loss.item()
    return total / (HELD_OUT // 64)


def trained(form: str, seed: int, steps: int, folder: Path, rate: float) -> dict[str, list[float]]:
    """[validation losses], one every so many steps."""
    dtype, options = FORMS[form]
    torch.manual_seed(seed)
    module = gpt2.model(gpt2.configuration("gpt2-tiny", LENGTH)[0], None)
    sequences = data.Sequences(folder, LENGTH, seed)
    if sequences.count < steps * BATCH + HELD_OUT:
        raise SystemExit(f"quality: {sequences.count} sequences are too few for {steps} steps")
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": steps, "warmup_num_steps": steps // 10}},
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
    }
    groups = gpt2.parameter_groups(module, 0.1)
    optimizer = deepfast.AdamW(groups, lr=rate, betas=(0.9, 0.95), **options)
    engine, *_ = deepfast.initialize(model=module, optimizer=optimizer, config=config)
    losses = []
    for step in tqdm(range(steps), desc=f"{form}, seed {seed}", leave=False):
        ids = sequences.batch(step * BATCH, BATCH)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if (step + 1) % EVERY == 0:
            losses.append(validation_loss(module, sequences))
    return {"validation": losses}


def losses(known: dict[str, Any], form: str) -> torch.Tensor:
    """[seeds, validations]"""
    return torch.tensor([run["validation"] for run in known["runs"][form].values()], dtype=torch.float64)


def plotted(known: dict[str, Any]) -> plt.Figure:
    """How far each form's validation loss is from that of fp32: the seeds' mean, and the range that they span."""
    fig, (whole, near) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    exact = losses(known, REFERENCE)
    steps = [known["about"]["every"] * (nth + 1) for nth in range(exact.shape[1])]
    for nth, form in enumerate(f for f in FORMS if f != REFERENCE and f in known["runs"]):
        off = 100 * (losses(known, form) / exact - 1)
        for ax in (whole, near):
            ax.plot(steps, off.mean(0), color=f"C{nth}", label=form, linewidth=1.2)
            ax.fill_between(steps, off.amin(0), off.amax(0), color=f"C{nth}", alpha=0.2, linewidth=0)
    for ax, title in ((whole, "all"), (near, "near fp32")):
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    near.set_ylim(-0.1, 0.1)
    whole.set_ylabel("validation loss, % above fp32's", fontsize=8)
    fig.legend(*whole.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    path = chosen.out / "quality.json"
    about = {"steps": chosen.steps, "lr": chosen.lr, "batch": BATCH, "length": LENGTH, "every": EVERY}
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("about") != about:
        known = {"about": about, "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        prepared(folder)
        for seed in range(chosen.seeds):
            for form in FORMS:
                runs = known["runs"].setdefault(form, {})
                if str(seed) not in runs:
                    runs[str(seed)] = trained(form, seed, chosen.steps, folder, chosen.lr)
                    path.write_text(json.dumps(known, indent=1) + "\n")
    plotted(known).savefig(chosen.out / "quality.png", dpi=160, metadata={"Software": None})
    for form in FORMS:
        print(f"{form:40} {losses(known, form)[:, -1].mean():.4f}")


if __name__ == "__main__":
    main()
