"""Checkpoints that survive a crash at any moment, can be checked with ``sha256sum -c``, and hold no pickle.

``<dir>/<tag>/`` holds ``.safetensors`` files, ``state.json`` and ``checksums.sha256``. It is put together under another
name and appears by one rename, when all of it is on the disk; ``<dir>/latest`` names the newest and is replaced in the
same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfast.engine.plain import plain, restore
from deepfast.errors import UserError
from deepfast.optim.shards import is_sharded

CHECKSUMS = "checksums.sha256"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or cannot be written."""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file, so that a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_text(temporary, text)
    os.replace(temporary, path)
    _sync(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes contiguous tensors on the host that share no memory; ``about`` goes into the file's header."""
    try:
        save_file(tensors, path, about)
    except SafetensorError as error:  # which has the system's error in its text alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def seal(path: Path) -> str:
    """The sha256 sum of a file that from here on stays on the disk."""
    _sync(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unwritable(target: Path, why: OSError | str) -> CheckpointError:
    if isinstance(why, OSError):
        why = f"{why.strerror or why}{f': {why.filename}' if why.filename else ''}"
    return CheckpointError(f"{target}: cannot be written: {why}")


def check_tag(tag: str) -> None:
    if not tag or "/" in tag or tag.startswith(".") or tag == "latest":
        raise CheckpointError(f"{tag!r} cannot name a checkpoint: it is to be the name of a folder")


def staging(directory: Path, tag: str) -> Path:
    return directory / f".{tag}.tmp"


def begin(directory: Path, tag: str) -> Path:
    """An empty folder in which the checkpoint ``tag`` is put together. What killed writers have left goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for old in directory.glob(".*.old"):
        _take_back(directory, old.name[1 : -len(".old")])
        shutil.rmtree(old, ignore_errors=True)
    folder = staging(directory, tag)
    folder.mkdir()
    return folder


def discard(folder: Path) -> None:
    """Removes a folder, which nobody sees half removed."""
    gone = folder.with_name(f".{folder.name.strip('.')}.gone.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone)


def to_json(data: dict[str, Any]) -> str:
    try:
        return json.dumps(plain(data), indent=1)
    except TypeError as error:
        raise CheckpointError(str(error)) from None


def read_json(path: Path) -> dict[str, Any]:
    return restore(json.loads(path.read_text(encoding="utf-8")))


def commit(directory: Path, tag: str, sums: dict[str, str], latest: bool = True) -> Path:
    """Publishes what was put together after ``begin`` and has these sums; from here on ``latest`` names it, or not."""
    folder, target, old = staging(directory, tag), directory / tag, _old(directory, tag)
    write_text(folder / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    _sync(folder)
    named = directory / ".latest.tmp"
    try:
        write_text(named, tag + "\n")  # before anything is seen: there may be no room for it
        if target.exists():  # the same step again: the old one goes only when the new one is there
            os.rename(target, old)
        os.rename(folder, target)
        _sync(directory)
        if latest:
            os.replace(named, directory / "latest")
            _sync(directory)
        else:
            named.unlink()
    except OSError:
        _take_back(directory, tag)
        named.unlink(missing_ok=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return target


def _old(directory: Path, tag: str) -> Path:
    return directory / f".{tag}.old"


def _take_back(directory: Path, tag: str) -> None:
    """After a kill between the two renames of commit(): the old one is the checkpoint again."""
    if _old(directory, tag).is_dir() and not (directory / tag).exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.rename(_old(directory, tag), directory / tag)


def tags(directory: Path) -> list[str]:
    """The checkpoints in ``directory``, newest first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if not p.name.startswith(".") and (p / CHECKSUMS).is_file()]
    return [p.name for p in sorted(found, key=lambda p: (p / CHECKSUMS).stat().st_mtime_ns, reverse=True)]


def latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, or the newest there is where it cannot be read; None if there is no checkpoint."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        tag = (directory / "latest").read_text(encoding="utf-8").strip()
        if tag:
            return tag
    return next(iter(tags(directory)), None)


def fault(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with the checkpoint, naming the file; None if it is intact. Each rank looks at a share of it."""
    sums = folder / CHECKSUMS
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"{sums} cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
    if not lines:
        return f"{sums} is empty"
    for line in lines[rank::ranks]:
        expected, _, name = line.partition("  ")
        if not name or "/" in name:
            return f"{sums} is damaged"
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != expected:
            return f"{path} is damaged (its sha256 differs from {CHECKSUMS})"
    return None


def verify(directory: Path, tag: str, rank: int = 0, ranks: int = 1) -> Path:
    """The folder of an intact checkpoint; of several ranks, each looks at a share of it.

    Raises:
        CheckpointError: names what is missing or damaged, and the newest intact checkpoint there is.
    """
    folder = directory / tag
    _take_back(directory, tag)
    if not folder.is_dir():
        others = ", ".join(tags(directory)) or "none"
        raise CheckpointError(f"{folder}: no such checkpoint (there are: {others})")
    wrong = fault(folder, rank, ranks)
    if wrong is None:
        return folder
    intact = next((t for t in tags(directory) if t != tag and fault(directory / t) is None), None)
    offer = f"the checkpoint {intact!r} is intact: resume from that one" if intact else "there is no other intact one"
    raise CheckpointError(f"{wrong}; {offer}")


def hint(directory: Path) -> str:
    """What to do where ``directory`` holds no checkpoint, but is one."""
    parent, name = directory.parent, directory.name
    return f" (it is one itself: load_checkpoint({str(parent)!r}, tag={name!r}))" if name in tags(parent) else ""


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints. What is being written is none yet."""
    for tag in tags(directory)[keep:]:
        if tag != latest(directory):
            discard(directory / tag)


def unique(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a module's state, without further names of the same one (tied weights)."""
    seen, kept = set(), {}
    for name, t in state.items():
        if not isinstance(t, Tensor):  # get_extra_state()
            raise CheckpointError(f"{name!r} of the module's state is no tensor but {type(t).__name__}")
        # (Of a DTensor a rank may have nothing, and yet all ranks are to keep the same names.)
        memory = id(t) if is_sharded(t) else t.untyped_storage().data_ptr()
        place = (memory, t.storage_offset(), t.shape, t.stride())
        if place not in seen or not (t.numel() or is_sharded(t)):
            kept[name] = t
        seen.add(place)
    return kept
