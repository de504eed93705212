"""What is planned for every family that ships as data, on one node and on eight, by a config of a well-known size?

    python benchmarks/search_families.py --out search_families.json

Every family in all that runs, on estimated clusters: the chosen plan breaks no rule and fits, or no plan does.  Every
search has a process of its own.  Beside the JSON a table (.md) says what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import measure

from galvatron.core.files import write_atomic
from galvatron.core.known import known_families
from galvatron.estimate import ClusterShape, estimate_model, spec_of_config
from galvatron.search import Limits, search

DEVICES_PER_NODE = 8
MAX_SEQ_LEN = 4096
GIVEN_SEQ_LEN = {"t5": 512}
"""Tokens of a sequence where a config has no most."""
PAIRS = 4096
"""In the batch of a contrast, which lives on many and has one microbatch alone."""
WIDE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
QWEN_TEXT = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BART large", {}),
    "bert": ("BERT large", WIDE),
    "clip": ("CLIP ViT-L/14", {
        "vision_config": {**WIDE, "patch_size": 14, "projection_dim": 768},
        "text_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768,
        },
        "projection_dim": 768,
    }),
    "cohere": ("Command R 35B", {}),
    "deepseek_v3": ("DeepSeek-V3 671B", {}),
    "deit": ("DeiT base", {}),
    "dinov2": ("DINOv2 large", {**WIDE, "patch_size": 14, "image_size": 518}),
    "electra": ("ELECTRA large", {**WIDE, "embedding_size": 1024}),
    "gemma2": ("Gemma 2 9B", {
        "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }),
    "gemma3_text": ("Gemma 3 4B", {
        "hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 10240,
    }),
    "glm4": ("GLM-4 9B", {}),
    "glm4v": ("GLM-4.1V 9B", {}),
    "gpt2": ("GPT-2 XL", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt_neox": ("GPT-NeoX 20B", {}),
    "gpt_oss": ("GPT-OSS 120B", {}),
    "granite": ("Granite 3 8B", {
        "num_hidden_layers": 40, "num_key_value_heads": 8, "intermediate_size": 12800, "vocab_size": 49155,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }),
    "llama": ("Llama 3.1 8B", {
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }),
    "llava": ("LLaVA 1.5 7B", {}),
    "marian": ("Opus-MT", {
        "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
    }),
    "mistral": ("Mistral 7B", {}),
    "mixtral": ("Mixtral 8x7B", {}),
    "modernbert": ("ModernBERT base", {}),
    "olmo2": ("OLMo 2 7B", {"vocab_size": 100352, "max_position_embeddings": 4096}),
    "opt": ("OPT 6.7B", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
        "word_embed_proj_dim": 4096,
    }),
    "pegasus": ("PEGASUS large", {"encoder_layers": 16, "decoder_layers": 16, "vocab_size": 96103}),
    "phi3": ("Phi-3 mini", {}),
    "qwen2": ("Qwen2.5 7B", QWEN_TEXT),
    "qwen2_5_vl": ("Qwen2.5-VL 7B", {"text_config": QWEN_TEXT, "vision_config": {"hidden_size": 1280}}),
    "qwen2_vl": ("Qwen2-VL 7B", {"text_config": QWEN_TEXT}),
    "qwen3": ("Qwen3 8B", {
        "num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 12288, "head_dim": 128,
    }),
    "qwen3_moe": ("Qwen3 30B-A3B", {"num_hidden_layers": 48, "head_dim": 128}),
    "roberta": ("RoBERTa large", {**WIDE, "vocab_size": 50265, "max_position_embeddings": 514}),
    "siglip": ("SigLIP so400m", {
        "vision_config": {**SO400M, "patch_size": 14, "image_size": 384},
        "text_config": {**SO400M, "projection_size": 1152},
    }),
    "smollm3": ("SmolLM3 3B", {}),
    "starcoder2": ("StarCoder2 3B", {}),
    "swin": ("Swin large", {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}),
    "t5": ("T5 3B", {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_heads": 32, "num_layers": 24}),
    "vit": ("ViT huge", {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14,
    }),
    "whisper": ("Whisper large v3", {
        "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
        "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 128,
        "vocab_size": 51866,
    }),
}  # fmt: skip
"""Of every type a published model, by what differs from the library's own config of the type."""


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--families", nargs="+", default=list(known_families()), choices=list(known_families()))
    parser.add_argument("--preset", default="h100")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--global-batch-size", type=int, default=512)
    return measure.sweep_options(parser)


def config_of(model_type: str) -> dict[str, Any]:
    """As the published model's ``config.json`` has it, in the keys that a size depends on."""
    from transformers import AutoConfig  # not torch

    config = AutoConfig.for_model(model_type, **SIZES[model_type][1])
    return json.loads(config.to_json_string(use_diff=False))  # type: ignore[no-any-return]


def one(point: dict[str, Any]) -> dict[str, Any]:
    name, devices = point["family"], point["num_devices"]
    family = known_families()[name].family
    spec = spec_of_config(config_of(family.model_type), name, family.task)
    seq_len = min(spec.max_seq_len, GIVEN_SEQ_LEN.get(name, MAX_SEQ_LEN))
    per_node = min(devices, DEVICES_PER_NODE)
    shape = ClusterShape.parse(f"{point['preset']}:{devices // per_node}x{per_node}", ())
    model, hardware = estimate_model(spec, shape.preset, seq_len=seq_len), shape.profile()
    row, found = measure.searched(
        lambda: search(
            model,
            hardware,
            global_batch_size=point["global_batch_size"],
            limits=Limits.parse("runtime"),
            baselines=False,
        )
    )
    size = {"parameters": spec.num_parameters, "num_layers": spec.num_layers, "stacks": spec.stacks, "task": spec.task}
    row = {"model": SIZES[family.model_type][0], **size, "seq_len": seq_len, **row}
    if found is None:
        return row
    found.plan.validate(spec, hardware.world_size)
    fits = found.prediction.peak_memory_bytes <= found.memory_limit_bytes
    return {**row, "fits": fits, "what_if": found.plan.what_if}


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {
            "family": family,
            "num_devices": devices,
            "preset": options.preset,
            "global_batch_size": PAIRS
            if known_families()[family].family.task == "contrast"
            else options.global_batch_size,
        }
        for family, devices in itertools.product(options.families, options.devices)
    ]


def words(point: dict[str, Any]) -> str:
    return f"{point['family']} on {point['num_devices']}"


def main() -> int:
    options = arguments()
    if options.point is not None:
        print(json.dumps(one(options.point)))
        return 0
    rows = measure.sweep(__file__, options, points(options), words)
    write_atomic(options.out.with_suffix(".md"), table(rows))
    measure.show("searches", COLUMNS, map(line, rows))
    return int(not all(row["status"] == "infeasible" or row.get("fits") for row in rows))


COLUMNS = ("family", "model", "parameters", "layers", "tokens", "devices", "step s", "gap", "GiB", "CPU s", "plan")


def line(row: dict[str, Any]) -> tuple[object, ...]:
    if row["status"] != "found":
        return (row["family"], row.get("model"), *[None] * 3, row["num_devices"], *[None] * 4, row["status"])
    return (
        row["family"],
        row["model"],
        f"{row['parameters'] / 1e9:.3g}B",
        *(row[name] for name in ("num_layers", "seq_len", "num_devices", "step_time_s", "gap")),
        row["peak_memory_bytes"] / 2**30,
        row["cpu_s"],
        "; ".join(row["plan"]),
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    cells = (["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in line(row)] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *cells)) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
