"""Does NaN or infinity under a mask, as models in float16 leave it in left padding, reach what is seen?"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache.backends import dispatch
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from tests.conftest import devices
from tests.strategies import random_states

LAYERS: dict[str, Callable[[], BaseInt8Layer]] = {
    "growing": Int8Layer,
    "fixed": lambda: StaticInt8Layer(400),
    "window": lambda: Int8SlidingLayer(300),
}

PADDING = 40


@pytest.fixture(params=sorted(dispatch.BACKENDS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one backend; those that do not run on the test's device are skipped."""
    device = request.node.callspec.params["device"]
    if request.param not in ("torch", device):
        pytest.skip(f"{request.param} does not run on {device}")
    if request.param == "cpu" and dispatch.cpu_backend.unavailable():
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, request.param)
    return request.param


def padding(dtype: torch.dtype | None, kv_len: int, device: str) -> Tensor:
    """A mask that hides the first ``PADDING`` tokens of the first of two sequences: bool, or added in ``dtype``."""
    seen = torch.ones(2, 1, 1, kv_len, dtype=torch.bool, device=device)
    seen[0, ..., :PADDING] = False
    return seen if dtype is None else torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("mask_dtype", [None, torch.float32], ids=str)
def test_what_is_hidden_need_not_be_finite_once_its_page_is_closed(
    backend: str, kind: str, dtype: torch.dtype, bad: float, mask_dtype: torch.dtype | None, device: str
) -> None:
    """Token by token or at once, every later answer is bit for bit that of finite padding."""
    key, value = random_states(2, 2, 200, 16, seed=1, dtype=dtype, device=device)
    query, _ = random_states(2, 4, 1, 16, seed=2, dtype=dtype, device=device)
    outputs = []
    for filler in (0.0, bad):
        key[0, :, :PADDING], value[0, :, 3:PADDING] = filler, filler
        for prompt in (50, 160):
            layer = LAYERS[kind]()
            layer.update(key[:, :, :prompt], value[:, :, :prompt])
            for position in range(prompt, 200):
                newest = slice(position, position + 1)
                states, _ = layer.update(key[:, :, newest], value[:, :, newest])
            view = states.pages_view  # type: ignore[attr-defined]
            assert view.num_pages == 2
            mask = padding(mask_dtype, view.seq_len, device)
            outputs.append(reads.attention(query, view, AttentionOptions(mask)))
    assert outputs[0].isfinite().all()
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mask_dtype", [None, torch.float16], ids=str)
def test_an_exact_token_is_hidden_where_torchs_attention_over_exact_states_hides_it(
    backend: str, kind: str, mask_dtype: torch.dtype | None, device: str
) -> None:
    """Its logit is -inf before the mask, as of an infinity in one channel of a key that has overflown."""
    key, value = random_states(2, 2, 160, 16, seed=1, dtype=torch.float16, device=device)
    query, _ = random_states(2, 2, 1, 16, seed=2, dtype=torch.float16, device=device)
    query[..., 3] = 1.0
    layer = LAYERS[kind]()
    layer.update(key[:, :, :110], value[:, :, :110])
    key[0, :, 150, 3] = -torch.inf
    states, values = layer.update(key[:, :, 110:], value[:, :, 110:])
    view = states.pages_view  # type: ignore[attr-defined]
    mask = padding(mask_dtype, view.seq_len, device)
    mask[0, ..., 150] = False if mask_dtype is None else -torch.inf
    dense = (part.restore()[:, :, : view.seq_len] for part in (states, values))  # type: ignore[attr-defined]
    expected = scaled_dot_product_attention(query, *dense, attn_mask=mask)
    assert expected.isfinite().all()
    output = reads.attention(query, view, AttentionOptions(mask)).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=4e-3, atol=4e-3)
