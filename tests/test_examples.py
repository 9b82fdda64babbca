"""examples/: each trains in each precision, and a run that was interrupted and resumed ends with the very same bits."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import deepfast

pytestmark = pytest.mark.xdist_group("frameworks")
EXAMPLES = ["hf_trainer", "accelerate_loop", "lightning_module"]
STEPS, EPOCHS = 30, 4  # of 16 steps, and of Lightning's 32: two and four checkpoints
# After how many steps a run is interrupted, skipped ones not counted: its last checkpoint is of its first epoch, or of
# a later one.
EARLY = {"hf_trainer": 15, "accelerate_loop": 15, "lightning_module": 40}
LEFT = {"hf_trainer": 20, "accelerate_loop": 20, "lightning_module": 96}  # steps after that checkpoint
LATE = {"hf_trainer": 25, "accelerate_loop": 25, "lightning_module": 100}
IN_FP16 = {"hf_trainer": 8, "accelerate_loop": 8, "lightning_module": 60}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """What the frameworks log; none of them asks the network; sums have one order, whoever runs the example."""
    for name, value in {"HF_HUB_OFFLINE": "1", "PL_GLOBAL_SEED": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("pytorch_lightning", "lightning_fabric", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=EXAMPLES)
def example(request) -> str:
    return request.param


@pytest.fixture
def as_on_a_gpu(example, monkeypatch):
    """fp16 is autocast with torch's GradScaler on the CPU, too; its scale is at first too large, and grows at once."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=4)

    if example == "lightning_module":
        from pytorch_lightning import Trainer
        from pytorch_lightning.plugins import MixedPrecision

        made, cls = Trainer.__init__, Trainer

        def make(self, *, precision, **kwargs):
            made(self, plugins=MixedPrecision(precision, "cpu", scaler()), **kwargs)
    else:
        from accelerate import Accelerator

        made, cls = Accelerator.__init__, Accelerator

        def make(self, *args, **kwargs):
            made(self, *args, **kwargs)
            assert self.mixed_precision == "fp16"
            self.native_amp, self.scaler = True, scaler()

    monkeypatch.setattr(cls, "__init__", make)


@functools.cache
def imported(example: str):
    spec = importlib.util.spec_from_file_location(example, ROOT / "examples" / f"{example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(example: str, precision: str, output: Path, *more: str) -> list[str]:
    length = ["--epochs", str(EPOCHS)] if example == "lightning_module" else ["--steps", str(STEPS)]
    return ["--precision", precision, "--output", str(output), *length, *more]


class InterruptionError(Exception):
    pass


def train(example: str, precision: str, output: Path, *more: str, interrupted: int | None = None) -> int:
    """Runs the example here and returns how many steps were made; after ``interrupted`` it is thrown out."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    made = 0

    def count(optimizer, *_):
        nonlocal made
        assert isinstance(optimizer, deepfast.AdamW)
        made += 1
        if made == interrupted:
            raise InterruptionError

    hook = register_optimizer_step_post_hook(count)
    try:
        imported(example).main(arguments(example, precision, output, *more))
    finally:
        hook.remove()
    return made


def weights(example: str, output: Path) -> dict[str, torch.Tensor]:
    if example == "lightning_module":
        return torch.load(output / "last.ckpt")["state_dict"]
    return load_file(output / "model.safetensors")


def same_bits(example: str, one: Path, other: Path) -> bool:
    ours, theirs = weights(example, one), weights(example, other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def losses(example: str, output: Path, printed: str) -> list[float]:
    if example == "hf_trainer":
        state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        return [row["loss"] for row in state["log_history"]]
    if example == "lightning_module":
        with (output / "metrics.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]
    return [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step ")]


def learns(example: str, output: Path, printed: str) -> bool:
    seen = losses(example, output, printed)
    assert len(seen) == (EPOCHS if example == "lightning_module" else STEPS // 10)
    return seen == sorted(seen, reverse=True) and seen[-1] < seen[0] - 0.5


def interrupt(example: str, precision: str, output: Path, after: dict[str, int]) -> None:
    with pytest.raises(InterruptionError):
        train(example, precision, output, interrupted=after[example])


def test_no_epoch_has_the_order_of_another(example, tmp_path):
    batches = set()
    shown = 0

    def look(module, inputs):
        nonlocal shown
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 256:  # of bytes, not of places
            batches.add(inputs[0].numpy().tobytes())
            shown += 1

    hook = register_module_forward_pre_hook(look)
    try:
        train(example, "fp32", tmp_path)
    finally:
        hook.remove()
    assert len(batches) == shown >= STEPS


def test_it_learns_and_resumes(example, tmp_path, capsys):
    train(example, "fp32", tmp_path / "unbroken")
    assert learns(example, tmp_path / "unbroken", capsys.readouterr().out)
    interrupt(example, "fp32", tmp_path / "resumed", EARLY)
    again = train(example, "fp32", tmp_path / "resumed", "--resume")
    assert again == LEFT[example]
    assert same_bits(example, tmp_path / "unbroken", tmp_path / "resumed")


def test_it_learns_in_bf16_and_another_process_resumes(example, tmp_path, capsys):
    """python examples/….py --resume, as it is typed."""
    train(example, "bf16", tmp_path / "unbroken")
    assert learns(example, tmp_path / "unbroken", capsys.readouterr().out)
    interrupt(example, "bf16", tmp_path / "resumed", LATE)
    command = arguments(example, "bf16", tmp_path / "resumed", "--resume")
    done = run(sys.executable, ROOT / "examples" / f"{example}.py", *command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert same_bits(example, tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_it_learns_and_resumes_in_fp16(example, tmp_path, capsys):
    """The checkpoint has the scale. Steps are skipped, and through those a schedule of Hugging Face's waits."""
    made = train(example, "fp16", tmp_path / "unbroken")
    assert learns(example, tmp_path / "unbroken", capsys.readouterr().out)
    interrupt(example, "fp16", tmp_path / "resumed", IN_FP16)
    assert 0 < train(example, "fp16", tmp_path / "resumed", "--resume") < made
    assert same_bits(example, tmp_path / "unbroken", tmp_path / "resumed")

    if example == "lightning_module":
        saved = torch.load(tmp_path / "unbroken" / "last.ckpt")
        optimizer, steps = saved["optimizer_states"][0], saved["global_step"]
    else:
        folder, optimizer, schedule = {
            "hf_trainer": (f"checkpoint-{STEPS}", "optimizer.pt", "scheduler.pt"),
            "accelerate_loop": (f"step{STEPS:06}", "optimizer.bin", "scheduler.bin"),
        }[example]
        optimizer = torch.load(tmp_path / "unbroken" / folder / optimizer)
        schedule = torch.load(tmp_path / "unbroken" / folder / schedule)
        assert schedule["last_epoch"] == optimizer["state"][0]["step"]
        steps = STEPS
    assert optimizer["state"][0]["step"] == made < steps


def test_fp16_on_a_cpu_is_what_the_example_says(example, tmp_path, capsys):
    """Without a GPU fp16 is fp32 (Hugging Face) or bf16 (Lightning), and there is a line about it."""
    really, other = ("bf16", "fp32") if example == "lightning_module" else ("fp32", "bf16")
    train(example, really, tmp_path / really)
    train(example, other, tmp_path / other)
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(example, "fp16", tmp_path / "fp16")
    said = capsys.readouterr().out + "".join(str(warning.message) for warning in warned)
    assert "CPU" in said
    assert really in said
    assert same_bits(example, tmp_path / really, tmp_path / "fp16")
    assert not same_bits(example, tmp_path / other, tmp_path / "fp16")
