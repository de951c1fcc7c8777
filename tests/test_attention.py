"""Is an int8 key routed to int8 attention, anything else left alone, and no fallback silent?"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from quantcache import FallbackError, FallbackWarning, Int8Tensor, QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers import routing
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.store.read_log import FallbackPolicy
from quantcache.store.states import ReadOnlyTensor
from tests.conftest import compiler_warnings
from tests.strategies import random_states

HEADS, GROUP, HEAD_DIM = 2, 3, 16


class Module(nn.Module):
    """What an attention function reads of the calling module."""

    num_key_value_groups = GROUP
    is_causal = True


def int8_pair(seq_len: int = 300, *, strict: bool = False, batch: int = 2) -> tuple[Int8Layer, Int8Tensor, Int8Tensor]:
    layer = Int8Layer(policy=FallbackPolicy(strict))
    key, value = random_states(batch, HEADS, seq_len, HEAD_DIM, seed=1)
    layer.update(key[:, :, :-5], value[:, :, :-5])
    key, value = layer.update(key[:, :, -5:], value[:, :, -5:])
    assert isinstance(key, Int8Tensor)
    return layer, key, value


def query(query_len: int = 1) -> torch.Tensor:
    return random_states(2, HEADS * GROUP, query_len, HEAD_DIM, seed=2)[0]


def restored(key: Int8Tensor, value: Int8Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return key.restore(), value.restore()


@pytest.fixture
def installed() -> None:
    routing.install()


@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
def test_sdpa_over_int8_equals_sdpa_over_the_restored_states(installed: None, query_len: int, masked: str) -> None:
    layer, key, value = int8_pair()
    mask = torch.ones(2, 1, query_len, 300, dtype=torch.bool).tril(300 - query_len)
    mask[0, ..., :70] = False
    if masked == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if masked == "none":
        query_len, mask = 1, None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ours, weights = sdpa(Module(), query(query_len), key, value, mask, scaling=0.2)
    theirs, _ = sdpa(Module(), query(query_len), *restored(key, value), mask, scaling=0.2)
    assert weights is None
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert layer.read_log.kernel == dispatch.choose_backend(torch.device("cpu"))


def test_flash_arguments_mean_what_the_flash_function_means(installed: None) -> None:
    _, key, value = int8_pair()
    padding = torch.ones(2, 300, dtype=torch.long)
    padding[0, :70] = 0
    flash = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    ours, _ = flash(Module(), query(5), key, value, padding, scaling=0.2, sliding_window=90, softcap=4.0)
    dense_key, dense_value = restored(key, value)
    position, key_position = torch.arange(295, 300)[:, None], torch.arange(300)[None]
    allowed = (key_position <= position) & (position - key_position < 90) & padding.bool()[:, None, None]
    logits = 0.2 * query(5) @ dense_key.repeat_interleave(GROUP, 1).transpose(-1, -2)
    weights = (4.0 * torch.tanh(logits / 4.0)).masked_fill(~allowed, -torch.inf).softmax(-1)
    theirs = (weights @ dense_value.repeat_interleave(GROUP, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_direct_sdpa_reads_int8_with_torchs_own_alignment(is_causal: bool) -> None:
    layer, key, value = int8_pair()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ours = sdpa(query(5), key, value, is_causal=is_causal, enable_gqa=True)
    theirs = sdpa(query(5), *restored(key, value), is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert layer.read_log.reason is None


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize(
    "operation",
    [
        lambda k: k[:, :, 3:10],
        lambda k: k.transpose(1, 2).reshape(-1),
        lambda k: k.repeat_interleave(2, dim=1),
        lambda k: torch.matmul(torch.ones(1, HEAD_DIM), k.transpose(2, 3)),
        lambda k: torch.cat([k, k], dim=2),
        lambda k: k.to(torch.float64),
        lambda k: k.clone(),
        lambda k: k.sum().item(),
        lambda k: (k == k).all(),
        lambda k: torch.nn.functional.pad(k, [0, 1]),
    ],
)
def test_every_other_operation_sees_the_restored_values(operation) -> None:
    _, key, _ = int8_pair()
    dense = key.restore()
    ours, theirs = operation(key), operation(dense)
    if isinstance(ours, torch.Tensor):
        shares_memory = theirs.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
        assert type(ours) is (ReadOnlyTensor if shares_memory else torch.Tensor)
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_shapes_are_read_without_restoring() -> None:
    layer, key, _ = int8_pair(strict=True)
    assert key.shape == (2, HEADS, 300, HEAD_DIM)
    assert (key.size(2), key.dim(), key.numel()) == (300, 4, 2 * HEADS * 300 * HEAD_DIM)
    assert (key.dtype, key.device) == (torch.float32, torch.device("cpu"))
    assert repr(key).startswith("Int8Tensor(keys, shape=(2, 2, 300, 16), dtype=torch.float32, device=cpu, pages=")
    assert layer.read_log.reason is None


def test_cached_states_are_read_only() -> None:
    _, key, _ = int8_pair()
    with pytest.raises(NotImplementedError, match=r"Int8Tensor: cached states are read-only, got aten::mul_"):
        key.mul_(2)


def test_a_fallback_warns_once_and_is_reported() -> None:
    cache = QuantizedInt8Cache()
    key, value = random_states(2, HEADS, 300, HEAD_DIM)
    cache.update(key, value, 0)
    seen, _ = cache.update(key[:, :, :1], value[:, :, :1], 0)
    with pytest.warns(FallbackWarning, match=r"restoring it to full precision \(aten::clone on cached states\)"):
        seen.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.clone()
    (row,) = cache.report().layers
    assert (row.kernel, row.reason) == ("restored", "aten::clone on cached states")
    assert "aten::clone on cached states" in str(cache.report())


def test_a_strict_cache_raises_instead() -> None:
    _, key, _ = int8_pair(strict=True)
    with pytest.raises(FallbackError, match="every read must be int8 attention, got aten::clone on cached states"):
        key.clone()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "sdpa: the option dropout"),
        ({"output_attentions": True}, "sdpa: the option output_attentions"),
        ({"attention_mask": torch.ones(2, 300, dtype=torch.bool)}, "sdpa: a mask of 2 axes"),
    ],
)
def test_what_int8_attention_lacks_is_named(installed: None, options: dict[str, object], reason: str) -> None:
    _, key, value = int8_pair(strict=True)
    with pytest.raises(FallbackError, match=reason):
        ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query(), key, value, **{"attention_mask": None, **options})


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("query_len", [1, 5])
def test_a_position_bias_is_added_to_the_mask(installed: None, mask: str, query_len: int) -> None:
    if mask == "none" and query_len > 1:
        pytest.skip("sdpa takes a missing mask for that of a static cache's prompt")
    layer, key, value = int8_pair(strict=True)
    bias = torch.randn(1, HEADS * GROUP, query_len, 300)
    allowed = torch.ones(2, 1, query_len, 300, dtype=torch.bool).tril(300 - query_len)
    allowed[1, ..., :70] = False
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    options = {"none": None, "bool": allowed, "float": additive}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ours, _ = sdpa(Module(), query(query_len), key, value, options[mask], position_bias=bias)
    theirs, _ = sdpa(Module(), query(query_len), *restored(key, value), options[mask], position_bias=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert layer.read_log.reason is None


@pytest.mark.parametrize("query_len", [1, 5])
def test_flex_arguments_mean_what_the_flex_function_means(installed: None, query_len: int) -> None:
    layer, key, value = int8_pair(strict=True)

    def visible(batch: Tensor, head: Tensor, position: Tensor, key_position: Tensor) -> Tensor:
        position = position + 300 - query_len
        return (key_position <= position) & (position - key_position < 90) & ((batch == 0) | (key_position >= 250))

    block_mask = create_block_mask(visible, 2, None, query_len, 300, device="cpu")
    sinks = torch.randn(HEADS * GROUP)
    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    ours, _ = flex(Module(), query(query_len), key, value, block_mask, scaling=0.2, softcap=4.0, s_aux=sinks)
    dense_key, dense_value = restored(key, value)
    position, key_position = torch.arange(300 - query_len, 300)[:, None], torch.arange(300)[None]
    allowed = (key_position <= position) & (position - key_position < 90)
    allowed = torch.stack([allowed, allowed & (key_position >= 250)])[:, None]
    logits = 0.2 * query(query_len) @ dense_key.repeat_interleave(GROUP, 1).transpose(-1, -2)
    logits = (4.0 * torch.tanh(logits / 4.0)).masked_fill(~allowed, -torch.inf)
    logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(2, -1, query_len, 1)], dim=-1)
    theirs = (logits.softmax(-1)[..., :-1] @ dense_value.repeat_interleave(GROUP, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert layer.read_log.reason is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_may_mix_dtypes(installed: None, dtype: torch.dtype) -> None:
    key, value = random_states(2, HEADS, 300, HEAD_DIM)
    layer, plain = Int8Layer(), Int8Layer()
    plain.update(key.to(dtype), value.to(dtype))
    with torch.autocast("cpu", dtype):
        layer.update(key, value.to(dtype))  # keys that were rotated in float32
        pair = layer.update(key[:, :, :1], value[:, :, :1].to(dtype))
        ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query(), *pair, None)
        direct = torch.nn.functional.scaled_dot_product_attention(query(), *pair, enable_gqa=True)
    expected = plain.update(key[:, :, :1].to(dtype), value[:, :, :1].to(dtype))
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query().to(dtype), *expected, None)
    assert torch.equal(ours, theirs)
    assert torch.equal(direct.transpose(1, 2), theirs)
    assert layer.read_log.reason is None


@pytest.mark.parametrize("config", [None, LlamaConfig(num_hidden_layers=1)])
def test_autocast_may_mix_dtypes_from_the_first_token_on(config: LlamaConfig | None) -> None:
    key, value = random_states(2, HEADS, 300, HEAD_DIM)
    cache = QuantizedInt8Cache(config)
    with torch.autocast("cpu", torch.bfloat16):
        cache.update(key, value.bfloat16(), 0)
    assert cache.layers[0].dtype == torch.bfloat16
    assert cache.get_seq_length() == 300


def test_plain_tensors_reach_the_original_untouched() -> None:
    seen = []

    def spy(module, query, key, value, attention_mask=None, **kwargs):
        seen.append((module, query, key, value, attention_mask, kwargs))
        return query, None

    original = AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("sdpa", spy)
    try:
        routing.install()
        module, states = Module(), torch.ones(1)
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, states, states, states, None, scaling=0.5, anything=1)
        assert seen == [(module, states, states, states, None, {"scaling": 0.5, "anything": 1})]
        routing.uninstall()
        assert AttentionInterface._global_mapping["sdpa"] is spy
    finally:
        AttentionInterface.register("sdpa", original)


def test_uninstall_puts_the_originals_back_and_caches_go_on_working() -> None:
    before = dict(AttentionInterface._global_mapping)
    cache = QuantizedInt8Cache()
    assert dict(AttentionInterface._global_mapping) != before
    QuantizedInt8Cache()  # a second cache wraps nothing twice
    routing.uninstall()
    assert dict(AttentionInterface._global_mapping) == before

    key, value = random_states(2, HEADS, 300, HEAD_DIM)
    cache.update(key, value, 0)
    pair = cache.update(key[:, :, :1], value[:, :, :1], 0)
    ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query(), *pair, None)
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query(), *restored(*pair), None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_uninstall_leaves_a_later_registration_alone() -> None:
    routing.install()
    wrapper = AttentionInterface._global_mapping["sdpa"]
    original = wrapper.__wrapped__

    def later(*args, **kwargs):
        return wrapper(*args, **kwargs)

    AttentionInterface.register("sdpa", later)
    try:
        with pytest.warns(UserWarning, match="stays, and may still call them: sdpa"):
            routing.uninstall()
        assert AttentionInterface._global_mapping["sdpa"] is later
    finally:
        AttentionInterface.register("sdpa", original)


CHOSEN = {
    "its own": lambda one, other: one,
    "doubled": lambda one, other: (one[0], 2 * one[1]),
    "of another layer": lambda one, other: (one[0], other[1]),
    "for one another": lambda one, other: (one[1], one[0]),
    "keys alone": lambda one, other: (one[0], one[0]),
}


@compiler_warnings
@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_attention_is_over_the_keys_and_values_it_is_given(installed: None, kind: str, compiled: bool) -> None:
    capacity = 200
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mask = (torch.arange(capacity if kind == "fixed" else 151) < 151)[None, None, None]
    for choose in CHOSEN.values():
        layers = [Int8Layer() if kind == "growing" else StaticInt8Layer(capacity) for _ in range(4)]
        for index, layer in enumerate(layers):
            layer.update(*random_states(2, HEADS, 150, HEAD_DIM, seed=index % 2))
        new = random_states(2, HEADS, 1, HEAD_DIM, seed=9)

        def step(query: torch.Tensor, one: Any, other: Any, choose: Any = choose, new: Any = new) -> torch.Tensor:
            key, value = choose(one.update(*new), other.update(*new))
            return sdpa(Module(), query, key, value, mask)[0]

        torch._dynamo.reset()
        run = torch.compile(step, backend="aot_eager", fullgraph=kind == "fixed", dynamic=False) if compiled else step
        with torch.no_grad():
            given = choose(*(tuple(states.clone() for states in layer.update(*new)) for layer in layers[2:]))
            dense = [states[:, :, :151].repeat_interleave(GROUP, dim=1) for states in given]
            expected = torch.nn.functional.scaled_dot_product_attention(query(), *dense).transpose(1, 2)
            torch.testing.assert_close(run(query(), *layers[:2]), expected, rtol=1e-5, atol=1e-6)
