"""Warnings that point at the line that asked for what they warn of."""

from __future__ import annotations

import sys
import warnings


def warn(text: str) -> None:
    """A UserWarning at the innermost line that is neither deepfast's nor torch's.

    Constructors call each other's, and torch wraps ``step``: how deep that goes, nobody knows beforehand.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("deepfast", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
