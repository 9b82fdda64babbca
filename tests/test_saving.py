"""Saving beside training: what is saved, when it is there, and what remains when it cannot be written."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import python, run
from engines import batches, engine, equal, state, train
from parts import give_state, odd_engine, saved_by, shared_out, whole_state

from deepfast.engine import checkpoint
from deepfast.engine.checkpoint import CheckpointError


@pytest.fixture
def held(monkeypatch):
    """Files of tensors are written only after ``go``."""
    write, events = checkpoint.write_tensors, SimpleNamespace(go=threading.Event(), begun=threading.Event())

    def later(*arguments):
        events.begun.set()
        events.go.wait()
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", later)
    yield events
    events.go.set()


def test_what_is_saved_is_of_the_moment_of_the_call(tmp_path, held, caplog):
    caplog.set_level(logging.INFO, "deepfast")
    e, data = engine({"bf16": True}), batches(12)
    train(e, data[:4])
    client = {"seen": [1, 2]}
    path = e.save_checkpoint(tmp_path, "a", client, wait=False)
    before, moments = state(e), [t.clone() for s in e.optimizer.state.values() for t in s.values()]
    random = torch.rand(2)
    client["seen"].append(3)
    train(e, data[4:])
    held.begun.wait()
    assert not path.exists()
    assert not caplog.records
    held.go.set()
    e.wait_for_checkpoint()
    assert [r.message.split(":")[0] for r in caplog.records] == [f"checkpoint {path}"]
    assert "MiB" in caplog.text
    loaded = engine({"bf16": True}, seed=5)
    assert loaded.load_checkpoint(tmp_path)[1] == {"seen": [1, 2]}
    assert equal(state(loaded), before)
    assert equal([t for s in loaded.optimizer.state.values() for t in s.values()], moments)
    assert torch.equal(torch.rand(2), random)


def test_a_save_and_a_load_wait_for_the_one_before(tmp_path, held):
    e = engine()
    e.save_checkpoint(tmp_path, "a", wait=False)
    threading.Timer(0.2, held.go.set).start()
    e.save_checkpoint(tmp_path, "b", wait=False)
    assert (tmp_path / "a").is_dir()
    assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "b")


def test_the_one_that_is_being_written_and_the_newest_are_not_pruned(tmp_path, held):
    held.go.set()
    e = engine()
    for tag in "abc":
        e.save_checkpoint(tmp_path, tag)
    os.utime(tmp_path / "a" / checkpoint.CHECKSUMS, (1e10, 1e10))  # by a clock that is ahead
    os.utime(tmp_path / "b" / checkpoint.CHECKSUMS, (1e10, 1e10))
    held.go.clear()
    e.save_checkpoint(tmp_path, "d", wait=False, keep=1)
    held.begun.wait()
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.fault(tmp_path / "c") is None
    held.go.set()
    e.wait_for_checkpoint()
    assert checkpoint.fault(tmp_path / "d") is None
    assert not (tmp_path / "c").exists()


def refusal(call) -> str | None:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def full(monkeypatch, n, *names, error=None):
    """The nth of these calls on the disk finds it full (or raises ``error``). Says how many calls there were."""
    calls = itertools.count()
    made = SimpleNamespace(count=0)

    def filled(call):
        def maybe(path, *arguments, **options):
            made.count = next(calls) + 1
            if made.count == n:
                raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return call(path, *arguments, **options)

        return maybe

    for name in names:
        module, attribute = (os, name.removeprefix("os.")) if name.startswith("os.") else (checkpoint, name)
        monkeypatch.setattr(module, attribute, filled(getattr(module, attribute)))
    return made


@pytest.mark.parametrize("tag", ["new", "old"])
def test_a_full_disk_loses_nothing_whichever_write_finds_it(tmp_path, tag):
    """All that is written, synced or renamed fails once. From the last rename on, the new one is there."""
    e = engine()
    train(e, batches(4))
    e.save_checkpoint(tmp_path, "old")
    before = state(e)
    train(e, batches(4))
    after, failed = state(e), 0
    for n in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            made = full(patch, n, "write_text", "write_tensors", "_sync", "os.rename", "os.replace", "os.mkdir")
            said = refusal(lambda: e.save_checkpoint(tmp_path, tag))
        if made.count < n:
            break
        failed += said is not None
        if said is not None:
            assert re.fullmatch(f"{tmp_path / tag}: cannot be written: No space left on device: .*", said)
        left = {p.name for p in tmp_path.iterdir() if not p.name.endswith(".old")}
        assert left <= {"old", "new", "latest"}, n
        loaded = engine(seed=5)
        loaded.load_checkpoint(tmp_path)
        assert equal(state(loaded), before) or equal(state(loaded), after), n
        loaded.load_checkpoint(tmp_path, "old")
    assert failed >= n - 2 > 10, "all but for making the folder that is there"


def test_all_of_it_is_on_the_disk_before_it_is_seen(tmp_path, monkeypatch):
    synced, before, fsync, rename = [], [], os.fsync, os.rename

    def note(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def look(source, target):
        before.extend(synced if target == tmp_path / "a" else ())
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", look)
    path = engine().save_checkpoint(tmp_path, "a")
    staging = checkpoint.staging(tmp_path, "a")
    assert {str(staging / file.name) for file in path.iterdir()} <= set(before)
    assert str(staging) in before[before.index(str(staging / checkpoint.CHECKSUMS)) :]
    assert {str(tmp_path), str(tmp_path / ".latest.tmp")} <= set(synced)


SMALL_DISK = """
import resource, signal, sys
from engines import CONFIG
from deepfast.engine.checkpoint import CheckpointError
from torch import nn
import deepfast
place, how = sys.argv[1:]
e, *_ = deepfast.initialize(model=nn.Linear(1000, 1000), config=CONFIG)
e.save_checkpoint(place, "small")
e.optimizer.init_state()
if how == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
try:
    e.save_checkpoint(place, "large")
