"""The two spellings of one configuration: flat keys, and DeepSpeed's nested ones; and its short forms."""

from __future__ import annotations

from typing import Any

from deepfast.engine.config import named
from deepfast.errors import ConfigError

# flat key -> where DeepSpeed keeps the same thing
SPELLINGS = {
    "train_micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "train_loss_scale": ("fp16", "loss_scale"),
    "num_warmup_steps": ("scheduler", "params", "warmup_num_steps"),
    "num_train_steps": ("scheduler", "params", "total_num_steps"),
}
ALIASES = {"bfloat16": "bf16"}


def unify(data: dict[str, Any]) -> dict[str, str]:
    """Moves DeepSpeed's spellings to the flat ones; the two may not contradict each other. Returns what was moved."""
    for key in ("fp16", "bf16", "bfloat16"):
        if isinstance(data.get(key), bool):
            data[key] = {"enabled": data[key]}
        elif key in data and not isinstance(data[key], dict | None):
            raise ConfigError(f"{key}={named.brief(data[key])}: it must be true, false or an object")
    for alias, key in ALIASES.items():
        if alias in data and data.setdefault(key, data[alias]) != data.pop(alias):
            raise ConfigError(f"{alias} contradicts {key}: keep one of them")
    if isinstance(data.get("zero_optimization"), bool):
        data["zero_optimization"] = {"stage": int(data["zero_optimization"])}
    optimizer = data.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("type"), str):
        optimizer["type"] = named.canonical(optimizer["type"])
        named.check_type(optimizer["type"])
    spelled = {}
    for flat, nested in SPELLINGS.items():
        holder: Any = data
        for part in nested[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or nested[-1] not in holder:
            continue
        value = holder.pop(nested[-1])
        if flat in data and data[flat] != value:
            one, other = named.brief(data[flat]), named.brief(value)
            raise ConfigError(f"{flat}={one} contradicts {'.'.join(nested)}={other}: keep one of them")
        if flat not in data:
            data[flat] = value
            spelled[flat] = ".".join(nested)
    return spelled
