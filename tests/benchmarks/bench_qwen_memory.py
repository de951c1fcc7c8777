"""Memory of Qwen-7B with the int8 cache, in the rows of the original's two tables, with bfloat16 and with Int4 weights.

    PYTHONPATH=. python tests/benchmarks/bench_qwen_memory.py [--quick] [--device cpu --tiny] [--out FILE]

Weights are random, of Qwen-7B's geometry, and made on the device. A row fills a new cache with the row's tokens through
the whole model, after the allocator was emptied and its peaks were reset, and reads the peaks.

How a row is measured ("measured_by"):
  chunks    Tokens are fed 64 at a time, which takes seconds where generate() takes a minute. It allocates no less than
            generate(): an update of at most 64 tokens closes at most one page, as updates of one token do, so pages,
            segments and tail are allocated in the same order and sizes (checked below against generate(), byte for
            byte), and the activations and the tail's buffer are those of 64 tokens a row and not of one.
  generate  A real generate() of as many tokens; the rows of it show that the chunks' figure is the higher one.

Units are GiB (2**30 bytes), as in the original's tables, whose smallest figure, 15.0, is below the 15.44e9 bytes of the
bfloat16 weights alone. "limit" is the original's figure with its quantised cache, less what the weights here are
smaller than bfloat16 ones. "dynamic" is transformers' DynamicCache fed the same chunks, which spares it most of the
sizes that generate() makes it allocate one after another.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.adapters.qwen import QWenConfig, QWenLMHeadModel, memory_report
from quantcache.adapters.qwen.gptq import GPTQFallbackConfig, GPTQFallbackQuantizer, GPTQLinear
from quantcache.layers._host import cache_argument
from tests.benchmarks import report

Row = dict[str, Any]

GIB = 2**30
CHUNK = 64
QWEN_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
           "intermediate_size": 22016, "vocab_size": 151936, "seq_length": 8192}  # fmt: skip
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 32,
        "intermediate_size": 128, "vocab_size": 512, "seq_length": 8192}  # fmt: skip
BATCH_TOKENS = 1024
# The figures of the original's README (one A100): batch or tokens, without and with its quantised cache; None: OOM.
BATCH_ROWS = [(1, 16.3, 15.5), (4, 24.1, 17.2), (16, 31.7, 22.3), (32, 48.7, 30.2), (64, None, 48.2), (100, None, 72.4)]
LENGTH_ROWS = [(512, 15.2, 15.0), (1024, 16.3, 15.5), (2048, 17.6, 15.8), (4096, 19.5, 16.6), (8192, 23.2, 17.6)]
INT4_TARGET = {2048: 7.5}


def make_model(geometry: dict[str, Any], int4: bool, device: torch.device) -> QWenLMHeadModel:
    """Random weights on the device; Int4 ones are packed words that never were anything else."""
    config = QWenConfig(**geometry, use_cache_quantization=True)
    dtype = torch.float16 if int4 else torch.bfloat16
    with torch.device("meta"):
        model = QWenLMHeadModel(config).to(dtype)
    if int4:
        quantizer = GPTQFallbackQuantizer(GPTQFallbackConfig(bits=4, group_size=min(128, config.hidden_size)))
        quantizer._process_model_before_weight_loading(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GPTQLinear):
                module.qweight.random_(-(2**31), 2**31 - 1)
                module.qzeros.fill_(0x77777777)
                module.scales.fill_(0.02 / 8)
                module.g_idx.copy_(torch.arange(module.in_features) // module.group_size)
                module.bias.zero_()
            for name, parameter in module.named_parameters(recurse=False):
                is_norm = parameter.dim() == 1 and name == "weight"
                parameter.fill_(1) if is_norm else parameter.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def by_chunks(model: QWenLMHeadModel, batch: int, tokens: int) -> QuantizedInt8Cache:
    cache = QuantizedInt8Cache(model.config)
    feed(model, cache, batch, tokens)
    return cache


def feed(model: QWenLMHeadModel, cache: Cache, batch: int, tokens: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)
    for chunk in ids.split(CHUNK, dim=1):
        logits = model(chunk, **cache_argument(cache), logits_to_keep=1).logits
    if not bool(logits.isfinite().all()):
        raise RuntimeError("bench_qwen_memory: logits must be finite.")


def by_generate(model: QWenLMHeadModel, batch: int, tokens: int) -> QuantizedInt8Cache:
    """The cache of a generate() from one token a row; the newest token is never fed."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    cache = QuantizedInt8Cache(model.config)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), do_sample=False, max_new_tokens=tokens,
        min_new_tokens=tokens, pad_token_id=0, eos_token_id=None, stop_words_ids=[],
    )  # fmt: skip
    return cache


