"""The CPU kernels against torch, in one run.

    PYTHONPATH=. python tests/benchmarks/bench_cpu_attention.py [--model FOLDER_WITH_GGUF] [--rows WORD ...]

Every row first checks its result, then times its candidates in turn, so that what slows one slows all; medians and
their ratios are written as JSON. Bytes are those the candidate must read and write. Each kind of row runs in a process
of its own, so that the memory one leaves behind does not shape the next.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache import QuantizedInt8Cache
from quantcache.backends import cpu, dispatch, processor
from quantcache.backends import torch as torch_backend
from quantcache.layers._host import cache_argument
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from quantcache.store.growing import Int8Pages
from quantcache.store.segments import Segment
from quantcache.store.view import PagesView
from tests.benchmarks import report

Row = dict[str, Any]

CAUSAL = AttentionOptions(is_causal=True)

COPIED_BYTES = 256 << 20


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def filled(
    batch: int, num_kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[Int8Pages, Tensor, Tensor]:
    key = torch.randn(batch, num_kv_heads, tokens, head_dim, dtype=torch.float32).to(dtype)
    value = torch.randn(batch, num_kv_heads, tokens, head_dim, dtype=torch.float32).to(dtype)
    pages = Int8Pages(key, value)
    pages.append(key, value)
    return pages, key, value


def restored(view: PagesView) -> tuple[Tensor, Tensor]:
    """What the view holds, in float64."""
    restore_pages = reference.restore_key_pages, reference.restore_value_pages
    kept = (
        [restore(*segment[2 * which : 2 * which + 2], torch.float32) for segment in view.segments]
        for which, restore in enumerate(restore_pages)
    )
    key, value = (
        torch.cat([*parts, tail], dim=2).double()
        for parts, tail in zip(kept, (view.key_tail, view.value_tail), strict=True)
    )
    return key, value


def attention_row(batch: int, num_kv_heads: int, group: int, tokens: int, head_dim: int, target: float | None) -> Row:
    """Decode attention of one token; the baselines are SDPA over dense caches, in the faster of its two forms."""
    pages, key, value = filled(batch, num_kv_heads, tokens, head_dim, torch.bfloat16)
    view = pages.view()
    query = torch.randn(batch, num_kv_heads * group, 1, head_dim).bfloat16()
    expected = reference.attend(query.double(), *restored(view), CAUSAL)
    output = reads.attention(query, view, CAUSAL)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)

    candidates: dict[str, Callable[[], object]] = {"int8": lambda: reads.attention(query, view, CAUSAL)}
    for dtype in (torch.bfloat16, torch.float32):
        dense = query.to(dtype), key.to(dtype), value.to(dtype)
        packed = dense[0].reshape(batch, num_kv_heads, group, head_dim)
        name = str(dtype).removeprefix("torch.")
        candidates[f"sdpa packed {name}"] = lambda q=packed, d=dense: scaled_dot_product_attention(q, d[1], d[2])
        candidates[f"sdpa gqa {name}"] = lambda d=dense: scaled_dot_product_attention(*d, enable_gqa=True)

    slow = interleaved({"torch backend": lambda: torch_backend.attention(query, view, CAUSAL)}, 1)
    times = interleaved(candidates, 15) | slow
    best = min(t for name, t in times.items() if name.startswith("sdpa"))
    return {
        "row": f"decode attention, batch {batch}, {num_kv_heads} KV heads, group {group}, head_dim {head_dim}, "
        f"{tokens} tokens",
        "median_ms": times,
        "int8_gb_per_s": round(2 * batch * num_kv_heads * tokens * head_dim / times["int8"] / 1e6, 1),
        "ratio_to_best_sdpa": round(best / times["int8"], 2),
        "ratio_to_torch_backend": round(slow["torch backend"] / times["int8"], 1),
        "target": target,
    }


def masked_row(new: int, num_kv_heads: int, group: int, tokens: int, head_dim: int) -> Row:
    """New tokens behind others, a draft or a turn, with the mask that ``generate()`` makes for them.

    The baselines are what transformers does of it with exact states: SDPA with that mask, heads grouped or repeated.
    """
    pages, key, value = filled(1, num_kv_heads, tokens, head_dim, torch.bfloat16)
    view = pages.view()
    query = torch.randn(1, num_kv_heads * group, new, head_dim).bfloat16()
    positions = torch.arange(tokens)
    mask = (positions <= positions[-new:, None])[None, None]
    masked = AttentionOptions(mask)
    output = reads.attention(query, view, masked)
    expected = reference.attend(query.double(), *restored(view), masked)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)
    candidates: dict[str, Callable[[], object]] = {"int8": lambda: reads.attention(query, view, masked)}
    for dtype in (torch.bfloat16, torch.float32):
        name, q, k, v = str(dtype).removeprefix("torch."), *(states.to(dtype) for states in (query, key, value))
        grouped = {"query": q, "key": k, "value": v, "enable_gqa": True}
        repeated = {"query": q} | {"key": k.repeat_interleave(group, dim=1), "value": v.repeat_interleave(group, dim=1)}
        for form, states in (("gqa", grouped), ("repeated", repeated)):
            candidates[f"sdpa {form} {name}"] = lambda states=states: scaled_dot_product_attention(
                **states, attn_mask=mask
            )
    times = interleaved(candidates, 7)
    best = min(t for name, t in times.items() if name.startswith("sdpa"))
    return {
        "row": f"masked attention, {new} new tokens over {tokens}, {num_kv_heads} KV heads, group {group}, "
        f"head_dim {head_dim}",
        "median_ms": times,
        "ratio_to_best_sdpa": round(best / times["int8"], 2),
        "target": 1.0,
    }


def append_row() -> Row:
    """One token behind 8192, in blocks; a block's median leaves out the one call in 64 that closes a page.

    This is all Python, whose speed on a shared processor changes by half from second to second: hence the quiet block.
    """
    pages, _, _ = filled(1, 8, 8192, 128, torch.bfloat16)
    token = torch.randn(1, 1, 8, 128).bfloat16().transpose(1, 2)
    blocks = []
    for _ in range(20):
        times = []
        for _ in range(100):
            start = time.perf_counter()
            pages.append(token, token)
            times.append(1e6 * (time.perf_counter() - start))
        blocks.append(statistics.median(times))
        time.sleep(0.1)
    return {
        "row": "append of one token, 8 KV heads, head_dim 128",
        "median_us": round(statistics.median(blocks), 2),
        "quiet_block_us": round(min(blocks), 2),
        "target": 15,
    }


def store_row(dtype: torch.dtype, transposed: bool) -> Row:
    """Quantising a prompt of 4096 tokens, in bytes read and written a second, against those of a copy.

    The copy is large enough to leave the caches, so that it is memory's speed and not that of a shared L3.
    """
    made = [torch.randn(1, 4096, 8, 128).to(dtype).transpose(1, 2) for _ in range(2)]
    key, value = made if transposed else (states.contiguous() for states in made)
    pages = [
        torch.empty_like(t).contiguous()
        for t in (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))
    ]
    expected = (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))
    cpu.store_pages(key, value, Segment(*pages))
    assert all(torch.equal(have, want) for have, want in zip(pages, expected, strict=True))
    nbytes = key.nbytes + value.nbytes + sum(t.nbytes for t in pages)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = interleaved(
        {"store_pages": lambda: cpu.store_pages(key, value, Segment(*pages)), "copy": lambda: target.copy_(source)}, 25
    )
    rate, copy_rate = nbytes / times["store_pages"] / 1e6, 2 * COPIED_BYTES / times["copy"] / 1e6
    slow = interleaved({"torch backend": lambda: torch_backend.store_pages(key, value, Segment(*pages))}, 1)
    name = str(dtype).removeprefix("torch.")
    return {
        "row": f"quantise 4096 tokens, 8 KV heads, head_dim 128, {name}, "
        f"{'transposed view' if transposed else 'contiguous'}",
        "median_ms": times | slow,
        "gb_per_s": round(rate, 1),
        "copy_gb_per_s": round(copy_rate, 1),
        "share_of_copy_bandwidth": round(rate / copy_rate, 2),
        "ratio_to_torch_backend": round(slow["torch backend"] / times["store_pages"], 1),
        "target": 0.3,
    }


def generate_row(name: str, model: Any, tokens: int, target: float, new_tokens: int, repeats: int) -> Row:
    """``generate()`` behind ``tokens`` of random states, so that only decoding is timed."""
    from transformers import DynamicCache

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, tokens - 1, config.num_key_value_heads, head_dim)
    states = [[torch.randn(shape).to(model.dtype).transpose(1, 2) for _ in range(2)] for _ in range(2)]
    prompt = torch.randint(0, 1000, (1, tokens))

    def timed(cache: Any) -> float:
        for layer in range(config.num_hidden_layers):
            key, value = states[layer % 2]
            cache.update(key, value, layer)
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache_argument(cache),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"int8": [], "DynamicCache": []}
    for _ in range(repeats):
        times["int8"].append(timed(QuantizedInt8Cache()))
        times["DynamicCache"].append(timed(DynamicCache()))
    rates = {kind: round(new_tokens / statistics.median(seconds), 3) for kind, seconds in times.items()}
    return {
        "row": f"generate(), {name}, {str(model.dtype).removeprefix('torch.')}, {tokens} tokens",
        "tokens_per_s": rates,
        "ratio": round(rates["int8"] / rates["DynamicCache"], 3),
        "target": target,
    }


def smollm2(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    file = next(Path(folder).glob("*.gguf")).name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def one_billion() -> Any:
    """Llama-3.2-1B's geometry with a small vocabulary and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def run_each(options: argparse.Namespace) -> None:
    """Every kind of row in its own process; their rows in one file."""
    out = Path(options.out)
    rows: list[Row] = []
    result: Row = {}
    for kind in options.rows:
        command = [sys.executable, __file__, "--rows", kind, "--out", str(out)]
        command += ["--model", options.model] if options.model else []
        command += ["--threads", str(options.threads)] if options.threads else []
        subprocess.run(command, check=True)
        result = json.loads(out.read_text())
        rows += result["rows"]
    report.write(result | {"rows": rows}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with SmolLM2-135M as GGUF; without it its rows are left out")
    parser.add_argument(
        "--rows", nargs="*", default=["append", "attention", "masked", "store", "smollm2", "one-billion"]
    )
    parser.add_argument("--out", default="docs/benchmarks/cpu-attention.json")
    parser.add_argument("--threads", type=int, help="instead of torch's own choice")
    options = parser.parse_args()
    if len(options.rows) > 1:
        return run_each(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    out = Path(options.out)
    rows: list[Row] = []

    def add(row: Row) -> None:
        row["threads"], row["load_average"] = torch.get_num_threads(), round(os.getloadavg()[0], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)

    if "append" in options.rows:
        add(append_row())
    if "attention" in options.rows:
        add(attention_row(1, 8, 4, 8192, 128, 2.0))
        add(attention_row(1, 8, 4, 32768, 128, 2.0))
        add(attention_row(8, 8, 4, 2048, 128, 1.5))
        add(attention_row(1, 3, 3, 8192, 64, None))
        add(attention_row(1, 8, 4, 256, 128, None))
    if "masked" in options.rows:
        add(masked_row(8, 8, 4, 8192, 128))
        add(masked_row(512, 3, 3, 4608, 64))
    if "store" in options.rows:
        for dtype in (torch.bfloat16, torch.float32):
            for transposed in (False, True):
                add(store_row(dtype, transposed))
    if "smollm2" in options.rows and options.model:
        model = smollm2(options.model)
        add(generate_row("SmolLM2-135M", model, 8192, 1.15, 16, 5))
        add(generate_row("SmolLM2-135M", model, 256, 0.97, 32, 21))
    if "one-billion" in options.rows:
        model = one_billion()
        add(generate_row("1B geometry, random weights", model, 8192, 1.15, 6, 3))
        add(generate_row("1B geometry, random weights", model, 256, 0.97, 6, 7))

    result = {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_cpu_attention.py --model FOLDER_WITH_GGUF",
        "hardware": {
            "processor": processor.name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": cpu.isa(),
        },
        "versions": report.versions(),
        "backend": dispatch.choose_backend(torch.device("cpu")),
        "rows": rows,
    }
    report.write(result, out)


if __name__ == "__main__":
    main()
