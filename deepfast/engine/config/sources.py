"""Where a configuration comes from: a file or a string, as JSON, as hjson, or as JSON in base64."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

from deepfast.engine.config.checks import kind
from deepfast.engine.config.named import brief, cut
from deepfast.errors import ConfigError


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file of JSON or hjson. Raises ConfigError, with line and column where it is neither."""
    name = cut(repr(os.fspath(path))[1:-1], 80)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _parsed(text, name)


def given(config: Any, args: Any = None) -> Any:
    """``config``, or what ``args.deepspeed_config`` names; read, where it is a path or a string.

    Raises:
        ConfigError: where there is none, where the two contradict each other, and for what cannot be read.
    """
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if config is None:
        config = named
    elif named is not None and named != config:
        raise ConfigError("initialize(): a configuration in args.deepspeed_config, and another in config=: keep one")
    if config is None or config == "":
        raise ConfigError("initialize(): no configuration: pass config= a dict or the path of a JSON file")
    if isinstance(config, str) and not os.path.exists(config):
        decoded = _decoded(config)
        if decoded is not None:
            return _parsed(decoded, "the configuration in base64")
    return read_json(config) if isinstance(config, (str, os.PathLike)) else config


def _decoded(text: str) -> str | None:
    """The object that a string holds in base64, if it does."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode()
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parsed(text: str, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ConfigError(f"{name}: the key {brief(twice)} is there twice in one object: keep one")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        data = _hjson(text, unique)
        if not isinstance(data, dict):
            raise ConfigError(f"{name}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise ConfigError(f"{name}: JSON that cannot be read: {cut(str(error), 100)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a JSON object was expected, got {kind(data)}")
    return data


def _hjson(text: str, unique: Any) -> Any:
    """With comments, trailing commas and the like, as DeepSpeed takes it; None where it is no hjson."""
    import hjson

    try:
        return hjson.loads(text, object_pairs_hook=unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError):
        return None
