"""``quantcache generate`` and ``quantcache chat``: answers as they come, with a prompt cache kept between runs."""

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
from quantcache._host import cache_argument, feed
from quantcache.cli.terminal import RichStreamer, human_bytes, open_model

_MARK: Final = "QUANTCACHE-REPLY"
"""Stands for a reply, to see what a chat template writes behind one."""


class TalkError(ValueError):
    """Arguments that do not go together; the message says what to do."""


@dataclass
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: length of an answer at most.
        temperature: 0 for the most likely token.
        top_p: share of the probability that is sampled from.
        seed: of the random numbers, None for another every time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class Talk:
    """A model, a cache, and the tokens that were said: those of the prompt and those of the answers.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        sampling: how it answers.
        console: where answers go.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, console: Console
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.console = model, tokenizer, sampling, console
        self.cache = QuantizedInt8Cache(model.config)
        self.ids: Tensor = torch.empty(1, 0, dtype=torch.int64)

    def load(self, file: Path) -> None:
        """Go on from a prompt cache.

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
        """Keep what was said so far, the last token of the last answer, which nothing has read yet, included."""
        unread = self.ids[:, self.cache.get_seq_length() :]
        if unread.shape[1]:
            self.read(unread)
        self.cache.save(file, model=self.model, input_ids=self.ids)

    def read(self, ids: Tensor) -> None:
        """Take tokens (1, n) behind those in the cache, without an answer."""
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
        said = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache_argument(self.cache),
            streamer=RichStreamer(self.tokenizer, self.console),
            pad_token_id=pad,
            **self.sampling.options(),
        )
        self.ids = said.cpu()
        return str(self.tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True))

    def turn_ids(self, text: str, system: str | None = None) -> Tensor:
        """Token ids (1, n) that put a user's turn behind what was said, up to where the answer begins."""
        if not self.ids.shape[1]:
            turns = [{"role": "user", "content": text}]
            if system:
                turns.insert(0, {"role": "system", "content": system})
            return self._encode(self._template(turns))
        # What the template writes behind a reply, the beginning of the next turn included.
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _MARK},
            {"role": "user", "content": text},
        ]
        behind = self._template(turns).rpartition(_MARK)[2] if _MARK not in text else ""
        last = str(self.tokenizer.decode(self.ids[0, -1:]))
        return self._encode(behind.removeprefix(last))

    def plain_ids(self, text: str) -> Tensor:
        """Token ids (1, n) of text as it is; special tokens are put before a first text alone."""
        return self._encode(text, add_special_tokens=not self.ids.shape[1])

    def _template(self, turns: list[dict[str, str]]) -> str:
        if self.tokenizer.chat_template:
            text: Any = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return str(text)
        names = {"system": "System", "user": "User", "assistant": "Assistant"}
        return "".join(f"{names[turn['role']]}: {turn['content']}\n" for turn in turns) + "Assistant:"

    def _encode(self, text: str, add_special_tokens: bool = False) -> Tensor:
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
        return ids.view(1, -1).to(torch.int64)


def begin(
    spec: str | None, device: torch.device, sampling: Sampling, load: Path | None, console: Console, notes: Console
) -> Talk:
    """A talk with a model, from a prompt cache if there is one.

    Raises:
        ModelError: the model cannot be had.
        CacheFileError, TalkError, OSError: see ``Talk.load``.
    """
    if load is not None and not load.is_file():  # before minutes go into a model
        raise TalkError(f"{load} must be a prompt cache, got no such file. --save makes one.")
    model, tokenizer, label = open_model(spec, device, notes)
    talk = Talk(model, tokenizer, sampling, console)
    notes.print(f"{label} in {model.dtype} on {device}", style="dim", highlight=False)
    if load is not None:
        start = time.perf_counter()
        talk.load(load)
        notes.print(
            f"{talk.ids.shape[1]:,} tokens from {load}, {human_bytes(talk.cache.nbytes)}, in "
            f"{time.perf_counter() - start:.2f} s",
            **_QUIET,
        )
    return talk


def generate(
    spec: str | None,
    prompt: str,
    *,
    chat: bool,
    device: torch.device,
    sampling: Sampling,
    load: Path | None,
    save: Path | None,
    read_only: bool,
) -> None:
    """Answer one prompt.

    Args:
        spec: see ``load_model``.
        prompt: text; behind that of ``load``.
        chat: as a turn of the model's chat template.
        device: where to run.
        sampling: how to answer.
        load: prompt cache to go on from.
        save: where to keep prompt and answer.
        read_only: keep the prompt without an answer.

    Raises:
        ModelError, CacheFileError, TalkError, OSError: see ``begin``.
    """
    console, notes = Console(), Console(stderr=True)
    talk = begin(spec, device, sampling, load, console, notes)
    ids = talk.turn_ids(prompt) if chat else talk.plain_ids(prompt)
    start, before = time.perf_counter(), talk.cache.get_seq_length()
    if read_only:
        if not ids.shape[1]:
            raise TalkError("the prompt must hold at least one token, got none")
        talk.read(ids)
    else:
        talk.answer(ids)
    took = time.perf_counter() - start
    fed = talk.cache.get_seq_length() - before
    notes.print(
        f"{fed:,} tokens in {took:.1f} s; cache of {talk.cache.get_seq_length():,} tokens, "
        f"{human_bytes(talk.cache.nbytes)}, read by {talk.cache.report().backend}",
        **_QUIET,
    )
    if save is not None:
        talk.save(save)
        notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}", **_QUIET)


def chat(
    spec: str | None,
    *,
    system: str | None,
    device: torch.device,
    sampling: Sampling,
    load: Path | None,
    save: Path | None,
    ask: Callable[[], str],
) -> None:
    """Talk until the user has enough.

    Args:
        spec: see ``load_model``.
        system: what the model is told first.
        device: where to run.
        sampling: how to answer.
        load: prompt cache to go on from.
        save: where to keep the conversation at its end.
        ask: gives the next turn; raises ``EOFError`` or ``KeyboardInterrupt`` for no more.

    Raises:
        ModelError, CacheFileError, TalkError, OSError: see ``begin``.
    """
    console, notes = Console(), Console(stderr=True)
    talk = begin(spec, device, sampling, load, console, notes)
    notes.print("/save FILE keeps the conversation, /reset forgets it, /quit or Ctrl-D ends it.", **_QUIET)
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            break
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            break
        try:
            if command == "/reset":
                talk.cache, talk.ids = QuantizedInt8Cache(talk.model.config), talk.ids[:, :0]
                notes.print("forgotten", **_QUIET)
            elif command == "/save":
                talk.save(Path(rest.strip()))
                notes.print(f"saved: {rest.strip()}", **_QUIET)
            elif command.startswith("/"):
                notes.print(f"no such command: {command}", **_QUIET)
            elif text:
                talk.answer(talk.turn_ids(text, system))
        except (ValueError, OSError) as error:
            notes.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
    if save is not None and talk.ids.shape[1]:
        talk.save(save)
        notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}", **_QUIET)


_QUIET: Final[dict[str, Any]] = {"style": "dim", "highlight": False, "markup": False, "soft_wrap": True}
