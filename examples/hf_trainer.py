"""A small GPT-2 on the source of argparse, byte by byte, by transformers' Trainer with deepfast's AdamW.

    python examples/hf_trainer.py --precision bf16 --output output/hf
    python examples/hf_trainer.py --precision bf16 --output output/hf --resume

bf16 is autocast over fp32 weights, on a CPU or a GPU. fp16, with torch's GradScaler, is a GPU's: on a CPU transformers
accepts fp16=True and trains in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import deepfast

LENGTH = 64  # bytes a sequence


def sequences() -> list[dict[str, torch.Tensor]]:
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()[: 256 * LENGTH]))
    return [{"input_ids": row, "labels": row} for row in data.view(-1, LENGTH)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GPT-2 by transformers' Trainer, with deepfast's AdamW")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--output", default="output/hf_trainer", help="where checkpoints and the model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=256, n_positions=LENGTH))
    training = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        use_cpu=not torch.cuda.is_available(),  # without a GPU bf16=True is an error else
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        max_grad_norm=1.0,
        weight_decay=0.1,  # of matrices only: the Trainer makes the groups
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_steps=10,
        save_total_limit=2,
        logging_steps=10,
        report_to=[],
    )
    if args.precision == "fp16" and training.use_cpu:
        print("fp16: on a CPU transformers trains in fp32")
    trainer = Trainer(
        model,
        training,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(deepfast.AdamW, {"lr": 3e-3, "betas": (0.9, 0.95)}),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
