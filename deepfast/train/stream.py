"""Text dealt out in its order while it is trained on: nothing is read or tokenized before it is wanted.

Rank 0 reads, a little ahead, and the other ranks are sent what each trains on. Nothing is kept on the disk: where the
next token comes from stands in the checkpoint, and from there on the files are read again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deepfast.engine.ranks import SharedError
from deepfast.train.data import HEAD, encoded
from deepfast.train.documents import (
    DataError,
    Piece,
    Skipped,
    are_tokens,
    check_tokens,
    nothing_in,
    pieces,
    source_files,
    token_map,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("deepfast")

# A chunk is what is tokenized together. One more than the last batch took is read ahead.
_CHUNK = 256 << 10  # characters
_DOCUMENTS = 256
_BLOCK = 1 << 20  # bytes of a text file, and tokens of a .bin file, read at a time


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a token comes from: the ``skip``-th of the piece that begins at ``at`` in ``file``, in this ``epoch``."""

    dataset_dir: str
    file: str = ""
    at: int = 0
    skip: int = 0
    epoch: int = 0


class _Read(NamedTuple):
    place: Place
    tokens: np.ndarray


class Reader:
    """The tokens of a dataset, in the order of its files and what stands in them; after its end it begins anew.

    Args:
        tokenizer: None for token files.
        vocab_size: of the model; tokens are checked against it.
        end: the token that ends a document, or None.

    Attributes:
        head: int64 [n]: the first tokens.

    Raises:
        DataError: for a dataset without files or text, and for token files whose size is not their tokens'.
    """

    def __init__(self, dataset_dir: str, tokenizer: Tokenizer | None, vocab_size: int, end: int | None) -> None:
        self.dataset_dir = dataset_dir
        self._tokenizer, self._vocab_size, self._end = tokenizer, vocab_size, end
        self._root, self._files = source_files(dataset_dir)
        if are_tokens(self._files):
            for path in self._files:
                token_map(path)
        self._ahead = ThreadPoolExecutor(1, "deepfast data")
        self._coming: deque[Future[list[_Read]]] = deque()
        self._wrapped = False  # and that was said
        self.seek(Place(dataset_dir))
        self.head = self.take(HEAD)
        self.seek(Place(dataset_dir))

    def seek(self, place: Place) -> bool:
        """Goes on from ``place``; from the beginning where its file is not there, and then returns False."""
        names = [self._name(path) for path in self._files]
        known = place.dataset_dir == self.dataset_dir and place.file in ("", *names)
        place = place if known else Place(self.dataset_dir)
        for chunk in self._coming:
            if not chunk.cancel():
                chunk.exception()  # nobody reads on in the old walk
        self._coming.clear()
        first = names.index(place.file) if place.file else 0
        self._walk = self._chunks(self._endless(first, place))
        self._held: deque[_Read] = deque()  # the first of which are dealt, up to the place
        self._skip, self._place = place.skip, dataclasses.replace(place, skip=0)
        self._skipped = Skipped()  # until the data's end is reached for the first time
        return known

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    @property
    def place(self) -> Place:
        """Of the token that ``take`` returns next."""
        return dataclasses.replace(self._place, skip=self._skip)

    def take(self, count: int) -> np.ndarray:
        """int64 [count]: the next tokens.

        Raises:
            DataError: where there is no text in all of the dataset, and for tokens that are not the model's.
        """
        taken = np.empty(count, dtype=np.int64)
        done, chunks = 0, 0
        while done < count:
            if not self._held:
                self._read_ahead(1)
                self._held.extend(self._coming.popleft().result())
                chunks += 1
            place, tokens = self._held[0]
            if place != self._place:
                if place.epoch > self._place.epoch and not self._wrapped:
                    self._wrapped = True
                    log.info("streaming: %s is at its end and begins anew", self.dataset_dir)
                self._place, self._skip = place, 0
            some = tokens[self._skip : self._skip + count - done]
            taken[done : done + len(some)] = some
            done, self._skip = done + len(some), self._skip + len(some)
            if self._skip >= len(tokens):
                self._held.popleft()
        self._read_ahead(chunks + 1)  # as much as this has taken, while it is trained on
        return taken

    def _read_ahead(self, chunks: int) -> None:
        """So many are being read, or more."""
        while len(self._coming) < chunks:
            self._coming.append(self._ahead.submit(next, self._walk))

    def _chunks(self, walk: Iterator[tuple[Place, Path, Any]]) -> Iterator[list[_Read]]:
        """What is tokenized together."""
        chunk: list[tuple[Place, Path, Any]] = []
        size = 0
        for place, path, found in walk:
            if chunk and chunk[-1][0].epoch < place.epoch:
                yield self._tokens(chunk)
                chunk, size = [], 0
            chunk.append((place, path, found))
            size += len(found.text if isinstance(found, Piece) else found)
            if size >= _CHUNK or len(chunk) == _DOCUMENTS:
                yield self._tokens(chunk)
                chunk, size = [], 0

    def _tokens(self, chunk: list[tuple[Place, Path, Any]]) -> list[_Read]:
        if self._tokenizer is not None:
            found = encoded([piece for _, _, piece in chunk], self._tokenizer, self._end)
        else:
            for _, path, tokens in chunk:
                check_tokens(tokens, path, self._vocab_size)
            found = [tokens for _, _, tokens in chunk]
        return [_Read(place, np.asarray(ids, dtype=np.int64)) for (place, _, _), ids in zip(chunk, found, strict=True)]

    def close(self) -> None:
        """Reads no further, and says what could not be read on the way."""
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._skipped.tell()

    def _endless(self, first: int, place: Place) -> Iterator[tuple[Place, Path, Any]]:
        """All of the data from a place on, over and over: a Piece, or some tokens of a token file."""
        epoch, at = place.epoch, place.at
        while True:
            skipped, found = self._skipped if epoch == place.epoch else Skipped(), False
            for path in self._files[first:]:
                for begin, some in self._within(path, at, skipped):
                    found = True
                    yield Place(self.dataset_dir, self._name(path), begin, 0, epoch), path, some
                at = 0
            if not found and epoch > place.epoch:  # the first pass may have begun behind all there is
                raise nothing_in(f"dataset_dir={self.dataset_dir!r}", self._files, self._skipped)
            epoch, first = epoch + 1, 0

    def _within(self, path: Path, at: int, skipped: Skipped) -> Iterator[tuple[int, Any]]:
        if self._tokenizer is None:
            tokens = token_map(path)
            yield from ((i, tokens[i : i + _BLOCK]) for i in range(at, len(tokens), _BLOCK))
        else:
            yield from ((piece.at, piece) for piece in pieces(path, skipped, at, _BLOCK) if piece.text)


