"""Tables of speed: kernels, decoding, first use."""

import re
from typing import Final

from tools.measurements import Row, attention_name, best_stock_ms, load, rows, where
from tools.tables.markdown import number, table


def cuda_attention() -> str:
    body = []
    for row in rows("cuda-attention", "attention"):
        for ending, ratio in (("", "ratio"), (_MASKED, "ratio_with_mask")):
            if ratio not in row:
                continue
            times = {
                name.removesuffix(_MASKED): time
                for name, time in row["median_us"].items()
                if name.endswith(_MASKED) == bool(ending)
            }
            rate = row["tb_per_s"] * row["median_us"]["int8"] / times["int8"]
            cells = [number(times.pop("int8")), number(min(times.values())), f"**{row[ratio]:.2f}**"]
            name = attention_name(row) + (", with the mask of `generate()`" if ending else "")
            body.append([name, *cells, number(rate), number(row["relative_error"], 2)])
    header = " | int8, µs | bfloat16 SDPA, µs | times as fast | TB/s | relative error"
    return table(header, body) + "\n\n" + where("cuda-attention")


_MASKED: Final = " with mask"


def cuda_account() -> str:
    body = []
    for row in rows("cuda-attention", "account"):
        cells = [number(row[part][name]) for name in ("int8", "sdpa gqa") for part in ("fixed_us", "tb_per_s")]
        tokens = " to ".join(f"{row['tokens'][end]:,}" for end in (0, -1))
        body.append([row["row"].removeprefix("account, ") + f", {tokens} tokens", *cells])
    header = " | int8: whatever it reads, µs | TB/s | bfloat16 SDPA: whatever it reads, µs | TB/s"
    return table(header, body) + "\n\n" + where("cuda-attention")


def cuda_prefill() -> str:
    body = []
    for row in rows("cuda-prefill"):
        times = row["median_us"]
        kinds = (
            "int8",
            "int8 with mask",
            "sdpa gqa with mask",
            "sdpa repeated with mask, no cuDNN",
            "flash without mask",
        )
        ratios = [f"**{row[name]:.2f}**" for name in ("ratio", "ratio_with_mask")]
        error = number(max(row["relative_error"].values()), 2)
        body.append([row["row"].removeprefix("prefill, "), *(number(times[kind]) for kind in kinds), *ratios, error])
    header = (
        "µs | int8, causal | int8, mask | SDPA, mask, cuDNN | SDPA, mask, heads repeated, no cuDNN | flash, no mask | "
        "times as fast as flash, no masks | as repeated heads, both with mask | relative error"
    )
    return table(header, body) + "\n\n" + where("cuda-prefill")


def cuda_shared() -> str:
    body = []
    for row in rows("cuda-shared"):
        times = row["median_us"]
        once = times.get("shared, read once", times["shared"])
        cells = [*(number(times[kind]) for kind in ("copies", "shared, read by each")), number(once)]
        error = number(max(row["relative_error"].values()), 2)
        body.append([row["row"], *cells, f"**{row['ratio']:.2f}**", error])
    header = "µs | copies | shared, read by each | shared, read once | times as fast as copies | relative error"
    return table(header, body) + "\n\n" + where("cuda-shared")


def reorder_cpu() -> str:
    return _reordering("reorder-cpu")


def reorder_gpu() -> str:
    return _reordering("reorder-gpu")


def _reordering(name: str) -> str:
    body = []
    for row in rows(name):
        (baseline, ratio), *_ = row["ratios"].items()
        times = (number(row["median_ms"][cache]) for cache in ("int8", baseline))
        body.append([row["row"], *times, baseline, f"**{ratio:.1f}**"])
    header = "ms, all layers | int8 | stock | which stock cache | times as fast"
    return table(header, body) + "\n\n" + where(name)


def generate_profile() -> str:
    body = []
    for row in rows("generate-profile"):
        first, *others = (number(1e3 * seconds) for seconds in row["seconds"])
        body.append([row["row"], row["cache"], first, ", ".join(others), number(row["host_ms"]), number(row["gpu_ms"])])
    header = "ms |  | first call | others | host, profiled | GPU, profiled"
    return table(header, body) + "\n\n" + where("generate-profile")


def cuda_blocks() -> str:
    body = []
    for row in rows("cuda-blocks"):
        times = row["median_us"]
        if "segments" in times:
            cells = [number(times[kind]) for kind in ("segments", "ordered", "shuffled")]
            body.append([row["row"], *cells, f"**{row['ratio']:.2f}**"])
    header = "µs | one segment | blocks in order | blocks anywhere | times as fast as one segment"
    return table(header, body) + "\n\n" + where("cuda-blocks")


