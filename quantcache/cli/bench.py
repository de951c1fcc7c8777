"""``quantcache bench``: decode speed and memory of both caches after contexts of several lengths."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from quantcache.cli.arguments import DTYPES, AsJson, Batch, Device, Dtype, Model, check_choice, open_device


def bench(
    spec: Model = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            "-t",
            metavar="N",
            min=1,
            help="Tokens of context; may be given several times.",
            show_default="256 and 2048",
        ),
    ] = None,
    batch: Batch = 1,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Decode steps of each cache.")] = 24,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time decoding with the default cache and with the int8 cache, in turn.

    [bold]Example[/bold]

    quantcache bench --tokens 512 --tokens 4096
    """
    check_choice(dtype, DTYPES, "--dtype")
    where = open_device(device, spec)
    from quantcache.cli.terminal import machine, open_model
    from quantcache.evaluation.racing import race
    from quantcache.evaluation.texts import read_text, token_rows
    from quantcache.layers.report import human_bytes

    console = Console(stderr=as_json)
    lengths = tokens or [256, 2048]
    model, tokenizer, label = open_model(spec, where, console, dtype)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max(lengths) + steps > most:
        raise ValueError(f"the model reads {most} tokens, got {max(lengths)} and {steps} steps after them")
    ids = token_rows(tokenizer, [read_text("prose") + read_text("code") * 8], 1, max(lengths))
    rows = []
    for length in lengths:
        with console.status(f"{length:,} tokens"):
            rows.append(race(model, ids[:, :length].expand(batch, -1), steps))
    if as_json:
        print(json.dumps({**machine(model, label), "rows": [asdict(row) for row in rows]}, indent=1))
        return
    heads = (
        "tokens",
        "default,\ntokens/s",
        "int8,\ntokens/s",
        "int8 /\ndefault",
        "default\ncache",
        "int8\ncache",
        "read by",
    )
    columns = (Column(head, no_wrap=head != "read by") for head in heads)
    dtype = str(model.dtype).removeprefix("torch.")
    table = Table(*columns, title=f"{label} in {dtype} on {where}, batch {batch}", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        speeds = batch / row.default_seconds, batch / row.int8_seconds
        rates = (*(f"{speed:,.1f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}")
        sizes = map(human_bytes, (row.default_nbytes, row.int8_nbytes))
        table.add_row(f"{row.seq_len:,}", *rates, *sizes, row.backend)
    console.print(table)
    console.print(f"Medians of {steps} decode steps of each cache, taken in turn.", style="dim")
