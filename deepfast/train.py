"""Trains a GPT-2 from a configuration file: ``ds_train.py --config config.json``, alone or under torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deepfast import checkpoint
from deepfast import config as configuration
from deepfast.config import Config
from deepfast.errors import ConfigError, UserError
from deepfast.ranks import init_distributed, launched
from deepfast.run import Reporter, Run

log = logging.getLogger("deepfast")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="ds_train.py", description="Train a GPT-2. Exit code 2: bad input; 130: Ctrl-C, saved.")
    parser.add_argument("--config", required=True, help="a JSON file; README.md lists its keys")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="TAG", help="go on from the newest checkpoint, or from TAG"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, dotted for sections"
    )
    return parser.parse_args(argv)


def overridden(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """``data`` with each ``key=value`` of the command line put in; a value is JSON, or else a string."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set {setting}: KEY=VALUE was expected")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        *path, last = key.split(".")
        holder = data
        for part in path:
            inner = holder.setdefault(part, {})
            holder[part] = inner = {"enabled": inner} if isinstance(inner, bool) else inner
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting}: {part} is no section")
            holder = inner
        holder[last] = value
    return data


class _StoppedTwiceError(Exception):
    """The user does not want to wait for the checkpoint."""


class Stop:
    """Turns the first SIGINT or SIGTERM into a flag that the loop looks at between steps; a second one is final."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal:
            raise _StoppedTwiceError("stopped at once by a second signal: what came after the last checkpoint is lost")
        self.signal = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step, with a checkpoint (a second signal: at once, without)\n")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


class _SharedError(UserError):
    """One that rank 0 has raised, and prints."""


def _on_rank_0(work: Callable[[], None]) -> None:
    """Does ``work`` on rank 0, the others wait; a UserError raised in it is raised on every rank."""
    failure: list[str | None] = [None]
    error: UserError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except UserError as raised:
            failure, error = [str(raised)], raised
    if dist.is_initialized():
        dist.broadcast_object_list(failure, 0)
    if failure[0] is not None:
        raise error or _SharedError(failure[0])


def _prepare_data(config: Config, run: Run, gpt2_config: Any, folder: Path | None, resume: bool) -> Any:
    """The tokenizer (None for token files) and the sequences; made by rank 0, read by all.

    What an earlier run left is moved only when all of the new one's input is known to be good.
    """
    from deepfast import data, gpt2

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

    _on_rank_0(prepare)
    return gpt2.tokenizer(run.model), data.Sequences(run.data, config.train_sequence_length, config.seed)


# What the order of the data, and so the meaning of a step, depends on.
_IDENTITY = ("dataset_dir", "seed", "train_batch_size", "train_sequence_length")


def train(config: Config, resume: str | None = None) -> int:
    """Runs the whole training and returns the exit code: 0, or 130 and 143 after a signal, the run saved."""
    run = Run(config.output_dir)
    rank, world = launched()
    config = configuration.trainer_defaults(config)
    configuration.resolve_batch(config, world or 1, one_process=True)
    run.check_writable()
    tag = None
    if resume is not None:
        tag = checkpoint.latest(run.checkpoints) if resume == "latest" else resume
        if tag is None:
            raise UserError(f"--resume: {run.checkpoints} holds no checkpoint; leave --resume out to start anew")
        if not (run.checkpoints / tag).is_dir():
            checkpoint.verify(run.checkpoints, tag)
    with Stop() as stop:
        return _train(config, run, tag, rank, stop)


def _train(config: Config, run: Run, tag: str | None, rank: int, stop: Stop) -> int:
    import transformers

    from deepfast import data, gpt2
    from deepfast.engine import initialize

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if tag is None:
        data.source_files(config.dataset_dir)  # the commonest mistake, before anything takes time
    init_distributed()
    torch.manual_seed(config.seed)
    gpt2_config, folder = gpt2.configuration(config.model_dir, config.train_sequence_length)
    module = gpt2.model(gpt2_config, folder)
    module.train()
    if config.optimizer is None or config.optimizer.params.weight_decay is None or config.num_train_steps is None:
        raise RuntimeError("trainer_defaults() has not been called")
    groups = gpt2.parameter_groups(module, config.optimizer.params.weight_decay)
    engine, *_ = initialize(model=module, model_parameters=groups, config=config)
    tokenizer, sequences = _prepare_data(config, run, gpt2_config, folder, resume=tag is not None)
    if tokenizer is not None:
        for settings in (module.config, module.generation_config):
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(config.seed + engine.rank)  # dropout differs between ranks
    identity = {name: getattr(config, name) for name in _IDENTITY}
    if tag is not None:
        path, before = engine.load_checkpoint(run.checkpoints, tag)
        log.info("resumed from %s", path)
        for name, value in before.items():
            if identity.get(name, value) != value:
                log.info("%s is now %s, it was %s: the data goes on in another order", name, identity[name], value)
    log.info("%.1fM parameters, %s, %d sequences of %d tokens, batch %d = micro %d x accumulation %d x ranks %d",
             sum(p.numel() for p in module.parameters()) / 1e6, str(engine.dtype).removeprefix("torch."),
             sequences.count, sequences.length, *config.batch_triple(), engine.world_size)  # fmt: skip
    reporter = Reporter(run, engine, config.num_train_steps) if rank == 0 else None
    try:
        while engine.global_steps < config.num_train_steps:
            started, lr = time.perf_counter(), engine.get_lr()[0]
            loss, stopped = _step(engine, sequences, stop)
            if reporter:
                tokens = config.train_sequence_length * engine.train_batch_size()
                reporter.step(loss, lr, tokens / (time.perf_counter() - started))
            done = engine.global_steps == config.num_train_steps
            if done or stopped or engine.global_steps % config.save_steps == 0:
                _save(engine, run, config.save_total_limit, reporter, identity)
            if stopped:
                break
    finally:
        if reporter:
            reporter.close()
    if reporter:
        reporter.plot()
    if stop.signal:
        if rank == 0:
            log.info("interrupted and saved after step %d: --resume goes on from here", engine.global_steps)
        return stop.exit_code
    if rank == 0:
        module.save_pretrained(run.model)
        _say_goodbye(config, run, module, tokenizer, sequences, engine.device)
    return 0


def _step(engine: Any, sequences: Any, stop: Stop) -> tuple[float, bool]:
    """One optimizer step. Returns the mean loss of the global batch, and whether some rank was told to stop."""
    micro, accumulation, world = (
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
        engine.world_size,
    )
    start = engine.global_steps * engine.train_batch_size()
    total = torch.zeros(2, device=engine.device)
    for i in range(accumulation):
        # Micro-batches are dealt out in turn: any number of ranks trains the same global batch.
        ids = sequences.batch(start + (i * world + engine.rank) * micro, micro).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        total[0] += loss.detach()
        engine.step()
    total[1] = float(bool(stop.signal))
    if world > 1:
        dist.all_reduce(total)
    mean, stopped = (total / torch.tensor([accumulation * world, 1.0], device=total.device)).tolist()
    return mean, stopped > 0


def _save(engine: Any, run: Run, keep: int, reporter: Reporter | None, identity: dict[str, Any]) -> None:
    if reporter:
        reporter.flush()
    engine.save_checkpoint(run.checkpoints, f"step{engine.global_steps}", identity)
    if engine.rank == 0:
        checkpoint.prune(run.checkpoints, keep)


def _say_goodbye(config: Config, run: Run, module: Any, tokenizer: Any, sequences: Any, device: torch.device) -> None:
    from deepfast import gpt2

    if config.sample_tokens:
        prompt = torch.from_numpy(sequences[0][:8]).to(device)
        ids = gpt2.sample(module, prompt, config.sample_tokens, config.seed)
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        print(f"\n--- a sample ---\n{text}\n----------------")
    print(f"model:       {run.model} (transformers: AutoModelForCausalLM.from_pretrained)")
    print(f"loss curve:  {run.plot}")
    print(f"TensorBoard: tensorboard --logdir {run.events}")


class _BarHandler(logging.StreamHandler):
    """Log lines above the progress bar, not through it, and on stdout: stderr is for what went wrong."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


