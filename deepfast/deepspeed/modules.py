"""What scripts ask of modules and parameters: experts, of which there are none, leaves, and attributes by dotted names.

A leaf is a module whose parameters ZeRO's stage 3 gathers together. Here they are whole on every rank anyway.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(whether it has experts, how many): it has none."""
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    return False


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    return False


def split_params_into_shared_and_expert_params(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return list(params), []


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | list[dict[str, Any]] | tuple[dict[str, Any], ...], max_group_size: float = 0
) -> list[dict[str, Any]]:
    """The groups as they are: no parameter is an expert's."""
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)


def configure_moe_param_groups(model_parameters: list[Any]) -> list[Any]:
    return model_parameters


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: list[type] | list[str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Returns the modules of those classes, which may be names.

    Raises:
        ValueError: where there are none, unless told not to.
    """

    def is_one(module: nn.Module) -> bool:
        kind = type(module)
        known = (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
        return any(c in known if isinstance(c, str) else isinstance(module, c) for c in leaf_module_classes)

    found = [module for module in model.modules() if is_one(module)]
    if not found and raise_if_not_found:
        raise ValueError(f"the model has no module of {leaf_module_classes}")
    return found


def recursive_getattr(model: Any, name: str) -> Any:
    """``model``'s attribute of a dotted name."""
    return functools.reduce(getattr, name.split("."), model)


def recursive_setattr(model: Any, name: str, value: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, last, value)
