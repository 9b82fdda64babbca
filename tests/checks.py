"""Checks that need processes of their own: how those run them and tell of it, and how a test starts and hears them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import HANGS, ROOT, run

from deepfast.engine.ranks import settle

SETTINGS = {"env": {"OMP_NUM_THREADS": "1"}, "timeout": HANGS}


def run_checks(checks: Mapping[str, Callable[[], object]], out: Path, after: Callable[[], object] = bool) -> None:
    """Runs them all; {name: "" or what went wrong} goes to ``out``. after(): called when one has ended."""
    results = {}
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            wrong = check()
            results[name] = wrong if isinstance(wrong, str) else ""
        except Exception:  # of whatever kind: the test fails with it
            results[name] = traceback.format_exc()
        seconds = time.perf_counter() - start
        print(out.stem, name, f"{seconds:.1f} s", results[name][-600:], file=sys.stderr, flush=True)
        after()
    out.write_text(json.dumps(results))
    settle()


def torchrun(ranks: int) -> tuple[object, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)


def heard(out: Path, *arguments: object) -> dict[str, str]:
    """What a script of tests/ has found; it writes it to ``out``."""
    script, *rest = arguments
    done = run(sys.executable, ROOT / "tests" / script, out, *rest, **SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def heard_of_ranks(ranks: int, place: Path, *arguments: object, **env: str) -> list[dict[str, str]]:
    """The same of each rank; they write to ``place``, rank.json."""
    script, *rest = arguments
    settings = {**SETTINGS, "env": {**SETTINGS["env"], **env}}
    done = run(*torchrun(ranks), ROOT / "tests" / script, place, *rest, **settings)
    files = [place / f"{rank}.json" for rank in range(ranks)]
    assert (done.returncode, [file.exists() for file in files]) == (0, [True] * ranks), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def heard_of_pair(
    place: Path, *arguments: object, ends: int = -signal.SIGKILL, timeout: float = HANGS
) -> list[dict[str, str]]:
    """The same of two ranks, of which the second one ends by a signal (torchrun would end the first), or as said."""
    script, *rest = arguments
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def start(rank):
        env = {**SETTINGS["env"], **where, "RANK": str(rank)}
        command = [sys.executable, ROOT / "tests" / script, place, *rest]
        try:
            return run(*command, env=env, timeout=timeout)
        except subprocess.TimeoutExpired as late:  # what it has said is not lost
            return subprocess.CompletedProcess(command, "late", "", (late.stderr or b"").decode(errors="replace"))

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    assert [d.returncode for d in done] == [0, ends], "\n".join(d.stderr[-3000:] for d in done)
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]


def failures(said: list[dict[str, str]], check: str) -> str:
    return "\n".join(f"rank {rank}: {results[check]}" for rank, results in enumerate(said) if results[check])
