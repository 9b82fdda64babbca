"""Text files to token sequences: read, tokenized once into a memory map, dealt out in an order that needs no state."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepfast.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("deepfast")

TEXT = (".txt", ".md", ".py", ".jsonl", ".parquet")
END_OF_TEXT = "<|endoftext|>"
_TRAINING_SAMPLE = 32 << 20  # characters a tokenizer is trained on
_BATCH = 256  # documents tokenized at a time
_LLMC_HEADER = 256  # llm.c's token files begin with int32[256]: magic, version, number of tokens
_LLMC_DTYPES = {20240520: np.uint16, 20240801: np.uint32}


class DataError(UserError):
    """A dataset that cannot be trained on."""


@dataclasses.dataclass
class Skipped:
    """What could not be read, counted."""

    files: int = 0
    lines: int = 0


def source_files(dataset_dir: str) -> tuple[Path, list[Path]]:
    """The dataset's folder and its files, sorted: text where there is any, else token files.

    Raises:
        DataError: for a folder that is missing or holds nothing readable.
    """
    if dataset_dir == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        own = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages", "test", "tests"} & set(p.parts)]
        return root, sorted(own)
    root = Path(dataset_dir)
    if not root.is_dir():
        raise DataError(f"dataset_dir={dataset_dir!r}: no such folder")
    files = sorted(p for p in _walk(root) if p.suffix.lower() in (*TEXT, ".bin"))
    text = [p for p in files if p.suffix.lower() != ".bin"]
    if len(text) < len(files):  # a README beside token files is not the dataset
        text = [p for p in text if p.stem.upper() not in ("README", "LICENSE")]
    if text and len(text) < len(files):
        log.info("%s holds text and .bin files: the text is used", root)
    if not files:
        raise DataError(f"dataset_dir={dataset_dir!r}: no {' '.join(TEXT)} or .bin file in it")
    return root, text or [p for p in files if p.suffix.lower() == ".bin"]


def _walk(root: Path) -> Iterator[Path]:
    """All files below ``root``, linked folders included, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen]
        yield from (Path(folder, name) for name in names)


def documents(files: list[Path], skipped: Skipped) -> Iterator[str]:
    """The texts in ``files``: one a file, one a line of .jsonl, one a row of .parquet. What is no UTF-8 is counted."""
    for path in files:
        try:
            yield from _documents_of(path, skipped)
        except (UnicodeDecodeError, OSError, _UnreadableError):
            skipped.files += 1


class _UnreadableError(Exception):
    pass


def _documents_of(path: Path, skipped: Skipped) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                text = _text_of(line)
                if text is not None:
                    yield text
                elif line.strip():
                    skipped.lines += 1
    else:
        yield path.read_text(encoding="utf-8-sig")


def _text_of(line: str) -> str | None:
    try:
        row = json.loads(line)
        text = row.get("text") if isinstance(row, dict) else row
        if isinstance(text, str):
            text.encode()  # half of a surrogate pair is no text
            return text
    except (ValueError, RecursionError):
        pass
    return None


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        known = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        return any(is_kind(kind) for is_kind in known)

    try:
        file = parquet.ParquetFile(path)
        strings = [f.name for f in file.schema_arrow if is_text(f.type)]
        column = "text" if "text" in strings else strings[0] if strings else None
        if column is None:
            raise _UnreadableError
        for batch in file.iter_batches(columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowException as error:
        raise _UnreadableError from error


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) over an even sample of the data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(p.stat().st_size for p in files)
    every = max(1, round(total / _TRAINING_SAMPLE))
    sample = (text for i, text in enumerate(documents(files, Skipped())) if i % every == 0)
    tokenizer.train_from_iterator((text[:_TRAINING_SAMPLE] for text in sample), trainer)
    return tokenizer