EXTRA = ("matplotlib", "numpy", "pyarrow", "tensorboard", "tokenizers", "tqdm", "transformers")


def missing_extra() -> list[str]:
    """What the trainer needs and is not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def _refused(message: str, rank: str) -> int:
    line = message.replace("\n", "\\n")
    print(f"ds_train.py: {line}" if rank == "0" else f"ds_train.py: rank {rank}: {line}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for bad input, 130 on Ctrl-C."""
    rank = os.environ.get("RANK", "0")
    handler = _BarHandler()
    handler.setFormatter(logging.Formatter("deepfast: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == "0" else logging.ERROR)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if missing := missing_extra():
            raise UserError(f"{', '.join(missing)} not installed: pip install 'deepfast[train]'")
        data = overridden(configuration.read_json(options.config), options.set)
        return train(configuration.load(data), options.resume)
    except _SharedError:
        return 2
    except UserError as error:
        return _refused(str(error), rank)
    except OSError as error:  # a full disk, a name too long, a folder that went away
        return _refused(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", rank)
    except _StoppedTwiceError as error:
        print(f"ds_train.py: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            return _refused("not enough memory: lower train_micro_batch_size or train_sequence_length", rank)
        raise
    except KeyboardInterrupt:
        return 130
    finally:
        log.removeHandler(handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
