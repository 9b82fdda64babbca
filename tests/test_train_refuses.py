"""The command line, given bad input: exit 2, one line, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import TRAIN, run
from runs import TORCHRUN, configure, furnished, losses, train


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
    ("output is a file", lambda p: configure(p, output_dir="config.json"), [], "output_dir='config.json': is a file"),
    ("no checkpoint", lambda p: None, ["--resume"], "output/checkpoints holds no checkpoint"),
    ("no such option", lambda p: None, ["--resum", "--x"], "unrecognized arguments: --resum --x"),
    ("eval steps", lambda p: configure(p, eval_steps=9), [], "eval_steps is set, and nothing to validate on: set eva"),
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


def test_a_backend_that_is_not_to_be_had(place):
    line = says_one_line(train(place, DEEPFAST_BACKEND="cuda"))
    assert "backend='cuda' was asked for, but the parameter lies on cpu" in line


@pytest.mark.parametrize("module", ["deepfast.deepspeed", "deepfast.deepspeed.zero_to_fp32"])
def test_commands_that_are_told_nothing(module):
    done = run(sys.executable, "-m", module)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the following arguments are required: " in line
    assert "args" not in line


@pytest.mark.parametrize("command", [[], ["biuld"]])
def test_no_such_command(command):
    done = run(sys.executable, "-m", "deepfast", *command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "doctor | build | tune | keys" in line


HEAVY = [
    ("no dataset", lambda p: configure(p, dataset_dir="nowhere"), "dataset_dir='nowhere': no such folder"),
    ("a file", lambda p: configure(p, dataset_dir="tiny/config.json"), "is a file: give the folder it lies in"),
    ("empty", lambda p: shutil.rmtree(p / "text") or (p / "text").mkdir(), "dataset_dir='text': no .txt"),
    ("no text", lambda p: [f.write_bytes(b"\xff\xfe") for f in (p / "text").iterdir()], "no readable text in its 4"),
    ("short", lambda p: [f.write_text("x") for f in (p / "text").iterdir()], "8 tokens are shorter than one sequence"),
    ("no validation", lambda p: configure(p, eval_dataset_dir="held"), "eval_dataset_dir='held': no such folder"),
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
    path = place / "output" / "checkpoints" / "step8" / "optimizer-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = says_one_line(train(place, "--resume"))
    assert "step8/optimizer-0.safetensors is damaged" in line
    assert "'step6' is intact: resume from that one" in line
    assert "there are: step8, step6" in says_one_line(train(place, "--resume", "step7"))
    done = train(place, "--resume", "step6")
    assert done.returncode == 0, done.stderr
    assert len(losses(place)) == 8


def test_a_full_disk_is_one_line(place):
    code = (
        "import sys, deepfast.engine.checkpoint as c, deepfast.train as t\n"
        "def full(path, *data): raise OSError(28, 'No space left on device', str(path))\n"
        "c.write_tensors = full\n"
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
