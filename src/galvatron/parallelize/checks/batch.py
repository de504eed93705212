"""What a batch must be, checked before anything is sent: the plan's shape, int64, ids that the vocabulary has.

Rows may be padded behind their tokens, where no label counts.

Every rank is given the whole global batch and takes its own rows of it.  That all were given the same is checked
now and then, by one reduction of two numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galvatron.core.errors import DataError
from galvatron.models.grids import GRIDS, PIXELS, Grids

from ..losses.fused import IGNORED
from .agreement import disagreement

AGREEMENT_EVERY = 100
"""Every how many batches the ranks compare theirs, from the first on.  [Empirical: November 2026, one CPU thread:
64 x 2,048 tokens take 1.0 ms to check and 1.0 ms more to compare, beside one reduction of 16 bytes.]"""


WORDS = "use the model's own tokenizer, or a model with as many rows"


class BatchCheck:
    """Checks one batch after another against a plan's shape and a vocabulary."""

    def __init__(
        self, shape: tuple[int, int], vocab_size: int, *, num_classes: int | None = None, grids: Grids | None = None
    ) -> None:
        """Batches have ``shape`` [global_batch_size, seq_len]; labels are of tokens, or ``num_classes`` of samples.

        ``grids``: how the model takes images, where these are patches.
        """
        self._grids = grids
        self.shape, self.vocab_size, self._of_tokens = shape, vocab_size, num_classes is None
        self._num_labels = vocab_size if num_classes is None else num_classes
        self._num_seen = 0

    def weight(
        self, inputs: Mapping[str, Tensor], labels: Tensor, *, num_tokens: int | None = None, accumulate: bool = False
    ) -> float:
        """What a counted token's loss is multiplied by, after all checks: 1 / ``num_tokens``, or the mean's if None.

        Raises:
            DataError: on all ranks alike where they compare their batches; otherwise where a batch breaks a rule.
        """
        given = {**inputs, "labels": labels}
        host = {name: values.cpu() if isinstance(values, Tensor) else values for name, values in given.items()}
        problem = next(filter(None, (self._problem(name, values) for name, values in host.items())), None)
        if not problem and self._grids is not None:
            problem = self._grids.problem(host)
        problem = problem or _padded_label(host)
        counted = 0 if problem else int((host["labels"] != IGNORED).sum())
        problem = problem or _uncounted(counted, num_tokens)
        if self._num_seen % AGREEMENT_EVERY == 0:
            settings = zlib.crc32(f"{num_tokens} {accumulate} {problem}".encode())
            found = disagreement({"batch": settings if problem else _digest(settings, *host.values())})
            if found is not None:
                raise DataError(
                    "every rank must be given the same global batch and settings, but those of rank "
                    f"{', '.join(map(str, found[1]))} differ from those of rank 0; give each rank all {self.shape[0]} "
                    "sequences in one order (no DistributedSampler, no shuffling by rank): it takes its own rows"
                )
        if problem:
            raise DataError(problem)
        self._num_seen += 1
        return 1.0 / (num_tokens or counted)

    def _problem(self, name: str, values: Any) -> str | None:
        """The rule that an input or the labels break, as a sentence; None if they break none."""
        if not isinstance(values, Tensor):
            return f"{name} must be a tensor, got {type(values).__name__}; make one with torch.tensor"
        if name not in ("input_ids", "labels", "position_ids", "attention_mask"):
            return self._other_problem(name, values)
        if name == "attention_mask" and values.dtype == torch.bool:
            values = values.long()
        if values.dtype != torch.int64:
            return f"{name} must be int64, got {str(values.dtype).removeprefix('torch.')}; convert with .long()"
        shape = self.shape[:1] if name == "labels" and not self._of_tokens else self.shape
        if tuple(values.shape) != shape:
            return (
                f"a batch must have the plan's shape {list(shape)} on every rank, got {name} of {list(values.shape)}; "
                f"give {'global_batch_size x seq_len tokens' if len(shape) > 1 else 'global_batch_size classes'}, not "
                "one rank's share of them"
            )
        if name == "position_ids":
            return _out_of_order(values)
        if name == "attention_mask":
            return _before_its_tokens(values)
        if name == "input_ids":
            return _outside(name, values, values, self.vocab_size, "ids", WORDS)
        known = torch.where(values == IGNORED, 0, values)
        what, remedy = ("ids", WORDS) if self._of_tokens else ("classes", "give a model with as many")
        marked = f"{remedy}; mark what does not count by {IGNORED}"
        return _outside(name, values, known, self._num_labels, what, marked)

    def _other_problem(self, name: str, values: Tensor) -> str | None:
        if self._grids is not None and name in (PIXELS, GRIDS):
            return None
        if values.dim() and values.shape[0] == self.shape[0]:
            return None
        return f"{name} must have {self.shape[0]} rows, the plan's global_batch_size, got {list(values.shape)}"


def _outside(name: str, given: Tensor, ids: Tensor, count: int, what: str, remedy: str) -> str | None:
    lowest, highest = map(int, torch.aminmax(ids))
    if lowest >= 0 and highest < count:
        return None
    at = ((ids < 0) | (ids >= count)).nonzero()[0].tolist()
    return (
        f"{name}[{', '.join(map(str, at))}]={int(given[tuple(at)])} is not among the model's {count} {what} "
        f"(0 to {count - 1}); {remedy}"
    )


def _out_of_order(position_ids: Tensor) -> str | None:
    follows = torch.cat((torch.zeros_like(position_ids[:, :1]), position_ids[:, :-1] + 1), dim=1)
    wrong = ((position_ids != 0) & (position_ids != follows)).nonzero()
    if not len(wrong):
        return None
    row, position = wrong[0].tolist()
    return (
        f"position_ids[{row}, {position}]={int(position_ids[row, position])} must be 0, where a document begins, or "
        f"{int(follows[row, position])}; count through each document of a row, and its padding, from 0"
    )


def _before_its_tokens(mask: Tensor) -> str | None:
    """That a row of an ``attention_mask`` is anything but ones and then zeros."""
    falls = torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1).diff(dim=1)
    wrong = (((mask != 0) & (mask != 1)) | (falls > 0)).nonzero().tolist() or (mask[:, :1] != 1).nonzero().tolist()
    if not wrong:
        return None
    row, position = wrong[0]
    return (
        f"attention_mask[{row}, {position}]={int(mask[row, position])} does not fit: a row is ones for its tokens, one "
        "or more, and then zeros for its padding; pad on the right"
    )


def _padded_label(batch: Mapping[str, Tensor]) -> str | None:
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if mask is None or labels.shape != mask.shape or "decoder_input_ids" in batch:  # of which the mask says nothing
        return None
    wrong = ((mask == 0) & (labels != IGNORED)).nonzero().tolist()
    if not wrong:
        return None
    row, position = wrong[0]
    return f"labels[{row}, {position}] counts, but attention_mask says padding; mark labels of padding by {IGNORED}"


def _uncounted(counted: int, num_tokens: int | None) -> str | None:
    if num_tokens is None and counted == 0:
        return f"no label of the batch counts, all are {IGNORED}; give at least one that does"
    if num_tokens is not None and num_tokens < max(counted, 1):
        return (
            f"num_tokens={num_tokens} must count the labels of all calls that add up, but {counted} count in this one "
            "alone; give their sum"
        )
    return None


def _digest(start: int, *tensors: Tensor) -> int:
    """A number below 2^32 that differs where any value does (but for a chance of 2^-32)."""
    for values in tensors:
        start = zlib.crc32(values.contiguous().numpy().data, start)
    return start
