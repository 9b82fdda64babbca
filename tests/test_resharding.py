"""What some ranks have written, others read, and plain torch; to the bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import run
from engines import CONFIG, equal, state
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Odd, check_state, elements, give_state, odd_engine, saved_by, shared_out, whole_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import deepfast
from deepfast.engine import checkpoint, reading
from deepfast.engine.boxes import cut, run_of


@settings(deadline=None)
@given(st.data())
def test_a_run_of_memory_is_a_few_boxes(data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    like = (
        torch.arange(math.prod(shape))
        .view([shape[d] for d in order])
        .permute([order.index(d) for d in range(len(shape))])
    )
    begin, end = sorted((data.draw(st.integers(0, like.numel())), data.draw(st.integers(0, like.numel()))))
    pieces = list(cut(torch.arange(begin, end), like, begin))
    assert len(pieces) <= max(1, 2 * len(shape) - 1)
    for box, view in pieces:
        assert torch.equal(view, like[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))])
    assert sorted(n for _, view in pieces for n in view.flatten().tolist()) == list(range(begin, end))
    assert torch.equal(run_of(like, like, begin, end), torch.arange(begin, end))


WRITERS = {"alone": [(0, 1)], "4 ranks": [(r, 4) for r in range(4)], "4, unevenly": [(r, 4, 3.0) for r in range(4)]}
READERS = {"alone": (0, 1), "as 1 of 3": (1, 3), "as the last of 2": (1, 2, 0.5), "as one with little": (0, 5, 4.0)}


def made(who, **config):
    e = odd_engine(**config)
    return e if who == (0, 1) else shared_out(e, *who)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writers", WRITERS)
@pytest.mark.parametrize("config", [{}, {"bf16": True}])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, monkeypatch, config, writers, reader):
    engines = [made(who, **config) for who in WRITERS[writers]]
    moments = whole_state(engines[0])
    for e in engines:
        give_state(e, moments)
        e.module.norm.running_mean.uniform_(generator=torch.Generator().manual_seed(7))
    saved_by(engines, tmp_path)
    loaded = made(READERS[reader], seed=9, **config)
    monkeypatch.setattr(type(loaded.optimizer), "step", lambda *_: pytest.fail("loading steps"))
    loaded.load_checkpoint(tmp_path)
    check_state(loaded, moments)
    assert equal(state(loaded), state(engines[0]))
    assert torch.equal(loaded.module.norm.running_mean, engines[0].module.norm.running_mean)


@pytest.mark.parametrize(
    ("source", "target"), [({}, {"fp16": True}), ({"bf16": True}, {}), ({"bf16": True}, {"fp16": True})]
)
def test_parts_keep_the_fp32_values_when_the_precision_changes(tmp_path, source, target):
    engines = [made((rank, 3), **source) for rank in range(3)]
    moments = whole_state(engines[0])
    for e in engines:
        give_state(e, moments)
    saved_by(engines, tmp_path)
    loaded = made((1, 2), seed=9, **target)
    loaded.load_checkpoint(tmp_path)
    for part, name in zip(loaded._parts(), loaded._names(), strict=True):
        exact = moments[name].get("master", dict(engines[0].module.named_parameters())[name].detach())
        if part.whole.dtype == torch.float32:
            assert torch.equal(part.whole, exact), name
        else:
            assert torch.equal(loaded.optimizer.get_master(part.mine), elements(part, exact)), name


def check_torch_reads(folder, engine, moments):
    """With nothing of ours."""
    plain = Odd(seed=9)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.5)
    kept = get_optimizer_state_dict(plain, optimizer)
    model = {name: t for name, t in plain.state_dict().items() if not name.startswith("again.")}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load({"model": model, "optim": {"state": kept["state"]}}, storage_reader=reader)
    set_optimizer_state_dict(plain, optimizer, kept)
    assert equal(plain.parameters(), engine.module.parameters())
    for name, p in plain.named_parameters():
        assert optimizer.state[p].keys() == moments[name].keys()
        for entry, t in moments[name].items():
            assert torch.equal(optimizer.state[p][entry], t), (name, entry)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("writers", WRITERS)
def test_plain_torch_reads_it(tmp_path, writers):
    engines = [made(who) for who in WRITERS[writers]]
    moments = whole_state(engines[0])
    for e in engines:
        give_state(e, moments)
    check_torch_reads(saved_by(engines, tmp_path), engines[0], moments)


def test_each_rank_writes_its_share_and_reads_its_own(tmp_path, monkeypatch):
    engines = [made((rank, 4)) for rank in range(4)]
    for e in engines:
        give_state(e, whole_state(e))
    path = saved_by(engines, tmp_path)
    written: list[str] = []
    for file in path.glob("model-*.safetensors"):
        with safe_open(file, "pt") as f:
            written += f.keys()
    assert {file.name for file in path.glob("model-*")} == {f"model-{rank}.safetensors" for rank in range(4)}
    assert len(written) == len(set(written)), "what is whole is written once"
    read = 0

    def count(_self, item, t):
        nonlocal read
        read += t.numel() * item.storage_index.fqn.startswith("optim.")

    monkeypatch.setattr(reading._Planner, "commit_tensor", count)
    loaded = made((1, 3))
    loaded.load_checkpoint(tmp_path)
    assert read == sum(2 * (part.end - part.begin) + 1 for part in loaded._parts())


def as_format_1(e, folder):
    """As versions before wrote it, by hand."""
    folder.mkdir()
    optimizer = e.optimizer.state_dict()
    moments = {f"{i}.{entry}": t for i, values in optimizer["state"].items() for entry, t in values.items()}
    save_file({k: t.detach().clone(memory_format=torch.contiguous_format)
               for k, t in checkpoint.unique(e.module.state_dict()).items()}, folder / "model.safetensors")  # fmt: skip
    save_file({k: t.clone(memory_format=torch.contiguous_format) for k, t in moments.items()},
              folder / "optimizer.safetensors")  # fmt: skip
    save_file({"cpu": torch.get_rng_state()}, folder / "rank0.safetensors")
    rest = {"state": {"0.note": "mine"}, "param_groups": optimizer["param_groups"]}
    (folder / "state.json").write_text(checkpoint.to_json({
        "format": 1, "world_size": 1, "global_steps": 3, "micro_steps": 12, "skipped_steps": 1, "optimizer": rest,
        "scaler": e.scaler.state_dict(), "lr_scheduler": None, "client_state": {"epoch": 2}}))  # fmt: skip
    files = sorted(path.name for path in folder.iterdir())
    (folder / checkpoint.CHECKSUMS).write_text(run("sha256sum", *files, cwd=folder).stdout)


@pytest.mark.parametrize("config", [{}, {"bf16": True}])
@pytest.mark.parametrize("reader", READERS)
def test_format_1_still_loads(tmp_path, reader, config):
    first = made((0, 1), **config)
    moments = whole_state(first)
    give_state(first, moments)
    as_format_1(first, tmp_path / "old")
    expected = torch.rand(3)
    torch.rand(5)
    loaded = made(READERS[reader], seed=9, **config)
    assert loaded.load_checkpoint(tmp_path) == (str(tmp_path / "old"), {"epoch": 2})
    assert loaded.optimizer.state[loaded._parts()[0].mine].pop("note") == "mine"
    check_state(loaded, moments)
    assert equal(state(loaded), state(first))
    assert (loaded.global_steps, loaded.micro_steps, loaded.skipped_steps) == (3, 12, 1)
    if reader == "alone":
        assert torch.equal(torch.rand(3), expected)


def test_what_the_optimizer_has_beside_the_modules_parameters(tmp_path):
    """Parameters that the module does not know, and whatever else somebody keeps in its state."""

    def made_with(extra):
        module = nn.Linear(2, 2)
        e, *_ = deepfast.initialize(
            model=module, config=CONFIG, optimizer=lambda p: torch.optim.Adagrad([*p, nn.Parameter(extra)], lr=0.1)
        )
        return e

    first, second = made_with(torch.ones(3)), made_with(torch.ones(3))
    stray = first.optimizer.param_groups[0]["params"][2]
    first.optimizer.state[stray]["sum"] = torch.tensor([1.0, 2.0, 3.0])
    first.optimizer.state[stray]["note"] = 3
    path = first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    kept = second.optimizer.state[second.optimizer.param_groups[0]["params"][2]]
    assert torch.equal(kept["sum"], torch.tensor([1.0, 2.0, 3.0]))
    assert kept["note"] == 3
    with safe_open(path / "optimizer-0.safetensors", "pt") as f:
        assert "optim.state.#2.sum" in f.keys()  # noqa: SIM118 - it is no dict


def test_files_that_do_not_hold_all_are_refused(tmp_path):
    """A box that is missing leaves a hole, which torch would not notice."""
    engines = [made((rank, 4)) for rank in range(4)]
    for e in engines:
        give_state(e, whole_state(e))
    path = saved_by(engines, tmp_path)
    (path / "optimizer-2.safetensors").unlink()
    sums = (path / checkpoint.CHECKSUMS).read_text().splitlines(keepends=True)
    (path / checkpoint.CHECKSUMS).write_text("".join(line for line in sums if "optimizer-2.safe" not in line))
    loaded = made((0, 1), seed=9)
    before = state(loaded)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be read: \d+ of \d+ elements of 'optim"):
        loaded.load_checkpoint(tmp_path)
    assert equal(before, state(loaded))
