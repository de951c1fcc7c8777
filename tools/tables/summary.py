"""One line for each thing that a reader wants to know."""

import contextlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tools.measurements import NotMeasuredError, Row, best_stock_ms, load, rows
from tools.tables.markdown import number, table


def _find(found: Iterable[Row], **wanted: Any) -> Row:
    """The row with these values.

    Raises:
        NotMeasuredError: there is none.
    """
    for row in found:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise NotMeasuredError(f"Not measured yet: a row with {wanted}.")


def _summary_memory() -> list[str]:
    held = load("memory")["held"]
    int8, exact = (
        _find(held, model="Llama-3.1-8B", tokens=8192, cache=cache)["held_bytes"] / 2**20
        for cache in ("quantcache int8", "DynamicCache")
    )
    return ["cache of Llama-3.1-8B, 8,192 tokens", f"{int8:.0f} MiB", f"`DynamicCache` {exact:,.0f} MiB"]


def _summary_quality() -> list[str]:
    found = [row for row in load("quality")["rows"] if row["model"] == "SmolLM2-135M" and row.get("prompt_len") == 512]
    own = _find(found, cache="quantcache int8")["mean_kl"]
    others = [
        f"{words} {number(_find(found, cache=cache)['mean_kl'], 2)}"
        for words, cache in (
            ("the model in bfloat16", "model in bfloat16, exact cache"),
            ("int8 with one scale per token", "int8 a token and head, symmetric"),
            ("`QuantizedCache` fp8", "QuantizedCache fp8"),
        )
    ]
    return ["KL divergence from the exact cache, SmolLM2-135M, nats per token", number(own, 2), ", ".join(others)]


def _summary_gpu() -> list[str]:
    name = "attention, batch 32, 32/8 heads, 8192 tokens, head_dim 128, query_len 1"
    times = dict(_find(rows("cuda-attention"), row=name)["median_us"])
    int8 = times.pop("int8")
    name = "attention of a layer, 32 x 8,192 tokens, H200"
    return [name, f"{int8:.0f} µs", f"bfloat16 SDPA {min(times.values()):.0f} µs"]


def _summary_flashinfer() -> list[str]:
    times = _find(rows("flashinfer"), row="batch 32, 32/8 heads, 8,192 tokens, head_dim 128")["median_us"]
    fp8, bf16 = (
        min(time for name, time in times.items() if name.startswith(f"flashinfer {words}")) for words in ("fp8", "bf16")
    )
    other = f"FlashInfer's fastest with fp8 {fp8:.0f} µs, with bfloat16 {bf16:.0f} µs"
    return ["the same beside a serving engine's kernels", f"{times['int8']:.0f} µs", other]


def _summary_cpu() -> list[str]:
    rates = _find(rows("cpu-attention"), row="generate(), SmolLM2-135M, float32, 8192 tokens")["tokens_per_s"]
    name = "`generate()` on a CPU, SmolLM2-135M, 8,192 tokens"
    return [name, f"{rates['int8']:.1f} tokens/s", f"`DynamicCache` {rates['DynamicCache']:.1f} tokens/s"]


def _summary_compiled(best: bool) -> list[str]:
    """The compiled row in which it does best, of those that were measured beside the best alternative, or worst."""
    found = [row for row in load("compiled-decode")["rows"] if row.get("ratio")]
    if len(found) < 2:
        raise NotMeasuredError("Not measured yet: `compiled-decode.json` lacks rows with both caches.")
    if best:
        found = [row for row in found if best_stock_ms(row)] or found
    row = (max if best else min)(found, key=lambda row: row["ratio"])
    times, stock = row["ms"], best_stock_ms(row)
    others = f"`StaticCache` {times['StaticCache']:.1f} ms per token"
    if stock:
        others += f", `DynamicCache`, eager, without cuDNN {stock:.1f} ms"
    what = re.sub(r"\d{4,}", lambda count: f"{int(count[0]):,}", row["row"].split(" of ")[0])
    name = f"compiled `generate()`, {what}, H200"
    return [name, f"{times['int8']:.1f} ms per token", others]


def _summary_samples() -> list[str]:
    """Each cache where torch's choice of attention suits it best."""
    found = [row for row in rows("generate-gpu") if row["name"] == "shared-samples"]
    if not found:
        raise NotMeasuredError("Not measured yet: samples of one prompt in `generate-gpu.json`.")
    seconds, peaks = (
        {cache: min(row[key][cache] for row in found) for cache in ("int8", "DynamicCache")}
        for key in ("seconds", "peak_gib")
    )
    return [
        f"{found[0]['row']} tokens, Qwen2.5-7B geometry, H200",
        f"{seconds['int8']:.2f} s, {peaks['int8']:.1f} GiB over the weights",
        f"`DynamicCache` {seconds['DynamicCache']:.2f} s, {peaks['DynamicCache']:.1f} GiB",
    ]


def _summary_serving() -> list[str]:
    job = _find(load("serving-gpu")["jobs"], name="even")
    ways = job["ways"]
    stock = ways["stock"]["whole_job_tokens_per_second"]
    return [
        f"`generate_batch`, {job['job']}, the same",
        f"{ways['int8 blocks']['new_tokens_per_second']:,.0f} tokens/s",
        f"blocks in bfloat16 without flash-attn {stock:,.0f} tokens/s",
    ]


def summary() -> str:
    """One line for each thing that a reader wants to know, what is worse included; lines that lack a measurement go."""
    body = []
    best, worst = (partial(_summary_compiled, best=best) for best in (True, False))
    lines: tuple[Callable[[], list[str]], ...]
    lines = (_summary_memory, _summary_quality, _summary_gpu, _summary_flashinfer, best, worst)
    lines += (_summary_samples, _summary_serving, _summary_cpu)
    for line in lines:
        with contextlib.suppress(NotMeasuredError):
            body.append(line())
    if not body:
        raise NotMeasuredError("Not measured yet.")
    return table(" | `QuantizedInt8Cache` | compared with", body)
