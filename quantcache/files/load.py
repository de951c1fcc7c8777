"""``QuantizedInt8Cache.load``: a file held against its layout and the model, and then read."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quantcache.files import fingerprint, gathering, host_states, pages, schema
from quantcache.files.container import Container, PathLike, Progress
from quantcache.files.header import DTYPES
from quantcache.files.prompts import KnownPrompt
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.growing import GrowingInt8Layer
from quantcache.layers.parallel import device_of_layer, ranks_of
from quantcache.layers.sliding import Int8SlidingLayer

FILE_NAME: Final = "prompt_cache.safetensors"
"""What ``save_pretrained`` writes into its folder."""

Made = TypeVar("Made", bound=KnownPrompt)
Stored = list[schema.StoredPages | None]


def load(
    cls: type[Made],
    path: PathLike,
    model: PreTrainedModel | None,
    config: PreTrainedConfig | None,
    device: torch.device | str | None,
    max_tokens: int | None,
    mmap: bool,
    verify: bool | None,
    strict: bool,
    on_progress: Progress,
) -> Made:
    """See ``QuantizedInt8Cache.load``."""
    where = None if device is None else torch.device(device)
    ranks = ranks_of(model)
    _check_arguments(model, config, where, max_tokens, mmap)
    verify = not mmap if verify is None else verify
    with Container(Path(path)) as file:
        description = schema.check_description(file)
        _check_model(file, description["model"], model, config)
        cache = _empty_cache(cls, file, description, config if model is None else model.config, strict)
        stored = _check_layers(file, description, cache)
        seq_len = _check_length(file, stored)
        gathering.check_shares(file.entries, ranks)
        _check_prefix(description, seq_len, max_tokens)
        total = sum(entry.nbytes for entry in file.entries.values())
        done = 0

        def read(name: str, rows: int | None = None) -> Tensor:
            nonlocal done
            done += file.entries[name].nbytes
            tensor = file.mapped(name, rows) if mmap else file.read(name, rows, verify)
            on_progress(done, total)
            return gathering.local_heads(name, tensor, ranks)

        for layer_idx, (layer, held) in enumerate(zip(cache.layers, stored, strict=True)):
            place = device_of_layer(model, layer_idx) if where is None else where
            if isinstance(layer, GrowingInt8Layer):
                if held is not None:
                    closed, row_table, *tails = pages.read_pages(held, read, file.refuse, place, max_tokens)
                    layer.lazy_initialization(tails[0], tails[1])
                    assert layer.pages is not None
                    layer.pages.fill(closed, tails[0], tails[1], held.first_page, row_table)
                    if max_tokens is not None:
                        layer.pages.crop(max(layer.pages.seq_len - max_tokens, 0))
                continue
            prefix = schema.part_name(layer_idx, "")
            names = [name for name in file.entries if name.startswith(prefix)]
            # Layers of transformers write their states in place, so a mapped one is copied; they are small.
            tensors = {name.removeprefix(prefix): read(name).to(place, copy=mmap) for name in names}
            host_states.restore_state(layer, tensors, seq_len)
        if schema.INPUT_IDS in file.entries:
            cache.input_ids = read(schema.INPUT_IDS)[:, :max_tokens].clone()
    return cache


def _check_arguments(
    model: object, config: object, device: torch.device | None, max_tokens: int | None, mmap: bool
) -> None:
    place = "QuantizedInt8Cache.load"
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"{place}: max_tokens must be an int of at least 1, got {max_tokens!r}.")
    if model is not None and config is not None:
        raise ValueError(f"{place}: one of model and config must be None, got both.")
    if mmap and device is not None and device.type != "cpu":
        raise ValueError(f"{place}: mmap=True must go to the CPU, got device={str(device)!r}.")


def _check_model(
    file: Container, stored: dict[str, Any] | None, model: PreTrainedModel | None, config: PreTrainedConfig | None
) -> None:
    """Refuse a file that another model made."""
    if stored is None or (model is None and config is None):
        return
    known = fingerprint.of_config(config) if config is not None else fingerprint.of_model(model)
    found = fingerprint.differences(stored, known)
    # The cheap fields first: nobody waits for a digest to hear that the model has other heads.
    if not found and model is not None and fingerprint.WEIGHTS in stored:
        found = fingerprint.differences(stored, fingerprint.of_model(model, digest_weights=True))
    if found:
        raise file.refuse("it must be of this model", "; ".join(found), "Make the cache anew.")


def _empty_cache(
    cls: type[Made], file: Container, description: dict[str, Any], config: PreTrainedConfig | None, strict: bool
) -> Made:
    """A cache with the layers of the file, all empty."""
    kinds = [layer["storage"] for layer in description["layers"]]
    windows = [layer for layer in description["layers"] if layer.get("sliding_window") is not None]
    native = [kind for kind in kinds if kind not in ("int8", "empty")] + ["int8 windows" for _ in windows]
    if native and not description["from_config"]:
        raise file.refuse("layers other than plain int8 must come from a cache made with a config", native[0])
    if native and config is None:
        raise ValueError(
            f"QuantizedInt8Cache.load: {file.path} must be loaded with the model's config, since it holds other "
            f"layers than plain int8, {', '.join(dict.fromkeys(native))}, got neither model nor config. Pass one."
        )
    make: Callable[..., Made] = functools.partial(
        cast(Any, cls), residual_length=description["residual_length"], strict=strict
    )
    if config is None or not description["from_config"]:
        cache = make()
        assert cache.layer_class_to_replicate is not None
        cache.layers.extend(cache.layer_class_to_replicate() for _ in kinds)
        return cache
    cache = make(config)
    if len(cache.layers) != len(kinds):
        raise file.refuse(f"the model has {len(cache.layers)} layers, so many must be stored", len(kinds))
    return cache


def _check_layers(file: Container, description: dict[str, Any], cache: KnownPrompt) -> Stored:
    """Hold every tensor of the file against its layer; None for layers without pages."""
    stored: Stored = []
    expected, batches = {schema.INPUT_IDS}, set()
    native: list[tuple[int, Any, dict[str, host_states.Spec]]] = []
    for layer_idx, (layer, told) in enumerate(zip(cache.layers, description["layers"], strict=True)):
        kind = "int8" if isinstance(layer, BaseInt8Layer) else type(layer).__name__
        if told["storage"] not in (kind, "empty" if kind == "int8" else kind):
            raise file.refuse(f"layer {layer_idx} must be {kind} for this model", told["storage"])
        window = layer.sliding_window if isinstance(layer, Int8SlidingLayer) else None
        first_page = told.get("first_page", 0)
        if told.get("sliding_window") != window or type(first_page) is not int or not 0 <= first_page < 1 << 40:
            raise file.refuse(f"layer {layer_idx} must have a window of {window} for this model", told)
        stored.append(None)
        if told["storage"] == "int8":
            stored[-1] = held = schema.check_pages(file, layer_idx, description["residual_length"], first_page)
            # What the next query sees must be there.
            if held.held < min(held.seq_len, window - 1 if window else held.seq_len):
                raise file.refuse(f"layer {layer_idx} must hold its window of {window}", f"{held.held} tokens")
            expected |= {schema.part_name(layer_idx, part) for part in schema.parts_of(held.num_rows is not None)}
            batches.add(held.batch)
        elif kind != "int8":
            prefix = schema.part_name(layer_idx, "")
            parts = {
                name.removeprefix(prefix): (getattr(torch, DTYPES[entry.dtype].name), entry.shape)
                for name, entry in file.entries.items()
                if name.startswith(prefix)
            }
            native.append((layer_idx, layer, parts))
            expected |= {prefix + part for part in parts}
    for name in file.entries:
        if name not in expected:
            raise file.refuse("every tensor must belong to a layer", name)
    seq_len = _check_length(file, stored)
    for layer_idx, layer, parts in native:
        try:
            host_states.check_state(layer, parts, seq_len)
        except host_states.HostLayerError as error:
            raise file.refuse(f"layer {layer_idx} must fit the model", str(error)) from error
        batches |= {shape[host_states.batch_axis(part)] for part, (_, shape) in parts.items()}
    if len(batches) > 1:
        raise file.refuse("all layers must hold one batch", sorted(batches))
    return stored


def _check_length(file: Container, stored: Stored) -> int:
    """Tokens that every int8 layer holds, and the token ids, where there are any, count."""
    shapes = {(held.batch, held.seq_len) for held in stored if held is not None}
    if len(shapes) != 1:
        raise file.refuse("int8 layers must hold the same tokens, at least one", sorted(shapes) or "none")
    entry = file.entries.get(schema.INPUT_IDS)
    if entry is not None and (entry.dtype != "I64" or entry.shape not in shapes):
        raise file.refuse(f"input_ids must be I64 {next(iter(shapes))}", f"{entry.dtype} {entry.shape}")
    return shapes.pop()[1]


def _check_prefix(description: dict[str, Any], seq_len: int, max_tokens: int | None) -> None:
    """Refuse to cut what has forgotten its beginning."""
    if max_tokens is None or max_tokens >= seq_len:
        return
    for layer_idx, layer in enumerate(description["layers"]):
        if layer["storage"] not in ("int8", "empty", "DummyLayer") or layer.get("first_page"):
            raise ValueError(
                "QuantizedInt8Cache.load: max_tokens needs layers that hold every token, "
                f"got {layer['storage']} as layer {layer_idx}, whose first ones are gone. Load all tokens."
            )
