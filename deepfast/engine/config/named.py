"""Optimizers and schedules as a configuration names them, and what their ``params`` may hold."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import Any

from deepfast.engine.config.schema import SCHEDULERS, OptimizerSection, SchedulerSection
from deepfast.errors import ConfigError
from deepfast.optimizers import OPTIMIZERS

_FORMS = "master state_dtype rounding seed".split()
_ADAM = "adam_w_mode torch_adam"
_DEEPSPEEDS = {"AdamW": _ADAM, "Adam": _ADAM, "LAMB": "bias_correction"}  # DeepSpeed has more words for these
# type -> what its params may hold
OPTIMIZER_PARAMS = {
    name: list(dict.fromkeys((*known.split(), *_DEEPSPEEDS.get(name, "").split(), *_FORMS)))
    for name, known in OPTIMIZERS.items()
}
# Where DeepSpeed's classes have other defaults than the paper's, or torch's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Lion": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "LAMB": {"eps": 1e-8},
}
_NOT_BUILT = (
    "is not built yet: take another, or pass one as optimizer= to deepfast.initialize(), in a script of your own"
)
_REFUSED = {
    "LBFGS": "needs a closure, which an engine has not",
    "SparseAdam": "is for sparse gradients, which an engine has not",
    **dict.fromkeys("Muon MuAdam MuAdamW MuSGD OneBitAdam OneBitLamb ZeroOneAdam".split(), _NOT_BUILT),
}


def canonical(name: str) -> str:
    """One of ours in whatever case, as DeepSpeed takes its own; another's as it is."""
    return {known.lower(): known for known in OPTIMIZERS}.get(name.lower(), name)


@functools.cache
def torchs(name: str) -> type | None:
    """The class of that name in torch.optim; None where deepfast has it, or where there is none."""
    if name in OPTIMIZERS or name.lower() in map(str.lower, _REFUSED):
        return None
    from torch import optim  # a configuration for one of ours is read without torch

    found = getattr(optim, name, None) if name in optim.__all__ else None
    return found if found is not optim.Optimizer and inspect.isclass(found) else None


def check_type(name: str) -> None:
    """Raises ConfigError for an optimizer that there is not."""
    reason = {known.lower(): why for known, why in _REFUSED.items()}.get(name.lower())
    if reason:
        raise ConfigError(f"optimizer.type={name!r} {reason}")
    if name not in OPTIMIZERS and torchs(name) is None:
        raise ConfigError(f"optimizer.type={brief(name)}: unknown: {near(name, [*OPTIMIZERS, *_torchs_names()])}")


def check_optimizer(section: OptimizerSection) -> None:
    """Raises ConfigError for params that are another's, or do not go together."""
    name, params = section.type, section.params
    theirs = torchs(name)
    if theirs is not None:
        _check_torchs(name, params, inspect.signature(theirs).parameters)
        return
    known = OPTIMIZER_PARAMS[name]
    for given in sorted(params.model_fields_set.difference(known)):
        raise ConfigError(f"optimizer.params.{given}: {name} has none: it takes {', '.join(known)}")
    if not params.bias_correction and "bias_correction" not in OPTIMIZERS[name].split():
        raise ConfigError(f"optimizer.params.bias_correction=false is not built for {name}: take it out")
    if params.nesterov and not (params.momentum and params.dampening == 0):
        raise ConfigError("optimizer.params.nesterov=true needs a momentum, and no dampening")
    for i, beta in enumerate(params.betas or ()):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.params.betas.{i}={beta} must lie in [0, 1)")


def _torchs_names() -> list[str]:
    from torch import optim

    return [name for name in optim.__all__ if torchs(name)]


_SWITCHES = ("capturable", "differentiable")  # of torch's: for graphs, and for gradients of a step


def _check_torchs(name: str, params: Any, signature: Any) -> None:
    known = [key for key in signature if key not in ("params", *_SWITCHES)]
    for key, value in given_torchs(params).items():
        if key not in known:
            raise ConfigError(f"optimizer.params.{brief(key)}: {name} has none: it takes {', '.join(known)}")
        if not _is_like(value, signature[key].default):
            raise ConfigError(
                f"optimizer.params.{key}={brief(value)}: {name}'s default is {brief(signature[key].default)}"
            )


def _is_like(value: Any, default: Any) -> bool:
    """Whether torch may take a value where it has this default."""
    if value is None:
        return default is None
    if isinstance(default, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (default is None or isinstance(default, bool))
    return isinstance(value, (int, float)) and abs(value) < 2**62


def given_torchs(params: Any) -> dict[str, Any]:
    """What was written, as far as it was; of torch's optimizers."""
    return params.model_dump(exclude_unset=True, exclude_none=True)


def chosen(section: OptimizerSection) -> tuple[Any, dict[str, Any]]:
    """The name of a class in :mod:`deepfast.optim`, or torch's class; and its arguments.

    DeepSpeed's default is no weight decay, but for torch's classes.
    """
    name, params = section.type, section.params
    theirs = torchs(name)
    if theirs is not None:  # the trainer may have set what this one has not
        takes = inspect.signature(theirs).parameters
        return theirs, {key: value for key, value in given_torchs(params).items() if key in takes}
    ours = {*OPTIMIZERS[name].split(), *_FORMS}
    arguments = params.model_dump(include=ours, exclude_unset=True, exclude_none=True)
    name = "AdamW" if name == "Adam" and params.adam_w_mode else name
    decay = 0.01 if name == "AdamW" and params.torch_adam else 0.0
    return name, {"weight_decay": decay, **_DEFAULTS.get(name, {}), **arguments}


def check_scheduler(section: SchedulerSection, spelled: Iterable[str]) -> None:
    """Raises ConfigError for one that there is not, for params that are another's, and for some that are missing.

    Args:
        spelled: the keys that were DeepSpeed's, and are flat now.
    """
    name, given = section.type, section.params.model_fields_set
    if name not in SCHEDULERS:
        raise ConfigError(
            f"scheduler.type={brief(name)}: unknown: {near(name, SCHEDULERS)}; of torch's, pass one as lr_scheduler= "
            "to initialize()"
        )
    known = SCHEDULERS[name].split()
    if not name.startswith("Warmup"):
        given = given | {key.rpartition(".")[2] for key in spelled if key.startswith("scheduler.params.")}
    for key in sorted(given.difference(known)):
        raise ConfigError(f"scheduler.params.{key}: {name} has none: {near(key, known)}")
    if name == "OneCycle":
        for key in ("cycle_min_lr", "cycle_max_lr"):
            if getattr(section.params, key) is None:
                raise ConfigError(f"scheduler.params.{key} is missing: OneCycle needs it")


def near(word: str, known: Iterable[str]) -> str:
    """Which of those may have been meant: a few at most."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [k for k in known if k in word]
    if close:
        return f"did you mean {close[0]!r}?"
    if len(known) <= 6:
        return f"known are: {', '.join(known)}"
    return "`python -m deepfast keys` lists what is known"


def brief(value: Any) -> str:
    """What somebody has written, cut short, in one line."""
    return cut(repr(value), 60)


def cut(text: str, length: int = 150) -> str:
    """The first line, or what of it fits."""
    line = (text.splitlines() or [""])[0]
    return line if len(line) <= length else f"{line[: length - 3]}..."
