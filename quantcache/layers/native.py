"""What a cache asks of any of its layers, int8 or transformers' own, whose classes differ in what they can do."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.fixed import select_rows as select_fixed_rows
from quantcache.layers.report import LayerReport
from quantcache.store.pages import Indices, Selection, as_selection


def reset(layer: Any) -> None:
    """Forget everything and give the memory back."""
    layer.reset()
    if isinstance(layer, DynamicLayer):  # which older transformers fill with zeros, at their old length
        layer.keys = layer.values = None
        layer.is_initialized = False
    if isinstance(layer, DynamicIndexedLayer):
        layer.indexer_keys, layer.is_indexer_initialized = None, False


def crop(layers: list[Any], tokens_to_remove: int) -> None:
    """``QuantizedInt8Cache.crop``, of every layer or of none."""
    for layer_idx, layer in enumerate(layers):
        if isinstance(layer, BaseInt8Layer):
            layer.check_crop(tokens_to_remove)
        elif tokens_to_remove and (reason := _why_not_back(layer, -tokens_to_remove)):
            raise ValueError(
                f"QuantizedInt8Cache.crop: layer {layer_idx}, a {type(layer).__name__}, {reason}, "
                f"got {tokens_to_remove}."
            )
    for layer in layers:
        if tokens_to_remove or getattr(layer, "record_past", hasattr(layer, "crop")):
            layer.crop(tokens_to_remove)


def reorder_rows(layers: list[Any], beam_idx: Indices) -> None:
    """``QuantizedInt8Cache.reorder_cache``, of every layer or of none."""
    selection = as_selection(beam_idx)
    others = _rows_of_others(layers, lambda batch: selection)
    _select_int8(layers, lambda batch: selection)
    for layer, rows in others:
        layer.reorder_cache(rows)


def select_rows(layers: list[Any], indices: Indices) -> None:
    """``QuantizedInt8Cache.batch_select_indices``, of every layer or of none."""
    _check_rows(layers, "batch_select_indices")
    selection = as_selection(indices)
    others = _rows_of_others(layers, lambda batch: selection)
    _select_int8(layers, lambda batch: selection)
    for layer, rows in others:
        is_linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        (layer.reorder_cache if is_linear else layer.batch_select_indices)(rows)


def repeat_rows(layers: list[Any], repeats: int) -> None:
    """``QuantizedInt8Cache.batch_repeat_interleave``, of every layer or of none."""

    def selection_of(batch: int) -> Selection:
        return Selection.repeating(batch, repeats)

    _check_rows(layers, "batch_repeat_interleave")
    others = _rows_of_others(layers, selection_of)
    _select_int8(layers, selection_of)
    for layer, rows in others:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        else:
            layer.batch_repeat_interleave(repeats)


def _select_int8(layers: list[Any], selection_of: Callable[[int], Selection]) -> None:
    """Take sequences of every int8 layer, in operations that layers alike share; refused before one has changed.

    Args:
        layers: of a cache, others among them.
        selection_of: which ones of as many as there are; asked once for each number.
    """
    by_batch: dict[int, list[BaseInt8Layer]] = {}
    for layer in layers:
        if isinstance(layer, BaseInt8Layer) and layer.pages is not None and not layer.is_empty:
            by_batch.setdefault(layer.pages.batch_size, []).append(layer)
    selections = {batch: selection_of(batch) for batch in by_batch}
    for batch, selection in selections.items():
        selection.rows(batch)
    for batch, alike in by_batch.items():
        select_fixed_rows([layer for layer in alike if isinstance(layer, StaticInt8Layer)], selections[batch])
        for layer in alike:
            if not isinstance(layer, StaticInt8Layer):
                layer.batch_select_indices(selections[batch])


def is_offloaded(layer: Any, only_non_sliding: bool) -> bool:
    """Whether offloading moves such a layer."""
    # Linear attention reads its states before anything is updated, where nobody would bring them back.
    if not hasattr(layer, "offload") or isinstance(layer, LinearAttentionCacheLayerMixin):
        return False
    return not (only_non_sliding and getattr(layer, "is_sliding", False))


def prefetch_next(layers: list[Any], layer_idx: int, only_non_sliding: bool) -> None:
    """Have the layer, and begin with the next int8 one, or after the last with the first."""
    layer = layers[layer_idx]
    if not isinstance(layer, BaseInt8Layer) and is_offloaded(layer, only_non_sliding):
        layer.prefetch()  # it knows no streams: in order with its update
    for following in (*layers[layer_idx + 1 :], *layers[:layer_idx]):
        if isinstance(following, BaseInt8Layer) and is_offloaded(following, only_non_sliding):
            following.prefetch()
            return


def seq_len(layers: list[Any]) -> int:
    """Tokens in a cache with these layers; waits for the device where only it knows the number."""
    int8 = [layer for layer in layers if isinstance(layer, BaseInt8Layer)]
    known = int8[:1] or [layer for layer in layers if hasattr(layer, "get_seq_length")]
    return max((int(layer.get_seq_length()) for layer in known), default=0)


def seq_lens(layers: list[Any]) -> list[int]:
    """``seq_len`` of each layer that counts its tokens."""
    return [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]


def is_empty(layers: list[Any]) -> bool:
    """Whether no token is stored, as far as any layer counts them; linear attention does not."""
    counts = any(hasattr(layer, "get_seq_length") for layer in layers)
    return not seq_len(layers) if counts else not layers


def holds_nothing(layers: list[Any]) -> bool:
    """Whether nothing is stored; False where a layer counts no tokens, as linear attention does not."""
    return all(hasattr(layer, "get_seq_length") for layer in layers) and not seq_len(layers)


def layer_nbytes(layer: Any) -> int:
    """Bytes a layer of any cache keeps in memory; transformers' layers have tensors or dicts of them as attributes."""
    if isinstance(layer, BaseInt8Layer):
        return layer.nbytes
    storages = {}
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def layer_report(layer: Any, layer_idx: int) -> LayerReport:
    """The layer's row of the cache's report."""
    if isinstance(layer, BaseInt8Layer):
        return layer.report(layer_idx)
    seq_len = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    storage = "shared" if type(layer).__name__ == "DummyLayer" else type(layer).__name__
    nbytes, keys = layer_nbytes(layer), getattr(layer, "keys", None)
    dtype = str(keys.dtype).removeprefix("torch.") if isinstance(keys, Tensor) else None
    return LayerReport(layer_idx, storage, seq_len, nbytes, "native", None, dtype=dtype, exact_nbytes=nbytes)


