"""What reordering beams and forking a prompt take of the host, in one run with transformers' caches.

    PYTHONPATH=. python tests/benchmarks/bench_reorder.py [--tokens N] [--repeats N] [--threads N] [--out FILE]

A cache of 32 layers holds ``--tokens`` tokens of 4 sequences. Each row checks first that the stored pages stay where
they are, and that every layer then holds the right sequences; then its candidates are timed in turn, and medians are
written as JSON. ``reorder`` is the call of ``reorder_cache`` alone, until the host has it back; ``step`` is that call
and a new token for every layer, which is when int8 tails are gathered, and on a GPU the wait for all of it. ``fork`` is
beside ``copy.deepcopy`` of a ``DynamicCache``, which is what there is without it.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.backends import processor
from tests.benchmarks.report import versions, write

Row = dict[str, Any]

LAYERS, KV_HEADS, HEAD_DIM, BATCH = 32, 8, 128, 4
ROOM = 512
"""Tokens of the fixed capacities behind those stored."""

ORDERS = ([1, 0, 3, 2], [0, 0, 1, 2], [2, 1, 1, 0], [3, 0, 1, 2])

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, hidden_size=4 * KV_HEADS * HEAD_DIM, num_attention_heads=4 * KV_HEADS,
    num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=8, max_position_embeddings=65536,
)  # fmt: skip


def states(tokens: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, batch, KV_HEADS, tokens, HEAD_DIM, device=DEVICE).bfloat16()
    return key, value


def filled(cache: Any, tokens: int) -> Any:
    given = states(tokens)
    for layer_idx in range(LAYERS):
        cache.update(*given, layer_idx)
    append(cache, states(1))
    return cache


def append(cache: Any, given: tuple[Tensor, Tensor]) -> None:
    for layer_idx in range(LAYERS):
        cache.update(*given, layer_idx)


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def pages_of(cache: QuantizedInt8Cache) -> list[int]:
    """Where the stored pages are."""
    return [part.data_ptr() for layer in cache.layers for s in layer.pages.view().segments for part in s]


def check_reordering(cache: QuantizedInt8Cache) -> None:
    """No page is moved or written, and every layer holds the sequences that were asked for."""
    order = torch.tensor(ORDERS[1], device=DEVICE)
    before = [layer.pages.restore() for layer in cache.layers]
    where = pages_of(cache)
    codes = [s.key_qdata.clone() for layer in cache.layers for s in layer.pages.view().segments]
    cache.reorder_cache(order)
    assert pages_of(cache) == where
    held = [s.key_qdata for layer in cache.layers for s in layer.pages.view().segments]
    assert all(torch.equal(have, want) for have, want in zip(held, codes, strict=True))
    for layer, dense in zip(cache.layers, before, strict=True):
        for have, want in zip(layer.pages.restore(), dense, strict=True):
            assert torch.equal(have, want[order])


def interleaved(candidates: dict[str, Callable[[int], float]], repeats: int) -> tuple[Row, Row]:
    """Median milliseconds of each candidate, and the median ratio of each to the first."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-2, repeats):
        for name, call in candidates.items():
            milliseconds = 1e3 * call(index)
            if index >= 0:
                times[name].append(milliseconds)
    first, *others = times
    ratios = {
        name: round(statistics.median(b / a for a, b in zip(times[first], times[name], strict=True)), 2)
        for name in others
    }
    return {name: round(statistics.median(values), 4) for name, values in times.items()}, ratios


def reorder_rows(caches: dict[str, Any], tokens: int, repeats: int) -> list[Row]:
    """``reorder_cache`` alone, and with the next token."""
    check_reordering(caches["int8"])
    orders = [torch.tensor(order, device=DEVICE) for order in ORDERS]
    given = states(1)

    def reorder(cache: Any) -> Callable[[int], float]:
        def call(index: int) -> float:
            start = now()
            cache.reorder_cache(orders[index % len(orders)])
            taken = time.perf_counter() - start
            append(cache, given)
            return taken

        return call

    def step(cache: Any) -> Callable[[int], float]:
        def call(index: int) -> float:
            start = now()
            cache.reorder_cache(orders[index % len(orders)])
            append(cache, given)
            return now() - start

        return call

    made, kind = [], "growing" if caches["int8"].layers[0].pages.capacity is None else "fixed capacity"
    for name, timed in (("reorder", reorder), ("step", step)):
        times, ratios = interleaved({each: timed(cache) for each, cache in caches.items()}, repeats)
        made.append({"row": f"{name}, {kind}", "tokens": tokens, "median_ms": times, "ratios": ratios})
    made[0]["target_ms"] = 1.0
    return made


def fork_row(tokens: int, repeats: int) -> Row:
    """``fork``, and a full copy of what transformers has."""
    cache, exact = filled(QuantizedInt8Cache(CONFIG), tokens), filled(DynamicCache(config=CONFIG), tokens)

    def timed(copied: Callable[[], Any]) -> Callable[[int], float]:
        def call(_: int) -> float:
            start = now()
            made = copied()
            taken = now() - start
            del made
            return taken

        return call

    fork = cache.fork()
    assert pages_of(fork) == pages_of(cache)
    append(fork, states(1))
    assert pages_of(fork) == pages_of(cache)
    tails = sum(buffer.nbytes for layer in fork.layers for buffer in (layer.pages.key_tail, layer.pages.value_tail))
    candidates = {"int8": timed(cache.fork), "DynamicCache, copy.deepcopy": timed(lambda: copy.deepcopy(exact))}
    times, ratios = interleaved(candidates, repeats)
    return {
        "row": "fork", "tokens": tokens, "median_ms": times, "ratios": ratios, "target_ms": 2.0,
        "mib_of_the_fork_once_it_goes_on": round(tails / 2**20, 2), "mib_of_the_cache": round(cache.nbytes / 2**20, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192 if ON_GPU else 1024, help="that are stored")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, help="instead of torch's own choice")
    parser.add_argument("--out", default=f"docs/benchmarks/reorder-{'gpu' if ON_GPU else 'cpu'}.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(made: list[Row]) -> None:
        for row in made:
            rows.append(row | {"load_average": round(os.getloadavg()[0], 2)})
            print(json.dumps(rows[-1]), flush=True)

    tokens, capacity = options.tokens, options.tokens + ROOM
    with torch.no_grad():
        growing = {"int8": QuantizedInt8Cache(CONFIG), "DynamicCache": DynamicCache(config=CONFIG)}
        add(reorder_rows({name: filled(cache, tokens) for name, cache in growing.items()}, tokens, options.repeats))
        del growing
        fixed = {
            "int8": QuantizedInt8Cache(CONFIG, max_cache_len=capacity),
            "StaticCache": StaticCache(config=CONFIG, max_cache_len=capacity),
        }
        add(reorder_rows({name: filled(cache, tokens) for name, cache in fixed.items()}, tokens, options.repeats))
        del fixed
        add([fork_row(tokens, options.repeats)])
    report = {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_reorder.py",
        "hardware": {"gpu": torch.cuda.get_device_name()} if ON_GPU else {
            "processor": processor.name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "sequences": BATCH, "dtype": "bfloat16",
        "rows": rows,
    }  # fmt: skip
    write(report, Path(options.out))


if __name__ == "__main__":
    main()
