"""``quantcache chat``: a conversation that stays in one int8 cache."""

from pathlib import Path
from typing import Annotated

import typer

from quantcache.cli.arguments import Device, Load, MaxNewTokens, Model, Save, Seed, Temperature, TopP, open_device


def chat(
    spec: Model = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    load: Load = None,
    save: Save = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Chat with a model; the whole conversation stays in one int8 cache.

    [bold]Examples[/bold]

    quantcache chat --save talk.safetensors

    quantcache chat --load talk.safetensors
    """
    where = open_device(device)
    from quantcache.cli.talking import Sampling, begin
    from quantcache.cli.terminal import human_bytes

    talk, notes = begin(spec, where, Sampling(max_new_tokens, temperature, top_p, seed), load)
    notes.print("/save FILE keeps the conversation, /reset forgets it, /quit or Ctrl-D ends it.")
    while True:
        try:
            text = str(typer.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)).strip()
        except (typer.Abort, KeyboardInterrupt):
            break
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            break
        try:
            if command == "/reset":
                talk.forget()
                notes.print("forgotten")
            elif command == "/save":
                talk.save(Path(rest.strip()))
                notes.print(f"saved: {rest.strip()}")
            elif command.startswith("/"):
                notes.print(f"no such command: {command}")
            elif text:
                talk.answer(talk.turn_ids(text, system))
        except (ValueError, OSError) as error:
            notes.print(str(error), style="red")
    if save is not None and talk.ids.shape[1]:
        talk.save(save)
        notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}")