def cuda_shared_profile() -> str:
    body = []
    for row in rows("cuda-shared-profile"):
        for kind, times in row["parts_us"].items():
            cycles = number(row["cycles_a_page"][kind])
            body.append([row["row"].split(" tokens")[0], kind, *(number(time) for time in times.values()), cycles])
    parts = " | ".join(load("cuda-shared-profile")["rows"][0]["parts_us"]["two"])
    header = f"µs | CTAs a processor | {parts} | cycles a page and processor"
    return table(header, body) + "\n\n" + where("cuda-shared-profile")


def flashinfer() -> str:
    """Serving engines' kernels: the fastest way of reading each format, and the fastest with pages of 64 tokens."""
    body = []
    left_out: dict[str, str] = {}
    for row in rows("flashinfer"):
        errors, ratios = row["relative_error"], row["times_as_fast_as_flashinfer"]
        name = re.sub("batch | heads| tokens", "", row["row"].removesuffix(", head_dim 128"))
        cells = [name, number(row["median_us"]["int8"])]
        for words in ("fp8", "bf16"):
            cells += [_fastest(row, "flashinfer", words), _fastest(row, "flashinfer", words, "pages of 64")]
        cells.append(number(min((time for name, time in row["median_us"].items() if _is_peer(name)), default=None)))
        cells += [f"**{ratios[words]:.2f}**" if words in ratios else "-" for words in ("fp8", "bf16")]
        cells += [number(max(e for name, e in errors.items() if words in name), 2) for words in ("int8", "fp8", "bf16")]
        body.append(cells)
        left_out |= {name: why for name, why in row["left_out"].items() if _is_peer(name)}
    header = (
        "µs | int8 | FlashInfer fp8 | pages of 64 | FlashInfer bf16 | pages of 64 | other peers, bf16 "
        "| times as fast as fp8 | as bf16 | relative error: int8 | fp8 | bf16"
    )
    absent = "".join(f"Left out: {name}: {why}.\n\n" for name, why in left_out.items())
    return table(header, body) + "\n\n" + absent + where("flashinfer")


def _is_peer(name: str) -> bool:
    return not name.startswith(("int8", "flashinfer"))


def _fastest(row: Row, *words: str) -> str:
    return number(min((time for name, time in row["median_us"].items() if all(w in name for w in words)), default=None))


def _with_dynamic(row: Row, figures: str, name: str = "") -> list[str]:
    """A row's name, its figures with both caches, and their ratio."""
    name = name or row["row"].partition("generate(), ")[2]
    return [name, *(number(row[figures][cache]) for cache in ("int8", "DynamicCache")), f"{row['ratio']:.2f}"]


def cuda_eager() -> str:
    body = [_with_dynamic(row, "ms_per_token") for row in rows("cuda-attention", "eager generate()")]
    host_time = "host time of one layer's update and attention, µs"
    body += [_with_dynamic(row, "host_us", host_time) for row in rows("cuda-attention", "host time")]
    return table("ms per token | int8 | DynamicCache | times as fast", body) + "\n\n" + where("cuda-attention")


def cuda_other() -> str:
    body = []
    for row in load("cuda-attention")["rows"]:
        if str(row["row"]).startswith(("attention", "account", "eager", "host time")):
            continue
        if seconds := row.get("seconds"):
            text = f"{number(seconds['cold'])} s, {number(1e3 * seconds['from disk'], 2)} ms from disk"
        else:
            text = ", ".join(f"{name} {number(value)} µs" for name, value in row.get("median_us", {}).items())
        body.append([row["row"], text])
    return table(" | median", body) + "\n\n" + where("cuda-attention")


def compiled_decode() -> str:
    body = []
    for row in load("compiled-decode")["rows"]:
        if "ms" not in row:
            continue
        memory = row.get("memory_gb", {})

        def reserved(kind: str, memory: Row = memory) -> str:
            return number(memory[kind]["reserved"]) if kind in memory else "-"

        def times(name: str, row: Row = row) -> list[str]:
            found = row.get(name, {})
            return [number(found.get(kind), missing="out of memory" if kind in found else "-") for kind in KINDS]

        ratio = f"**{row['ratio']:.2f}**" if "ratio" in row else "-"
        stock = number(best_stock_ms(row))
        body.append([row["row"], *times("ms"), ratio, stock, *times("step_ms"), *map(reserved, KINDS)])
    header = (
        " | int8, ms per token | StaticCache | times as fast | eager DynamicCache without cuDNN "
        "| the step alone: int8, ms | static | int8, GB reserved | static"
    )
    return table(header, body) + "\n\n" + where("compiled-decode")


