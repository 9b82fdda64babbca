"""``python -m deepfast doctor | build | tune | keys``: what is here, what would run, and why not something faster;
which batch trains fastest; what may stand in a configuration."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from deepfast import build


def doctor() -> int:
    """Prints what was found, what was built, what would be used, and why not. Returns the exit code."""
    import torch

    import deepfast
    from deepfast import build
    from deepfast.errors import ConfigError
    from deepfast.train import missing_extra

    def line(name: str, value: object) -> None:
        print(f"{name:<14} {value}")

    cxx = build.compiler()
    line("deepfast", f"{deepfast.__version__} ({Path(deepfast.__file__).parent})")
    line("python", f"{platform.python_version()} on {platform.machine()}, {platform.system()} {platform.release()}")
    line("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}, {torch.get_num_threads()} threads")
    line("instructions", f"{build.capability()} (ATEN_CPU_CAPABILITY lowers it)")
    line("huge pages", _huge_pages())
    line("C++ compiler", cxx or "none: install g++ or set CXX")
    line("nvcc", build.nvcc())
    try:
        line("cache", build.cache_dir())
    except build.BuildError as error:
        line("cache", f"none: {error}")
    line("GPU", _gpu())
    missing = missing_extra()
    line("trainer", f"missing {', '.join(missing)}: pip install 'deepfast[train]'" if missing else "ready")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepfast import kernels, ops
    line("CPU kernels", ops.LIBRARY or f"none: {ops.BUILD_ERROR}")
    line("communication", _library(build.COMM))
    line("CUDA kernels", _library(build.CUDA))
    why_not = kernels.available()
    line("Triton kernels", "ready" if why_not is None else f"none: {why_not}")
    try:
        chosen = ops.forced()
        runs = {"CPU": _on_a_cpu(chosen), "GPU": _on_a_gpu(chosen)}
    except ConfigError as error:
        runs = dict.fromkeys(("CPU", "GPU"), f"nothing: DEEPFAST_BACKEND: {error}")
    for device, what in runs.items():
        line(f"on a {device}", what)
    here = runs.values() if torch.cuda.is_available() else [runs["CPU"]]
    return 0 if ops.LIBRARY and not all(what.startswith("nothing") for what in here) else 1


def _library(library: build.Library) -> str:
    """Where it is, or that it would be compiled, or why neither. (Nothing is compiled for a question.)"""
    from deepfast import build

    found = build.find(library)
    if found is not None:
        return str(found)
    try:
        failure = build.remembered(library)
    except build.BuildError as error:
        failure = str(error)
    return "not compiled yet (python -m deepfast build)" if failure is None else f"none: {failure}"


def _on_a_cpu(chosen: str) -> str:
    import torch

    from deepfast import ops, reference
    from deepfast.errors import BackendError

    try:
        backend = ops.select(chosen, torch.device("cpu"), torch.float32)
    except BackendError as error:
        return f"nothing: DEEPFAST_BACKEND: {error}"
    if backend is reference:
        why = f"DEEPFAST_BACKEND={chosen}" if chosen == "reference" else "there are no compiled kernels"
        return f"the reference, in plain torch ({why})"
    return "Triton's interpreter" if chosen == "triton" else "compiled kernels"


def _on_a_gpu(chosen: str) -> str:
    """As ops.select() would have it; which compiles, though, what is not there."""
    from deepfast import build, kernels

    kinds = {"cuda": not _library(build.CUDA).startswith("none"), "triton": kernels.available() is None}
    kinds |= {"cpu": False, "reference": True}
    order = ("cuda", "triton", "reference") if chosen == "auto" else (chosen,)
    runs = {"cuda": "compiled kernels", "triton": "Triton", "reference": "the reference, in plain torch"}
    found = [runs[kind] for kind in order if kinds[kind]]
    return found[0] if found else f"nothing: DEEPFAST_BACKEND: {chosen!r} is not to be had there"


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.is_file():
        return "not on this system"
    text = path.read_text().strip()
    on = "[never]" not in text
    return f"{'used for' if on else 'off; they would speed up'} optimizer state ({text})"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use" + ("" if shutil.which("nvidia-smi") is None else " (nvidia-smi is here)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def build_kernels() -> int:
    """Compiles the kernels that are not there, also where an earlier attempt failed. Returns the exit code.

    0: all that this machine has the means for, and the CPU's, are there.
    """
    from deepfast import build

    made = build.build_all()
    code = 0
    for library, found in made.items():
        if isinstance(found, Path):
            print(found)
        elif library == build.CPU or not found.passing:
            code = 1
    return code


def list_keys(word: str) -> int:
    """Prints the configuration's keys with their defaults and meanings, of those that mention ``word``. Returns the
    exit code: 1 where there is none."""
    from deepfast.engine import config

    head, rule, *rows = config.table().splitlines()
    found = [row for row in rows if word.lower() in row.lower()]
    print("\n".join([head, rule, *found] if found else [f"no key has to do with {word!r}"]))
    return 0 if found else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")  # one line, without the usage


def main() -> int:
    if sys.argv[1:2] == ["tune"]:  # which reads its own options
        from deepfast.train.tune import command

        return command.main(sys.argv[2:])
    parser = _Parser(prog="python -m deepfast")
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor | build | tune | keys")
    commands.add_parser("doctor", help="what was found, built and would be used, and why not")
    commands.add_parser("build", help="compile the kernels now")
    commands.add_parser("tune", help="find the micro-batch and accumulation that train a configuration fastest")
    keys = commands.add_parser("keys", help="list what may stand in a configuration")
    keys.add_argument("word", nargs="?", default="", help="only what has to do with it")
    options = parser.parse_args()
    if options.command == "keys":
        return list_keys(options.word)
    if options.command == "doctor":
        return doctor()
    return build_kernels()


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)
