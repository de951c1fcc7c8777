"""``QuantizedInt8Cache`` against the other caches that ``generate()`` takes.

    make bench [BENCH_ARGS="--size full -k attention"]

Three questions for each geometry and cache: ``update`` stores one token; ``attention`` stores one and attends to all,
which is a layer's part of a decode step; ``generate`` is a whole model of random weights that decodes a few tokens
behind a full context. The first two go through two layers, since a cache on the CPU brings the next layer while one is
used, and count both. Quantised caches of transformers do most of their work, restoring, in ``update``. Every cache's
output is first compared with that of float64 attention over the exact states; its error stands in the row.

``cache_bytes`` counts what the cache holds at the end, ``peak_*`` (GPU) what torch had in the timed part at its peak,
weights not counted. On a GPU the clock stops when the GPU is done, so host time counts where it is the longer one. On
a CPU that other work shares, one thread and its own time tell more than the clock on the wall:
``OMP_NUM_THREADS=1 make bench BENCH_ARGS="--benchmark-timer=time.process_time"``.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from quantcache.layers._host import cache_argument
from tests.benchmarks.peers.candidates import CACHES, DYNAMIC, INT8, RefusedError, held_nbytes
from tests.benchmarks.peers.geometries import Geometry

ROUNDS, WARM_UP = 12, 2
LAYERS = 2
NEW_TOKENS = 8

LARGEST_ERROR = {INT8: 0.02, DYNAMIC: 0.01, "StaticCache": 0.01, "OffloadedCache": 0.01}
"""Relative RMS error of attention on normal random states: 8 bits give about 0.005, bfloat16 outputs 0.003."""


def skipped_without_memory(bench: Callable[..., None]) -> Callable[..., None]:
    """A cache that does not fit on the GPU is left out, with that as its reason."""

    @functools.wraps(bench)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            bench(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            pytest.skip("out of memory in at least one row")

    return guarded


class Attending(torch.nn.Module):
    """As much of a model's attention module as the registered attention functions look at."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_key_value_groups = geometry.num_q_heads // geometry.num_kv_heads
        self.is_causal, self.layer_idx = True, 0
        self.config = geometry.config(1)
        self.config._attn_implementation = "sdpa"


def make_cache(cache_name: str, geometry: Geometry, num_layers: int, steps: int) -> Cache:
    try:
        return CACHES[cache_name](geometry.config(num_layers), geometry.tokens + steps)
    except RefusedError as reason:
        pytest.skip(str(reason))


def states(geometry: Geometry, heads: int, tokens: int, device: torch.device) -> Tensor:
    shape = (geometry.batch, tokens, heads, geometry.head_dim)  # heads behind tokens, as projections give them
    return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)


def update_layers(cache: Cache, new_states: list[Tensor]) -> None:
    for layer in range(len(cache.layers)):
        cache.update(*new_states, layer)


