from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from galvatron.models import build_spec
from galvatron.profile.activations import count, count_activations, counts
from galvatron.profile.units import UnitShape

S, H, F, N, K, V = 32, 64, 96, 4, 2, 131

LLAMA = LlamaConfig(
    hidden_size=H,
    intermediate_size=F,
    num_hidden_layers=2,
    num_attention_heads=N,
    num_key_value_heads=K,
    vocab_size=V,
    max_position_embeddings=S,
)
QWEN3 = Qwen3Config(**{**LLAMA.to_diff_dict(), "head_dim": H // N, "tie_word_embeddings": True, "model_type": "qwen3"})
GPT2 = GPT2Config(n_embd=H, n_layer=2, n_head=N, vocab_size=V, n_positions=S, bos_token_id=0, eos_token_id=0)


def _shape(config: PretrainedConfig, unit: str, tp: int = 1, dtype: torch.dtype = torch.float32) -> UnitShape:
    return UnitShape(config, build_spec(config), unit, tp, S, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["embedding", "layer", "head"])
@pytest.mark.parametrize("config", [LLAMA, QWEN3, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_fake_counts_equal_what_a_real_run_allocates(config, unit, dtype):
    for tp, recompute in ((1, "none"), (2, "none"), (1, "selective"), (2, "mlp"), (2, "linears"), (2, "full")):
        if unit == "layer" or recompute == "none":
            shape = _shape(config, unit, tp, dtype)
            assert count(shape, recompute, 2) == count(shape, recompute, 2, fake=False)


@pytest.mark.parametrize("unit", ["embedding", "layer", "head"])
def test_the_line_gives_the_count_of_any_batch(unit):
    shape = _shape(LLAMA, unit, 2)
    sample = count_activations(shape, "none")
    shared = sample.fixed_bytes
    # the rotary cosines and sines, and the int64 positions they come from
    assert shared == (2 * S * (H // N) * 4 + S * 8 if unit == "embedding" else 0)
    for batch in (1, 4, 7):
        counted = count(shape, "none", batch)
        assert counted.saved_bytes == batch * sample.bytes_per_sequence
        assert counted.workspace_bytes <= sample.workspace_bytes(np.array(float(batch)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_workspace_grows_by_chunks_of_tokens(monkeypatch, dtype):
    wide = LlamaConfig(**{**LLAMA.to_diff_dict(), "vocab_size": 20 * V})
    monkeypatch.setattr("galvatron.parallelize.losses.fused.CHUNK_BYTES", 4 * S * 20 * V * 6)  # four sequences in bf16
    shape = _shape(wide, "head", dtype=dtype)
    sample = count_activations(shape, "none")
    assert sample.workspace_beyond is not None
    assert sample.workspace_beyond[1] < sample.workspace_bytes_per_sequence / 3
    for batch in (1, 2, 4, 5, 8, 9, 16):
        counted = count(shape, "none", batch).workspace_bytes
        assert counted <= sample.workspace_bytes(np.array(float(batch))) <= 1.35 * counted


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_full_recompute_keeps_the_cut_input_alone(tp):
    sample = count_activations(_shape(LLAMA, "layer", tp), "full")
    assert (sample.fixed_bytes, sample.bytes_per_sequence) == (0, S // tp * H * 4)
    kept = count_activations(_shape(LLAMA, "layer", tp), "none")
    total = sample.bytes_per_sequence + sample.workspace_bytes_per_sequence
    assert total >= kept.bytes_per_sequence  # while it runs again everything is there


def test_llama_layer_equals_its_closed_form():
    """The tensors that autograd keeps of an uncut fp32 layer, in elements per token."""
    norms = 2 * (2 * H + 1)  # of either: the input, the normalised input and the reciprocal root
    gathered = 2 * H  # what the column-cut linears multiply
    attention = 2 * H + 2 * (H // N) * K + N  # rotated q, output; rotated k, v; log-sum-exp
    mlp = 4 * F  # gate, its activation, up, their product
    sample = count_activations(_shape(LLAMA, "layer"), "none")
    assert sample.bytes_per_sequence == 4 * S * (norms + gathered + attention + mlp)


LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=V,
    max_position_embeddings=4096,
)
LOG_SUM_EXP, RMS = 4 / 64, 2 * 4 / 2048  # a float32 for every head of 64; one for every norm
KEPT = {
    "none": 53 + LOG_SUM_EXP + RMS,
    "selective": 25 + LOG_SUM_EXP,
    "mlp": 9 + LOG_SUM_EXP,
    "linears": 4 + LOG_SUM_EXP,
    "full": 2,
}
"""Bytes that a bf16 layer keeps for every token and hidden unit.

Without recompute: norms 2 x (4 + 2), inputs of both regions 2 x 2, attention 5 (q 2, k and v 0.5, output 2), the MLP
4 x 8.  Selective: the input 2, attention 5, its projected output 2, gate and up 2 x 8; without these the MLP's; without
linears the input and attention's output.
"""

COMPILED = {**KEPT, "none": 37 + LOG_SUM_EXP + RMS}
"""Without recompute the compiler keeps neither norms in float32 nor residual sums twice; it runs no product again."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself does
def test_a_compiled_layer_keeps_no_more_than_it_did_whatever_ran_before(capfd):
    """Levels take turns in one process: graphs of one that served another would be silent."""
    shape = UnitShape(LLAMA_1B, build_spec(LLAMA_1B), "layer", 1, 4096, torch.bfloat16, compiled=True)
    levels = [*COMPILED, *reversed(COMPILED)]
    kept = [counted.saved_bytes / 4096 / 2048 for counted in counts(shape, levels, 1)]
    assert kept == pytest.approx([COMPILED[level] for level in levels], abs=1e-3)  # full: and a generator's state
    assert capfd.readouterr().err == ""  # torch's advice on any selective checkpoint is left out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself does
def test_a_compiled_layer_peaks_no_higher_than_the_same_layer_that_is_not():
    """Graphs run operation by operation hold more at once than kernels that torch has for the same."""
    shape = UnitShape(LLAMA, build_spec(LLAMA), "layer", 1, S, torch.bfloat16)
    eager, compiled = (count_activations(replace(shape, compiled=compiled), "none") for compiled in (False, True))
    assert compiled.bytes_per_sequence < eager.bytes_per_sequence
    assert compiled.bytes_per_sequence + compiled.workspace_bytes_per_sequence <= (
        eager.bytes_per_sequence + eager.workspace_bytes_per_sequence
    )


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_layer_keeps_no_more_than_it_did(tp):
    """A guard: whoever makes layers fatter changes these numbers."""
    shape = UnitShape(LLAMA_1B, build_spec(LLAMA_1B), "layer", tp, 4096, torch.bfloat16)
    kept = {m: count_activations(shape, m).bytes_per_sequence / 4096 / 2048 for m in KEPT}
    gathered = 2 * 2 * (1 - 1 / tp)  # without recompute both regions keep their whole input
    summed = 2 * (tp > 1)  # sums over ranks are kept where a rank's own linears are not
    expected = {level: kept / tp for level, kept in KEPT.items()}
    expected |= {"none": expected["none"] + gathered, "linears": expected["linears"] + summed / tp}
    assert kept == pytest.approx(expected, abs=1e-6)


def test_bfloat16_halves_what_is_not_upcast():
    single = count_activations(_shape(LLAMA, "layer"), "none").bytes_per_sequence
    half = count_activations(replace(_shape(LLAMA, "layer"), dtype=torch.bfloat16), "none").bytes_per_sequence
    assert single / 2 < half < single


@pytest.mark.parametrize("unit", ["layer", "head"])
def test_float16_keeps_what_bfloat16_does(unit: str) -> None:
    counted = (
        count_activations(replace(_shape(LLAMA, unit), dtype=d), "none") for d in (torch.float16, torch.bfloat16)
    )
    first, second = counted
    assert first == second


def test_parameters_are_not_counted():
    wide = LlamaConfig(**{**LLAMA.to_diff_dict(), "vocab_size": 8 * V})
    assert count_activations(_shape(wide, "embedding"), "none") == count_activations(_shape(LLAMA, "embedding"), "none")
