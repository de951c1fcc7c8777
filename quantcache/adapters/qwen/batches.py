"""``generate_batch``: many prompts, in left-padded batches as large as free memory allows."""

import os
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from quantcache.adapters.qwen.chat import DEFAULT_SYSTEM, chat_inputs, merged_config
from quantcache.adapters.qwen.prompts import decode_tokens, get_stop_words_ids
from quantcache.layers._host import CACHE_NAMES
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE

logger = logging.get_logger("quantcache.adapters.qwen")

USABLE_SHARE: Final = 0.8
"""Of the free memory; the rest is for fragments and for what sampling sorts."""

INT8_BYTES: Final = 1.1
"""Of a cached number: 1.05 for codes and metadata of pages, and the slack of segments."""

TAIL: Final = PAGE_SIZE + DEFAULT_RESIDUAL_LENGTH
"""Tokens at the end that are not quantised, at most."""

ROWS_WITHOUT_KNOWLEDGE: Final = 8
"""Rows of a batch on a device that does not say how much memory it has."""


class BatchMixin:
    """``generate_batch``, for the model with ``generate``."""

    _tokenizer: Any = None

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        tokenizer: Any = None,
        *,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answers to ``prompts`` in their order, from left-padded batches of prompts of like lengths.

        A batch that does not fit after all is halved and tried again.

        Args:
            prompts: chat queries, or token ids, which are continued as they are.
            tokenizer: the model's; by default the one that lies where the model came from, which is loaded once.
            system: the system prompt of the queries.
            stop_words_ids: token sequences that end an answer, besides the format's.
            batch_size: rows of a batch; by default as many as free memory holds.
            progress: show a progress bar, unless transformers' bars are switched off.
            generation_config: the model's by default.
            kwargs: for ``generate``; they override ``generation_config``.

        Raises:
            ValueError: ``batch_size`` under 1, an empty prompt, more than one answer a prompt asked for, a cache given,
                or a query to a model that is no chat model; no tokenizer given and none where the model came from.
            torch.OutOfMemoryError: a single prompt does not fit.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"generate_batch: batch_size must be at least 1, got {batch_size}.")
        for name in CACHE_NAMES:
            if kwargs.pop(name, None) is not None:
                raise ValueError(
                    f"generate_batch: {name} must not be given, as each batch has a cache of its own. "
                    "Set config.use_cache_quantization for the int8 cache."
                )
        tokenizer = self._own_tokenizer() if tokenizer is None else tokenizer
        config, kwargs = merged_config(self, generation_config, kwargs)
        if (config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"generate_batch: num_return_sequences must be 1, got {config.num_return_sequences}. "
                "Give a prompt several times for several answers."
            )
        rows: list[tuple[str | None, list[int]]] = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                text, ids, _ = chat_inputs(tokenizer, prompt, None, system, None, config)
                rows.append((text, ids))
            else:
                rows.append((None, [int(token) for token in prompt]))
            if not rows[-1][1]:
                raise ValueError(f"generate_batch: prompts must not be empty, got an empty one at {index}.")
        chat_format = "chatml" if any(text is not None for text, _ in rows) else "raw"
        words = [*map(list, stop_words_ids or []), *get_stop_words_ids(chat_format, tokenizer)]
        options = {"stop_words_ids": words, "generation_config": config, **kwargs}
        answers = [""] * len(rows)
        pending = sorted(range(len(rows)), key=lambda index: -len(rows[index][1]))  # like lengths waste no padding
        limit = batch_size
        with logging.tqdm(total=len(rows), disable=not progress, desc="generate_batch") as bar:
            while pending:
                width = len(rows[pending[0]][1])
                size = limit or self._rows_that_fit(width, config)
                chosen = pending[:size]
                try:
                    output = self._continued([rows[index][1] for index in chosen], tokenizer, options)
                except torch.OutOfMemoryError:
                    if len(chosen) == 1:
                        raise
                    limit = len(chosen) // 2
                    logger.warning(f"generate_batch: {len(chosen)} rows did not fit; going on with {limit}.")
                    torch.cuda.empty_cache()
                    continue
                pending = pending[size:]
                for tokens, index in zip(output, chosen, strict=True):
                    answers[index] = _answer(tokens, width, *rows[index], tokenizer)
                bar.update(len(chosen))
        return answers

    def _own_tokenizer(self) -> Any:
        """The tokenizer that lies where the model came from.

        Raises:
            ValueError: the model came from nowhere, or there is none.
        """
        if self._tokenizer is None:
            origin: str = self.name_or_path  # type: ignore[attr-defined]
            advice = "Pass the tokenizer: generate_batch(prompts, tokenizer)."
            if not origin:
                raise ValueError(
                    "generate_batch: without a tokenizer the model must come from a folder or a hub, got a model "
                    f"that was not loaded. {advice}"
                )
            revision = getattr(self.config, "_commit_hash", None)  # type: ignore[attr-defined]
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(origin, revision=revision)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"generate_batch: the tokenizer must lie where the model came from, got {origin!r} without a "
                    f"readable one ({type(error).__name__}). {advice}"
                ) from error
        return self._tokenizer

    def _continued(self, batch: list[list[int]], tokenizer: Any, options: dict[str, Any]) -> Tensor:
        """Prompts, left-padded to the longest, and what follows each: (rows, seq_len)."""
        width = max(map(len, batch))
        input_ids = torch.full((len(batch), width), tokenizer.eod_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(batch):
            input_ids[row, width - len(ids) :], mask[row, width - len(ids) :] = torch.tensor(ids), 1
        device = self.device  # type: ignore[attr-defined]
        output: Tensor = self.generate(input_ids.to(device), attention_mask=mask.to(device), **options)  # type: ignore[attr-defined]
        return output

    def _rows_that_fit(self, width: int, config: Any) -> int:
        """Rows of ``width`` prompt tokens and their answers whose cache and activations fit into free memory."""
        model, free = self.config, free_memory(self.device)  # type: ignore[attr-defined]
        if free is None:
            return ROWS_WITHOUT_KNOWLEDGE
        itemsize = self.dtype.itemsize  # type: ignore[attr-defined]
        tokens = width + (config.max_new_tokens or max((config.max_length or 0) - width, 0))
        # A growing float cache is copied to grow, which fragments memory.
        per_number = INT8_BYTES * tokens + TAIL * itemsize if model.use_cache_quantization else 2 * itemsize * tokens
        cache = 2 * model.num_hidden_layers * model.num_attention_heads * model.kv_channels * per_number
        activations = width * (8 * model.hidden_size + 2 * model.intermediate_size) * itemsize
        logits = 4 * model.vocab_size * torch.float32.itemsize
        beams = config.num_beams or 1
        return max(1, int(USABLE_SHARE * free / (beams * (cache + logits) + activations)))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, or None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _answer(tokens: Tensor, width: int, raw_text: str | None, prompt_ids: list[int], tokenizer: Any) -> str:
    """What follows a prompt in its row of a batch whose prompts are ``width`` tokens wide."""
    if raw_text is None:
        return str(tokenizer.decode(tokens[width:], skip_special_tokens=True)).strip()
    return str(decode_tokens(tokens[width - len(prompt_ids) :], tokenizer, len(raw_text), len(prompt_ids)))
