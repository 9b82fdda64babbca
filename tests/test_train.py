"""The command line, end to end: small models, real processes."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HANGS, ROOT, TRAIN, python
from runs import TORCHRUN, configure, losses, metrics, train
from safetensors import safe_open

from deepfast.train import report as run_files

SEED = json.loads((ROOT / "examples" / "config.json").read_text())


def test_the_seeds_config_trains(place):
    """All eleven keys as they are; fewer steps, so that it ends."""
    shutil.move(place / "text", place / "gpt-2")
    (place / "config.json").write_text(json.dumps(SEED))
    done = train(place, "--set", "num_train_steps=3", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    rows = metrics(place)
    assert [set(row) for row in rows] == [
        {"step", "loss", "lr", "loss_scale", "grad_norm", "tokens_per_s", "skipped", "memory_mib"}
    ] * 3
    assert all(row["loss_scale"] == 0.5 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx([5e-7, 1e-6, 1.5e-6])
    assert rows[0]["loss"] == pytest.approx(6.93, abs=0.1)
    assert "model_dir='model' does not exist: a fresh gpt2-tiny is trained" in done.stdout
    assert "weights and gradients are fp16, forward and backward compute in fp32" in done.stdout
    assert "batch 32 = micro 8 x accumulation 4 x ranks 1" in done.stdout
    config = json.loads((place / "output" / "model" / "config.json").read_text())
    assert config["n_positions"] >= 512


def test_what_a_run_leaves(place):
    done = train(place)
    assert done.returncode == 0, done.stderr
    output = place / "output"
    assert sum(losses(place)[-3:]) < sum(losses(place)[:3]), "it learns"
    assert "--- a sample ---" in done.stdout
    assert "tensorboard --logdir output/tensorboard" in done.stdout
    assert "output/loss.png" in done.stdout
    first, last = done.stderr.splitlines()  # far fewer than steps, and nothing else: no library warns
    assert re.match(r"step 1/8 \[.*, loss \d.*loss scale 65536\]$", first)
    assert re.match(r"step 8/8 \[.*<00:00, .*step.*loss scale 65536\]$", last)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events.*"))
    assert (output / "checkpoints" / "latest").read_text().strip() == "step8"
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["latest", "step6", "step8"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(place))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert model.dtype == torch.float16
    text = "def main():\n    return 'ü'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == 320

    # Again without --resume: nothing is lost.
    first = losses(place)
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert losses(place / "output" / "earlier", "1") == first == losses(place)
    # The result as a start: weights and tokenizer are taken from it.
    configure(place, model_dir="output/model", output_dir="tuned")
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert losses(place, "tuned")[0] < first[2]
    assert (place / "tuned/model/tokenizer.json").read_bytes() == (output / "model/tokenizer.json").read_bytes()
    # Also where the run it comes from is the one that is moved out of the way.
    configure(place, model_dir="output/model")
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert losses(place)[0] < first[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_fills_a_line_of_a_terminal_and_a_few_of_a_file(monkeypatch, terminal):
    clock, written = itertools.count(0, 0.25), io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = run_files.Progress(100, 1100)
    for step in range(100, 1100):
        progress.step(f"loss {step}")
    progress.close()
    if terminal:
        assert "\r" in written.getvalue()
        assert "1100/1100" in written.getvalue()
        return
    lines = written.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/1100" for n in (*range(101, 1101, 40), 1100)]
    assert lines[-1] == "step 1100/1100 [04:10<00:00,  4.00step/s, loss 1099]"


@pytest.mark.parametrize("changes", [{}, {"fp16": False, "bf16": True, "train_micro_batch_size": 4}])
def test_resuming_gives_the_very_same_losses(place, changes):
    """Dropout, accumulation, mid-epoch and over an epoch's end."""
    text = place / "text"
    for path in text.iterdir():
        path.write_text(path.read_text()[:2500])
    configure(place, **changes, num_train_steps=60, save_steps=20, output_dir="whole")
    assert train(place).returncode == 0
    whole = metrics(place, "whole")
    configure(place, **changes, num_train_steps=60, save_steps=20)
    process = start(place)
    wait_for_step(place, 25, process)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    reached = len(metrics(place))
    assert f"interrupted and saved after step {reached}" in out
    assert 25 <= reached < 60
    done = train(place, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resumed from output/checkpoints/step{reached}" in done.stdout
    of_a_machine = {"tokens_per_s": 0, "memory_mib": 0}
    assert [{**row, **of_a_machine} for row in metrics(place)] == [{**row, **of_a_machine} for row in whole]
    a, b = (place / name / "model" / "model.safetensors" for name in ("whole", "output"))
    assert a.read_bytes() == b.read_bytes()


def start(place: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TRAIN), "--config", "config.json", *options],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(place: Path, step: int, process: subprocess.Popen[str]) -> None:
    path = place / "output" / "metrics.jsonl"
    deadline = time.monotonic() + HANGS
    while not path.exists() or path.read_text().count("\n") < step:
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it never got to step {step}: {process.communicate()}")
        time.sleep(0.02)


