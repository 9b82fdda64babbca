"""What a run shows of itself while it trains: its loss on what it does not train on, samples, pictures, its end."""

from __future__ import annotations

import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from runs import SMALL, TORCHRUN, configure, losses, metrics, train

from deepfast.engine import config
from deepfast.errors import ConfigError, UserError
from deepfast.train import data, gpt2, validation
from deepfast.train.defaults import trainer_defaults
from deepfast.train.prepare import held_out, prepare_data
from deepfast.train.run import Run

MEASURED = ("eval_loss", "eval_perplexity")


def without(rows: list[dict], *keys: str) -> list[dict]:
    """Rows as any machine writes them, and without these."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_mib", *keys)} for row in rows]


def test_validation_and_samples_leave_training_alone(place):
    """Under dropout, accumulation, fp16: every number of the run is the same to the last bit, and so is the model."""
    (place / "held").mkdir()
    (place / "text" / "typing.py").rename(place / "held" / "typing.py")
    configure(place, output_dir="plain")
    assert train(place).returncode == 0
    configure(
        place, eval_dataset_dir="held", eval_steps=3, eval_sequences=31, sample_steps=2, sample_prompt="def main(",
        csv_monitor={"enabled": True, "output_path": "csv", "job_name": "job"},
    )  # fmt: skip
    done = train(place)
    assert done.returncode == 0, done.stderr
    output, rows = place / "output", metrics(place)
    assert without(rows, *MEASURED) == without(metrics(place, "plain"))
    model = "model/model.safetensors"
    assert (output / model).read_bytes() == (place / "plain" / model).read_bytes()

    # Said where one looks.
    assert "validated on 31 sequences every 3 steps, and at the end" in done.stdout
    found = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(found) == [3, 6, 8]
    assert all(
        row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in rows if row["step"] in found
    )
    assert (
        f"validation: loss {found[8]:.4f} (perplexity {math.exp(found[8]):.4g}) after step 8, the best" in done.stdout
    )
    assert re.search(rf"step 8/8 .*validation {found[8]:.3f} \(perplexity {math.exp(found[8]):.4g}\)", done.stderr)
    written = (place / "csv" / "job" / "Train_Samples_eval_loss.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[1]) for line in written] == pytest.approx(list(found.values()), rel=1e-4)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [2, 4, 6, 8]
    assert all(row["text"].startswith("def main(") and len(row["text"]) > 9 for row in samples)
    assert f"a sample after step 8:\n{samples[-1]['text']}" in done.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("eval_loss")} == pytest.approx(found)
    assert [e.step for e in events.Scalars("eval_perplexity")] == [3, 6, 8]
    assert [e.step for e in events.Tensors("sample/text_summary")] == [2, 4, 6, 8]

    # The last figure is that of the model that is there.
    module = gpt2.model(*gpt2.configuration(str(output / "model"), 32)).eval()
    held = data.Held.all_of(output / "eval_data", 32)
    with torch.no_grad():
        ids = held.at_most(31).batch(0, 31)
        assert found[8] == pytest.approx(float(module(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert held.count > 100

    # Resumed, all of it goes on: the best is the best of the whole run.
    lines = (output / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "eval_loss": 0.5})
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    done = train(place, "--resume", "step6")
    assert done.returncode == 0, done.stderr
    assert without(metrics(place))[3:] == without(rows)[3:]
    assert re.search(r"validation: loss 5\.\d+ .* after step 8; the best: loss 0\.5000 .* after step 3", done.stdout)
    assert [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()] == samples
    assert "read anew" not in done.stdout


def test_ranks_validate_together(place):
    """On a part of the data, with parts of the weights, and with a last batch that is not for all: the same figure."""
    shape = json.loads((place / "tiny" / "config.json").read_text())
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, **off}))
    common = {"eval_share": 0.1, "eval_steps": 2, "eval_sequences": 9, "num_train_steps": 4, "fp16": False}
    configure(place, **common, output_dir="one")
    assert train(place).returncode == 0
    parts = {"stage": 3, "stage3_param_persistence_threshold": 0}
    configure(place, **common, output_dir="two", zero_optimization=parts, sample_steps=2)
    done = train(place, launch=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "validated on 9 sequences" in done.stdout
    one, two = (metrics(place, name) for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    found, expected = ([row["eval_loss"] for row in rows[1::2]] for rows in (two, one))
    assert found == pytest.approx(expected, rel=1e-5)
    samples = [json.loads(line) for line in (place / "two" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [2, 4]
    assert samples[0]["text"] != samples[1]["text"]


class Engine(torch.nn.Module):
    """One of several ranks, played: its loss is the mean of what it is given."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world_size, self.device = rank, world, torch.device("cpu")
        self.calls: list[int] = []

    def train_micro_batch_size_per_gpu(self) -> int:
        return 4

    def forward(self, input_ids, labels, **_):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert labels is input_ids
        self.calls.append(len(input_ids))
        return SimpleNamespace(loss=input_ids.float().mean())


