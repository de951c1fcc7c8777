"""Does a fork go on by itself, and share the bytes until one of the two changes them?"""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from tests.architectures import ARCHITECTURES
from tests.strategies import random_states
from tests.twins import HEAD_DIM, HEADS, stored

TOKENS = 400


def filled(layers: int = 2, **options: object) -> QuantizedInt8Cache:
    cache = QuantizedInt8Cache(**options)
    for layer_idx in range(layers):
        cache.update(*random_states(2, HEADS, TOKENS, HEAD_DIM, seed=layer_idx), layer_idx)
    return cache


def addresses(cache: QuantizedInt8Cache) -> list[int]:
    return [part.data_ptr() for layer in cache.layers for segment in layer.pages.segments for part in segment]


def contents(cache: QuantizedInt8Cache) -> list[Tensor]:
    """All that is stored, in memory of its own."""
    parts = [(*stored(layer.pages), layer.pages.key_tail, layer.pages.value_tail) for layer in cache.layers]
    return [part.clone() for layer in parts for part in layer]


def assert_same(have: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(have, want, strict=True):
        assert torch.equal(one, other)


def append(cache: QuantizedInt8Cache, tokens: int, seed: int) -> None:
    for layer_idx, layer in enumerate(cache.layers):
        cache.update(*random_states(layer.pages.batch_size, HEADS, tokens, HEAD_DIM, seed=seed + layer_idx), layer_idx)


def test_a_fork_copies_no_page() -> None:
    cache = filled()
    before = cache.nbytes
    fork = cache.fork()
    assert addresses(fork) == addresses(cache)
    assert cache.nbytes == before
    assert_same(contents(fork), contents(cache))
    append(fork, 1, seed=9)
    assert addresses(fork) == addresses(cache)
    assert set(addresses(copy.deepcopy(fork))).isdisjoint(addresses(cache)), "deepcopy is a full copy"


CHANGES = {
    "one token": lambda cache: append(cache, 1, seed=50),
    "many tokens": lambda cache: append(cache, 300, seed=60),
    "crop of the tail": lambda cache: (cache.crop(-5), append(cache, 5, seed=70)),
    "crop of pages": lambda cache: (cache.crop(-200), append(cache, 300, seed=80)),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: (cache.batch_select_indices(torch.tensor([1])), append(cache, 200, seed=90)),
    "repeat": lambda cache: (cache.batch_repeat_interleave(3), append(cache, 200, seed=95)),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("whose", ["source", "fork", "fork of the fork"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_one_does_the_other_does_not_see(change: str, whose: str, offloaded: bool) -> None:
    """Also with room behind the closed pages, which is that of one of them."""
    cache = filled()
    for tokens in (2000, 64):
        append(cache, tokens, seed=20 + tokens)
    room = cache.layers[0].pages
    assert room.num_pages < sum(segment.capacity for segment in room.segments)
    if offloaded:
        for layer in cache.layers:
            layer.pages.offload()
    fork = cache.fork()
    caches = {"source": cache, "fork": fork, "fork of the fork": fork.fork()}
    alone = copy.deepcopy(cache)
    before = contents(alone)
    CHANGES[change](caches[whose])
    CHANGES[change](alone)
    others = [other for name, other in caches.items() if name != whose]
    for other in others:
        assert_same(contents(other), before)
    if change != "reset":
        assert_same(contents(caches[whose]), contents(alone))
    # The others go on, over whatever was shared.
    twin = copy.deepcopy(others[0])
    for other in (*others, twin):
        other.crop(-130)
        append(other, 250, seed=100)
    assert_same(contents(others[0]), contents(others[1]))
    assert_same(contents(others[0]), contents(twin))
    if change != "reset":
        assert_same(contents(caches[whose]), contents(alone))


def test_pages_are_freed_with_the_last_that_holds_them() -> None:
    cache = filled(1)
    page = weakref.ref(cache.layers[0].pages.segments[0].key_qdata)
    memory = cache.layers[0].pages.segments[0].key_qdata.untyped_storage().data_ptr()
    fork = cache.fork()
    del cache
    gc.collect()
    assert fork.layers[0].pages.segments[0].key_qdata.untyped_storage().data_ptr() == memory
    fork.layers[0].pages._closed = None
    del fork
    gc.collect()
    assert page() is None


def test_host_copies_are_shared() -> None:
    cache = filled(1)
    pages = cache.layers[0].pages
    pages.offload()
    fork = cache.fork()
    assert fork.layers[0].pages.is_offloaded
    theirs, ours = fork.layers[0].pages._host.segments, pages._host.segments
    assert [part.data_ptr() for segment in theirs for part in segment] == [
        part.data_ptr() for segment in ours for part in segment
    ]


def test_a_window_is_shared_too() -> None:
    cache = QuantizedInt8Cache()
    cache.layers = [Int8SlidingLayer(150), Int8Layer()]
    for layer_idx in range(2):
        cache.update(*random_states(2, HEADS, TOKENS, HEAD_DIM, seed=layer_idx), layer_idx)
    fork, alone = cache.fork(), copy.deepcopy(cache)
    assert addresses(fork) == addresses(cache)
    before = contents(cache)
    for one in (fork, alone):
        append(one, 500, seed=7)
        one.crop(-20)
    assert_same(contents(fork), contents(alone))
    assert_same(contents(cache), before)


def test_a_fixed_capacity_is_copied() -> None:
    config = Qwen2Config(num_hidden_layers=2, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    cache = filled(config=config, max_cache_len=600)
    fork = cache.fork()
    assert all(
        one.pages.memory.data_ptr() != two.pages.memory.data_ptr()
        for one, two in zip(cache.layers, fork.layers, strict=True)
    )
    append(fork, 100, seed=5)
    assert [row.seq_len for row in cache.report().layers] == [TOKENS, TOKENS]
    assert [row.seq_len for row in fork.report().layers] == [TOKENS + 100, TOKENS + 100]


@pytest.mark.parametrize("name", ["Qwen3-Next", "Gemma 3"])
@torch.no_grad()
def test_a_fork_of_a_hybrid_goes_on_alone(name: str) -> None:
    model = next(a for a in ARCHITECTURES if a.name == name).make()
    ids = torch.randint(2, 97, (2, 200))
    cache = QuantizedInt8Cache(model.config)
    model(ids[:, :150], **cache_argument(cache))
    fork, alone = cache.fork(), copy.deepcopy(cache)
    outputs = [model(ids[:, 150:], **cache_argument(one)).logits for one in (fork, alone, cache)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_fork_has_a_policy_of_its_own() -> None:
    cache = filled(3)
    fork = cache.fork()
    policies = {id(layer.read_log.policy) for layer in fork.layers}
    assert policies == {id(fork._make.policy)}
    assert policies.isdisjoint({id(layer.read_log.policy) for layer in cache.layers})
    fork.update(*random_states(2, HEADS, 1, HEAD_DIM), 3)
    assert (len(fork), len(cache)) == (4, 3)


@pytest.mark.parametrize("cache", [QuantizedInt8Cache(), filled().fork()], ids=["new", "reset"])
def test_a_fork_of_nothing_is_refused(cache: QuantizedInt8Cache) -> None:
    cache.reset()
    with pytest.raises(ValueError, match=r"QuantizedInt8Cache\.fork: the cache must hold tokens, got an empty one\."):
        cache.fork()
