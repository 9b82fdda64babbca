"""What one rank writes of an engine: copies in the host's memory, so that training can go on.

Keys are those that torch.distributed.checkpoint gives to ``{"model": model.state_dict(), "optim": {"state": ...}}``:
``model.<name>``, ``optim.state.<name>.<entry>``. What is whole on all ranks is dealt out over them. A part of a
parameter is cut into boxes; a file holds a key once, so the nth box of each goes into the rank's nth file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfast.engine import checkpoint
from deepfast.engine.boxes import box_of, cut
from deepfast.engine.parts import Part
from deepfast.optim import Optimizer
from deepfast.optim.shards import is_sharded, local


class Snapshot:
    """This rank's files.

    Attributes:
        expected: of each key that is in this checkpoint, how many elements all ranks together have to write.
        written: how many this rank does.
        state: the rest, as JSON text; rank 0 writes it.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.expected: dict[str, int] = {}
        self.written: dict[str, int] = defaultdict(int)
        self.state = ""
        self._files: dict[str, dict[str, tuple[tuple[int, ...], Tensor]]] = defaultdict(dict)
        self._loads = [0] * world_size

    def add_model(self, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            self._add_tensor("model", f"model.{name}", t)

    def add_optimizer(self, optimizer: torch.optim.Optimizer, parts: list[Part], names: list[str]) -> dict[str, Any]:
        """Adds the tensors; returns what is left: for JSON, with the names of what there is."""
        ours = optimizer if isinstance(optimizer, Optimizer) else None
        packed = optimizer.state_dict() if ours is None else ours.state_dict(compact=True)
        state = dict(packed["state"])
        rest: dict[str, Any] = {"param_groups": packed["param_groups"], "names": names, "tensors": {}, "state": {}}
        for index, (part, name) in enumerate(zip(parts, names, strict=True)):
            values = state.pop(index, {})
            tensors = {entry: value for entry, value in values.items() if isinstance(value, Tensor)}
            rest["tensors"][name] = list(tensors)
            rest["state"][name] = {entry: value for entry, value in values.items() if entry not in tensors}
            for entry, t in tensors.items():
                if ours is not None:  # one after the other: together they may be more than the device has room for
                    t = ours.unpacked(part.mine, entry, t)
                self._add_state(f"optim.state.{name}.{entry}", t, part)
        return {**rest, "beside": state}  # what somebody keeps beside the parameters' states

    def _add_state(self, key: str, t: Tensor, part: Part) -> None:
        if not part.sharded or t.shape != part.mine.shape:
            self._add_tensor("optimizer", key, t)
        elif not part.whole.numel():
            self._add_whole("optimizer", key, t.view(part.whole.shape))
        else:
            self._expect(key, part.whole.numel())
            for nth, (box, view) in enumerate(cut(t.detach(), part.whole, part.begin)):
                self._add("optimizer", key, view, nth, box.offsets)

    def add_random_state(self) -> None:
        self._add("random", f"rng.{self.rank}.cpu", torch.get_rng_state())
        if torch.cuda.is_available():
            self._add("random", f"rng.{self.rank}.cuda", torch.cuda.get_rng_state())

    def _add_tensor(self, kind: str, key: str, t: Tensor) -> None:
        if not is_sharded(t) or not t.numel():
            self._add_whole(kind, key, local(t))
            return
        self._expect(key, t.numel())
        box, first = box_of(t)
        if first and local(t).numel():
            self._add(kind, key, local(t), 0, box.offsets)

    def _add_whole(self, kind: str, key: str, t: Tensor) -> None:
        self._expect(key, t.numel())
        writer = self._loads.index(min(self._loads))
        self._loads[writer] += t.numel() * t.element_size()
        if writer == self.rank:
            self._add(kind, key, t)

    def _expect(self, key: str, numel: int) -> None:
        if key in self.expected:
            raise checkpoint.CheckpointError(f"two tensors would be saved as {key!r}")
        self.expected[key] = numel

    def _add(self, kind: str, key: str, t: Tensor, nth: int = 0, offsets: tuple[int, ...] | None = None) -> None:
        copy = torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t.detach())  # row-major, and its own memory
        file = f"{kind}-{self.rank}{f'.{nth}' if nth else ''}.safetensors"
        self._files[file][key] = ((0,) * t.ndim if offsets is None else offsets, copy)
        self.written[key] += t.numel()

    def write(self, folder: Path) -> dict[str, str]:
        """Writes all of it, to stay there. Returns the files' sha256 sums."""
        sums = {}
        if self.rank == 0:
            checkpoint.write_text(folder / "state.json", self.state)
            sums["state.json"] = checkpoint.seal(folder / "state.json")
        for name, tensors in self._files.items():
            offsets = {key: {"saved_offsets": list(at)} for key, (at, _) in tensors.items()}
            about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
            checkpoint.write_tensors(folder / name, {key: t for key, (_, t) in tensors.items()}, about)
            sums[name] = checkpoint.seal(folder / name)
        return sums
