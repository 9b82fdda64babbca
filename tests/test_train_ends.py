"""How a run of ds_train.py ends that overflows, and what it leaves of memory, time and monitors."""

from __future__ import annotations

import pytest
from runs import TORCHRUN, configure, losses, metrics, train

TOO_LARGE = {"enabled": True, "loss_scale": 2.0**40}


def says_one_line(done, code: int) -> str:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ds_train.py: ")]
    assert line == done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert len(line) <= 200
    return line


def test_a_run_without_a_step_is_no_success(place):
    configure(place, fp16=TOO_LARGE, num_train_steps=4)
    line = says_one_line(train(place), 1)
    assert "no step was ever applied: all 4 had inf or NaN in their gradients: look at the data" in line
    rows = metrics(place)
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4]
    assert not (place / "output" / "model" / "model.safetensors").exists(), "nothing was trained"
    # It is the whole run that counts: one that goes on from there with another scale is one.
    configure(place, num_train_steps=6)
    done = train(place, "--resume", "--set", "fp16.loss_scale=1")
    assert done.returncode == 0, done.stderr
    assert len(losses(place)) == 6
    assert (place / "output" / "model" / "model.safetensors").exists()


def test_too_many_skips_in_a_row_end_a_run(place):
    configure(place, fp16={**TOO_LARGE, "max_skips_at_minimum": 3}, name_nonfinite=True)
    done = train(place)
    line = says_one_line(done, 1)
    assert "3 skips in a row at loss scale 1.09951e+12 (static): inf or NaN in " in line
    assert "('transformer.wte.weight'" in line
    told = [line for line in done.stdout.splitlines() if "skipped" in line]
    assert [line.split(":")[1] for line in told] == [f" step {n} skipped" for n in (1, 2, 3)]
    assert all(
        "first in 'transformer.wte.weight'; loss scale 1.099511628e+12 -> 1.099511628e+12" in line for line in told
    )
    assert len(metrics(place)) == 2, "the steps before"


def test_two_ranks_say_it_once(place):
    configure(place, fp16={**TOO_LARGE, "max_skips_at_minimum": 2}, num_train_steps=4)
    done = train(place, launch=TORCHRUN)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "ds_train.py: " in line]
    assert "2 skips in a row" in line
    assert done.stdout.count(" skipped: ") == 2
    assert "LossScaleError" not in done.stderr, "torchrun's own traceback is the only one"


def test_memory_times_and_monitors(place):
    configure(
        place, wall_clock_breakdown=True, steps_per_print=4,
        csv_monitor={"enabled": True, "output_path": "csv", "job_name": "job"},
    )  # fmt: skip
    done = train(place)
    assert done.returncode == 0, done.stderr
    rows = metrics(place)
    times = ("forward_ms", "backward_ms", "step_ms")
    assert all(row[key] > 0 for row in rows for key in times)
    peaks = [row["memory_mib"] for row in rows]
    assert peaks == sorted(peaks)
    assert 50 < peaks[0] <= peaks[-1] < 100_000
    lines = [line for line in done.stdout.splitlines() if "deepfast: step=" in line]
    assert [line.split(",")[0].split("=")[1] for line in lines] == ["4", "8"]
    assert all(", ms: fwd=" in line for line in lines)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "output" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"step"}
    assert [e.value for e in events.Scalars("step_ms")] == pytest.approx([row["step_ms"] for row in rows])
    written = (place / "csv" / "job" / "Train_Samples_train_loss.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[1]) for line in written] == pytest.approx(losses(place), rel=1e-4)


def test_a_step_of_very_many_micro_batches_is_told(place):
    configure(place, fp16=False, train_batch_size=1000, train_micro_batch_size=1, train_sequence_length=2,
              num_train_steps=1)  # fmt: skip
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert "each step is 1000 micro-batches long, and ends before it can be interrupted" in done.stdout
