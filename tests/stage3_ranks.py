"""Run by test_stage3.py on 2 and 4 ranks: ZeRO's stage 3 beside stage 0, which is one process's to the last bit."""

from __future__ import annotations

import datetime
import functools
import itertools
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import towers
from checks import run_checks
from conftest import HANGS
from towers import RANK, SIZE, compare, engine, kept, loss_of, step_of

from deepfast.engine.by_hand import safe_get_full_grad, safe_set_full_grad
from deepfast.optim.shards import is_sharded, is_unit, local

# The order of sums is one process's where a step is one micro-batch of each rank; with more of them the ranks are
# added first. bf16 weights are rounded half to even, not away from zero, and so may differ by one unit.
EXACT = 0.0
CLOSE = {"fp32": 1e-5, "fp16": 2**-9, "bf16": 2**-6}  # of 16 bits: four times the unit that is rounded to


def both(steps=3, **options):
    spoil, weights, backward = (options.pop(name, None) for name in ("spoil", "weights", "backward"))
    found = []
    for stage in (0, 3):
        e = engine(stage, **options)
        losses = [step_of(e, step, spoil, weights, backward) for step in range(steps)]
        found.append((e, losses, e.get_global_grad_norm()))
    return found


def check_stages(precision, accumulation, clip):
    exact = accumulation == 1 and not clip and precision != "bf16"
    # (What Adam makes of a gradient that is nearly zero is of any size: it would compare noise.)
    rule = {} if exact else {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}
    (a, losses, norm), (b, others, other) = both(
        precision=precision, accumulation=accumulation, config={"gradient_clipping": clip}, **rule
    )
    compare(kept(b), kept(a), EXACT if exact else CLOSE[precision])
    assert others == losses if exact else others == pytest.approx(losses, rel=CLOSE[precision])
    assert other == pytest.approx(norm, rel=1e-6 if exact else CLOSE[precision])


def check_each_rank_has_its_part():
    e = engine(3, "bf16")
    assert [name for name, m in e.module.named_modules() if is_unit(m)] == ["", *(f"blocks.{i}" for i in range(3))]
    numel = {name: p.numel() for name, p in towers.Tower().named_parameters()}
    step_of(e, 0)
    e.eval()
    with torch.no_grad():
        e.module(*towers.micro_batch(0, 0))
    assert is_sharded(e.module.few), "FSDP would leave the outermost unit whole"
    own = dict(zip(e._names(), e._params(), strict=True))
    assert own.keys() == numel.keys()
    for name, p in own.items():
        assert is_sharded(p) == (name not in ("scale", "empty")), name
        assert p.dtype == (torch.float32 if is_sharded(p) else torch.bfloat16)
        if is_sharded(p):
            chunks = torch.arange(p.shape[0]).chunk(SIZE)
            assert local(p).shape[0] == (len(chunks[RANK]) if RANK < len(chunks) else 0)
        for key, value in e.optimizer.state.get(p, {}).items():
            assert key == "step" or local(value).shape == local(p).shape
    held = torch.tensor(sum(local(p).numel() for p in own.values()))
    dist.all_reduce(held)
    assert held == sum(numel.values()) + (SIZE - 1) * numel["scale"]
    assert e.zero_optimization_stage() == 3
    assert e.zero_optimization_partition_weights()


def check_rank_0s_weights_are_everybodys():
    def net():
        tower = towers.Tower()
        with torch.no_grad():
            for t in (*tower.parameters(), tower.shift):
                t += RANK
        return tower

    e, expected = engine(3, net=net), towers.Tower()
    for name, t in e.module_state_dict().items():
        assert torch.equal(t, expected.state_dict()[name]), name


def check_small_blocks_go_with_what_is_around_them():
    e = engine(3, config={"zero_optimization": {"stage": 3}})
    assert [name for name, m in e.module.named_modules() if is_unit(m)] == [""]


def check_weights_of_micro_batches():
    for precision in ("fp32", "fp16"):
        (a, *_), (b, *_) = both(precision=precision, accumulation=3, weights=True)
        compare(kept(b), kept(a), CLOSE[precision])


def check_overflow_of_one_rank():
    def spoil(step, nth):
        return float("inf") if step == 1 and nth == SIZE - 1 else 1.0

    for precision in ("fp16", "bf16"):
        (a, losses, _), (b, others, _) = both(precision=precision, spoil=spoil)
        assert a.skipped_steps == b.skipped_steps == 1
        assert others == losses if precision == "fp16" else others == pytest.approx(losses, rel=CLOSE["bf16"])
        compare(kept(b), kept(a), EXACT if precision == "fp16" else CLOSE["bf16"])


def check_names_of_what_is_not_finite():
    e = engine(3, "fp16", config={"name_nonfinite": True})
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("deepfast").addHandler(handler)
    e.backward(loss_of(e, 0, RANK))
    few = torch.zeros(3, 30)
    few[2] = float("inf")  # which the first rank has no row of
    safe_set_full_grad(e.module.few, few)
    e.step()
    logging.getLogger("deepfast").removeHandler(handler)
    assert not e.was_step_applied()
    assert RANK != 0 or any("first in 'few'" in line for line in heard), heard


