"""Do layers of a type keep packed documents apart?  A tiny twin that sees two of them, together and alone, decides.

Takes a config; knows nothing of plans.  A type whose layers do not hand on what they are told of documents, or that
positions enter by another way, would train on wrong numbers.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from galvatron.core.errors import UnsupportedError
from galvatron.models import family_of, structure_key, twin_config, twin_model

from ..layers.attention import use_attention
from ..layers.documents import OwnPlaces, Packed, documents_of

TOLERANCE = 1e-4
"""Of the largest hidden state; what is right differs by 1e-6 of it."""
LENGTHS = (7, 9)
_known: dict[str, str | None] = {}


def check_packing(config: PretrainedConfig) -> None:
    """Raise UnsupportedError unless layers of ``config`` keep documents apart; looked at once a process."""
    key = structure_key(config)
    if key not in _known:
        _known[key] = _problem(config)
    if _known[key] is not None:
        raise UnsupportedError(
            f"layers of {config.model_type} do not keep the packed documents of a row apart ({_known[key]}); give rows "
            "of one document each, without position_ids, or set data.separate_documents = false"
        )


@torch.no_grad()
def _problem(config: PretrainedConfig) -> str | None:
    twin = twin_config(config)
    model, family, packed, whole = twin_model(twin), family_of(config), Packed(), range(1)
    if not family.asks_for_attention:
        return "they attend by themselves"
    use_attention(model, family)
    for stack in family.stacks:
        for layer in model.get_submodule(stack.path).children():
            OwnPlaces(whole, whole, None, packed).enter(layer)
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
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    wanted = torch.cat(alone, dim=1)
    error = float((together - wanted).abs().max() / wanted.abs().max())
    return None if error <= TOLERANCE else f"hidden states are off by {error:.2g} of the largest"
