from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen3Config

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import Device
from galvatron.core.known import known_families
from galvatron.core.model import RECOMPUTES
from galvatron.core.model_profile import ModelProfile
from galvatron.estimate import CARDS, cluster, estimate_model, model_spec, spec_of_config
from galvatron.estimate.compute import Rates, attention_s, matmuls_s
from galvatron.estimate.devices import Constant, preset
from galvatron.estimate.layer import local_layer, matrices
from galvatron.estimate.profile import batches
from galvatron.models import build_spec
from galvatron.profile.activations import count_activations
from galvatron.profile.units import UnitShape

S = 64
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": S,
}
LLAMA = LlamaConfig(**SMALL)
QWEN3 = Qwen3Config(**SMALL, head_dim=16)
GPT2 = GPT2Config(
    n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=S, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip


def _length(spec, most=512):
    return spec.max_seq_len if spec.task == "image_classification" else min(spec.max_seq_len, most)


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_samples_of_every_unit_and_survives_its_file(name):
    spec = model_spec(name)
    profile = estimate_model(spec, "h100", seq_len=_length(spec, 2048), max_batch=4)
    assert ModelProfile.from_json(profile.to_json()) == profile
    assert profile.origin == "estimated"
    assert 1 in profile.tp_degrees()
    for unit in spec.units:
        for tp in {sample.tp for sample in profile.compute if sample.unit == unit}:
            assert [s.batch for s in profile.compute if (s.unit, s.tp) == (unit, tp)] == [1, 2, 4]
            kept = {s.recompute: s for s in profile.activations if (s.unit, s.tp) == (unit, tp)}
            assert set(kept) == ({"none"} if unit in ("embedding", "head") else set(RECOMPUTES))
            if len(kept) > 1:
                saved = [kept[r].bytes_per_sequence for r in RECOMPUTES]
                assert saved == sorted(saved, reverse=True)
                for sample in (s for s in profile.compute if (s.unit, s.tp) == (unit, tp)):
                    again_s = [sample.recompute_s(level) for level in RECOMPUTES]
                    assert again_s == sorted(again_s)
                    everything = spec.kind(unit).needs_output  # or without the last product
                    assert again_s[-1] <= sample.forward_s if everything else again_s[-1] < sample.forward_s
    assert profile.compiled
    layers = [sample for sample in profile.compute if sample.unit != "head"]  # whose loss does it all in its forward
    assert all(sample.forward_s < sample.backward_s * 1.01 for sample in layers)


@pytest.mark.parametrize(
    ("config", "precision", "tps"),
    [(LLAMA, "bf16", (1, 2)), (LLAMA, "fp32", (1, 4)), (QWEN3, "bf16", (2,)), (GPT2, "fp32", (1, 2))],
    ids=["llama-bf16", "llama-fp32", "qwen3", "gpt2"],
)
def test_activations_are_what_the_runtime_keeps(config, precision, tps):
    spec = build_spec(config)
    profile = estimate_model(spec, "a100", seq_len=S, precision=precision, tp_degrees=tps, compiled=False)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    for sample in profile.activations:
        if sample.tp == 4 and sample.unit != "layer":
            continue
        counted = count_activations(UnitShape(config, spec, sample.unit, sample.tp, S, dtype), sample.recompute)
        assert sample.fixed_bytes == counted.fixed_bytes
        # float32 statistics (two a token) of CUDA's LayerNorm, which the CPU keeps in the input's dtype
        statistics = 2 * S * (4 - dtype.itemsize)
        assert sample.bytes_per_sequence == pytest.approx(counted.bytes_per_sequence, rel=0.01, abs=statistics)
        for batch in np.array([2.0, 2.0**20]):
            estimated, found = (s.bytes_per_sequence * batch + s.workspace_bytes(batch) for s in (sample, counted))
            assert estimated == pytest.approx(found, rel=0.1)


COUNTED = {
    "llama": (29.375, 16.6875, 58.375, 33.1875),
    "gpt2": (32.375, 18.1875, 64.5, 36.25),
    "qwen3": (32.75, 18.375, 64.75, 36.375),
}
"""Bytes a token and hidden unit that a compiled layer keeps, in bf16 under tp 1 and 2 and in fp32 under tp 1 and 2.
[``count_activations`` with ``compiled``, torch 2.13; each takes seconds to compile]"""


@pytest.mark.parametrize("config", [LLAMA, QWEN3, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_activations_of_compiled_layers_are_what_was_counted(config):
    spec, counted = build_spec(config), iter(COUNTED[config.model_type])
    for precision, size in (("bf16", 2), ("fp32", 4)):
        profile = estimate_model(spec, "a100", seq_len=S, precision=precision, tp_degrees=(1, 2))
        for tp in (1, 2):
            kept = next(s for s in profile.activations if (s.unit, s.tp, s.recompute) == ("layer", tp, "none"))
            # CUDA's LayerNorm keeps float32 statistics, four a token and layer, and the CPU in the input's dtype
            statistics = 4 * (4 - size) / 64 / tp
            assert kept.bytes_per_sequence / S / 64 == pytest.approx(next(counted), abs=statistics + 1e-9)


LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


def _h200(*, compiled):
    spec = spec_of_config(LLAMA_1B, "1b")
    profile = estimate_model(spec, "h200", seq_len=4096, tp_degrees=[1], compiled=compiled)
    return profile, {(s.unit, s.batch): s for s in profile.compute}


@pytest.mark.parametrize("name", known_families())
def test_every_family_is_estimated(name):
    known = known_families()[name]
    family = known.family
    config = json.loads(AutoConfig.for_model(family.model_type).to_json_string(use_diff=False))
    if known.outline.tower is not None:  # transformers' own defaults are of towers and texts that do not meet
        vision = config["vision_config"]
        vision["out_hidden_size" if "out_hidden_size" in vision else "hidden_size"] = config["text_config"][
            "hidden_size"
        ]
    spec = spec_of_config(config, name, family.task)
    profile = estimate_model(spec, "h100", seq_len=_length(spec), tp_degrees=(1, 2))
    assert {sample.unit for sample in profile.compute} == set(spec.units)
    assert all(sample.forward_s > 0 for sample in profile.compute)


def test_layers_of_an_h200_take_what_was_measured():
    """Eager layers of LLaMA-1.24B on one H200, torch 2.11: 11.0 and 22.1 ms for 8 sequences of 4,096, 53 bytes kept."""
    eager, samples = _h200(compiled=False)
    layer = samples["layer", 8]
    assert layer.forward_s == pytest.approx(10.98e-3, rel=0.1)
    assert layer.backward_s == pytest.approx(22.08e-3, rel=0.05)
    compiled, faster = _h200(compiled=True)
    for profile, num_bytes in ((eager, 53.1), (compiled, 37.1)):
        kept = next(s for s in profile.activations if (s.unit, s.recompute) == ("layer", "none"))
        assert kept.bytes_per_sequence / 4096 / 2048 == pytest.approx(num_bytes, abs=0.1)
    assert faster["layer", 8].forward_s < 0.9 * layer.forward_s
    assert faster["layer", 8].recompute_s("full") < 0.9 * faster["layer", 8].forward_s


def test_attention_is_slower_for_small_heads():
    """H200, cuDNN, causal, 4,096 tokens, 32 heads of 64: 398 TFLOP/s forward and 342 backward, measured."""
    spec = spec_of_config(LLAMA_1B, "1b")
    layer, rates = local_layer(spec.layer, "llama", 1, 4096, compiled=True), Rates.of(preset("h200"), "bf16")
    flops = 4 * 4096 * 4096 * 64 * 32 / 2
    forward_s, backward_s = attention_s(layer, rates)
    assert flops / forward_s == pytest.approx(398e12, rel=0.05)
    assert 2.5 * flops / backward_s == pytest.approx(342e12, rel=0.05)
    wide, wide_back = attention_s(replace(layer, heads=16), rates)
    assert (forward_s, backward_s) > (1.2 * wide, 1.2 * wide_back)


def test_what_a_step_moves_of_every_parameter_takes_its_time():
    """Bytes a parameter over 85% of 4.8 TB/s, which no cache holds: nothing of it shrinks with the batch."""
    profile, samples = _h200(compiled=True)
    rate, vocabulary = 0.85 * 4.8e12, 128256 * 2048
    # the norm 4; AdamW 16 read and 16 written; float32 read and its copy written
    assert profile.optimizer_s_per_parameter == pytest.approx((4 + 32 + 6) / rate)
    # the embedding's gradient: zeros, read and added to the sum; the measured 1.5 ms gathered and reduced it besides
    assert samples["embedding", 1].backward_s == pytest.approx((2 + 2 + 8) * vocabulary / rate, rel=0.05)
    frozen = estimate_model(_frozen(spec_of_config(LLAMA_1B, "1b")), "h200", seq_len=4096, tp_degrees=[1])
    without = {(s.unit, s.batch): s for s in frozen.compute}
    layer = sum(math.prod(p.shape) for p in profile.spec.layer.parameters)
    added = samples["layer", 4].backward_s - without["layer", 4].backward_s
    products_s = matmuls_s(matrices(profile.spec.layer.parameters, 1), 4 * 4096, Rates.of(preset("h200"), "bf16"))
    assert added == pytest.approx(layer * (2 + 8) / rate + products_s)


def _frozen(spec):
    parameters = tuple(p.model_copy(update={"trainable": False}) for p in spec.layer.parameters)
    return spec.model_copy(update={"layers": (spec.layer.model_copy(update={"parameters": parameters}),)})


def test_a_layer_of_llama2_7b_takes_what_was_published():
    """Forward of one layer on an A100, Hetu-Galvatron's profile: 4.40 ms at batch 1, 3.94 ms a sequence at batch 8."""
    profile = estimate_model(model_spec("llama2-7b"), "a100-40g", seq_len=2048, compiled=False)
    forward = {s.batch: s.forward_s for s in profile.compute if (s.unit, s.tp) == ("layer", 1)}
    assert forward[1] == pytest.approx(4.40e-3, rel=0.2)
    assert forward[8] / 8 == pytest.approx(3.94e-3, rel=0.2)


def test_large_layers_take_their_flops_at_the_best_rate():
    spec = model_spec("llama3.1-405b")
    profile = estimate_model(spec, "h100", seq_len=8192, tp_degrees=[1])
    layer = next(s for s in profile.compute if s.unit == "layer" and s.batch == 4)
    flops = 4 * 8192 * (2 * spec.layer.num_parameters + spec.layer.attention_flops_per_token(8192) / 2)
    best_s = flops / preset("h100").matmul_flops_per_s("bf16")
    assert best_s < layer.forward_s < 1.2 * best_s


@pytest.mark.parametrize("name", ["llama2-7b", "gpt3-175b", "mixtral-8x7b", "deepseek-v3", "t5-3b", "swin-h"])
@pytest.mark.parametrize(
    "field", ["bf16_flops_per_s", "memory_bytes_per_s", "matmul_efficiency", "memory_efficiency", "exponentials_per_s"]
)
def test_a_faster_device_is_never_slower(name, field):
    device = preset("a100")
    faster = device.model_copy(update={field: Constant(value=1.2 * getattr(device, field).value, source="made up")})
    spec = model_spec(name)
    seq_len = _length(spec)
    before, after = (estimate_model(spec, d, seq_len=seq_len, max_batch=8) for d in (device, faster))
    for slow, fast in zip(before.compute, after.compute, strict=True):
        assert fast.forward_s <= slow.forward_s
        assert fast.backward_s <= slow.backward_s
        assert all(fast.again_s[level] <= slow.again_s[level] for level in slow.again_s)
    assert after.optimizer_s_per_parameter <= before.optimizer_s_per_parameter


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-30b-a3b", "bert-large"])
def test_more_work_takes_longer_and_more_ranks_keep_less(name):
    spec = model_spec(name)
    profile = estimate_model(spec, "h100", seq_len=512)
    for unit in spec.units:
        one = [s.forward_s for s in profile.compute if (s.unit, s.tp) == (unit, 1)]
        assert one == sorted(one)
        for recompute in RECOMPUTES:
            kept = [s.bytes_per_sequence for s in profile.activations if (s.unit, s.recompute) == (unit, recompute)]
            assert unit == "embedding" or kept == sorted(kept, reverse=True)


def test_degrees_that_cuts_refuse_are_left_out():
    spec = model_spec("llama3.1-8b")  # 32 heads, 8 kv heads
    profile = estimate_model(spec, "h100", seq_len=768, tp_degrees=[2, 3, 6, 12, 16, 64])
    assert profile.tp_degrees() == (1, 2, 16)
    assert {s.tp for s in profile.compute if s.unit == "head"} == {1, 2, 3, 6, 12, 16, 64}
    gpt = estimate_model(model_spec("gpt3-175b"), "h100", seq_len=1536, tp_degrees=[3, 6, 12, 64])
    assert gpt.tp_degrees() == (1, 3, 6, 12)  # 96 heads


def test_kv_heads_fewer_than_ranks_are_not_cut_further():
    keys = {**SMALL, "model_type": "llama", "num_key_value_heads": 1}
    profile = estimate_model(spec_of_config(keys, "small"), "h100", seq_len=S, tp_degrees=[1, 2, 4])
    assert profile.tp_degrees() == (1, 2, 4)


def test_the_device_of_a_profile_will_do():
    spec = model_spec("llama2-7b")
    assert estimate_model(spec, cluster("H100:8").device, seq_len=512) == estimate_model(spec, "h100", seq_len=512)


def test_wrong_lengths_and_devices_are_refused():
    with pytest.raises(ConfigError, match="seq_len=8192 must be from 1 to max_seq_len=4096"):
        estimate_model(model_spec("llama2-7b"), "h100", seq_len=8192)
    with pytest.raises(ConfigError, match="no device is called 'abacus'"):
        estimate_model(model_spec("llama2-7b"), "abacus", seq_len=512)


def test_batches_end_with_the_largest():
    assert [batches(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_small_layers_wait_for_the_host_and_large_ones_do_not():
    spec = model_spec("t5-3b")
    slow, fast = (estimate_model(spec, name, seq_len=512, max_batch=64) for name in ("a100", "b200"))
    one, many = (
        [s.forward_s for p in (slow, fast) for s in p.compute if (s.unit, s.tp, s.batch) == ("layers 25-47", 1, batch)]
        for batch in (1, 64)
    )
    assert one[0] == one[1]
    assert many[0] > 2 * many[1]


H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    memory_bytes=84_900_000_000,
    matmul_flops_per_s={"bf16": 6e14, "fp32": 5e13},
)


def test_a_measured_device_counts_by_its_own_rate():
    spec = model_spec("llama2-7b")
    measured = estimate_model(spec, H100, seq_len=2048, tp_degrees=[1])
    assert measured.device == H100.name
    fast = H100.model_copy(update={"matmul_flops_per_s": {"bf16": 12e14}})
    slow_s, fast_s = (
        next(s.forward_s for s in p.compute if s.unit == "layer" and s.batch == 8)
        for p in (measured, estimate_model(spec, fast, seq_len=2048, tp_degrees=[1]))
    )
    assert 0.5 < fast_s / slow_s < 0.65  # products take half, what moves memory as long as before
    same_memory = estimate_model(spec, "h100", seq_len=2048, tp_degrees=[1])
    assert measured.optimizer_s_per_parameter == same_memory.optimizer_s_per_parameter


def test_a_device_without_a_preset_is_estimated_by_its_rate_alone():
    xeon = Device(name="Intel Xeon", type="cpu", memory_bytes=2**34, matmul_flops_per_s={"fp32": 1e12})
    profile = estimate_model(model_spec("llama2-7b"), xeon, seq_len=512, precision="fp32", tp_degrees=[1])
    assert (profile.device, profile.precision) == ("Intel Xeon", "fp32")
    head_s = next(s.forward_s for s in profile.compute if s.unit == "head" and s.batch == 8)
    assert head_s > 8 * 512 * 2 * 32000 * 4096 / 1e12
    with pytest.raises(ConfigError, match=r"Intel Xeon has no matrix rate in bf16 .*; choose --precision fp32"):
        estimate_model(model_spec("llama2-7b"), xeon, seq_len=512)


def test_a_sequence_of_another_length_than_an_image_has_is_refused():
    with pytest.raises(ConfigError, match="seq_len=49 must be 3136, what an image is to swin-h; choose that"):
        estimate_model(model_spec("swin-h"), "h100", seq_len=49)


def test_layers_of_windows_keep_whole_sequences_beside_what_is_cut():
    """Two norms of whole sequences are not divided by tp; queries, keys, values and the MLP are."""
    spec = model_spec("swin-h")
    profile = estimate_model(spec, "h100", seq_len=3136, tp_degrees=[1, 2], max_batch=1)
    name = spec.layers[0].name
    one, two = (
        next(a for a in profile.activations if (a.unit, a.tp, a.recompute) == (name, tp, "none")) for tp in (1, 2)
    )
    hidden = 3136 * 320 * 2
    assert one.bytes_per_sequence / 2 + hidden < two.bytes_per_sequence < one.bytes_per_sequence
