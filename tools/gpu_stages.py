"""Runs stages one after the other in the time there is, and keeps on disk what is known at any moment.

A stage's commands run at once, each in a session of its own that is ended whole. What they say goes to OUT/log.txt,
figures come a line each in OUT/figures.jsonl, and OUT/gpu.json, written anew by rename whenever there is news, holds
all of it: whoever kills this loses nothing that was known before.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PRCTL = ctypes.CDLL(None).prctl
PAUSE = 0.1  # seconds between two looks at what runs
RESERVE = 3.0  # seconds of the budget for the last words


@dataclasses.dataclass(frozen=True)
class Stage:
    """commands: they run at once. says: what each must say to have passed; a checker that has checked nothing has not.
    again: what has died (not: failed) is run again if it got further, see ``each``."""

    name: str
    limit: float  # seconds
    commands: Sequence[Sequence[object]]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    says: str = ""
    again: bool = False


class Session:
    """Args: out: folder of the results. scratch: of what nobody wants afterwards. budget: seconds for everything.
    about: what the JSON says of itself."""

    def __init__(
        self, out: Path, scratch: Path, budget: float, env: Mapping[str, str], root: Path, about: Mapping[str, object]
    ) -> None:
        self.out, self.scratch, self.root, self.about = out.resolve(), scratch, root, dict(about)
        self.out.mkdir(parents=True, exist_ok=True)
        for old in ("log.txt", "figures.jsonl"):
            (self.out / old).unlink(missing_ok=True)
        self.begun, self.facts = scratch / "begun.txt", scratch / "facts.json"
        self.env = {
            **os.environ,
            **env,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "SESSION_OUT": str(self.out),
            "SESSION_BEGUN": str(self.begun),
        }
        self.start, self.budget = time.monotonic(), budget
        self.stages: dict[str, dict[str, object]] = {}
        self.behind: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.figures = 0
        self.keep()

    def passed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.budget - self.passed() - RESERVE

    def run(self, stage: Stage) -> None:
        """Never raises for what a command does: the next stage is to run."""
        limit = min(stage.limit, self.left())
        if limit < 1:
            self.stages[stage.name] = {"verdict": "no time was left"}
            self.keep()
            return
        begin = time.monotonic()
        until = begin + limit
        self.stages[stage.name] = {"verdict": "running"}
        self.keep()
        print(f"\n== {stage.name}: {limit:.0f} s at most", flush=True)
        log = self.out / "log.txt"
        with log.open("ab", buffering=0) as file:
            file.write(f"\n== {stage.name}, {self.passed():.0f} s after the start\n".encode())
            at = file.tell()
            self.begun.unlink(missing_ok=True)
            verdicts = self._run_all(stage, file, until)
            while stage.again and self._died_further(verdicts) and time.monotonic() < until:
                more = self._run_all(stage, file, until)
                verdicts = [f"{old}; then {new}" for old, new in zip(verdicts, more, strict=True)]
        said = log.read_bytes()[at:].decode(errors="replace").splitlines()
        silent = len(stage.commands) - sum(stage.says in line for line in said) if stage.says else 0
        if set(verdicts) == {"passed"} and silent > 0:
            verdicts = [f'{silent} of {len(stage.commands)} have not said "{stage.says}"']
        fine = set(verdicts) == {"passed"}
        self.stages[stage.name] = {
            "verdict": "passed" if fine else ", ".join(dict.fromkeys(v for v in verdicts if v != "passed")),
            "seconds": round(time.monotonic() - begin, 1),
            "said": said[-3 if fine else -40 :],
        }
        self.keep()
        lines = [] if self.figures and fine else said[-3 if fine else -25 :]
        print("\n".join([*lines, f"{stage.name}: {self.stages[stage.name]['verdict']}"]), flush=True)

    def _run_all(self, stage: Stage, log: object, until: float) -> list[str]:
        self._before = self.begun.stat().st_size if self.begun.is_file() else 0
        running = [self._start(command, stage.env, log) for command in stage.commands]
        verdicts: dict[int, str] = {}
        try:
            while len(verdicts) < len(running):
                for i, process in enumerate(running):
                    if i not in verdicts and (verdict := verdict_of(process, until)):
                        verdicts[i] = verdict
                        end_whole(process)
                self._tell_figures()
                time.sleep(PAUSE)
        finally:  # somebody has interrupted
            for process in running:
                end_whole(process)
        self._tell_figures()
        return [verdicts[i] for i in range(len(running))]

    def _start(self, command: Sequence[object], env: Mapping[str, str], log: object) -> subprocess.Popen[bytes] | str:
        """The process, or why there is none."""
        try:
            return subprocess.Popen(
                [str(c) for c in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env={**self.env, **env},
                start_new_session=True,
                preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 (this process has one thread)
            )
        except OSError as error:
            return f"could not be run: {error}"

    def _died_further(self, verdicts: list[str]) -> bool:
        died = verdicts[0].rpartition("; then ")[2] not in ("passed", "exit code 1")
        return died and self.begun.is_file() and self.begun.stat().st_size > self._before

    def begin_behind(self, name: str, *command: object, env: Mapping[str, str] | None = None) -> None:
        """Beside the stages, at low priority; it has until the end."""
        with (self.scratch / "behind.txt").open("ab") as log:
            process = self._start(["nice", "-n", "10", *command], env or {}, log)
        if isinstance(process, str):
            self.stages[name] = {"verdict": process}
        else:
            self.behind[name] = process, time.monotonic()

    def finish(self) -> bool:
        """Whether all has passed."""
        for name, (process, begin) in self.behind.items():
            try:
                code = process.wait(max(1.0, self.left()))
                verdict = "passed" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                verdict = "had not ended"
            end_whole(process)
            said = (self.scratch / "behind.txt").read_text(errors="replace").splitlines()
            self.stages[name] = {"verdict": verdict, "seconds": round(time.monotonic() - begin, 1), "said": said[-10:]}
        self.keep()
        bad = [name for name, stage in self.stages.items() if stage["verdict"] != "passed"]
        print(f"\n{self.passed():.0f} s. {'Not passed: ' + ', '.join(bad) if bad else 'All passed.'}", flush=True)
        return not bad

    def end(self) -> None:
        """Ends what runs behind: somebody has interrupted."""
        for process, _ in self.behind.values():
            end_whole(process)

    def _tell_figures(self) -> None:
        rows = self._rows()
        for row in rows[self.figures :]:
            print(in_short(row), flush=True)
        if len(rows) > self.figures:
            self.figures = len(rows)
            self.keep()

    def _rows(self) -> list[object]:
        return list(whole_lines(self.out / "figures.jsonl"))

    def keep(self) -> None:
        known = {
            **self.about,
            "seconds": round(self.passed(), 1),
            "machine": json.loads(self.facts.read_text()) if self.facts.is_file() else {},
            "stages": self.stages,
            "figures": self._rows(),
        }
        replace(self.out / "gpu.json", json.dumps(known, indent=1) + "\n")


def in_short(row: Mapping[str, object]) -> str:
    """A figure as a line to be read; all of it is in the JSON."""
    times = [f"{name} {times['ms']} ms" for name, times in row.items() if isinstance(times, dict) and "ms" in times]
    ours = next((times for times in row.values() if isinstance(times, dict) and "host_us" in times), {})
    more = [f"host {ours['host_us']} us"] if ours else []
    if "share_of_copy" in row:
        expected = f" (expected: {row['expected']})" if row.get("expected") else ""
        more.append(f"{row['share_of_copy']} of a copy's speed{expected}")
    return f"{row['title']}: {', '.join([*times, *more])}"


def replace(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, whoever is killed when."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)


def whole_lines(path: Path) -> list[object]:
    """JSON, a line each; the last one may still be coming."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def die_with(parent: int) -> None:
    """Whoever kills the session has the GPU to himself."""
    PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def verdict_of(process: subprocess.Popen[bytes] | str, until: float) -> str | None:
    """None: it still runs, and may."""
    code = process if isinstance(process, str) else process.poll()
    if isinstance(code, str):
        return code
    if code is not None:
        return "passed" if code == 0 else f"exit code {code}"
    return "stopped at its time limit" if time.monotonic() > until else None


