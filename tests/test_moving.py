"""Does a cache that is moved hold the same bytes on the other device, and stay as it was where it cannot be moved?"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers._host import cache_argument, feed
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.store.growing import Int8Pages
from tests.architectures import ARCHITECTURES
from tests.conftest import skip_without_gpu
from tests.strategies import random_states

CPU, META = torch.device("cpu"), torch.device("meta")
HEADS, HEAD_DIM = 2, 32
ATTENTIVE = [one for one in ARCHITECTURES if not one.is_encoder_decoder]


def states(tokens: int, seed: int, device: Any = "cpu", batch: int = 2) -> tuple[Tensor, Tensor]:
    return random_states(batch, HEADS, tokens, HEAD_DIM, seed=seed, device=device)


def parts(layer: Any) -> list[Tensor]:
    """All that an int8 layer stores, offloaded or not."""
    view = layer.pages.stored()
    return [*(part for segment in view.segments for part in segment), view.key_tail, view.value_tail]


def assert_same(one: Any, other: Any) -> None:
    """Byte for byte, however the pages lie in segments."""
    views = [layer.pages.stored() for layer in (one, other)]
    pages = [[torch.cat(held).cpu() for held in zip(*view.segments, strict=True)] for view in views]
    tails = [[view.key_tail.cpu(), view.value_tail.cpu()] for view in views]
    for have, want in zip(pages[0] + tails[0], pages[1] + tails[1], strict=True):
        assert torch.equal(have, want)


def growing() -> Int8Layer:
    return Int8Layer()


def window() -> Int8SlidingLayer:
    return Int8SlidingLayer(200)


def fixed() -> StaticInt8Layer:
    return StaticInt8Layer(1000)


CHANGES = {
    "as it came": lambda layer: None,
    "reordered": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "rows shared": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "cropped into a page": lambda layer: layer.crop(-140),
    "offloaded": lambda layer: layer.pages.offload(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [growing, window, fixed])
def test_what_is_moved_goes_on_as_the_layer_would(make: Any, change: str) -> None:
    """Between a device and itself, which is all there is without a GPU: every byte is copied, and nothing shared."""
    layer = make()
    for tokens, seed in ((300, 0), (1, 1), (50, 2)):
        layer.update(*states(tokens, seed))
    if change == "cropped into a page" and make is window:
        pytest.skip("what a window has dropped does not come back")
    CHANGES[change](layer)
    moved = copy.deepcopy(layer)
    moved.take_over(layer.pages.moved(CPU))
    assert_same(moved, layer)
    assert moved.get_seq_length() == layer.get_seq_length()
    assert not moved.pages.is_offloaded, "on a CPU there is nothing to bring back"
    for one in parts(moved):
        assert all(one.data_ptr() != other.data_ptr() for other in parts(layer) if other.numel())
    for tokens, seed in ((1, 5), (90, 6), (1, 7)):
        given = states(tokens, seed)
        moved.update(*given)
        layer.update(*given)
        for have, want in zip(moved.pages.restore(), layer.pages.restore(), strict=True):
            assert torch.equal(have, want)
    assert_same(moved, layer)


@pytest.mark.parametrize("architecture", ATTENTIVE, ids=lambda one: one.name)
def test_a_cache_of_any_model_goes_to_meta(architecture: Any) -> None:
    """Layers of transformers' own too: nothing is left behind, and no shape or length changes."""
    torch.manual_seed(0)
    model = architecture.make(architecture.implementations[0])
    cache = QuantizedInt8Cache(model.config)
    ids = torch.randint(2, 90, (1, 170))
    with torch.no_grad():
        feed(model, ids, cache)
    before = [row.seq_len for row in cache.report().layers]
    assert cache.to("meta") is cache
    for layer in cache.layers:
        values = parts(layer) if hasattr(layer, "pages") and layer.pages else list(vars(layer).values())
        for value in values:
            for tensor in value.values() if isinstance(value, dict) else [value]:
                assert not isinstance(tensor, Tensor) or tensor.device == META
    assert [row.seq_len for row in cache.report().layers] == before
    assert cache.get_seq_length() == 170
    with pytest.raises(ValueError, match="must hold numbers to be moved to cpu, got one on the meta device"):
        cache.to("cpu")


def filled(**options: Any) -> QuantizedInt8Cache:
    cache = QuantizedInt8Cache(**options)
    for layer_idx in range(2):
        cache.update(*states(300, seed=layer_idx), layer_idx)
    return cache


