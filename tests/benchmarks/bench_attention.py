"""The CUDA kernels against torch, in one run.

    PYTHONPATH=. python tests/benchmarks/bench_attention.py [--rows WORD ...] [--out FILE]

Every row first checks its result against float64, then times its candidates in turn behind a flush of the L2 cache;
medians and their ratios are written as JSON. Times are the GPU's, between events, unless a row says otherwise.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from quantcache import QuantizedInt8Cache
from quantcache.backends import cuda
from quantcache.layers._host import cache_argument
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.growing import Int8Pages, PagesView
from quantcache.store.segments import Segment
from tests.benchmarks import report
from tests.benchmarks.turns import Clock, PassOn, in_pairs, typical

Row = dict[str, Any]

CAUSAL = AttentionOptions(is_causal=True)

SHAPES = [  # batch, q heads, kv heads, tokens, head_dim, query_len, target
    (32, 32, 32, 4096, 128, 1, 1.75),
    (1, 32, 32, 32768, 128, 1, 1.75),
    (32, 28, 4, 8192, 128, 1, 1.80),
    (32, 32, 8, 8192, 128, 1, 1.80),
    (1, 28, 4, 131072, 128, 1, 1.65),
    (8, 32, 8, 32768, 64, 1, 1.65),
    (16, 8, 1, 16384, 256, 1, 1.60),
    (1, 32, 8, 4096, 128, 1, 1.15),
    (1, 32, 8, 32768, 128, 8, 1.40),
]


FLUSHES = 3
"""Times 190 us on an H200; queueing 512 tokens over a restored layer took a slow host 259 us."""


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int = 30) -> dict[str, float]:
    """Median microseconds of each candidate on the GPU, the L2 cache flushed before each call.

    The flush reads, since lines that it had written would be written back during the call. It takes longer than the
    host needs to queue what follows, so that no launch is waited for.
    """
    flush, total = torch.zeros(192 << 20, device="cuda"), torch.zeros((), device="cuda")
    events = {
        name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)] for name in candidates
    }
    for call in candidates.values():
        for _ in range(3):
            call()
    for index in range(repeats):
        for name, call in candidates.items():
            start, stop = events[name][index]
            for _ in range(FLUSHES):
                torch.sum(flush, dim=0, out=total)
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
    return {
        name: round(1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs), 2) for name, pairs in events.items()
    }


def filled(
    batch: int, num_kv_heads: int, tokens: int, head_dim: int, device: str = "cuda", new: int = 0
) -> tuple[PagesView, Tensor, Tensor]:
    """What the call that brings the ``new`` last tokens reads, those exact, or a later one if 0; and the states."""
    shape = (batch, tokens, num_kv_heads, head_dim)
    key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    pages = Int8Pages(key, value)
    stored = tokens - new
    pages.append(key[:, :, :stored], value[:, :, :stored])
    view = pages.append(key[:, :, stored:], value[:, :, stored:]) if new else pages.view()
    return view, key.contiguous(), value.contiguous()


def check(view: PagesView, query: Tensor, output: Tensor, attn_mask: Tensor | None = None) -> float:
    """Relative error of the first and the last row of the batch."""
    errors = []
    group = query.shape[1] // view.key_tail.shape[1]
    for row in {0, query.shape[0] - 1}:
        for head in {0, view.key_tail.shape[1] - 1}:
            part = [
                torch.cat([restore(getattr(s, f"{kind}_qdata")[:, row : row + 1, head : head + 1],
                                   getattr(s, f"{kind}_metadata")[:, row : row + 1, head : head + 1], torch.float32)
                           for s in view.segments] + [tail[row : row + 1, head : head + 1].float()], dim=2)
                for kind, restore, tail in (
                    ("key", reference.restore_key_pages, view.key_tail),
                    ("value", reference.restore_value_pages, view.value_tail),
                )
            ]  # fmt: skip
            heads = slice(head * group, (head + 1) * group)
            row_mask = None if attn_mask is None else attn_mask[row : row + 1]
            expected = reference.attend(
                query[row : row + 1, heads].double(), *part, CAUSAL._replace(attn_mask=row_mask)
            )
            errors.append(relative_error(output[row : row + 1, :, heads], expected))
    return max(errors)


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


def baselines(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> dict[str, Callable[[], object]]:
    batch, num_q_heads, query_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    made: dict[str, Callable[[], object]] = {
        "sdpa gqa": lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    }
    if query_len == 1 and num_q_heads > num_kv_heads:
        packed = query.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        made["sdpa packed"] = lambda: scaled_dot_product_attention(packed, key, value, attn_mask=mask)
    return made


def nbytes_of(view: PagesView) -> int:
    """What a call reads of it."""
    parts = [part for segment in view.segments for part in segment]
    return sum(part.nbytes for part in (*parts, view.key_tail, view.value_tail))


def attention_row(
    batch: int, num_q_heads: int, num_kv_heads: int, tokens: int, head_dim: int, query_len: int, target: float
) -> Row:
    """The newest tokens of each sequence, and, where they are several, with the mask that ``generate()`` makes then.

    For one token it makes none, unless there is padding, see ``padding_row``.
    """
    view, key, value = filled(batch, num_kv_heads, tokens, head_dim)
    query = torch.randn(batch, query_len, num_q_heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    errors = {"int8": check(view, query, reads.attention(query, view, CAUSAL))}
    bias = causal_lower_right(query_len, tokens) if query_len > 1 else None
    candidates = {"int8": lambda: reads.attention(query, view, CAUSAL)} | baselines(query, key, value, bias)
    if query_len > 1:
        mask = mask_of_generate(query_len, tokens)
        masked = AttentionOptions(mask)
        repeated = [states.repeat_interleave(num_q_heads // num_kv_heads, dim=1) for states in (key, value)]
        errors["int8 with mask"] = check(view, query, reads.attention(query, view, masked), mask)
        candidates |= {
            "int8 with mask": lambda: reads.attention(query, view, masked),
            "sdpa repeated with mask": lambda: scaled_dot_product_attention(query, *repeated, attn_mask=mask),
        } | {f"{name} with mask": call for name, call in baselines(query, key, value, mask).items()}
    times = interleaved(candidates)

    def ratio(ending: str) -> float:
        of_kind = {name: t for name, t in times.items() if name.endswith(" with mask") == bool(ending)}
        return round(min(t for name, t in of_kind.items() if name != f"int8{ending}") / times[f"int8{ending}"], 3)

    row = {
        "row": f"attention, batch {batch}, {num_q_heads}/{num_kv_heads} heads, {tokens} tokens, head_dim {head_dim}, "
        f"query_len {query_len}",
        "median_us": times,
        "tb_per_s": round(nbytes_of(view) / times["int8"] / 1e6, 2),
        "relative_error": max(errors.values()),
        "ratio": ratio(""),
        "target": target,
    }
    return row if query_len == 1 else row | {"ratio_with_mask": ratio(" with mask")}


ACCOUNTS = [(32, 28, 4, 8192), (1, 28, 4, 131072), (32, 32, 8, 8192)]
"""Shapes of one token, head_dim 128, whose time is taken apart: batch, q heads, kv heads, tokens."""

SHARES = (0.25, 0.5, 1, 2)
"""Of the tokens of a shape."""


def account_row(batch: int, num_q_heads: int, num_kv_heads: int, tokens: int) -> Row:
    """What a launch takes whatever it reads, and how fast it reads: a line through times of shorter and longer ones."""
    nbytes: dict[str, list[int]] = {"int8": [], "sdpa gqa": []}
    times: dict[str, list[float]] = {name: [] for name in nbytes}
    errors = []
    for share in SHARES:
        view, key, value = filled(batch, num_kv_heads, int(share * tokens), 128)
        query = torch.randn(batch, 1, num_q_heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        errors.append(check(view, query, reads.attention(query, view, CAUSAL)))
        gqa = baselines(query, key, value)["sdpa gqa"]
        found = interleaved({"int8": functools.partial(reads.attention, query, view, CAUSAL), "sdpa gqa": gqa})
        for name, took in found.items():
            times[name].append(took)
        nbytes["int8"].append(nbytes_of(view))
        nbytes["sdpa gqa"].append(key.nbytes + value.nbytes)
    lines = {name: statistics.linear_regression(nbytes[name], times[name]) for name in times}
    return {
        "row": f"account, batch {batch}, {num_q_heads}/{num_kv_heads} heads, head_dim 128",
        "tokens": [int(share * tokens) for share in SHARES],
        "median_us": times,
        "relative_error": max(errors),
        "fixed_us": {name: round(line.intercept, 1) for name, line in lines.items()},
        "tb_per_s": {name: round(1e-6 / line.slope, 2) for name, line in lines.items()},
    }


def mask_of_generate(new: int, tokens: int) -> Tensor:
    """Bool (1, 1, new, tokens): what ``generate()`` passes for the newest of some tokens without padding."""
    positions = torch.arange(tokens, device="cuda")
    return (positions <= positions[-new:, None])[None, None]


PREFILLS = [  # new tokens, tokens, q heads, kv heads, head_dim, target against flash without a mask
    (512, 32768, 32, 8, 128, 0.95),
    (2048, 32768, 28, 4, 128, 0.85),
    (128, 8192, 32, 8, 128, 1.0),
    (512, 32768, 32, 8, 64, 0.85),
    (512, 32768, 8, 1, 256, 0.85),
]


def prefill_row(new: int, tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, target: float) -> Row:
    """New tokens behind others, exact as in their call, with the mask that ``generate()`` passes and without one.

    Baselines over exact states: SDPA with that mask, its heads grouped (which cuDNN takes) and repeated without cuDNN
    (which transformers does for kernels that know no groups); and flash attention, which takes no mask.
    """
    view, key, value = filled(1, num_kv_heads, tokens, head_dim, new=new)
    query = torch.randn(1, new, num_q_heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    mask = mask_of_generate(new, tokens)
    masked = AttentionOptions(mask)
    errors = {
        "int8": check(view, query, reads.attention(query, view, CAUSAL)),
        "int8 with mask": check(view, query, reads.attention(query, view, masked), mask),
    }
    group = num_q_heads // num_kv_heads
    repeated = [states.repeat_interleave(group, dim=1) for states in (key, value)]

    def without_cudnn() -> Tensor:
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return scaled_dot_product_attention(query, *repeated, attn_mask=mask)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, *repeated, attn_mask=causal_lower_right(new, tokens))

    times = interleaved(
        {
            "int8": lambda: reads.attention(query, view, CAUSAL),
            "int8 with mask": lambda: reads.attention(query, view, masked),
            "sdpa gqa with mask": lambda: scaled_dot_product_attention(
                query, key, value, attn_mask=mask, enable_gqa=True
            ),
            "sdpa repeated with mask, no cuDNN": without_cudnn,
            "flash without mask": flash,
        },
        repeats=10,
    )
    return {
        "row": f"prefill, {new} new tokens over {tokens}, {num_q_heads}/{num_kv_heads} heads, head_dim {head_dim}",
        "median_us": times,
        "relative_error": errors,
        "ratio": round(times["flash without mask"] / times["int8"], 3),
        "ratio_with_mask": round(times["sdpa repeated with mask, no cuDNN"] / times["int8 with mask"], 3),
        "target": target,
        "target_with_mask": 3.0,
    }


def padding_row() -> Row:
    """A boolean mask of left padding, of 0 to 93 tokens."""
    batch, num_q_heads, num_kv_heads, tokens, head_dim = 32, 32, 8, 8192, 128
    view, key, value = filled(batch, num_kv_heads, tokens, head_dim)
    query = torch.randn(batch, num_q_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    hidden = torch.arange(batch, device="cuda") * 3
    mask = (torch.arange(tokens, device="cuda") >= hidden[:, None])[:, None, None]
    error = check(view, query, reads.attention(query, view, AttentionOptions(mask)), mask)
    times = interleaved(
        {
            "int8": lambda: reads.attention(query, view, CAUSAL),
            "int8 with mask": lambda: reads.attention(query, view, AttentionOptions(mask)),
        }
        | baselines(query, key, value)
        | {f"{name} with mask": call for name, call in baselines(query, key, value, mask).items()}
    )
    return {
        "row": "left padding, batch 32, 32/8 heads, 8192 tokens, head_dim 128",
        "median_us": times,
        "relative_error": error,
        "cost": round(times["int8 with mask"] / times["int8"] - 1, 3),
        "target": 0.10,
    }


def append_row() -> Row:
    key, value = (torch.randn(32, 1, 32, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    tails = [torch.zeros(32, 32, 96, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    times = interleaved({"append": lambda: cuda.append_tail(key, value, *tails, 40)})
    return {"row": "append of one token, batch 32, 32 heads, head_dim 128", "median_us": times, "target_us": 6}


def store_row() -> Row:
    """Quantising 8192 tokens, in bytes read and written a second, against those of a copy of the same size."""
    key, value = (torch.randn(1, 8192, 8, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    pages = [t.contiguous() for t in (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))]
    written = [torch.empty_like(t) for t in pages]
    cuda.store_pages(key, value, Segment(*written))
    assert all(torch.equal(have, want) for have, want in zip(written, pages, strict=True))
    nbytes = key.nbytes + value.nbytes + sum(t.nbytes for t in pages)
    rows = {}
    sources = {"copy of as many bytes": nbytes // 2, "copy of 1 GiB": 1 << 30}
    candidates: dict[str, Callable[[], object]] = {
        "store_pages": lambda: cuda.store_pages(key, value, Segment(*written))
    }
    for name, size in sources.items():
        source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        candidates[name] = lambda target=target, source=source: target.copy_(source)
    times = interleaved(candidates)
    rates = {name: round(2 * size / times[name] / 1e6, 2) for name, size in sources.items()}
    rows["tb_per_s"] = {"store_pages": round(nbytes / times["store_pages"] / 1e6, 2)} | rates
    share = {name: round(rows["tb_per_s"]["store_pages"] / rate, 3) for name, rate in rates.items()}
    return {
        "row": "quantise 8192 tokens, 8 heads, head_dim 128",
        "median_us": times,
        "share_of_copy_bandwidth": share,
        "target": 0.6,
    } | rows


FIRST_USE = """
import time, torch
from quantcache.quantization.options import AttentionOptions
from quantcache.store.growing import Int8Pages
torch.zeros(1, device="cuda"); torch.cuda.synchronize()
key, value = (torch.randn(1, 300, 8, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
query = torch.randn(1, 32, 1, 128, device="cuda").bfloat16()
start = time.perf_counter()
pages = Int8Pages(key, value)
pages.append(key, value)
view = pages.append(key[:, :, :1], value[:, :, :1])
reads.attention(query, view)
mask = torch.ones(1, 1, 1, 301, dtype=torch.bool, device="cuda")
reads.attention(query, view, AttentionOptions(mask))
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_use_row() -> Row:
    """Seconds from the first append to a masked and an unmasked read, in a fresh process."""
    folder = tempfile.mkdtemp()
    environment = {**os.environ, "QUANTCACHE_CACHE": folder}
    try:
        cold, warm = (
            float(subprocess.run([sys.executable, "-c", FIRST_USE], env=environment, check=True, capture_output=True,
                                 text=True).stdout)
            for _ in range(2)
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    return {"row": "first use of a model's kernels", "seconds": {"cold": cold, "from disk": warm}, "target": [3, 0.05]}


def host_row() -> Row:
    """Microseconds the host spends on one layer of an eager decode step, update and attention, never waiting."""
    from transformers.cache_utils import DynamicLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from quantcache.layers.growing import Int8Layer

    QuantizedInt8Cache()
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    module.eval()
    key, value = (torch.randn(1, 1024, 8, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    query = torch.randn(1, 1, 32, 128, device="cuda").bfloat16().transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    times: dict[str, list[float]] = {"int8": [], "DynamicCache": []}
    with torch.no_grad():
        for _ in range(12):
            for name, make in (("int8", Int8Layer), ("DynamicCache", DynamicLayer)):
                layer = make()
                layer.update(key, value)
                steps = []
                for index in range(260):
                    start = time.perf_counter()
                    states = layer.update(key[:, :, :1], value[:, :, :1])
                    attend(module, query, *states, None, scaling=0.088)
                    steps.append(1e6 * (time.perf_counter() - start))
                    if index % 20 == 19:
                        torch.cuda.synchronize()
                times[name].append(statistics.mean(steps[4:]))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {
        "row": "host time of one layer's update and attention, mean over 256 steps",
        "host_us": medians,
        "ratio": round(medians["DynamicCache"] / medians["int8"], 3),
        "target": 1.0,
    }


def generate_row(tokens: int, target: float, batch: int = 1) -> Row:
    """Eager ``generate()`` of Qwen-7B's geometry with random weights behind ``tokens`` of random states.

    The host, which is what takes the time, is now faster and now slower: of ten pairs of runs the steps are taken in
    turn, and each counts with its median.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=65536, dtype=torch.bfloat16, eos_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MODELS.setdefault("7B", None) or LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    MODELS["7B"] = model
    shape = (batch, tokens - 1, 32, 128)
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    prompt = torch.randint(0, 1000, (batch, tokens), device="cuda")
    new_tokens = PAGE_SIZE  # so that closing a page has its share

    def timed(make: Callable[[], Any], pass_on: PassOn) -> list[float]:
        cache = make()
        for layer in range(config.num_hidden_layers):
            cache.update(*states, layer)
        clock = Clock(pass_on)
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **cache_argument(cache), max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        return clock.per_token()

    made: dict[str, Callable[[], Any]] = {"int8": QuantizedInt8Cache, "DynamicCache": DynamicCache}
    times = in_pairs({name: functools.partial(timed, make) for name, make in made.items()}, 10)
    ratios = [sum(dense) / sum(int8) for dense, int8 in zip(times["DynamicCache"], times["int8"], strict=True)]
    seconds = {name: typical(runs) for name, runs in times.items()}
    return {
        "row": f"eager generate(), Qwen-7B geometry, batch {batch}, {tokens} tokens",
        "ms_per_token": {name: round(1e3 * each, 3) for name, each in seconds.items()},
        "ratio": round(seconds["DynamicCache"] / seconds["int8"], 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        "target": target,
    }


MODELS: dict[str, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        nargs="*",
        default=["attention", "account", "prefill", "padding", "append", "store", "first", "host", "generate"],
    )
    parser.add_argument("--out", default="docs/benchmarks/cuda-attention.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(rows, Path(options.out))  # after each row: a run that is cut short keeps what it has
        torch.cuda.empty_cache()

    if "attention" in options.rows:
        for shape in SHAPES:
            add(attention_row(*shape))
    if "account" in options.rows:
        for account in ACCOUNTS:
            add(account_row(*account))
    if "prefill" in options.rows:
        for prefill in PREFILLS:
            add(prefill_row(*prefill))
    for name, make in (
        ("padding", padding_row),
        ("append", append_row),
        ("store", store_row),
        ("first", first_use_row),
        ("host", host_row),
    ):
        if name in options.rows:
            add(make())
    if "generate" in options.rows:
        add(generate_row(256, 0.97))
        add(generate_row(8192, 1.0))
        add(generate_row(8192, 1.0, batch=8))


def write(rows: list[Row], out: Path, command: str = "PYTHONPATH=. python tests/benchmarks/bench_attention.py") -> None:
    """The file, with the rows that there are; ``command`` is what was called, but for its arguments."""
    properties = torch.cuda.get_device_properties(0)
    result = {
        "command": shlex.join([*command.split(), *sys.argv[1:]]),
        "hardware": {"gpu": properties.name, "processors": properties.multi_processor_count},
        "versions": report.versions(),
        "rows": rows,
    }
    report.write(result, out)


if __name__ == "__main__":
    main()
