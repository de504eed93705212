"""What a parallel model has of a module: parameters, modes and weights, as far as one process of many has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError, UnsupportedError
from galvatron.core.lora import is_adapters
from galvatron.core.model import ModelSpec
from galvatron.models import Adapter

from .checks.refusals import INSTEAD_OF_COPYING, INSTEAD_OF_FORWARD, refusal
from .pipeline.driver import Chunk
from .processes.grid import Grid
from .sharding.fsdp import gathered_buffers
from .state.adapters import check_alone, merge, merged_shapes, write_adapter
from .state.export import MAX_SHARD_BYTES, write_hf_directory
from .state.gather import Shapes, gather_whole
from .state.pieces import LocalParameter
from .state.safetensors_file import Entry
from .state.state import load_local_state, load_whole_state, local_state, whole_state


class ParallelModule:
    """A rank's part of a model, with what a module has where that means something; the rest is refused by name."""

    def __init__(
        self,
        grid: Grid,
        spec: ModelSpec,
        config: PretrainedConfig,
        chunks: tuple[Chunk, ...],
        parameters: list[LocalParameter],
        adapter: Adapter | None,
    ) -> None:
        self.plan, self.spec, self.grid, self.config, self.adapter = grid.plan, spec, grid, config, adapter
        self.stages, self.local_parameters = tuple(chunk.stage for chunk in chunks), parameters
        self._sharded = tuple(unit for chunk in chunks for unit in chunk.sharded)
        self._unsharded = tuple(unit for chunk in chunks for unit in chunk.unsharded)

    @property
    def training(self) -> bool:
        """Whether ``train_step`` draws dropout."""
        return self.stages[0].training

    def train(self, mode: bool = True) -> Self:
        """Let ``train_step`` draw dropout, or not."""
        for stage in self.stages:
            stage.train(mode)
        return self

    def eval(self) -> Self:
        """Let ``train_step`` draw no dropout; ``evaluate`` never does."""
        return self.train(False)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.grid.world.device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's part of every parameter it has one of, by Hugging Face name; a part may be of no elements.

        Any optimizer of ``torch.optim`` takes them.  One that treats elements alone (SGD, Adam, Lion) computes what
        it would on whole tensors; one that looks at whole matrices (Muon, Adafactor, LAMB) sees this rank's part.
        """
        return ((part.name, part.tensor) for part in self.local_parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names.  Norms of their gradients are local: clip with ``clip_grad_norm_`` of the model."""
        return (part.tensor for part in self.local_parameters)

    def state_dict(self, *, full: bool = True) -> dict[str, Tensor]:
        """The weights.

        Args:
            full: whole tensors by Hugging Face name, float32 on the CPU, on rank 0; {} on the others.  Collective.
                ``hf_model.load_state_dict`` takes them.  Otherwise this rank's parts by name and place, as they
                are (``clone`` what shall not change): no communication, and of use to the same rank and plan alone.
        """
        return whole_state(self.local_parameters, self._ties) if full else local_state(self.local_parameters)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, full: bool = True) -> None:
        """Take weights as ``state_dict`` gives them; of full ones rank 0's count, whatever plan they come from.

        Raises CheckpointError if names, shapes or dtypes are not the model's; no weight has changed then.
        """
        if full:
            load_whole_state(self.local_parameters, state_dict, self._ties)
        else:
            load_local_state(self.local_parameters, state_dict)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        adapter_only: bool = False,
    ) -> None:
        """Write weights in ``dtype``, config and, if given, a Hugging Face ``tokenizer`` for ``from_pretrained``.

        A collective call; rank 0 writes, one tensor at a time.  ``directory`` must be new or empty and appears
        whole or not at all.  An adapter is merged into the weights; with ``adapter_only`` it is written alone, for
        ``PeftModel.from_pretrained``.

        Raises:
            OutputError: the directory is not empty or the disk refuses.
            ConfigError: there is no adapter to write alone, or other parameters were trained too.
        """
        adapter, folder = self.adapter, Path(directory)

        def write(shapes: Shapes, tensors: Iterator[Tensor]) -> None:
            if adapter is not None:
                tensors, shapes = merge(shapes, tensors, adapter), merged_shapes(shapes)
            entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
            write_hf_directory(folder, self.config, entries, tensors, tokenizer, max_shard_bytes)

        if not adapter_only:
            gather_whole(self.local_parameters, write)
            return
        if adapter is None:
            raise ConfigError("this model has no adapter to write alone; leave adapter_only out")
        check_alone(parameter.name for parameter in self.spec.trained_parameters())
        alone = [part for part in self.local_parameters if is_adapters(part.name)]
        gather_whole(alone, lambda shapes, tensors: write_adapter(folder, adapter, shapes, tensors, dtype, tokenizer))

    def gathered_buffers(self) -> Iterator[Tensor]:
        """What parameters are gathered into (of no bytes while not in use) and flat buffers: to count memory."""
        yield from gathered_buffers(self._sharded)
        for unit in self._unsharded:
            yield from unit.buffers()

    @property
    def _ties(self) -> dict[str, str]:
        tied = self.spec.tied_names
        return {tied[1]: tied[0]} if tied else {}

    if not TYPE_CHECKING:  # a type checker knows what is missing without it

        def __getattr__(self, name: str) -> NoReturn:
            raise refusal(name)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there is no forward without its backward, nor one process that has all logits."""
        raise UnsupportedError(f"a parallel model cannot be called: {INSTEAD_OF_FORWARD}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refused: a copy would lack the processes that hold the rest."""
        raise UnsupportedError(f"a parallel model cannot be copied or pickled: {INSTEAD_OF_COPYING}")
