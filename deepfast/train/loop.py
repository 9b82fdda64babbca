"""Trains a GPT-2, from a configuration to a model in a folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepfast.engine import checkpoint
from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.engine.ranks import init_distributed, launched
from deepfast.errors import TrainingError, UserError
from deepfast.train.data import Held
from deepfast.train.defaults import trainer_defaults
from deepfast.train.forecast import Forecast
from deepfast.train.report import Reporter
from deepfast.train.run import Run
from deepfast.train.sample import Sampler
from deepfast.train.stop import Stop
from deepfast.train.stream import Stream
from deepfast.train.validation import mean_loss

log = logging.getLogger("deepfast")

MANY = 1000  # micro-batches a step: hardly meant

# What the order of the data, and so the meaning of a step, depends on.
_IDENTITY = ("dataset_dir", "seed", "train_batch_size", "train_sequence_length", "eval_share", "streaming")


def train(config: Config, resume: str | None = None) -> int:
    """Runs the whole training and returns the exit code: 0, or 130 and 143 after a signal, the run saved.

    Raises:
        UserError: for bad input.
        TrainingError: on all ranks, where no step was applied: none of all, or none of many in a row.
    """
    run = Run(config.output_dir)
    rank, world = launched()
    config = trainer_defaults(config)
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
    from deepfast.train import data, gpt2  # these take seconds, in which Ctrl-C is heeded already
    from deepfast.train.prepare import held_out, prepare_data

    if tag is None:
        data.source_files(config.dataset_dir)  # the commonest mistake, before anything takes time
        if config.eval_dataset_dir is not None:
            data.source_files(config.eval_dataset_dir, "eval_dataset_dir")
    init_distributed()
    engine, module, folder = begun(config)
    tokenizer, sequences = prepare_data(config, run, module.config, folder, resume=tag is not None)
    if tokenizer is not None:
        for settings in (module.config, module.generation_config):
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(config.seed + engine.rank)  # dropout differs between ranks
    identity = {name: getattr(config, name) for name in _IDENTITY}
    if tag is not None:
        path, before = engine.load_checkpoint(run.checkpoints, tag)
        log.info("resumed from %s", path)
        asked = ("dataset_dir", "streaming") if config.streaming else _IDENTITY
        for name, value in (before or {}).items():
            if name in asked and identity[name] != value:
                log.info("%s is now %s, it was %s: the data goes on in another order", name, identity[name], value)
        if isinstance(sequences, Stream):
            sequences.go_on((before or {}).get("stream"))
    held = held_out(config, run, sequences)
    counted = "" if isinstance(sequences, Stream) else f"{sequences.count} "
    log.info("%.1fM parameters, %s, %ssequences of %d tokens, batch %d = micro %d x accumulation %d x ranks %d",
             sum(p.numel() for p in module.parameters()) / 1e6, str(engine.dtype).removeprefix("torch."),
             counted, sequences.length, *config.batch_triple(), engine.world_size)  # fmt: skip
    if engine.gradient_accumulation_steps() >= MANY:
        log.warning("each step is %d micro-batches long, and ends before it can be interrupted: see train_batch_size",
                    engine.gradient_accumulation_steps())  # fmt: skip
    if held is not None:
        log.info("validated on %d sequences every %d steps, and at the end", held.count, config.eval_steps)
    sampler = Sampler(config, engine, tokenizer, sequences)
    reporter = Reporter(run, engine, config.num_train_steps or 0) if rank == 0 else None
    try:
        _steps(config, run, engine, sequences, held, sampler, reporter, identity, stop)
    except TrainingError:
        if reporter:
            reporter.curves.draw()  # of what led there
        raise
    finally:
        engine.monitor.close()
        if isinstance(sequences, Stream):
            sequences.close()
        if reporter:
            reporter.close()
    if reporter:
        reporter.curves.draw()
        if said := reporter.validated():
            log.info("validation: %s", said)
    if stop.signal:
        if rank == 0:
            log.info("interrupted and saved after step %d: --resume goes on from here", engine.global_steps)
        return stop.exit_code
    if engine.skipped_steps == engine.global_steps:
        raise TrainingError(
            f"no step was ever applied: all {engine.global_steps} had inf or NaN in their gradients: look at the data, "
            "try bf16, fp32, a smaller loss scale or a lower lr"
        )
    weights = engine.consolidated() if engine.zero_optimization_partition_weights() else None
    if rank == 0:
        module = module if weights is None else gpt2.with_weights(module.config, weights)
        module.save_pretrained(run.model)
        if config.sample_tokens and not config.sample_steps:  # those have it already
            print(f"\n--- a sample ---\n{sampler(module)}\n----------------")
        print(f"model:       {run.model} (transformers: AutoModelForCausalLM.from_pretrained)")
        print(f"loss curve:  {run.plot}")
        print(f"TensorBoard: tensorboard --logdir {run.events}")
    return 0


def begun(config: Config) -> tuple[Any, Any, Path | None]:
    """The engine, its model, and the folder that this came from, if from one; of a configuration with all defaults."""
    import transformers

    from deepfast.engine.initialization import initialize
    from deepfast.train import gpt2

    if config.optimizer is None or config.optimizer.params.weight_decay is None or config.num_train_steps is None:
        raise RuntimeError("trainer_defaults() has not been called")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    gpt2_config, folder = gpt2.configuration(config.model_dir, config.train_sequence_length)
    module = gpt2.model(gpt2_config, folder)
    module.train()
    groups = gpt2.parameter_groups(module, config.optimizer.params.weight_decay)
    engine, *_ = initialize(model=module, model_parameters=groups, config=config)
    return engine, module, folder


def _steps(
    config: Config,
    run: Run,
    engine: Any,
    sequences: Any,
    held: Held | None,
    sampler: Sampler,
    reporter: Reporter | None,
    identity: dict[str, Any],
    stop: Stop,
) -> None:
    """The steps that are left, and what is due after some and after the last: a validation, a sample, a checkpoint."""
    last = config.num_train_steps or 0
    tokens = config.train_sequence_length * engine.train_batch_size()
    every = {"checkpoint": config.save_steps, "sample": config.sample_steps}
    if held is not None:
        every["validation"] = config.eval_steps or config.save_steps
    every = {name: steps for name, steps in every.items() if steps}
    forecast = Forecast(engine.global_steps, last, tokens, every)
    while engine.global_steps < last:
        started, lr = time.perf_counter(), engine.get_lr()[0]
        loss, stopped = one_step(engine, sequences, stop)
        rate = tokens / (time.perf_counter() - started)
        step, eval_loss = engine.global_steps, None
        due = {"checkpoint"} if stopped else {name for name, n in every.items() if step == last or step % n == 0}
        if held is not None and "validation" in due:
            with forecast.apart("validation"):
                eval_loss = mean_loss(engine, held)
        if reporter:
            reporter.step(loss, lr, rate, eval_loss)
        if "sample" in due:
            with forecast.apart("sample"):
                text = sampler()
                if reporter and text is not None:
                    reporter.sample(text)
        if "checkpoint" in due:
            with forecast.apart("checkpoint"):
                _save(engine, run, config.save_total_limit, reporter, {**identity, "stream": sequences.state()})
        if stopped:
            break
        if reporter:
            reporter.curves.draw_if_due(checkpoint=bool(due - {"sample"}))
        if said := forecast.stepped(step):
            log.info(said)
    engine.wait_for_checkpoint()


def one_step(engine: Any, sequences: Any, stop: Stop) -> tuple[float, bool]:
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
    engine.save_checkpoint(run.checkpoints, f"step{engine.global_steps}", identity, wait=False, keep=keep)
