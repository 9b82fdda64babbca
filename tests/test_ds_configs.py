"""Configurations of public repositories: they train with DeepSpeed 0.19.8's losses and learning rates, or are refused.

``ds_configs.json`` holds them as somebody has run them on a CPU: "auto" filled in, cut to one rank, fp16 off.
``losses`` and ``lrs`` (one number: all the same) are DeepSpeed's; without them it refuses the configuration.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from torch import nn

import deepfast
from deepfast.errors import ConfigError

ROWS = [
    (number, row)
    for row in json.loads((ROOT / "tests" / "ds_configs.json").read_text(encoding="utf-8"))
    for number in row["n"]
]
STEPS = 6

# DeepSpeed trains these. Keys that it ignores are taken for mistakes here; what changes data would change results.
IGNORED_BY_DEEPSPEED = {
    10: "'use_cpu': unknown key",
    11: "'same_network': unknown key",
    34: "'log': unknown key",
    35: "'log': unknown key",
    83: "'optimizer.eps': unknown key: did you mean 'optimizer.params.eps'?",
    84: "'optimizer.eps': unknown key: did you mean 'optimizer.params.eps'?",
    85: "'optimizer.eps': unknown key: did you mean 'optimizer.params.eps'?",
    86: "'backend': unknown key",
    163: "'cuda_visible_devices': unknown key",
}
DATA_EFFICIENCY = dict.fromkeys((157, 158, 159, 160, 161, 162), "data_efficiency: is not supported")
# DeepSpeed refuses these, too.
BOTH_REFUSE = {
    4: "'fp16.fp16_scale_tolerance': unknown key",
    5: "'fp16.opt_level': unknown key",
    **dict.fromkeys((7, 105, 166, 167), "'bf16.loss_scale': unknown key: did you mean 'fp16.loss_scale'?"),
    **dict.fromkeys((12, 13), "'same_network': unknown key"),
    33: "amp: is not supported, and cannot be ignored: use fp16 or bf16",
    **dict.fromkeys((36, 147), "optimizer.type='ZeroOneAdam' is not built yet"),
    **dict.fromkeys((134, 135, 136), "optimizer.type='OnebitAdam' is not built yet"),
    **dict.fromkeys((148, 149), "optimizer.type='OneBitAdam' is not built yet"),
    **dict.fromkeys((150, 151, 152), "optimizer.type='OneBitLamb' is not built yet"),
    **dict.fromkeys(
        (51, 121, 122, 123, 124, 126, 127, 128, 130, 131, 132, 171), "compression_training: is not supported"
    ),
    52: "optimizer.params.max_grad_norm: is not supported, and cannot be ignored: use gradient_clipping",
    **dict.fromkeys((53, 55, 173, 174, 175), "data_efficiency: is not supported"),
    **dict.fromkeys((76, 79, 172), "curriculum_learning: is not supported"),
    90: "eigenvalue: is not supported",
    108: "tensor_parallel: is not supported",
    111: "'comms_config': unknown key: did you mean 'comms_logger'?",
    153: "optimizer.params.max_coeff: is not supported, and cannot be ignored: LAMB is the paper's",
    154: "progressive_layer_drop: is not supported",
    155: "sparse_attention: is not supported",
    **dict.fromkeys((164, 165), "'cuda_visible_devices': unknown key"),
}
REFUSED = {**IGNORED_BY_DEEPSPEED, **DATA_EFFICIENCY, **BOTH_REFUSE}
# bf16 without ZeRO: there DeepSpeed's Adam takes its first step for its second. They are compared with plain torch.
BF16_STAGE_0 = (38, 78, 107, 176, 180)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))


def micro_batches(size):
    g = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(size, 8, generator=g)
        yield x, x.sum(-1, keepdim=True)


def is_bf16(config) -> bool:
    return any((config.get(key) or {}).get("enabled") for key in ("bf16", "bfloat16"))


def trained(config) -> tuple[list[float], list[float]]:
    """Losses and learning rates; under bf16 from weights that were rounded before, as DeepSpeed's masters are."""
    module = net().bfloat16().float() if is_bf16(config) else net()
    options = {} if "optimizer" in config else {"optimizer": torch.optim.AdamW(module.parameters(), lr=1e-3)}
    engine, *_ = deepfast.initialize(model=module, config=config, model_parameters=module.parameters(), **options)
    batches = micro_batches(min(engine.train_micro_batch_size_per_gpu(), 16))
    losses, lrs = [], []
    for _ in range(STEPS):
        total = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            x, y = next(batches)
            loss = nn.functional.mse_loss(engine(x.to(engine.dtype)).float(), y)
            engine.backward(loss)
            engine.step()
            total += loss.item()
        losses.append(total / engine.gradient_accumulation_steps())
        lrs.append(engine.get_lr()[0])
    return losses, lrs


def by_torch(micro, accumulation, clipping) -> list[float]:
    """The losses of a bf16 net whose fp32 masters are stepped by AdamW."""
    module = net().bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in module.parameters()]
    optimizer, batches, losses = torch.optim.AdamW(masters, lr=1e-3), micro_batches(micro), []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for x, y in (next(batches) for _ in range(accumulation)):
            loss = nn.functional.mse_loss(module(x.bfloat16()).float(), y)
            for master, grad in zip(masters, torch.autograd.grad(loss, list(module.parameters())), strict=True):
                share = grad.float() / accumulation
                master.grad = share if master.grad is None else master.grad + share
            total += loss.item()
        nn.utils.clip_grad_norm_(masters, clipping)
        optimizer.step()
        for p, master in zip(module.parameters(), masters, strict=True):
            p.data.copy_(master.data)
        losses.append(total / accumulation)
    return losses


@pytest.mark.parametrize(("number", "row"), [pytest.param(n, row, id=str(n)) for n, row in ROWS])
def test_a_public_configuration(number, row):
    if number in REFUSED:
        with pytest.raises(ConfigError) as caught:
            trained(row["config"])
        assert str(caught.value).startswith(REFUSED[number])
        assert len(str(caught.value)) <= 200
        assert "\n" not in str(caught.value)
        return
    losses, lrs = trained(row["config"])
    if number in BF16_STAGE_0:
        batch, micro, accumulation = (
            row["config"].get(key)
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        clipping = row["config"].get("gradient_clipping", 1.0)
        assert losses == pytest.approx(by_torch(min(micro, 16), accumulation or batch // micro, clipping), rel=1e-3)
        assert losses[0] == pytest.approx(row["losses"][0], rel=1e-4)
    elif "losses" in row:
        assert losses == pytest.approx(row["losses"], rel=1e-3)
    else:
        assert all(torch.tensor(losses).isfinite())
        return
    assert lrs == pytest.approx(row["lrs"] * (STEPS // len(row["lrs"])), rel=1e-6)


def test_the_tables_are_of_these_rows():
    known = dict(ROWS)
    assert len(known) == len(ROWS) == 189
    assert all("losses" in known[n] for n in (*IGNORED_BY_DEEPSPEED, *DATA_EFFICIENCY, *BF16_STAGE_0))
    assert not any("losses" in known[n] for n in BOTH_REFUSE)
