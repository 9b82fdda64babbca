"""Checkpoints that survive a crash at any moment, can be checked with ``sha256sum -c``, and hold no pickle.

``<dir>/<tag>/`` holds ``.safetensors`` files, ``state.json`` and ``checksums.sha256``. It is written under another
name and appears by one rename; ``<dir>/latest`` names the newest and is replaced in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfast.errors import UserError

CHECKSUMS = "checksums.sha256"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or cannot be written."""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file, so that a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def staging(directory: Path, tag: str) -> Path:
    return directory / f".{tag}.tmp"


def begin(directory: Path, tag: str) -> Path:
    """An empty folder in which the checkpoint ``tag`` is put together."""
    folder = staging(directory, tag)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # safetensors wants contiguous tensors that share no memory; saving a view would drag its whole storage along.
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path)
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it and ``restore`` brings it back: tuples, small tensors and any keys included.

    Raises:
        CheckpointError: for what only a pickle could hold.
    """
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: plain(v) for k, v in value.items()}
        return {"__dict__": [[plain(k), plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [plain(v) for v in value]}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"a checkpoint holds no pickles: numbers, strings, tensors, lists, tuples and dicts, not {type(value).__name__}"
    )


def restore(value: Any) -> Any:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return [restore(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__dict__" in value:
        return {restore(k): restore(v) for k, v in value["__dict__"]}
    if "__tuple__" in value:
        return tuple(restore(v) for v in value["__tuple__"])
    if "__tensor__" in value:
        return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
    return {k: restore(v) for k, v in value.items()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain(data), indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return restore(json.loads(path.read_text(encoding="utf-8")))


def commit(directory: Path, tag: str) -> Path:
    """Publishes what was put together after ``begin``; from here on ``latest`` names it."""
    folder, target = staging(directory, tag), directory / tag
    files = sorted(p for p in folder.iterdir())
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in files), encoding="utf-8")
    for path in (*files, folder / CHECKSUMS, folder):
        _sync(path)
    if target.exists():  # the same step again: the old one goes only when the new one is there
        old = directory / f".{tag}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, target)
    write_atomically(directory / "latest", tag + "\n")
    return target


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


def fault(folder: Path) -> str | None:
    """What is wrong with the checkpoint, naming the file; None if it is intact."""
    sums = folder / CHECKSUMS
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"{sums} cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
    if not lines:
        return f"{sums} is empty"
    for line in lines:
        expected, _, name = line.partition("  ")
        if not name or "/" in name:
            return f"{sums} is damaged"
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != expected:
            return f"{path} is damaged (its sha256 differs from {CHECKSUMS})"
    return None


def verify(directory: Path, tag: str) -> Path:
    """The folder of an intact checkpoint.

    Raises:
        CheckpointError: names what is missing or damaged, and the newest intact checkpoint there is.
    """
    folder, old = directory / tag, directory / f".{tag}.old"
    if old.is_dir() and not folder.exists():  # killed between the two renames of commit()
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.rename(old, folder)
    if not folder.is_dir():
        others = ", ".join(tags(directory)) or "none"
        raise CheckpointError(f"{folder}: no such checkpoint (there are: {others})")
    wrong = fault(folder)
    if wrong is None:
        return folder
    intact = next((t for t in tags(directory) if t != tag and fault(directory / t) is None), None)
    offer = f"the checkpoint {intact!r} is intact: resume from that one" if intact else "there is no other intact one"
    raise CheckpointError(f"{wrong}; {offer}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints, and what killed writers left."""
    for tag in tags(directory)[keep:]:
        if tag != latest(directory):
            shutil.rmtree(directory / tag)
    for leftover in (*directory.glob(".*.tmp"), *directory.glob(".*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def unique(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a module's state, without further names of the same one (tied weights)."""
    seen, kept = set(), {}
    for name, t in state.items():
        if not isinstance(t, Tensor):  # get_extra_state()
            raise CheckpointError(f"{name!r} of the module's state is no tensor but {type(t).__name__}")
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride())
        if t.numel() == 0 or place not in seen:
            kept[name] = t
        seen.add(place)
    return kept


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the rest) of an optimizer's state_dict; the rest goes to JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{index}.{name}"] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def unpack_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that ``pack_optimizer`` took apart."""
    state: dict[int, dict[str, Any]] = {}
    pairs: Iterable[tuple[str, Any]] = (*tensors.items(), *rest["state"].items())
    for key, value in pairs:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
