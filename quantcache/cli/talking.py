"""What ``generate``, ``chat`` and ``demo`` do: answers as they come, and a prompt cache kept between runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache import QuantizedInt8Cache
from quantcache.cli.terminal import RichStreamer, human_bytes, open_model
from quantcache.layers._host import cache_argument, feed

_MARK: Final = "QUANTCACHE-REPLY"
"""Stands for a reply, to see what a chat template writes after one."""


class TalkError(ValueError):
    """Arguments that do not fit together; the message says what to do."""


@dataclass
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        temperature: 0 for the most likely token.
        top_p: probability mass that is sampled from.
        seed: of the random numbers, None for another every time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature == 0:
            return greedy
        return greedy | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Talk:
    """A model, a cache, and the tokens that were said: those of the prompt and those of the answers.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        sampling: how it answers.
        console: where answers go.
        make_cache: the class of the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        console: Console,
        make_cache: Callable[..., Any] = QuantizedInt8Cache,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.console = model, tokenizer, sampling, console
        self.make_cache = make_cache
        self.forget()

    def forget(self) -> None:
        """Begin anew, with an empty cache."""
        self.cache = self.make_cache(config=self.model.config)
        self.ids: Tensor = torch.empty(1, 0, dtype=torch.int64)

    def load(self, file: Path) -> None:
        """Continue from a prompt cache.

        Raises:
            CacheFileError: it is damaged or another model's.
            TalkError: it has no token ids, or several sequences.
            OSError: it cannot be read.
        """
        cache = QuantizedInt8Cache.load(file, model=self.model)
        if cache.input_ids is None or len(cache.input_ids) != 1:
            held = "none" if cache.input_ids is None else f"{len(cache.input_ids)} sequences"
            raise TalkError(f"{file} must hold the token ids of one sequence, got {held}. Save it with input_ids=.")
        self.cache, self.ids = cache, cache.input_ids

    def save(self, file: Path) -> None:
        """Save what was said so far, the last token of the last answer, which nothing has read yet, included."""
        unread = self.ids[:, self.cache.get_seq_length() :]
        if unread.shape[1]:
            self.read(unread)
        self.cache.save(file, model=self.model, input_ids=self.ids)

    def read(self, ids: Tensor) -> None:
        """Append tokens (1, n) to those in the cache, without an answer.

        Raises:
            TalkError: there are none.
        """
        if not ids.shape[1]:
            raise TalkError("the prompt must hold at least one token, got none")
        with torch.no_grad():
            feed(self.model, ids.to(self.model.device), self.cache, logits_to_keep=1)
        self.ids = torch.cat([self.ids[:, : self.cache.get_seq_length() - ids.shape[1]], ids], dim=1)

    def answer(self, ids: Tensor) -> str:
        """Take tokens (1, n), stream an answer to the console and keep both.

        Raises:
            TalkError: nothing to answer to, or more tokens than the model was made for.
        """
        prompt = torch.cat([self.ids, ids], dim=1)
        if prompt.shape[1] <= self.cache.get_seq_length():
            raise TalkError("the prompt must hold at least one token that is not in the cache, got none")
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and prompt.shape[1] + self.sampling.max_new_tokens > most:
            raise TalkError(
                f"prompt and answer must fit the {most} tokens the model was made for, got {prompt.shape[1]} and "
                f"{self.sampling.max_new_tokens}"
            )
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        prompt = prompt.to(self.model.device)
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        streamer = RichStreamer(self.tokenizer, self.console)
        options = {**self.sampling.options(), "streamer": streamer, "pad_token_id": pad}
        said = generate(prompt, attention_mask=torch.ones_like(prompt), **cache_argument(self.cache), **options)
        self.ids = said.cpu()
        return str(self.tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True))

    def turn_ids(self, text: str, system: str | None = None) -> Tensor:
        """Token ids (1, n) that append a user's turn to what was said, up to where the answer begins."""
        if not self.ids.shape[1]:
            begun = [("system", system)] if system else []
            return self._encode(self._template(*begun, ("user", text)))
        # What the template writes after a reply, the beginning of the next turn included.
        turns = (("user", "?"), ("assistant", _MARK), ("user", text))
        after = self._template(*turns).rpartition(_MARK)[2] if _MARK not in text else ""
        last = str(self.tokenizer.decode(self.ids[0, -1:]))
        return self._encode(after.removeprefix(last))

    def plain_ids(self, text: str) -> Tensor:
        """Token ids (1, n) of text as it is; special tokens are put before a first text alone."""
        return self._encode(text, add_special_tokens=not self.ids.shape[1])

    def _template(self, *turns: tuple[str, str]) -> str:
        """Turns, each a role and what it says, up to where the answer begins."""
        if self.tokenizer.chat_template:
            said = [{"role": role, "content": content} for role, content in turns]
            return str(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        return "".join(f"{role.title()}: {content}\n" for role, content in turns) + "Assistant:"

    def _encode(self, text: str, add_special_tokens: bool = False) -> Tensor:
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
        return ids.view(1, -1).to(torch.int64)


def begin(spec: str | None, device: torch.device, sampling: Sampling, load: Path | None) -> tuple[Talk, Console]:
    """A talk with a model, from a prompt cache if there is one, and the console for notes: the standard error.

    Raises:
        ModelError: the model cannot be had.
        CacheFileError, TalkError, OSError: see ``Talk.load``.
    """
    if load is not None and not load.is_file():  # before minutes go into a model
        raise TalkError(f"{load} must be a prompt cache, got no such file. --save makes one.")
    notes = Console(stderr=True, style="dim", highlight=False, markup=False, soft_wrap=True)
    model, tokenizer, label = open_model(spec, device, notes)
    talk = Talk(model, tokenizer, sampling, Console())
    notes.print(f"{label} in {model.dtype} on {device}")
    if load is not None:
        start = time.perf_counter()
        talk.load(load)
        seconds = time.perf_counter() - start
        notes.print(f"{talk.ids.shape[1]:,} tokens from {load}, {human_bytes(talk.cache.nbytes)}, in {seconds:.2f} s")
    return talk, notes
