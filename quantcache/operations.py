"""What a cache does to all its layers, int8 ones and transformers' own."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from quantcache.layers import Int8Layer


class LayerOperations:
    """Rollback, batch operations, reset and offloading of a cache with a list of ``layers``.

    Attributes:
        layers: int8 layers and transformers' own.
        only_non_sliding: whether offloading leaves sliding-window layers where they are.
    """

    layers: list[Any]
    only_non_sliding: bool

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to bring the pages of a layer back to its device, beside the work that is queued there."""
        if self._is_offloaded(layer_idx, only_non_sliding):
            self.layers[layer_idx].prefetch()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Keep the pages of a layer in host memory alone until they are read again."""
        if self._is_offloaded(layer_idx, only_non_sliding):
            self.layers[layer_idx].offload()

    def reset(self) -> None:
        """Forget everything; the cache is then as it was made, and the memory given back."""
        for layer in self.layers:
            layer.reset()
            if isinstance(layer, DynamicLayer):  # which older transformers fill with zeros, at their old length
                layer.keys = layer.values = None
                layer.is_initialized = False
            if isinstance(layer, DynamicIndexedLayer):
                layer.indexer_keys, layer.is_indexer_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every layer; see ``Int8Layer.crop``.

        Args:
            tokens_to_remove: minus the number of tokens; 0 changes nothing in an int8 layer.

        Raises:
            ValueError: a positive number, more tokens than a layer holds, or a layer with a recurrent state, which
                cannot go back; every layer is then as it was.
        """
        tokens_to_remove = int(tokens_to_remove)  # older transformers hand over a tensor
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, Int8Layer):
                layer.check_crop(tokens_to_remove)
            elif tokens_to_remove and any(getattr(layer, "is_recurrent_states_initialized", {}).values()):
                raise ValueError(
                    f"QuantizedInt8Cache.crop: layer {layer_idx}, a {type(layer).__name__}, keeps a recurrent state "
                    f"that cannot forget tokens, got {tokens_to_remove}. Go back to a copy.deepcopy of the cache."
                )
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (1-D, int64 or bool) of the batch in every layer, in that order."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            else:
                _take_rows(layer, indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times in every layer, copies side by side."""
        for layer in self.layers:
            if hasattr(layer, "batch_repeat_interleave"):
                layer.batch_repeat_interleave(repeats)
            elif (batch := _batch_of(layer)) is not None:
                _take_rows(layer, torch.arange(batch).repeat_interleave(repeats))

    def _is_offloaded(self, layer_idx: int, only_non_sliding: bool) -> bool:
        layer = self.layers[layer_idx]
        return hasattr(layer, "offload") and not (only_non_sliding and getattr(layer, "is_sliding", False))

    def _prefetch_next(self, layer_idx: int) -> None:
        """Have the layer, and begin with the next int8 one, or after the last with the first."""
        if not isinstance(self.layers[layer_idx], Int8Layer):
            self.prefetch(layer_idx, self.only_non_sliding)  # it knows no streams: in order with its update
        for following in (*range(layer_idx + 1, len(self.layers)), *range(layer_idx)):
            if isinstance(self.layers[following], Int8Layer) and self._is_offloaded(following, self.only_non_sliding):
                self.prefetch(following, self.only_non_sliding)
                return


def _take_rows(layer: Any, indices: Tensor) -> None:
    """What transformers' linear attention layers have under another name, though any rows in any number will do."""
    layer.reorder_cache(indices)


def _batch_of(layer: Any) -> int | None:
    """Sequences in a linear-attention layer, None while it is empty."""
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return next((state.shape[0] for state in states if state is not None), None)
