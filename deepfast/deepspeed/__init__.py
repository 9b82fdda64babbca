"""DeepSpeed's surface: ``import deepfast.deepspeed as deepspeed`` in the place of ``import deepspeed``.

From then on ``deepspeed`` and its submodules mean what is here (``from deepspeed.ops.adam import FusedAdam``), in the
whole process; ``python -m deepfast.deepspeed script.py …`` runs a script that is not changed at all. What there is, is
listed in ``names.py``; a name that is not says so. Nothing is loaded before it is used.

Raises:
    ImportError: if DeepSpeed itself is imported already.
"""

import sys
from typing import Any

from deepfast.deepspeed import surface


def __getattr__(name: str) -> Any:
    return surface.find("deepspeed", name)


def __dir__() -> list[str]:
    return sorted([*globals(), *surface.names("deepspeed")])


surface.register(sys.modules[__name__])
