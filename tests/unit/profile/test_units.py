from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from galvatron.core.model import ENDS
from galvatron.models import build_spec, for_task
from galvatron.profile.units import UnitShape
from galvatron.testing.models import tiny_config

CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
        max_position_embeddings=16,
    ),
    "masked words": tiny_config("bert", num_hidden_layers=1, max_position_embeddings=16),
    "images": tiny_config("vit", num_hidden_layers=1, image_size=12, patch_size=4, num_channels=1),
    "classes of texts": for_task(
        tiny_config("llama", num_hidden_layers=1, max_position_embeddings=16, pad_token_id=1), "text_classification"
    ),
    "texts to texts": tiny_config("t5", num_layers=2, num_decoder_layers=1),
    "sounds to texts": tiny_config("whisper"),
    "pairs": tiny_config("clip"),
    "images in texts": tiny_config("llava", vision_feature_layer=-1),
    "images with grids": tiny_config("qwen2_vl"),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=67, n_positions=16, bos_token_id=0, eos_token_id=0),
}


@pytest.mark.parametrize(
    ("tp", "dtype"), [(1, torch.float32), (2, torch.float32), (4, torch.float32), (1, torch.bfloat16)]
)
@pytest.mark.parametrize("family", CONFIGS)
def test_units_hold_the_shapes_of_the_first_tp_rank_and_run(family, tp, dtype):
    config = CONFIGS[family]
    spec = build_spec(config)
    seq_len = min(spec.max_seq_len, 16)
    tp = math.gcd(tp, *(kind.tokens(seq_len) for kind in spec.layers))  # an image's 10 tokens
    for name in spec.units:
        shape = UnitShape(config, spec, name, tp, seq_len, dtype)
        unit = shape.build()
        expected = sorted(math.prod(p.local_shape(tp)) for p in spec.unit(name).parameters)
        held = set(itertools.chain.from_iterable(owner.parameters() for owner in unit.owners))
        assert sorted(p.numel() for p in held) == expected
        unit.allocate(dtype, torch.device("cpu"), torch.clone)
        tokens, labels = shape.inputs(3, torch.device("cpu"))
        if family == "sounds to texts" and name == "layers 2-3":
            assert labels["encoder_hidden_states"].shape == (3, 12 // tp, 32)  # whatever the text's length
        output = unit(tokens, **labels)
        is_number = name == "head" or (name == "embedding" and spec.stacks > 1)
        own = spec.kind(name).tokens(seq_len) if name not in ENDS else seq_len
        assert tuple(output.shape) == (() if is_number else (3, own // tp, 32))
        assert name == "head" or output.dtype == dtype
        output.backward(torch.ones_like(output))
        unused = {n for owner in unit.owners for n, p in owner.named_parameters() if p.requires_grad and p.grad is None}
        # the tower's last norm makes what a LLaVA does not take
        assert not unused or (family, name, unused) == ("images in texts", "embedding", {"weight", "bias"})
