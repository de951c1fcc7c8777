"""Do caches that share stored rows, with themselves and with forks, stay what unshared ones are, whatever is done?"""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, Qwen2Config

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.store import reads
from quantcache.store.growing import Int8Pages
from tests.strategies import random_states

HEADS, HEAD_DIM, LAYERS, CAPACITY = 2, 16, 2, 420
MOST_ROWS, MOST_CACHES = 6, 3
MAX_ERROR = 0.1
"""Of restored states of normal numbers: two half-scales, of a page that was reopened, are below it."""

Operation = tuple[str, int]


class Three:
    """A cache, one that copies where the first shares, and transformers' exact one, in which all is done alike."""

    def __init__(self, ours: QuantizedInt8Cache, copies: QuantizedInt8Cache, exact: DynamicCache) -> None:
        self.ours, self.copies, self.exact = ours, copies, exact

    @property
    def batch(self) -> int:
        return self.exact.layers[0].keys.shape[0] if self.seq_len else 2

    @property
    def seq_len(self) -> int:
        return self.exact.get_seq_length() if self.exact.layers else 0

    def every(self, method: str, *arguments: object) -> None:
        for cache in (self.ours, self.copies, self.exact):
            getattr(cache, method)(*arguments)
        for layer in self.copies.layers:  # nothing shared
            if isinstance(layer.pages, Int8Pages) and layer.pages.row_table is not None:
                layer.pages._take(list(layer.pages.stored().segments))

    def run(self, name: str, number: int, seed: int) -> None:
        if name == "update":
            if self.ours.layers and self.ours.is_compileable and self.seq_len + number > CAPACITY:
                return
            for layer_idx in range(LAYERS):
                states = random_states(self.batch, HEADS, number, HEAD_DIM, seed=100 * seed + layer_idx)
                for cache in (self.ours, self.copies, self.exact):
                    cache.update(*states, layer_idx)
        elif not self.seq_len:
            return
        elif name == "crop":
            self.every("crop", -min(number, self.seq_len - 1))
        elif name == "offload":  # what offload() does on a GPU
            for layer in (*self.ours.layers, *self.copies.layers):
                layer.pages.offload()
        elif name == "save and load":
            if isinstance(self.ours.layers[0].pages, Int8Pages):
                with tempfile.TemporaryDirectory() as folder:
                    self.ours.save(Path(folder) / "cache.safetensors")
                    self.ours = QuantizedInt8Cache.load(Path(folder) / "cache.safetensors")
        else:
            order = torch.randint(self.batch, (self.batch,), generator=torch.Generator().manual_seed(number))
            if name == "reorder":
                self.every("reorder_cache", order)
            elif isinstance(self.ours.layers[0].pages, Int8Pages):
                if name == "select":
                    self.every("batch_select_indices", order[: 1 + number % self.batch])
                elif 2 * self.batch <= MOST_ROWS:
                    self.every("batch_repeat_interleave", 2)

    def fork(self) -> "Three":
        return Three(self.ours.fork(), copy.deepcopy(self.copies), copy.deepcopy(self.exact))

    def check(self) -> None:
        for ours, copies, exact in zip(self.ours.layers, self.copies.layers, self.exact.layers, strict=True):
            assert int(ours.get_seq_length()) == self.seq_len
            assert ours.pages.batch_size == self.batch
            for held, wanted in zip(_bytes(ours.pages), _bytes(copies.pages), strict=True):
                assert torch.equal(held, wanted)
            query, _ = random_states(self.batch, 2 * HEADS, 1, HEAD_DIM, seed=7)
            read = reads.attention(query, ours.pages.view())
            torch.testing.assert_close(read, reads.attention(query, copies.pages.view()), rtol=1e-4, atol=1e-5)
            for held, wanted in zip(ours.pages.restore(), (exact.keys, exact.values), strict=True):
                assert (held - wanted).abs().max() < MAX_ERROR


def _bytes(pages: object) -> list[Tensor]:
    """Every stored byte, in the order of the sequences."""
    stored = pages.stored()
    return [*(torch.cat(parts) for parts in zip(*stored.segments, strict=True)), stored.key_tail, stored.value_tail]


def run(operations: list[Operation], **options: object) -> None:
    config = Qwen2Config(num_hidden_layers=LAYERS, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    caches = [QuantizedInt8Cache(config, **options), QuantizedInt8Cache(config, **options)]
    every = [Three(*caches, DynamicCache())]
    for step, (name, number) in enumerate(operations):
        at_work = every[number % len(every)]
        if name == "fork":
            if at_work.seq_len and len(every) < MOST_CACHES:
                every.append(at_work.fork())
        else:
            at_work.run(name, number, step)
    for each in every:
        if each.seq_len:
            each.check()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["update", "update", "update", "crop", "reorder", "select", "repeat", "fork", "offload", "save and load"]
        ),
        st.sampled_from([1, 2, 3, 40, 64, 97, 200]),
    ),
    min_size=3,
    max_size=16,
).map(lambda operations: [("update", 200), *operations])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_any_schedule_leaves_the_bytes_of_copies(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and dispatch.cpu_backend.unavailable():
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, backend)
    given(operations=OPERATIONS)(run)()


def test_any_schedule_of_a_fixed_capacity_leaves_the_bytes_of_copies() -> None:
    given(operations=OPERATIONS)(lambda operations: run(operations, max_cache_len=CAPACITY))()


@pytest.mark.parametrize("max_cache_len", [None, CAPACITY])
@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (torch.tensor([0, 2]), IndexError),
        (torch.tensor([-3, 0]), IndexError),
        (torch.tensor([0.0, 1.0]), TypeError),
        (torch.tensor([[0, 1]]), (IndexError, ValueError)),
        (torch.tensor([0, 1], device="meta"), ValueError),
    ],
)
def test_bad_sequences_are_refused_and_change_nothing(
    max_cache_len: int | None, indices: Tensor, error: type[Exception]
) -> None:
    config = Qwen2Config(num_hidden_layers=LAYERS, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    cache = QuantizedInt8Cache(config, max_cache_len=max_cache_len)
    for layer_idx in range(LAYERS):
        cache.update(*random_states(2, HEADS, 200, HEAD_DIM, seed=layer_idx), layer_idx)
    cache.reorder_cache(torch.tensor([1, 1]))
    before = [part.clone() for layer in cache.layers for part in _bytes(layer.pages)]
    for method in (cache.reorder_cache, cache.batch_select_indices):
        with pytest.raises(error, match=r"(indices must be|keeps its batch of) "):
            method(indices)
    for held, wanted in zip((part for layer in cache.layers for part in _bytes(layer.pages)), before, strict=True):
        assert torch.equal(held, wanted)
