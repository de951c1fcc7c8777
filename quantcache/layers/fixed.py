"""``StaticInt8Layer``: the layer contract of transformers over ``StaticInt8Pages``, for compiled decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.layers import _host
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.report import LayerReport
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH
from quantcache.store import fixed, traced
from quantcache.store.fixed import StaticInt8Pages, check_room
from quantcache.store.pages import Indices, Pages, Selection, as_selection
from quantcache.store.read_log import FallbackPolicy
from quantcache.store.tensor import RecordedStates
from quantcache.store.view import PagesView

_OFFLOADED: Final = "its pages are offloaded"


def select_rows(layers: Sequence["StaticInt8Layer"], selection: Selection) -> None:
    """``batch_select_indices`` of several layers at once, of all or of none.

    Raises:
        ValueError: see there.
    """
    held = [layer.pages for layer in layers if layer.pages is not None]
    for pages in held:
        if (taken := len(selection.rows(pages.batch_size))) != pages.batch_size:
            raise ValueError(
                "StaticInt8Layer: a cache of fixed capacity keeps its batch of "
                f"{pages.batch_size} sequences, got {taken}. Use QuantizedInt8Cache without max_cache_len."
            )
    fixed.select_rows(held, selection)


@dataclass(eq=False)
class Common:
    """What the layers of one cache share; a compiled step then checks one object a layer.

    Attributes:
        scratch: see ``dispatch.scratch_for``.
        policy: of their cache.
    """

    scratch: Tensor
    policy: FallbackPolicy


CommonByKind = dict[tuple[torch.device, int], Common]
"""By device and v_head_dim, which decide how much scratch there is; layers run in turn."""


class StaticInt8Layer(BaseInt8Layer):
    """Keys and values of one decoder layer in int8, in memory for ``max_cache_len`` tokens.

    A compiled step reads and writes it at fixed addresses with the length in device memory; the time of a read follows
    the tokens there are, not the capacity.

    Args:
        max_cache_len: tokens that fit.
        residual_length: see ``BaseInt8Layer``.
        policy: see ``BaseInt8Layer``.
        commons: what this layer and others of its cache share.
        offloading: whether its cache offloads it after each turn; a compiled step cannot run then.
    """

    pages: StaticInt8Pages | None
    keeps_batch = True
    is_compileable = True
    """Whether a compiled step can run here: kernels are there that read lengths on the device. Asked before each."""

    def __init__(
        self,
        max_cache_len: int,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        policy: FallbackPolicy | None = None,
        commons: CommonByKind | None = None,
        offloading: bool = False,
    ) -> None:
        super().__init__(residual_length, policy)
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise TypeError(f"QuantizedInt8Cache: max_cache_len must be an int, got {type(max_cache_len).__name__}.")
        if max_cache_len < 1:
            raise ValueError(f"QuantizedInt8Cache: max_cache_len must be at least 1 token, got {max_cache_len}.")
        self.max_cache_len = max_cache_len
        self._commons: CommonByKind = {} if commons is None else commons
        self._common: Common | None = None
        self._why_eager = _OFFLOADED if offloading else None
        self.is_compileable = not offloading
        # What was asked for masks since the host last knew the length: no fewer tokens than came. See get_mask_sizes.
        self._at_most = 0

    def __repr__(self) -> str:
        return f"StaticInt8Layer(max_cache_len={self.max_cache_len}, nbytes={self.nbytes})"

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored. Never waits for the device: a compiled step has stored some."""
        return self.pages is None or (not self.pages.is_stale and self.pages.is_empty)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """As transformers' static layer: assisted decoding is not offered it."""
        return False

    @property
    def storage(self) -> str:
        """What the report calls it."""
        return "int8 static"

    @property
    def _padded_len(self) -> int | None:
        """All there is room for, where steps can be compiled; elsewhere the host may leave the mask out."""
        return self.max_cache_len if self.is_compileable else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_addresses()

    def _new_pages(self, key_states: Tensor, value_states: Tensor) -> StaticInt8Pages:
        return StaticInt8Pages(key_states, value_states, self.max_cache_len, self.residual_length)

    def _pages_for(self, key_states: Tensor, value_states: Tensor) -> StaticInt8Pages:
        check_room(self.max_cache_len, key_states.shape[2])
        # After a reset other sequences may come, for which there is other memory and another compilation.
        have = self.pages
        return (
            have
            if have is not None and have.is_for(key_states, value_states)
            else self._new_pages(key_states, value_states)
        )

    def _hold(self, pages: Pages, key_states: Tensor) -> None:
        assert isinstance(pages, StaticInt8Pages)
        if pages is not self.pages:
            tails = pages.buffers.key_tail, pages.buffers.value_tail
            kind = pages.device, tails[1].shape[3]
            common = self._commons.get(kind) or Common(dispatch.scratch_for(*tails), self.read_log.policy)
            why_eager = _OFFLOADED if self._why_eager == _OFFLOADED else dispatch.why_not_recorded(*tails)
            super()._hold(pages, key_states)
            self._common = self._commons[kind] = common
            self._why_eager, self.is_compileable = why_eager, why_eager is None
            self._mark_addresses()
        self._at_most = pages.seq_len

    def _mark_addresses(self) -> None:
        """Tell torch that the memory stays where it is, without which a step that writes it cannot be a CUDA graph."""
        if self.pages is None or self._common is None or torch.compiler.is_compiling():
            return
        if self.pages.keeps_addresses:
            for tensor in (self.pages.memory, self._common.scratch):
                _host.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens and return the keys and values that their queries attend to; see ``BaseInt8Layer.update``.

        Raises:
            TypeError, ValueError: see ``check_states``; or there is no room. The layer is then as it was. A compiled
                step cannot raise; ``get_mask_sizes`` does, which ``generate()`` asks before each.
        """
        if torch.compiler.is_compiling():
            wants_gradient = traced.wants_gradient(key_states, value_states)
            if self.pages is None or not self.pages.keeps_addresses or wants_gradient:
                return self._update_traced(key_states, value_states, self.pages is None, kwargs.get("named"))
            # Through the class, for an instance would have to be checked for methods of its own.
            return StaticInt8Layer._update_recorded(self, key_states, value_states)
        states = super().update(key_states, value_states)
        assert self.pages is not None
        self._at_most = self.pages.seq_len
        return states

    def _states(self, view: PagesView) -> tuple[Tensor, Tensor]:
        view.capacity = self._padded_len
        return super()._states(view)

    def _update_recorded(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        pages, common = self.pages, self._common
        assert pages is not None
        assert common is not None
        layout = pages.layout.constant()
        parts = pages.memory, common.scratch, *StaticInt8Pages.append_recorded(pages, key_states, value_states)
        on_restore = "raise" if common.policy.strict else "quiet" if common.policy.warned else "warn"
        kind: Any = {"shape_of_memory": layout.shape, "dtype": layout.dtype, "on_restore": on_restore}
        return RecordedStates(*parts, **kind, is_key=True), RecordedStates(*parts, **kind, is_key=False)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens will see, see ``_padded_len``.

        Raises:
            ValueError: they do not fit. ``generate()`` asks before each step, compiled or not.
        """
        if torch.compiler.is_compiling():
            return (query_length if self.pages is None else self.max_cache_len), 0
        if self._at_most + query_length > self.max_cache_len:
            # The host may ask twice before one step.
            self._at_most = 0 if self.pages is None else self.pages.seq_len
        check_room(self.max_cache_len, query_length, self._at_most)
        self._at_most += query_length
        if self.pages is None or self.is_empty:
            return query_length, 0
        return self._padded_len or self.pages.seq_len + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored; on the device, int32 (), where the host would have to wait for the number."""
        if self.pages is None:
            return 0
        if torch.compiler.is_compiling():
            seq_len = self.pages.device_seq_len
            hidden = torch.is_grad_enabled() or not self.pages.keeps_addresses  # whatever changes it in this graph
            taken = traced.length(self._handle, seq_len) if hidden and not traced.is_exporting() else seq_len
            return taken  # type: ignore[return-value]
        if self.pages.is_stale:
            return self.pages.device_seq_len  # type: ignore[return-value]
        return self.pages.seq_len

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget every token and keep the memory, at the addresses that compiled steps know."""
        if self.pages is not None:
            self.pages.reset()
        self._at_most = 0
        traced.forget(self)

    def offload(self) -> None:
        """See ``BaseInt8Layer.offload``. Steps that ``generate()`` compiles need the memory to stay; none runs then."""
        super().offload()
        if self.pages is not None and not self.pages.keeps_addresses:
            self._why_eager, self.is_compileable = _OFFLOADED, False

    def check_crop(self, tokens_to_remove: int) -> None:
        """See ``BaseInt8Layer.check_crop``."""
        if self.pages is not None:
            self.pages.synchronize()
        super().check_crop(tokens_to_remove)

    def batch_select_indices(self, indices: Indices) -> None:
        """Take as many sequences ``indices`` (1-D, integers) of the batch as there are, in that order.

        Raises:
            ValueError: another number of sequences; addresses and shapes are fixed.
        """
        select_rows([self], as_selection(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused but for 1, which changes nothing: the batch is fixed."""
        if self.pages is not None:
            self.batch_select_indices(Selection.repeating(self.pages.batch_size, repeats))

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, in other memory, which no step that was recorded before knows."""
        if self.pages is not None and not self.is_empty:
            self.take_over(self.pages.repeated(repeats))

    def report(self, layer_idx: int) -> LayerReport:
        """This layer's row of the cache's report."""
        if self.pages is not None:
            self.pages.synchronize()  # tells what recorded steps did
        storage, kernel = "empty" if self.is_empty else self.storage, self.read_log.kernel
        reason = self.read_log.reason or (self._why_eager and f"not compiled: {self._why_eager}")
        if self.pages is not None and self.pages.was_recorded:
            kernel = f"{self.pages.backend[0]}, compiled"
        return self._report_as(layer_idx, storage, kernel, reason)

    def _exact_tokens(self) -> int:
        """Tokens for which transformers' own layer would have room."""
        return 0 if self.pages is None else self.pages.capacity
