"""Stored keys and values for the tests of the operations, and how far their attention may be from the specification."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView

SAFETY = 8
"""Float32 roundings allowed per sum, in eps of the sum of magnitudes: float32 matmuls of these sizes need 2 to 3."""


@dataclass(frozen=True)
class Case:
    """One call of ``reads.attention``.

    Attributes:
        segments: pages in each segment.
        transposed: query and tail as transformers hands them over, (batch, tokens, heads, head_dim) transposed.
    """

    batch: int = 1
    num_kv_heads: int = 2
    group: int = 1
    query_len: int = 1
    segments: tuple[int, ...] = (2,)
    tail_len: int = 33
    head_dim: int = 64
    v_head_dim: int = 64
    dtype: torch.dtype = torch.float32
    transposed: bool = False

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def kv_len(self) -> int:
        return sum(self.segments) * PAGE_SIZE + self.tail_len


@dataclass(frozen=True)
class Stored:
    """Arguments of ``reads.attention``, and the numbers they stand for in float64."""

    query: Tensor
    key_qdata: list[Tensor]
    key_metadata: list[Tensor]
    value_qdata: list[Tensor]
    value_metadata: list[Tensor]
    key_tail: Tensor
    value_tail: Tensor

    @cached_property
    def view(self) -> PagesView:
        parts = zip(self.key_qdata, self.key_metadata, self.value_qdata, self.value_metadata, strict=True)
        return PagesView(ClosedPages(tuple(Segment(*each) for each in parts)), self.key_tail, self.value_tail)

    @property
    def arguments(self) -> tuple[Tensor, PagesView]:
        return self.query, self.view

    def exact(self) -> tuple[Tensor, Tensor]:
        """Restored keys and values, float64."""
        dense = []
        for restore, qdata, metadata, tail in (
            (reference.restore_key_pages, self.key_qdata, self.key_metadata, self.key_tail),
            (reference.restore_value_pages, self.value_qdata, self.value_metadata, self.value_tail),
        ):
            pages = [restore(q, m, torch.float32) for q, m in zip(qdata, metadata, strict=True)]
            dense.append(torch.cat([*pages, tail.float()], dim=2).double())
        return dense[0], dense[1]


def build(case: Case, seed: int = 0) -> Stored:
    """Random states of ``case``, with a bias in some key channels as Qwen2 has it."""
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int, tokens: int, width: int) -> Tensor:
        made = torch.randn(case.batch, tokens, heads, width, generator=generator).transpose(1, 2)
        made = made.to(case.dtype)
        return made if case.transposed else made.contiguous()

    keys: tuple[list[Tensor], list[Tensor]] = ([], [])
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pages in case.segments:
        key = states(case.num_kv_heads, pages * PAGE_SIZE, case.head_dim)
        key[..., ::7] += 5.0
        value = states(case.num_kv_heads, pages * PAGE_SIZE, case.v_head_dim)
        for lists, made in ((keys, reference.quantize_key_pages(key)), (values, reference.quantize_value_pages(value))):
            for target, tensor in zip(lists, made, strict=True):
                # A slack page of the segment behind the used ones, which must never be read.
                whole = torch.full((pages + 1, *tensor.shape[1:]), -128, dtype=tensor.dtype)
                if tensor.dtype == torch.int16:
                    whole[pages:] = 0x7FC0
                whole[:pages] = tensor
                target.append(whole[:pages])
    return Stored(
        states(case.num_q_heads, case.query_len, case.head_dim),
        *keys,
        *values,
        states(case.num_kv_heads, case.tail_len, case.head_dim),
        states(case.num_kv_heads, case.tail_len, case.v_head_dim),
    )


def attention_bound(stored: Stored, expected: Tensor, softmax_scale: float, eps: float) -> Tensor:
    """Largest |output - expected| allowed per element, for sums whose terms are rounded to ``eps``.

    A logit is a difference of sums over ``softmax_scale * |query_d| * scale_d * (|code| + |zero_point|)``, which bounds
    its rounding by ``delta``; the output then moves by ``expm1(2 * delta) * max|value|`` and by the rounding of its own
    sums, and by the cast to its dtype.
    """
    key_size = stored.key_tail.double().abs().amax().item() if stored.key_tail.numel() else 0.0
    value_size = stored.value_tail.double().abs().amax().item() if stored.value_tail.numel() else 0.0
    for metadata in stored.key_metadata:
        scale, zero_point = reference.unpack_metadata(metadata)
        key_size = max(key_size, (scale * (128 + zero_point.abs())).amax().item())
    for metadata in stored.value_metadata:
        scale, zero_point = reference.unpack_metadata(metadata)
        value_size = max(value_size, (scale * (128 + zero_point.abs())).amax().item())
    delta = SAFETY * eps * softmax_scale * stored.query.double().abs().sum(-1).amax() * key_size
    out = torch.finfo(stored.query.dtype)
    cast = (0.5 * out.eps if out.eps > 1e-6 else 0.0) * expected.abs() + out.smallest_normal
    return torch.expm1(2 * delta) * value_size + SAFETY * eps * value_size + cast


def assert_within(output: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Raises with the worst element and its place, in units of the bound."""
    error = (output.double() - expected.double()).abs()
    assert not error.isnan().any(), f"NaN at {error.isnan().nonzero()[0].tolist()}"
    excess = error / bound
    worst = int(excess.argmax())
    place = torch.unravel_index(torch.tensor(worst), excess.shape)
    assert excess.flatten()[worst] <= 1, f"{excess.flatten()[worst]:.3g} bounds at {tuple(map(int, place))}"


def asked_of_cuda(stored: Stored, tolerance: float, **options: Any) -> Tensor:
    """The CUDA backend's output, which is the specification's in float64 over the restored states.

    Args:
        stored: what is attended to.
        tolerance: largest ||output - expected|| / ||expected||.
        options: of ``AttentionOptions``.
    """
    key, value = stored.exact()
    asked = AttentionOptions(**options)
    device = stored.query.device
    expected = reference.attend(stored.query.double(), key.to(device), value.to(device), asked)
    output = reads.attention(*stored.arguments, asked)  # type: ignore[arg-type]
    assert output.dtype == stored.query.dtype
    assert output.is_contiguous()
    error = (output.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"
    return output
