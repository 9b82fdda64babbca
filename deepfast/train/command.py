"""The command line: ``ds_train.py --config config.json``, alone or under torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from typing import Any, NoReturn

import torch.distributed as dist

from deepfast.engine import config as configuration
from deepfast.engine.ranks import SharedError, leave
from deepfast.errors import ConfigError, TrainingError, UserError
from deepfast.train.stop import StoppedTwiceError

log = logging.getLogger("deepfast")


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="ds_train.py", description="Train a GPT-2. Exit code 2: bad input; 130: Ctrl-C, saved; 1: in vain."
    )
    parser.add_argument("--config", required=True, help="a JSON file; python -m deepfast keys lists its keys")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="TAG", help="go on from the newest checkpoint, or from TAG"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, dotted for sections"
    )
    return parser.parse_args(argv)


def overridden(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """``data`` with each ``key=value`` of the command line put in; a value is JSON, or else a string."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set {setting}: KEY=VALUE was expected")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        *path, last = key.split(".")
        holder = data
        for part in path:
            inner = holder.setdefault(part, {})
            holder[part] = inner = {"enabled": inner} if isinstance(inner, bool) else inner
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting}: {part} is no section")
            holder = inner
        holder[last] = value
    return data


class _BarHandler(logging.StreamHandler):
    """Log lines above the progress bar, not through it, and on stdout: stderr is for what went wrong."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


EXTRA = ("matplotlib", "numpy", "pyarrow", "tensorboard", "tokenizers", "tqdm", "transformers")


def missing_extra() -> list[str]:
    """What the trainer needs and is not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def _refused(message: str, rank: str, code: int = UserError.exit_code) -> int:
    line = message.replace("\n", "\\n")
    print(f"ds_train.py: {line}" if rank == "0" else f"ds_train.py: rank {rank}: {line}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 where training leads nowhere, 2 for bad input, 130 on Ctrl-C."""
    rank = os.environ.get("RANK", "0")
    handler = _BarHandler()
    handler.setFormatter(logging.Formatter("deepfast: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == "0" else logging.ERROR)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if missing := missing_extra():
            raise UserError(f"{', '.join(missing)} not installed: pip install 'deepfast[train]'")
        from deepfast.train.loop import train  # which needs them

        data = overridden(configuration.read_json(options.config), options.set)
        return train(configuration.load(data), options.resume)
    except SharedError as error:
        return error.exit_code
    except TrainingError as error:  # which all ranks raise
        return _refused(str(error), rank, error.exit_code) if rank == "0" else error.exit_code
    except UserError as error:
        return _refused(str(error), rank)
    except OSError as error:  # a full disk, a name too long, a folder that went away
        return _refused(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", rank)
    except StoppedTwiceError as error:
        print(f"ds_train.py: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            return _refused("not enough memory: lower train_micro_batch_size or train_sequence_length", rank)
        raise
    except KeyboardInterrupt:
        return 130
    finally:
        log.removeHandler(handler)
        if dist.is_initialized():
            leave()
