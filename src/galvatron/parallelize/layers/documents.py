"""Documents packed in rows: whom a token sees, and where in its document it stands.

Takes positions that begin at 0 with every document; gives layers what their rows hold.  Of a row of S tokens that is S
numbers: where each token's document begins; two tokens are of one document where these are equal.  Masks are made of
them, one layer's at a time; flash attention on CUDA takes the bounds of documents instead, and no mask is made.
Padding at the end of a row is a document too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..processes.collectives import of_spans
from .forward import wrap_forward


class Documents(NamedTuple):
    """Of B rows of S tokens.

    Attributes:
        starts: int32 [B, S], the position at which each token's document begins.
        bounds: int32 [documents + 1], where documents begin in all rows, one row after the other, and where the last
            ends; on CUDA alone.
        of_side: whether they are the rows of another stack, whose states queries see: those of first documents alone.
    """

    starts: Tensor
    bounds: Tensor | None
    of_side: bool = False

    def given(self, *, of_side: bool) -> Documents:
        """The same, said to be those of another stack or not."""
        return Documents(self.starts, self.bounds, of_side)


def documents_of(position_ids_BS: Tensor, device: torch.device) -> Documents:
    """The documents of rows by their positions, int64 on the CPU."""
    starts = torch.arange(position_ids_BS.shape[1]) - position_ids_BS
    return Documents(_sent(starts.int(), device), _sent(_bounds(position_ids_BS), device) if _is_cuda(device) else None)


def positions_beside_padding(attention_mask_BS: Tensor) -> Tensor:
    """Positions, int64 on the CPU, of rows whose tokens are followed by padding: both count from 0."""
    mask = attention_mask_BS.cpu().long()
    positions, lengths = torch.arange(mask.shape[1]).expand(mask.shape), mask.sum(dim=1, keepdim=True)
    return torch.where(positions < lengths, positions, positions - lengths)


def see_first(starts_BK: Tensor) -> Tensor:
    """[B, 1, 1, K]: whether a key is of its row's first document."""
    return (starts_BK == 0)[:, None, None, :]


def see_each_other(starts_BQ: Tensor, starts_BK: Tensor) -> Tensor:
    """[B, 1, Q, K]: whether a query and a key are of one document."""
    return (starts_BQ[:, :, None] == starts_BK[:, None, :]).unsqueeze(1)


def _bounds(position_ids_BS: Tensor) -> Tensor:
    """As many entries as a power of two, the last ones documents of no tokens: compiled layers see few shapes."""
    begins, total = position_ids_BS.flatten().eq(0).nonzero().flatten(), position_ids_BS.numel()
    whole = torch.full((1 << (len(begins)).bit_length(),), total)
    whole[: len(begins)] = begins
    return whole.int()


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On ``device``; from pinned memory, or the host would wait for it."""
    return values.contiguous().pin_memory().to(device, non_blocking=True) if _is_cuda(device) else values


@dataclass
class Packed:
    """The documents of the microbatch whose forward runs, by the rows that a layer sees; None where a row is one."""

    now: dict[range, Documents] | None = None


class OwnPlaces:
    """What some layers see of what a stage is told: their positions of rotary tables, their rows, their documents.

    Tables are cut once a forward, however many layers ask.
    """

    def __init__(self, rows: range, told: range, spans: tuple[range, ...] | None, packed: Packed) -> None:
        """``rows`` of a microbatch are theirs, of ``told`` the tables are; ``spans``: their positions, None: all."""
        self._rows, self._own_rows = rows, slice(rows.start - told.start, rows.stop - told.start)
        self._spans, self._packed = spans, packed
        self._whole: tuple[Tensor, ...] = ()
        self._own: tuple[Tensor, ...] = ()

    def enter(self, module: nn.Module, *, of_side: bool = False) -> None:
        """Let ``module`` see the tables [1 or rows, S, D] that it is given cut down to these places.

        ``of_side``: whether documents are those of states that it is given beside its own.
        """
        wrap_forward(module, partial(self._call, of_side))

    def _call(self, of_side: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = self._of(tables)
        if self._packed.now is not None:
            kwargs["documents"] = self._packed.now[self._rows].given(of_side=of_side)
        return forward(*args, **kwargs)

    def _of(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(tables) != len(self._whole) or any(a is not b for a, b in zip(tables, self._whole, strict=True)):
            self._whole, self._own = tables, tuple(self._part(table) for table in tables)
        return self._own

    def _part(self, table: Tensor) -> Tensor:
        rows = table if table.shape[0] == 1 else table[self._own_rows]
        if self._spans is None:
            return rows
        return torch.cat([rows[..., span.start : span.stop, :] for span in self._spans], dim=-2)


@dataclass(frozen=True)
class PackedSteps:
    """A batch's microbatches as one chunk of a model is told them: positions, and documents by rows."""

    positions: Tensor
    documents: tuple[dict[range, Documents], ...]

    @classmethod
    def of(
        cls, position_ids: Tensor, told: range, spans: tuple[range, ...], rows: set[range], device: torch.device
    ) -> PackedSteps:
        """Of ``position_ids`` [microbatches, rows, S] on the CPU: of ``told`` rows the positions of ``spans``."""
        own = of_spans(position_ids[:, told.start : told.stop], spans)
        documents = tuple(
            {own_rows: documents_of(microbatch[own_rows.start : own_rows.stop], device) for own_rows in rows}
            for microbatch in position_ids
        )
        return cls(_sent(own, device), documents)
