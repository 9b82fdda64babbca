"""Drop-in optimizers: torch's arguments and behaviour, the whole step in one pass over memory."""

from deepfast.optim.adam import AdamW
from deepfast.optim.base import Optimizer

__all__ = ["AdamW", "Optimizer"]
