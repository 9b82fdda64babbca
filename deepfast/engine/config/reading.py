"""From a dictionary to a configuration that can be used, or one line that says which key cannot."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError

from deepfast.engine.config import ignored, named, spellings
from deepfast.engine.config.checks import check, kind, one_line
from deepfast.engine.config.schema import Config, TorchParams
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


def load(data: dict[str, Any]) -> Config:
    """Checks a configuration in either spelling. Keys that begin with "_" are comments.

    Raises:
        ConfigError: with one line that names the key, what it holds and what it may hold.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"configuration: an object was expected, got {kind(data)}")
    auto: list[str] = []
    source, data = data, _written(data, "", auto)
    spelled = spellings.unify(data)
    unused, offload = ignored.take_out(data)
    section: Any = data.get("optimizer")
    name, params = (section.get("type"), section.get("params", {})) if isinstance(section, dict) else (None, None)
    at: tuple[str, ...] = ()
    try:
        if isinstance(name, str) and isinstance(params, dict) and named.torchs(name) is not None:
            at = ("optimizer", "params")
            section["params"] = TorchParams.model_validate(params)
            at = ()
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(one_line(error, data, spelled, at)) from None
    check(config, spelled)
    config._auto, config._source = auto, source
    if unused:
        log.warning("configuration keys without effect here: %s", ", ".join(unused))
    if offload:
        log.warning("%s: offloading is not built yet: the state stays on the device", ", ".join(offload))
    return config


def _written(value: Any, prefix: str, auto: list[str]) -> Any:
    """A copy without comments, in which "auto" (noted) and null mean unset."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, held in value.items():
        if not isinstance(key, str):
            raise ConfigError(f"{named.brief(prefix + str(key))}: a key must be a string")
        if key.startswith("_") or held is None:
            continue
        if isinstance(held, str) and held == "auto":
            auto.append(prefix + key)
        else:
            kept[key] = _written(held, f"{prefix}{key}.", auto)
    return kept
