"""``QuantizedInt8Cache``: the cache a user hands to ``generate``.

It is long since all that a user calls is documented in this one class; what a method does stands in the rooms below.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from quantcache.files import load, prompts, save
from quantcache.files.container import PathLike, Progress, no_progress
from quantcache.layers import calls, conversion, moving, native, routing, samples
from quantcache.layers._host import given_to_generate
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.editing import EditedStates, edited
from quantcache.layers.factory import (
    LayerFactory,
    LayersOnUse,
    check_goes_without_config,
    layers_for,
    one_for_two_error,
)
from quantcache.layers.growing import GrowingInt8Layer
from quantcache.layers.native import layer_nbytes, layer_report
from quantcache.layers.report import CacheReport
from quantcache.layers.sizing import tokens_of_generate
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE
from quantcache.store import traced
from quantcache.store.fixed import check_room
from quantcache.store.pages import Indices, as_selection
from quantcache.store.read_log import FallbackPolicy

_CONVERT: Final = "QuantizedInt8Cache.from_legacy_cache(past_key_values)"


def _needs_config(name: str) -> Callable[..., Any]:
    """The host's method ``name``, for layers that hold more than keys and values; without a config there are none."""

    @functools.wraps(getattr(Cache, name, Cache.update))
    def method(self: "QuantizedInt8Cache", *args: Any, **kwargs: Any) -> Any:
        if self.layer_class_to_replicate is not None:
            raise ValueError(
                f"QuantizedInt8Cache.{name}: a hybrid model, whose layers hold more than keys and values, needs a "
                "cache made from its config, got config=None. Use QuantizedInt8Cache(model.config)."
            )
        return getattr(Cache, name)(self, *args, **kwargs)

    return method


def _refuse_one_for_two(cache: "QuantizedInt8Cache") -> None:
    """What an encoder-decoder model needs is not one cache."""
    if cache._is_encoder_decoder:
        raise one_for_two_error()


