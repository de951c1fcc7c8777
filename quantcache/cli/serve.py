"""``quantcache serve``: transformers' OpenAI-compatible server, with requests batched over int8 blocks."""

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from quantcache.cli.arguments import DEMO_MODEL, DTYPES, Device, Dtype, check_choice, open_device

if TYPE_CHECKING:
    from quantcache.serving import Int8BatchingManager

LOG_LEVELS = ("debug", "info", "warning", "error")


def serve(
    spec: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A hub id, a folder or a .gguf file.", show_default=DEMO_MODEL)
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model.", show_default="MODEL as it is given"),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            "--max-memory",
            min=0.01,
            max=1.0,
            metavar="X",
            help="Share of the memory that the model leaves free that the blocks may take.",
            show_default="0.8; 0.6 on a CPU",
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Size of the pool, in blocks of 64 tokens in the model's dtype; int8 fits more of them.",
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Most tokens of a step; longer prompts are read in chunks.", show_default="8192"
        ),
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most requests of a step; others wait.", show_default="1024")
    ] = None,
    keep_apart: Annotated[
        bool,
        typer.Option("--no-share-prefixes", metavar="", help="Do not share the blocks of prompts that begin alike."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    log_level: Annotated[
        str, typer.Option(metavar="NAME", help="What the server writes: debug, info, warning or error.")
    ] = "warning",
) -> None:
    """Serve a model to many users: OpenAI's API over int8 blocks, one batch of all requests.

    Clients talk to http://HOST:PORT/v1.
    Ctrl-C ends the server, after the answers at work or five seconds.

    [bold]Examples[/bold]

    quantcache serve

    quantcache serve Qwen/Qwen2.5-7B-Instruct --host 0.0.0.0 --max-memory 0.9

    quantcache serve ./my-model --name my-model --num-blocks 4096
    """
    check_choice(dtype, DTYPES, "--dtype")
    check_choice(log_level, LOG_LEVELS, "--log-level")
    where = open_device(device, spec)
    from rich.console import Console

    from quantcache import serving
    from quantcache.cli.terminal import open_model
    from quantcache.serving import asked, server

    console = Console(stderr=True)
    with server.listen(host, port) as listening:
        model, tokenizer, label = open_model(spec, where, console, dtype)
        silence(log_level)
        options = {
            "num_blocks": num_blocks,
            "max_memory_percent": max_memory,
            "max_batch_tokens": max_batch_tokens,
            "max_requests_per_batch": max_requests,
            "allow_block_sharing": not keep_apart,
        }
        try:
            manager = serving.create_manager(model, asked.batching_config(**options), asked.sampling_config(model))
        except (MemoryError, NotImplementedError, TypeError) as error:  # what a user can mend, by another model or size
            raise ValueError(str(error)) from error
        try:
            manager.warmup()
            manager.start()
            try_out(manager)
            most_tokens = min(manager.most_tokens, manager.max_positions or manager.most_tokens)
            app = server.build_app(manager, model, tokenizer, name or label, most_tokens)

            def tell(url: str) -> None:
                told = f"{name or label} at {url}/v1; one request has at most {most_tokens:,} tokens. Ctrl-C ends."
                console.print(f"{manager.report()}\n{told}", soft_wrap=True, highlight=False)

            server.run(app, listening, log_level, tell)
            console.print(str(manager.report()), soft_wrap=True, highlight=False)
        finally:
            serving.remove_manager(model, hard_stop=True)


def try_out(manager: "Int8BatchingManager") -> None:
    """Have one token generated before clients come.

    Raises:
        ValueError: the model cannot be batched.
    """
    manager.add_request([0], max_new_tokens=1)
    output, runs = None, True
    while output is None and runs:
        runs = manager.is_running()
        output = manager.get_result(timeout=1)
    if output is None or output.error is not None:
        raise ValueError("int8_batching: the manager ended." if output is None else output.error)


def silence(log_level: str) -> None:
    """But in ``debug`` and ``info``: transformers says nothing of each request that came."""
    if log_level in ("warning", "error"):
        for name in ("transformers.cli.serving", "ContinuousBatchingLogger"):
            logging.getLogger(name).setLevel(logging.ERROR)
