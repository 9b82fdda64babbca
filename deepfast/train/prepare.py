"""The data of a run, made ready by rank 0 for all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from deepfast.engine.config import Config
from deepfast.engine.ranks import on_rank_0
from deepfast.train import data, gpt2
from deepfast.train.run import Run

log = logging.getLogger("deepfast")


def prepare_data(config: Config, run: Run, gpt2_config: Any, folder: Path | None, resume: bool) -> Any:
    """The tokenizer (None for token files) and the sequences; made by rank 0, read by all.

    What an earlier run left is moved only when all of the new one's input is known to be good.
    """

    def prepare() -> None:
        if resume and data.complete(run.data, config.dataset_dir):
            return
        staged = run.root / ".new"
        shutil.rmtree(staged, ignore_errors=True)
        _, files = data.source_files(config.dataset_dir)
        # A model that has been trained goes on with its tokenizer.
        tokenizer = gpt2.tokenizer(run.model if resume else folder)
        token_files = files[0].suffix.lower() == ".bin"
        if tokenizer is None and not token_files:
            log.info("training a byte-level BPE of %d tokens on %s", gpt2_config.vocab_size, config.dataset_dir)
            tokenizer = gpt2.wrap(data.train_tokenizer(files, gpt2_config.vocab_size))
        if tokenizer is not None:
            if len(tokenizer) > gpt2_config.vocab_size:
                raise gpt2.ModelError(
                    f"model_dir={config.model_dir!r}: its vocab_size is {gpt2_config.vocab_size}, the tokenizer "
                    f"needs {len(tokenizer)}"
                )
            tokenizer.save_pretrained(staged / "model")
        data.prepare(
            config.dataset_dir,
            files,
            staged / "data",
            None if token_files or tokenizer is None else tokenizer.backend_tokenizer,
            gpt2_config.vocab_size,
            None if tokenizer is None else tokenizer.eos_token_id,
        )
        data.Sequences(staged / "data", config.train_sequence_length, config.seed)
        if resume:
            log.info("the tokens of %s are not those of the checkpoint's run: read anew", config.dataset_dir)
        else:
            run.set_aside()
            if (staged / "model").is_dir():
                os.rename(staged / "model", run.model)
        shutil.rmtree(run.data, ignore_errors=True)
        os.rename(staged / "data", run.data)
        shutil.rmtree(staged)

    on_rank_0(prepare)
    return gpt2.tokenizer(run.model), data.Sequences(run.data, config.train_sequence_length, config.seed)
