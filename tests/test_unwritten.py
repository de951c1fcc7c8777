"""Newest tokens that attention writes on its way: is a layer the same whether they were written, read, or neither yet?

The CUDA kernels do it; here the torch backend stands in for them, so that the bookkeeping is tested without a GPU.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from quantcache import Int8Tensor
from quantcache.backends import dispatch
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from tests.strategies import Operation, random_states, schedules
from tests.twins import HEAD_DIM, HEADS, V_HEAD_DIM, ExactTwin

fixtures_last_for_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def writes_on_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    monkeypatch.setattr(dispatch.BACKENDS["torch"], "WRITES_ON_READ", True)


@given(operations=schedules())
@fixtures_last_for_all_examples
def test_any_schedule_leaves_what_the_exact_layer_holds(operations: list[Operation]) -> None:
    twin = ExactTwin(Int8Layer())
    for operation in operations:
        twin.run(operation)
    twin.check()


@given(operations=schedules())
@fixtures_last_for_all_examples
def test_any_schedule_of_a_window_leaves_what_the_exact_layer_holds(operations: list[Operation]) -> None:
    twin = ExactTwin(Int8SlidingLayer(150))
    for operation in operations:
        twin.run(operation)
    twin.check()


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, _ = random_states(2, HEADS, tokens, HEAD_DIM, seed=seed)
    value, _ = random_states(2, HEADS, tokens, V_HEAD_DIM, seed=seed + 1000)
    return key, value


def filled() -> Int8Layer:
    layer = Int8Layer()
    layer.update(*states(200, 0))
    layer.update(*states(1, 1))  # makes room in the tail
    return layer


def test_a_read_writes_the_newest_token_and_a_second_one_reads_it() -> None:
    layer, other = filled(), filled()
    query, _ = random_states(2, HEADS, 1, HEAD_DIM, seed=9)
    key, value = layer.update(*states(1, 2))
    assert isinstance(key, Int8Tensor)
    assert key.pages_view.pending is not None
    first = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert key.pages_view.pending is None
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, key, value), first)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *other.update(*states(1, 2)))
    assert torch.equal(first, expected)


@pytest.mark.parametrize("touch", ["update", "keys", "crop", "reorder", "copy", "restore", "offload"])
def test_a_token_that_nobody_read_is_not_lost(touch: str) -> None:
    layer = filled()
    newest = states(1, 2)
    key, _ = layer.update(*newest)
    assert key.pages_view.pending is not None
    assert layer.pages is not None
    if touch == "update":
        layer.update(*states(1, 3))
        layer.crop(-1)
    elif touch == "crop":
        layer.update(*states(1, 3))
        layer.crop(-1)
        layer.update(*states(1, 4))
        layer.crop(-1)
    elif touch == "reorder":
        layer.reorder_cache(torch.tensor([0, 1]))
    elif touch == "copy":
        layer = copy.deepcopy(layer)
    elif touch == "restore":
        assert torch.equal(key.restore()[:, :, -1:], newest[0])
    elif touch == "offload":
        layer.pages.offload()
    assert layer.keys is not None
    assert layer.get_seq_length() == 202
    assert layer.pages is not None
    for have, want in zip((layer.pages.key_tail, layer.pages.value_tail), newest, strict=True):
        assert torch.equal(have[:, :, -1:], want)


def test_a_refused_read_leaves_the_token_to_be_written() -> None:
    layer = filled()
    newest = states(1, 2)
    key, value = layer.update(*newest)
    query, _ = random_states(2, HEADS, 1, HEAD_DIM, seed=9)
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=torch.ones(1, 1, 1, 5).bool())
    assert torch.equal(key.restore()[:, :, -1:], newest[0])
