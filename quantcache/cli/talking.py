"""What ``generate``, ``chat`` and ``demo`` do: answers as they come, and a prompt cache kept between runs."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.cli.terminal import AnswerStream, ending_on_interrupt, open_model, peak_nbytes
from quantcache.layers._host import cache_argument, feed
from quantcache.layers.native import layer_nbytes
from quantcache.layers.report import human_bytes

_MARK: Final = "QUANTCACHE-REPLY"
"""Stands for a reply, to see what a chat template writes after one."""

_USER: Final = "\nUser:"
"""Where the next turn begins in a conversation without a chat template."""

STATIC_TOKENS: Final = 4096
"""Room of a cache of fixed capacity; one that is outgrown is made anew, twice as large."""

REGENERATE_TEMPERATURE: Final = 0.8
"""Of another answer, where answers are the most likely tokens and would be the same again."""


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
        stop: texts that end an answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature == 0:
            return greedy
        return greedy | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Answered:
    """What an answer took.

    Attributes:
        prompt_tokens: read before it, those in the cache not counted.
        prompt_seconds: until its first token.
        tokens: of the answer.
        seconds: from its first token to its last.
        was_interrupted: whether Ctrl-C ended it.
    """

    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float
    was_interrupted: bool

    def __str__(self) -> str:
        prompt = f"{self.prompt_tokens:,} tokens, {self.prompt_tokens / max(self.prompt_seconds, 1e-9):,.1f} tokens/s"
        answer = f"{self.tokens:,} tokens"
        if self.tokens > 1:
            answer += f", {(self.tokens - 1) / max(self.seconds, 1e-9):,.1f} tokens/s"
        return f"prompt: {prompt}; answer: {answer}{', interrupted' if self.was_interrupted else ''}"


class Talk:
    """A model, a cache, and the tokens that were said: those of the prompt and those of the answers.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        sampling: how it answers.
        console: where answers go.
        make_cache: the class of the cache, which takes a ``config``.

    Attributes:
        cache: what is read and filled.
        ids: int64 (1, tokens) on the CPU, all that was said; the last may not be in the cache yet.
        last: what the last answer took, None before the first.
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
        self.last: Answered | None = None
        self._room = STATIC_TOKENS
        self.forget()

    def forget(self) -> None:
        """Begin anew, with an empty cache."""
        self.cache = self._new_cache()
        self.ids: Tensor = torch.empty(1, 0, dtype=torch.int64)
        self._asked = 0  # tokens before the last answer; 0 where there is none
        self._is_invented = False  # whether turns are written without a chat template of the model's

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
        self.cache, self.ids, self._asked = cache, cache.input_ids, 0

    def save(self, file: Path) -> None:
        """Save what was said so far, the last token of the last answer, which nothing has read yet, included.

        Raises:
            TalkError: nothing was said, or the cache is one of transformers' own.
            OSError: it cannot be written.
        """
        if not isinstance(self.cache, QuantizedInt8Cache):
            raise TalkError(f"the cache must be int8 to be saved, got a {type(self.cache).__name__}. Use --cache int8.")
        if not self.ids.shape[1]:
            raise TalkError(f"there must be something to save to {file}, got no tokens")
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
        self._make_room(prompt.shape[1] + self.sampling.max_new_tokens)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        # Without a template the model would write the user's next turn itself.
        stop = [*self.sampling.stop, *([_USER] if self._is_invented else [])]
        stream, cached = AnswerStream(self.tokenizer, self.console, stop), int(self.cache.get_seq_length())
        start = time.perf_counter()
        try:
            with ending_on_interrupt(stream):
                self._generate(prompt.to(self.model.device), stream)
        except KeyboardInterrupt:  # the second: what has come is kept, and what the cache lacks of it is read again
            stream.was_interrupted = True
            stream.end()  # type: ignore[no-untyped-call]
        finally:
            end = time.perf_counter()
            first = stream.first_at or end
            self._asked, said = prompt.shape[1], stream.kept_ids()
            self.ids = torch.cat([prompt, torch.tensor([said], dtype=torch.int64).view(1, -1)], dim=1)
            self._take_back(int(self.cache.get_seq_length()) - self.ids.shape[1])
            self.last = Answered(
                prompt_tokens=prompt.shape[1] - cached,
                prompt_seconds=first - start,
                tokens=len(stream.ids),
                seconds=end - first,
                was_interrupted=stream.was_interrupted,
            )
        return stream.text

    def answer_again(self) -> str:
        """Take the last answer back and give another; sampled where answers are the most likely tokens.

        Raises:
            TalkError: there is no answer to take back.
        """
        if not self._asked:
            raise TalkError("there must be an answer to give another, got none in this conversation yet")
        prompt = self.ids[:, : self._asked]
        self._take_back(int(self.cache.get_seq_length()) - (prompt.shape[1] - 1))  # its last token is read again
        sampling, self.ids = self.sampling, prompt[:, :0]
        self.sampling = replace(sampling, seed=None, temperature=sampling.temperature or REGENERATE_TEMPERATURE)
        try:
            return self.answer(prompt)
        finally:
            self.sampling = sampling

    def _generate(self, prompt: Tensor, stream: AnswerStream) -> None:
        """Stream an answer to a prompt (1, n), stored tokens included."""
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        options = {**self.sampling.options(), "streamer": stream, "pad_token_id": pad}
        options["stopping_criteria"] = StoppingCriteriaList([stream.criterion()])
        generate(prompt, attention_mask=torch.ones_like(prompt), **cache_argument(self.cache), **options)

    def _new_cache(self) -> Any:
        room = {"max_cache_len": self._room} if self.make_cache is StaticCache else {}
        return self.make_cache(config=self.model.config, **room)

    def _make_room(self, tokens: int) -> None:
        """Have room for so many tokens, in a larger cache if need be, for which the conversation is read again."""
        if self.make_cache is StaticCache and tokens > self._room:
            while self._room < tokens:
                self._room *= 2
            self.cache = self._new_cache()

    def _take_back(self, tokens: int) -> None:
        """Forget the newest tokens of the cache; a cache that cannot go back is made anew, and reads all again."""
        if tokens <= 0:
            return
        try:
            self.cache.crop(-tokens)
        except (AttributeError, NotImplementedError, ValueError):
            self.cache = self._new_cache()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, whichever it is."""
        return sum(map(layer_nbytes, self.cache.layers))

    def told(self) -> str:
        """What the last answer took, what the cache holds and how it was read, in three lines."""
        seq_len = int(self.cache.get_seq_length())
        lines = [] if self.last is None else [str(self.last)]
        held = f"cache: {seq_len:,} tokens, {human_bytes(self.nbytes)}"
        if isinstance(self.cache, QuantizedInt8Cache):
            report = self.cache.report()
            dtype = str(self.model.dtype).removeprefix("torch.")
            held += f" ({human_bytes(report.exact_nbytes)} in {dtype})"
            held += f", read by {report.backend}" if report.why_exact is None else f"; {report.why_exact}"
        lines.append(held)
        if (peak := peak_nbytes(self.model.device)) is not None:
            lines.append(f"peak memory: {human_bytes(peak)}")
        return "\n".join(lines)

    def turn_ids(self, text: str, system: str | None = None) -> Tensor:
        """Token ids (1, n) that append a user's turn to what was said, up to where the answer begins."""
        self._is_invented = not self.tokenizer.chat_template
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


