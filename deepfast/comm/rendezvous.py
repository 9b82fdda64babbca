"""Who shares a host with whom, and how they come by each other's memory.

Each rank makes an anonymous file (memfd) and hands it to the others of its host over a socket: the file has no name,
and the socket's is the kernel's and goes with it, so nothing can be left behind, and the size of /dev/shm is no limit.
Everything else goes through the group's store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import socket
import struct
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepfast import build
from deepfast.errors import PeerTimeout


def identity() -> str:
    """The same for two ranks exactly where sockets of this host's kernel connect them.

    ``$DEEPFAST_HOST_ID`` overrides, for tests.
    """
    named = os.environ.get("DEEPFAST_HOST_ID")
    if named:
        return named
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.stat("/proc/self/ns/net").st_ino  # containers may share a kernel and not see each other's sockets
    except OSError:
        return socket.gethostname()
    return f"{boot}/{network}"


def connect(store: Any, rank: int, size: int, timeout: timedelta) -> tuple[Any, Any, list[list[int]]]:
    """This rank's peers, its communicator (both of the compiled module), and the ranks of each host.

    Args:
        store: a store of this communicator's own; all that use it belong to it.
        rank: among the ``size`` ranks.
        timeout: for each operation, and for the others to come here.

    Raises:
        PeerTimeout: naming the ranks that have not come.
        deepfast.errors.BuildError: where the communication is not to be had.
    """
    native = build.load_comm()
    until = time.monotonic() + timeout.total_seconds()
    with _listening() as listener:
        token = secrets.token_hex(16)
        name = listener.getsockname()
        said = {"host": identity(), "socket": (name.decode() if isinstance(name, bytes) else name), "token": token}
        store.set(f"rank/{rank}", json.dumps(said))
        everybody = _gather(store, size, until)
        hosts: dict[str, list[int]] = {}
        for r, one in enumerate(everybody):
            hosts.setdefault(one["host"], []).append(r)
        here = hosts[said["host"]]
        if len(here) > native.MAX_RANKS:
            raise RuntimeError(f"deepfast: {len(here)} ranks on one host; {native.MAX_RANKS} are the most")
        own = os.memfd_create("deepfast", os.MFD_CLOEXEC)
        fcntl.lockf(own, fcntl.LOCK_EX)  # held as long as this process lives; before the others have the file
        heap = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(here)
        os.ftruncate(own, native.HEAP_AT + heap)  # pages that nobody touches cost nothing
        try:
            fds = _exchange(listener, everybody[here[0]], rank, here, own, until)
        except BaseException:
            os.close(own)
            raise
    peers = native.Peers(here.index(rank), fds, here, heap, timeout.total_seconds())
    between = None
    if len(hosts) > 1:
        host = list(hosts).index(said["host"])
        leaders = None
        if rank == here[0]:
            leaders = dist.ProcessGroupGloo(dist.PrefixStore("leaders", store), host, len(hosts), timeout=timeout)
        between = native.Hosts(leaders, dist.PrefixStore("hosts", store), host, list(hosts.values()))
    return peers, native.Communicator(rank, size, peers, between), list(hosts.values())


def _listening() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # the kernel finds a name, in no file system
    listener.listen()
    return listener


def _gather(store: Any, size: int, until: float) -> list[dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    while True:
        for r in range(size):
            if r not in found and store.check([f"rank/{r}"]):
                found[r] = json.loads(store.get(f"rank/{r}"))
        if len(found) == size:
            return [found[r] for r in range(size)]
        if time.monotonic() > until:
            _raise_missing([r for r in range(size) if r not in found])
        time.sleep(0.002)


def _exchange(
    listener: socket.socket, leader: dict[str, str], rank: int, here: list[int], own: int, until: float
) -> list[int]:
    """The files of all ranks of this host, in order. (The own one is never sent back: closing a copy of it would drop
    the lock by which the others see that this rank is alive.)"""
    if rank != here[0]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to_leader:
            to_leader.settimeout(max(0.1, until - time.monotonic()))
            try:
                to_leader.connect(leader["socket"])
                socket.send_fds(to_leader, [f"{leader['token']} {rank}".encode()], [own])
                data, others, _, _ = socket.recv_fds(to_leader, 1, len(here))
            except OSError as error:
                _raise_missing([here[0]], str(error))
            if data != b"." or len(others) != len(here) - 1:
                _raise_missing([here[0]], "it left")
        others.insert(here.index(rank), own)
        return others
    connections: dict[int, tuple[socket.socket, int]] = {}
    with contextlib.ExitStack() as stack:
        while len(connections) < len(here) - 1:
            listener.settimeout(max(0.1, until - time.monotonic()))
            try:
                connection = stack.enter_context(listener.accept()[0])
                connection.settimeout(max(0.1, until - time.monotonic()))
                _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                data, fds, _, _ = socket.recv_fds(connection, 128, 1)
            except OSError as error:
                _raise_missing([r for r in here[1:] if r not in connections], str(error))
            token, _, sender = data.decode(errors="replace").partition(" ")
            known = uid == os.geteuid() and hmac.compare_digest(token, leader["token"]) and sender.isdigit()
            if not known or len(fds) != 1 or int(sender) not in here[1:]:
                for fd in fds:  # a stranger
                    os.close(fd)
                continue
            connections[int(sender)] = connection, fds[0]
        files = [own, *(connections[r][1] for r in here[1:])]
        for r in here[1:]:
            others = [fd for other, fd in zip(here, files, strict=True) if other != r]
            # One that has died since it came here is named by the first operation, to everybody.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(connections[r][0], [b"."], others)
    return files


def _raise_missing(ranks: list[int], why: str = "silent at the timeout") -> None:
    raise PeerTimeout(
        f"deepfast: no communicator: missing rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {why}",
        tuple(ranks),
    )
