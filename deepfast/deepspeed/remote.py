"""Commands on several hosts at once, which end together."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NamedTuple

# Beginnings of the environment variables that go along to other hosts.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHON", "NCCL", "UCX", "GLOO", "TORCH", "OMP", "DEEPFAST")
PATIENCE = 30.0  # seconds for ranks to end when they are told to


class Job(NamedTuple):
    """A command.

    Attributes:
        env: variables beside this process's.
        remote: the command calls another host, and ends what it has started there when its stdin is closed.
    """

    command: list[str]
    env: dict[str, str]
    remote: bool = False


def by_ssh(host: str, port: int | None, env: dict[str, str], command: list[str]) -> list[str]:
    """Runs ``command`` on another host, in the folder of this name, until it ends or somebody closes ssh's stdin: a
    process that ssh has started does not hear that ssh was killed."""
    sent = {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)} | env
    line = shlex.join(["env", *(f"{name}={value}" for name, value in sent.items()), *command])
    script = (
        f"cd {shlex.quote(os.getcwd())} || exit 2; exec 3<&0; {line} </dev/null & child=$!; "
        "(cat <&3; kill $child) >/dev/null 2>&1 & wait $child"
    )
    return ["ssh", *(() if port is None else ("-p", str(port))), host, shlex.join(["sh", "-c", script])]


def run(jobs: list[Job]) -> int:
    """Runs them together: where one fails, or this process is told to end, all end.

    Returns:
        The exit code: 0, that of the first that has failed, 130 after Ctrl-C, or 128 and the signal's number.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        for job in jobs:
            stdin = subprocess.PIPE if job.remote else None
            running.append((job, subprocess.Popen(job.command, stdin=stdin, env={**os.environ, **job.env})))
        while True:
            codes = [process.poll() for _, process in running]
            failed = next((code for code in codes if code), None)
            if failed is not None:
                return failed if failed > 0 else 128 - failed
            if None not in codes:
                return 0
            time.sleep(0.1)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"deepfast: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        _end(running)


def _end(running: list[tuple[Job, subprocess.Popen[bytes]]]) -> None:
    for job, process in running:
        if process.stdin is not None:
            process.stdin.close()
        if not job.remote and process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + PATIENCE
    for _, process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
