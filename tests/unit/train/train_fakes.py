"""A model of one process with parts that are cut by hand: enough for the trainer, checkpoints and export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from galvatron.core.job import TrainSection
from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.parallelize.state.pieces import LocalParameter, Piece
from galvatron.plan import LayerStrategy, Plan
from galvatron.train import Lineage

VOCAB = 257


def whole_part(name: str, values: torch.Tensor) -> LocalParameter:
    """A parameter that one rank holds entirely."""
    zeros = (0,) * values.dim()
    piece = Piece(local_offset=zeros, global_offset=zeros, size=tuple(values.shape))
    return _part(name, torch.nn.Parameter(values), tuple(values.shape), (piece,))


def swapped_part(name: str, values: torch.Tensor) -> LocalParameter:
    """The same, held as two pieces: the lower half of the rows first."""
    rows = values.shape[0]
    half = rows // 2
    swapped = torch.cat([values[half:], values[:half]])
    rest = (0,) * (values.dim() - 1)
    pieces = (
        Piece(local_offset=(0, *rest), global_offset=(half, *rest), size=(rows - half, *values.shape[1:])),
        Piece(local_offset=(rows - half, *rest), global_offset=(0, *rest), size=(half, *values.shape[1:])),
    )
    return _part(name, torch.nn.Parameter(swapped), tuple(values.shape), pieces)


def _part(name: str, tensor: torch.nn.Parameter, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> LocalParameter:
    return LocalParameter(name=name, tensor=tensor, global_shape=shape, pieces=pieces, replicas=1, is_primary=True)


def global_values(part: LocalParameter) -> torch.Tensor:
    """The whole parameter, from a fake's pieces."""
    result = torch.full(part.global_shape, torch.nan)
    for piece in part.pieces:
        source = tuple(slice(o, o + s) for o, s in zip(piece.local_offset, piece.size, strict=True))
        target = tuple(slice(o, o + s) for o, s in zip(piece.global_offset, piece.size, strict=True))
        result[target] = part.tensor.detach()[source]
    return result


@dataclass
class FakeModel:
    """Predicts the next token from this one by a table and a bias; parts as they are given."""

    table: LocalParameter
    bias: LocalParameter
    swapped: bool = False
    steps: int = 0
    loss_scale: None = None
    adapter: None = None
    capacity_factor: None = None

    @staticmethod
    def make(*, swapped: bool = False, seed: int = 0) -> FakeModel:
        """Random weights of ``seed``; ``swapped`` changes how they are held, not what they are."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(VOCAB, VOCAB, generator=generator) * 0.1
        table = swapped_part("table.weight", values) if swapped else whole_part("table.weight", values)
        return FakeModel(table, whole_part("bias", torch.zeros(VOCAB)), swapped)

    @property
    def local_parameters(self) -> list[LocalParameter]:
        return [self.table, self.bias]

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(vocab_size=VOCAB)

    @property
    def spec(self) -> ModelSpec:
        unit = UnitSpec(parameters=(ParameterSpec(name="table.weight", shape=(VOCAB, VOCAB)),))
        sizes = {"hidden_size": VOCAB, "ffn_size": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 1}
        return ModelSpec(
            name="fake", family="fake", vocab_size=VOCAB, max_seq_len=64, tied_embeddings=False,
            embedding=unit, head=unit,
            layers=(LayerKind(count=1, parameters=unit.parameters, **sizes),),
        )  # fmt: skip

    def _loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = input_ids if not self.swapped else (input_ids + VOCAB - VOCAB // 2) % VOCAB
        logits = self.table.tensor[rows] + self.bias.tensor
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def train_step(self, input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        self.zero_grad()
        loss = self._loss(input_ids, labels)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._loss(input_ids, labels)

    def evaluate_classes(self, **batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a language model has no classes")

    def zero_grad(self) -> None:
        for part in self.local_parameters:
            part.tensor.grad = None

    def gathered_buffers(self) -> list[torch.Tensor]:
        return []

    def dropped_choices(self) -> torch.Tensor:
        raise AssertionError("no experts")

    def grad_norm(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_([p.tensor for p in self.local_parameters], float("inf"))


def section(**changes: object) -> TrainSection:
    """A small train section."""
    return TrainSection(**{"global_batch_size": 4, "seq_len": 8, "num_steps": 6, "lr": 0.05, "seed": 3, **changes})


def lineage_for(train: TrainSection, **changes: object) -> Lineage:
    """The lineage of a FakeModel's run without a job."""
    given = {"train": train, "config": {"vocab_size": VOCAB}, "eval_fraction": 0.05, "versions": {"torch": "1"}}
    return Lineage(**{**given, **changes})


def plan_for(train: TrainSection) -> Plan:
    """A plan of one device for it."""
    one = LayerStrategy()
    return Plan(
        model="fake", world_size=1, layers_per_stage=(1,), embedding=one, layers=(one,), head=one,
        global_batch_size=train.global_batch_size, seq_len=train.seq_len,
    )  # fmt: skip
