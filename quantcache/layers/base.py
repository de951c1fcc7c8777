"""``BaseInt8Layer``: the layer contract of transformers over the store, which every int8 layer keeps."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from quantcache.layers.report import LayerReport
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, MAX_RESIDUAL_LENGTH
from quantcache.store import reads, traced
from quantcache.store.offloading import copy_stream
from quantcache.store.pages import Indices, Pages
from quantcache.store.read_log import FallbackPolicy, ReadLog
from quantcache.store.tensor import Int8Tensor, autocast_to
from quantcache.store.view import PagesView


def check_states(key_states: Tensor, value_states: Tensor, held: "BaseInt8Layer | None" = None) -> None:
    """Refuse keys and values that no layer, or not the layer ``held``, can store.

    Raises:
        TypeError: not tensors, not floating point, or of another dtype than the layer holds.
        ValueError: shapes or devices that do not fit each other or the layer.
    """
    place = "Int8Layer.update"
    for name, states in (("key_states", key_states), ("value_states", value_states)):
        if not isinstance(states, Tensor):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(states).__name__}.")
        if not states.is_floating_point() or states.element_size() == 1:
            raise TypeError(f"{place}: {name} must be float16, bfloat16, float32 or float64, got {states.dtype}.")
        if states.dim() != 4:
            raise ValueError(
                f"{place}: {name} must be (batch, num_kv_heads, query_len, head_dim), got {tuple(states.shape)}."
            )
    if key_states.shape[:3] != value_states.shape[:3]:
        raise ValueError(
            f"{place}: key_states and value_states must agree in batch, num_kv_heads and query_len, "
            f"got {tuple(key_states.shape)} and {tuple(value_states.shape)}."
        )
    if key_states.dtype != value_states.dtype:
        raise TypeError(
            f"{place}: key_states and value_states must have one dtype, "
            f"got {key_states.dtype} and {value_states.dtype}."
        )
    if key_states.device != value_states.device:
        raise ValueError(
            f"{place}: key_states and value_states must be on one device, "
            f"got {key_states.device} and {value_states.device}."
        )
    if 0 in (*key_states.shape[:2], key_states.shape[3], value_states.shape[3]):
        raise ValueError(
            f"{place}: batch, num_kv_heads and head_dim must be at least 1, "
            f"got {tuple(key_states.shape)} and {tuple(value_states.shape)}."
        )
    if held is None or held.pages is None or held.is_empty:
        return
    if key_states.device != held.device:
        raise ValueError(f"{place}: key_states must be on the layer's device, {held.device}, got {key_states.device}.")
    for name, states, stored in (
        ("key_states", key_states, held.pages.key_tail),
        ("value_states", value_states, held.pages.value_tail),
    ):
        if states.dtype != stored.dtype:
            raise TypeError(f"{place}: {name} must have the dtype the layer holds, {stored.dtype}, got {states.dtype}.")
        for axis, word in ((0, "batch"), (1, "num_kv_heads"), (3, "head_dim")):
            if states.shape[axis] != stored.shape[axis]:
                repeats, rest = divmod(states.shape[axis], stored.shape[axis])
                go_on = f"batch_repeat_interleave({repeats}) to continue each stored sequence {repeats} times, or "
                if held.keeps_batch:
                    go_on = f"a cache without max_cache_len for {go_on}"
                raise ValueError(
                    f"{place}: {name} must have the {word} the layer holds, {stored.shape[axis]}, "
                    f"got {states.shape[axis]}. Use {go_on if axis == 0 and not rest else ''}reset() for new sequences."
                )


def assignment_error(name: str) -> NotImplementedError:
    """What someone gets who would put other states in the place of those stored."""
    return NotImplementedError(
        f"Int8Layer.{name}: cached states are read-only, got an assignment. Change tokens that are stored within "
        "`with cache.edit(layer_idx) as states:`; for other tokens, as after pruning, make a DynamicCache with "
        "cache.to_dynamic() and a new cache with QuantizedInt8Cache.from_dynamic()."
    )


class BaseInt8Layer(CacheLayerMixin, ABC):
    """Keys and values of one decoder layer in int8.

    It derives from ``CacheLayerMixin`` for its type alone: every method is defined here and no storage inherited.

    Args:
        residual_length: newer tokens that must exist before a page is quantised, at least 0.
        policy: what to do about slow reads, shared by the layers of one cache.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = True
    keeps_batch = False
    """Whether the number of sequences stays what it was at first."""
    pages: Pages | None
    """What is stored; None before the first tokens."""

    def __init__(self, residual_length: int = DEFAULT_RESIDUAL_LENGTH, policy: FallbackPolicy | None = None) -> None:
        # Not super().__init__(): it would assign keys and values, which are views of the pages here.
        if isinstance(residual_length, bool) or not isinstance(residual_length, int):
            raise TypeError(
                f"QuantizedInt8Cache: residual_length must be an int, got {type(residual_length).__name__}."
            )
        if residual_length < 0:
            raise ValueError(f"QuantizedInt8Cache: residual_length must be at least 0, got {residual_length}.")
        if residual_length > MAX_RESIDUAL_LENGTH:
            raise ValueError(
                f"QuantizedInt8Cache: residual_length must be at most {MAX_RESIDUAL_LENGTH}, got {residual_length}."
            )
        self.residual_length = residual_length
        self.read_log = ReadLog(policy or FallbackPolicy())
        self.pages = None
        self.is_initialized = False
        self._accepted: tuple[object, ...] = ()
        self._cut_gradients = False
        self._handle = traced.handle_for(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handle = traced.handle_for(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seq_len={self.get_seq_length()}, nbytes={self.nbytes})"

    if not TYPE_CHECKING:  # mypy would take every name for one that exists

        def __getattr__(self, name: str) -> Any:
            """Tell a model that asks a layer for more than keys and values what kind of layer this is.

            Raises:
                AttributeError: always.
            """
            raise AttributeError(
                f"{type(self).__name__}.{name}: an int8 layer holds keys and values alone, and has no {name}. A model "
                "that asks for it needs a cache made from its config: QuantizedInt8Cache(model.config).",
                name=name,
                obj=self,
            )

    @property
    def _padded_len(self) -> int | None:
        """Tokens of the shape that readers see, zeros behind those there are; None: those there are."""
        return None

    @property
    @abstractmethod
    def storage(self) -> str:
        """What the report calls it."""

    @abstractmethod
    def _new_pages(self, key_states: Tensor, value_states: Tensor) -> Pages:
        """Empty pages for states like these, nothing of which is stored."""

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored."""
        return self.pages is None or self.pages.is_empty

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether a short rollback leaves no trace: always, up to ``residual_length`` tokens."""
        return self.residual_length > 0

    @property
    def keys(self) -> Tensor | None:
        """What attention would read, a read-only ``Int8Tensor``; ``QuantizedInt8Cache.edit`` changes it."""
        return None if self.pages is None else self._stored(self.pages)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        raise assignment_error("keys")

    @property
    def values(self) -> Tensor | None:
        """As ``keys``."""
        return None if self.pages is None else self._stored(self.pages)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        raise assignment_error("values")

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return 0 if self.pages is None else self.pages.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first states; nothing is stored of them."""
        self._hold(self._new_pages(key_states, value_states), key_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens and return the keys and values that their queries attend to.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim), floating point, any strides.
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
            args: ignored, as the host passes more than is needed.
            kwargs: ignored likewise.

        Returns:
            The arguments themselves for an empty layer, plain exact tensors while no page is closed, a pair of
            ``Int8Tensor`` from then on. Where gradients to the new tokens are wanted, dense tensors that carry them;
            earlier tokens are constants.

        Raises:
            TypeError, ValueError: see ``check_states``; the layer is then as it was.
        """
        key_states, value_states = self.checked(key_states, value_states)
        wants_gradient = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self.is_empty:
            pages = self._pages_for(key_states, value_states)
            pages.append(key_states, value_states)
            self._hold(pages, key_states)
            self._cut_gradients = wants_gradient
            self.read_log.ran("exact")
            return key_states, value_states
        assert self.pages is not None
        num_pages = self.pages.num_pages
        if wants_gradient and (num_pages or self._cut_gradients):
            self.read_log.cut_gradients("restored" if num_pages else "exact")
        dense = None
        # Exact states, too, as a backward pass may need them when later tokens are in the memory of the tail.
        if wants_gradient or (torch.is_grad_enabled() and not num_pages):
            # Before they are stored: what fails then has stored nothing.
            keys, values = reads.restore_both(self.pages.view())
            missing = max(0, (self._padded_len or 0) - keys.shape[2] - key_states.shape[2])
            dense = _joined(keys, key_states, missing), _joined(values, value_states, missing)
        view = self.pages.append(key_states, value_states)
        if num_pages == 0 and not (wants_gradient and self._cut_gradients):
            self.read_log.ran("exact")
        self._cut_gradients |= wants_gradient
        states = self._states(view)
        return dense if dense and (wants_gradient or view.is_exact) else states

    def _update_traced(
        self, key_states: Tensor, value_states: Tensor, is_empty: bool, named: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``update`` in a graph of torch.compile that looks at no length: it is called when the graph runs.

        Args:
            key_states: see ``update``.
            value_states: likewise.
            is_empty: whether the layer is.
            named: handle of its cache and its place there, if the cache is to be called.
        """
        named = named or (self._handle, traced.ITSELF)
        if key_states.dtype != value_states.dtype:  # as in checked
            kind = key_states.device.type
            held = torch.get_autocast_dtype(kind) if self.pages is None else self.dtype
            key_states, value_states = autocast_to(held, key_states), autocast_to(held, value_states)
        wants_gradient = traced.wants_gradient(key_states, value_states)
        kv_len, _ = self.get_mask_sizes(key_states.shape[2])
        traced.update(*named, key_states, value_states, wants_gradient)
        if is_empty:
            return key_states, value_states
        states = traced.newest(*named, kv_len, key_states, value_states)
        if wants_gradient:
            keys, values = map(traced.with_gradient, states, (key_states, value_states))
            return keys, values
        return states

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return 0 if self.pages is None else self.pages.seq_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Up to ``residual_length`` tokens nothing else changes. Beyond that the page they lie in is reopened: its other
        tokens keep their restored values and gain one more half-scale of error when the page fills again.

        Args:
            tokens_to_remove: minus the number of tokens, as the host's ``crop`` takes it; 0 changes nothing.

        Raises:
            ValueError: a positive number, or more tokens than there are; the layer is then as it was.
        """
        tokens_to_remove = int(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        if tokens_to_remove and self.pages is not None:
            self.pages.crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what ``crop`` would raise, and do nothing else."""
        if tokens_to_remove > 0:
            raise ValueError(
                "Int8Layer.crop: tokens_to_remove must be zero or negative, "
                f"got {tokens_to_remove}. Use -{tokens_to_remove} to remove the newest {tokens_to_remove} tokens."
            )
        if self.is_initialized and -tokens_to_remove > self.get_seq_length():
            raise ValueError(
                f"Int8Layer.crop: at most the {self.get_seq_length()} tokens stored can be removed, "
                f"got {-tokens_to_remove}."
            )

    def reorder_cache(self, beam_idx: Indices) -> None:
        """Take the sequences ``beam_idx`` (batch,) of the batch, in that order, byte for byte."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Indices) -> None:
        """Keep the sequences ``indices`` (1-D, integers or bool) of the batch, in that order."""
        if self.pages is not None and not self.is_empty:
            batch = self.pages.batch_size
            self.pages.index_select(indices)
            if self.pages.batch_size != batch:
                self._accepted = ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times, copies side by side."""
        if self.pages is not None and not self.is_empty:
            self.pages.repeat_interleave(repeats)
            self._accepted = ()

    def offload(self) -> None:
        """Keep the closed pages in host memory alone; whatever reads them next brings them back. No-op on a CPU."""
        if self.pages is not None and self.pages.device.type != "cpu":
            self.pages.offload()

    def prefetch(self) -> None:
        """Begin to bring offloaded pages back to the layer's device, beside the work queued there."""
        if self.pages is not None:
            self.pages.fetch(copy_stream(self.pages.device))

    def take_over(self, pages: Pages) -> None:
        """Go on with other pages, which hold what those of this layer hold, on another device."""
        self._hold(pages, pages.key_tail)
        self._accepted = ()

    def report(self, layer_idx: int) -> LayerReport:
        """This layer's row of the cache's report."""
        storage, kernel = self.storage if self.get_seq_length() else "empty", self.read_log.kernel
        return self._report_as(layer_idx, storage, kernel, self.read_log.reason)

    def _report_as(self, layer_idx: int, storage: str, kernel: str, reason: str | None) -> LayerReport:
        if self.pages is None:
            return LayerReport(layer_idx, storage, 0, 0, kernel, reason)
        storage += ", in host memory" if self.pages.is_offloaded else ""
        keys, values = self.pages.key_tail, self.pages.value_tail
        token_nbytes = (keys.shape[3] + values.shape[3]) * self.pages.batch_size * keys.shape[1] * keys.element_size()
        return LayerReport(
            layer_idx=layer_idx,
            storage=storage,
            seq_len=self.pages.seq_len,
            nbytes=self.nbytes,
            kernel=kernel,
            reason=reason,
            rows_stored=self.pages.rows_stored,
            rows_read=self.pages.batch_size * self.pages.num_pages,
            dtype=str(keys.dtype).removeprefix("torch."),
            exact_nbytes=self._exact_tokens() * token_nbytes,
        )

    def _exact_tokens(self) -> int:
        """Tokens that transformers' own layer would hold in the place of this one."""
        return self.get_seq_length()

    def _pages_for(self, key_states: Tensor, value_states: Tensor) -> Pages:
        """What the first tokens go to."""
        return self._new_pages(key_states, value_states)

    def _hold(self, pages: Pages, key_states: Tensor) -> None:
        """Store what comes in ``pages`` from now on."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pages, self.is_initialized = pages, True

    def checked(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The states as ``update`` stores them, or ``check_states`` raises.

        What a decode step hands over is like what the last one did, and passes without (8 us a layer).
        """
        signature: tuple[object, ...] = ()
        if isinstance(key_states, Tensor) and isinstance(value_states, Tensor):
            signature = (
                *(key_states.shape, key_states.dtype, key_states.device),
                *(value_states.shape, value_states.dtype, value_states.device),
            )
            if signature == self._accepted:
                return key_states, value_states
            if key_states.dtype != value_states.dtype and torch.is_autocast_enabled(key_states.device.type):
                # Rotated keys come in float32 then. Attention will bring both to autocast's dtype.
                pages, kind = self.pages, key_states.device.type
                held = torch.get_autocast_dtype(kind) if pages is None else pages.key_tail.dtype
                return self.checked(autocast_to(held, key_states), autocast_to(held, value_states))
        check_states(key_states, value_states, self)
        self._accepted = signature
        return key_states, value_states

    def _stored(self, pages: Pages) -> tuple[Tensor, Tensor]:
        """What attention would read of all that is stored."""
        return Int8Tensor.pair(pages.view(), self.read_log)

    def _states(self, view: PagesView) -> tuple[Tensor, Tensor]:
        """What attention gets of a view."""
        return (view.key_tail, view.value_tail) if view.is_exact else Int8Tensor.pair(view, self.read_log)


def _joined(dense: Tensor, new_states: Tensor, missing: int) -> Tensor:
    """Dense states, new ones behind them and then zeros for ``missing`` tokens."""
    return torch.nn.functional.pad(torch.cat([dense, new_states], dim=2), (0, 0, 0, missing))