@dataclass(frozen=True)
class Opening:
    """How a talk begins, as the options of the commands say it.

    Attributes:
        spec: see ``load_model``.
        device: of the model.
        dtype: torch's name of the model's dtype, None to choose it.
        attention: transformers' ``attn_implementation``, None for its own choice.
        cache: one of ``arguments.CACHES``.
        load: a prompt cache to continue from.
    """

    spec: str | None
    device: torch.device
    dtype: str | None = None
    attention: str | None = None
    cache: str = "int8"
    load: Path | None = None


MAKERS: Final[dict[str, Callable[..., Any]]] = {
    "int8": QuantizedInt8Cache,
    "default": DynamicCache,
    "static": StaticCache,
}
"""The class of each kind of cache."""


def begin(opening: Opening, sampling: Sampling) -> tuple[Talk, Console]:
    """A talk with a model, from a prompt cache if there is one, and the console for notes: the standard error.

    Raises:
        ModelError: the model cannot be had.
        CacheFileError, TalkError, OSError: see ``Talk.load``.
    """
    load = opening.load
    if load is not None and not load.is_file():  # before minutes go into a model
        raise TalkError(f"{load} must be a prompt cache, got no such file. --save makes one.")
    # A terminal gets whole words, a pipe whole lines.
    notes = Console(stderr=True, style="dim", highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())
    model, tokenizer, label = open_model(opening.spec, opening.device, notes, opening.dtype, opening.attention)
    talk = Talk(model, tokenizer, sampling, Console(), MAKERS[opening.cache])
    notes.print(f"{label} in {str(model.dtype).removeprefix('torch.')} on {opening.device}")
    if load is not None:
        start = time.perf_counter()
        talk.load(load)
        seconds = time.perf_counter() - start
        notes.print(f"{talk.ids.shape[1]:,} tokens from {load}, {human_bytes(talk.cache.nbytes)}, in {seconds:.2f} s")
    return talk, notes


def warn_without_template(talk: Talk, notes: Console) -> None:
    """Say that the model has no chat template, where turns are wanted."""
    if not talk.tokenizer.chat_template:
        notes.print(
            "This model has no chat template, so it is likely a base model, which was not trained to answer. Turns are "
            "written as User: and Assistant: lines. `quantcache generate` continues a text as it is.",
            style="yellow",
        )
