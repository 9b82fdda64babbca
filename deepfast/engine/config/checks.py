"""What a schema cannot say: which values go together; and what is wrong with a configuration, in one line."""

from __future__ import annotations

import difflib
import json
import logging
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from deepfast.engine.config.ignored import REFUSED, UNUSED, ZERO_REFUSED, ZERO_UNUSED
from deepfast.engine.config.schema import OPTIMIZER_PARAMS, Config, fields
from deepfast.engine.config.spellings import SPELLINGS
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


def check(config: Config) -> None:
    for name, section in (("fp16", config.fp16), ("bf16", config.bf16)):
        if section and "enabled" not in section.model_fields_set:
            log.info('%s: a section without "enabled": true is off, as in DeepSpeed', name)
    if config.train_loss_scale and config.train_loss_scale < 2**-64:
        raise ConfigError(f"train_loss_scale={config.train_loss_scale}: too small for fp32; 0 means dynamic")
    for name in ("output_dir", "model_dir", "dataset_dir"):
        if "\0" in getattr(config, name):
            raise ConfigError(f"{name}: holds a NUL character")
    if config.fp16 and config.fp16.enabled and config.bf16 and config.bf16.enabled:
        raise ConfigError("fp16 and bf16 are both enabled: choose one")
    if config.optimizer is None:
        return
    params = config.optimizer.params
    known = OPTIMIZER_PARAMS[config.optimizer.type]
    for name in sorted(params.model_fields_set.difference(known)):
        raise ConfigError(f"optimizer.params.{name}: {config.optimizer.type} has none: it takes {', '.join(known)}")
    if params.nesterov and not (params.momentum and params.dampening == 0):
        raise ConfigError("optimizer.params.nesterov=true needs a momentum, and no dampening")
    for i, beta in enumerate(params.betas or ()):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.params.betas.{i}={beta} must lie in [0, 1)")


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def one_line(error: ValidationError, spelled: dict[str, str]) -> str:
    """The first fault: which key, what it holds, what it may hold."""
    fault = error.errors()[0]
    loc = [str(part) for part in fault["loc"]]
    key, value = ".".join(loc), fault["input"]
    key = spelled.get(key, key)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.6) or [k for k in known if k in loc[-1]]
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
        return f"{key!r}: unknown key: {hint}{more}"
    if fault["type"] == "missing":
        return f"{key}: it is required{more}"
    shown = json.dumps(value, default=str)
    message = fault["msg"].replace("Input should be", "it must be").replace("String should", "it should")
    message = message.replace("a valid tuple", "a list")
    message = re.sub(r"a valid (?=i)", "an ", message).replace("a valid ", "a ")
    message = re.sub(r"a dictionary( or instance of \w+)?", "an object", message)
    return f"{key}={shown if len(shown) < 60 else kind(value)}: {message}{more}"


def _known_keys(path: list[str]) -> list[str]:
    """The keys a section may hold, the commonest first."""
    model: type[BaseModel] = Config
    for part in path:
        model = next((s for name, _, s in fields(model) if name == part and s), model)
    nested = [spelling[-1] for spelling in SPELLINGS.values() if list(spelling[:-1]) == path]
    extra = {(): [*UNUSED, *REFUSED], ("zero_optimization",): [*ZERO_UNUSED, *ZERO_REFUSED]}
    return [*model.model_fields, *nested, *extra.get(tuple(path), [])]