except CheckpointError as error:
    print(error)
e.load_checkpoint(place)
"""


def small_disk(place, how):
    done = python(SMALL_DISK.replace("sys.argv[1:]", repr((str(place), how))))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in place.iterdir() if p.name != "lost+found") == ["latest", "small"]
    return done.stdout


def test_a_file_that_may_not_grow(tmp_path):
    line = small_disk(tmp_path, "limit")
    assert (
        line == f"{tmp_path}/large: cannot be written: File too large: {tmp_path}/.large.tmp/optimizer-0.safetensors\n"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_full(tmp_path):
    if run("mount", "-t", "tmpfs", "-o", "size=10m", "none", tmp_path).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        assert "large: cannot be written: No space left on device" in small_disk(tmp_path, "disk")
    finally:
        run("umount", tmp_path)


@pytest.mark.parametrize("asked", ["save", "load", "wait"])
def test_an_error_is_not_lost(tmp_path, asked):
    e = engine()
    e.save_checkpoint(tmp_path, "a")
    with pytest.MonkeyPatch.context() as patch:
        full(patch, 1, "write_tensors")
        e.save_checkpoint(tmp_path, "b", wait=False)
        e._saving.join()
    ask = {"save": lambda: e.save_checkpoint(tmp_path, "c"), "load": lambda: e.load_checkpoint(tmp_path)}
    with pytest.raises(CheckpointError, match="b: cannot be written: No space left"):
        ask.get(asked, e.wait_for_checkpoint)()
    e.wait_for_checkpoint()  # once
    assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "a")


AT_EXIT = """
import logging, sys, time
from engines import engine
from deepfast.engine import checkpoint
logging.basicConfig(level="ERROR", format="%(message)s")
write = checkpoint.write_tensors
def slow(*arguments):
    time.sleep(0.5)
    FAIL
    write(*arguments)
checkpoint.write_tensors = slow
engine().save_checkpoint("PLACE", "a", wait=False)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_python_ends_when_the_checkpoint_is_there_or_says_why_not(tmp_path, fails):
    code = AT_EXIT.replace("PLACE", str(tmp_path)).replace("FAIL", "raise OSError(28, 'full')" if fails else "")
    done = python(code)
    assert done.returncode == 0
    if fails:
        assert done.stderr == f"{tmp_path}/a: cannot be written: full\n"
        assert list(tmp_path.iterdir()) == []
    else:
        assert done.stderr == ""
        assert checkpoint.fault(tmp_path / "a") is None


# Several ranks: rank 0 publishes what all have written.


def ranks_of(count):
    engines = [shared_out(odd_engine(), rank, count) for rank in range(count)]
    for e in engines:
        give_state(e, whole_state(e))
    return engines


def outcomes(engines, directory, **options):
    for e in engines:
        e.save_checkpoint(directory, "b", wait=False, **options)
    return [refusal(e.wait_for_checkpoint) for e in engines]


def test_a_rank_that_never_comes_is_named(tmp_path):
    engines = ranks_of(3)
    saved_by(engines, tmp_path, tag="a")
    (said, _) = outcomes(engines[:2], tmp_path, timeout=0.2)
    assert said.startswith(f"{tmp_path}/b: cannot be written: nothing came within 0.2 s from rank 2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]
    assert checkpoint.fault(tmp_path / "a") is None


@pytest.mark.parametrize("slip", ["written", "cannot be written either"])
def test_one_rank_that_cannot_write_fails_the_checkpoint(tmp_path, monkeypatch, slip):
    engines = ranks_of(3)
    saved_by(engines, tmp_path, tag="a")
    write, name = checkpoint.write_tensors, checkpoint.write_atomically

    def full_for_rank_2(path, *arguments):
        if path.name in ("optimizer-2.safetensors", ".rank2") and (path.suffix or slip != "written"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        (write if path.suffix else name)(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full_for_rank_2)
    monkeypatch.setattr(checkpoint, "write_atomically", full_for_rank_2)
    said = outcomes(engines, tmp_path, timeout=20)
    why = "No space left on device" if slip == "written" else "rank 2 has failed, and could not say why"
    assert why in said[0]
    assert ("(rank 2)" in said[0]) == (slip == "written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]


def test_ranks_that_do_not_keep_the_same_are_noticed(tmp_path):
    engines = ranks_of(3)
    del engines[1].optimizer.state[engines[1]._parts()[0].mine]["exp_avg"]
    said = outcomes(engines, tmp_path)
    assert f"'optim.state.{engines[1]._names()[0]}.exp_avg'" in said[0]
    assert "do all keep the same state?" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_killed_leaves_nothing_that_counts(tmp_path, monkeypatch):
    """Where rank 0 stops at any moment: what is there is found again, and cleared away by the next save."""
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    e = engine()
    for n in itertools.count(1):
        e.save_checkpoint(tmp_path, "a")
        with pytest.MonkeyPatch.context() as patch:
            made = full(patch, n, "_sync", "os.rename", "os.replace", "os.unlink", error=SystemExit())
            e.save_checkpoint(tmp_path, "a")  # its thread ends where it stands: not even its errors are looked after
        assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "a")
        if made.count < n:
            break
    assert n > 8
    e.save_checkpoint(tmp_path, "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "latest"]
