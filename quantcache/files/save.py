"""``QuantizedInt8Cache.save``: the tensors of every layer, by name, and what is said of them."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache import __version__
from quantcache.files import container, fingerprint, gathering, host_states, pages, schema, shared
from quantcache.files.container import PathLike, Progress
from quantcache.files.description import check
from quantcache.files.header import arrange
from quantcache.files.prompts import KnownPrompt
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.parallel import Ranks, kv_heads_of, ranks_of, world_size
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE


class Contents(NamedTuple):
    """Of one file.

    Attributes:
        specs: dtype and shape of each tensor, with the heads of all ranks.
        pieces: what yields the bytes of each; of several ranks, on rank 0.
        layers: what the header says of each layer.
        residual_length: of the int8 layers.
    """

    specs: pages.Specs
    pieces: dict[str, Callable[[], Iterable[Tensor]]]
    layers: list[dict[str, Any]]
    residual_length: int


def save(
    cache: KnownPrompt,
    path: PathLike,
    model: PreTrainedModel | None,
    input_ids: Tensor | None,
    digest_weights: bool,
    on_progress: Progress,
) -> None:
    """See ``QuantizedInt8Cache.save``."""
    ranks = ranks_of(model)
    if model is None and world_size() > 1:
        raise ValueError(
            "QuantizedInt8Cache.save: among several processes the model must be given, since it says which heads "
            f"this one holds, got model=None in one of {world_size()}. Pass model=..., on every rank."
        )
    contents = contents_of(cache, input_ids, model)
    description = {
        "layout": schema.layout_of(contents.specs),
        "quantcache": __version__,
        "page_size": PAGE_SIZE,
        "residual_length": contents.residual_length,
        "from_config": cache.layer_class_to_replicate is None,
        "model": None if model is None else fingerprint.of_model(model, digest_weights),
        "layers": contents.layers,
    }
    check(description, _refused)
    entries = arrange(contents.specs)

    def write(pieces: Callable[[str], Any]) -> None:
        container.write(Path(path), entries, description, pieces, on_progress)

    if ranks is None:
        write(lambda name: contents.pieces[name]())
    else:
        gathering.write_together(ranks, list(entries), contents.pieces, write)


def _refused(rule: str, got: object) -> ValueError:
    """A file that ``load`` would not take is not written, whatever a model's config has in its fields."""
    return ValueError(f"QuantizedInt8Cache.save: {rule}, got {got}.")


