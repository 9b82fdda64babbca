"""A folder's files, and the documents in them: piece by piece, so that no file is read whole, from any place on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepfast.errors import UserError

log = logging.getLogger("deepfast")

TEXT = (".txt", ".md", ".py", ".jsonl", ".parquet")
BLOCK = 16 << 20  # bytes: a text file that has no more is one piece
_ROWS = 1024  # of .parquet, read at a time
_LLMC_HEADER = 256  # llm.c's token files begin with int32[256]: magic, version, number of tokens
_LLMC_DTYPES = {20240520: np.uint16, 20240801: np.uint32}


class DataError(UserError):
    """A dataset that cannot be trained on."""


@dataclasses.dataclass
class Skipped:
    """What could not be read, counted."""

    files: int = 0
    lines: int = 0

    def tell(self) -> None:
        if said := str(self):
            log.info("skipped: %s", said)

    def __str__(self) -> str:
        said = [f"{self.files} of the files: no UTF-8 text"] if self.files else []
        return "; ".join([*said, *([f'{self.lines} of the lines: no "text" in them'] if self.lines else [])])


def nothing_in(named: str, files: list[Path], skipped: Skipped) -> DataError:
    """What is raised where all of the files have been read, and nothing was found.

    Args:
        named: the key and its value.
    """
    what = "tokens" if are_tokens(files) else "readable text"
    why = f" (skipped: {skipped})" if str(skipped) else ""
    return DataError(f"{named}: no {what} in its {len(files)} file{'s' if len(files) != 1 else ''}{why}")


class Piece(NamedTuple):
    """Some text of a document.

    Attributes:
        at: where in its file it begins: a byte; of .parquet a row.
        ends: it is the document's last.
    """

    at: int
    text: str
    ends: bool


def source_files(dataset_dir: str, key: str = "dataset_dir") -> tuple[Path, list[Path]]:
    """The dataset's folder and its files, sorted: text where there is any, else token files.

    Args:
        key: of the configuration, that names the folder.

    Raises:
        DataError: for a folder that is missing or holds nothing readable.
    """
    if dataset_dir == "stdlib":
        root = folder(dataset_dir)
        own = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages", "test", "tests"} & set(p.parts)]
        return root, sorted(own)
    root = folder(dataset_dir)
    if not root.is_dir():
        what = "is a file: give the folder it lies in" if root.is_file() else "no such folder"
        raise DataError(f"{key}={dataset_dir!r}: {what}")
    files = sorted(p for p in _walk(root) if p.suffix.lower() in (*TEXT, ".bin"))
    text = [p for p in files if p.suffix.lower() != ".bin"]
    if len(text) < len(files):  # a README beside token files is not the dataset
        text = [p for p in text if p.stem.upper() not in ("README", "LICENSE")]
    if text and len(text) < len(files):
        log.info("%s holds text and .bin files: the text is used", root)
    if not files:
        raise DataError(f"{key}={dataset_dir!r}: no {' '.join(TEXT)} or .bin file in it")
    return root, text or [p for p in files if p.suffix.lower() == ".bin"]


def folder(dataset_dir: str) -> Path:
    return Path(sysconfig.get_path("stdlib") if dataset_dir == "stdlib" else dataset_dir)


def are_tokens(files: list[Path]) -> bool:
    """Whether these, of one dataset, are token files."""
    return files[0].suffix.lower() == ".bin"


def _walk(root: Path) -> Iterator[Path]:
    """All files below ``root``, linked folders included, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen]
        yield from (Path(folder, name) for name in names)


class _UnreadableError(Exception):
    pass


