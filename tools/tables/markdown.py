"""Tables and numbers in Markdown."""

import math
from collections.abc import Iterable, Sequence


def table(header: str, body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, from its first line between the outer bars and the cells of the others."""
    lines = [header, " | ".join(["---"] * len(header.split(" | "))), *map(" | ".join, body)]
    return "\n".join(f"| {line} |".replace("|  |", "| |") for line in lines)


def number(value: float | None, digits: int = 3, missing: str = "-") -> str:
    """``digits`` significant digits, without an exponent where it stays short; ``missing`` for None."""
    if value is None:
        return missing
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
