"""An ``Int8Layer`` beside transformers' exact layer, fed and cut alike, down to the stored bytes."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quantcache import Int8Tensor
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization import reference
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.growing import Int8Pages, Segment
from tests.strategies import Operation, random_states

HEADS, HEAD_DIM, V_HEAD_DIM = 2, 8, 12


def stored(pages: Int8Pages) -> Segment:
    """The closed pages as one segment."""
    segments = pages.stored().segments
    return Segment(*(torch.cat(parts).to(pages.device) for parts in zip(*segments, strict=True)))


def dense(states: Tensor) -> Tensor:
    """Plain values of what ``layer.keys`` gives."""
    return states.restore() if isinstance(states, Int8Tensor) else states


class ExactTwin:
    """transformers' DynamicLayer, which also follows the one lossy rule: a reopened page keeps its restored values.

    It keeps every token, also beside an ``Int8SlidingLayer``, which must then hold the newest of them.
    """

    def __init__(self, layer: Int8Layer) -> None:
        self.layer, self.exact = layer, DynamicLayer()
        self.batch, self.seed = 2, 0

    @property
    def seq_len(self) -> int:
        return self.exact.get_seq_length()

    @property
    def first(self) -> int:
        """Tokens let go."""
        return self.layer.pages.first_page * PAGE_SIZE if self.layer.pages is not None else 0

    def run(self, operation: Operation) -> None:
        """Do ``operation`` on both and check that they agree; what makes no sense now is left out."""
        name, number = operation
        if name == "update":
            self.seed += 1
            key, _ = random_states(self.batch, HEADS, number, HEAD_DIM, seed=self.seed)
            value, _ = random_states(self.batch, HEADS, number, V_HEAD_DIM, seed=self.seed + 1000)
            self.update(key, value)
        elif name == "crop":
            # A window that is full takes back what it can; test_messages.py asks for more.
            most = self.seq_len
            if isinstance(self.layer, Int8SlidingLayer) and self.first:
                most = self.seq_len - (self.layer.sliding_window - 1) - self.first
            self.crop(min(number, most))
        elif name == "reset":
            self.layer.reset()
            self.exact, self.batch = DynamicLayer(), 2  # older transformers zero a layer in place of emptying it
        elif name == "offload":
            if self.layer.pages is not None:
                self.layer.pages.offload()  # what offload() does on a GPU
        elif name == "repeat":
            if self.batch <= 3 and self.seq_len:
                self.call("batch_repeat_interleave", 2)
                self.batch *= 2
        elif self.seq_len:
            order = torch.randint(self.batch, (self.batch,), generator=torch.Generator().manual_seed(number))
            if name == "select":
                order = order[: 1 + number % self.batch]
                self.batch = len(order)
            self.call({"select": "batch_select_indices", "reorder": "reorder_cache"}[name], order)
        self.check_lengths()

    def update(self, key_states: Tensor, value_states: Tensor) -> None:
        query_len, first = key_states.shape[2], self.first
        assert self.layer.get_mask_sizes(query_len) == (self.seq_len - first + query_len, first)
        seen = self.layer.update(key_states, value_states)
        expected = self.exact.update(key_states, value_states)
        closed = 0
        if isinstance(seen[0], Int8Tensor):
            closed = seen[0].pages_view.num_pages * PAGE_SIZE
        for ours, theirs in zip(seen, expected, strict=True):
            theirs = theirs[:, :, first:]
            assert ours.shape == theirs.shape
            assert torch.equal(dense(ours)[:, :, closed:], theirs[:, :, closed:])

    def crop(self, tokens: int) -> None:
        if self.layer.pages is not None:
            kept = (self.seq_len - tokens) // PAGE_SIZE
            if kept < self.layer.pages.first_page + self.layer.pages.num_pages:
                # the rest of a reopened page is what its int8 restores to
                reopened = slice(kept * PAGE_SIZE, (kept + 1) * PAGE_SIZE)
                for name, quantize, restore in (
                    ("keys", reference.quantize_key_pages, reference.restore_key_pages),
                    ("values", reference.quantize_value_pages, reference.restore_value_pages),
                ):
                    states = getattr(self.exact, name).clone()
                    states[:, :, reopened] = restore(*quantize(states[:, :, reopened]), states.dtype)
                    setattr(self.exact, name, states)
        self.layer.crop(-tokens)
        if self.exact.is_initialized:  # older transformers cannot crop a layer that is empty
            self.exact.crop(-tokens)

    def call(self, name: str, *args: object) -> None:
        getattr(self.layer, name)(*args)
        getattr(self.exact, name)(*args)

    def check_lengths(self) -> None:
        """Length, batch and room are right."""
        layer = self.layer
        assert layer.get_seq_length() == self.seq_len
        assert layer.get_mask_sizes(3) == (self.seq_len - self.first + 3, self.first)
        if layer.pages is None or layer.pages.is_empty:
            return
        pages = layer.pages
        assert pages.batch_size == self.batch
        tail_len = pages.key_tail.shape[2]
        assert pages.seq_len == self.first + pages.num_pages * PAGE_SIZE + tail_len
        assert tail_len < PAGE_SIZE + layer.residual_length
        if isinstance(layer, Int8SlidingLayer):
            # The next query sees window - 1 tokens; a rollback within residual_length needs no more.
            assert self.first <= max(0, self.seq_len - (layer.sliding_window - 1))
            if not layer.record_past:
                reach = layer.sliding_window - 1 + layer.residual_length
                segment = max(reach // PAGE_SIZE // 16, 1)
                # Nothing is let go between two closings, 64 tokens apart, and then by whole segments.
                assert self.seq_len - self.first < reach + (segment + 2) * PAGE_SIZE + layer.residual_length

    def check(self) -> None:
        """The tail is exact, and the pages hold exactly what quantising the exact tokens gives."""
        self.check_lengths()
        pages = self.layer.pages
        if pages is None or pages.is_empty:
            return
        first, closed = self.first, self.first + pages.num_pages * PAGE_SIZE
        assert torch.equal(pages.key_tail, self.exact.keys[:, :, closed:])
        assert torch.equal(pages.value_tail, self.exact.values[:, :, closed:])
        if pages.num_pages:
            keys = reference.quantize_key_pages(self.exact.keys[:, :, first:closed])
            values = reference.quantize_value_pages(self.exact.values[:, :, first:closed])
            for ours, theirs in zip(stored(pages), (*keys, *values), strict=True):
                assert torch.equal(ours, theirs)
