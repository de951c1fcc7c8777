"""What serving refuses: models and settings at the start, requests one by one."""

import operator
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from quantcache.quantization.scheme import PAGE_SIZE

PLACE: Final = "int8_batching"

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of models whose open pages the layout has room for."""

_NOT_BATCHED: Final[dict[str, object]] = {
    "num_beams": 1,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": 1.0,
}
"""Options of ``generate`` that its continuous batching does not read, and what each is where it is not wanted."""

_LISTED: Final = 8
"""Layers that a message names."""


def check_model(model: Any) -> None:
    """Refuse a model whose layers are not all full attention with keys and values of their own.

    Raises:
        NotImplementedError: it names the layers, or else what is in the way, as layers on several devices are.
        TypeError: it is no model, or its dtype is none of ``DTYPES``.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise TypeError(f"{PLACE}: the model must be one of transformers, loaded, got {name}.")
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
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise NotImplementedError(
            f"{PLACE}: the model must be on one device, as the pool is, {name} is on {', '.join(devices)}. "
            "Load it with tp_plan to share it among GPUs."
        )
    if model.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{PLACE}: the dtype of the model must be one of {names}, got {model.dtype}.")
    if getattr(model, "generation_config", None) is None:
        raise NotImplementedError(f"{PLACE}: the model must generate text, {name} does not.")


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
        TypeError: it is no config of continuous batching.
        ValueError: ``page_size`` is not 64; another size is out of its range; blocks are to be offloaded from a CPU.
        NotImplementedError: it names what transformers' manager offers and this one does not.
    """
    if not isinstance(config, ContinuousBatchingConfig):
        raise TypeError(
            f"{PLACE}: continuous_batching_config must be a ContinuousBatchingConfig, got {type(config).__name__}."
        )
    for name in ("num_blocks", "max_batch_tokens", "max_requests_per_batch"):
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{PLACE}: {name} must be a whole number from 1, got {value!r}.")
    share = config.max_memory_percent
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"{PLACE}: max_memory_percent must be above 0 and at most 1, got {share!r}.")
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


def check_generation(config: GenerationConfig) -> None:
    """Refuse ways to generate that transformers' manager would pass over in silence.

    Raises:
        NotImplementedError: it names the option.
    """
    for name in _NOT_BATCHED:
        value = getattr(config, name, None)
        if value is not None and value is not False and value != _NOT_BATCHED[name]:
            raise NotImplementedError(
                f"{PLACE}: generation_config must have no {name}, which transformers' continuous batching does not "
                f"know, got {value!r}."
            )


def check_stop_strings(stop_strings: Any, tokenizer: Any) -> tuple[str, ...]:
    """The strings that end an answer, of which there may be none.

    Args:
        stop_strings: a string, several, or None.
        tokenizer: of the model, None where nobody gave it.

    Raises:
        TypeError: it is something else, or has something else in it.
        ValueError: a string is empty; there are strings and no tokenizer.
    """
    found = (stop_strings,) if isinstance(stop_strings, str) else () if stop_strings is None else stop_strings
    if not isinstance(found, list | tuple) or not all(isinstance(string, str) for string in found):
        raise TypeError(f"{PLACE}: stop_strings must be a string or a list of strings, got {stop_strings!r}.")
    if "" in found:
        raise ValueError(f"{PLACE}: each of stop_strings must have a character, got {stop_strings!r}.")
    if found and not hasattr(tokenizer, "get_vocab"):
        raise ValueError(
            f"{PLACE}: stop_strings must come with the model's tokenizer, got {stop_strings!r} and "
            f"{type(tokenizer).__name__}. Give int8_batching or generate_batch tokenizer=..."
        )
    return tuple(found)


def check_answers(number: int) -> None:
    """Refuse a request that wants no answer.

    Raises:
        ValueError: it does.
    """
    if type(number) is not int or number < 1:
        raise ValueError(f"{PLACE}: num_return_sequences must be a whole number from 1, got {number!r}.")


def tokens_of(prompt: Any) -> list[int]:
    """The tokens of a prompt.

    Raises:
        TypeError: it is no sequence of whole numbers.
    """
    try:
        return list(map(operator.index, prompt))
    except TypeError:
        raise TypeError(
            f"{PLACE}: a prompt must be a list of tokens, as in tokenizer(text).input_ids, got {repr(prompt)[:60]}."
        ) from None


def max_positions(config: Any) -> int | None:
    """Tokens that a model was made for, None if its config, that of the text model, does not say."""
    return getattr(config, "max_position_embeddings", None) or None


def check_positions(config: Any, length: int, max_new_tokens: int) -> None:
    """Refuse a request with tokens for which the model has no position; rotary embeddings are computed for any.

    Args:
        config: of the text model.
        length: tokens of the prompt.
        max_new_tokens: most tokens of the answer.

    Raises:
        ValueError: the model looks positions up, and the last token is behind them.
    """
    positions = max_positions(config)
    if getattr(config, "rope_parameters", None) is None and positions and length + max_new_tokens - 1 > positions:
        raise ValueError(
            f"{PLACE}: a prompt and its answer must fit the {positions} positions of the model, got {length} and up to "
            f"{max_new_tokens} new ones."
        )


def check_prompt(prompt: Sequence[int], max_new_tokens: int, most_tokens: int, vocab_size: int) -> None:
    """Refuse a request that can never be served.

    Args:
        prompt: its tokens.
        max_new_tokens: most tokens of the answer.
        most_tokens: stored tokens of one request that the pool has room for.
        vocab_size: tokens that the model knows.

    Raises:
        TypeError: ``max_new_tokens`` is no whole number.
        ValueError: the prompt is empty or has a token that the model does not know, or there is no room for the two.
    """
    if not isinstance(max_new_tokens, int):
        raise TypeError(f"{PLACE}: max_new_tokens must be a whole number, got {max_new_tokens!r}.")
    length = len(prompt)
    if not length:
        raise ValueError(f"{PLACE}: a prompt must have a token, got none.")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(f"{PLACE}: the tokens of a prompt must be 0 to {vocab_size - 1}, got {wrong}.")
    needed = length + max_new_tokens - 1  # the last token of an answer is not stored
    if max_new_tokens >= 1 and needed <= most_tokens:
        return
    if length > most_tokens:
        raise ValueError(
            f"{PLACE}: a prompt must fit the pool, {most_tokens} tokens, got {length}. Give the pool more by "
            "num_blocks or max_memory_percent."
        )
    if max_new_tokens < 1:
        raise ValueError(f"{PLACE}: an answer must have room for a token, got {max_new_tokens} after {length}.")
    raise ValueError(
        f"{PLACE}: a prompt and its answer must fit the pool, {most_tokens} tokens, got {length} and up to "
        f"{max_new_tokens} new ones. Ask for fewer, or give the pool more by num_blocks or max_memory_percent."
    )
