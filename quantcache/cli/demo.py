"""``quantcache demo``: a question about a long document, with the default cache and with the int8 cache."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from quantcache.cli.arguments import DTYPES, Attention, Device, Dtype, Model, Stop, System, check_choice, open_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from torch import Tensor

    from quantcache.cli.talking import Talk

FACT: Final = "The lock of the garden gate opens with the number 4827."
QUESTION: Final = "Which number opens the lock of the garden gate?"
"""What stands in the middle of the document, and what is asked about it."""

DOCUMENT_CHARACTERS: Final = 7000
"""Of the novel; some 1,650 tokens, which a model of 135 million parameters still reads well."""

STEPS: Final = 32
"""Tokens of the document that are decoded again with both caches, for the speed and the quality."""

BAR: Final = 28
"""Characters of the longest bar."""


def document() -> str:
    """Paragraphs of Persuasion with ``FACT`` in their middle."""
    from quantcache.evaluation.texts import read_text

    paragraphs, characters = [], 0
    for paragraph in read_text("prose").split("\n\n"):
        if characters > DOCUMENT_CHARACTERS:
            break
        paragraphs.append(paragraph)
        characters += len(paragraph)
    middle = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:middle], FACT, *paragraphs[middle:]])


def demo(
    spec: Model = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to ask.", show_default="about a long document")
    ] = None,
    system: System = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=3, help="Maximum number of new tokens.")
    ] = 48,
    stop: Stop = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Ask about a long document with the default cache and with the int8 cache; compare answer, memory and speed."""
    check_choice(dtype, DTYPES, "--dtype")
    where = open_device(device, spec)
    from rich.console import Console
    from transformers.cache_utils import DynamicCache

    from quantcache import QuantizedInt8Cache
    from quantcache.cli.talking import Sampling, Talk, TalkError
    from quantcache.cli.terminal import open_model

    console = Console(highlight=False)
    model, tokenizer, label = open_model(spec, where, console, dtype, attention)
    if system is not None and not tokenizer.chat_template:
        raise TalkError(f"--system must go with a model that has a chat template, got {label}, which has none")
    sampling = Sampling(max_new_tokens, stop=stop or [])
    talks = {
        name: Talk(model, tokenizer, sampling, console, kind)
        for name, kind in (("default", DynamicCache), ("int8", QuantizedInt8Cache))
    }
    # A first forward pass loads and builds; no answer pays for it.
    warm_up = Talk(model, tokenizer, Sampling(max_new_tokens=2), Console(quiet=True))
    asked = f"{document()}\n\n{QUESTION}" if prompt is None else prompt
    ids = warm_up.turn_ids(asked, system) if tokenizer.chat_template else warm_up.plain_ids(asked)
    computed_in = str(model.dtype).removeprefix("torch.")
    console.print(f"[bold]{label}[/bold] in {computed_in} on {where}")
    if prompt is None:
        console.print(f"reads {ids.shape[1]:,} tokens of Persuasion by Jane Austen.")
        console.print(f"In the middle stands: [italic]{FACT}[/italic]")
        console.print(f"\n[bold]{QUESTION}[/bold]")
    else:
        console.print(f"reads a prompt of {ids.shape[1]:,} tokens.\n")
    warm_up.answer(ids[:, : min(ids.shape[1], 128)])
    for name, talk in talks.items():
        console.print(f"[dim]{name:<9}[/dim]", end="")
        talk.answer(ids)
    _compare(console, talks, ids)


def _compare(console: "Console", talks: "Mapping[str, Talk]", ids: "Tensor") -> None:
    """Print how the answers, the memory and the speed of the two caches compare; ``ids`` (1, n) is the prompt."""
    from quantcache.evaluation.comparison import first_difference, kl_divergence
    from quantcache.evaluation.racing import step_in_turn
    from quantcache.layers.native import layer_nbytes
    from quantcache.layers.report import human_bytes

    exact, int8 = talks.values()
    differs = first_difference(*(talk.ids[0, ids.shape[1] :].tolist() for talk in talks.values()))
    console.print("The same answer." if differs is None else f"The answers differ from token {differs + 1} on.")

    held = {name: sum(map(layer_nbytes, talk.cache.layers)) for name, talk in talks.items()}
    tokens = exact.cache.get_seq_length()
    # Whatever dtype this machine computes in, a GPU's 16 bits are what one would compare with.
    in_bfloat16 = held["default"] * 2 // exact.model.dtype.itemsize
    sizes = {"bfloat16": in_bfloat16, "int8": held["int8"]}
    share = sizes["int8"] / sizes["bfloat16"]
    console.print(f"\n[bold]Memory[/bold] of the cache for {tokens:,} tokens")
    _print_bars(console, {name: float(size) for name, size in sizes.items()}, list(map(human_bytes, sizes.values())))
    console.print(f"int8 takes {share:.0%} of bfloat16; with a longer text nearer to half.")
    if exact.model.dtype.itemsize != 2:
        dtype = str(exact.model.dtype).removeprefix("torch.")
        console.print(f"(In {dtype} the default cache takes {human_bytes(held['default'])} here.)", style="dim")

    divergences, alike = [], []

    def compare(logits: "Mapping[str, Tensor]") -> None:
        one, other = (logits[name][0, -1].double().log_softmax(-1) for name in talks)
        divergences.append(float(kl_divergence(one, other)))
        alike.append(bool(one.argmax() == other.argmax()))

    with console.status("decoding with both caches in turn"):
        start = ids.shape[1] // 8  # after what a chat template writes
        text = ids[:, start : start + STEPS]
        seconds = step_in_turn(exact.model, {name: talk.cache for name, talk in talks.items()}, text, compare)
    speeds = [1 / taken for taken in seconds.values()]
    console.print(f"\n[bold]Decoding[/bold] after {tokens:,} tokens")
    _print_bars(
        console, dict(zip(("default", "int8"), speeds, strict=True)), [f"{each:.1f} tokens/s" for each in speeds]
    )
    console.print(f"{speeds[1] / speeds[0]:.2f} times as fast, int8 read by {int8.cache.report().backend}.")
    mean = sum(divergences) / len(divergences)
    console.print(f"\n[bold]The next {len(divergences)} predictions[/bold]")
    console.print(f"the same most likely token in {sum(alike)}, mean KL {mean:.1e} nats.")


def _print_bars(console: "Console", values: dict[str, float], said: list[str]) -> None:
    """A line for each value: its name, a bar, and what is said of it."""
    for (name, value), text in zip(values.items(), said, strict=True):
        colour = "blue" if name == "int8" else "yellow"
        bar = "█" * max(1, round(BAR * value / max(values.values())))
        console.print(f"{name:<9}[{colour}]{bar}[/{colour}] {text}")