def test_kill_9_at_any_moment(place):
    configure(place, num_train_steps=150, save_steps=2, output_dir="whole")
    assert train(place).returncode == 0
    configure(place, num_train_steps=150, save_steps=2)
    dice = random.Random(7)
    process = start(place)
    for kill in range(5):
        wait_for_step(place, 4 + 20 * kill, process)
        time.sleep(dice.random() * 0.3)  # a step with its checkpoint takes about 0.1 s
        process.kill()
        process.wait()
        process = start(place, "--resume")
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert losses(place) == losses(place, "whole")


WRITING = """
import io, signal, sys
from deepfast.train import Stop

class Interrupted(io.RawIOBase):
    def writable(self): return True
    def write(self, data):
        if not stop.signal: signal.raise_signal(signal.SIGTERM)
        return len(data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Interrupted()), write_through=True)
with Stop() as stop:
    print("a line of progress", file=sys.stderr, flush=True)
sys.exit(stop.exit_code)
"""


def test_a_signal_in_the_middle_of_a_line():
    done = python(WRITING)
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopping after this step" in done.stderr


def test_sigterm_saves_and_a_second_signal_is_final(place):
    configure(place, num_train_steps=10_000, save_steps=10_000)
    process = start(place)
    wait_for_step(place, 3, process)
    process.terminate()
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "stopping after this step, with a checkpoint" in err
    assert (place / "output" / "checkpoints" / "latest").exists()
    shutil.rmtree(place / "output")
    # Steps long enough for a second signal to come within one.
    configure(place, num_train_steps=10, train_batch_size=20_000, train_micro_batch_size=20)
    process = start(place)
    deadline = time.monotonic() + HANGS
    while not (place / "output" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    assert "stopped at once by a second signal" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "changes", [{}, {"fp16": None}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}}]
)
def test_two_ranks_train_the_same_global_batch(place, changes):
    shape = json.loads((place / "tiny" / "config.json").read_text())
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, **off}))
    common = {**changes, "num_train_steps": 4, "gradient_accumulation_steps": 2}
    configure(place, **common, output_dir="one")
    assert train(place).returncode == 0
    configure(place, **common, output_dir="two")
    done = train(place, launch=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "gradient_accumulation_steps=2 over 2 ranks: 1 each" in done.stdout
    sharded = re.search(r"ZeRO stage [23] over 2 ranks: .* of 0\.\d+M parameters", done.stdout)
    assert (sharded is not None) == ("zero_optimization" in changes), done.stdout
    one, two = (np.array([[row["loss"], row["grad_norm"]] for row in metrics(place, n)]) for n in ("one", "two"))
    in_parts = changes.get("zero_optimization") == {"stage": 3}  # whose norm is added up in another order
    assert np.allclose(one, two, rtol=1e-4, atol=0) if in_parts else (one == two).all()
    with safe_open(place / "two" / "model" / "model.safetensors", "pt") as model:
        dtypes = {model.get_tensor(name).dtype for name in model.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32 if "fp16" in changes else torch.float16}
    # Resumed with another number of ranks.
    configure(place, **{**common, "num_train_steps": 6}, output_dir="two")
    done = train(place, "--resume")
    assert done.returncode == 0, done.stderr
    assert "written by 2 rank(s), read by 1" in done.stdout
    assert len(losses(place, "two")) == 6


def test_four_ranks_with_parts_of_the_weights_then_two(place):
    """Overflows, clipping and a resumption at stage 3, beside one process: its skips and scales, its losses to the
    rounding of fp16 weights."""
    shape = json.loads((place / "tiny" / "config.json").read_text())
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, "n_layer": 2, **off}))
    common = {
        "train_batch_size": 8,
        "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 3},
        "gradient_clipping": 0.5,
        "num_train_steps": 10,
        "save_steps": 5,
    }
    parts = {"stage": 3, "stage3_param_persistence_threshold": 0}
    configure(place, **common, output_dir="one")
    assert train(place).returncode == 0
    configure(place, **common, output_dir="parts", zero_optimization=parts)
    done = train(place, launch=(*TORCHRUN[:-1], "4"))
    assert done.returncode == 0, done.stderr
    assert "on each, in 3 unit(s)" in done.stdout
    shutil.rmtree(place / "parts" / "checkpoints" / "step10")
    (place / "parts" / "checkpoints" / "latest").write_text("step5")
    done = train(place, "--resume", launch=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "written by 4 rank(s), read by 2" in done.stdout
    one, others = (metrics(place, name) for name in ("one", "parts"))
    for name in ("step", "skipped", "loss_scale", "lr"):
        assert [row[name] for row in others] == [row[name] for row in one], name
    assert one[-1]["skipped"] >= 2
    for name in ("loss", "grad_norm"):
        found, expected = ([row[name] for row in rows if row[name] is not None] for rows in (others, one))
        assert np.allclose(found, expected, rtol=1e-3, atol=0), name


def test_resuming_with_another_configuration(place):
    assert train(place).returncode == 0
    first = losses(place)
    tokenizer = (place / "output" / "model" / "tokenizer.json").read_bytes()
    # A longer run, other text: the model's tokenizer stays, and what has changed is said.
    shutil.copytree(place / "text", place / "more")
    (place / "more" / "x.txt").write_text("another text\n" * 1000)
    configure(place, num_train_steps=10, dataset_dir="more")
    done = train(place, "--resume")
    assert done.returncode == 0, done.stderr
    assert "dataset_dir is now more, it was text" in done.stdout
    assert (place / "output" / "model" / "tokenizer.json").read_bytes() == tokenizer
    assert losses(place)[:8] == first
    assert losses(place)[9] < first[0]
    # From an earlier checkpoint, by its name: what came after it is gone.
    done = train(place, "--resume", "step9", "--set", "num_train_steps=9")
    assert done.returncode == 0, done.stderr
    assert len(losses(place)) == 9


def test_runs_that_diverge_or_overflow_end_well(place):
    configure(place, fp16=None, num_train_steps=4, num_warmup_steps=None, optimizer={"params": {"lr": 1e6}},
              gradient_clipping=0.0, eval_share=0.01, eval_steps=1)  # fmt: skip
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert [metrics(place)[-1][key] for key in ("loss", "eval_loss", "eval_perplexity")] == [None] * 3
    assert "validation: " not in done.stdout, "nothing to say"
    configure(place, fp16={"enabled": True, "initial_scale_power": 24, "hysteresis": 1}, num_train_steps=12)
    done = train(place)
    assert done.returncode == 0, done.stderr
    rows = metrics(place)
    assert rows[0]["skipped"] == 1
    assert rows[0]["grad_norm"] is None
    assert rows[-1]["skipped"] < 12
    assert rows[0]["loss_scale"] == 2**23
    skipped = sum(row["grad_norm"] is None for row in rows)
    assert rows[-1]["skipped"] == skipped
    clean = list(itertools.accumulate((row["grad_norm"] is not None for row in rows[:-1]), initial=0))
    lrs = {count: row["lr"] for count, row in zip(clean, rows, strict=True)}  # one for each number of steps made
    assert [row["lr"] for row in rows] == [lrs[count] for count in clean], "the schedule waits"
    assert len(set(lrs.values())) > 1


def test_token_files_train_without_a_tokenizer(place):
    import numpy as np

    (place / "tokens").mkdir()
    np.random.default_rng(0).integers(0, 320, 5000).astype(np.uint16).tofile(place / "tokens" / "a.bin")
    configure(place, dataset_dir="tokens")
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert not (place / "output" / "model" / "tokenizer.json").exists()


def test_fp16_products_are_computed_in_fp32():
    """torch's fp16 matrix product can be hundreds of times slower on a CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import deepfast

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ("mm", "linear", "attention", "matmul")):
                products.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    from deepfast.train import gpt2

    products: set[torch.dtype] = set()
    module = gpt2.model(gpt2.configuration("gpt2-tiny", 16)[0], None)
    config = {"train_batch_size": 2, "fp16": True, "optimizer": {"params": {"lr": 0.1}}}
    engine, *_ = deepfast.initialize(model=module, config=config)
    ids = torch.randint(0, 1024, (2, 16))
    with Seen():
        engine.backward(engine(input_ids=ids, labels=ids).loss)
    assert products == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {p.grad.dtype for p in module.parameters()} == {torch.float16}
