"""ChatML prompts, stop words, ``chat``, ``chat_stream`` and ``generate_batch`` as callers of the original know them."""

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TextIteratorStreamer
from transformers.utils import logging

DEFAULT_SYSTEM = "You are a helpful assistant."
History = list[tuple[str, str]]


class StopWordsLogitsProcessor(LogitsProcessor):
    """Forces the end token in every row whose newest tokens are a stop word.

    Raises:
        ValueError: no end token, or an empty stop word.
    """

    def __init__(self, stop_words_ids: Iterable[Iterable[int]], eos_token_id: int | Sequence[int] | None) -> None:
        self.words = [list(word) for word in stop_words_ids]
        if eos_token_id is None:
            raise ValueError("StopWordsLogitsProcessor: eos_token_id must be a token id, got None.")
        if not all(self.words):
            raise ValueError(f"StopWordsLogitsProcessor: stop words must not be empty, got {self.words}.")
        self.eos = eos_token_id if isinstance(eos_token_id, int) else eos_token_id[0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (batch, vocab_size), with 2**15 for the end token in the rows that end."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for word in self.words:
            if input_ids.shape[1] >= len(word):
                ended |= (input_ids[:, -len(word) :] == input_ids.new_tensor(word)).all(-1)
        scores = scores.clone()
        scores[ended, self.eos] = 2.0**15
        return scores


def get_stop_words_ids(chat_format: str, tokenizer: Any) -> list[list[int]]:
    """Stop words of a chat format: ``<|im_end|>`` and ``<|im_start|>`` for "chatml", ``<|endoftext|>`` for "raw".

    Raises:
        ValueError: another format.
    """
    if chat_format == "raw":
        return [[tokenizer.eod_id]]
    if chat_format == "chatml":
        return [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    raise ValueError(f'get_stop_words_ids: chat_format must be "chatml" or "raw", got {chat_format!r}.')


def make_context(
    tokenizer: Any,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt of a chat turn, as text and as token ids.

    Special tokens inside ``query``, ``history`` and ``system`` are plain text. Turns are kept from the newest back
    while system, turn and what is kept are under ``max_window_size`` tokens; the query is not counted.

    Raises:
        ValueError: ``chat_format`` is neither "chatml" nor "raw".
    """
    if chat_format == "raw":
        return query, list(tokenizer(query)["input_ids"])
    if chat_format != "chatml":
        raise ValueError(f'make_context: chat_format must be "chatml" or "raw", got {chat_format!r}.')

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def block(role: str, content: str) -> tuple[str, list[int]]:
        ids = [tokenizer.im_start_id, *encode(role), *newline, *encode(content), tokenizer.im_end_id]
        return f"<|im_start|>{role}\n{content}<|im_end|>", ids

    newline = encode("\n")
    text, ids = block("system", system)
    kept_text, kept_ids = "", list[int]()
    for past_query, past_response in reversed(history or []):
        user, user_ids = block("user", past_query)
        assistant, assistant_ids = block("assistant", past_response)
        turn_ids = [*newline, *user_ids, *newline, *assistant_ids]
        if len(ids) + len(turn_ids) + len(kept_ids) >= max_window_size:
            break
        kept_text, kept_ids = f"\n{user}\n{assistant}{kept_text}", turn_ids + kept_ids
    user, user_ids = block("user", query)
    text += f"{kept_text}\n{user}\n<|im_start|>assistant\n"
    ids = [*ids, *kept_ids, *newline, *user_ids, *newline, tokenizer.im_start_id, *encode("assistant"), *newline]
    return text, ids


def decode_tokens(
    tokens: Tensor | Sequence[int],
    tokenizer: Any,
    raw_text_len: int,
    context_length: int,
    chat_format: str = "chatml",
    errors: str = "replace",
) -> str:
    """The reply in ``tokens``, which begin with the prompt.

    Args:
        tokens: (seq_len,) prompt and reply.
        tokenizer: the model's.
        raw_text_len: characters of the prompt's text.
        context_length: tokens of the prompt.
        chat_format: "chatml" cuts at the first ``<|im_start|>`` or ``<|im_end|>`` after the prompt, and drops the last
            token where there is neither; "raw" cuts at ``<|endoftext|>``.
        errors: as for ``bytes.decode``; "replace" or "ignore".

    Raises:
        ValueError: another ``chat_format``.
    """
    ids = [int(token) for token in tokens]
    if chat_format == "chatml":
        ends = {tokenizer.im_start_id, tokenizer.im_end_id}
        end = next((i for i in range(context_length, len(ids)) if ids[i] in ends), len(ids) - 1)
        end = max(end, context_length)
    elif chat_format == "raw":
        end = next((i for i in range(context_length, len(ids)) if ids[i] == tokenizer.eod_id), len(ids))
    else:
        raise ValueError(f'decode_tokens: chat_format must be "chatml" or "raw", got {chat_format!r}.')
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=False)[raw_text_len:]
    return (text.replace("\ufffd", "") if errors == "ignore" else text).strip()


class ChatMixin:
    """``chat`` and its relatives, for the model with ``generate``."""

    def _chat_inputs(
        self, tokenizer: Any, query: str, history: History | None, system: str, stop_words_ids: Any, config: Any
    ) -> tuple[str, list[int], list[list[int]]]:
        chat_format = getattr(config, "chat_format", None)
        if chat_format != "chatml":
            raise ValueError(
                f'chat: generation_config.chat_format must be "chatml", got {chat_format!r}. Is this a chat model?'
            )
        window = getattr(config, "max_window_size", None) or 6144
        raw_text, ids = make_context(tokenizer, query, history, system, window)
        return raw_text, ids, [*map(list, stop_words_ids or []), *get_stop_words_ids("chatml", tokenizer)]

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
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
            stop_words_ids: token sequences that end the reply, besides the format's.
            generation_config: the model's by default.
            kwargs: for ``generate``; they override ``generation_config``.

        Returns:
            The reply and the history with this turn.

        Raises:
            ValueError: the generation config is not that of a chat model.
        """
        config, kwargs = self._merged(generation_config, kwargs)
        raw_text, ids, words = self._chat_inputs(tokenizer, query, history, system, stop_words_ids, config)
        input_ids = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        output = self.generate(  # type: ignore[attr-defined]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            stop_words_ids=words,
            generation_config=config,
            **kwargs,
        )
        response = decode_tokens(output[0], tokenizer, len(raw_text), len(ids))
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
        config, kwargs = self._merged(generation_config, kwargs)
        _, ids, words = self._chat_inputs(tokenizer, query, history, system, stop_words_ids, config)
        input_ids = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self.generate(  # type: ignore[attr-defined]
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    stop_words_ids=words,
                    generation_config=config,
                    streamer=streamer,
                    **kwargs,
                )
            except BaseException as failure:
                failures.append(failure)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        text = ""
        for piece in streamer:
            if piece:
                text += piece
                yield text
        thread.join()
        if failures:
            raise failures[0]

    def _merged(self, generation_config: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """One generation config with ``kwargs`` in it, and the rest of them; neither argument is changed."""
        config = copy.deepcopy(generation_config or self.generation_config)  # type: ignore[attr-defined]
        return config, config.update(**kwargs)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        tokenizer: Any,
        *,
        system: str = DEFAULT_SYSTEM,
        batch_size: int | None = None,
        progress: bool = True,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answers to ``prompts`` in their order, in left-padded batches.

        Args:
            prompts: chat queries, or token ids, which are continued as they are.
            tokenizer: the model's.
            system: the system prompt of the queries.
            batch_size: rows of a batch; by default as many as free memory holds.
            progress: show a progress bar.
            generation_config: the model's by default.
            kwargs: for ``generate``; they override ``generation_config``.

        Raises:
            ValueError: ``batch_size`` under 1, an empty prompt, or a query to a model that is no chat model.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"generate_batch: batch_size must be at least 1, got {batch_size}.")
        config, kwargs = self._merged(generation_config, kwargs)
        rows: list[tuple[str | None, list[int]]] = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                text, ids, _ = self._chat_inputs(tokenizer, prompt, None, system, None, config)
                rows.append((text, ids))
            else:
                rows.append((None, [int(token) for token in prompt]))
            if not rows[-1][1]:
                raise ValueError(f"generate_batch: prompts must not be empty, got an empty one at {index}.")
        words = get_stop_words_ids("chatml" if any(text is not None for text, _ in rows) else "raw", tokenizer)
        answers = [""] * len(rows)
        pending = sorted(range(len(rows)), key=lambda index: -len(rows[index][1]))  # like lengths waste no padding
        bar = logging.tqdm(total=len(rows), disable=not progress)
        while pending:
            width = len(rows[pending[0]][1])
            size = batch_size or self._rows_that_fit(width + (config.max_new_tokens or 512))
            chosen, pending = pending[:size], pending[size:]
            batch_ids = torch.full((len(chosen), width), tokenizer.eod_id)
            mask = torch.zeros_like(batch_ids)
            for row, index in enumerate(chosen):
                tokens = torch.tensor(rows[index][1])
                batch_ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
            device = self.device  # type: ignore[attr-defined]
            output = self.generate(  # type: ignore[attr-defined]
                batch_ids.to(device),
                attention_mask=mask.to(device),
                stop_words_ids=words,
                generation_config=config,
                **kwargs,
            )
            for row, index in enumerate(chosen):
                raw_text, prompt_ids = rows[index]
                if raw_text is None:
                    answers[index] = tokenizer.decode(output[row, width:], skip_special_tokens=True).strip()
                else:
                    tokens = output[row, width - len(prompt_ids) :]
                    answers[index] = decode_tokens(tokens, tokenizer, len(raw_text), len(prompt_ids))
            bar.update(len(chosen))
        bar.close()
        return answers

    def _rows_that_fit(self, seq_len: int) -> int:
        """Rows of ``seq_len`` tokens whose cache takes at most half of the free GPU memory; 8 elsewhere."""
        if self.device.type != "cuda":  # type: ignore[attr-defined]
            return 8
        config = self.config  # type: ignore[attr-defined]
        per_token = 2 * config.num_hidden_layers * config.num_attention_heads * config.kv_channels
        element_size = 1.1 if config.use_cache_quantization else self.dtype.itemsize  # type: ignore[attr-defined]
        free, _ = torch.cuda.mem_get_info(self.device)  # type: ignore[attr-defined]
        return max(1, int(free / 2 / (per_token * element_size * seq_len)))
