"""A small model of the source of argparse, byte by byte, in Lightning with deepfast's AdamW.

    python examples/lightning_module.py --precision bf16 --output output/lightning
    python examples/lightning_module.py --precision bf16 --output output/lightning --resume

bf16 is autocast over fp32 weights, on a CPU or a GPU. fp16, with torch's GradScaler, is a GPU's: on a CPU Lightning
trains in bf16 instead, and says so. Lightning resumes at the end of an epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import deepfast

CONTEXT = 16  # bytes, from which the next is guessed
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class NextByte(pl.LightningModule):
    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 128), nn.GELU(), nn.Linear(128, 256)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        context, following = batch
        loss = nn.functional.cross_entropy(self.net(context), following)
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        # It clips inside the step; gradient_clip_val= of the Trainer works as well, in passes of its own.
        optimizer = deepfast.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        data = torch.tensor(list(Path(argparse.__file__).read_bytes()[: 2048 + CONTEXT])).unfold(0, CONTEXT + 1, 1)
        dataset = TensorDataset(data[:, :-1], data[:, -1])
        # Its order is a function of the epoch's number, which Lightning tells it: a resumed run has the same.
        order = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(dataset, batch_size=64, sampler=order)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a model of bytes in Lightning, with deepfast's AdamW")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--output", default="output/lightning_module", help="where checkpoints and metrics.csv go")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(argv)

    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        precision=PRECISIONS[args.precision],
        callbacks=[ModelCheckpoint(args.output, filename="last", enable_version_counter=False)],
        logger=CSVLogger(args.output, name="", version=""),
    )
    module = NextByte(total_steps=args.epochs * 2048 // 64)
    trainer.fit(module, ckpt_path=f"{args.output}/last.ckpt" if args.resume else None)


if __name__ == "__main__":
    main()
