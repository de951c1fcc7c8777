"""``quantcache generate``: continue a prompt, with its cache kept between runs."""

import time
from typing import Annotated

import typer

from quantcache.cli.arguments import Device, Load, MaxNewTokens, Model, Save, Seed, Temperature, TopP, open_device


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from the standard input.")],
    spec: Model = None,
    load: Load = None,
    save: Save = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's turn.")
    ] = False,
    only_read: Annotated[
        bool, typer.Option("--only-read", help="Fill the cache and save it, without an answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Continue a prompt, and save its cache to continue from later.

    The answer goes to the standard output, everything else to the standard error.

    [bold]Examples[/bold]

    quantcache generate "The KV cache is"

    quantcache generate - --only-read --save book.safetensors < book.txt

    quantcache generate "In short, the book says" --load book.safetensors
    """
    if only_read and save is None:
        raise typer.BadParameter("needs --save, or nothing is left of it", param_hint="--only-read")
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    where = open_device(device)
    from quantcache.cli.talking import Sampling, begin
    from quantcache.cli.terminal import human_bytes

    talk, notes = begin(spec, where, Sampling(max_new_tokens, temperature, top_p, seed), load)
    ids = talk.turn_ids(prompt) if chat else talk.plain_ids(prompt)
    start, before = time.perf_counter(), talk.cache.get_seq_length()
    if only_read:
        talk.read(ids)
    else:
        talk.answer(ids)
    seconds, seq_len = time.perf_counter() - start, talk.cache.get_seq_length()
    notes.print(
        f"{seq_len - before:,} tokens in {seconds:.1f} s; cache of {seq_len:,} tokens, "
        f"{human_bytes(talk.cache.nbytes)}, read by {talk.cache.report().backend}"
    )
    if save is not None:
        talk.save(save)
        notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}")
