"""Puts the configuration table, generated from the schema, between its markers in README.md."""

from pathlib import Path

from deepfast import config

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- configuration -->\n", "<!-- /configuration -->"

before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
_, _, after = rest.partition(END)
README.write_text(f"{before}{BEGIN}{config.table()}\n{END}{after}", encoding="utf-8")
