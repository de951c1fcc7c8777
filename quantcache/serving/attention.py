"""The attention function that a model has while it serves."""

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface

from quantcache.quantization.options import AttentionOptions
from quantcache.serving import _host

NAME: Final = "quantcache_int8_blocks"
"""It has neither "flash" in it, at which transformers looks for another package, nor is it one that makes masks."""

_UNSUPPORTED: Final = ("position_bias", "sliding_window", "output_attentions", "dropout")
"""Options of attention functions that blocks do not cover."""


def attend_blocks(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a batch over its blocks, in which its new tokens are stored thereafter.

    Args:
        module: the attention module.
        query: (1, num_q_heads, tokens, head_dim).
        key: (1, num_kv_heads, tokens, head_dim).
        value: (1, num_kv_heads, tokens, head_dim).
        attention_mask: None.
        kwargs: options of attention functions, and what transformers says of the batch.

    Returns:
        (1, tokens, num_q_heads, head_dim), and None for the weights.

    Raises:
        RuntimeError: the model was called otherwise than by the manager.
        NotImplementedError: an option is not covered.
    """
    store = _host.store_of(module, kwargs)
    if store is None:
        raise RuntimeError(
            "int8_batching: the model must be left to its requests while they run, got a call of its own. Use "
            "generate_batch, add_request or cache_implementation='paged', or wait until the manager has stopped."
        )
    for option in _UNSUPPORTED:
        asked = kwargs.get(option)
        if asked is not None and (isinstance(asked, Tensor) or asked):
            raise NotImplementedError(f"int8_batching: attention must have no {option}, got {asked!r}.")
    options = AttentionOptions(
        is_causal=True, softmax_scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux")
    )
    return store.attend(module.layer_idx, query, key, value, kwargs, options), None


def register() -> None:
    """Make the name known to transformers, however often this is called."""
    AttentionInterface.register(NAME, attend_blocks)
