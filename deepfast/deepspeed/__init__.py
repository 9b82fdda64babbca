"""DeepSpeed's surface: ``import deepfast.deepspeed as deepspeed`` in the place of ``import deepspeed``.

From then on ``deepspeed`` and its submodules mean what is here (``from deepspeed.ops.adam import FusedAdam``), in the
whole process; ``python -m deepfast.deepspeed script.py …`` runs a script that is not changed at all. What there is, is
listed in ``names.py``; a name that is not says so. Nothing is loaded before it is used.

Raises:
    ImportError: if DeepSpeed itself is imported already.
"""

import sys
from typing import TYPE_CHECKING, Any

from deepfast.deepspeed import surface

if TYPE_CHECKING:  # what scripts call at the top; the submodules are made when the package is imported
    from deepfast.deepspeed.collectives import init_distributed as init_distributed
    from deepfast.deepspeed.devices import get_accelerator as get_accelerator
    from deepfast.deepspeed.logs import log_dist as log_dist
    from deepfast.deepspeed.logs import logger as logger
    from deepfast.engine.engine import Engine
    from deepfast.engine.initialization import add_config_arguments as add_config_arguments
    from deepfast.engine.initialization import initialize as initialize

    __version__: str
    DeepSpeedEngine = Engine


def __getattr__(name: str) -> Any:
    return surface.find("deepspeed", name)


def __dir__() -> list[str]:
    return sorted([*globals(), *surface.names("deepspeed")])


surface.register(sys.modules[__name__])
