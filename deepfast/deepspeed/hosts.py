"""Which hosts train, and which of their GPUs: hostfiles, ``--include`` and ``--exclude``, as DeepSpeed writes them."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

from deepfast.errors import UserError

Slots = dict[str, list[int]]  # of each host, in their order: its GPUs by number; one process each


def read(file: Path) -> Slots:
    """The hosts of a file with a line ``name slots=4`` for each.

    Raises:
        UserError: for a line of another form, a host that is there twice, and a file without one.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
    hosts: Slots = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) == 0:
            raise UserError(f"{file}, line {number}: a line like `worker-1 slots=4` was expected, not {text[:60]!r}")
        if match[1] in hosts:
            raise UserError(f"{file}, line {number}: {match[1]} is there already")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise UserError(f"{file} names no host: lines like `worker-1 slots=4` were expected")
    return hosts


def _listed(option: str, text: str) -> dict[str, list[int] | None]:
    """{host: slots, or None for all of them} of ``host@host:0,1``."""
    found: dict[str, list[int] | None] = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if not host or not re.fullmatch(r"\d+(,\d+)*" if colon else "", numbers):
            raise UserError(f"{option} {text}: HOST or HOST:0,1 was expected, joined by @, not {part!r}")
        earlier = found.get(host, [])
        own = [int(n) for n in numbers.split(",")] if colon else None
        found[host] = None if own is None or earlier is None else sorted({*earlier, *own})
    return found


def choose(hosts: Slots, include: str, exclude: str, known: bool = True) -> Slots:
    """Those of ``hosts`` that are named, or that are not, in the same order.

    Args:
        known: the slots are all that there are; False: nobody knows, and any number may be named.

    Raises:
        UserError: for a host or a slot that is not there, and where nothing is left.
    """
    option, text = ("--include", include) if include else ("--exclude", exclude)
    listed = _listed(option, text)
    left: Slots = {} if include else {host: list(slots) for host, slots in hosts.items()}
    for host, slots in listed.items():
        if host not in hosts:
            raise UserError(f"{option} {text}: there is no host {host} (there are: {', '.join(hosts)})")
        absent = [slot for slot in slots or [] if slot not in hosts[host]]
        if absent and known:
            raise UserError(f"{option} {text}: {host} has no slot {absent[0]} (it has {len(hosts[host])}, from 0)")
        if include:
            left[host] = hosts[host] if slots is None else slots
        else:
            left[host] = [] if slots is None else [slot for slot in left[host] if slot not in slots]
    chosen = {host: left[host] for host in hosts if left.get(host)}
    if not chosen:
        raise UserError(f"{option} {text}: nothing is left to train on")
    return chosen


def is_here(host: str) -> bool:
    """Whether that is this machine: by its name, or because its address can be bound to."""
    if host in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((socket.gethostbyname(host), 0))
        return True
    return False
