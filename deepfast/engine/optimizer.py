"""Which optimizer an engine steps: the caller's, ours in the place of torch's, or the configuration's."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from deepfast import optim
from deepfast.engine.config import Config, automatic, named
from deepfast.errors import ConfigError
from deepfast.optim import Optimizer, lost
from deepfast.optim.state import HALF

log = logging.getLogger("deepfast")


def choose(optimizer: Any, parameters: Any, config: Config, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer of an engine whose weights are ``dtype``; set to clip as configured, and to tell the norm.

    Without a word about it in the configuration gradients are clipped at 1.0, unless the optimizer does it as it is.

    Args:
        optimizer: an optimizer, or a function of ``parameters`` that makes one; None: as configured.

    Raises:
        ConfigError: where neither says which, and for a wrapper around an optimizer.
    """
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(parameters)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        what = type(optimizer).__name__
        raise ConfigError(f"initialize(): optimizer= takes an optimizer, or a function that makes one, not {what}")
    if optimizer is None:
        if config.optimizer is None:
            raise ConfigError("no optimizer: pass optimizer= to initialize(), or set one in the configuration")
        name, arguments = named.chosen(config.optimizer)
        try:
            optimizer = (getattr(optim, name) if isinstance(name, str) else name)(parameters, **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"optimizer: {named.cut(str(error))}") from None
    elif type(optimizer) in _REPLACED and not optimizer.state:
        optimizer = _replacement(optimizer)
    elif isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        named.check_type(type(optimizer).__name__)  # which says why not
    if config.gradient_clipping is None and not getattr(optimizer, "max_grad_norm", None):
        config.gradient_clipping = 1.0
        log.warning("no gradient_clipping in the configuration: 1.0, as in DeepSpeed; 0 turns it off")
    automatic.tell(config, optimizer)
    if isinstance(optimizer, Optimizer):
        if "param_groups" not in vars(optimizer):  # what is set here would stay on a wrapper that has its class
            raise ConfigError(f"initialize() needs the optimizer itself, not a wrapper ({type(optimizer).__name__})")
        if optimizer._in_backward is not None:
            raise ConfigError("initialize(): an engine needs all gradients at once: no step_in_backward()")
        optimizer._measure_norm = True
        optimizer.max_grad_norm = config.gradient_clipping or optimizer.max_grad_norm
    elif dtype in HALF:
        log.warning("%s keeps no master: it updates 16-bit weights directly", type(optimizer).__name__)
        lost.watch(optimizer, "a deepfast optimizer adds them up in a master")
    return optimizer


_REPLACED: dict[type, type[Optimizer]] = {
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
    torch.optim.SGD: optim.SGD,
}


def _replacement(theirs: torch.optim.Optimizer) -> Optimizer:
    """Ours in the place of torch's: its very group dicts and hooks, so whoever steers it goes on doing so."""
    ours_class = _REPLACED[type(theirs)]
    name = ours_class.__name__
    log.warning("torch.optim.%s is replaced by deepfast.%s: the same update, in one pass", name, name)
    taken = inspect.signature(ours_class).parameters.keys() - {"fused", "foreach"}
    for group in theirs.param_groups:
        group["fused"] = group["foreach"] = None
    ours = ours_class(theirs.param_groups, **{k: v for k, v in theirs.defaults.items() if k in taken})
    ours._optimizer_step_pre_hooks = theirs._optimizer_step_pre_hooks
    ours._optimizer_step_post_hooks = theirs._optimizer_step_post_hooks
    theirs._opt_called = True  # type: ignore[attr-defined]  # so that its scheduler does not miss its steps
    # Whoever keeps theirs saves and loads what is stepped.
    theirs.state_dict, theirs.load_state_dict = ours.state_dict, ours.load_state_dict  # type: ignore[method-assign]
    return ours
