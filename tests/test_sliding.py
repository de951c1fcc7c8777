"""Does a window in int8 hold what transformers' own sliding layer would show its queries, in bounded memory?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from quantcache import QuantizedInt8Cache
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import MAX_NATIVE_WINDOW, PAGE_SIZE
from tests.bounds import assert_within
from tests.strategies import Operation, random_states, schedules
from tests.twins import HEAD_DIM, HEADS, ExactTwin, dense, stored


@given(
    operations=schedules(),
    window=st.sampled_from([2, 64, 100, 300]),
    residual_length=st.sampled_from([0, 32]),
    records=st.booleans(),
)
def test_any_schedule_holds_the_window_of_the_exact_tokens(
    operations: list[Operation], window: int, residual_length: int, records: bool
) -> None:
    twin = ExactTwin(Int8SlidingLayer(window, residual_length))
    if records:
        twin.layer.activate_past_recording()
    for operation in operations:
        twin.run(operation)
    twin.check()


@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize("chunk", [1, 50, 200])
def test_queries_see_at_least_what_transformers_own_layer_shows(window: int, chunk: int) -> None:
    ours, theirs = Int8SlidingLayer(window), DynamicSlidingWindowLayer(window)
    for step in range(600 // chunk):
        key, value = random_states(1, HEADS, chunk, HEAD_DIM, seed=step)
        _, our_offset = ours.get_mask_sizes(chunk)
        their_length, their_offset = theirs.get_mask_sizes(chunk)
        seen, expected = ours.update(key, value), theirs.update(key, value)
        assert our_offset <= their_offset
        for one, other in zip(seen, expected, strict=True):
            newest = dense(one)[:, :, their_offset - our_offset :]
            assert newest.shape[2] == their_length == other.shape[2]
            # N(0, 1) over 64 tokens or 8 channels spans less than 10, in 254 steps
            bound = torch.full_like(newest, 10 / 254)
            assert_within(newest, other, bound, unit=bound)


def test_a_prompt_beyond_the_window_is_stored_no_further_than_the_window_reaches() -> None:
    layer, whole = Int8SlidingLayer(256), ExactTwin(Int8SlidingLayer(256))
    key, value = random_states(1, HEADS, 5000, HEAD_DIM)
    returned = layer.update(key, value)
    assert returned[0] is key
    assert layer.pages is not None
    assert layer.get_seq_length() == 5000
    assert layer.pages.first_page == (5000 - 255 - 32) // PAGE_SIZE
    for start in range(0, 5000, 50):
        new = slice(start, start + 50)
        whole.layer.update(key[:, :, new], value[:, :, new])
    assert whole.layer.pages is not None
    skipped = layer.pages.first_page - whole.layer.pages.first_page
    for at_once, in_pieces in zip(stored(layer.pages), stored(whole.layer.pages), strict=True):
        assert torch.equal(at_once, in_pieces[skipped:])


def test_memory_stays_bounded_over_ten_windows() -> None:
    layer, full = Int8SlidingLayer(2048), []
    key, value = random_states(1, HEADS, 1024, HEAD_DIM)
    for _ in range(20):
        layer.update(key, value)
        full.append(layer.nbytes)
    assert max(full[3:]) <= full[3] + full[0] / 4


def test_views_outlive_the_pages_they_show() -> None:
    layer = Int8SlidingLayer(64)
    layer.update(*random_states(1, HEADS, 200, HEAD_DIM))
    seen, _ = layer.update(*random_states(1, HEADS, 1, HEAD_DIM, seed=1))
    before = dense(seen).clone()
    for step in range(300):
        layer.update(*random_states(1, HEADS, 1, HEAD_DIM, seed=step))
    assert torch.equal(dense(seen), before)


@pytest.mark.parametrize("seq_len", [100, 1500, 4000])
def test_conversion_keeps_the_window(seq_len: int) -> None:
    window = MAX_NATIVE_WINDOW + 100
    native = DynamicSlidingWindowLayer(window)
    for step in range(seq_len // 50):
        native.update(*random_states(1, HEADS, 50, HEAD_DIM, seed=step))
    exact = DynamicCache()
    exact.layers = [native]
    cache = QuantizedInt8Cache.from_dynamic(exact)
    layer = cache.layers[0]
    assert isinstance(layer, Int8SlidingLayer)
    assert layer.get_seq_length() == seq_len
    back = cache.to_dynamic().layers[0]
    assert type(back) is DynamicSlidingWindowLayer
    assert back.get_mask_sizes(1) == native.get_mask_sizes(1)
    bound = torch.full_like(native.keys, 10 / 254)
    assert_within(back.keys, native.keys, bound, unit=bound)
    assert_within(back.values, native.values, bound, unit=bound)


def test_a_recorded_past_can_be_taken_back_and_is_let_go_at_the_next_crop() -> None:
    layer = Int8SlidingLayer(100)
    layer.update(*random_states(1, HEADS, 400, HEAD_DIM))
    layer.activate_past_recording()
    layer.update(*random_states(1, HEADS, 500, HEAD_DIM, seed=1))
    assert layer.pages is not None
    held = layer.nbytes
    layer.crop(-450)
    assert layer.get_seq_length() == 450
    assert layer.pages.first_page * PAGE_SIZE <= 450 - 99
    layer.update(*random_states(1, HEADS, 500, HEAD_DIM, seed=2))
    layer.crop(0)
    assert layer.nbytes < held
