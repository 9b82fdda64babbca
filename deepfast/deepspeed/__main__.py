"""``python -m deepfast.deepspeed [-m] script.py …`` runs a DeepSpeed script as it is: its ``deepspeed`` is deepfast's.

All else is as ``python script.py …`` has it. Also under torchrun: ``torchrun … -m deepfast.deepspeed script.py …``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from deepfast.deepspeed.launcher import Parser
from deepfast.errors import UserError


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m deepfast.deepspeed", description=__doc__.partition("\n")[0])
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    parser.add_argument("--local_rank", action="store_true", help="pass --local_rank=$LOCAL_RANK on, before ARGS")
    parser.add_argument("--no_python", action="store_true", help="the script is a program")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER).required = False
    return parser.parse_args(argv)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception as Python would show it, had it run the script: without the frames that have led there."""
    ours = {__file__, runpy.run_module.__code__.co_filename}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:  # of a package above it, or while that is imported
        return error.name is None or not f"{module}.".startswith(f"{error.name}.")


def _run(path: str, source: bytes) -> None:
    """The script as the module ``__main__``, which it is to the end; runpy would show it another ``sys.argv[0]``."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    exec(compile(source, path, "exec", dont_inherit=True), vars(main))  # noqa: S102 - it is what is asked for


def _refused(line: str) -> int:
    print(f"deepfast: {line}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Runs the script. Returns 2 where there is none; else it ends as the script does."""
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _refused(str(error))
    script = options.script
    passed = [f"--local_rank={os.environ.get('LOCAL_RANK', '0')}"] if options.local_rank else []
    sys.argv = [script, *passed, *options.args]
    if options.no_python:
        try:
            os.execvp(script, sys.argv)  # noqa: S606
        except OSError as error:
            return _refused(f"{script}: {error.strerror}")
    from_here = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))  # sys.path[0] is this folder
    # What the script starts by multiprocessing imports it anew, with this path.
    sys.path.insert(int(from_here), str(Path(__file__).with_name("unchanged")))
    sys.excepthook = _show
    if options.module:
        if not _there(script):
            return _refused(f"there is no module {script}")
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return 0
    try:
        source = Path(script).read_bytes()
    except OSError as error:
        return _refused(f"{script}: {error.strerror}")
    if from_here:
        sys.path[0] = str(Path(script).resolve().parent)
    _run(os.path.abspath(script), source)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
