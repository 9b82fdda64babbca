"""What a schema cannot say: which values go together; and what is wrong with a configuration, in one line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from deepfast.engine.config import named
from deepfast.engine.config.ignored import OFFLOAD, REFUSED, UNUSED
from deepfast.engine.config.schema import Config, fields
from deepfast.engine.config.spellings import ALIASES, SPELLINGS
from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")


def check(config: Config, spelled: dict[str, str]) -> None:
    for name, section in (("fp16", config.fp16), ("bf16", config.bf16)):
        if section and "enabled" not in section.model_fields_set:
            log.info('%s: a section without "enabled": true is off, as in DeepSpeed', name)
    if config.train_loss_scale and config.train_loss_scale < 2**-64:
        raise ConfigError(f"train_loss_scale={config.train_loss_scale}: too small for fp32; 0 means dynamic")
    for name in ("output_dir", "model_dir", "dataset_dir", "eval_dataset_dir"):
        if "\0" in (getattr(config, name) or ""):
            raise ConfigError(f"{name}: holds a NUL character")
    if config.fp16 and config.fp16.enabled and config.bf16 and config.bf16.enabled:
        raise ConfigError("fp16 and bf16 are both enabled: choose one")
    if config.data_types.grad_accum_dtype not in (None, "fp32"):
        log.info("data_types.grad_accum_dtype=%s: micro-batches are summed in fp32", config.data_types.grad_accum_dtype)
    if config.optimizer is not None:
        named.check_optimizer(config.optimizer)
    if config.scheduler is not None:
        named.check_scheduler(config.scheduler, spelled.values())


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def one_line(error: ValidationError, data: dict[str, Any], spelled: dict[str, str], at: tuple[str, ...] = ()) -> str:
    """The first fault: which key, what it holds, what it may hold.

    Args:
        at: the section that was validated.
    """
    faults = error.errors()
    fault = faults[0]
    loc = _place(data, fault, at)
    others = len({tuple(_place(data, other, at)) for other in faults}) - 1
    more = f" (and {others} more)" if others else ""
    if fault["type"] == "extra_forbidden":
        return f"{named.brief('.'.join(loc))}: unknown key: {_hint(loc)}{more}"
    key = ".".join(loc)
    key = spelled.get(key, key)
    if not key.isprintable() or len(key) > 80:
        key = named.brief(key)
    if fault["type"] == "missing":
        return f"{key}: it is required{more}"
    value = fault["input"]
    try:
        shown = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        shown = named.brief(value)
    message = fault["msg"].replace("Input should be", "it must be").replace("String should", "it should")
    message = message.replace("a valid tuple", "a list")
    message = re.sub(r"a valid (?=i)", "an ", message).replace("a valid ", "a ")
    message = re.sub(r"a dictionary( or instance of \w+)?", "an object", message)
    return f"{key}={shown if len(shown) < 60 else kind(value)}: {message}{more}"


def _place(data: Any, fault: Any, at: tuple[str, ...]) -> list[str]:
    """Where in the data a fault is; pydantic's place goes on with names of types."""
    place, found = (*at, *fault["loc"]), []
    for part in place:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break
        found.append(str(part))
    return [*found, str(place[-1])] if fault["type"] == "missing" else found


def _hint(loc: list[str]) -> str:
    """Where the key is known, or which keys are near it."""
    section, key = ".".join(loc[:-1]), loc[-1]
    known = list(_known(section))
    places = [path for path in _all_keys() if path.rpartition(".")[2] == key and path not in known]
    return f"did you mean {places[0]!r}?" if places else named.near(key, known)


def _known(section: str) -> Iterator[str]:
    """The keys that a section may hold."""
    inside = f"{section}." if section else ""
    for path in _all_keys():
        key = path.removeprefix(inside)
        if path.startswith(inside) and "." not in key:
            yield key


def _all_keys() -> list[str]:
    """All that are known, with their sections."""

    def within(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, _, section in fields(model):
            yield prefix + name
            if section:
                yield from within(section, f"{prefix}{name}.")

    nested = (".".join(path) for path in SPELLINGS.values())
    return [*within(Config, ""), *nested, *ALIASES, *sorted((*UNUSED, *OFFLOAD, *REFUSED))]
