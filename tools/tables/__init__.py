"""Markdown tables, each written from one measurement.

``TABLES`` maps the name that stands in a page to the function that writes the table, whose name it is. A measurement
that is missing is said to be missing, in the table's place.
"""

from collections.abc import Callable
from inspect import getmembers, isfunction

from tools.tables import memory, peers, quality, serving, speed, summary

TABLES: dict[str, Callable[[], str]] = {
    name.replace("_", "-"): writer
    for module in (memory, quality, serving, speed, summary)
    for name, writer in getmembers(module, isfunction)
    if writer.__module__ == module.__name__ and not name.startswith("_")
} | {name: lambda name=name: peers.peers(name) for name in ("peers-cpu", "peers-gpu", "peers-generate-gpu")}  # type: ignore[misc]
