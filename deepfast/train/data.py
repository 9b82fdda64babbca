"""Text files to token sequences: read, tokenized once into a memory map, dealt out in an order that needs no state."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepfast.train.documents import (
    DataError,
    Piece,
    Skipped,
    check_tokens,
    nothing_in,
    pieces,
    source_files,
    token_map,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END_OF_TEXT", "DataError", "Held", "Sequences", "complete", "prepare", "source_files", "train_tokenizer"]

log = logging.getLogger("deepfast")

END_OF_TEXT = "<|endoftext|>"
SAMPLE = 32 << 20  # characters a tokenizer is trained on
HEAD = 8  # tokens of the data that a sample of text goes on from
_BATCH = 256  # pieces tokenized at a time, or fewer with so many characters:
_CHARACTERS = 16 << 20
_TOKENS = 16 << 20  # copied at a time
_RUNS = 16  # in which sequences are held out, at most
_SHORTEST = 8  # sequences of such a run, where there are enough


def train_tokenizer(files: list[Path], vocab_size: int, *, first: bool = False) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) over an even sample of the data.

    Args:
        first: over its beginning instead; nothing beyond that is read.
    """
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
    every = 1 if first else max(1, round(sum(p.stat().st_size for p in files) / SAMPLE))
    tokenizer.train_from_iterator(_sample(files, every, SAMPLE if first else None), trainer)
    return tokenizer


def _sample(files: list[Path], every: int, until: int | None) -> Iterator[str]:
    """Of every so-manieth document the first characters; ends when there were ``until``, if that is not None."""
    number, taken, total = 0, 0, 0
    for path in files:
        for piece in pieces(path, Skipped()):
            if number % every == 0 and taken < SAMPLE:
                yield piece.text[: SAMPLE - taken]
            taken += len(piece.text)
            total += len(piece.text)
            if until is not None and total >= until:
                return
            if piece.ends:
                number, taken = number + 1, 0
        # A file that breaks off has no piece that ends.
        number, taken = (number + 1, 0) if taken else (number, 0)


