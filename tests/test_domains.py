"""examples/ of any domain: each learns, and is beside its twin in plain torch but for the lines that a switch takes."""

from __future__ import annotations

import argparse
import difflib
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

pytestmark = pytest.mark.xdist_group("domains")
EXAMPLES = ROOT / "examples"
PLAIN = EXAMPLES / "plain_torch"

# All that is other in the twin: lines of the example, lines of the twin.
OTHER = {
    "risk_model": (
        """import deepfast

        optimizer = deepfast.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
        scaler = deepfast.LossScaler(device)""",
        """optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        scaler = torch.amp.GradScaler(device)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)""",
    ),
    "image_classifier": (
        """import deepfast

        model.to(device, torch.bfloat16)
        optimizer = deepfast.AdamW(model.parameters(), lr=3e-3)""",
        """model.to(device).forward = torch.autocast(device, torch.bfloat16)(model.forward)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)""",
    ),
    "translation": (
        """import deepfast

        optimizer = deepfast.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)""",
        """optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)""",
    ),
    "finetune_gpt2": (
        """import deepfast

        config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5 if args.model else 3e-3, "weight_decay": 0.01}},
        }
        model, *_ = deepfast.initialize(model=model, config=config)
        model.backward(loss)
        model.step()""",
        """optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5 if args.model else 3e-3, weight_decay=0.01)
        scaler = torch.amp.GradScaler(device)
        model.forward = torch.autocast(device, torch.float16)(model.forward)
        scaler.scale(loss / 2).backward()
        if micro_step % 2 == 1:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()""",
    ),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In another folder; sums have one order on any machine; no framework asks the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def play(monkeypatch, capsys):
    """Runs a script in this process and returns what it printed."""

    def play(script: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return play


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", printed, re.MULTILINE)]


def figure(name: str, printed: str) -> float:
    (value,) = re.findall(rf"{name} ([\d.]+)", printed)
    return float(value)


def stripped(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("name", OTHER)
def test_a_switch_takes_these_lines_alone(name):
    ours, plain = ((folder / f"{name}.py").read_text().splitlines() for folder in (EXAMPLES, PLAIN))
    lines = list(difflib.ndiff(ours, plain))
    assert stripped(line[2:] for line in lines if line.startswith("- ")) == stripped(OTHER[name][0].splitlines())
    assert stripped(line[2:] for line in lines if line.startswith("+ ")) == stripped(OTHER[name][1].splitlines())
    assert len(ours) <= 60


def test_every_example_has_its_twin():
    assert {path.stem for path in PLAIN.iterdir() if path.suffix == ".py"} == set(OTHER)
    assert not [path for path in PLAIN.glob("*.py") if "deepfast" in path.read_text()]


def test_risk_model(play, tmp_path):
    """In fp16, of which a last bit may fall either way: losses are one to a thousandth."""
    ours, plain = play(EXAMPLES / "risk_model.py"), play(PLAIN / "risk_model.py")
    assert losses(ours)[:3] == pytest.approx(losses(plain)[:3], rel=1e-4)
    assert losses(ours) == pytest.approx(losses(plain), rel=3e-3)
    for printed in (ours, plain):
        assert figure("AUC", printed) > 0.9  # chance: 0.5
        defaults, expected = map(float, re.findall(r"([\d.]+)%", printed)[1:])
        assert defaults > 50  # 8.7 of all
        assert abs(defaults - expected) < 5
    assert figure("AUC", ours) == pytest.approx(figure("AUC", plain), abs=2e-3)


@pytest.mark.parametrize(("first", "second"), [(EXAMPLES, PLAIN), (PLAIN, EXAMPLES)], ids=["to torch", "from torch"])
def test_a_checkpoint_goes_on_in_the_other(first, second, play, tmp_path):
    """Moments, scale and schedule, too: without them the losses are others in the second digit."""
    whole = losses(play(first / "risk_model.py", "--steps", 81))
    begun = losses(play(first / "risk_model.py", "--steps", 40, "--checkpoint", tmp_path / "risk.pt"))
    ended = losses(play(second / "risk_model.py", "--steps", 41, "--checkpoint", tmp_path / "risk.pt"))
    assert begun + ended == pytest.approx(whole, rel=1e-3)
    saved = torch.load(tmp_path / "risk.pt")
    assert saved["schedule"]["last_epoch"] == 81
    assert saved["optimizer"]["state"][0]["step"] == 81


def test_image_classifier(play):
    """Weights in bf16 against autocast over fp32 ones: the same pictures, rounded in other places."""
    ours, plain = play(EXAMPLES / "image_classifier.py"), play(PLAIN / "image_classifier.py")
    assert losses(ours)[:4] == pytest.approx(losses(plain)[:4], rel=0.01)
    for printed in (ours, plain):
        assert figure("accuracy", printed) > 0.95  # chance: 0.2
    assert figure("accuracy", ours) == pytest.approx(figure("accuracy", plain), abs=0.02)


def test_translation(play):
    """fp32 to rounding, until that has grown: training is chaotic, and each step multiplies it."""
    ours = play(EXAMPLES / "translation.py", "--steps", 170)
    plain = play(PLAIN / "translation.py", "--steps", 170)
    assert losses(ours)[:3] == pytest.approx(losses(plain)[:3], rel=1e-5)
    assert losses(ours)[:6] == pytest.approx(losses(plain)[:6], rel=1e-3)
    for printed in (ours, plain):
        assert figure("exact match", printed) > 0.8  # chance: one in a million
    assert figure("exact match", ours) == pytest.approx(figure("exact match", plain), abs=0.1)


def test_finetune_gpt2(play, tmp_path):
    """fp16 weights with masters against autocast over fp32 ones."""
    ours = play(EXAMPLES / "finetune_gpt2.py", "--steps", 30)
    plain = play(PLAIN / "finetune_gpt2.py", "--steps", 30)
    assert losses(ours) == pytest.approx(losses(plain), rel=0.02)
    for printed in (ours, plain):
        before, after = map(float, re.findall(r"perplexity ([\d.]+)", printed))
        assert before > 150  # chance: 256
        assert after < 20


def a_gpt2(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([argparse.__file__], vocab_size=400, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="!").save_pretrained(folder)  # noqa: S106
    torch.manual_seed(1)
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 400}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def test_finetune_a_model_of_ones_own(play, tmp_path):
    a_gpt2(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--text", difflib.__file__, "--steps", 3)
    for folder in (EXAMPLES, PLAIN):
        printed = play(folder / "finetune_gpt2.py", *arguments, "--output", tmp_path / "tuned")
        before, after = map(float, re.findall(r"perplexity ([\d.]+)", printed))
        assert 300 < after < before < 500
        (tmp_path / "tuned" / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
        (tmp_path / "tuned" / "tokenizer_config.json").write_bytes(
            (tmp_path / "model" / "tokenizer_config.json").read_bytes()
        )
        again = play(folder / "finetune_gpt2.py", "--model", tmp_path / "tuned", *arguments[2:4], "--steps", 0)
        assert figure("before: perplexity", again) == pytest.approx(after, rel=0.01)


@pytest.mark.parametrize("name", OTHER)
def test_as_it_is_typed(name, tmp_path):
    """From another folder, one step: there are figures, and nothing is left behind."""
    done = run(sys.executable, EXAMPLES / f"{name}.py", "--steps", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [EXAMPLES, PLAIN], ids=["ours", "plain"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--text", "short.txt"), "5 tokens"),
        (("--text", "missing.txt"), "No such file or directory: 'missing.txt'"),
        (("--text", "latin.txt", "--model", "model"), "'utf-8' codec can't decode"),
        (("--model", "./missing"), "missing"),
    ],
    ids=["short", "missing", "latin", "model"],
)
def test_bad_input_to_finetune_gpt2_is_one_line(folder, arguments, told, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    a_gpt2(tmp_path / "model")
    done = run(sys.executable, folder / "finetune_gpt2.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
