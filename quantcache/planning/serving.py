"""What requests take in the blocks of continuous batching, in transformers' 16 bits and in int8, and what fits."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from quantcache.planning.fit import DEFAULT_OVERHEAD, weights_nbytes
from quantcache.planning.geometry import DTYPE_BYTES, Geometry, GeometryError, LayerGeometry
from quantcache.planning.sizes import page_nbytes
from quantcache.quantization.scheme import PAGE_SIZE

EXACT_BLOCK_TOKENS: Final = 256
"""Tokens of a block in 16 bits: the default of transformers' ``ContinuousBatchingConfig.page_size``."""

TRASH_BLOCKS: Final = 2
"""Blocks at the beginning of transformers' pool that hold no request: what padding reads and writes."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a pool, each of some tokens of every layer of one request.

    Attributes:
        cache: "bf16" or "int8".
        tokens: in a block.
        nbytes: of a block.
        num_open: blocks that the tokens behind the last full block take: one in 16 bits; in int8 one of exact keys and
            one of exact values, or more of each for a model in float32.
    """

    cache: str
    tokens: int
    nbytes: int
    num_open: int

    def of_request(self, tokens: int) -> int:
        """Blocks of a request that has stored ``tokens``."""
        full, rest = divmod(tokens, self.tokens)
        return full + (self.num_open if rest else 0)

    def most_of_request(self, tokens: int) -> int:
        """The most blocks that a request has held by the time it has stored ``tokens``: closing a page may free one."""
        return max(self.of_request(tokens), self.of_request(tokens - 1) if tokens > 1 else 0)


@dataclass(frozen=True)
class ServingFit:
    """What fits next to the weights in one format.

    Attributes:
        weights: "bf16", "int8" or "int4".
        weights_nbytes: of the weights.
        cache: "bf16" or "int8".
        free_nbytes: what is left for the pool.
        num_blocks: blocks in it.
        num_requests: requests of the plan's length that it holds at the same time, each at its end.
    """

    weights: str
    weights_nbytes: int
    cache: str
    free_nbytes: int
    num_blocks: int
    num_requests: int


@dataclass(frozen=True)
class ServingPlan:
    """The answer of ``plan_requests``.

    Attributes:
        model: its name.
        requests: asked for, at the same time.
        prompt_len: tokens of each prompt.
        new_tokens: of each answer.
        bf16: the blocks in 16 bits.
        int8: the blocks in int8.
        bf16_blocks: of one request at its end.
        int8_blocks: of one request at its end.
        bf16_nbytes: of all requests.
        int8_nbytes: of all requests.
        num_params: weights, None if unknown.
        max_positions: tokens the model was made for, None if unknown.
        gpu_nbytes: of the GPU, None if none was named.
        fits: a row for each format of weights and cache, none without a GPU or a count of weights.
    """

    model: str
    requests: int
    prompt_len: int
    new_tokens: int
    bf16: Blocks
    int8: Blocks
    bf16_blocks: int
    int8_blocks: int
    bf16_nbytes: int
    int8_nbytes: int
    num_params: int | None
    max_positions: int | None
    gpu_nbytes: int | None
    fits: list[ServingFit]

    def to_dict(self) -> dict[str, Any]:
        """As JSON wants it."""
        return asdict(self)


def plan_requests(
    geometry: Geometry,
    *,
    requests: int = 1,
    prompt_len: int = 2048,
    new_tokens: int = 512,
    gpu_nbytes: int | None = None,
    overhead: float = DEFAULT_OVERHEAD,
) -> ServingPlan:
    """What requests take under continuous batching, and how many a GPU holds at the same time.

    Every request is counted at its end, when it is longest, and none shares a prefix with another.

    Args:
        geometry: of the model.
        requests: at the same time, at least 1.
        prompt_len: tokens of each prompt, at least 1.
        new_tokens: of each answer. The last of them is never stored.
        gpu_nbytes: of its memory; None leaves out what fits.
        overhead: share of it that is lost to other things, from 0 to below 1.

    Raises:
        GeometryError: a layer is not full attention, and continuous batching over int8 blocks refuses the model.
        ValueError: numbers out of their range.
    """
    for name, value, least in (("requests", requests, 1), ("prompt_len", prompt_len, 1), ("new_tokens", new_tokens, 0)):
        if value < least:
            raise ValueError(f"plan_requests: {name} must be at least {least}, got {value}.")
    if not 0 <= overhead < 1:
        raise ValueError(f"plan_requests: overhead must be from 0 to below 1, got {overhead}.")
    bf16, int8 = blocks(geometry, "bf16"), blocks(geometry, "int8")
    stored = prompt_len + max(0, new_tokens - 1)
    needed = {each.cache: each.most_of_request(stored) for each in (bf16, int8)}
    fits = []
    if gpu_nbytes is not None:
        for weights, nbytes in weights_nbytes(geometry).items():
            free = int(gpu_nbytes * (1 - overhead)) - nbytes
            for each in (bf16, int8):
                count = max(0, free // each.nbytes - TRASH_BLOCKS)
                fits.append(ServingFit(weights, nbytes, each.cache, free, count, count // needed[each.cache]))
    return ServingPlan(
        model=geometry.name,
        requests=requests,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        bf16=bf16,
        int8=int8,
        bf16_blocks=needed["bf16"],
        int8_blocks=needed["int8"],
        bf16_nbytes=requests * needed["bf16"] * bf16.nbytes,
        int8_nbytes=requests * needed["int8"] * int8.nbytes,
        num_params=geometry.num_params,
        max_positions=geometry.max_positions,
        gpu_nbytes=gpu_nbytes,
        fits=fits,
    )


def blocks(geometry: Geometry, cache: str) -> Blocks:
    """The blocks of one kind of pool.

    Args:
        geometry: of the model.
        cache: "int8", or "bf16" for transformers' own, in 16 bits whatever the model's dtype is.

    Raises:
        GeometryError: a layer is not full attention.
    """
    others = sorted({_kind(layer) for layer in geometry.layers} - {"full attention"})
    if others:
        raise GeometryError(
            f"plan_requests: every layer of {geometry.name} must be full attention to be served in int8 blocks, "
            f"got {' and '.join(others)}."
        )
    if cache == "bf16":
        token = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in geometry.layers)
        return Blocks(cache, EXACT_BLOCK_TOKENS, EXACT_BLOCK_TOKENS * token * 2, 1)
    # The exact keys of a page, and its exact values, each in as many blocks as their bytes need.
    element = DTYPE_BYTES[geometry.dtype]
    exact = (PAGE_SIZE * each.num_kv_heads * each.head_dim * element for each in geometry.layers)
    side = max(-(-nbytes // page_nbytes(each)) for nbytes, each in zip(exact, geometry.layers, strict=True))
    return Blocks(cache, PAGE_SIZE, sum(map(page_nbytes, geometry.layers)), 2 * side)


def _kind(layer: LayerGeometry) -> str:
    if layer.window is not None:
        return "layers with a window"
    if layer.conv_elements or layer.state_elements:
        return "layers with a state"
    if not layer.num_kv_heads:
        return "layers without keys and values"
    return "full attention" if layer.head_dim == layer.v_head_dim else "layers whose keys and values differ in width"
