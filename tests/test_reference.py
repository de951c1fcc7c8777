"""Does the specification keep its own promises?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantcache.quantization import reference, scheme
from quantcache.quantization.options import AttentionOptions
from tests.bounds import assert_within, attention_bound, cast_bound
from tests.strategies import DTYPES, broken, kv_states, make_states, random_states

KEYS = (reference.quantize_key_pages, reference.restore_key_pages, -2)
VALUES = (reference.quantize_value_pages, reference.restore_value_pages, -1)


def scale_like(states: Tensor, metadata: Tensor, shared_axis: int) -> Tensor:
    """The scale of each element of (batch, num_kv_heads, T, head_dim) states."""
    scale, _ = reference.unpack_metadata(metadata)
    pages = scale.unsqueeze(shared_axis).expand(*scale.shape[:3], scheme.PAGE_SIZE, states.shape[-1])
    return reference.join_pages(pages)


@pytest.mark.parametrize(("quantize", "restore", "axis"), [KEYS, VALUES], ids=["keys", "values"])
@given(states=kv_states())
def test_restored_states_lie_within_half_a_scale(quantize, restore, axis, states: Tensor) -> None:
    qdata, metadata = quantize(states)
    scale = scale_like(states, metadata, axis)
    restored = restore(qdata, metadata, torch.float32)
    assert_within(restored, states, 0.5 * scale.double(), unit=scale)


@pytest.mark.parametrize(("quantize", "restore", "axis"), [KEYS, VALUES], ids=["keys", "values"])
@given(states=kv_states())
def test_restoring_to_the_source_dtype_adds_only_the_cast(quantize, restore, axis, states: Tensor) -> None:
    qdata, metadata = quantize(states)
    scale = scale_like(states, metadata, axis)
    restored = restore(qdata, metadata, states.dtype)
    assert restored.isfinite().all()
    assert_within(restored, states, cast_bound(states, 0.5 * scale), unit=scale)


@pytest.mark.parametrize(("quantize", "restore", "axis"), [KEYS, VALUES], ids=["keys", "values"])
@given(states=kv_states())
def test_the_scale_is_no_wider_than_the_data_needs(quantize, restore, axis, states: Tensor) -> None:
    _, metadata = quantize(states)
    scale, _ = reference.unpack_metadata(metadata)
    pages = reference.split_pages(states).double()
    low, high = pages.amin(axis), pages.amax(axis)
    needed = torch.maximum((high - low) / scheme.MAX_STEPS, torch.maximum(high.abs(), low.abs()) / scheme.MAX_ABS_STEPS)
    # bfloat16 rounds up by at most 2 ** -7 of the scale; the rest is float32 rounding of the quotients.
    assert (scale.double() <= needed.clamp_min(scheme.MIN_SCALE) * (1 + 2**-7 + 1e-3)).all()


@given(states=kv_states(), exponent=st.integers(-8, 8))
def test_a_power_of_two_moves_only_the_scale(states: Tensor, exponent: int) -> None:
    states = states.float().clamp(-1e30, 1e30)
    states = torch.where(states.abs() < 1e-25, 0.0, states)
    for quantize in (reference.quantize_key_pages, reference.quantize_value_pages):
        qdata, metadata = quantize(states)
        moved_qdata, moved_metadata = quantize(states * 2.0**exponent)
        scale, zero_point = reference.unpack_metadata(metadata)
        moved_scale, moved_zero_point = reference.unpack_metadata(moved_metadata)
        assert torch.equal(qdata, moved_qdata)
        assert torch.equal(zero_point, moved_zero_point)
        floor = torch.tensor(scheme.MIN_SCALE)
        assert torch.equal(torch.where(scale == floor, floor, scale * 2.0**exponent), moved_scale)


@given(states=kv_states())
def test_quantising_restored_states_again_moves_them_by_at_most_half_a_scale(states: Tensor) -> None:
    qdata, metadata = reference.quantize_key_pages(states)
    restored = reference.restore_key_pages(qdata, metadata, torch.float32)
    again_qdata, again_metadata = reference.quantize_key_pages(restored)
    again = reference.restore_key_pages(again_qdata, again_metadata, torch.float32)
    scale = scale_like(states, again_metadata, -2)
    assert_within(again, restored, 0.5 * scale.double(), unit=scale)


@pytest.mark.parametrize(("quantize", "restore", "axis"), [KEYS, VALUES], ids=["keys", "values"])
@given(states=kv_states(), seed=st.integers(0, 99))
def test_finite_states_lie_within_half_a_scale_whatever_is_beside_them(
    quantize, restore, axis, states: Tensor, seed: int
) -> None:
    states = broken(states, seed)
    qdata, metadata = quantize(states)
    scale = scale_like(states, metadata, axis)
    restored = restore(qdata, metadata, torch.float32)
    assert restored.isfinite().all()
    expected = torch.where(states.isfinite(), states.float(), restored)
    assert_within(restored, expected, 0.5 * scale.double(), unit=scale)


@pytest.mark.parametrize(("quantize", "restore", "axis"), [KEYS, VALUES], ids=["keys", "values"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_stored_as_an_end_of_its_group(quantize, restore, axis, dtype: torch.dtype) -> None:
    """+inf as the largest finite number, -inf and NaN as the smallest, and in a group without one as zero."""
    states = broken(make_states("normal", (2, 3, 128, 8), dtype, seed=1))
    pages = reference.split_pages(states).movedim(axis, -1)
    groups = pages.reshape(-1, pages.shape[-1]).clone()
    for group in groups:
        finite = group[group.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        group[group == torch.inf], group[~(group > -torch.inf)] = high, low
    settled = reference.join_pages(groups.view(pages.shape).movedim(-1, axis))
    assert settled.isfinite().all()
    assert torch.equal(settled[states.isfinite()], states[states.isfinite()])
    for ours, theirs in zip(quantize(states), quantize(settled), strict=True):
        assert torch.equal(ours, theirs)


def test_zeros_restore_to_exact_zeros() -> None:
    states = torch.zeros(1, 1, 64, 8)
    assert torch.equal(reference.restore_key_pages(*reference.quantize_key_pages(states), torch.float32), states)
    assert torch.equal(reference.restore_value_pages(*reference.quantize_value_pages(states), torch.float32), states)


def test_one_huge_channel_leaves_the_other_keys_their_own_step() -> None:
    states = make_states("normal", (1, 1, 64, 8), torch.float32, seed=3)
    states[..., 5] += 150.0
    restored = reference.restore_key_pages(*reference.quantize_key_pages(states), torch.float32)
    error = (restored - states).abs().amax(dim=-2).flatten()
    # A normal channel spans less than 8 in 64 draws: half of 8 / 254, rounded up to bfloat16, is below 0.016.
    assert error[torch.arange(8) != 5].max() < 0.016


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("v_head_dim", [16, 24])
def test_quantised_attention_stays_within_the_bound(group: int, v_head_dim: int) -> None:
    key, _ = random_states(2, 2, 192, 16, seed=1)
    value, _ = random_states(2, 2, 192, v_head_dim, seed=2)
    query, _ = random_states(2, 2 * group, 5, 16, seed=3, dtype=torch.float64)
    key_qdata, key_metadata = reference.quantize_key_pages(key)
    value_qdata, value_metadata = reference.quantize_value_pages(value)
    options = AttentionOptions(is_causal=True, softmax_scale=0.25)
    exact = reference.attend(query, key, value, options)
    restored = reference.attend(
        query,
        reference.restore_key_pages(key_qdata, key_metadata, torch.float32),
        reference.restore_value_pages(value_qdata, value_metadata, torch.float32),
        options,
    )
    key_scale, value_scale = (reference.unpack_metadata(m)[0] for m in (key_metadata, value_metadata))
    bound = attention_bound(query, 0.25, key_scale, value_scale, value)
    error = float((restored - exact).abs().max())
    assert 0 < error <= bound


def test_attend_equals_torch_attention() -> None:
    query, _ = random_states(2, 6, 7, 16, seed=1, dtype=torch.float64)
    key, value = random_states(2, 2, 20, 16, seed=2, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 20) > 0.3
    mask[..., 0] = True
    additive = torch.randn(2, 6, 7, 20, dtype=torch.float64)
    for attn_mask in (None, mask, additive):
        ours = reference.attend(query, key, value, AttentionOptions(attn_mask, softmax_scale=0.3))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_causality_and_window_are_the_masks_they_name() -> None:
    query, _ = random_states(1, 2, 4, 8, seed=1, dtype=torch.float64)
    key, value = random_states(1, 2, 10, 8, seed=2, dtype=torch.float64)
    position, key_position = torch.arange(6, 10)[:, None], torch.arange(10)[None]
    mask = (key_position <= position) & (key_position > position - 3)
    by_rule = reference.attend(query, key, value, AttentionOptions(is_causal=True, window=3))
    by_mask = reference.attend(query, key, value, AttentionOptions(mask))
    assert torch.equal(by_rule, by_mask)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    query, _ = random_states(1, 1, 2, 8)
    key, value = random_states(1, 1, 5, 8, seed=1)
    mask = torch.tensor([[False] * 5, [True] * 5])
    output = reference.attend(query, key, value, AttentionOptions(mask))
    assert (output[0, 0] == 0).all()
    assert (output[0, 1] != 0).all()


def test_softcap_bounds_the_logits_and_sinks_take_probability() -> None:
    query, _ = random_states(1, 2, 1, 8, dtype=torch.float64)
    key, _ = random_states(1, 2, 6, 8, seed=1, dtype=torch.float64)
    value = torch.ones(1, 2, 6, 8, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    output = reference.attend(query, key, value, AttentionOptions(softmax_scale=1.0, softcap=2.0, sinks=sinks))
    logits = 2.0 * torch.tanh((query @ key.transpose(-1, -2)) / 2.0)
    mass = logits.exp().sum(-1) / (logits.exp().sum(-1) + sinks.exp()[None, :, None])
    torch.testing.assert_close(output[..., 0], mass.transpose(1, 2), rtol=1e-12, atol=0)
