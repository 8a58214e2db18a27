"""Sequences as people have them: padded batches with lengths, and with resets inside a sequence.

A sequence that begins anew at some step is several sequences. Cut at every reset and at its own end, a padded batch is
a ragged batch of more and shorter sequences, which the kernels compute without a step of padding and with more samples
at a time. Here are the cuts, and the way there and back, in torch's own operations: no gradient passes a cut.

T steps, B samples, S segments, N rows: the steps that are computed. Segments lie in order of falling length, their rows
as in a PackedSequence: all first steps, then all second ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling


@dataclass(frozen=True)
class Segments:
    """Where the rows of a padded batch (T, B, *) go.

    Attributes:
        steps, samples: T and B.
        rows: (N,) the place of each row in the batch flattened to (T*B, *).
        batch_sizes: segments that have a step t, for each t, on the CPU: what the kernels take.
        sample: (S,) the sample that a segment is a part of.
        begins, ends: (S,) whether the segment begins with the sample's initial state, and whether it is its last.
        first, last: (B,) the sample's first and last segment; any for a sample without a step.
        empty: (B,) samples without a step, or None if there are none.
        uncut: whether every segment begins and ends with its sample.
    """

    steps: int
    samples: int
    rows: Tensor
    batch_sizes: Tensor
    sample: Tensor
    begins: Tensor
    ends: Tensor
    first: Tensor
    last: Tensor
    empty: Tensor | None
    uncut: bool

    @property
    def whole(self) -> bool:
        """Whether nothing was cut: every sample has every step and its own initial state."""
        return self.uncut and len(self.sample) == self.samples and len(self.rows) == self.steps * self.samples

    def gather(self, x: Tensor) -> Tensor:
        """The rows of x (T, B, *): (N, *); without any, (1, 0, *), a batch of no sample."""
        if not is_compiling() and len(self.rows) == 0:
            return x[:1, :0]
        return x.flatten(0, 1).index_select(0, self.rows)

    def scatter(self, y: Tensor) -> Tensor:
        """(N, *), as the kernels give them, back to (T, B, *), zero where there is no row."""
        y = y.reshape(-1, y.size(-1))
        found = y.new_zeros(self.steps * self.samples, y.size(-1)).index_copy(0, self.rows, y)
        # (Not unflatten, which Dynamo does not trace where torch has another default device.)
        return found.view(self.steps, self.samples, y.size(-1))

    def initial(self, state: Tensor | None, directions: int) -> Tensor | None:
        """The initial states of the segments (L*D, S, *) from those of the samples (L*D, B, *)."""
        if state is None:
            return None
        taken = state.index_select(1, self.sample)
        if self.uncut:
            return taken
        own = torch.stack([self.begins, self.ends][:directions]).repeat(state.size(0) // directions, 1)
        return torch.where(own.unsqueeze(2), taken, 0)

    def final(self, state: Tensor, before: Tensor | None, directions: int) -> Tensor:
        """The final states of the samples from those of the segments; ``before``: the samples' initial ones."""
        if not is_compiling() and len(self.sample) == 0:
            nothing = state.new_zeros(state.size(0), self.samples, state.size(2))
            found = torch.cat([state, nothing], dim=1)  # which autograd knows
        else:
            by_direction = state.view(state.size(0) // directions, directions, *state.shape[1:]).unbind(1)
            ends = (self.last, self.first)
            found = torch.stack([s.index_select(1, end) for s, end in zip(by_direction, ends)], dim=1).flatten(0, 1)
        if self.empty is None:
            return found
        return torch.where(self.empty.unsqueeze(1), 0 if before is None else before, found)


def cut(
    lengths: Tensor | Sequence[int] | None, reset: Tensor | None, steps: int, samples: int, device: torch.device
) -> Segments:
    """The segments of a batch (T, B, *) on ``device``.

    Args:
        lengths: (B,) integers from 0 to T, on any device; None: T each.
        reset: (T, B) boolean, on any device, true where a sample begins anew *before* the step; None: nowhere.
            Marks beyond the end of a sample have no meaning.

    Raises:
        TypeError, ValueError: another dtype or shape, a length out of range.
    """
    if is_compiling():
        return _traced(lengths, reset, steps, samples, device)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    ends = torch.full((samples,), steps, device="cpu") if lengths is None else _checked_lengths(lengths, steps, samples)
    marks = torch.zeros(samples, steps, dtype=torch.bool, device="cpu")
    if reset is not None:
        marks = _checked_reset(reset, steps, samples).t().clone(memory_format=torch.contiguous_format)
    cut_at_start = marks[:, 0].clone()
    marks[:, 0] = True
    marks &= torch.arange(steps, device="cpu") < ends.unsqueeze(1)
    sample, start = marks.nonzero().unbind(1)  # by sample, then by time
    same = sample[1:] == sample[:-1]
    stop = ends[sample]
    stop[:-1][same] = start[1:][same]
    order = torch.argsort(stop - start, descending=True, stable=True)
    sample, start, stop = sample[order], start[order], stop[order]
    length, begins = stop - start, (start == 0) & ~cut_at_start[sample]
    first, last = (torch.zeros(samples, dtype=torch.long, device="cpu") for _ in range(2))
    number = torch.arange(len(sample), device="cpu")
    first[sample[start == 0]] = number[start == 0]
    is_last = stop == ends[sample]
    last[sample[is_last]] = number[is_last]

    batch_sizes = torch.bincount(length, minlength=1)[1:].flip(0).cumsum(0).flip(0)
    offset = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
    segment = torch.repeat_interleave(number, length)
    step = torch.arange(len(segment), device="cpu") - torch.repeat_interleave(length.cumsum(0) - length, length)
    rows = torch.empty_like(segment)
    rows[offset[step] + segment] = (start[segment] + step) * samples + sample[segment]
    empty = ends == 0
    return Segments(
        steps,
        samples,
        rows.to(device),
        batch_sizes,
        *(t.to(device) for t in (sample, begins, is_last, first, last)),
        empty.to(device) if bool(empty.any()) else None,
        bool(begins.all()) and bool(is_last.all()),
    )


@torch.library.custom_op("fusedrnn::cut", mutates_args=())
def _cut(lengths: Tensor | None, reset: Tensor | None, steps: int, samples: int, device: torch.device) -> list[Tensor]:
    """:func:`cut` as one node of a compiled graph: its tensors, with ``empty`` in any case."""
    found = cut(lengths, reset, steps, samples, device)
    if len(found.rows) == 0:
        raise ValueError("a compiled layer needs a sample with a step: all lengths are 0")
    empty = torch.zeros(samples, dtype=torch.bool, device=device) if found.empty is None else found.empty
    return [found.rows, found.batch_sizes, found.sample, found.begins, found.ends, found.first, found.last, empty]


@_cut.register_fake
def _(lengths: Tensor | None, reset: Tensor | None, steps: int, samples: int, device: torch.device) -> list[Tensor]:
    rows, segments, longest = (torch.library.get_ctx().new_dynamic_size(min=1) for _ in range(3))

    def some(size: int, dtype: torch.dtype = torch.long, device: torch.device | str = device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return [
        some(rows), some(longest, device="cpu"), some(segments), *(some(segments, torch.bool) for _ in range(2)),
        *(some(samples) for _ in range(2)), some(samples, torch.bool),
    ]  # fmt: skip


def _traced(
    lengths: Tensor | Sequence[int] | None, reset: Tensor | None, steps: int, samples: int, device: torch.device
) -> Segments:
    """What a compiler sees of :func:`cut`: how many rows and segments there are is known when it runs."""
    lengths = lengths if lengths is None or isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    rows, batch_sizes, sample, begins, ends, first, last, empty = _cut(lengths, reset, steps, samples, device)
    return Segments(steps, samples, rows, batch_sizes, sample, begins, ends, first, last, empty, uncut=False)


def _checked_lengths(lengths: Tensor | Sequence[int], steps: int, samples: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.long, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"lengths must be integers, one for each sample, got {lengths!r}") from error
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (samples,):
        raise ValueError(f"lengths must have shape {[samples]}, a length for each sample, got {list(lengths.shape)}")
    lengths = _on_the_host("lengths", lengths).long()
    if samples and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"lengths must be from 0 to T = {steps}, got {int(lengths.min())} to {int(lengths.max())}")
    return lengths


def _checked_reset(reset: Tensor, steps: int, samples: int) -> Tensor:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        found = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset must be a boolean tensor, got {found}")
    if reset.shape != (steps, samples):
        raise ValueError(f"reset must have shape {[steps, samples]}, a mark for each step, got {list(reset.shape)}")
    return _on_the_host("reset", reset)


def _on_the_host(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, which say what is computed: got a tensor on the meta device")
    return tensor.detach().cpu()
