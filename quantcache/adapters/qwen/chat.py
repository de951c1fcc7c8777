"""``chat`` and ``chat_stream`` as callers of the original know them."""

import copy
import queue
import threading
from collections.abc import Iterator
from typing import Any, Final

import torch
from transformers.generation.streamers import BaseStreamer

from quantcache.adapters.qwen.prompts import decode_tokens, get_stop_words_ids, make_context

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
DEFAULT_WINDOW: Final = 6144
"""Tokens of history where the generation config says nothing, as released with most chat models."""

History = list[tuple[str, str]]
_UNSET: Final = object()


def merged_config(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One generation config with ``kwargs`` in it, and the rest of them; neither argument is changed."""
    config = copy.deepcopy(generation_config or model.generation_config)
    kwargs = dict(kwargs)
    if (window := kwargs.pop("max_window_size", None)) is not None:
        config.max_window_size = window
    return config, config.update(**kwargs)


def chat_inputs(
    tokenizer: Any, query: str, history: History | None, system: str, stop_words_ids: Any, config: Any
) -> tuple[str, list[int], list[list[int]]]:
    """Prompt text, prompt ids and stop words of a turn.

    Raises:
        ValueError: ``config`` is not that of a chat model.
    """
    chat_format = getattr(config, "chat_format", None)
    if chat_format != "chatml":
        raise ValueError(
            f'chat: generation_config.chat_format must be "chatml", got {chat_format!r}. Is this a chat model?'
        )
    window = getattr(config, "max_window_size", None) or DEFAULT_WINDOW
    raw_text, ids = make_context(tokenizer, query, history, system, window)
    return raw_text, ids, [*map(list, stop_words_ids or []), *get_stop_words_ids("chatml", tokenizer)]


class ChatMixin:
    """``chat`` and ``chat_stream``, for the model with ``generate``."""

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        stream: object = _UNSET,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer ``query``.

        Args:
            tokenizer: the model's.
            query: the user's words.
            history: (query, response) pairs, oldest first; it is not changed.
            system: the system prompt.
            stream: refused, as in the original; use ``chat_stream``.
            stop_words_ids: token sequences that end the reply, besides the format's.
            generation_config: the model's by default.
            kwargs: for ``generate``, and ``max_window_size``; they override ``generation_config``.

        Returns:
            The reply and the history with this turn.

        Raises:
            ValueError: the generation config is not that of a chat model.
            TypeError: ``stream`` is given.
        """
        if stream is not _UNSET:
            raise TypeError(f"chat: stream is not an argument, got {stream!r}. Use chat_stream for a stream.")
        config, kwargs = merged_config(self, generation_config, kwargs)
        raw_text, ids, words = chat_inputs(tokenizer, query, history, system, stop_words_ids, config)
        input_ids = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        options = {**kwargs, "stop_words_ids": words, "generation_config": config}
        output = self.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)  # type: ignore[attr-defined]
        response = str(decode_tokens(output[0], tokenizer, len(raw_text), len(ids)))
        return response, [*(history or []), (query, response)]

    def chat_stream(
        self,
        tokenizer: Any,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """As ``chat``, yielding the whole reply so far each time it grows; an error in ``generate`` is raised here."""
        config, kwargs = merged_config(self, generation_config, kwargs)
        _, ids, words = chat_inputs(tokenizer, query, history, system, stop_words_ids, config)
        input_ids = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        options = {**kwargs, "stop_words_ids": words, "generation_config": config}
        return _growing_reply(self, tokenizer, input_ids, options)


def _growing_reply(model: Any, tokenizer: Any, input_ids: torch.Tensor, options: dict[str, Any]) -> Iterator[str]:
    """``generate`` in a thread of its own, and the text so far whenever it grows; closing the iterator ends both."""
    tokens = _TokenQueue()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(input_ids, attention_mask=torch.ones_like(input_ids), streamer=tokens, **options)
        except BaseException as failure:
            failures.append(failure)
            tokens.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    reply: list[int] = []
    text = ""
    try:
        while (new := tokens.arrived.get()) is not None:
            reply += new
            longer = tokenizer.decode(reply, skip_special_tokens=True, errors="ignore")
            if longer != text:
                text = longer
                yield text
    finally:  # also when the caller stops reading
        tokens.abandoned = True
        thread.join()
    if failures:
        raise failures[0]


class _AbandonedError(Exception):
    """Ends a ``generate`` whose tokens nobody reads."""


class _TokenQueue(BaseStreamer):
    """New tokens of one sequence for another thread, a list each time, None at the end; the prompt is left out."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[list[int] | None] = queue.Queue()
        self.abandoned = False
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with the prompt and then with each token; ends it when nobody reads any more."""
        if self.abandoned:
            raise _AbandonedError
        if self._prompt_seen:
            self.arrived.put(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Called by ``generate`` after the last token."""
        self.arrived.put(None)
