"""Does each backend equal the reference, and each operation its schema?"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from quantcache.store.fixed import StaticInt8Pages
from quantcache.store.growing import Int8Pages, PagesView
from tests.conftest import devices
from tests.strategies import DTYPES, make_states, random_states


@pytest.fixture(params=sorted(dispatch.BACKENDS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one backend; those that do not run on the test's device are skipped."""
    device = request.node.callspec.params.get("device", "cpu")
    if request.param not in ("torch", device):
        pytest.skip(f"{request.param} does not run on {device}")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, request.param)
    return request.param


def filled(
    seq_len: int, *, batch: int = 2, heads: int = 2, head_dim: int = 16, v_head_dim: int = 24, **kind: object
) -> PagesView:
    """A view over several segments and a tail."""
    dtype, device = kind.get("dtype", torch.float32), kind.get("device", "cpu")
    key, _ = random_states(batch, heads, seq_len, head_dim, seed=1, dtype=dtype, device=device)
    value, _ = random_states(batch, heads, seq_len, v_head_dim, seed=2, dtype=dtype, device=device)
    pages = Int8Pages(key, value)
    for part in range(0, seq_len, 130):
        pages.append(key[:, :, part : part + 130], value[:, :, part : part + 130])
    return pages.view()


def expected_attention(view: PagesView, query: Tensor, **options: Any) -> Tensor:
    """The specification in float64 over the restored states."""
    keys = [reference.restore_key_pages(s.key_qdata, s.key_metadata, torch.float32) for s in view.segments]
    values = [reference.restore_value_pages(s.value_qdata, s.value_metadata, torch.float32) for s in view.segments]
    key = torch.cat([*keys, view.key_tail.float()], dim=2)
    value = torch.cat([*values, view.value_tail.float()], dim=2)
    return reference.attend(query.double(), key, value, AttentionOptions(**options))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "constant", "huge_channel", "grid", "any_bits", "offset", "top"])
def test_stored_pages_equal_the_reference_bit_for_bit(backend: str, kind: str, dtype: torch.dtype, device: str) -> None:
    key = make_states(kind, (2, 192, 3, 16), dtype, seed=5).to(device).transpose(1, 2)
    value = make_states(kind, (2, 3, 192, 24), dtype, seed=6).to(device)
    pages = Int8Pages(key, value, residual_length=0)
    pages.append(key, value)
    (segment,) = pages.segments
    expected = (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))
    for ours, theirs in zip(segment, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_states_equal_the_reference(backend: str, dtype: torch.dtype, device: str) -> None:
    view = filled(400, dtype=dtype, device=device)
    assert len(view.segments) > 1
    keys = [reference.restore_key_pages(s.key_qdata, s.key_metadata, dtype) for s in view.segments]
    values = [reference.restore_value_pages(s.value_qdata, s.value_metadata, dtype) for s in view.segments]
    assert torch.equal(reads.restore(view, True), torch.cat([*keys, view.key_tail], dim=2))
    assert torch.equal(reads.restore(view, False), torch.cat([*values, view.value_tail], dim=2))


SHAPES = [(1, 1), (1, 3), (5, 1), (5, 4)]  # query_len, query heads per KV head
OPTIONS = ["none", "causal", "padding", "bool", "bool_per_head", "additive", "window", "softcap", "sinks", "all"]


def options_for(name: str, query: Tensor, kv_len: int) -> dict[str, object]:
    """Keyword arguments of ops.attention for one named case."""
    batch, num_q_heads, query_len, _ = query.shape
    generator = torch.Generator().manual_seed(11)

    def random_mask(heads: int) -> Tensor:
        mask = torch.rand(batch, heads, query_len, kv_len, generator=generator) > 0.3
        mask[..., -1] = True
        return mask.to(query.device)

    padding = torch.ones(batch, 1, 1, kv_len, dtype=torch.bool, device=query.device)
    padding[0, ..., :70] = False
    additive = torch.randn(batch, 1, query_len, kv_len, generator=generator).to(query)
    sinks = torch.randn(num_q_heads, generator=generator).to(query)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "padding": {"attn_mask": padding, "is_causal": True},
        "bool": {"attn_mask": random_mask(1)},
        "bool_per_head": {"attn_mask": random_mask(num_q_heads)},
        "additive": {"attn_mask": additive},
        "window": {"is_causal": True, "window": 75},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": sinks},
        "all": {
            "attn_mask": additive,
            "is_causal": True,
            "window": 150,
            "softcap": 3.0,
            "sinks": sinks,
            "softmax_scale": 0.1,
        },
    }[name]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_equals_the_reference(backend: str, option: str, dtype: torch.dtype, device: str) -> None:
    for (query_len, group), seq_len in itertools.product(SHAPES, (40, 300)):
        view = filled(seq_len, dtype=dtype, device=device)
        query, _ = random_states(2, 2 * group, query_len, 16, seed=3, dtype=dtype, device=device)
        options = options_for(option, query, view.seq_len)
        output = reads.attention(query, view, AttentionOptions(**options))
        assert output.dtype == dtype
        assert output.is_contiguous()
        expected = expected_attention(view, query, **options)
        # Inputs are rounded to dtype once (keys, values, query weights), the output once more.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("pages", [0, 1, 3])
