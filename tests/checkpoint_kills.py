"""Trains on some ranks, saves beside that all the time, and is killed: what is there afterwards is what it should be.

After each kill (-9, of one rank or of all, at any moment) the newest checkpoint must be intact, and hold to the bit
what a run that nobody killed had at that step; the next life goes on from it. A hundred kills on three ranks:

    PYTHONPATH=. .venv/bin/python tests/checkpoint_kills.py /tmp/kills --kills 100 --ranks 3

Under torchrun it is one life of such a run, in which rank 1 kills itself once (test_checkpoint_ranks.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import deepfast
import deepfast.engine.reading  # here, once, not in each life
from deepfast import build, ops
from deepfast.engine import checkpoint
from deepfast.engine.boxes import run_of

LAST = 120  # steps


def made() -> deepfast.Engine:
    """Dropout asks for the random state, fp16 for masters and the loss scale."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 300), nn.Dropout(), nn.Linear(300, 100))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 20, "hysteresis": 1},
        "optimizer": {"params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5, "total_num_steps": LAST}},
    }
    e = deepfast.initialize(model=module, config=config)[0]
    torch.manual_seed(e.rank)
    return e


def step(e: deepfast.Engine) -> None:
    g = torch.Generator().manual_seed(e.global_steps * e.world_size + e.rank)
    e.backward(e(torch.randn(2, 16, generator=g)).float().square().mean())
    e.step()


def live(place: Path, e: deepfast.Engine, suicide: int | None = None) -> None:
    """From the last checkpoint to the end, one more after each step."""
    e.load_checkpoint(place)
    while e.global_steps < LAST:
        step(e)
        if e.global_steps == suicide:
            os.kill(os.getpid(), signal.SIGKILL)
        e.save_checkpoint(place, f"step{e.global_steps}", {"scale": e.loss_scale}, wait=False, keep=2)
    e.wait_for_checkpoint()


def tell(place: Path, e: deepfast.Engine) -> None:
    """Writes what a run that nobody kills has after each step: plainly, with nothing of checkpoints."""
    while e.global_steps < LAST:
        step(e)
        tensors = {f"weight.{name}": t for name, t in e.module.state_dict().items()}
        for part, name in zip(e._parts(), e._names(), strict=True):
            for entry, t in e.optimizer.state[part.mine].items():
                tensors[f"{entry}.{name}.{part.begin}.{part.end}"] = t
        save_file(tensors, place / f"{e.global_steps}-{e.rank}.safetensors", {"scale": str(e.loss_scale)})


def differences(folder: Path, told: Path) -> list[str]:
    """Between a checkpoint, read on one rank, and what was told of that step."""
    e = made()
    _, client = e.load_checkpoint(folder.parent, folder.name)
    files = list(told.glob(f"{e.global_steps}-*.safetensors"))
    wrong = [] if files else ["nothing was told of it"]
    params = dict(e.module.named_parameters())
    for file in files:
        for key, expected in load_file(file).items():
            entry, _, name = key.partition(".")
            if entry == "weight":
                t = e.module.state_dict()[name]
            else:
                name, begin, end = name.rsplit(".", 2)
                t = e.optimizer.state[params[name]][entry]
                t = t if entry == "step" or t.shape == expected.shape else run_of(t, params[name], int(begin), int(end))
            if not torch.equal(t, expected):
                wrong.append(f"{folder.name}: {key}")
    if client["scale"] != e.loss_scale:
        wrong.append("the loss scale")
    return wrong


def forked(work, *arguments) -> int:
    """Starts ``work`` in a process of its own, without importing everything again."""
    if child := os.fork():
        return child
    code = 1
    try:
        work(*arguments)
        code = 0
    except Exception as error:  # whoever loses a rank ends with one
        print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def as_rank(work, rank: int, ranks: int, store: Path, *arguments) -> None:
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    e = made()
    (store.parent / f"{store.name}.{rank}").touch()
    work(*arguments, e)
    dist.destroy_process_group()


def ended(child: int, seconds: float = 0.0) -> int | None:
    """Its exit code; None if it is still there then."""
    deadline = time.monotonic() + seconds
    while not (status := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status[1])


def kill_once(place: Path, nth: int, ranks: int, dice: random.Random) -> bool:
    """One life and its end. Returns whether it was a kill."""
    store = place / f"store{nth}"
    children = {rank: forked(as_rank, live, rank, ranks, store, place / "checkpoints") for rank in range(ranks)}
    while not all((place / f"{store.name}.{rank}").exists() for rank in range(ranks)):
        time.sleep(0.005)
    time.sleep(dice.random() * 0.4)
    victims = dice.choice([*([rank] for rank in range(ranks)), list(range(ranks))])
    for rank in victims:
        os.kill(children[rank], signal.SIGKILL)
    killed = [ended(children[rank], 60) == -signal.SIGKILL for rank in victims]
    grace = dice.random() * 0.3  # in which those that are left may end as they like
    for rank in children.keys() - set(victims):
        if ended(children[rank], grace) is None:
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
    return any(killed)


def check(place: Path, told: Path, report: Path) -> None:
    tag = checkpoint.latest(place)
    wrong = [] if tag is None else differences(place / tag, told)
    others = [checkpoint.fault(place / other) for other in checkpoint.tags(place)]
    report.write_text(json.dumps({"tag": tag, "wrong": [*wrong, *filter(None, others)]}))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place, dice = options.place.resolve(), random.Random(options.seed)
    told, checkpoints = place / "told", place / "checkpoints"
    told.mkdir(parents=True)
    children = [forked(as_rank, tell, r, options.ranks, place / "store", told) for r in range(options.ranks)]
    if any(ended(child, 120) != 0 for child in children):
        return 1
    kills, nth, seen = 0, 0, []
    while kills < options.kills:
        nth += 1
        kills += kill_once(place, nth, options.ranks, dice)
        report = place / "report.json"
        if ended(forked(check, checkpoints, told, report), 120) != 0:
            return 1
        found = json.loads(report.read_text())
        seen.append(found["tag"])
        if found["wrong"]:
            print(f"life {nth}:", *found["wrong"], sep="\n", file=sys.stderr)
            return 1
        if found["tag"] == f"step{LAST}":
            os.rename(checkpoints, place / f"checkpoints-until-life-{nth}")
    print(json.dumps({"kills": kills, "tags": seen}))
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    build.load_comm()
    if ops.LIBRARY is None:
        raise SystemExit(ops.BUILD_ERROR)
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        raise SystemExit(main())
    deepfast.init_distributed()
    first, e = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", made()
    live(Path(sys.argv[1]), e, suicide=LAST // 2 if first and e.rank == 1 else None)
