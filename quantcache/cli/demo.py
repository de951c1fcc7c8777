"""``quantcache demo``: one model, one prompt, the default cache and the int8 cache side by side."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from quantcache.cli.arguments import Device, Model, open_device

if TYPE_CHECKING:
    from quantcache.cli.talking import Talk
    from quantcache.evaluation.comparison import Comparison
    from quantcache.evaluation.racing import Race

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


def demo(
    spec: Model = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.  [default: a question about a short text]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="Maximum number of new tokens.")] = 160,
    device: Device = None,
) -> None:
    """Answer a prompt with the default cache and with the int8 cache, and compare them in a table."""
    where = open_device(device)
    from transformers.cache_utils import DynamicCache

    from quantcache import QuantizedInt8Cache
    from quantcache.cli.talking import Sampling, Talk
    from quantcache.cli.terminal import open_model
    from quantcache.evaluation.comparison import compare_teacher_forced
    from quantcache.evaluation.racing import race
    from quantcache.evaluation.texts import read_text, token_rows

    console, sampling = Console(), Sampling(max_new_tokens)
    model, tokenizer, label = open_model(spec, where, console)
    # A first forward pass loads and builds; neither answer pays for it.
    warm_up = Talk(model, tokenizer, Sampling(max_new_tokens=2), Console(quiet=True))
    asked = PROMPT if prompt is None else prompt
    ids = warm_up.turn_ids(asked) if tokenizer.chat_template else warm_up.plain_ids(asked)
    console.print(f"[bold]{label}[/bold] in {model.dtype} on {where}, prompt of {ids.shape[1]} tokens")
    warm_up.answer(ids)
    exact, int8 = (Talk(model, tokenizer, sampling, console, kind) for kind in (DynamicCache, QuantizedInt8Cache))
    for name, talk in (("default cache", exact), ("int8 cache", int8)):
        console.rule(name)
        talk.answer(ids)
    console.rule("compared")
    longest: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or RACE_TOKENS
    text = token_rows(tokenizer, [read_text("prose")], 1, max(TEXT_TOKENS, min(RACE_TOKENS, longest - RACE_STEPS)))
    with console.status("reading a text through both caches"):
        lengths = {"prompt_len": min(TEXT_PROMPT, TEXT_TOKENS // 2), "chunk_len": TEXT_CHUNK}
        make_cache = partial(QuantizedInt8Cache, model.config)
        comparison = compare_teacher_forced(model, text[:, :TEXT_TOKENS], make_cache, **lengths)
    with console.status("timing both caches after a long text"):
        timed = race(model, text[:, : min(RACE_TOKENS, longest - RACE_STEPS)], RACE_STEPS)
    console.print(_table(exact, int8, ids.shape[1], comparison, timed))
    console.print(f"The speed is the median of {RACE_STEPS} steps of each cache, taken in turn.", style="dim")


def _table(exact: "Talk", int8: "Talk", prompt_len: int, comparison: "Comparison", race: "Race") -> Table:
    from quantcache.evaluation.comparison import first_difference
    from quantcache.layers.native import layer_nbytes

    table = Table("", "default cache", "int8 cache", "int8 / default")
    nbytes = [sum(map(layer_nbytes, talk.cache.layers)) for talk in (exact, int8)]
    per_token = [size / talk.cache.get_seq_length() for size, talk in zip(nbytes, (exact, int8), strict=True)]
    speeds = [1 / race.default_seconds, 1 / race.int8_seconds]
    table.add_row("KV cache", *(f"{size:,} bytes" for size in nbytes), f"{nbytes[1] / nbytes[0]:.3f}")
    table.add_row("a token of context", *(f"{size:,.0f} bytes" for size in per_token))
    decoding = (f"{speed:.1f} tokens/s" for speed in speeds)
    table.add_row(f"decoding after {race.seq_len:,} tokens", *decoding, f"{speeds[1] / speeds[0]:.2f}")
    table.add_row("read by", "transformers", int8.cache.report().backend)
    answers = [talk.ids[0, prompt_len:].tolist() for talk in (exact, int8)]
    differs = first_difference(*answers)
    found = "identical" if differs is None else f"differ at token {differs}"
    table.add_section()
    table.add_row("answers", f"{len(answers[0])} tokens", found)
    table.add_row("mean KL from the default cache", "0", f"{comparison.mean_kl:.1e} nats/token")
    table.add_row("same most likely token", "", f"{comparison.top1_agreement:.2%} of {comparison.tokens}")
    return table
