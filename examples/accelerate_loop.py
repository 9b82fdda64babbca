"""A small GPT-2 on the source of argparse, byte by byte, in an own loop with Accelerate and deepfast's AdamW.

    python examples/accelerate_loop.py --precision bf16 --output output/accelerate
    python examples/accelerate_loop.py --precision bf16 --output output/accelerate --resume
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

bf16 is autocast over fp32 weights, on a CPU or a GPU. fp16, with torch's GradScaler, is a GPU's: on a CPU Accelerate
accepts mixed_precision="fp16" and trains in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

import deepfast

LENGTH = 64  # bytes a sequence
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GPT-2 in a loop with Accelerate and deepfast's AdamW")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--output", default="output/accelerate_loop", help="where checkpoints and the model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # or else, without a GPU, ranks do not see each other
        mixed_precision=PRECISIONS[args.precision],
        gradient_accumulation_steps=2,
        # the order of an epoch is a function of its number, so that a resumed epoch has the same
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    if args.precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.print("fp16: on a CPU Accelerate trains in fp32")

    set_seed(0)
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()[: 256 * LENGTH])).view(-1, LENGTH)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=256, n_positions=LENGTH))
    optimizer = deepfast.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)
    ranks = accelerator.num_processes  # Accelerate moves a schedule once a rank
    schedule = get_cosine_schedule_with_warmup(optimizer, 10 * ranks, args.steps * ranks)
    # with a generator of its own the loader does not draw from the one that dropout draws from
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator())
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    step = 0
    if args.resume:
        last = max(Path(args.output).glob("step*"), default=None)
        if last is None:
            parser.error(f"no checkpoint in {args.output}: start without --resume")
        accelerator.load_state(str(last))
        step = int(last.name.removeprefix("step"))
    epoch, done = divmod(step * accelerator.gradient_accumulation_steps, len(loader))
    while step < args.steps:
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()  # clips, too
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % 10 == 0:
                accelerator.print(f"step {step} loss {loss.item():.3f} lr {schedule.get_last_lr()[0]:.1e}")
                accelerator.save_state(f"{args.output}/step{step:06}")
            if step == args.steps:
                break
        epoch, done = epoch + 1, 0
    accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)


if __name__ == "__main__":
    main()
