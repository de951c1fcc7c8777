"""ChatML prompts, stop words and the cutting of replies, as callers of the original know them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


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
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The reply in ``tokens``, which begin with the prompt.

    Args:
        tokens: (seq_len,) prompt and reply.
        tokenizer: the model's.
        raw_text_len: characters of the prompt's text.
        context_length: tokens of the prompt.
        chat_format: "chatml" cuts at the first ``<|im_start|>`` or ``<|im_end|>`` after the prompt, and drops the last
            token where there is neither; "raw" cuts at ``<|endoftext|>``.
        verbose: print the text before it is cut, and why it ended.
        return_end_reason: return the reply and why it ended: "Gen length N" or "Gen '<|im_end|>'".
        errors: as for ``bytes.decode``: "replace" or "ignore" bytes that are no text.

    Raises:
        ValueError: another ``chat_format``.
    """
    ids = [int(token) for token in tokens]
    if chat_format == "chatml":
        stops, end = {tokenizer.im_start_id, tokenizer.im_end_id}, max(len(ids) - 1, context_length)
    elif chat_format == "raw":
        stops, end = {tokenizer.eod_id}, len(ids)
    else:
        raise ValueError(f'decode_tokens: chat_format must be "chatml" or "raw", got {chat_format!r}.')
    end_reason = f"Gen length {len(ids)}"
    cut = next((index for index in range(context_length, len(ids)) if ids[index] in stops), None)
    if cut is not None:
        end, end_reason = cut, f"Gen {tokenizer.decode([ids[cut]])!r}"
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=False, errors=errors)[raw_text_len:]
    if verbose:
        whole = tokenizer.decode(ids, skip_special_tokens=False, errors=errors)[raw_text_len:]
        print(f"\nRaw Generate: {whole}\n\nEnd Reason: {end_reason}\n\nGenerate: {text.strip()}")
    return (text.strip(), end_reason) if return_end_reason else text.strip()