class Stream:
    """Sequences as a :class:`Reader` has them, for all ranks; made by all together.

    Args:
        reader: on rank 0; None on others.
        length: tokens a sequence.

    """

    def __init__(self, reader: Reader | None, length: int) -> None:
        self.length = length
        self._reader = reader
        self._rank, self._world, self._group = 0, 1, None
        if dist.is_initialized():
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            if dist.get_backend() != "gloo":  # sequences travel between hosts' memories
                self._group = dist.new_group(backend="gloo")

    def batch(self, start: int, size: int) -> Tensor:
        """int64 [size, length]: this rank's part of the next ``size`` sequences of each rank. All ranks call it alike.

        Args:
            start: without meaning: what comes next comes next.

        Raises:
            DataError: on rank 0, see ``Reader.take``; on others SharedError.
        """
        everyone = torch.empty(self._world * size, self.length, dtype=torch.int64)
        error: DataError | None = None
        if self._reader is not None:
            try:
                everyone = torch.from_numpy(self._reader.take(everyone.numel())).view_as(everyone)
            except DataError as raised:
                error = raised
                everyone.fill_(-1)
        if self._world > 1:
            dist.broadcast(everyone, 0, group=self._group)
        if everyone[0, 0] < 0:
            raise error or SharedError("rank 0 has no data")
        return everyone[self._rank * size :][:size]

    def state(self) -> dict[str, Any] | None:
        """Where the next sequence comes from, as JSON can hold it; None on other ranks than 0."""
        return None if self._reader is None else dataclasses.asdict(self._reader.place)

    @property
    def head(self) -> np.ndarray | None:
        """int64 [n]: what the data begins with; None on other ranks than 0."""
        return None if self._reader is None else self._reader.head

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Goes on from what ``state`` returned; where that is none, or not of this data, from its beginning."""
        if self._reader is not None and not (state and self._reader.seek(Place(**state))):
            log.info("streaming: where the data stood is not known: it begins anew")

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
