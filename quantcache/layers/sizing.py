"""How many tokens a call of ``generate()`` will store, for a cache of fixed capacity."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig


def tokens_of_generate(
    model: Any, inputs: Tensor | Mapping[str, Any], generation_config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[int, int]:
    """Tokens of the prompt and new tokens of ``model.generate(**inputs, generation_config=..., **options)``.

    Args:
        model: with a ``generation_config`` of its own.
        inputs: token ids (batch, seq_len), or the keyword arguments with ``input_ids`` or ``inputs_embeds``.
        generation_config: as for ``generate()``; the model's if None.
        options: the other keyword arguments of ``generate()``; those that change no length are ignored.

    Raises:
        ValueError: no prompt among the inputs, or no limit to the new tokens.
    """
    prompt = inputs
    if not isinstance(inputs, Tensor):
        found = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if not found:
            raise ValueError(
                "QuantizedInt8Cache.for_generate: inputs must be token ids or have input_ids or inputs_embeds, "
                f"got {', '.join(inputs) or 'nothing'}."
            )
        prompt = found[0]
    prompt_len: int = prompt.shape[1]  # type: ignore[union-attr]
    config = copy.deepcopy(generation_config or model.generation_config)
    config.update(**{name: value for name, value in options.items() if name in ("max_new_tokens", "max_length")})
    if config.max_new_tokens is not None:
        return prompt_len, config.max_new_tokens
    if config.max_length is None:
        raise ValueError(
            "QuantizedInt8Cache.for_generate: the number of new tokens must be limited, got neither max_new_tokens nor "
            "max_length. Pass max_new_tokens, here and to generate()."
        )
    return prompt_len, max(config.max_length - prompt_len, 0)
