"""``quantcache inspect``: what a prompt cache holds, from its header alone. Loads no torch."""

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quantcache.cli.arguments import AsJson


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A prompt cache.")],
    verify: Annotated[
        bool, typer.Option("--verify", metavar="", help="Read every byte and compare its checksum.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a prompt cache holds, and of which model; the exit code is 1 if it is damaged.

    [bold]Example[/bold]

    quantcache inspect talk.safetensors --verify
    """
    from quantcache.layers.report import human_bytes

    found = summarise(file, verify)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    facts = Table(show_header=False, title=str(file), box=SIMPLE)
    facts.add_row("size", human_bytes(found["file_nbytes"]))
    facts.add_row("layout", f"{found['layout']}, written by quantcache {found['quantcache']}")
    batches = sorted({row["batch"] for row in found["layers"] if "batch" in row})
    facts.add_row("sequences", ", ".join(map(str, batches)) or "not known")
    facts.add_row("token ids", "stored" if found["has_input_ids"] else "not stored")
    facts.add_row("checksums", found["checksums"] if verify else "not compared; --verify reads every byte")
    if found["model"] is None:
        facts.add_row("model", "not named; any model with such layers can load it")
    else:
        facts.add_row("model", "\n".join(f"{name}: {value}" for name, value in found["model"].items()))
    console.print(facts)
    table = Table(
        "layers", "storage", "tokens", "pages+tail", "heads", "dim", "dtype", "size", box=SIMPLE_HEAD, pad_edge=False
    )
    for first, last, row in _runs(found["layers"]):
        storage = row["storage"] + (f", window {row['sliding_window']}" if row.get("sliding_window") else "")
        numbers = [str(first) if first == last else f"{first} to {last}", storage]
        if row["storage"] == "int8":
            dims = str(row["head_dim"])
            dims += "" if row["v_head_dim"] == row["head_dim"] else f" / {row['v_head_dim']}"
            numbers += [f"{row['seq_len']:,}", f"{row['pages']} + {row['tail_tokens']}"]
            numbers += [str(row["num_kv_heads"]), dims, row["dtype"]]
        else:
            numbers += [""] * 5
        table.add_row(*numbers, human_bytes(row["nbytes"] * (last - first + 1)))
    console.print(table)


def summarise(path: Path, verify: bool = False) -> dict[str, Any]:
    """What the header says, checked as far as it can be without the model.

    Args:
        path: of the file.
        verify: read every byte and compare its checksum.

    Raises:
        CacheFileError: no prompt cache, or a damaged one.
        OSError: it cannot be read.
    """
    from quantcache.files import schema
    from quantcache.files.container import Container
    from quantcache.files.header import DTYPES

    with Container(path) as file:
        told = schema.check_description(file)
        layers = []
        for layer_idx, layer in enumerate(told["layers"]):
            prefix = schema.part_name(layer_idx, "")
            mine = {name.removeprefix(prefix): e for name, e in file.entries.items() if name.startswith(prefix)}
            row = {**layer, "nbytes": sum(entry.nbytes for entry in mine.values())}
            if layer["storage"] == "int8":
                held = schema.check_pages(file, layer_idx, told["residual_length"], int(layer.get("first_page", 0)))
                key, value = mine["key_tail"], mine["value_tail"]
                row |= {"pages": held.num_pages, "tail_tokens": held.tail_len, "seq_len": held.seq_len}
                row |= {"batch": held.batch, "num_kv_heads": key.shape[1], "head_dim": key.shape[3]}
                row |= {"v_head_dim": value.shape[3], "dtype": DTYPES[key.dtype].name}
            layers.append(row)
        for name in file.entries if verify else ():
            file.check_bytes(name)
        return {
            "file": str(path),
            "file_nbytes": path.stat().st_size,
            **{name: told[name] for name in ("layout", "quantcache", "residual_length", "from_config", "model")},
            "has_input_ids": schema.INPUT_IDS in file.entries,
            "checksums": "compared" if verify else "not compared",
            "layers": layers,
        }


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """First and last index of neighbouring layers that are alike."""
    runs = (list(alike) for _, alike in groupby(enumerate(layers), key=itemgetter(1)))
    return [(run[0][0], run[-1][0], run[0][1]) for run in runs]
