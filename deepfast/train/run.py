"""What a run leaves in its output folder, and where it stands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from deepfast.engine import checkpoint
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


class Run:
    """The files of one run: ``output_dir/`` and what stands in it."""

    def __init__(self, output_dir: str) -> None:
        self.root = Path(output_dir)
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.samples = self.root / "samples.jsonl"
        self.data = self.root / "data"
        self.eval_data = self.root / "eval_data"
        self.model = self.root / "model"
        self.plot = self.root / "loss.png"
        self.events = self.root / "tensorboard"

    def check_writable(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            why = "is a file" if self.root.is_file() else f"cannot be written: {error.strerror}"
            raise ConfigError(f"output_dir={str(self.root)!r}: {why}") from None

    def set_aside(self) -> None:
        """Moves what an earlier run left to ``earlier/<n>``: a new run overwrites nothing."""
        results = (self.checkpoints, self.metrics, self.samples, self.model, self.plot, self.events)
        left = [path for path in results if path.exists()]
        if not left:
            return
        earlier = self.root / "earlier"
        number = 1 + max([int(p.name) for p in earlier.glob("*") if p.name.isdigit()], default=0)
        target = earlier / str(number)
        target.mkdir(parents=True)
        for path in left:
            os.rename(path, target / path.name)
        log.info("%s held an earlier run: moved to %s", self.root, target)

    def read_metrics(self, until: int) -> list[dict[str, Any]]:
        """The lines of the first ``until`` steps; a line that a kill cut short is none."""
        return _rows(self.metrics, until)

    def cut_short(self, path: Path, until: int) -> list[dict[str, Any]]:
        """The same of ``path``, in which the rest is then gone."""
        rows = _rows(path, until)
        checkpoint.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _rows(path: Path, until: int) -> list[dict[str, Any]]:
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("step", until + 1) <= until]
