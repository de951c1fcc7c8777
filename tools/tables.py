"""Markdown tables, each written from one measurement.

``TABLES`` maps the name that stands in a page to the function that writes the table. A measurement that is missing is
said to be missing, in the table's place.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.measurements import NotMeasured, Row, load, rows, where

GIB = 2**30


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


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


def _attention_name(row: Row) -> str:
    return str(row["row"]).removeprefix("attention, ").removeprefix("decode attention, ").replace(", query_len 1", "")


# On a GPU


def cuda_attention() -> str:
    body = []
    for row in rows("cuda-attention", "attention"):
        times = dict(row["median_us"])
        int8 = times.pop("int8")
        body.append(
            [_attention_name(row), number(int8), number(min(times.values())), f"**{row['ratio']:.2f}**",
             number(row["tb_per_s"]), number(row["relative_error"], 2)]
        )  # fmt: skip
    header = ["", "int8, µs", "bfloat16 SDPA, µs", "times as fast", "TB/s", "relative error"]
    return table(header, body) + "\n\n" + where("cuda-attention")


def cuda_eager() -> str:
    body = []
    for row in rows("cuda-attention", "eager generate()"):
        times = row["ms_per_token"]
        name = row["row"].removeprefix("eager generate(), ")
        body.append([name, number(times["int8"]), number(times["DynamicCache"]), f"{row['ratio']:.2f}"])
    for row in rows("cuda-attention", "host time"):
        times = row["host_us"]
        name = "host time of one layer's update and attention, µs"
        body.append([name, number(times["int8"]), number(times["DynamicCache"]), f"{row['ratio']:.2f}"])
    header = ["ms a token", "int8", "DynamicCache", "times as fast"]
    return table(header, body) + "\n\n" + where("cuda-attention")


def cuda_other() -> str:
    body = []
    for row in load("cuda-attention")["rows"]:
        if str(row["row"]).startswith(("attention", "eager", "host time")):
            continue
        if "seconds" in row:
            seconds = row["seconds"]
            body.append([row["row"], f"{number(seconds['cold'])} s, {number(1e3 * seconds['from disk'], 2)} ms from disk"])
            continue
        text = ", ".join(f"{name} {number(value)} µs" for name, value in row.get("median_us", {}).items())
        body.append([row["row"], text])
    return table(["", "median"], body) + "\n\n" + where("cuda-attention")


def compiled_decode() -> str:
    body = []
    for row in load("compiled-decode")["rows"]:
        if "ms" not in row:
            continue
        memory = row.get("memory_gb", {})

        def reserved(kind: str, memory: Row = memory) -> str:
            return number(memory[kind]["reserved"]) if kind in memory else "-"

        ms = [number(row["ms"].get(kind), missing="out of memory" if kind in row["ms"] else "-") for kind in KINDS]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        body.append([row["row"], *ms, ratio, *map(reserved, KINDS)])
    header = ["", "int8, ms a token", "StaticCache", "times as fast", "int8, GB reserved", "StaticCache"]
    return table(header, body) + "\n\n" + where("compiled-decode")


KINDS = ("int8", "StaticCache")


def compiled_memory() -> str:
    body = []
    for row in rows("compiled-decode", "memory"):
        memory = row["memory_gb"]
        peaks = [number(memory[kind]) for kind in ("allocated", "reserved")] if memory else ["out of memory"] * 2
        limit = f"{row['limit_gb']:g}" if row.get("limit_gb") else "-"
        body.append([row["row"].removeprefix("memory, "), *peaks, number(row.get("cache_gb")), limit])
    header = ["", "peak allocated, GB", "peak reserved, GB", "of it the cache, GB", "limit set, GB"]
    return table(header, body) + "\n\n" + where("compiled-decode")


def qwen_memory() -> str:
    body = []
    for row in load("qwen-memory")["rows"]:
        originals = [number(row[f"original_{which}_gib"], missing="out of memory") for which in ("without", "with")]
        ours = [number(row[f"peak_{kind}_gib"]) for kind in ("allocated", "reserved")]
        name = f"{row['weights']}, batch {row['batch']}, {row['tokens']:,} tokens"
        name += " (by `generate`)" if row["measured_by"] == "generate" else ""
        body.append([name, *originals, *ours, number(row["cache_gib"])])
    header = ["GiB", "original, float cache", "original, quantised", "quantcache, allocated", "reserved", "of it the cache"]
    return table(header, body) + "\n\n" + where("qwen-memory")


def flat_rows(name: str) -> str:
    """Any rows: everything that a row holds besides its name, in one cell."""

    def flat(value: Any, prefix: str = "") -> list[str]:
        if isinstance(value, dict):
            return [part for key, inner in value.items() for part in flat(inner, f"{prefix}{key} ")]
        if isinstance(value, float):
            value = number(value)
        return [f"{prefix.replace('_', ' ')}{value}"]

    body = []
    for row in load(name)["rows"]:
        rest = {key: value for key, value in row.items() if key not in {"row", "target"} and value is not None}
        body.append([str(row.get("row", "")), ", ".join(flat(rest))])
    return table(["", "measured"], body) + "\n\n" + where(name)


# On a CPU


def cpu_attention() -> str:
    body = []
    for row in rows("cpu-attention", "decode attention"):
        times = row["median_ms"]
        exact = min(value for name, value in times.items() if name.startswith("sdpa"))
        body.append(
            [_attention_name(row), number(times["int8"]), number(exact), f"**{row['ratio_to_best_sdpa']:.2f}**",
             f"{row['ratio_to_torch_backend']:.0f}"]
        )  # fmt: skip
    header = ["", "int8, ms", "exact, ms", "times as fast", "times as fast as the torch backend"]
    return table(header, body) + "\n\n" + where("cpu-attention")


def cpu_generate() -> str:
    body = []
    for row in rows("cpu-attention", "generate()"):
        rates = row["tokens_per_s"]
        name = row["row"].removeprefix("generate(), ")
        body.append([name, number(rates["int8"]), number(rates["DynamicCache"]), f"**{row['ratio']:.2f}**"])
    return table(["tokens a second", "int8", "DynamicCache", "times as fast"], body) + "\n\n" + where("cpu-attention")


def first_use() -> str:
    report = load("first-use")
    body = [[row["row"], f"{number(row['seconds'])} s"] for row in report["rows"]]
    return table(["", "seconds"], body) + "\n\n" + where("first-use")


def files() -> str:
    report = load("files")
    speeds = report["median_gb_per_s"]
    body = [[name, number(value)] for name, value in speeds.items()]
    size = f"A cache of {report['cache']['tokens']:,} tokens of an 8B Llama, a file of {report['file_bytes'] / GIB:.2f} GiB."
    return f"{size}\n\n" + table(["", "GB/s"], body) + "\n\n" + where("files")


# Memory


def memory_held() -> str:
    report = load("memory")
    body = []
    for model in dict.fromkeys(row["model"] for row in report["held"]):
        found = {(row["tokens"], row["cache"]): row for row in report["held"] if row["model"] == model}
        for tokens in dict.fromkeys(row["tokens"] for row in report["held"]):
            exact, int8 = found[tokens, "DynamicCache"]["held_bytes"], found[tokens, "quantcache int8"]["held_bytes"]
            body.append([model, f"{tokens:,}", number(exact / 2**20), number(int8 / 2**20), f"{int8 / exact:.3f}"])
    header = ["", "tokens", "DynamicCache, MiB", "int8, MiB", "int8 / DynamicCache"]
    return table(header, body) + "\n\n" + where("memory")


def memory_peers() -> str:
    report = load("memory")
    models = list(dict.fromkeys(row["model"] for row in report["held"]))
    found = {(row["cache"], row["model"]): row for row in report["held"] if row["tokens"] == 8192}
    body = [
        [cache, *(number(found[cache, model]["bytes_per_number"]) for model in models)]
        for cache in dict.fromkeys(cache for cache, _ in found)
    ]
    return table(["bytes a number at 8,192 tokens", *models], body) + "\n\n" + where("memory")


def memory_fits() -> str:
    body = []
    for row in load("memory")["fits"]:
        batch, context = row["largest_batch"], row["longest_context"]
        body.append(
            [row["model"], f"{row['gpu_gib']}", f"{row['tokens']:,}", f"{batch['bf16']:,}", f"{batch['int8']:,}",
             f"{context['bf16']:,}", f"{context['int8']:,}"]
        )  # fmt: skip
    header = ["bfloat16 weights", "GPU, GiB", "tokens", "largest batch, bf16 cache", "int8", "longest context, bf16 cache", "int8"]
    return table(header, body) + "\n\n" + where("memory")


# Quality


def quality() -> str:
    report = load("quality")
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    measured = [row for row in report["rows"] if "mean_kl" in row]
    prompts = {model: max(row["prompt_len"] for row in measured if row["model"] == model) for model in models}
    found = {(row["cache"], row["model"], row["prompt_len"]): row for row in measured}
    refused = {(row["cache"], row["model"]) for row in report["rows"] if "refused" in row}
    sizes = {row["cache"]: row["bytes_per_number"] for row in measured if row["bytes_per_number"]}
    body = []
    for cache in sorted(dict.fromkeys(row["cache"] for row in report["rows"]), key=lambda name: "int8" not in name[:16]):
        cells = []
        for model in models:
            row = found.get((cache, model, prompts[model]))
            if row is None:
                cells += ["refuses" if (cache, model) in refused else "-", ""]
            else:
                cells += [number(row["mean_kl"], 2), percent(row["top1_agreement"])]
        name = f"**{cache}**" if cache == "quantcache int8" else cache
        body.append([name, number(sizes.get(cache)), *cells])
    header = ["", "bytes a number", *(part for model in models for part in (f"{model}: KL", "same top token"))]
    return table(header, body) + "\n\n" + where("quality")


def quality_odd_prompt() -> str:
    found = [row for row in load("quality")["rows"] if row.get("prompt_len", 512) != 512]
    if not found:
        raise NotMeasured("Not measured yet: `quality.json` has no prompt of another length.")
    body = [[row["model"], row["cache"], str(row["prompt_len"]), number(row["mean_kl"], 2)] for row in found]
    return table(["", "cache", "prompt", "KL"], body) + "\n\n" + where("quality")


def states() -> str:
    report = load("states")
    body = []
    for kind in ("key", "value"):
        heads = [head for head in report["heads"] if head["kind"] == kind]
        ratios = sorted(head["largest_over_median_channel"] for head in heads)
        means = [sum(head["error"][rule] for head in heads) / len(heads) for rule in ("per_token", "per_channel")]
        body.append(
            [f"{kind}s", number(ratios[len(ratios) // 2], 2), number(ratios[-1], 2), *(percent(mean) for mean in means)]
        )
    header = [report["model"], "largest over median channel: median head", "worst head", "error, a scale each token", "a scale each channel"]
    return table(header, body) + "\n\n" + where("states")


# Peers


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
        header = [group, "median, ms", "times as fast as DynamicCache", "cache, MiB", "peak reserved, MiB", "relative error"]
        used = [i for i in range(len(header)) if i < 4 or any(row[i] != "-" for row in body)]
        tables.append(table([header[i] for i in used], [[row[i] for i in used] for row in body]))
    left_out = "; ".join(f"{cache}: {reason}" for cache, reason in report["left_out"].items())
    return "\n\n".join([*tables, f"Left out: {left_out}." if left_out else "", where(name)])


# In short


def _find(found: Iterable[Row], **wanted: Any) -> Row:
    """The row with these values.

    Raises:
        NotMeasured: there is none.
    """
    for row in found:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise NotMeasured(f"Not measured yet: a row with {wanted}.")


def _summary_memory() -> list[str]:
    held = load("memory")["held"]
    int8, exact = (
        _find(held, model="Llama-3.1-8B", tokens=8192, cache=cache)["held_bytes"] / 2**20
        for cache in ("quantcache int8", "DynamicCache")
    )
    return ["cache of Llama-3.1-8B, 8,192 tokens", f"{int8:.0f} MiB", f"`DynamicCache` {exact:.0f} MiB"]


def _summary_quality() -> list[str]:
    found = [row for row in load("quality")["rows"] if row["model"] == "SmolLM2-135M" and row.get("prompt_len") == 512]
    own = _find(found, cache="quantcache int8")["mean_kl"]
    others = [
        f"{words} {number(_find(found, cache=cache)['mean_kl'], 2)}"
        for words, cache in (
            ("the model in bfloat16", "model in bfloat16, exact cache"),
            ("int8 with a scale a token", "int8 a token and head, symmetric"),
            ("`QuantizedCache` fp8", "QuantizedCache fp8"),
        )
    ]
    return ["distance of the answers, SmolLM2-135M, KL in nats a token", number(own, 2), ", ".join(others)]


def _summary_gpu() -> list[str]:
    name = "attention, batch 32, 32/8 heads, 8192 tokens, head_dim 128, query_len 1"
    times = dict(_find(rows("cuda-attention"), row=name)["median_us"])
    int8 = times.pop("int8")
    return ["attention of a layer, 32 x 8,192 tokens, H200", f"{int8:.0f} µs", f"bfloat16 SDPA {min(times.values()):.0f} µs"]


def _summary_cpu() -> list[str]:
    rates = _find(rows("cpu-attention"), row="generate(), SmolLM2-135M, float32, 8192 tokens")["tokens_per_s"]
    name = "`generate()` on a CPU, SmolLM2-135M, 8,192 tokens"
    return [name, f"{rates['int8']:.1f} tokens/s", f"`DynamicCache` {rates['DynamicCache']:.1f} tokens/s"]


def _summary_eager() -> list[str]:
    name = "eager generate(), Qwen-7B geometry, batch 1, 8192 tokens"
    times = _find(rows("cuda-attention"), row=name)["ms_per_token"]
    name = "eager `generate()`, one sequence, Qwen-7B geometry, H200"
    return [name, f"{times['int8']:.1f} ms a token", f"`DynamicCache` {times['DynamicCache']:.1f} ms: {'slower' if times['int8'] > times['DynamicCache'] else 'faster'}"]


def summary() -> str:
    """One line for each thing that a reader wants to know, what is worse included; lines that lack a measurement go."""
    body = []
    for line in (_summary_memory, _summary_quality, _summary_gpu, _summary_cpu, _summary_eager):
        with contextlib.suppress(NotMeasured):
            body.append(line())
    if not body:
        raise NotMeasured("Not measured yet.")
    return table(["", "`QuantizedInt8Cache`", "compared with"], body)


TABLES: dict[str, Callable[[], str]] = {
    "cuda-attention": cuda_attention,
    "summary": summary,
    "cuda-eager": cuda_eager,
    "cuda-other": cuda_other,
    "compiled-decode": compiled_decode,
    "compiled-memory": compiled_memory,
    "qwen-memory": qwen_memory,
    "parallel": lambda: flat_rows("parallel"),
    "cpu-attention": cpu_attention,
    "cpu-generate": cpu_generate,
    "first-use": first_use,
    "files": files,
    "memory-held": memory_held,
    "memory-peers": memory_peers,
    "memory-fits": memory_fits,
    "quality": quality,
    "quality-odd-prompt": quality_odd_prompt,
    "states": states,
    "peers-cpu": lambda: peers("peers-cpu"),
    "peers-gpu": lambda: peers("peers-gpu"),
}