class QuantizedInt8Cache(DynamicCache):
    """A KV cache that stores int8 and reads int8, inside the ordinary ``generate()``.

        model.generate(**inputs, cache=QuantizedInt8Cache())

    Before transformers 5.24 the argument is ``past_key_values``.

    Keys are quantised per channel over pages of 64 tokens, values per token; the newest tokens stay exact. The prompt
    attends at full precision, and a context of less than 64 + ``residual_length`` tokens is never quantised.

    It is a ``DynamicCache`` by type, since transformers asks for one (in ``EncoderDecoderCache``, for example), and
    takes nothing else from it.

    Args:
        config: the model's config. Full-attention layers and windows of more than 1024 tokens are then int8, and small
            windows, linear-attention and other special layers transformers' own. Without it every layer is int8, is
            made on first use and keeps all tokens, which suits decoders whose layers are all attention; the others
            are refused at the first call.
        residual_length: newer tokens that must exist before a page is quantised. A rollback of up to that many tokens,
            as assisted decoding makes, leaves no trace.
        strict: raise ``FallbackError`` where a read would have to restore the cache to full precision, instead of
            warning once.
        max_cache_len: allocate memory for so many tokens at once, so that ``generate()`` compiles the decoding step, as
            it does with a ``StaticCache``. Needs ``config``. See ``for_generate``, which finds the number.
        offloading: keep closed pages in host memory and bring those of the next layer to the GPU while one is at work.
            Each page goes to the host once; a decode step moves int8 bytes one way. Nothing to do on a CPU. With
            ``max_cache_len`` too; ``generate()`` then compiles nothing.
        offload_only_non_sliding: leave sliding-window layers where they are.

    Attributes:
        input_ids: int64 (batch, tokens) on the CPU, the tokens that a file brought, or None. While it is set,
            ``generate`` refuses a prompt that does not begin with it; set it to None to leave that check out.

    Raises:
        TypeError: ``config`` is not a config, ``residual_length`` not an int.
        ValueError: a negative ``residual_length``; a config whose model transformers cannot cache.
    """

    layers: list[Any]
    input_ids: Tensor | None = None
    known_ids: Tensor | None = None
    """The prompt (batch, seq_len) that ``generate`` read into the cache; None where others may have come since."""
    _was_asked: bool = False
    """Whether a model asked for the sizes of its masks."""

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            convert = f" For legacy key and value tuples use {_CONVERT}." if isinstance(config, (tuple, list)) else ""
            raise TypeError(
                "QuantizedInt8Cache: config must be the model's config (model.config) or None, "
                f"got {type(config).__name__}.{convert}"
            )
        if max_cache_len is not None and config is None:
            raise ValueError(
                "QuantizedInt8Cache: max_cache_len needs the model's config, got config=None. "
                "Use QuantizedInt8Cache(model.config, max_cache_len=...)."
            )
        # Eager attention is to restore the states, so that nothing is left to warn of.
        policy = FallbackPolicy(strict)
        make = LayerFactory(residual_length, policy, max_cache_len, offloading=offloading)
        # Not DynamicCache.__init__: it would make the layers.
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=make)  # type: ignore[arg-type]
            self.layers = LayersOnUse()
        else:
            Cache.__init__(self, layers=layers_for(config, make))
        self._make = make
        self._is_encoder_decoder = config is not None and bool(getattr(config, "is_encoder_decoder", False))
        # The host's own streams are not made: on a machine without an accelerator they cannot be.
        self.offloading, self.only_non_sliding = offloading, offload_only_non_sliding
        self._handle = traced.handle_for(self)
        routing.install()
        calls.watch_generate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handle = traced.handle_for(self)
        routing.install()
        calls.watch_generate()

    @classmethod
    def for_encoder_decoder(
        cls,
        config: PreTrainedConfig | None = None,
        *,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
        offloading: bool = False,
        quantize_cross_attention: bool = True,
    ) -> EncoderDecoderCache:
        """What an encoder-decoder model takes as its cache: one for self- and one for cross-attention.

        Args:
            config: as for the constructor, as are the other arguments.
            residual_length: see the constructor.
            strict: see the constructor.
            offloading: see the constructor; an exact cross-attention cache stays where it is.
            quantize_cross_attention: store the encoder's keys and values, which are computed once, in int8 too; if
                False, exactly.
        """
        make = functools.partial(cls, config, residual_length=residual_length, strict=strict, offloading=offloading)
        return EncoderDecoderCache(make(), make() if quantize_cross_attention else DynamicCache(config=config))

    @classmethod
    def for_generate(
        cls,
        model: Any,
        inputs: Tensor | Mapping[str, Any],
        generation_config: GenerationConfig | None = None,
        *,
        max_cache_len: int | None = None,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
        **options: Any,
    ) -> "QuantizedInt8Cache":
        """A cache of the fixed capacity that one call of ``generate()`` needs, which then compiles the decoding step.

            cache = QuantizedInt8Cache.for_generate(model, inputs, max_new_tokens=512)
            model.generate(**inputs, cache=cache, max_new_tokens=512)

        Args:
            model: what will generate.
            inputs: token ids (batch, seq_len), or the keyword arguments of ``generate()`` with ``input_ids``.
            generation_config: as for ``generate()``.
            max_cache_len: more tokens than this call needs, for ``reset()`` and later calls without a new compilation.
            residual_length: see the constructor.
            strict: see the constructor.
            options: other keyword arguments of ``generate()``; ``max_new_tokens`` and ``max_length`` count.

        Raises:
            ValueError: the prompt and the new tokens do not fit into ``max_cache_len``, or the length has no limit.
        """
        prompt_len, new_tokens = tokens_of_generate(model, inputs, generation_config, options)
        needed = prompt_len + new_tokens
        if max_cache_len is not None and max_cache_len < needed:
            raise ValueError(
                "QuantizedInt8Cache.for_generate: max_cache_len must be at least the prompt and the new tokens, "
                f"{prompt_len} + {new_tokens} = {needed}, got {max_cache_len}."
            )
        config = model.config.get_text_config(decoder=True)
        return cls(config, residual_length=residual_length, strict=strict, max_cache_len=max_cache_len or needed)

    @classmethod
    def for_samples(
        cls,
        model: Any,
        inputs: Tensor | Mapping[str, Any],
        n: int,
        *,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
        max_cache_len: int | None = None,
    ) -> "tuple[QuantizedInt8Cache, dict[str, Tensor]]":
        """A cache in which ``n`` answers to each prompt share its bytes, and the inputs for them.

            cache, repeated = QuantizedInt8Cache.for_samples(model, inputs, 16)
            model.generate(**repeated, cache=cache, do_sample=True, max_new_tokens=512)

        The prompts run once, but for their last token, with which ``generate()`` goes on; by itself it would run
        ``n`` copies. Where it makes the copies of the ids itself, for ``num_beams=n`` or ``num_return_sequences=n``,
        give it the inputs as they were and this cache.

        Args:
            model: what will generate.
            inputs: token ids (batch, seq_len), or the keyword arguments of ``generate()`` with ``input_ids`` and, if
                prompts are padded on the left, ``attention_mask``, as a tokenizer returns them.
            n: answers to each prompt.
            residual_length: see the constructor.
            strict: see the constructor.
            max_cache_len: see the constructor. Memory for ``n`` copies is then allocated; the prompts run once all the
                same.

        Returns:
            The cache, with ``n`` sequences side by side for each prompt, and ids and mask for as many.

        Raises:
            TypeError, ValueError: no such inputs, padding on the right, ``n`` below 1, or a prompt that does not fit.
            NotImplementedError: an encoder-decoder model; inputs such as images or embeddings; with ``max_cache_len``
                a model with layers that are not int8.
        """
        prompts = samples.prompts_of(model, inputs, n)
        config = model.config.get_text_config(decoder=True)
        cache = cls(config, residual_length=residual_length, strict=strict, max_cache_len=max_cache_len)
        if max_cache_len is not None:
            samples.check_layers(cache.layers)
            check_room(max_cache_len, prompts["input_ids"].shape[1])
        samples.run(model, cache, prompts)
        if max_cache_len is None:
            cache.batch_repeat_interleave(n)
        else:
            for layer in cache.layers:
                layer.repeat(n)
        return cache, samples.repeated(prompts, n)

    @classmethod
    def from_legacy_cache(
        cls,
        past_key_values: Iterable[tuple[Tensor, Tensor]],
        config: PreTrainedConfig | None = None,
        *,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
    ) -> "QuantizedInt8Cache":
        """A cache filled from legacy tuples, one ``(key_states, value_states)`` per layer.

        Args:
            past_key_values: each tensor (batch, num_kv_heads, seq_len, head_dim).
            config: as for the constructor, as are the other arguments.
            residual_length: see the constructor.
            strict: see the constructor.

        Raises:
            TypeError, ValueError: an entry is no pair of such tensors.
        """
        cache = cls(config, residual_length=residual_length, strict=strict)
        for layer_idx, states in enumerate(past_key_values):
            if not isinstance(states, (tuple, list)) or len(states) != 2:
                raise ValueError(
                    "QuantizedInt8Cache.from_legacy_cache: each layer must be a pair (key_states, value_states), "
                    f"got {type(states).__name__} of length {len(states) if hasattr(states, '__len__') else '?'} "
                    f"for layer {layer_idx}."
                )
            cache.update(*states, layer_idx)
        return cache

    @classmethod
    def from_dynamic(
        cls,
        cache: DynamicCache,
        config: PreTrainedConfig | None = None,
        *,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        strict: bool = False,
    ) -> "QuantizedInt8Cache":
        """A cache with the contents of a ``DynamicCache``, which stays as it is and shares no memory with the new one.

        Its full-attention layers are quantised; layers of every other kind are copied.

        Args:
            cache: what to convert.
            config: as for the constructor, as are the other arguments. Needed for hybrid models.
            residual_length: see the constructor.
            strict: see the constructor.

        Raises:
            TypeError: ``cache`` is not a ``DynamicCache``.
            ValueError: the config has another number of layers.
        """
        if not isinstance(cache, DynamicCache) or isinstance(cache, QuantizedInt8Cache):
            raise TypeError(
                f"QuantizedInt8Cache.from_dynamic: cache must be a DynamicCache, got {type(cache).__name__}."
            )
        made = cls(config, residual_length=residual_length, strict=strict)
        if config is not None and len(cache.layers) not in (0, len(made.layers)):
            raise ValueError(
                "QuantizedInt8Cache.from_dynamic: cache must have the layers of the config, "
                f"{len(made.layers)}, got {len(cache.layers)}. Is the config that of another model?"
            )
        empty = made.layers or [made._make.instead_of(layer) for layer in cache.layers]
        made.layers[: len(cache.layers)] = map(conversion.filled, empty, cache.layers)
        return made

    def to_dynamic(self) -> DynamicCache:
        """A ``DynamicCache`` with the restored keys and values, which shares no memory with this one.

        It takes about twice the memory. What was quantised stays rounded; tokens of the tails are exact.
        """
        made = DynamicCache()
        made.layers = [conversion.dense(layer) for layer in self.layers]
        return made

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values: codes, metadata, exact tails, native layers and slack.

        What sequences of the cache share counts once. What it shares with its forks counts in each of them.
        """
        return sum(layer_nbytes(layer) for layer in self.layers)

    def report(self) -> CacheReport:
        """What each layer stores, what that saves against the model's dtype, and by which path it was last read.

        ``print(cache.report())`` shows a table, ``cache.report().plot()`` a figure.

        ``rows_stored`` of a layer below its ``rows_read`` says that sequences share pages.
        """
        layers = [layer_report(layer, layer_idx) for layer_idx, layer in enumerate(self.layers)]
        lost = self._make.policy.lost
        if lost is None and self._was_asked and native.holds_nothing(self.layers):
            lost = "A model asked this cache for the sizes of its masks and stored nothing"
        return CacheReport(layers, lost, PAGE_SIZE + self._make.residual_length)

    def fork(self) -> "QuantizedInt8Cache":
        """A cache with the same tokens that goes on by itself and shares the bytes that are stored.

            question = document.fork()
            model.generate(**inputs, cache=question)

        Closed int8 pages are shared until either of the two changes them, which leaves those of the other as they are,
        and are freed with the last cache that holds them. Exact tails, layers of transformers' own and layers of fixed
        capacity are copied. ``copy.deepcopy`` copies everything.

        Raises:
            ValueError: no token is stored.
        """
        if native.is_empty(self.layers):
            raise ValueError(
                "QuantizedInt8Cache.fork: the cache must hold tokens, got an empty one. "
                "Run the prefix first, or make another cache."
            )
        policy = copy.copy(self._make.policy)
        memo: dict[int, Any] = {id(self._make.policy): policy}
        memo |= {id(layer): layer.fork(policy) for layer in self.layers if isinstance(layer, GrowingInt8Layer)}
        return copy.deepcopy(self, memo)

    def to(self, device: torch.device | str | int) -> "QuantizedInt8Cache":
        """Move all that is stored to a device, byte for byte, and go on there.

            cache.to("cpu")  # in the memory of the machine until it is needed again
            model.generate(**inputs, cache=cache.to(model.device))

        Every layer goes to the one device, also those of a model that is spread over several. Pages that are offloaded
        stay in host memory, unless the device is the CPU. Forks stay where they are: what was shared is copied. Until
        all of it is there, memory is taken on both devices.

        Args:
            device: as torch names it, ``"cpu"`` or ``"cuda:1"`` for example. On ``"meta"`` shapes alone are kept.

        Returns:
            This cache.

        Raises:
            TypeError: ``device`` is no device.
            ValueError: this machine has no such device; what is on ``"meta"`` holds no numbers; or compiled steps read
                and write a cache with ``max_cache_len`` where it is. Nothing is then moved.
        """
        moving.move(self.layers, moving.checked_device(device))
        return self

    def __repr__(self) -> str:
        int8 = [layer for layer in self.layers if isinstance(layer, BaseInt8Layer)]
        native = len(self.layers) - len(int8)
        parts = [f"{len(int8)} int8 layers"] + ([f"{native} native layers"] if native else [])
        seq_len = max((layer.get_seq_length() for layer in int8), default=0)
        return f"QuantizedInt8Cache({', '.join(parts)}, seq_len={seq_len}, nbytes={self.nbytes})"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens of one layer and return what their queries attend to; see ``BaseInt8Layer.update``.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim).
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
            layer_idx: decoder layer, from 0.
            args: passed on to the layer.
            kwargs: passed on to the layer.

        Raises:
            TypeError, ValueError: see ``BaseInt8Layer.update``; the cache is then as it was.
            IndexError: the config has no such layer.
        """
        known = len(self.layers)
        if layer_idx < 0 or (layer_idx >= known and self.layer_class_to_replicate is None):
            raise IndexError(
                f"QuantizedInt8Cache.update: layer_idx must be from 0 to {known - 1}, got {layer_idx}. "
                "Is the config that of another model?"
            )
        if (layer_idx >= known or self.offloading) and torch.compiler.is_compiling():
            return self._update_traced(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= known:
            made = [self._make() for _ in range(known, layer_idx + 1)]
            made[-1].checked(key_states, value_states)  # before the cache has them
            if not known:
                self._begin_at(layer_idx)
            self.layers += made
        if self.offloading:
            native.prefetch_next(self.layers, layer_idx, self.only_non_sliding)
        states: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        if self.offloading:
            self.offload(layer_idx, self.only_non_sliding)
        return states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens of a layer will see."""
        kv_len, kv_offset = super().get_mask_sizes(query_length, layer_idx)
        if not torch.compiler.is_compiling():
            self._was_asked = True
            calls.note_question(self, kv_offset + kv_len - query_length)
        return kv_len, kv_offset

    def _begin_at(self, layer_idx: int) -> None:
        """Take ``layer_idx`` for the first layer, from which the host derives positions and masks of all."""
        if layer_idx:
            raise ValueError(
                "QuantizedInt8Cache.update: without a config the first layer must store tokens first, "
                f"got layer {layer_idx} in a cache of none. Use QuantizedInt8Cache(model.config)."
            )
        if (model := calls.model_given(self)) is not None:
            check_goes_without_config(model.config)
        self.layers = []

    def _update_traced(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """``update`` in a graph of torch.compile, where layers are made, and their pages moved, when it runs."""
        if layer_idx < len(self.layers):
            layer, kwargs["named"] = self.layers[layer_idx], (self._handle, layer_idx)
            states: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return states
        traced.update(self._handle, layer_idx, key_states, value_states)
        return key_states, value_states

    def edit(self, layer_idx: int) -> AbstractContextManager[EditedStates]:
        """Change the stored keys and values of a layer, which are read-only elsewhere.

            with cache.edit(layer_idx) as states:
                states.values[:, :, -1] += steering

        ``states.keys`` and ``states.values`` are ordinary tensors (batch, num_kv_heads, tokens, head_dim) in the
        model's dtype, what was quantised restored. Write into them or assign others of the same shape; the layer takes
        them over when the block ends. Numbers that share a scale with a change, of the keys a channel of a page, of the
        values a token, are then quantised again, within half a step. All others keep their bytes, and the newest
        tokens are exact. In layers of transformers' own all tokens are, with its zeros where a capacity is fixed.

        The layer is restored for it, and nothing is changed if the block raises.

        Args:
            layer_idx: decoder layer, from 0.

        Raises:
            IndexError: there is no such layer.
            NotImplementedError: the layer holds no keys and values, as one of linear attention.
            ValueError: it is empty; or what is left in ``states`` has another shape or is on another device.
            TypeError: or another dtype.
        """
        return edited(self.layers, layer_idx)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to bring the pages of a layer back to its device, beside the work that is queued there."""
        if native.is_offloaded(self.layers[layer_idx], only_non_sliding):
            self.layers[layer_idx].prefetch()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Keep the pages of a layer in host memory alone until they are read again."""
        if native.is_offloaded(self.layers[layer_idx], only_non_sliding):
            self.layers[layer_idx].offload()

    def reset(self) -> None:
        """Forget everything; the cache is then as it was made, and the memory given back."""
        for layer in self.layers:
            native.reset(layer)
        self.input_ids = self.known_ids = self._make.policy.lost = None
        self._was_asked = False
        traced.forget(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every layer; see ``BaseInt8Layer.crop``.

        Args:
            tokens_to_remove: minus the number of tokens. With 0 layers that record their past drop it.

        Raises:
            ValueError: a positive number, more tokens than a layer holds, or a layer that cannot go back; every layer
                is then as it was.
        """
        native.crop(self.layers, int(tokens_to_remove))  # older transformers hand over a tensor
        self._was_asked = False
        if self.input_ids is not None and tokens_to_remove:
            self.input_ids = self.input_ids[:, : self.get_seq_length()]
        if self.known_ids is not None and tokens_to_remove:
            self.known_ids = self.known_ids[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Indices) -> None:
        """Take the sequences ``beam_idx`` (batch,) of the batch in every layer, in that order.

        Raises:
            TypeError, IndexError: no such sequences; every layer is then as it was.
            ValueError: another number of them than a layer of fixed capacity has; likewise.
        """
        native.reorder_rows(self.layers, beam_idx)
        self._select_ids(beam_idx)

    def batch_select_indices(self, indices: Indices) -> None:
        """Keep the sequences ``indices`` (1-D, integers or bool) of the batch in every layer, in that order.

        Raises:
            TypeError, IndexError: no such sequences; every layer is then as it was.
            ValueError: a layer of fixed capacity, which keeps its batch; likewise.
        """
        native.select_rows(self.layers, indices)
        self._select_ids(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times in every layer, copies side by side.

        Raises:
            ValueError: a layer of fixed capacity, which keeps its batch; every layer is then as it was.
        """
        native.repeat_rows(self.layers, repeats)
        if self.input_ids is not None:
            self.input_ids = self.input_ids.repeat_interleave(repeats, dim=0)
        self.known_ids = None

    def _select_ids(self, indices: Indices) -> None:
        if self.input_ids is not None:
            self.input_ids = self.input_ids[as_selection(indices).rows(len(self.input_ids))]
        self.known_ids = None

    def check_prompt(self, input_ids: Tensor) -> None:
        """Refuse a prompt that does not begin with the stored tokens; ``generate`` calls it by itself.

        Only a loaded cache knows its tokens for sure. One that ``generate`` filled warns.

        Args:
            input_ids: int64 (batch, seq_len), the whole prompt, stored tokens included.

        Raises:
            ValueError: it does not begin with them, or holds nothing beyond what is cached.
        """
        prompts.check_prompt(self, input_ids)

    def save(
        self,
        path: PathLike,
        model: PreTrainedModel | None = None,
        input_ids: Tensor | None = None,
        *,
        digest_weights: bool = False,
        on_progress: Progress = no_progress,
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
        save.save(self, path, model, input_ids, digest_weights, on_progress)

    @classmethod
    def load(
        cls,
        path: PathLike,
        model: PreTrainedModel | None = None,
        *,
        config: PreTrainedConfig | None = None,
        device: torch.device | str | None = None,
        max_tokens: int | None = None,
        mmap: bool = False,
        verify: bool | None = None,
        strict: bool = False,
        on_progress: Progress = no_progress,
    ) -> "QuantizedInt8Cache":
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
        return load.load(cls, path, model, config, device, max_tokens, mmap, verify, strict, on_progress)

    def save_pretrained(self, save_directory: PathLike, **options: Any) -> None:
        """``save`` into ``prompt_cache.safetensors`` of a folder, which is made if need be.

        Args:
            save_directory: the folder.
            options: ``model``, ``input_ids`` and the other arguments of ``save``.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save(Path(save_directory) / load.FILE_NAME, **options)

    @classmethod
    def from_pretrained(cls, directory: PathLike, **options: Any) -> "QuantizedInt8Cache":
        """``load`` from ``prompt_cache.safetensors`` of a folder.

        Args:
            directory: the folder.
            options: ``model`` and the other arguments of ``load``.
        """
        return cls.load(Path(directory) / load.FILE_NAME, **options)

    _is_user_defined = given_to_generate(_refuse_one_for_two)
    get_conv_state = _needs_config("get_conv_state")
    update_conv_state = _needs_config("update_conv_state")
    get_recurrent_state = _needs_config("get_recurrent_state")
    update_recurrent_state = _needs_config("update_recurrent_state")
    has_previous_state = _needs_config("has_previous_state")
    update_indexer = _needs_config("update_indexer")
