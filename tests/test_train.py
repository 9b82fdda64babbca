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
from types import SimpleNamespace

import pytest
import torch
from conftest import HANGS, ROOT, TRAIN, python, run

from deepfast.train import report as run_files

SEED = json.loads((ROOT / "examples" / "config.json").read_text())
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Small enough that most of a run is starting it.
SMALL = {
    "train_batch_size": 4,
    "train_micro_batch_size": 2,
    "train_sequence_length": 32,
    "fp16": True,
    "num_train_steps": 8,
    "num_warmup_steps": 2,
    "model_dir": "tiny",
    "dataset_dir": "text",
    "save_steps": 3,
    "sample_tokens": 8,
}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with text, and a one-layer GPT-2 with dropout."""
    return furnished(tmp_path)


def furnished(place: Path) -> Path:
    (place / "text").mkdir()
    for name in ("argparse", "ast", "typing", "inspect"):
        shutil.copy(Path(os.__file__).parent / f"{name}.py", place / "text")
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 320, "n_positions": 64}
    (place / "tiny").mkdir()
    (place / "tiny" / "config.json").write_text(json.dumps(shape))
    configure(place)
    return place


def configure(place: Path, **changes) -> None:
    config = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    (place / "config.json").write_text(json.dumps(config))


def train(place: Path, *options: object, launch: tuple = (sys.executable,), **env: str):
    env = {"OMP_NUM_THREADS": "1", **env}
    return run(*launch, TRAIN, "--config", "config.json", *options, cwd=place, env=env)


def metrics(place: Path, output: str = "output") -> list[dict]:
    lines = (place / output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def losses(place: Path, output: str = "output") -> list[float]:
    rows = metrics(place, output)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_the_seeds_config_trains(place):
    """All eleven keys as they are; fewer steps, so that it ends."""
    shutil.move(place / "text", place / "gpt-2")
    (place / "config.json").write_text(json.dumps(SEED))
    done = train(place, "--set", "num_train_steps=3", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    rows = metrics(place)
    assert [set(row) for row in rows] == [
        {"step", "loss", "lr", "loss_scale", "grad_norm", "tokens_per_s", "skipped"}
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
    assert [{**row, "tokens_per_s": 0} for row in metrics(place)] == [{**row, "tokens_per_s": 0} for row in whole]
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


@pytest.mark.parametrize("changes", [{"num_train_steps": 4}, {"num_train_steps": 4, "fp16": None}])
def test_two_ranks_train_the_same_global_batch(place, changes):
    shape = json.loads((place / "tiny" / "config.json").read_text())
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, **off}))
    common = {**changes, "gradient_accumulation_steps": 2}
    configure(place, **common, output_dir="one")
    assert train(place).returncode == 0
    configure(place, **common, output_dir="two")
    done = train(place, launch=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "gradient_accumulation_steps=2 over 2 ranks: 1 each" in done.stdout
    assert losses(place, "two") == pytest.approx(losses(place, "one"), rel=1e-5)
    norms = [[row["grad_norm"] for row in metrics(place, name)] for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    # Resumed with another number of ranks.
    configure(place, **{**common, "num_train_steps": 6}, output_dir="two")
    done = train(place, "--resume")
    assert done.returncode == 0, done.stderr
    assert "written by 2 rank(s), read by 1" in done.stdout
    assert len(losses(place, "two")) == 6


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
              gradient_clipping=0.0)  # fmt: skip
    done = train(place)
    assert done.returncode == 0, done.stderr
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


# Bad input: exit 2, one line.


def says_one_line(done) -> str:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ds_train.py: ")
    return lines[0]


QUICK = [
    # (what is done to the folder or the config, options, what the line says); nothing heavy is imported for these
    ("config.json", lambda p: (p / "config.json").unlink(), [], "config.json: no such file"),
    ("json", lambda p: (p / "config.json").write_text('{"a": 1,\n  oops}'), [], "not JSON: line 2, column 3"),
    ("unknown", lambda p: configure(p, train_batchsize=3), [], "did you mean 'train_batch_size'?"),
    ("type", lambda p: configure(p, num_train_steps="ten"), [], 'num_train_steps="ten": it must be an integer'),
    ("zero", lambda p: configure(p, train_batch_size=0), [], "train_batch_size=0: it must be greater than 0"),
    ("negative", lambda p: configure(p, num_warmup_steps=-1), [], "num_warmup_steps=-1"),
    ("triple", lambda p: configure(p, gradient_accumulation_steps=3), [], "accumulation_steps 3 x ranks 1 = 6"),
    ("spellings", lambda p: configure(p, train_micro_batch_size_per_gpu=8), [], "micro_batch_size=2 contradicts"),
    ("output", lambda p: configure(p, output_dir="config.json/x"), [], "output_dir='config.json/x': cannot be written"),
    ("no checkpoint", lambda p: None, ["--resume"], "output/checkpoints holds no checkpoint"),
    ("no such option", lambda p: None, ["--resum", "--x"], "unrecognized arguments: --x"),
    ("set", lambda p: None, ["--set", "x"], "--set x: KEY=VALUE was expected"),
    ("set deep", lambda p: None, ["--set", "fp16.loss_scal=2"], "'fp16.loss_scal': unknown key: did you mean"),
]  # fmt: skip


# Importing torch takes longer than all of these: one process does it, and forks another for each.
FORKS = """
import os, sys
from deepfast.train import main
for place, *options in map(str.split, sys.stdin):
    if child := os.fork():
        print(place, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(place)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(["--config", "config.json", *options]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[tuple[bool, str], SimpleNamespace]:
    said = {}
    for optimize in (False, True):
        places = {name: furnished(tmp_path_factory.mktemp("place")) for name, *_ in QUICK}
        for name, spoil, _, _ in QUICK:
            spoil(places[name])
        lines = "".join(f"{' '.join([str(places[name]), *options])}\n" for name, _, options, _ in QUICK)
        done = run(sys.executable, *(["-O"] if optimize else []), "-c", FORKS, input=lines)
        codes = dict(map(str.split, done.stdout.splitlines()))
        for name, path in places.items():
            said[optimize, name] = SimpleNamespace(
                returncode=int(codes[str(path)]), stdout="", stderr=(path / "stderr").read_text()
            )
    return said


@pytest.mark.xdist_group("refusals")
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("name", "message"), [(q[0], q[-1]) for q in QUICK], ids=[q[0] for q in QUICK])
def test_bad_configurations(refusals, name, message, optimize):
    assert message in says_one_line(refusals[optimize, name])


def test_a_missing_option():
    done = run(sys.executable, TRAIN)
    assert "--config" in says_one_line(done)


HEAVY = [
    ("no dataset", lambda p: configure(p, dataset_dir="nowhere"), "dataset_dir='nowhere': no such folder"),
    ("empty", lambda p: shutil.rmtree(p / "text") or (p / "text").mkdir(), "dataset_dir='text': no .txt"),
    ("no text", lambda p: [f.write_bytes(b"\xff\xfe") for f in (p / "text").iterdir()], "no readable text in its 4"),
    ("short", lambda p: [f.write_text("x") for f in (p / "text").iterdir()], "8 tokens are shorter than one sequence"),
    ("no gpt-2", lambda p: (p / "tiny" / "config.json").write_text('{"model_type": "bert"}'), "'bert', not 'gpt2'"),
    ("positions", lambda p: configure(p, train_sequence_length=65), "more than the 64 positions"),
    ("odd tokens", lambda p: [f.rename(f.with_suffix(".bin")).write_bytes(b"abc") for f in (p / "text").iterdir()],
     "3 bytes are not a whole number of uint16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), HEAVY, ids=[h[0] for h in HEAVY])
def test_bad_data_and_models_take_nothing_away(place, name, spoil, message):
    """A typo must not cost the run that is there."""
    kept = place / "output" / "checkpoints" / "step3"
    kept.mkdir(parents=True)
    spoil(place)
    assert message in says_one_line(train(place))
    assert kept.is_dir()


def test_damaged_checkpoints(place):
    assert train(place).returncode == 0
    path = place / "output" / "checkpoints" / "step8" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = says_one_line(train(place, "--resume"))
    assert "step8/optimizer.safetensors is damaged" in line
    assert "'step6' is intact: resume from that one" in line
    assert "there are: step8, step6" in says_one_line(train(place, "--resume", "step7"))
    done = train(place, "--resume", "step6")
    assert done.returncode == 0, done.stderr
    assert len(losses(place)) == 8


def test_a_full_disk_is_one_line(place):
    """/dev/full stands for it: the checkpoint's first file cannot be written."""
    code = (
        "import sys, deepfast.engine.checkpoint as c, deepfast.train as t\n"
        "def full(path, data): raise OSError(28, 'No space left on device', str(path))\n"
        "c.write_json = full\n"
        "sys.exit(t.main(['--config', 'config.json', '--set', 'num_train_steps=3']))"
    )
    done = run(sys.executable, "-c", code, cwd=place)
    assert done.returncode == 2
    assert "step3: cannot be written: No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_too_little_memory_is_one_line(place):
    tiny = json.loads((place / "tiny" / "config.json").read_text())
    (place / "tiny" / "config.json").write_text(json.dumps({**tiny, "n_positions": 10**9}))
    assert "not enough memory" in says_one_line(train(place))


def test_an_unknown_backend_is_one_line(place):
    assert "unknown backend 'tpu'" in says_one_line(train(place, DEEPFAST_BACKEND="tpu"))


def test_errors_of_one_rank_are_seen(place):
    configure(place, dataset_dir="nowhere")
    done = train(place, launch=TORCHRUN)
    assert done.returncode != 0
    assert "ds_train.py: dataset_dir='nowhere': no such folder" in done.stderr


def test_a_missing_extra_is_named(place):
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'tokenizers' else find(name, *a)\n"
        "from deepfast.train import main; sys.exit(main(['--config', 'config.json']))"
    )
    done = run(sys.executable, "-c", code, cwd=place)
    assert says_one_line(done) == "ds_train.py: tokenizers not installed: pip install 'deepfast[train]'"


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