def check_chunks(device: torch.device) -> None:
    """The claim of the measurement, on a tiny model: chunks leave what generate() leaves, segment by segment."""
    model = make_model(TINY, False, device)
    for tokens in (97, 300, 1300):
        chunks, generated = by_chunks(model, 2, tokens), by_generate(model, 2, tokens)
        for one, other in zip(chunks.layers, generated.layers, strict=True):
            sizes = [[(s.capacity, s.nbytes) for s in layer.pages.segments] for layer in (one, other)]
            counts = [(layer.get_seq_length(), layer.pages.num_pages) for layer in (one, other)]
            if sizes[0] != sizes[1] or counts[0] != counts[1] or one.nbytes < other.nbytes:
                raise RuntimeError(f"bench_qwen_memory: chunks and generate() must store alike, got {sizes}, {counts}.")


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(on_gpu: bool, prefix: str = "") -> Row:
    """Peak GiB that torch has allocated and reserved since ``forget``; null for a model on the CPU."""
    found = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
    return {f"{prefix}peak_{name}_gib": round(peak() / GIB, 3) if on_gpu else None for name, peak in found.items()}


def measure_dynamic(model: QWenLMHeadModel, batch: int, tokens: int) -> Row:
    """The peaks of DynamicCache fed the same; null where there is no memory for it."""
    forget()
    try:
        feed(model, DynamicCache(config=model.config), batch, tokens)
    except torch.cuda.OutOfMemoryError:
        return peaks(False, "dynamic_")
    return peaks(model.device.type == "cuda", "dynamic_")


