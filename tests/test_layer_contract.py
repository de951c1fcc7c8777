"""Does every host method act as on the host's own unquantised layer, down to the stored bytes?"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from tests.conftest import devices
from tests.strategies import Operation, random_states, schedules
from tests.twins import HEAD_DIM, HEADS, ExactTwin, dense, stored


@given(operations=schedules(), residual_length=st.sampled_from([0, 5, 32]))
def test_any_schedule_of_operations_matches_the_unquantised_layer(
    operations: list[Operation], residual_length: int
) -> None:
    twin = ExactTwin(Int8Layer(residual_length))
    for step, operation in enumerate(operations):
        twin.run(operation)
        if step % 4 == 0:
            twin.check()
    twin.check()


@given(cuts=st.lists(st.integers(1, 120), min_size=1, max_size=6), residual_length=st.sampled_from([0, 32]))
def test_the_stored_bytes_do_not_depend_on_how_tokens_were_fed(cuts: list[int], residual_length: int) -> None:
    total = sum(cuts)
    key, value = random_states(1, HEADS, total, HEAD_DIM, seed=7)
    at_once, in_pieces = Int8Layer(residual_length), Int8Layer(residual_length)
    at_once.update(key, value)
    start = 0
    for cut in cuts:
        in_pieces.update(key[:, :, start : start + cut], value[:, :, start : start + cut])
        start += cut
    assert at_once.pages is not None
    assert in_pieces.pages is not None
    assert at_once.pages.num_pages == in_pieces.pages.num_pages == max(0, (total - residual_length) // PAGE_SIZE)
    assert torch.equal(at_once.pages.key_tail, in_pieces.pages.key_tail)
    if at_once.pages.num_pages:
        for ours, theirs in zip(stored(at_once.pages), stored(in_pieces.pages), strict=True):
            assert torch.equal(ours, theirs)


@given(
    accepted=st.lists(st.integers(1, 9), min_size=10, max_size=30),
    rejected=st.lists(st.integers(0, 32), min_size=30, max_size=30),
)
def test_rejected_drafts_up_to_residual_length_leave_no_trace(accepted: list[int], rejected: list[int]) -> None:
    total = sum(accepted)
    key, value = random_states(1, HEADS, total, HEAD_DIM, seed=8)
    wrong_key, wrong_value = random_states(1, HEADS, 32, HEAD_DIM, seed=9)
    plain, drafted = Int8Layer(), Int8Layer()
    start = 0
    for count, draft in zip(accepted, rejected, strict=False):
        new = slice(start, start + count)
        plain.update(key[:, :, new], value[:, :, new])
        drafted.update(
            torch.cat([key[:, :, new], wrong_key[:, :, :draft]], dim=2),
            torch.cat([value[:, :, new], wrong_value[:, :, :draft]], dim=2),
        )
        drafted.crop(-draft)
        start += count
    assert plain.pages is not None
    assert drafted.pages is not None
    assert torch.equal(plain.pages.restore()[0][:, :, drafted.pages.num_pages * PAGE_SIZE :], drafted.pages.key_tail)
    pages = min(plain.pages.num_pages, drafted.pages.num_pages)
    if pages:
        for ours, theirs in zip(stored(plain.pages), stored(drafted.pages), strict=True):
            assert torch.equal(ours[:pages], theirs[:pages])


@pytest.mark.parametrize("device", devices())
def test_segments_never_move_over_a_thousand_tokens(device: str) -> None:
    layer = Int8Layer()
    key, value = random_states(1, HEADS, 200, HEAD_DIM, device=device)
    layer.update(key, value)
    assert layer.pages is not None
    addresses: dict[int, list[int]] = {}
    for step in range(1000):
        layer.update(key[:, :, step % 200, None], value[:, :, step % 200, None])
        for index, segment in enumerate(layer.pages.segments):
            now = [part.data_ptr() for part in segment]
            assert addresses.setdefault(index, now) == now
    assert len(addresses) > 2
    assert layer.get_seq_length() == 1200


def test_the_first_update_returns_its_arguments() -> None:
    layer = Int8Layer()
    key, value = random_states(1, HEADS, 200, HEAD_DIM)
    returned = layer.update(key, value)
    assert returned[0] is key
    assert returned[1] is value


def test_the_callers_prompt_is_not_kept_alive() -> None:
    layer = Int8Layer()
    key, value = random_states(1, HEADS, 70, HEAD_DIM)
    layer.update(key, value)
    assert layer.pages is not None
    kept = {layer.pages.key_tail.untyped_storage().data_ptr(), layer.pages.value_tail.untyped_storage().data_ptr()}
    assert kept.isdisjoint({key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()})


def test_a_chunk_sees_itself_exactly() -> None:
    layer = Int8Layer()
    key, value = random_states(1, HEADS, 500, HEAD_DIM)
    layer.update(key[:, :, :200], value[:, :, :200])
    seen_key, _ = layer.update(key[:, :, 200:], value[:, :, 200:])
    assert torch.equal(dense(seen_key)[:, :, 128:], key[:, :, 128:])


def test_a_view_stays_what_it_was_while_tokens_are_appended() -> None:
    layer = Int8Layer()
    key, value = random_states(1, HEADS, 400, HEAD_DIM)
    layer.update(key[:, :, :170], value[:, :, :170])
    seen_key, seen_value = layer.update(key[:, :, 170:171], value[:, :, 170:171])
    before = dense(seen_key).clone(), dense(seen_value).clone()
    for token in range(171, 400):
        layer.update(key[:, :, token, None], value[:, :, token, None])
    assert torch.equal(dense(seen_key), before[0])
    assert torch.equal(dense(seen_value), before[1])


@pytest.mark.parametrize(("head_dim", "limit"), [(64, 0.57), (128, 0.55)])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_memory_stays_below_the_limit_at_2048_tokens(head_dim: int, limit: float, one_by_one: bool) -> None:
    key, value = random_states(1, 2, 2048, head_dim, dtype=torch.bfloat16)
    layer, exact = Int8Layer(), DynamicLayer()
    exact.update(key, value)
    for part in range(2048) if one_by_one else [slice(None)]:
        new = slice(part, part + 1) if isinstance(part, int) else part
        layer.update(key[:, :, new], value[:, :, new])
    assert layer.nbytes <= limit * (exact.keys.nbytes + exact.values.nbytes)


def test_nbytes_counts_every_tensor_the_layer_holds() -> None:
    layer = Int8Layer()
    for step in range(5):
        layer.update(*random_states(2, HEADS, 90, HEAD_DIM, seed=step))
    assert layer.pages is not None
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for part in (*(p for s in layer.pages.segments for p in s), layer.pages.key_tail, layer.pages.value_tail)
    }
    assert layer.nbytes == sum(storages.values())


def test_slack_is_never_read() -> None:
    key, value = random_states(1, HEADS, 300, HEAD_DIM)
    layer = Int8Layer()
    layer.update(key, value)
    layer.crop(-60)
    assert layer.pages is not None
    before = dense(layer.keys), dense(layer.values)
    for segment in layer.pages.segments:
        used = layer.pages.num_pages
        segment.key_qdata[used:] = segment.value_qdata[used:] = -128
        segment.key_metadata[used:] = segment.value_metadata[used:] = 0x7FC0  # NaN as bfloat16
    query, _ = random_states(1, HEADS, 1, HEAD_DIM, seed=5)
    output = reads.attention(query, layer.pages.view())
    assert output.isfinite().all()
    assert torch.equal(dense(layer.keys), before[0])
    assert torch.equal(dense(layer.values), before[1])


def test_the_layer_is_the_hosts_type_and_inherits_no_behaviour() -> None:
    methods = {name for name, value in vars(DynamicLayer).items() if callable(value)} | {
        "offload",
        "prefetch",
        "reorder_cache",
    }
    for kind in (Int8Layer, Int8SlidingLayer):
        assert issubclass(kind, CacheLayerMixin)
        ours = [base for base in kind.__mro__ if base.__module__.startswith("quantcache.")]
        assert methods <= {name for base in ours for name in vars(base)}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("how", ["plain", "copied", "offloaded", "reordered offloaded", "edited offloaded"])
@pytest.mark.parametrize("make", [Int8Layer, lambda: StaticInt8Layer(500)], ids=["growing", "fixed"])
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(
    make: Callable[[], BaseInt8Layer], how: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTCACHE_BACKEND", backend)
    key, value = random_states(2, HEADS, 450, HEAD_DIM)
    layer, plain = make(), make()
    with torch.inference_mode():
        layer.update(key[:, :, :300].clone(), value[:, :, :300].clone())
        layer.crop(-20)
        if how == "copied":
            layer = copy.deepcopy(layer)
        if "offloaded" in how:
            layer.pages.offload()
            layer.pages.fetch()
        if "reordered" in how:
            layer.reorder_cache(torch.tensor([1, 0]))
        if "edited" in how:
            layer.pages.replace(*layer.pages.restore())
    if "reordered" in how:
        layer.reorder_cache(torch.tensor([1, 0]))
    for tokens in (slice(280, 281), slice(281, 400), slice(400, 450)):
        layer.update(key[:, :, tokens], value[:, :, tokens])
    layer.crop(-10)
    plain.update(key[:, :, :440], value[:, :, :440])
    for have, want in zip(layer.pages.restore(), plain.pages.restore(), strict=True):
        assert torch.equal(have, want)
    layer.reset()
    layer.update(key, value)


def test_gradients_reach_the_new_tokens() -> None:
    key, value = random_states(1, HEADS, 200, HEAD_DIM)
    layer = Int8Layer()
    layer.update(key, value)
    new_key, new_value = (s.requires_grad_() for s in random_states(1, HEADS, 2, HEAD_DIM, seed=3))
    query = random_states(1, HEADS, 2, HEAD_DIM, seed=4)[0].requires_grad_()
    with pytest.warns(UserWarning, match="gradients are enabled, and stop"):
        seen_key, seen_value = layer.update(new_key, new_value)
    torch.nn.functional.scaled_dot_product_attention(query, seen_key, seen_value).sum().backward()
    exact_key = torch.cat([dense(seen_key).detach()[:, :, :200], new_key.detach()], dim=2).requires_grad_()
    exact_value = torch.cat([dense(seen_value).detach()[:, :, :200], new_value.detach()], dim=2).requires_grad_()
    exact_query = query.detach().requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(exact_query, exact_key, exact_value).sum().backward()
    torch.testing.assert_close(new_key.grad, exact_key.grad[:, :, 200:])
    torch.testing.assert_close(new_value.grad, exact_value.grad[:, :, 200:])
    torch.testing.assert_close(query.grad, exact_query.grad)


@pytest.mark.parametrize("make", [Int8Layer, lambda: StaticInt8Layer(200, offloading=True)])
def test_exact_keys_are_what_they_were_in_a_backward_pass_after_later_tokens(make: Callable[[], Any]) -> None:
    """Queries alone carry gradients, as with an adapter on ``q_proj``; torch refuses tensors that changed since."""
    key, value = random_states(1, HEADS, 46, HEAD_DIM)
    query = random_states(1, HEADS, 1, HEAD_DIM, seed=4)[0].requires_grad_()
    layer, outputs = make(), []
    layer.update(key[:, :, :40], value[:, :, :40])
    for token in range(40, 46):
        states = layer.update(key[:, :, token : token + 1], value[:, :, token : token + 1])
        outputs.append(torch.nn.functional.scaled_dot_product_attention(query, *states).sum())
    torch.stack(outputs).sum().backward()
    ours, query.grad = query.grad, None
    for stop in range(41, 47):
        torch.nn.functional.scaled_dot_product_attention(query, key[:, :, :stop], value[:, :, :stop]).sum().backward()
    torch.testing.assert_close(ours, query.grad)
