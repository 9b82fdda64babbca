"""``python -m deepfast tune --config config.json``: the micro-batch and accumulation that train fastest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.errors import TrainingError, UserError
from deepfast.train.command import Parser, missing_extra, overridden
from deepfast.train.run import Run
from deepfast.train.tune import memory, tuned
from deepfast.train.tune.attempt import attempt
from deepfast.train.tune.search import Result, best, candidates, enough
from deepfast.train.tune.trial import RUN, Request

log = logging.getLogger("deepfast")

_MARGIN = 0.1  # of the memory that is there, which a search leaves alone
_START = 15.0  # seconds, about, until a trial measures

ABOUT = """Finds the micro-batch and the gradient accumulation that train a configuration fastest within memory. A few
real steps are trained with each, in a process of its own, on random tokens: no data is read. Where train_batch_size is
given it stays, and training gives the same result, to rounding, whichever is chosen; where it is not, the micro-batch
is doubled and the batch with it. What stands in output_dir stays as it is; tune.json and tune.png are put beside it,
and the configuration with the best batch (as JSON: comments are lost)."""
MORE = "exit code: 0; 1: no trial ran through; 2: bad input; 130: Ctrl-C, with what was found until then written"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _size(text: str) -> int:
    try:
        return memory.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_seconds.__name__, _count.__name__ = "number of seconds", "number of processes"  # what argparse says of others


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m deepfast tune", description=ABOUT, epilog=MORE)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a configuration of ds_train.py; it is not changed")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, dotted for sections")
    add("--nproc-per-node", type=_count, default=1, metavar="N", help="processes that train together (default: 1)")
    add("--seconds", type=_seconds, default=5.0, metavar="S", help="to measure each for (default: 5)")
    add(
        "--memory", type=_size, metavar="SIZE",
        help="the most that one process may take, as 8GiB: of a GPU's memory, or of the host's "
        f"(default there: what is available, less {100 * _MARGIN:.0f} %%, divided among the processes)",
    )  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="the configuration found (default: NAME.tuned.json in output_dir)")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be found out.

    Attributes:
        data: the configuration as it was written.
        config: the same, its batch resolved for these ranks.
        share: sequences of each rank in an optimizer step, where train_batch_size is given.
        limit: bytes that a rank may take; None: all that a GPU has.
        out: where the configuration found goes.
    """

    data: dict[str, Any]
    config: Config
    ranks: int
    share: int | None
    seconds: float
    limit: int | None
    run: Run
    out: Path

    @property
    def figures(self) -> Path:
        return self.run.root / "tune.json"

    @property
    def picture(self) -> Path:
        return self.run.root / "tune.png"


def read(options: argparse.Namespace) -> Plan:
    """What the command line asks for.

    Raises:
        UserError: for what the trainer would refuse, and for what cannot be done.
    """
    data, ranks = overridden(configuration.read_json(options.config), options.set), options.nproc_per_node
    config = configuration.load(data)
    fixed = config.train_batch_size is not None
    if not fixed and config.train_micro_batch_size is None and set(tuned.MICRO) & set(config._auto):
        config.train_micro_batch_size = 1  # which micro-batch, is the question
    configuration.resolve_batch(config, ranks, one_process=True)
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UserError(f"--nproc-per-node {ranks}: there are only {gpus} GPUs")
    limit = options.memory
    if limit is None and not gpus and (there := memory.available()) is not None:
        limit = int(there * (1 - _MARGIN)) // ranks
    run = Run(config.output_dir)
    out = options.out or run.root / f"{Path(options.config).stem}.tuned.json"
    share = config.batch_triple()[0] // ranks if fixed else None
    plan = Plan(data, config, ranks, share, options.seconds, limit, run, out)
    for path in (out, plan.figures, plan.picture):
        if path.resolve() == Path(options.config).resolve():
            raise UserError(f"{path}: is the configuration itself, and would be overwritten: --out names another file")
    run.check_writable()
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written: a file in a folder that is there was expected")
    return plan


def tune(plan: Plan) -> int:
    """Searches, and writes what it finds as it finds it. Returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        UserError: where the trainer would refuse the configuration.
        TrainingError: where no trial ran through.
    """
    batch, configured, _ = plan.config.batch_triple()
    micros = candidates(plan.share, configured)
    about = {
        "machine": tuned.machine(plan.ranks),
        "train_sequence_length": plan.config.train_sequence_length,
        "train_batch_size": batch if plan.share else None,
        "configured": configured,
        "memory_limit": plan.limit,
    }
    _say_hello(plan, micros)
    results: list[Result] = []
    ended, interrupted = "unfinished", False
    try:
        with _Progress(len(micros)) as progress:
            left = micros
            while left:
                micro, *left = left
                accumulation = plan.share // micro if plan.share else plan.config.batch_triple()[2]
                progress.trying(micro)
                request = Request(plan.data, micro, accumulation, plan.seconds, plan.limit)
                result, known = attempt(request, plan.ranks, plan.config.train_sequence_length, progress.refresh)
                if not results:
                    for line in (*known["log"].splitlines(), "", tuned.HEAD):
                        progress.print(line)
                    about["model"] = {name: known[name] for name in ("parameters", "dtype") if name in known}
                results.append(result)
                progress.print(tuned.line(results, _note(results, configured)))
                progress.done()
                why = enough(results)
                if why:
                    # One would like to know how much is gained: the configured one is tried at any rate.
                    reached = configured in left and result.outcome != "memory"
                    left = left[left.index(configured) :] if reached else []
                ended = "unfinished" if left else why or "there is no larger one"
                _write(plan, about, results, ended)
    except KeyboardInterrupt:
        ended, interrupted = "interrupted", True
    found = best(results)
    if found is None:
        if interrupted:
            print("interrupted before a trial was through: nothing is written")
            return 130
        raise TrainingError(f"no trial ran through: micro-batch {results[0].micro}: {_note(results[:1], configured)}")
    _write(plan, about, results, ended)
    tuned.plot(plan.picture, results, configured)
    _say_goodbye(plan, results, *found, ended)
    return 130 if interrupted else 0


