"""Saving and loading: ``QuantizedInt8Cache.save``, ``load`` and their folder forms."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quantcache import __version__, fingerprint, host_layers
from quantcache.layers import Int8Layer
from quantcache.prompts import KnownPrompt, watch_generate
from quantcache.scheme import PAGE_SIZE
from quantcache.sliding import Int8SlidingLayer
from quantcache.storage import container, schema
from quantcache.storage.container import Container, Progress
from quantcache.storage.header import DTYPES, arrange

FILE_NAME: Final = "prompt_cache.safetensors"
"""What ``save_pretrained`` writes into its folder."""

Made = TypeVar("Made", bound="CacheFiles")
PathLike = str | os.PathLike[str]
Stored = list[schema.StoredPages | None]


def _no_progress(done: int, total: int) -> None:
    pass


class CacheFiles(KnownPrompt):
    """The part of ``QuantizedInt8Cache`` that deals with files."""

    def save(
        self,
        path: PathLike,
        model: PreTrainedModel | None = None,
        input_ids: Tensor | None = None,
        *,
        digest_weights: bool = False,
        on_progress: Progress = _no_progress,
    ) -> None:
        """Write the cache to one safetensors file: int8 bytes and metadata as they are, exact tails, native layers.

        The file appears in one step; what ``path`` was before stays until then. Of a cache on a GPU no more than 32 MiB
        are on the CPU at a time, of one on the CPU nothing is copied but a tail.

        Args:
            path: of the file; its folder must exist.
            model: whose cache it is. Its fingerprint goes into the file, and ``load`` compares it.
            input_ids: int64 (batch, at least seq_len), the tokens that were fed; the first ``seq_len`` are stored, so
                what ``generate`` returned can be passed as it is. None: those the cache was loaded with, if it still
                holds no others.
            digest_weights: put a digest of all weights into the fingerprint, which tells fine-tuned models apart.
            on_progress: told bytes written and bytes in all.

        Raises:
            TypeError: ``input_ids`` are no integers.
            ValueError: an empty cache, ``input_ids`` that cannot be its tokens, or a layer that no file holds.
            OSError: the file cannot be written.
        """
        batch, seq_len = _size_of(self)
        ids = _ids_to_save(self, input_ids, batch, seq_len)
        specs: schema.Specs = {}
        pieces: dict[str, Callable[[], Any]] = {}
        layers: list[dict[str, Any]] = []
        residual_length = 0
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, Int8Layer):
                residual_length = layer.residual_length
                layers.append(_described(layer))
                if layer.pages is not None and not layer.pages.is_empty:
                    view = layer.pages.stored()
                    specs.update(schema.pages_specs(layer_idx, view))
                    for part in schema.PARTS:
                        name = schema.part_name(layer_idx, part)
                        pieces[name] = functools.partial(schema.pages_pieces, view, part)
                continue
            try:
                tensors = host_layers.state_of(layer, seq_len)
            except host_layers.HostLayerError as error:
                raise ValueError(f"QuantizedInt8Cache.save: {error} in layer {layer_idx}.") from error
            layers.append({"storage": type(layer).__name__})
            for part, tensor in tensors.items():
                name = schema.part_name(layer_idx, part)
                specs[name] = (tensor.dtype, tuple(tensor.shape))
                pieces[name] = functools.partial(schema.staged, tensor)
        if ids is not None:
            specs[schema.INPUT_IDS] = (torch.int64, tuple(ids.shape))
            pieces[schema.INPUT_IDS] = lambda: [ids]
        description = {
            "layout": schema.LAYOUT,
            "quantcache": __version__,
            "page_size": PAGE_SIZE,
            "residual_length": residual_length,
            "from_config": self.layer_class_to_replicate is None,
            "model": None if model is None else fingerprint.of_model(model, digest_weights),
            "layers": layers,
        }
        container.write(Path(path), arrange(specs), description, lambda name: pieces[name](), on_progress)

    @classmethod
    def load(
        cls: type[Made],
        path: PathLike,
        model: PreTrainedModel | None = None,
        *,
        config: PreTrainedConfig | None = None,
        device: torch.device | str | None = None,
        max_tokens: int | None = None,
        mmap: bool = False,
        verify: bool | None = None,
        strict: bool = False,
        on_progress: Progress = _no_progress,
    ) -> Made:
        """A cache with the bytes of a file that ``save`` wrote.

        All that the header says is held against the size of the file, the layout and the model before memory is taken
        for a tensor.

        Args:
            path: of the file.
            model: the model that will continue. Its fingerprint must be that of the file, if the file has one.
            config: in place of ``model``: its config; dtype and weights are then not compared.
            device: where to put the bytes. None: where ``model`` has each layer, the CPU without a model.
            max_tokens: load only the first so many tokens. One that ends within a page reopens it, as ``crop`` does.
            mmap: leave the bytes in the file until they are read; the file must then not be changed in place.
            verify: compare the checksums of the bytes; None for "unless ``mmap``", since it reads all of them.
            strict: as for the constructor.
            on_progress: told bytes read and bytes in all.

        Returns:
            The cache; its ``input_ids`` are the stored tokens, and ``generate`` refuses a prompt that does not begin
            with them.

        Raises:
            CacheFileError: no prompt cache, a damaged or forged one, a newer layout, or another model's.
            ValueError: arguments that exclude each other or ask for what the file cannot give.
            OSError: the file cannot be read.
        """
        where = None if device is None else torch.device(device)
        _check_arguments(model, config, where, max_tokens, mmap)
        verify = not mmap if verify is None else verify
        with Container(Path(path)) as file:
            description = schema.check_description(file)
            _check_model(file, description["model"], model, config)
            cache = _empty_cache(cls, file, description, config if model is None else model.config, strict)
            stored = _check_layers(file, description, cache)
            seq_len = _check_length(file, stored)
            _check_prefix(description, seq_len, max_tokens)
            total = sum(entry.nbytes for entry in file.entries.values())
            done = 0

            def read(name: str, rows: int | None = None) -> Tensor:
                nonlocal done
                done += file.entries[name].nbytes
                tensor = file.mapped(name, rows) if mmap else file.read(name, rows, verify)
                on_progress(done, total)
                return tensor

            for layer_idx, (layer, held) in enumerate(zip(cache.layers, stored, strict=True)):
                place = _device_of(model, layer_idx) if where is None else where
                if isinstance(layer, Int8Layer):
                    if held is not None:
                        closed, key_tail, value_tail = schema.read_pages(held, read, place, max_tokens)
                        layer.lazy_initialization(key_tail, value_tail)
                        assert layer.pages is not None
                        layer.pages.fill(closed, key_tail, value_tail, held.first_page)
                        if max_tokens is not None:
                            layer.pages.crop(max(layer.pages.seq_len - max_tokens, 0))
                    continue
                prefix = schema.part_name(layer_idx, "")
                names = [name for name in file.entries if name.startswith(prefix)]
                # Layers of transformers write their states in place, so a mapped one is copied; they are small.
                tensors = {name.removeprefix(prefix): read(name).to(place, copy=mmap) for name in names}
                host_layers.restore_state(layer, tensors, seq_len)
            if schema.INPUT_IDS in file.entries:
                cache.input_ids = read(schema.INPUT_IDS)[:, :max_tokens].clone()
                watch_generate()
        return cache

    def save_pretrained(self, save_directory: PathLike, **options: Any) -> None:
        """``save`` into ``prompt_cache.safetensors`` of a folder, which is made if need be.

        Args:
            save_directory: the folder.
            options: ``model``, ``input_ids`` and the other arguments of ``save``.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save(Path(save_directory) / FILE_NAME, **options)

    @classmethod
    def from_pretrained(cls: type[Made], directory: PathLike, **options: Any) -> Made:
        """``load`` from ``prompt_cache.safetensors`` of a folder.

        Args:
            directory: the folder.
            options: ``model`` and the other arguments of ``load``.
        """
        return cls.load(Path(directory) / FILE_NAME, **options)


