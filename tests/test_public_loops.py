"""Training loops as public DeepSpeed scripts have them (tests/loops), not a line of them changed, on one and two ranks.

What they are to give is plain torch's, or what DeepSpeed 0.19.8 has given (on a CPU, one process).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run
from safetensors.torch import load_file

LOOPS = TESTS / "loops"
HALF = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12}}}


def script(name, tmp_path, *options, ranks=1, config=None):
    """The last line that it prints, under `python -m deepfast.deepspeed`, or on ranks under the launcher."""
    given = []
    if config is not None:
        (tmp_path / "ds_config.json").write_text(json.dumps(config))
        given = ["--deepspeed", "--deepspeed_config", tmp_path / "ds_config.json"]
    launch = ["deepfast.deepspeed"]
    if ranks > 1:
        launch = ["deepfast.deepspeed.launcher", "--num_gpus", ranks]
    done = run(
        sys.executable, "-m", *launch, LOOPS / f"{name}.py", *options, *given,
        env={"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# What the same script gives with an engine of three lines in plain torch.
GAN = {
    "losses": [
        [1.3850436210632324, 0.6826967000961304],
        [1.3780733942985535, 0.6864768862724304],
        [1.3028139472007751, 0.6948421597480774],
    ],
    "weights": [64.621494471794, 133.77747225861094],
}


@pytest.mark.parametrize("kind", HALF)
def test_gan(tmp_path, kind):
    """Two engines; the generator's loss goes through the discriminator's."""
    config = {"train_batch_size": 8, "steps_per_print": 2000, "gradient_clipping": 1.0, **HALF[kind]}
    got = script("gan", tmp_path, config=config)
    tolerance = 1e-4 if kind == "fp32" else 2e-2
    assert got["steps"] == [3, 3]
    assert sum(got["losses"], []) == pytest.approx(sum(GAN["losses"], []), rel=tolerance)  # noqa: RUF017
    assert got["weights"] == pytest.approx(GAN["weights"], rel=tolerance)


@pytest.mark.parametrize("stage", [0, 2])
def test_gan_on_two_ranks(tmp_path, stage):
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
    got = script("gan", tmp_path, ranks=2, config=config)
    assert got["steps"] == [3, 3]
    assert got["losses"][2] < got["losses"][0]


# DeepSpeed 0.19.8's
BERT = [
    0.6951714158058167, 0.6912949085235596, 0.686905026435852, 0.6737241744995117, 0.6949418783187866,
    0.7153411507606506, 0.7130614519119263, 0.6922144889831543, 0.7029849290847778, 0.6629915833473206,
    0.6883633136749268, 0.6821054220199585,
]  # fmt: skip
BERT_LR = 0.0032142857142857147


@pytest.mark.parametrize("options", [[], ["--offload", "--gradient_checkpointing"]])
@pytest.mark.parametrize(("kind", "ranks"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("fp16", 2)])
def test_bert_fine_tuning(tmp_path, kind, ranks, options):
    """Groups, a client's optimizer and schedule, accelerator, module's attributes, the module saved."""
    config = {"train_micro_batch_size_per_gpu": 8 // ranks, "gradient_clipping": 1.0, **HALF[kind]}
    if ranks > 1:
        config["zero_optimization"] = {"stage": 2}
    got = script("bert", tmp_path, "--output", tmp_path / "out", *options, ranks=ranks, config=config)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) > 20
    tolerance = 1e-3 if kind == "fp32" else 2e-2
    if ranks == 1:
        assert got["losses"] == pytest.approx(BERT, rel=tolerance)
    else:  # this rank's half
        assert got["losses"][0] == pytest.approx(BERT[0], rel=0.1)
    assert got["lr"] == pytest.approx([BERT_LR, BERT_LR])
    assert 0 < got["norm"] < 10


@pytest.mark.parametrize(("dtype", "ranks", "stage"), [("fp32", 1, 0), ("bf16", 1, 1), ("fp16", 2, 2), ("fp32", 2, 0)])
def test_image_classifier(tmp_path, dtype, ranks, stage):
    """The engine's loader, epochs, --local_rank, inputs in the target type."""
    got = script("images", tmp_path, "--dtype", dtype, "--stage", stage, ranks=ranks)
    assert got["steps"] == 40
    assert 1.2 < got["first"] < 1.6
    assert got["last"] < 0.5
    assert got["right"] > 0.7  # of four kinds; an evaluation in bf16 is coarse, with DeepSpeed, too


# DeepSpeed 0.19.8's, ZeRO stage 1
LANGUAGE = [
    13.719627380371094, 14.330745220184326, 14.71093225479126, 14.306388854980469, 13.711382389068604,
    13.260522842407227, 11.843591213226318, 10.660329341888428,
]  # fmt: skip
LANGUAGE_WEIGHTS = {"embed.weight": -29.546225641854107, "block.linear2.weight": -2.786382062971825}
MODEL = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize(("kind", "ranks"), [("fp32", 1), ("fp32", 2), ("bf16", 2), ("fp16", 1)])
def test_language_model_that_is_resumed(tmp_path, kind, ranks):
    """What backward returns is summed, as DeepSpeed divides it; a run in two parts is the run in one, to the bit."""
    config = {**MODEL, "train_micro_batch_size_per_gpu": 4 // ranks, **HALF[kind]}
    whole = script("language", tmp_path, "--checkpoints", tmp_path / "whole", ranks=ranks, config=config)
    cut = (
        script("language", tmp_path, "--checkpoints", tmp_path / "cut", *more, ranks=ranks, config=config)
        for more in (["--stop_after", 3], [])
    )
    first, rest = cut
    assert first["losses"] + rest["losses"] == whole["losses"]
    assert rest["weights"] == whole["weights"]
    assert (whole["lr"], whole["skipped"]) == ([0.01], 0)
    assert whole["scale"] == (4096.0 if kind == "fp16" else 1.0)
    if ranks == 1:
        tolerance = 1e-3 if kind == "fp32" else 2e-2
        assert whole["losses"] == pytest.approx(LANGUAGE, rel=tolerance)
        for name, value in LANGUAGE_WEIGHTS.items():
            assert whole["weights"][name] == pytest.approx(value, rel=tolerance * 3)
    assert sorted(path.name for path in Path(tmp_path / "whole").iterdir())[:2] == ["iter1", "iter2"]
    assert torch.tensor(whole["losses"]).isfinite().all()
