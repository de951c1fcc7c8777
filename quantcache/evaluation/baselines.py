"""The caches that `quantcache eval` compares: int8, what bfloat16 costs, and transformers' own quantised caches."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from quantcache import QuantizedInt8Cache
from quantcache.evaluation.comparison import Candidate, exact_cache


class RoundedCache(DynamicCache):
    """The default cache with keys and values rounded to bfloat16, as a bfloat16 model would store them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store and return rounded states.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim).
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
            layer_idx: decoder layer.
            args: passed on.
            kwargs: passed on.
        """
        key_states, value_states = (states.bfloat16().to(states.dtype) for states in (key_states, value_states))
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return stored


INT8: Final = "int8 cache"
ROUNDED: Final = "bf16 cache"
BF16: Final = "bf16 model"
FP8: Final = "QuantizedCache fp8"
HQQ: Final = "QuantizedCache hqq 8 bit"
QUANTO: Final = "QuantizedCache quanto 4 bit"

NAMES: Final = {"int8": INT8, "bf16-cache": ROUNDED, "bf16": BF16, "fp8": FP8, "hqq": HQQ, "quanto": QUANTO}
"""Short names for the command line."""

_PACKAGES: Final = {HQQ: "hqq", QUANTO: "optimum.quanto"}


def check_names(wanted: list[str] | None) -> None:
    """Refuse a short name that is none of ``NAMES``.

    Raises:
        ValueError: it names them.
    """
    for name in wanted or ():
        if name not in NAMES:
            raise ValueError(f"check_names: a cache must be one of {', '.join(NAMES)}, got {name!r}.")


def candidates(model: PreTrainedModel, wanted: list[str] | None = None) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The caches that can be compared on a model here.

    Args:
        model: the reference, best in float32.
        wanted: short names of ``NAMES``; None for all that there are.

    Returns:
        The candidates by name, and for those left out the reason.

    Raises:
        ValueError: a name that is none of ``NAMES``.
    """
    check_names(wanted)
    made: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for name in (NAMES[short] for short in wanted or NAMES):
        package = _PACKAGES.get(name)
        if package is not None and not _installed(package):
            left_out[name] = f"{package} is not installed"
            continue
        try:
            candidate = _candidate(model, name)
            candidate.make_cache()
        except (ValueError, ImportError, RuntimeError) as error:
            left_out[name] = str(error).strip().splitlines()[0]
        else:
            made[name] = candidate
    return made, left_out


def _candidate(model: PreTrainedModel, name: str) -> Candidate:
    config = model.config
    if name == BF16:
        if model.dtype == torch.bfloat16:
            raise ValueError("the reference is bfloat16 itself")
        other = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]
        return Candidate(exact_cache(model).make_cache, other)
    makers: dict[str, Callable[[], Cache]] = {
        INT8: lambda: QuantizedInt8Cache(config),
        ROUNDED: lambda: RoundedCache(config=config),
        FP8: lambda: QuantizedCache("fp8", config),
        HQQ: lambda: QuantizedCache("hqq", config, nbits=8, axis_key=1, axis_value=1),
        QUANTO: lambda: QuantizedCache("quanto", config, nbits=4),
    }
    return Candidate(makers[name])


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
