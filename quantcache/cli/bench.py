"""``quantcache bench``: decode speed and memory of both caches behind texts of several lengths."""

import json
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from quantcache.cli.terminal import human_bytes, machine, open_model
from quantcache.evaluation.racing import Race, race
from quantcache.evaluation.texts import read_text, token_rows


def run(
    spec: str | None, lengths: list[int], batch: int, steps: int, device: torch.device, dtype: str | None, as_json: bool
) -> None:
    """Print a row for each length.

    Args:
        spec: see ``load_model``.
        lengths: tokens of context.
        batch: sequences.
        steps: decode steps of each cache.
        device: where to run.
        dtype: of the model, None for its own.
        as_json: print JSON in place of a table.

    Raises:
        ModelError: the model cannot be had.
        ValueError: a length that the model was not made for.
    """
    console = Console(stderr=as_json)
    model, tokenizer, label = open_model(spec, device, console, None if dtype is None else getattr(torch, dtype))
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for length in lengths:
        if most is not None and length + steps > most:
            raise ValueError(f"the model reads {most} tokens, got {length} and {steps} steps behind them")
    ids = token_rows(tokenizer, [read_text("prose") + read_text("code") * 8], 1, max(lengths))
    rows: list[Race] = []
    for length in lengths:
        with console.status(f"{length:,} tokens"):
            rows.append(race(model, ids[:, :length].expand(batch, -1), steps))
    if as_json:
        print(json.dumps({**machine(model, label), "rows": [asdict(row) for row in rows]}, indent=1))
        return
    table = Table(
        *("tokens", "default, tokens/s", "int8, tokens/s", "int8 / default", "default cache", "int8 cache", "read by"),
        title=f"{label} in {model.dtype} on {device}, batch {batch}",
    )
    for row in rows:
        speeds = batch / row.default_seconds, batch / row.int8_seconds
        table.add_row(
            f"{row.seq_len:,}",
            *(f"{speed:,.1f}" for speed in speeds),
            f"{speeds[1] / speeds[0]:.2f}",
            human_bytes(row.default_nbytes),
            human_bytes(row.int8_nbytes),
            row.backend,
        )
    console.print(table)
    console.print(f"Medians of {steps} decode steps of each cache, taken in turn.", style="dim")
