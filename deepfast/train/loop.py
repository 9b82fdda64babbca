"""Trains a GPT-2, from a configuration to a model in a folder."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist

from deepfast.engine import checkpoint
from deepfast.engine import config as configuration
from deepfast.engine.config import Config
from deepfast.engine.ranks import init_distributed, launched
from deepfast.errors import TrainingError, UserError
from deepfast.train.defaults import trainer_defaults
from deepfast.train.report import Reporter
from deepfast.train.run import Run
from deepfast.train.stop import Stop

log = logging.getLogger("deepfast")

# What the order of the data, and so the meaning of a step, depends on.
_IDENTITY = ("dataset_dir", "seed", "train_batch_size", "train_sequence_length")


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
    import transformers  # these take seconds, in which Ctrl-C is heeded already

    from deepfast.engine.initialization import initialize
    from deepfast.train import data, gpt2
    from deepfast.train.prepare import prepare_data

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
    tokenizer, sequences = prepare_data(config, run, gpt2_config, folder, resume=tag is not None)
    if tokenizer is not None:
        for settings in (module.config, module.generation_config):
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(config.seed + engine.rank)  # dropout differs between ranks
    identity = {name: getattr(config, name) for name in _IDENTITY}
    if tag is not None:
        path, before = engine.load_checkpoint(run.checkpoints, tag)
        log.info("resumed from %s", path)
        for name, value in (before or {}).items():
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
        engine.wait_for_checkpoint()
    finally:
        engine.monitor.close()
        if reporter:
            reporter.close()
    if reporter:
        reporter.plot()
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
    engine.save_checkpoint(run.checkpoints, f"step{engine.global_steps}", identity, wait=False, keep=keep)


def _say_goodbye(config: Config, run: Run, module: Any, tokenizer: Any, sequences: Any, device: torch.device) -> None:
    from deepfast.train import gpt2

    if config.sample_tokens:
        prompt = torch.from_numpy(sequences[0][:8]).to(device)
        ids = gpt2.sample(module, prompt, config.sample_tokens, config.seed)
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        print(f"\n--- a sample ---\n{text}\n----------------")
    print(f"model:       {run.model} (transformers: AutoModelForCausalLM.from_pretrained)")
    print(f"loss curve:  {run.plot}")
    print(f"TensorBoard: tensorboard --logdir {run.events}")
