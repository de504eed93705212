"""Shapes of the causal families: LLaMA and its relatives, GPT-2, GPT-NeoX, and those with experts.

Takes a Config; gives a ModelSpec whose parameters have Hugging Face's names and order.
"""

from __future__ import annotations

from galvatron.core.errors import ConfigError
from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec

from .parts import Config, attention, chain, column, experts, gated_mlp, layer_norm, multi_head, row, vocabulary, whole

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(config: Config, name: str) -> ModelSpec:
    """LLaMA, Mistral, Qwen2 and Qwen3: RMS norms, grouped queries, a gated MLP."""
    mlp = gated_mlp("mlp.", config.size("hidden_size"), config.size("intermediate_size"), config.get("mlp_bias", False))
    parameters = chain(_llama_attention(config), mlp, _llama_norms(config))
    layer = _llama_kind(config, "intermediate_size", parameters)
    return _llama_model(config, name, (layer,))


def mixtral(config: Config, name: str) -> ModelSpec:
    """Mixtral: every MLP is a set of experts."""
    return _mixture(config, name, "num_local_experts", "intermediate_size")


def qwen3_moe(config: Config, name: str) -> ModelSpec:
    """Qwen3-MoE with experts in every layer."""
    if config.get("mlp_only_layers", []) or config.get("decoder_sparse_step", 1) != 1:
        raise ConfigError(
            f"qwen3_moe needs experts in every layer, got mlp_only_layers={config.get('mlp_only_layers', [])}, "
            f"decoder_sparse_step={config.get('decoder_sparse_step', 1)}; set them to [] and 1"
        )
    return _mixture(config, name, "num_experts", "moe_intermediate_size")


def _mixture(config: Config, name: str, count_key: str, ffn_key: str) -> ModelSpec:
    mlp = experts("mlp.", config.size(count_key), config.size("hidden_size"), config.size(ffn_key))
    parameters = chain(_llama_attention(config), mlp, _llama_norms(config))
    routed = {"num_experts": config.size(count_key), "experts_per_token": config.size("num_experts_per_tok")}
    return _llama_model(config, name, (_llama_kind(config, ffn_key, parameters, **routed),))


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


def _llama_attention(config: Config) -> tuple[ParameterSpec, ...]:
    hidden, heads, head_dim = config.size("hidden_size"), config.size("num_attention_heads"), _head_dim(config)
    bias = config.get("attention_bias", False)
    linears = attention(
        "self_attn.",
        QKVO,
        hidden,
        heads,
        _kv_heads(config),
        head_dim,
        bias=bias or config.get("qkv_bias", False),
        output_bias=bias,
    )
    norms = [whole(f"self_attn.{x}_norm.weight", head_dim) for x in "qk"] if config.get("qk_norm", False) else []
    return chain(linears, norms)


def _llama_norms(config: Config) -> tuple[ParameterSpec, ...]:
    hidden = config.size("hidden_size")
    return whole("input_layernorm.weight", hidden), whole("post_attention_layernorm.weight", hidden)


def _llama_kind(config: Config, ffn_key: str, parameters: tuple[ParameterSpec, ...], **routed: int) -> LayerKind:
    return LayerKind(
        count=config.size("num_hidden_layers"),
        hidden_size=config.size("hidden_size"),
        ffn_size=config.size(ffn_key),
        num_heads=config.size("num_attention_heads"),
        num_kv_heads=_kv_heads(config),
        head_dim=_head_dim(config),
        parameters=parameters,
        **routed,
    )


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


def _kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads", config.size("num_attention_heads"))


def _head_dim(config: Config) -> int:
    if "head_dim" in config:
        return config.size("head_dim")
    hidden, heads = config.heads("hidden_size", "num_attention_heads")
    return hidden // heads


def gpt2(config: Config, name: str) -> ModelSpec:
    """GPT-2 and GPT-3: learned positions, biases everywhere, q, k and v fused, weights [inputs, outputs]."""
    (hidden, heads), words = config.heads("n_embd", "n_head"), config.size("vocab_size")
    ffn, positions = config.get("n_inner", 4 * hidden), config.size("n_positions")
    parameters = chain(
        layer_norm("ln_1", hidden),
        column("attn.c_attn", 3 * hidden, hidden, Cut(dim=0, segments=(heads, heads, heads)), True, transposed=True),
        row("attn.c_proj", hidden, hidden, heads, True, transposed=True),
        layer_norm("ln_2", hidden),
        column("mlp.c_fc", ffn, hidden, Cut(dim=0, segments=(ffn,)), True, transposed=True),
        row("mlp.c_proj", hidden, ffn, ffn, True, transposed=True),
    )
    word = vocabulary("transformer.wte.weight", words, hidden)
    head = chain(layer_norm("transformer.ln_f", hidden), [vocabulary("lm_head.weight", words, hidden)])
    return ModelSpec(
        name=name,
        family="gpt2",
        layers=(multi_head(config.size("n_layer"), hidden, ffn, heads, parameters),),
        vocab_size=words,
        max_seq_len=positions,
        tied_embeddings=config.get("tie_word_embeddings", True),
        embedding=UnitSpec(parameters=(word, whole("transformer.wpe.weight", positions, hidden))),
        head=UnitSpec(parameters=head),
    )


def gpt_neox(config: Config, name: str) -> ModelSpec:
    """GPT-NeoX and Pythia: rotary, biases everywhere, q, k and v fused head by head."""
    (hidden, heads), words = config.heads("hidden_size", "num_attention_heads"), config.size("vocab_size")
    ffn = config.size("intermediate_size")
    bias = config.get("attention_bias", True)
    parameters = chain(
        layer_norm("input_layernorm", hidden),
        layer_norm("post_attention_layernorm", hidden),
        column("attention.query_key_value", 3 * hidden, hidden, Cut(dim=0, segments=(heads,)), bias),
        row("attention.dense", hidden, hidden, heads, bias),
        column("mlp.dense_h_to_4h", ffn, hidden, Cut(dim=0, segments=(ffn,)), True),
        row("mlp.dense_4h_to_h", hidden, ffn, ffn, True),
    )
    head = chain(layer_norm("gpt_neox.final_layer_norm", hidden), [vocabulary("lm_head.weight", words, hidden)])
    return ModelSpec(
        name=name,
        family="gpt_neox",
        layers=(multi_head(config.size("num_hidden_layers"), hidden, ffn, heads, parameters),),
        vocab_size=words,
        max_seq_len=config.size("max_position_embeddings"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        embedding=UnitSpec(parameters=(vocabulary("gpt_neox.embed_in.weight", words, hidden),)),
        head=UnitSpec(parameters=head),
    )
