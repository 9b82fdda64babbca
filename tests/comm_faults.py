"""Run by test_comm.py: ranks that die, hang and come back. Each is forked, so that a hundred groups cost seconds."""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from checks import run_checks
from conftest import HANGS

from deepfast import build
from deepfast.comm import rendezvous as hosts
from deepfast.errors import PeerTimeout

SECOND = timedelta(seconds=1)
AT_ONCE = 1.5  # seconds, on two cores that others use, too; far from the timeouts that it is told apart from


class Rank:
    """A forked process that runs ``body(rank)``; what that returns, or raises, comes back as JSON."""

    unheard: ClassVar[set[int]] = set()  # processes whose result nobody has asked for

    def __init__(self, rank, body, host=""):
        self.rank = rank
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            self.unheard.add(self.pid)
            return
        said = {}
        try:
            os.environ["DEEPFAST_HOST_ID"] = host
            said["returned"] = body(rank)
        except PeerTimeout as error:
            said = {"missing": sorted(error.ranks), "said": str(error), "at": time.monotonic()}
        except BaseException:
            said = {"failed": traceback.format_exc()}
        finally:
            with contextlib.suppress(OSError):
                os.write(write, json.dumps(said).encode())
            os._exit(0)

    def signal(self, number):
        os.kill(self.pid, number)

    def result(self, within=HANGS):
        """What it has said; {} where it was killed."""
        until, data = time.monotonic() + within, b""
        os.set_blocking(self._read, False)
        while True:
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(self._read, 65536)
                if not chunk:
                    break
                data += chunk
            assert time.monotonic() < until, f"rank {self.rank} hangs"
            time.sleep(0.0005)
        os.close(self._read)
        os.waitpid(self.pid, 0)
        self.unheard.discard(self.pid)
        said = json.loads(data) if data else {}
        assert "failed" not in said, said["failed"]
        return said


def end_all():
    """What a check that has failed leaves, stopped ones too: they would hold on to this process's output."""
    for pid in Rank.unheard:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    Rank.unheard.clear()