def measure(
    model: QWenLMHeadModel, weights: str, table: str, batch: int, tokens: int, figures: tuple[Any, Any], how: str
) -> Row:
    on_gpu = model.device.type == "cuda"
    forget()
    started = time.perf_counter()
    cache = (by_chunks if how == "chunks" else by_generate)(model, batch, tokens)
    if on_gpu:
        torch.cuda.synchronize()
    report = memory_report(model, cache)
    # What bfloat16 weights of this geometry weigh, whatever these are packed to.
    config = model.config
    per_layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * (config.intermediate_size // 2 + 1)
    bf16 = 2 * (config.num_hidden_layers * (per_layer + 2 * config.hidden_size) + config.hidden_size)
    bf16 += 2 * 2 * config.vocab_size * config.hidden_size
    held = report.packed_weights + report.float_weights
    row: Row = {
        "weights": weights,
        "table": table,
        "batch": batch,
        "tokens": tokens,
        "measured_by": how,
        "weights_gib": round(held / GIB, 3),
        "cache_gib": round(report.cache / GIB, 3),
        "cache_bytes": report.cache,
        "read_by": cache.report().backend,
        "seconds": round(time.perf_counter() - started, 1),
        **peaks(on_gpu),
        "original_without_gib": figures[0],
        "original_with_gib": figures[1],
        "limit_gib": round(figures[1] - (bf16 - held) / GIB, 3),
    }
    if weights == "int4" and batch == 1 and tokens in INT4_TARGET:
        row["int4_target_gib"] = INT4_TARGET[tokens]
    if on_gpu:
        row["allocated_within_limit"] = row["peak_allocated_gib"] <= row["limit_gib"]
        row["reserved_within_limit"] = row["peak_reserved_gib"] <= row["limit_gib"]
    if how == "chunks":
        del cache
        row |= measure_dynamic(model, batch, tokens)
    return row


def plan(options: argparse.Namespace) -> list[tuple[str, int, int, tuple[Any, Any], str]]:
    """Rows as table, batch, tokens, the original's figures, and how to measure."""
    batches, lengths, batch_tokens = BATCH_ROWS, LENGTH_ROWS, BATCH_TOKENS
    if options.quick:
        batches, lengths = [BATCH_ROWS[0], BATCH_ROWS[3]], [LENGTH_ROWS[0], LENGTH_ROWS[2]]
    if options.tiny:
        batches, lengths, batch_tokens = BATCH_ROWS[:2], LENGTH_ROWS[:1], 256
    rows = [("batch", batch, batch_tokens, (without, with_), "chunks") for batch, without, with_ in batches]
    rows += [("length", 1, tokens, (without, with_), "chunks") for tokens, without, with_ in lengths]
    if options.only:
        rows = [row for row in rows if row[0] == options.only]
    if options.without_generate or options.only:
        return rows
    # The same by generate(): the smallest row and the largest one.
    rows.append(("length", 1, lengths[0][0], lengths[0][1:], "generate"))
    if not options.quick:
        rows.append(("batch", batches[-1][0], batch_tokens, batches[-1][1:], "generate"))
    return rows


def as_table(rows: list[Row]) -> str:
    """The rows in Markdown, for the documentation."""
    columns = ("weights", "batch", "tokens", "measured_by", "peak_allocated_gib", "peak_reserved_gib", "limit_gib",
               "original_with_gib", "original_without_gib", "cache_gib", "weights_gib")  # fmt: skip
    lines = [columns, ("---",) * len(columns), *(tuple(row[column] for column in columns) for row in rows)]
    return "\n".join("| " + " | ".join("-" if x is None else str(x) for x in line) + " |" for line in lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and few tokens")
    parser.add_argument(
        "--quick", action="store_true", help="two batches and two lengths, one of them by generate() too"
    )
    parser.add_argument("--without-generate", action="store_true", help="the rows by chunks alone, in a minute")
    parser.add_argument(
        "--only", choices=["batch", "length"], help="one of the two tables, without the rows by generate()"
    )
    parser.add_argument("--weights", nargs="*", default=["bf16", "int4"])
    parser.add_argument("--out", default="docs/benchmarks/qwen-memory.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows: list[Row] = []
    check_chunks(device)
    for weights in options.weights:
        model = make_model(TINY if options.tiny else QWEN_7B, weights == "int4", device)
        for table, batch, tokens, figures, how in plan(options):
            if weights == "int4" and how == "generate" and batch > 1:
                continue  # the cache is the same; what differs is in the row of one sequence
            rows.append(measure(model, weights, table, batch, tokens, figures, how))
            print(json.dumps(rows[-1]), flush=True)
            write(rows, options, device)  # after each row: a run that is cut short keeps what it has
        del model
        forget()  # the next weights must not lie in pieces of what these leave
    print(as_table(rows))


def write(rows: list[Row], options: argparse.Namespace, device: torch.device) -> None:
    """The file, with the rows that there are."""
    hardware: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)}
    result = {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_qwen_memory.py"
        + "".join(f" --{name.replace('_', '-')}" for name in ("quick", "without_generate") if vars(options)[name]),
        "hardware": hardware,
        "versions": report.versions(),
        "geometry": TINY if options.tiny else QWEN_7B,
        "rows": rows,
    }
    report.write(result, Path(options.out))


if __name__ == "__main__":
    main()