def end_whole(process: subprocess.Popen[bytes] | str) -> None:
    """With all that it has started: it would run on, on the GPU."""
    if isinstance(process, str):
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # a driver may not let go of it


# For what a stage runs.


def report(row: Mapping[str, object]) -> None:
    """A figure, known from now on."""
    line = json.dumps(row)
    print(line, flush=True)
    if "SESSION_OUT" in os.environ:
        with Path(os.environ["SESSION_OUT"], "figures.jsonl").open("a") as file:
            file.write(line + "\n")


def each(cases: Mapping[str, Callable[[], object]]) -> int:
    """Runs them in order and returns an exit code. After a CUDA error, nothing works in its process any more: it ends,
    and when it is started again, goes on behind the case that was to blame."""
    begun = Path(os.environ["SESSION_BEGUN"]) if "SESSION_BEGUN" in os.environ else None
    done = begun.read_text().splitlines() if begun and begun.is_file() else []
    failed = False
    for name, case in cases.items():
        if name in done:
            continue
        if begun:
            with begun.open("a") as file:
                file.write(name + "\n")
        try:
            case()
        except Exception as error:  # the next one is to run
            failed = True
            traceback.print_exc(file=sys.stdout)
            print(f"{name}: {error}", flush=True)
            if context_is_broken():
                os._exit(3)  # taking it down may hang
    return int(failed)


def context_is_broken() -> bool:
    """Whether the GPU's errors stay with this process."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(error, flush=True)
        return True
    return False
