"""What a request to the server asks for: what of it is served, and how the manager is told."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from quantcache.quantization.scheme import PAGE_SIZE

DEFAULT_NEW_TOKENS: Final = 1024
"""Tokens of an answer whose request names no number, where so many fit; transformers' server has the same."""


def sampling_config(model: PreTrainedModel) -> GenerationConfig:
    """A generation config for a manager whose requests bring their own sampling: it has every processor for it."""
    own = model.generation_config
    return GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=50,
        top_p=0.5,
        max_new_tokens=own.max_new_tokens or DEFAULT_NEW_TOKENS,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id,
    )


def batching_config(**options: Any) -> ContinuousBatchingConfig:
    """A config of blocks of 64 tokens, with sampling options for each request.

    Args:
        options: others of transformers' ``ContinuousBatchingConfig``.
    """
    return ContinuousBatchingConfig(page_size=PAGE_SIZE, per_request_processors=True, **options)


def sampling_of(gen_config: GenerationConfig, vocab_size: int) -> dict[str, Any]:
    """What a request tells the manager's processors; without sampling, the most likely token is the only one left."""
    if not gen_config.do_sample or gen_config.temperature == 0:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return {
        "temperature": 1.0 if gen_config.temperature is None else float(gen_config.temperature),
        "top_k": min(gen_config.top_k or vocab_size, vocab_size),  # before 5.24 the host looks beyond a row's end
        "top_p": 1.0 if gen_config.top_p is None else float(gen_config.top_p),
    }


LENGTHS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "generation_config": (),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Fields that change an answer and are not served, with the values that ask for nothing."""

MOST_ANSWERS: Final = 128
MOST_STOPS: Final = 4
"""Of a request, as in OpenAI's API."""


def check_body(body: Mapping[str, Any]) -> None:
    """Refuse a request that cannot be served as it asks.

    Raises:
        HTTPException: 400 with the field and what it must be.
    """
    for field, neutral in NEUTRAL.items():
        if body.get(field) is not None and body[field] not in neutral:
            raise HTTPException(400, f"{field} is not served under continuous batching, got {body[field]!r}.")
    for field in LENGTHS:
        value = body.get(field)
        if value is not None and (type(value) is not int or value < 1):
            raise HTTPException(400, f"{field} must be a whole number from 1, got {value!r}.")
    answers, stop = body.get("n"), body.get("stop")
    if answers is not None and (type(answers) is not int or not 1 <= answers <= MOST_ANSWERS):
        raise HTTPException(400, f"n must be a whole number from 1 to {MOST_ANSWERS}, got {answers!r}.")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise HTTPException(400, f"stop must be a string or up to {MOST_STOPS} of them, none empty, got {stop!r}.")
    for field, low, high in (("temperature", 0, 100), ("top_p", 0, 1)):
        value = body.get(field)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            raise HTTPException(400, f"{field} must be a number from {low} to {high}, got {value!r}.")
    if "messages" in body or not {"prompt", "input"} & body.keys():
        messages = body.get("messages")
        turns = messages if isinstance(messages, list) else []
        if not turns or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in turns):
            raise HTTPException(400, "messages must be a list of at least one object with role and content.")
