"""Which micro-batches a search tries, when it ends, what is best; how a trial ended; the batch written down."""

from __future__ import annotations

import itertools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import HANGS

from deepfast.engine import config as configuration
from deepfast.errors import TrainingError, UserError
from deepfast.train import loop
from deepfast.train.tune import attempt, memory, trial, tuned
from deepfast.train.tune.search import Result, best, candidates, enough
from deepfast.train.tune.trial import Request


def measured(*figures: tuple[int, float], peak: int = 100) -> list[Result]:
    return [Result(micro, 1, "measured", 1.0, 3, speed, peak + micro) for micro, speed in figures]


@pytest.mark.parametrize("share", [1, 2, 7, 12, 31, 60, 96, 2**20, 3 * 5 * 7 * 11 * 13, 2**31 - 1])
def test_candidates_divide_the_batch_and_are_few(share):
    micros = candidates(share, share)
    assert micros == sorted(set(micros))
    assert all(share % micro == 0 for micro in micros)
    assert micros[0] == 1
    assert micros[-1] == share
    assert len(micros) <= share.bit_length() + 1
    if share == 60:
        assert micros == [1, 2, 4, 10, 15, 30, 60]


def test_candidates_have_the_configured_one():
    assert 6 in candidates(60, 6)
    assert candidates(None, 3) == [1, 2, 3, 4, *(2**i for i in range(3, 13))]
    assert candidates(None, 5000)[-2:] == [4096, 5000]


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (measured((1, 100)), None),
        (measured((1, 100), (2, 150), (4, 200), (8, 250)), None),
        (measured((1, 100), (2, 50)), None),  # a size that the hardware does not like, or noise
        (measured((1, 100), (2, 50), (4, 110)), None),
        (measured((1, 100), (2, 150), (4, 140), (8, 130)), "up to 4 times micro-batch 2 nothing is faster"),
        (measured((1, 100), (2, 101), (4, 102)), "up to 4 times micro-batch 1 nothing is faster"),
        (measured((1, 100), (2, 102), (4, 104)), None),  # each a tie with the one before it; but it goes up
        (measured((1, 100), (3, 101)), None),
        ([*measured((1, 100)), Result(2, 1, "memory")], "memory runs out at micro-batch 2"),
        ([Result(1, 1, "memory")], "memory runs out at micro-batch 1"),
        ([Result(1, 1, "failed")] * 2, None),
        ([Result(1, 1, "failed")] * 3, "3 in a row have failed"),
        ([*measured((1, 100)), Result(2, 1, "failed")], None),
    ],
)
def test_when_it_ends(results, why):
    found = enough(results)
    assert (found is None) == (why is None), found
    assert why is None or why in found


def test_the_best_is_the_fastest_and_among_equals_the_least_memory():
    def chosen(results: list[Result]) -> int:
        return best(results)[0].micro

    assert best([]) is None
    assert best([Result(1, 1, "memory"), Result(2, 1, "failed")]) is None
    assert chosen(measured((1, 100), (2, 200), (4, 190))) == 2
    assert chosen(measured((1, 100), (2, 195), (4, 200), (8, 150))) == 2
    assert chosen(measured((1, 100), (2, 190), (4, 200))) == 4
    less = [*measured((1, 199)), *measured((4, 200), peak=10)]  # not the smaller one, but the one with less memory
    assert chosen(less) == 4
    assert chosen([*measured((1, 10)), Result(2, 1, "memory")]) == 1
    assert "least memory within 3%" in best(less)[1]
    assert "within 3% of the fastest (micro-batch 4: 200 tokens/s)" in best(measured((2, 199), (4, 200)))[1]


def test_sizes():
    assert [memory.size(text) for text in ("8GiB", "1.5 gib", "500MB", "2g", "64")] == [
        8 << 30, 3 << 29, 500_000_000, 2_000_000_000, 64,
    ]  # fmt: skip
    for text in ("", "GiB", "-1GiB", "0", "8 apples", "nan"):
        with pytest.raises(ValueError, match="like 8GiB was expected"):
            memory.size(text)


@pytest.mark.parametrize("kind", ["v1", "v2", "a container's v2", "none"])
def test_what_is_available_is_what_the_nearest_limit_leaves(tmp_path, kind):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder, line, where = groups / "memory", "4:cpu,memory:/a/b\n1:name=systemd:/\n", "a"
    if "v2" in kind:
        names, folder, line = ("memory.max", "memory.current", "inactive_file"), groups, "0::/a/b\n"
    if "container" in kind:
        where = ""
    (proc / "self" / "cgroup").write_text(line)
    if kind != "none":
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / names[0]).write_text("max\n")
        for name, text in zip((*names[:2], "memory.stat"), ("5000", "3000", f"anon 1\n{names[2]} 500\n"), strict=True):
            (folder / where / name).write_text(text)
    assert memory.available(proc, groups) == (8000 << 10 if kind == "none" else 2500)


