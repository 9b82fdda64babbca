"""``import deepspeed`` in processes that an unchanged script starts: they have its ``sys.path``."""

import importlib
import sys

sys.modules.pop("deepspeed", None)  # this file
sys.modules["deepspeed"] = importlib.import_module("deepfast.deepspeed")