@pytest.mark.parametrize("tail", [0, 1, 96])
def test_pages_and_tail_of_any_length(backend: str, pages: int, tail: int) -> None:
    if pages == tail == 0:
        pytest.skip("nothing to attend to")
    key, value = random_states(1, 2, pages * 64 + tail, 16)
    held = Int8Pages(key, value, residual_length=0 if tail < 64 else 96)
    if pages:
        held.residual_length = 0
        held.append(key[:, :, : pages * 64], value[:, :, : pages * 64])
        held.residual_length = 96
    if tail:
        held.append(key[:, :, pages * 64 :], value[:, :, pages * 64 :])
    view = held.view()
    assert (view.num_pages, view.key_tail.shape[2]) == (pages, tail)
    query, _ = random_states(1, 4, 1, 16, seed=3)
    torch.testing.assert_close(
        reads.attention(query, view).double(), expected_attention(view, query), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gets_zeros(backend: str, dtype: torch.dtype, device: str) -> None:
    view = filled(300, dtype=dtype, device=device)
    query, _ = random_states(2, 4, 3, 16, seed=3, dtype=dtype, device=device)
    mask = torch.ones(2, 1, 3, 300, dtype=torch.bool, device=device)
    mask[1, :, 2] = False
    for attn_mask in (mask, torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)):
        output = reads.attention(query, view, AttentionOptions(attn_mask))
        assert (output[1, 2] == 0).all()
        assert (output[1, 1] != 0).any()
        assert output.isfinite().all()


def test_operations_keep_their_schemas() -> None:
    view = filled(300)
    query, _ = random_states(2, 4, 3, 16, seed=3)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    packed = reads.packed(view)
    torch.library.opcheck(
        torch.ops.quantcache.attention, (query, *packed, None, True, 0.25, None, None, None), test_utils=tests
    )
    for is_key in (True, False):
        torch.library.opcheck(torch.ops.quantcache.restore, (*packed, torch.float32, is_key), test_utils=tests)
    key, value = random_states(2, 2, 64, 16)
    fresh = Int8Pages(key, value, residual_length=0)
    fresh.append(key, value)
    torch.library.opcheck(torch.ops.quantcache.store_pages, (key, value, *fresh.segments[0]), test_utils=tests)
    fixed = StaticInt8Pages(key, value, 300)
    fixed.append(key, value)
    step = key[:, :, :1], value[:, :, :1], fixed.memory, fixed.layout.shape, torch.float32
    torch.library.opcheck(torch.ops.quantcache.advance, step, test_utils=tests)
    source = key, value, torch.tensor([0, 64, 64, 0], dtype=torch.int32)
    none = key[:, :, :0], value[:, :, :0], *step[2:]
    torch.library.opcheck(torch.ops.quantcache.advance, (*none, *source), test_utils=tests)
    recorded = [fixed.memory, torch.zeros(0, dtype=torch.int32)], fixed.layout.shape
    torch.library.opcheck(
        torch.ops.quantcache.attention, (query, *recorded, None, True, 0.25, None, None, None), test_utils=tests
    )
    torch.library.opcheck(torch.ops.quantcache.restore, (*recorded, torch.float32, True), test_utils=tests)


def test_a_gradient_to_the_query_is_that_of_attention_over_restored_states(backend: str) -> None:
    view = filled(300, v_head_dim=16)
    query = random_states(2, 4, 3, 16, seed=3)[0].requires_grad_()
    reads.attention(query, view, AttentionOptions(is_causal=True)).square().sum().backward()
    again = query.detach().double().requires_grad_()
    expected_attention(view, again, is_causal=True).square().sum().backward()
    torch.testing.assert_close(query.grad, again.grad.float(), rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "tpu")
    with pytest.raises(ValueError, match=r"QUANTCACHE_BACKEND: must be one of .*torch.*, got 'tpu'"):
        dispatch.choose_backend(torch.device("cpu"))
