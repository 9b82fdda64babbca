"""From JSON to a configuration that can be used, or one line that says which key cannot."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepfast.engine.config import ignored, spellings
from deepfast.engine.config.checks import check, kind, one_line
from deepfast.engine.config.schema import Config
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError, with line and column where it is no JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise ConfigError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a JSON object was expected, got {kind(data)}")
    return data


def load(data: dict[str, Any]) -> Config:
    """Checks a configuration in either spelling.

    Raises:
        ConfigError: with one line that names the key, what it holds and what it may hold.
    """
    data = _without_auto(data)
    unused = ignored.take_out(data)
    spelled = spellings.unify(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(one_line(error, spelled)) from None
    if unused:
        log.warning("configuration keys without effect here: %s", ", ".join(unused))
    check(config)
    return config


def _without_auto(value: Any) -> Any:
    """A copy in which "auto" and null mean unset."""
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v is not None and v != "auto"}
    return value
