"""``deepfast script.py …``: DeepSpeed's launcher, as a torchrun command that it prints and runs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from deepfast.deepspeed import hosts, remote
from deepfast.deepspeed.hosts import Slots
from deepfast.errors import UserError

HOSTFILE = "/job/hostfile"  # where DeepSpeed looks if it is told nothing
PORT = 29500

ABOUT = """Runs a DeepSpeed script on the GPUs of this host, or of several, one process each; without GPUs on the CPU.
The script is not changed: its `deepspeed` is deepfast.deepspeed. It is started by torchrun; the command is printed."""
MORE = """deepfast doctor | build | tune | keys   what `python -m deepfast` has
exit code                               torchrun's; 2: bad input, one line on stderr; 130, 143: Ctrl-C, SIGTERM"""


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="deepfast",
        usage="deepfast [options] script.py [args of the script]",
        description=ABOUT,
        epilog=MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--num_gpus", "--num_accelerators", type=int, metavar="N", help="GPUs (without GPUs: processes) of each host")
    add("--num_nodes", type=int, metavar="N", help="the first N hosts of the hostfile")
    add("-i", "--include", default="", metavar="HOSTS", help="which GPUs: host:0,1@host2; this host is localhost")
    add("-e", "--exclude", default="", metavar="HOSTS", help="all GPUs but these")
    add("-H", "--hostfile", metavar="FILE", help=f"a line for each host: name slots=4 (default: {HOSTFILE}, if there)")
    add("--master_addr", default="", metavar="NAME", help="where ranks meet; default: the first host")
    add("--master_port", type=int, metavar="PORT", help=f"default: any that is free; of several hosts {PORT}")
    add("--module", action="store_true", help="the script is a module's name, as of python -m")
    add("--no_python", action="store_true", help="the script is a program")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--node_rank", type=int, default=-1, metavar="N", help="start only this host's part; the others start theirs")
    add("--no_ssh", action="store_true", help="the same, with --node_rank")
    add("--ssh_port", type=int, metavar="PORT", help="where other hosts answer")
    add("--launcher", default="ssh", help="ssh (also for pdsh); others are refused")
    add("-q", "--quiet", action="store_true", help="do not print the command")
    for unused in ("--no_ssh_check", "--force_multi", "--bind_cores_to_rank"):
        add(unused, action="store_true", help=argparse.SUPPRESS)
    add("--log_level", help=argparse.SUPPRESS)
    add("script", help="the script; what comes after it is its own")
    add("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.launcher.lower() not in ("ssh", "pdsh"):
        raise UserError(f"--launcher {options.launcher}: hosts are reached by ssh; under it, start torchrun itself")
    if options.include and options.exclude:
        raise UserError("--include and --exclude: only one of them")
    for name in ("num_gpus", "num_nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            if value != -1:  # DeepSpeed's word for "not said"
                raise UserError(f"--{name} {value}: at least 1 was expected")
            setattr(options, name, None)
        elif value is not None and (options.include or options.exclude):
            raise UserError(f"--{name} and --include or --exclude: only one of them")
    if options.no_ssh and options.node_rank < 0:
        raise UserError("--no_ssh: which host is this? --node_rank 0 and so on")
    if options.module and options.no_python:
        raise UserError("--module and --no_python: only one of them")
    if not (options.module or options.no_python) and not Path(options.script).exists():
        raise UserError(f"{options.script}: there is no such file")


def _hostfile(options: argparse.Namespace) -> Slots | None:
    if options.hostfile is not None and not Path(options.hostfile).exists():
        raise UserError(f"--hostfile {options.hostfile}: there is no such file")
    file = Path(options.hostfile or HOSTFILE)  # /dev/null is no hostfile, as in DeepSpeed
    return hosts.read(file) if file.is_file() else None


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _of_this_host(options: argparse.Namespace) -> tuple[Slots, bool]:
    """(its GPUs, whether they are all that there are); without GPUs, where any number of processes may be asked for,
    one process."""
    named = options.include or options.exclude
    if named and os.environ.pop("CUDA_VISIBLE_DEVICES", None) is not None:
        _say("CUDA_VISIBLE_DEVICES is not used, for --include or --exclude is there")
    gpus = _gpus()
    if gpus == 0 and options.num_gpus:
        return {"localhost": list(range(options.num_gpus))}, False
    return {"localhost": list(range(gpus or 1))}, gpus > 0


def resources(options: argparse.Namespace) -> Slots:
    """All processes that there will be: of each host its slots.

    Raises:
        UserError: for more than there are.
    """
    listed = _hostfile(options)
    found, known = (listed, True) if listed is not None else _of_this_host(options)
    if options.include or options.exclude:
        return hosts.choose(found, options.include, options.exclude, known)
    nodes = options.num_nodes or len(found)
    if listed is None and nodes > 1 and options.node_rank >= 0:
        found = {f"#{rank}": found["localhost"] for rank in range(nodes)}  # nobody is called
    if nodes > len(found):
        raise UserError(f"--num_nodes {nodes}: there is only {len(found)} (--hostfile names hosts)")
    found = dict(list(found.items())[:nodes])
    for host, slots in found.items():
        if (options.num_gpus or 0) > len(slots):
            raise UserError(f"--num_gpus {options.num_gpus}: {host} has only {len(slots)}")
    return {host: slots[: options.num_gpus] for host, slots in found.items()}


def command(options: argparse.Namespace, found: Slots, rank: int) -> tuple[dict[str, str], list[str]]:
    """What starts one host's processes: (environment variables, arguments).

    Args:
        rank: the host's number.
    """
    slots = list(found.values())[rank]
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={len(slots)}"]
    if len(found) == 1 and options.master_port is None and not options.master_addr:
        line.append("--standalone")
    else:
        address = options.master_addr or ("127.0.0.1" if len(found) == 1 else next(iter(found)))
        if address in ("localhost", "#0") and len(found) > 1:
            raise UserError("--master_addr is missing: a name of the first host by which the others know it")
        line += [f"--nnodes={len(found)}", f"--node-rank={rank}", f"--master-addr={address}"]
        line.append(f"--master-port={options.master_port or PORT}")
    line += ["-m", "deepfast.deepspeed"]
    flags = {"--local_rank": not options.no_local_rank, "-m": options.module, "--no_python": options.no_python}
    line += [flag for flag, is_set in flags.items() if is_set]
    chosen = options.include or options.exclude
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))} if chosen else {}
    return env, [*line, options.script, *options.args]


