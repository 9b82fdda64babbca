"""Sharded training, ZeRO 1 and 2: the checks of zero_ranks.py and zero_edges.py, in one start of ranks each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checks import failures, heard_of_pair, heard_of_ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from zero_edges import CHECKS as EDGES
from zero_edges import ON_HOSTS
from zero_killed import MOMENTS
from zero_ranks import CHECKS, Net, in_memory


def wrong(said: list[dict[str, str]]) -> list[str]:
    return [text for check in said[0] if (text := failures(said, check))]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_give_the_bits_of_one_process(tmp_path, ranks):
    said = heard_of_ranks(ranks, tmp_path, "zero_ranks.py")
    assert said[0].keys() == CHECKS.keys()
    assert wrong(said) == []


def test_what_else_happens_to_a_sharded_engine(tmp_path):
    said = heard_of_ranks(2, tmp_path, "zero_edges.py")
    assert said[0].keys() | {"all_optimizers_and_types"} == EDGES.keys()
    assert wrong(said) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By four ranks at stage 2, one of which has an empty part of most parameters."""
    place = tmp_path_factory.mktemp("saved")
    assert wrong(heard_of_ranks(4, place, "zero_checkpoint.py", "save", 2)) == []
    return place


@pytest.mark.xdist_group("zero_saved")
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (3, 1), (2, 2), (2, 0)])
def test_others_go_on_with_the_same_bits(saved, ranks, stage):
    assert wrong(heard_of_ranks(ranks, saved, "zero_checkpoint.py", "load", stage)) == []


@pytest.mark.xdist_group("zero_saved")
def test_plain_torch_reads_it(saved):
    model = Net().half()
    params = {n: p for n, p in model.named_parameters() if not n.startswith(("never", "frozen", "empty"))}
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, amsgrad=True)
    optim = get_optimizer_state_dict(model, optimizer)
    assert optim["state"].keys() == params.keys()
    moments = {name: {k: v.float() for k, v in state.items()} for name, state in optim["state"].items()}  # not 16 bits
    weights = {name: t for name, t in model.state_dict().items() if name != "tied.weight"}
    reader = dcp.HuggingFaceStorageReader(str(saved / "AdamW" / "two"))
    dcp.load({"model": weights, "optim": {"state": moments}}, storage_reader=reader, no_dist=True)
    then, _ = torch.load(saved / "AdamW.pt")
    for name, p in params.items():
        assert torch.equal(weights[name], then[name])
        for key, value in moments[name].items():
            laid = value if key == "step" else torch.empty_like(p, dtype=torch.float32).copy_(value)
            assert torch.equal(in_memory(laid), then[f"{name}.{key}"])
    set_optimizer_state_dict(model, optimizer, {**optim, "state": moments})
    assert torch.equal(optimizer.state[model.wide.weight]["exp_avg"], moments["wide.weight"]["exp_avg"].half())


@pytest.mark.parametrize("where", [[], ["hosts"]])
@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_a_rank_is_killed(tmp_path, moment, where):
    alone, killed = heard_of_pair(tmp_path, "zero_killed.py", moment, *where)
    assert (alone, killed) == ({MOMENTS[moment]: ""}, {})


@pytest.mark.xdist_group("comm_played")
def test_gpus_played_on_the_host(cuda_on_host, tmp_path):
    assert wrong(heard_of_ranks(2, tmp_path, "zero_played.py", "cuda", cuda_on_host.file)) == []


@pytest.mark.parametrize("compiled", [True, False])
def test_between_hosts(tmp_path, compiled):
    """Without kernels there is no communicator: ranks of one host are as strange to each other as those of two."""
    missing = {} if compiled else {"DEEPFAST_DISABLE_JIT": "1", "DEEPFAST_CACHE_DIR": str(tmp_path / "empty")}
    said = heard_of_ranks(2, tmp_path, "zero_edges.py", "hosts", **missing)
    assert set(ON_HOSTS) == said[0].keys()
    assert wrong(said) == []