@pytest.mark.parametrize(("count", "world"), [(1, 1), (11, 1), (1, 3), (12, 3), (17, 3), (25, 3)])
def test_every_sequence_counts_once(monkeypatch, count, world):
    tokens = np.random.default_rng(0).integers(0, 99, 5 * count)
    held, shares = data.Held(tokens, 5, np.arange(count)), []
    monkeypatch.setattr(validation.dist, "all_reduce", lambda total: shares.append(float(total)))
    engines = [Engine(rank, world) for rank in range(world)]
    found = [validation.mean_loss(engine, held) for engine in engines]
    mean = sum(shares) / count if world > 1 else found[0]
    assert mean == pytest.approx(tokens.mean())
    assert len({len(engine.calls) for engine in engines}) == 1, "all run equally many forward passes"
    assert all(engine.training for engine in engines)


def test_a_perplexity_that_is_no_number():
    assert validation.perplexity(2.0) == pytest.approx(math.exp(2))
    assert validation.perplexity(1e4) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_sequences": 9},
            "eval_sequences is set, and nothing to validate on: set eval_share or eval_dataset_dir",
        ),
        ({"eval_share": 1.5}, r"eval_share=1\.5: it must be less than 1"),
        ({"eval_share": 0}, "eval_share=0: it must be greater than 0"),
        ({"eval_share": 0.1, "eval_dataset_dir": "tiny"}, "eval_dataset_dir and eval_share are both set: keep one"),
        ({"eval_dataset_dir": "text/../text/x"}, "one is in the other, and would be trained on"),
        ({"eval_dataset_dir": "."}, "one is in the other, and would be trained on"),
        ({"eval_dataset_dir": "a\0"}, "eval_dataset_dir: holds a NUL character"),
        ({"streaming": True, "eval_share": 0.1}, "streaming reads no more than it needs: set eval_dataset_dir"),
        ({"sample_steps": 5, "sample_tokens": 0}, "sample_steps is set, and sample_tokens=0"),
        ({"eval_step": 5}, "'eval_step': unknown key: did you mean 'eval_steps'?"),
    ],
)
def test_keys_that_do_not_go_together(place, monkeypatch, changes, message):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as raised:
        trainer_defaults(config.load({**SMALL, **changes}))
    assert len(str(raised.value)) < 200


def test_it_is_validated_as_often_as_saved():
    assert trainer_defaults(config.load({**SMALL, "eval_share": 0.1})).eval_steps == SMALL["save_steps"]
    assert trainer_defaults(config.load(SMALL)).eval_steps is None


def token_file(folder, count: int = 5000) -> None:
    folder.mkdir()
    np.random.default_rng(0).integers(0, 300, count).astype(np.uint16).tofile(folder / "a.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset_dir": "few"}, r"eval_dataset_dir='few': 9 tokens are shorter than one sequence"),
        ({"eval_dataset_dir": "empty"}, r"eval_dataset_dir='empty': no \.txt"),
        ({"dataset_dir": "tokens", "eval_dataset_dir": "text"}, "what is trained on are tokens without a tokenizer"),
        ({"dataset_dir": "few", "train_sequence_length": 8, "eval_share": 0.5}, "of 1 sequences it leaves none to tr"),
        ({"dataset_dir": "tokens", "sample_prompt": "x"}, "sample_prompt: token files come without a tokenizer"),
        ({"streaming": True, "dataset_dir": "empty"}, "dataset_dir='empty': no "),
    ],
)
def test_bad_validation_takes_nothing_away(place, monkeypatch, changes, message):
    """The run that is there stays until all of the new one's input is known to be good."""
    monkeypatch.chdir(place)
    token_file(place / "tokens")
    token_file(place / "few", 9)
    (place / "empty").mkdir()
    (place / "output" / "checkpoints").mkdir(parents=True)
    settings = config.load({**SMALL, **changes})
    shape, folder = gpt2.configuration("tiny", 8)
    with pytest.raises(UserError, match=message):
        prepare_data(settings, Run("output"), shape, folder, False)
    assert [path.name for path in (place / "output").iterdir() if not path.name.startswith(".")] == ["checkpoints"]


