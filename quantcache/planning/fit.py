"""What fits: batches and contexts on a GPU of a given size."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from quantcache.planning.geometry import DTYPE_BYTES, Geometry
from quantcache.planning.sizes import exact_nbytes, int8_nbytes
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH

GIB: Final = 1 << 30

DEFAULT_OVERHEAD: Final = 0.1
"""Share of a GPU that weights and cache cannot use: the driver's context, activations, workspaces, fragmentation."""

WEIGHT_BYTES: Final = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
"""A weight in each format; 4-bit weights have a 16-bit scale for every 64 (bitsandbytes, AWQ and GPTQ: 64 or
128). Embeddings and the output layer stay in 16 bits."""

MOST: Final = 1 << 40
"""Where a search for what fits ends."""


@dataclass(frozen=True)
class Fit:
    """What fits next to the weights in one format.

    Attributes:
        weights: "bf16", "int8" or "int4".
        weights_nbytes: of the weights.
        cache: "bf16" or "int8".
        free_nbytes: what is left for the cache.
        largest_batch: sequences of the plan's length.
        longest_context: tokens at the plan's batch, more than the model was made for included.
    """

    weights: str
    weights_nbytes: int
    cache: str
    free_nbytes: int
    largest_batch: int
    longest_context: int


@dataclass(frozen=True)
class Plan:
    """The answer of ``plan``.

    Attributes:
        model: its name.
        batch: sequences asked for.
        tokens: stored in each.
        new_tokens: how many of them were generated one by one.
        bf16_nbytes: bytes of the default cache in 16 bits.
        int8_nbytes: bytes of the int8 cache, tail and slack included.
        bf16_per_token: bytes that one more token takes in the default cache, of one sequence.
        int8_per_token: in the int8 cache, on average over pages.
        layers: how many layers of each kind.
        num_params: weights, None if unknown.
        max_positions: tokens the model was made for, None if unknown.
        gpu_nbytes: of the GPU, None if none was named.
        fits: a row for each format of weights and cache, none without a GPU or a count of weights.
    """

    model: str
    batch: int
    tokens: int
    new_tokens: int
    bf16_nbytes: int
    int8_nbytes: int
    bf16_per_token: int
    int8_per_token: int
    layers: dict[str, int]
    num_params: int | None
    max_positions: int | None
    gpu_nbytes: int | None
    fits: list[Fit]

    def to_dict(self) -> dict[str, Any]:
        """As JSON wants it."""
        return asdict(self)


def plan(
    geometry: Geometry,
    *,
    batch: int = 1,
    tokens: int = 8192,
    new_tokens: int = 512,
    gpu_nbytes: int | None = None,
    overhead: float = DEFAULT_OVERHEAD,
    residual_length: int = DEFAULT_RESIDUAL_LENGTH,
) -> Plan:
    """What the cache takes at ``batch`` x ``tokens``, and what fits on a GPU.

    Args:
        geometry: of the model.
        batch: sequences, at least 1.
        tokens: in each at the end, at least 1.
        new_tokens: how many of them are generated, which costs some slack.
        gpu_nbytes: of its memory; None leaves out what fits.
        overhead: share of it that is lost to other things, from 0 to below 1.
        residual_length: see the cache.

    Raises:
        ValueError: numbers out of their range.
    """
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}.")
    if not 0 <= overhead < 1:
        raise ValueError(f"plan: overhead must be from 0 to below 1, got {overhead}.")
    new_tokens = min(new_tokens, tokens - 1)
    wide = geometry.dtype if DTYPE_BYTES[geometry.dtype] == 2 else "bfloat16"

    exact = partial(exact_nbytes, geometry, dtype=wide)

    def int8(batch: int, tokens: int) -> int:
        return int8_nbytes(geometry, batch, tokens, min(new_tokens, tokens - 1), residual_length)

    # Far beyond every window, over a number of pages that hides where in a page one stands.
    far = 1 << 20
    counts: dict[str, int] = {}
    for layer in geometry.layers:
        kind = f"{layer.kind}{'' if layer.window is None else f', window {layer.window}'}"
        kind += ", state" if layer.conv_elements or layer.state_elements else ""
        kind = "none" if layer.kind == "native" and not layer.num_kv_heads and "state" not in kind else kind
        counts[kind] = counts.get(kind, 0) + 1
    fits = []
    if gpu_nbytes is not None:
        for weights, nbytes in weights_nbytes(geometry).items():
            free = int(gpu_nbytes * (1 - overhead)) - nbytes
            for name, size in (("bf16", exact), ("int8", int8)):
                batches, contexts = partial(size, tokens=tokens), partial(size, batch)
                fits.append(Fit(weights, nbytes, name, free, _largest(batches, free), _largest(contexts, free)))
    return Plan(
        model=geometry.name,
        batch=batch,
        tokens=tokens,
        new_tokens=new_tokens,
        bf16_nbytes=exact(batch, tokens),
        int8_nbytes=int8(batch, tokens),
        bf16_per_token=exact(1, far + 1) - exact(1, far),
        int8_per_token=(int8_nbytes(geometry, 1, 2 * far) - int8_nbytes(geometry, 1, far)) // far,
        layers=counts,
        num_params=geometry.num_params,
        max_positions=geometry.max_positions,
        gpu_nbytes=gpu_nbytes,
        fits=fits,
    )


def weights_nbytes(geometry: Geometry) -> dict[str, int]:
    """Bytes of the weights in each format of ``WEIGHT_BYTES``; empty if their number is unknown."""
    if geometry.num_params is None:
        return {}
    linear = geometry.num_params - geometry.num_embedding_params
    kept = geometry.num_embedding_params * WEIGHT_BYTES["bf16"]
    return {name: int(linear * each + kept) for name, each in WEIGHT_BYTES.items()}


def _largest(size: Callable[[int], int], room: int) -> int:
    """The largest n from 0 to ``MOST`` whose size is at most ``room``; sizes grow with n but for a tail's slack."""
    low, high = 0, 1
    if room <= 0 or size(1) > room:
        return 0
    while high < MOST and size(high) <= room:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low
