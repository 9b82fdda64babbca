"""A trainer for GPT-2s: ``ds_train.py --config config.json``, or ``python -m deepfast.train``."""

from deepfast.train.command import main, missing_extra
from deepfast.train.stop import Stop

__all__ = ["Stop", "main", "missing_extra"]
