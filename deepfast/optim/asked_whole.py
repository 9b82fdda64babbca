"""torch.distributed.checkpoint wants the state of all of an optimizer's parameters, at any time.

What it loads into is the state that is there already, and its keys have to be those of what was saved, on all ranks.
An optimizer that has none is made to step, with gradients of zero and a learning rate of zero. That step counts: who
asks for the state before training would correct Adam's bias one step late ever after, and round by another chance. So
it is no step here. And a parameter that has never had a gradient has its state in what is saved, as it has it in what
is loaded into.
"""

from __future__ import annotations

import sys

_CALLER = "torch.distributed.checkpoint.state_dict"


def asks() -> bool:
    """Whether it is that which calls, through whatever wrappers (schedulers, frameworks and profilers have some)."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _CALLER:
            return True
    return False
