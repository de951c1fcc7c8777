"""``quantcache demo``: one model, one prompt, the default cache and the int8 cache side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache._host import cache_argument
from quantcache.cache import layer_nbytes
from quantcache.cli.terminal import RichStreamer, choose_device, open_model
from quantcache.evaluation.comparison import Comparison, compare_teacher_forced, first_difference
from quantcache.evaluation.models import ModelError
from quantcache.evaluation.racing import Race, race

__all__ = ["ModelError", "choose_device", "run"]

PROMPT = """Here is a note about language models.

A language model writes one token at a time. For each new token, every attention layer compares a
query with the keys of all the tokens before it and mixes their values. Computing those keys and
values again for every token would be wasteful, so they are kept in memory. That store is called the
KV cache. It grows with the length of the conversation and with the number of conversations that are
answered at once, and with long contexts it takes more memory than the model itself. On a graphics
card the time for a token is then mostly the time to read the cache. Storing each number in eight
bits instead of sixteen halves the memory and the bytes to be read. The difficulty is that some
channels of the keys are a hundred times larger than the others. If all the channels of a token
share one scale, the large ones decide the step and the small ones are rounded away. If each channel
has a scale of its own for a page of sixty-four tokens, every channel keeps its detail. Values have
no such outliers, so one scale for each token serves them well. The newest tokens are kept exactly
as they are, because they may still be taken back.

Explain in your own words why the cache is needed, why it gets large, and why keys and values are
treated differently."""

TEXT_TOKENS, TEXT_PROMPT, TEXT_CHUNK = 768, 256, 16
"""The teacher-forced pass: tokens of text, tokens of its first call, tokens of each later call (for time: with one
token a call the figures are the same to two digits and take eight times as long)."""

RACE_TOKENS, RACE_STEPS = 2048, 24
"""The race: tokens of context, and decode steps of each cache."""


@dataclass(frozen=True)
class Run:
    """One answer.

    Attributes:
        token_ids: the answer, without the prompt.
        seq_len: tokens in the cache at its end.
        nbytes: bytes of the cache at its end.
        backend: what read the cache.
    """

    token_ids: list[int]
    seq_len: int
    nbytes: int
    backend: str


def run(spec: str | None, prompt: str | None, max_new_tokens: int, device: torch.device) -> None:
    """Print two streamed answers and the table.

    Args:
        spec: see ``load_model``.
        prompt: what to ask; None for the demo's own.
        max_new_tokens: length of each answer at most.
        device: where to run.

    Raises:
        ModelError: the model cannot be had.
    """
    console = Console()
    model, tokenizer, label = open_model(spec, device, console)
    inputs = _encode(tokenizer, PROMPT if prompt is None else prompt).to(device)
    console.print(f"[bold]{label}[/bold] in {model.dtype} on {device}, prompt of {inputs.shape[1]} tokens")
    _warm_up(model, inputs)

    runs: dict[str, Run] = {}
    for name, make_cache in (("default cache", DynamicCache), ("int8 cache", QuantizedInt8Cache)):
        console.rule(name)
        runs[name] = _answer(model, tokenizer, inputs, make_cache(config=model.config), max_new_tokens, console)
    console.rule("compared")
    with console.status("reading a text through both caches"):
        comparison = _compare(model, tokenizer)
    with console.status("timing both caches behind a long text"):
        longest: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or RACE_TOKENS
        timed = race(model, _text_ids(tokenizer, min(RACE_TOKENS, longest - RACE_STEPS)), RACE_STEPS)
    console.print(_table(runs["default cache"], runs["int8 cache"], comparison, timed))
    console.print(f"The speed is the median of {RACE_STEPS} steps of each cache, taken in turn.", style="dim")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids (1, prompt_len) of a chat turn, or of the plain prompt for a model without a chat template."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        ids: Tensor = encoded if isinstance(encoded, Tensor) else encoded["input_ids"]
        return ids
    plain: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    return plain


def _warm_up(model: PreTrainedModel, inputs: Tensor) -> None:
    """Load and build what a first forward pass loads and builds, so that neither run pays for it."""
    _generate(model, inputs, max_new_tokens=2, **cache_argument(QuantizedInt8Cache(model.config)))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Tensor,
    cache: Cache,
    max_new_tokens: int,
    console: Console,
) -> Run:
    streamer = RichStreamer(tokenizer, console)
    output = _generate(model, inputs, max_new_tokens=max_new_tokens, streamer=streamer, **cache_argument(cache))
    return Run(
        token_ids=output[0, inputs.shape[1] :].tolist(),
        seq_len=cache.get_seq_length(),
        nbytes=sum(map(layer_nbytes, cache.layers)),
        backend=cache.report().backend if isinstance(cache, QuantizedInt8Cache) else "transformers",
    )


def _generate(model: PreTrainedModel, inputs: Tensor, **options: Any) -> Tensor:
    """Greedy ``generate()`` of one sequence, the prompt included."""
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    return generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0, **options)


def _compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Comparison:
    """Both caches over the same text."""
    ids = _text_ids(tokenizer, TEXT_TOKENS)
    return compare_teacher_forced(
        model,
        ids,
        lambda: QuantizedInt8Cache(model.config),
        reference_factory=lambda: DynamicCache(config=model.config),
        prompt_len=min(TEXT_PROMPT, ids.shape[1] // 2),
        chunk_len=TEXT_CHUNK,
    )


def _text_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """(1, at most ``tokens``) ids of Python's own language reference, which every Python carries."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids: Tensor = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return ids


def _table(default: Run, int8: Run, comparison: Comparison, race: Race) -> Table:
    table = Table("", "default cache", "int8 cache", "int8 / default")

    def row(name: str, left: str, right: str, ratio: str = "") -> None:
        table.add_row(name, left, right, ratio)

    row("KV cache", f"{default.nbytes:,} bytes", f"{int8.nbytes:,} bytes", f"{int8.nbytes / default.nbytes:.3f}")
    per_token = [f"{run.nbytes / run.seq_len:,.0f} bytes" for run in (default, int8)]
    row("a token of context", per_token[0], per_token[1])
    speeds = [1 / race.default_seconds, 1 / race.int8_seconds]
    behind = f"decoding behind {race.seq_len:,} tokens"
    row(behind, f"{speeds[0]:.1f} tokens/s", f"{speeds[1]:.1f} tokens/s", f"{speeds[1] / speeds[0]:.2f}")
    row("read by", default.backend, int8.backend)
    differs = first_difference(default.token_ids, int8.token_ids)
    table.add_section()
    row("answers", f"{len(default.token_ids)} tokens", "identical" if differs is None else f"differ at token {differs}")
    row("mean KL to the default cache", "0", f"{comparison.mean_kl:.1e} nats/token")
    row("same most likely token", "", f"{comparison.top1_agreement:.2%} of {comparison.tokens}")
    return table
