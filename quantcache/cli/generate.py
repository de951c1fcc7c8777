"""``quantcache generate``: continue a prompt, with its cache kept between runs."""

from typing import Annotated

import typer

from quantcache.cli.arguments import (
    DTYPES,
    INTERRUPTED,
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
    open_device,
)


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from the standard input.")
    ],
    spec: Model = None,
    load: Load = None,
    save: Save = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", metavar="", help="Put the prompt into the model's chat template, as a user's turn."),
    ] = False,
    system: System = None,
    only_read: Annotated[
        bool, typer.Option("--only-read", metavar="", help="Fill the cache and save it, without an answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    cache: CacheKind = "int8",
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Continue a prompt, and save its cache to continue from later.

    The answer goes to the standard output, all else to the standard error.
    Ctrl-C ends the answer; what has come is saved.

    [bold]Examples[/bold]

    quantcache generate "The KV cache is"

    quantcache generate - --only-read --save book.safetensors < book.txt

    quantcache generate "In short, the book says" --load book.safetensors
    """
    if only_read and save is None:
        raise typer.BadParameter("needs --save, or nothing is left of it", param_hint="--only-read")
    if system is not None and not chat:
        raise typer.BadParameter("needs --chat, which writes turns", param_hint="--system")
    check_choice(dtype, DTYPES, "--dtype")
    check_cache(cache, load, save)
    check_target(save)
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    where = open_device(device, spec)
    from quantcache.cli.talking import Opening, Sampling, begin, warn_without_template
    from quantcache.layers.report import human_bytes

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop or [])
    talk, notes = begin(Opening(spec, where, dtype, attention, cache, load), sampling)
    if chat:
        warn_without_template(talk, notes)
    ids = talk.turn_ids(prompt, system) if chat else talk.plain_ids(prompt)
    if only_read:
        talk.read(ids)
    else:
        talk.answer(ids)
    notes.print(talk.told())
    if save is not None:
        talk.save(save)
        notes.print(f"saved: {save}, {human_bytes(save.stat().st_size)}")
    if talk.last is not None and talk.last.was_interrupted:
        raise typer.Exit(INTERRUPTED)
