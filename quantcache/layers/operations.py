"""What a cache does to all its layers, int8 ones and transformers' own."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from quantcache.layers.base import Int8Layer


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
            tokens_to_remove: minus the number of tokens. With 0 layers that record their past let go of it.

        Raises:
            ValueError: a positive number, more tokens than a layer holds, or a layer that cannot go back; every layer
                is then as it was.
        """
        tokens_to_remove = int(tokens_to_remove)  # older transformers hand over a tensor
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, Int8Layer):
                layer.check_crop(tokens_to_remove)
            elif tokens_to_remove and (reason := _why_not_back(layer, -tokens_to_remove)):
                raise ValueError(
                    f"QuantizedInt8Cache.crop: layer {layer_idx}, a {type(layer).__name__}, {reason}, "
                    f"got {tokens_to_remove}."
                )
        for layer in self.layers:
            if tokens_to_remove or getattr(layer, "record_past", hasattr(layer, "crop")):
                layer.crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (1-D, int64 or bool) of the batch in every layer, in that order.

        Raises:
            ValueError: a layer of fixed capacity, which keeps its batch; every layer is then as it was.
        """
        self._check_rows("batch_select_indices")
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
                layer.reorder_cache(rows)  # type: ignore[arg-type]
            else:
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times in every layer, copies side by side.

        Raises:
            ValueError: a layer of fixed capacity, which keeps its batch; every layer is then as it was.
        """
        self._check_rows("batch_repeat_interleave")
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                rows = torch.arange(_batch_of(layer)).repeat_interleave(repeats)
                layer.reorder_cache(rows)  # type: ignore[arg-type]
            else:
                layer.batch_repeat_interleave(repeats)

    def _check_rows(self, method: str) -> None:
        for layer_idx, layer in enumerate(self.layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin) and not hasattr(layer, method):
                raise ValueError(
                    f"QuantizedInt8Cache.{method}: layer {layer_idx}, a {type(layer).__name__} of fixed capacity, "
                    "keeps its batch. Use QuantizedInt8Cache without max_cache_len."
                )

    def _is_offloaded(self, layer_idx: int, only_non_sliding: bool) -> bool:
        layer = self.layers[layer_idx]
        # Linear attention reads its states before anything is updated, where nobody would bring them back.
        if not hasattr(layer, "offload") or isinstance(layer, LinearAttentionCacheLayerMixin):
            return False
        return not (only_non_sliding and getattr(layer, "is_sliding", False))

    def _prefetch_next(self, layer_idx: int) -> None:
        """Have the layer, and begin with the next int8 one, or after the last with the first."""
        if not isinstance(self.layers[layer_idx], Int8Layer):
            self.prefetch(layer_idx, self.only_non_sliding)  # it knows no streams: in order with its update
        for following in (*range(layer_idx + 1, len(self.layers)), *range(layer_idx)):
            if isinstance(self.layers[following], Int8Layer) and self._is_offloaded(following, self.only_non_sliding):
                self.prefetch(following, self.only_non_sliding)
                return


def _why_not_back(layer: Any, tokens: int) -> str | None:
    """Why a layer of transformers cannot forget its newest ``tokens``, or None."""
    is_fixed = isinstance(layer, StaticLayer)
    # Newer transformers can take a window of fixed capacity back, but only one that never has to forget.
    if not hasattr(layer, "crop") or (is_fixed and not layer.is_croppable):
        return "has a fixed capacity and cannot forget tokens; use a cache without max_cache_len"
    if is_fixed and tokens > int(layer.get_seq_length()):
        return f"holds {int(layer.get_seq_length())} tokens and cannot forget more"
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()):
            return "keeps a recurrent state that cannot forget tokens; go back to a copy.deepcopy of the cache"
        if not layer.record_past and any(layer.is_conv_states_initialized.values()):
            return "kept no past; call activate_past_recording() before the update that may be taken back"
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
        needed = min(layer.get_seq_length() - tokens, layer.sliding_window - 1)
        if not 0 <= needed <= layer.keys.shape[2] - tokens:
            return "does not hold the window before them; call activate_past_recording() before the update"
    return None


def _batch_of(layer: LinearAttentionCacheLayerMixin) -> int:
    """Sequences in a linear-attention layer, whose own ``reorder_cache`` takes any of them in any number."""
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return next((state.shape[0] for state in states if state is not None), 0)
