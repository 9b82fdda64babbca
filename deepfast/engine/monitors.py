"""Where numbers of a run go: TensorBoard, CSV files, Weights & Biases; DeepSpeed's sections, layout and events."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from deepfast.engine.config import Config
from deepfast.engine.config.schema import CsvMonitor, TensorBoard, Wandb
from deepfast.engine.ranks import on_rank_0
from deepfast.errors import ConfigError

Event = tuple[str, float, int]  # name, value, and where on the x-axis: samples so far


class Writer(Protocol):
    def write(self, events: list[Event]) -> None: ...

    def close(self) -> None: ...


class Monitor:
    """Rank 0 writes events to all that the configuration has enabled. All ranks make one together.

    Attributes:
        enabled: whether there is anything to write to; the same on all ranks.

    Raises:
        ConfigError: on all ranks, for a package that is not installed and a folder that cannot be written.
    """

    def __init__(self, config: Config) -> None:
        kinds = ((_TensorBoard, config.tensorboard), (_Csv, config.csv_monitor), (_Wandb, config.wandb))
        wanted = [(kind, section) for kind, section in kinds if section.enabled]
        self.enabled = bool(wanted)
        self._writers: list[Writer] = []
        if wanted:
            on_rank_0(lambda: self._writers.extend(kind(section) for kind, section in wanted))  # type: ignore[arg-type]

    def write_events(self, events: Iterable[Event]) -> None:
        """Writes (name, value, step) triples; on another rank than 0 without effect."""
        events = list(events)
        for writer in self._writers:
            writer.write(events)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()


def _folder(name: str, section: TensorBoard | CsvMonitor) -> Path:
    folder = Path(section.output_path) / section.job_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: the folder {str(folder)!r} cannot be made: {why}") from None
    return folder


class _TensorBoard:
    def __init__(self, section: TensorBoard) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tensorboard.enabled: the package is not installed: pip install tensorboard, or turn it off"
            ) from None
        self._board = SummaryWriter(str(_folder("tensorboard", section)))

    def write(self, events: list[Event]) -> None:
        for name, value, step in events:
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Csv:
    """A file for each name, opened for each event: a run that is killed has lost nothing."""

    def __init__(self, section: CsvMonitor) -> None:
        self._folder = _folder("csv_monitor", section)

    def write(self, events: list[Event]) -> None:
        for name, value, step in events:
            path = self._folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
            with path.open("a", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerow([step, value])

    def close(self) -> None: ...


class _Wandb:
    def __init__(self, section: Wandb) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "wandb.enabled: the package is not installed: pip install wandb, or turn it off"
            ) from None
        try:
            self._run: Any = wandb.init(project=section.project, group=section.group, entity=section.team)
        except Exception as error:  # of whatever kind: no key, no network
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"wandb: {said[0][:100]} (WANDB_MODE=offline needs no server)") from None

    def write(self, events: list[Event]) -> None:
        for step, some in itertools.groupby(events, key=lambda event: event[2]):
            self._run.log({name: value for name, value, _ in some}, step=step)

    def close(self) -> None:
        self._run.finish()
