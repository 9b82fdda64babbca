"""The schema as a table, for docs/configuration.md and `python -m deepfast keys`."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deepfast.engine.config.schema import Config, fields
from deepfast.engine.config.spellings import SPELLINGS


def table() -> str:
    """The schema as a Markdown table."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def add(model: type[BaseModel], prefix: str) -> None:
        for name, field, section in fields(model):
            key = prefix + name
            same = [".".join(SPELLINGS[key])] if key in SPELLINGS else []
            if section and not field.description:
                add(section, key + ".")
                continue
            default = field.get_default(call_default_factory=True)
            shown = "" if default is None or default is PydanticUndefined or section else f"`{json.dumps(default)}`"
            also = "".join(f" = `{other}`" for other in same)
            lines.append(f"| `{key}`{also} | {shown} | {field.description} |")
            if section:
                add(section, key + ".")

    add(Config, "")
    return "\n".join(lines)