def compiled_account() -> str:
    """Where the milliseconds of a token go."""
    body = []
    for row in load("compiled-decode")["rows"]:
        if account := row.get("account_ms"):
            between = row["ms"]["int8"] - sum(account.values())
            body.append([row["row"], *(number(account[kind]) for kind in ACCOUNT), number(between)])
    header = " | ".join(["int8, ms per token", *ACCOUNT.values(), "between two graphs"])
    return table(header, body) + "\n\n" + where("compiled-decode")


ACCOUNT = {
    "attention": "attention",
    "advance": "the new token and page ends",
    "matrix products": "matrix products",
    "other": "other",
}
"""Kinds of kernels in the measurement, and what the table calls them."""


_WAYS: Final = "`compile_config` | first replayed token, s | in a later call, s | ms per token"


def compiled_variants() -> str:
    (row,) = rows("compiled-variants", "variants")
    ways = [
        [
            name,
            *(number(found.get(key)) for key in ("first_s", "later_s", "ms")),
            found.get("why") or str(found["cudagraph_skips"]),
        ]
        for name, found in row["variants"].items()
    ]
    loops = [[name, number(found), number(found - row["step_ms"])] for name, found in row["loops_ms"].items()]
    return "\n\n".join(
        [
            table(f"{_WAYS} | CUDA graphs that torch skipped", ways),
            table("the loop, with the default | ms per token | of it not the step", loops),
            where("compiled-variants"),
        ]
    )


def compiled_lengths() -> str:
    """One token after contexts of several lengths, eager and compiled."""
    (row,) = (row for row in load("compiled-decode")["rows"] if "ms_by_tokens" in row)
    found = row["ms_by_tokens"]
    columns = {
        **{cache: f"{cache}, compiled" for cache in KINDS},
        **{f"{cache} eager": f"{cache}, eager" for cache in ("int8", "DynamicCache")},
        "DynamicCache eager, no cuDNN": "DynamicCache, eager, without cuDNN",
    }
    kinds = [kind for kind in columns if kind in found]
    body = [[f"{int(tokens):,}", *(number(found[kind][tokens]) for kind in kinds)] for tokens in found["int8"]]
    header = " | ".join(["tokens", *(columns[kind] for kind in kinds)])
    geometry, capacity = str(row["row"]).split(",", 1)[0], int(str(row["row"]).rsplit(" ", 1)[1])
    told = f"Milliseconds per token, {geometry}'s geometry, one sequence; the compiled caches have room for "
    return f"{told}{capacity:,} tokens.\n\n" + table(header, body) + "\n\n" + where("compiled-decode")


KINDS = ("int8", "StaticCache")


def compiled_memory() -> str:
    body = []
    for row in rows("compiled-decode", "memory"):
        memory = row["memory_gb"]
        peaks = [number(memory[kind]) for kind in ("allocated", "reserved")] if memory else ["out of memory"] * 2
        limit = f"{row['limit_gb']:g}" if row.get("limit_gb") else "-"
        body.append([row["row"].removeprefix("memory, "), *peaks, number(row.get("cache_gb")), limit])
    header = " | peak allocated, GB | peak reserved, GB | of it the cache, GB | limit set, GB"
    return table(header, body) + "\n\n" + where("compiled-decode")


def qwen_memory() -> str:
    body = []
    for row in load("qwen-memory")["rows"]:
        originals = [number(row[f"original_{which}_gib"], missing="out of memory") for which in ("without", "with")]
        ours, dynamic = (
            [number(row.get(f"{cache}peak_{kind}_gib"), missing="-") for kind in ("allocated", "reserved")]
            for cache in ("", "dynamic_")
        )
        name = f"{row['weights']}, batch {row['batch']}, {row['tokens']:,} tokens"
        name += " (by `generate`)" if row["measured_by"] == "generate" else ""
        body.append([name, *originals, *ours, number(row["cache_gib"]), *dynamic])
    header = (
        "GiB | original, float cache | original, quantised "
        "| quantcache, allocated | reserved | of it the cache | DynamicCache, allocated | reserved"
    )
    return table(header, body) + "\n\n" + where("qwen-memory")


