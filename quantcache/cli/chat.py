"""``quantcache chat``: a conversation that stays in one cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from quantcache.cli.arguments import (
    DTYPES,
    Attention,
    CacheKind,
    Device,
    Dtype,
    Load,
    MaxNewTokens,
    Model,
    Save,
    Seed,
    Stop,
    System,
    Temperature,
    TopP,
    check_cache,
    check_choice,
    check_target,
    in_users_words,
    open_device,
)

if TYPE_CHECKING:
    from rich.console import Console

    from quantcache.cli.lines import Lines
    from quantcache.cli.talking import Talk

HELP: Final = '''/save NAME  keep the conversation in a file
/regen      take the last answer back and give another
/reset      forget the conversation
/help       show this
/quit       end, as Ctrl-D and Ctrl-C do here; Ctrl-C in an answer ends that
A \\ at the end of a line continues on the next; """ begins and ends a text of
several lines.'''


def chat(
    spec: Model = None,
    system: System = None,
    load: Load = None,
    save: Save = None,
    max_new_tokens: MaxNewTokens = 512,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    cache: CacheKind = "int8",
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Chat with a model; the whole conversation stays in one cache. /help says what else can be typed.

    [bold]Examples[/bold]

    quantcache chat --save talk.safetensors

    quantcache chat --load talk.safetensors
    """
    check_choice(dtype, DTYPES, "--dtype")
    check_cache(cache, load, save)
    check_target(save)
    where = open_device(device, spec)
    from quantcache.cli.lines import Lines
    from quantcache.cli.talking import Opening, Sampling, begin, warn_without_template
    from quantcache.layers.report import human_bytes

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop or [])
    talk, notes = begin(Opening(spec, where, dtype, attention, cache, load), sampling)
    warn_without_template(talk, notes)
    notes.print("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat.")
    lines = Lines(notes, [line.split()[0] for line in HELP.splitlines() if line.startswith("/")])
    try:
        converse(talk, notes, lines, system)
    finally:  # whatever ends it
        lines.keep()
        if save is not None and talk.ids.shape[1]:
            talk.save(save)
            notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}")


def converse(talk: "Talk", notes: "Console", lines: "Lines", system: str | None) -> None:
    """Take turns until the user leaves."""
    while (text := lines.read("you> ")) is not None:
        command, _, rest = text.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/help":
                notes.print(HELP)
            elif command == "/reset":
                talk.forget()
                notes.print("forgotten")
            elif command == "/save":
                save_as(talk, rest.strip())
                notes.print(f"saved: {rest.strip()}")
            elif command == "/regen":
                talk.answer_again()
                notes.print(talk.told())
            elif command.startswith("/"):
                notes.print(f"no such command: {command}; /help lists them")
            elif text:
                talk.answer(talk.turn_ids(text, system))
                notes.print(talk.told())
        except (ValueError, OSError) as error:
            notes.print(in_users_words(error), style="red")


def save_as(talk: "Talk", name: str) -> None:
    """Save the conversation under a name that the user typed.

    Raises:
        ValueError: none was, or there is nothing to save.
        OSError: it cannot be written.
    """
    if not name:
        raise ValueError("/save must be followed by the name of a file, as /save talk.safetensors")
    file = Path(name).expanduser()
    check_target(file)
    talk.save(file)
