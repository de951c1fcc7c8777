"""How many weights a decoder has, from its config.

Counted are embeddings, attention, feed-forward layers and experts; norms and biases are left out, less than 0.1 %. The
tests compare with transformers' models and with the published counts of the presets.
"""

from collections.abc import Mapping
from typing import Any, Final

_UNGATED: Final = frozenset({"gpt2", "gpt_neox", "bloom", "falcon", "opt", "gptj", "phi", "starcoder2", "mpt"})
"""Families with two matrices in a feed-forward layer; others have three."""

_UNKNOWN: Final = frozenset({"jamba", "falcon_h1", "lfm2"})
"""Families whose mixers are not counted here."""


def count_parameters(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Weights in all, and those of the embeddings and the output layer; None for families not known here."""
    model_type = str(config.get("model_type"))
    hidden, vocab = config.get("hidden_size") or config.get("n_embd"), config.get("vocab_size")
    count = config.get("num_hidden_layers") or config.get("n_layer")
    if model_type in _UNKNOWN or not (isinstance(hidden, int) and isinstance(vocab, int) and isinstance(count, int)):
        return None
    # Families that tie by default leave the entry out of their files.
    ties = config.get("tie_word_embeddings", model_type in ("gpt2", "bloom", "gemma2", "gemma3_text", "falcon"))
    embeddings = vocab * hidden * (1 if ties else 2)
    if model_type == "gpt2":  # positions are learned
        embeddings += hidden * config.get("n_positions", 1024)
    layers = sum(_mixer(config, hidden, i) + _feed_forward(config, hidden, i) for i in range(count))
    return embeddings + layers, embeddings


def _mixer(config: Mapping[str, Any], hidden: int, index: int) -> int:
    """Weights of the attention of a layer, or of what stands in its place."""
    period = config.get("full_attention_interval", 4)
    if "linear_num_value_heads" in config and (index + 1) % period:
        key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        value = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        projections = 2 * key + 2 * value + 2 * config["linear_num_value_heads"]
        return int(hidden * (projections + value) + (2 * key + value) * config["linear_conv_kernel_dim"])
    heads = config.get("num_attention_heads") or config["n_head"]
    if config.get("kv_lora_rank"):
        rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
        query, rank = heads * (nope + rope), config["kv_lora_rank"]
        low_rank = config.get("q_lora_rank")
        queries = hidden * query if not low_rank else low_rank * (hidden + query)
        return int(queries + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden)
    head_dim = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    gate = heads if "linear_num_value_heads" in config else 0  # these gate the output of full attention
    return int(hidden * head_dim * (2 * heads + gate + 2 * kv_heads))


def _feed_forward(config: Mapping[str, Any], hidden: int, index: int) -> int:
    """Weights of the feed-forward layer or the experts of a layer."""
    width = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_hidden_size") or 4 * hidden
    matrices = 2 if config.get("model_type") in _UNGATED else 3
    experts = next((config[n] for n in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(n)), 0)
    dense_first = config.get("first_k_dense_replace", 0)
    if not experts or index < dense_first or (index + 1) % (config.get("decoder_sparse_step") or 1):
        return int(matrices * hidden * width)
    expert_width = config.get("moe_intermediate_size") or width
    shared = config.get("shared_expert_intermediate_size") or config.get("n_shared_experts", 0) * expert_width
    gate = hidden if config.get("shared_expert_intermediate_size") else 0
    return int(matrices * hidden * (experts * expert_width + shared) + hidden * experts + gate)
