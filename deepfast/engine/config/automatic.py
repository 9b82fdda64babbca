"""The word "auto": it is for a framework to fill in. In a script it means what is taken otherwise, and that is said."""

from __future__ import annotations

import json
import logging
from typing import Any

from deepfast.engine.config.ignored import OFFLOAD, REFUSED, UNUSED
from deepfast.engine.config.schema import Config
from deepfast.engine.config.spellings import SPELLINGS

log = logging.getLogger("deepfast")


def tell(config: Config, optimizer: Any) -> None:
    """Logs what all that was "auto" has become, in one line."""
    became = {key: _value(key, config, optimizer) for key in config._auto if not _unused(key)}
    if became:
        said = ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in became.items())
        log.warning('"auto" in the configuration, and no framework to fill it in: %s', said)


def _unused(key: str) -> bool:
    names = {key, *(key[:i] for i, letter in enumerate(key) if letter == ".")}
    return not names.isdisjoint((*UNUSED, *OFFLOAD, *REFUSED))


def _value(key: str, config: Config, optimizer: Any) -> Any:
    section, _, name = key.rpartition(".")
    defaults = getattr(optimizer, "defaults", {})
    if section == "optimizer.params" and name in defaults:
        return defaults[name]
    if key == "optimizer.type":
        return type(optimizer).__name__
    flat = {".".join(nested): known for known, nested in SPELLINGS.items()}.get(key, key)
    value: Any = config
    for part in flat.split("."):
        value = getattr(value, part, None)
    return "its default" if value is None else value
