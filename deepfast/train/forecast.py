"""How long a run will take, said once it is known, and again where that was far off."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator


class Forecast:
    """Measures steps, and what is done between them.

    Args:
        done: steps made before.
        total: the step after which training ends.
        tokens: of a step.
        every: after how many steps something is done beside them, by its name; and at the end.
    """

    COLD = 1  # steps that are not measured: caches and memory are filled
    SECONDS, STEPS = 3.0, 20  # of measured steps, of which one is enough to say something
    WORTH = 5.0  # seconds to go that are worth a line
    RECENT = 50  # steps that tell how long the next will take
    OFF, LEAST = 1.5, 30.0  # so many times, and seconds, wrong: that is said

    def __init__(self, done: int, total: int, tokens: int, every: dict[str, int]) -> None:
        self._total, self._tokens, self._every = total, tokens, every
        self._cold = self.COLD
        self._steps: deque[float] = deque(maxlen=self.RECENT)
        self._beside: dict[str, list[float]] = {name: [] for name in every}
        self._last, self._apart = time.monotonic(), 0.0
        self._said: tuple[float, float] | None = None  # when, and how many seconds were to go

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Within: something that is no step."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._beside[name].append(seconds)
        self._apart += seconds

    def stepped(self, step: int) -> str | None:
        """After each step, and what was done beside it. Returns what is to be said, if anything is."""
        now = time.monotonic()
        seconds, self._last, self._apart = now - self._last - self._apart, now, 0.0
        if self._cold:
            self._cold -= 1
            return None
        self._steps.append(seconds)
        if step >= self._total or not self._due(now, step):
            return None
        left = self._left(step)
        again = "" if self._said is None else "now "
        self._said = now, left
        return again + self._line(step, left)

    def _due(self, now: float, step: int) -> bool:
        if self._said is None:
            measured = sum(self._steps) >= self.SECONDS or len(self._steps) >= self.STEPS
            return measured and self._left(step) >= self.WORTH
        when, promised = self._said
        takes = now - when + self._left(step)
        wrong = max(takes / promised, promised / takes) > self.OFF if promised else True
        return wrong and abs(takes - promised) > self.LEAST

    def _left(self, step: int) -> float:
        """Seconds from here to the end, as far as things have been measured."""
        beside = sum(self._count(step, name) * _mean(spans) for name, spans in self._beside.items() if spans)
        return (self._total - step) * _mean(self._steps) + beside

    def _count(self, step: int, name: str) -> int:
        every = self._every[name]
        return self._total // every - step // every + (self._total % every > 0)

    def _line(self, step: int, left: float) -> str:
        steps, rate = self._total - step, self._tokens / max(_mean(self._steps), 1e-9)
        beside = [
            f"{self._count(step, name)} {name}s of {duration(_mean(spans))}"
            for name, spans in self._beside.items()
            if spans and self._count(step, name) * _mean(spans) > 0.05 * left
        ]
        what = ", ".join([f"{steps:,} steps of {self._tokens:,} tokens at {rate:,.0f} tokens/s", *beside])
        return f"about {duration(left)} to go ({what}), until {clock(time.time(), left)}"


def _mean(spans: list[float] | deque[float]) -> float:
    return sum(spans) / len(spans)


def duration(seconds: float) -> str:
    """In the two largest units that matter."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 595:
        minutes, rest = divmod(round(seconds / 10), 6)
        return f"{minutes} min {rest}0 s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def clock(now: float, left: float) -> str:
    """The time of day then, with the date where that is another one."""
    today, then = time.localtime(now), time.localtime(now + left)
    return time.strftime("%H:%M" if today[:3] == then[:3] else "%Y-%m-%d %H:%M", then)