def _size_of(cache: KnownPrompt) -> tuple[int, int]:
    """Sequences and tokens of a cache; every int8 layer that holds any has the same."""
    held = [layer.pages for layer in cache.layers if isinstance(layer, Int8Layer) and layer.pages is not None]
    sizes = {(pages.batch_size, pages.seq_len) for pages in held if not pages.is_empty}
    if len(sizes) != 1:
        raise ValueError(
            "QuantizedInt8Cache.save: int8 layers must hold the same tokens, at least one, got (batch, seq_len) of "
            f"{sorted(sizes) or 'none'}."
        )
    return sizes.pop()


def _described(layer: Int8Layer) -> dict[str, Any]:
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
    native: list[tuple[int, Any, dict[str, host_layers.Spec]]] = []
    for layer_idx, (layer, told) in enumerate(zip(cache.layers, description["layers"], strict=True)):
        kind = "int8" if isinstance(layer, Int8Layer) else type(layer).__name__
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
            expected |= {schema.part_name(layer_idx, part) for part in schema.PARTS}
            batches.add(held.batch)
        elif kind != "int8":
            prefix = schema.part_name(layer_idx, "")
            parts = {
                name.removeprefix(prefix): (DTYPES[entry.dtype], entry.shape)
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
            host_layers.check_state(layer, parts, seq_len)
        except host_layers.HostLayerError as error:
            raise file.refuse(f"layer {layer_idx} must fit the model", str(error)) from error
        batches |= {shape[host_layers.batch_axis(part)] for part, (_, shape) in parts.items()}
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


def _device_of(model: PreTrainedModel | None, layer_idx: int) -> torch.device:
    """Where ``model`` has its decoder layer ``layer_idx``; accelerate notes it where a model is spread over devices."""
    if model is None:
        return torch.device("cpu")
    spread: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    for name, place in spread.items():
        if name.endswith(f"layers.{layer_idx}") and place not in ("cpu", "disk"):
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    device: torch.device = model.device
    return device