def waited(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call, until the device has done its work."""
    if device.type != "cuda":
        return call

    def waiting() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return waiting


def start_peak(device: torch.device) -> int:
    """Bytes allocated before the timed part."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def note_memory(benchmark: Any, cache: Cache, weights: int, device: torch.device) -> None:
    benchmark.extra_info["cache_bytes"] = held_nbytes(cache)
    if device.type == "cuda":
        benchmark.extra_info["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() - weights
        benchmark.extra_info["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() - weights


@skipped_without_memory
@torch.no_grad()
def bench_update(benchmark: Any, geometry: Geometry, cache_name: str, device: torch.device) -> None:
    cache = make_cache(cache_name, geometry, LAYERS, ROUNDS + WARM_UP + 1)
    prompt = [states(geometry, geometry.num_kv_heads, geometry.tokens, device) for _ in range(2)]
    update_layers(cache, prompt)
    del prompt
    token = [states(geometry, geometry.num_kv_heads, 1, device) for _ in range(2)]
    start_peak(device)
    benchmark.pedantic(
        waited(lambda: update_layers(cache, token), device), rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1
    )
    note_memory(benchmark, cache, 0, device)


def relative_error(outputs: list[Tensor], query: Tensor, key: Tensor, value: Tensor, group: int) -> float:
    """The largest of attentions (batch, 1, heads, head_dim) to float64's of exact states, on the first sequence."""
    query, key, value = (x[:1].double() for x in (query, key, value))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    expected = (weights @ value).transpose(1, 2)
    return max(float((found[:1].double() - expected).norm() / expected.norm()) for found in outputs)


@skipped_without_memory
@torch.no_grad()
def bench_attention(benchmark: Any, geometry: Geometry, cache_name: str, device: torch.device) -> None:
    module = Attending(geometry)
    cache = make_cache(cache_name, geometry, LAYERS, ROUNDS + WARM_UP + 2)
    prompt = [states(geometry, geometry.num_kv_heads, geometry.tokens, device) for _ in range(2)]
    update_layers(cache, prompt)
    query = states(geometry, geometry.num_q_heads, 1, device)
    token = [states(geometry, geometry.num_kv_heads, 1, device) for _ in range(2)]
    attend = AttentionInterface()["sdpa"]

    def mask() -> Tensor | None:
        """StaticCache returns its whole capacity, of which only a part is written; the others need no mask."""
        if cache_name != "StaticCache":
            return None
        kept = torch.arange(cache.layers[0].max_cache_len, device=device) < cache.get_seq_length()
        return kept.view(1, 1, 1, -1)

    def step() -> list[Tensor]:
        found = []
        for layer in range(LAYERS):
            read = cache.update(*token, layer)
            attended, _ = attend(module, query, *read, mask(), scaling=geometry.head_dim**-0.5, is_causal=False)
            found.append(attended)
        return found

    outputs = step()
    key, value = (torch.cat([old, new], dim=2) for old, new in zip(prompt, token, strict=True))
    error = relative_error(outputs, query, key, value, module.num_key_value_groups)
    most = LARGEST_ERROR.get(cache_name, 1.0)
    if not error < most:
        raise AssertionError(f"{cache_name} is {error:.3f} from exact attention, more than {most}")
    benchmark.extra_info["relative_error"] = float(f"{error:.3g}")
    del prompt, key, value, outputs
    start_peak(device)
    benchmark.pedantic(waited(step, device), rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1)
    note_memory(benchmark, cache, 0, device)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {}


@skipped_without_memory
@torch.no_grad()
def bench_generate(
    benchmark: Any, geometry: Geometry, cache_name: str, device: torch.device, models: dict[str, PreTrainedModel]
) -> None:
    """Each round decodes ``NEW_TOKENS`` behind a new cache; filling it is not timed. StaticCache is not compiled."""
    if geometry.name not in models:
        models.clear()  # one model at a time
        models[geometry.name] = geometry.model(device)
    model = models[geometry.name]
    prompt = torch.randint(1, 1000, (geometry.batch, geometry.tokens + 1), device=device)
    filling = [states(geometry, geometry.num_kv_heads, geometry.tokens, device) for _ in range(2)]
    # Made once here, since a skip inside the timed part would leave an empty result.
    weights, caches = 0, [make_cache(cache_name, geometry, geometry.num_layers, NEW_TOKENS + 1)]

    def new_cache() -> tuple[tuple[Cache], dict[str, Any]]:
        nonlocal weights
        caches.clear()
        cache = make_cache(cache_name, geometry, geometry.num_layers, NEW_TOKENS + 1)
        weights = start_peak(device)
        update_layers(cache, filling)
        caches.append(cache)
        return (cache,), {}

    def generate(cache: Cache) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache_argument(cache),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            disable_compile=True,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(generate, setup=new_cache, rounds=3, warmup_rounds=1, iterations=1)
    benchmark.extra_info["new_tokens"] = NEW_TOKENS
    note_memory(benchmark, caches[-1], weights, device)