def test_the_device_that_it_is_on_changes_nothing() -> None:
    cache = filled()
    addresses = [part.data_ptr() for layer in cache.layers for part in parts(layer)]
    assert cache.to("cpu:0") is cache.to(CPU) is cache
    assert [part.data_ptr() for layer in cache.layers for part in parts(layer)] == addresses
    assert QuantizedInt8Cache().to("cpu").get_seq_length() == 0


def test_forks_stay_where_they_are() -> None:
    cache = filled()
    fork = cache.fork()
    cache.to("meta")
    assert all(part.device == CPU for layer in fork.layers for part in parts(layer))
    fork.update(*states(1, seed=9), 0)


def test_a_move_that_fails_in_the_middle_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, moved = filled(), Int8Pages.moved
    want, calls = copy.deepcopy(cache), []

    def fail_at_second(pages: Int8Pages, device: torch.device) -> Int8Pages:
        calls.append(device)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return moved(pages, device)

    monkeypatch.setattr(Int8Pages, "moved", fail_at_second)
    with pytest.raises(torch.OutOfMemoryError):
        cache.to("meta")
    for layer, other in zip(cache.layers, want.layers, strict=True):
        assert_same(layer, other)
        assert layer.device == CPU


def test_a_move_without_memory_for_compiled_steps_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not_recorded", lambda *tails: "no kernels take them")
    layer = StaticInt8Layer(1000)
    layer.update(*states(300, seed=0))
    cache, held = QuantizedInt8Cache(), dict(vars(layer))
    cache.layers = [layer]

    def fail(*tails: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dispatch, "scratch_for", fail)
    with pytest.raises(torch.OutOfMemoryError):
        cache.to("meta")
    assert vars(layer) == held


def test_a_layer_that_a_compiled_step_knows_stays() -> None:
    layer = StaticInt8Layer(1000)
    layer.update(*states(300, seed=0))

    def step(key: Tensor, value: Tensor) -> Tensor:
        layer.update(key, value)
        return key + 1

    with torch.no_grad():
        torch.compile(step, backend="eager", fullgraph=True)(*states(1, seed=1))
    cache = QuantizedInt8Cache()
    cache.layers = [Int8Layer(), layer]
    cache.layers[0].update(*states(300, seed=0))
    with pytest.raises(ValueError, match=r"layer 1 must stay on cpu, where a compiled step .* got meta"):
        cache.to("meta")
    assert cache.layers[0].device == CPU
    assert cache.to("cpu") is cache


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        (torch.float16, TypeError, r"got torch.float16. A cache keeps the dtype of its model."),
        (None, TypeError, "device must be a torch.device, its name or its index, got None"),
        ("warp", ValueError, "device must be one of this machine, got 'warp'"),
        ("cuda:63", ValueError, "device must be one of this machine, got 'cuda:63'"),
    ],
)
def test_what_is_no_device_is_named(device: Any, error: type[Exception], message: str) -> None:
    cache = filled()
    with pytest.raises(error, match=message):
        cache.to(device)
    assert cache.layers[1].device == CPU


@pytest.mark.cuda
@skip_without_gpu
@pytest.mark.parametrize("options", [{}, {"offloading": True}, {"max_cache_len": 600}], ids=str)
def test_a_cache_goes_to_the_cpu_and_back(options: dict[str, Any]) -> None:
    """The answer after a round trip is the one without, byte for byte, and forks read where they are."""
    torch.manual_seed(0)
    model = next(one for one in ATTENTIVE if one.name.startswith("Qwen2")).make().to("cuda")
    ids = torch.randint(2, 90, (2, 300), device="cuda")
    caches = [QuantizedInt8Cache(model.config, **options) for _ in range(2)]
    answers = []
    for cache, travels in zip(caches, (False, True), strict=True):
        with torch.no_grad():
            feed(model, ids[:, :-1], cache)
        if travels:
            assert cache.to("cpu") is cache
            assert all(part.device == CPU for layer in cache.layers for part in parts(layer))
            assert cache.report().layers[0].seq_len == 299
            cache.to("cuda")
        keywords = {"max_new_tokens": 40, "do_sample": False, "disable_compile": True, **cache_argument(cache)}
        answers.append(model.generate(ids, **keywords))
    assert torch.equal(*answers)
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert_same(layer, other)
    if not options:
        fork = caches[1].fork()
        caches[1].to("cpu")
        with torch.no_grad():
            feed(model, ids[:, :1], fork)
