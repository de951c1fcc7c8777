"""``StaticInt8Pages``: the bytes of one layer of a fixed capacity, with its lengths in device memory.

Every address stays what it is, so a compiled step and a CUDA graph can run on them. The host counts along while it
makes the steps itself; after compiled ones it has to ask the device.
"""

from typing import Any

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE
from quantcache.store import fixed_ops, ops
from quantcache.store.fixed_ops import PAGES, SEQ_LEN, TAIL_LEN, NewerTail, Sizes, layout_for
from quantcache.store.segments import ClosedPages, PagesView


def check_room(capacity: int, new_tokens: int, seq_len: int = 0) -> None:
    """Refuse more tokens than fit.

    Raises:
        ValueError: ``seq_len + new_tokens`` is more than ``capacity``; nothing has changed.
    """
    if seq_len + new_tokens > capacity:
        raise ValueError(
            f"QuantizedInt8Cache: at most max_cache_len={capacity} tokens fit, got {new_tokens} more behind {seq_len}. "
            "Make a cache with a larger max_cache_len, or call reset() for new sequences."
        )


class StaticInt8Pages:
    """The keys and values of one layer: int8 pages and an exact tail, in memory allocated once.

    A page is closed with the first call after ``residual_length`` newer tokens exist, or by the call that brings them
    if it brings more than one token; the codes are those of ``Int8Pages``.

    Args:
        key_states: (batch, num_kv_heads, any, head_dim); fixes shapes, dtype and device, nothing is stored of it.
        value_states: (batch, num_kv_heads, any, v_head_dim).
        capacity: tokens that fit.
        residual_length: newer tokens that a page waits for, at least 0.
    """

    def __init__(
        self,
        key_states: Tensor,
        value_states: Tensor,
        capacity: int,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
    ) -> None:
        self.layout = layout_for(_sizes(capacity, residual_length, key_states, value_states), key_states.dtype)
        self.memory = self.layout.allocate(key_states.device)
        self.store = self.layout.unpack(self.memory)
        self.is_stale = False
        """Whether compiled steps ran since the host last knew the lengths."""
        self.was_compiled = False
        """Whether the last step that the host knows of was a compiled one."""
        self._pages = self._tail_len = 0

    def __getstate__(self) -> dict[str, Any]:
        """The memory, and not once more the parts that share it."""
        return {name: value for name, value in vars(self).items() if name != "store"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layout = layout_for(self.layout.sizes, self.layout.dtype)  # a copy would not be the one that is shared
        self.store = self.layout.unpack(self.memory)

    def is_for(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the memory is that of states of this batch, these heads and head_dims, dtype and device."""
        sizes = _sizes(self.capacity, self.residual_length, key_states, value_states)
        have = self.layout.sizes, self.layout.dtype, self.device
        return have == (sizes, key_states.dtype, key_states.device)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.layout.sizes.capacity

    @property
    def residual_length(self) -> int:
        """Newer tokens that a page waits for."""
        return self.layout.sizes.residual_length

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.memory.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self.layout.sizes.batch

    @property
    def backend(self) -> str:
        """What ``dispatch.backend_for`` the states names."""
        return dispatch.backend_for(self.store.key_tail, self.store.value_tail)[0]

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.memory.device

    @property
    def seq_len(self) -> int:
        """Tokens stored. Waits for the device after compiled steps."""
        self.synchronize()
        return self._pages * PAGE_SIZE + self._tail_len

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored."""
        return self.seq_len == 0

    @property
    def num_pages(self) -> int:
        """Closed pages."""
        self.synchronize()
        return self._pages

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        self.synchronize()
        return self.store.key_tail[:, :, : self._tail_len]

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        self.synchronize()
        return self.store.value_tail[:, :, : self._tail_len]

    @property
    def device_seq_len(self) -> Tensor:
        """Tokens stored, int32 () on the device; sees every later step."""
        # A compiled step takes the memory alone, not parts of it too.
        store = self.layout.unpack(self.memory) if torch.compiler.is_compiling() else self.store
        return store.lengths[SEQ_LEN]

    def synchronize(self) -> None:
        """Learn the lengths from the device, if compiled steps have changed them.

        Raises:
            RuntimeError: compiled steps were given more tokens than fit. They read and wrote nothing out of bounds, but
                the tokens that did not fit are lost.
        """
        if not self.is_stale:
            return
        lengths = self.store.lengths.tolist()
        if lengths[SEQ_LEN] > self.capacity:
            raise RuntimeError(
                f"QuantizedInt8Cache: at most max_cache_len={self.capacity} tokens fit, compiled steps were given "
                f"{lengths[SEQ_LEN]}. What was generated beyond is not to be trusted. Make a cache with a larger "
                "max_cache_len, or call reset()."
            )
        self._pages, self._tail_len = lengths[PAGES], lengths[TAIL_LEN]
        self.is_stale, self.was_compiled = False, True

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[PagesView, NewerTail | None]:
        """Store new tokens and return what their queries read: as a view, or in the memory with other tokens as tail.

        In both the new tokens are exact. The tail of the view of an empty layer is the arguments themselves.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim), shapes, dtype and device as at construction.
            value_states: (batch, num_kv_heads, query_len, v_head_dim).

        Raises:
            ValueError: see ``check_room``.
        """
        new_tokens = key_states.shape[2]
        check_room(self.capacity, new_tokens, self.seq_len)
        self.was_compiled = False
        key_states, value_states = key_states.detach(), value_states.detach()
        self.close_due_pages()
        store, pages = self.store, self._pages
        if new_tokens == 1:
            fixed_ops.append(key_states, value_states, self.memory, self.layout)
            self._tail_len += 1
            return self.view(), None
        if not self._tail_len:
            key_tail, value_tail = key_states, value_states
        else:
            key_tail, value_tail = (
                torch.cat([tail[:, :, : self._tail_len], states], dim=2)
                for tail, states in ((store.key_tail, key_states), (store.value_tail, value_states))
            )
        newer = NewerTail(key_tail, value_tail, _with_new(store.lengths, new_tokens))
        fixed_ops.store_tokens(newer, self.memory, self.layout)
        closed = max(0, (key_tail.shape[2] - self.residual_length) // PAGE_SIZE)
        self._pages, self._tail_len = pages + closed, key_tail.shape[2] - closed * PAGE_SIZE
        return self._view(pages, key_tail, value_tail), newer

    def append_compiled(self, key_states: Tensor, value_states: Tensor) -> NewerTail | None:
        """``append`` for a step that is being compiled: nothing is asked of the device, and no room is checked."""
        self.is_stale = True
        memory, layout, new_tokens = self.memory, self.layout, key_states.shape[2]
        if new_tokens == 1:
            fixed_ops.append(key_states, value_states, memory, layout)
            return None
        fixed_ops.append(key_states[:, :, :0], value_states[:, :, :0], memory, layout)
        store = layout.unpack(memory)
        places = store.lengths[TAIL_LEN] + torch.arange(new_tokens, device=memory.device)
        key_tail, value_tail = (
            torch.nn.functional.pad(tail, (0, 0, 0, new_tokens)).index_copy(2, places, states)
            for tail, states in ((store.key_tail, key_states), (store.value_tail, value_states))
        )
        newer = NewerTail(key_tail, value_tail, _with_new(store.lengths, new_tokens))
        fixed_ops.store_tokens(newer, memory, layout)
        return newer

    def close_due_pages(self) -> None:
        """Quantise a page that has as many newer tokens as it waits for, as the next step would."""
        self.synchronize()
        if self._tail_len >= PAGE_SIZE + self.residual_length:
            none = self.store.key_tail[:, :, :0], self.store.value_tail[:, :, :0]
            fixed_ops.append(*none, self.memory, self.layout)
            self._pages, self._tail_len = self._pages + 1, self._tail_len - PAGE_SIZE

    def view(self) -> PagesView:
        """All tokens stored, for reading."""
        return self._view(self.num_pages, self.key_tail, self.value_tail)

    def stored(self) -> PagesView:
        """As ``view``, once the pages that are due are closed. For copying."""
        self.close_due_pages()
        return self.view()

    def restore(self) -> tuple[Tensor, Tensor]:
        """Keys and values, dense, in the model's dtype; see ``PagesView``."""
        self.close_due_pages()
        view = self.view()
        return view.restore_keys(), view.restore_values()

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        self.store.lengths.zero_()
        self._pages = self._tail_len = 0
        self.is_stale = self.was_compiled = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; see ``Int8Pages.crop``."""
        self.close_due_pages()
        pages, rest = divmod(self.seq_len - tokens_to_remove, PAGE_SIZE)
        if pages < self._pages:
            reopened = self.store.pages.narrow(pages, pages + 1)
            none = self.store.key_tail[:, :, :0], self.store.value_tail[:, :, :0]
            view = PagesView(ClosedPages((reopened,)), *none)
            states = view.restore_keys()[:, :, :rest], view.restore_values()[:, :, :rest]
            ops.append_tail(*states, self.store.key_tail, self.store.value_tail, 0)
            self._pages, self._tail_len = pages, rest
        else:
            self._tail_len = pages * PAGE_SIZE + rest - self._pages * PAGE_SIZE
        self.store.lengths.copy_(self._lengths_on_host())

    def index_select(self, indices: Tensor) -> None:
        """Take as many sequences ``indices`` (1-D, int64) of the batch as there are, in that order, byte for byte."""
        indices = indices.to(self.device)
        for part in self.store.pages:
            part.copy_(part[:, indices])
        for tail in self.store[4:6]:
            tail.copy_(tail[indices])

    def _view(self, pages: int, key_tail: Tensor, value_tail: Tensor) -> PagesView:
        segments = (self.store.pages.narrow(0, pages),) if pages else ()
        return PagesView(ClosedPages(segments), key_tail, value_tail)

    def _lengths_on_host(self) -> Tensor:
        seq_len = self._pages * PAGE_SIZE + self._tail_len
        return torch.tensor([self._pages, self._tail_len, seq_len, 0], dtype=torch.int32)


def _sizes(capacity: int, residual_length: int, key_states: Tensor, value_states: Tensor) -> Sizes:
    batch, num_kv_heads, _, head_dim = key_states.shape
    return Sizes(capacity, residual_length, batch, num_kv_heads, head_dim, value_states.shape[3])


def _with_new(lengths: Tensor, new_tokens: int) -> Tensor:
    """The lengths if ``new_tokens`` were part of the tail, on the device."""
    lengths = lengths.clone()
    lengths[TAIL_LEN : SEQ_LEN + 1] += new_tokens
    return lengths
