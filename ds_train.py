#!/usr/bin/env python3
"""Trains a GPT-2 from a configuration file; see docs/training.md."""

try:
    from deepfast.train import main

    code = main()
except KeyboardInterrupt:
    code = 130
raise SystemExit(code)