def contents_of(cache: KnownPrompt, input_ids: Tensor | None, model: PreTrainedModel | None) -> Contents:
    """What the file of ``cache`` holds; see ``QuantizedInt8Cache.save`` for the arguments and errors.

    Where several processes share the model, every one must call it, and either all return or all raise.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return _contents(cache, input_ids, None)
    assert model is not None
    try:
        made = _contents(cache, input_ids, ranks)
        _check_heads(made, ranks, model)
    except Exception as error:
        gathering.agree(ranks, {}, error)
        raise
    gathering.agree(ranks, {"layers": made.layers, "tensors": made.specs}, None)
    return made


def _contents(cache: KnownPrompt, input_ids: Tensor | None, ranks: Ranks | None) -> Contents:
    batch, seq_len = _size_of(cache)
    ids = _ids_to_save(cache, input_ids, batch, seq_len)
    int8 = [layer for layer in cache.layers if isinstance(layer, BaseInt8Layer)]
    made = Contents({}, {}, [], int8[0].residual_length)
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, BaseInt8Layer):
            made.layers.append(_described(layer))
            if layer.pages is not None and not layer.pages.is_empty:
                view = layer.pages.stored(shares=ranks is None)
                if view.row_table is not None:
                    view = shared.flattened(view) or layer.pages.stored()
                specs = pages.pages_specs(layer_idx, view)
                for part in schema.parts_of(view.row_table is not None):
                    name = schema.part_name(layer_idx, part)
                    if ranks is None:
                        made.specs[name] = specs[name]
                        made.pieces[name] = functools.partial(pages.pages_pieces, view, part)
                    else:
                        made.specs[name] = gathering.whole_spec(part, specs[name], ranks)
                        made.pieces[name] = functools.partial(gathering.whole_pages, view, part, ranks)
            continue
        try:
            tensors = host_states.state_of(layer, seq_len)
        except host_states.HostLayerError as error:
            raise ValueError(f"QuantizedInt8Cache.save: {error} in layer {layer_idx}.") from error
        made.layers.append({"storage": type(layer).__name__})
        for part, tensor in tensors.items():
            name = schema.part_name(layer_idx, part)
            made.specs[name] = (tensor.dtype, tuple(tensor.shape))
            if ranks is None:
                made.pieces[name] = functools.partial(pages.staged, tensor)
            else:
                gathering.check_part("QuantizedInt8Cache.save", name, part)
                made.specs[name] = gathering.whole_spec(part, made.specs[name], ranks)
                made.pieces[name] = functools.partial(gathering.whole_states, tensor, ranks)
    if ids is not None:
        made.specs[schema.INPUT_IDS] = (torch.int64, tuple(ids.shape))
        made.pieces[schema.INPUT_IDS] = lambda: [ids]
    return made


def _check_heads(made: Contents, ranks: Ranks, model: PreTrainedModel) -> None:
    """Hold the heads of all ranks together against the model's config."""
    expected = kv_heads_of(model.config)
    for name, (_, shape) in made.specs.items():
        if name == schema.INPUT_IDS or not expected:
            continue
        heads = shape[gathering.head_axis(name.split(".", 2)[2])]
        if heads not in expected:
            whose = "shared by" if ranks.is_split else "the same on"
            raise ValueError(
                f"QuantizedInt8Cache.save: a layer must have the {' or '.join(map(str, sorted(expected)))} KV heads of "
                f"the model, got {heads} in {name}, {whose} {ranks.size} ranks by the model's tp_plan. Is the cache "
                "that of this model?"
            )


def _size_of(cache: KnownPrompt) -> tuple[int, int]:
    """Sequences and tokens of a cache; every int8 layer that holds any has the same."""
    held = [layer.pages for layer in cache.layers if isinstance(layer, BaseInt8Layer) and layer.pages is not None]
    sizes = {(pages.batch_size, pages.seq_len) for pages in held if not pages.is_empty}
    if len(sizes) != 1:
        raise ValueError(
            "QuantizedInt8Cache.save: int8 layers must hold the same tokens, at least one, got (batch, seq_len) of "
            f"{sorted(sizes) or 'none'}."
        )
    return sizes.pop()


def _described(layer: BaseInt8Layer) -> dict[str, Any]:
    """What the header says of an int8 layer."""
    if layer.pages is None or layer.pages.is_empty:
        described: dict[str, Any] = {"storage": "empty"}
    else:
        described = {"storage": "int8"}
    if isinstance(layer, Int8SlidingLayer):
        described["sliding_window"] = layer.sliding_window
        described["first_page"] = 0 if layer.pages is None else layer.pages.first_page
        if layer.record_past:
            raise ValueError("QuantizedInt8Cache.save: no layer must wait for crop, got record_past=True.")
    return described


def _ids_to_save(cache: KnownPrompt, input_ids: Tensor | None, batch: int, seq_len: int) -> Tensor | None:
    """The tokens that the cache holds, int64 on the CPU, or None if nobody knows them."""
    place = "QuantizedInt8Cache.save"
    if input_ids is None:
        known = cache.input_ids
        return known if known is not None and known.shape[1] == seq_len else None
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"{place}: input_ids must be an int64 tensor, got {got}.")
    if input_ids.dim() != 2 or len(input_ids) != batch or input_ids.shape[1] < seq_len:
        raise ValueError(
            f"{place}: input_ids must be the ({batch}, {seq_len}) tokens stored, or begin with them, "
            f"got {tuple(input_ids.shape)}."
        )
    return input_ids[:, :seq_len].to("cpu", torch.int64)
