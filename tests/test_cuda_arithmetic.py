"""Is the arithmetic that the CUDA kernels rest on exact? Tried on every mantissa, on the CPU, in the kernels' order."""

import pytest
import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.scheme import MAX_ABS_STEPS, MAX_STEPS, PAGE_SIZE
from tests.strategies import DTYPES, broken, make_states

MANTISSA_BITS = {torch.bfloat16: 8, torch.float16: 11}
ROUNDER = 12582912.0


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c``, rounded once: float64 holds the product of two float32 numbers."""
    return (a.double() * b.double() + c.double()).float()


@pytest.mark.parametrize("divisor", [MAX_STEPS, MAX_ABS_STEPS])
def test_division_by_a_constant_is_that_of_ieee(divisor: int) -> None:
    """``divided`` of pages/affine.cuh: powers of two scale both sides alike, so one exponent stands for all."""
    states = torch.arange(1 << 23, dtype=torch.int32).add_(0x3F800000).view(torch.float32)
    inverse, whole = torch.tensor(1.0) / divisor, torch.tensor(float(divisor))
    quotient = states * inverse
    assert torch.equal(fused(fused(-quotient, whole, states), inverse, quotient), states / divisor)


@pytest.mark.parametrize("dtype", MANTISSA_BITS)
@pytest.mark.parametrize("ulps", [-1, 0, 1], ids="inverse off by {} ulp".format)
def test_sixteen_bit_states_round_as_their_exact_quotients(dtype: torch.dtype, ulps: int) -> None:
    """``Affine.steps`` of pages/affine.cuh, its inverse an ulp off, as rcp.approx may be (PTX ISA, "rcp")."""
    bits = MANTISSA_BITS[dtype]
    scale = torch.arange(128, 256).float()
    inverse = ((1 / scale).view(torch.int32) + ulps).view(torch.float32)
    correction = fused(-scale, inverse, torch.ones(())) * inverse
    for exponent in range(-bits - 4, 23 - bits + 8):
        states = torch.arange(1 << bits - 1, 1 << bits).float()[:, None] * 2.0**exponent
        found = fused(states, inverse, states * correction) + ROUNDER - ROUNDER
        # Twice the distance to the multiple below, in units that are integers.
        whole = (states.double() / scale).floor()
        rest = 2 * (states.double() - whole * scale)
        expected = whole + ((rest > scale) | ((rest == scale) & (whole % 2 == 1))).double()
        assert torch.equal(found.double()[expected <= MAX_ABS_STEPS], expected[expected <= MAX_ABS_STEPS])


def finite_range(states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``FourRanges`` of pages/elements.cuh: of nothing finite the range is inverted, and loses against any other."""
    finite = states.isfinite()
    return torch.where(finite, states, torch.inf).amin(dim), torch.where(finite, states, -torch.inf).amax(dim)


def or_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(low <= high, low, 0.0), torch.where(low <= high, high, 0.0)


def within(states: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.fmin(torch.fmax(states, low), high)


def warp_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last axis, as integers in the order of floats; a NaN is the canonical one."""

    def ordered(bits: Tensor) -> Tensor:
        return bits ^ (bits >> 31 & 0x7FFFFFFF)

    ends = [torch.where(end.isnan(), torch.nan, end).view(torch.int32) for end in (low, high)]
    reduced = ordered(ends[0]).amin(-1), ordered(ends[1]).amax(-1)
    return ordered(reduced[0]).view(torch.float32), ordered(reduced[1]).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "top", "tiny", "any_bits"])
def test_states_that_are_not_finite_meet_the_range_that_the_reference_gives_them(kind: str, dtype: torch.dtype) -> None:
    """``store_keys`` and ``store_values`` of pages/store.cuh, from the threads' ranges to the states they round."""
    page = broken(make_states(kind, (2, 3, PAGE_SIZE, 96), dtype, seed=4)).float().flatten(0, 1)
    threads = page.view(-1, 8, 8, 24, 4)  # page, token of a thread, thread of tokens, thread of channels, channel
    low, high = threads.amin(1), threads.amax(1)
    has_others = ~(low.abs().maximum(high.abs()) < torch.inf).all(-1, keepdim=True)
    own = finite_range(threads, 1)
    low, high = torch.where(has_others, own[0], low), torch.where(has_others, own[1], high)
    low, high = (end[:, None, None] for end in or_zero(low.amin(1), high.amax(1)))
    settled = torch.where(has_others[:, None], within(threads, low, high), threads)
    for ours, theirs in zip((settled, low, high), reference.within_finite(page, 1), strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)

    low, high = warp_range(page.view(-1, 64, 24, 4).amin(-1), page.view(-1, 64, 24, 4).amax(-1))
    has_others = ~(low.abs().maximum(high.abs()) < torch.inf)[..., None]
    own = or_zero(*warp_range(*finite_range(page.view(-1, 64, 24, 4), -1)))
    low, high = (
        torch.where(has_others, new[..., None], end[..., None]) for new, end in zip(own, (low, high), strict=True)
    )
    settled = torch.where(has_others, within(page, low, high), page)
    for ours, theirs in zip((settled, low, high), reference.within_finite(page, 2), strict=True):
        assert torch.equal(ours, theirs)
