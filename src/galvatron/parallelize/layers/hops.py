"""Who is in a ring, what two of its ranks see of each other, and what goes round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import group_named

from .blocks import Block, positions, seen, visible
from .documents import see_each_other


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and what two of them see of each other.

    ``chunks``: by rank, which of so many chunks a run is; ``pieces``: runs a rank has (in each half, if folded).
    """

    group: dist.ProcessGroup | None
    chunks: tuple[int, ...]
    pieces: int
    folded: bool
    causal: bool
    window: int | None
    scale: float

    @classmethod
    def of(cls, group: str, chunks: Sequence[int], *rest: Any) -> Ring:
        """From what the dispatcher can hand on; without a name, of this rank alone."""
        return cls(group_named(group) if group else None, tuple(chunks), *rest)

    @property
    def rank(self) -> int:
        """This rank's place."""
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.chunks)

    def source(self, step: int) -> int:
        """Whose keys and values are here after ``step`` hops."""
        return (self.rank - step) % self.size

    def runs(self, rank: int, tokens: int) -> list[range]:
        """The positions of ``rank``, ascending, of ``tokens`` it has."""
        width = tokens // (self.pieces * (1 + self.folded))
        shorter = width
        while self.window is not None and shorter % 2 == 0 and shorter // 2 >= self.window:
            shorter //= 2  # what a window leaves of scores is a band, computed by short runs
        indices = [piece * self.size + self.chunks[rank] for piece in range(self.pieces)]
        if self.folded:
            indices += [2 * self.pieces * self.size - 1 - index for index in reversed(indices)]
        starts = (start for index in indices for start in range(index * width, (index + 1) * width, shorter))
        return [range(start, start + shorter) for start in starts]

    def blocks(
        self, step: int, tokens: int, starts: Tensor | None, device: torch.device
    ) -> Iterator[tuple[Block, Tensor | None]]:
        """What is to be computed after ``step`` hops, every row in one block at most; masks as [..., rows, columns]."""
        queries, keys = self.runs(self.rank, tokens), self.runs(self.source(step), tokens)
        if not self.causal:
            blocks = iter([Block(slice(0, tokens), slice(0, tokens))])
        elif step == 0 and self.window is None:
            blocks = iter([Block(slice(0, tokens), slice(0, tokens), causal=True)])
        else:
            blocks = seen(queries, keys, self.window)
        for block in blocks:
            window = self.window if block.masked else None
            mask = visible(queries, keys, block, window, device) if block.masked else None
            if starts is not None:
                begin = starts[:, positions(queries, block.rows, device)]
                alike = see_each_other(begin, starts[:, positions(keys, block.columns, device)])
                mask = alike & visible(queries, keys, block, window, device) if self.causal else alike
            yield block, mask

    def pass_on(self, message: Tensor) -> Passing:
        """Send ``message`` to the next rank and receive as much from the previous one."""
        assert self.group is not None
        received = torch.empty_like(message)
        ranks = dist.get_process_group_ranks(self.group)
        after, before = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        sent = dist.P2POp(dist.isend, message, after, self.group)
        comes = dist.P2POp(dist.irecv, received, before, self.group)
        return Passing(message, received, dist.batch_isend_irecv([sent, comes]))


@dataclass(frozen=True)
class Passing:
    """A message on its way, held until it has left, and the one that takes its place."""

    sent: Tensor
    received: Tensor
    works: Sequence[dist.Work]

    def wait(self) -> Tensor:
        """What was received."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Packed:
    """Keys and values, or their gradients, in one message; [B, K, S, D] each are views of it."""

    message: Tensor
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Packed:
        """A copy of both."""
        return cls(torch.cat((key.flatten(), value.flatten())), tuple(key.shape), tuple(value.shape))

    @property
    def key(self) -> Tensor:
        """[B, K, S, D]."""
        return self.message[: self._key_elements].view(self.key_shape)

    @property
    def value(self) -> Tensor:
        """[B, K, S, D] too."""
        return self.message[self._key_elements :].view(self.value_shape)

    @property
    def _key_elements(self) -> int:
        return torch.Size(self.key_shape).numel()

    def next(self, message: Tensor) -> Packed:
        """What a message of the same shapes holds."""
        return Packed(message, self.key_shape, self.value_shape)

    def zeros(self, dtype: torch.dtype) -> Packed:
        """For their gradients."""
        return self.next(torch.zeros_like(self.message, dtype=dtype))
