"""The command line: there is a file for each command. They load torch and transformers when they run, so that
``--help`` and a wrong argument are answered at once.
"""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantcache import __version__
from quantcache.cli import bench, chat, demo, doctor, evaluate, generate, inspect, lm_eval, plan, serve
from quantcache.cli.arguments import failing

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo.demo,
    "generate": generate.generate,
    "chat": chat.chat,
    "serve": serve.serve,
    "plan": plan.plan,
    "eval": evaluate.evaluate,
    "lm-eval": lm_eval.lm_eval,
    "bench": bench.bench,
    "inspect": inspect.inspect,
    "doctor": doctor.doctor,
}
"""The commands in the order of ``--help``."""

app = typer.Typer(
    name="quantcache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The KV cache of Hugging Face models in int8."""


for name, command in COMMANDS.items():
    app.command(name, context_settings=lm_eval.SETTINGS if name == "lm-eval" else None)(failing(name)(command))
