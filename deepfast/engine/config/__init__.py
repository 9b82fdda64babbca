"""The configuration: one schema, two spellings.

DeepSpeed's nested keys and the flat ones may be mixed; where both spell the same thing they must agree. Every unknown
key, at any depth, is an error that names it and the nearest known one. DeepSpeed keys that only tune speed or memory
are accepted and logged once as unused; keys that would change the result are errors.
"""

from deepfast.engine.config.batch import resolve_batch
from deepfast.engine.config.markdown import table
from deepfast.engine.config.reading import load
from deepfast.engine.config.schema import Config, SchedulerSection
from deepfast.engine.config.sources import given, read_json

__all__ = ["Config", "SchedulerSection", "given", "load", "read_json", "resolve_batch", "table"]
