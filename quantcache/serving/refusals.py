"""What serving refuses: models and settings at the start, requests one by one."""

from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig

from quantcache.quantization.scheme import PAGE_SIZE

PLACE: Final = "int8_batching"

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of models whose open pages the layout has room for."""

_LISTED: Final = 8
"""Layers that a message names."""


def check_model(model: Any) -> None:
    """Refuse a model whose layers are not all full attention with keys and values of their own.

    Raises:
        NotImplementedError: it names the layers, or else what is in the way.
        TypeError: its dtype is none of ``DTYPES``.
    """
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{PLACE}: the model must be a decoder, {name} has an encoder, whose states no block keeps. "
            "Use generate() with a QuantizedInt8Cache."
        )
    config = config.get_text_config()
    other = _other_layers(config)
    if other:
        kinds = "; ".join(f"{kind} in {_listed(layers)}" for kind, layers in other.items())
        raise NotImplementedError(
            f"{PLACE}: all layers must be full_attention, {name} has {kinds}. Use generate() with a QuantizedInt8Cache."
        )
    for reason in (
        "a recurrent state" if getattr(model, "_is_stateful", False) else None,
        "compressed keys and values (kv_lora_rank)" if getattr(config, "kv_lora_rank", None) else None,
        "layers that share keys and values" if getattr(config, "num_kv_shared_layers", None) else None,
        None
        if getattr(model, "_supports_attention_backend", False)
        else "attention of its own, not transformers' AttentionInterface",
    ):
        if reason:
            raise NotImplementedError(
                f"{PLACE}: each layer must store keys and values of its own, {name} has {reason}. "
                "Use generate() with a QuantizedInt8Cache."
            )
    if model.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{PLACE}: the dtype of the model must be one of {names}, got {model.dtype}.")


def _other_layers(config: Any) -> dict[str, list[int]]:
    """The layers of each kind that is not full attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = getattr(config, "layers_block_type", None)
        kinds = None if kinds is None else ["full_attention" if kind == "attention" else kind for kind in kinds]
    if kinds is None:
        is_sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if is_sliding else "full_attention"] * config.num_hidden_layers
    other: dict[str, list[int]] = {}
    for layer_idx, kind in enumerate(kinds):
        if kind != "full_attention":
            other.setdefault(kind, []).append(layer_idx)
    return other


def _listed(layers: list[int]) -> str:
    """Layers in words."""
    more = len(layers) - _LISTED
    shown = ", ".join(map(str, layers[:_LISTED]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def check_config(config: ContinuousBatchingConfig, device: torch.device) -> None:
    """Refuse settings that blocks of int8 do not work with.

    Raises:
        ValueError: ``page_size`` is not 64; blocks are to be offloaded from a CPU.
        NotImplementedError: it names what transformers' manager offers and this one does not.
    """
    if config.page_size != PAGE_SIZE:
        raise ValueError(
            f"{PLACE}: page_size must be {PAGE_SIZE}, the tokens of an int8 page, got {config.page_size}. "
            f"Give ContinuousBatchingConfig(page_size={PAGE_SIZE}, ...), or none; num_blocks counts such pages."
        )
    compiled = ("varlen_compile_config", "decode_compile_config", "default_compile_level")
    asked = [name for name in compiled if getattr(config, name, None)]
    if asked:
        raise NotImplementedError(f"{PLACE}: the forward pass must not be compiled, got {asked[0]}.")
    graphs = config.use_cuda_graph
    if isinstance(graphs, tuple) and graphs[0]:
        raise NotImplementedError(
            f"{PLACE}: use_cuda_graph must be (False, ...), batches with prompts are not recorded, got {graphs}."
        )
    if config.cpu_offload_space is None or config.cpu_offload_space > 0:
        if device.type == "cpu":
            raise ValueError(
                f"{PLACE}: cpu_offload_space must be 0 for a model on a CPU, got {config.cpu_offload_space}."
            )
        if config.use_async_batching:
            raise NotImplementedError(
                f"{PLACE}: cpu_offload_space and use_async_batching must not come together, since a request then goes "
                "back by a token, whose page may be closed. Leave one of them out."
            )


def refusal_of_prompt(prompt: Any, max_new_tokens: int | None, most_tokens: int) -> str | None:
    """Why a request can never be served, or None.

    Args:
        prompt: its tokens.
        max_new_tokens: most tokens of the answer, None for no limit.
        most_tokens: stored tokens of one request that the pool has room for.
    """
    length = len(prompt)
    if not length:
        return f"{PLACE}: a prompt must have a token, got none."
    if max_new_tokens is not None and max_new_tokens < 1:
        return f"{PLACE}: max_new_tokens must be at least 1, got {max_new_tokens}."
    # The last token of an answer is not stored.
    needed = length + (0 if max_new_tokens is None else max_new_tokens - 1)
    if needed > most_tokens:
        answer = "" if max_new_tokens is None else f" and up to {max_new_tokens} new ones"
        return (
            f"{PLACE}: the pool must have room for a request, {most_tokens} tokens at most, got a prompt of {length}"
            f"{answer}. Give it more by num_blocks or max_memory_percent."
        )
    return None
