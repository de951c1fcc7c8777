"""The JSON files of docs/benchmarks, which hold every number that the documentation shows."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FOLDER = DOCS / "benchmarks"

Row = dict[str, Any]

GIB = 2**30


class NotMeasuredError(LookupError):
    """A measurement is not there, or lacks what is asked of it; the message says so to the reader."""


def load(name: str) -> Row:
    """``docs/benchmarks/NAME.json``.

    Raises:
        NotMeasuredError: there is no such file.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise NotMeasuredError(f"Not measured yet: there is no `{path.relative_to(ROOT)}`.")
    loaded: Row = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def rows(name: str, starting: str = "") -> list[Row]:
    """Rows of a measurement whose name begins with ``starting``.

    Raises:
        NotMeasuredError: there are none.
    """
    found = [row for row in load(name)["rows"] if row.get("row", "").startswith(starting)]
    if not found:
        raise NotMeasuredError(f"Not measured yet: `{name}.json` has no row that begins with “{starting}”.")
    return found


def attention_name(row: Row) -> str:
    """What a row of attention is of, without what all of them share."""
    return str(row["row"]).removeprefix("attention, ").removeprefix("decode attention, ").replace(", query_len 1", "")


def best_stock_ms(row: Row) -> float | None:
    """Milliseconds per token of the default cache, eager and without cuDNN's attention; None where not measured.

    It is the best that a user of a model with grouped heads has without int8.
    """
    name = "DynamicCache eager, no cuDNN"
    by_tokens = list(row.get("ms_by_tokens", {}).get(name, {}).values())
    found: float | None = row["ms"].get(name) or (by_tokens[-1] if by_tokens else None)
    return found


def where(name: str, *, link: str = "benchmarks/") -> str:
    """One line of Markdown: hardware, versions, command and the file itself."""
    report = load(name)
    hardware = report["hardware"]
    gpus = hardware.get("gpus", [])
    device = " and ".join(gpus) or hardware.get("gpu") or hardware.get("processor") or hardware.get("device", "")
    cores = f", {hardware['threads']} threads" if "threads" in hardware else ""
    timer = f", {report['timer']}" if report.get("timer", "wall clock") != "wall clock" else ""
    versions = report.get("versions", {})
    kept = ", ".join(
        f"{key} {versions[key]}" for key in ("torch", "transformers", "flashinfer", "xllamacpp") if versions.get(key)
    )
    busy = f", load average {report['load_average']}" if report.get("load_average") else ""
    note = f" {report['note']}" if report.get("note") else ""
    source = f"`{report['command']}` → [{name}.json]({link}{name}.json)."
    return f"Measured on {device}{cores}{timer}{busy}; {kept}. {source}{note}"
