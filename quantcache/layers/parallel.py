"""Where a model over several devices or processes has the layers and the KV heads that a cache mirrors."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, distributed
from transformers import PreTrainedConfig, PreTrainedModel

from quantcache.layers import _host

_KEY_PROJECTIONS: Final = frozenset({"k_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn"})
"""Modules from whose output keys are cut, by the last part of their names in the plans of transformers."""

_WHOLE_OUTPUTS: Final = frozenset(
    {"colwise_gather_output", "colwise_rep", "replicate", "replicated_with_grad_allreduce"}
)
"""Styles of a plan whose output is the same on every rank."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share one tensor-parallel model, seen from one of them.

    Attributes:
        group: of torch.distributed.
        rank: this process in it.
        size: processes in it, at least 2.
        device: where collectives of the group take tensors.
        is_split: whether each holds its share of the KV heads, in the order of the ranks; if not, each holds all.
    """

    group: Any
    rank: int
    size: int
    device: torch.device
    is_split: bool

    @property
    def first(self) -> int:
        """Rank 0 of the group as torch.distributed counts it in the whole world."""
        return distributed.get_global_rank(self.group, 0)

    def whole_heads(self, local_heads: int) -> int:
        """KV heads of the model, of which this process holds ``local_heads``."""
        return local_heads * self.size if self.is_split else local_heads


def ranks_of(model: PreTrainedModel | None) -> Ranks | None:
    """The processes that share ``model``; None for a model in one process, or without a model."""
    mesh = _host.tensor_parallel_mesh(model)
    if model is None or mesh is None:
        return None
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size(), device, _splits_heads(model))


def world_size() -> int:
    """Processes that torch.distributed runs, 1 without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a weight of which this process holds a part; every process that shares it must ask."""
    gather = getattr(tensor, "full_tensor", None)
    made: Tensor = tensor if gather is None else gather()
    return made


def kv_heads_of(config: PreTrainedConfig) -> set[int]:
    """Numbers of KV heads that layers of the decoder may have, empty where the config does not say."""
    decoder = config.get_text_config(decoder=True)
    # Latent attention makes keys for every query head; some models have other layers with heads of their own.
    names = ("num_key_value_heads", "num_global_key_value_heads")
    found = (
        {getattr(decoder, name, None) for name in names} if getattr(decoder, "kv_lora_rank", None) is None else {None}
    )
    heads = {number for number in found if isinstance(number, int)}
    every = getattr(decoder, "num_attention_heads", None)
    return heads or ({every} if isinstance(every, int) else set())


def device_of_layer(model: PreTrainedModel | None, layer_idx: int) -> torch.device:
    """Where ``model`` computes the keys of decoder layer ``layer_idx``; the CPU without a model.

    Weights that accelerate brings from host memory or disk when they are needed count where they are brought to.
    """
    if model is None:
        return torch.device("cpu")
    for module in _decoder_of(model).modules():
        if getattr(module, "layer_idx", None) != layer_idx:
            continue
        for part in module.modules():
            if next(part.parameters(recurse=False), None) is None:
                continue
            return _host.brought_to(part) or next(part.parameters(recurse=False)).device
    device: torch.device = model.device
    return device


def _splits_heads(model: PreTrainedModel) -> bool:
    """Whether a module that makes keys is cut, and its output is not put together again.

    The plan alone does not say: layers that are quantised may have been left whole.
    """
    styles = {name.rpartition(".")[2]: style for name, style in (model.tp_plan or {}).items()}
    for name, module in _decoder_of(model).named_modules():
        last = name.rpartition(".")[2]
        if last in _KEY_PROJECTIONS and styles.get(last, "replicate") not in _WHOLE_OUTPUTS:
            return any(hasattr(weight, "placements") for weight in module.parameters())
    return False


def _decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part that has the decoder layers, apart from the towers of images and sound."""
    try:
        decoder: torch.nn.Module = model.get_decoder()
    except (AttributeError, NotImplementedError):  # a few models have none that transformers finds
        return model
    return decoder
