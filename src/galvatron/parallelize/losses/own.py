"""A user's own loss on the logits of a vocabulary cut along tp: each rank computes it for some of the tokens.

The tp ranks hold their rows' logits of the same tokens.  One all-to-all gives each of them whole logits of its part
of these tokens, no more elements than before; the share of the loss that it then has is of those tokens alone.

T tokens (batch x sequence), V vocabulary rows, of this rank or whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron.core.errors import ConfigError

from ..processes.collectives import AxisGroup, exchange
from .fused import IGNORED, LossTerms

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(float32 logits [tokens, vocabulary], int64 labels [tokens]) → losses [tokens], each of its own token alone."""


def own_loss_share(
    loss_fn: LossFunction, logits_TV: Tensor, labels_T: Tensor, vocabulary_size: int, weight: float, tp: AxisGroup
) -> Tensor:
    """This rank's share of ``weight`` x the summed losses of the counted tokens, a float32 scalar.

    Shares add up to the loss over the tp ranks, which divide T.  ``loss_fn`` sees counted tokens only.
    """
    whole_TV = _whole_rows(logits_TV, vocabulary_size, tp)
    own_T = labels_T.unflatten(0, (tp.size, -1))[tp.rank]
    counted = own_T != IGNORED
    logits = whole_TV[counted].float()
    if len(logits) == 0:
        return logits.sum()  # zero, and part of the graph: the other ranks wait for its backward
    return loss_fn(logits, own_T[counted]).sum() * weight


def check_loss(loss_fn: LossFunction, vocabulary_size: int, device: torch.device) -> None:
    """Try ``loss_fn`` on two tokens; raises ConfigError unless it gives each a loss that depends on its logits."""
    logits = torch.zeros(2, vocabulary_size, device=device, requires_grad=True)
    with torch.enable_grad():
        losses = loss_fn(logits, torch.zeros(2, dtype=torch.int64, device=device))
    if not isinstance(losses, Tensor) or losses.shape != (2,):
        given = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"loss_fn must return one loss a token, shape [2] for two tokens, but returned {given}; leave out its mean "
            "or sum (reduction='none'): the mean over all counted tokens, on whatever rank, is taken afterwards"
        )
    if not losses.requires_grad:
        raise ConfigError("loss_fn must return losses with a gradient to the logits; compute them by torch alone")
    if others := [leaf for leaf in _leaves(losses) if leaf is not logits]:
        raise ConfigError(
            f"loss_fn has parameters of its own (the first is {list(others[0].shape)}), of whose gradients each rank "
            "would have a part; detach them, or let them not require a gradient"
        )


def terms_of(loss_fn: LossFunction | None, label_smoothing: float, z_loss: float) -> LossTerms:
    """What cross entropy is made of; raises ConfigError for what it cannot be, or where ``loss_fn`` takes its place."""
    if not (0.0 <= label_smoothing < 1.0 and 0.0 <= z_loss < math.inf):
        raise ConfigError(
            f"label_smoothing={label_smoothing} must be from 0 to below 1 and z_loss={z_loss} not negative; choose 0.1 "
            "and 1e-4, as is usual"
        )
    if loss_fn is not None and (label_smoothing or z_loss):
        raise ConfigError(
            f"label_smoothing={label_smoothing} and z_loss={z_loss} are terms of cross entropy, which loss_fn "
            "replaces; let loss_fn add them, or leave it out"
        )
    return LossTerms(label_smoothing=label_smoothing, z_loss=z_loss)


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """What a backward from ``result`` would leave gradients at."""
    waiting, seen = [result.grad_fn], set[object]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def _whole_rows(logits_TV: Tensor, vocabulary_size: int, tp: AxisGroup) -> Tensor:
    """[T, V of this rank] → [T/tp, whole V]."""
    if tp.size == 1:
        return logits_TV
    columns = math.ceil(vocabulary_size / tp.size)  # as core.model.Cut deals them: the last ranks may have fewer
    padded = F.pad(logits_TV, (0, columns - logits_TV.shape[-1]))
    received = exchange(padded.unflatten(0, (tp.size, -1)), tp)
    return received.transpose(0, 1).flatten(1)[:, :vocabulary_size]
