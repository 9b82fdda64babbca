"""Starts a trial in processes of its own, and says how it ended, however it ended. None of them outlives this one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepfast.errors import UserError
from deepfast.train.tune.search import Result
from deepfast.train.tune.trial import Request

HANGS = 900.0  # seconds without a micro-batch, or with the model not yet there: nothing comes any more
_PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL
_PAUSE = 0.1


def attempt(request: Request, ranks: int, length: int, idle: Callable[[], None]) -> tuple[Result, dict[str, Any]]:
    """(how it went, what else is known: its ``log``; ``parameters`` and ``dtype`` of a model that was trained).

    Args:
        length: tokens a sequence.
        idle: is called now and then.

    Raises:
        UserError: where the trainer would refuse to train, whatever the micro-batch.
    """
    with tempfile.TemporaryDirectory(prefix="deepfast-tune-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        (folder / "beat").touch()
        with _started(folder, ranks) as process:
            hangs = not _ended(process, folder / "beat", idle)
        outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))]
        log, errors = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    refused = [outcome["refused"] for outcome in outcomes if "refused" in outcome]
    killed = process.returncode == -signal.SIGKILL or re.search(r"exitcode *: *-9\b", errors) is not None

    def result(outcome: Any, **figures: Any) -> Result:
        return Result(request.micro, request.accumulation, outcome, **figures)

    if sum("peak" in outcome for outcome in outcomes) == ranks:
        seconds = outcomes[0]["step_seconds"]
        tokens = request.micro * request.accumulation * ranks * length
        measured = result(
            "measured",
            step_seconds=seconds,
            steps=outcomes[0]["steps"],
            tokens_per_s=tokens / seconds,
            peak=max(outcome["peak"] for outcome in outcomes),
        )
        return measured, {**outcomes[0], "log": log}
    if hangs:
        return result("failed", said=f"nothing came of it in {HANGS:.0f} seconds"), {"log": log}
    if any("memory" in outcome for outcome in outcomes):
        return result("memory"), {"log": log}
    if refused:
        raise UserError(refused[0])
    failed = [outcome["failed"] for outcome in outcomes if "failed" in outcome]
    if not failed and killed:  # where memory runs out, the kernel kills
        return result("memory", said="killed"), {"log": log}
    lines = failed[0].splitlines()[:1] if failed else errors.strip().splitlines()[-1:]
    return result("failed", said=lines[0] if lines else f"exit code {process.returncode}"), {"log": log}


def _ended(process: subprocess.Popen[bytes], beat: Path, idle: Callable[[], None]) -> bool:
    """Waits for it. False where it does nothing any more."""
    while time.time() - beat.stat().st_mtime < HANGS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PAUSE)
            return True
        idle()
    return False


@contextlib.contextmanager
def _started(folder: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    leash = [sys.executable, str(Path(__file__).with_name("leash.py"))]
    trial = [sys.executable, "-m", "deepfast.train.tune.trial", str(folder)]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        trial = [*torchrun, "--no-python", *leash, "{}", *trial]
    command = [*leash, str(os.getpid()), *trial]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        # In a session of its own, a terminal's Ctrl-C does not reach it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks; else they end with it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
                process.kill()
                process.wait()
