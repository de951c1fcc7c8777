"""What a backend offers, and what it is given: the interfaces between the store and the kernels."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from quantcache.quantization.options import AttentionOptions


class SegmentLike(Protocol):
    """Closed pages that lie together; see ``store.segments.Segment``."""

    @property
    def key_qdata(self) -> Tensor:
        """int8 (pages, rows, num_kv_heads, page_size, head_dim)."""

    @property
    def key_metadata(self) -> Tensor:
        """int16 (pages, rows, num_kv_heads, head_dim, 2)."""

    @property
    def value_qdata(self) -> Tensor:
        """int8 (pages, rows, num_kv_heads, page_size, v_head_dim)."""

    @property
    def value_metadata(self) -> Tensor:
        """int16 (pages, rows, num_kv_heads, page_size, 2)."""

    @property
    def memo(self) -> dict[object, Any]:
        """What backends found out about it."""

    def narrow(self, start: int, stop: int | None) -> "SegmentLike":
        """The pages ``start`` to ``stop``, sharing memory."""


class View(Protocol):
    """What one call reads; see ``store.view.PagesView``."""

    pending: tuple[Tensor, Tensor] | None
    """The newest keys and values, the last of the ``tail_len`` tokens, where they are not in the buffers yet."""

    @property
    def segments(self) -> Sequence[SegmentLike]:
        """The closed pages; with ``lengths`` the first of them count."""

    @property
    def num_pages(self) -> int:
        """Pages in all segments."""

    @property
    def row_table(self) -> Tensor | None:
        """int32 (batch, num_pages), the stored row that each sequence reads a page from; None: its own."""

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Exact keys and values, (batch, num_kv_heads, at least tail_len, head_dim)."""

    @property
    def tail_len(self) -> int:
        """Tokens of the buffers that count, unless ``lengths`` says."""

    @property
    def lengths(self) -> Tensor | None:
        """int32 (2 or more,) on the device: pages and tail_len in use, read when a kernel runs; None: the host's."""

    @property
    def scratch(self) -> Tensor | None:
        """Memory for a call that is recorded; see ``Backend.make_scratch``."""

    def on_host(self) -> "View":
        """The same with lengths that the host knows; waits for the device."""

    @property
    def may_share(self) -> bool:
        """Whether neighbouring sequences may read one row of the table; if not, looking for it is in vain."""

    @property
    def memo(self) -> dict[object, Any]:
        """What backends found out about the segments; lives as long as they do not change."""


class Buffers(Protocol):
    """The parts of a layer of fixed capacity; see ``store.buffer.FixedBuffers``."""

    @property
    def pages(self) -> SegmentLike:
        """All pages that there is room for."""

    @property
    def key_tail(self) -> Tensor:
        """(batch, num_kv_heads, tail capacity, head_dim)."""

    @property
    def value_tail(self) -> Tensor:
        """(batch, num_kv_heads, tail capacity, v_head_dim)."""

    @property
    def lengths(self) -> Tensor:
        """int32 (4,): closed pages, tokens in the tail, tokens in all, and a counter that kernels leave zero."""

    @property
    def newest(self) -> Tensor:
        """uint8 (bytes,): the tails and the lengths as they lie in memory."""

    def like_newest(self) -> "Buffers":
        """Tails and lengths in memory of their own, uninitialised."""


Source = tuple[Tensor, Tensor, Tensor]
"""Keys, values (batch, num_kv_heads, any, head_dim) and int32 lengths with these tokens as the tail."""


class Backend(Protocol):
    """What a module in ``backends/`` offers. ``store.writes`` and ``store.reads`` say what each operation promises."""

    WRITES_ON_READ: bool
    """Whether ``attention`` writes pending tokens in the launch that reads them; elsewhere they are written first."""

    READS_ROW_TABLE: bool
    """Whether it follows a view's row table; elsewhere the pages are put in order before."""

    READS_LENGTHS: bool
    """Whether lengths in device memory are read by its kernels; elsewhere the host waits for them."""

    def store_pages(self, key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
        """Quantise whole pages."""

    def append_tail(
        self, key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int
    ) -> None:
        """Write new tokens into the tail."""

    def advance(
        self, source: Source | None, key_states: Tensor, value_states: Tensor, buffers: Buffers, residual_length: int
    ) -> None:
        """Close pages, append tokens and move the lengths of a layer of fixed capacity."""

    def restore(self, view: View, is_key: bool) -> Tensor:
        """Dense keys or values."""
        ...

    def attention(self, query: Tensor, view: View, options: AttentionOptions) -> Tensor:
        """Attention over pages and tail, the pending tokens included, which are in the buffers afterwards."""
        ...

    def kernel_of(self, query: Tensor, view: View) -> str:
        """What ``attention`` reads such a call by, for reports: the backend's name, and of several kernels which."""
        ...

    def make_scratch(self, device: Any, v_head_dim: int) -> Tensor:
        """Memory that recorded calls of ``attention`` need besides the layer, zeroed; for layers that run in turn."""
        ...

    def unsupported(self, *states: Tensor) -> str | None:
        """Why it does not cover operations on such states, or None."""
        ...
