"""Shapes of the causal family that is planned for and not trained yet: DeepSeek-V3.

Takes a Config; gives a ModelSpec whose parameters have Hugging Face's names and order.
"""

from __future__ import annotations

from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec

from .parts import Config, chain, column, experts, gated_mlp, row, vocabulary, whole


def deepseek_v3(config: Config, name: str) -> ModelSpec:
    """DeepSeek-V3: latent attention; dense layers, then layers of experts with shared ones.

    Multi-token prediction is left out.  ``head_dim`` is the mean of the widths of queries and of values, which is
    what attention's FLOPs see.
    """
    hidden, ffn, moe_ffn = (config.size(k) for k in ("hidden_size", "intermediate_size", "moe_intermediate_size"))
    dense = config.size("first_k_dense_replace")
    common = {
        "hidden_size": hidden,
        "num_heads": config.size("num_attention_heads"),
        "num_kv_heads": config.size("num_attention_heads"),
        "head_dim": (_query_width(config) + config.size("v_head_dim")) // 2,
    }
    before, norms = chain(_latent_attention(config)), _llama_norms(config)
    shared = gated_mlp("mlp.shared_experts.", hidden, config.size("n_shared_experts") * moe_ffn)
    routed = chain(experts("mlp.", config.size("n_routed_experts"), hidden, moe_ffn), shared)
    kinds = (
        LayerKind(
            name="dense",
            count=dense,
            ffn_size=ffn,
            parameters=chain(before, gated_mlp("mlp.", hidden, ffn), norms),
            **common,
        ),
        LayerKind(
            name="moe",
            count=config.size("num_hidden_layers") - dense,
            ffn_size=moe_ffn,
            num_experts=config.size("n_routed_experts"),
            experts_per_token=config.size("num_experts_per_tok"),
            beside_experts="mlp.shared_experts",
            parameters=chain(before, routed, norms),
            **common,
        ),
    )
    return _llama_model(config, name, kinds)


def _query_width(config: Config) -> int:
    return config.size("qk_nope_head_dim") + config.size("qk_rope_head_dim")


def _latent_attention(config: Config) -> tuple[ParameterSpec, ...]:
    """Queries, keys and values from latents; what makes the latents and their norms stay whole on every rank."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    q_rank, kv_rank, value = (config.size(key) for key in ("q_lora_rank", "kv_lora_rank", "v_head_dim"))
    by_heads = Cut(dim=0, segments=(heads,))
    keys_and_values = heads * (config.size("qk_nope_head_dim") + value)
    return chain(
        column("self_attn.q_a_proj", q_rank, hidden, None),
        [whole("self_attn.q_a_layernorm.weight", q_rank)],
        column("self_attn.q_b_proj", heads * _query_width(config), q_rank, by_heads),
        column("self_attn.kv_a_proj_with_mqa", kv_rank + config.size("qk_rope_head_dim"), hidden, None),
        [whole("self_attn.kv_a_layernorm.weight", kv_rank)],
        column("self_attn.kv_b_proj", keys_and_values, kv_rank, by_heads),
        row("self_attn.o_proj", hidden, heads * value, heads),
    )


def _llama_norms(config: Config) -> tuple[ParameterSpec, ...]:
    hidden = config.size("hidden_size")
    return whole("input_layernorm.weight", hidden), whole("post_attention_layernorm.weight", hidden)


def _llama_model(config: Config, name: str, layers: tuple[LayerKind, ...]) -> ModelSpec:
    hidden, words = config.size("hidden_size"), config.size("vocab_size")
    return ModelSpec(
        name=name,
        family=config.get("model_type", ""),
        layers=layers,
        vocab_size=words,
        max_seq_len=config.size("max_position_embeddings"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        embedding=UnitSpec(parameters=(vocabulary("model.embed_tokens.weight", words, hidden),)),
        head=UnitSpec(parameters=(whole("model.norm.weight", hidden), vocabulary("lm_head.weight", words, hidden))),
    )
