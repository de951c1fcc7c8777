"""Quantising stored pages again after someone changed what they restore to."""

import torch
from torch import Tensor

from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads, writes
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView


def requantized(closed: Segment, key_states: Tensor, value_states: Tensor, backend: str | None = None) -> Segment:
    """The pages of other states, in memory of their own; ``closed`` itself where they are what it restores to.

    Only numbers that share a scale with one that changed are quantised: a channel of keys in a page, a token of values.
    All others keep their bytes, since restored values do not always quantise to the bytes that they came from.

    Args:
        closed: (pages, batch, ...), without slack, on the device of the states.
        key_states: (batch, num_kv_heads, pages * page_size, head_dim).
        value_states: (batch, num_kv_heads, pages * page_size, v_head_dim).
        backend: what ``backend_for`` the states named, if it was asked already.
    """
    no_tail = key_states[:, :, :0], value_states[:, :, :0]
    held = reads.restore_both(PagesView(ClosedPages((closed,)), *no_tail))
    # (pages, batch, num_kv_heads, page_size, head_dim)
    key_changed, value_changed = (
        _differs(old, new).unflatten(2, (-1, PAGE_SIZE)).movedim(2, 0)
        for old, new in zip(held, (key_states, value_states), strict=True)
    )
    channels, tokens = key_changed.any(3), value_changed.any(4)
    if not channels.any() and not tokens.any():
        return closed
    made = Segment.allocate(closed.capacity, key_states, value_states)
    writes.store_pages(key_states, value_states, made, backend)
    taken = channels[..., None, :], channels[..., None], tokens[..., None], tokens[..., None]
    return Segment(*(torch.where(mask, new, old) for mask, new, old in zip(taken, made, closed, strict=True)))


def _differs(old: Tensor, new: Tensor) -> Tensor:
    return (old != new) & ~(old.isnan() & new.isnan())
