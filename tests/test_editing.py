"""Does ``cache.edit`` change what it is asked to change, and not a byte besides?"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from quantcache import QuantizedInt8Cache
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.pages import Pages
from tests.strategies import random_states

BATCH, HEADS, HEAD_DIM = 3, 2, 8
CONFIG = LlamaConfig(num_hidden_layers=1)


def filled(kind: str, tokens: int = 230) -> QuantizedInt8Cache:
    cache = QuantizedInt8Cache(CONFIG, max_cache_len=400) if kind == "fixed" else QuantizedInt8Cache(strict=True)
    if kind == "sliding":
        cache.layers = [Int8SlidingLayer(100)]
    cache.update(*random_states(BATCH, HEADS, tokens - 1, HEAD_DIM, seed=1), 0)
    cache.update(*random_states(BATCH, HEADS, 1, HEAD_DIM, seed=2), 0)
    if kind == "reordered":
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    elif kind == "offloaded":
        cache.layers[0].pages.offload()  # what offload() does on a GPU
    return cache


KINDS = ["growing", "reordered", "offloaded", "sliding", "fixed"]


def parts(pages: Pages) -> list[Tensor]:
    """Codes and metadata of keys and values, and the tails."""
    view = pages.stored()
    segments = [torch.cat(part) for part in zip(*view.segments, strict=True)]
    return [part.clone() for part in (*segments, view.key_tail, view.value_tail)]


@pytest.mark.parametrize("tokens", [20, 230])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_what_attention_reads_and_touches_no_other_scale(kind: str, tokens: int) -> None:
    cache = filled(kind, tokens)
    pages = cache.layers[0].pages
    before = parts(pages)
    key_states, value_states = pages.restore()
    with cache.edit(0) as states:
        assert type(states.keys) is type(states.values) is Tensor
        assert torch.equal(states.keys, key_states)
        assert torch.equal(states.values, value_states)
        states.keys[1, 0, 5, 3] = 9.0
        states.values[2, 1, 7] = torch.arange(HEAD_DIM) % 3
        states.values[:, :, -1] *= -1
        wanted = states.keys.clone(), states.values.clone()
    restored = pages.restore()
    for have, want in zip(restored, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0.03)
    assert torch.equal(restored[1][:, :, -1], wanted[1][:, :, -1]), "the tail is exact"
    query = random_states(BATCH, HEADS, 1, HEAD_DIM, seed=5)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *restored).transpose(1, 2)
    torch.testing.assert_close(reads.attention(query, pages.view()), expected, rtol=1e-4, atol=1e-5)
    if tokens < 96:
        return
    changed = [old != new for old, new in zip(before, parts(pages), strict=True)]
    key_qdata, key_metadata, value_qdata, value_metadata = changed[:4]
    for mask, allowed in (
        (key_qdata, (0, 1, 0, slice(None), 3)),
        (key_metadata, (0, 1, 0, 3)),
        (value_qdata, (0, 2, 1, 7)),
        (value_metadata, (0, 2, 1, 7)),
    ):
        assert mask[allowed].any()
        mask[allowed] = False
        assert not mask.any(), "what shares no scale with the edit keeps its bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_changes_nothing_keeps_every_byte(kind: str) -> None:
    cache = filled(kind)
    before, nbytes = parts(cache.layers[0].pages), cache.nbytes
    with cache.edit(0) as states:
        states.values *= 1
    for old, new in zip(before, parts(cache.layers[0].pages), strict=True):
        assert torch.equal(old, new)
    assert kind in ("offloaded", "growing", "reordered") or cache.nbytes <= nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_layer_goes_on(kind: str) -> None:
    cache, plain = filled(kind), filled(kind)
    with cache.edit(0) as states:
        states.values = states.values + 1
    for step in range(100):
        new = random_states(BATCH, HEADS, 1, HEAD_DIM, seed=10 + step)
        cache.update(*new, 0)
        plain.update(*new, 0)
    ours, theirs = parts(cache.layers[0].pages), parts(plain.layers[0].pages)
    newest = (230 // PAGE_SIZE) - cache.layers[0].pages.first_page
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(one, other), "keys were not edited"
    for one, other in zip(ours[2:4], theirs[2:4], strict=True):
        assert torch.equal(one[newest + 1 :], other[newest + 1 :])
    cache.crop(-20)
    assert cache.get_seq_length() == 310


WRONG: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "the block": (lambda states: 1 / 0, ZeroDivisionError, "division by zero"),
    "shape": (
        lambda states: setattr(states, "keys", states.keys[:, :, 1:]),
        ValueError,
        "QuantizedInt8Cache.edit: keys must have the shape of what the layer holds, (3, 2, 230, 8), got "
        "(3, 2, 229, 8). To drop or add tokens use cache.to_dynamic() and QuantizedInt8Cache.from_dynamic().",
    ),
    "dtype": (
        lambda states: setattr(states, "values", states.values.half()),
        TypeError,
        "QuantizedInt8Cache.edit: values must have the dtype the layer holds, torch.float32, got torch.float16.",
    ),
    "device": (
        lambda states: setattr(states, "values", states.values.to("meta")),
        ValueError,
        "QuantizedInt8Cache.edit: values must be on the layer's device, cpu, got meta.",
    ),
    "type": (
        lambda states: setattr(states, "keys", [1.0]),
        TypeError,
        "QuantizedInt8Cache.edit: keys must be a tensor, got list.",
    ),
}


def spoil(cache: QuantizedInt8Cache, change: Callable[[Any], object]) -> None:
    with cache.edit(0) as states:
        states.keys.zero_()
        change(states)


@pytest.mark.parametrize("kind", ["growing", "reordered", "fixed"])
@pytest.mark.parametrize("case", WRONG)
def test_an_edit_that_fails_changes_nothing(case: str, kind: str) -> None:
    cache = filled(kind)
    before = parts(cache.layers[0].pages)
    change, error, message = WRONG[case]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        spoil(cache, change)
    for old, new in zip(before, parts(cache.layers[0].pages), strict=True):
        assert torch.equal(old, new)


def test_layers_of_transformers_are_edited_too() -> None:
    window = DynamicSlidingWindowLayer(32)
    window.update(*random_states(1, 2, 50, 8))
    cache = QuantizedInt8Cache()
    cache.layers = [window]
    with cache.edit(0) as states:
        states.values[:, :, -1] = 7
    assert (window.values[:, :, -1] == 7).all()
    config = LlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=32)
    cache = QuantizedInt8Cache(config, max_cache_len=256)
    cache.update(*random_states(1, 2, 20, 8), 0)
    address = cache.layers[0].keys.data_ptr()
    with cache.edit(0) as states:
        states.keys[:, :, 3] = 7
    assert (cache.layers[0].keys[:, :, 3] == 7).all()
    assert cache.layers[0].keys.data_ptr() == address, "which compiled steps know"


def test_an_edit_says_where_there_is_nothing_to_edit() -> None:
    cache = QuantizedInt8Cache()
    with pytest.raises(
        IndexError, match=r"^QuantizedInt8Cache.edit: layer_idx must be from 0 to -1, got 0\. No token "
    ):
        cache.edit(0).__enter__()
    cache.layers = [Int8Layer(), LinearAttentionLayer()]
    with pytest.raises(ValueError, match=r"^QuantizedInt8Cache.edit: layer 0 must hold tokens, got an empty layer\.$"):
        cache.edit(0).__enter__()
    with pytest.raises(
        NotImplementedError, match=r"layer 1 must be one of keys and values, got a LinearAttentionLayer"
    ):
        cache.edit(1).__enter__()


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_an_assignment_to_a_layer_says_how_states_are_changed(name: str, kind: str) -> None:
    layer = filled(kind).layers[0]
    with pytest.raises(
        NotImplementedError,
        match=rf"^Int8Layer\.{name}: cached states are read-only, got an assignment\. .*cache\.edit.*from_dynamic\(\)",
    ):
        setattr(layer, name, torch.zeros(BATCH, HEADS, 5, HEAD_DIM))
