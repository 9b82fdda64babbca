"""Which micro-batches are tried, when enough have been, and which is the best. Figures only: nothing runs here."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

TIE = 0.03  # a difference that the next measurement may turn round
FURTHER = (
    4  # times the best micro-batch: two doublings, for one may be a size that the hardware does not like, or noise
)
FAILURES = 3  # in a row
LARGEST = 4096  # micro-batch, where the configuration's batch sets no end


@dataclasses.dataclass(frozen=True)
class Result:
    """How one trial went.

    Attributes:
        micro: sequences a forward pass, of one rank.
        accumulation: micro-batches an optimizer step, of one rank.
        outcome: ``memory`` where it ran out of it.
        step_seconds: of an optimizer step, the median; 0 where none was measured.
        steps: that were measured.
        tokens_per_s: over all ranks.
        peak: bytes, of the rank that took most.
        said: the last line of an error.
    """

    micro: int
    accumulation: int
    outcome: Literal["measured", "memory", "failed"]
    step_seconds: float = 0.0
    steps: int = 0
    tokens_per_s: float = 0.0
    peak: int = 0
    said: str = ""


def candidates(share: int | None, configured: int) -> list[int]:
    """Micro-batches to try, from small to large; the configured one is among them.

    From one to the next there is a factor of about two: less than that seldom changes the speed by more than two
    measurements differ, and so there are few, however large the batch is.

    Args:
        share: sequences that each rank contributes to an optimizer step; micro-batches divide it. None: not fixed.
    """
    if share is None:
        return sorted({configured, *(2**i for i in range(LARGEST.bit_length()))})
    small = [d for d in range(1, math.isqrt(share) + 1) if share % d == 0]
    divisors = sorted({*small, *(share // d for d in small)})
    powers = [2**i for i in range(share.bit_length())]
    near = {min(divisors, key=lambda d: abs(math.log2(d / power))) for power in powers}
    return sorted({configured, share, *near})


def _measured(results: list[Result]) -> list[Result]:
    return [result for result in results if result.outcome == "measured"]


def enough(results: list[Result]) -> str | None:
    """Why larger micro-batches than those tried, which come from small to large, need no trial; None: one does."""
    last, measured = results[-1], _measured(results)
    if last.outcome == "memory":
        return f"memory runs out at micro-batch {last.micro}"
    if len(results) >= FAILURES and all(result.outcome == "failed" for result in results[-FAILURES:]):
        return f"{FAILURES} in a row have failed"
    if not measured:
        return None
    record = measured[0]  # the last that was more than a tie with the record before it
    for result in measured:
        if result.tokens_per_s > (1 + TIE) * record.tokens_per_s:
            record = result
    if last.micro >= FURTHER * record.micro:
        return f"up to {last.micro // record.micro} times micro-batch {record.micro} nothing is faster"
    return None


def best(results: list[Result]) -> tuple[Result, str] | None:
    """The one to take, and why; None where none was measured. Of those that are as good as equal: the least memory."""
    measured = _measured(results)
    if not measured:
        return None
    fastest = max(measured, key=lambda result: result.tokens_per_s)
    equal = [result for result in measured if result.tokens_per_s >= (1 - TIE) * fastest.tokens_per_s]
    chosen = min(equal, key=lambda result: (result.peak, result.micro))
    if chosen is fastest:
        return chosen, "the fastest" if len(equal) == 1 else f"the fastest, and the least memory within {TIE:.0%} of it"
    return chosen, (
        f"within {TIE:.0%} of the fastest (micro-batch {fastest.micro}: {fastest.tokens_per_s:,.0f} tokens/s), "
        "with less memory"
    )