def start_store():
    """The port of a store that no rank's death ends. Its threads run in a process of their own: a fork beside them
    could copy a lock that one of them holds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, f"{store.port}\n".encode())
        signal.pause()
    atexit.register(os.kill, pid, signal.SIGKILL)
    return int(os.read(read, 100))


def communicator(name, rank, size, timeout=20 * SECOND):
    client = dist.TCPStore("127.0.0.1", PORT, is_master=False, wait_for_workers=False)
    peers, comm, _ = hosts.connect(dist.PrefixStore(name, client), rank, size, timeout)
    ALIVE.append((peers, comm, client))
    return comm


ALIVE: list = []


def all_reduce(comm, t):
    comm.all_reduce_(t, 1.0, None, None)
    return t


def names_in_the_system():
    """What a process could leave behind. (Sockets without a file go with their processes.)"""
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "/" in line]
    return {*sockets, *(os.listdir("/dev/shm") if Path("/dev/shm").is_dir() else [])}


def check_killed_at_random_moments():
    """A hundred groups of two to four ranks, one of which dies: the others always raise, in time, and name it."""
    random.seed(0)
    before, times = names_in_the_system(), []
    for i in range(100):
        size = random.choice((2, 3, 4))
        victim = random.randrange(size)

        def body(rank, i=i, size=size, victim=victim):
            joined = False  # where it is killed while they join, some may have, and others not
            small = torch.zeros(10)
            try:
                comm = communicator(f"kill {i}", rank, size, timeout=3 * SECOND)
                joined = True
                memory = comm.empty(200_000, torch.float32).fill_(0.0)
                for k in range(10**9):
                    all_reduce(comm, (small, memory, torch.zeros(150_000))[k % 3])
            except PeerTimeout as error:
                said = {"joined": joined, "missing": list(error.ranks), "at": time.monotonic()}
            # The ranks that are left make a new one.
            others = [r for r in range(size) if r != victim]
            again = communicator(f"again {i}", others.index(rank), size - 1)
            return {**said, "sum": all_reduce(again, torch.ones(100_000))[-1].item()}

        ranks = [Rank(r, body) for r in range(size)]
        time.sleep(random.uniform(0.02, 0.08))
        ranks[victim].signal(signal.SIGKILL)
        killed = time.monotonic()
        joined, missing = [], []
        for rank in ranks:
            said = rank.result()
            if rank.rank == victim:
                assert not said
                continue
            said = said["returned"]
            assert said["sum"] == size - 1
            assert said["at"] - killed < 3 + 12, (i, said["at"] - killed)  # from when they have started to wait
            if said["joined"]:
                joined.append(rank.rank)
                missing.append(said["missing"])
                times.append(said["at"] - killed)
        for named in missing:  # who could not join without the victim has left, too
            assert victim in named, (i, missing)
            assert not {*joined} & {*named}, (i, joined, missing)
    assert sorted(times)[len(times) * 9 // 10] < AT_ONCE, times  # on a busy machine one may have had no core
    until = time.monotonic() + 30  # other tests' names come and go
    while (left := names_in_the_system() - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


def check_stopped_ranks_are_waited_for_and_then_named():
    joined = mmap.mmap(-1, 3)  # that all see

    def body(rank):
        comm = communicator("stop", rank, 3, timeout=6 * SECOND)
        joined[rank] = 1
        for _ in range(10**9):
            all_reduce(comm, torch.zeros(10))

    ranks = [Rank(r, body) for r in range(3)]
    until = time.monotonic() + HANGS
    while sum(joined[:]) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    ranks[1].signal(signal.SIGSTOP)
    time.sleep(1.0)
    ranks[1].signal(signal.SIGCONT)  # slow, no more
    time.sleep(0.5)
    ranks[1].signal(signal.SIGSTOP)
    stopped = time.monotonic()
    for r in (0, 2):
        said = ranks[r].result()
        assert said["missing"] == [1], said
        assert 5 < said["at"] - stopped < 60, said
    ranks[1].signal(signal.SIGCONT)
    assert ranks[1].result()["missing"] == [1], "it learns what the others have found"


def check_who_never_comes_is_named():
    def body(rank):
        communicator("never", rank, 3, timeout=SECOND)

    start = time.monotonic()
    for rank in [Rank(r, body) for r in (0, 2)]:
        said = rank.result()
        assert said["missing"] == [1], said
        assert said["at"] - start < 10


def check_who_dies_while_the_others_join_is_named():
    """It has come to the first rank, and is gone before all have."""

    def body(rank):
        if rank == 1:
            hosts.socket.recv_fds = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            exchange = hosts._exchange
            hosts._exchange = lambda *args: (time.sleep(1.0), exchange(*args))[1]
        all_reduce(communicator("joining", rank, 3), torch.zeros(10))

    ranks = [Rank(r, body) for r in range(3)]
    assert ranks[1].result() == {}
    for r in (0, 2):
        said = ranks[r].result()
        assert said["missing"] == [1], said
        assert "died" in said["said"], "and not: silent"


def across(name, number, victim, timeout, hosts_of="aabb"):
    """Four ranks on two hosts, one of which gets the signal."""

    def body(rank):
        comm = communicator(name, rank, 4, timeout)
        for k in range(10**9):
            all_reduce(comm, torch.zeros((10, 50_000)[k % 2]))

    ranks = [Rank(r, body, host=hosts_of[r]) for r in range(4)]
    time.sleep(1.0)
    ranks[victim].signal(number)
    at = time.monotonic()
    said = [rank.result() for rank in ranks if rank.rank != victim]
    ranks[victim].signal(signal.SIGKILL)
    ranks[victim].result()
    return [(one["missing"], one["at"] - at) for one in said]


def check_a_death_on_another_host_is_named():
    for victim in (1, 3, 0, 2):  # 0 and 2 lead their hosts
        for missing, after in across(f"dead {victim}", signal.SIGKILL, victim, 20 * SECOND):
            assert missing == [victim], (victim, missing)
            assert after < 10, "long before the timeout"


def check_silence_on_another_host_is_named():
    for victim in (3, 2):
        for missing, after in across(f"silent {victim}", signal.SIGSTOP, victim, SECOND):
            assert missing == [victim], (victim, missing)
            assert after < 30, after


def check_four_ranks_on_two_cores_do_not_crawl():
    """No rank spins away the time of the one it waits for: a small sum takes microseconds, not time slices."""

    def body(rank):
        comm = communicator("crawl", rank, 4)
        t = torch.zeros(100)
        all_reduce(comm, t)
        best = 1.0  # of ten rows: others use the cores, too
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(100):
                all_reduce(comm, t)
            best = min(best, (time.perf_counter() - start) / 100)
        return best

    seconds = [rank.result()["returned"] for rank in [Rank(r, body) for r in range(4)]]
    assert max(seconds) < 2e-3, seconds  # a time slice is 3 to 4 ms


def check_a_fork_does_not_hide_a_death():
    """A worker of a data loader goes on living, with all that it has inherited."""

    def body(rank):
        comm = communicator("fork", rank, 2)
        if rank == 1:
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            all_reduce(comm, torch.zeros(1))
        except PeerTimeout as error:
            return list(error.ranks), time.monotonic() - start
        return None

    ranks = [Rank(r, body) for r in range(2)]
    missing, after = ranks[0].result()["returned"]
    assert missing == [1]
    assert after < AT_ONCE


def check_a_child_may_not_use_it():
    def body(rank):
        comm = communicator("child", rank, 1)
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                all_reduce(comm, torch.zeros(1))
            except RuntimeError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        return os.read(read, 1000).decode(), all_reduce(comm, torch.ones(1)).item()

    said, value = Rank(0, body).result()["returned"]
    assert "belongs to the parent process" in said
    assert value == 1.0


def check_a_stranger_at_the_socket_is_turned_away():
    import socket

    def body(rank):
        if rank == 1:
            client = dist.TCPStore("127.0.0.1", PORT, is_master=False, wait_for_workers=False)
            at = json.loads(dist.PrefixStore("stranger", client).get("rank/0"))["socket"]
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(at)
                s.sendall(b"wrong token 1")
        return all_reduce(communicator("stranger", rank, 2), torch.ones(3)).tolist()

    for rank in [Rank(r, body) for r in range(2)]:
        assert rank.result()["returned"] == [2.0] * 3


def check_ctrl_c_ends_a_wait():
    def body(rank):
        comm = communicator("interrupt", rank, 2, timeout=100 * SECOND)
        if rank == 1:
            time.sleep(3)
            return None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ALIVE[-1][0].heed_signals()
        start = time.monotonic()
        try:
            all_reduce(comm, torch.zeros(1))
        except KeyboardInterrupt:
            return time.monotonic() - start
        return None

    ranks = [Rank(r, body) for r in range(2)]
    time.sleep(0.7)
    ranks[0].signal(signal.SIGINT)
    assert ranks[0].result()["returned"] < 2.0
    ranks[1].result()


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    torch.set_num_threads(1)
    build.load_comm()
    PORT = start_store()
    run_checks({name: globals()[name] for name in CHECKS}, Path(sys.argv[1]), end_all)
