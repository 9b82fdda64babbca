"""Trains a GPT-2 from a configuration file: ``ds_train.py --config config.json``, alone or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deepfast import checkpoint
from deepfast import config as configuration
from deepfast.config import Config
from deepfast.errors import ConfigError, UserError

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
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


class Run:
    """The files of one run: ``output_dir/`` and what stands in it."""

    def __init__(self, output_dir: str) -> None:
        self.root = Path(output_dir)
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.data = self.root / "data"
        self.model = self.root / "model"
        self.plot = self.root / "loss.png"
        self.events = self.root / "tensorboard"

    def check_writable(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise ConfigError(f"output_dir={str(self.root)!r}: cannot be written: {error.strerror}") from None

    def set_aside(self) -> None:
        """Moves what an earlier run left to ``earlier/<n>``: a new run overwrites nothing."""
        left = [p for p in (self.checkpoints, self.metrics, self.model, self.plot, self.events) if p.exists()]
        if not left:
            return
        earlier = self.root / "earlier"
        number = 1 + max([int(p.name) for p in earlier.glob("*") if p.name.isdigit()], default=0)
        target = earlier / str(number)
        target.mkdir(parents=True)
        for path in left:
            os.rename(path, target / path.name)
        log.info("%s held an earlier run: moved to %s", self.root, target)

    def read_metrics(self, until: int) -> list[dict[str, Any]]:
        """The lines of the first ``until`` steps; a line that a kill cut short is none."""
        rows = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and row.get("step", until + 1) <= until]


class _SharedError(UserError):
    """One that rank 0 has raised, and prints."""


@contextlib.contextmanager
def _first_on_rank_0() -> Iterator[bool]:
    """The block runs on rank 0 alone (yields True there); a UserError raised in it is raised on every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    failure: list[str | None] = [None]
    error: UserError | None = None
    if rank == 0:
        try:
            yield True
        except UserError as raised:
            failure, error = [str(raised)], raised
    else:
        yield False
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

    with _first_on_rank_0() as here:
        if here:
            prepare()
    return gpt2.tokenizer(run.model), data.Sequences(run.data, config.train_sequence_length, config.seed)


# What the order of the data, and so the meaning of a step, depends on.
_IDENTITY = ("dataset_dir", "seed", "train_batch_size", "train_sequence_length")


def train(config: Config, resume: str | None = None) -> int:
    """Runs the whole training and returns the exit code: 0, or 130 and 143 after a signal, the run saved."""
    from deepfast.engine import launched

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
    from deepfast.engine import init_distributed, initialize

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


def _finite(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


class Reporter:
    """metrics.jsonl, TensorBoard, the progress bar, and in the end loss.png."""

    def __init__(self, run: Run, engine: Any, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.run, self.engine = run, engine
        self.rows = run.read_metrics(engine.global_steps)
        checkpoint.write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = run.metrics.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run.events), purge_step=engine.global_steps + 1)
        self.bar = tqdm(total=total, initial=engine.global_steps, unit="step", dynamic_ncols=True)

    def step(self, loss: float, lr: float, rate: float) -> None:
        """Notes the step that the engine has just made: its mean loss, its learning rate, its tokens a second."""
        engine = self.engine
        row = {
            "step": engine.global_steps,
            "loss": _finite(loss),
            "lr": lr,
            "loss_scale": engine.loss_scale,
            "grad_norm": _finite(engine.get_global_grad_norm()),
            "tokens_per_s": round(rate, 1),
            "skipped": engine.skipped_steps,
        }
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key in ("loss", "lr", "loss_scale", "grad_norm", "tokens_per_s", "skipped"):
            if row[key] is not None:
                self.board.add_scalar(key, row[key], row["step"])
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s, loss scale {row['loss_scale']:g}")
        self.bar.update()

    def flush(self) -> None:
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()

    def plot(self) -> None:
        """loss.png: the loss, and beneath it learning rate and loss scale."""
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        steps = [row["step"] for row in self.rows]
        losses = [math.nan if row["loss"] is None else row["loss"] for row in self.rows]
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
        top.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.4, label="loss")
        window = max(1, len(losses) // 20)
        smooth = [sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))]
        top.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of the last {window + 1} steps")
        top.set_ylabel("loss (nats a token)")
        top.legend()
        top.grid(alpha=0.3)
        bottom.plot(steps, [row["lr"] for row in self.rows], color="tab:green")
        bottom.set_ylabel("learning rate", color="tab:green")
        bottom.set_xlabel("optimizer step")
        scales = bottom.twinx()
        scales.plot(steps, [row["loss_scale"] for row in self.rows], color="tab:red", linestyle="--")
        scales.set_ylabel("loss scale", color="tab:red")
        figure.tight_layout()
        figure.savefig(self.run.plot, dpi=120)
        plt.close(figure)


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


def _require_extra() -> None:
    needed = ("matplotlib", "numpy", "pyarrow", "tensorboard", "tokenizers", "tqdm", "transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'deepfast[train]'")


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
        _require_extra()
        data = overridden(configuration.read_json(options.config), options.set)
        return train(configuration.load(data), options.resume)
    except _SharedError:
        return 2
    except UserError as error:
        return _refused(str(error), rank)
    except OSError as error:  # a full disk, a name too long, a folder that went away
        return _refused(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", rank)
    except KeyboardInterrupt:
        return 130
    finally:
        log.removeHandler(handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
