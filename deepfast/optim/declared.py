"""What an optimizer says of itself: its options and, of each group, the rule, its moments and its hyperparameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfast.optim.hyper import Value, check_flags, check_numbers, is_read_on
from deepfast.optim.options import NAMES, Backend, Form, Master, Option, Rounding
from deepfast.optim.shards import Shards
from deepfast.reference import RULES


class Declared(torch.optim.Optimizer):
    """The first layer of :class:`deepfast.optim.Optimizer`. A subclass of that one answers what is asked here."""

    master = Option[Master]()
    state_dtype = Option[Form | dict[str, Form]]()
    rounding = Option[Rounding]()
    seed = Option[int]()
    max_grad_norm = Option[float | None]()
    reset_grad = Option[bool]()
    backend = Option[Backend]()
    _shared: dict[str, Any]  # see wrapped.py

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a hyperparameter out of range."""
        raise NotImplementedError(
            f"deepfast: {type(self).__name__} has no step of its own: take AdamW, Adam, SGD, Lion, LAMB or Adagrad"
        )

    def _rule(self, group: dict[str, Any]) -> str:
        """The kernels' name of the rule that updates this group."""
        raise NotImplementedError

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """torch's names of the tensors that the rule keeps, in the kernels' order.

        Raises ValueError where one of them cannot be of the form that is asked for.
        """
        return RULES[self._rule(group)].keeps

    # What of a group is not a checkpoint's to say: how the step is done, and (of some) which rule the class is.
    _not_loaded: tuple[str, ...] = ("foreach", "fused")
    # The count of a state that has begun and has none.
    _uncounted: float | None = None

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether it is to be known how many steps a parameter has seen: for the rule, or for random bits."""
        return RULES[self._rule(group)].counts_steps or self._by_chance()

    def _by_chance(self) -> bool:
        """Whether anything is rounded by chance."""
        asked = self.state_dtype
        return self.rounding == "stochastic" or "int8" in (asked.values() if isinstance(asked, dict) else (asked,))

    def _form(self, moment: str) -> str:
        """How a moment is to be kept: a key of ``options.MOMENTS``."""
        asked = self.state_dtype
        return asked.get(moment, "fp32") if isinstance(asked, dict) else asked

    def _initial(self, group: dict[str, Any]) -> float:
        """What the moments begin at."""
        return 0.0

    def _hyper(self, group: dict[str, Any]) -> tuple[Value, ...]:
        """The values that the rule's ``prepare`` takes."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in NAMES:
            if name in param_group:
                raise ValueError(f"deepfast: {name} is an option of the optimizer, not of a parameter group")
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"deepfast: a parameter group needs 'params', got {', '.join(param_group) or 'nothing'}")
        super().add_param_group(param_group)
        for name in NAMES:
            param_group.pop(name, None)  # torch has put all of ``defaults`` there
        try:
            check_numbers(self.param_groups[-1])
            self._check(self.param_groups[-1])
            self._moments(self.param_groups[-1])  # may refuse them
            for shards in filter(None, map(Shards.of, self.param_groups[-1]["params"])):
                if any(placement.is_partial() for placement in shards.placements):
                    raise ValueError("deepfast: a parameter is a DTensor of partial sums: redistribute() it first")
            check_flags(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _params(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def _hyper_table(self, device: torch.device) -> tuple[Tensor, list[Tensor | None]]:
        """fp64 [groups, 1 + the rule's values]: the gradient's sign, then what ``_hyper`` says (lr first).

        And the learning rates that are tensors on ``device``: they are read there, in the step, and stand for the
        table's. (No list if there are none.)
        """
        signs = [-1.0 if group["maximize"] else 1.0 for group in self.param_groups]
        try:
            values = [self._hyper(group) for group in self.param_groups]
            lrs = [lr if isinstance(lr, Tensor) and is_read_on(device, lr) else None for lr, *_ in values]
            rows = [
                [sign, 0.0 if lr is not None else float(row[0]), *map(float, row[1:])]
                for sign, row, lr in zip(signs, values, lrs, strict=True)
            ]
        except (TypeError, ValueError):
            for group in self.param_groups:  # somebody has put there what is no number
                check_numbers(group)
            raise
        return torch.tensor(rows, dtype=torch.float64, device="cpu"), lrs if any(lr is not None for lr in lrs) else []

    def _check_capture(self, device: torch.device) -> None:
        """A graph replays the numbers of its capture; those that change must be tensors, and those are read anew."""
        for group in self.param_groups:
            lr, *others = self._hyper(group)
            if not isinstance(lr, Tensor) or not is_read_on(device, lr):
                value = "..." if isinstance(lr, Tensor) else lr
                raise RuntimeError(
                    f"deepfast: a graph would keep the learning rate of its capture for ever: give it as a float32 or "
                    f"float64 tensor on {device} (lr=torch.tensor({value}, device='cuda')) and change it in place"
                )
            if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in others):
                raise RuntimeError("deepfast: only the learning rate is read on the device: give the others as floats")