def test_what_is_tokenized_is_of_this_run(place, monkeypatch):
    """Tokens that another run's tokenizer made are gone, also where this one needs none."""
    monkeypatch.chdir(place)
    shape, folder = gpt2.configuration("tiny", 32)
    (place / "text" / "typing.py").rename(place / "tiny" / "typing.py")
    run, before = Run("output"), config.load({**SMALL, "eval_dataset_dir": "tiny"})
    _, sequences = prepare_data(before, run, shape, folder, False)
    assert held_out(before, run, sequences).count > 100
    after = config.load({**SMALL, "streaming": True})
    _, stream = prepare_data(after, run, shape, folder, False)
    stream.close()
    assert not run.data.exists()
    assert not run.eval_data.exists()
    # Resumed with another validation: only that is read.
    prepare_data(before, run, shape, folder, False)
    times = (run.data / "tokens.bin").stat().st_mtime_ns, (run.eval_data / "tokens.bin").stat().st_mtime_ns
    (place / "other").mkdir()
    (place / "other" / "a.txt").write_text("some other words\n" * 500)
    other = config.load({**SMALL, "eval_dataset_dir": "other"})
    _, sequences = prepare_data(other, run, shape, folder, True)
    assert (run.data / "tokens.bin").stat().st_mtime_ns == times[0]
    assert (run.eval_data / "tokens.bin").stat().st_mtime_ns > times[1]
    assert held_out(other, run, sequences).chosen.max() < 300


def test_an_engine_leaves_the_trainers_keys_alone():
    import deepfast

    settings = {"train_batch_size": 2, "eval_steps": 3, "sample_steps": 1, "sample_tokens": 0, "streaming": True}
    engine, *_ = deepfast.initialize(model=torch.nn.Linear(2, 2), config={**settings, "eval_share": 0.5})
    assert engine.config["eval_share"] == 0.5


WHILE_IT_RUNS = """
import os, sys
from deepfast import train
from deepfast.train import forecast, plot, report
plot.Curves.PAUSE = plot.Curves.AFTER_CHECKPOINT = plot.Curves.SHARE = 0
forecast.Forecast.WORTH = forecast.Forecast.SECONDS = 0
pictures, step, draw = [], report.Reporter.step, plot._draw
def looked(self, *args):
    step(self, *args)
    pictures.append(self.run.plot.exists() and self.run.plot.read_bytes())
def until_the_disk_is_full(columns, path):
    if len(columns["step"]) > 5: raise OSError(28, "No space left on device")
    draw(columns, path)
report.Reporter.step, plot._draw = looked, until_the_disk_is_full
code = train.main(["--config", "config.json"])
print([picture and picture[-8:] == b"IEND\\xaeB`\\x82" for picture in pictures], len(set(pictures)))
sys.exit(code)
"""


def test_a_picture_and_a_forecast_while_it_runs(place):
    """Pictures from the first step on, as long as there is room; then the last one, and the run goes on."""
    configure(place, save_steps=100)
    done = run(sys.executable, "-c", WHILE_IT_RUNS, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{[False, *[True] * 7]} 6"
    assert not list((place / "output").glob(".*"))
    assert done.stdout.count("output/loss.png cannot be drawn: No space left on device; training goes on") == 1
    assert len(losses(place)) == 8
    (line,) = [line for line in done.stdout.splitlines() if " to go (" in line]
    assert re.search(r": about .* to go \(6 steps of 128 tokens at [\d,]+ tokens/s.*\), until \d\d:\d\d$", line)
