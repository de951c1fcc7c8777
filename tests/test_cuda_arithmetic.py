"""Is the arithmetic that the CUDA kernels rest on exact? Tried on every mantissa, on the CPU, in the kernels' order."""

import pytest
import torch
from torch import Tensor

from quantcache.quantization.scheme import MAX_ABS_STEPS, MAX_STEPS

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