def prepare(
    dataset_dir: str,
    files: list[Path],
    output: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    end: int | None,
) -> Path:
    """Writes ``output/tokens.bin`` and ``tokens.json`` for the dataset, and returns the folder.

    Args:
        files: what ``source_files`` found.
        tokenizer: None for token files.
        vocab_size: of the model; token files are checked against it.
        end: the token that ends a document, or None.

    Raises:
        DataError: where the dataset holds no text, or tokens that are not the model's.
    """
    staging = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    skipped = Skipped()
    with (staging / "tokens.bin").open("wb") as out:
        if tokenizer is None:
            count = _copy_tokens(files, out, dtype, vocab_size)
        else:
            count = _tokenize(files, out, dtype, tokenizer, end, skipped)
    if skipped.files or skipped.lines:
        log.info("skipped: %d files that hold no UTF-8 text, %d lines that hold no text", skipped.files, skipped.lines)
    if count == 0:
        what = "tokens" if tokenizer is None else "readable text"
        raise DataError(f"dataset_dir={dataset_dir!r}: no {what} in its {len(files)} files")
    meta = {"dataset_dir": dataset_dir, "tokens": count, "dtype": np.dtype(dtype).name}
    (staging / "tokens.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    os.rename(staging, output)
    return output


def _tokenize(files: list[Path], out: Any, dtype: Any, tokenizer: Tokenizer, end: int | None, skipped: Skipped) -> int:
    from tqdm import tqdm

    count = 0
    pending: list[str] = []
    size = sum(p.stat().st_size for p in files)

    def flush() -> int:
        written = 0
        for encoding in tokenizer.encode_batch_fast(pending, add_special_tokens=False):
            ids = encoding.ids if end is None else [*encoding.ids, end]
            np.asarray(ids, dtype=dtype).tofile(out)
            written += len(ids)
        pending.clear()
        return written

    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", leave=False, disable=None) as bar:
        for text in documents(files, skipped):
            if not text:
                continue
            pending.append(text)
            bar.update(len(text))
            if len(pending) == _BATCH:
                count += flush()
        count += flush()
    return count


def _copy_tokens(files: list[Path], out: Any, dtype: Any, vocab_size: int) -> int:
    count = 0
    for path in files:
        header = np.fromfile(path, dtype=np.int32, count=3)
        known = len(header) == 3 and int(header[0]) in _LLMC_DTYPES
        source = np.dtype(_LLMC_DTYPES[int(header[0])] if known else np.uint16)
        size = path.stat().st_size - (_LLMC_HEADER * 4 if known else 0)
        if size < 0 or size % source.itemsize or (known and size != header[2] * source.itemsize):
            expected = f"{header[2]} tokens of {source}, as its header says" if known else f"a whole number of {source}"
            raise DataError(f"{path}: {size} bytes are not {expected}")
        if size == 0:
            continue
        tokens = np.memmap(path, dtype=source, mode="r", offset=path.stat().st_size - size)
        if int(tokens.max()) >= vocab_size:
            raise DataError(
                f"{path}: holds the token {int(tokens.max())}, but the model knows only {vocab_size}: "
                'set model_dir to one that fits ("gpt2" for GPT-2\'s own tokens)'
            )
        tokens.astype(dtype, copy=False).tofile(out)
        count += len(tokens)
    return count


def complete(folder: Path, dataset_dir: str) -> bool:
    """Whether the tokens of ``dataset_dir`` lie whole in ``folder``."""
    try:
        meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        size = (folder / "tokens.bin").stat().st_size
        return meta["dataset_dir"] == dataset_dir and size == meta["tokens"] * np.dtype(meta["dtype"]).itemsize
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Sequences:
    """A token memory map cut into sequences, shuffled anew each epoch by a function of (seed, epoch) alone.

    So the data's position is the number of sequences seen, and nothing else needs to be saved to resume.
    """

    def __init__(self, folder: Path, length: int, seed: int) -> None:
        meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        self.dataset_dir: str = meta["dataset_dir"]
        self.length = length
        self.seed = seed
        self.tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        self.count = len(self.tokens) // length
        if self.count == 0:
            raise DataError(
                f"dataset_dir={self.dataset_dir!r}: {len(self.tokens)} tokens are shorter than one sequence "
                f"(train_sequence_length={length})"
            )
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> np.ndarray:
        """int64 [length]: the ``position``-th sequence of an endless walk over the data."""
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self._epoch = epoch
        start = int(self._order[index]) * self.length
        return self.tokens[start : start + self.length].astype(np.int64)

    def batch(self, start: int, size: int) -> Tensor:
        """int64 [size, length]: sequences ``start`` to ``start + size``."""
        return torch.from_numpy(np.stack([self[start + i] for i in range(size)]))
