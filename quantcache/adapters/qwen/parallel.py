"""Tensor parallelism of the fused ``c_attn``: a style for transformers' plans that gives each rank whole heads."""

from typing import Any, Final

import torch
from transformers.distributed import tensor_parallel

from quantcache.layers._host import register_parallel_style

PACKED_QKV: Final = "qwen_packed_qkv"
"""Name of the style in ``base_model_tp_plan``."""

_PARTS: Final = 3
"""Queries, keys and values, one after the other in the rows of ``c_attn``."""


def register() -> None:
    """Make the style known to transformers; done when the package is imported, harmless when repeated.

    Where torch has no distributed package nothing is registered and nothing is lost.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    class PackedQkvParallel(tensor_parallel.PackedColwiseParallel):
        """The host's packed style for three parts; it would cut the bias of a packed layer without regard to them."""

        def __init__(self) -> None:
            super().__init__(split_factor=_PARTS)

        def shard_param(self, module: torch.nn.Module, param: str, mesh: Any) -> None:
            """Give each rank its rows of each part, of the weight and of the bias."""
            held = module._parameters.get(param)
            if held is not None:
                sharded = distribute_tensor(held, mesh, [_StridedShard(dim=0, split_factor=_PARTS)], src_data_rank=None)
                module._parameters[param] = torch.nn.Parameter(sharded, requires_grad=held.requires_grad)

    register_parallel_style(PACKED_QKV, PackedQkvParallel())