def parallel() -> str:
    """Decoding on one GPU and on two."""
    body = []
    for row in load("parallel")["rows"]:
        for kind, rate in row["tokens_per_s"].items():
            why = row["why"].get(kind)
            memory = row["memory_gb"].get(kind) or []
            held = " + ".join(number(gpu["reserved"]) for gpu in memory if gpu["reserved"] > 1)
            body.append([row["row"], row["placement"], kind, why or f"{rate:,.0f}", held or "-"])
    header = " |  | cache | tokens per second | GB reserved on each GPU"
    return table(header, body) + "\n\n" + where("parallel")


def cpu_attention() -> str:
    body = []
    for row in rows("cpu-attention"):
        if not row["row"].startswith(("decode attention", "masked attention")):
            continue
        times = row["median_ms"]
        exact = min(value for name, value in times.items() if name.startswith("sdpa"))
        slow = row.get("ratio_to_torch_backend")
        ratios = f"**{row['ratio_to_best_sdpa']:.2f}**", "-" if slow is None else f"{slow:.0f}"
        body.append([attention_name(row), number(times["int8"]), number(exact), *ratios])
    header = " | int8, ms | exact, ms | times as fast | times as fast as the torch backend"
    return table(header, body) + "\n\n" + where("cpu-attention")


def cpu_generate() -> str:
    body = [_with_dynamic(row, "tokens_per_s") for row in rows("cpu-attention", "generate()")]
    body = [[*cells, f"**{ratio}**"] for *cells, ratio in body]
    return table("tokens per second | int8 | DynamicCache | times as fast", body) + "\n\n" + where("cpu-attention")


def llama_cpp() -> str:
    """One model on a CPU, here and in llama.cpp."""
    found = rows("llama-cpp")
    body = []
    for row in found:
        ratios = {kind: f"**{ratio:.2f}**" for kind, ratio in row["times_as_fast_as"].items()}
        for kind, pace in row["tokens_per_s"].items():
            body.append([row["row"], kind, number(pace), ratios.get(kind, "")])
    header = "model and tokens | cache | tokens per second | int8, times as fast"
    built = f"llama.cpp: {load('llama-cpp')['llama_cpp_system']}."
    return table(header, body) + f"\n\n{built.replace(' | ', ', ')}\n\n" + where("llama-cpp")


def _generate(name: str) -> str:
    """Every way of calling ``generate()``: each row with all of its caches."""
    body = []
    for row in rows(name):
        factor, unit = (1e3, "ms") if row["unit"] == "per token" else (1, "s")
        stock = [cache for cache in row["seconds"] if cache != "int8"]
        against = " / ".join(stock) + (", no cuDNN" if row["cudnn"] is False else "")
        times = [[number(factor * row["seconds"][cache]) for cache in caches] for caches in (["int8"], stock)]
        peaks = [[number(row["peak_gib"][cache] or None) for cache in caches] for caches in (["int8"], stock)]
        cells = [*map(" / ".join, times), f"**{row['ratio']:.2f}**", *map(" / ".join, peaks)]
        body.append([row["row"], f"{unit}, {row['unit']}", against, *cells, row["path"]])
    header = " |  | against | int8 | stock cache | times as fast | int8, peak GiB | stock cache | read by"
    models = ", ".join(dict.fromkeys(row["model"] for row in rows(name)))
    return table(header, body) + f"\n\n{models}. " + where(name)


def generate_gpu() -> str:
    return _generate("generate-gpu")


def generate_cpu() -> str:
    return _generate("generate-cpu")


def wheel() -> str:
    report = load("wheel")
    body = [
        [row["row"].removeprefix("first use, "), name, number(1e3 * took), number(1e3 * again if again else None)]
        for row in report["rows"]
        for name, took in row["seconds"].items()
        if not name.startswith(("import", "again"))
        for again in [row["seconds"].get(name.replace("attention", "again", 1)) if "attention" in name else None]
    ]
    size = f"A wheel of {number(report['wheel_bytes'] / 1e6)} MB."
    return "\n\n".join([table("device | first call | ms | the same again, ms", body), size, where("wheel")])


def first_use() -> str:
    body = [[row["row"], f"{number(row['seconds'])} s"] for row in load("first-use")["rows"]]
    return table(" | seconds", body) + "\n\n" + where("first-use")
