"""python -m deepfast tune: with trials made up, and real searches with small models, killed and interrupted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import HANGS, run
from runs import configure, losses, train

from deepfast.errors import UserError
from deepfast.train.tune import command as tune
from deepfast.train.tune.search import Result

# --- The command line, with trials made up ---


@pytest.fixture
def made_up(place, monkeypatch):
    """``tune.main`` in a folder, its trials answered by a function of the micro-batch."""
    monkeypatch.chdir(place)
    asked = []

    def play(answer, *options: str) -> tuple[int, list[tuple[int, int]]]:
        asked.clear()

        def attempt(request, ranks, length, idle):
            asked.append((request.micro, request.accumulation))
            outcome = answer(request.micro)
            if isinstance(outcome, BaseException):
                raise outcome
            figures = {"tokens_per_s": outcome, "peak": 1 << 20} if not isinstance(outcome, str) else {}
            kind = "measured" if figures else "memory" if outcome == "memory" else "failed"
            said = "" if figures or kind == "memory" else str(outcome)
            return Result(request.micro, request.accumulation, kind, said=said, **figures), {"log": ""}

        monkeypatch.setattr(tune, "attempt", attempt)
        return tune.main(["--config", "config.json", *options]), asked

    return play


def test_a_given_batch_is_kept_by_every_trial(made_up, place, capsys):
    configure(place, train_batch_size=60, train_micro_batch_size=6)
    code, asked = made_up(lambda micro: 100 + micro, "--nproc-per-node", "2")
    assert code == 0
    assert [micro for micro, _ in asked] == [1, 2, 5, 6, 10, 15, 30]
    assert {micro * accumulation * 2 for micro, accumulation in asked} == {60}
    out = capsys.readouterr().out
    assert "at most 7 trials" in out
    assert "ended after 7 trials: there is no larger one" in out
    assert "train_batch_size=60 stays: training gives the same" in out
    assert "best: micro-batch 30 x accumulation 1 on each of 2 ranks" in out
    assert "torchrun --standalone --nproc-per-node 2 -m deepfast.train --config output/config.tuned.json" in out
    assert "times as fast as the configured 6" in out


@pytest.mark.parametrize("batch", [None, "auto"])
def test_without_a_batch_micro_batches_double_and_accumulation_stays(made_up, place, capsys, batch):
    configure(place, train_batch_size=batch, gradient_accumulation_steps=3)
    code, asked = made_up(lambda micro: 1000 if micro == 4 else micro)
    assert code == 0
    assert asked == [(1, 3), (2, 3), (4, 3), (8, 3), (16, 3)]
    assert "training's result changes with it" in capsys.readouterr().out
    # The configured one is tried at any rate, and what comes after it, if that is worth it.
    configure(place, train_batch_size=None, train_micro_batch_size=64)
    assert made_up(lambda micro: 64 / micro) == (0, [(1, 1), (2, 1), (4, 1), (64, 1)])
    assert "64.00 times as fast as the configured 64" in capsys.readouterr().out
    assert made_up(lambda micro: 80 if micro == 64 else 1 / micro) == (
        0, [(1, 1), (2, 1), (4, 1), (64, 1), (128, 1), (256, 1)],
    )  # fmt: skip
    assert "the configuration has it already" in capsys.readouterr().out
    configure(place, train_batch_size=None, train_micro_batch_size="auto")
    assert made_up(lambda micro: 1000 if micro == 2 else micro) == (0, [(1, 1), (2, 1), (4, 1), (8, 1)])


def test_failures_are_said_once_and_do_not_end_it(made_up, place, capsys):
    configure(place, train_batch_size=32)
    code, asked = made_up(lambda micro: 100.0 if micro == 8 else "memory" if micro == 16 else "a bug")
    assert (code, len(asked)) == (1, 3), "three in a row end it"
    assert capsys.readouterr().err.splitlines()[-1] == (
        "deepfast tune: no trial ran through: micro-batch 1: failed: a bug"
    )
    code, asked = made_up(lambda micro: {4: 100.0, 16: "memory"}.get(micro, "a bug"))
    assert (code, len(asked)) == (0, 5)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("-  ")[-1].strip() for row in rows if "failed" in row] == [
        "failed: a bug", "failed, as before", "failed, as before",
    ]  # fmt: skip
    figures = json.loads(Path("output/tune.json").read_text())
    assert [trial["outcome"] for trial in figures["trials"]] == ["failed", "failed", "measured", "failed", "memory"]
    assert figures["chosen"]["micro"] == 4
    configure(place, train_batch_size=32, train_micro_batch_size=32)
    assert made_up(lambda micro: "memory" if micro > 2 else 100.0) == (0, [(1, 32), (2, 16), (4, 8)])
    assert "the configured 32 needs more memory than there is" in capsys.readouterr().out
    assert "a bug" not in Path("output/tune.json").read_text()
    assert Path("output/tune.png").read_bytes().startswith(b"\x89PNG")
    Path("output/config.tuned.json").unlink()
    code, _ = made_up(lambda micro: "memory")
    assert code == 1
    assert "no trial ran through: micro-batch 1: out of memory" in capsys.readouterr().err
    assert not Path("output/config.tuned.json").exists()


def test_what_is_refused_is_one_line(made_up, place, capsys):
    def refused(*options: str, answer=pytest.fail) -> str:
        code, _ = made_up(answer, *options)
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("deepfast tune: ")
        return line

    assert "no such file" in refused("--config", "nowhere.json")
    assert "KEY=VALUE was expected" in refused("--set", "x")
    assert "did you mean 'train_batch_size'?" in refused("--set", "train_batchsize=3")
    assert "train_batch_size=4 cannot be divided" in refused("--nproc-per-node", "3")
    assert "8 apples" in refused("--memory", "8 apples")
    assert "invalid number of seconds value: '-1'" in refused("--seconds=-1")
    assert "--nproc-per-node" in refused("--nproc-per-node", "0")
    assert "unrecognized arguments: --what" in refused("--what")
    assert "output_dir='config.json/x': cannot be written" in refused("--set", "output_dir=config.json/x")
    assert "is the configuration itself" in refused("--out", "../" + place.name + "/config.json")
    assert "--out nowhere/x.json: cannot be written" in refused("--out", "nowhere/x.json")
    assert "missing" in refused("--set", "train_batch_size=null", "--set", "train_micro_batch_size=null")
    assert "is no\\nGPT-2" in refused(answer=lambda micro: UserError("is no\nGPT-2"))
    assert json.loads(Path("config.json").read_text())["train_batch_size"] == 4


def test_ctrl_c_writes_the_best_so_far(made_up, place, capsys):
    configure(place, train_batch_size=32)
    speeds = itertools.chain([10.0, 20.0], itertools.repeat(KeyboardInterrupt()))
    code, _ = made_up(lambda micro: next(speeds), "--out", "found.json")
    assert code == 130
    out = capsys.readouterr().out
    assert "ended after 2 trials: interrupted" in out
    assert "best: micro-batch 2 x accumulation 16: 20 tokens/s" in out
    assert json.loads(Path("found.json").read_text())["train_micro_batch_size"] == 2
    assert json.loads(Path("output/tune.json").read_text())["ended"] == "interrupted"


# --- Real searches ---


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "deepfast", "tune", "--config", "config.json", "--seconds", "0.2", *map(str, options)]


def rows(out: str) -> dict[int, str]:
    lines = [line.split() for line in out.splitlines()]
    return {int(line[0]): " ".join(line) for line in lines if len(line) > 4 and line[0].isdigit()}


def started(place: Path, *options: object) -> tuple[subprocess.Popen[str], str]:
    """A search, and a mark in the environment of all processes that come of it."""
    mark = uuid.uuid4().hex
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DEEPFAST_TEST_MARK": mark}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*options), cwd=place, env=env, stdout=pipe, stderr=pipe, text=True), mark


def marked(mark: str, named: str = "") -> list[int]:
    """The processes with this mark that live, and run what is so named."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes() and named in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