def _check_rows(layers: list[Any], method: str) -> None:
    for layer_idx, layer in enumerate(layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin) and not hasattr(layer, method):
            raise ValueError(
                f"QuantizedInt8Cache.{method}: layer {layer_idx}, a {type(layer).__name__} of fixed capacity, "
                "keeps its batch. Use QuantizedInt8Cache without max_cache_len."
            )


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


def _rows_of_others(layers: list[Any], selection_of: Callable[[int], Selection]) -> list[tuple[Any, Tensor]]:
    """Each layer of transformers' that holds sequences, and which of them to take, int64 on its device.

    Raises:
        TypeError, IndexError: see ``checked_indices``.
    """
    held = [(layer, _states_of(layer)) for layer in layers if not isinstance(layer, BaseInt8Layer)]
    found = [(layer, states, len(states)) for layer, states in held if states is not None]
    return [(layer, selection_of(batch).on(states.device, batch)) for layer, states, batch in found]


def _states_of(layer: Any) -> Tensor | None:
    """One of the tensors of a layer of transformers', (batch, ...); None where it holds no sequence."""
    states = [getattr(layer, "keys", None)]
    if isinstance(layer, LinearAttentionCacheLayerMixin):  # whose own reorder_cache takes any of them in any number
        states = [*layer.conv_states.values(), *layer.recurrent_states.values(), *states]
    return next((each for each in states if isinstance(each, Tensor) and len(each)), None)
