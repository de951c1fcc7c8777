"""What attention reads of one layer: segments of closed int8 pages, then an exact tail.

Nothing here writes; ``pages.py`` does. Nothing here knows about transformers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from quantcache import ops
from quantcache.scheme import PAGE_SIZE


class Segment(NamedTuple):
    """Memory for ``capacity`` pages, allocated at once.

    key_qdata: int8 (capacity, batch, num_kv_heads, page_size, head_dim)
    key_metadata: int16 (capacity, batch, num_kv_heads, head_dim, 2)
    value_qdata: int8 (capacity, batch, num_kv_heads, page_size, v_head_dim)
    value_metadata: int16 (capacity, batch, num_kv_heads, page_size, 2)
    """

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor

    @classmethod
    def allocate(cls, capacity: int, key_states: Tensor, value_states: Tensor) -> "Segment":
        """An uninitialised segment for states shaped like (batch, num_kv_heads, any, head_dim)."""
        batch, num_kv_heads, _, head_dim = key_states.shape
        rows, device = (capacity, batch, num_kv_heads), key_states.device

        def memory(dtype: torch.dtype, *tail: int) -> Tensor:
            return torch.empty(*rows, *tail, dtype=dtype, device=device)

        return cls(
            memory(torch.int8, PAGE_SIZE, head_dim),
            memory(torch.int16, head_dim, 2),
            memory(torch.int8, PAGE_SIZE, value_states.shape[-1]),
            memory(torch.int16, PAGE_SIZE, 2),
        )

    @property
    def capacity(self) -> int:
        """Pages that fit."""
        return self.key_qdata.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(part.nbytes for part in self)

    def narrow(self, start: int, stop: int | None) -> "Segment":
        """The pages ``start`` to ``stop`` (None: the end), sharing memory."""
        return Segment(*(part[start:stop] for part in self))


@dataclass(frozen=True, eq=False)
class ClosedPages:
    """Closed pages, as the operations take them; made once and shared by the views until the pages change."""

    segments: tuple[Segment, ...]

    @cached_property
    def num_pages(self) -> int:
        """Pages in all segments."""
        return sum(segment.capacity for segment in self.segments)

    @cached_property
    def key_parts(self) -> tuple[ops.Parts, ops.Parts]:
        """Codes and metadata of the keys, a tensor a segment."""
        return ops.Parts(s.key_qdata for s in self.segments), ops.Parts(s.key_metadata for s in self.segments)

    @cached_property
    def value_parts(self) -> tuple[ops.Parts, ops.Parts]:
        """Codes and metadata of the values, a tensor a segment."""
        return ops.Parts(s.value_qdata for s in self.segments), ops.Parts(s.value_metadata for s in self.segments)


@dataclass(eq=False)
class PagesView:
    """What one attention call reads: closed pages, then the tail.

    It shares memory with the cache. Appending leaves it valid; a crop followed by an append writes over its tail.
    """

    closed: ClosedPages
    key_tail: Tensor
    value_tail: Tensor
    backend: tuple[str, str | None] | None = None
    """What ``ops.backend_for`` says of it, where it has been asked."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The closed pages, without slack."""
        return self.closed.segments

    @property
    def num_pages(self) -> int:
        """Closed pages in the view."""
        return self.closed.num_pages

    @property
    def seq_len(self) -> int:
        """Tokens in the view."""
        return self.closed.num_pages * PAGE_SIZE + self.key_tail.shape[2]

    def shows(self, other: "PagesView") -> bool:
        """Whether ``other`` is of the same tokens in the same memory, as keys and values read one by one are."""
        return self is other or (
            self.closed is other.closed
            and _same_memory(self.key_tail, other.key_tail)
            and _same_memory(self.value_tail, other.value_tail)
        )

    def restore_keys(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, head_dim) in the model's dtype."""
        return ops.restore_keys(*self.closed.key_parts, self.key_tail) if self.segments else self.key_tail

    def restore_values(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, v_head_dim) in the model's dtype."""
        return ops.restore_values(*self.closed.value_parts, self.value_tail) if self.segments else self.value_tail

    def attention(
        self,
        query: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """``ops.attention`` over this view."""
        return ops.attention(
            query,
            *self.closed.key_parts,
            *self.closed.value_parts,
            self.key_tail,
            self.value_tail,
            attn_mask=attn_mask,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
