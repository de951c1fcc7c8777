"""The tables of the peers' suite."""

from tools.measurements import load, where
from tools.tables.markdown import number, table


def peers(name: str) -> str:
    report = load(name)
    tables = []
    for group, members in report["groups"].items():
        body = [
            [f"**{row['cache']}**" if row["cache"] == report["subject"] else row["cache"], number(row["median_ms"]),
             number(row.get("times_as_fast_as_dynamic")), number(row["cache_bytes"] / 2**20),
             number(row.get("peak_reserved_bytes", 0) / 2**20 or None), number(row.get("relative_error"), 2)]
            for row in members
        ]  # fmt: skip
        header = (
            f"{group} | median, ms | times as fast as DynamicCache | cache, MiB | peak reserved, MiB | relative error"
        )
        columns = header.split(" | ")
        used = [i for i in range(len(columns)) if i < 4 or any(row[i] != "-" for row in body)]
        tables.append(table(" | ".join(columns[i] for i in used), [[row[i] for i in used] for row in body]))
    left_out = "; ".join(f"{cache}: {reason}" for cache, reason in report["left_out"].items())
    return "\n\n".join([*tables, *([f"Left out: {left_out}."] if left_out else []), where(name)])
