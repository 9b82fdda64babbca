"""Reading the tensors of a checkpoint through torch.distributed.checkpoint: each rank what it needs, however written.

A tensor is asked for, whole or as a run of its memory, and is filled when all of them are read at once. Nothing here
unpickles, and no rank waits for another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from deepfast.engine.boxes import Box, box_of, cut, run_of
from deepfast.engine.checkpoint import CheckpointError, read_tensors
from deepfast.engine.parts import Part
from deepfast.optim.shards import is_sharded, local
from deepfast.optim.state import wrapped


class Stored:
    """The tensors of a checkpoint of today's format.

    Attributes:
        shapes: those of all tensors there are, by their keys.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = dcp.HuggingFaceStorageReader(str(folder))
        with _one_line(folder):
            kept = self._reader.read_metadata().state_dict_metadata
        self._kept = {key: meta for key, meta in kept.items() if isinstance(meta, TensorStorageMetadata)}
        self.shapes = {key: meta.size for key, meta in self._kept.items()}
        self._asked: list[_Asked] = []

    def dtype(self, key: str) -> torch.dtype:
        return self._kept[key].properties.dtype

    def ask(self, key: str, like: Part | Tensor | None = None) -> Tensor:
        """A tensor of the saved type that ``read`` will fill: all of it, the run of a part, which is 1-D, or a DTensor
        that lies as ``like`` does."""
        if key not in self._kept:
            raise CheckpointError(f"{self.folder}: {key!r} is missing")
        if isinstance(like, Part):
            t = torch.empty(like.end - like.begin, dtype=self.dtype(key), device="cpu")
            self._asked.append(_Asked(key, list(cut(t, like.whole, like.begin))))
        elif like is not None and is_sharded(like):
            t = torch.empty(local(like).shape, dtype=self.dtype(key), device=local(like).device)
            self._asked.append(_Asked(key, [(box_of(like)[0], t)] if t.numel() else []))
            return wrapped(t, like)
        else:
            t = torch.empty(self.shapes[key], dtype=self.dtype(key), device="cpu")
            self._asked.append(_Asked(key, [(Box((0,) * t.ndim, tuple(t.shape)), t)]))
        return t

    def read(self) -> None:
        """Fills what was asked for.

        Raises:
            CheckpointError: where the files do not hold all of it.
        """
        asked, self._asked = self._asked, []
        with _one_line(self.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no_dist means one process
            dcp.load({}, storage_reader=self._reader, planner=_Planner(asked), no_dist=True)


class _Asked(NamedTuple):
    key: str
    boxes: list[tuple[Box, Tensor]]  # with the views that they are read into


class _Planner(LoadPlanner):
    """Which elements of which file go where: torch's own answer, for boxes of any number."""

    def __init__(self, asked: list[_Asked]) -> None:
        self._asked = asked

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        if metadata is None:
            raise CheckpointError("no metadata")
        self._kept = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for nth, asked in enumerate(self._asked) for item in self._items(nth, asked)])

    def _items(self, nth: int, asked: _Asked) -> Iterator[ReadItem]:
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in asked.boxes]
        meta = self._kept[asked.key]
        if not isinstance(meta, TensorStorageMetadata):
            raise CheckpointError(f"{asked.key!r} is no tensor")
        items = create_read_items_for_chunk_list(asked.key, meta, chunks)
        # torch leaves elements that no file has as they are; here they would be anything.
        found = sum(math.prod(item.lengths) for item in items)
        wanted = sum(view.numel() for _, view in asked.boxes)
        if found != wanted:
            raise CheckpointError(f"{found} of {wanted} elements of {asked.key!r} are there")
        for item in items:  # one key may have been asked for twice
            yield dataclasses.replace(item, dest_index=MetadataIndex(str(nth), item.dest_index.offset))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn!r} is no tensor")  # it would be a pickle

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        t = next(t for box, t in self._asked[int(index.fqn)].boxes if box.offsets == index.offset)
        for d, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            t = t.narrow(d, start, length)
        return t

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """What torch or safetensors raise, as a CheckpointError that names the folder."""
    try:
        yield
    except dcp.CheckpointException as failed:  # of one rank, for we ask for no more
        error, _ = next(iter(failed.failures.values()))
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


class StoredBefore:
    """The same for a checkpoint of format 1, which had everything whole, in files of other names."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self._tensors = folder, tensors
        self.shapes = {key: t.shape for key, t in tensors.items()}

    def ask(self, key: str, like: Part | Tensor | None = None) -> Tensor:
        t = self._tensors[key]
        if isinstance(like, Part):
            return run_of(t, like.whole, like.begin, like.end)
        if like is None or not is_sharded(like):
            return t
        for d, (offset, size) in enumerate(zip(*box_of(like)[0], strict=True)):
            t = t.narrow(d, offset, size)
        return wrapped(t.to(local(like).device), like)

    def read(self) -> None:
        """It has been."""


def stored(folder: Path, state: dict[str, Any], names: list[str]) -> tuple[Stored | StoredBefore, dict[str, Any]]:
    """The tensors of a checkpoint, and what else it has of its optimizer.

    Args:
        state: what state.json holds.
        names: of the optimizer's parameters, in its order: format 1 knew only their numbers.

    Raises:
        CheckpointError: for a format of a later version.
    """
    if state.get("format") == 2:
        return Stored(folder), state["optimizer"]
    if state.get("format") != 1:
        raise CheckpointError(f"{folder}: format {state.get('format')} is not known to this version")
    tensors = {f"model.{name}": t for name, t in read_tensors(folder / "model.safetensors").items()}
    for path in folder.glob("rank*.safetensors"):
        rank = path.stem.removeprefix("rank")
        tensors.update((f"rng.{rank}.{device}", t) for device, t in read_tensors(path).items())
    rest: dict[str, Any] = {"param_groups": state["optimizer"]["param_groups"], "beside": {}}
    moments = read_tensors(folder / "optimizer.safetensors")
    rest["tensors"], rest["state"] = by_name(moments, names), by_name(state["optimizer"]["state"], names)
    for name, entries in rest["tensors"].items():
        tensors.update((f"optim.state.{name}.{entry}", t) for entry, t in entries.items())
    return StoredBefore(folder, tensors), rest


def by_name(values: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {entry: value}} of {"number.entry": value}."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        index, _, entry = key.partition(".")
        name = names[int(index)] if int(index) < len(names) else f"#{index}"
        found.setdefault(name, {})[entry] = value
    return found
