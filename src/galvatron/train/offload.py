"""AdamW with moments in host memory: slice by slice they come to the device, are updated and go back.

On CUDA host memory is pinned, and copies of either direction run on a stream of their own: one slice comes while the
one before it is updated and the one before that goes.  On a CPU, which has one memory, the same copies run in turn.
Elements are updated by the same kernel as those whose moments stay, so they come out the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as update_by_adamw

from galvatron.plan.offload import SLICE_ELEMENTS, SLOTS

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """A run of a parameter's elements, and where the slice has them."""

    parameter: nn.Parameter
    start: int
    stop: int
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.start : self.stop]

    def in_slot(self, slot: Tensor) -> Tensor:
        return slot[:, self.at : self.at + self.stop - self.start]


@dataclass(frozen=True)
class _Slice:
    group: int
    pieces: tuple[_Piece, ...]

    @property
    def elements(self) -> int:
        last = self.pieces[-1]
        return last.at + last.stop - last.start


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that keeps the moments of some parameters in host memory.

    ``state`` is that of AdamW, so checkpoints are too.  What is ``hosted`` has moments from the start.
    """

    def __init__(self, groups: list[dict[str, Any]], hosted: Mapping[nn.Parameter, str], **options: Any) -> None:
        """``hosted``: parameters with the unit that each travels with; ``options``: those of AdamW."""
        super().__init__(groups, **options)
        self.hosted = dict(hosted)
        self._slices = [s for index in range(len(self.param_groups)) for s in self._sliced(index)]
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        for parameter in self.hosted:
            pinned = parameter.is_cuda
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{name: torch.zeros(parameter.shape, pin_memory=pinned) for name in MOMENTS},
            }

    def _sliced(self, group: int) -> Iterator[_Slice]:
        own = [p for p in self.param_groups[group]["params"] if p in self.hosted]
        for _, members in itertools.groupby(own, key=self.hosted.__getitem__):
            pieces: list[_Piece] = []
            for parameter in members:
                start = 0
                while start < parameter.numel():
                    at = pieces[-1].at + pieces[-1].stop - pieces[-1].start if pieces else 0
                    stop = min(parameter.numel(), start + SLICE_ELEMENTS - at)
                    pieces.append(_Piece(parameter, start, stop, at))
                    start = stop
                    if at + stop - pieces[-1].start == SLICE_ELEMENTS:
                        yield _Slice(group, tuple(pieces))
                        pieces = []
            if pieces:
                yield _Slice(group, tuple(pieces))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW's update of what has a gradient; ``grad_scale`` and ``found_inf`` count as for any fused optimizer."""
        assert closure is None
        gradients = {p: p.grad for p in self.hosted if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self._update(gradients)
        skipped = getattr(self, "found_inf", None)
        for parameter in gradients:
            self.state[parameter]["step"] += 1.0 if skipped is None else 1.0 - skipped

    def _update(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Every slice of what has ``gradients``: its moments come, all of it is updated, they go back."""
        given = (replace(s, pieces=tuple(p for p in s.pieces if p.parameter in gradients)) for s in self._slices)
        slices = [own for own in given if own.pieces]
        if not slices:
            return
        device = slices[0].pieces[0].parameter.device
        most = max(own.elements for own in slices)
        slots = [torch.empty(len(MOMENTS), most, device=device) for _ in range(min(SLOTS, len(slices)))]
        comes, used, goes = self._three_streams(device)
        _wait(comes, _mark(used))
        left: dict[int, torch.cuda.Event | None] = {}
        for index, own in enumerate(slices):
            at = index % len(slots)
            with _on(comes):
                _wait(comes, left.get(at))
                for piece, moments in self._moments(own):
                    for mine, slot in zip(moments, piece.in_slot(slots[at]), strict=True):
                        slot.copy_(mine, non_blocking=True)
            _wait(used, _mark(comes))
            self._update_slice(own, slots[at], gradients)
            with _on(goes):
                _wait(goes, _mark(used))
                for piece, moments in self._moments(own):
                    for mine, slot in zip(moments, piece.in_slot(slots[at]), strict=True):
                        mine.copy_(slot, non_blocking=True)
            left[at] = _mark(goes)
        # slots are free for others, and moments for the next update, when all have gone
        _wait(used, _mark(goes))

    def _three_streams(self, device: torch.device) -> tuple[torch.cuda.Stream | None, ...]:
        if device.type != "cuda":
            return None, None, None
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[0], torch.cuda.current_stream(device), self._streams[1]

    def _moments(self, own: _Slice) -> Iterator[tuple[_Piece, list[Tensor]]]:
        for piece in own.pieces:
            yield piece, [piece.of(self.state[piece.parameter][name]) for name in MOMENTS]

    def _update_slice(self, own: _Slice, slot: Tensor, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        group = self.param_groups[own.group]
        beta1, beta2 = group["betas"]
        update_by_adamw(
            [piece.of(piece.parameter.detach()) for piece in own.pieces],
            [gradients[piece.parameter].reshape(-1)[piece.start : piece.stop] for piece in own.pieces],
            [piece.in_slot(slot)[0] for piece in own.pieces],
            [piece.in_slot(slot)[1] for piece in own.pieces],
            [],
            [self.state[piece.parameter]["step"].clone() for piece in own.pieces],  # which each would count up
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def host_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The moments that ``optimizer`` has in host memory."""
    for parameter in optimizer.hosted if isinstance(optimizer, OffloadedAdamW) else ():
        yield from (optimizer.state[parameter][name] for name in MOMENTS)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
