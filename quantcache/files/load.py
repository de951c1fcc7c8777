"""Saving and loading: ``QuantizedInt8Cache.save``, ``load`` and their folder forms."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quantcache import __version__
from quantcache.files import container, fingerprint, gathering, host_states, schema
from quantcache.files.container import Container, Progress
from quantcache.files.header import DTYPES, arrange
from quantcache.files.prompts import KnownPrompt, watch_generate
from quantcache.files.save import contents_of
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.growing import GrowingInt8Layer
from quantcache.layers.parallel import device_of_layer, ranks_of, world_size
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE

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

        Where tensor parallelism spreads the KV heads over processes, every rank calls it and rank 0 writes the file
        that one process would write.

        Args:
            path: of the file; its folder must exist.
            model: whose cache it is. Its fingerprint goes into the file, and ``load`` compares it. Needed among
                several processes.
            input_ids: int64 (batch, at least seq_len), the tokens that were fed; the first ``seq_len`` are stored, so
                what ``generate`` returned can be passed as it is. None: those the cache was loaded with, if it still
                holds no others.
            digest_weights: put a digest of all weights into the fingerprint, which tells fine-tuned models apart.
            on_progress: told bytes written and bytes in all.

        Raises:
            TypeError: ``input_ids`` are no integers.
            ValueError: an empty cache, ``input_ids`` that cannot be its tokens, a layer that no file holds, or ranks
                that do not hold parts of one cache.
            NotImplementedError: several processes and a layer with more than keys and values.
            OSError: the file cannot be written; of several processes each says so.
        """
        ranks = ranks_of(model)
        if model is None and world_size() > 1:
            raise ValueError(
                "QuantizedInt8Cache.save: among several processes the model must be given, since it says which heads "
                f"this one holds, got model=None in one of {world_size()}. Pass model=..., on every rank."
            )
        contents = contents_of(self, input_ids, model)
        description = {
            "layout": schema.LAYOUT,
            "quantcache": __version__,
            "page_size": PAGE_SIZE,
            "residual_length": contents.residual_length,
            "from_config": self.layer_class_to_replicate is None,
            "model": None if model is None else fingerprint.of_model(model, digest_weights),
            "layers": contents.layers,
        }
        entries = arrange(contents.specs)

        def write(pieces: Callable[[str], Any]) -> None:
            container.write(Path(path), entries, description, pieces, on_progress)

        if ranks is None:
            write(lambda name: contents.pieces[name]())
        else:
            gathering.write_together(ranks, list(entries), contents.pieces, write)

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
        for a tensor. Where tensor parallelism spreads the KV heads of ``model`` over processes, each takes its own,
        however many processes saved them.

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
                host_states.restore_state(layer, tensors, seq_len)
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
