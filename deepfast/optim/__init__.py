"""Drop-in optimizers: torch's arguments and behaviour, the whole step in one pass over memory."""

from deepfast.optim.adagrad import Adagrad
from deepfast.optim.adam import Adam, AdamW
from deepfast.optim.base import Optimizer
from deepfast.optim.in_backward import step_in_backward
from deepfast.optim.lamb import LAMB
from deepfast.optim.lion import Lion
from deepfast.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "step_in_backward"]