def pieces(path: Path, skipped: Skipped, at: int = 0, block: int = BLOCK) -> Iterator[Piece]:
    """The texts in a file: one a file, one a line of .jsonl, one a row of .parquet. What cannot be read is counted.

    Args:
        at: where a piece begins; those from there on are read.
        block: bytes of a text file read at a time: a longer one comes in pieces.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _rows(path, at)
        elif kind == ".jsonl":
            yield from _lines(path, at, skipped)
        else:
            yield from _blocks(path, at, block)
    except (UnicodeDecodeError, OSError, _UnreadableError):
        skipped.files += 1


def _blocks(path: Path, at: int, block: int) -> Iterator[Piece]:
    size = path.stat().st_size
    with path.open("rb") as file:
        while True:
            file.seek(at)
            data = file.read(block)
            ends = at + len(data) >= size or not data
            if not ends:
                data = data[: _cut(data)]
            text = data.decode("utf-8" if at else "utf-8-sig")
            yield Piece(at, text.replace("\r\n", "\n").replace("\r", "\n"), ends)
            if ends:
                return
            at += len(data)


def _cut(block: bytes) -> int:
    """Where a block ends that its file goes on after: before its last line end, or else space, that a word follows.

    There GPT-2's tokenizer cuts, too, and so the pieces have the tokens that the whole has. Without any: after a whole
    character.
    """
    for near in (rb"\r?\n(?=\S)", rb" (?=\S)"):
        for begin in (max(1, len(block) - (1 << 16)), 1):
            ends = [match.start() for match in re.finditer(near, block[begin:])]
            if ends:
                return begin + ends[-1]
    last = next((back for back in range(1, 5) if block[-back] & 0xC0 != 0x80), 1)
    cut = len(block) - (last if block[-last] >= 0xC0 else 0)
    return cut - (block[cut - 1 : cut] == b"\r") or len(block)


def _lines(path: Path, at: int, skipped: Skipped) -> Iterator[Piece]:
    with path.open("rb") as file:
        file.seek(at)
        for line in iter(file.readline, b""):
            text = _text_of(line if at else line.removeprefix(b"\xef\xbb\xbf"))
            if text is not None:
                yield Piece(at, text, True)
            elif line.strip():
                skipped.lines += 1
            at += len(line)


def _text_of(line: bytes) -> str | None:
    try:
        row = json.loads(line.decode())
        text = row.get("text") if isinstance(row, dict) else row
        if isinstance(text, str):
            text.encode()  # half of a surrogate pair is no text
            return text
    except (ValueError, RecursionError):
        pass
    return None


def _rows(path: Path, at: int) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        known = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        return any(is_kind(kind) for is_kind in known)

    try:
        with parquet.ParquetFile(path) as file:
            strings = [f.name for f in file.schema_arrow if is_text(f.type)]
            column = "text" if "text" in strings else strings[0] if strings else None
            if column is None:
                raise _UnreadableError
            row = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count <= at:  # what comes before is not even read
                    row += count
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                    for text in batch.column(0).to_pylist():
                        if text and row >= at:
                            yield Piece(row, text, True)
                        row += 1
    except pyarrow.ArrowException as error:
        raise _UnreadableError from error


def token_map(path: Path) -> np.ndarray:
    """uint16 or uint32 [n]: the tokens of a .bin file, in a memory map.

    Raises:
        DataError: for one whose size is not its tokens'.
    """
    header = np.fromfile(path, dtype=np.int32, count=3)
    known = len(header) == 3 and int(header[0]) in _LLMC_DTYPES
    source = np.dtype(_LLMC_DTYPES[int(header[0])] if known else np.uint16)
    size = path.stat().st_size - (_LLMC_HEADER * 4 if known else 0)
    if size < 0 or size % source.itemsize or (known and size != header[2] * source.itemsize):
        expected = f"{header[2]} tokens of {source}, as its header says" if known else f"a whole number of {source}"
        raise DataError(f"{path}: {size} bytes are not {expected}")
    if size == 0:
        return np.empty(0, dtype=source)
    return np.memmap(path, dtype=source, mode="r", offset=path.stat().st_size - size)


def check_tokens(tokens: np.ndarray, path: Path, vocab_size: int) -> None:
    """Raises DataError for a token that the model has not."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise DataError(
            f"{path}: holds the token {int(tokens.max())}, but the model knows only {vocab_size}: "
            'set model_dir to one that fits ("gpt2" for GPT-2\'s own tokens)'
        )
