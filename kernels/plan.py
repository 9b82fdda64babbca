"""What an optimizer's steps have in common: its parameters and their state, looked at once and kept."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepfast import graphs
from deepfast.reference import GROUPED, KEPT, RESET, Range, check_distinct, detach, mark

from . import norms, refresh, statistics, step
from .checks import (
    check_count,
    check_device,
    check_dtype,
    check_grouped,
    check_master,
    check_moment,
    check_question,
    check_values,
    is_plain,
    require,
    written,
)
from .formulas import RULES
from .order import ElementOrder
from .table import Span, Stream, Table, span_of, upload


@dataclasses.dataclass
class Entry:
    """A parameter, its state (weak: who moves it away wants its memory back), and what was last found of both."""

    param: Tensor
    dtype: torch.dtype
    group: int
    known: int | None  # writes to the parameter when its master was last right
    address: int
    master: weakref.ref[Tensor] | None
    step: weakref.ref[Tensor] | None
    moments: list[weakref.ref[Tensor]]
    whole: Tensor | None = None  # the DTensor that the parameter is this rank's shard of
    chance: tuple[int, int] = (0, 0)  # seed and first element
    stochastic: bool = False  # how the weight is rounded
    seen: list[Any] | None = None  # where all of it lay, gradient included, when `span` was made of it
    span: Span | None = None

    def writes(self) -> int:
        return mark(self.param)[0] + (0 if self.whole is None else self.whole._version)

    def state(self) -> list[Tensor]:
        """Step count and master, where there are any, and moments."""
        tensors = [ref() for ref in (self.step, self.master, *self.moments) if ref is not None]
        require(all(t is not None for t in tensors), "a tensor of the optimizer's state is gone")
        return [t for t in tensors if t is not None]


class Plan:
    """:class:`deepfast.reference.Plan` on Triton's kernels, and the twin of ``csrc/bindings/plan.h``.

    Each step only the gradients are new: where nothing has moved since the last one, nothing is sent to the device but
    hyperparameters that have changed. Nothing is ever read back.

    Args:
        rule: a key of ``formulas.RULES``.
        params: n tensors of fp32, fp16 or bf16 on one device, in any layout.
        masters: n tensors, fp32, or int16 where they are split; an empty one where there is none.
        moments: fp32, fp16, bf16 or in 8 bits (``csrc/codec/int8.h``), as many times n as the rule keeps, all first
            moments first.
        steps: n tensors of one fp32 value, or none where neither the rule counts nor chance is asked for.
        groups: int32 [n] on the CPU, each parameter's row of hyperparameters.

    Raises:
        RuntimeError: for tensors that do not fit, in every method before anything is written.
    """

    STALE = -1

    def __init__(
        self,
        rule: str,
        params: Sequence[Tensor],
        masters: Sequence[Tensor],
        moments: Sequence[Tensor],
        steps: Sequence[Tensor],
        groups: Tensor,
    ) -> None:
        require(rule in RULES, f"the kernels have no rule named '{rule}'")
        self._name, self._rule, count = rule, RULES[rule], len(params)
        check_count(masters, count, "masters")
        check_count(moments, count * self._rule.moments, "moments")
        check_count(steps, count if self._rule.counts_steps or steps else 0, "step counts")
        require(
            groups.dtype == torch.int32 and groups.is_contiguous() and groups.numel() == count,
            "groups must be one int32 a parameter",
        )
        self._device = params[0].device if count else _home()
        self._entries = [
            Entry(
                param,
                check_dtype(param, "a parameter"),
                group,
                None,
                mark(param)[1],
                weakref.ref(masters[i]) if masters[i].numel() else None,
                weakref.ref(steps[i]) if steps else None,
                [weakref.ref(moment) for moment in moments[i::count]],
            )
            for i, (param, group) in enumerate(zip(params, groups.tolist(), strict=True))
        ]
        self._active: list[tuple[Entry, Tensor]] = []
        self._stepped: list[Entry] = []  # in the last step
        self._spans: list[Span] = []
        self._order = ElementOrder(self._device)
        self._after = KEPT
        self._table: Table | None = None  # of this step,
        self._last_table: Table | None = None  # and of the last one
        self._last_groups: tuple[list[int], Tensor] | None = None
        self._sinks: Tensor | None = None
        self._stream = 0  # on which both were made

    def needs_norms(self) -> bool:
        return self._rule.direction is not None

    def gather(self, grads: Sequence[Tensor | None], after: int) -> int:
        """Finds the gradients (each parameter's own, unless they are given) and returns how many there are.

        ``STALE`` where a parameter has changed its type or its place, or a gradient is none that the kernels take.
        """
        self._release()
        self._after, self._stepped = after, []
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        if stream != self._stream:  # their memory may be given to others as soon as that stream has done with it
            self._stream, self._last_table, self._last_groups = stream, None, None
        if grads:
            check_count(grads, len(self._entries), "gradients")
        try:
            written = []  # past their masters
            for i, entry in enumerate(self._entries):
                grad = grads[i] if grads else entry.param.grad
                if self._is_stale(entry, grad):
                    self._release()
                    return self.STALE
                if grad is not None:
                    self._active.append((entry, grad))
                    self._spans.append(self._span(entry, grad))
                    if entry.master is not None and entry.writes() != entry.known:
                        written.append(self._spans[-1])
            if after != KEPT:
                check_distinct(self._ranges())
            if written:
                refresh.refresh(Table(written, self._device))
        except BaseException:
            self._release()
            raise
        return len(self._active)

    def _is_stale(self, entry: Entry, grad: Tensor | None) -> bool:
        param = entry.param
        if param.device != self._device or param.dtype != entry.dtype or mark(param)[1] != entry.address:
            return True
        if grad is not None and entry.seen is not None and entry.seen[0][2] != param.stride():
            return True  # its state is laid anew
        return grad is not None and not is_plain(grad, self._device)

    def _span(self, entry: Entry, grad: Tensor) -> Span:
        """The last one, unless something has moved."""
        state = entry.state()
        seen = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (entry.param, grad, *state)]
        if entry.span is None or seen != entry.seen:
            copies = self._order.copies
            entry.span = self._look(entry, grad, state)
            entry.seen = seen if self._order.copies == copies else None
        return entry.span

    def _look(self, entry: Entry, grad: Tensor, state: list[Tensor]) -> Span:
        """Everything checked, and brought into one element order."""
        order, param = self._order, entry.param
        forms = [check_moment(t) for t in state[len(state) - self._rule.moments :]]
        require(entry.step is not None or GROUPED.isdisjoint(forms), "moments in 8 bits need step counts")
        order.follow(param)
        address = order.write(param, "a parameter")
        at_step = 0
        if entry.step is not None:
            count, *state = state
            check_values(count, 1, "a step count", self._device)
            at_step = count.data_ptr()
        master: Stream | None = None
        if entry.master is not None:
            kept, *state = state
            form = check_master(kept, entry.dtype)
            master = order.write(kept, "a master"), form
        moments = []
        for t, form in zip(state, forms, strict=True):
            if form in GROUPED:
                check_grouped(t, param.numel(), self._device)
            moments.append((t.data_ptr() if form in GROUPED else order.write(t, "a moment"), form))
        at_grad = order.write(grad, "a gradient") if self._after != KEPT else order.read(grad, "a gradient")
        return span_of(
            (address, entry.dtype),
            (at_grad, grad.dtype),
            param.numel(),
            master,
            moments,
            at_step,
            entry.group,
            entry.chance,
            entry.stochastic,
        )

    def by_chance(self, seeds: Sequence[int], first: Sequence[int], weights: bool) -> None:
        """Of what is rounded by chance (``csrc/codec/noise.h``): moments in 8 bits; step counts are needed.

        Args:
            seeds: each parameter's.
            first: where in the whole parameter its first element is.
            weights: those without a master are rounded so, too, from now on.
        """
        check_count(seeds, len(self._entries), "seeds")
        check_count(first, len(self._entries), "places")
        for entry, seed, place in zip(self._entries, seeds, first, strict=True):
            require(entry.step is not None, "rounding by chance needs step counts")
            entry.chance, entry.stochastic, entry.span = (seed, place), weights, None

    def shards_of(self, wholes: Sequence[Tensor]) -> None:
        """The parameters are this rank's shards of these DTensors, to which all writes count, too."""
        check_count(wholes, len(self._entries), "DTensors")
        for entry, whole in zip(self._entries, wholes, strict=True):
            entry.whole = whole

    def send_to(self, displacements: list[int]) -> None:
        """From now on steps write each new weight so many bytes further on, too: where other ranks have theirs."""
        self._sinks = upload(displacements, self._device)

    def gradient_memory(self) -> list[int]:
        """Of what ``gather`` has found: where each gradient begins and ends."""
        return [at for begin, end in self._ranges() for at in (begin, end)]

    def _ranges(self) -> list[Range]:
        return [(s.grad, s.grad + s.numel * s.kind.grad.itemsize) for s in self._spans]

    def trust(self) -> None:
        """The masters are as they are to be, whatever their weights are now."""
        for entry in self._entries:
            entry.known = entry.writes()

    def refresh(self) -> None:
        """Masters take over what has been written to their weights, by whoever."""
        if written := [span for span in self._spans if span.master]:
            refresh.refresh(Table(written, self._device))

    def settle(self) -> None:
        """What has been written to the parameters so far is known to their masters."""
        for entry in self._stepped:
            entry.known = entry.writes()

    def _release(self) -> None:
        self._active, self._spans = [], []
        self._order, self._table = ElementOrder(self._device), None

    def _on_device(self) -> Table:
        """This step's table: the last one where all lies as before."""
        if self._table is None:
            if graphs.capturing(self._device):  # a graph gets its own, made in it, that no other step knows of
                self._table = Table(self._spans, self._device)
            elif self._last_table is not None and self._last_table.spans == self._spans:
                self._table = self._last_table
            else:
                self._table = self._last_table = Table(self._spans, self._device, self._last_table)
        return self._table

    def _groups(self, hyper: Tensor, lrs: Sequence[Tensor | None]) -> Tensor:
        """int64 [groups, hyper + 2] on the device: the bits of ``hyper``, address and size of a tensor lr."""
        rows = hyper.view(torch.int64).tolist()
        for row, lr in zip(rows, lrs or [None] * len(rows), strict=True):
            row += (0, 0) if lr is None else (lr.data_ptr(), lr.element_size())
        flat = [value for row in rows for value in row]
        if graphs.capturing(self._device):
            return upload(flat, self._device)
        if self._last_groups is None or self._last_groups[0] != flat:
            self._last_groups = flat, upload(flat, self._device)
        return self._last_groups[1]

    def statistics(self) -> Tensor:
        """fp64 [2]: sum of squares of all gradients, and > 0 where one of them is not finite."""
        return statistics.statistics(self._on_device())

    def decide(
        self, record: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float, check: bool
    ) -> None:
        """``statistics``, and the record that follows from them: see :func:`deepfast.reference.decide_`."""
        check_values(record, 3, "the record", self._device)
        check_question(grad_scale, found_inf, self._device)
        statistics.decide_from_gradients(record, self._on_device(), grad_scale, found_inf, max_norm, check)
        written([record])

    def norms(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor) -> Tensor:
        """fp64 [gradients, 2]: the sums of squares that ``step`` needs. Moves the moments on."""
        require(self.needs_norms(), f"'{self._name}' needs no norms")
        self._check(hyper, lrs, record)
        return norms.norms(self._rule, self._on_device(), self._groups(hyper, lrs), record)

    def step(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor, norms: Tensor | None) -> None:
        """One step over all parameters that have a gradient; the arguments are the reference's."""
        self._check(hyper, lrs, record)
        if self.needs_norms():
            if norms is None:
                raise RuntimeError(f"deepfast: '{self._name}' needs norms")
            check_values(norms, 2 * len(self._spans), "the norms", self._device, torch.float64)
        else:
            norms = None
        groups = self._groups(hyper, lrs)
        step.step(self._rule, self._on_device(), groups, record, norms, self._after, self._sinks)
        self._order.write_back()
        written([entry.param for entry, _ in self._active])
        written([entry.whole for entry, _ in self._active if entry.whole is not None])
        if self._after != KEPT:
            written([grad for _, grad in self._active])
        if self._after == RESET:
            detach([grad for _, grad in self._active])
        self._stepped = [entry for entry, _ in self._active]
        self.settle()
        self._release()

    def _check(self, hyper: Tensor, lrs: Sequence[Tensor | None], record: Tensor) -> None:
        require(
            hyper.dtype == torch.float64 and hyper.dim() == 2 and hyper.is_contiguous() and hyper.device.type == "cpu",
            "hyper must be a contiguous float64 matrix",
        )
        rows, columns = hyper.shape
        require(columns == self._rule.hyper, f"'{self._name}' takes {self._rule.hyper} hyperparameters, got {columns}")
        for span in self._spans:
            require(0 <= span.group < rows, f"group {span.group} of {rows}")
        if lrs:
            check_count(lrs, rows, "learning rates")
        for lr in lrs:
            if lr is not None:
                require(
                    lr.numel() == 1 and lr.dtype in (torch.float32, torch.float64),
                    "a learning rate must be one float32 or float64 value",
                )
                check_device(lr, self._device, "a learning rate")
        check_values(record, 3, "the record", self._device)


def _home() -> torch.device:
    """Where the sums over no parameter at all lie."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