@pytest.mark.parametrize(
    ("data", "ranks", "share", "micro", "expected"),
    [
        ({"train_batch_size": 32}, 1, 32, 8, {"train_batch_size": 32, "train_micro_batch_size": 8}),
        ({"train_batch_size": 32, "gradient_accumulation_steps": "auto"}, 2, 16, 8,
         {"train_batch_size": 32, "gradient_accumulation_steps": 2, "train_micro_batch_size": 8}),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": False}}, 1, 32, 4,
         {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": False}}),
        ({"train_batch_size": 32, "optimizer": {"type": "Lion"}, "_why": "x"}, 1, 32, 4,
         {"train_batch_size": 32, "optimizer": {"type": "Lion"}, "_why": "x", "train_micro_batch_size_per_gpu": 4}),
        # accumulation of one process, as the trainer reads it, and of each of two
        ({"train_batch_size": 32, "train_micro_batch_size": 8, "gradient_accumulation_steps": 4}, 2, 16, 2,
         {"train_batch_size": 32, "train_micro_batch_size": 2, "gradient_accumulation_steps": 16}),
        ({"train_batch_size": 32, "train_micro_batch_size": 8, "gradient_accumulation_steps": 2}, 2, 16, 2,
         {"train_batch_size": 32, "train_micro_batch_size": 2, "gradient_accumulation_steps": 8}),
        ({"train_micro_batch_size": 8, "gradient_accumulation_steps": 4}, 2, None, 2,
         {"train_micro_batch_size": 2, "gradient_accumulation_steps": 4}),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 8}, 2, None, 4,
         {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}),
    ],
)  # fmt: skip
def test_the_batch_is_written_in_the_configurations_own_words(data, ranks, share, micro, expected):
    config = configuration.load(data)
    configuration.resolve_batch(config, ranks, one_process=True)
    accumulation = share // micro if share else config.gradient_accumulation_steps
    before = json.dumps(data)
    written, keys = tuned.with_batch(data, config, Result(micro, accumulation, "measured"), ranks)
    assert json.dumps(data) == before
    assert list(written.items()) == list(expected.items())
    assert keys == [key for key in (*tuned.KEYS,) if key in expected]
    again = configuration.load(written)
    configuration.resolve_batch(again, ranks, one_process=True)
    assert again.batch_triple() == (micro * accumulation * ranks, micro, accumulation)


@pytest.mark.parametrize(
    ("script", "outcome", "said"),
    [
        ("echo warning >&2; echo 'the reason' >&2; exit 3", "failed", "the reason"),
        ("exit 3", "failed", "exit code 3"),
        ("kill -9 $$", "memory", "killed"),
        ("echo '  exitcode  : -9 (pid: 7)' >&2; exit 1", "memory", "killed"),  # as torchrun says it of a rank
        ("exec sleep 100", "failed", "nothing came of it in 1 seconds"),
        ("""echo '{"memory": true}' > $6/rank1.json; echo '{"failed": "a peer has gone"}' > $6/rank0.json""",
         "memory", ""),
        ("""echo '{"failed": "RuntimeError: first\\\\nframe #0"}' > $6/rank0.json""", "failed", "RuntimeError: first"),
    ],
)  # fmt: skip
def test_how_a_trial_ended(tmp_path, monkeypatch, script, outcome, said):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(attempt, "HANGS", 1.0 if "sleep" in script else HANGS)
    result, _ = attempt.attempt(Request({}, 2, 3, 1.0, None), 1, 8, lambda: None)
    assert result == Result(2, 3, outcome, said=said)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (UserError("model_dir: is no GPT-2"), "refused"),
        (TrainingError("20 steps in a row were skipped"), "failed"),
        (RuntimeError("shapes do not fit"), "failed"),
    ],
)
def test_what_an_error_in_a_trial_means(monkeypatch, tmp_path, error, outcome):
    def trained(*_):
        raise error

    monkeypatch.setattr(trial, "_trained", trained)
    assert trial._outcome(Request({}, 1, 1, 1.0, None), tmp_path).keys() == {outcome}


@pytest.mark.parametrize(("accumulation", "expected"), [(1, 6), (3, 12), (4, 13), (100, 13 + 96)])
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_takes_what_its_micro_batches_take_and_its_end(monkeypatch, tmp_path, accumulation, expected, skips):
    """The first takes 5 seconds, the last 6 with the optimizer's step, each other 1; a skipped step 100 more."""
    now, done = 0.0, itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    run = min(accumulation, trial.RUN)
    engine = SimpleNamespace(skipped_steps=0, gradient_accumulation_steps=lambda: run)

    def step(engine, tokens, stop):
        nonlocal now
        for i in range(run):
            batch = tokens.batch(0, 2)
            assert batch.shape == (2, 8)
            assert 0 <= batch.min() <= batch.max() < 11
            now += 6 if i == run - 1 else 5 if i == 0 else 1
        if next(done) < trial.WARM_UP:
            now += 1000
        elif skips and next(done) % 3 == 0:
            engine.skipped_steps += 1
            now += 100

    monkeypatch.setattr(loop, "one_step", step)
    tokens = trial.Tokens(11, 8, torch.device("cpu"), tmp_path / "beat")
    seconds = trial._steps(engine, tokens, Request({}, 2, accumulation, 1e4, None))
    assert seconds == pytest.approx([expected] * len(seconds))
    assert len(seconds) >= trial.STEPS
    assert (engine.skipped_steps > 0) == skips
    assert (tmp_path / "beat").exists()
