"""ZeRO's stage 3: the checks of stage3_ranks.py, stage3_given.py, stage3_checkpoint.py, each in one start of ranks."""

from __future__ import annotations

import pytest
import torch
from checks import failures, heard_of_ranks
from safetensors.torch import load_file
from stage3_checkpoint import OPTIMIZERS
from stage3_given import CHECKS as GIVEN
from stage3_ranks import CHECKS
from torch import nn
from towers import Block, Tower

import deepfast
from deepfast.deepspeed.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepfast.engine.units import blocks


def wrong(said: list[dict[str, str]]) -> list[str]:
    return [text for check in said[0] if (text := failures(said, check))]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("script", "checks"), [("stage3_ranks.py", CHECKS), ("stage3_given.py", GIVEN)])
def test_stage_3_is_stage_0_in_parts(tmp_path, ranks, script, checks):
    said = heard_of_ranks(ranks, tmp_path, script)
    assert said[0].keys() == checks.keys()
    assert wrong(said) == []


def saved_by(place, ranks, stage):
    for precision in ("fp32", "fp16"):
        (place / precision).mkdir()
    said = heard_of_ranks(ranks, place, "stage3_checkpoint.py", "save", stage)
    assert len(said[0]) == 2 * len(OPTIMIZERS)
    assert wrong(said) == []
    return place


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """By four ranks, of which one has nothing of some parameters."""
    return saved_by(tmp_path_factory.mktemp("in_parts"), 4, 3)


@pytest.mark.xdist_group("stage3_saved")
@pytest.mark.parametrize(
    ("ranks", "what", "stage"), [(4, "load_exactly", 3), (3, "load", 3), (2, "load", 2), (1, "load", 0)]
)
def test_others_go_on(in_parts, ranks, what, stage):
    said = heard_of_ranks(ranks, in_parts, "stage3_checkpoint.py", what, stage)
    assert len(said[0]) == 2 * len(OPTIMIZERS)
    assert wrong(said) == []


@pytest.mark.xdist_group("stage3_saved")
def test_its_files_hold_whole_weights(in_parts):
    for precision in ("fp32", "fp16"):
        then, after, _ = torch.load(in_parts / precision / "SGD.pt")
        state = get_fp32_state_dict_from_zero_checkpoint(str(in_parts / precision / "SGD"))
        model = Tower()
        assert model.load_state_dict(state, strict=False) == (["head.weight"], []), "the tied one"
        weights = load_file(in_parts / precision / "SGD" / "weights.safetensors")
        for name, p in model.named_parameters():
            # (What nothing trains was compared as the cast has rounded it.)
            expected = then[name] if not name.startswith("frozen") else Tower().get_parameter(name)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2**-40)
            assert weights[name].dtype == {"fp32": torch.float32, "fp16": torch.float16}[precision]
            assert torch.equal(weights[name].float(), after[name].to(weights[name].dtype).float())


def test_whole_weights_become_parts(tmp_path):
    place = saved_by(tmp_path, 2, 2)
    assert wrong(heard_of_ranks(4, place, "stage3_checkpoint.py", "load", 3)) == []


def test_one_process_has_nothing_to_cut():
    net = nn.Linear(3, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "optimizer": {"params": {}}}
    e = deepfast.initialize(model=net, config=config)[0]
    before = net.weight.detach().clone()
    e.backward(e(torch.rand(1, 3)).sum())
    e.step()
    assert type(net.weight) is nn.Parameter
    assert not torch.equal(net.weight, before)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(Block(), Block()), Block()])
        self.extra = nn.ModuleDict({"a": Block(), "small": nn.Linear(2, 2)})
        self.lists = nn.ModuleList([nn.ModuleList([Block()])])


def test_blocks_are_the_outermost_members_of_lists():
    net = Nested()
    names = {m: name for name, m in net.named_modules()}
    assert [names[m] for m in blocks(net, 100)] == ["layers.0", "layers.1", "extra.a", "lists.0.0"]
    assert [names[m] for m in blocks(net, 3000)] == ["layers.0"]
    assert [names[m] for m in blocks(net, 0)] == ["layers.0", "layers.1", "extra.a", "extra.small", "lists.0.0"]
    assert blocks(net, 10**9) == []


def test_blocks_that_share_weights_with_others_are_the_whole_modules():
    net = Nested()
    net.layers[1].wide.weight = net.extra["a"].wide.weight
    net.lists[0].append(net.lists[0][0])  # the very same block twice: that is one
    names = {m: name for name, m in net.named_modules()}
    assert [names[m] for m in blocks(net, 100)] == ["layers.0", "lists.0.0"]
