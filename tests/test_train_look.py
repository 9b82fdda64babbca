"""How a run is drawn, and what is said of its end."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from deepfast.train import plot
from deepfast.train.forecast import Forecast, clock, duration


@pytest.fixture
def now(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        value = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.value)
    return Clock


def row(step: int, **others) -> dict:
    return {"step": step, "loss": 5.0 - step / 1e6, "lr": 1e-3, "loss_scale": 1.0, **others}


def test_pictures_are_drawn_now_and_then(tmp_path, monkeypatch, now):
    drawn = []

    def draws(*_):
        drawn.append(now.value)
        now.value += 2.0
        (tmp_path / ".loss.png.tmp").touch()

    monkeypatch.setattr(plot, "_draw", draws)
    curves = plot.Curves(tmp_path / "loss.png")
    curves.draw_if_due(checkpoint=True)
    now.value += 11
    curves.draw_if_due(checkpoint=True)
    assert not drawn, "of nothing there is no picture"
    curves.add(row(1))
    curves.draw_if_due(checkpoint=False)
    assert not drawn
    curves.draw_if_due(checkpoint=True)
    assert drawn == [1011.0]
    while now.value < 2000:
        now.value += 1
        curves.draw_if_due(checkpoint=False)
    assert len(drawn) == 10, "one that takes 2 s is drawn every 100 s"
    assert (tmp_path / "loss.png").exists()


def test_a_picture_that_fails_leaves_the_one_before(tmp_path, monkeypatch, caplog):
    curves = plot.Curves(tmp_path / "loss.png")
    curves.add(row(1))
    curves.draw()
    before = (tmp_path / "loss.png").read_bytes()
    assert before.startswith(b"\x89PNG")

    def breaks(_, path):
        path.write_bytes(b"half")
        raise ValueError("what a library says")

    monkeypatch.setattr(plot, "_draw", breaks)
    curves.draw()
    curves.draw()
    assert (tmp_path / "loss.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert caplog.text.count("cannot be drawn: what a library says; training goes on") == 1


@pytest.mark.parametrize("steps", [1, 7, 150_000])
def test_long_runs_are_few_points(tmp_path, monkeypatch, steps):
    from matplotlib.axes import Axes

    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    original = Axes.plot

    def spied(self, x, y, **style):
        lines[style.get("label", style["color"])] = np.asarray(x), np.asarray(y)
        return original(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", spied)
    beside = Axes.secondary_yaxis
    scales: list[np.ndarray] = []

    def perplexities(self, place, functions):
        scales.append(functions[1](functions[0](np.array([0.0, 4.5]))))
        return beside(self, place, functions=functions)

    monkeypatch.setattr(Axes, "secondary_yaxis", perplexities)
    curves = plot.Curves(tmp_path / "loss.png")
    for step in range(1, steps + 1):
        measured = {"eval_loss": 4.5} if step % 3 == 0 else {}
        curves.add(row(step, **measured) | ({"loss": 9.0} if step == 5 else {"loss": None} if step == 6 else {}))
    curves.draw()
    assert max(len(x) for name, (x, _) in lines.items() if name != "validation loss") <= 4000
    x, y = lines["loss"]
    assert x[0] == 1
    if steps > 1:
        assert np.nanmax(y) == 9.0, "what stands out is seen"
        (name,) = [name for name in lines if name.startswith("mean of the last")]
        assert np.isfinite(lines[name][1]).all(), "a loss that is no number is left out of the means after it"
        held = lines["validation loss"]
        assert held[0].tolist() == list(range(3, steps + 1, 3))
        assert set(held[1]) == {4.5}
        np.testing.assert_allclose(scales[0], [0.0, 4.5], atol=1e-12)
    else:
        assert "validation loss" not in lines


def test_means_are_of_the_last_values():
    values = np.array([1.0, 3.0, math.nan, 5.0, 7.0, math.nan, math.nan, math.nan])
    expected = [1, 2, 2, 4, 6, 6, 7, math.nan]
    np.testing.assert_allclose(plot._means(values, 3), expected)


def train(now, forecast: Forecast, steps: range, seconds: float, **beside: tuple[int, float]) -> dict[int, str]:
    """Steps of that many seconds; after every so many of them something that takes its time. What is said, and when."""
    said = {}
    for step in steps:
        now.value += seconds
        for name, (every, takes) in beside.items():
            if step % every == 0:
                with forecast.apart(name):
                    now.value += takes
        if line := forecast.stepped(step):
            said[step] = line
    return said


def test_the_end_is_foretold_once(now):
    forecast = Forecast(0, 1000, 4096, {"checkpoint": 500})
    now.value += 60  # the first step is no measure
    said = train(now, forecast, range(1, 1001), 0.62, checkpoint=(500, 1.0))
    assert list(said) == [6]
    assert said[6].startswith("about 10 min to go (994 steps of 4,096 tokens at 6,606 tokens/s), until ")


def test_what_is_done_beside_the_steps_counts_when_it_has_been_measured(now):
    """Resumed, too: only what is left."""
    forecast = Forecast(600, 1005, 100, {"validation": 10, "sample": 100})
    said = train(now, forecast, range(601, 1006), 0.25, validation=(10, 7.5), sample=(100, 0.1))
    assert list(said) == [613], "13 steps, less the first, are 3 s"
    assert (
        "about 6 min 40 s to go (392 steps of 100 tokens at 400 tokens/s, 40 validations of 7.5 s), until" in said[613]
    )


def test_a_forecast_that_was_far_off_is_mended(now):
    forecast = Forecast(0, 1000, 100, {"validation": 100})
    said = train(now, forecast, range(1, 100), 0.5)
    assert list(said) == [7]
    said = train(now, forecast, range(100, 1001), 0.5, validation=(100, 600.0))
    assert list(said) == [100], "nobody could know how long a validation takes"
    assert said[100].startswith("now about 1 h 38 min to go (900 steps of 100 tokens at 200 tokens/s, 9 validations")
    forecast = Forecast(0, 1000, 100, {})
    first = train(now, forecast, range(1, 101), 0.5)
    assert list(first) == [7]
    assert len(train(now, forecast, range(101, 1001), 0.6)) == 0, "a little slower"
    forecast = Forecast(0, 1000, 100, {})
    train(now, forecast, range(1, 101), 0.5)
    assert 1 <= len(train(now, forecast, range(101, 1001), 3.0)) <= 4


def test_what_is_over_soon_needs_no_forecast(now):
    assert train(now, Forecast(0, 100, 10, {}), range(1, 101), 0.02) == {}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.97, "10 s"), (59.6, "1 min"), (200, "3 min 20 s"), (596, "10 min"),
     (3599, "1 h"), (7500, "2 h 5 min"), (86399, "1 d"), (90000, "1 d 1 h")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_time_of_day_has_a_date_where_it_is_another():
    noon = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    assert clock(noon, 3660) == "13:01"
    assert clock(noon, 24 * 3600) == "2026-03-05 12:00"