def check_loss_backward():
    """Passes that the engine is not asked for."""
    for precision, accumulation in itertools.product(("fp32", "fp16"), (1, 2)):
        (a, *_), (b, *_) = both(
            precision=precision, accumulation=accumulation, backward=lambda e, loss: e.scale(loss).backward()
        )
        compare(kept(b), kept(a), EXACT if accumulation == 1 else CLOSE[precision])


def check_a_loss_of_two_engines():
    for accumulation in (1, 2):
        found = []
        for stage in (0, 3):
            e, other = engine(stage, accumulation=accumulation), engine(stage, accumulation=accumulation)
            for step in range(2 * accumulation):
                e.backward(loss_of(e, step, RANK) + 2 * loss_of(other, step, RANK + SIZE), weight=1.0 + RANK + step)
                e.step(), other.step()
            found.append((kept(e), kept(other)))
        for one, two in zip(*found, strict=True):
            compare(two, one, CLOSE["fp32"])


def check_what_nobody_used_is_left_alone():
    """And what only some ranks have used is not: FSDP makes zeros for the others."""
    (a, *_), (b, *_) = both(accumulation=2, weight_decay=0.5)
    found = kept(b)
    assert "never.exp_avg" not in found
    assert torch.equal(found["never"], torch.ones(5, 5))
    assert not torch.equal(found["sometimes"], torch.ones(30))
    compare(found, kept(a), CLOSE["fp32"])


def check_gradients_by_hand():
    for precision, accumulation in itertools.product(("fp32", "fp16"), (1, 2)):
        e, twin = engine(3, precision, accumulation), engine(0, precision, accumulation)
        for k in range(accumulation):
            for one in (e, twin):
                one.backward(loss_of(one, 0, k * SIZE + RANK))
                if k < accumulation - 1:
                    one.step()
        grads = {}
        for name, p in zip(e._names(), e._params(), strict=True):
            grad, expected = safe_get_full_grad(p), safe_get_full_grad(twin.module.get_parameter(name))
            assert (grad is None) == (expected is None), name
            if grad is None:
                continue
            compare({"": grad}, {"": expected}, CLOSE[precision])
            grads[name] = grad
            if is_sharded(p):
                with pytest.raises(RuntimeError, match="safe_get_full_grad"):
                    p.grad.norm()
        assert {"embedding.weight", "scale", "few"} <= grads.keys()
        for name, p in zip(e._names(), e._params(), strict=True):
            if name in grads:
                safe_set_full_grad(p, torch.full_like(grads[name], 0.5))
        e.step()
        numel = sum(grad.numel() for grad in grads.values())
        assert e.get_global_grad_norm() == pytest.approx(0.5 * numel**0.5, rel=1e-5)


def check_no_sync():
    e, twin = engine(3, accumulation=2), engine(3, accumulation=2)
    for one, alone in ((e, True), (twin, False)):
        if alone:
            with one.no_sync():
                one.backward(loss_of(one, 0, RANK))
        else:
            one.backward(loss_of(one, 0, RANK))
        one.step()
        one.backward(loss_of(one, 0, SIZE + RANK))
        one.step()
    compare(kept(e), kept(twin))


def check_zero_grad_and_half_a_step():
    e, twin = engine(3, accumulation=2), engine(0, accumulation=2)
    for one in (e, twin):
        one.backward(loss_of(one, 9, RANK))
        one.zero_grad()
        one.step()
        one.backward(loss_of(one, 0, RANK))
        one.step()
    compare(kept(e), kept(twin), EXACT)


def check_module_state_dicts():
    for precision in ("bf16", "fp16"):
        a, b = engine(0, precision), engine(3, precision)
        step_of(a, 0), step_of(b, 0)
        expected, found = a.module_state_dict(), b.module_state_dict()
        compare(found, expected, CLOSE["bf16"])
        assert found["few"].dtype == a.dtype
        assert b.module_state_dict(exclude_frozen_parameters=True).keys() == found.keys() - {
            "frozen.weight",
            "frozen.bias",
        }
        assert (b.consolidated() is None) == (RANK != 0)
        b.load_module_state_dict({name: t * 0 + 0.5 for name, t in found.items()})
        assert all((t == 0.5).all() for t in b.module_state_dict().values())
        with pytest.raises(RuntimeError, match="Missing key"):
            b.load_module_state_dict({})


def check_compiled():
    found = []
    for compiled in (False, True):
        e = engine(3, "fp16")
        if compiled:
            e.compile(backend="eager")
        found.append([step_of(e, step) for step in range(2)])
        e.eval()
        with torch.no_grad():
            found[-1].append(float(loss_of(e, 2, 0)))
        found[-1].append(kept(e))
    assert found[0][:3] == found[1][:3]
    compare(found[1][3], found[0][3], EXACT)


def check_destroy():
    e = engine(3, "fp16")
    step_of(e, 0)
    e.destroy()
    e(*towers.micro_batch(0, 0)).sum().backward()


CHECKS = {
    **{
        f"stages {d} {a} {c}": functools.partial(check_stages, d, a, c)
        for d, a, c in itertools.product(towers.DTYPES, (1, 3), (0, 0.5))
    },
    **{name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")},
}
CHECKS.pop("stages")


def main(checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS))
    chosen = {name: check for name, check in checks.items() if name.startswith(tuple(sys.argv[2:]) or "")}
    run_checks(chosen, Path(sys.argv[1], f"{RANK}.json"), dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(CHECKS)