def _write(plan: Plan, about: dict[str, Any], results: list[Result], ended: str) -> None:
    tuned.write_figures(plan.figures, about, results, ended)
    if found := best(results):
        tuned.write_configuration(plan.out, tuned.with_batch(plan.data, plan.config, found[0], plan.ranks)[0])


def _note(results: list[Result], configured: int) -> str:
    """Of the last one. What an earlier one has said is not said again."""
    last = results[-1]
    notes = ["as configured"] if last.micro == configured and last.outcome == "measured" else []
    if last.outcome == "memory":
        notes.append("out of memory" + (" (killed)" if last.said else ""))
    elif last.outcome == "failed":
        again = any(result.said == last.said for result in results[:-1])
        notes.append("failed, as before" if again else f"failed: {last.said}")
    elif last.accumulation > RUN:
        notes.append(f"{RUN} micro-batches of a step were run")
    return ", ".join(notes)


def _say_hello(plan: Plan, micros: list[int]) -> None:
    batch, _, accumulation = plan.config.batch_triple()
    processes = f"{plan.ranks} processes" if plan.ranks > 1 else "one process"
    minutes = math.ceil(len(micros) * (_START + plan.seconds) / 60)
    print(f"at most {len(micros)} trials, {processes} each, about {minutes} min; Ctrl-C keeps the best until then")
    if plan.share:
        print(f"train_batch_size={batch} stays: training gives the same, to rounding and dropout, whichever is chosen")
    else:
        print(
            f"train_batch_size is not given: it grows with the micro-batch, {accumulation} of which make a step, and "
            "training's result changes with it"
        )
    print("tokens are random: no data is read")
    if plan.limit is not None:
        print(f"memory: {memory.said(plan.limit)} for each process")
    sys.stdout.flush()


def _say_goodbye(plan: Plan, results: list[Result], chosen: Result, why: str, ended: str) -> None:
    _, micro, _ = plan.config.batch_triple()
    written, keys = tuned.with_batch(plan.data, plan.config, chosen, plan.ranks)
    print(f"\nended after {len(results)} trials: {ended}")
    over = f" on each of {plan.ranks} ranks" if plan.ranks > 1 else ""
    print(f"best: micro-batch {chosen.micro} x accumulation {chosen.accumulation}{over}: {chosen.tokens_per_s:,.0f} "
          f"tokens/s, {memory.said(chosen.peak)}: {why}")  # fmt: skip
    before = next((r for r in results if r.micro == micro and r.outcome == "measured"), None)
    if before is chosen:
        print("the configuration has it already")
    elif before is not None:
        print(f"that is {chosen.tokens_per_s / before.tokens_per_s:.2f} times as fast as the configured {micro}")
    elif any(result.outcome == "memory" and result.micro <= micro for result in results):
        print(f"the configured {micro} needs more memory than there is")
    print("  " + json.dumps({key: written[key] for key in keys})[1:-1])
    print(f"figures: {plan.figures}, {plan.picture}")
    launch = "python" if plan.ranks == 1 else f"torchrun --standalone --nproc-per-node {plan.ranks}"
    print(f"train with it: {launch} -m deepfast.train --config {shlex.quote(str(plan.out))}", flush=True)


class _Progress:
    """How far the search is, on stderr: a bar on a terminal, in a file a line for each trial."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="trial", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False)
        self.total, self.count = total, 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def trying(self, micro: int) -> None:
        self.micro = micro
        self.bar.set_description_str(f"micro-batch {micro}")

    def refresh(self) -> None:
        self.bar.refresh()

    def print(self, line: str) -> None:
        """On stdout, above the bar."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def done(self) -> None:
        self.count += 1
        self.bar.update()
        if self.bar.disable:
            print(f"trial {self.count}/{self.total}: micro-batch {self.micro}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 where no trial ran through, 2 for bad input, 130 on Ctrl-C."""
    quiet = logging.NullHandler()  # the trainer's warnings are the trials' to say
    log.addHandler(quiet)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if missing := missing_extra():
            raise UserError(f"{', '.join(missing)} not installed: pip install 'deepfast[train]'")
        return tune(read(options))
    except UserError as error:
        return _refused(str(error), error.exit_code)
    except OSError as error:
        return _refused(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        return 130
    finally:
        log.removeHandler(quiet)


def _refused(message: str, code: int = UserError.exit_code) -> int:
    line = message.replace("\n", "\\n")
    print(f"deepfast tune: {line}", file=sys.stderr)
    return code