def wait_for(what, limit: float = HANGS) -> None:
    deadline = time.monotonic() + limit
    while not what():
        if time.monotonic() > deadline:
            pytest.fail("it never came")
        time.sleep(0.05)


def wait_for_row(process: subprocess.Popen[str], micro: int) -> None:
    for line in process.stdout:
        if line.split()[:1] == [str(micro)]:
            return
    pytest.fail(f"there was no row: {process.communicate()[1]}")


def test_a_search_and_training_with_what_it_found(place):
    kept = place / "output" / "checkpoints" / "step3"
    kept.mkdir(parents=True)
    board = {"enabled": True, "output_path": "board"}
    configure(place, train_batch_size=5, train_micro_batch_size=5, tensorboard=board)
    done = run(*command(), cwd=place, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert kept.is_dir()
    assert not (place / "board").exists(), "it is no run"
    assert sorted(p.name for p in (place / "output").iterdir()) == [
        "checkpoints", "config.tuned.json", "tune.json", "tune.png",
    ]  # fmt: skip
    figures = json.loads((place / "output" / "tune.json").read_text())
    assert rows(done.stdout).keys() == {trial["micro"] for trial in figures["trials"]} == {1, 5}
    for trial in figures["trials"]:
        assert trial["outcome"] == "measured"
        assert trial["micro"] * trial["accumulation"] == 5
        assert trial["tokens_per_s"] == pytest.approx(5 * 32 / trial["step_seconds"])
        assert trial["steps"] >= 3
        assert trial["peak"] > 50 << 20
    assert "4 micro-batches of a step were run" in rows(done.stdout)[1]
    assert "micro-batches of a step were run" not in rows(done.stdout)[5]
    assert set(figures["machine"]) == {"cpu", "cores", "gpu", "torch", "deepfast", "ranks"}
    assert figures["model"] == {"parameters": 25056, "dtype": "float16"}
    assert str(place) not in json.dumps(figures)
    assert (place / "output" / "tune.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((place / "output" / "config.tuned.json").read_text())
    given = json.loads((place / "config.json").read_text())
    assert found == {**given, "train_micro_batch_size": figures["chosen"]["micro"]}
    assert "-m deepfast.train --config output/config.tuned.json" in done.stdout.splitlines()[-1]
    done = train(place, "--config", "output/config.tuned.json", "--set", "output_dir=trained")
    assert done.returncode == 0, done.stderr
    assert f"batch 5 = micro {figures['chosen']['micro']} x" in done.stdout
    assert len(losses(place, "trained")) == 8


def test_memory_that_runs_out_ends_no_search(place):
    """A prime batch: one micro-batch fits well within the limit, 127 do not nearly: 1.6 GB are their logits alone."""
    shape = json.loads((place / "tiny" / "config.json").read_text())
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, "vocab_size": 50257}))
    unused = {"zero_allow_untested_optimizer": True}
    configure(place, train_batch_size=127, train_micro_batch_size=None, train_sequence_length=64, **unused)
    done = run(*command("--memory", "1.2GiB"), cwd=place, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "memory: 1,229 MiB for each process" in done.stdout
    assert "without effect here: zero_allow_untested_optimizer" in done.stdout
    assert rows(done.stdout)[127] == "127 1 - - - out of memory"
    assert "best: micro-batch 1 x accumulation 127" in done.stdout
    assert json.loads((place / "output" / "config.tuned.json").read_text())["train_micro_batch_size"] == 1
    assert len(done.stderr.splitlines()) == 2, "a line for each trial, and nothing else"


def test_a_trial_that_is_killed_ran_out_of_memory(place):
    configure(place, train_batch_size=3, train_micro_batch_size=1)
    process, mark = started(place)
    wait_for_row(process, 1)
    wait_for(lambda: marked(mark, "deepfast.train.tune.trial"))
    (trial,) = marked(mark, "deepfast.train.tune.trial")
    wait_for(lambda: Path(f"/proc/{trial}/oom_score_adj").read_text().strip() == "1000")
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() != "1000"
    os.kill(trial, signal.SIGKILL)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert rows(out)[3] == "3 1 - - - out of memory (killed)"
    assert "best: micro-batch 1 x accumulation 3" in out


def test_two_ranks_and_ctrl_c_in_the_middle(place):
    configure(place, train_batch_size=8, train_micro_batch_size=1)
    process, mark = started(place, "--nproc-per-node", 2, "--seconds", 5)  # so long that the next one is met, too
    wait_for_row(process, 1)
    wait_for(lambda: len(marked(mark)) >= 4)  # the search, torchrun, two ranks
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, err
    wait_for(lambda: not marked(mark))
    assert "Traceback" not in err
    assert "best: micro-batch 1 x accumulation 4 on each of 2 ranks" in out
    figures = json.loads((place / "output" / "tune.json").read_text())
    assert [trial["outcome"] for trial in figures["trials"]] == ["measured"]
    assert figures["trials"][0]["tokens_per_s"] == pytest.approx(8 * 32 / figures["trials"][0]["step_seconds"])
    assert (place / "output" / "config.tuned.json").exists()


LEASH = (sys.executable, Path(tune.__file__).with_name("leash.py"))
ORPHAN = """
import os, subprocess, sys
subprocess.Popen(["sh", "-c", 'read -r go; exec "$@"', "sh", *sys.argv[1:3], str(os.getpid()), *sys.argv[3:]])
"""


def test_nobody_begins_for_a_search_that_has_died():
    """A rank that was just starting when search and torchrun were killed: nobody tells it so any more. That nobody has
    asked yet how they ended, so that they still have their PIDs, does not matter.
    """
    assert run(*LEASH, os.getpid(), "echo", "begun").stdout == "begun\n"
    assert run(*LEASH, os.getpid(), "sh", "-c", '"$@"; exit 3', "sh", *LEASH, "{}", "echo", "begun").stdout == "begun\n"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", ORPHAN, *LEASH, "echo", "begun"], stdin=pipe, stdout=pipe) as parent:
        wait_for(lambda: Path(f"/proc/{parent.pid}/stat").read_text().split()[2] == "Z")
        parent.stdin.write(b"go\n")
        parent.stdin.close()
        assert parent.stdout.read() == b""


def test_no_rank_outlives_a_search_that_is_killed(place):
    process, mark = started(place, "--nproc-per-node", 2, "--seconds", 1000)
    wait_for(lambda: len(marked(mark, "deepfast.train.tune.trial")) >= 3)  # torchrun has the words, too
    process.kill()
    process.communicate()
    try:
        wait_for(lambda: not marked(mark))
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_model_that_the_trainer_refuses_is_refused_in_one_line(place):
    (place / "tiny" / "config.json").write_text('{"model_type": "bert"}')
    done = run(*command(), cwd=place)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["deepfast tune: tiny/config.json: model_type is 'bert', not 'gpt2'"]


BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("matplotlib", "pyarrow", "tensorboard", "tokenizers", "tqdm", "transformers")))
sys.argv[0] = "deepfast"
runpy.run_module("deepfast", run_name="__main__")
"""


def test_without_the_extra_it_says_what_to_install():
    done = run(sys.executable, "-c", BARE, "tune", "--config", "x.json")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("transformers not installed: pip install 'deepfast[train]'")
    assert "doctor | build | tune" in run(sys.executable, "-c", BARE, "--help").stdout
    assert "less 10 %, divided" in " ".join(run(sys.executable, "-c", BARE, "tune", "--help").stdout.split())
