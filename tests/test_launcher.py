"""``deepfast script.py``: which processes it starts, where, and that an unchanged script runs in them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, run

DEEPFAST = (sys.executable, "-m", "deepfast.deepspeed.launcher")
RUNNER = (sys.executable, "-m", "deepfast.deepspeed")
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def put(place: Path, name: str, text: str, mode: int = 0o644) -> Path:
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def printed(tmp_path):
    """What a torchrun command would be, without running it: (its variables and arguments, the exit code, stderr)."""
    program = (
        "import json, os, signal, sys; from deepfast.deepspeed import hosts, launcher, remote\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "visible = lambda: os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "launcher._gpus = lambda: len(visible().split(',')) if visible() else int(os.environ['GPUS'])\n"
        "def execve(path, line, env):\n"
        "    print(json.dumps([[env.get('CUDA_VISIBLE_DEVICES', ''), line]])), sys.exit()\n"
        "os.execve = execve\n"
        "remote.run = lambda jobs: print(json.dumps([[job.env, job.command] for job in jobs]))\n"
        "hosts.is_here = lambda host: host in ('localhost', 'here')\n"
        "sys.exit(launcher.main())"
    )
    put(tmp_path, "train.py", "")
    put(tmp_path, "hosts", "here slots=4  # this one\n\nother slots=4\nthird slots=2\n")

    def ask(*arguments: object, gpus: int = 0, visible: str = ""):
        env = {**ENV, "GPUS": str(gpus), "CUDA_VISIBLE_DEVICES": visible}
        done = run(sys.executable, "-c", program, *arguments, cwd=tmp_path, env=env)
        return (json.loads(done.stdout) if done.stdout else None), done.returncode, done.stderr

    return ask


def test_one_host(printed):
    (line,), _, said = printed("train.py", "--lr", "1")
    variables, command = line
    expected = (
        "-m torch.distributed.run --nproc-per-node=1 --standalone -m deepfast.deepspeed --local_rank train.py --lr 1"
    )
    assert (variables, command[1:]) == ("", expected.split())
    assert said == f"deepfast: {shlex.join(command)}\n"
    (line,), _, said = printed("-q", "--module", "--no_local_rank", "--num_gpus=3", "some.module", "--module")
    expected = "--nproc-per-node=3 --standalone -m deepfast.deepspeed -m some.module --module"
    assert (line[1][3:], said) == (expected.split(), "")
    (line,), *_ = printed("--master_port", 29501, "--no_python", "/bin/true")
    expected = "--nproc-per-node=1 --nnodes=1 --node-rank=0 --master-addr=127.0.0.1 --master-port=29501"
    assert line[1][3:] == [*expected.split(), "-m", "deepfast.deepspeed", "--local_rank", "--no_python", "/bin/true"]


def test_gpus_of_one_host(printed):
    def chosen(*options, **here):
        (line,), _, said = printed(*options, "train.py", **here)
        return line[0], line[1][3], said

    assert chosen(gpus=4)[:2] == ("", "--nproc-per-node=4")
    assert chosen("--num_gpus", 2, gpus=4)[:2] == ("", "--nproc-per-node=2")
    assert chosen("--num_gpus", 2, gpus=2, visible="2,3")[:2] == ("2,3", "--nproc-per-node=2")
    assert chosen("--include", "localhost:0,2", gpus=4)[:2] == ("0,2", "--nproc-per-node=2")
    assert chosen("--exclude", "localhost:0,2", gpus=4)[:2] == ("1,3", "--nproc-per-node=2")
    assert chosen("--include", "localhost", gpus=4)[:2] == ("0,1,2,3", "--nproc-per-node=4")
    assert chosen("--include", "localhost:0,2")[:2] == ("0,2", "--nproc-per-node=2")  # no GPUs: processes
    variables, _, said = chosen("--include", "localhost:1", gpus=4, visible="0")
    assert variables == "1"
    assert "CUDA_VISIBLE_DEVICES is not used" in said
    assert "CUDA_VISIBLE_DEVICES=1 " in said, "the line that is printed can be pasted"


def test_several_hosts(printed):
    jobs, _, said = printed("-H", "hosts", "--include", "other:1,3@here:0", "--ssh_port", 22, "train.py", "it's")
    assert len(jobs) == 2
    (here, local), (_, there) = jobs
    rendezvous = ["--nnodes=2", "--node-rank=0", "--master-addr=here", "--master-port=29500"]
    assert (here, local[3:8]) == ({"CUDA_VISIBLE_DEVICES": "0"}, ["--nproc-per-node=1", *rendezvous])
    assert there[:4] == ["ssh", "-p", "22", "other"]
    script = shlex.split(there[4])[2]
    command = shlex.join([*local[:3], "--nproc-per-node=2", *rendezvous, *local[8:]]).replace("rank=0", "rank=1")
    assert f"CUDA_VISIBLE_DEVICES=1,3 {command} </dev/null" in script
    lines = said.splitlines()
    assert [line.split()[1] for line in lines] == ["here:", "other:"]
    assert f"CUDA_VISIBLE_DEVICES=1,3 {command}" in lines[1]
    jobs, *_ = printed("-H", "hosts", "--num_nodes", 2, "--num_gpus", 3, "--master_addr", "a", "train.py")
    assert len(jobs) == 2
    assert all("--nproc-per-node=3 --nnodes=2" in " ".join(command) for _, command in jobs)
    jobs, *_ = printed("-H", "hosts", "--exclude", "here@third:0", "train.py")
    assert [shlex.join(c).count("ssh") for _, c in jobs] == [1, 1]
    assert "--nproc-per-node=1 --nnodes=2 --node-rank=1 --master-addr=other" in shlex.join(jobs[1][1])


def test_a_host_may_start_its_own_part(printed):
    (line,), *_ = printed("-H", "hosts", "--no_ssh", "--node_rank", 2, "train.py")
    assert line[1][3:6] == ["--nproc-per-node=2", "--nnodes=3", "--node-rank=2"]
    (line,), *_ = printed("--num_nodes", 2, "--node_rank", 1, "--master_addr", "a", "train.py", gpus=2)
    assert line[1][3:7] == ["--nproc-per-node=2", "--nnodes=2", "--node-rank=1", "--master-addr=a"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "": "which script? deepfast train.py",
        "absent.py": "absent.py: there is no such file",
        "--num_gpu 2 train.py": "unrecognized arguments: --num_gpu",
        "--num_gpus 0 train.py": "--num_gpus 0: at least 1",
        "--num_gpus 5 train.py": "--num_gpus 5: localhost has only 4",
        "--num_gpus x train.py": "--num_gpus",
        "--num_nodes 2 train.py": "--num_nodes 2: there is only 1",
        "--include localhost:7 train.py": "localhost has no slot 7",
        "--include elsewhere train.py": "no host elsewhere",
        "--include localhost:a train.py": "HOST:0,1 was expected",
        "--exclude localhost train.py": "nothing is left",
        "--include localhost --exclude localhost train.py": "only one of them",
        "--include localhost --num_gpus 1 train.py": "only one of them",
        "--launcher slurm train.py": "--launcher slurm",
        "--hostfile absent train.py": "--hostfile absent: there is no such file",
        "--hostfile train.py train.py": "train.py names no host",
        "--hostfile bad train.py": "bad, line 2: a line like `worker-1 slots=4` was expected",
        "--hostfile twice train.py": "twice, line 2: a is there already",
        "--hostfile away --include localhost train.py": "no host localhost (there are: a, b)",
        "--hostfile two train.py": "--master_addr is missing",
        "--no_ssh train.py": "--node_rank",
        "--node_rank 3 train.py": "--node_rank 3: there are 1 hosts",
        "--module --no_python train.py": "only one of them",
    }.items(),
)
def test_bad_input_is_one_line(printed, tmp_path, arguments, says):
    put(tmp_path, "bad", "a slots=1\nb 2\n")
    put(tmp_path, "twice", "a slots=1\na slots=2\n")
    put(tmp_path, "away", "a slots=1\nb slots=2\n")
    put(tmp_path, "two", "localhost slots=1\nb slots=2\n")
    ran, code, said = printed(*arguments.split(), gpus=4)
    assert (ran, code, len(said.splitlines())) == (None, 2, 1), said
    assert said.startswith("deepfast: ")
    assert says in said
    assert len(said) <= 210


def test_no_hostfile_is_this_host(printed):
    (line,), *_ = printed("--hostfile", os.devnull, "train.py")
    assert "--standalone" in line[1]


SCRIPT = """\
import argparse, os, sys
import deepspeed
from deepspeed.ops.adam import FusedAdam
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--out")
args = deepspeed.add_config_arguments(parser).parse_args()
torch.manual_seed(0)
net = torch.nn.Linear(2, 1)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
engine, *_ = deepspeed.initialize(args=args, model=net, optimizer=FusedAdam(net.parameters()), config=config)
engine.backward(engine(torch.ones(1, 2) * deepspeed.comm.get_rank()).sum())
engine.step()
rank = deepspeed.comm.get_rank()
with open(f"{args.out}.{rank}", "w") as file:
    print(args.local_rank, deepspeed.comm.get_world_size(), sys.argv[0], os.path.basename(sys.path[0]),
          os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
"""


def test_an_unchanged_script_trains_on_two_processes(tmp_path):
    put(tmp_path, "sub/train.py", SCRIPT)
    options = ("--include", "localhost:0,2", "sub/train.py", "--out", "said", "--deepspeed")
    done = run(*DEEPFAST, *options, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"said.{rank}").read_text().split() == [str(rank), "2", "sub/train.py", "sub", "0,2"]


FAKE_SSH = """\
#!/bin/sh
# ssh [-p PORT] HOST COMMAND on this very machine: what was asked for is written down
[ "$1" = -p ] && shift 2
echo "$1" >>"$FAKE_SSH_LOG"
shift
exec sh -c "$*"
"""


def with_fake_ssh(tmp_path: Path) -> dict[str, str]:
    ssh = put(tmp_path, "bin/ssh", FAKE_SSH, 0o755)
    return {**ENV, "PATH": f"{ssh.parent}:{os.environ['PATH']}", "FAKE_SSH_LOG": str(tmp_path / "log")}


def test_two_hosts_train_together(tmp_path):
    """With torchrun itself; what it starts has no need of torch."""
    said = "f\"{os.environ['LOCAL_RANK']} {os.environ['WORLD_SIZE']} {sys.argv[1:]}\\n\""
    text = f"import deepspeed, os, sys; sys.stdout.write({said})\n"  # in one piece: two write to one pipe
    put(tmp_path, "it's a script.py", text)
    put(tmp_path, "hosts", "no-such-host-a.invalid slots=1\nno-such-host-b.invalid slots=1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", port, "it's a script.py")
    done = run(*DEEPFAST, *options, cwd=tmp_path, env=with_fake_ssh(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((tmp_path / "log").read_text().split()) == ["no-such-host-a.invalid", "no-such-host-b.invalid"]
    assert done.stdout == "0 2 ['--local_rank=0']\n" * 2, "two ranks, each the first on its host"


TOGETHER = """\
import sys
from deepfast.deepspeed import remote
from deepfast.deepspeed.remote import Job, by_ssh, run
remote.PATIENCE = 1e6  # nobody is to be killed for being late
say = "echo $$ >pid.{0}; while [ ! -e pid.0 ] || [ ! -e pid.1 ]; do sleep 0.05; done; {1}"
lines = [["sh", "-c", say.format(n, what)] for n, what in enumerate(sys.argv[1:])]
sys.exit(run([Job(by_ssh("there", None, {}, lines[0]), {}, remote=True), Job(lines[1], {})]))
"""
WAITS = "exec sleep 10000"
# What is ignored stays so in all that is started, and a suite that runs in the background ignores Ctrl-C.
AS = """\
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.{})
os.execvp(sys.argv[1], sys.argv[1:])
"""
IN_A_TERMINAL = (sys.executable, "-c", AS.format("SIG_DFL"))
UNDER_NOHUP = (sys.executable, "-c", AS.format("SIG_IGN"))


def together(tmp_path: Path, *what: str, under: tuple[str, ...] = IN_A_TERMINAL) -> subprocess.Popen[str]:
    """One command on a host that ssh calls, one on this one."""
    env = {**os.environ, **with_fake_ssh(tmp_path)}
    command = [*under, sys.executable, "-c", TOGETHER, *what]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_ended(tmp_path: Path) -> bool:
    pids = [int((tmp_path / f"pid.{n}").read_text()) for n in (0, 1)]
    deadline = time.monotonic() + HANGS
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(map(gone, pids))


@pytest.mark.parametrize("what", [("exit 3", WAITS), (WAITS, "exit 3"), (WAITS, "kill -6 $$")])
def test_where_one_host_fails_all_end(tmp_path, what):
    job = together(tmp_path, *what)
    _, said = job.communicate(timeout=HANGS)
    assert job.returncode == (134 if "kill" in what[1] else 3), said
    assert all_ended(tmp_path)


def test_all_that_end_well_are_waited_for(tmp_path):
    job = together(tmp_path, "sleep 0.3; touch late", "exit 0")
    job.communicate(timeout=HANGS)
    assert job.returncode == 0
    assert (tmp_path / "late").exists()


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_hosts(tmp_path, signal_, code):
    job = together(tmp_path, WAITS, WAITS)
    while job.poll() is None and not all((tmp_path / f"pid.{n}").exists() for n in (0, 1)):
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal_)
    _, said = job.communicate(timeout=HANGS)
    assert job.returncode == code, said
    assert all_ended(tmp_path)


def test_a_logout_ends_no_hosts_under_nohup(tmp_path):
    job = together(
        tmp_path, *["trap 'exit 5' HUP; while [ ! -e go ]; do sleep 0.05; done; exit 0"] * 2, under=UNDER_NOHUP
    )
    while job.poll() is None and not all((tmp_path / f"pid.{n}").exists() for n in (0, 1)):
        time.sleep(0.05)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    put(tmp_path, "go", "")
    assert job.communicate(timeout=HANGS) == (None, "")
    assert job.returncode == 0


@pytest.mark.parametrize(("under", "code"), [(IN_A_TERMINAL, 1), (UNDER_NOHUP, 0)])
def test_torchrun_too_ignores_a_logout_under_nohup(tmp_path, under, code):
    text = (
        "import pathlib, time\npathlib.Path('begun').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\n"
    )
    put(tmp_path, "train.py", text)
    pipe = subprocess.PIPE
    job = subprocess.Popen(
        [*under, *DEEPFAST, "train.py"], cwd=tmp_path, env={**os.environ, **ENV}, stderr=pipe, text=True
    )
    while job.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    put(tmp_path, "go", "")
    _, said = job.communicate(timeout=HANGS)
    assert job.returncode == code, said
    assert ("PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT" in said.splitlines()[0]) == (not code)


def test_without_ssh_it_says_so():
    program = "from deepfast.deepspeed.remote import *; print(run([Job(['no-such-program'], {})]))"
    done = run(sys.executable, "-c", program)
    assert (done.stdout, done.stderr) == ("2\n", "deepfast: no-such-program: No such file or directory\n")


# python -m deepfast.deepspeed


def same_as_python(place: Path, *arguments: object) -> None:
    """Output, exit code and traceback."""
    ours, theirs = (run(*program, *arguments, cwd=place) for program in (RUNNER, (sys.executable,)))
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_a_script_runs_as_in_python(tmp_path):
    put(tmp_path, "beside/other.py", "value = 7\n")
    put(tmp_path, "beside/__init__.py", "")
    shows = "import sys\nprint(sys.argv, sys.path[0], __name__, __file__)\n"
    shows += "def f(a: int): pass\nprint(f.__annotations__)\n"
    put(tmp_path, "beside/shows.py", f"{shows}import other\n")
    same_as_python(tmp_path, "beside/shows.py", "--a", "-m", "--", "b")
    put(tmp_path, "beside/module.py", f"{shows}import beside.other\n")
    same_as_python(tmp_path, "-m", "beside.module", "--a")
    put(tmp_path, "exits.py", "import sys; sys.exit(7)\n")
    same_as_python(tmp_path, "exits.py")
    put(
        tmp_path,
        "chained.py",
        "def f():\n    try:\n        1 / 0\n    except Exception as e:\n        raise KeyError from e\nf()\n",
    )
    same_as_python(tmp_path, "chained.py")
    put(tmp_path, "syntax.py", "a = = 1\n")
    same_as_python(tmp_path, "syntax.py")


def test_deepspeed_is_there_also_in_what_a_script_starts(tmp_path):
    text = (
        "import multiprocessing\nimport deepspeed\ndef f(x):\n    return deepspeed.__version__\n"
        "if __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(f, [1])[0] == deepspeed.__version__, 'deepfast' in deepspeed.__version__)\n"
    )
    put(tmp_path, "spawns.py", text)
    done = run(*RUNNER, "spawns.py", cwd=tmp_path)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_local_rank_and_programs(tmp_path):
    put(tmp_path, "shows.py", "import sys; print(sys.argv)")
    assert run(*RUNNER, "--local_rank", "shows.py", "a", cwd=tmp_path, env={"LOCAL_RANK": "3"}).stdout == (
        "['shows.py', '--local_rank=3', 'a']\n"
    )
    done = run(*RUNNER, "--no_python", "--local_rank", "echo", "a", env={"LOCAL_RANK": "3"})
    assert done.stdout == "--local_rank=3 a\n"


@pytest.mark.parametrize("arguments", ["absent.py", "-m absent.module", "-m absent", "--no_python absent"])
def test_a_script_that_is_not_there_is_one_line(tmp_path, arguments):
    done = run(*RUNNER, *arguments.split(), cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent" in done.stderr


def test_the_doctor_and_help():
    assert "doctor" in run(*DEEPFAST, "doctor", "--help").stdout
    assert "--config" in run(*DEEPFAST, "tune", "--help").stdout
    asked = run(*DEEPFAST, "keys", "Clip").stdout.splitlines()
    assert len(asked) == 3
    assert "gradient_clipping" in asked[2]
    assert run(*DEEPFAST, "keys", "no such word").returncode == 1
    assert "--include" in run(*DEEPFAST, "--help").stdout
