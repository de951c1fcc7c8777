"""Tables of memory, and of files."""

from tools.measurements import GIB, load, where
from tools.tables.markdown import number, table


def memory_held() -> str:
    report = load("memory")
    body = []
    for model in dict.fromkeys(row["model"] for row in report["held"]):
        found = {(row["tokens"], row["cache"]): row for row in report["held"] if row["model"] == model}
        for tokens in sorted({tokens for tokens, _ in found}):
            exact, int8 = found[tokens, "DynamicCache"]["held_bytes"], found[tokens, "quantcache int8"]["held_bytes"]
            body.append([model, f"{tokens:,}", number(exact / 2**20), number(int8 / 2**20), f"{int8 / exact:.3f}"])
    header = " | tokens | DynamicCache, MiB | int8, MiB | int8 / DynamicCache"
    return table(header, body) + "\n\n" + where("memory")


def memory_peers() -> str:
    report = load("memory")
    models = list(dict.fromkeys(row["model"] for row in report["held"]))
    found = {(row["cache"], row["model"]): row for row in report["held"] if row["tokens"] == 8192}
    body = [
        [cache, *(number(found[cache, model]["bytes_per_number"]) for model in models)]
        for cache in dict.fromkeys(cache for cache, _ in found)
    ]
    return table(" | ".join(["bytes per number at 8,192 tokens", *models]), body) + "\n\n" + where("memory")


def memory_fits() -> str:
    body = []
    for row in load("memory")["fits"]:
        batch, context = row["largest_batch"], row["longest_context"]
        most = (f"{found[cache]:,}" for found in (batch, context) for cache in ("bf16", "int8"))
        body.append([row["model"], f"{row['gpu_gib']}", f"{row['tokens']:,}", *most])
    columns = "GPU, GiB | tokens | largest batch, bf16 cache | int8 | longest context, bf16 cache | int8"
    return table(f"bfloat16 weights | {columns}", body) + "\n\n" + where("memory")


def files() -> str:
    report = load("files")
    body = [[name, number(value)] for name, value in report["median_gb_per_s"].items()]
    tokens, size = report["cache"]["tokens"], report["file_bytes"] / GIB
    told = f"A cache of {tokens:,} tokens of an 8B Llama, {size:.2f} GiB on disk."
    return "\n\n".join([told, table(" | GB/s", body), where("files")])
