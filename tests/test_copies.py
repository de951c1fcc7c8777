"""Are copies, pickles and offloaded layers the same bytes, in memory of their own?"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantcache import Int8Tensor, QuantizedInt8Cache
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.store import reads
from tests.conftest import devices, skip_without_gpu
from tests.strategies import random_states
from tests.twins import HEAD_DIM, HEADS, dense, stored

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


def filled(layer: Int8Layer, device: str = "cpu") -> Int8Layer:
    for step in range(4):
        layer.update(*random_states(2, HEADS, 90, HEAD_DIM, seed=step, device=device))
    return layer


def addresses(thing: object) -> set[int]:
    """Where the tensors are that ``thing`` can reach."""
    found, seen, queue = set(), set(), [thing]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) and not isinstance(item, Int8Tensor):
            found.add(item.untyped_storage().data_ptr())
        elif isinstance(item, (list, tuple)):
            queue += item
        elif isinstance(item, dict):
            queue += item.values()
        if hasattr(item, "__dict__") or hasattr(item, "__slots__"):
            queue += [*vars(item).values()] if hasattr(item, "__dict__") else []
            queue += [getattr(item, name, None) for name in getattr(type(item), "__slots__", ())]
    return found


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("make", [Int8Layer, lambda: Int8SlidingLayer(100)], ids=["full", "sliding"])
def test_a_copy_goes_on_alone(how: str, evicted: bool, make: Callable[[], Int8Layer], device: str) -> None:
    layer, plain = filled(make(), device), filled(make(), device)
    query, _ = random_states(2, HEADS, 1, HEAD_DIM, seed=9, device=device)
    reads.attention(query, layer.pages.view())  # backends note addresses at the first read
    if evicted:
        layer.pages.offload()
    branch = COPIES[how](layer)
    assert addresses(branch).isdisjoint(addresses(layer))
    for one in (branch, layer, plain):
        one.update(*random_states(2, HEADS, 70, HEAD_DIM, seed=5, device=device))
    layer.crop(-30)
    layer.reorder_cache(torch.tensor([1, 0], device=device))
    for ours, theirs in zip(stored(branch.pages), stored(plain.pages), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(dense(branch.keys), dense(plain.keys))
    assert torch.equal(reads.attention(query, branch.pages.view()), reads.attention(query, plain.pages.view()))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_no_slack(how: str) -> None:
    layer = Int8Layer()
    for step in range(40):
        layer.update(*random_states(1, HEADS, 64, HEAD_DIM, seed=step))
    layer.crop(-64)
    assert sum(segment.capacity for segment in layer.pages.segments) > layer.pages.num_pages
    branch = COPIES[how](layer)
    assert sum(segment.capacity for segment in branch.pages.segments) == branch.pages.num_pages == layer.pages.num_pages


@pytest.mark.parametrize("how", COPIES)
def test_what_attention_read_can_be_copied(how: str) -> None:
    keys = filled(Int8Layer()).keys
    copied = COPIES[how](keys)
    assert isinstance(copied, Int8Tensor)
    assert torch.equal(copied.restore(), keys.restore())
    assert addresses(copied.pages_view).isdisjoint(addresses(keys.pages_view))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("offloading", [False, True])
def test_a_copied_cache_shares_its_policy_among_its_own_layers(how: str, offloading: bool) -> None:
    cache = QuantizedInt8Cache(offloading=offloading)
    for layer_idx in range(3):
        cache.update(*random_states(1, HEADS, 200, HEAD_DIM), layer_idx)
    branch = COPIES[how](cache)
    assert [row.seq_len for row in branch.report().layers] == [200, 200, 200]
    assert branch.offloading == offloading
    branch.update(*random_states(1, HEADS, 1, HEAD_DIM), 3)
    policies = {id(layer.read_log.policy) for layer in branch.layers}
    assert len(policies) == 1
    assert policies.isdisjoint({id(layer.read_log.policy) for layer in cache.layers})
    assert (len(branch), len(cache)) == (4, 3)


def test_iteration_gives_keys_values_and_window_of_each_layer() -> None:
    cache = QuantizedInt8Cache()
    assert list(cache) == []
    cache.update(*random_states(1, HEADS, 200, HEAD_DIM), 0)
    cache.layers.append(filled(Int8SlidingLayer(100)))
    (key, value, window), (_, _, other_window) = cache
    assert key.shape == value.shape == (1, HEADS, 200, HEAD_DIM)
    assert window is None
    assert other_window == 100


@pytest.mark.parametrize("device", devices())
def test_evicted_pages_come_back_as_they_were(device: str) -> None:
    layer, plain = filled(Int8Layer(), device), filled(Int8Layer(), device)
    for step in range(200):
        layer.pages.offload()
        assert not layer.pages._segments
        if step % 3 == 0:
            layer.prefetch()
        new = random_states(2, HEADS, 1, HEAD_DIM, seed=step, device=device)
        layer.update(*new)
        plain.update(*new)
    for ours, theirs in zip(stored(layer.pages), stored(plain.pages), strict=True):
        assert torch.equal(ours, theirs)


def test_a_page_travels_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcache.store import offloading

    moved: list[int] = []
    original = offloading._copy

    def counted(source: Any, target: Any) -> None:
        moved.append(source.capacity)
        original(source, target)

    layer = filled(Int8Layer())
    pages = layer.pages.num_pages
    monkeypatch.setattr(offloading, "_copy", counted)
    layer.pages.offload()
    assert sum(moved) == pages
    layer.pages.fetch()
    assert sum(moved) == 2 * pages
    layer.pages.offload()
    assert sum(moved) == 2 * pages
    layer.update(*random_states(2, HEADS, 64, HEAD_DIM))
    assert sum(moved) == 3 * pages  # back again for the read
    layer.pages.offload()
    assert sum(moved) == 3 * pages + layer.pages.num_pages - pages


def test_batch_operations_and_rollback_leave_evicted_pages_where_they_are() -> None:
    layer, plain = filled(Int8Layer()), filled(Int8Layer())
    for name, argument in (
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([3, 0])),
        ("crop", -150),
    ):
        layer.pages.offload()
        assert layer.report(0).storage == "int8, in host memory"
        getattr(layer, name)(argument)
        getattr(plain, name)(argument)
        assert layer.pages.is_offloaded
    for ours, theirs in zip(stored(layer.pages), stored(plain.pages), strict=True):
        assert torch.equal(ours, theirs)


def test_nbytes_counts_host_memory() -> None:
    layer = filled(Int8Layer())
    before = layer.nbytes
    layer.pages.offload()
    assert layer.nbytes == before


@pytest.mark.cuda
@skip_without_gpu
def test_offloading_leaves_little_on_the_gpu() -> None:
    held = []
    for offloading in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = QuantizedInt8Cache(offloading=offloading)
        for layer_idx in range(8):
            cache.update(*random_states(1, 8, 4096, 128, dtype=torch.float16, device="cuda"), layer_idx)
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # at which the allocator takes back what other streams had
        held.append(torch.cuda.memory_allocated() - before)
        del cache
    # One of eight layers, on its way back, and the exact tails of all.
    assert held[1] < 0.25 * held[0]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("only_non_sliding", [False, True])
def test_an_offloading_cache_answers_as_a_resident_one(device: str, only_non_sliding: bool) -> None:
    caches = [QuantizedInt8Cache(), QuantizedInt8Cache(offloading=True, offload_only_non_sliding=only_non_sliding)]
    for cache in caches:
        cache.layers = [Int8Layer(), Int8SlidingLayer(100), Int8Layer()]
    for step in range(80):
        query_len = 150 if step == 0 else 1 + step % 3
        for layer_idx in range(3):
            new = random_states(2, HEADS, query_len, 16, seed=step * 3 + layer_idx, device=device)
            query, _ = random_states(2, HEADS, query_len, 16, seed=step, device=device)
            outputs = [
                torch.nn.functional.scaled_dot_product_attention(query, *cache.update(*new, layer_idx))
                for cache in caches
            ]
            assert torch.equal(*outputs)
        if step == 40:
            for cache in caches:
                cache.reorder_cache(torch.tensor([1, 1], device=device))
                cache.crop(-2)
    if device == "cuda":
        evicted = [layer.pages.is_offloaded for layer in caches[1].layers]
        assert evicted == [False, not only_non_sliding, True]  # the first is on its way back
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        for ours, theirs in zip(stored(one.pages), stored(other.pages), strict=True):
            assert torch.equal(ours, theirs)
