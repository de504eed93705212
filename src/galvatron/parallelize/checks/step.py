"""What must hold before a step, on all that it depends on beside the weights.

The loss that it is given, torch's settings, where parameters lie, what its inputs ask of the model's layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError, DataError
from galvatron.core.model import ModelSpec
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models.grids import Grids
from galvatron.models.inputs import words_of
from galvatron.plan import Plan

from ..losses.own import LossFunction, check_loss
from ..state.pieces import LocalParameter
from .batch import BatchCheck
from .packing import check_packing, check_padding
from .surroundings import check_surroundings


class StepCheck:
    """Checks one step after another; remembers what needs one look alone."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        config: PretrainedConfig,
        parameters: Sequence[LocalParameter],
        device: torch.device,
    ) -> None:
        """Of a model under ``plan`` whose ``parameters`` lie where they shall stay."""
        self._spec, self._config, self._parameters, self._device = spec, config, parameters, device
        self._global_batch_size = plan.global_batch_size
        self.place()
        self._checked_loss: LossFunction | None = None
        shape, classes = (plan.global_batch_size, plan.seq_len), None if spec.task in TOKEN_TASKS else spec.vocab_size
        words = spec.vocab_size if classes is None else words_of(config)
        grids = Grids.of(config)
        self.train_batches = BatchCheck(shape, words, num_classes=classes, grids=grids)
        self.evaluation_batches = BatchCheck(shape, words, num_classes=classes, grids=grids)

    def place(self) -> None:
        """Take where parameters lie now for where they shall stay."""
        self._placed = {p.name: (p.tensor.data_ptr(), p.tensor.requires_grad) for p in self._parameters}

    def before(self, loss_fn: LossFunction | None, inputs: Collection[str], *, plain: bool, gradients: bool) -> None:
        """Raise ConfigError if ``loss_fn``, torch's settings or a parameter's place make a step wrong in silence.

        Or UnsupportedError if documents that ``position_ids`` tell apart would see each other, or tokens their
        padding.  ``inputs`` names what is given; a ``plain`` loss has no terms of the caller's.
        """
        check_surroundings(self._device, gradients=gradients)
        if self._spec.task == "contrast" and not plain:
            raise ConfigError("a contrast has a loss of its own; leave out loss_fn, label_smoothing and z_loss")
        if "position_ids" in inputs:
            check_packing(self._config)
        if "attention_mask" in inputs and self._spec.ends == "whole":
            check_padding(self._config)
        if loss_fn is not None and loss_fn is not self._checked_loss:
            check_loss(loss_fn, self._spec.vocab_size, self._device)
            self._checked_loss = loss_fn
        for parameter in self._parameters:
            address, requires_grad = self._placed[parameter.name]
            if parameter.tensor.data_ptr() != address:
                raise ConfigError(f"{parameter.name} has lost its storage; change it in place (copy_), not by .data =")
            if parameter.tensor.requires_grad != requires_grad:
                raise ConfigError(
                    f"requires_grad of {parameter.name} was changed after parallelize, which no longer takes effect; "
                    "set it on the Hugging Face model before"
                )

    def labels(self, labels: Tensor | None) -> Tensor:
        """The labels, which a contrast has none of; raises DataError where others lack them."""
        if labels is None and self._spec.task == "contrast":
            return torch.zeros(self._global_batch_size, dtype=torch.int64)
        if labels is None:
            raise DataError("a batch needs labels; give labels=, int64, where what does not count is -100")
        return labels


def named(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of ``inputs`` that are given."""
    return {name: values for name, values in inputs.items() if values is not None}