def _under_nohup() -> dict[str, str]:
    """Variables (those of its --signals-to-handle) by which torchrun, too, ignores SIGHUP where this process does; else
    it would end at a logout."""
    if "PET_SIGNALS_TO_HANDLE" in os.environ or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        return {}
    return {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT"}


def _say(line: str) -> None:
    print(f"deepfast: {line}", file=sys.stderr, flush=True)


def start(options: argparse.Namespace) -> int:
    """Starts it all. Returns the exit code; of one host alone it does not return, but becomes torchrun."""
    found = resources(options)
    rank = options.node_rank
    if rank >= len(found):
        raise UserError(f"--node_rank {rank}: there are {len(found)} hosts, from 0 (--num_nodes or --hostfile)")
    if rank < 0 and len(found) == 1 and hosts.is_here(next(iter(found))):
        rank = 0
    wanted = {host: command(options, found, n) for n, host in enumerate(found) if rank in (-1, n)}
    jobs: list[remote.Job] = []
    for host, (env, line) in wanted.items():
        if rank >= 0 or hosts.is_here(host):
            env |= _under_nohup()
            jobs.append(remote.Job(line, env))
        else:
            jobs.append(remote.Job(remote.by_ssh(host, options.ssh_port, env, line), {}, remote=True))
        if not options.quiet:
            told = shlex.join([*(f"{name}={value}" for name, value in env.items()), *line])
            _say(f"{host}: {told}" if len(wanted) > 1 else told)
    if rank >= 0:
        os.execve(jobs[0].command[0], jobs[0].command, {**os.environ, **jobs[0].env})  # noqa: S606
    return remote.run(jobs)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("doctor", "build", "tune", "keys") and not Path(argv[0]).exists():
        os.execv(sys.executable, [sys.executable, "-m", "deepfast", *argv])  # noqa: S606
    try:
        if not argv:
            raise UserError("which script? deepfast train.py ... (see --help)")
        return start(parse(argv))
    except UserError as error:
        _say(str(error))
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
