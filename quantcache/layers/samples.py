"""Prompts that many answers go on from: what ``QuantizedInt8Cache.for_samples`` takes, runs and gives back."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantcache.layers import _host
from quantcache.layers.fixed import StaticInt8Layer

_PLACE: Final = "QuantizedInt8Cache.for_samples"

_TOKENWISE: Final = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs with a number for each token, of which all but the last can be run before."""


def prompts_of(model: Any, inputs: Tensor | Mapping[str, Any], n: int) -> dict[str, Tensor]:
    """The inputs by name, once they are known to be prompts that ``n`` answers each can go on from.

    Args:
        model: what will generate.
        inputs: token ids (batch, seq_len), or a mapping with ``input_ids``.
        n: answers to each prompt.

    Raises:
        TypeError: ``n`` is not an int, or an input is not a tensor.
        ValueError: ``n`` is below 1; no ids, or other shapes than theirs; prompts that are not padded on the left.
        NotImplementedError: an encoder-decoder model, or inputs other than one number for each token.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{_PLACE}: n must be an int, got {type(n).__name__}.")
    if n < 1:
        raise ValueError(f"{_PLACE}: n must be at least 1 answer, got {n}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{_PLACE}: the model must be a decoder, got {type(model).__name__}. An encoder-decoder model runs its "
            "encoder once for all answers by itself: pass num_return_sequences or num_beams to generate()."
        )
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    prompts = {name: value for name, value in given.items() if value is not None}
    if "input_ids" not in prompts:
        raise ValueError(
            f"{_PLACE}: inputs must be token ids or have input_ids, got {', '.join(prompts) or 'nothing'}."
        )
    for name, value in prompts.items():
        if name not in _TOKENWISE:
            raise NotImplementedError(
                f"{_PLACE}: inputs must be of {', '.join(_TOKENWISE)}, got {name}. Fill a cache with the prompt by "
                "generate() or the model itself, and call cache.batch_repeat_interleave(n)."
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{_PLACE}: {name} must be a tensor, got {type(value).__name__}. Ask the tokenizer for "
                'return_tensors="pt".'
            )
    ids = prompts["input_ids"]
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{_PLACE}: input_ids must be (batch, seq_len), at least (1, 1), got {tuple(ids.shape)}.")
    for name, value in prompts.items():
        if value.shape != ids.shape:
            raise ValueError(
                f"{_PLACE}: {name} must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(value.shape)}."
            )
    mask = prompts.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"{_PLACE}: prompts must be padded on the left, got padding behind prompt {row}. "
            'Use AutoTokenizer.from_pretrained(..., padding_side="left").'
        )
    return prompts


def check_layers(layers: list[Any]) -> None:
    """Refuse layers of fixed capacity that cannot be repeated.

    Raises:
        NotImplementedError: one is transformers' own.
    """
    for layer_idx, layer in enumerate(layers):
        if not isinstance(layer, StaticInt8Layer):
            raise NotImplementedError(
                f"{_PLACE}: with max_cache_len every layer must be int8, got a {type(layer).__name__} as layer "
                f"{layer_idx}. Leave max_cache_len out."
            )


def run(model: Any, cache: Any, prompts: dict[str, Tensor]) -> None:
    """Fill ``cache`` with all but the last token of the prompts, from which ``generate()`` goes on.

    It is ``generate()`` that runs them, which knows the positions, masks and further inputs that each model wants. The
    token that it adds is not stored.
    """
    begun = {name: value[:, :-1] for name, value in prompts.items()}
    if begun["input_ids"].shape[1]:
        plain: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        model.generate(**begun, **_host.cache_argument(cache), **plain)


def repeated(prompts: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The inputs of ``n`` answers to each prompt, side by side."""
    return {name: torch.repeat_interleave(value, n, dim=0) for name, value in prompts.items()}