def prepare(
    dataset_dir: str,
    files: list[Path],
    output: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    end: int | None,
    key: str = "dataset_dir",
) -> Path:
    """Writes ``output/tokens.bin`` and ``tokens.json`` for the dataset, and returns the folder.

    Args:
        files: what ``source_files`` found.
        tokenizer: None for token files.
        vocab_size: of the model; token files are checked against it.
        end: the token that ends a document, or None.
        key: of the configuration, that names the dataset.

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
    skipped.tell()
    if count == 0:
        raise nothing_in(f"{key}={dataset_dir!r}", files, skipped)
    meta = {"dataset_dir": dataset_dir, "tokens": count, "dtype": np.dtype(dtype).name}
    (staging / "tokens.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    os.rename(staging, output)
    return output


def encoded(texts: Iterable[Piece], tokenizer: Tokenizer, end: int | None) -> list[list[int]]:
    """The tokens of each piece; the last of a document has ``end`` after it, if that is not None."""
    texts = list(texts)
    encodings = tokenizer.encode_batch_fast([piece.text for piece in texts], add_special_tokens=False)
    return [
        [*encoding.ids, end] if piece.ends and end is not None else encoding.ids
        for piece, encoding in zip(texts, encodings, strict=True)
    ]


def _tokenize(files: list[Path], out: Any, dtype: Any, tokenizer: Tokenizer, end: int | None, skipped: Skipped) -> int:
    from tqdm import tqdm

    count, characters = 0, 0
    pending: list[Piece] = []
    size = sum(p.stat().st_size for p in files)

    def flush() -> int:
        written = 0
        for ids in encoded(pending, tokenizer, end):
            np.asarray(ids, dtype=dtype).tofile(out)
            written += len(ids)
        pending.clear()
        return written

    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", leave=False, disable=None) as bar:
        for path in files:
            for piece in pieces(path, skipped):
                if not piece.text:
                    continue
                pending.append(piece)
                characters += len(piece.text)
                bar.update(len(piece.text))
                if len(pending) == _BATCH or characters >= _CHARACTERS:
                    count += flush()
                    characters = 0
        count += flush()
    return count


def _copy_tokens(files: list[Path], out: Any, dtype: Any, vocab_size: int) -> int:
    count = 0
    for path in files:
        tokens = token_map(path)
        check_tokens(tokens, path, vocab_size)
        for start in range(0, len(tokens), _TOKENS):
            tokens[start : start + _TOKENS].astype(dtype, copy=False).tofile(out)
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


def _cut(folder: Path, length: int, key: str) -> tuple[np.ndarray, int]:
    """The tokens in ``folder``, and how many sequences they are; a rest that is none is left out."""
    meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    if len(tokens) < length:
        raise DataError(
            f"{key}={meta['dataset_dir']!r}: {len(tokens)} tokens are shorter than one sequence "
            f"(train_sequence_length={length})"
        )
    return tokens, len(tokens) // length


class Held:
    """Sequences that are not trained on, always the same ones.

    Args:
        tokens: in a memory map.
        chosen: int64 [n]: which sequences of it.
    """

    def __init__(self, tokens: np.ndarray, length: int, chosen: np.ndarray) -> None:
        self.tokens, self.length, self.chosen = tokens, length, chosen
        self.count = len(chosen)

    @classmethod
    def all_of(cls, folder: Path, length: int) -> Held:
        """What ``prepare`` has made of the configuration's eval_dataset_dir."""
        tokens, count = _cut(folder, length, "eval_dataset_dir")
        return cls(tokens, length, np.arange(count))

    def at_most(self, count: int) -> Held:
        """So many of them, spread evenly."""
        few = min(count, self.count)
        return Held(self.tokens, self.length, self.chosen[np.arange(few) * self.count // few])

    def batch(self, start: int, size: int) -> Tensor:
        """int64 [size, length]: sequences ``start`` to ``start + size``."""
        rows = [self.tokens[i * self.length : (i + 1) * self.length] for i in self.chosen[start : start + size]]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class Sequences:
    """A token memory map cut into sequences, shuffled anew each epoch by a function of (seed, epoch) alone.

    So the data's position is the number of sequences seen, and nothing else needs to be saved to resume.

    Args:
        held_out: a share of the sequences that is none of these, but ``held``; None: nothing is. It depends on nothing
            else. It lies in up to 16 runs, spread evenly over the data, so that it is like the rest; and within a run
            the neighbours of a sequence, which may be of the same document, are held out with it.
    """

    def __init__(self, folder: Path, length: int, seed: int, held_out: float | None = None) -> None:
        self.tokens, count = _cut(folder, length, "dataset_dir")
        self.length = length
        self.seed = seed
        self._gaps, self._sizes = _runs(count, held_out)
        self.count = count - int(self._sizes.sum())
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def held(self) -> Held:
        begins = self._gaps + np.cumsum(self._sizes) - self._sizes
        runs = [np.arange(begin, begin + size) for begin, size in zip(begins, self._sizes, strict=True)]
        return Held(self.tokens, self.length, np.concatenate(runs))

    @property
    def head(self) -> np.ndarray:
        """int64 [n]: what the first sequence begins with."""
        return self[0][:HEAD]

    def __getitem__(self, position: int) -> np.ndarray:
        """int64 [length]: the ``position``-th sequence of an endless walk over the data."""
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self._epoch = epoch
        trained = int(self._order[index])
        runs = np.searchsorted(self._gaps, trained, side="right")  # that lie before it
        start = (trained + int(self._sizes[:runs].sum())) * self.length
        return self.tokens[start : start + self.length].astype(np.int64)

    def state(self) -> None:
        """Where the next sequence comes from, if its number does not say it: a stream's."""

    def batch(self, start: int, size: int) -> Tensor:
        """int64 [size, length]: sequences ``start`` to ``start + size``."""
        return torch.from_numpy(np.stack([self[start + i] for i in range(size)]))


def _runs(count: int, share: float | None) -> tuple[np.ndarray, np.ndarray]:
    """How many sequences are trained on before each run of held-out ones, and how many it has."""
    if share is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    held = max(1, round(count * share))
    trained = count - held
    if trained < 1:
        raise DataError(f"eval_share={share}: of {count} sequences it leaves none to train on")
    number = max(1, min(_RUNS, held // _SHORTEST))
    return (2 * np.arange(number) + 1) * trained // (2 * number), np.diff(np.arange(number + 1) * held // number)
