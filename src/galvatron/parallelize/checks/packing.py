"""Do layers of a type keep packed documents apart, and padding?  A tiny twin decides.

It sees two documents, together and alone; or padded rows, as ``transformers`` masks them and as documents, or where
images and texts are contrasted without a mask.

Takes a config; knows nothing of plans.  A type whose layers do not hand on what they are told of documents, or that
positions enter by another way, would train on wrong numbers.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import UnsupportedError
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import Family, family_of, structure_key, task_of, twin_config, twin_model
from galvatron.models.failures import said
from galvatron.models.twin import run_twin, twin_inputs

from ..layers.attention import Context, attend_across, use_attention
from ..layers.documents import OwnPlaces, Packed, documents_of, positions_beside_padding
from ..losses.fused import IGNORED

TOLERANCE = 1e-4
"""Of the largest hidden state; what is right differs by 1e-6 of it."""
LENGTHS = (7, 9)
PADDED = (5, 16, 11)
"""Tokens of the rows of 16 that are padded."""
_known: dict[str, str | None] = {}
_known_padding: dict[str, str | None] = {}


def check_packing(config: PretrainedConfig) -> None:
    """Raise UnsupportedError unless layers of ``config`` keep documents apart; looked at once a process."""
    if family_of(config).ends == "whole":
        raise UnsupportedError(
            f"documents are packed for causal language models, not for {task_of(config)} by {config.model_type}; give "
            "rows of one document each, without position_ids, padded where they are shorter (attention_mask)"
        )
    key = structure_key(config)
    if key not in _known:
        _known[key] = _problem(config)
    if _known[key] is not None:
        raise UnsupportedError(
            f"layers of {config.model_type} do not keep the packed documents of a row apart ({_known[key]}); give rows "
            "of one document each, without position_ids, or set data.separate_documents = false"
        )


def check_padding(config: PretrainedConfig) -> None:
    """Raise UnsupportedError unless models of ``config`` are given padded rows right; looked at once a process."""
    if task_of(config) == "vision_language":
        raise UnsupportedError(
            f"rows of {config.model_type} need no attention_mask: no token sees what is behind it; pad on the right, "
            f"mark labels of padding by {IGNORED}, and leave attention_mask out"
        )
    key = structure_key(config)
    if key not in _known_padding:
        _known_padding[key] = _padding_problem(config)
    if _known_padding[key] is not None:
        remedy = "give rows without padding, and no attention_mask"
        if task_of(config) == "contrast":
            remedy = "leave attention_mask out of tokenizer.model_input_names where padding is seen like words (SigLIP)"
        raise UnsupportedError(
            f"layers of {config.model_type} do not keep padding apart ({_known_padding[key]}); {remedy}"
        )


@torch.no_grad()
def _padding_problem(config: PretrainedConfig) -> str | None:
    """Of ends that see whole sequences; others are causal, and no token sees what is behind it."""
    twin, family, rows = twin_config(config), family_of(config), len(PADDED)
    inputs = twin_inputs(twin, rows)
    if "input_ids" not in inputs:
        return "it takes no tokens"
    if not family.asks_for_attention and family.task != "contrast":
        return "they attend by themselves"
    mask = (torch.arange(inputs["input_ids"].shape[1]) < torch.tensor(PADDED).unsqueeze(1)).long()
    padding = getattr(twin.get_text_config(), "pad_token_id", None) or 0
    inputs |= {"input_ids": torch.where(mask == 1, inputs["input_ids"], padding), "attention_mask": mask}
    ours, packed, seen = twin_model(twin), Packed(), inputs
    if family.task == "contrast":
        inputs["input_ids"][torch.arange(rows), mask.sum(dim=1) - 1] = getattr(
            twin.get_text_config(), "eos_token_id", 0
        )
        seen = {name: values for name, values in inputs.items() if name != "attention_mask"}
    else:
        _take_documents(ours, family, range(rows), packed)
        if not all(stack.causal for stack in family.stacks):
            packed.now = {range(rows): documents_of(positions_beside_padding(mask), torch.device("cpu"))}
    try:
        wanted, found = run_twin(twin_model(twin), inputs), run_twin(ours, seen)
    except Exception as failure:  # of any kind: a foreign model runs there
        return said(failure)
    if task_of(config) in TOKEN_TASKS - {"seq2seq_lm"}:
        wanted, found = wanted[mask == 1], found[mask == 1]
    return _difference(found, wanted, "outputs")


def _take_documents(model: PreTrainedModel, family: Family, rows: range, packed: Packed) -> None:
    use_attention(model, family)
    for stack in family.stacks:
        for layer in model.get_submodule(stack.path).children():
            attend_across(layer, Context())
            OwnPlaces(rows, rows, None, packed).enter(layer, of_side=stack.side is not None)


def _difference(found: torch.Tensor, wanted: torch.Tensor, of: str) -> str | None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return None if error <= TOLERANCE else f"{of} are off by {error:.2g} of the largest"


@torch.no_grad()
def _problem(config: PretrainedConfig) -> str | None:
    twin = twin_config(config)
    model, family, packed, whole = twin_model(twin), family_of(config), Packed(), range(1)
    if not family.asks_for_attention:
        return "they attend by themselves"
    _take_documents(model, family, whole, packed)
    ids = torch.randint(90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))

    def hidden(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        decoder = model.get_submodule(family.decoder)
        return decoder(input_ids=ids, position_ids=positions.unsqueeze(0), use_cache=False).last_hidden_state

    try:
        counted = [torch.arange(length) for length in LENGTHS]
        alone = [hidden(part, count) for part, count in zip(ids.split(LENGTHS, dim=1), counted, strict=True)]
        positions = torch.cat(counted)
        packed.now = {whole: documents_of(positions.unsqueeze(0), torch.device("cpu"))}
        together = hidden(ids, positions)
    except Exception as failure:  # of any kind: a foreign model runs there
        return said(failure)
    return _difference(together, torch.cat(alone, dim=1), "hidden states")
