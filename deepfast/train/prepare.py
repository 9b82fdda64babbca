"""The data of a run, made ready by rank 0 for all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from deepfast.engine.config import Config
from deepfast.engine.ranks import on_rank_0
from deepfast.errors import ConfigError
from deepfast.train import data, documents, gpt2
from deepfast.train.run import Run
from deepfast.train.stream import Reader, Stream

log = logging.getLogger("deepfast")


class _Part(NamedTuple):
    """What is tokenized: where to, and which key of the configuration says what."""

    place: Path
    key: str
    dataset_dir: str


def prepare_data(config: Config, run: Run, gpt2_config: Any, folder: Path | None, resume: bool) -> Any:
    """The tokenizer (None for token files) and the sequences; made by rank 0, read by all.

    What an earlier run left is moved only when all of the new one's input is known to be good. With ``streaming`` rank
    0 reads while it trains; what is validated on is tokenized here all the same.
    """
    readers: list[Reader] = []

    def prepare() -> None:
        wanted = [] if config.streaming else [_Part(run.data, "dataset_dir", config.dataset_dir)]
        if config.eval_dataset_dir is not None:
            wanted.append(_Part(run.eval_data, "eval_dataset_dir", config.eval_dataset_dir))
        missing = [part for part in wanted if not (resume and data.complete(part.place, part.dataset_dir))]
        if resume and not missing and not config.streaming:
            _check_prompt(config, gpt2.tokenizer(run.model))
            return
        staged = run.root / ".new"
        shutil.rmtree(staged, ignore_errors=True)
        tokenizer = _tokenizer(config, gpt2_config, run.model if resume else folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged / "model")
        for part in missing:
            _tokenize(part, staged / part.place.name, tokenizer, gpt2_config.vocab_size)
        length = config.train_sequence_length
        if config.streaming:
            readers.append(_reader(config.dataset_dir, tokenizer, gpt2_config.vocab_size))
        elif (staged / "data").is_dir():
            data.Sequences(staged / "data", length, config.seed, config.eval_share)
        if (staged / "eval_data").is_dir():
            data.Held.all_of(staged / "eval_data", length)
        if not resume:
            run.set_aside()
            for old in (run.data, run.eval_data):  # another tokenizer's
                shutil.rmtree(old, ignore_errors=True)
            if (staged / "model").is_dir():
                os.rename(staged / "model", run.model)
        for part in missing:
            if resume:
                log.info("the tokens of %s are not those of the checkpoint's run: read anew", part.dataset_dir)
            shutil.rmtree(part.place, ignore_errors=True)
            os.rename(staged / part.place.name, part.place)
        shutil.rmtree(staged, ignore_errors=True)

    on_rank_0(prepare)
    tokenizer = gpt2.tokenizer(run.model)
    if config.streaming:
        return tokenizer, Stream(readers[0] if readers else None, config.train_sequence_length)
    return tokenizer, data.Sequences(run.data, config.train_sequence_length, config.seed, config.eval_share)


def held_out(config: Config, run: Run, sequences: Any) -> data.Held | None:
    """What the configuration says is validated on, if it does."""
    if config.eval_dataset_dir is None and config.eval_share is None:
        return None
    held = data.Held.all_of(run.eval_data, sequences.length) if config.eval_dataset_dir else sequences.held
    return held.at_most(config.eval_sequences or held.count)


def _tokenizer(config: Config, gpt2_config: Any, folder: Path | None) -> Any:
    """The model's: one that has been trained goes on with its own. Without one, a new one; None for token files."""
    _, files = documents.source_files(config.dataset_dir)
    tokenizer = gpt2.tokenizer(folder)
    if tokenizer is None and not documents.are_tokens(files):
        part = f"the first {data.SAMPLE >> 20} MiB of " if config.streaming else ""
        log.info("training a byte-level BPE of %d tokens on %s%s", gpt2_config.vocab_size, part, config.dataset_dir)
        tokenizer = gpt2.wrap(data.train_tokenizer(files, gpt2_config.vocab_size, first=config.streaming))
    _check_prompt(config, tokenizer)
    if tokenizer is not None and len(tokenizer) > gpt2_config.vocab_size:
        raise gpt2.ModelError(
            f"model_dir={config.model_dir!r}: its vocab_size is {gpt2_config.vocab_size}, the tokenizer "
            f"needs {len(tokenizer)}"
        )
    return tokenizer


def _check_prompt(config: Config, tokenizer: Any) -> None:
    if config.sample_prompt and tokenizer is None:
        raise ConfigError("sample_prompt: token files come without a tokenizer that reads it: take it out")


def _reading(key: str, dataset_dir: str, tokenizer: Any) -> tuple[list[Path], Any, int | None]:
    """A dataset's files, the tokenizer that they are read with (None for token files), and what ends a document."""
    _, files = documents.source_files(dataset_dir, key)
    if documents.are_tokens(files):
        return files, None, None
    if tokenizer is None:
        raise data.DataError(f"{key}={dataset_dir!r}: is text, and what is trained on are tokens without a tokenizer")
    return files, tokenizer.backend_tokenizer, tokenizer.eos_token_id


def _tokenize(part: _Part, output: Path, tokenizer: Any, vocab_size: int) -> None:
    files, backend, end = _reading(part.key, part.dataset_dir, tokenizer)
    data.prepare(part.dataset_dir, files, output, backend, vocab_size, end, part.key)


def _reader(dataset_dir: str, tokenizer: Any, vocab_size: int) -> Reader:
    _, backend, end = _reading("dataset_dir", dataset_dir, tokenizer)
    return Reader(dataset_dir, backend, vocab_size, end)
